"""QGF's training: flow-matching behaviour cloning and IQL critics, decoupled (official code: zhouzypaul/qgf).

Neither sees the other. What improves on the data happens while acting: the gradient of the critic at the estimated clean
chunk guides the flow (`counterflow.steering.CriticGuidance`), and the best of several chunks may be kept. With guidance weight
0 it is behaviour cloning.

    policy   L = E || v(s, x_t, t) - (a - x_0) ||^2,   t ~ {0, 1/K, ..., 1}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from counterflow.checks import FRACTION, Range
from counterflow.data.transitions import Chunks
from counterflow.learning.iql import Aggregation, IQLNetworks, critic_loss, value_loss
from counterflow.learning.offline import Critic, Field, Following, Losses, OfflineConfig, OfflineLearner
from counterflow.policies import NetworkConfig
from counterflow.policies.networks import sinusoidal
from counterflow.policies.stacked import StackedMLP


@dataclass(frozen=True)
class QGFConfig(OfflineConfig):
    """Settings of QGF's training; see `OfflineConfig` for the others.

    Attributes:
        expectile: kappa of the value's loss.
        members: critics.
        aggregation: of their values, in the value's loss.
    """

    expectile: float = 0.9
    members: int = 2
    aggregation: Aggregation = "min"

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        FRACTION.check_all(self, "expectile")
        Range(2, integer=True).check_all(self, "depth")


@dataclass(frozen=True)
class FlowDraws:
    """What is random in a flow-matching loss; seeds (S) first.

    Attributes:
        noise: (S, B, D) x_0.
        t: (S, B) times.
    """

    noise: Tensor
    t: Tensor


def policy_loss(policy: StackedMLP, batch: Chunks, draws: FlowDraws) -> Tensor:
    """Return the flow-matching loss of every seed (S,), its time embedded by sines and cosines.

    With goals the policy has its own: a critic learns from goals that are never reached, a policy can't.
    """
    chunks, t = batch.actions.flatten(-2), draws.t[..., None]
    x_t = (1 - t) * draws.noise + t * chunks
    inputs = torch.cat([batch.seen_by_policy, x_t, sinusoidal(draws.t)], dim=-1)
    velocity: Tensor = policy(inputs).float()
    return (velocity - (chunks - draws.noise)).square().mean((1, 2))


class QGFLearner(OfflineLearner[QGFConfig, Chunks]):
    """Trains a flow policy and critics, many seeds at once."""

    name: ClassVar[str] = "qgf"
    batch_kind: ClassVar[str] = "chunks"

    def build(self) -> dict[str, StackedMLP]:
        """Make policy, critics, their target, and value."""
        config, sizes, seeds = self.config, self.sizes, len(self.seeds)

        def critic() -> StackedMLP:
            inputs = sizes.observation + sizes.chunk
            return StackedMLP(inputs, 1, seeds * config.members, config.width, config.depth, "before")

        inputs = sizes.observation + sizes.chunk + sinusoidal(torch.zeros(1)).shape[-1]
        self.policy = StackedMLP(inputs, sizes.chunk, seeds, config.width, config.depth, "before", norm_last=False)
        value = StackedMLP(sizes.observation, 1, seeds, config.width, config.depth, "before")
        self.parts = IQLNetworks(critic(), critic(), value)
        return {"policy": self.policy, **vars(self.parts)}

    def following(self) -> Sequence[Following]:
        """The critics' target."""
        return (Following(self.parts.critic, self.parts.target_critic, self.config.target_rate),)

    def draw(self, rng: torch.Generator, updates: int) -> FlowDraws:
        """Draw noises, and times on the grid of the denoising steps."""
        shape, device, steps = (updates, self.config.batch_size), self.device, self.config.flow_steps
        return FlowDraws(
            torch.randn((*shape, self.sizes.chunk), generator=rng, device=device),
            torch.randint(steps + 1, shape, generator=rng, device=device) / steps,
        )

    def loss(self, batch: Chunks, draws: FlowDraws) -> Losses:
        """Return the sum of the three losses, which share no parameters."""
        config = self.config
        cloning = policy_loss(self.policy, batch, draws)
        critics, values = critic_loss(self.parts, batch, config.discount**config.horizon)
        states = value_loss(self.parts, batch, config.expectile, config.aggregation)
        numbers = {"bc_loss": cloning, "critic_loss": critics, "value_loss": states, "q": values.mean((1, 2))}
        return cloning + critics + states, numbers

    def field(self) -> Field:
        """Return the policy."""
        network = NetworkConfig("normed_mlp", self.config.width, self.config.depth)
        return Field(network, self.policy)

    def critic(self) -> Critic:
        """Return the target critics."""
        return Critic(self.parts.target_critic)
