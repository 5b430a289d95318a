"""What every environment says, in types: its description, a moment of it, a batch of moments, and its camera."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from counterflow.errors import InvalidInputError
from counterflow.layout import ActionLayout, ObservationLayout

FloatArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.integer]
Image = npt.NDArray[np.uint8]
Privileged = dict[str, npt.NDArray[np.float64]]
Sights = dict[str, npt.NDArray[Any]]
"""What is shown to a policy that looks, by name: pictures (H, W, 3) uint8, numbers (D,) float32."""


@dataclass(frozen=True)
class EnvSpec:
    """The description of one environment (one task).

    Attributes:
        name: full name, for example "ogbench/cube-single-task1".
        family: the environments that share actions, a prior, and observations (or, where they have an observation layout, what
            an observation tells of the robot and of an object), for example "ogbench/cube-single" or "metaworld".
        task: the task in a sentence.
        observation_dim: O, the length of a state observation, the goal included.
        action_dim: A, the length of an action.
        action_low: (A,) lowest action, in environment units.
        action_high: (A,) highest action, in environment units.
        action_layout: which action dimension does what; None where a direction in words means nothing to an action, as in
            the torques of a walking robot.
        max_episode_steps: an episode is truncated after this many steps.
        goal_dim: how many of the observation's last entries are the goal (0 where the task is always the same).
        observation_layout: which of the observation's entries tell of the robot and of which object; None: not told.
        sights: what it can show a policy that looks, beside the state, by LeRobot's names: the shape of a picture, (H, W, 3), or
            how many numbers, (D,). Empty: nothing.
    """

    name: str
    family: str
    task: str
    observation_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    action_layout: ActionLayout | None
    max_episode_steps: int
    goal_dim: int = 0
    observation_layout: ObservationLayout | None = None
    sights: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def check_action(self, action: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return an action (A,) as float64, rounding errors at the limits taken off.

        Raises:
            InvalidInputError: its shape is wrong, or it is not finite, or it is outside the limits.
        """
        checked = np.asarray(action, dtype=np.float64)
        low, high = np.array(self.action_low), np.array(self.action_high)
        if (
            checked.shape != (self.action_dim,)
            or not np.isfinite(checked).all()
            or (checked < low - 1e-6).any()
            or (checked > high + 1e-6).any()
        ):
            raise InvalidInputError(
                f"{self.name} was given the action {np.array2string(checked, precision=3)}; expected {self.action_dim} finite "
                f"numbers in [{low.min():g}, {high.max():g}]. Add a `Limits` edit to the steered policy, or check its "
                "normalisation."
            )
        return np.clip(checked, low, high)


@dataclass(frozen=True)
class RenderSettings:
    """How frames are drawn.

    Attributes:
        width: pixels.
        height: pixels.
        quality: "fast" leaves out shadows and multisampling (about ten times the frames a second with software
            rendering); "dataset" draws as the benchmark itself does, for pixels that must match published data.
        camera: the camera's name; None takes the benchmark's own choice.
    """

    width: int = 256
    height: int = 256
    quality: Literal["fast", "dataset"] = "fast"
    camera: str | None = None

    def __post_init__(self) -> None:
        """Check the sizes and the quality."""
        if not (16 <= self.width <= 4096 and 16 <= self.height <= 4096):
            raise InvalidInputError(
                f"frame size is {self.width} x {self.height}; expected 16 to 4096 pixels each way. Choose a smaller one."
            )
        if self.quality not in ("fast", "dataset"):
            raise InvalidInputError(f"render quality is {self.quality!r}; expected 'fast' or 'dataset'.")


@dataclass(frozen=True)
class CameraView:
    """A pinhole camera in MuJoCo's convention.

    Attributes:
        position: (3,) metres, world frame.
        rotation: (3, 3), columns are the camera's right, up and backward axes in the world frame.
        fovy: vertical field of view in degrees.
        width: image width in pixels.
        height: image height in pixels.
    """

    position: FloatArray
    rotation: FloatArray
    fovy: float
    width: int
    height: int

    def project(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Project world points to pixels.

        Args:
            points: (N, 3) metres, world frame.

        Returns:
            (N, 2) pixel coordinates (column, row), row 0 at the top. Points behind the camera give NaN.
        """
        local = (np.asarray(points, dtype=np.float64) - self.position) @ self.rotation
        depth = -local[:, 2]
        focal = 0.5 * self.height / np.tan(np.radians(self.fovy) / 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            pixels = np.stack(
                [self.width / 2 + focal * local[:, 0] / depth, self.height / 2 - focal * local[:, 1] / depth], axis=1
            )
        pixels[depth <= 0] = np.nan
        return pixels


@dataclass(frozen=True)
class Moment:
    """One environment after a reset or a step.

    Attributes:
        observation: (O,) float32.
        reward: of the step that led here (0 after a reset).
        success: whether the task's goal is reached.
        terminated: the episode ended in a final state.
        truncated: the episode ran out of time.
        privileged: the simulator's own account of the state and the goal, by name, each (k,) float64. Reasoners may look
            at it; policies may not.
    """

    observation: npt.NDArray[np.float32]
    reward: float
    success: bool
    terminated: bool
    truncated: bool
    privileged: Privileged


@dataclass(frozen=True)
class Batch:
    """Several environments after a reset or after executing one action chunk each.

    N is the number of environments, H the length of the chunk. Where an episode ended inside the chunk the rest of the
    chunk was not executed: `steps` says how many actions were.

    Attributes:
        observation: (N, O) float32, after the last executed action.
        rewards: (N, H) float64, zero where nothing was executed; (N, 0) after a reset.
        steps: (N,) how many actions were executed.
        success: (N,) whether the goal was reached during the chunk.
        terminated: (N,) the episode ended in a final state.
        truncated: (N,) the episode ran out of time.
        privileged: by name, each (N, k) float64.
        frames: for each environment, the images drawn after each executed action (empty unless asked for).
        paths: for each environment, (steps, O) float32, the observation after each executed action.
    """

    observation: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float64]
    steps: npt.NDArray[np.int64]
    success: BoolArray
    terminated: BoolArray
    truncated: BoolArray
    privileged: Privileged
    frames: list[list[Image]] = field(default_factory=list)
    paths: list[npt.NDArray[np.float32]] = field(default_factory=list)

    @property
    def done(self) -> BoolArray:
        """(N,) whether the episode is over."""
        return self.terminated | self.truncated

    def view(self, row: int) -> Privileged:
        """Return the privileged state of one environment, each value (k,)."""
        return {name: values[row] for name, values in self.privileged.items()}


class TaskEnv(Protocol):
    """One simulated task. A new benchmark is one file that provides this, and one line in the registry."""

    @property
    def spec(self) -> EnvSpec:
        """The description."""
        ...

    def reset(self, seed: int) -> Moment:
        """Begin the episode that `seed` names: the same seed always begins the same episode, whatever came before."""
        ...

    def step(self, action: FloatArray) -> Moment:
        """Execute one action (A,), in environment units."""
        ...

    def render(self) -> Image:
        """Draw the present state: (height, width, 3) uint8."""
        ...

    def camera(self) -> CameraView:
        """Describe the camera that `render` draws with."""
        ...

    def close(self) -> None:
        """Free the simulator and its renderer."""
        ...


class SeenTaskEnv(TaskEnv, Protocol):
    """A task that can show a policy more than its state: what its `spec.sights` names."""

    def look(self, names: Sequence[str]) -> Sights:
        """Show some of that as it is now; only what is named is drawn."""
        ...
