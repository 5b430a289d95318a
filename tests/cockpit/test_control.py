"""Who may move, and when: decided by reports and a clock that is handed in."""

from __future__ import annotations

import numpy as np
import pytest

from counterflow.cockpit.control import Control
from counterflow.envs import CameraView
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.reasoners import Direction
from counterflow.reasoners.words import OGBENCH_WAYS, ways_of

# OGBench's camera stands in front of the robot and looks back at it.
FRONT = CameraView(np.array([1.3, 0, 0.5]), np.array([[0, -0.34, 0.94], [1.0, 0, 0], [0, 0.94, 0.34]]), 45.0, 256, 256)


@pytest.fixture
def control() -> Control:
    return Control(ways_of(FRONT.rotation), stale_after=0.5)


def test_directions_are_those_of_the_picture() -> None:
    ways = ways_of(FRONT.rotation)
    assert ways == OGBENCH_WAYS
    middle = np.array([0.4, 0.0, 0.1])
    (x0, y0), *others = FRONT.project(
        [middle, *(middle + 0.05 * np.array(ways[way]) for way in ("right", "away", "up"))]
    )
    (right, _), (_, away), (_, up) = others
    assert right > x0
    assert away < y0  # further away is higher in the picture
    assert up < y0
    assert ways["left"] == tuple(-axis for axis in ways["right"])


def test_nothing_moves_before_anybody_says_so(control: Control) -> None:
    assert control.wish(0.0) is None


def test_a_held_key_moves_for_as_long_as_it_is_held(control: Control) -> None:
    control.report({"up"}, 10.0)
    wish = control.wish(10.1)
    assert wish is not None
    assert wish.direction == Direction((0, 0, 1), gripper="open")
    assert control.goes_on(wish, 10.2)
    control.report([], 10.3)
    assert not control.goes_on(wish, 10.3)
    assert control.wish(10.3) is None


def test_reports_grow_stale_whatever_is_held(control: Control) -> None:
    """A page that hangs, sleeps or has gone says nothing: that stops the motion."""
    control.report({"up"}, 10.0)
    wish = control.wish(10.0)
    assert wish is not None
    assert control.goes_on(wish, 10.5)
    assert not control.goes_on(wish, 10.51)
    assert control.wish(10.51) is None


def test_a_pilot_needs_fresh_reports_too(control: Control) -> None:
    control.pilot = True
    control.report([], 10.0)
    wish = control.wish(10.0)
    assert wish is not None
    assert (wish.kind, wish.direction) == ("pilot", None)
    assert not control.goes_on(wish, 11.0)
    assert control.wish(11.0) is None


def test_a_key_takes_over_from_a_pilot(control: Control) -> None:
    control.pilot = True
    control.report([], 10.0)
    wish = control.wish(10.0)
    control.report({"left"}, 10.1)
    assert wish is not None
    assert not control.goes_on(wish, 10.1)
    taken = control.wish(10.1)
    assert taken is not None
    assert taken.kind == "hold"


def test_a_key_that_was_let_go_at_once_counts_once(control: Control) -> None:
    control.report({"left"}, 10.0)
    control.report([], 10.01)
    assert control.wish(10.02) is not None
    assert control.wish(10.03) is None


def test_a_press_that_nobody_acted_on_is_forgotten(control: Control) -> None:
    """Keys pressed during a pause of the network must not move the robot seconds later."""
    control.report({"left"}, 10.0)
    control.report([], 10.01)
    assert control.wish(11.0) is None
    control.report([], 11.1)
    assert control.wish(11.1) is None


def test_a_tap_is_a_whole_chunk_and_taps_do_not_queue(control: Control) -> None:
    for _ in range(3):
        control.tap({"right"}, 10.0)
    wish = control.wish(10.0)
    assert wish is not None
    assert wish.kind == "tap"
    assert control.goes_on(wish, 10.4)
    assert control.wish(10.4) is None


def test_diagonals_opposites_and_less(control: Control) -> None:
    control.report({"right", "up"}, 1.0, less=True)
    wish = control.wish(1.0)
    assert wish is not None
    assert wish.direction is not None
    assert sum(abs(axis) for axis in wish.direction.axes) == 2
    assert wish.direction.amount == 0.5
    control.report({"left", "right"}, 1.1)
    assert control.wish(1.1) is None


def test_letting_the_policy_decide_is_a_key_like_others(control: Control) -> None:
    control.report({"policy"}, 1.0)
    wish = control.wish(1.0)
    assert wish is not None
    assert wish.direction == Direction(defer=True)


def test_the_gripper_moves_when_it_is_told_to(control: Control) -> None:
    control.grip("close", 1.0)
    wish = control.wish(1.0)
    assert wish is not None
    assert wish.direction == Direction(gripper="close")
    control.report({"up"}, 1.1)
    wish = control.wish(1.1)
    assert wish is not None
    assert wish.direction == Direction((0, 0, 1), gripper="close")


def test_letting_go_forgets_everything(control: Control) -> None:
    control.tap({"up"}, 1.0)
    control.report({"up"}, 1.0)
    control.let_go()
    assert control.wish(1.0) is None


def test_what_a_page_makes_up_is_refused(control: Control) -> None:
    with pytest.raises(UnknownNameError, match="sideways"):
        control.report({"sideways"}, 1.0)
    with pytest.raises(UnknownNameError, match="gripper"):
        control.grip("crush", 1.0)
    assert control.wish(1.0) is None
    with pytest.raises(InvalidInputError, match="stale_after"):
        Control({}, stale_after=0)
