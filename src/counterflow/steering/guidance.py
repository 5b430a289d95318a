"""The second port: what is added to the field on the way.

A guidance is a function of (x, t, v, context) that returns the velocity to follow instead of v, each (B, H, A), t (B,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from counterflow.checks import POSITIVE, check_names
from counterflow.errors import InvalidInputError
from counterflow.policies import BasePolicy
from counterflow.steering.aggregation import Aggregation, check_aggregation
from counterflow.steering.context import SteeringContext

if TYPE_CHECKING:  # a critic knows steered policies, and these know guidances
    from counterflow.steering.critic import ChunkCritic

Estimate = Literal["clean", "noisy"]
WeightSchedule = Literal["constant", "remaining"]


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


@dataclass(frozen=True, eq=False)
class CriticGuidance:
    """Follow the gradient of a critic's value (QGF, arXiv 2606.11087; with a frozen VLA's features GAF, arXiv 2607.02092).

    At every step the finished chunk is estimated, and the critic is asked which way it would become better:

        a = clip(x + (1 - t) v),   g = grad_a Q(s, a),   v' = v + weight g

    Entries that aren't executed (padding, rows that lie in the past, rows beyond those that the critic judges) get no guidance.

    Attributes:
        critic: Q.
        policy: the policy that is guided, steered or not: its action space says what the estimate is clipped to, and its
            features are what the critic may look at.
        weight: what the gradient is multiplied with; its scale is that of the critic's values (`choose_weight` finds one).
        estimate: where the gradient is taken. "clean": at the estimated finished chunk, at the clipped point. "noisy": at the
            state x itself, which no critic was trained on (QFQL).
        jacobian: pull the gradient back through the estimate, clipping included: g becomes g^T da/dx. The paper leaves it out.
        schedule: "constant"; or "remaining": weight (1 - t) / t, the factor with which a flow's velocity follows a score. It
            is made for `jacobian`, which vanishes as the factor grows.
        largest_factor: what (1 - t) / t is bounded to. 10 bounds t = 0 alone at ten steps, where the Jacobian of an exact
            flow is 0 and nothing should be lost.
        clip: whether the clean estimate is clipped to the action space's limits.
        aggregation: of the ensemble's values, see `aggregate`.
        rho: of "lower_confidence".
        task: (E,) the task embedding of a critic that was made with one.

    Raises:
        UnknownNameError: no such estimate, schedule or aggregation.
        InvalidInputError: a number is out of range, or a Jacobian was asked for of the noisy state.
        MismatchError: the critic was made for other chunks.
    """

    critic: ChunkCritic
    policy: BasePolicy
    weight: float
    estimate: Estimate = "clean"
    jacobian: bool = False
    schedule: WeightSchedule = "constant"
    largest_factor: float = 10.0
    clip: bool = True
    aggregation: Aggregation = "min"
    rho: float = 1.0
    task: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the settings, and that critic and policy belong together."""
        check_names(self, estimate=Estimate, schedule=WeightSchedule)
        check_aggregation(self.aggregation, self.rho)
        if isinstance(self.weight, str) or not math.isfinite(self.weight):
            raise InvalidInputError(
                f"the guidance's weight is {self.weight!r}; expected a finite number. choose_weight finds one."
            )
        POSITIVE.check_all(self, "largest_factor")
        if self.jacobian and self.estimate == "noisy":
            raise InvalidInputError(
                "a Jacobian was asked for, of the noisy state with respect to itself. Use estimate='clean', or no Jacobian."
            )
        self.critic.binding.check(self.policy)
        self.critic.check_task(self.task)

    @property
    def differentiates(self) -> bool:
        """Whether it needs the velocity with its graph."""
        return self.jacobian and self.weight != 0

    def __call__(self, x: Tensor, t: Tensor, v: Tensor, context: SteeringContext) -> Tensor:
        """Return the guided velocity; with the Jacobian, v must have been computed from x with gradients."""
        if self.weight == 0:
            return v
        if self.jacobian and not v.requires_grad:  # without this the identity would silently take its place
            raise InvalidInputError(
                "the Jacobian needs a velocity that can be differentiated; this policy computes its own without gradients. "
                "Leave the Jacobian out, or use a policy that doesn't run under torch.no_grad."
            )
        critic, binding = self.critic, self.critic.binding
        inputs = critic.inputs_of(self.policy, context)
        # Somebody further out may differentiate what is returned, and then the gradient is part of the graph.
        kept = torch.is_grad_enabled() and x.requires_grad and not (self.jacobian and x.is_leaf)
        with torch.enable_grad():
            estimate = critic.judged(x if self.estimate == "noisy" else x + (1 - t)[:, None, None] * v)
            if self.estimate == "clean" and self.clip:
                estimate = self.policy.action_spec.limit_normalised(estimate)
            point = estimate if kept else estimate.detach().requires_grad_()
            value = critic.value(inputs, point, self.aggregation, self.rho, self.task).sum()
            (slope,) = torch.autograd.grad(value, point, create_graph=kept)
            if self.jacobian:
                (slope,) = torch.autograd.grad(estimate, x, slope, retain_graph=True, create_graph=kept)
                slope = critic.judged(slope)
        beyond = x.shape[1] - binding.past - binding.horizon
        slope = functional.pad(slope, (0, x.shape[2] - binding.dim, binding.past, beyond))
        if self.schedule == "remaining":
            slope = ((1 - t) / t).clamp(max=self.largest_factor)[:, None, None] * slope
        return v + self.weight * slope
