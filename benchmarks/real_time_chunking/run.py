"""Real-time chunking: do steered chunks join, when each is computed while the one before it is being executed?

    python benchmarks/real_time_chunking/run.py

Of every chunk of five actions three are executed; the next chunk is computed from what was seen before the last of them, so its
first action comes too late and the old chunk's fourth is executed in its place. Written: how far the command jumps where one
chunk takes over from the other, how far it moves between two actions of one chunk, and how often the task is solved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

from counterflow.experiments.evaluate import ReasonerSettings, load_prior, machine, open_env
from counterflow.experiments.statistics import SuccessRate
from counterflow.files import write_between, write_json
from counterflow.random import RowGenerators, child_seed
from counterflow.reasoners import to_reference
from counterflow.steering import Continuation, ContinueChunk, FlowReversal, Guidance, Plan, SteeredPolicy

HERE = Path(__file__).parent
TASKS = ("ogbench/cube-single-task1", "ogbench/cube-single-task4")
EXECUTED, DELAY, STEPS = 3, 1, 5
GUIDANCES: dict[str, Guidance | None] = {
    "none": None,
    "identity": ContinueChunk(jacobian="identity"),
    "exact": ContinueChunk(jacobian="exact"),
}


@dataclass(frozen=True)
class Arguments:
    """Run the real-time chunking benchmark."""

    episodes: int = 25
    """Episodes of each variant on each task."""
    seed: int = 0
    """What they descend from."""


def main() -> None:
    """Run everything and write the results and the table."""
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(1)
    console = Console()
    found = []
    for task in TASKS:
        for steered in (False, True):
            for name, guidance in GUIDANCES.items():
                one = play(task, steered, guidance, arguments.episodes, arguments.seed)
                found.append({"task": task, "steering": "FRS" if steered else "base", "continuation": name, **one})
                console.log(found[-1])
    content = {
        "machine": machine(),
        "executed": EXECUTED,
        "delay": DELAY,
        "episodes": arguments.episodes,
        "seed": arguments.seed,
        "results": found,
    }
    write_json(HERE / "results.json", content)
    report(found)


def play(task: str, steered: bool, guidance: Guidance | None, episodes: int, seed: int) -> dict[str, Any]:
    """Play episodes of one variant, all at once, and return what was measured."""
    prior = load_prior(task)
    start = FlowReversal(steps=STEPS) if steered else None
    policy = SteeredPolicy(prior, start=start, guidance=guidance, steps=STEPS)
    settings = ReasonerSettings()
    seeds = [child_seed(seed, "episode", index) for index in range(episodes)]
    joins, inside, solved = [], [], np.zeros(episodes, bool)
    with open_env(task, episodes, num_envs=episodes) as env:
        reasoners = [settings.maker(task)() for _ in seeds]
        for reasoner, one in zip(reasoners, seeds, strict=True):
            reasoner.reset(child_seed(one, "reasoner"))
        noise = RowGenerators([child_seed(one, "policy") for one in seeds])
        batch = env.reset([child_seed(one, "environment") for one in seeds])
        playing = np.ones(episodes, bool)
        old: Plan | None = None
        while playing.any():
            reference = None
            if steered:
                directions = [reasoner.decide(batch.view(row)) for row, reasoner in enumerate(reasoners)]
                reference = to_reference(directions, policy.action_spec, settings.writing())
            continuation = None if old is None else Continuation.of(old.chunk, EXECUTED, DELAY)
            new = policy.act(torch.from_numpy(batch.observation), reference, noise, continuation=continuation)
            actions = new.actions.numpy()[:, :EXECUTED].copy()
            if old is not None:
                late = old.actions.numpy()[:, EXECUTED : EXECUTED + DELAY]
                actions[:, :DELAY] = late
                joins.append(np.linalg.norm(actions[:, DELAY] - late[:, -1], axis=1)[playing])
            inside.append(np.linalg.norm(np.diff(new.actions.numpy(), axis=1), axis=2).mean(1)[playing])
            batch = env.execute(actions, rows=np.flatnonzero(playing).tolist())
            solved |= playing & batch.success
            playing &= ~batch.done
            old = new
    return {
        "successes": int(solved.sum()),
        "episodes": episodes,
        "jump_at_joins": float(np.concatenate(joins).mean()),
        "step_inside_chunks": float(np.concatenate(inside).mean()),
    }


def report(found: list[dict[str, Any]]) -> None:
    """Write the table into the README."""
    lines = ["| steering | continuation | jump where chunks join | step inside a chunk | success |"]
    lines += ["| --- | --- | ---: | ---: | ---: |"]
    for steering in ("base", "FRS"):
        for name in GUIDANCES:
            rows = [one for one in found if (one["steering"], one["continuation"]) == (steering, name)]
            jump, step = (np.mean([one[key] for one in rows]) for key in ("jump_at_joins", "step_inside_chunks"))
            rate = SuccessRate(sum(one["successes"] for one in rows), sum(one["episodes"] for one in rows))
            low, high = rate.interval.low, rate.interval.high
            lines.append(
                f"| {steering} | {name} | {jump:.3f} | {step:.3f} | {100 * rate.rate:.0f} ({100 * low:.0f}-{100 * high:.0f}) |"
            )
    write_between(HERE / "README.md", "table", "benchmarks/real_time_chunking/run.py", "\n".join(lines))


if __name__ == "__main__":
    main()
