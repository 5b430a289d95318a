"""A scripted reasoner for cubes: which cube to move next, and the coarse direction towards doing it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from counterflow.reasoners.direction import Direction, View
from counterflow.reasoners.motion import Point, along, approach, still

REACHED = 0.035  # OGBench counts a cube as placed within 0.04 m of its goal
CUBE_SIZE = 0.04
MISSED = 0.85  # how far the gripper closes (0 is open, 1 is closed) when there is no cube in it
FREE_SPOTS = np.array([(x, y, 0.02) for x in (0.35, 0.425, 0.5) for y in (-0.25, 0.0, 0.25)])


@dataclass(frozen=True)
class PickAndPlace:
    """Coarse single-axis directions that bring one cube to a place.

    Attributes:
        clearance: height above a cube or a place at which to travel, metres.
        grasp_aligned: horizontal distance within which to go down on a cube, metres.
        place_aligned: horizontal distance within which to go down on the goal, metres.
        grasp_height: the gripper closes within this height of the cube's centre, metres.
    """

    clearance: float = 0.08
    grasp_aligned: float = 0.03
    place_aligned: float = 0.025
    grasp_height: float = 0.015

    def direction(self, view: View, cube: Point, goal: Point) -> Direction:
        """Say the next direction for bringing the cube at `cube` (3,) to `goal` (3,)."""
        effector = view["proprio/effector_pos"]
        near = np.abs((cube - effector)[:2]).max() < self.grasp_aligned and abs(cube[2] - effector[2]) < 0.03
        closed, touching = view["proprio/gripper_opening"][0], view["proprio/gripper_contact"][0] > 0.3
        if near and closed > MISSED:
            return Direction((0, 0, 1), 1.0, "open")
        if near and touching:
            return self._carry(cube, goal)
        if near and cube[2] - effector[2] > -self.grasp_height:
            return still("close")
        return approach(effector, cube, clearance=self.clearance, aligned=self.grasp_aligned, gripper="open")

    def _carry(self, cube: Point, goal: Point) -> Direction:
        offset = goal - cube
        if np.abs(offset[:2]).max() > self.place_aligned:
            if cube[2] < goal[2] + self.clearance:
                return Direction((0, 0, 1), 1.0, "close")
            return along(np.array([offset[0], offset[1], 0.0]), "close")
        if offset[2] < -0.015:
            return Direction((0, 0, -1), 1.0, "close")
        return still("open")


class CubeReasoner:
    """Looks at cubes and goals, moves one cube at a time, supports before what stands on them.

    A cube whose goal is taken by another waits until that one has moved; where all wait for each other (a swap), one is
    put aside first.
    """

    def __init__(self, motion: PickAndPlace | None = None) -> None:
        self._motion = PickAndPlace() if motion is None else motion
        self._target: tuple[int, Point] | None = None

    def reset(self, seed: int) -> None:  # noqa: ARG002 - nothing here is random
        """Forget which cube was being moved."""
        self._target = None

    def decide(self, view: View) -> Direction:
        """Say the next direction; rise and open when every cube is in its place."""
        cubes, goals = _rows(view, "privileged/block_{}_pos"), _rows(view, "goal/block_{}_pos")
        if self._target is None or _distance(cubes[self._target[0]], self._target[1]) < REACHED:
            self._target = next_cube(cubes, goals)
        if self._target is None:
            return Direction((0, 0, 1), 1.0, "open")
        index, place = self._target
        return self._motion.direction(view, cubes[index], place)


def next_cube(cubes: npt.NDArray[np.float64], goals: npt.NDArray[np.float64]) -> tuple[int, Point] | None:
    """Choose which cube to move and where: (index, place (3,)), or None when all are placed.

    Args:
        cubes: (N, 3) where they are.
        goals: (N, 3) where they should be.
    """
    wrong = [i for i in range(len(cubes)) if _distance(cubes[i], goals[i]) >= REACHED]
    clear = [i for i in wrong if not any(_stands_on(cubes[j], cubes[i]) for j in range(len(cubes)) if j != i)]
    for index in sorted(clear, key=lambda i: goals[i][2]):
        supported = all(j not in wrong for j in range(len(goals)) if j != index and _stands_on(goals[index], goals[j]))
        free = all(_distance(cubes[j], goals[index]) > CUBE_SIZE for j in range(len(cubes)) if j != index)
        if supported and free:
            return index, goals[index]
    if not wrong:
        return None
    # Every cube waits for another: put one that is in the way aside, on a free spot of the table.
    on_top = [
        i for i in range(len(cubes)) if not any(_stands_on(cubes[j], cubes[i]) for j in range(len(cubes)) if j != i)
    ]
    index = next(
        (i for i in on_top if any(_distance(cubes[i], goals[j]) <= CUBE_SIZE for j in wrong if j != i)), on_top[0]
    )
    taken = np.concatenate([cubes, goals])[:, None, :2]
    room = np.linalg.norm(taken - FREE_SPOTS[None, :, :2], axis=-1).min(axis=0)
    return index, FREE_SPOTS[int(room.argmax())]


def _rows(view: View, pattern: str) -> npt.NDArray[np.float64]:
    count = sum(1 for name in view if name.startswith(pattern.split("{}")[0]) and name.endswith("_pos"))
    return np.stack([view[pattern.format(i)] for i in range(count)])


def _distance(a: Point, b: Point) -> float:
    return float(np.linalg.norm(a - b))


def _stands_on(upper: Point, lower: Point) -> bool:
    return bool(upper[2] > lower[2] + CUBE_SIZE / 2 and np.linalg.norm((upper - lower)[:2]) < CUBE_SIZE / 2)
