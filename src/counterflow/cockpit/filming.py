"""The film of an episode that was driven in the cockpit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from counterflow.cockpit.episode import Shot
from counterflow.envs import CameraView
from counterflow.experiments.film import ARROW, FRAMES_PER_SECOND, describe
from counterflow.experiments.panels import Arrow, Panel, Status, compose
from counterflow.experiments.video import video_writer


def write_film(
    path: Path, shots: Sequence[Shot], camera: CameraView, max_steps: int, success: bool, heading: str = ""
) -> Path:
    """Write a film (.mp4).

    Args:
        path: where it goes.
        shots: its frames.
        camera: through which it is seen.
        max_steps: of an episode.
        success: whether the task was solved.
        heading: above the picture.

    Raises:
        StorageError: it can't be written.
        MissingDependencyError: there is no ffmpeg.
    """
    with video_writer(path, FRAMES_PER_SECOND) as write:
        for step, shot in enumerate(shots):
            last = step == len(shots) - 1
            status: Status = "running" if not last else "success" if success else "unfinished"
            arrow = None
            direction = shot.direction
            if direction is not None and direction.vector.any():
                ends = [shot.effector, shot.effector + ARROW * direction.vector]
                (x0, y0), (x1, y1) = camera.project(ends).tolist()
                arrow = Arrow((x0, y0), (x1, y1))
            panel = Panel(
                np.asarray(Image.open(io.BytesIO(shot.jpeg)).convert("RGB")),
                title=shot.method or "base",
                caption="" if direction is None else describe(direction, camera),
                arrow=arrow,
                step=step,
                max_steps=max_steps,
                status=status,
            )
            for _ in range(20 if last else 1):
                write(compose([panel], heading=heading))
    return path
