"""The three ports together: any start with any guidance and any edit, repeatable row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from counterflow.errors import InvalidInputError, MismatchError
from counterflow.flow import GaussianField, denoise
from counterflow.policies import ActionSpec, FieldPolicy, Normaliser, bind
from counterflow.random import RowGenerators
from counterflow.steering import (
    Chain,
    Edit,
    ExecuteReference,
    FlowReversal,
    FollowReference,
    Gaussian,
    Guidance,
    Limits,
    MethodSettings,
    NearestToReference,
    PartialNoising,
    Reference,
    Start,
    SteeredPolicy,
    steer,
)


def gaussian_velocity(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """The flow from N(0, I) to N(mean, 0.3^2), with one mean for each row (B,)."""
    offset = mean[:, None, None] * torch.ones_like(x)
    field = GaussianField(torch.zeros(x.shape[1:]), 0.3)
    return field(x - t[:, None, None] * offset, t) + offset


STARTS: list[Start | None] = [None, Gaussian(), FlowReversal(3), FlowReversal(3, depth=0.5), PartialNoising(0.4)]
GUIDANCES: list[Guidance | None] = [None, FollowReference()]
EDITS: list[Edit | None] = [
    None,
    NearestToReference(3),
    ExecuteReference(),
    Limits(-0.4, 0.4),
    Chain([NearestToReference(2, "l2"), Limits(-1.0, 1.0)]),
]
METHODS = ("base", "direct", "frs", "partial", "rank")


def make_prior() -> FieldPolicy:
    return FieldPolicy(gaussian_velocity, ActionSpec(3, 4, (-4.0,) * 4, (4.0,) * 4))


@given(
    start=st.sampled_from(STARTS),
    guidance=st.sampled_from(GUIDANCES),
    edit=st.sampled_from(EDITS),
    seed=st.integers(0, 2**31 - 2),
    active=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_everything_composes_and_rows_do_not_touch(
    start: Start | None, guidance: Guidance | None, edit: Edit | None, seed: int, active: list[bool]
) -> None:
    """What a row does depends on its own observation, reference and generator, not on its neighbours'."""
    policy = SteeredPolicy(make_prior(), start, guidance, edit, steps=3)
    means, speaks = torch.tensor([0.0, 0.5, -0.5, 1.0]), torch.tensor(active)
    chunk = torch.linspace(-1, 1, 48).reshape(4, 3, 4)
    together = policy.act(means, Reference.of(chunk, speaks), RowGenerators([seed] * 3 + [7]))
    assert together.actions.shape == (4, 3, 4)
    assert together.actions.isfinite().all()
    alone = policy.act(means[3:], Reference.of(chunk[3:], speaks[3:]), RowGenerators([7]))
    torch.testing.assert_close(together.actions[3:], alone.actions, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.noise[3:], alone.noise, atol=1e-6, rtol=0)


