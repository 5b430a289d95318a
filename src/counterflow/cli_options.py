"""Options that several commands share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from counterflow.steering import MethodSettings

SteerName = Literal["base", "direct", "frs", "partial", "rank"]
LearnedName = Literal["dsbc", "bc"]


@dataclass(frozen=True)
class Steering:
    """How the frozen policy is steered."""

    steps: int = 10
    """Denoising steps of base, direct, partial and rank."""
    reversal_steps: int = 5
    """K of flow reversal steering, back and forth."""
    perturbation: float = 0.0
    """Noise added to the reversed noise of flow reversal steering (standard deviation)."""
    tau: float = 0.5
    """Noise level of partial noising: near 1 trusts the reference, near 0 the prior."""
    candidates: int = 16
    """n of sample-and-rank."""
    distance: Literal["cosine", "l2"] = "cosine"
    """What sample-and-rank compares by."""
    padding: Literal["fresh", "held", "reversed"] = "fresh"
    """Of flow reversal steering, the padded dimensions of a policy that has some: drawn afresh, held, or kept."""

    def settings(self) -> MethodSettings:
        """Return the methods' settings."""
        from counterflow.steering import MethodSettings

        return MethodSettings(**asdict(self))
