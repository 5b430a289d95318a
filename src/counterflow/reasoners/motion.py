"""Coarse motions that the scripted reasoners share: which single axis to name next. World frame, metres."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from counterflow.reasoners.direction import Direction, GripperCommand

Point = npt.NDArray[np.float64]


def along(vector: Point, gripper: GripperCommand) -> Direction:
    """Name the one axis along which `vector` (3,) is largest.

    The amount is always the whole one: halved references, tried for what is near, are weaker than the prior's own habits
    (it never quite closes a drawer) and cost success.
    """
    axis = int(np.abs(vector).argmax())
    axes = [0, 0, 0]
    axes[axis] = int(np.sign(vector[axis]))
    return Direction((axes[0], axes[1], axes[2]), 1.0, gripper)


def still(gripper: GripperCommand) -> Direction:
    """Stay, and move the gripper only."""
    return Direction((0, 0, 0), 1.0, gripper)


def approach(effector: Point, target: Point, *, clearance: float, aligned: float, gripper: GripperCommand) -> Direction:
    """Go over `target` at a safe height, then down on it.

    Args:
        effector: (3,) where the gripper is.
        target: (3,) where it should come down.
        clearance: how far above the target the gripper must be to travel.
        aligned: horizontal distance along either axis within which it may go down.
        gripper: the command all the way.
    """
    offset = target - effector
    if np.abs(offset[:2]).max() > aligned:
        if effector[2] < target[2] + clearance:
            return Direction((0, 0, 1), 1.0, gripper)
        return along(np.array([offset[0], offset[1], 0.0]), gripper)
    return Direction((0, 0, 1 if offset[2] > 0 else -1), 1.0, gripper)
