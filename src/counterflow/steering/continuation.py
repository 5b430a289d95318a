"""Real-time chunking: a new chunk that continues the one being executed (arXiv 2506.07339), as a guidance.

While a robot executes a chunk the next one is computed, from an observation that is a few actions old. What is executed
meanwhile can't be changed, and what follows should join it without a jerk. So the new chunk is asked to agree with the rest of
the old one: strictly over the actions that will have been executed before it is ready, softly over those that both cover, not at
all beyond. At time t the finished chunk is estimated as x + (1 - t) v, and its weighted error is pulled back through that
estimate (pseudoinverse guidance):

    v' = v + min(beta, (t^2 + (1 - t)^2) / (t (1 - t))) (W (Y - x - (1 - t) v))^T d[x + (1 - t) v]/dx

Being a guidance it composes with any start: a reference that was reversed (FRS) or a learned noise says what to do, the guidance
how to get there from what is under way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from counterflow.checks import POSITIVE, check_name
from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.policies import ActionSpec

if TYPE_CHECKING:  # a context holds a continuation
    from counterflow.steering.context import SteeringContext

Schedule = Literal["exponential", "linear", "ones", "zeros"]
Jacobian = Literal["exact", "identity"]


def continuation_weights(
    horizon: int, delay: int, overlap: int, schedule: Schedule = "exponential", device: torch.device | str = "cpu"
) -> Tensor:
    """Return how strongly each action of a new chunk is held to the old one, (H,), from 1 to 0 (arXiv 2506.07339, eq. 5).

    Args:
        horizon: H.
        delay: d, actions that will have been executed before the new chunk is ready: weight 1.
        overlap: actions of the new chunk that the old one covers, d <= overlap <= H; from there on the weight is 0.
        schedule: how it falls in between: "exponential" (the paper's) and "linear" end just above 0, "ones" stays at 1,
            "zeros" holds nothing beyond the delay.
        device: where to put them.

    Raises:
        InvalidInputError: delay and overlap are out of order.
        UnknownNameError: no such schedule.
    """
    if not 0 <= delay <= overlap <= horizon:
        raise InvalidInputError(
            f"a delay of {delay} and an overlap of {overlap} were given for chunks of {horizon} actions; expected "
            "0 <= delay <= overlap <= horizon. If inference takes longer than what is left of a chunk, slow the robot down, "
            "or execute less of each chunk."
        )
    index = torch.arange(horizon, device=device, dtype=torch.float32)
    if schedule == "ones":
        between = torch.ones_like(index)
    elif schedule == "zeros":
        between = torch.zeros_like(index)
    elif schedule in ("linear", "exponential"):
        between = (overlap - index) / (overlap - delay + 1)
        if schedule == "exponential":
            between = between * torch.expm1(between) / math.expm1(1)
    else:
        raise UnknownNameError("schedule", str(schedule), get_args(Schedule))
    return torch.where(index < delay, 1.0, torch.where(index < overlap, between, 0.0))


@dataclass(frozen=True)
class Continuation:
    """What is being executed while a new chunk is computed.

    Attributes:
        chunk: (B, H, A) normalised: row i is what would be executed at the new chunk's row i, as far as it is known.
        weights: (B, H) how strongly the new chunk is held to it, 0 to 1; 0 where nothing is known.
    """

    chunk: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        """Check shapes and values.

        Raises:
            InvalidInputError: shapes don't fit, or values are not finite or out of range.
        """
        if self.chunk.ndim != 3 or self.weights.shape != self.chunk.shape[:2]:
            raise InvalidInputError(
                f"a continuation has chunk {tuple(self.chunk.shape)} and weights {tuple(self.weights.shape)}; expected "
                "(B, H, A) and (B, H)."
            )
        if not bool(torch.isfinite(self.chunk).all()):
            raise InvalidInputError("the chunk to continue holds NaN or infinite values; expected normalised actions.")
        if not bool(((self.weights >= 0) & (self.weights <= 1)).all()):
            raise InvalidInputError("the weights of a continuation are not all within 0 to 1.")

    @classmethod
    def of(
        cls, chunk: Tensor, executed: int, delay: int, schedule: Schedule = "exponential", *, past: int = 0
    ) -> Continuation:
        """Continue the chunk that is being executed.

        Args:
            chunk: (B, H, A) normalised, the whole of it (`Plan.chunk`).
            executed: how many of its actions had been executed when the new observation was made, 0 to H.
            delay: how many more will have been executed before the new chunk is ready.
            schedule: as for `continuation_weights`.
            past: rows of a chunk that lie before its first executed action (`ActionSpec.past`).

        Raises:
            InvalidInputError: the counts don't fit the chunk.
        """
        if chunk.ndim != 3:
            raise InvalidInputError(f"the chunk to continue has shape {tuple(chunk.shape)}; expected (B, H, A).")
        horizon = chunk.shape[1]
        if not 0 <= executed <= horizon:
            raise InvalidInputError(
                f"{executed} actions of a chunk of {horizon} were executed; expected 0 to {horizon}."
            )
        left = horizon - executed
        shifted = torch.cat([chunk[:, executed:], torch.zeros_like(chunk[:, :executed])], 1)
        weights = continuation_weights(horizon, past + delay, left, schedule, chunk.device)
        return cls(shifted, weights.to(chunk).expand(len(chunk), -1))

    def fitted(self, spec: ActionSpec, rows: int) -> Continuation:
        """Return it for `rows` observations and an action space; what is padded is nobody's to hold, and left out.

        Raises:
            MismatchError: it is for other ones.
        """
        if tuple(self.chunk.shape) not in {(rows, spec.horizon, size) for size in (spec.dim, spec.state_dim)}:
            raise MismatchError(
                f"the chunk to continue has shape {tuple(self.chunk.shape)}; the policy and the observations need "
                f"{(rows, spec.horizon, spec.dim)} (B, H, A)."
            )
        return Continuation(self.chunk[..., : spec.dim], self.weights)

    def to(self, device: torch.device) -> Continuation:
        """Return it on a device."""
        return Continuation(self.chunk.to(device), self.weights.to(device))

    def repeat(self, copies: int) -> Continuation:
        """Repeat every row `copies` times, neighbours together."""
        return Continuation(self.chunk.repeat_interleave(copies, 0), self.weights.repeat_interleave(copies, 0))


@dataclass(frozen=True)
class ContinueChunk:
    """Guide the flow to continue the chunk that is being executed; without a continuation it does nothing.

    Attributes:
        largest_weight: beta, what the guidance is multiplied with at most. The factor grows without bound towards t = 0
            and t = 1, and few denoising steps overshoot; 5 is the paper's.
        jacobian: of the estimated chunk with respect to the state. "exact": the true vector-Jacobian product, a backward
            pass through the velocity a step, which lets the prior carry the old chunk's course into actions that nothing
            holds. "identity": leave it out, which costs nothing and moves each entry by its own error alone.

    Raises:
        InvalidInputError: the largest weight is not positive.
        UnknownNameError: no such Jacobian.
    """

    largest_weight: float = 5.0
    jacobian: Jacobian = "exact"

    def __post_init__(self) -> None:
        """Check both settings."""
        POSITIVE.check_all(self, "largest_weight")
        check_name("jacobian", self.jacobian, Jacobian)

    @property
    def differentiates(self) -> bool:
        """Whether it needs the velocity with its graph."""
        return self.jacobian == "exact"

    def __call__(self, x: Tensor, t: Tensor, v: Tensor, context: SteeringContext) -> Tensor:
        """Return the guided velocity; with the exact Jacobian, v must have been computed from x with gradients."""
        continuation = context.continuation
        if continuation is None:
            return v
        remaining = (1 - t)[:, None, None]
        estimate = x + remaining * v
        held = continuation.chunk.shape[-1]
        error = continuation.weights[..., None] * (continuation.chunk - estimate[..., :held])
        error = functional.pad(error, (0, x.shape[-1] - held))
        if self.jacobian == "exact":
            if not v.requires_grad:  # without this the identity would silently take its place
                raise InvalidInputError(
                    "the exact Jacobian needs a velocity that can be differentiated; this policy computes its own without "
                    "gradients. Use jacobian='identity', or a policy that doesn't run under torch.no_grad."
                )
            (correction,) = torch.autograd.grad(estimate, x, error, retain_graph=True, create_graph=not x.is_leaf)
        else:
            correction = error
        factor = (t.square() + (1 - t).square()) / (t * (1 - t))  # infinite at both ends, and bounded
        return v + factor.clamp(max=self.largest_weight)[:, None, None] * correction
