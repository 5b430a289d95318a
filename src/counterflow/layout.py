"""Which dimension of an action does what: what environments know, and policies and reasoners need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActionLayout:
    """Which dimensions of an action do what, so that a direction in words can be written into an action.

    Attributes:
        translation: the dimensions that move the end effector along world x, y and z.
        rotation: the dimensions that turn it.
        gripper: the dimension that moves the gripper, or None.
        gripper_close_sign: +1 if positive values close the gripper, -1 if they open it.
    """

    translation: tuple[int, ...]
    rotation: tuple[int, ...] = ()
    gripper: int | None = None
    gripper_close_sign: int = 1
