"""What the three ports see: the base policy's own context, and the reference that somebody gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from counterflow.errors import InvalidInputError, MismatchError
from counterflow.policies import ActionSpec, repeat_context
from counterflow.steering.continuation import Continuation

# A reference far outside the normalised action range is a mistake of units, not a coarse hint.
LARGEST_REFERENCE = 10.0


@dataclass(frozen=True)
class Reference:
    """A coarse action chunk to steer towards, one a row of the batch.

    Attributes:
        chunk: (B, H, A) normalised actions.
        active: (B,) bool; where False nobody speaks ("defer") and the base policy acts alone.
        steered: (B, H, A) bool; the entries that the reference speaks for. The others are the policy's to decide: after
            a reversal their noise is drawn afresh (the paper's in-painting in noise space).
    """

    chunk: Tensor
    active: Tensor
    steered: Tensor

    @classmethod
    def of(cls, chunk: Tensor, active: Tensor | None = None, steered: Tensor | None = None) -> Reference:
        """Make a reference from a chunk (B, H, A), checked; by default every row is active and every entry steered.

        Raises:
            InvalidInputError: the chunk is not (B, H, A), not finite, or so large that its units must be wrong.
        """
        if chunk.ndim != 3 or not chunk.is_floating_point():
            raise InvalidInputError(
                f"a reference has shape {tuple(chunk.shape)} and type {chunk.dtype}; expected floating point (B, H, A). "
                "Add the missing dimensions (one observation is B = 1, a single action H = 1)."
            )
        if not bool(torch.isfinite(chunk).all()):
            raise InvalidInputError("a reference holds NaN or infinite values; expected finite normalised actions.")
        largest = float(chunk.abs().max()) if chunk.numel() else 0.0
        if largest > LARGEST_REFERENCE:
            raise InvalidInputError(
                f"a reference holds the value {largest:.3g}; expected normalised actions (within about +-{LARGEST_REFERENCE:g}). "
                "Use `action_spec.normalise` to bring environment units to normalised ones."
            )
        active = torch.ones(chunk.shape[0], dtype=torch.bool, device=chunk.device) if active is None else active
        steered = torch.ones_like(chunk, dtype=torch.bool) if steered is None else steered.expand(chunk.shape)
        if active.shape != chunk.shape[:1]:
            raise InvalidInputError(f"`active` has shape {tuple(active.shape)}; expected ({chunk.shape[0]},).")
        return cls(chunk, active.bool(), steered.bool())

    def within(self, spec: ActionSpec) -> Reference:
        """Return the reference in the shape of the flow's state, speaking for nothing that isn't executed.

        A chunk (B, H, A) of a padded action space gets zeros, with which the flow was trained, in the padding. The padding
        and the rows that lie in the past are nobody's to steer: after a reversal their noise is drawn afresh.
        """
        if spec.is_plain:
            return self
        chunk, steered = self.chunk, self.steered
        if spec.padding and chunk.shape[-1] == spec.dim:
            chunk, steered = functional.pad(chunk, (0, spec.padding)), functional.pad(steered, (0, spec.padding))
        inside = torch.zeros_like(steered)
        inside[:, spec.past :, : spec.dim] = True
        return Reference(chunk, self.active, steered & inside)

    def check(self, spec: ActionSpec, rows: int) -> None:
        """Raise `MismatchError` unless the reference fits `rows` observations and the action space."""
        expected = (rows, spec.horizon, spec.state_dim)
        if tuple(self.chunk.shape) != expected:
            raise MismatchError(
                f"the reference has shape {tuple(self.chunk.shape)}; the policy and the observations need {expected} "
                "(B, H, A). Build it for this policy's horizon and action size."
            )

    @property
    def spoken(self) -> Tensor:
        """(B, H, A) bool: the entries that somebody speaks for in rows that are active."""
        return self.steered & self.active[:, None, None]

    def repeat(self, copies: int) -> Reference:
        """Repeat every row `copies` times, neighbours together."""
        return Reference(
            self.chunk.repeat_interleave(copies, 0),
            self.active.repeat_interleave(copies, 0),
            self.steered.repeat_interleave(copies, 0),
        )


@dataclass(frozen=True)
class SteeringContext:
    """The context of a steered policy: what all three ports are given.

    Attributes:
        features: the base policy's own context (`base.encode(observation)`).
        batch_size: B.
        reference: the coarse reference, or None when nobody gave one.
        observation: what the policy was shown, for what was learned from observations; None where it isn't kept.
        continuation: the chunk that is being executed, or None.
    """

    features: Any
    batch_size: int
    reference: Reference | None = None
    observation: Any = None
    continuation: Continuation | None = None

    def repeat_interleave(self, copies: int) -> SteeringContext:
        """Repeat every row `copies` times, neighbours together (for several candidates an observation)."""
        return SteeringContext(
            repeat_context(self.features, copies),
            self.batch_size * copies,
            None if self.reference is None else self.reference.repeat(copies),
            None if self.observation is None else repeat_context(self.observation, copies),
            None if self.continuation is None else self.continuation.repeat(copies),
        )
