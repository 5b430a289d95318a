"""A scripted reasoner for the scene: cube, two buttons that lock drawer and window, a drawer and a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from counterflow.reasoners.cubes import REACHED, PickAndPlace
from counterflow.reasoners.direction import Direction, View
from counterflow.reasoners.motion import Point, along, approach, still
from counterflow.reasoners.puzzle import ButtonPress

SLIDE_REACHED = 0.03  # OGBench counts a slide as placed within 0.04 m
DRAWER_OPEN = -0.16
LOCK = {"drawer": 0, "window": 1}  # a button in state 0 locks its slide


@dataclass(frozen=True)
class SlideHandle:
    """Coarse single-axis directions that take a handle and pull or push it along its slide.

    Attributes:
        clearance: height above the handle at which to travel, metres.
        aligned: horizontal distance along either axis within which to go down, metres.
        grasp_height: the gripper closes within this height of the handle, metres.
    """

    clearance: float = 0.05
    aligned: float = 0.025
    grasp_height: float = 0.02

    def direction(self, view: View, handle: Point, goal: Point) -> Direction:
        """Say the next direction for bringing the handle at `handle` (3,) to `goal` (3,)."""
        effector = view["proprio/effector_pos"]
        offset = handle - effector
        at_handle = np.abs(offset[:2]).max() < self.aligned + 0.01 and offset[2] > -self.grasp_height
        if not at_handle:
            return approach(effector, handle, clearance=self.clearance, aligned=self.aligned, gripper="open")
        if view["proprio/gripper_opening"][0] < 0.5:  # 0 is open, 1 is closed
            return still("close")
        return along(goal - handle, "close")


@dataclass(frozen=True)
class Subgoal:
    """One thing to do next.

    Attributes:
        what: "cube", "button", "drawer", "window" or "done".
        place: where the cube or the handle should go, (3,) metres.
        button: which button to press.
    """

    what: Literal["cube", "button", "drawer", "window", "done"]
    place: Point | None = None
    button: int = 0


def next_subgoal(view: View) -> Subgoal:
    """Choose what to do next, in an order in which nothing done has to be undone.

    A cube that belongs into the drawer needs it open, and an open drawer needs its button; buttons are set last, because
    setting one may lock what still has to move.
    """
    cube, cube_goal = view["privileged/block_0_pos"], view["goal/block_0_pos"]
    buttons, button_goals = view["privileged/button_states"], view["goal/button_states"]
    into_drawer = cube_goal[1] < -0.3
    if into_drawer and not _in_drawer(view):
        if view["privileged/drawer_pos"][0] > DRAWER_OPEN + SLIDE_REACHED:
            return _slide(view, "drawer", DRAWER_OPEN)
        return Subgoal("cube", place=view["privileged/drawer_center"])
    if not into_drawer and np.linalg.norm(cube - cube_goal) > REACHED:
        return Subgoal("cube", place=cube_goal)
    for slide in ("drawer", "window"):
        goal = float(view[f"goal/{slide}_pos"][0])
        if abs(view[f"privileged/{slide}_pos"][0] - goal) > SLIDE_REACHED:
            return _slide(view, slide, goal)
    wrong = np.flatnonzero(buttons != button_goals)
    return Subgoal("button", button=int(wrong[0])) if wrong.size else Subgoal("done")


def _slide(view: View, slide: Literal["drawer", "window"] | str, goal: float) -> Subgoal:
    """Move a slide's joint to `goal`, unlocking it first if need be."""
    if view["privileged/button_states"][LOCK[slide]] == 0:
        return Subgoal("button", button=LOCK[slide])
    handle, final = view[f"privileged/{slide}_handle_pos"], view[f"goal/{slide}_handle_pos"]
    now, last = view[f"privileged/{slide}_pos"][0], view[f"goal/{slide}_pos"][0]
    # Handle positions are linear in the joint; where the final goal is where we are, use the slide's known axis.
    axis = (final - handle) / (last - now) if abs(last - now) > 1e-3 else _AXES[slide]
    return Subgoal("drawer" if slide == "drawer" else "window", place=handle + axis * (goal - now))


_AXES = {"drawer": np.array([0.0, -1.0, 0.0]), "window": np.array([1.0, 0.0, 0.0])}


def _in_drawer(view: View) -> bool:
    """Return whether the cube lies inside the drawer, let go of (the box is OGBench's own)."""
    cube, front = view["privileged/block_0_pos"], view["privileged/drawer_handle_pos"][1]
    low, high = np.array([0.21, front - 0.27, 0.0]), np.array([0.45, front - 0.07, 0.15])
    inside = bool((low <= cube).all() and (cube <= high).all())
    held = view["proprio/gripper_contact"][0] > 0.3 and np.linalg.norm(cube - view["proprio/effector_pos"]) < 0.04
    return inside and not held


class SceneReasoner:
    """Looks at the whole scene, keeps to one subgoal until it is done, and rises before it turns to the next.

    Args:
        retreat: height to which to rise between subgoals, metres.
    """

    def __init__(self, retreat: float = 0.22) -> None:
        self._retreat = retreat
        self._cube, self._slide, self._press = PickAndPlace(), SlideHandle(), ButtonPress()
        self._last: tuple[str, int] | None = None
        self._rising = False

    def reset(self, seed: int) -> None:  # noqa: ARG002 - nothing here is random
        """Forget the last subgoal."""
        self._last, self._rising = None, False

    def decide(self, view: View) -> Direction:
        """Say the next direction; rise when everything is in its place."""
        subgoal = next_subgoal(view)
        name = (subgoal.what, subgoal.button)
        if self._last is not None and name != self._last:
            self._rising = True
        self._last = name
        if self._rising and view["proprio/effector_pos"][2] < self._retreat:
            return Direction((0, 0, 1), 1.0, "open")
        self._rising = False
        if subgoal.what == "button":
            return self._press.direction(view, subgoal.button)
        if subgoal.what == "cube":
            assert subgoal.place is not None
            return self._cube.direction(view, view["privileged/block_0_pos"], subgoal.place)
        if subgoal.what in ("drawer", "window"):
            assert subgoal.place is not None
            return self._slide.direction(view, view[f"privileged/{subgoal.what}_handle_pos"], subgoal.place)
        return Direction((0, 0, 1), 1.0, "open")
