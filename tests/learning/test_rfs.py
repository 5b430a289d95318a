"""RFS and residual RL: the start is the base policy, both heads learn, advantages, seeds, resumption."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.data import Replay
from counterflow.errors import CheckpointError, InvalidInputError, UnknownNameError
from counterflow.learning.residual import ResidualConfig, ResidualLearner
from counterflow.learning.rfs import RFSConfig, RFSLearner, Rollout, advantages, divergence_of, policy_loss
from counterflow.learning.sac import ActionSizes
from counterflow.policies import ActionSpec, FlowPolicy, NetworkConfig, Normaliser
from counterflow.steering import SteeringSpace
from counterflow.steering.actor import parameters

SMALL = {"width": 16, "depth": 2, "epochs": 2, "minibatches": 2}
LIMITS = torch.tensor([0.2, 0.05])


def make(seeds: list[int], latent: int = 3, limits: Tensor = LIMITS, **changes: Any) -> RFSLearner:
    return RFSLearner(4, latent, limits, RFSConfig(**{**SMALL, **changes}), seeds)


def rollout(learner: RFSLearner, turns: int = 12, rows: int = 2) -> Rollout:
    """What is rewarded is a large first latent and a large last residual."""
    seeds = len(learner.seeds)
    rng = torch.Generator().manual_seed(1)
    seen = torch.randn(turns + 1, 1, rows, 4, generator=rng).expand(-1, seeds, -1, -1)
    raw, densities = zip(*(learner.act(one) for one in seen[:-1]), strict=True)
    made = learner.executed(torch.stack(raw))
    rewards = made[..., -1] / 0.05 + (made[..., 0] if learner.latent else 0)
    done = torch.zeros(rewards.shape, dtype=torch.bool)
    return Rollout(seen[:-1], torch.stack(raw), torch.stack(densities), rewards, 0.9 + 0 * rewards, seen[1:], done)


def test_it_begins_as_the_base_policy() -> None:
    """The latent's law is the prior's own whatever is seen, the residual's mean is 0 and its deviation small."""
    learner = make([0, 1])
    raw, _ = learner.act(100 * torch.randn(2, 20_000, 4))
    made = learner.executed(raw)
    assert made[..., :3].mean().abs() < 0.01
    assert made[..., :3].std() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(made[..., 3:].mean((0, 1)) / LIMITS, torch.zeros(2), atol=3e-3, rtol=0)
    torch.testing.assert_close(made[..., 3:].std((0, 1)) / LIMITS, torch.full((2,), 0.08), atol=3e-3, rtol=0)
    best, _ = learner.act(torch.randn(2, 5, 4), explore=False)
    assert (best == 0).all()


def test_both_heads_learn_and_the_frozen_policy_stays_as_it_is() -> None:
    spec = ActionSpec(1, 3, (-1.0,) * 3, (1.0,) * 3)
    flow = FlowPolicy(NetworkConfig(width=8, depth=1), Normaliser(torch.zeros(4), torch.ones(4)), spec)
    flow.requires_grad_(False)
    before = flow.fingerprint
    space = SteeringSpace(flow, "both", bound=None, residual_bound=0.1)
    learner = RFSLearner(4, space.latent_size, space.limits[space.latent_size :], RFSConfig(**SMALL), [0])
    context, inputs = space.encode(torch.randn(6, 4))
    raw, _ = learner.act(inputs[None])
    space.decide(context, learner.executed(raw)[0], torch.randn(6, 1, 3))
    head = learner.policy.weights[-1].detach().clone()
    learner.update(rollout(learner))
    moved = (learner.policy.weights[-1] - head).abs().sum((0, 1))
    assert (moved[: space.latent_size] > 0).all()
    assert (moved[space.latent_size :] > 0).all()
    assert flow.fingerprint == before


