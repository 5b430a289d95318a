"""Where windows begin: every start there is, once, and drawn as the weighting says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.data.starts import Weighting, WindowStarts
from counterflow.errors import InvalidInputError, UnknownNameError

CPU = torch.device("cpu")
EPISODES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=6)
"""For each episode the rows before its first one that belong to nothing, and its starts."""


def placed(episodes: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    firsts, counts, rows, row = [], [], [], 0
    for gap, count in episodes:
        row += gap
        firsts.append(row)
        counts.append(count)
        rows += range(row, row + count)
        row += count
    return np.array(firsts), np.array(counts), rows


@given(EPISODES, st.sampled_from(["windows", "episodes"]))
def test_every_start_is_there_once_and_no_other_is_drawn(episodes: list[tuple[int, int]], weighting: Weighting) -> None:
    firsts, counts, rows = placed(episodes)
    starts = WindowStarts(firsts, counts, weighting, CPU)
    assert len(starts) == len(rows)
    assert starts.rows.tolist() == rows
    drawn = starts.draw(400, torch.Generator().manual_seed(0))
    assert drawn.shape == (400,)
    assert drawn.dtype == torch.int64
    assert set(drawn.tolist()) <= set(rows)


@pytest.mark.parametrize(("weighting", "share"), [("windows", 1 / 10), ("episodes", 1 / 2)])
def test_a_short_episode_counts_by_its_windows_or_as_much_as_a_long_one(weighting: Weighting, share: float) -> None:
    starts = WindowStarts(np.array([0, 9]), np.array([9, 1]), weighting, CPU)
    drawn = starts.draw(20_000, torch.Generator().manual_seed(1))
    assert (drawn == 9).double().mean().item() == pytest.approx(share, abs=0.015)
    long = torch.bincount(drawn, minlength=10)[:9] / (drawn < 9).sum()
    assert long.tolist() == pytest.approx([1 / 9] * 9, abs=0.015)


def test_draws_repeat_with_their_generator() -> None:
    starts = WindowStarts(np.array([0]), np.array([100]), "windows", CPU)
    first, again = (starts.draw(8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_bad_input() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'windows'"):
        WindowStarts(np.array([0]), np.array([1]), "window", CPU)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="batch_size is 0; expected an integer of at least 1"):
        WindowStarts(np.array([0]), np.array([1]), "windows", CPU).draw(0, torch.Generator())
