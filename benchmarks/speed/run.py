"""How fast the prior trains and how much stepping environments side by side gains.

    python benchmarks/speed/run.py DATA

DATA is a cube-single dataset, made by `counterflow collect ogbench/cube-single`. Writes `results.json` beside this file.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from counterflow.envs import make_env
from counterflow.experiments.evaluate import ReasonerSettings, evaluate, load_prior, machine
from counterflow.experiments.train import train_bc
from counterflow.files import write_json
from counterflow.learning import BCConfig
from counterflow.learning.bc import choose_precision

HERE = Path(__file__).parent
ENV = "ogbench/cube-single-task4"


@dataclass(frozen=True)
class Arguments:
    """Run the speed benchmark."""

    data: tyro.conf.Positional[Path]
    """A cube-single dataset (.npz)."""
    steps: int = 12_000
    """Updates of the training."""
    repeats: int = 3
    """Repeats of each evaluation; the median is reported."""


def measure_training(data: Path, steps: int, precision: Literal["bfloat16", "float32"]) -> dict[str, Any]:
    """Train a 4 x 512 prior with batch 512 and say how long it took, compilation included."""
    folder = Path(tempfile.mkdtemp())
    try:
        trained = train_bc(data, "ogbench/cube-single", folder / "run", BCConfig(steps=steps, precision=precision))
    finally:
        shutil.rmtree(folder)
    return {
        "precision": precision,
        "updates": steps,
        "seconds": round(trained.seconds, 1),
        "updates_per_second": round(steps / trained.seconds, 1),
        "held_out_loss": round(trained.validation_loss, 5),
    }


def measure_evaluation(num_envs: int, workers: int, episodes: int, repeats: int) -> dict[str, Any]:
    """Evaluate Flow Reversal Steering and the base policy; return environment steps a second of wall-clock."""
    prior = load_prior(ENV)
    rates: dict[str, list[float]] = {"base": [], "frs": []}
    with make_env(ENV, num_envs, workers=workers) as env:
        for _ in range(repeats):
            for method, values in rates.items():
                result = evaluate(env, prior, method, episodes, seed=0, reasoner=ReasonerSettings())
                values.append(result.environment_steps / result.seconds)
    return {
        "environments": num_envs,
        "worker_processes": workers,
        "episodes": episodes,
        "steps_per_second": {method: round(statistics.median(values)) for method, values in rates.items()},
    }


def main() -> None:
    """Measure and write."""
    arguments = tyro.cli(Arguments)
    console = Console()
    began = time.perf_counter()
    # Where the processor has no instructions for bfloat16 it is emulated, and nobody would choose it.
    precisions = sorted(
        {choose_precision("auto", torch.device("cpu")), choose_precision("float32", torch.device("cpu"))}
    )
    training = [measure_training(arguments.data, arguments.steps, precision) for precision in precisions]
    console.print(training)
    torch.set_num_threads(1)  # as the command line does: the policy is small, and the cores are the simulators'
    # One environment in the caller's process, as a simple loop would have it, against the default.
    single = measure_evaluation(1, 0, 16, arguments.repeats)
    vectorised = measure_evaluation(16, 2, 32, arguments.repeats)
    gain = {
        method: round(vectorised["steps_per_second"][method] / single["steps_per_second"][method], 2)
        for method in single["steps_per_second"]
    }
    result = {
        "machine": {**machine(), "processor": _processor(), "threads": torch.get_num_threads()},
        "training": training,
        "evaluation": {"single": single, "vectorised": vectorised, "gain": gain},
        "seconds": round(time.perf_counter() - began),
    }
    write_json(HERE / "results.json", result)
    console.print(json.dumps(result, indent=1))


def _processor() -> str:
    """Return the processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
