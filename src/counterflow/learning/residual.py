"""Residual RL on a frozen policy, after PLD and Policy Decorator: a bounded correction of the base's action, learned by SAC.

    executed action = limit( base action + bound * tanh(...) )

The base's chunk is drawn with the observation, so the actor sees what it corrects. The critics look at the action that is
executed (or, as ablations, at the residual alone, or at base and residual). The residual begins small, may be ramped up, and the
replay is warmed with the base's own rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from counterflow.checks import check_name
from counterflow.errors import InvalidInputError
from counterflow.learning.sac import ActionSizes, SACConfig, SACLearner

CriticSees = Literal["executed", "residual", "both"]
Compose = Callable[[Tensor, Tensor], Tensor]
"""(base chunks (N, X), residuals (N, D)) -> what is executed (N, C), normalised; the gradient passes where nothing is clipped."""


@dataclass(frozen=True)
class ResidualConfig(SACConfig):
    """Settings of residual RL; see `SACConfig` for the others.

    Attributes:
        critic_sees: the "executed" action, the "residual" alone, or "both" base and residual.
        ramp: decisions of a seed over which the residual grows to its full size; 0: it has it from the start.

    Raises:
        UnknownNameError: no such name.
        InvalidInputError: a number is out of range.
    """

    initial_std: float = 0.1
    initial_temperature: float = 0.1
    critic_sees: CriticSees = "executed"
    ramp: int = 0

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_name("critic input", self.critic_sees, CriticSees)

    def size_at(self, decisions: int) -> float:
        """Return the share of the residual that is executed after so many decisions of a seed."""
        return min(1.0, decisions / self.ramp) if self.ramp else 1.0


class ResidualLearner(SACLearner[ResidualConfig]):
    """SAC whose action is a residual.

    Args:
        sizes, config, seeds, device: as for `SACLearner`; an observation ends with the base's chunk.
        base: X, how many of an observation's last entries are the base's chunk.
        compose: how base and residual become what is executed.
    """

    name: ClassVar[str] = "residual"

    def __init__(
        self,
        sizes: ActionSizes,
        config: ResidualConfig,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        base: int,
        compose: Compose,
    ) -> None:
        if not 0 < base < sizes.observation:
            raise InvalidInputError(
                f"{base} of an observation's {sizes.observation} entries were said to be the base's chunk; expected some of them."
            )
        self.base, self.compose = base, compose
        super().__init__(sizes, config, seeds, device)

    @property
    def judged_size(self) -> int:
        """The observation, and what the settings say."""
        seen, sizes = self.sizes.observation - self.base, self.sizes
        own = {"executed": sizes.executed, "residual": sizes.action, "both": self.base + sizes.action}
        return seen + own[self.config.critic_sees]

    def judge(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return what critics look at, (S, B, I)."""
        seen, base = observations[..., : -self.base], observations[..., -self.base :]
        if self.config.critic_sees == "residual":
            return torch.cat([seen, actions / self.limits], -1)
        if self.config.critic_sees == "both":
            return torch.cat([seen, base, actions / self.limits], -1)
        executed = self.compose(base.flatten(0, 1), actions.flatten(0, 1)).unflatten(0, actions.shape[:2])
        return torch.cat([seen, executed], -1)
