"""The second port: what is added to the field on the way.

A guidance is a function of (x, t, v, context) that returns the velocity to follow instead of v, each (B, H, A), t (B,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from counterflow.steering.context import SteeringContext


class Guidance(Protocol):
    """What the flow follows instead of the prior's velocity.

    A guidance with a true attribute `differentiates` is given x and v with the graph that leads from one to the other, so
    that it can ask for vector-Jacobian products; what it returns is detached afterwards. Others pay nothing for that.
    Where x is not a leaf of the graph, somebody further out differentiates what it returns: it then has to keep its own graph.
    """

    def __call__(self, x: Tensor, t: Tensor, v: Tensor, context: SteeringContext) -> Tensor:
        """Return the guided velocity (B, H, A) at state x and time t, where the prior's is v."""
        ...


@dataclass(frozen=True)
class Together:
    """Several guidances, each given the velocity that the one before it returned."""

    guidances: Sequence[Guidance]

    @property
    def differentiates(self) -> bool:
        """Whether one of them needs the velocity with its graph."""
        return any(getattr(guidance, "differentiates", False) for guidance in self.guidances)

    def __call__(self, x: Tensor, t: Tensor, v: Tensor, context: SteeringContext) -> Tensor:
        """Apply them in order."""
        for guidance in self.guidances:
            v = guidance(x, t, v, context)
        return v


@dataclass(frozen=True)
class FollowReference:
    """Overwrite the steered entries at every denoising step: they move straight to the reference, the rest follows the prior.

    The straight path from x at time t to the reference at time 1 has velocity (reference - x) / (1 - t), so the steered
    entries of the finished chunk equal the reference, while the others were denoised in their company.
    """

    def __call__(self, x: Tensor, t: Tensor, v: Tensor, context: SteeringContext) -> Tensor:
        """Return v with the steered entries replaced."""
        if context.reference is None:
            return v
        remaining = (1.0 - t).clamp_min(1e-6)[:, None, None]
        return torch.where(context.reference.spoken, (context.reference.chunk - x) / remaining, v)
