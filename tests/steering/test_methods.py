"""The five ways to use a reference, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.policies import FieldPolicy
from counterflow.random import RowGenerators
from counterflow.steering import MethodSettings, Reference, SteeredPolicy, steer

METHODS = ("base", "direct", "frs", "partial", "rank")


@pytest.mark.parametrize("method", METHODS)
def test_where_nobody_speaks_every_method_is_a_draw_of_the_base(prior: FieldPolicy, method: str) -> None:
    means = torch.zeros(3)
    silent = Reference.of(torch.ones(3, 3, 4), torch.zeros(3, dtype=torch.bool))
    steered = steer(prior, method, MethodSettings(steps=5, reversal_steps=5, tau=0.5, candidates=1))
    base = SteeredPolicy(prior, steps=steered.steps)
    plan = steered.act(means, silent, RowGenerators(range(3)))
    assert torch.equal(plan.actions, base.act(means, None, RowGenerators(range(3))).actions)


def test_each_does_what_its_name_says(prior: FieldPolicy) -> None:
    means, reference = torch.zeros(400), Reference.of(torch.full((400, 3, 4), 0.9))
    chunks = {name: steer(prior, name).act(means, reference, 0).chunk for name in METHODS}
    assert chunks["base"].mean().abs() < 0.02
    assert chunks["direct"].eq(0.9).all()
    assert 0.3 < chunks["frs"].mean() < 0.9
    assert chunks["frs"].std(0).max() < 1e-4  # reversal of one reference is one noise
    assert 0.1 < chunks["partial"].mean() < 0.9
    assert chunks["partial"].std(0).min() > 0.01
    assert 0.05 < chunks["rank"].mean() < 0.5


class TestSettings:
    def test_each_method_reads_its_own(self, prior: FieldPolicy, means: Tensor) -> None:
        def chunk(method: str, **settings: Any) -> Tensor:
            return steer(prior, method, MethodSettings(**settings)).act(means, torch.ones(5, 3, 4), 0).chunk

        for method, changes in (
            ("base", {"steps": 3}),
            ("frs", {"reversal_steps": 3}),
            ("frs", {"perturbation": 0.5}),
            ("frs", {"latent": "low_rank", "latent_rank": 1}),
            ("partial", {"tau": 0.8}),
            ("rank", {"candidates": 2}),
            ("rank", {"distance": "l2"}),
        ):
            assert not torch.equal(chunk(method, **changes), chunk(method))
            assert torch.equal(chunk("direct", **changes), chunk("direct"))

    @pytest.mark.parametrize(("tau", "steps"), [(0.0, 10), (0.5, 5), (0.7, 3), (0.99, 1)])
    def test_partial_noising_denoises_with_the_steps_that_are_left(
        self, prior: FieldPolicy, tau: float, steps: int
    ) -> None:
        assert steer(prior, "partial", MethodSettings(tau=tau)).steps == steps

    @pytest.mark.parametrize(
        ("method", "changes"),
        [
            *[
                (method, {"steps": steps})
                for method in ("base", "direct", "partial", "rank")
                for steps in (0, -5, 1001)
            ],
            ("partial", {"steps": 2.5}),
            ("frs", {"reversal_steps": 0}),
            ("frs", {"reversal_steps": 1001}),
            ("frs", {"perturbation": -0.1}),
            ("partial", {"tau": 1.0}),
            ("partial", {"tau": -0.1}),
            ("rank", {"candidates": 0}),
            ("rank", {"candidates": 5000}),
            ("rank", {"distance": "l3"}),
        ],
    )
    def test_out_of_range(self, prior: FieldPolicy, method: str, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match="expected"):
            steer(prior, method, MethodSettings(**changes))

    def test_an_unknown_name_suggests_the_nearest(self, prior: FieldPolicy) -> None:
        with pytest.raises(UnknownNameError, match="frs"):
            steer(prior, "fsr")
