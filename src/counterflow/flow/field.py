"""What a velocity field is, and what every function of this room checks before it calls one.

Convention of the whole library: t = 0 is noise, t = 1 is action, x_t = (1 - t) x_0 + t a, and the field regresses a -
x_0. Rows of a batch never touch: row b of v(x, t) depends on row b of x and t alone.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from counterflow.checks import COUNT
from counterflow.errors import InvalidInputError, MismatchError


class Field(Protocol):
    """A velocity field: anything that can be called with x (B, ...) and t (B,) in [0, 1] and returns v, shaped like x.

    t has the type and the device of x.

    Whatever else the velocity depends on (an observation, a language feature) is closed over, one row of it for each
    row of x. A plain `torch.nn.Module` with this signature is a field.
    """

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor:
        """Return the velocity at state `x` and time `t`."""
        ...


def evaluate(field: Field, x: Tensor, t: Tensor) -> Tensor:
    """Return `field(x, t)` in x's type (under autocast a field answers in another), once its shape has been checked.

    Raises:
        MismatchError: the field returned something else than one velocity for each entry of x.
    """
    velocity = field(x, t.to(x.dtype))
    if velocity.shape != x.shape:
        raise MismatchError(
            f"the field returned a velocity of shape {tuple(velocity.shape)} for a state of shape {tuple(x.shape)}; "
            "expected the same shape. Check the field's output layer, or that x has the shape that it was trained on."
        )
    return velocity.to(x.dtype)


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """View `values` (B,) as (B, 1, ..., 1) in x's type, or as booleans, so that each meets its own row of x (B, ...)."""
    view = values.reshape(values.shape + (1,) * (x.ndim - 1))
    return view if view.dtype == torch.bool else view.to(x.dtype)


def flatten_rows(x: Tensor) -> Tensor:
    """View x (B, ...) as (B, n); a batch of scalars (B,) becomes (B, 1)."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def inspectable(x: Tensor) -> bool:
    """Whether the values of `x` may be looked at now.

    Only on the CPU and outside `torch.compile`: elsewhere a look stalls the device, or breaks the graph. Shapes and
    types are checked everywhere; they are free.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_state(x: Tensor, name: str) -> None:
    """Check that `x`, called `name` by the caller, can be integrated.

    Raises:
        InvalidInputError: x is not a floating-point tensor with a batch dimension, or (on the CPU) holds NaN or
        infinity.
    """
    if not isinstance(x, Tensor):
        raise InvalidInputError(f"{name} is a {type(x).__name__}; expected a torch tensor of shape (B, ...).")
    if not x.is_floating_point():
        raise InvalidInputError(f"{name} has type {x.dtype}; expected floating point, e.g. {name}.float().")
    if x.ndim == 0:
        raise InvalidInputError(f"{name} is a single number; expected a leading batch dimension, e.g. {name}[None].")
    if inspectable(x) and not torch.isfinite(x).all():
        bad = (~torch.isfinite(x)).sum().item()
        raise InvalidInputError(
            f"{name} holds {bad} values of {x.numel()} that are NaN or infinite; expected finite numbers. "
            "Look for them where the tensor was made."
        )


def check_like(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Check that `x` is a valid state of the same shape as `other`.

    Raises:
        InvalidInputError: x can't be integrated.
        MismatchError: the shapes differ.
    """
    check_state(x, name)
    if x.shape != other.shape:
        raise MismatchError(
            f"{name} has shape {tuple(x.shape)}, {other_name} {tuple(other.shape)}; expected the same shape for both."
        )


def check_count(count: int, name: str) -> None:
    """Check that `count`, called `name` by the caller, is a positive integer.

    Raises:
        InvalidInputError: it is not.
    """
    COUNT.check(name, count, written=True)


def check_differentiation(caller: str) -> None:
    """Check that gradients can be taken here, on behalf of the function `caller`.

    Raises:
        InvalidInputError: inference mode is on, inside of which no graph can be recorded.
    """
    if torch.is_inference_mode_enabled():
        raise InvalidInputError(
            f"{caller} differentiates the field, which torch.inference_mode forbids; use torch.no_grad instead."
        )
