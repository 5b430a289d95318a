"""Directions in the words of somebody who looks through the camera, and the world axes that they mean."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Axes = tuple[int, int, int]

OGBENCH_WAYS: dict[str, Axes] = {
    "right": (0, 1, 0),
    "left": (0, -1, 0),
    "away": (-1, 0, 0),
    "nearer": (1, 0, 0),
    "up": (0, 0, 1),
    "down": (0, 0, -1),
}
"""Through OGBench's front camera, which stands opposite the robot and looks back at it."""


def ways_of(rotation: npt.NDArray[np.floating]) -> dict[str, Axes]:
    """Say which world axis each direction is, as seen through a camera.

    "right" is the horizontal world axis that points most to the image's right, "away" the other one, pointing into the image.

    Args:
        rotation: (3, 3), columns are the camera's right, up and backward axes in the world frame.
    """
    right, backward = rotation[:, 0], rotation[:, 2]
    across = int(np.abs(right[:2]).argmax())
    along = 1 - across
    to_right = _axis(across, 1 if right[across] > 0 else -1)
    into = -backward[along] if abs(backward[along]) > 1e-6 else rotation[along, 1]
    away = _axis(along, 1 if into > 0 else -1)
    return {
        "right": to_right,
        "left": _opposite(to_right),
        "away": away,
        "nearer": _opposite(away),
        "up": (0, 0, 1),
        "down": (0, 0, -1),
    }


def _axis(index: int, sign: int) -> Axes:
    axes = [0, 0, 0]
    axes[index] = sign
    return axes[0], axes[1], axes[2]


def _opposite(axes: Axes) -> Axes:
    return -axes[0], -axes[1], -axes[2]
