"""The scripted reasoners: what they want next, and that following them in the simulator leads there."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from counterflow.envs import make_env
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.experiments.evaluate import ReasonerSettings, evaluate, load_prior
from counterflow.reasoners import CubeReasoner, Direction, scripted_reasoner, solve_lights_out
from counterflow.reasoners.cubes import PickAndPlace, next_cube
from counterflow.reasoners.scene import next_subgoal


def pressed(presses: npt.NDArray[np.int64], rows: int, columns: int) -> npt.NDArray[np.int64]:
    lights = np.zeros((rows, columns), dtype=np.int64)
    for row, column in np.argwhere(presses.reshape(rows, columns)):
        for r, c in ((row, column), (row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if 0 <= r < rows and 0 <= c < columns:
                lights[r, c] ^= 1
    return lights.reshape(-1)


class TestLightsOut:
    def test_every_pattern_of_three_by_three_with_the_fewest_presses(self) -> None:
        for pattern in itertools.product((0, 1), repeat=9):
            presses = solve_lights_out(np.array(pattern), 3, 3)
            assert pressed(presses, 3, 3).tolist() == list(pattern)

    @pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 5), (4, 6)])
    def test_grids_with_many_solutions_get_the_shortest(self, rows: int, columns: int) -> None:
        """Two presses that were made must be answered with at most two."""
        rng = np.random.default_rng(0)
        for _ in range(20):
            made = np.zeros(rows * columns, dtype=np.int64)
            made[rng.choice(rows * columns, 2, replace=False)] = 1
            lights = pressed(made, rows, columns)
            presses = solve_lights_out(lights, rows, columns)
            assert np.array_equal(pressed(presses, rows, columns), lights)
            assert presses.sum() <= 2

    def test_what_cannot_be_reached(self) -> None:
        unreachable = np.zeros(16, dtype=np.int64)
        unreachable[0] = 1  # the 4 x 4 puzzle has patterns that no presses make
        with pytest.raises(InvalidInputError, match="no presses"):
            solve_lights_out(unreachable, 4, 4)


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
    CUBE, GOAL = np.array([0.4, 0.0, 0.02]), np.array([0.4, 0.2, 0.02])

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


class TestScene:
    @pytest.mark.parametrize(
        ("task", "first"), [(1, "drawer"), (2, "button"), (3, "cube"), (4, "button"), (5, "button")]
    )
    def test_what_each_task_begins_with(self, task: int, first: str) -> None:
        """Task 1 has nothing locked; in 2, 4 and 5 the drawer that must move is; in 3 the cube lies wrong."""
        with make_env(f"ogbench/scene-task{task}", workers=0) as env:
            view = env.reset([0]).view(0)
        assert next_subgoal(view).what == first

    def test_an_open_drawer_is_moved_a_little_further_than_it_must_be(self) -> None:
        with make_env("ogbench/scene-task1", workers=0) as env:
            view = env.reset([0]).view(0)
        view["privileged/drawer_pos"] = view["goal/drawer_pos"] + 0.025
        assert next_subgoal(view).what != "drawer"
        assert next_subgoal(view, moving="drawer").what == "drawer"


@pytest.mark.parametrize("env", ["cube-single-task2", "puzzle-3x3-task1", "scene-task3"])
def test_following_them_with_the_shipped_prior_succeeds(env: str) -> None:
    """The whole of it: reasoner, reference, reversal, prior, simulator."""
    name = f"ogbench/{env}"
    with make_env(name, 4, workers=2) as vector:
        result = evaluate(vector, load_prior(name), "frs", 4, 0, reasoner=ReasonerSettings())
    assert result.rate.successes >= 3
    assert result.agreement > 0.7


def test_every_single_axis_is_coarse() -> None:
    """They name one axis at a time, never a diagonal."""
    with make_env("ogbench/cube-double-task3", 1) as env:
        batch, reasoner = env.reset([1]), CubeReasoner()
        reasoner.reset(0)
        for _ in range(20):
            said = reasoner.decide(batch.view(0))
            assert sum(map(abs, said.axes)) <= 1
            action = np.zeros((1, 5, 5))
            action[..., :3] = 0.7 * said.vector
            batch = env.execute(action)


def test_an_environment_that_no_script_knows() -> None:
    with pytest.raises(UnknownNameError, match="scripted reasoner"):
        scripted_reasoner("metaworld/reach")
