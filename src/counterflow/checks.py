"""What a setting may be: the ranges and the lists of names that classes of settings check when they are made.

COUNT.check_all(self, "steps", "batch_size")  # InvalidInputError: steps is 0; expected an integer of at least 1.
FRACTION.check("the discount", discount)
check_name("schedule", schedule, Schedule)  # a Literal
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args

from counterflow.errors import InvalidInputError, UnknownNameError


@dataclass(frozen=True)
class Range:
    """A range of finite numbers.

    Attributes:
        low: the least; minus infinity: there is none.
        high: the greatest; infinity: there is none.
        above: numbers have to be above `low`, which is not allowed itself.
        below: numbers have to be below `high`.
        integer: whole numbers alone. A bool is no number.
        unit: what is counted or measured, in the plural, for example "seconds".
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    integer: bool = False
    unit: str = ""

    def __contains__(self, value: Any) -> bool:
        """Say whether a value is a number of this range."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.integer else Real):
            return False
        number = float(value)
        return (
            math.isfinite(number)
            and (self.low < number if self.above else self.low <= number)
            and (number < self.high if self.below else number <= self.high)
        )

    def __str__(self) -> str:
        """Say it in words, as after "expected"."""
        kind = "an integer" if self.integer else "a number"
        if not (self.integer or (math.isfinite(self.low) and math.isfinite(self.high))):
            kind = "a finite number"
        low = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        bounds = [low] * math.isfinite(self.low) + [high] * math.isfinite(self.high)
        if len(bounds) == 2 and not (self.above or self.below):
            bounds = [f"from {self.low:g} to {self.high:g}"]
        said = f"{kind} {' and '.join(bounds)}" if bounds else kind
        return f"{said} ({self.unit})" if self.unit else said

    def check(self, name: str, value: Any, hint: str = "", *, written: bool = False) -> None:
        """Raise `InvalidInputError` unless a value is of this range.

        Args:
            name: what the value is called in the message.
            value: anything.
            hint: what to do about it, where that isn't plain from the range.
            written: the value goes into a file, where NumPy's numbers are none.
        """
        if value not in self or (written and not isinstance(value, int | float)):
            raise InvalidInputError(f"{name} is {value!r}; expected {self}.{hint and ' ' + hint}")

    def check_all(self, settings: object, *names: str) -> None:
        """Raise `InvalidInputError` unless these attributes of `settings`, which are written into files, are of this range."""
        for name in names:
            self.check(name, getattr(settings, name), written=True)


COUNT = Range(1, integer=True)
COUNT_OR_ZERO = Range(0, integer=True)
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
RATE = Range(0, 1, above=True)
"""Learning rates, discounts: 1 is allowed, 0 is not."""
FRACTION = Range(0, 1, above=True, below=True)


def check_numbers(settings: Any, or_zero: Collection[str] = ()) -> None:
    """Raise `InvalidInputError` unless every number among a dataclass's fields is plausible.

    Args:
        settings: an instance of a dataclass; fields annotated "int" are to be 1 or more, "float" finite and 0 or more.
        or_zero: integers that may be 0.
    """
    for field in dataclasses.fields(settings):
        if field.type == "int":
            (COUNT_OR_ZERO if field.name in or_zero else COUNT).check_all(settings, field.name)
        elif field.type == "float":
            NOT_NEGATIVE.check_all(settings, field.name)


def check_name(kind: str, value: Any, known: Any) -> None:
    """Raise `UnknownNameError` unless a value is one of a Literal's.

    Args:
        kind: what the value is the name of, for example "schedule".
        value: anything.
        known: a `Literal`.
    """
    if value not in get_args(known):
        raise UnknownNameError(kind, str(value), get_args(known))


def check_names(settings: object, **known: Any) -> None:
    """Raise `UnknownNameError` unless these attributes of `settings` are of their Literals."""
    for name, literal in known.items():
        check_name(name, getattr(settings, name), literal)
