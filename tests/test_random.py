"""Randomness descends from one seed, row by row."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import InvalidInputError
from counterflow.random import SEED_BOUND, RowGenerators, check_seed, child_seed, draw_normal, generator, global_numpy


@given(st.integers(0, SEED_BOUND - 1), st.text(), st.integers(0, 10))
def test_children_are_repeatable_seeds(seed: int, name: str, index: int) -> None:
    child = child_seed(seed, name, index)
    assert check_seed(child) == child == child_seed(seed, name, index)


def test_streams_do_not_share_children() -> None:
    children = {child_seed(seed, name, index) for seed in range(10) for name in "ab" for index in range(50)}
    assert len(children) == 1000


def test_a_known_child_stays_what_it_is() -> None:
    """Results in the benchmarks descend from these numbers: changing them changes every result."""
    assert child_seed(0, "episode", 0) == 1504712854


def test_rows_draw_for_themselves() -> None:
    together = RowGenerators([1, 2, 3]).normal((3, 4))
    assert torch.equal(together[1:2], RowGenerators([2]).normal((1, 4)))
    rows = RowGenerators([1, 2])
    rows.normal((2, 4))
    rows.reseed(0, 9)
    again = rows.normal((2, 4))
    assert torch.equal(again[:1], RowGenerators([9]).normal((1, 4)))


def test_several_candidates_a_row_are_neighbours() -> None:
    wide = draw_normal(RowGenerators([1, 2]), (6, 4))
    assert torch.equal(wide[:3], RowGenerators([1]).normal((1, 3, 4))[0])
    assert torch.equal(wide[3:], RowGenerators([2]).normal((1, 3, 4))[0])
    with pytest.raises(InvalidInputError, match="multiple"):
        draw_normal(RowGenerators([1, 2]), (5, 4))
    assert torch.equal(draw_normal(generator(3), (2, 2)), torch.randn(2, 2, generator=generator(3)))


@pytest.mark.parametrize("seed", [-1, SEED_BOUND, 1.0, True, "1"])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(InvalidInputError, match="seed is"):
        check_seed(seed)


def test_numpys_global_generator_is_seeded_for_a_while_and_put_back() -> None:
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    with suppress(RuntimeError), global_numpy(9):
        inside = np.random.random(3)
        raise RuntimeError
    assert np.array_equal(np.random.random(3), expected)
    np.random.seed(9)
    assert np.array_equal(np.random.random(3), inside)
