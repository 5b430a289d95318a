"""What a base policy is: an action space, an encoder that runs once an observation, and a velocity. No more.

A small MLP, a transformer and a vision-language-action model differ in nothing else, so all that steers them is written
against this file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from counterflow.checks import check_name
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.flow import Field
from counterflow.layout import ActionLayout
from counterflow.policies.identity import identify
from counterflow.policies.normalisation import Normaliser

Prior = Literal["gaussian", "uniform"]
"""The law of the flow's noise, entry by entry: N(0, 1), or uniform on [-1, 1]."""

Context = Any
"""Whatever `encode` returns: a tensor, or a pytree of tensors, whose leading dimension is the batch."""


@dataclass(frozen=True)
class ActionSpec:
    """A policy's action space: the size of a chunk, its limits, and the way between environment and normalised units.

    The flow moves states (B, H, A + padding). In most policies that is the chunk of actions itself; what is more than that
    (padded dimensions, rows that lie in the past) belongs to the flow and is never executed.

    Attributes:
        horizon: H, rows of the flow's state: the actions in a chunk, after those that lie in the past.
        dim: A, the dimension of an action.
        low: (A,) lowest action in environment units; None: unlimited.
        high: (A,) highest action in environment units; None: unlimited.
        normaliser: from environment units to the policy's; None: they are the same.
        layout: which dimension does what; None: unknown (references must then be given as chunks, not directions).
        padding: trailing dimensions that the flow moves and nobody executes (pi0 and SmolVLA pad every robot's actions to
            32). Trained as zero; no reference speaks for them.
        past: leading rows that lie in the past (a policy that sees n observations plans from the first of them, so n - 1
            of its actions are over when it has decided); never executed, and no reference speaks for them.
        executed: how many of a chunk's actions are executed before the policy is asked again; None: all.
        prior: the law of the flow's noise.

    Raises:
        InvalidInputError: a size is out of range, or limits or layout don't fit the dimension.
        UnknownNameError: no such prior.
    """

    horizon: int
    dim: int
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    normaliser: Normaliser | None = None
    layout: ActionLayout | None = None
    padding: int = 0
    past: int = 0
    executed: int | None = None
    prior: Prior = "gaussian"

    def __post_init__(self) -> None:
        """Check that everything fits together."""
        check_name("prior", self.prior, Prior)
        if self.horizon < 1 or self.dim < 1:
            raise InvalidInputError(
                f"an action chunk of {self.horizon} x {self.dim} was described; expected 1 x 1 or more."
            )
        if self.padding < 0 or not 0 <= self.past < self.horizon:
            raise InvalidInputError(
                f"padding is {self.padding} and {self.past} of {self.horizon} rows lie in the past; expected 0 or more, and 0 "
                f"to {self.horizon - 1}."
            )
        if self.executed is not None and not 1 <= self.executed <= self.horizon - self.past:
            raise InvalidInputError(
                f"{self.executed} actions of a chunk were to be executed; expected 1 to {self.horizon - self.past}, or None "
                "for all."
            )
        for name, limit in (("low", self.low), ("high", self.high)):
            if limit is not None and len(limit) != self.dim:
                raise InvalidInputError(f"{name} has {len(limit)} entries; the action has {self.dim} dimensions.")
        if (
            self.low is not None
            and self.high is not None
            and any(a >= b for a, b in zip(self.low, self.high, strict=True))
        ):
            raise InvalidInputError(f"the limits are low {self.low} and high {self.high}; expected low below high.")
        if self.normaliser is not None and self.normaliser.dim != self.dim:
            raise InvalidInputError(
                f"the normaliser is for {self.normaliser.dim} dimensions; the action has {self.dim}."
            )
        if self.layout is not None:
            gripper = () if self.layout.gripper is None else (self.layout.gripper,)
            named = (*self.layout.translation, *self.layout.rotation, *gripper)
            if any(not 0 <= index < self.dim for index in named) or len({*named}) != len(named):
                raise InvalidInputError(
                    f"the layout names dimensions {named}; expected different ones from 0 to {self.dim - 1}."
                )

    @classmethod
    def from_description(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ActionSpec:
        """Make the one that `description` and `tensors` tell of."""
        layout, kind = content["layout"], content["normalisation"]
        return cls(
            horizon=content["horizon"],
            dim=content["dim"],
            low=None if content["low"] is None else tuple(content["low"]),
            high=None if content["high"] is None else tuple(content["high"]),
            normaliser=None if kind is None else Normaliser.from_tensors(tensors, "action", kind),
            layout=layout
            and ActionLayout(
                tuple(layout["translation"]), tuple(layout["rotation"]), layout["gripper"], layout["gripper_close_sign"]
            ),
        )

    def description(self) -> dict[str, Any]:
        """Return everything but the numbers, as plain values, of a space without padding or past (such a one is never kept)."""
        return {
            "horizon": self.horizon,
            "dim": self.dim,
            "low": None if self.low is None else list(self.low),
            "high": None if self.high is None else list(self.high),
            "normalisation": None if self.normaliser is None else self.normaliser.kind,
            "layout": None if self.layout is None else asdict(self.layout),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return its numbers, by name."""
        return {} if self.normaliser is None else self.normaliser.tensors("action")

    @property
    def state_dim(self) -> int:
        """A + padding, the size of a row of what the flow moves."""
        return self.dim + self.padding

    @property
    def is_plain(self) -> bool:
        """Whether the flow's state is the executed chunk and nothing else: no padding, no rows that lie in the past."""
        return self.padding == 0 and self.past == 0

    def normalise(self, actions: Tensor) -> Tensor:
        """Bring actions (..., A) from environment units to the policy's, (..., A + padding) with zeros in the padding."""
        normalised = actions if self.normaliser is None else self.normaliser.normalise(actions)
        return functional.pad(normalised, (0, self.padding)) if self.padding else normalised

    def denormalise(self, actions: Tensor) -> Tensor:
        """Bring actions (..., A + padding) from the policy's units to the environment's, (..., A)."""
        actions = actions[..., : self.dim] if self.padding else actions
        return actions if self.normaliser is None else self.normaliser.denormalise(actions)

    def limit_normalised(self, actions: Tensor) -> Tensor:
        """Clip actions (..., A), normalised, to the limits in these units; the gradient passes where nothing is clipped."""
        low = (-torch.inf,) * self.dim if self.low is None else self.low
        high = (torch.inf,) * self.dim if self.high is None else self.high
        limits = torch.tensor([low, high], dtype=actions.dtype, device=actions.device)
        if self.normaliser is not None:
            limits = self.normaliser.normalise(limits)
        return actions.clamp(limits[0], limits[1])

    def limit(self, actions: Tensor) -> Tensor:
        """Clip actions (..., A), environment units, to the limits."""
        if self.low is not None:
            actions = torch.maximum(actions, torch.as_tensor(self.low, dtype=actions.dtype, device=actions.device))
        if self.high is not None:
            actions = torch.minimum(actions, torch.as_tensor(self.high, dtype=actions.dtype, device=actions.device))
        return actions


@runtime_checkable
class BasePolicy(Protocol):
    """A frozen flow policy.

    Optional attributes that are used where they exist: `device` (where it computes), `observation_dim` and `cameras`
    (checked against the environment), `family` and `fingerprint` (what learned noises are bound to), `features`.
    """

    @property
    def action_spec(self) -> ActionSpec:
        """The action space."""
        ...

    def encode(self, observation: Any) -> Context:
        """Compute, once, whatever the velocity needs of an observation (leading dimension B)."""
        ...

    def velocity(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at state x (B, H, A + padding), normalised, and time t (B,), in x's shape; t = 0 is noise."""
        ...


def as_device(device: torch.device | str) -> torch.device:
    """Return a device that can be used here.

    Raises:
        InvalidInputError: there is no such device, or this machine or build of torch doesn't have it.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(
            f"device {str(device)!r} can't be used here: {reason}. Expected 'cpu' or, with a GPU and a torch built for it, "
            "'cuda'."
        ) from error
    return found


def bind(policy: BasePolicy, context: Context) -> Field:
    """Return the policy's velocity field for one context: a function of (x, t)."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        return policy.velocity(context, x, t)

    return field


def repeat_context(context: Context, copies: int) -> Context:
    """Repeat every row of a context `copies` times, neighbours together; whatever isn't a tensor is kept."""
    if hasattr(context, "repeat_interleave") and not isinstance(context, Tensor):
        return context.repeat_interleave(copies)
    return tree_map(lambda leaf: leaf.repeat_interleave(copies, 0) if isinstance(leaf, Tensor) else leaf, context)


class FieldPolicy:
    """Your own flow policy, as it is: a module called `field(x, t, observation)`, and its action space.

    Args:
        field: called with x (B, H, A), t (B,) and what `encode` returned; returns the velocity (B, H, A) in this library's
            convention, t = 0 noise and t = 1 action. If yours has it the other way round, pass
            `lambda x, t, o: -field(x, 1 - t, o)`.
        action_spec: horizon, dimension, limits, normalisation and layout of its actions.
        encode: what to compute once an observation, for example normalisation or a vision backbone; None: nothing.
        device: where it computes; None: where its parameters lie, else the CPU.
        name: stands for field and encoder in the fingerprint, in the place of their code and numbers; for what can't be
            looked into (a server, a compiled library), for an object that changes while it is used (counts, caches), or code
            that should count as the same when it is rewritten.
    """

    def __init__(
        self,
        field: Callable[[Tensor, Tensor, Context], Tensor],
        action_spec: ActionSpec,
        encode: Callable[[Any], Context] | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
    ) -> None:
        self._name = name
        self._field, self._encode, self.action_spec = field, encode, action_spec
        if device is None:
            parameter = next(field.parameters(), None) if isinstance(field, nn.Module) else None
            device = "cpu" if parameter is None else parameter.device
        self.device = torch.device(device)

    @property
    def fingerprint(self) -> str:
        """A short name for exactly this policy: whatever depends on it (noises, critics) can refuse another.

        It depends on the numbers and the code of the field and of the encoder (see `identity.identify`; or on `name` in
        their place) and on the action space.
        """
        return identify(type(self), self._name or (self._field, self._encode), self.action_spec)

    def encode(self, observation: Any) -> Context:
        """Move a tensor to the device and apply what was given as `encode`."""
        if isinstance(observation, Tensor):
            observation = observation.to(self.device)
        return observation if self._encode is None else self._encode(observation)

    def velocity(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """Call the field.

        Raises:
            MismatchError: it returned something that is not shaped like x.
        """
        velocity = self._field(x, t, context)
        if velocity.shape != x.shape:
            raise MismatchError(
                f"the field returned {tuple(velocity.shape)} for x of shape {tuple(x.shape)}; expected the same shape. "
                "Check that horizon and dim in the ActionSpec are those of the module."
            )
        return velocity
