"""A critic's gradient on the way, and its choice at the end: numbers computed by hand (the official code's: `test_golden.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from counterflow.errors import CheckpointError, CounterflowError, InvalidInputError, MismatchError, UnknownNameError
from counterflow.flow import GaussianField, denoise
from counterflow.policies import ActionSpec, FieldPolicy, Normaliser, bind
from counterflow.policies.stacked import StackedMLP
from counterflow.steering import (
    ChunkCritic,
    ChunkRegressor,
    Continuation,
    ContinueChunk,
    CriticBinding,
    CriticConfig,
    CriticGuidance,
    FlowReversal,
    GuidanceSettings,
    HighestValue,
    LearnedNoise,
    Plan,
    Reference,
    RegressorConfig,
    Rng,
    SteeredPolicy,
    SteeringContext,
    Together,
    aggregate,
    binding_of,
    choose_weight,
    guide,
    task_embedding,
)

H, A, F = 3, 2, 4
STD = 0.5


class Quadratic(nn.Module):
    """Q_m(s, a) = -k_m / 2 |a - c - s|^2 + g a, with s the mean of what is seen: curvature k, target c and slope g."""

    def __init__(self, *curvatures: float, target: float = 0.0, slope: float = 0.0) -> None:
        super().__init__()
        self.curvature = nn.Parameter(torch.tensor(curvatures)[:, None, None])
        self.target, self.slope = target, slope

    def forward(self, inputs: Tensor) -> Tensor:
        seen, chunk = inputs[..., :F], inputs[..., F:]
        distance = (chunk - self.target - seen.mean(-1, keepdim=True)).square().sum(-1, keepdim=True)
        return -self.curvature / 2 * distance + self.slope * chunk.sum(-1, keepdim=True)


def critic_of(network: nn.Module, members: int = 1, horizon: int = H, dim: int = A, past: int = 0) -> ChunkCritic:
    plain = Normaliser(torch.zeros(F), torch.ones(F), "none")
    binding = CriticBinding("", "", horizon, dim, past)
    return ChunkCritic(CriticConfig("observation", members), binding, plain, network)


def gaussian(mean: float = 0.0, limit: float | None = None, padding: int = 0, past: int = 0) -> FieldPolicy:
    """The exact flow from N(0, I) to N(mean, 0.5^2), whatever is seen."""
    shape = (H + past, A + padding)

    def field(x: Tensor, t: Tensor, seen: Tensor) -> Tensor:
        return GaussianField(torch.full(shape, mean, dtype=x.dtype), STD)(x, t)

    limits = None if limit is None else (limit,) * A
    low = None if limits is None else tuple(-one for one in limits)
    return FieldPolicy(field, ActionSpec(*(H + past, A), low, limits, padding=padding, past=past))


def given_noise(noise: Tensor) -> Callable[[Any, SteeringContext, Rng], tuple[Tensor, Tensor]]:
    return lambda policy, context, rng: (noise, noise.new_zeros(len(noise)))


def act(policy: FieldPolicy, guidance: Any, noise: Tensor, steps: int = 10, seen: Tensor | None = None) -> Plan:
    seen = torch.zeros(len(noise), F) if seen is None else seen
    return SteeredPolicy(policy, given_noise(noise), guidance, steps=steps).act(seen, rng=0)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(5, H, A, generator=torch.Generator().manual_seed(0))


class TestByHand:
    def test_one_step(self, noise: Tensor) -> None:
        """At t = 0 the estimate is the mean m, so x_1 = m + w k (c + s - m), whatever the noise."""
        critic = critic_of(Quadratic(2.0, target=1.0))
        seen = torch.full((5, F), 0.25)
        chunk = act(gaussian(0.5), CriticGuidance(critic, gaussian(0.5), 0.1), noise, 1, seen).chunk
        torch.testing.assert_close(chunk, torch.full_like(chunk, 0.5 + 0.1 * 2 * (1.0 + 0.25 - 0.5)))

    def test_the_noisy_estimate(self, noise: Tensor) -> None:
        """The gradient at the state itself: x_1 = m + w k (c - x_0)."""
        guidance = CriticGuidance(critic_of(Quadratic(2.0, target=1.0)), gaussian(0.5), 0.1, "noisy")
        chunk = act(gaussian(0.5), guidance, noise, 1).chunk
        torch.testing.assert_close(chunk, 0.5 + 0.1 * 2 * (1.0 - noise))

    @pytest.mark.parametrize("jacobian", [False, True])
    def test_two_steps(self, noise: Tensor, jacobian: bool) -> None:
        """The second step's estimate is x + v / 2 at t = 1/2, whose derivative is t std^2 / ((1 - t)^2 + t^2 std^2)."""
        policy, weight, curvature, target = gaussian(0.5), 0.2, 1.5, -1.0
        gain = 0.5 * STD**2 / (0.25 + 0.25 * STD**2)
        first = noise + ((0.5 - noise) + weight * (0.0 if jacobian else 1.0) * curvature * (target - 0.5)) / 2
        estimate = 0.5 + gain * (first - 0.25)
        velocity = (estimate - first) / 0.5
        pulled = (gain if jacobian else 1.0) * curvature * (target - estimate)
        guidance = CriticGuidance(critic_of(Quadratic(curvature, target=target)), policy, weight, jacobian=jacobian)
        torch.testing.assert_close(act(policy, guidance, noise, 2).chunk, first + (velocity + weight * pulled) / 2)

    def test_the_clip_stands_before_the_gradient(self, noise: Tensor) -> None:
        """The gradient is taken at the clipped point; with the Jacobian nothing comes back from what is clipped."""
        policy = gaussian(0.9, limit=0.5)
        states = []
        for jacobian in (False, True):
            critic = critic_of(Quadratic(1.0))
            guidance = CriticGuidance(critic, policy, 0.1, jacobian=jacobian)
            steered = SteeredPolicy(policy, guidance=guidance, steps=1)
            with torch.no_grad():
                states.append(denoise(bind(steered, steered.encode(torch.zeros(5, F))), noise, 1))
        torch.testing.assert_close(states[0], torch.full_like(noise, 0.9 - 0.1 * 0.5))
        torch.testing.assert_close(states[1], torch.full_like(noise, 0.9))
        free = CriticGuidance(critic_of(Quadratic(1.0)), policy, 0.1, clip=False)
        steered = SteeredPolicy(policy, guidance=free, steps=1)
        with torch.no_grad():
            unclipped = denoise(bind(steered, steered.encode(torch.zeros(5, F))), noise, 1)
        torch.testing.assert_close(unclipped, torch.full_like(noise, 0.9 - 0.1 * 0.9))

    @pytest.mark.parametrize(("schedule", "jacobian"), [("remaining", True), ("constant", False)])
    def test_the_mean_moves_as_the_flow_says(self, noise: Tensor, schedule: Any, jacobian: bool) -> None:
        """For Q = g a the law that the flow should have is the prior tilted by exp(w Q): its mean moves by w g std^2.

        The factor (1 - t) / t with the Jacobian is what leads there exactly. A constant weight moves it by
        w g std times the integral of 1 / sqrt((1 - t)^2 + t^2 std^2).
        """
        weight, slope, policy = 0.8, -0.5, gaussian(0.3)
        critic = critic_of(Quadratic(0.0, slope=slope))
        guidance = CriticGuidance(critic, policy, weight, jacobian=jacobian, schedule=schedule, largest_factor=1e6)
        steered = SteeredPolicy(policy, given_noise(noise), guidance, steps=200, solver="rk4")
        chunk = steered.act(torch.zeros(5, F), rng=0).chunk
        if schedule == "remaining":
            moved = weight * slope * STD**2
        else:
            t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
            moved = weight * slope * STD * float((1 / ((1 - t) ** 2 + (t * STD) ** 2).sqrt()).mean())
        torch.testing.assert_close(chunk, 0.3 + STD * noise + moved, atol=2e-4, rtol=0)

    @pytest.mark.parametrize(("how", "curvature"), [("min", 3.0), ("mean", 2.0), ("lower_confidence", 2.5)])
    def test_the_ensemble_guides_as_it_is_aggregated(self, noise: Tensor, how: Any, curvature: float) -> None:
        """Of Q_m = -k_m d^2 / 2 with k = 1 and 3 the lowest has k = 3, the mean 2, and the mean less half the deviation 2.5."""
        policy, critic = gaussian(0.5), critic_of(Quadratic(1.0, 3.0, target=1.0), members=2)
        guidance = CriticGuidance(critic, policy, 0.1, aggregation=how, rho=0.5)
        chunk = act(policy, guidance, noise, 1).chunk
        torch.testing.assert_close(chunk, torch.full_like(chunk, 0.5 + 0.1 * curvature * 0.5))

    def test_the_factor_is_bounded(self, noise: Tensor) -> None:
        policy = gaussian()
        guidance = CriticGuidance(
            critic_of(Quadratic(0.0, slope=1.0)), policy, 0.1, schedule="remaining", largest_factor=7.0
        )
        chunk = act(policy, guidance, noise, 1).chunk
        torch.testing.assert_close(chunk, torch.full_like(chunk, 0.7))

    def test_padding_and_past_get_none(self) -> None:
        policy = gaussian(padding=3, past=2)
        state = torch.randn(4, H + 2, A + 3, generator=torch.Generator().manual_seed(1))
        for jacobian in (False, True):
            guidance = CriticGuidance(critic_of(Quadratic(1.0, target=9.0), past=2), policy, 1.0, jacobian=jacobian)
            steered = SteeredPolicy(policy, guidance=guidance)
            t = torch.full((4,), 0.5)
            with torch.no_grad():
                difference = steered.velocity(steered.encode(torch.zeros(4, F)), state, t) - bind(policy, None)(
                    state, t
                )
            assert (difference[:, 2:, :A] != 0).all()
            difference[:, 2:, :A] = 0
            assert (difference == 0).all()

    @pytest.mark.parametrize("jacobian", [False, True])
    def test_weight_zero_is_unguided(self, noise: Tensor, jacobian: bool) -> None:
        policy = gaussian(0.2, limit=1.0)
        guidance = CriticGuidance(critic_of(Quadratic(1.0)), policy, 0.0, jacobian=jacobian)
        assert torch.equal(act(policy, guidance, noise).chunk, act(policy, None, noise).chunk)

    @pytest.mark.parametrize("jacobian", [False, True])
    def test_float64(self, noise: Tensor, jacobian: bool) -> None:
        policy = gaussian(0.2)
        critic = critic_of(Quadratic(1.0, 2.0, target=0.4), members=2)
        single = act(policy, CriticGuidance(critic, policy, 0.3, jacobian=jacobian), noise).chunk
        double = act(policy, CriticGuidance(critic.double(), policy, 0.3, jacobian=jacobian), noise.double()).chunk
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), single)

    def test_gradients_agree_with_finite_differences(self) -> None:
        """The pulled-back gradient is that of Q(clip(x + (1 - t) v(x))) in x."""
        policy, critic = gaussian(0.3, limit=1.0), trained().double()
        x = torch.randn(3, H, A, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
        seen, t = torch.ones(3, F, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)

        def value(x: Tensor) -> Tensor:
            estimate = (x + (1 - t)[:, None, None] * policy.velocity(None, x, t)).clamp(-1, 1)
            return critic.value(seen, estimate).sum()

        (expected,) = torch.autograd.grad(value(x), x)
        steered = SteeredPolicy(policy, guidance=CriticGuidance(critic, policy, 1.0, jacobian=True))
        with torch.no_grad():
            found = steered.velocity(steered.encode(seen), x.detach(), t) - policy.velocity(None, x.detach(), t)
        torch.testing.assert_close(found, expected)


def trained(members: int = 3, seed: int = 0, inputs: Any = "observation", policy: str = "") -> ChunkCritic:
    """A critic with random weights, as if trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ChunkCritic(
            CriticConfig(inputs, members, width=16, depth=2),
            CriticBinding(policy, "", H, A),
            Normaliser(torch.zeros(F), torch.full((F,), 2.0)),
        ).requires_grad_(False)


class TestComposing:
    def test_with_a_reversed_reference(self, noise: Tensor) -> None:
        """The reference is reversed through the unguided flow; the way back is guided."""
        policy = gaussian()
        critic = critic_of(Quadratic(0.0, slope=1.0))
        reference = Reference.of(noise / 4)
        start = FlowReversal(5, solver="exact")
        frs = SteeredPolicy(policy, start=start, steps=5)
        seen = torch.zeros(5, F)
        free = frs.act(seen, reference, 0)
        torch.testing.assert_close(free.chunk, noise / 4, atol=1e-4, rtol=1e-4)
        guidance = CriticGuidance(critic, policy, 0.05)
        for guided in (
            SteeredPolicy(policy, start, guidance, steps=5),
            SteeredPolicy(frs, guidance=guidance, steps=5),
            guide(frs, critic, GuidanceSettings(0.05)),
        ):
            plan = guided.act(seen, reference, 0)
            torch.testing.assert_close(plan.noise, free.noise)
            alone = SteeredPolicy(policy, given_noise(free.noise), guidance, steps=5).act(seen, rng=0)
            torch.testing.assert_close(plan.chunk, alone.chunk)
            assert ((plan.chunk - free.chunk) > 0.01).all()

    def test_every_setting_reaches_the_guidance(self) -> None:
        policy, critic = SteeredPolicy(gaussian()), trained()
        changes: dict[str, Any] = {
            "weight": 0.3,
            "estimate": "noisy",
            "jacobian": True,
            "schedule": "remaining",
            "largest_factor": 3.0,
            "clip": False,
            "aggregation": "lower_confidence",
            "rho": 2.5,
        }
        plain = GuidanceSettings(0.1)
        for name, value in changes.items():
            guidance = guide(policy, critic, replace(plain, **{name: value})).guidance
            assert isinstance(guidance, CriticGuidance)
            expected = {**{key: getattr(plain, key) for key in changes}, name: value}
            assert {key: getattr(guidance, key) for key in changes} == expected
        edit = guide(policy, critic, replace(plain, best_of=7, aggregation="mean", rho=2.0)).edit
        assert isinstance(edit, HighestValue)
        assert (edit.candidates, edit.aggregation, edit.rho) == (7, "mean", 2.0)

    def test_with_a_learned_noise(self) -> None:
        policy = gaussian()
        size = H * A
        torch.manual_seed(0)
        noises = ChunkRegressor(
            RegressorConfig(inputs="observation", members=1, width=8, depth=1),
            Normaliser(torch.zeros(F), torch.ones(F)),
            Normaliser(torch.zeros(size), torch.ones(size)),
            binding_of(policy, 5),
        )
        seen = torch.randn(4, F)
        driven = SteeredPolicy(policy, start=LearnedNoise(noises), steps=5)
        free, guided = driven.act(seen, rng=0), guide(driven, trained(), GuidanceSettings(0.5)).act(seen, rng=0)
        assert torch.equal(free.noise, guided.noise)
        assert not torch.allclose(free.chunk, guided.chunk)

    def test_two_critics_add_up(self, noise: Tensor) -> None:
        """Both gradients of Q = g a are constant, so their order and nesting don't matter."""
        policy, seen = gaussian(), torch.zeros(5, F)
        one = CriticGuidance(critic_of(Quadratic(0.0, slope=1.0)), policy, 0.1)
        other = CriticGuidance(critic_of(Quadratic(0.0, slope=-3.0)), policy, 0.2)
        both = CriticGuidance(critic_of(Quadratic(0.0, slope=1.0)), policy, 0.1 - 0.6)
        expected = act(policy, both, noise).chunk
        torch.testing.assert_close(act(policy, Together([one, other]), noise).chunk, expected)
        nested = SteeredPolicy(SteeredPolicy(policy, given_noise(noise), one), guidance=other)
        torch.testing.assert_close(nested.act(seen, rng=0).chunk, expected)

    @pytest.mark.parametrize("jacobian", [False, True])
    @pytest.mark.parametrize("nested", [False, True])
    def test_inside_another_that_differentiates(self, jacobian: bool, nested: bool) -> None:
        """An outer guidance's Jacobian goes through the whole guided velocity, the critic's curvature included."""
        policy, critic = gaussian(0.3), trained().double()
        inner = CriticGuidance(critic, policy, 0.7, jacobian=jacobian)
        chunk = torch.full((2, H, A), 0.5, dtype=torch.float64)
        seen, t = torch.ones(2, F, dtype=torch.float64), torch.full((2,), 0.4, dtype=torch.float64)
        continuation = Continuation(chunk, torch.ones(2, H, dtype=torch.float64))
        x = torch.randn(2, H, A, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        if nested:
            steered = SteeredPolicy(SteeredPolicy(policy, guidance=inner), guidance=ContinueChunk())
        else:
            steered = SteeredPolicy(policy, guidance=Together([inner, ContinueChunk()]))
        context = steered.encode(seen, continuation=continuation)
        with torch.no_grad():
            found = steered.velocity(context, x, t)

        def guided(x: Tensor) -> Tensor:
            estimate = x + (1 - t)[:, None, None] * policy.velocity(None, x, t)
            (slope,) = torch.autograd.grad(
                critic.value(seen, estimate).sum(), x if jacobian else estimate, create_graph=True
            )
            return policy.velocity(None, x, t) + 0.7 * slope

        point = x.clone().requires_grad_()
        velocity = guided(point)
        if jacobian and not nested:  # in one list, what a guidance pulled back counts as given for the next
            velocity = policy.velocity(None, point, t) + (velocity - policy.velocity(None, point, t)).detach()
        estimate = point + (1 - t)[:, None, None] * velocity
        (correction,) = torch.autograd.grad(estimate, point, chunk - estimate.detach())
        factor = (0.4**2 + 0.6**2) / (0.4 * 0.6)
        torch.testing.assert_close(found, (velocity + factor * correction).detach())

    def test_rows_do_not_depend_on_their_batch(self, noise: Tensor) -> None:
        policy, critic = gaussian(), trained()
        seen = torch.randn(5, F, generator=torch.Generator().manual_seed(3))
        for jacobian in (False, True):
            guidance = CriticGuidance(critic, policy, 0.5, jacobian=jacobian)
            whole = act(policy, guidance, noise, seen=seen).chunk
            for row in range(5):
                alone = act(policy, guidance, noise[row : row + 1], seen=seen[row : row + 1]).chunk
                torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=1e-5)

    def test_weights_are_left_alone(self, noise: Tensor) -> None:
        policy, critic = gaussian(), trained().requires_grad_(True)
        act(policy, CriticGuidance(critic, policy, 0.5, jacobian=True), noise)
        assert all(parameter.grad is None for parameter in critic.parameters())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    weight=st.floats(-100, 100),
    scale=st.floats(0, 50),
    jacobian=st.booleans(),
    schedule=st.sampled_from(["constant", "remaining"]),
    how=st.sampled_from(["min", "mean", "lower_confidence"]),
    members=st.integers(1, 3),
    steps=st.integers(1, 6),
)
def test_always_finite(
    seed: int, weight: float, scale: float, jacobian: bool, schedule: Any, how: Any, members: int, steps: int
) -> None:
    policy, critic = gaussian(0.3, limit=1.0), trained(members, seed)
    state = scale * torch.randn(3, H, A, generator=torch.Generator().manual_seed(seed))
    guidance = CriticGuidance(critic, policy, weight, jacobian=jacobian, schedule=schedule, aggregation=how)
    chunk = act(policy, guidance, state, steps, torch.full((3, F), scale)).chunk
    assert chunk.isfinite().all()
    assert (chunk.abs() <= 1).all()


