"""The hand of LIBERO's expert: what it sees of itself and of everything by name, and its smallest motions.

Gripper poses are commanded as displacements (robosuite's OSC_POSE: 1 is 5 cm, or 0.5 rad). Every motion is a generator of one
action a step that looks again before each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from counterflow.errors import MismatchError
from counterflow.reasoners.direction import View
from counterflow.reasoners.motion import Point

Action = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

# A gripper's rotation here: its fingers move along the second column, and it points along the third. At rest it points down, and
# its fingers move along world y.
DOWN: Matrix = np.diag([-1.0, 1.0, -1.0])
GAIN = 10.0  # action for a metre of error
TURNING_GAIN = 2.0  # action for a radian of error
BASE = np.array([-0.66, 0.0])  # where the robot stands
STRETCHED = (-0.6, -0.25)  # radians of the elbow: from the first on the hand rises more slowly, at the second no more
# In the frame of a drawer: where its handle is, by level. White and wooden cabinets have the same handles.
DRAWER_HANDLES = {"top": (0.0, -0.1016, 0.184), "middle": (0.0, -0.1016, 0.110), "bottom": (0.0, -0.1016, 0.041)}


class LiberoHand:
    """Sees, and moves a hand.

    Args:
        stride: how many steps pass between two questions; more than one where it is asked once a chunk.
    """

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._view: View = {}

    # What it sees.

    def _at(self, name: str) -> Point:
        return np.asarray(self._view[f"privileged/{name}_pos"], dtype=np.float64)

    def _turn(self, name: str) -> Matrix:
        return rotation_of(self._view[f"privileged/{name}_quat"])

    def _joint(self, name: str) -> float:
        return float(self._view[f"privileged/{name}_joint"][0])

    @property
    def _hand(self) -> Point:
        return np.asarray(self._view["proprio/effector_pos"], dtype=np.float64)

    def _box(self, name: str) -> tuple[Point, Point]:
        """Return the corners of the box around a thing, in its own frame; of a place, a point."""
        if f"privileged/{name}_low" not in self._view:
            return np.zeros(3), np.zeros(3)
        low, high = self._view[f"privileged/{name}_low"], self._view[f"privileged/{name}_high"]
        return np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)

    def _heights(self, name: str) -> tuple[float, float]:
        """Return how far a thing reaches below and above its origin, as it lies, metres."""
        low, high = self._box(name)
        turn = self._turn(name)
        corners = np.array([(x, y, z) for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
        up = corners @ turn[2]
        return float(up.min()), float(up.max())

    @staticmethod
    def _joint_names(view: View, name: str) -> list[str]:
        """Return the parts that move of a fixture or of the region of one: "cabinet_1_top_region" is moved by its top level."""
        stem = name.replace("_region", "")
        fixture, _, level = stem.rpartition("_")
        joints = [key.removeprefix("privileged/").removesuffix("_joint") for key in view if key.endswith("_joint")]
        levels = [joint for joint in joints if joint == f"{fixture}_{level}_level"]
        return levels or [
            joint for joint in joints if joint.startswith(f"{stem}_") and "region" not in joint and "side" not in joint
        ]

    def _moving(self, thing: str) -> str:
        names = self._joint_names(self._view, thing)
        if not names:
            raise MismatchError(f"the view tells of no joint of {thing}; use the expert of the task that is being run.")
        return names[0]

    def _drawer_handle(self, part: str) -> Point:
        level = next(level for level in DRAWER_HANDLES if f"_{level}_level" in part)
        handle: Point = self._at(part) + self._turn(part) @ np.array(DRAWER_HANDLES[level])
        return handle

    # The smallest motions.

    def _calls(self, steps: int) -> int:
        return -(-steps // self._stride)

    def _go(
        self,
        target: Callable[[], Point],
        facing: Matrix | None,
        gripper: float,
        near: float,
        patience: int = 100,
        unless: Callable[[], bool] = lambda: False,
    ) -> Iterator[Action]:
        """Go to where `target` says, turned as `facing` (None: as it is), until near, or patience ends, or `unless`."""
        for _ in range(self._calls(patience)):
            if unless():
                return
            place = target()
            turned = 0.0 if facing is None else float(np.linalg.norm(rotation_vector(facing, self._facing())))
            if np.linalg.norm(place - self._hand) < near and turned < (0.12 if self._stride == 1 else 0.5):
                return
            yield self._towards(place, facing, gripper)

    def _wait(self, gripper: float, steps: int) -> Iterator[Action]:
        for _ in range(self._calls(steps)):
            yield np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gripper])

    def _facing(self) -> Matrix:
        site = rotation_of(self._view["proprio/effector_quat"])
        fingers, forward = site[:, 0], site[:, 2]  # in robosuite's own frame the fingers move along the first
        return np.stack([np.cross(fingers, forward), fingers, forward], axis=1)

    def _towards(self, place: Point, facing: Matrix | None, gripper: float) -> Action:
        turning = np.zeros(3) if facing is None else TURNING_GAIN * rotation_vector(facing, self._facing())
        motion = GAIN * (place - self._hand)
        if motion[2] > 0.0:  # an arm that is quite stretched can't be bent again by lifting its hand: nearer first
            bent, straight = STRETCHED
            able = np.clip((straight - self._view["proprio/joint_pos"][3]) / (straight - bent), 0.0, 1.0)
            reach = self._hand[:2] - BASE
            motion[2] *= able
            motion[:2] -= (1.0 - able) * reach / np.linalg.norm(reach)
        return np.array([*motion, *turning, gripper])


def rotation_of(quaternion: npt.ArrayLike) -> Matrix:
    """Return the matrix (3, 3) of a unit quaternion w x y z."""
    w, x, y, z = np.asarray(quaternion, dtype=np.float64)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_vector(wanted: Matrix, present: Matrix) -> npt.NDArray[np.float64]:
    """Return the turn (3,) from `present` to `wanted`, axis times radians, in the world frame."""
    error = wanted @ present.T
    angle = float(np.arccos(np.clip((np.trace(error) - 1) / 2, -1.0, 1.0)))
    axis = np.array([error[2, 1] - error[1, 2], error[0, 2] - error[2, 0], error[1, 0] - error[0, 1]])
    length = float(np.linalg.norm(axis))
    if length < 1e-6:  # no turn; or half a turn, about any horizontal axis as well as another
        return np.zeros(3) if angle < 1.0 else np.array([0.0, 0.0, angle])
    return axis / length * angle


def facing_down(closing: npt.NDArray[np.float64], near: Matrix = DOWN) -> Matrix:
    """Return the gripper's rotation (3, 3) that points down with its fingers closing along `closing` (2,), turned least.

    A gripper that is turned half round closes along the same line, so of the two the one that is nearer to `near` is taken.
    """
    side = np.array([closing[0], closing[1], 0.0])
    down = np.array([0.0, 0.0, -1.0])
    one = np.stack([np.cross(side, down), side, down], axis=1)
    other = one @ np.diag([-1.0, -1.0, 1.0])
    return one if np.trace(one @ near.T) >= np.trace(other @ near.T) else other


def facing_along(approach: Point, bar: Point) -> Matrix:
    """Return the gripper's rotation (3, 3) that points along `approach` (3,) with its fingers on both sides of a bar (3,)."""
    forward = approach / np.linalg.norm(approach)
    side = np.cross(forward, bar)
    side = side / np.linalg.norm(side)
    one = np.stack([np.cross(side, forward), side, forward], axis=1)
    other = one @ np.diag([-1.0, -1.0, 1.0])
    return one if np.trace(one @ DOWN.T) >= np.trace(other @ DOWN.T) else other
