"""`SteeredPolicy`: a frozen base policy with a hand on the wheel at up to three places.

    where the flow starts        start      (policy, context, rng) -> (x, t)
    what is added on the way     guidance   (x, t, v, context) -> v
    what is done to the result   edit       (chunks, context) -> chunk

Any start composes with any guidance and any edit. A steered policy is itself a base policy, so it can be steered again; a port
left at None means "as the base does".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from counterflow.checks import Range
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.flow import denoise
from counterflow.policies import ActionSpec, BasePolicy, bind
from counterflow.random import generator
from counterflow.steering.context import Reference, SteeringContext
from counterflow.steering.continuation import Continuation
from counterflow.steering.edit import Edit
from counterflow.steering.guidance import Guidance
from counterflow.steering.start import Gaussian, Rng, Start

Inputs = Literal["features", "observation"]
"""What a small network beside the frozen policy looks at: the policy's own features, or the observation."""

MAX_STEPS = 1000


@dataclass(frozen=True)
class Plan:
    """What a steered policy decided for a batch of observations, and how it came to it.

    Attributes:
        actions: (B, H - past, A) environment units, within the action limits: what to execute.
        chunk: (B, H, A + padding) the whole chunk, normalised.
        base_chunk: (B, H, A + padding) what the flow gave, before it was edited or limited, normalised.
        noise: (B, H, A + padding) where the flow started (of the candidate that was kept, where the edit kept one unchanged;
            otherwise of the first).
        start_time: (B,) the time at which it started.
        reference: the reference that was given, or None.
        noise_percentile: (B,) of the noise's norm under the prior (chi distribution), padding left out, 0 to 1; near 1
            means that the reference lies outside what the prior would do. NaN for rows that start later than t = 0, and
            for a prior that isn't Gaussian.
        round_trip_error: (B,) root mean square distance between the reference and what came of it, over the entries it
            speaks for, normalised units; NaN where nobody spoke.
        agreement: (B,) cosine between the motion that the reference asked for and the motion that is executed (summed
            over the chunk, translation only where the layout is known); NaN where nobody spoke.
        evaluations: how often each observation's field was evaluated.
        features: (B, F) the frozen policy's own features of the observations, or None if it offers none.
    """

    actions: Tensor
    chunk: Tensor
    base_chunk: Tensor
    noise: Tensor
    start_time: Tensor
    reference: Reference | None
    noise_percentile: Tensor
    round_trip_error: Tensor
    agreement: Tensor
    evaluations: int
    features: Tensor | None = None


