"""Where the flow starts: fresh noise, a reversed reference, a noised one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from counterflow.errors import InvalidInputError
from counterflow.policies import ActionSpec, FieldPolicy
from counterflow.random import RowGenerators, generator
from counterflow.steering import (
    FlowReversal,
    Gaussian,
    LatentShape,
    PartialNoising,
    Reference,
    SteeredPolicy,
    SteeringContext,
)


def context(means: Tensor, reference: Reference | None = None) -> SteeringContext:
    return SteeringContext(means, len(means), reference)


def reference(means: Tensor, value: float = 1.5, **changes: Any) -> Reference:
    return Reference.of(torch.full((len(means), 3, 4), value), **changes)


class TestGaussian:
    def test_it_is_the_standard_normal_at_time_zero(self, prior: FieldPolicy) -> None:
        noise, t = Gaussian()(prior, context(torch.zeros(2000)), generator(0))
        assert t.eq(0).all()
        assert noise.mean().abs() < 0.02
        assert abs(noise.std() - 1) < 0.02


class TestFlowReversal:
    @pytest.mark.parametrize("solver", ["midpoint", "rk4"])
    def test_accurate_solvers_find_the_known_noise(self, prior: FieldPolicy, means: Tensor, solver: Any) -> None:
        """A Gaussian flow carries noise w to mean + std w, so the reference r comes from (r - mean) / std."""
        noise, t = FlowReversal(200, solver)(prior, context(means, reference(means)), generator(0))
        expected = ((1.5 - means) / 0.3)[:, None, None].expand_as(noise)
        torch.testing.assert_close(noise, expected, atol=2e-2, rtol=0)
        assert t.eq(0).all()

    def test_euler_reversal_is_the_papers_loop(self, prior: FieldPolicy, means: Tensor) -> None:
        noise, _ = FlowReversal(5)(prior, context(means, reference(means)), generator(0))
        x = torch.full((5, 3, 4), 1.5)
        for step in range(5):
            x = x - prior.velocity(means, x, torch.full((5,), 1 - step / 5)) / 5
        torch.testing.assert_close(noise, x)

    def test_exact_reversal_and_as_many_steps_return_the_reference(self, prior: FieldPolicy, means: Tensor) -> None:
        steered = SteeredPolicy(prior, start=FlowReversal(10, "exact"), steps=10)
        plan = steered.act(means, reference(means), 0)
        torch.testing.assert_close(plan.chunk, torch.full((5, 3, 4), 1.5), atol=1e-4, rtol=0)
        assert plan.round_trip_error.max() < 1e-4

    @given(value=st.floats(-1.5, 1.5), mean=st.floats(-1, 1), steps=st.integers(4, 20))
    def test_an_exact_round_trip_whatever_the_reference(self, value: float, mean: float, steps: int) -> None:
        bent = FieldPolicy(lambda x, t, o: o[:, None, None] - x.sin(), ActionSpec(3, 4, (-4.0,) * 4, (4.0,) * 4))
        policy = SteeredPolicy(bent, start=FlowReversal(steps, "exact"), steps=steps)
        plan = policy.act(torch.tensor([mean]), torch.full((1, 3, 4), value), 0)
        torch.testing.assert_close(plan.chunk, torch.full((1, 3, 4), value), atol=1e-4, rtol=0)

    def test_few_steps_pull_towards_the_prior_and_many_do_not(self, prior: FieldPolicy) -> None:
        means = torch.zeros(1)
        distance = {
            steps: SteeredPolicy(prior, start=FlowReversal(steps), steps=steps)
            .act(means, reference(means), 0)
            .chunk.mean()
            for steps in (3, 10, 100)
        }
        assert 0 < distance[3] < distance[10] < distance[100] < 1.5
        assert distance[100] > 1.3

    def test_rows_where_nobody_speaks_start_like_the_base(self, prior: FieldPolicy, means: Tensor) -> None:
        active = torch.tensor([True, False, True, False, True])
        given = reference(means, active=active)
        rows = RowGenerators(range(5))
        noise, _ = FlowReversal(5)(prior, context(means, given), RowGenerators(range(5)))
        fresh = rows.normal((5, 3, 4))
        assert torch.equal(noise[~active], fresh[~active])
        assert (noise[active] != fresh[active]).all()

    def test_entries_that_are_not_steered_get_fresh_noise(self, prior: FieldPolicy, means: Tensor) -> None:
        steered = torch.zeros(5, 3, 4, dtype=torch.bool)
        steered[..., :3] = True
        noise, _ = FlowReversal(5)(prior, context(means, reference(means, steered=steered)), RowGenerators(range(5)))
        assert torch.equal(noise[..., 3], RowGenerators(range(5)).normal((5, 3, 4))[..., 3])
        full, _ = FlowReversal(5)(prior, context(means, reference(means)), RowGenerators(range(5)))
        assert torch.equal(noise[..., :3], full[..., :3])

    def test_a_partial_reversal_enters_the_flow_on_the_way(self, prior: FieldPolicy, means: Tensor) -> None:
        state, t = FlowReversal(4, depth=0.25)(prior, context(means, reference(means)), generator(0))
        assert t.eq(0.75).all()
        shallow = SteeredPolicy(prior, start=FlowReversal(4, depth=0.1), steps=4).act(means, reference(means), 0)
        deep = SteeredPolicy(prior, start=FlowReversal(4), steps=4).act(means, reference(means), 0)
        assert shallow.round_trip_error.mean() < deep.round_trip_error.mean()
        assert shallow.noise_percentile.isnan().all()
        assert state.isfinite().all()

    def test_perturbation_spreads_the_noise(self, prior: FieldPolicy) -> None:
        means = torch.zeros(500)
        noise, _ = FlowReversal(5, perturbation=0.5)(prior, context(means, reference(means)), generator(0))
        assert noise.std(0).mean().item() == pytest.approx(0.5, abs=0.03)


class TestShapesOfReversedNoise:
    @pytest.mark.parametrize(
        "latent", [LatentShape("repeated"), LatentShape("low_rank", 1), LatentShape("low_rank", 2, "zero")]
    )
    def test_what_is_executed_is_the_nearest_noise_of_the_shape(
        self, prior: FieldPolicy, means: Tensor, latent: LatentShape
    ) -> None:
        rising = Reference.of(torch.linspace(0.4, 1.2, 12).square().view(1, 3, 4).expand(5, 3, 4).contiguous())
        active = torch.tensor([True, True, True, True, False])
        given = dataclasses.replace(rising, active=active)
        full, _ = FlowReversal(5)(prior, context(means, given), RowGenerators(range(5)))
        shaped, _ = FlowReversal(5, latent=latent)(prior, context(means, given), RowGenerators(range(5)))
        torch.testing.assert_close(latent.project(shaped)[:4], latent.project(full)[:4])
        assert not torch.allclose(shaped[:4], full[:4], atol=1e-2)
        assert torch.equal(shaped[4], full[4])  # nobody speaks: the prior's own
        fresh = RowGenerators(range(5)).normal((5, 3, 4))
        torch.testing.assert_close(shaped[:4], latent.expand(latent.project(full), 3, fresh)[:4])

    def test_only_noise_has_a_shape(self) -> None:
        with pytest.raises(InvalidInputError, match="expected depth 1"):
            FlowReversal(5, depth=0.5, latent=LatentShape("repeated"))


class TestPartialNoising:
    def test_it_mixes_noise_and_reference_and_starts_there(self, prior: FieldPolicy, means: Tensor) -> None:
        active = torch.tensor([True, True, True, True, False])
        start = PartialNoising(0.7)
        state, t = start(prior, context(means, reference(means, active=active)), RowGenerators(range(5)))
        fresh = RowGenerators(range(5)).normal((5, 3, 4))
        torch.testing.assert_close(state[:4], 0.3 * fresh[:4] + 0.7 * 1.5)
        assert torch.equal(state[4], fresh[4])
        assert t.tolist() == pytest.approx([0.7] * 4 + [0.0])

    def test_entries_that_are_not_steered_are_noise_alone(self, prior: FieldPolicy, means: Tensor) -> None:
        steered = torch.zeros(5, 3, 4, dtype=torch.bool)
        steered[..., :3] = True
        given = reference(means, steered=steered)
        state, _ = PartialNoising(0.7)(prior, context(means, given), RowGenerators(range(5)))
        fresh = RowGenerators(range(5)).normal((5, 3, 4))
        torch.testing.assert_close(state[..., :3], 0.3 * fresh[..., :3] + 0.7 * 1.5)
        torch.testing.assert_close(state[..., 3], 0.3 * fresh[..., 3])


def test_without_a_reference_every_start_is_fresh_noise(prior: FieldPolicy, means: Tensor) -> None:
    for start in (Gaussian(), FlowReversal(5), PartialNoising(0.5)):
        noise, t = start(prior, context(means), generator(3))
        assert torch.equal(noise, torch.randn(5, 3, 4, generator=generator(3)))
        assert t.eq(0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlowReversal(0),
        lambda: FlowReversal(1001),
        lambda: FlowReversal(5, "rk5"),
        lambda: FlowReversal(5, depth=0.0),
        lambda: FlowReversal(5, "exact", depth=0.5),
        lambda: FlowReversal(5, perturbation=-1.0),
        lambda: FlowReversal(5, perturbation=float("nan")),
        lambda: PartialNoising(1.0),
        lambda: PartialNoising(-0.1),
        lambda: PartialNoising(float("nan")),
    ],
)
def test_settings_out_of_range(make: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"expected|needs"):
        make()