class TestAggregation:
    VALUES = torch.tensor([[1.0, 5.0], [3.0, 5.0]])

    @pytest.mark.parametrize(
        ("how", "expected"), [("min", [1.0, 5.0]), ("mean", [2.0, 5.0]), ("lower_confidence", [1.5, 5.0])]
    )
    def test_by_hand(self, how: Any, expected: list[float]) -> None:
        assert aggregate(self.VALUES, how, rho=0.5).tolist() == expected

    def test_gradient_where_all_members_agree(self) -> None:
        """The standard deviation has no derivative at 0; that of agreeing members must not spoil the others'."""
        values = self.VALUES.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(aggregate(values, "lower_confidence").sum(), values)
        assert gradient.isfinite().all()

    def test_unknown(self) -> None:
        with pytest.raises(UnknownNameError, match="aggregation 'median'"):
            aggregate(self.VALUES, "median")  # type: ignore[arg-type]


class TestHighestValue:
    def test_the_best_candidate_is_kept(self) -> None:
        policy, critic = gaussian(), trained()
        context = SteeredPolicy(policy).encode(torch.randn(4, F))
        chunks = torch.randn(4, 6, H, A)
        kept = HighestValue(critic, policy, 6)(chunks, context)
        assert kept.shape == (4, 1, H, A)
        for row in range(4):
            values = critic.value(context.observation[[row] * 6], chunks[row])
            assert torch.equal(kept[row, 0], chunks[row, values.argmax()])

    def test_more_candidates_have_higher_values(self) -> None:
        policy, critic = gaussian(), trained()
        seen = torch.zeros(64, F)
        means = [
            float(critic.value(seen, guide(SteeredPolicy(policy), critic, one).act(seen, rng=0).chunk).mean())
            for one in (GuidanceSettings(0.0), GuidanceSettings(0.0, best_of=8), GuidanceSettings(0.0, best_of=64))
        ]
        assert means[0] < means[1] < means[2]

    def test_what_is_judged_is_what_would_be_executed(self) -> None:
        """Beyond the limits a candidate gains nothing."""
        policy, critic = gaussian(limit=1.0), critic_of(Quadratic(0.0, slope=1.0))
        chunks = torch.zeros(1, 3, H, A)
        chunks[:, 0, 0], chunks[:, 1, 0], chunks[:, 1, 1], chunks[:, 2] = 50.0, 1.0, 1.0, 0.1
        context = SteeredPolicy(policy).encode(torch.zeros(1, F))
        assert torch.equal(HighestValue(critic, policy, 3)(chunks, context)[:, 0], chunks[:, 1])

    def test_padding_and_past_are_not_judged(self) -> None:
        policy = gaussian(padding=1, past=1)
        chunks = torch.zeros(1, 2, H + 1, A + 1)
        chunks[:, 0, 0], chunks[:, 0, :, A:], chunks[:, 1, 1:, :A] = 9.0, 9.0, 1.0
        context = SteeredPolicy(policy).encode(torch.zeros(1, F))
        edit = HighestValue(critic_of(Quadratic(0.0, slope=1.0), past=1), policy, 2)
        assert torch.equal(edit(chunks, context)[:, 0], chunks[:, 1])

    def test_no_number_is_never_the_best(self) -> None:
        class Broken(nn.Module):
            def forward(self, inputs: Tensor) -> Tensor:
                first = inputs[..., F : F + 1]
                return torch.where(first > 1, torch.nan, first)

        policy = gaussian()
        chunks = torch.zeros(2, 3, H, A)
        chunks[0, :, 0, 0], chunks[1, :, 0, 0] = torch.tensor([5.0, 0.3, 0.2]), torch.tensor([5.0, 6.0, 7.0])
        context = SteeredPolicy(policy).encode(torch.zeros(2, F))
        kept = HighestValue(critic_of(Broken()), policy, 3)(chunks, context)[:, 0, 0, 0]
        assert kept.tolist() == pytest.approx([0.3, 5.0])

    def test_out_of_range(self) -> None:
        with pytest.raises(InvalidInputError, match="best-of-N n is 0"):
            HighestValue(trained(), gaussian(), 0)