class TestPlan:
    def test_a_seed_repeats_and_no_seed_does_not(self) -> None:
        policy, means = SteeredPolicy(make_prior()), torch.zeros(2)
        assert torch.equal(policy.act(means, rng=5).actions, policy.act(means, rng=5).actions)
        assert not torch.equal(policy.act(means).actions, policy.act(means).actions)

    def test_actions_are_in_environment_units_and_within_limits(self) -> None:
        spec = ActionSpec(3, 4, (-1.0,) * 4, (1.0,) * 4, Normaliser(torch.full((4,), 0.5), torch.full((4,), 2.0)))
        plan = SteeredPolicy(FieldPolicy(gaussian_velocity, spec), steps=50).act(torch.full((500,), 0.1), rng=0)
        assert plan.actions.max() == 1.0
        torch.testing.assert_close(plan.chunk * 2 + 0.5, plan.actions)

    def test_field_evaluations_are_counted(self) -> None:
        means, reference = torch.zeros(2), Reference.of(torch.ones(2, 3, 4))
        settings = MethodSettings(steps=10, reversal_steps=5, tau=0.7, candidates=16)
        counts = {name: steer(make_prior(), name, settings).act(means, reference, 0).evaluations for name in METHODS}
        assert counts == {"base": 10, "direct": 10, "frs": 10, "partial": 3, "rank": 160}

    def test_diagnostics(self) -> None:
        means, reference = torch.zeros(2), torch.full((2, 3, 4), 1.0)
        reference[1] = -reference[1]
        plan = SteeredPolicy(make_prior(), edit=ExecuteReference()).act(means, reference, 0)
        assert plan.agreement.tolist() == pytest.approx([1.0, 1.0])
        assert plan.round_trip_error.tolist() == [0.0, 0.0]
        free = SteeredPolicy(make_prior(), steps=2).act(torch.zeros(4000), None, 0)
        assert free.agreement.isnan().all()
        quantiles = torch.quantile(free.noise_percentile, torch.tensor([0.1, 0.5, 0.9]))
        torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=0.03, rtol=0)
        far = SteeredPolicy(make_prior(), start=FlowReversal(50), steps=50).act(means, torch.full((2, 3, 4), 3.0), 0)
        assert far.noise_percentile.min() > 0.999

    def test_the_noise_is_the_one_that_the_chosen_candidate_came_from(self) -> None:
        means, reference = torch.tensor([0.0, 0.5, 1.0]), torch.linspace(-1, 1, 36).reshape(3, 3, 4)
        policy = make_prior()
        plan = SteeredPolicy(policy, edit=NearestToReference(16, "l2"), steps=4).act(means, reference, 0)
        torch.testing.assert_close(denoise(bind(policy, means), plan.noise, 4), plan.chunk)

    def test_no_graph_is_kept(self) -> None:
        scale = torch.ones((), requires_grad=True)
        policy = FieldPolicy(lambda x, t, o: x * scale, ActionSpec(3, 4))
        assert not SteeredPolicy(policy).act(torch.zeros(2), rng=0).actions.requires_grad


class TestSteeringAgain:
    def test_what_is_left_open_is_the_inner_policys_choice(self, prior: FieldPolicy, means: Tensor) -> None:
        inner = SteeredPolicy(prior, start=FlowReversal(4), edit=Limits(-0.5, 0.5), steps=4)
        outer = SteeredPolicy(inner, steps=4)
        reference = torch.ones(5, 3, 4)
        assert torch.equal(outer.act(means, reference, 0).actions, inner.act(means, reference, 0).actions)

    def test_both_edits_apply_inner_first(self, prior: FieldPolicy, means: Tensor) -> None:
        inner = SteeredPolicy(prior, edit=Limits(-0.1, 0.1))
        outer = SteeredPolicy(inner, edit=ExecuteReference())
        assert outer.act(means, torch.full((5, 3, 4), 0.7), 0).chunk.eq(0.7).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("chunk", "message"),
        [
            (torch.zeros(3, 4), r"\(B, H, A\)"),
            (torch.zeros(2, 3, 4, dtype=torch.int64), "floating point"),
            (torch.full((2, 3, 4), float("nan")), "NaN"),
            (torch.full((2, 3, 4), 255.0), "normalise"),
        ],
    )
    def test_references_that_cannot_be_right(self, chunk: Tensor, message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            SteeredPolicy(make_prior()).act(torch.zeros(2), chunk, 0)

    @pytest.mark.parametrize("shape", [(2, 3, 5), (2, 2, 4), (1, 3, 4)])
    def test_references_of_another_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(MismatchError, match=r"need \(2, 3, 4\)"):
            SteeredPolicy(make_prior()).act(torch.zeros(2), torch.zeros(shape), 0)

    def test_an_observation_without_a_batch(self) -> None:
        with pytest.raises(InvalidInputError, match="batch dimension"):
            SteeredPolicy(make_prior()).act(torch.tensor(0.0), rng=0)

    @pytest.mark.parametrize("steps", [0, -1, 1001, 2.5])
    def test_steps(self, steps: Any) -> None:
        with pytest.raises(InvalidInputError, match="denoising steps"):
            SteeredPolicy(make_prior(), steps=steps)
