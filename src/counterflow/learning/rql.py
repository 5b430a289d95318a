"""RQL: offline RL that treats the steps of a flow as steps of the decision process (official code: aoberai/rql).

One value function V(s, x_f, f) judges complete (f = 1) and partial (f < 1) chunks. Dataset chunks are pulled back along the
present flow by a random fraction of its steps, so that V learns what a partly denoised chunk is worth:

    target   y = sum_{k<h} gamma^k r_k + gamma^h mask (mean_m - rho std_m) V'_m(s_h, x_0, 0),   x_0 ~ N(0, I)
    critic   L = E expectile_kappa(y - V(s, x_f, f)),   x_f: the chunk after K Euler-reversal steps of size d / K, f = 1 - d
    actor    L = E [ -mean_m V(s, x_t + v min(1/K, 1 - t), min(t + 1/K, 1)) + alpha || v - (a - x_0) ||^2 ]

d ~ U[0, 1] for half of the batch, from {0, 1/K, ..., 1} for the other half. What acts is the actor's exponential average,
denoised in K steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from counterflow.checks import FRACTION, NOT_NEGATIVE
from counterflow.data.transitions import Windows
from counterflow.errors import InvalidInputError
from counterflow.learning.offline import (
    Critic,
    Field,
    Following,
    Losses,
    OfflineConfig,
    OfflineLearner,
    expectile_loss,
    velocity_inputs,
)
from counterflow.policies import NetworkConfig
from counterflow.policies.stacked import StackedMLP


@dataclass(frozen=True)
class RQLConfig(OfflineConfig):
    """Settings of RQL, by the official names where they have one; see `OfflineConfig` for the others.

    Attributes:
        alpha: weight of the flow-matching loss in the actor's.
        expectile: kappa of the critic's loss.
        rho: how many standard deviations of the ensemble the target lies below its mean.
        members: networks in the value ensemble (official: ensemble_ct).
        average: decay of the averaged actor that acts (official: ema).
    """

    alpha: float = 1.0
    expectile: float = 0.5
    rho: float = 0.0
    members: int = 10
    average: float = 0.999

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        NOT_NEGATIVE.check_all(self, "alpha", "rho")
        FRACTION.check_all(self, "expectile", "average")
        if self.batch_size % 2:
            raise InvalidInputError(
                f"batch_size is {self.batch_size}; RQL draws its halves differently, so expected even."
            )


@dataclass(frozen=True)
class RQLNetworks:
    """The networks of S seeds.

    Attributes:
        actor: S velocity networks of (observation, x, t).
        value: S * M value networks of (observation, x, f).
        target_actor: what acts.
        target_value: what targets are made with.
    """

    actor: StackedMLP
    value: StackedMLP
    target_actor: StackedMLP
    target_value: StackedMLP


@dataclass(frozen=True)
class RQLDraws:
    """What is random in a loss; all with seeds (S) first.

    Attributes:
        next_noise: (S, B, D) the noise from which the next chunk would start.
        reversal: (S, B) d, how far chunks are pulled back.
        noise: (S, B, D) x_0 of the flow-matching path.
        t: (S, B) times on it.
    """

    next_noise: Tensor
    reversal: Tensor
    noise: Tensor
    t: Tensor


def pull_back(networks: RQLNetworks, observations: Tensor, chunks: Tensor, reversal: Tensor, steps: int) -> Tensor:
    """Return chunks (S, B, D) after `steps` Euler-reversal steps that cover the fraction `reversal` (S, B) of the flow."""
    width = reversal / steps
    with torch.no_grad():
        x, f = chunks, torch.ones_like(reversal)
        for _ in range(steps):
            x = x - networks.actor(velocity_inputs(observations, x, f)) * width[..., None]
            f = f - width
    return x


def rql_loss(networks: RQLNetworks, batch: Windows, draws: RQLDraws, config: RQLConfig) -> Losses:
    """Return the total loss of every seed (S,) on windows (S, B, h + 1, ...), and its parts."""
    horizon, steps = config.horizon, config.flow_steps
    observations, chunks = batch.observations[..., 0, :], batch.actions[..., :horizon, :].flatten(-2)
    ended = torch.cat([torch.zeros_like(batch.terminals[..., :1]), batch.terminals[..., :-1]], dim=-1)
    valid = (ended.sum(-1) <= 1).to(chunks.dtype)

    with torch.no_grad():
        start = velocity_inputs(batch.observations[..., -1, :], draws.next_noise, torch.zeros_like(draws.t))
        following = networks.target_value.ensemble(start)[..., 0].float()  # (S, M, B)
        following = following.mean(1) - config.rho * following.std(1, correction=0)
        powers = config.discount ** torch.arange(horizon, device=chunks.device, dtype=chunks.dtype)
        rewards = (batch.rewards * (1 - ended))[..., :horizon] @ powers
        target = rewards + config.discount**horizon * batch.masks[..., horizon - 1] * following
        x = pull_back(networks, observations, chunks, draws.reversal, steps)

    values = networks.value.ensemble(velocity_inputs(observations, x, 1 - draws.reversal))[..., 0].float()
    critic_loss = (expectile_loss(target[:, None] - values, config.expectile) * valid[:, None]).mean((1, 2))

    t = draws.t[..., None]
    x_t = (1 - t) * draws.noise + t * chunks
    velocity = networks.actor(velocity_inputs(observations, x_t, draws.t)).float()
    refined = x_t + velocity * (1 - t).clamp(max=1 / steps)
    judged = networks.value.ensemble(
        velocity_inputs(observations, refined, (draws.t + 1 / steps).clamp(max=1)), frozen=True
    )[..., 0].float()
    actor_loss = -(judged.mean(1) * valid).mean(-1)
    alive = (1 - ended[..., :-1]).repeat_interleave(batch.actions.shape[-1], -1)
    bc_loss = ((velocity - (chunks - draws.noise)).square() * alive).mean((1, 2))

    total = actor_loss + config.alpha * bc_loss + critic_loss
    numbers = {"critic_loss": critic_loss, "actor_loss": actor_loss, "bc_loss": bc_loss, "value": values.mean((1, 2))}
    return total, numbers


class RQLLearner(OfflineLearner[RQLConfig, Windows]):
    """Trains RQL's networks, many seeds at once."""

    name: ClassVar[str] = "rql"
    batch_kind: ClassVar[str] = "windows"

    def build(self) -> dict[str, StackedMLP]:
        """Make actor and value, and their targets."""
        config, seeds = self.config, len(self.seeds)
        inputs = self.sizes.observation + self.sizes.chunk + 1

        def actor() -> StackedMLP:
            return StackedMLP(inputs, self.sizes.chunk, seeds, config.width, config.depth)

        def value() -> StackedMLP:
            return StackedMLP(inputs, 1, seeds * config.members, config.width, config.depth, "after")

        self.parts = RQLNetworks(actor(), value(), actor(), value())
        return dict(vars(self.parts))

    def following(self) -> Sequence[Following]:
        """The value's target, and the actor that acts."""
        parts = self.parts
        return (
            Following(parts.value, parts.target_value, self.config.target_rate),
            Following(parts.actor, parts.target_actor, 1 - self.config.average),
        )

    def draw(self, rng: torch.Generator, updates: int) -> RQLDraws:
        """Draw noises and times of one seed."""
        shape, device, steps = (updates, self.config.batch_size), self.device, self.config.flow_steps
        half = (updates, self.config.batch_size // 2)
        reversal = torch.cat(
            [
                torch.rand(half, generator=rng, device=device),
                torch.randint(steps + 1, half, generator=rng, device=device) / steps,
            ],
            dim=1,
        )
        return RQLDraws(
            torch.randn((*shape, self.sizes.chunk), generator=rng, device=device),
            reversal,
            torch.randn((*shape, self.sizes.chunk), generator=rng, device=device),
            torch.rand(shape, generator=rng, device=device),
        )

    def loss(self, batch: Windows, draws: RQLDraws) -> Losses:
        """Return `rql_loss`."""
        return rql_loss(self.parts, batch, draws, self.config)

    def field(self) -> Field:
        """Return the averaged actor."""
        network = NetworkConfig("plain_mlp", self.config.width, self.config.depth)
        return Field(network, self.parts.target_actor)

    def critic(self) -> Critic:
        """Return the target value of complete chunks (f = 1)."""
        return Critic(self.parts.target_value, (1.0,))
