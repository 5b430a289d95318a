"""Real-time chunking: the next chunk continues the one that is being executed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.policies import ActionSpec, FieldPolicy
from counterflow.steering import (
    Continuation,
    ContinueChunk,
    FlowReversal,
    Reference,
    SteeredPolicy,
    SteeringContext,
    Together,
    continuation_weights,
)

HORIZON, DIM = 4, 2
SIZE = HORIZON * DIM


class Correlated:
    """The exact flow from N(0, I) to N(mean, covariance) over whole chunks, whose entries depend on each other."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(3)
        root = torch.randn(SIZE, SIZE, generator=rng, dtype=torch.float64) / math.sqrt(SIZE)
        self.covariance = root @ root.T + 0.05 * torch.eye(SIZE, dtype=torch.float64)
        self.mean = torch.randn(SIZE, generator=rng, dtype=torch.float64)

    def gain(self, t: float) -> Tensor:
        """The Jacobian of E[action | x_t] with respect to x_t."""
        eye = torch.eye(SIZE, dtype=torch.float64)
        return t * self.covariance @ torch.linalg.inv((1 - t) ** 2 * eye + t**2 * self.covariance)

    def estimate(self, x: Tensor, t: float) -> Tensor:
        return (self.mean + (x.flatten(1) - t * self.mean) @ self.gain(t)).view_as(x)

    def __call__(self, x: Tensor, t: Tensor, observation: Any = None) -> Tensor:
        time, eye = float(t[0]), torch.eye(SIZE, dtype=torch.float64)
        spread = torch.linalg.inv((1 - time) ** 2 * eye + time**2 * self.covariance)
        return (
            self.mean + (x.flatten(1) - time * self.mean) @ spread @ (time * self.covariance - (1 - time) * eye)
        ).view_as(x)


@pytest.fixture
def flow() -> Correlated:
    return Correlated()


@pytest.fixture
def policy(flow: Correlated) -> FieldPolicy:
    return FieldPolicy(flow, ActionSpec(HORIZON, DIM))


