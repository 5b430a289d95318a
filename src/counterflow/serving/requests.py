"""What a client asks: an observation and, beside it, `steer`, `noise`, `view` and `expect`, each checked before it is used.

observation   every other entry of the message: arrays, numbers and texts by name, without a batch dimension
steer         what the policy is steered by: a direction, a reference chunk, or a reasoner's name
view          what the reasoner sees; None: the observation's arrays
noise         where the flow starts, (H, A) normalised, instead of a fresh draw
expect        what the policy must be, by name: see `ServedPolicy.belongs`
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.policies import ActionSpec
from counterflow.policies.observation import ObservationEntry
from counterflow.reasoners import Convention, Direction, to_reference
from counterflow.steering import Reference

RESERVED = ("steer", "noise", "view", "expect")
PLAIN = "observation"
"""The name under which a policy that sees a single array is sent it."""

DEEPEST = 4  # maps in maps: openpi's ALOHA robots send {"images": {"cam_high": ...}}
LONGEST_NAME = 128
MOST_VIEWED = 4096  # numbers in an entry of a reasoner's view

Observation = dict[str, Any]
"""Names to arrays and texts, of one moment; entries of inner maps are called "outer/inner"."""


@dataclass(frozen=True)
class ReasonerCall:
    """A reasoner is to say the direction.

    Attributes:
        name: which.
        view: what it sees, names to (k,) arrays.
        reset: whether a new episode begins.
    """

    name: str
    view: dict[str, npt.NDArray[np.float64]]
    reset: bool


@dataclass(frozen=True)
class Asked:
    """A message, checked.

    Attributes:
        observation: of one moment.
        steer: a reference of one row, a reasoner that is to be asked for it, or None.
        noise: (1, H, A) or (N, H, A), or None.
    """

    observation: Observation
    steer: Reference | ReasonerCall | None
    noise: Tensor | None

    @property
    def needs_reasoner(self) -> bool:
        """Whether a reasoner is to be asked, which may take long."""
        return isinstance(self.steer, ReasonerCall)


@dataclass(frozen=True)
class Request:
    """What the policy is to decide, complete.

    Attributes:
        observation: of one moment.
        reference: of one row, or None.
        noise: (1, H, A) or (N, H, A) instead of the first draw, or None.
        seed: what this request's draws descend from.
    """

    observation: Observation
    reference: Reference | None
    noise: Tensor | None
    seed: int

    @property
    def signature(self) -> Hashable:
        """What must agree for two requests to share a batch: names, types and shapes of the observation."""
        return tuple(
            (name, "text") if isinstance(value, str) else (name, value.dtype.str, value.shape)
            for name, value in self.observation.items()
        )


def read_observation(
    content: Mapping[str, Any], declared: Mapping[str, ObservationEntry] | None, names: Mapping[str, str] | None = None
) -> Observation:
    """Check an observation against what the policy declares (None: it declares nothing).

    Args:
        content: as it was sent.
        declared: the policy's entries.
        names: the policy's names for entries that the robot calls something else.

    Returns:
        Arrays first, then texts, each by name: every floating-point array float32 and finite.

    Raises:
        InvalidInputError: an entry is missing, of the wrong type, NaN or infinite.
        MismatchError: an entry has another shape.
        UnknownNameError: the policy declares its entries, and this is none of them.
    """
    names = {} if names is None else names
    given = {names.get(name, name): _entry(name, value) for name, value in _flatten(content)}
    if declared is not None:
        for name in given:
            if name not in declared:
                raise UnknownNameError("observation entry", name[:80], [*declared, *RESERVED])
        for name, entry in declared.items():
            if name not in given and not entry.optional:
                raise InvalidInputError(
                    f"the observation lacks {name!r}; this policy sees {_listed(declared)}, and was sent "
                    f"{', '.join(map(repr, given)) or 'nothing'}."
                )
        given = {name: _fitted(name, value, declared[name]) for name, value in given.items()}
    if not given:
        raise InvalidInputError(
            "a message without an observation was sent; expected its arrays, numbers and texts by name, for example "
            "{'observation': state}."
        )
    return dict(sorted(given.items(), key=lambda item: (isinstance(item[1], str), item[0])))


def stack(observations: list[Observation], plain: bool) -> Any:
    """Make a batch of observations of the same signature: tensors (B, ...) and lists of texts by name.

    Args:
        observations: B of them.
        plain: return the only tensor itself, for a policy that sees a single array.
    """
    batch = {
        name: [one[name] for one in observations]
        if isinstance(value, str)
        else torch.from_numpy(np.stack([one[name] for one in observations]))
        for name, value in observations[0].items()
    }
    return batch[PLAIN] if plain else batch


def read_noise(noise: Any, spec: ActionSpec, candidates: int) -> Tensor | None:
    """Check a noise (H, A), or (N, H, A) where the policy draws N candidates; return (1 or N, H, A).

    Raises:
        InvalidInputError: it is not an array of finite floating-point numbers.
        MismatchError: it has another shape.
    """
    if noise is None:
        return None
    tensor = _floating(noise, "the noise")
    shapes: list[tuple[int, ...]] = [(spec.horizon, spec.state_dim)]
    shapes += [(candidates, spec.horizon, spec.state_dim)] if candidates > 1 else []
    if tuple(tensor.shape) not in shapes:
        raise MismatchError(
            f"the noise has shape {tuple(tensor.shape)}; this policy's flow starts at {' or '.join(map(str, shapes))} "
            "(horizon, action size with padding). Was it made for another policy?"
        )
    if spec.prior == "uniform":
        if not bool((tensor.abs() < 1).all()):
            raise InvalidInputError("the noise leaves (-1, 1), on which this policy's noise is uniform.")
        # Draws are Gaussian, and become uniform through their distribution function.
        tensor = math.sqrt(2) * torch.erfinv(tensor.double()).float()
    return tensor if tensor.ndim == 3 else tensor[None]


def read_steer(
    steer: Any, view: Any, observation: Observation, spec: ActionSpec, convention: Convention
) -> Reference | ReasonerCall | None:
    """Check what the policy is to be steered by.

    Args:
        steer: None; a reasoner's name; a reference chunk (H, A) in environment units; or a map: a direction ("axes",
            "amount", "gripper", "defer"), a chunk ("chunk", "units", "steered"), or a reasoner ("reasoner", "reset").
        view: what a reasoner sees; None: the observation's arrays.
        observation: the observation.
        spec: the policy's action space.
        convention: how a direction becomes a reference.

    Raises:
        InvalidInputError: it is none of these, or a value is out of range.
        MismatchError: a chunk of another shape, or a direction where the action space has no layout.
        UnknownNameError: the map has an entry that is none of these.
    """
    if steer is None:
        return None
    if isinstance(steer, str):
        return ReasonerCall(steer, _view(view, observation), reset=False)
    if isinstance(steer, np.ndarray):
        return _reference(steer, "environment", None, spec)
    if not isinstance(steer, dict):
        raise InvalidInputError(
            f"steer is a {type(steer).__name__}; expected a direction ({{'axes': [0, 0, -1]}}), a reference chunk (an array), "
            "or a reasoner's name."
        )
    if "reasoner" in steer:
        _only(steer, "reasoner", "reset")
        name, reset = steer["reasoner"], steer.get("reset", False)
        if not isinstance(name, str) or not isinstance(reset, bool | np.bool_):
            raise InvalidInputError("steer names a reasoner by a text, and says reset by true or false.")
        return ReasonerCall(name, _view(view, observation), bool(reset))
    if "chunk" in steer:
        _only(steer, "chunk", "units", "steered")
        return _reference(steer["chunk"], steer.get("units", "environment"), steer.get("steered"), spec)
    return to_reference([read_direction(steer)], spec, convention)


def read_direction(steer: Mapping[str, Any]) -> Direction:
    """Read a direction from plain values.

    Raises:
        InvalidInputError: a value has the wrong type or is out of range.
        UnknownNameError: an entry or a gripper command is not known.
    """
    _only(steer, "axes", "amount", "gripper", "defer")
    said = steer.get("axes", (0, 0, 0))
    axes = list(said) if isinstance(said, list | tuple) or (isinstance(said, np.ndarray) and said.ndim == 1) else []
    amount, gripper, defer = steer.get("amount", 1.0), steer.get("gripper", "policy"), steer.get("defer", False)
    if len(axes) != 3 or any(not _is_number(axis) or float(axis) not in (-1, 0, 1) for axis in axes):
        raise InvalidInputError(f"direction axes are {str(said)[:80]}; expected three of -1, 0, 1 for x, y, z.")
    if not _is_number(amount):
        raise InvalidInputError(f"direction amount is a {type(amount).__name__}; expected a number in (0, 1].")
    if not isinstance(gripper, str) or not isinstance(defer, bool | np.bool_):
        raise InvalidInputError("a direction says gripper by a text, and defer by true or false.")
    x, y, z = (int(axis) for axis in axes)
    return Direction((x, y, z), float(amount), gripper[:80], bool(defer))  # type: ignore[arg-type] # it checks


def _reference(chunk: Any, units: Any, steered: Any, spec: ActionSpec) -> Reference:
    tensor = _floating(chunk, "the reference chunk")
    shape = (spec.horizon, spec.dim)
    if tuple(tensor.shape) != shape:
        raise MismatchError(
            f"the reference chunk has shape {tuple(tensor.shape)}; this policy's chunks are {shape} (horizon, action size). "
            "Build it for this policy."
        )
    if units not in ("environment", "normalised"):
        raise InvalidInputError(f"a chunk's units are {str(units)[:80]!r}; expected 'environment' or 'normalised'.")
    mask = None
    if steered is not None:
        if not isinstance(steered, np.ndarray) or steered.dtype != np.bool_ or steered.shape != shape:
            raise InvalidInputError(f"steered says which entries of a chunk count; expected a boolean array {shape}.")
        mask = torch.from_numpy(steered.copy())[None]
    if units == "normalised":
        return Reference.of(tensor[None], steered=mask)
    reference = Reference.of(spec.normalise(tensor[None])[..., : spec.dim], steered=mask)
    limited = spec.normalise(spec.limit(tensor[None]))[..., : spec.dim]
    return Reference(limited, reference.active, reference.steered)


def _view(view: Any, observation: Observation) -> dict[str, npt.NDArray[np.float64]]:
    """Return what a reasoner sees."""
    if view is None:
        return {
            name: value.astype(np.float64)
            for name, value in observation.items()
            if not isinstance(value, str) and value.ndim == 1
        }
    if not isinstance(view, dict):
        raise InvalidInputError(f"the view is a {type(view).__name__}; expected a map of names to arrays.")
    seen = {}
    for name, value in _flatten(view):
        array = _entry(name, value)
        if isinstance(array, str) or array.ndim > 1 or array.size > MOST_VIEWED:
            raise InvalidInputError(f"the view's {name!r} is no list of numbers; expected an array (k,).")
        seen[name] = array.astype(np.float64).reshape(-1)
    return seen


def _flatten(content: Mapping[str, Any], prefix: str = "", depth: int = 0) -> list[tuple[str, Any]]:
    if depth >= DEEPEST:
        raise InvalidInputError(
            f"an observation has maps within maps, {DEEPEST} deep or more. Name its entries 'a/b' instead."
        )
    found: list[tuple[str, Any]] = []
    for name, value in content.items():
        if len(name) > LONGEST_NAME:
            raise InvalidInputError(f"an entry's name begins {name[:40]!r} and is too long; at most {LONGEST_NAME}.")
        if isinstance(value, dict):
            found += _flatten(value, f"{prefix}{name}/", depth + 1)
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _entry(name: str, value: Any) -> npt.NDArray[Any] | str:
    """Return an array or a text; floating point as float32, finite."""
    if isinstance(value, str):
        return value
    if not isinstance(value, np.ndarray | np.generic | bool | int | float):
        raise InvalidInputError(
            f"the entry {name!r} is a {type(value).__name__}; expected a numpy array, a number or a text."
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidInputError(f"the entry {name!r} is a whole number beyond 64 bits; expected a smaller one.")
    array = np.asarray(value)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what overflows is found below
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise InvalidInputError(
                f"the entry {name!r} holds {int((~np.isfinite(array)).sum())} values of {array.size} that are NaN, infinite or "
                "too large. Look for them where the robot measures it."
            )
    return array


def _fitted(name: str, value: npt.NDArray[Any] | str, entry: ObservationEntry) -> npt.NDArray[Any] | str:
    """Check one entry against what was declared."""
    if entry.dtype == "image":
        return _image(name, value, entry)
    dtype = "text" if isinstance(value, str) else value.dtype.name
    if dtype != entry.dtype:
        raise InvalidInputError(
            f"the entry {name!r} is of type {dtype}; this policy sees {entry}. Convert it before sending."
        )
    if not isinstance(value, str) and not entry.fits(value.shape):
        raise MismatchError(
            f"the entry {name!r} has shape {value.shape}; this policy sees {entry}, without a batch dimension. Was it made for "
            "another robot?"
        )
    return value


def _image(name: str, value: npt.NDArray[Any] | str, entry: ObservationEntry) -> npt.NDArray[Any]:
    """Return an image (C, H, W), float32 in [0, 1], from one like it or from bytes (H, W, C)."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
        channels_first = value if value.shape[0] == entry.shape[0] else value.transpose(2, 0, 1)
        value = channels_first.astype(np.float32) / 255
    if isinstance(value, str) or value.dtype.kind != "f" or not entry.fits(value.shape):
        kind = "a text" if isinstance(value, str) else f"of type {value.dtype.name} and shape {value.shape}"
        channels = entry.shape[0]
        raise MismatchError(
            f"the image {name!r} is {kind}; this policy sees bytes (height, width, {channels}) or float32 ({channels}, height, "
            "width) from 0 to 1, without a batch dimension."
        )
    if value.min() < 0 or value.max() > 1:
        raise InvalidInputError(
            f"the image {name!r} goes from {value.min():.4g} to {value.max():.4g}; expected 0 to 1."
        )
    return value


def _floating(value: Any, what: str) -> Tensor:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        kind = value.dtype.name if isinstance(value, np.ndarray) else type(value).__name__
        raise InvalidInputError(f"{what} is of type {kind}; expected an array of floating-point numbers (float32).")
    with np.errstate(over="ignore"):
        array = value.astype(np.float32)
    if not np.isfinite(array).all():
        raise InvalidInputError(f"{what} holds NaN or infinite values; expected finite numbers.")
    return torch.from_numpy(array)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _only(content: Mapping[str, Any], *known: str) -> None:
    for name in content:
        if name not in known:
            raise UnknownNameError("entry of steer", name[:80], known)


def _listed(declared: Mapping[str, ObservationEntry]) -> str:
    return ", ".join(f"{name!r} ({entry})" for name, entry in declared.items())
