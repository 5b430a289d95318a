"""What reversal does to a reference: on the paper's one-dimensional toy, and on references of real tasks.

    python benchmarks/reversal/run.py

takes about two minutes and writes `results.json` and the figures beside this file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from counterflow.experiments.analysis import PAPER_STEPS, analyse_reversal, gather_references
from counterflow.experiments.evaluate import load_prior, machine, open_env
from counterflow.experiments.figures import Marginals, RoundTrip, paths_1d, reversal_analysis
from counterflow.files import write_json
from counterflow.flow import GaussianMixtureField
from counterflow.flow.solvers import trajectory

HERE = Path(__file__).parent
TASKS = ("ogbench/cube-single-task4", "ogbench/scene-task4", "ogbench/puzzle-3x3-task4")
REFERENCES = 64
TOY_STEPS = (3, 5, 10, 50)
TOY_REFERENCES = (-3.2, -0.6, 2.0, 3.0)


def toy_field() -> GaussianMixtureField:
    """Return the flow to modes at -2 and +2, variance 0.1, weights 0.8 and 0.2, of the FRS project page."""
    return GaussianMixtureField(
        torch.tensor([-2.0, 2.0], dtype=torch.float64), 0.1**0.5, torch.tensor([0.8, 0.2], dtype=torch.float64)
    )


def toy_marginals() -> Marginals:
    """Return the density of x_t over the toy's flow: a mixture of N(t m, (1 - t)^2 + 0.1 t^2)."""
    times, positions = np.linspace(0, 1, 121), np.linspace(-4, 4, 321)
    density = np.zeros((len(times), len(positions)))
    for mean, weight in ((-2.0, 0.8), (2.0, 0.2)):
        variance = (1 - times) ** 2 + 0.1 * times**2
        distance = positions[None] - times[:, None] * mean
        density += weight * np.exp(-(distance**2) / (2 * variance[:, None])) / np.sqrt(2 * np.pi * variance[:, None])
    return Marginals(times, positions, density)


def toy_round_trip(reference: float, steps: int) -> RoundTrip:
    """Reverse a reference in K steps and denoise it in as many."""
    field = toy_field()
    forth = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    back = forth.flip(0)
    reversed_path = trajectory(field, torch.tensor([reference], dtype=torch.float64), back)
    denoised_path = trajectory(field, reversed_path[-1], forth)
    return RoundTrip(back.numpy(), reversed_path[:, 0].numpy(), forth.numpy(), denoised_path[:, 0].numpy())


def main() -> None:
    """Draw the toy, analyse the tasks."""
    console = Console()
    panels = {f"K = {steps}": [toy_round_trip(one, steps) for one in TOY_REFERENCES] for steps in TOY_STEPS}
    console.print(paths_1d(panels, toy_marginals(), HERE / "toy.png", title="References reversed and denoised again"))
    rows = {}
    for task in TASKS:
        prior = load_prior(task)
        with open_env(task, 16) as env:
            observations, reference = gather_references(env, prior, REFERENCES, seed=0)
        found = analyse_reversal(prior, observations, reference)
        rows[task] = found.to_json()
        name = task.split("/")[1]
        figure = HERE / f"{name}.png"
        reversal_analysis(PAPER_STEPS, found.displacement, found.log_prob_gain, figure, title=f"Flow reversal, {name}")
        console.print(figure)
    write_json(HERE / "results.json", {"machine": machine(), "references": REFERENCES, "tasks": rows})
    console.print(rows)


if __name__ == "__main__":
    main()
