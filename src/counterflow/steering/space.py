"""What reinforcement learning holds in its hand: an action that is a latent noise, a residual, or both.

    executed action = limit( denoise(noise, s) + residual )

The frozen flow sits inside. Residuals, and their bounds, are in the units that the environment takes actions in, whatever the
policy's normalisation is: a bound in normalised units would mean something else for every policy (RFS, arXiv 2602.01789).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from counterflow.checks import POSITIVE, check_name
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.flow import denoise
from counterflow.policies import BasePolicy, bind
from counterflow.steering.latent import LatentShape
from counterflow.steering.steered import check_steps, frozen

Ports = Literal["latent", "residual", "both"]


@dataclass(frozen=True)
class Decided:
    """What came of a batch of actions.

    Attributes:
        noise: (B, H, A + padding) where the flow started.
        base: (B, H, A + padding) what the frozen flow made of it, normalised.
        chunk: (B, H, A + padding) what is executed, normalised.
        actions: (B, E, A) what is executed, environment units, within the limits.
    """

    noise: Tensor
    base: Tensor
    chunk: Tensor
    actions: Tensor


@dataclass(frozen=True, eq=False)
class SteeringSpace:
    """The actions with which a frozen policy is steered: (B, D) numbers, latents first.

    Attributes:
        policy: the frozen policy.
        ports: "latent", "residual", or "both".
        steps: K, denoising steps.
        solver: of the denoising.
        bound: the largest coefficient of a latent; larger ones are clipped. None: no bound.
        latent: which part of the noise is decided on.
        residual_bound: the largest residual, environment units: one number, or one for each of the A dimensions.
        show_base: whether the learner sees the base policy's chunk beside the observation (a residual's critic has to know
            what it is added to). The base's noise is drawn with the observation then, so this needs ports "residual".

    Raises:
        UnknownNameError: no such ports.
        InvalidInputError: a number is out of range.
        MismatchError: the policy has no flow.
    """

    policy: BasePolicy
    ports: Ports = "latent"
    steps: int = 5
    solver: str = "euler"
    bound: float | None = 1.5
    latent: LatentShape = field(default_factory=LatentShape)
    residual_bound: float | Sequence[float] = 0.1
    show_base: bool = False

    def __post_init__(self) -> None:
        """Check every setting."""
        check_name("steering ports", self.ports, Ports)
        check_steps(self.steps)
        if self.bound is not None:
            POSITIVE.check("the noise bound", self.bound)
        bounds = self._bounds()
        dim = self.policy.action_spec.dim
        if len(bounds) != dim or not all(0 <= one < float("inf") for one in bounds):
            raise InvalidInputError(
                f"the residual's bound is {self.residual_bound!r}; expected a number of at least 0, or {dim} of them, one a "
                "dimension, in the units of the environment's actions."
            )
        if self.show_base and self.ports != "residual":
            raise InvalidInputError(
                f"the base's chunk can't be shown before its noise is decided on; ports are {self.ports!r}, expected "
                "'residual'."
            )
        if not getattr(frozen(self.policy), "has_flow", True):
            raise MismatchError("this policy makes its chunk in a single step; there is no flow to steer.")

    def _bounds(self) -> tuple[float, ...]:
        given = self.residual_bound
        if isinstance(given, int | float):
            return (float(given),) * self.policy.action_spec.dim
        return tuple(float(one) for one in given)

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return torch.device(getattr(self.policy, "device", "cpu"))

    @property
    def executed(self) -> int:
        """E, how many actions of a chunk are executed."""
        spec = self.policy.action_spec
        return spec.executed or spec.horizon - spec.past

    @property
    def latent_size(self) -> int:
        """How many numbers decide on the latent."""
        spec = self.policy.action_spec
        return 0 if self.ports == "residual" else self.latent.rows(spec.horizon) * spec.dim

    @property
    def residual_size(self) -> int:
        """How many numbers decide on the residual."""
        return 0 if self.ports == "latent" else self.executed * self.policy.action_spec.dim

    @property
    def size(self) -> int:
        """D, how many numbers an action has."""
        return self.latent_size + self.residual_size

    @property
    def limits(self) -> Tensor:
        """(D,) the largest size of each number; infinite where there is no bound."""
        bound = float("inf") if self.bound is None else self.bound
        residual = torch.tensor(self._bounds()).repeat(self.executed)
        return torch.cat([torch.full((self.latent_size,), bound), residual[: self.residual_size]])

    def encode(self, observation: Tensor | Mapping[str, Any]) -> tuple[Any, Tensor]:
        """Return the policy's context of observations (B, O), or what it looks at, and what a learner sees of them (B, F).

        That is the frozen policy's own features where it offers them, else the observation.

        Raises:
            MismatchError: the policy looks at pictures and offers no features.
        """
        context = self.policy.encode(observation)
        inner = frozen(self.policy)
        if inner is self.policy and hasattr(inner, "features"):
            return context, inner.features(context).flatten(1).float()
        if not isinstance(observation, Tensor):
            raise MismatchError(
                f"{type(inner).__name__} looks at {', '.join(observation)} and offers no features, so a learner beside it would "
                "see nothing. Give it a method `features(context) -> (B, F)`."
            )
        return context, observation.to(self.device).flatten(1).float()

    def context_of(self, inputs: Tensor) -> Any:
        """Return the context that features (B, F) belong to, for denoising from what a replay keeps.

        Raises:
            MismatchError: the policy's features are not its context.
        """
        inner = frozen(self.policy)
        if not getattr(inner, "features_are_context", False) or inner is not self.policy:
            raise MismatchError(
                f"{type(inner).__name__} can't denoise from its features alone, which noise aliasing does in every update. "
                "Use the SAC variant."
            )
        return inputs

    def split(self, actions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the latent's coefficients (B, R, A) and the residual (B, E, A), each within its bounds; None: not steered.

        Raises:
            InvalidInputError: the actions are not (B, D), or not finite.
        """
        dim = self.policy.action_spec.dim
        if actions.ndim != 2 or actions.shape[1] != self.size:
            raise InvalidInputError(
                f"steering actions have shape {tuple(actions.shape)}; expected (B, {self.size}): {self.latent_size} numbers of "
                f"the latent and {self.residual_size} of the residual."
            )
        limits = self.limits.to(actions)
        actions = actions.clamp(-limits, limits)
        latent, residual = actions[:, : self.latent_size], actions[:, self.latent_size :]
        return (
            latent.unflatten(1, (-1, dim)) if self.latent_size else None,
            residual.unflatten(1, (self.executed, dim)) if self.residual_size else None,
        )

    def noise(self, latent: Tensor | None, fresh: Tensor) -> Tensor:
        """Return where the flow starts, (B, H, A + padding).

        Args:
            latent: (B, R, A) coefficients, or None where the base policy's own noise is used.
            fresh: (B, H, A + padding) a draw of the prior, for all that nobody decides on.
        """
        if latent is None:
            return fresh
        spec = self.policy.action_spec
        own = self.latent.expand(latent, spec.horizon, fresh[..., : spec.dim])
        return torch.cat([own, fresh[..., spec.dim :]], dim=-1) if spec.padding else own

    @torch.no_grad()
    def denoise(self, context: Any, noise: Tensor) -> Tensor:
        """Return what the frozen flow makes of noises (B, H, A + padding), normalised."""
        return denoise(bind(self.policy, context), noise, self.steps, self.solver)

    def executed_part(self, chunks: Tensor) -> Tensor:
        """Return what is executed of chunks (B, H, A + padding), flat, in the same units, (B, E A)."""
        spec = self.policy.action_spec
        return chunks[:, spec.past : spec.past + self.executed, : spec.dim].flatten(1)

    def compose(self, base: Tensor, residual: Tensor | None) -> Tensor:
        """Return the executed actions (B, E, A), environment units, of a base chunk (B, H, A + padding) and a residual."""
        spec = self.policy.action_spec
        actions = spec.denormalise(base)[:, spec.past : spec.past + self.executed]
        return spec.limit(actions if residual is None else actions + residual)

    def decide(self, context: Any, actions: Tensor, fresh: Tensor, base: Tensor | None = None) -> Decided:
        """Turn actions (B, D) into what is executed.

        Args:
            context: of the observations.
            actions: (B, D).
            fresh: (B, H, A + padding) a draw of the prior.
            base: (B, H, A + padding) what the flow makes of `fresh`, where it is known already (with `show_base`).
        """
        latent, residual = self.split(actions.to(self.device))
        noise = self.noise(latent, fresh.to(self.device))
        made = self.denoise(context, noise) if base is None or latent is not None else base
        executed = self.compose(made, residual)
        spec = self.policy.action_spec
        chunk = spec.normalise(spec.limit(spec.denormalise(made)))
        chunk[:, spec.past : spec.past + self.executed] = spec.normalise(executed)
        return Decided(noise, made, chunk, executed)
