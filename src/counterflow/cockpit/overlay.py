"""What is drawn over the picture: where a chunk leads, as paths in the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from counterflow.envs import CameraView
from counterflow.policies import ActionSpec

REACH = 0.04  # metres drawn for one unit of command: about twice what OGBench's arm covers, for the eye
Path = list[list[float]]


def paths_of(
    actions: npt.NDArray[Any],
    spec: ActionSpec,
    camera: CameraView,
    start: npt.NDArray[np.float64],
    reach: float = REACH,
) -> list[Path]:
    """Return where chunks of actions lead, as paths in the image.

    Args:
        actions: (N, H, A), environment units.
        spec: says which dimensions move the robot.
        camera: through which it is seen.
        start: (3,) where the gripper is, metres.
        reach: metres for one unit of command.

    Returns:
        N paths of up to H + 1 points (column, row), as shares of the image's width and height; what lies behind the camera is
        left out.
    """
    if spec.layout is None or not len(actions):
        return []
    axes = list(spec.layout.translation)
    moved = np.zeros((*actions.shape[:2], 3))
    moved[..., : len(axes)] = np.cumsum(actions[..., axes], axis=1) * reach
    points = np.concatenate([np.zeros((len(actions), 1, 3)), moved], axis=1) + start
    pixels = camera.project(points.reshape(-1, 3)).reshape(*points.shape[:2], 2) / (camera.width, camera.height)
    return [[[round(x, 4), round(y, 4)] for x, y in path.tolist() if x == x and y == y] for path in pixels]


def executable(chunk: Tensor, spec: ActionSpec) -> npt.NDArray[np.float32]:
    """Return normalised chunks (N, H, A + padding) as the actions that would be executed, (N, H - past, A)."""
    actions: npt.NDArray[np.float32] = spec.limit(spec.denormalise(chunk))[:, spec.past :].float().cpu().numpy()
    return actions
