"""Which cube to move, and what to say in each phase of moving it."""

from __future__ import annotations

import numpy as np
import pytest

from counterflow.reasoners import CubeReasoner, Direction
from counterflow.reasoners.cubes import PickAndPlace, next_cube
from counterflow.reasoners.direction import View


def view(
    cubes: list[tuple[float, float, float]],
    goals: list[tuple[float, float, float]],
    effector: tuple[float, float, float] = (0.4, 0.0, 0.3),
) -> View:
    said = {
        "proprio/effector_pos": np.array(effector),
        "proprio/gripper_contact": np.array([0.0]),
        "proprio/gripper_opening": np.array([0.0]),
    }
    said |= {f"privileged/block_{index}_pos": np.array(place) for index, place in enumerate(cubes)}
    return said | {f"goal/block_{index}_pos": np.array(place) for index, place in enumerate(goals)}


class TestWhichCube:
    def test_supports_before_what_stands_on_them(self) -> None:
        cubes = np.array([[0.3, 0.0, 0.02], [0.4, 0.1, 0.02]])
        goals = np.array([[0.5, 0.0, 0.06], [0.5, 0.0, 0.02]])  # cube 0 is to stand on cube 1
        chosen = next_cube(cubes, goals)
        assert chosen is not None
        assert chosen[0] == 1

    def test_what_is_covered_waits(self) -> None:
        cubes = np.array([[0.4, 0.0, 0.02], [0.4, 0.0, 0.06]])
        goals = np.array([[0.5, 0.1, 0.02], [0.3, -0.1, 0.02]])
        chosen = next_cube(cubes, goals)
        assert chosen is not None
        assert chosen[0] == 1

    def test_a_goal_that_is_taken_waits(self) -> None:
        cubes = np.array([[0.3, 0.1, 0.02], [0.4, 0.0, 0.02]])
        goals = np.array([[0.4, 0.0, 0.02], [0.5, -0.1, 0.02]])  # cube 0 goes where cube 1 still lies
        chosen = next_cube(cubes, goals)
        assert chosen is not None
        assert chosen[0] == 1

    def test_a_swap_puts_one_aside_first(self) -> None:
        cubes = np.array([[0.4, 0.1, 0.02], [0.4, -0.1, 0.02]])
        chosen = next_cube(cubes, cubes[::-1].copy())
        assert chosen is not None
        _, place = chosen
        assert min(np.linalg.norm(cubes - place, axis=1)) > 0.05

    def test_nothing_left_to_do(self) -> None:
        cubes = np.array([[0.4, 0.1, 0.02]])
        assert next_cube(cubes, cubes.copy()) is None


class TestPickAndPlace:
    GOAL = np.array([0.4, 0.2, 0.02])

    def say(
        self, effector: tuple[float, float, float], contact: float, opening: float, cube: tuple[float, ...]
    ) -> Direction:
        view = {
            "proprio/effector_pos": np.array(effector),
            "proprio/gripper_contact": np.array([contact]),
            "proprio/gripper_opening": np.array([opening]),
        }
        return PickAndPlace().direction(view, np.array(cube), self.GOAL)

    @pytest.mark.parametrize(
        ("effector", "contact", "opening", "cube", "axes", "gripper"),
        [
            ((0.2, 0.0, 0.05), 0.0, 0.0, (0.4, 0.0, 0.02), (0, 0, 1), "open"),  # low and far: up first
            ((0.2, 0.0, 0.20), 0.0, 0.0, (0.4, 0.0, 0.02), (1, 0, 0), "open"),  # over to the cube
            ((0.4, 0.0, 0.20), 0.0, 0.0, (0.4, 0.0, 0.02), (0, 0, -1), "open"),  # down on it
            ((0.4, 0.0, 0.02), 0.0, 0.0, (0.4, 0.0, 0.02), (0, 0, 0), "close"),  # grasp
            ((0.4, 0.0, 0.02), 1.0, 0.5, (0.4, 0.0, 0.02), (0, 0, 1), "close"),  # lift
            ((0.4, 0.0, 0.02), 0.4, 0.98, (0.4, 0.0, 0.02), (0, 0, 1), "open"),  # missed: again
            ((0.4, 0.0, 0.20), 1.0, 0.5, (0.4, 0.0, 0.20), (0, 1, 0), "close"),  # carry
            ((0.4, 0.2, 0.20), 1.0, 0.5, (0.4, 0.2, 0.20), (0, 0, -1), "close"),  # down
            ((0.4, 0.2, 0.02), 1.0, 0.5, (0.4, 0.2, 0.02), (0, 0, 0), "open"),  # let go
        ],
    )
    def test_each_phase(
        self,
        effector: tuple[float, float, float],
        contact: float,
        opening: float,
        cube: tuple[float, ...],
        axes: tuple[int, int, int],
        gripper: str,
    ) -> None:
        said = self.say(effector, contact, opening, cube)
        assert (said.axes, said.gripper) == (axes, gripper)


class TestReasoner:
    LEFT, RIGHT, FAR = (0.4, -0.2, 0.02), (0.4, 0.2, 0.02), (0.6, 0.0, 0.02)

    def test_it_stays_with_a_cube_until_that_is_placed(self) -> None:
        reasoner = CubeReasoner()
        reasoner.reset(0)
        goals = [self.RIGHT, self.FAR]
        first = reasoner.decide(view([self.LEFT, self.RIGHT], goals))
        assert first.axes == (0, 1, 0)  # cube 1 lies where cube 0 belongs
        # With cube 1 in the air cube 0 could go home at once, but what was begun is finished.
        half = view([self.LEFT, (0.5, 0.1, 0.3)], goals, (0.2, 0.1, 0.4))
        chosen = next_cube(np.array([self.LEFT, (0.5, 0.1, 0.3)]), np.array(goals))
        assert chosen is not None
        assert chosen[0] == 0
        assert reasoner.decide(half).axes == (1, 0, 0)
        then = reasoner.decide(view([self.LEFT, self.FAR], goals))
        assert then.axes == (0, -1, 0)

    def test_a_new_episode_forgets_the_last(self) -> None:
        reasoner = CubeReasoner()
        reasoner.decide(view([self.LEFT], [self.FAR]))
        reasoner.reset(0)
        done = reasoner.decide(view([self.RIGHT], [self.RIGHT]))
        assert (done.axes, done.gripper) == ((0, 0, 1), "open")
