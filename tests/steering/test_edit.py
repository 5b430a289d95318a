"""What is done to the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counterflow.errors import InvalidInputError
from counterflow.policies import FieldPolicy
from counterflow.steering import (
    Chain,
    ExecuteReference,
    Limits,
    NearestToReference,
    Reference,
    SteeredPolicy,
    SteeringContext,
)

CANDIDATES = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.6, 0.8]])[None, :, None]  # (1, 3, 1, 2)


def given(*reference: float, **changes: Any) -> SteeringContext:
    return SteeringContext(None, 1, Reference.of(torch.tensor([[list(reference)]]), **changes))


class TestNearest:
    @pytest.mark.parametrize(
        ("distance", "reference", "chosen"),
        [("cosine", (0.0, 1.0), 1), ("l2", (0.0, 1.0), 2), ("cosine", (3.0, 4.0), 2), ("l2", (2.0, 0.0), 0)],
    )
    def test_the_nearest_is_kept(self, distance: Any, reference: tuple[float, float], chosen: int) -> None:
        kept = NearestToReference(3, distance)(CANDIDATES, given(*reference))
        assert torch.equal(kept, CANDIDATES[:, chosen : chosen + 1])

    def test_only_what_is_spoken_for_counts(self) -> None:
        only_second = torch.tensor([[[False, True]]])
        kept = NearestToReference(3, "l2")(CANDIDATES, given(9.0, 0.0, steered=only_second))
        assert torch.equal(kept, CANDIDATES[:, :1])

    def test_where_nobody_speaks_the_first_is_kept(self) -> None:
        silent = given(0.0, 1.0, active=torch.tensor([False]))
        for context in (silent, SteeringContext(None, 1)):
            assert torch.equal(NearestToReference(3)(CANDIDATES, context), CANDIDATES[:, :1])

    def test_more_candidates_come_nearer(self, prior: FieldPolicy) -> None:
        reference = Reference.of(torch.full((200, 3, 4), 0.6))
        error = [
            SteeredPolicy(prior, edit=NearestToReference(count, "l2"))
            .act(torch.zeros(200), reference, 0)
            .round_trip_error
            for count in (1, 4, 64)
        ]
        assert error[0].mean() > error[1].mean() > error[2].mean()


class TestExecuteReference:
    def test_the_reference_where_it_speaks_and_the_policy_elsewhere(self) -> None:
        context = given(7.0, 8.0, steered=torch.tensor([[[True, False]]]))
        assert ExecuteReference()(CANDIDATES, context)[0, :, 0].tolist() == [
            [7.0, 0.0],
            [7.0, 5.0],
            [7.0, pytest.approx(0.8)],
        ]

    def test_deferring_is_the_policy(self) -> None:
        assert torch.equal(ExecuteReference()(CANDIDATES, given(7.0, 8.0, active=torch.tensor([False]))), CANDIDATES)


class TestLimits:
    def test_hard_bounds(self) -> None:
        limited = Limits(-0.5, torch.tensor([0.5, 2.0]))(CANDIDATES, SteeringContext(None, 1))
        assert limited.max() == 2.0
        assert limited[..., 0].max() == 0.5

    def test_a_chain_applies_them_in_order(self) -> None:
        chain = Chain([NearestToReference(3, "l2"), Limits(0.0, 0.7)])
        assert chain.candidates == 3
        assert chain(CANDIDATES, given(0.5, 1.0)).flatten().tolist() == pytest.approx([0.6, 0.7])


@pytest.mark.parametrize(
    "make",
    [
        lambda: NearestToReference(0),
        lambda: NearestToReference(4, "l1"),
        lambda: Limits(1.0, 1.0),
        lambda: Limits(2.0, -2.0),
    ],
)
def test_settings_out_of_range(make: Any) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        make()
