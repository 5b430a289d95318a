"""The demo: a frozen policy fails; told coarse directions, and steered by flow reversal, it succeeds."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from counterflow.errors import MissingDependencyError, RenderingError
from counterflow.experiments.compare import Comparison, Contender, compare, success_table
from counterflow.experiments.figures import success_bars
from counterflow.experiments.film import film
from counterflow.experiments.progress import progress_bar
from counterflow.experiments.rollout import Episode
from counterflow.files import write_json

TASKS = ("ogbench/cube-single-task1", "ogbench/puzzle-3x3-task3", "ogbench/scene-task4")
FILMED = "ogbench/scene-task4"
BASE, STEERED = "base policy", "steered (FRS)"


def demo(console: Console, out: Path, episodes: int = 8, seed: int = 0) -> Comparison:
    """Compare base and Flow Reversal Steering on three tasks; leave a table, a figure and a video in `out`.

    Args:
        console: where to say what happens.
        out: the folder.
        episodes: for each policy on each task.
        seed: what they descend from.

    Raises:
        StorageError: a file can't be written.
    """
    began = time.perf_counter()
    console.print(
        "A frozen flow policy, cloned from undirected play, doesn't know its task. A reasoner that sees the goal says one "
        "coarse direction before each chunk;\nFlow Reversal Steering turns it into an action that the policy itself would take."
    )
    contenders = [Contender(BASE, "base"), Contender(STEERED, "frs")]
    with progress_bar(console, "running", len(TASKS) * len(contenders) * episodes, "episodes") as update:
        done = 0
        what = ""

        def say(task: str, contender: Contender) -> None:
            nonlocal what
            what = f"{task}, {contender.label}"

        def count(_: Episode) -> None:
            nonlocal done
            done += 1
            update(done, what)

        comparison = compare(TASKS, contenders, episodes, seed, on_start=say, on_episode=count)
    console.print(success_table(comparison, f"Success, {episodes} episodes each (small: 95% interval)"))
    write_json(out / "results.json", {"results": comparison.results})
    groups = {task: {label: rates[task] for label, rates in comparison.rates.items()} for task in comparison.tasks}
    console.print(f"numbers  {out / 'results.json'}")
    console.print(f"figure   {success_bars(groups, out / 'success.png', title='Steered by coarse directions')}")
    try:
        with console.status(f"filming {FILMED}"):
            path = film(FILMED, out / "base-and-steered.mp4", seed=seed, tries=2)
        console.print(f"video    {path}")
    except (RenderingError, MissingDependencyError) as error:
        console.print(f"no video: {error}")
    console.print(f"{time.perf_counter() - began:.0f} seconds in all.")
    return comparison