class TestBelonging:
    """A critic's values mean something for one policy's chunks alone."""

    @pytest.mark.parametrize(
        ("binding", "message"),
        [
            (CriticBinding("abc", "", H, A), "policy 'abc', not"),
            (CriticBinding("", "", H + 1, A), "rows 0 to 4 of 2 numbers, not 3 rows from row 0 on of 2"),
            (CriticBinding("", "", H, A + 1), "rows 0 to 3 of 3 numbers"),
            (CriticBinding("", "", H, A, 1), "rows 1 to 4"),
        ],
    )
    def test_other_chunks(self, binding: CriticBinding, message: str) -> None:
        plain = Normaliser(torch.zeros(F), torch.ones(F), "none")
        critic = ChunkCritic(CriticConfig("observation", width=8, depth=1), binding, plain)
        for use in (lambda: CriticGuidance(critic, gaussian(), 0.1), lambda: HighestValue(critic, gaussian())):
            with pytest.raises(MismatchError, match=f"critic was made for other chunks: {message}"):
                use()

    def test_other_units(self) -> None:
        spec = ActionSpec(H, A, normaliser=Normaliser(torch.zeros(A), torch.full((A,), 2.0)))
        policy = FieldPolicy(lambda x, t, seen: -x, spec)
        with pytest.raises(MismatchError, match="environment's units, not normalised by 'mean_std'"):
            CriticGuidance(trained(), policy, 0.1)
        CriticGuidance(trained(policy=policy.fingerprint), policy, 0.1)

    def test_the_rows_that_are_executed_may_be_fewer(self) -> None:
        policy = FieldPolicy(lambda x, t, seen: -x, ActionSpec(H + 2, A, executed=H))
        noise = torch.zeros(2, H + 2, A)
        chunk = act(policy, CriticGuidance(critic_of(Quadratic(0.0, slope=1.0)), policy, 1.0), noise).chunk
        assert (chunk[:, :H] > 0).all()
        assert (chunk[:, H:] == 0).all()

    def test_other_inputs(self) -> None:
        policy = gaussian()
        steered = SteeredPolicy(policy, guidance=CriticGuidance(trained(), policy, 0.1))
        with pytest.raises(MismatchError, match=r"shape \(2, 7\); the critic was made for \(B, 4\)"):
            steered.act(torch.zeros(2, 7), rng=0)
        looking = trained(inputs="features")
        with pytest.raises(MismatchError, match="offers no features"):
            SteeredPolicy(policy, guidance=CriticGuidance(looking, policy, 0.1)).act(torch.zeros(2, F), rng=0)

    def test_features_are_the_frozen_policys(self, noise: Tensor) -> None:
        policy = gaussian()
        policy.features = lambda context: 2 * context  # type: ignore[attr-defined]
        seen = torch.randn(5, F)
        looking = trained(inputs="features")
        found = act(policy, CriticGuidance(looking, policy, 0.5), noise, seen=seen).chunk
        expected = act(policy, CriticGuidance(trained(), policy, 0.5), noise, seen=2 * seen).chunk
        torch.testing.assert_close(found, expected)
        steered = SteeredPolicy(SteeredPolicy(policy), guidance=CriticGuidance(looking, SteeredPolicy(policy), 0.5))
        assert steered.act(seen, rng=0).chunk.isfinite().all()

    def test_a_task(self, noise: Tensor) -> None:
        torch.manual_seed(0)
        critic = ChunkCritic(
            CriticConfig("observation", width=16, depth=1, task_dim=3),
            CriticBinding("", "", H, A),
            Normaliser(torch.zeros(F), torch.ones(F), "none"),
        )
        policy = gaussian()
        with pytest.raises(MismatchError, match="task embedding of 0 numbers was given; the critic was made for 3"):
            CriticGuidance(critic, policy, 0.1)
        chunks = [
            act(policy, CriticGuidance(critic, policy, 1.0, task=task), noise).chunk
            for task in (torch.zeros(3), torch.ones(3))
        ]
        assert not torch.allclose(*chunks)
        assert HighestValue(critic, policy, 4, task=torch.ones(3)).candidates == 4
        with pytest.raises(MismatchError, match="made for 0"):
            CriticGuidance(trained(), policy, 0.1, task=torch.ones(3))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"weight": math.nan}, InvalidInputError, "weight is nan"),
            ({"weight": "auto"}, InvalidInputError, "choose_weight finds one"),
            ({"estimate": "tidy"}, UnknownNameError, "unknown estimate 'tidy'"),
            ({"schedule": "rising"}, UnknownNameError, "unknown schedule"),
            ({"aggregation": "max"}, UnknownNameError, "unknown aggregation"),
            ({"rho": -1}, InvalidInputError, "rho"),
            ({"largest_factor": 0.0}, InvalidInputError, "largest_factor"),
            ({"jacobian": True, "estimate": "noisy"}, InvalidInputError, "Leave|no Jacobian"),
        ],
    )
    def test_settings(self, changes: dict[str, Any], error: type[CounterflowError], message: str) -> None:
        with pytest.raises(error, match=message):
            CriticGuidance(trained(), gaussian(), **{"weight": 0.1, **changes})

    def test_a_policy_without_gradients_is_refused(self, noise: Tensor) -> None:
        policy = FieldPolicy(torch.no_grad()(lambda x, t, seen: -x), ActionSpec(H, A))
        with pytest.raises(InvalidInputError, match="velocity that can be differentiated"):
            act(policy, CriticGuidance(trained(), policy, 0.1, jacobian=True), noise)


