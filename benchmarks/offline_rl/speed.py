"""How long an update of RQL takes, here and in the official JAX code, on the same machine, by turns.

    python benchmarks/offline_rl/speed.py --official CLONE --official-python JAX_ENVIRONMENT/bin/python

CLONE is a clone of github.com/aoberai/rql, JAX_ENVIRONMENT an environment with jax, flax, optax, distrax, ml_collections and
einops. Without them ours alone is measured. Writes `results/speed.json` and the table in README.md.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from counterflow.data import Windows
from counterflow.experiments.evaluate import machine
from counterflow.files import write_json
from counterflow.learning.bc import choose_precision
from counterflow.learning.offline import Sizes
from counterflow.learning.rql import RQLConfig, RQLLearner

HERE = Path(__file__).parent
SIZES = Sizes(observation=28, action=5, horizon=5)
CONFIG = RQLConfig(alpha=10.0, expectile=0.9, rho=0.5)
BLOCKS = 5


@dataclass(frozen=True)
class Arguments:
    """Time RQL's update."""

    official: Path | None = None
    """A clone of the official code."""
    official_python: Path | None = None
    """The interpreter of an environment in which it runs."""
    updates: int = 20
    """In a block; five blocks a turn."""
    turns: int = 3
    """How often each is measured."""
    seeds: tuple[int, ...] = (1,)
    """How many seeds are trained side by side; on a GPU 1 and 8 are asked for."""
    device: str = "cpu"
    """Where ours computes."""


def main() -> None:
    """Measure by turns, and write what was found."""
    arguments = tyro.cli(Arguments)
    console = Console()
    device = torch.device(arguments.device)
    precisions = ["float32"] + (["bfloat16"] if choose_precision("auto", device) == "bfloat16" else [])
    found: dict[str, list[float]] = {}
    versions: dict[str, Any] = {}
    learners = {
        f"ours, {precision}, {count} seed{'s' if count > 1 else ''}": make(precision, count, device)
        for precision in precisions
        for count in arguments.seeds
    }
    for turn in range(arguments.turns):
        if arguments.official is not None and arguments.official_python is not None:
            official = time_official(arguments.official_python, arguments.official, arguments.updates)
            found.setdefault("official (JAX)", []).extend(official["milliseconds"])
            versions |= {"jax": official["jax"], "jax_device": official["device"]}
        for name, learner in learners.items():
            found.setdefault(name, []).extend(time_ours(learner, arguments.updates))
        medians = {name: f"{statistics.median(values):.0f} ms" for name, values in found.items()}
        console.log(f"turn {turn + 1}: {medians}")
    result = {"machine": {**machine(), **versions}, "threads": torch.get_num_threads(), "milliseconds": found}
    write_json(HERE / "results" / "speed.json", result)


def make(precision: Any, seeds: int, device: torch.device) -> RQLLearner:
    """Make a learner of the official sizes."""
    return RQLLearner(SIZES, replace(CONFIG, precision=precision), list(range(seeds)), device)


def time_ours(learner: RQLLearner, updates: int) -> list[float]:
    """Return milliseconds an update, one number a block, after the compilation."""
    rng, device = torch.Generator().manual_seed(0), learner.device
    shape = (len(learner.seeds), CONFIG.batch_size, SIZES.horizon + 1)
    batch = Windows(
        observations=torch.randn((*shape, SIZES.observation), generator=rng).to(device),
        actions=(torch.rand((*shape, SIZES.action), generator=rng) * 2 - 1).to(device),
        rewards=-torch.ones(shape, device=device),
        terminals=torch.zeros(shape, device=device),
        masks=torch.ones(shape, device=device),
    )

    def no_starts(count: int, _: torch.Generator) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.long, device=device)

    def run(count: int) -> None:
        done = 0
        while done < count:
            rows = learner.block(no_starts)[: count - done]
            for _ in rows:
                learner.update(batch)
            done += len(rows)
        if device.type == "cuda":
            torch.cuda.synchronize()

    run(3)
    milliseconds = []
    for _ in range(BLOCKS):
        began = time.perf_counter()
        run(updates)
        milliseconds.append(1000 * (time.perf_counter() - began) / updates)
    return milliseconds


def time_official(python: Path, clone: Path, updates: int) -> dict[str, Any]:
    """Return what `official_rql.py` measures in a process of its own."""
    command = [str(python), str(HERE / "official_rql.py"), str(clone), str(updates)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


if __name__ == "__main__":
    main()