class _Counted:
    """A base policy that counts its field evaluations, a row each."""

    def __init__(self, policy: BasePolicy) -> None:
        self._policy = policy
        self.action_spec = policy.action_spec
        self.evaluations = 0
        for optional in ("device", "features"):
            if hasattr(policy, optional):
                setattr(self, optional, getattr(policy, optional))

    def encode(self, observation: Any) -> Any:
        return self._policy.encode(observation)

    def velocity(self, context: Any, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += len(x)
        return self._policy.velocity(context, x, t)


class SteeredPolicy:
    """A frozen base policy, steered at three ports.

    Args:
        base: the frozen policy: anything with `action_spec`, `encode` and `velocity`; another steered policy, too.
        start: where the flow starts; None: fresh noise (or as a steered base does).
        guidance: what the flow follows; None: the base's velocity.
        edit: what is done to the result; None: nothing.
        steps: K, denoising steps from the start to t = 1.
        solver: "euler" (what flow policies are deployed with), "midpoint" or "rk4".

    Raises:
        InvalidInputError: steps is out of range.
    """

    def __init__(
        self,
        base: BasePolicy,
        start: Start | None = None,
        guidance: Guidance | None = None,
        edit: Edit | None = None,
        *,
        steps: int = 10,
        solver: str = "euler",
    ) -> None:
        check_steps(steps)
        self.base, self.start, self.guidance, self.edit = base, start, guidance, edit
        self.steps, self.solver = steps, solver

    @property
    def action_spec(self) -> ActionSpec:
        """The base policy's action space."""
        return self.base.action_spec

    @property
    def device(self) -> torch.device:
        """The device that the base policy computes on."""
        return torch.device(getattr(self.base, "device", "cpu"))

    def encode(
        self, observation: Any, reference: Reference | None = None, continuation: Continuation | None = None
    ) -> SteeringContext:
        """Encode a batch of observations once, together with the reference, for all three ports.

        Args:
            observation: what the base policy takes, leading dimension B.
            reference: the coarse reference (B rows), or None.
            continuation: the chunk that is being executed (B rows), or None.

        Raises:
            MismatchError: reference or continuation do not fit the observations or the action space.
        """
        rows = _rows_of(observation)
        if reference is not None:
            reference = reference.within(self.action_spec)
            reference.check(self.action_spec, rows)
            device = self.device
            reference = Reference(reference.chunk.to(device), reference.active.to(device), reference.steered.to(device))
        if continuation is not None:
            continuation = continuation.fitted(self.action_spec, rows).to(self.device)
        if isinstance(self.base, SteeredPolicy):
            features: Any = self.base.encode(observation, reference, continuation)
        else:
            features = self.base.encode(observation)
        return SteeringContext(features, rows, reference, _as_tensors(observation), continuation)

    def velocity(self, context: SteeringContext, x: Tensor, t: Tensor) -> Tensor:
        """Return the guided velocity (B, H, A)."""
        if self.guidance is None:
            return self.base.velocity(context.features, x, t)
        if not getattr(self.guidance, "differentiates", False):
            return self.guidance(x, t, self.base.velocity(context.features, x, t), context)
        with torch.enable_grad():
            inner = x.requires_grad  # somebody outside differentiates too, and needs the graph to reach their x
            point = x.view_as(x) if inner else x.detach().requires_grad_()
            guided = self.guidance(point, t, self.base.velocity(context.features, point, t), context)
        return guided if inner else guided.detach()

    def begin(self, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        """Choose where the flow starts: (x (B, H, A), t (B,))."""
        if self.start is not None:
            return self.start(self.base, context, rng)
        if isinstance(self.base, SteeredPolicy):
            return self.base.begin(context.features, rng)
        return Gaussian()(self.base, context, rng)

    @property
    def candidates(self) -> int:
        """How many candidates are drawn for each observation."""
        own = 1 if self.edit is None else self.edit.candidates
        return max(own, self.base.candidates) if isinstance(self.base, SteeredPolicy) else own

    @property
    def edits(self) -> bool:
        """Whether anything is done to the flow's result."""
        return self.edit is not None or (isinstance(self.base, SteeredPolicy) and self.base.edits)

    def finish(self, chunks: Tensor, context: SteeringContext) -> Tensor:
        """Apply the edits, the base's first: (B, N, H, A) to (B, M, H, A)."""
        if isinstance(self.base, SteeredPolicy):
            chunks = self.base.finish(chunks, context.features)
        return chunks if self.edit is None else self.edit(chunks, context)

    @torch.no_grad()
    def act(
        self,
        observation: Any,
        reference: Reference | Tensor | None = None,
        rng: Rng | int | None = None,
        *,
        continuation: Continuation | None = None,
    ) -> Plan:
        """Decide on an action chunk for every observation.

        Args:
            observation: leading dimension B.
            reference: a `Reference`, or simply a chunk (B, H, A) in normalised units.
            rng: a torch generator, one generator a row, or a seed; None draws a seed from torch's global generator.
            continuation: the chunk that is being executed meanwhile, for a guidance that continues it (`ContinueChunk`).

        Returns:
            The plan: actions in environment units, and how they came about.

        Raises:
            InvalidInputError: observation or reference holds values that can't be right.
            MismatchError: shapes don't fit.
        """
        if isinstance(reference, Tensor):
            reference = Reference.of(reference)
        if rng is None or isinstance(rng, int):
            rng = generator(int(torch.randint(2**31 - 1, ()))) if rng is None else generator(rng)
        context = self.encode(observation, reference, continuation)
        policy, counter = self._counted()
        copies = self.candidates
        wide = context.repeat_interleave(copies) if copies > 1 else context
        noise, start_time = policy.begin(wide, rng)
        states = denoise(bind(policy, wide), noise, self.steps, self.solver, start=start_time)
        candidates = states.unflatten(0, (-1, copies))
        chunk = self.finish(candidates, context)[:, 0]
        kept = (candidates == chunk[:, None]).flatten(2).all(-1).int().argmax(1)
        rows = torch.arange(len(kept), device=kept.device)

        spec = self.action_spec
        actions = spec.limit(spec.denormalise(chunk))
        plan = Plan(
            actions=actions[:, spec.past :],
            chunk=spec.normalise(actions),
            base_chunk=candidates[rows, kept],
            noise=noise.unflatten(0, (-1, copies))[rows, kept],
            start_time=start_time.unflatten(0, (-1, copies))[rows, kept],
            reference=context.reference,
            noise_percentile=chunk.new_empty(0),
            round_trip_error=chunk.new_empty(0),
            agreement=chunk.new_empty(0),
            evaluations=counter.evaluations // len(chunk),
            features=features_of(self, context) if hasattr(frozen(self), "features") else None,
        )
        return with_diagnostics(plan, self.action_spec)

    def _counted(self) -> tuple[SteeredPolicy, _Counted]:
        """Return this policy over a base that counts, and the count."""
        if isinstance(self.base, SteeredPolicy):
            base: BasePolicy
            base, counter = self.base._counted()
        else:
            base = counter = _Counted(self.base)
        steered = SteeredPolicy(base, self.start, self.guidance, self.edit, steps=self.steps, solver=self.solver)
        return steered, counter


def frozen(policy: BasePolicy) -> Any:
    """Return the frozen policy under all the steering."""
    while isinstance(policy, SteeredPolicy):
        policy = policy.base
    return policy


def features_of(policy: BasePolicy, context: SteeringContext) -> Tensor:
    """Return the frozen policy's own features (B, F) of the observations in a context.

    Raises:
        MismatchError: the policy offers none.
    """
    inner: Any = context.features
    while isinstance(inner, SteeringContext):
        inner = inner.features
    own = frozen(policy)
    if not hasattr(own, "features"):
        raise MismatchError(
            f"{type(own).__name__} offers no features (no method `features(context) -> (B, F)`). Give it one, or record "
            "and train with observations."
        )
    features: Tensor = own.features(inner)
    return features


def inputs_of(policy: BasePolicy, context: SteeringContext, kind: Inputs) -> Tensor:
    """Return what a small network beside the frozen policy looks at, (B, F), from a steering context.

    Raises:
        MismatchError: the policy offers no features, or there is no observation of numbers.
    """
    if kind == "features":
        return features_of(policy, context)
    observation = context.observation
    if observation is None or isinstance(observation, dict):
        raise MismatchError(
            "this network looks at observations, and none, or several kinds, are here. Train it on features instead."
        )
    seen = torch.as_tensor(observation)
    return seen.reshape(len(seen), -1)


def check_steps(steps: int) -> int:
    """Return `steps`, or raise `InvalidInputError` unless it is a sensible number of denoising steps."""
    Range(1, MAX_STEPS, integer=True).check("denoising steps", steps, written=True)
    return steps


def _as_tensors(observation: Any) -> Any:
    """Return the observation with arrays as tensors, so that its rows can be repeated."""
    return tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, observation)


def _rows_of(observation: Tensor | npt.NDArray[Any] | dict[str, Any]) -> int:
    """Return B: the leading dimension of an observation, or of the first entry of a dictionary of them that has any."""
    if isinstance(observation, dict):
        shape = next((np.shape(entry) for entry in observation.values() if np.shape(entry)), ())
    else:
        shape = np.shape(observation)
    if not shape:
        raise InvalidInputError("an observation has no batch dimension; expected (B, ...). Add one with [None].")
    return int(shape[0])


def with_diagnostics(plan: Plan, spec: ActionSpec) -> Plan:
    """Fill in how far the plan's noise and result are from what the prior and the reference would have."""
    noise = plan.noise[..., : spec.dim]
    # A sum of n squared standard normals: chi-square, whose distribution function is the regularised gamma function.
    half_square = noise.double().square().flatten(1).sum(1) / 2
    percentile = torch.special.gammainc(torch.full_like(half_square, noise[0].numel() / 2), half_square).to(plan.noise)
    percentile = torch.where((plan.start_time > 0) | (spec.prior != "gaussian"), torch.nan, percentile)
    nothing = torch.full_like(percentile, torch.nan)
    if plan.reference is None:
        return replace(plan, noise_percentile=percentile, round_trip_error=nothing, agreement=nothing)
    spoken = plan.reference.spoken
    difference = (plan.chunk - plan.reference.chunk).square() * spoken
    error = (difference.flatten(1).sum(1) / spoken.flatten(1).sum(1)).sqrt()
    motion = torch.ones(spec.dim, dtype=torch.bool, device=spoken.device)
    if spec.layout is not None:
        motion[:] = False
        motion[list(spec.layout.translation)] = True
    executable = spoken[:, spec.past :, : spec.dim]
    wanted = (spec.denormalise(plan.reference.chunk)[:, spec.past :] * executable)[..., motion].sum(1)
    executed = (plan.actions * executable)[..., motion].sum(1)
    agreement = torch.cosine_similarity(wanted, executed, dim=-1)
    agreement = torch.where(plan.reference.active & (wanted.abs().sum(-1) > 0), agreement, nothing)
    return replace(plan, noise_percentile=percentile, round_trip_error=error, agreement=agreement)
