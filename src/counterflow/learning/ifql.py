"""IFQL: implicit flow Q-learning, the flow's variant of IDQL (official code: seohongpark/fql, agents/ifql.py).

IQL's critics and value, and flow-matching behaviour cloning beside them; what acts is the best of N = 32 samples of the flow,
by the lower of the critics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from counterflow.checks import FRACTION
from counterflow.data.transitions import Chunks
from counterflow.learning.iql import IQLNetworks, critic_loss, value_loss
from counterflow.learning.offline import (
    Critic,
    Field,
    Following,
    Losses,
    OfflineConfig,
    OfflineLearner,
    velocity_inputs,
)
from counterflow.learning.qgf import FlowDraws
from counterflow.policies import NetworkConfig
from counterflow.policies.stacked import StackedMLP


@dataclass(frozen=True)
class IFQLConfig(OfflineConfig):
    """Settings of IFQL; see `OfflineConfig` for the others.

    Attributes:
        expectile: kappa of the value's loss.
        candidates: N, samples of which the best acts.
    """

    expectile: float = 0.9
    candidates: int = 32

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        FRACTION.check_all(self, "expectile")


class IFQLLearner(OfflineLearner[IFQLConfig, Chunks]):
    """Trains a flow policy and two critics, many seeds at once."""

    name: ClassVar[str] = "ifql"
    batch_kind: ClassVar[str] = "chunks"

    def build(self) -> dict[str, StackedMLP]:
        """Make flow, critics, their target, and value."""
        config, sizes, seeds = self.config, self.sizes, len(self.seeds)

        def critic() -> StackedMLP:
            return StackedMLP(sizes.observation + sizes.chunk, 1, seeds * 2, config.width, config.depth, "after")

        self.flow = StackedMLP(sizes.observation + sizes.chunk + 1, sizes.chunk, seeds, config.width, config.depth)
        value = StackedMLP(sizes.observation, 1, seeds, config.width, config.depth, "after")
        self.parts = IQLNetworks(critic(), critic(), value)
        return {"flow": self.flow, **vars(self.parts)}

    def following(self) -> Sequence[Following]:
        """The critics' target."""
        return (Following(self.parts.critic, self.parts.target_critic, self.config.target_rate),)

    def draw(self, rng: torch.Generator, updates: int) -> FlowDraws:
        """Draw noises and times."""
        shape = (updates, self.config.batch_size)
        return FlowDraws(
            torch.randn((*shape, self.sizes.chunk), generator=rng, device=self.device),
            torch.rand(shape, generator=rng, device=self.device),
        )

    def loss(self, batch: Chunks, draws: FlowDraws) -> Losses:
        """Return the sum of the three losses, which share no parameters; the critics' squares are added, not averaged."""
        config = self.config
        chunks, t = batch.actions.flatten(-2), draws.t[..., None]
        x_t = (1 - t) * draws.noise + t * chunks
        velocity = self.flow(velocity_inputs(batch.seen_by_policy, x_t, draws.t)).float()
        cloning = (velocity - (chunks - draws.noise)).square().mean((1, 2))
        critics, values = critic_loss(self.parts, batch, config.discount**config.horizon)
        states = value_loss(self.parts, batch, config.expectile)
        numbers = {"bc_loss": cloning, "critic_loss": critics, "value_loss": states, "q": values.mean((1, 2))}
        return cloning + 2 * critics + states, numbers

    def field(self) -> Field:
        """Return the flow."""
        network = NetworkConfig("plain_mlp", self.config.width, self.config.depth)
        return Field(network, self.flow)

    def critic(self) -> Critic:
        """Return the target critics (the official code ranks by the critics themselves, a few hundred updates ahead)."""
        return Critic(self.parts.target_critic)
