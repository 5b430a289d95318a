"""LIBERO's expert: goals read from problem files, grasps and turns by geometry (no simulator)."""

from __future__ import annotations

import numpy as np
import pytest

from counterflow.errors import InvalidInputError
from counterflow.reasoners import libero_expert
from counterflow.reasoners.libero_expert import (
    DOWN,
    LiberoExpert,
    LiberoReasoner,
    facing_along,
    facing_down,
    rotation_of,
    rotation_vector,
)
from counterflow.reasoners.libero_goals import Goal, parse_goals


class TestGoals:
    def test_they_come_in_an_order_that_undoes_nothing(self) -> None:
        problem = "(:init (On a b)) (:goal (And (Close cabinet_1_top_region) (In bowl_1 cabinet_1_top_region)))"
        assert parse_goals(problem) == (
            Goal("in", "bowl_1", "cabinet_1_top_region"),
            Goal("close", "cabinet_1_top_region"),
        )
        stacked = parse_goals("(:goal (And (On bowl_1 bowl_2) (In bowl_2 tray_1_contain_region)))")
        assert [goal.thing for goal in stacked] == ["bowl_2", "bowl_1"]
        assert parse_goals("(:goal (And (Turnon stove_1)))") == (Goal("turnon", "stove_1"),)

    @pytest.mark.parametrize("problem", ["(:init (On a b))", "(:goal (And (Shake a)))"])
    def test_what_cannot_be_meant_is_refused(self, problem: str) -> None:
        with pytest.raises(InvalidInputError, match="expected"):
            parse_goals(problem)


class TestTurns:
    def test_the_turn_from_one_rotation_to_another(self) -> None:
        turned = rotation_of([np.cos(0.2), 0.0, 0.0, np.sin(0.2)])
        np.testing.assert_allclose(rotation_vector(turned @ DOWN, DOWN), [0.0, 0.0, 0.4], atol=1e-9)
        np.testing.assert_allclose(rotation_vector(DOWN, DOWN), 0.0, atol=1e-9)

    @pytest.mark.parametrize("angle", [-2.5, -1.0, 0.3, 1.4, 3.0])
    def test_a_gripper_that_points_down_closes_where_it_should_and_turns_least(self, angle: float) -> None:
        closing = np.array([np.cos(angle), np.sin(angle)])
        facing = facing_down(closing)
        np.testing.assert_allclose(facing[:, 2], [0, 0, -1], atol=1e-9)
        assert abs(facing[:2, 1] @ closing) == pytest.approx(1.0)
        assert np.linalg.det(facing) == pytest.approx(1.0)
        assert np.linalg.norm(rotation_vector(facing, DOWN)) <= np.pi / 2 + 1e-9

    def test_a_bar_lies_between_the_fingers(self) -> None:
        facing = facing_along(np.array([0.0, 1.0, -1.0]), np.array([1.0, 0.0, 0.0]))
        assert facing[:, 1] @ np.array([1.0, 0.0, 0.0]) == pytest.approx(0.0)
        assert np.linalg.det(facing) == pytest.approx(1.0)


def view(**changes: list[float]) -> dict[str, np.ndarray]:
    told = {
        "proprio/effector_pos": [0.0, 0.0, 1.1],
        "proprio/effector_quat": [0.0, np.sqrt(0.5), np.sqrt(0.5), 0.0],  # as it is at rest
        "proprio/gripper_opening": [0.0],
        "privileged/soup_1_pos": [0.1, 0.0, 0.95],
        "privileged/soup_1_quat": [1.0, 0.0, 0.0, 0.0],
        "privileged/soup_1_joint": [0.0],
        "privileged/soup_1_low": [-0.03, -0.02, -0.05],
        "privileged/soup_1_high": [0.03, 0.02, 0.05],
        "privileged/basket_1_contain_region_pos": [0.0, 0.3, 0.95],
        "privileged/basket_1_contain_region_quat": [1.0, 0.0, 0.0, 0.0],
        "privileged/basket_1_contain_region_joint": [0.0],
    }
    return {name: np.asarray(value, dtype=np.float64) for name, value in (told | changes).items()}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(libero_expert, "goals_of", lambda name: (Goal("in", "soup_1", "basket_1_contain_region"),))
    return "libero/90/x"


class TestExpert:
    def test_it_goes_over_the_thing_first_and_opens_the_gripper(self, task: str) -> None:
        action = LiberoExpert(task, noise=0.0).act(view())
        assert action[0] > 0.5
        assert (abs(action[1]), action[6]) == (pytest.approx(0.0, abs=1e-9), -1.0)
        np.testing.assert_allclose(action[3:6], 0.0, atol=1e-6)  # its thin side lies along the fingers already

    def test_it_takes_hold_of_the_thin_side(self, task: str) -> None:
        expert = LiberoExpert(task, noise=0.0)
        expert.wanted(view())
        assert abs(expert._grasps("soup_1")[0].closing[1]) == pytest.approx(1.0)
        expert.wanted(view(**{"privileged/soup_1_quat": [np.sqrt(0.5), 0.0, 0.0, np.sqrt(0.5)]}))
        assert abs(expert._grasps("soup_1")[0].closing[0]) == pytest.approx(1.0)

    def test_it_closes_once_it_is_there(self, task: str) -> None:
        expert = LiberoExpert(task, noise=0.0)
        grip = expert_place = None
        now = view()
        for _ in range(200):  # a hand that does what it is told
            action = expert.act(now)
            expert_place = now["proprio/effector_pos"] + 0.05 * action[:3]
            now = view(**{"proprio/effector_pos": list(expert_place)})
            if action[6] > 0:
                grip = expert_place
                break
        assert grip is not None
        assert np.linalg.norm(grip[:2] - [0.1, 0.0]) < 0.02
        assert 0.93 < grip[2] < 1.0

    def test_the_noise_descends_from_the_seed(self, task: str) -> None:
        expert = LiberoExpert(task, noise=0.3)
        actions = []
        for seed in (1, 1, 2):
            expert.reset(seed)
            actions.append(expert.act(view()))
        np.testing.assert_array_equal(actions[0], actions[1])
        assert not np.array_equal(actions[1], actions[2])
        with pytest.raises(InvalidInputError, match="noise"):
            LiberoExpert(task, noise=2.0)

    def test_the_reasoner_says_one_axis(self, task: str) -> None:
        said = LiberoReasoner(task).decide(view())
        assert (said.axes, said.gripper, said.defer) == ((1, 0, 0), "open", False)
