"""A scripted reasoner for the puzzle: solve "lights out", then name the coarse direction to the next button."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from counterflow.errors import InvalidInputError
from counterflow.reasoners.direction import Direction, View
from counterflow.reasoners.motion import approach

GRIDS = {9: (3, 3), 16: (4, 4), 20: (4, 5), 24: (4, 6)}


def solve_lights_out(difference: npt.NDArray[np.int64], rows: int, columns: int) -> npt.NDArray[np.int64]:
    """Find the fewest buttons to press.

    A press flips a button and its neighbours, and pressing is commutative, so the presses x solve M x = difference over
    the integers modulo 2. Elimination finds one solution; adding combinations of the null space finds the shortest.

    Args:
        difference: (rows * columns,) 1 where a light must flip.
        rows: rows of the grid.
        columns: columns of the grid.

    Returns:
        (rows * columns,) 1 for each button to press once.

    Raises:
        InvalidInputError: no sequence of presses leads there.
    """
    size = rows * columns
    matrix = np.zeros((size, size), dtype=np.int64)
    for index in range(size):
        row, column = divmod(index, columns)
        for r, c in ((row, column), (row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if 0 <= r < rows and 0 <= c < columns:
                matrix[r * columns + c, index] = 1
    system = np.concatenate([matrix, np.asarray(difference, dtype=np.int64).reshape(size, 1) % 2], axis=1)
    pivots: list[int] = []
    for column in range(size):
        rank = len(pivots)
        candidates = np.flatnonzero(system[rank:, column])
        if candidates.size == 0:
            continue
        pivot = rank + int(candidates[0])
        system[[rank, pivot]] = system[[pivot, rank]]
        others = np.flatnonzero(system[:, column])
        for other in others[others != rank]:
            system[other] ^= system[rank]
        pivots.append(column)
    if system[len(pivots) :, -1].any():
        raise InvalidInputError(
            f"no presses turn this {rows} x {columns} puzzle into its goal; check the goal pattern."
        )
    free = [column for column in range(size) if column not in pivots]
    best = None
    for combination in range(2 ** len(free)):  # at most 2^4 on these grids
        solution = np.zeros(size, dtype=np.int64)
        solution[free] = [(combination >> bit) & 1 for bit in range(len(free))]
        solution[pivots] = (system[: len(pivots), -1] + system[: len(pivots), free] @ solution[free]) % 2
        if best is None or solution.sum() < best.sum():
            best = solution
    assert best is not None
    return best


class ButtonPress:
    """Coarse single-axis directions that press one button and come up again.

    Args:
        clearance: height above the button at which to travel, metres.
        aligned: horizontal distance along either axis within which to go down, metres.
    """

    def __init__(self, clearance: float = 0.01, aligned: float = 0.025) -> None:
        self._clearance, self._aligned = clearance, aligned

    def direction(self, view: View, button: int) -> Direction:
        """Say the next direction for pressing `button`."""
        effector, top = view["proprio/effector_pos"], view[f"privileged/button_{button}_top_pos"]
        # A pressed button toggles once; it must come up before it can toggle again.
        if view[f"privileged/button_{button}_pos"][0] < -0.015:
            return Direction((0, 0, 1), 1.0, "close")
        bottom = top - np.array([0.0, 0.0, 0.025])
        return approach(effector, bottom, clearance=self._clearance + 0.025, aligned=self._aligned, gripper="close")


class PuzzleReasoner:
    """Looks at lights and goal, solves the puzzle anew before each chunk, and stays with a button until it is pressed."""

    def __init__(self, press: ButtonPress | None = None) -> None:
        self._press = ButtonPress() if press is None else press
        self._button: int | None = None

    def reset(self, seed: int) -> None:  # noqa: ARG002 - nothing here is random
        """Forget the button that was being pressed."""
        self._button = None

    def decide(self, view: View) -> Direction:
        """Say the next direction; rise when every light is right."""
        difference = (view["privileged/button_states"] != view["goal/button_states"]).astype(np.int64)
        if not difference.any():
            return Direction((0, 0, 1), 1.0, "close")
        presses = np.flatnonzero(solve_lights_out(difference, *GRIDS[len(difference)]))
        if self._button is None or self._button not in presses:
            effector = view["proprio/effector_pos"]
            travel = [np.linalg.norm((view[f"privileged/button_{b}_top_pos"] - effector)[:2]) for b in presses]
            self._button = int(presses[int(np.argmin(travel))])
        return self._press.direction(view, self._button)
