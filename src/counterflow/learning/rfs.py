"""RFS: latent and residual together, learned by PPO (arXiv 2602.01789).

    pi(s) -> (a_0, a_r),   executed action = limit( flow(s, a_0) + a_r ),   a_r = bound * tanh(raw)

a_0 is Gaussian and begins as the prior's own noise, mean 0 and deviation 1 (where the space has a noise bound it clips that);
raw is Gaussian, begins with mean 0 and a small deviation. So it begins as the base policy (with a stochastic residual: in the
mean, and nearly so where its deviation is small).
No likelihood of the flow and no gradient through its sampler are needed.

    policy   L = -E min(ratio A, clip(ratio, 1 - c, 1 + c) A),   A by generalised advantage estimation
    value    L = E (V(s) - A - V_old(s))^2

A time limit is no end: the value of the last observation counts. Ablations decide on the latent alone, or on the residual alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from counterflow.checks import RATE, check_numbers
from counterflow.errors import InvalidInputError
from counterflow.learning.state import Resumable
from counterflow.policies import as_device
from counterflow.policies.stacked import Activation, StackedMLP
from counterflow.random import check_seed, child_seed, generator

PACING = 1.5
PACES = (0.01, 10.0)


@dataclass(frozen=True)
class RFSConfig:
    """Settings of PPO over latent and residual.

    Attributes:
        discount: gamma of an environment step.
        gae: lambda of generalised advantage estimation, a decision.
        clip: of the ratio.
        epochs: passes over a rollout.
        minibatches: in a pass.
        rollout: decisions of every environment between two updates.
        max_gradient: norm to which gradients are scaled down.
        learning_rate: of the policy.
        value_learning_rate: of the value.
        width: neurons of the first hidden layer; each next has half as many.
        depth: hidden layers.
        activation: of both networks.
        value_weight: of the value's loss.
        entropy_weight: of the entropy's bonus.
        residual_std: deviation of the residual at the start, in units of its bound (0.08 was healthy, 0.37 destroyed one base);
            the network says the residual's mean in units of it, so it is the size of a step, too.
        desired_divergence: of the policy after an update from before, KL in nats; each seed's steps become shorter or longer so
            that it comes near (as in rsl_rl, a minibatch at a time); 0: steps are the learning rate's. With a residual whose
            deviation is small a step of the mean is many deviations, which clipping does not hold.
        ramp: decisions of a seed over which the residual grows to its full size; 0: it has it from the start.

    Raises:
        InvalidInputError: a number is out of range.
    """

    discount: float = 0.99
    gae: float = 0.95
    clip: float = 0.2
    epochs: int = 10
    minibatches: int = 4
    rollout: int = 64
    max_gradient: float = 1.0
    learning_rate: float = 3e-4
    value_learning_rate: float = 1e-3
    width: int = 256
    depth: int = 3
    activation: Activation = "elu"
    value_weight: float = 1.0
    entropy_weight: float = 0.0
    residual_std: float = 0.08
    desired_divergence: float = 0.0
    ramp: int = 0

    def __post_init__(self) -> None:
        """Check every setting."""
        check_numbers(self, or_zero=("ramp", "desired_divergence"))
        RATE.check_all(self, "discount", "gae", "clip", "learning_rate", "value_learning_rate", "residual_std")
        if self.width >> (self.depth - 1) < 1:
            raise InvalidInputError(
                f"width {self.width} can't be halved {self.depth - 1} times; expected more neurons, or fewer layers."
            )

    @property
    def hidden(self) -> list[int]:
        """The hidden layers."""
        return [self.width >> layer for layer in range(self.depth)]

    def size_at(self, decisions: int) -> float:
        """Return the share of the residual that is executed after so many decisions of a seed."""
        return min(1.0, decisions / self.ramp) if self.ramp else 1.0


@dataclass(frozen=True)
class Rollout:
    """Decisions of all environments, one after another: T decisions, S seeds, E environments.

    Attributes:
        observations: (T, S, E, F).
        raw: (T, S, E, D) what the policy drew.
        densities: (T, S, E) its log-density there.
        rewards: (T, S, E) discounted sums over the chunk.
        discounts: (T, S, E) what the next value counts, 0 where the task was solved.
        next_observations: (T, S, E, F), of an episode that ended at its end.
        done: (T, S, E) bool.
    """

    observations: Tensor
    raw: Tensor
    densities: Tensor
    rewards: Tensor
    discounts: Tensor
    next_observations: Tensor
    done: Tensor


def density_of(mean: Tensor, log_std: Tensor, raw: Tensor) -> Tensor:
    """Return the log-density (...) of draws (..., D) of a Gaussian."""
    noise = (raw - mean) / log_std.exp()
    return (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def divergence_of(mean: Tensor, log_std: Tensor, from_mean: Tensor, from_log_std: Tensor) -> Tensor:
    """Return KL(before || now), nats (...), of Gaussians (..., D)."""
    shift = (mean - from_mean).square() + (2 * from_log_std).exp()
    return (log_std - from_log_std + 0.5 * shift * (-2 * log_std).exp() - 0.5).sum(-1)


def advantages(
    rewards: Tensor, discounts: Tensor, done: Tensor, values: Tensor, next_values: Tensor, gae: float
) -> Tensor:
    """Return generalised advantages (arXiv 1506.02438), all (T, ...).

    Discounts are each decision's own (a chunk may be cut short); at an episode's end the trace stops, and what comes after
    counts through `next_values` unless the discount is 0.
    """
    found, trace = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for turn in reversed(range(len(rewards))):
        error = rewards[turn] + discounts[turn] * next_values[turn] - values[turn]
        trace = error + gae * discounts[turn] * trace * (~done[turn])
        found[turn] = trace
    return found


def policy_loss(density: Tensor, before: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return PPO's clipped loss (S,) (arXiv 1707.06347, equation 7); all (S, B)."""
    ratio = (density - before).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean(1)


