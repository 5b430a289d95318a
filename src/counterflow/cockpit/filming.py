"""The film of an episode that was driven in the cockpit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from counterflow.envs import CameraView
from counterflow.experiments.film import ARROW, FRAMES_PER_SECOND, describe
from counterflow.experiments.panels import Arrow, Panel, Status, compose
from counterflow.experiments.video import video_writer
from counterflow.reasoners import Direction

Shot = tuple[bytes, str, Direction | None, npt.NDArray[np.float64]]


def write_film(
    path: Path, shots: Sequence[Shot], camera: CameraView, max_steps: int, success: bool, heading: str = ""
) -> Path:
    """Write a film (.mp4).

    Args:
        path: where it goes.
        shots: for every frame the picture (JPEG), the method, what was said (or None), and where the gripper was, (3,) metres.
        camera: through which it is seen.
        max_steps: of an episode.
        success: whether the task was solved.
        heading: above the picture.

    Raises:
        StorageError: it can't be written.
        MissingDependencyError: there is no ffmpeg.
    """
    with video_writer(path, FRAMES_PER_SECOND) as write:
        for step, (jpeg, method, direction, effector) in enumerate(shots):
            last = step == len(shots) - 1
            status: Status = "running" if not last else "success" if success else "unfinished"
            arrow = None
            if direction is not None and direction.vector.any():
                (x0, y0), (x1, y1) = camera.project([effector, effector + ARROW * direction.vector]).tolist()
                arrow = Arrow((x0, y0), (x1, y1))
            panel = Panel(
                np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")),
                title=method or "base",
                caption="" if direction is None else describe(direction, camera),
                arrow=arrow,
                step=step,
                max_steps=max_steps,
                status=status,
            )
            for _ in range(20 if last else 1):
                write(compose([panel], heading=heading))
    return path
