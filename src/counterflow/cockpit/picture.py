"""What is seen: the newest picture, and what is drawn over it."""

from __future__ import annotations

import io
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from counterflow.cockpit.background import Background
from counterflow.cockpit.overlay import Path, executable, paths_of
from counterflow.cockpit.simulator import Simulator
from counterflow.cockpit.targets import Target
from counterflow.steering import MethodSettings, Plan

QUALITY = 82  # of the pictures, JPEG


@dataclass(frozen=True)
class Frame:
    """A picture and what is drawn over it.

    Attributes:
        number: it only grows.
        jpeg: the picture.
        overlay: paths in shares of width and height: "reference", "fan", "chunk", and where the gripper is, "gripper".
        step: environment steps so far.
        sequence: number of the last report of the driver's that moved the robot.
    """

    number: int
    jpeg: bytes
    overlay: dict[str, Any]
    step: int
    sequence: int


@dataclass(frozen=True)
class _Sampling:
    """Samples that were asked for: the answer, where the gripper was, (3,) metres, and the drawing that they belong to."""

    answer: Future[npt.NDArray[np.float32]]
    start: npt.NDArray[np.float64]
    drawn: dict[str, Any]


class Picture:
    """Draws the simulator, the chunk that is being executed, and what the policy might do by itself.

    Args:
        target: what is driven.
        simulator: what is seen.
        questions: where samples are asked for that may take seconds.

    Attributes:
        frame: the newest; None: there is none yet.
    """

    def __init__(self, target: Target, simulator: Simulator, questions: Background) -> None:
        self._target, self._simulator, self.questions = target, simulator, questions
        self.frame: Frame | None = None
        self.sampling: _Sampling | None = None
        self.clear()

    def clear(self) -> None:
        """Draw nothing over the picture: an episode begins."""
        self._drawn: dict[str, Any] = {}
        self._sequence = 0

    def draw_plan(self, plan: Plan, sequence: int) -> None:
        """Draw a chunk, and what was said, from where the gripper is.

        Args:
            plan: the chunk.
            sequence: number of the report that it came from.
        """
        self._sequence = sequence
        self._start = self._simulator.effector
        drawn: dict[str, Any] = {"chunk": self._paths(plan.actions.float().cpu().numpy(), self._start)}
        if plan.reference is not None:
            reference = executable(plan.reference.chunk.cpu(), self._target.action_spec)
            drawn["reference"] = self._paths(reference, self._start)
        drawn["agreement"] = _number(plan.agreement[0])
        drawn["noise_percentile"] = _number(plan.noise_percentile[0])
        self._drawn = drawn

    def draw_fan(self, observation: npt.NDArray[np.float32], steering: MethodSettings, seed: int) -> None:
        """Draw what the policy might do by itself: now, or, where a server is asked, as soon as it has answered.

        Args:
            observation: (O,) what the chunk that is drawn was decided on.
            steering: settings of the methods.
            seed: of the samples.
        """
        asked = (observation, steering, seed)
        if not self._target.slow:
            self._drawn["fan"] = self._paths(self._target.fan(*asked), self._start)
        elif self.sampling is None:
            self.sampling = _Sampling(self.questions.submit(self._target.fan, *asked), self._start, self._drawn)

    def take_samples(self) -> None:
        """Draw the samples that have come meanwhile."""
        if self.sampling is None or not self.sampling.answer.done():
            return
        sampling, self.sampling = self.sampling, None
        if sampling.answer.exception() is None:  # where it fails, whoever drives hears of it by the next chunk
            sampling.drawn["fan"] = self._paths(sampling.answer.result(), sampling.start)

    def show(self, image: npt.NDArray[np.uint8], step: int) -> bytes:
        """Make the newest frame of an image (height, width, 3); return it as JPEG."""
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY)
        jpeg, camera = buffer.getvalue(), self._simulator.camera
        gripper = camera.project(self._simulator.effector[None])[0] / (camera.width, camera.height)
        overlay = {**self._drawn, "gripper": [_number(value) for value in gripper]}
        number = 1 if self.frame is None else self.frame.number + 1
        self.frame = Frame(number, jpeg, overlay, step, self._sequence)
        return jpeg

    def _paths(self, actions: npt.NDArray[np.float32], start: npt.NDArray[np.float64]) -> list[Path]:
        return paths_of(actions, self._target.action_spec, self._simulator.camera, start)


def _number(value: Any) -> float | None:
    """Return a number that json knows."""
    number = float(value)
    return round(number, 4) if np.isfinite(number) else None
