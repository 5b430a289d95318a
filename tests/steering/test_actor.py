"""Actors at a frozen policy's ports: the same actions as in training, and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterflow.errors import CheckpointError, MismatchError
from counterflow.policies import ActionSpec, FlowPolicy, NetworkConfig, Normaliser
from counterflow.random import generator
from counterflow.steering import LatentShape, binding_of
from counterflow.steering.actor import ActorConfig, SteeringActor, parameters, steer_actor


@pytest.fixture(scope="module")
def policy() -> FlowPolicy:
    torch.manual_seed(0)
    spec = ActionSpec(3, 2, (-1.0,) * 2, (1.0,) * 2, Normaliser(torch.zeros(2), torch.tensor([0.5, 2.0])))
    made = FlowPolicy(NetworkConfig(width=8, depth=1), Normaliser(torch.zeros(4), torch.full((4,), 2.0)), spec)
    return made.requires_grad_(False).eval()


CONFIGS = {
    "latent": ActorConfig(hidden=(8,)),
    "repeated": ActorConfig(latent=LatentShape("repeated"), hidden=(8,)),
    "residual": ActorConfig(ports="residual", residual_bound=(0.1, 0.2), show_base=True, hidden=(8,)),
    "both": ActorConfig(
        "gaussian", "both", None, residual_bound=(0.1, 0.2), hidden=(8, 4), norm="none", activation="elu"
    ),
    "both, bounded": ActorConfig(
        "gaussian", "both", 0.7, residual_bound=(0.1, 0.2), hidden=(8, 4), norm="none", activation="elu"
    ),
}


def make(name: str, policy: FlowPolicy) -> SteeringActor:
    torch.manual_seed(1)
    config = CONFIGS[name]
    space = config.space(policy, 4, "euler")
    inputs = 4 + (6 if config.show_base else 0)
    return SteeringActor(config, inputs, space.size, binding_of(policy, 4)).requires_grad_(False)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_steered_policy_executes_what_the_space_says(name: str, policy: FlowPolicy) -> None:
    actor = make(name, policy)
    space = actor.config.space(policy, 4, "euler")
    observation = torch.randn(5, 4)
    plan = steer_actor(policy, actor, sample=False).act(observation, rng=3)
    fresh = torch.randn((5, 3, 2), generator=generator(3))
    context, seen = space.encode(observation)
    if actor.config.show_base:
        seen = torch.cat([seen, space.denoise(context, fresh).flatten(1)], 1)
    wanted = space.decide(context, actor(seen, space.limits), fresh)
    torch.testing.assert_close(plan.actions, wanted.actions)
    torch.testing.assert_close(plan.noise, wanted.noise)
    assert plan.actions.std() > 0


def test_a_gaussian_actors_latents_are_drawn(policy: FlowPolicy) -> None:
    actor, observation = make("both", policy), torch.randn(5, 4)
    drawn = [steer_actor(policy, actor).act(observation, rng=seed).noise for seed in (0, 1)]
    assert not torch.allclose(*drawn)
    means = [steer_actor(policy, actor, sample=False).act(observation, rng=seed).noise for seed in (0, 1)]
    torch.testing.assert_close(*means)


def test_a_gaussian_actors_latents_are_clipped_to_their_bound_and_nothing_else(policy: FlowPolicy) -> None:
    """Within it they are what is said, beyond it they lie on it; without one they are free."""
    free, bounded = make("both", policy), make("both, bounded", policy)
    bounded.load_state_dict(free.state_dict())
    observation = torch.randn(500, 4)
    said, kept = (steer_actor(policy, one).act(observation, rng=0).noise for one in (free, bounded))
    assert said.abs().max() > 2
    torch.testing.assert_close(kept, said.clamp(-0.7, 0.7))
    draws = torch.randn(500, free.outputs)
    said, kept = (
        one(observation, one.config.space(policy, 4, "euler").limits, draws)[:, one.latents :]
        for one in (free, bounded)
    )
    torch.testing.assert_close(kept, said)
    assert said.abs().max() > 0.1


def test_a_squashed_actors_latents_are_drawn_where_that_is_asked_for(policy: FlowPolicy) -> None:
    """By the law that it was trained with: the network's deviations, squashed into the bound."""
    actor, observation = make("latent", policy), torch.randn(1, 4).expand(4000, -1)
    mean = steer_actor(policy, actor).act(observation, rng=0).noise
    drawn = steer_actor(policy, actor, sample=True).act(observation, rng=0).noise
    assert torch.equal(mean[0], mean[1])
    assert drawn.abs().max() <= 1.5
    _, log_std = parameters(actor.network(observation[None, :1])[0])
    raw = torch.atanh((drawn / 1.5).clamp(-1 + 1e-6, 1 - 1e-6)).flatten(1)
    torch.testing.assert_close(raw.median(0).values, torch.atanh(mean[0].flatten() / 1.5), atol=0.1, rtol=0.1)
    torch.testing.assert_close(raw.std(0), log_std[0].exp(), atol=0.05, rtol=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_comes_back_from_disk(name: str, policy: FlowPolicy, tmp_path: Path) -> None:
    actor = make(name, policy)
    path = actor.save(tmp_path / "actor")
    again = SteeringActor.load(path)
    assert again.config == actor.config
    assert again.fingerprint == actor.fingerprint
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        SteeringActor.load(path)


def test_another_policy_or_size_is_refused(policy: FlowPolicy) -> None:
    actor = make("latent", policy)
    other = FlowPolicy(NetworkConfig(width=8, depth=2), policy.observation_normaliser, policy.action_spec)
    with pytest.raises(MismatchError, match="this actor belongs to another frozen policy"):
        steer_actor(other, actor)
    with pytest.raises(MismatchError, match="sees"):
        actor(torch.zeros(2, 3), torch.ones(6))
