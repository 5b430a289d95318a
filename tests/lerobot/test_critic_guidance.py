"""Critics on LeRobot's policies: on the features of the frozen backbone, alone, with a reversed reference, and best of N."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from counterflow.learning import ChunkCriticConfig, ChunkCriticLearner, Rollouts
from counterflow.policies import Normaliser
from counterflow.steering import (
    ChunkCritic,
    CriticBinding,
    CriticConfig,
    FlowReversal,
    GuidanceSettings,
    SteeredPolicy,
    choose_weight,
    guide,
    task_embedding,
)

Make = Callable[..., Any]


def binding_of(policy: Any) -> CriticBinding:
    spec = policy.action_spec
    rows = spec.executed or spec.horizon - spec.past
    return CriticBinding(policy.fingerprint, policy.family, rows, spec.dim, spec.past)


def critic_of(policy: Any, observation: dict[str, Any]) -> ChunkCritic:
    """A critic with random weights on the policy's features."""
    size = policy.features(policy.encode(observation)).shape[1]
    torch.manual_seed(0)
    config = CriticConfig("features", members=2, width=16, depth=1)
    critic = ChunkCritic(config, binding_of(policy), Normaliser(torch.zeros(size), torch.ones(size)))
    return critic.requires_grad_(False)


@pytest.mark.parametrize("jacobian", [False, True])
def test_guidance_raises_the_critics_value(made: Any, jacobian: bool) -> None:
    policy, observation = made.wrapped(), made.observation()
    critic = critic_of(policy, observation)
    how = GuidanceSettings(jacobian=jacobian, radius=0.2, aggregation="mean")
    chosen = choose_weight(policy, critic, observation, how, draws=4, steps=policy.steps)
    assert chosen.weight > 0
    base = SteeredPolicy(policy, steps=policy.steps)
    free = base.act(observation, rng=0)
    plan = guide(base, critic, how.with_weight(chosen.weight)).act(observation, rng=0)
    assert torch.equal(plan.noise, free.noise)
    assert free.features is not None
    values = [critic.value(free.features, critic.judged(one.chunk), "mean") for one in (free, plan)]
    assert (values[1] > values[0]).all()
    kept = guide(base, critic, replace(how, weight=0.0, best_of=4)).act(observation, rng=0)
    assert kept.evaluations == 4 * free.evaluations
    assert not any(parameter.grad is not None for parameter in made.policy.parameters())


def test_together_with_a_reversed_reference(made: Any) -> None:
    """The backbone is asked once for all of it."""
    policy, observation = made.wrapped(), made.observation()
    spec = policy.action_spec
    critic = critic_of(policy, observation)
    reference = torch.full((2, spec.horizon, spec.dim), 0.3)
    steered = SteeredPolicy(policy, start=FlowReversal(policy.steps), steps=policy.steps)
    free = steered.act(observation, reference, rng=0)
    with mock.patch.object(policy._flow, "prefix", wraps=policy._flow.prefix) as prefix:
        plan = guide(steered, critic, GuidanceSettings(weight=1.0)).act(observation, reference, rng=0)
    assert prefix.call_count == 1
    assert torch.equal(plan.noise, free.noise)
    assert not torch.allclose(plan.chunk, free.chunk)


@pytest.mark.parametrize("method", ["td", "monte_carlo"])
def test_a_critic_of_its_own_successes_and_failures_guides_it(shared: Make, method: Any) -> None:
    """Chunks succeed whose first number is high: what is learned on the features of the backbone leads there."""
    made = shared("smolvla")
    policy, task = made.wrapped(), task_embedding("push the cube", 6)
    base, binding = SteeredPolicy(policy, steps=policy.steps), binding_of(policy)
    plans = [base.act(made.observation(8, seed=seed), rng=seed) for seed in range(12)]
    chunks = torch.cat([plan.chunk for plan in plans])[:, : binding.horizon, : binding.dim]
    first = chunks[..., 0].mean(1)
    count = len(chunks)
    rollouts = Rollouts(
        inputs=torch.cat([plan.features for plan in plans if plan.features is not None]).numpy(),
        chunks=chunks.numpy(),
        executed=np.full(count, binding.horizon),
        success=(first > first.median()).numpy(),
        episodes=np.arange(count),
        binding=binding,
        tasks=np.tile(task.numpy(), (count, 1)),
    )
    config = ChunkCriticConfig(
        CriticConfig("features", members=2, width=32, depth=1, task_dim=6),
        method=method,
        steps=300,
        batch_size=64,
        learning_rate=3e-3,
        target_rate=0.05,
        held_out=0.0,
    )
    critic = ChunkCriticLearner(rollouts, config, 0).fit()
    observation = made.observation(8, seed=99)
    how = GuidanceSettings(radius=0.5, aggregation="mean")
    weight = choose_weight(policy, critic, observation, how, draws=4, steps=policy.steps, task=task).weight
    free = base.act(observation, rng=99)
    plan = guide(base, critic, how.with_weight(weight), task).act(observation, rng=99)
    moved = (critic.judged(plan.chunk) - critic.judged(free.chunk))[..., 0].mean()
    assert moved > 0.1 * first.std()