@pytest.mark.parametrize(("latent", "limits"), [(3, LIMITS), (3, LIMITS[:0]), (0, LIMITS)])
def test_it_learns_what_is_rewarded(latent: int, limits: Tensor) -> None:
    learner = make([0, 1], latent, limits, learning_rate=5e-3, residual_std=0.3)

    def level() -> float:
        made = learner.executed(learner.act(torch.randn(2, 200, 4), explore=False)[0])
        own = made[..., 0] if latent else made[..., -1] / 0.05
        return float(own.mean())

    for _ in range(15):
        found = rollout(learner)
        if not len(limits):
            found = Rollout(**{**vars(found), "rewards": found.raw[..., 0]})
        numbers = learner.update(found)
    assert level() > 0.25
    assert ("latent_std" in numbers, "residual_std" in numbers) == (latent > 0, len(limits) > 0)


def test_advantages_stop_at_ends_and_count_what_lies_beyond_a_time_limit() -> None:
    rewards, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.5, 0.5])
    following, done = torch.tensor([0.5, 10.0, 0.5]), torch.tensor([False, True, False])
    found = advantages(rewards, torch.tensor([0.9, 0.8, 0.0]), done, values, following, 0.5)
    last = 3 - 0.5
    middle = 2 + 0.8 * 10 - 0.5
    first = 1 + 0.9 * 0.5 - 0.5 + 0.5 * 0.9 * middle
    assert found.tolist() == pytest.approx([first, middle, last])


def test_the_ratio_is_clipped_where_it_has_gone_far_enough() -> None:
    density = torch.tensor([[math.log(1.5)]], requires_grad=True)
    loss = policy_loss(density, torch.zeros(1, 1), torch.ones(1, 1), 0.2)
    assert loss.item() == pytest.approx(-1.2)
    loss.sum().backward()
    assert density.grad is not None
    assert density.grad.item() == 0
    assert policy_loss(density, torch.zeros(1, 1), -torch.ones(1, 1), 0.2).item() == pytest.approx(1.5)


def test_the_divergence_is_that_of_gaussians() -> None:
    mean, log_std = torch.tensor([[1.0, 2.0]]), torch.tensor([0.1, -0.4])
    before, before_log_std = torch.zeros(1, 2), torch.tensor([0.3, 0.2])
    found = divergence_of(mean, log_std, before, before_log_std)
    laws = [torch.distributions.Normal(m, s.exp()) for m, s in ((before, before_log_std), (mean, log_std))]
    torch.testing.assert_close(found, torch.distributions.kl_divergence(*laws).sum(-1))


def test_steps_are_as_long_as_the_divergence_lets_them() -> None:
    def moved(desired: float) -> tuple[float, Tensor]:
        learner = make([0, 1], learning_rate=0.1, epochs=10, desired_divergence=desired)
        numbers = [learner.update(rollout(learner, turns=32)) for _ in range(8)]
        return float(torch.stack([one["divergence"] for one in numbers[-3:]]).mean()), learner.pace

    free, pace = moved(0.0)
    assert bool((pace == 1).all())
    held, pace = moved(0.02)
    assert free > 10 * held
    assert held < 0.2
    assert bool((pace < 1).all())


