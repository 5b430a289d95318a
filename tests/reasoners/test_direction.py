"""Directions, and both conventions for writing them into a reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.policies import ActionLayout, ActionSpec, Normaliser
from counterflow.reasoners import OGBENCH, PAPER, Convention, Direction, to_reference
from counterflow.steering.context import LARGEST_REFERENCE

LAYOUT = ActionLayout(translation=(0, 1, 2), rotation=(3,), gripper=4)
PLAIN = ActionSpec(5, 5, (-1.0,) * 5, (1.0,) * 5, layout=LAYOUT)
# Quantile normalisation of a lopsided gripper and a rotation whose middle is not zero.
SKEWED = ActionSpec(
    5,
    5,
    (-1.0,) * 5,
    (1.0,) * 5,
    Normaliser(torch.tensor([0.0, 0.1, 0.0, 0.2, 0.5]), torch.tensor([0.5, 0.5, 0.5, 0.4, 0.5])),
    LAYOUT,
)


class TestDirection:
    @given(st.tuples(*[st.sampled_from([-1, 0, 1])] * 3), st.floats(0.01, 1.0))
    def test_the_vector_has_the_length_of_the_amount(self, axes: tuple[int, int, int], amount: float) -> None:
        vector = Direction(axes, amount).vector
        assert np.linalg.norm(vector) == pytest.approx(amount if any(axes) else 0.0)
        assert np.array_equal(np.sign(vector), axes)

    def test_who_defers_asks_for_no_motion(self) -> None:
        assert not Direction((1, 0, 0), defer=True).vector.any()

    @pytest.mark.parametrize(
        ("arguments", "kind"),
        [
            ({"axes": (2, 0, 0)}, InvalidInputError),
            ({"axes": (1, 0)}, InvalidInputError),
            ({"amount": 0.0}, InvalidInputError),
            ({"amount": float("nan")}, InvalidInputError),
            ({"gripper": "shut"}, UnknownNameError),
        ],
    )
    def test_bad_input(self, arguments: dict[str, Any], kind: type[Exception]) -> None:
        with pytest.raises(kind):
            Direction(**arguments)


class TestOurConvention:
    def test_one_axis_in_environment_units_constant_over_the_chunk(self) -> None:
        reference = to_reference([Direction((0, 0, -1), gripper="close"), Direction((1, 0, 0), 0.5, "open")], PLAIN)
        expected = torch.tensor([[0.0, 0.0, -0.7, 0.0, 1.0], [0.35, 0.0, 0.0, 0.0, -1.0]])
        assert reference.chunk.shape == (2, 5, 5)
        torch.testing.assert_close(reference.chunk, expected[:, None].expand(2, 5, 5))
        assert reference.active.all()
        assert reference.steered.all()

    def test_normalised_zero_is_not_raw_zero(self) -> None:
        reference = to_reference([Direction((1, 0, 0), gripper="hold")], SKEWED)
        raw = SKEWED.denormalise(reference.chunk)[0, 0]
        torch.testing.assert_close(raw, torch.tensor([0.7, 0.0, 0.0, 0.0, 0.0]))
        assert reference.chunk[0, 0, 3].item() == pytest.approx(-0.5)

    def test_commands_stay_within_the_limits(self) -> None:
        reference = to_reference([Direction((1, 0, 0), gripper="close")], PLAIN, Convention(2.0, gripper_magnitude=3.0))
        assert reference.chunk.max() == 1.0

    def test_a_dimension_that_never_moved_in_the_policys_data_is_asked_for_as_far_as_a_reference_goes(self) -> None:
        scale = torch.tensor([0.5, 1e-3, 0.5, 0.5, 1e-3])
        still = dataclasses.replace(PLAIN, normaliser=Normaliser(torch.zeros(5), scale))
        chunk = to_reference([Direction((0.0, 1.0, 1.0))], still).chunk
        assert chunk[0, 0, 1] == LARGEST_REFERENCE
        assert 0 < chunk[0, 0, 2] < LARGEST_REFERENCE

    def test_a_gripper_that_opens_with_positive_values(self) -> None:
        spec = ActionSpec(5, 5, layout=ActionLayout((0, 1, 2), (3,), 4, gripper_close_sign=-1))
        assert to_reference([Direction(gripper="close")], spec).chunk[0, 0, 4] == -1.0


class TestPaperConvention:
    def test_unit_length_in_normalised_translation(self) -> None:
        reference = to_reference([Direction((1, -1, 0), gripper="hold"), Direction((0, 1, 0), 0.5)], SKEWED, PAPER)
        assert reference.chunk[0, 0, :3].norm().item() == pytest.approx(1.0)
        assert reference.chunk[1, 0, :3].tolist() == [0.0, 0.5, 0.0]
        assert SKEWED.denormalise(reference.chunk)[0, 0, 3:].tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


class TestWhoDecidesWhat:
    def test_the_gripper_left_to_the_policy(self) -> None:
        reference = to_reference([Direction((1, 0, 0)), Direction((1, 0, 0), gripper="hold")], PLAIN)
        assert not reference.steered[0, :, 4].any()
        assert reference.steered[0, :, :4].all()
        assert reference.steered[1].all()

    def test_rotation_and_later_rows_left_to_the_policy(self) -> None:
        given = to_reference([Direction((1, 0, 0), gripper="open")], PLAIN, Convention(rotation="policy", rows=2))
        assert not given.steered[..., 3].any()
        assert not given.steered[:, 2:].any()
        assert given.steered[:, :2, [0, 1, 2, 4]].all()

    def test_deferring(self) -> None:
        assert to_reference([Direction(defer=True), Direction()], PLAIN).active.tolist() == [False, True]


class TestBadInput:
    def test_an_action_space_that_does_not_say_what_moves(self) -> None:
        with pytest.raises(MismatchError, match="Give its ActionSpec a layout"):
            to_reference([Direction()], ActionSpec(5, 5))

    def test_no_gripper_to_command(self) -> None:
        with pytest.raises(MismatchError, match="has no gripper"):
            to_reference([Direction(gripper="open")], ActionSpec(5, 3, layout=ActionLayout((0, 1, 2))))

    @pytest.mark.parametrize(
        "changes", [{"magnitude": 0.0}, {"magnitude": float("inf")}, {"gripper_magnitude": -1}, {"rows": 0}]
    )
    def test_conventions_out_of_range(self, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match="expected"):
            Convention(**changes)


def test_the_named_conventions() -> None:
    assert (OGBENCH.magnitude, OGBENCH.units, OGBENCH.rotation) == (0.7, "environment", "hold")
    assert (PAPER.magnitude, PAPER.units) == (1.0, "normalised")
