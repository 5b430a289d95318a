"""The scene's order of subgoals, its handles, and leaving one thing before the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from counterflow.envs import make_env
from counterflow.reasoners import SceneReasoner
from counterflow.reasoners.direction import View
from counterflow.reasoners.scene import SlideHandle, next_subgoal


@pytest.fixture(scope="module")
def scene() -> dict[str, Any]:
    """Task 1 as it begins: everything unlocked, drawer and window to be moved, the cube where it belongs."""
    with make_env("ogbench/scene-task1", workers=0) as env:
        return dict(env.reset([0]).view(0))


@pytest.mark.parametrize(("task", "first"), [(2, "button"), (3, "cube"), (4, "button"), (5, "button")])
def test_what_each_task_begins_with(task: int, first: str) -> None:
    """In 2, 4 and 5 what must move is locked; in 3 the cube lies wrong."""
    with make_env(f"ogbench/scene-task{task}", workers=0) as env:
        view = env.reset([0]).view(0)
    assert next_subgoal(view).what == first


class TestSubgoals:
    def finished(self, scene: View) -> dict[str, Any]:
        """The same scene with everything in its place."""
        view = dict(scene)
        for name in ("drawer_pos", "window_pos", "button_states", "block_0_pos"):
            view[f"privileged/{name}"] = scene[f"goal/{name}"]
        return view

    def test_done_when_everything_is_in_its_place(self, scene: View) -> None:
        assert next_subgoal(scene).what == "drawer"
        assert next_subgoal(self.finished(scene)).what == "done"

    def test_buttons_are_set_last(self, scene: View) -> None:
        view = self.finished(scene)
        view["goal/button_states"] = 1 - view["privileged/button_states"]
        assert (next_subgoal(view).what, next_subgoal(view).button) == ("button", 0)
        view["privileged/window_pos"] = view["goal/window_pos"] + 0.1
        view["privileged/button_states"] = np.array([1.0, 1.0])
        assert next_subgoal(view).what == "window"

    @pytest.mark.parametrize(("slide", "button"), [("drawer", 0), ("window", 1)])
    def test_a_locked_slide_is_unlocked_first(self, scene: View, slide: str, button: int) -> None:
        view = self.finished(scene)
        view[f"privileged/{slide}_pos"] = view[f"goal/{slide}_pos"] + 0.1
        view["privileged/button_states"] = np.array([1.0, 1.0])
        assert next_subgoal(view).what == slide
        view["privileged/button_states"] = np.array([float(button != 0), float(button != 1)])
        found = next_subgoal(view)
        assert (found.what, found.button) == ("button", button)

    def test_a_slide_is_moved_a_little_further_than_it_must_be(self, scene: View) -> None:
        view = dict(scene)
        view["privileged/drawer_pos"] = view["goal/drawer_pos"] + 0.025
        assert next_subgoal(view).what != "drawer"
        assert next_subgoal(view, moving="drawer").what == "drawer"

    def test_a_cube_that_belongs_into_the_drawer_needs_it_open(self, scene: View) -> None:
        view = self.finished(scene)
        view["goal/block_0_pos"] = np.array([0.33, -0.36, 0.06])
        view["privileged/block_0_pos"] = np.array([0.4, 0.1, 0.02])
        view["privileged/button_states"] = np.array([1.0, 1.0])
        view["privileged/drawer_pos"] = np.array([0.0])
        assert next_subgoal(view).what == "drawer"
        view["privileged/drawer_pos"] = np.array([-0.16])
        found = next_subgoal(view)
        assert found.what == "cube"
        assert found.place is view["privileged/drawer_center"]

    def test_the_handle_is_sent_where_its_slide_ends(self, scene: View) -> None:
        """Handles move with their joints: the drawer's along -y, metre by metre."""
        place = next_subgoal(scene).place
        np.testing.assert_allclose(place, scene["goal/drawer_handle_pos"], atol=1e-6)


class TestSlideHandle:
    HANDLE, GOAL = np.array([0.4, 0.0, 0.1]), np.array([0.4, -0.2, 0.1])

    @pytest.mark.parametrize(
        ("effector", "opening", "axes", "gripper"),
        [
            ((0.2, 0.0, 0.10), 0.0, (0, 0, 1), "open"),  # low and far: up first
            ((0.2, 0.0, 0.30), 0.0, (1, 0, 0), "open"),  # over to it
            ((0.4, 0.0, 0.30), 0.0, (0, 0, -1), "open"),  # down on it
            ((0.4, 0.0, 0.11), 0.0, (0, 0, 0), "close"),  # take it
            ((0.4, 0.0, 0.11), 0.6, (0, -1, 0), "close"),  # pull
            ((0.4, 0.1, 0.30), 0.6, (0, -1, 0), "open"),  # closed, but away from it: let go and come back
        ],
    )
    def test_each_phase(
        self, effector: tuple[float, float, float], opening: float, axes: tuple[int, int, int], gripper: str
    ) -> None:
        view = {"proprio/effector_pos": np.array(effector), "proprio/gripper_opening": np.array([opening])}
        said = SlideHandle().direction(view, self.HANDLE, self.GOAL)
        assert (said.axes, said.gripper) == (axes, gripper)


class TestReasoner:
    def at(self, scene: View, height: float, opening: float, **changes: Any) -> dict[str, Any]:
        view = {name: np.array(value, copy=True) for name, value in scene.items()}
        view["proprio/effector_pos"] = np.array([0.4, 0.0, height])
        view["proprio/gripper_opening"] = np.array([opening])
        return view | {name.replace("__", "/"): value for name, value in changes.items()}

    def test_it_lets_go_and_rises_before_it_turns_to_the_next(self, scene: View) -> None:
        reasoner = SceneReasoner()
        reasoner.reset(0)
        astray = scene["goal/block_0_pos"] + np.array([0.0, 0.1, 0.0])
        reasoner.decide(self.at(scene, 0.1, 0.8, privileged__block_0_pos=astray))
        letting_go = reasoner.decide(self.at(scene, 0.2, 0.8))  # the cube is in its place: the drawer is next
        assert (letting_go.axes, letting_go.gripper) == ((0, 0, 0), "open")
        rising = [reasoner.decide(self.at(scene, height, 0.0)) for height in (0.2, 0.22, 0.249)]
        assert {(said.axes, said.gripper) for said in rising} == {((0, 0, 1), "open")}
        view = self.at(scene, 0.251, 0.0)
        towards = SlideHandle().direction(view, view["privileged/drawer_handle_pos"], next_subgoal(view).place)
        assert reasoner.decide(view) == towards
        assert towards.axes != (0, 0, 1)
        # Once it has risen it may go down again.
        assert reasoner.decide(self.at(scene, 0.2, 0.0)) == towards

    def test_a_new_episode_begins_without_rising(self, scene: View) -> None:
        reasoner = SceneReasoner()
        reasoner.decide(self.at(scene, 0.15, 0.8))
        reasoner.reset(0)
        view = self.at(scene, 0.15, 0.8, privileged__drawer_pos=scene["goal/drawer_pos"])
        assert reasoner.decide(view) == SlideHandle().direction(
            view, view["privileged/window_handle_pos"], next_subgoal(view, None).place
        )
