"""The first port: where the flow starts.

A start is a function of (policy, context, rng) that returns the state x (B, H, A) and, for each row, the time t (B,) at which
that state lies on the flow. t = 0 is noise; a start may also enter the flow part of the way (t > 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from counterflow.checks import RATE, Range
from counterflow.errors import InvalidInputError
from counterflow.flow import Field, invert, reverse
from counterflow.flow.field import per_row
from counterflow.policies import BasePolicy, bind
from counterflow.random import RowGenerators, draw_normal, draw_prior
from counterflow.steering.context import Reference, SteeringContext
from counterflow.steering.latent import FULL, LatentShape

Rng = torch.Generator | RowGenerators
Padding = Literal["fresh", "held", "reversed"]


class Start(Protocol):
    """Where the flow starts: returns (x (B, H, A), t (B,))."""

    def __call__(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        """Choose the start of every row."""
        ...


def _fresh(policy: BasePolicy, context: SteeringContext, rng: Rng) -> Tensor:
    """Draw the prior's noise for every row, on the device of the reference where there is one."""
    device = torch.device("cpu") if context.reference is None else context.reference.chunk.device
    device = getattr(policy, "device", device)
    spec = policy.action_spec
    return draw_prior(rng, (context.batch_size, spec.horizon, spec.state_dim), device, spec.prior)


@dataclass(frozen=True)
class Gaussian:
    """Fresh noise: what the base policy does by itself."""

    def __call__(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        """Return the prior's noise at t = 0."""
        noise = _fresh(policy, context, rng)
        return noise, noise.new_zeros(context.batch_size)


@dataclass(frozen=True)
class FlowReversal:
    """Flow Reversal Steering (arXiv 2606.13675): the noise that the reference reverses to.

    Rows where nobody speaks start from fresh noise, and so, after a full reversal, do the entries that the reference does not
    steer (in-painting in noise space). After a partial one (depth < 1) these keep the state that the reversal gave them.

    Attributes:
        steps: K, how many steps back.
        solver: "euler" is the paper's, whose round trip pulls towards the prior's modes; "midpoint" and "rk4" are more
            faithful to the reference; "exact" inverts the discrete Euler map, so that denoising with as many Euler steps
            returns the reference itself.
        depth: how far back along the flow, in (0, 1]; less than 1 reverses only part of the way (to t = 1 - depth) and
            denoises from there.
        perturbation: standard deviation of Gaussian noise added to the reversed noise (at full depth up to 1 does no
            harm: reversal finds a good region, not a point).
        padding: what becomes of padded dimensions, which a reversal moves away from where the flow was trained. "fresh":
            they are reversed along and then drawn afresh (the paper's in-painting); "held": all the way back they stay on
            the straight path between fresh noise and the zeros of training, so that the network never sees them drift;
            "reversed": they keep what reversal gave. It makes no difference where nothing is padded.
        latent: the shape in which the noise is executed, the nearest one to what reversal gave: what is to be learned in a shape
            has to be shown in it (of "repeated" the mean over the chunk, as in the paper's distillation). Rows where nobody
            speaks keep the prior's own.

    Raises:
        InvalidInputError: a setting is out of range.
    """

    steps: int = 5
    solver: Literal["euler", "midpoint", "rk4", "exact"] = "euler"
    depth: float = 1.0
    perturbation: float = 0.0
    padding: Padding = "fresh"
    latent: LatentShape = FULL

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.latent.kind != "full" and self.depth != 1:
            raise InvalidInputError(
                f"FlowReversal depth is {self.depth} and the latent's shape {self.latent.kind!r}; expected depth 1: only noise "
                "has a shape."
            )
        if self.padding not in get_args(Padding):
            raise InvalidInputError(
                f"FlowReversal padding is {self.padding!r}; expected 'fresh', 'held' or 'reversed'."
            )
        Range(1, 1000, integer=True).check("FlowReversal steps (K)", self.steps, written=True)
        if self.solver not in ("euler", "midpoint", "rk4", "exact"):
            raise InvalidInputError(
                f"FlowReversal solver is {self.solver!r}; expected 'euler', 'midpoint', 'rk4' or 'exact'."
            )
        RATE.check("FlowReversal depth", self.depth)
        if self.solver == "exact" and self.depth != 1:
            raise InvalidInputError("exact inversion needs depth 1; choose another solver for a partial reversal.")
        Range(0, 10).check("FlowReversal perturbation", self.perturbation)

    def __call__(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        """Reverse the reference; return its noise at t = 0 (or the state at t = 1 - depth)."""
        fresh = _fresh(policy, context, rng)
        reference = context.reference
        if reference is None:
            return fresh, fresh.new_zeros(context.batch_size)
        field = bind(policy, context.features)
        first_padded = policy.action_spec.dim
        if policy.action_spec.padding and self.padding == "held":
            field = _holding(field, fresh, first_padded)
        if self.solver == "exact":
            reversed_noise = invert(field, reference.chunk, self.steps)
        else:
            reversed_noise = reverse(field, reference.chunk, self.steps, self.solver, end=1.0 - self.depth)
        if self.perturbation:
            reversed_noise = reversed_noise + self.perturbation * draw_normal(
                rng, reversed_noise.shape, reversed_noise.device
            )
        start = torch.where(reference.active, 1.0 - self.depth, 0.0).to(fresh)
        kept = reference.spoken if self.depth == 1 else reference.active[:, None, None]
        state = torch.where(kept, reversed_noise, fresh)
        if self.latent.kind != "full":
            shaped = self.latent.expand(self.latent.project(state), state.shape[1], fresh)
            state = torch.where(reference.active[:, None, None], shaped, state)
        if policy.action_spec.padding:
            # At time t the padding of a sample is (1 - t) times its noise: it was trained to become zero.
            new = per_row(1.0 - start, fresh) * fresh
            if self.padding == "reversed":
                new = torch.where(reference.active[:, None, None], reversed_noise, new)
            state[..., first_padded:] = new[..., first_padded:]
        return state, start


def _holding(field: Field, noise: Tensor, first: int) -> Field:
    """Return a field whose dimensions from `first` on run straight from `noise` at t = 0 to zero at t = 1."""

    def held(x: Tensor, t: Tensor) -> Tensor:
        x = torch.cat([x[..., :first], (per_row(1.0 - t, noise) * noise)[..., first:]], dim=-1)
        return torch.cat([field(x, t)[..., :first], -noise[..., first:]], dim=-1)

    return held


@dataclass(frozen=True)
class PartialNoising:
    """Noise the reference up to time tau and denoise from there (the SDEdit baseline of arXiv 2606.13675).

    Attributes:
        tau: x = (1 - tau) eps + tau reference; near 1 trusts the reference, near 0 the prior. The paper finds it very
            sensitive and sweeps it.

    Raises:
        InvalidInputError: tau is not in [0, 1).
    """

    tau: float = 0.5

    def __post_init__(self) -> None:
        """Check tau."""
        Range(0, 1, below=True).check("PartialNoising tau", self.tau)

    def __call__(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        """Return the noised reference at t = tau, fresh noise at t = 0 where nobody speaks."""
        fresh = _fresh(policy, context, rng)
        if context.reference is None:
            return fresh, fresh.new_zeros(context.batch_size)
        reference: Reference = context.reference
        start = torch.where(reference.active, self.tau, 0.0).to(fresh)
        weight = start[:, None, None] * reference.steered
        return (1.0 - start)[:, None, None] * fresh + weight * reference.chunk, start
