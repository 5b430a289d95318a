"""References, and the context that all three ports are given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import InvalidInputError
from counterflow.policies import ActionSpec
from counterflow.steering import Reference, SteeringContext


def test_by_default_everybody_speaks_for_everything() -> None:
    reference = Reference.of(torch.zeros(2, 3, 4))
    assert reference.active.tolist() == [True, True]
    assert reference.steered.all()
    assert reference.spoken.all()
    assert reference.spoken.shape == (2, 3, 4)


def test_spoken_for_is_steered_in_rows_that_are_active() -> None:
    steered = torch.tensor([True, False])  # one a dimension, for all rows
    reference = Reference.of(torch.zeros(2, 3, 2), torch.tensor([True, False]), steered)
    assert reference.spoken[0].tolist() == [[True, False]] * 3
    assert not reference.spoken[1].any()


@given(copies=st.integers(1, 4), rows=st.integers(1, 4))
def test_repeating_keeps_every_row_together_with_its_own(copies: int, rows: int) -> None:
    chunk = torch.arange(rows, dtype=torch.float32)[:, None, None].expand(rows, 2, 2).clone() / rows
    active = torch.arange(rows) % 2 == 0
    reference = Reference.of(chunk, active, (chunk > 0.4))
    wide = SteeringContext({"state": chunk[:, 0]}, rows, reference).repeat_interleave(copies)
    assert wide.batch_size == rows * copies
    assert wide.reference is not None
    for row in range(rows):
        for copy in range(row * copies, (row + 1) * copies):
            assert torch.equal(wide.features["state"][copy], chunk[row, 0])
            assert torch.equal(wide.reference.chunk[copy], chunk[row])
            assert torch.equal(wide.reference.spoken[copy], reference.spoken[row])
    alone = SteeringContext(chunk, rows).repeat_interleave(copies)
    assert alone.reference is None


@pytest.mark.parametrize("value", [10.0, -10.0, 0.0])
def test_the_largest_sensible_values_are_taken(value: float) -> None:
    Reference.of(torch.full((1, 1, 1), value)).check(ActionSpec(1, 1), 1)


@pytest.mark.parametrize("value", [10.1, -255.0, float("inf"), float("nan")])
def test_others_are_not(value: float) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        Reference.of(torch.full((1, 1, 1), value))


def test_an_activity_for_other_rows() -> None:
    with pytest.raises(InvalidInputError, match=r"`active` has shape \(3,\); expected \(2,\)"):
        Reference.of(torch.zeros(2, 1, 1), torch.ones(3, dtype=torch.bool))
