"""What an ensemble says as one: the lowest, the mean, or a lower confidence bound."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from counterflow.checks import Range, check_name
from counterflow.errors import UnknownNameError

Aggregation = Literal["min", "mean", "lower_confidence"]


def aggregate(values: Tensor, how: Aggregation = "min", rho: float = 1.0) -> Tensor:
    """Return the members' values (M, ...) as one (...).

    Args:
        values: (M, ...).
        how: "min" (the default of QGF's official code), "mean", or "lower_confidence": mean - rho std, the standard deviation
            that of the M values themselves (RQL, arXiv 2606.17551).
        rho: of "lower_confidence".

    Raises:
        UnknownNameError: no such aggregation.
    """
    if how == "min":
        return values.amin(0)
    if how == "mean":
        return values.mean(0)
    if how == "lower_confidence":
        return values.mean(0) - rho * values.std(0, correction=0)
    raise UnknownNameError("aggregation", str(how), get_args(Aggregation))


def check_aggregation(how: str, rho: float) -> None:
    """Refuse unknown names and numbers out of range.

    Raises:
        UnknownNameError: no such aggregation.
        InvalidInputError: rho is out of range.
    """
    check_name("aggregation", how, Aggregation)
    Range(0, 1000).check("rho of the lower confidence bound", rho)
