"""`Direction`: the little that a reasoner says, and how it becomes a reference chunk.

A person with six keys, a vision-language model and a script all say the same thing: along which axes, how much, what the
gripper should do, or nothing at all ("defer"). A `Convention` writes that into an action chunk. Source: FRS (arXiv
2606.13675); the two named conventions are the paper's and the one this project uses on OGBench.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from counterflow.checks import COUNT, Range, check_name
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.policies import ActionSpec
from counterflow.steering import Reference
from counterflow.steering.context import LARGEST_REFERENCE

GripperCommand = Literal["policy", "hold", "open", "close"]
View = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Direction:
    """What a reasoner says about the next chunk.

    Attributes:
        axes: signed world axes (x, y, z), each -1, 0 or 1; several at once mean the diagonal.
        amount: how far, in (0, 1]: 1 is the full magnitude of the convention, 0.5 what the paper calls "less".
        gripper: "open" or "close" it, "hold" it where it is, or leave it to the "policy".
        defer: nothing to say; the base policy acts alone.

    Raises:
        InvalidInputError: an axis is not -1, 0 or 1, the amount is out of range, or the gripper command is unknown.
    """

    axes: tuple[int, int, int] = (0, 0, 0)
    amount: float = 1.0
    gripper: GripperCommand = "policy"
    defer: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        if len(self.axes) != 3 or any(axis not in (-1, 0, 1) for axis in self.axes):
            raise InvalidInputError(f"direction axes are {self.axes!r}; expected three of -1, 0, 1 for x, y, z.")
        if not (0 < self.amount <= 1):
            raise InvalidInputError(f"direction amount is {self.amount!r}; expected a number in (0, 1].")
        check_name("gripper command", self.gripper, GripperCommand)

    @property
    def vector(self) -> npt.NDArray[np.float64]:
        """(3,) unit vector along the axes times the amount; zero where no axis is named or the reasoner defers."""
        axes = np.asarray(self.axes, dtype=np.float64)
        length = np.linalg.norm(axes)
        return axes * 0.0 if self.defer or length == 0 else axes / length * self.amount


@dataclass(frozen=True)
class Convention:
    """How a direction is written into an action chunk.

    Attributes:
        magnitude: length of the translation for amount 1, in `units`.
        units: "environment" (commands as the robot takes them) or "normalised" (the policy's space, as the paper does).
        gripper_magnitude: size of an "open" or "close" command, environment units.
        rotation: "hold" writes the encoding of raw zero; "policy" hands rotation to the policy (its noise is drawn afresh).
        rows: how many of the chunk's rows the reference speaks for; None is all. Later rows are the policy's.

    Raises:
        InvalidInputError: a magnitude is not positive and finite.
    """

    magnitude: float = 0.7
    units: Literal["environment", "normalised"] = "environment"
    gripper_magnitude: float = 1.0
    rotation: Literal["hold", "policy"] = "hold"
    rows: int | None = None

    def __post_init__(self) -> None:
        """Check the magnitudes."""
        for name in ("magnitude", "gripper_magnitude"):
            value = getattr(self, name)
            Range(0, 10, above=True).check(f"convention {name}", value)
        if self.rows is not None:
            COUNT.check("convention rows", self.rows)


OGBENCH = Convention()
"""Ours on OGBench: magnitude 0.7 in environment units, gripper commanded, rotation held at zero."""

PAPER = Convention(magnitude=1.0, units="normalised")
"""The paper's: unit length in normalised translation ("less" halves it), rotation and a held gripper at raw zero."""

CONVENTIONS = {"ogbench": OGBENCH, "paper": PAPER}


def to_reference(directions: Sequence[Direction], spec: ActionSpec, convention: Convention = OGBENCH) -> Reference:
    """Write directions into reference chunks, constant over the chunk.

    Args:
        directions: one a row, B of them.
        spec: the policy's action space; its layout says which dimension does what.
        convention: magnitudes and who decides what.

    Returns:
        The reference, chunk (B, H, A + padding) normalised.

    Raises:
        MismatchError: the action space has no layout, or no gripper to command.
    """
    layout = spec.layout
    if layout is None:
        raise MismatchError(
            "the policy's action space does not say which dimensions move the robot. Give its ActionSpec a layout "
            "(ActionLayout(translation=..., rotation=..., gripper=...)), or build the reference chunk yourself."
        )
    rows, dims = len(directions), spec.dim
    raw = torch.zeros(rows, dims)
    translation = torch.zeros(rows, 3)
    steered = torch.ones(rows, spec.horizon, dims, dtype=torch.bool)
    for row, direction in enumerate(directions):
        translation[row] = torch.as_tensor(direction.vector) * convention.magnitude
        if layout.gripper is None:
            if direction.gripper in ("open", "close"):
                raise MismatchError(f"the gripper was told to {direction.gripper}; this action space has no gripper.")
        elif direction.gripper == "policy":
            steered[row, :, layout.gripper] = False
        else:
            sign = {"close": 1.0, "open": -1.0, "hold": 0.0}[direction.gripper] * layout.gripper_close_sign
            raw[row, layout.gripper] = sign * convention.gripper_magnitude
    if convention.rotation == "policy":
        steered[..., list(layout.rotation)] = False
    if convention.rows is not None:
        steered[:, convention.rows :] = False
    axes = list(layout.translation)
    if convention.units == "environment":
        raw[:, axes] = translation[:, : len(axes)]
        chunk = spec.normalise(spec.limit(raw))
    else:
        chunk = spec.normalise(raw)
        chunk[:, axes] = translation[:, : len(axes)]
    # Of a dimension that hardly moved in the policy's data, and is normalised by that, any motion lies hundreds of units away: as
    # far as a reference may go says the same to a policy that never moves it.
    chunk = chunk.clamp(-LARGEST_REFERENCE, LARGEST_REFERENCE)
    active = torch.tensor([not direction.defer for direction in directions], dtype=torch.bool)
    whole = chunk[:, None, :dims].expand(rows, spec.horizon, dims).clone()
    return Reference.of(whole, active, steered).within(spec)


class Reasoner(Protocol):
    """Somebody who looks at the situation before each chunk and says a direction. One reasoner serves one episode at a time.

    One that has an attribute `looks` that is true finds camera images in what it is shown: "image/<camera>", (height, width, 3).
    """

    def reset(self, seed: int) -> None:
        """Forget the last episode; `seed` feeds whatever is random."""
        ...

    def decide(self, view: View) -> Direction:
        """Say the direction for the next chunk, given what is to be seen (names to (k,) arrays)."""
        ...
