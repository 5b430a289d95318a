"""Lights out against brute force, and pressing one button after the other."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import InvalidInputError
from counterflow.reasoners import PuzzleReasoner, solve_lights_out
from counterflow.reasoners.direction import View
from counterflow.reasoners.puzzle import ButtonPress


def pressed(presses: npt.NDArray[np.int64], rows: int, columns: int) -> npt.NDArray[np.int64]:
    lights = np.zeros((rows, columns), dtype=np.int64)
    for row, column in np.argwhere(presses.reshape(rows, columns)):
        for r, c in ((row, column), (row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if 0 <= r < rows and 0 <= c < columns:
                lights[r, c] ^= 1
    return lights.reshape(-1)


@cache
def fewest(rows: int, columns: int) -> dict[bytes, int]:
    """Try every set of presses: the fewest for each pattern of lights that can be made."""
    size = rows * columns
    effect = np.stack([pressed(row, rows, columns) for row in np.eye(size, dtype=np.int64)])
    sets = (np.arange(2**size)[:, None] >> np.arange(size)) & 1
    lights = (sets @ effect % 2).astype(np.uint8)
    best: dict[bytes, int] = {}
    for pattern, count in zip(lights, sets.sum(1), strict=True):
        key = pattern.tobytes()
        best[key] = min(best.get(key, size), int(count))
    return best


class TestLightsOut:
    def test_every_pattern_of_three_by_three(self) -> None:
        for pattern in itertools.product((0, 1), repeat=9):
            presses = solve_lights_out(np.array(pattern), 3, 3)
            assert pressed(presses, 3, 3).tolist() == list(pattern)

    @given(
        shape=st.sampled_from([(1, 1), (1, 2), (2, 2), (2, 3), (3, 2), (1, 5), (3, 3), (2, 5), (4, 4)]), data=st.data()
    )
    def test_as_few_presses_as_by_brute_force(self, shape: tuple[int, int], data: st.DataObject) -> None:
        size = shape[0] * shape[1]
        lights = np.array(data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)), dtype=np.int64)
        expected = fewest(*shape).get(lights.astype(np.uint8).tobytes())
        if expected is None:
            with pytest.raises(InvalidInputError, match="no presses"):
                solve_lights_out(lights, *shape)
        else:
            presses = solve_lights_out(lights, *shape)
            assert np.array_equal(pressed(presses, *shape), lights)
            assert presses.sum() == expected

    @given(made=st.sets(st.integers(0, 15), max_size=16))
    def test_as_few_presses_as_by_brute_force_where_there_are_sixteen_ways(self, made: set[int]) -> None:
        lights = pressed(np.isin(np.arange(16), list(made)).astype(np.int64), 4, 4)
        presses = solve_lights_out(lights, 4, 4)
        assert np.array_equal(pressed(presses, 4, 4), lights)
        assert presses.sum() == fewest(4, 4)[lights.astype(np.uint8).tobytes()]

    @pytest.mark.parametrize(("rows", "columns"), [(4, 5), (4, 6)])
    def test_large_grids(self, rows: int, columns: int) -> None:
        """Two presses that were made must be answered with at most two."""
        rng = np.random.default_rng(0)
        for _ in range(20):
            made = np.zeros(rows * columns, dtype=np.int64)
            made[rng.choice(rows * columns, 2, replace=False)] = 1
            lights = pressed(made, rows, columns)
            presses = solve_lights_out(lights, rows, columns)
            assert np.array_equal(pressed(presses, rows, columns), lights)
            assert presses.sum() <= 2


def view(
    effector: tuple[float, float, float], states: list[int], goals: list[int], depth: dict[int, float] | None = None
) -> View:
    """Buttons of a 3 x 3 puzzle, 0.1 m apart, their tops 0.05 m high."""
    said: dict[str, npt.NDArray[np.float64]] = {
        "proprio/effector_pos": np.array(effector),
        "privileged/button_states": np.array(states, dtype=np.float64),
        "goal/button_states": np.array(goals, dtype=np.float64),
    }
    for button in range(9):
        row, column = divmod(button, 3)
        said[f"privileged/button_{button}_top_pos"] = np.array([0.3 + 0.1 * row, 0.1 * (column - 1), 0.05])
        said[f"privileged/button_{button}_pos"] = np.array([(depth or {}).get(button, 0.0)])
    return said


class TestButtonPress:
    @pytest.mark.parametrize(
        ("effector", "depth", "axes"),
        [
            ((0.3, 0.2, 0.05), 0.0, (0, 0, 1)),  # low and beside it: up first
            ((0.3, 0.2, 0.20), 0.0, (0, -1, 0)),  # over to it
            ((0.3, 0.1, 0.20), 0.0, (0, 0, -1)),  # down on it
            ((0.3, 0.1, 0.04), -0.01, (0, 0, -1)),  # not yet pressed through
            ((0.3, 0.1, 0.03), -0.02, (0, 0, 1)),  # pressed: up, or it will not toggle again
        ],
    )
    def test_each_phase(self, effector: tuple[float, float, float], depth: float, axes: tuple[int, int, int]) -> None:
        said = ButtonPress().direction(view(effector, [0] * 9, [0] * 9, {2: depth}), 2)
        assert (said.axes, said.gripper) == (axes, "close")


class TestReasoner:
    def test_the_nearest_button_first_and_it_stays_with_it(self) -> None:
        lights = pressed(np.array([1, 0, 0, 0, 0, 0, 0, 0, 1]), 3, 3).tolist()  # buttons 0 and 8, in opposite corners
        reasoner = PuzzleReasoner()
        reasoner.reset(0)
        # Button 8 is at (0.5, 0.1), button 0 at (0.3, -0.1).
        assert reasoner.decide(view((0.5, 0.0, 0.3), lights, [0] * 9)).axes == (0, 1, 0)
        assert reasoner.decide(view((0.3, -0.09, 0.3), lights, [0] * 9)).axes == (
            1,
            0,
            0,
        )  # near 0, but on its way to 8
        rest = pressed(np.array([1, 0, 0, 0, 0, 0, 0, 0, 0]), 3, 3).tolist()
        assert reasoner.decide(view((0.5, 0.1, 0.3), rest, [0] * 9)).axes in ((-1, 0, 0), (0, -1, 0))

    def test_it_rises_when_every_light_is_right(self) -> None:
        said = PuzzleReasoner().decide(view((0.3, 0.0, 0.1), [1, 0] * 4 + [1], [1, 0] * 4 + [1]))
        assert (said.axes, said.gripper) == ((0, 0, 1), "close")
