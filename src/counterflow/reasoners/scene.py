"""A scripted reasoner for the scene: cube, two buttons that lock drawer and window, a drawer and a window."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from counterflow.reasoners.cubes import REACHED, PickAndPlace
from counterflow.reasoners.direction import Direction, View
from counterflow.reasoners.motion import Point, along, approach, still
from counterflow.reasoners.puzzle import ButtonPress

SLIDE_REACHED = 0.035  # OGBench counts a slide as placed within 0.04 m
SLIDE_FINISHED = 0.015  # closer than needed, so that letting go does not undo it
RISE = 0.05  # metres to leave a handle by
OVER_THE_DRAWER = 0.12  # metres above the drawer's centre at which a cube clears its front
DRAWER_OPEN = -0.16
# The prior of so many skills lines up with a cube less well by itself than that of cubes alone: come nearer first.
ON_THE_TABLE = PickAndPlace(clearance=0.05, grasp_aligned=0.02, place_aligned=0.035)
LOCK = {"drawer": 0, "window": 1}  # a button in state 0 locks its slide


@dataclass(frozen=True)
class SlideHandle:
    """Coarse single-axis directions that take a handle and pull or push it along its slide.

    Attributes:
        clearance: height above the handle at which to travel, metres.
        aligned: horizontal distance along either axis within which to go down, metres.
        grasp_height: the gripper closes within this height of the handle, metres.
        held: a closed gripper within this distance along each axis holds the handle, metres.
    """

    clearance: float = 0.04
    aligned: float = 0.045
    grasp_height: float = 0.025
    held: float = 0.05

    def direction(self, view: View, handle: Point, goal: Point) -> Direction:
        """Say the next direction for bringing the handle at `handle` (3,) to `goal` (3,)."""
        effector = view["proprio/effector_pos"]
        offset = handle - effector
        closed = view["proprio/gripper_opening"][0] > 0.5  # 0 is open, 1 is closed
        if closed and np.abs(offset).max() < self.held:
            return along(goal - handle, "close")
        if np.abs(offset[:2]).max() < self.aligned + 0.01 and offset[2] > -self.grasp_height:
            return still("close")
        return approach(effector, handle, clearance=self.clearance, aligned=self.aligned, gripper="open")


@dataclass(frozen=True)
class Subgoal:
    """One thing to do next.

    Attributes:
        what: "cube", "button", "drawer", "window" or "done".
        place: where the cube or the handle should go, (3,) metres; for a button and at the end nowhere.
        button: which button to press.
    """

    what: Literal["cube", "button", "drawer", "window", "done"]
    place: Point = field(default_factory=lambda: np.full(3, np.nan))
    button: int = 0


def next_subgoal(view: View, moving: str | None = None) -> Subgoal:
    """Choose what to do next, in an order in which nothing done has to be undone.

    A cube that belongs into the drawer needs it open, and an open drawer needs its button; buttons are set last, because
    setting one may lock what still has to move.

    Args:
        view: the simulator's account.
        moving: "drawer" or "window" while one is being moved: it is moved further in than it would have to be.
    """
    reached = {slide: SLIDE_FINISHED if slide == moving else SLIDE_REACHED for slide in LOCK}
    cube, cube_goal = view["privileged/block_0_pos"], view["goal/block_0_pos"]
    buttons, button_goals = view["privileged/button_states"], view["goal/button_states"]
    into_drawer = cube_goal[1] < -0.3
    if into_drawer and not _in_drawer(view):
        if view["privileged/drawer_pos"][0] > DRAWER_OPEN + reached["drawer"]:
            return _slide(view, "drawer", DRAWER_OPEN)
        return Subgoal("cube", place=view["privileged/drawer_center"])
    if not into_drawer and np.linalg.norm(cube - cube_goal) > REACHED:
        return Subgoal("cube", place=cube_goal)
    for slide in ("drawer", "window"):
        goal = float(view[f"goal/{slide}_pos"][0])
        if abs(view[f"privileged/{slide}_pos"][0] - goal) > reached[slide]:
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
        retreat: height to which to rise at least between subgoals, metres.
    """

    def __init__(self, retreat: float = 0.22) -> None:
        self._retreat = retreat
        self._cube, self._slide, self._press = ON_THE_TABLE, SlideHandle(), ButtonPress()
        self._cube_over_drawer = replace(ON_THE_TABLE, clearance=OVER_THE_DRAWER)
        self._last: tuple[str, int] | None = None
        self._letting_go, self._rise_to = False, 0.0

    def reset(self, seed: int) -> None:  # noqa: ARG002 - nothing here is random
        """Forget the last subgoal."""
        self._last, self._letting_go, self._rise_to = None, False, 0.0

    def decide(self, view: View) -> Direction:
        """Say the next direction; rise when everything is in its place."""
        subgoal = next_subgoal(view, self._last[0] if self._last is not None else None)
        name = (subgoal.what, subgoal.button)
        height = float(view["proprio/effector_pos"][2])
        if self._last is not None and name != self._last:
            self._letting_go, self._rise_to = True, max(self._retreat, height + RISE)
        self._last = name
        if self._letting_go and view["proprio/gripper_opening"][0] > 0.3:
            return still("open")  # before leaving, or what was held comes along
        self._letting_go = False
        if height < self._rise_to:
            return Direction((0, 0, 1), 1.0, "open")
        self._rise_to = 0.0
        if subgoal.what == "button":
            return self._press.direction(view, subgoal.button)
        if subgoal.what == "cube":
            into_drawer = subgoal.place is view["privileged/drawer_center"]
            motion = self._cube_over_drawer if into_drawer else self._cube
            return motion.direction(view, view["privileged/block_0_pos"], subgoal.place)
        if subgoal.what in ("drawer", "window"):
            return self._slide.direction(view, view[f"privileged/{subgoal.what}_handle_pos"], subgoal.place)
        return Direction((0, 0, 1), 1.0, "open")
