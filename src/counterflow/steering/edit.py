"""The third port: what is done to the result.

An edit is a function of (chunks, context): chunks are the N candidates of every row, (B, N, H, A), normalised; it returns
(B, M, H, A) with 1 <= M <= N. `candidates` says how many it wants to choose from. After the last edit the first candidate is
executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from counterflow.checks import Range
from counterflow.errors import InvalidInputError
from counterflow.policies import BasePolicy
from counterflow.steering.aggregation import Aggregation, check_aggregation
from counterflow.steering.context import SteeringContext

if TYPE_CHECKING:  # a critic knows steered policies, and these know edits
    from counterflow.steering.critic import ChunkCritic


class Edit(Protocol):
    """What is done to the candidates: (B, N, H, A) to (B, M, H, A)."""

    @property
    def candidates(self) -> int:
        """How many candidates an observation this edit wants."""
        ...

    def __call__(self, chunks: Tensor, context: SteeringContext) -> Tensor:
        """Edit or choose among the candidates."""
        ...


@dataclass(frozen=True)
class Chain:
    """Several edits, one after the other."""

    edits: Sequence[Edit]

    @property
    def candidates(self) -> int:
        """As many as the most demanding edit wants."""
        return max((edit.candidates for edit in self.edits), default=1)

    def __call__(self, chunks: Tensor, context: SteeringContext) -> Tensor:
        """Apply them in order."""
        for edit in self.edits:
            chunks = edit(chunks, context)
        return chunks


@dataclass(frozen=True)
class ExecuteReference:
    """Direct execution: the reference itself, in the entries it speaks for; the base policy where nobody speaks."""

    candidates: int = 1

    def __call__(self, chunks: Tensor, context: SteeringContext) -> Tensor:
        """Overwrite the candidates with the reference."""
        if context.reference is None:
            return chunks
        return torch.where(context.reference.spoken[:, None], context.reference.chunk[:, None], chunks)


@dataclass(frozen=True)
class NearestToReference:
    """Sample-and-rank: of n candidates keep the one nearest to the reference (a baseline of arXiv 2606.13675, its n = 16).

    Attributes:
        candidates: n.
        distance: "cosine" (the paper's) or "l2", over the entries that the reference speaks for.

    Raises:
        InvalidInputError: a setting is out of range.
    """

    candidates: int = 16
    distance: Literal["cosine", "l2"] = "cosine"

    def __post_init__(self) -> None:
        """Check the settings."""
        Range(1, 4096, integer=True).check("sample-and-rank n", self.candidates, written=True)
        if self.distance not in ("cosine", "l2"):
            raise InvalidInputError(f"sample-and-rank distance is {self.distance!r}; expected 'cosine' or 'l2'.")

    def __call__(self, chunks: Tensor, context: SteeringContext) -> Tensor:
        """Keep the nearest candidate of each row; the first where nobody speaks."""
        if context.reference is None:
            return chunks[:, :1]
        spoken = context.reference.spoken.flatten(1)[:, None]
        candidates = chunks.flatten(2) * spoken
        reference = context.reference.chunk.flatten(1)[:, None] * spoken
        if self.distance == "cosine":
            nearness = torch.cosine_similarity(candidates, reference, dim=-1)
        else:
            nearness = -(candidates - reference).square().sum(-1)
        best = nearness.argmax(dim=1)  # ties, as where nobody speaks, go to the first
        return chunks.gather(1, best[:, None, None, None].expand(-1, 1, *chunks.shape[2:]))


@dataclass(frozen=True, eq=False)
class HighestValue:
    """Best of N: of n candidates keep the one that a critic gives the highest value (IFQL; on top of QGF, arXiv 2606.11087).

    Attributes:
        critic: Q.
        policy: the policy whose candidates they are: what is judged is clipped to its limits, as it would be executed, and its
            features are what the critic may look at.
        candidates: n.
        aggregation: of the ensemble's values, see `aggregate`.
        rho: of "lower_confidence".
        task: (E,) the task embedding of a critic that was made with one.

    Raises:
        UnknownNameError: no such aggregation.
        InvalidInputError: a number is out of range.
        MismatchError: the critic was made for other chunks.
    """

    critic: ChunkCritic
    policy: BasePolicy
    candidates: int = 8
    aggregation: Aggregation = "min"
    rho: float = 1.0
    task: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the settings, and that critic and policy belong together."""
        Range(1, 4096, integer=True).check("best-of-N n", self.candidates, written=True)
        check_aggregation(self.aggregation, self.rho)
        self.critic.binding.check(self.policy)
        self.critic.check_task(self.task)

    def __call__(self, chunks: Tensor, context: SteeringContext) -> Tensor:
        """Keep the best candidate of each row; a value that is no number is the worst."""
        count = chunks.shape[1]
        judged = self.critic.judged(chunks).flatten(0, 1)
        inputs = self.critic.inputs_of(self.policy, context).repeat_interleave(count, 0)
        executed = self.policy.action_spec.limit_normalised(judged)
        values = self.critic.value(inputs, executed, self.aggregation, self.rho, self.task).unflatten(0, (-1, count))
        best = torch.where(values.isnan(), -torch.inf, values).argmax(dim=1)
        return chunks.gather(1, best[:, None, None, None].expand(-1, 1, *chunks.shape[2:]))


@dataclass(frozen=True)
class Limits:
    """Clip every action to bounds, in normalised units.

    A steered policy always ends within its action space's own limits; this edit is for narrower ones, and for hard
    constraints, which reversal can't promise to keep.

    Attributes:
        low: lowest normalised action, one number or one a dimension.
        high: highest normalised action.
    """

    low: float | Tensor
    high: float | Tensor
    candidates: int = 1

    def __post_init__(self) -> None:
        """Check that low is below high."""
        if not bool((torch.as_tensor(self.low) < torch.as_tensor(self.high)).all()):
            raise InvalidInputError(f"limits are low {self.low} and high {self.high}; expected low below high.")

    def __call__(self, chunks: Tensor, context: SteeringContext) -> Tensor:  # noqa: ARG002 - the port's signature
        """Clip."""
        low = torch.as_tensor(self.low, dtype=chunks.dtype, device=chunks.device)
        high = torch.as_tensor(self.high, dtype=chunks.dtype, device=chunks.device)
        dims = max(low.shape[-1] if low.ndim else 0, high.shape[-1] if high.ndim else 0) or chunks.shape[-1]
        # Limits of an action say nothing of what the flow moves beyond it (padding).
        return torch.cat([chunks[..., :dims].clamp(low, high), chunks[..., dims:]], dim=-1)
