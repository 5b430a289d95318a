"""LIBERO's expert: goals read from problem files, grasps and turns by geometry (no simulator)."""

from __future__ import annotations

import numpy as np
import pytest

from counterflow.errors import InvalidInputError
from counterflow.reasoners import libero_expert
from counterflow.reasoners.libero_expert import LiberoExpert, LiberoReasoner
from counterflow.reasoners.libero_goals import Goal, parse_goals
from counterflow.reasoners.libero_hand import DOWN, facing_along, facing_down, rotation_of, rotation_vector


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
        "proprio/joint_pos": [0.0, 0.2, 0.0, -2.4, 0.0, 2.6, 0.8],
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


def with_drawer(moved: float, bowl: float) -> dict[str, np.ndarray]:
    """Return a view of a cabinet whose top drawer is open by -`moved`, and of a bowl at y = `bowl` below where it comes out."""
    return view(
        **{
            "privileged/cabinet_1_top_level_pos": [0.0, 0.3 + moved, 0.9],
            "privileged/cabinet_1_top_level_quat": [1.0, 0.0, 0.0, 0.0],
            "privileged/cabinet_1_top_level_joint": [moved],
            "privileged/cabinet_1_top_region_pos": [0.0, 0.3 + moved, 1.09],
            "privileged/cabinet_1_top_region_quat": [1.0, 0.0, 0.0, 0.0],
            "privileged/cabinet_1_top_region_joint": [0.0],
            "privileged/bowl_1_pos": [0.0, bowl, 0.9],
            "privileged/bowl_1_quat": [1.0, 0.0, 0.0, 0.0],
            "privileged/bowl_1_joint": [0.0],
            "privileged/bowl_1_low": [-0.06, -0.06, 0.0],
            "privileged/bowl_1_high": [0.06, 0.06, 0.05],
        }
    )


class TestBesideDrawers:
    """The handle is at y = 0.3 - 0.1016 where the drawer is shut, and nearer where it is open; y falls outwards."""

    @pytest.fixture
    def expert(self, monkeypatch: pytest.MonkeyPatch) -> LiberoExpert:
        goals = Goal("open", "cabinet_1_top_region"), Goal("in", "bowl_1", "cabinet_1_top_region")
        monkeypatch.setattr(libero_expert, "goals_of", lambda name: goals)
        return LiberoExpert("libero/90/x", noise=0.0)

    def see(self, expert: LiberoExpert, **where: float) -> None:
        expert.reset(0)
        expert.wanted(with_drawer(**where))

    def test_a_thing_counts_as_beside_a_drawer_that_is_open_or_will_be(self, expert: LiberoExpert) -> None:
        for moved in (0.0, -0.15):
            self.see(expert, moved=moved, bowl=-0.02)
            gap, outwards = expert._beside_drawer("bowl_1")  # type: ignore[misc]
            assert gap == pytest.approx(0.3 - 0.1016 - 0.15 + 0.02, abs=1e-6)
            np.testing.assert_allclose(outwards, [0.0, -1.0, 0.0], atol=1e-9)
        self.see(expert, moved=0.0, bowl=-0.3)
        assert expert._beside_drawer("bowl_1") is None

    def test_there_the_hand_is_thin_side_ahead_and_leans_away(self, expert: LiberoExpert) -> None:
        self.see(expert, moved=-0.15, bowl=-0.02)
        first = expert._grasps("bowl_1")[0]
        assert abs(first.closing[1]) < 0.1
        facing = expert._beside("bowl_1", first.closing)
        assert facing[1, 2] > 0.3  # it points inwards, so its body is outwards
        self.see(expert, moved=-0.15, bowl=-0.3)
        assert abs(expert._grasps("bowl_1")[0].closing[1]) > 0.9
        np.testing.assert_allclose(expert._beside("bowl_1", first.closing)[:, 2], [0.0, 0.0, -1.0], atol=1e-9)

    def test_what_would_be_in_the_hands_way_is_drawn_out_before_the_drawer_is_opened(
        self, expert: LiberoExpert
    ) -> None:
        self.see(expert, moved=0.0, bowl=0.04)
        names = []
        plan = expert._plan
        while plan is not None:
            names.append(plan.gi_code.co_name)  # type: ignore[attr-defined]
            plan = plan.gi_yieldfrom  # type: ignore[attr-defined]
        assert {"_draw", "_pull_drawer"} <= {*names}

    @pytest.mark.parametrize(
        ("goals", "first"),
        [
            ([Goal("open", "cabinet_1_top_region"), Goal("close", "cabinet_1_bottom_region")], "close"),
            ([Goal("on", "bowl_1", "cabinet_1_top_side"), Goal("close", "cabinet_1_top_region")], "close"),
            ([Goal("in", "bowl_1", "cabinet_1_top_region"), Goal("close", "cabinet_1_top_region")], "in"),
            ([Goal("in", "mug_1", "microwave_1_heating_region"), Goal("close", "microwave_1")], "in"),
        ],
    )
    def test_what_is_open_is_shut_first_unless_something_goes_in(
        self, monkeypatch: pytest.MonkeyPatch, goals: list[Goal], first: str
    ) -> None:
        monkeypatch.setattr(libero_expert, "goals_of", lambda name: tuple(goals))
        assert LiberoExpert("libero/90/x").goals[0].predicate == first


class TestReach:
    def test_a_stretched_arm_comes_nearer_before_it_rises(self, task: str) -> None:
        expert = LiberoExpert(task, noise=0.0)
        bent = view()
        expert.wanted(bent)
        up = np.array([0.0, 0.0, 1.3])
        assert expert._towards(up, None, 1.0)[2] == pytest.approx(2.0)
        expert.wanted(view(**{"proprio/joint_pos": [0.0, 1.3, 0.0, -0.1, 0.0, 1.4, 0.8]}))
        rising = expert._towards(up, None, 1.0)
        assert rising[2] == 0.0
        assert rising[0] < -0.9  # the robot stands at negative x
        assert expert._towards(np.array([0.0, 0.0, 0.9]), None, 1.0)[2] == pytest.approx(-2.0)

    def test_over_what_is_far_the_hand_leans_back(self, task: str) -> None:
        expert = LiberoExpert(task, noise=0.0)
        for x, leans in ((0.0, False), (0.2, True)):
            expert.reset(0)
            expert.wanted(view(**{"privileged/soup_1_pos": [x, 0.0, 0.95]}))
            facing = expert._beside("soup_1", np.array([0.0, 1.0]))
            assert bool(facing[0, 2] > 0.3) is leans

    def test_a_book_goes_in_along_its_compartments_walls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        goal = Goal("in", "book_1", "desk_caddy_1_front_contain_region")
        monkeypatch.setattr(libero_expert, "goals_of", lambda name: (goal,))
        told = view() | {name.replace("soup", "book"): value for name, value in view().items() if "soup" in name}
        for part in ("pos", "quat", "joint"):
            told[f"privileged/{goal.place}_{part}"] = told[f"privileged/basket_1_contain_region_{part}"]
        told["privileged/desk_caddy_1_quat"] = np.array([0.0, 0.0, 0.0, 1.0])  # half a turn
        expert = LiberoExpert("libero/90/x", noise=0.0)
        expert.wanted(told)
        skew = np.array([np.cos(0.6), np.sin(0.6)])
        np.testing.assert_allclose(expert._put_across(goal, skew), [1.0, 0.0], atol=1e-9)
        elsewhere = Goal("in", "book_1", "basket_1_contain_region")
        np.testing.assert_allclose(expert._put_across(elsewhere, skew), skew)
