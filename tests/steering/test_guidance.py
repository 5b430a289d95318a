"""What is added to the field on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterflow.policies import FieldPolicy
from counterflow.steering import FollowReference, Reference, SteeredPolicy, SteeringContext, Together


class TestFollowReference:
    @pytest.mark.parametrize("steps", [1, 2, 8])
    def test_steered_entries_arrive_at_the_reference(self, prior: FieldPolicy, means: Tensor, steps: int) -> None:
        steered = torch.zeros(5, 3, 4, dtype=torch.bool)
        steered[..., 1] = True
        reference = Reference.of(torch.full((5, 3, 4), 1.25), steered=steered)
        plan = SteeredPolicy(prior, guidance=FollowReference(), steps=steps).act(means, reference, 0)
        torch.testing.assert_close(plan.chunk[..., 1], torch.full((5, 3), 1.25), atol=1e-5, rtol=0)
        free = SteeredPolicy(prior, steps=steps).act(means, None, 0)
        torch.testing.assert_close(plan.chunk[..., [0, 2, 3]], free.chunk[..., [0, 2, 3]])

    def test_where_nobody_speaks_the_prior_is_followed(self, prior: FieldPolicy, means: Tensor) -> None:
        active = torch.tensor([True, False, True, False, True])
        reference = Reference.of(torch.ones(5, 3, 4), active)
        plan = SteeredPolicy(prior, guidance=FollowReference()).act(means, reference, 0)
        free = SteeredPolicy(prior).act(means, None, 0)
        assert torch.equal(plan.chunk[~active], free.chunk[~active])
        assert not torch.equal(plan.chunk[active], free.chunk[active])
        silent = SteeredPolicy(prior, guidance=FollowReference()).act(means, None, 0)
        assert torch.equal(silent.chunk, free.chunk)

    def test_at_the_end_of_the_flow_it_stays_finite(self) -> None:
        context = SteeringContext(None, 1, Reference.of(torch.ones(1, 1, 1)))
        x = torch.full((1, 1, 1), 0.5)
        assert FollowReference()(x, torch.ones(1), x, context).isfinite().all()


def test_several_are_applied_in_order() -> None:
    def add(x: Tensor, t: Tensor, v: Tensor, context: SteeringContext) -> Tensor:
        return v + 1

    def double(x: Tensor, t: Tensor, v: Tensor, context: SteeringContext) -> Tensor:
        return v * 2

    x = torch.zeros(1, 1, 1)
    context = SteeringContext(None, 1)
    assert Together([add, double])(x, torch.zeros(1), x, context).item() == 2
    assert Together([double, add])(x, torch.zeros(1), x, context).item() == 1
    assert Together([])(x, torch.zeros(1), x, context).item() == 0
