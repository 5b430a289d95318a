"""How often the scripted expert solves LIBERO's tasks: a table over a suite, resumable.

    python benchmarks/libero_experts/run.py --suite 90 --starts 10 --workers 2

Every task is tried from its first initial states. Each task's outcome is a line in results/<suite>.jsonl as soon as it is
known; run again, it does what is left and writes results/<suite>.md. The noise is the demonstrations'.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from counterflow.envs.libero import LiberoEnv, groups
from counterflow.errors import CounterflowError
from counterflow.experiments.workers import in_workers
from counterflow.files import replacing
from counterflow.random import child_seed
from counterflow.reasoners import oracle_expert

RESULTS = Path(__file__).parent / "results"
SOLVED = 0.8


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    suite: str = "90"
    """One of spatial, object, goal, 10, 90."""
    starts: int = 10
    """Initial states of each task."""
    noise: float = 0.1
    """Noise on the expert's motion."""
    seed: int = 0
    """What noise and places of fixtures descend from."""
    workers: int = 2
    """Processes."""
    tasks: tuple[str, ...] = ()
    """Only tasks whose names contain one of these."""


def main(settings: Settings) -> None:
    """Measure what is left, and write the table."""
    path = RESULTS / f"{settings.suite}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    asked = {"starts": settings.starts, "noise": settings.noise, "seed": settings.seed}
    done = {line["task"]: line for line in read(path) if line["settings"] == asked}
    chosen = [
        task
        for task in groups()[f"libero/{settings.suite}"]
        if not settings.tasks or any(part in task for part in settings.tasks)
    ]
    left = [task for task in chosen if task not in done]
    for task, line in in_workers(partial(measure, settings=asked), left, settings.workers):
        done[task] = line
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{sum(line['successes'])}/{settings.starts}  {task}  {line.get('error', '')}", flush=True)
    if not settings.tasks:
        with replacing(path.with_suffix(".md")) as temporary:
            temporary.write_text(table([done[task] for task in chosen], settings))


def measure(task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Try one task from its initial states; run in a worker."""
    successes: list[bool] = []
    steps: list[int] = []
    try:
        env, expert = LiberoEnv(task), oracle_expert(task, settings["noise"])
        for start in range(settings["starts"]):
            seed = child_seed(settings["seed"], task, start)
            moment = env.reset_to(start, seed)
            expert.reset(seed)
            count = 0
            while not (moment.terminated or moment.truncated):
                moment = env.step(expert.act(moment.privileged))
                count += 1
            successes.append(moment.success)
            steps.append(count)
        env.close()
    except CounterflowError as error:
        return {"task": task, "settings": settings, "successes": successes, "steps": steps, "error": str(error)}
    return {"task": task, "settings": settings, "successes": successes, "steps": steps}


def read(path: Path) -> list[dict[str, Any]]:
    """Read the lines that are whole: a kill may have cut the last one off."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def table(lines: list[dict[str, Any]], settings: Settings) -> str:
    """Return the table: a row a task, and how many count as solved."""
    solved = [line for line in lines if sum(line["successes"]) >= SOLVED * settings.starts]
    rows = [
        f"# The scripted expert on libero_{settings.suite}",
        "",
        f"`python benchmarks/libero_experts/run.py --suite {settings.suite} --starts {settings.starts} --noise "
        f"{settings.noise:g} --seed {settings.seed}`: {len(solved)} of {len(lines)} tasks solved from at least {SOLVED:.0%} of "
        f"{settings.starts} initial states.",
        "",
        "| task | solved | mean steps where solved |",
        "| --- | --- | --- |",
    ]
    for line in lines:
        taken = [steps for steps, success in zip(line["steps"], line["successes"], strict=True) if success]
        mean = f"{sum(taken) / len(taken):.0f}" if taken else ""
        rows.append(f"| {line['task'].split('/')[-1]} | {sum(line['successes'])}/{settings.starts} | {mean} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
