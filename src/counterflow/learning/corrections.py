"""Offline RFS: a residual learned from corrections (arXiv 2602.01789, section 5.2), by TD3+BC (arXiv 2106.06860).

The policy runs, somebody intervenes. Where they did, the residual is what they did minus what the base would have done from the
latent that it used; elsewhere it is 0.

    critic   L = E (Q_m(s, a) - y)^2,   y = r + d min_m Q'_m(s', limit(a_b' + pi'(s', a_b') + clipped noise))
    actor    L = E [ -Q_1(s, limit(a_b + pi)) / mean |Q| * alpha + || pi - a_r ||^2 ]

The critic looks at the action that is executed (on the robot, critics of the residual alone, or of base and residual, failed).
The anchor is on the residual, or on the executed action: a residual's alone collapsed in one port.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from counterflow.checks import check_name
from counterflow.data.replay import ReplayBatch
from counterflow.learning.residual import Compose, ResidualConfig, ResidualLearner
from counterflow.learning.sac import ActionSizes, Losses, SACDraws
from counterflow.policies.stacked import StackedMLP

Anchor = Literal["residual", "executed"]


@dataclass(frozen=True)
class CorrectionsConfig(ResidualConfig):
    """Settings of offline RFS; see `ResidualConfig` and `SACConfig` for the others (temperature and entropy are not read).

    Attributes:
        alpha: weight of the value against the anchor; 0: the corrections are imitated, and the critic is not asked. TD3+BC's
            own 2.5 is made for actions: residuals are mostly zero, their anchor is a hundred times as small, and with 2.5 an
            actor follows the critic wherever it is wrong (`benchmarks/online_rl`).
        anchor: what is held near the recorded: the "residual", in units of its bound, or the "executed" action.
        policy_noise: deviation of the noise on the target's residual, in units of its bound.
        noise_clip: where that noise is clipped.
        policy_delay: critic updates for one of the actor.

    Raises:
        UnknownNameError: no such anchor.
        InvalidInputError: a number is out of range.
    """

    prefilled_share: float = 1.0
    alpha: float = 0.01
    anchor: Anchor = "residual"
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    policy_delay: int = 2

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_name("anchor", self.anchor, Anchor)


class CorrectionsLearner(ResidualLearner):
    """TD3+BC on residuals; arguments as for `ResidualLearner`.

    Its actor says means and deviations as SAC's does, so that it is handed on the same way; only the means are learned and used.
    """

    name: ClassVar[str] = "corrections"
    config: CorrectionsConfig

    def __init__(
        self,
        sizes: ActionSizes,
        config: CorrectionsConfig,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        base: int,
        compose: Compose,
    ) -> None:
        super().__init__(sizes, config, seeds, device, base=base, compose=compose)

    def build(self) -> dict[str, StackedMLP]:
        """Make actor and critics, and a target of each."""
        networks = super().build()
        return networks | {"target_actor": self.network(self.sizes.observation, 2 * self.sizes.action, len(self.seeds))}

    def following(self) -> list[tuple[StackedMLP, StackedMLP]]:
        """The critics' target, and the actor's."""
        return [*super().following(), (self.networks["actor"], self.networks["target_actor"])]

    def residual(self, network: str, observations: Tensor) -> Tensor:
        """Return the residuals (S, B, D) of an actor, in units of their bounds."""
        said: Tensor = self.networks[network](observations)
        return torch.tanh(said[..., : self.sizes.action].float())

    def critic_losses(self, batch: ReplayBatch, draws: SACDraws) -> Losses:
        """Return the critics' loss of every seed (S,)."""
        config = self.config
        with torch.no_grad():
            noise = (config.policy_noise * draws.next_noise).clamp(-config.noise_clip, config.noise_clip)
            following = (self.residual("target_actor", batch.next_observations) + noise).clamp(-1, 1) * self.limits
            judged = self.networks["target_critic"].ensemble(self.judge(batch.next_observations, following))
            wanted = batch.rewards + batch.discounts * judged[..., 0].float().amin(1)
        values = self.networks["critic"].ensemble(self.judge(batch.observations, batch.actions))[..., 0].float()
        losses = (values - wanted[:, None]).square().mean((1, 2))
        return losses, {"critic_loss": losses, "value": values.mean((1, 2))}

    def actor_losses(self, batch: ReplayBatch) -> Losses:
        """Return the actor's loss of every seed (S,)."""
        unit = self.residual("actor", batch.observations)
        judged = self.judge(batch.observations, unit * self.limits)
        values = self.networks["critic"].ensemble(judged, frozen=True)[:, 0, :, 0].float()
        weight = self.config.alpha / values.detach().abs().mean(1, keepdim=True).clamp_min(1e-6)
        if self.config.anchor == "residual":
            apart = (unit - batch.actions / self.limits).square().mean(-1)
        else:
            base = batch.observations[..., -self.base :].flatten(0, 1)
            made = self.compose(base, (unit * self.limits).flatten(0, 1)).view(batch.executed.shape)
            apart = (made - batch.executed).square().mean(-1)
        losses = (apart - weight * values).mean(1)
        return losses, {"actor_loss": losses, "anchor": apart.mean(1)}

    def apply(
        self,
        batch: ReplayBatch,
        draws: SACDraws,
        shown: Tensor,  # noqa: ARG002 - the anchor stands in the place of the cloning term
        acted: Tensor,  # noqa: ARG002
        cloning: Tensor,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Take one step of the critics, and every so often one of the actor; targets follow then."""
        judging, numbers = self.critic_losses(batch, draws)
        self.optimise(judging)
        acting, told = self.actor_losses(batch)
        if self.step % self.config.policy_delay == 0:
            self.optimise(acting)
            self.follow()
        return {name: value.detach() for name, value in {"loss": judging, **numbers, **told}.items()}

    @torch.no_grad()
    def act(self, observations: Tensor, *, explore: bool = True) -> Tensor:  # noqa: ARG002 - it learns from what is recorded
        """Return residuals (S, E, D): the means."""
        return self.residual("actor", observations) * self.limits
