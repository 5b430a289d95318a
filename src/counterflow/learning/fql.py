"""FQL: flow Q-learning (official code: seohongpark/fql, agents/fql.py).

A flow clones the data; a policy of one step is distilled from it and maximises the critics besides:

    critic     L = E mean_m (r + gamma^h mask agg_m Q'_m(s_h, clip(mu(s_h, z))) - Q_m(s, a))^2
    flow       L = E || v(s, x_t, t) - (a - x_0) ||^2
    one step   L = E [ alpha || mu(s, z) - flow(s, z) ||^2 - mean_m Q_m(s, clip(mu(s, z))) ]

flow(s, z) is the K-step denoising of z, without gradient. What acts is mu, which is a flow of a single step: v = mu(s, z) - z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from counterflow.checks import NOT_NEGATIVE
from counterflow.data.transitions import Chunks
from counterflow.learning.iql import Aggregation, aggregate
from counterflow.learning.offline import (
    Critic,
    Field,
    Following,
    Losses,
    OfflineConfig,
    OfflineLearner,
    velocity_inputs,
)
from counterflow.policies import NetworkConfig
from counterflow.policies.stacked import StackedMLP


@dataclass(frozen=True)
class FQLConfig(OfflineConfig):
    """Settings of FQL, by the official names; see `OfflineConfig` for the others.

    Attributes:
        alpha: weight of the distillation.
        aggregation: of the target critics (official: q_agg).
        normalise_q: divide the critics' term by their mean absolute value.
    """

    alpha: float = 10.0
    aggregation: Aggregation = "mean"
    normalise_q: bool = False

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        NOT_NEGATIVE.check_all(self, "alpha")


@dataclass(frozen=True)
class FQLNetworks:
    """The networks of S seeds.

    Attributes:
        flow: S velocity networks of (observation, x, t).
        one_step: S networks of (observation, noise) that say a chunk.
        critic: S * 2 networks of (observation, chunk).
        target_critic: what targets are made with.
    """

    flow: StackedMLP
    one_step: StackedMLP
    critic: StackedMLP
    target_critic: StackedMLP


@dataclass(frozen=True)
class FQLDraws:
    """What is random in a loss; seeds (S) first, each (S, B, D) but t (S, B).

    Attributes:
        next_noise: of the next chunk.
        noise: x_0 of the flow-matching path.
        t: times on it.
        distilled_noise: z of the distillation.
    """

    next_noise: Tensor
    noise: Tensor
    t: Tensor
    distilled_noise: Tensor


def denoised(flow: StackedMLP, observations: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Return the flow's chunks (S, B, D) after `steps` Euler steps from noise, clipped to [-1, 1]."""
    with torch.no_grad():
        x = noise
        for step in range(steps):
            t = torch.full(x.shape[:-1], step / steps, device=x.device, dtype=x.dtype)
            x = x + flow(velocity_inputs(observations, x, t)) / steps
    return x.clamp(-1, 1)


def fql_loss(networks: FQLNetworks, batch: Chunks, draws: FQLDraws, config: FQLConfig) -> Losses:
    """Return the total loss of every seed (S,) on chunks (S, B, ...), and its parts."""
    observations, seen, chunks = batch.observations, batch.seen_by_policy, batch.actions.flatten(-2)
    with torch.no_grad():
        following = networks.one_step(torch.cat([batch.next_observations, draws.next_noise], dim=-1)).clamp(-1, 1)
        inputs = torch.cat([batch.next_observations, following], dim=-1)
        judged = aggregate(networks.target_critic.ensemble(inputs)[..., 0].float(), config.aggregation)
        target = batch.rewards + config.discount**config.horizon * batch.masks * judged
        wanted = denoised(networks.flow, seen, draws.distilled_noise, config.flow_steps)
    values = networks.critic.ensemble(torch.cat([observations, chunks], dim=-1))[..., 0].float()
    critic_loss = ((values - target[:, None]).square() * batch.valid[:, None]).mean((1, 2))

    t = draws.t[..., None]
    x_t = (1 - t) * draws.noise + t * chunks
    velocity = networks.flow(velocity_inputs(seen, x_t, draws.t)).float()
    bc_loss = (velocity - (chunks - draws.noise)).square().mean((1, 2))

    said = networks.one_step(torch.cat([seen, draws.distilled_noise], dim=-1)).float()
    distill_loss = (said - wanted).square().mean((1, 2))
    liked = networks.critic.ensemble(torch.cat([seen, said.clamp(-1, 1)], dim=-1), frozen=True)[..., 0]
    liked = liked.float().mean(1)
    q_loss = -liked.mean(-1)
    if config.normalise_q:
        q_loss = q_loss / liked.detach().abs().mean(-1)
    actor_loss = bc_loss + config.alpha * distill_loss + q_loss
    numbers = {
        "critic_loss": critic_loss,
        "actor_loss": actor_loss,
        "bc_loss": bc_loss,
        "distill_loss": distill_loss,
        "q": values.mean((1, 2)),
    }
    return critic_loss + actor_loss, numbers


class FQLLearner(OfflineLearner[FQLConfig, Chunks]):
    """Trains FQL's networks, many seeds at once."""

    name: ClassVar[str] = "fql"
    batch_kind: ClassVar[str] = "chunks"

    def build(self) -> dict[str, StackedMLP]:
        """Make flow, one-step policy, critics and their target."""
        config, sizes, seeds = self.config, self.sizes, len(self.seeds)
        inputs = sizes.observation + sizes.chunk

        def critic() -> StackedMLP:
            return StackedMLP(inputs, 1, seeds * 2, config.width, config.depth, "after")

        self.parts = FQLNetworks(
            StackedMLP(inputs + 1, sizes.chunk, seeds, config.width, config.depth),
            StackedMLP(inputs, sizes.chunk, seeds, config.width, config.depth),
            critic(),
            critic(),
        )
        return dict(vars(self.parts))

    def following(self) -> Sequence[Following]:
        """The critics' target."""
        return (Following(self.parts.critic, self.parts.target_critic, self.config.target_rate),)

    def draw(self, rng: torch.Generator, updates: int) -> FQLDraws:
        """Draw noises and times of one seed."""
        shape = (updates, self.config.batch_size)

        def normal() -> Tensor:
            return torch.randn((*shape, self.sizes.chunk), generator=rng, device=self.device)

        return FQLDraws(normal(), normal(), torch.rand(shape, generator=rng, device=self.device), normal())

    def loss(self, batch: Chunks, draws: FQLDraws) -> Losses:
        """Return `fql_loss`."""
        return fql_loss(self.parts, batch, draws, self.config)

    def field(self) -> Field:
        """Return the one-step policy, as a flow of one step."""
        return Field(NetworkConfig("one_step_mlp", self.config.width, self.config.depth), self.parts.one_step)

    def critic(self) -> Critic:
        """Return the target critics."""
        return Critic(self.parts.target_critic)
