"""Offline RFS: residuals from corrections, anchored, with the critic on what is executed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counterflow.data import Recorded, Replay
from counterflow.errors import UnknownNameError
from counterflow.learning.corrections import CorrectionsConfig, CorrectionsLearner
from counterflow.learning.sac import ActionSizes

LIMITS = torch.tensor([0.4, 0.2])
SMALL: dict[str, Any] = {"width": 16, "depth": 1, "batch_size": 32, "compile": False}


def compose(base: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return (base + residual).clamp(-1, 1)


def corrected(worth: float = 0.0) -> Replay:
    """Corrections are always 0.5 of the bound; what is worth most (if anything is) is a residual of -0.5."""
    rng = torch.Generator().manual_seed(0)
    seen, base = torch.randn((300, 3), generator=rng), torch.rand((300, 2), generator=rng) - 0.5
    unit = 0.5 + 0.4 * torch.randn((300, 2), generator=rng)
    unit = unit.clamp(-1, 1)
    observations = torch.cat([seen, base], 1)
    recorded = Recorded(
        observations,
        unit * LIMITS,
        compose(base, unit * LIMITS),
        -worth * (unit + 0.5).square().sum(1),
        torch.zeros(300),
        observations,
        torch.arange(300),
        torch.ones(300, dtype=torch.bool),
    )
    return Replay((5, 2, 2), 2, 1, 400, recorded)


def make(**changes: Any) -> CorrectionsLearner:
    config = CorrectionsConfig(**{**SMALL, "learning_rate": 5e-3, "actor_learning_rate": 5e-3, **changes})
    return CorrectionsLearner(ActionSizes(5, LIMITS, 2), config, [0, 1], base=2, compose=compose)


@pytest.mark.parametrize("anchor", ["residual", "executed"])
def test_without_values_it_does_as_was_corrected(anchor: str) -> None:
    learner = make(anchor=anchor, alpha=0.0)
    learner.update(corrected(), 200)
    unit = learner.act(torch.randn(2, 50, 5) * torch.tensor([1, 1, 1, 0.3, 0.3])) / LIMITS
    assert unit.mean().item() == pytest.approx(0.5, abs=0.15)


def test_values_pull_it_away() -> None:
    learner = make(alpha=50.0)
    learner.update(corrected(worth=1.0), 250)
    assert (learner.act(torch.randn(2, 50, 5) * 0.3) / LIMITS).mean() < 0.2


def test_the_actor_learns_every_second_update_and_goes_on_with_the_same_numbers() -> None:
    learner, replay = make(), corrected()
    learner.update(replay, 1)
    head = learner.networks["actor"].weights[-1].detach().clone()
    learner.update(replay, 1)
    assert torch.equal(head, learner.networks["actor"].weights[-1])
    learner.update(replay, 1)
    assert not torch.equal(head, learner.networks["actor"].weights[-1])
    again = make()
    again.restore(learner.state())
    wanted, found = learner.update(replay, 3), again.update(replay, 3)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    with pytest.raises(UnknownNameError):
        make(anchor="nothing")