def some(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, HORIZON, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def observations(rows: int) -> Tensor:
    return torch.zeros(rows, 1, dtype=torch.float64)


def steered(policy: FieldPolicy, jacobian: Any = "exact", **rest: Any) -> SteeredPolicy:
    return SteeredPolicy(policy, guidance=ContinueChunk(jacobian=jacobian), **rest)


class Doubles:
    """A start in double precision."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def __call__(self, policy: Any, context: SteeringContext, rng: Any) -> tuple[Tensor, Tensor]:
        return self.noise, self.noise.new_zeros(len(self.noise))


class TestWeights:
    def test_the_papers_law(self) -> None:
        # d = 1, H - s = 4: c = 3/4, 2/4, 1/4 at the actions between, times (e^c - 1)/(e - 1).
        found = continuation_weights(6, 1, 4, "exponential")
        expected = [1.0, *(c * (math.exp(c) - 1) / (math.e - 1) for c in (0.75, 0.5, 0.25)), 0.0, 0.0]
        torch.testing.assert_close(found, torch.tensor(expected))

    def test_the_others(self) -> None:
        assert continuation_weights(5, 2, 4, "linear").tolist() == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])
        assert continuation_weights(5, 2, 4, "ones").tolist() == [1, 1, 1, 1, 0]
        assert continuation_weights(5, 2, 4, "zeros").tolist() == [1, 1, 0, 0, 0]
        assert continuation_weights(3, 0, 0).tolist() == [0, 0, 0]
        assert continuation_weights(3, 3, 3).tolist() == [1, 1, 1]

    @given(st.data())
    def test_they_never_rise(self, data: st.DataObject) -> None:
        horizon = data.draw(st.integers(1, 60))
        overlap = data.draw(st.integers(0, horizon))
        delay = data.draw(st.integers(0, overlap))
        for schedule in ("exponential", "linear", "ones", "zeros"):
            weights = continuation_weights(horizon, delay, overlap, schedule)  # type: ignore[arg-type]
            assert weights.shape == (horizon,)
            assert bool((weights.diff() <= 0).all())
            assert bool((weights[:delay] == 1).all())
            assert bool((weights[overlap:] == 0).all())

    @pytest.mark.parametrize(("delay", "overlap"), [(-1, 2), (3, 2), (2, 5)])
    def test_counts_out_of_order(self, delay: int, overlap: int) -> None:
        with pytest.raises(InvalidInputError, match="delay"):
            continuation_weights(4, delay, overlap)

    def test_an_unknown_schedule(self) -> None:
        with pytest.raises(UnknownNameError, match="schedule"):
            continuation_weights(4, 1, 2, "cosine")  # type: ignore[arg-type]


class TestContinuation:
    def test_the_rest_of_the_old_chunk_moves_to_the_front(self) -> None:
        chunk = some(2)
        found = Continuation.of(chunk, executed=1, delay=1, schedule="ones")
        assert torch.equal(found.chunk[:, :3], chunk[:, 1:])
        assert found.weights.tolist() == [[1, 1, 1, 0]] * 2

    def test_rows_that_lie_in_the_past_are_held_like_those_of_the_delay(self) -> None:
        found = Continuation.of(some(1), executed=1, delay=1, schedule="zeros", past=1)
        assert found.weights.tolist() == [[1, 1, 0, 0]]

    def test_a_chunk_that_is_over_holds_nothing(self) -> None:
        assert not Continuation.of(some(1), executed=HORIZON, delay=0).weights.any()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c, w: (c[0], w), "expected"),
            (lambda c, w: (c, w[:, :2]), "expected"),
            (lambda c, w: (c * torch.nan, w), "NaN"),
            (lambda c, w: (c, w + 0.1), "0 to 1"),
            (lambda c, w: (c, w * torch.nan), "0 to 1"),
        ],
    )
    def test_what_can_not_be_right(self, change: Any, message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            Continuation(*change(some(2), torch.ones(2, HORIZON)))

    def test_more_executed_than_there_is(self) -> None:
        with pytest.raises(InvalidInputError, match="executed"):
            Continuation.of(some(1), executed=HORIZON + 1, delay=0)
        with pytest.raises(InvalidInputError, match="delay"):
            Continuation.of(some(1), executed=HORIZON - 1, delay=2)

    def test_of_another_policy(self, policy: FieldPolicy) -> None:
        other = Continuation.of(torch.zeros(1, HORIZON + 1, DIM), 1, 0)
        with pytest.raises(MismatchError, match="continue"):
            steered(policy).act(observations(1), continuation=other)
        with pytest.raises(MismatchError, match="continue"):
            steered(policy).act(observations(2), continuation=Continuation.of(some(1), 1, 0))


class TestTheGuidance:
    @pytest.mark.parametrize("time", [0.05, 0.3, 0.5, 0.8, 0.95])
    @pytest.mark.parametrize("jacobian", ["exact", "identity"])
    def test_both_forms_are_what_the_closed_form_says(
        self, flow: Correlated, policy: FieldPolicy, time: float, jacobian: str
    ) -> None:
        old, x, t = some(3, 1), some(3, 2), torch.full((3,), time, dtype=torch.float64)
        continuation = Continuation.of(old, executed=1, delay=1)
        guided = steered(policy, jacobian)
        context = guided.encode(observations(3), None, continuation)
        found = guided.velocity(context, x, t)

        error = continuation.weights[..., None] * (continuation.chunk - flow.estimate(x, time))
        # x + (1 - t) v is E[action | x_t], whose Jacobian is `gain` (symmetric: it is a function of the covariance).
        pulled = (error.flatten(1) @ flow.gain(time)).view_as(x) if jacobian == "exact" else error
        factor = min(5.0, (time**2 + (1 - time) ** 2) / (time * (1 - time)))
        torch.testing.assert_close(found, flow(x, t) + factor * pulled, atol=1e-9, rtol=1e-9)
        assert not found.requires_grad

    def test_at_the_beginning_the_factor_is_bounded(self, flow: Correlated, policy: FieldPolicy) -> None:
        context = steered(policy).encode(observations(1), None, Continuation.of(some(1), 1, 1))
        for jacobian in ("exact", "identity"):
            found = steered(policy, jacobian).velocity(context, some(1, 2), torch.zeros(1, dtype=torch.float64))
            assert bool(found.isfinite().all())

    @pytest.mark.parametrize("jacobian", ["exact", "identity"])
    def test_the_new_chunk_joins_the_old_one(self, policy: FieldPolicy, jacobian: str) -> None:
        start = Doubles(some(64))
        old = SteeredPolicy(policy, start=Doubles(some(64, 1)), steps=20).act(observations(64)).chunk
        continuation = Continuation.of(old, executed=1, delay=1)
        free = SteeredPolicy(policy, start=start, steps=20).act(observations(64)).chunk
        held = steered(policy, jacobian, start=start, steps=20).act(observations(64), continuation=continuation).chunk
        gap, free_gap = ((one[:, 0] - old[:, 1]).abs().mean() for one in (held, free))
        assert gap < 0.25 * free_gap

    def test_only_the_exact_form_reaches_what_nothing_holds(self, flow: Correlated, policy: FieldPolicy) -> None:
        # One evaluation of the field: entries without weight feel the correction through the Jacobian alone.
        x, t = some(1), torch.full((1,), 0.5, dtype=torch.float64)
        continuation = Continuation(some(1, 5), torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64))
        moved = {}
        for jacobian in ("exact", "identity"):
            guided = steered(policy, jacobian)
            context = guided.encode(observations(1), None, continuation)
            moved[jacobian] = (guided.velocity(context, x, t) - flow(x, t))[0, 1:].abs().max()
        assert moved["identity"] == 0
        assert moved["exact"] > 1e-3

    def test_without_a_chunk_to_continue_nothing_changes(self, policy: FieldPolicy) -> None:
        start = Doubles(some(2))
        plain = SteeredPolicy(policy, start=start).act(observations(2))
        for jacobian in ("exact", "identity"):
            plan = steered(policy, jacobian, start=start).act(observations(2))
            assert torch.equal(plan.chunk, plain.chunk)
            nothing = Continuation(some(2), torch.zeros(2, HORIZON, dtype=torch.float64))
            held = steered(policy, jacobian, start=start).act(observations(2), continuation=nothing)
            torch.testing.assert_close(held.chunk, plain.chunk)

    def test_it_costs_no_further_evaluation(self, policy: FieldPolicy) -> None:
        plan = steered(policy, start=Doubles(some(1)), steps=7).act(
            observations(1), continuation=Continuation.of(some(1), 1, 1)
        )
        assert plan.evaluations == 7

    def test_together_with_flow_reversal(self, policy: FieldPolicy) -> None:
        reference = Reference.of(some(16, 9).clamp(-1, 1))
        old = SteeredPolicy(policy, start=Doubles(some(16, 1)), steps=20).act(observations(16)).chunk
        continuation = Continuation.of(old, executed=2, delay=1)
        start = FlowReversal(steps=20, solver="exact")
        plain = SteeredPolicy(policy, start=start, steps=20).act(observations(16), reference).chunk
        torch.testing.assert_close(plain, reference.chunk, atol=1e-4, rtol=0)
        joined = steered(policy, start=start, steps=20).act(observations(16), reference, continuation=continuation)
        assert (joined.chunk[:, 0] - old[:, 2]).abs().mean() < 0.3 * (plain[:, 0] - old[:, 2]).abs().mean()
        assert torch.equal(joined.noise, SteeredPolicy(policy, start=start).act(observations(16), reference).noise)

    def test_padding_is_nobodys_to_hold(self, flow: Correlated) -> None:
        """The last dimension as padding: it is moved by what the held one does to it, not towards the old chunk's."""
        padded = FieldPolicy(flow, ActionSpec(HORIZON, 1, padding=1))
        x, t = some(2), torch.full((2,), 0.5, dtype=torch.float64)
        old = some(2, 5)
        other = old.clone()
        other[..., 1] += 1
        moved = []
        for chunk in (old, other, old[..., :1]):
            guided = steered(padded, "identity")
            context = guided.encode(observations(2), None, Continuation.of(chunk, 1, 1))
            moved.append(guided.velocity(context, x, t) - flow(x, t))
        assert torch.equal(moved[0], moved[1])
        assert torch.equal(moved[0], moved[2])
        assert not moved[0][..., 1].any()
        assert moved[0][:, 0, 0].all()

    def test_several_candidates_continue_the_same_chunk(self, policy: FieldPolicy) -> None:
        class Two:
            candidates = 2

            def __call__(self, chunks: Tensor, context: SteeringContext) -> Tensor:
                return chunks[:, 1:]

        old = some(2, 4)
        noise = some(4)
        guided = steered(policy, start=Doubles(noise), edit=Two())
        plan = guided.act(observations(2), continuation=Continuation.of(old, 1, 1))
        alone = steered(policy, start=Doubles(noise[1::2])).act(
            observations(2), continuation=Continuation.of(old, 1, 1)
        )
        torch.testing.assert_close(plan.chunk, alone.chunk)

    def test_a_guided_policy_guided_again_differentiates_the_inner_guidance(self, policy: FieldPolicy) -> None:
        x, t = some(1), torch.full((1,), 0.4, dtype=torch.float64)
        inner = steered(policy)
        outer = SteeredPolicy(inner, guidance=ContinueChunk())
        continuation = Continuation.of(some(1, 5), 1, 1)
        context = outer.encode(observations(1), None, continuation)

        def estimate(point: Tensor) -> Tensor:
            return point + 0.6 * inner.velocity(context.features, point, t)

        basis = torch.eye(SIZE, dtype=torch.float64).view(SIZE, 1, HORIZON, DIM)
        jacobian = torch.stack([(estimate(x + 1e-5 * e) - estimate(x - 1e-5 * e)).flatten() / 2e-5 for e in basis], 1)
        error = continuation.weights[..., None] * (continuation.chunk - estimate(x))
        pulled = (error.flatten() @ jacobian).view_as(x)
        factor = (0.4**2 + 0.6**2) / (0.4 * 0.6)
        expected = inner.velocity(context.features, x, t) + factor * pulled
        torch.testing.assert_close(outer.velocity(context, x, t), expected, atol=1e-6, rtol=1e-6)

    def test_among_others(self, policy: FieldPolicy) -> None:
        def push(x: Tensor, t: Tensor, v: Tensor, context: SteeringContext) -> Tensor:
            return v + 0.1

        assert Together([push, ContinueChunk()]).differentiates
        assert not Together([push, ContinueChunk(jacobian="identity")]).differentiates
        start, continuation = Doubles(some(1)), Continuation.of(some(1, 5), 1, 1)
        both = SteeredPolicy(policy, start=start, guidance=Together([push, ContinueChunk()]))
        nested = SteeredPolicy(SteeredPolicy(policy, start=start, guidance=push), guidance=ContinueChunk())
        torch.testing.assert_close(
            both.act(observations(1), continuation=continuation).chunk,
            nested.act(observations(1), continuation=continuation).chunk,
        )

    def test_a_policy_that_can_not_be_differentiated(self, flow: Correlated) -> None:
        policy = FieldPolicy(torch.no_grad()(flow), ActionSpec(HORIZON, DIM))
        constant = Doubles(some(1))
        with pytest.raises(InvalidInputError, match="identity"):
            steered(policy, start=constant).act(observations(1), continuation=Continuation.of(some(1), 1, 1))
        steered(policy, "identity", start=constant).act(observations(1), continuation=Continuation.of(some(1), 1, 1))

    @pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan])
    def test_a_weight_out_of_range(self, weight: float) -> None:
        with pytest.raises(InvalidInputError, match="largest_weight"):
            ContinueChunk(weight)

    def test_an_unknown_jacobian(self) -> None:
        with pytest.raises(UnknownNameError, match="jacobian"):
            ContinueChunk(jacobian="approximate")  # type: ignore[arg-type]
