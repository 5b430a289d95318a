"""Follow a velocity field along time: noise to action (`denoise`), action to noise (`reverse`), or any grid of times.

Flow policies are deployed with a handful of fixed Euler steps, so what matters here is a named number of equal steps
rather than an adaptive solver: the number is part of the policy's behaviour. With few steps the round trip `reverse`
then `denoise` is lossy and pulls an action towards the policy's modes: this loss is what Flow Reversal Steering uses
(arXiv 2606.13675).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.flow.field import Field, check_count, check_state, evaluate, inspectable, per_row

Step = Callable[[Field, Tensor, Tensor, Tensor], Tensor]
"""One step: (field, x (B, ...), t (B,), next t (B,)) -> x at the next t. Backwards in time where next t < t."""


def euler_step(field: Field, x: Tensor, t: Tensor, next_t: Tensor) -> Tensor:
    """Take one explicit Euler step (order 1): the velocity is that of the point being left."""
    return x + per_row(next_t - t, x) * evaluate(field, x, t)


def midpoint_step(field: Field, x: Tensor, t: Tensor, next_t: Tensor) -> Tensor:
    """Take one explicit midpoint step (order 2, two evaluations)."""
    middle_t = (t + next_t) / 2
    middle = euler_step(field, x, t, middle_t)
    return x + per_row(next_t - t, x) * evaluate(field, middle, middle_t)


def rk4_step(field: Field, x: Tensor, t: Tensor, next_t: Tensor) -> Tensor:
    """Take one step of the classical Runge-Kutta method (order 4, four evaluations)."""
    middle_t = (t + next_t) / 2
    width = per_row(next_t - t, x)
    first = evaluate(field, x, t)
    second = evaluate(field, x + width / 2 * first, middle_t)
    third = evaluate(field, x + width / 2 * second, middle_t)
    fourth = evaluate(field, x + width * third, next_t)
    return x + width / 6 * (first + 2 * second + 2 * third + fourth)


SOLVERS: dict[str, Step] = {"euler": euler_step, "midpoint": midpoint_step, "rk4": rk4_step}


def denoise(field: Field, noise: Tensor, steps: int, solver: str = "euler", *, start: float | Tensor = 0.0) -> Tensor:
    """Follow the field from noise to action, in equal steps.

    With "euler": x <- x + v(x, i/K)/K for i = 0..K-1. Differentiable in `noise` and in the field's parameters.

    Args:
        field: velocity field; called `steps` times with "euler", twice that with "midpoint", four times with "rk4".
        noise: (B, ...) the state at time `start`; at 0 a draw of N(0, I).
        steps: K, how many steps, whatever the start.
        solver: "euler" (what flow policies are deployed with), "midpoint" or "rk4".
        start: time at which `noise` lies on the flow, in [0, 1]: one number, or (B,) one for each row. A row that
            starts at 1 stays where it is.

    Returns:
        (B, ...) the state at t = 1.

    Raises:
        UnknownNameError: no such solver.
        InvalidInputError: `noise`, `steps` or `start` is not as described. (On a GPU and inside `torch.compile` values
            are not looked at, only types and shapes: NaN there comes out as NaN.)
        MismatchError: the field's output is not shaped like its input.
    """
    check_state(noise, "noise")
    return _follow(field, noise, _equal_steps(noise, steps, start, "start"), solver)


def reverse(field: Field, action: Tensor, steps: int, solver: str = "euler", *, end: float | Tensor = 0.0) -> Tensor:
    """Follow the field backwards from action to noise, in equal steps.

    With "euler" this is the reversal of Flow Reversal Steering (arXiv 2606.13675): x <- x - v(x, t)/K from t = 1. It
    evaluates the field at the later point of each step, where `denoise` evaluates it at the earlier one, so the two are
    not each other's inverse; `counterflow.flow.invert` is. Differentiable in `action` and in the field's parameters.

    Args:
        field: velocity field.
        action: (B, ...) the state at t = 1.
        steps: K, how many steps, whatever the end.
        solver: "euler", "midpoint" or "rk4"; the latter two make the round trip more faithful.
        end: time in [0, 1] at which to stop: one number, or (B,) one for each row.

    Returns:
        (B, ...) the state at t = `end`.

    Raises:
        UnknownNameError, InvalidInputError, MismatchError: as `denoise`.
    """
    check_state(action, "action")
    return _follow(field, action, _equal_steps(action, steps, end, "end").flip(0), solver)


def integrate(field: Field, x: Tensor, times: Tensor | Sequence[float], solver: str = "euler") -> Tensor:
    """Follow the field over any grid of times, forwards or backwards.

    Args:
        field: velocity field.
        x: (B, ...) the state at the first time.
        times: (N + 1,) for all rows or (N + 1, B) for each its own, in [0, 1]: one step between each two neighbours.
        solver: "euler", "midpoint" or "rk4".

    Returns:
        (B, ...) the state at the last time.

    Raises:
        UnknownNameError, InvalidInputError, MismatchError: as `denoise`.
    """
    check_state(x, "x")
    return _follow(field, x, _given_times(x, times), solver)


def trajectory(field: Field, x: Tensor, times: Tensor | Sequence[float], solver: str = "euler") -> Tensor:
    """Follow the field as `integrate` does, and keep every state on the way.

    Returns:
        (N + 1, B, ...) the states at `times`; the first is `x`.
    """
    check_state(x, "x")
    step = _find_solver(solver)
    states = [x]
    for t, next_t in pairwise(_given_times(x, times).unbind()):
        states.append(step(field, states[-1], t, next_t))
    return torch.stack(states)


def time_grid(x: Tensor, steps: int, start: float | Tensor = 0.0) -> Tensor:
    """Return the times (steps + 1, B) at which `denoise` visits the rows of x (B, ...), equally spaced up to 1."""
    return _equal_steps(x, steps, start, "start")


def _follow(field: Field, x: Tensor, times: Tensor, solver: str) -> Tensor:
    """Take a step between each two neighbours of `times` (N + 1, B); return the last state."""
    step = _find_solver(solver)
    state = x
    for t, next_t in pairwise(times.unbind()):
        state = step(field, state, t, next_t)
    return state


def _find_solver(solver: str) -> Step:
    """Look a solver up by its name."""
    if solver not in SOLVERS:
        raise UnknownNameError("solver", str(solver), SOLVERS)
    return SOLVERS[solver]


def _equal_steps(x: Tensor, steps: int, start: float | Tensor, name: str) -> Tensor:
    """Return (steps + 1, B) times from `start` to 1, in x's type (at least float32) and on its device."""
    check_count(steps, "steps")
    dtype = torch.promote_types(x.dtype, torch.float32)
    fractions = torch.arange(steps + 1, dtype=dtype, device=x.device)[:, None] / steps
    if isinstance(start, Tensor):
        if start.shape != x.shape[:1]:
            raise InvalidInputError(
                f"{name} has shape {tuple(start.shape)}; expected a number, or one for each row: ({len(x)},)."
            )
        _check_times(start, name)
        first = start.to(x.device, dtype)
        return (first + (1 - first) * fractions).clamp(0, 1)
    if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start <= 1:
        raise InvalidInputError(f"{name} is {start!r}; expected a time in [0, 1]: 0 is noise, 1 is action.")
    return (start + (1 - start) * fractions).clamp(0, 1).expand(-1, len(x))


def _given_times(x: Tensor, times: Tensor | Sequence[float]) -> Tensor:
    """Return the caller's grid as (N + 1, B), in x's type (at least float32) and on its device."""
    grid = torch.as_tensor(times, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if grid.ndim not in (1, 2) or len(grid) < 2 or (grid.ndim == 2 and grid.shape[1] != len(x)):
        raise InvalidInputError(
            f"times has shape {tuple(grid.shape)}; expected (N + 1,) or (N + 1, {len(x)}) with at least two times."
        )
    _check_times(grid, "times")
    return grid.clamp(0, 1) if grid.ndim == 2 else grid.clamp(0, 1)[:, None].expand(-1, len(x))


def _check_times(times: Tensor, name: str) -> None:
    """Check that every time is in [0, 1], where values may be looked at."""
    if inspectable(times) and not ((times >= 0) & (times <= 1)).all():
        raise InvalidInputError(
            f"{name} goes from {times.min().item():.6g} to {times.max().item():.6g}; "
            "expected times in [0, 1]: 0 is noise, 1 is action."
        )