def test_a_step_moves_a_residual_as_far_in_nats_as_a_latent() -> None:
    """Otherwise a residual with a deviation of 0.08 takes nearly all of the divergence that an update is allowed."""
    learner = make([0, 1], epochs=1, minibatches=1)
    before = learner.log_std.detach().clone()
    learner.update(rollout(learner, turns=64))
    seen = torch.randn(2, 500, 4)
    mean = learner.mean(seen)
    nats = torch.stack(
        [divergence_of(mean[..., [i]], before[..., [i]], 0 * mean[..., [i]], before[..., [i]]).mean() for i in range(5)]
    )
    assert nats.min() > nats.max() / 20
    torch.testing.assert_close(learner.part(1)(seen[1:]), mean[1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_kept_of_a_seed_learned_on_a_gpu() -> None:
    learner = RFSLearner(4, 3, LIMITS, RFSConfig(**SMALL), [0, 1], "cuda")
    assert learner.part(0)(torch.randn(1, 5, 4)).shape == (1, 5, 5)


def test_a_seed_learns_the_same_alone_and_beside_others() -> None:
    together, alone = make([4, 9]), make([9])
    for _ in range(2):
        both, one = together.update(rollout(together)), alone.update(rollout(alone))
    for name in one:
        torch.testing.assert_close(both[name][1], one[name][0], rtol=1e-3, atol=1e-4)


def test_resumed_training_gives_the_same_numbers() -> None:
    whole, second = make([0, 1]), make([0, 1])
    whole.update(rollout(whole))
    second.restore(whole.state())
    wanted, found = whole.update(rollout(whole)), second.update(rollout(second))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    with pytest.raises(CheckpointError):
        make([0]).restore(whole.state())


def test_each_seeds_gradient_is_shortened_by_itself() -> None:
    learner = make([0, 1])
    for one in learner._modules.parameters():
        one.grad = torch.zeros_like(one)
    learner.policy.biases[-1].grad[0] = 100.0
    learner.policy.biases[-1].grad[1] = 1e-3
    learner._shorten()
    gradient = learner.policy.biases[-1].grad
    assert gradient[0].norm() == pytest.approx(1, abs=1e-3)
    assert (gradient[1] == 1e-3).all()


def test_residuals_are_ramped() -> None:
    learner = make([0])
    raw = torch.full((1, 1, 5), 10.0)
    torch.testing.assert_close(learner.executed(raw, 0.5)[0, 0, 3:], 0.5 * LIMITS)
    assert [RFSConfig(ramp=10).size_at(count) for count in (0, 5, 50)] == [0, 0.5, 1]
    assert [ResidualConfig(ramp=10).size_at(count) for count in (0, 5, 50)] == [0, 0.5, 1]
    assert RFSConfig().size_at(0) == 1


@pytest.mark.parametrize(
    "changes", [{"gae": 0.0}, {"epochs": 0}, {"clip": 2.0}, {"width": 2, "depth": 4}, {"entropy_weight": -1.0}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        RFSConfig(**changes)
    with pytest.raises(InvalidInputError, match="something to decide on"):
        make([0], 0, LIMITS[:0])
    with pytest.raises(UnknownNameError):
        ResidualConfig(critic_sees="nothing")  # type: ignore[arg-type]


def residual(sees: str, **changes: Any) -> ResidualLearner:
    config = ResidualConfig(width=12, depth=1, batch_size=8, compile=False, critic_sees=sees, **changes)  # type: ignore[arg-type]
    sizes = ActionSizes(5, LIMITS, 2)
    return ResidualLearner(sizes, config, [0, 1], base=2, compose=lambda base, own: (base + own).clamp(-1, 1))


@pytest.mark.parametrize("sees", ["executed", "residual", "both"])
def test_a_residuals_critic_sees_what_is_asked(sees: str) -> None:
    learner = residual(sees)
    observations, actions = torch.full((2, 3, 5), 0.9), torch.full((2, 3, 2), 0.15)
    observations[..., :3] = 7.0
    looked = learner.judge(observations, actions)
    own = {"executed": [1.0, 1.0], "residual": [0.75, 3.0], "both": [0.9, 0.9, 0.75, 3.0]}[sees]
    assert looked.shape[-1] == learner.judged_size
    assert looked[0, 0].tolist() == pytest.approx([7.0, 7.0, 7.0, *own])
    replay = Replay((5, 2, 2), 2, 1, 50)
    for turn in range(20):
        done = torch.full((2, 1), turn % 5 == 4)
        seen = torch.randn(2, 1, 5)
        replay.add(seen, actions[:, :1], seen[..., :2], seen[..., 0], seen[..., 0].abs(), seen, done, done)
    numbers = learner.update(replay, 3)
    assert all(torch.isfinite(value).all() for value in numbers.values())


def test_a_residual_begins_small() -> None:
    learner = residual("executed")
    mean, log_std = parameters(learner.networks["actor"](torch.randn(2, 50, 5)))
    assert mean.abs().max() < 0.05
    assert log_std.exp().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (learner.act(torch.randn(2, 500, 5)).std((0, 1)) / LIMITS).max() < 0.15
