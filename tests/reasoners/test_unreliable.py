"""A reasoner made worse on purpose."""

from __future__ import annotations

from typing import Any

import pytest

from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.reasoners import Direction, OverruledGripper, UnreliableReasoner, View


class Always:
    """Says up, gripper open; counts."""

    def __init__(self) -> None:
        self.said = 0

    def reset(self, seed: int) -> None:
        self.said = 0

    def decide(self, view: View) -> Direction:
        self.said += 1
        return Direction((0, 0, 1), 1 / self.said, "open")


def listen(error: float, seed: int, chunks: int = 400, delay: int = 0) -> list[Direction]:
    reasoner = UnreliableReasoner(Always(), error, delay)
    reasoner.reset(seed)
    return [reasoner.decide({}) for _ in range(chunks)]


def wrong(said: list[Direction]) -> list[int]:
    return [chunk for chunk, direction in enumerate(said) if direction.axes != (0, 0, 1)]


def test_it_is_wrong_as_often_as_asked_and_keeps_the_gripper() -> None:
    said = listen(0.3, 0, 4000)
    assert len(wrong(said)) / 4000 == pytest.approx(0.3, abs=0.03)
    assert {direction.gripper for direction in said} == {"open"}
    assert len({direction.axes for direction in said}) == 6  # right, and five ways to be wrong
    assert wrong(listen(0.0, 0)) == []
    assert len(wrong(listen(1.0, 0))) == 400


def test_a_seed_makes_the_same_mistakes_and_another_makes_others() -> None:
    assert listen(0.3, 5) == listen(0.3, 5)
    assert wrong(listen(0.3, 5)) != wrong(listen(0.3, 6))


def test_more_error_only_adds_mistakes() -> None:
    assert set(wrong(listen(0.2, 1))) < set(wrong(listen(0.4, 1)))


def test_late_means_deferring_and_then_saying_what_was_said_before() -> None:
    said = listen(0.0, 0, chunks=5, delay=2)
    assert [direction.defer for direction in said] == [True, True, False, False, False]
    assert [direction.amount for direction in said[2:]] == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.parametrize("arguments", [(-0.1,), (1.1,), (float("nan"),), (0.0, -1), (0.0, 1.5)])
def test_bad_input(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        UnreliableReasoner(Always(), *arguments)


def test_the_gripper_is_overruled_and_nothing_else() -> None:
    plain = Always()
    plain.reset(0)
    overruled = OverruledGripper(Always(), "hold")
    overruled.reset(0)
    for _ in range(3):
        said, heard = plain.decide({}), overruled.decide({})
        assert (heard.axes, heard.amount, heard.gripper) == (said.axes, said.amount, "hold")
    with pytest.raises(UnknownNameError, match="gripper command"):
        OverruledGripper(Always(), "shut")  # type: ignore[arg-type]