class RFSLearner(Resumable):
    """Trains policies over latent and residual, many seeds at once.

    Args:
        observation: F.
        latent: how many numbers decide on the latent; 0: it is left to the prior (residual alone).
        residual_limits: (R,) bounds of the residual's numbers; empty: latent alone.
        config: the settings.
        seeds: one a run that is trained.
        device: where to train.

    Raises:
        InvalidInputError: there is nothing to decide on, or no seed, or one twice, or a bound is not positive.
    """

    name: ClassVar[str] = "rfs"

    def __init__(
        self,
        observation: int,
        latent: int,
        residual_limits: Tensor,
        config: RFSConfig,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        if not seeds or len({*seeds}) != len(seeds):
            raise InvalidInputError(f"the seeds are {tuple(seeds)}; expected one or more different ones.")
        if latent + len(residual_limits) == 0 or bool((residual_limits <= 0).any()):
            raise InvalidInputError(
                f"the policy would decide on {latent} numbers of the latent and on residuals bounded by "
                f"{residual_limits.tolist()}; expected something to decide on, and positive bounds."
            )
        self.config, self.seeds = config, tuple(check_seed(seed) for seed in seeds)
        self.device, self.step = as_device(device), 0
        self.latent, self.limits = latent, residual_limits.to(self.device)
        self.size = latent + len(residual_limits)
        count = len(self.seeds)
        self.policy = StackedMLP(observation, self.size, count, config.hidden, activation=config.activation)
        self.value = StackedMLP(observation, 1, count, config.hidden, activation=config.activation)
        weights = [generator(child_seed(seed, "weights")) for seed in self.seeds]
        for network in (self.policy, self.value):
            network.reset(weights)
        with torch.no_grad():
            self.policy.weights[-1].zero_()  # the mean is 0 everywhere: the latent's law is the prior's own
        start = torch.zeros(count, 1, self.size)
        start[..., latent:] = math.log(config.residual_std)
        self._modules = nn.ModuleDict({"policy": self.policy, "value": self.value})
        self._modules.register_parameter("log_std", nn.Parameter(start))
        units = torch.ones(self.size)
        units[latent:] = config.residual_std
        self._modules.register_buffer("pace", torch.ones(count))
        self._modules.register_buffer("units", units)
        self._modules.to(self.device)
        self.log_std: Tensor = self._modules.log_std  # type: ignore[assignment]
        self.pace: Tensor = self._modules.pace  # type: ignore[assignment]  # (S,) of a learning rate's step, what is taken
        # (D,) of what the network says: a residual's mean in deviations of its start, so that a step moves it as far, in nats, as
        # the latent's mean. Otherwise the residual takes the whole divergence that an update is allowed.
        self.units: Tensor = self._modules.units  # type: ignore[assignment]
        self._optimiser = torch.optim.Adam(
            [
                {"params": [*self.policy.parameters(), self.log_std], "lr": config.learning_rate},
                {"params": list(self.value.parameters()), "lr": config.value_learning_rate},
            ],
            fused=True,
        )
        self._rngs = [generator(child_seed(seed, self.name), self.device) for seed in self.seeds]

    def mean(self, observations: Tensor) -> Tensor:
        """Return the means (S, ..., D) for observations (S, ..., F), before the residual's squashing."""
        said: Tensor = self.policy(observations)
        return said * self.units

    def part(self, index: int) -> StackedMLP:
        """Return a copy of a seed's policy that says means in their own units."""
        part = self.policy.part(index, 1)
        with torch.no_grad():
            for one in (part.weights[-1], part.biases[-1]):
                one.mul_(self.units.to(one.device))
        return part

    def executed(self, raw: Tensor, size: float = 1.0) -> Tensor:
        """Return actions (..., D) of what was drawn: the residual squashed into its bounds, times `size`, the latent as it is.

        Where the space has a noise bound, it is the space that clips the latent.
        """
        residual = size * self.limits * torch.tanh(raw[..., self.latent :])
        return torch.cat([raw[..., : self.latent], residual], -1)

    @torch.no_grad()
    def act(self, observations: Tensor, *, explore: bool = True) -> tuple[Tensor, Tensor]:
        """Return what is drawn (S, E, D) for observations (S, E, F), and its log-density (S, E)."""
        mean = self.mean(observations)
        shape = (observations.shape[1], self.size)
        noise = [torch.randn(shape, generator=rng, device=self.device) * float(explore) for rng in self._rngs]
        raw = mean + self.log_std.exp() * torch.stack(noise)
        return raw, density_of(mean, self.log_std, raw)

    def update(self, rollout: Rollout) -> dict[str, Tensor]:
        """Learn from a rollout; return means of each seed's numbers, (S,), without waiting for the device."""
        config, seeds = self.config, len(self.seeds)

        def flat(values: Tensor) -> Tensor:
            return values.transpose(0, 1).flatten(1, 2)  # (S, T E, ...)

        seen = flat(rollout.observations)
        with torch.no_grad():
            values = self.value(seen)[..., 0]
            following = self.value(flat(rollout.next_observations))[..., 0]
            shape = rollout.rewards.transpose(0, 1).shape
            now, later = (one.view(shape).transpose(0, 1) for one in (values, following))
            advantage = flat(advantages(rollout.rewards, rollout.discounts, rollout.done, now, later, config.gae))
            targets = advantage + values
            first_mean, first_log_std = self.mean(seen), self.log_std.detach().clone()
            scaled = (advantage - advantage.mean(1, keepdim=True)) / (advantage.std(1, keepdim=True) + 1e-8)
        raw, before = flat(rollout.raw), flat(rollout.densities)
        count = seen.shape[1]
        rows = torch.arange(seeds, device=self.device)[:, None]
        found: list[dict[str, Tensor]] = []
        for _ in range(config.epochs):
            order = torch.stack([torch.randperm(count, generator=rng, device=self.device) for rng in self._rngs])
            for chosen in order.chunk(min(config.minibatches, count), 1):
                mean = self.mean(seen[rows, chosen])
                density = density_of(mean, self.log_std, raw[rows, chosen])
                acting = policy_loss(density, before[rows, chosen], scaled[rows, chosen], config.clip)
                judging = (self.value(seen[rows, chosen])[..., 0] - targets[rows, chosen]).square().mean(1)
                entropy = self.log_std.sum((1, 2))
                losses = acting + config.value_weight * judging - config.entropy_weight * entropy
                self._optimiser.zero_grad()
                losses.sum().backward()
                self._shorten()
                moved = divergence_of(
                    mean.detach(), self.log_std.detach(), first_mean[rows, chosen], first_log_std
                ).mean(1)
                self._take_step(moved)
                self.step += 1
                found.append({"loss": losses, "policy_loss": acting, "value_loss": judging, "divergence": moved})
        numbers = {name: torch.stack([one[name].detach() for one in found]).mean(0) for name in found[0]}
        numbers["value"] = values.mean(1)
        if self.latent:
            numbers["latent_std"] = self.log_std.detach()[:, 0, : self.latent].exp().mean(1)
        if len(self.limits):
            numbers["residual_std"] = self.log_std.detach()[:, 0, self.latent :].exp().mean(1)
        return numbers

    @torch.no_grad()
    def _take_step(self, moved: Tensor) -> None:
        """Step as far as the divergence (S,) that there is already lets each seed's policy go."""
        desired = self.config.desired_divergence
        if not desired:
            self._optimiser.step()
            return
        faster = torch.where(moved < desired / 2, PACING, 1.0)
        self.pace.mul_(torch.where(moved > 2 * desired, 1 / PACING, faster)).clamp_(*PACES)
        own = [*self.policy.parameters(), self.log_std]
        before = [one.clone() for one in own]
        self._optimiser.step()
        for one, start in zip(own, before, strict=True):
            one.copy_(torch.lerp(start, one, self.pace.view(-1, *[1] * (one.ndim - 1))))

    @torch.no_grad()
    def _shorten(self) -> None:
        """Scale each seed's own gradient down to the largest norm."""
        gradients = [one.grad for one in self._modules.parameters() if one.grad is not None]
        squares = torch.stack([one.flatten(1).square().sum(1) for one in gradients]).sum(0)
        scale = (self.config.max_gradient / (squares.sqrt() + 1e-6)).clamp(max=1)
        for one in gradients:
            one.mul_(scale.view(-1, *[1] * (one.ndim - 1)))