class TestFiles:
    def test_what_is_saved_is_loaded(self, tmp_path: Path) -> None:
        critic = trained()
        critic.provenance = {"seed": 0}
        found = ChunkCritic.load(critic.save(tmp_path / "critic"))
        seen, chunks = torch.randn(5, F), torch.randn(5, H, A)
        assert torch.equal(found.values(seen, chunks), critic.values(seen, chunks))
        assert found.fingerprint == critic.fingerprint
        assert found.fingerprint != trained(seed=1).fingerprint
        assert (found.binding, found.config, found.provenance) == (critic.binding, critic.config, {"seed": 0})
        assert not any(parameter.requires_grad for parameter in found.parameters())

    def test_a_network_of_ones_own(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="a critic with a Quadratic can't be written"):
            critic_of(Quadratic(1.0)).save(tmp_path / "critic")
        size = F + H * A
        network = StackedMLP(size, 1, 4, 16, 2, "after").part(1, 2)
        plain = Normaliser(torch.zeros(F), torch.ones(F), "none")
        config = CriticConfig("observation", 2, 16, 2, "after")
        critic = ChunkCritic(config, CriticBinding("", "", H, A), plain, network)
        assert ChunkCritic.load(critic.save(tmp_path / "critic")).fingerprint == critic.fingerprint
        with pytest.raises(InvalidInputError, match="expected .* for CriticConfig"):
            ChunkCritic(replace(config, norm="before"), CriticBinding("", "", H, A), plain, network)

    def test_damage(self, tmp_path: Path) -> None:
        path = trained().save(tmp_path / "critic")
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        with pytest.raises(CheckpointError, match="truncated"):
            ChunkCritic.load(path)
        path.write_bytes(whole[:-4] + b"\0\0\0?")
        with pytest.raises(CheckpointError, match="changed after it was saved"):
            ChunkCritic.load(path)
        with pytest.raises(CheckpointError, match="no such file"):
            ChunkCritic.load(tmp_path / "other")

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"inputs": "pixels"}, UnknownNameError),
            ({"norm": "batch"}, UnknownNameError),
            ({"members": 0}, InvalidInputError),
            ({"task_dim": -1}, InvalidInputError),
        ],
    )
    def test_settings(self, changes: dict[str, Any], error: type[CounterflowError]) -> None:
        with pytest.raises(error):
            CriticConfig(**changes)


