"""Ranges and names that settings are checked against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.checks import COUNT, FRACTION, NOT_NEGATIVE, RATE, SHARE, Range, check_name, check_names, check_numbers
from counterflow.errors import InvalidInputError, UnknownNameError

Colour = Literal["red", "green"]


@dataclass(frozen=True)
class Settings:
    """Some of each kind."""

    steps: int = 3
    rest: int = 1
    rate: float = 0.5
    name: Colour = "red"
    loose: object = None


@pytest.mark.parametrize(
    ("one", "inside", "outside", "said"),
    [
        (COUNT, [1, 7], [0, -1, 1.0, 1.5, True, "1", None, float("nan")], "an integer of at least 1"),
        (SHARE, [0, 1, 0.5, np.float32(0.5)], [-0.1, 1.1, float("nan"), True], "a number from 0 to 1"),
        (RATE, [1, 1e-9], [0, 0.0, 1.01, None], "a number above 0 and at most 1"),
        (FRACTION, [0.5], [0, 1], "a number above 0 and below 1"),
        (NOT_NEGATIVE, [0, 1e300], [-1e-9, float("inf"), float("nan")], "a finite number of at least 0"),
        (Range(), [-5, 0.1], [float("inf"), -float("inf"), float("nan"), "x"], "a finite number"),
        (Range(0, 1, below=True), [0, 0.99], [1], "a number of at least 0 and below 1"),
        (Range(high=3), [-100, 3], [3.1], "a finite number at most 3"),
        (Range(0.05, 60, unit="seconds"), [0.05, 60], [61], "a number from 0.05 to 60 (seconds)"),
    ],
)
def test_ranges_hold_what_they_say(one: Range, inside: list[object], outside: list[object], said: str) -> None:
    assert str(one) == said
    for value in inside:
        assert value in one
        one.check("it", value)
    for value in outside:
        assert value not in one
        with pytest.raises(InvalidInputError) as caught:
            one.check("it", value, "Give another.")
        assert str(caught.value) == f"it is {value!r}; expected {said}. Give another."


@given(st.floats(-10, 10), st.floats(0, 5), st.floats(-20, 20), st.booleans(), st.booleans())
def test_ends_are_out_where_they_are_open(low: float, width: float, value: float, above: bool, below: bool) -> None:
    high = low + width
    expected = (low < value if above else low <= value) and (value < high if below else value <= high)
    assert (value in Range(low, high, above=above, below=below)) == expected


def test_numpys_integers_count_but_are_no_settings() -> None:
    COUNT.check("steps", np.int64(3))
    with pytest.raises(InvalidInputError, match=r"steps is np.int64\(3\); expected an integer of at least 1"):
        COUNT.check_all(Settings(steps=np.int64(3)), "steps")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="steps is np.int64"):
        COUNT.check("steps", np.int64(3), written=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(steps=0), "steps is 0; expected an integer of at least 1."),
        (Settings(steps=True), "steps is True; "),
        (Settings(steps=2.0), "steps is 2.0; "),  # type: ignore[arg-type]
        (Settings(rest=-1), "rest is -1; expected an integer of at least 0."),
        (Settings(rate=-0.1), "rate is -0.1; expected a finite number of at least 0."),
        (Settings(rate=float("nan")), "rate is nan; "),
    ],
)
def test_all_numbers_of_a_class_of_settings_are_looked_at(settings: Settings, message: str) -> None:
    check_numbers(Settings(rest=0, rate=0.0), or_zero=("rest",))
    with pytest.raises(InvalidInputError) as caught:
        check_numbers(settings, or_zero=("rest",))
    assert str(caught.value).startswith(message)


def test_names_are_those_of_a_literal() -> None:
    check_name("colour", "red", Colour)
    check_names(Settings(), name=Colour)
    with pytest.raises(UnknownNameError, match="unknown colour 'gren': did you mean 'green'"):
        check_name("colour", "gren", Colour)
    with pytest.raises(UnknownNameError, match="unknown name 'blue': known: green, red"):
        check_names(Settings(name="blue"), name=Colour)  # type: ignore[arg-type]
