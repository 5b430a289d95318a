"""Real-time chunking on LeRobot's policies: their padding is nobody's to hold, their caches survive being differentiated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counterflow.steering import Continuation, ContinueChunk, FlowReversal, SteeredPolicy


@pytest.mark.parametrize("jacobian", ["exact", "identity"])
def test_the_next_chunk_joins(made: Any, jacobian: Any) -> None:
    policy = made.wrapped()
    spec = policy.action_spec
    if spec.horizon - spec.past < 4:
        pytest.skip("chunks too short to continue")
    observation = made.observation()
    old = SteeredPolicy(policy, steps=policy.steps).act(observation, rng=0).chunk
    continuation = Continuation.of(old, executed=2, delay=1, past=spec.past)
    free = SteeredPolicy(policy, steps=policy.steps).act(observation, rng=1)
    guided = SteeredPolicy(policy, guidance=ContinueChunk(jacobian=jacobian), steps=policy.steps)
    held = guided.act(observation, rng=1, continuation=continuation)
    again = guided.act(observation, rng=1, continuation=continuation)
    first = spec.past
    gap, free_gap = (
        (one.chunk[:, first, : spec.dim] - old[:, first + 2, : spec.dim]).abs().mean() for one in (held, free)
    )
    assert gap < 0.5 * free_gap
    torch.testing.assert_close(held.chunk, again.chunk)
    assert not any(parameter.grad is not None for parameter in made.policy.parameters())


def test_together_with_a_reversed_reference(made: Any) -> None:
    policy = made.wrapped()
    spec = policy.action_spec
    observation = made.observation()
    old = SteeredPolicy(policy, steps=policy.steps).act(observation, rng=0).chunk
    wanted = torch.full((len(old), spec.horizon, spec.dim), 0.3)
    steered = SteeredPolicy(policy, start=FlowReversal(policy.steps), guidance=ContinueChunk(), steps=policy.steps)
    alone = steered.act(observation, wanted, 1)
    joined = steered.act(observation, wanted, 1, continuation=Continuation.of(old, 1, 1, past=spec.past))
    assert torch.equal(alone.noise, joined.noise)
    assert not torch.equal(alone.chunk, joined.chunk)