class TestChoosingTheWeight:
    SEEN = torch.zeros(3, F)

    def test_by_hand(self) -> None:
        """A constant gradient g moves every chunk by the same multiple of w g; the spread is the prior's std."""
        policy, critic = gaussian(), critic_of(Quadratic(0.0, slope=0.01))
        chosen = choose_weight(policy, critic, self.SEEN, GuidanceSettings(radius=0.5), draws=512)
        noise = torch.randn(1, H, A)
        one = act(policy, CriticGuidance(critic, policy, 1.0), noise).chunk - act(policy, None, noise).chunk
        assert chosen.spread == pytest.approx(float(act(policy, None, torch.randn(4000, H, A)).chunk.std()), rel=0.05)
        assert chosen.weight * float(one.mean()) == pytest.approx(0.5 * chosen.spread, rel=0.03)
        assert list(chosen.curve) == sorted(chosen.curve)

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
    def test_the_scale_of_the_critic_does_not_matter(self, scale: float) -> None:
        policy = gaussian(limit=1.0)
        plain = choose_weight(policy, critic_of(Quadratic(0.0, slope=1.0)), self.SEEN)
        scaled = choose_weight(policy, critic_of(Quadratic(0.0, slope=scale)), self.SEEN)
        assert scaled.weight * scale == pytest.approx(plain.weight, rel=0.05)

    @pytest.mark.parametrize("radius", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("jacobian", [False, True])
    def test_the_change_is_what_was_asked_for(self, radius: float, jacobian: bool) -> None:
        policy, critic = gaussian(limit=2.0), trained()
        how = GuidanceSettings(jacobian=jacobian, radius=radius)
        chosen = choose_weight(policy, critic, self.SEEN, how, draws=64, seed=1)
        assert dict(chosen.curve)[chosen.weight] == pytest.approx(radius, rel=0.05)
        steered = guide(SteeredPolicy(policy), critic, how.with_weight(chosen.weight))
        many = torch.zeros(500, F)
        moved = steered.act(many, rng=0).chunk - SteeredPolicy(policy).act(many, rng=0).chunk
        assert float(moved.square().mean().sqrt()) / chosen.spread == pytest.approx(radius, rel=0.15)

    def test_what_can_not_be_chosen(self) -> None:
        with pytest.raises(InvalidInputError, match="does not depend on the chunk"):
            choose_weight(gaussian(), critic_of(Quadratic(0.0)), self.SEEN)
        still = FieldPolicy(lambda x, t, seen: -x / (1 - t)[:, None, None], ActionSpec(H, A))
        with pytest.raises(InvalidInputError, match="Give the weight as a number"):
            choose_weight(still, trained(), self.SEEN)
        with pytest.raises(InvalidInputError, match="radius"):
            choose_weight(gaussian(), trained(), self.SEEN, GuidanceSettings(radius=0.0))
        with pytest.raises(InvalidInputError, match="2 or more"):
            choose_weight(gaussian(), trained(), self.SEEN, draws=1)
        with pytest.raises(InvalidInputError, match="Find one with choose_weight"):
            guide(SteeredPolicy(gaussian()), trained(), GuidanceSettings("auto"))


def test_embeddings_of_tasks_are_fixed_and_share_what_their_words_share() -> None:
    one, other = task_embedding("put the mug on the plate", 64), task_embedding("put the bowl on the plate", 64)
    assert torch.equal(one, task_embedding("Put the mug on the plate.", 64))
    assert one.norm().item() == pytest.approx(1)
    assert one @ other > 0.5 > (one @ task_embedding("open drawer", 64)).abs()
    assert not task_embedding("", 3).any()
