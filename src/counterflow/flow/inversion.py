"""The noise that denoises to a given action.

Euler *reversal* (`counterflow.flow.reverse`) only comes near it, which Flow Reversal Steering wants. Where the noise
must reproduce the action (offline noise labels, corrections), `invert` solves each Euler step exactly, as FlowDAgger
does (arXiv 2607.08877), and `refine` searches by gradient where no exact answer exists.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor

from counterflow.errors import InvalidInputError
from counterflow.flow.field import (
    Field,
    check_count,
    check_differentiation,
    check_like,
    check_state,
    evaluate,
    flatten_rows,
    inspectable,
    per_row,
)
from counterflow.flow.solvers import denoise, reverse, time_grid

MEMORY = 5  # past points that a sweep learns from


@overload
def invert(
    field: Field,
    action: Tensor,
    steps: int,
    iterations: int = ...,
    *,
    tolerance: float = ...,
    max_iterations: int = ...,
    return_residual: Literal[False] = ...,
) -> Tensor: ...
@overload
def invert(
    field: Field,
    action: Tensor,
    steps: int,
    iterations: int = ...,
    *,
    tolerance: float = ...,
    max_iterations: int = ...,
    return_residual: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def invert(
    field: Field,
    action: Tensor,
    steps: int,
    iterations: int = 5,
    *,
    tolerance: float = 1e-9,
    max_iterations: int = 100,
    return_residual: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Invert the discrete Euler map: `denoise(field, invert(field, action, K), K)` is `action`.

    From i = K-1 down to 0 it solves x_i = x_{i+1} - v(x_i, i/K)/K, starting at the Euler reversal's guess (arXiv
    2607.08877). The plain fixed point contracts by |dv/dx|/K a sweep, about 0.1 to 0.3 for a trained policy at K = 10,
    and fails near or above 1. So every sweep here is Anderson-accelerated (Walker and Ni, SIAM Journal on Numerical
    Analysis 49, 2011), starts from the best point so far and is halved while it doesn't help. The first sweep is the
    plain one, and no step ever ends further from its solution than it began.

    Each row stops moving once it has converged, so its noise does not depend on the rest of the batch. Not
    differentiable: the result is detached. After the first `iterations` sweeps of a step the host waits for the device
    once a sweep; on a CPU there is nothing to wait for, and a step is over as soon as all rows have converged.

    Args:
        field: velocity field; called K (2 + iterations) times or more, on a CPU 3 K times or more.
        action: (B, ...) the actions to reproduce.
        steps: K, the Euler steps that the noise will be denoised with.
        iterations: sweeps that each step takes in any case (FlowDAgger: 3 to 5), but for a CPU's rows that have converged.
        tolerance: a row's step has converged when no entry is off by more than `tolerance` times the row's largest
            entry (or 1 if that is larger); never finer than four rounding units of action's type.
        max_iterations: sweeps after which a step gives up on the rows that have not converged. At `iterations` or
            below, the cost is fixed (on a CPU: at most that) and the host is left out.
        return_residual: also return how far the round trip misses (K more evaluations).

    Returns:
        (B, ...) the noise; with `return_residual` also (B,), the largest absolute entry of denoise(noise) - action. A
        large residual means that no noise was found: the action is out of the discrete flow's reach, or K is too small
        for the field.

    Raises:
        InvalidInputError: `action`, `steps`, `iterations`, `tolerance` or `max_iterations` is not as described.
        MismatchError: the field's output is not shaped like its input.
    """
    check_state(action, "action")
    check_count(iterations, "iterations")
    check_count(max_iterations, "max_iterations")
    if not tolerance > 0:
        raise InvalidInputError(f"tolerance is {tolerance!r}; expected a positive number, e.g. 1e-6.")
    tolerance = max(tolerance, 4 * torch.finfo(action.dtype).eps)
    with torch.no_grad():
        noise = action
        for t, earlier_t in pairwise(time_grid(action, steps).flip(0).unbind()):
            noise = _invert_step(field, noise, earlier_t, t, iterations, max_iterations, tolerance)
        if not return_residual:
            return noise
        return noise, flatten_rows(denoise(field, noise, steps) - action).abs().amax(1)


def _invert_step(
    field: Field, end: Tensor, t: Tensor, next_t: Tensor, iterations: int, max_iterations: int, tolerance: float
) -> Tensor:
    """Solve x + (next_t - t) v(x, t) = end for x; all (B, ...), times (B,)."""
    width = per_row(next_t - t, end)
    allowed = tolerance * flatten_rows(end).abs().amax(1).clamp(min=1)

    def miss(x: Tensor) -> Tensor:
        return end - width * evaluate(field, x, t) - x

    best = end - width * evaluate(field, end, next_t)
    best_miss = miss(best)
    best_error = flatten_rows(best_miss).abs().amax(1)
    scale = torch.ones_like(best_error)
    points, misses = [best], [best_miss]
    most = max(iterations, max_iterations)
    at_no_cost = inspectable(end)  # what has converged stays where it is, looked at or not
    for sweep in range(1, most + 1):
        candidate = best + per_row(scale, best) * _accelerate(best, best_miss, points, misses)
        candidate_miss = miss(candidate)
        error = flatten_rows(candidate_miss).abs().amax(1)
        sound = per_row(torch.isfinite(error), best)  # a wild candidate must not spoil the memory
        points = [*points[1 - MEMORY :], torch.where(sound, candidate, best)]
        misses = [*misses[1 - MEMORY :], torch.where(sound, candidate_miss, best_miss)]

        better = (error < best_error) & (best_error > allowed)
        best = torch.where(per_row(better, best), candidate, best)
        best_miss = torch.where(per_row(better, best), candidate_miss, best_miss)
        best_error = torch.where(better, error, best_error)
        scale = torch.where(better, (2 * scale).clamp(max=1), scale / 2)
        if (sweep >= iterations or at_no_cost) and sweep < most and not (best_error > allowed).any():
            break
    return best


def _accelerate(best: Tensor, best_miss: Tensor, points: list[Tensor], misses: list[Tensor]) -> Tensor:
    """Return Anderson's step from `best` (B, ...): the miss, corrected by how it differs at past points.

    The correction is the least-squares solution of (differences of misses) c = miss, solved for each row through its
    small normal equations in float64, with a little ridge because differences become alike (or zero) towards
    convergence.
    """
    point_differences = torch.stack([flatten_rows(point - best) for point in points], dim=2)  # (B, n, M)
    miss_differences = torch.stack([flatten_rows(miss - best_miss) for miss in misses], dim=2)
    wide = miss_differences.double()
    gram = wide.mT @ wide
    ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).sum(1) + 1e-30
    gram = gram + ridge[:, None, None] * torch.eye(len(points), dtype=gram.dtype, device=gram.device)
    # solve_ex, since solve waits for the device to report singular systems; the ridge rules them out
    coefficients, _ = torch.linalg.solve_ex(gram, wide.mT @ flatten_rows(best_miss).double()[:, :, None])
    correction = torch.bmm(point_differences + miss_differences, coefficients.to(best.dtype))
    return best_miss - correction.reshape(best.shape)


def refine(
    field: Field,
    action: Tensor,
    steps: int,
    noise: Tensor | None = None,
    iterations: int = 100,
    learning_rate: float = 0.05,
    penalty: float = 0.0,
    *,
    solver: str = "euler",
    weight: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """Search the noise w that minimises ||denoise(w) - action||^2 + penalty ||w||^2, by Adam through the denoising.

    With weights p and a centre c it minimises sum p (denoise(w) - action)^2 + penalty ||w - c||^2: the most likely noise, if the
    action was read off with variance 1 / p and the noise was expected at c.

    Each row keeps the best noise that it has seen, so none is returned that is worse than its start. The field's
    parameters get no gradients. Rows do not influence each other.

    Args:
        field: velocity field, differentiable in x.
        action: (B, ...) the actions to approach.
        steps: K, the steps that the noise will be denoised with.
        noise: (B, ...) where to begin; None: the Euler reversal of `action` in K steps.
        iterations: Adam's updates; each costs one denoising and its gradient.
        learning_rate: Adam's, in units of the noise.
        penalty: lambda >= 0, what a squared unit of noise may cost in squared error; keeps the noise likely under N(0,
        I).
        solver: the one that the noise will be denoised with.
        weight: p >= 0, shaped like `action`: what a squared error of each entry counts; None: 1.
        centre: c, shaped like `action`: what the penalty draws the noise to; None: 0.

    Returns:
        (B, ...) the noise, detached.

    Raises:
        InvalidInputError: an argument is not as described, or the call is inside `torch.inference_mode` (use
        `torch.no_grad`).
        MismatchError: `noise`, `weight` or `centre` is not shaped like `action`, or the field's output not like its input.
        UnknownNameError: no such solver.
    """
    check_state(action, "action")
    check_count(iterations, "iterations")
    if not learning_rate > 0:
        raise InvalidInputError(f"learning_rate is {learning_rate!r}; expected a positive number, e.g. 0.05.")
    if not penalty >= 0:
        raise InvalidInputError(f"penalty is {penalty!r}; expected zero or a positive number.")
    check_differentiation("refine")
    action = action.detach()
    if noise is None:
        with torch.no_grad():
            noise = reverse(field, action, steps, solver)
    check_like(noise, "noise", action, "action")
    for given, name in ((weight, "weight"), (centre, "centre")):
        if given is not None:
            check_like(given, name, action, "action")

    def objective(candidate: Tensor) -> Tensor:
        missed = (denoise(field, candidate, steps, solver) - action) ** 2
        strayed = candidate if centre is None else candidate - centre
        return flatten_rows(missed if weight is None else weight * missed).sum(1) + penalty * (
            flatten_rows(strayed) ** 2
        ).sum(1)

    best = noise.detach()
    best_value = torch.full_like(flatten_rows(best).sum(1), math.inf)
    latent = best.clone().requires_grad_()
    optimiser = torch.optim.Adam([latent], lr=learning_rate)
    for _ in range(iterations):
        with torch.enable_grad():
            value = objective(latent)
            (latent.grad,) = torch.autograd.grad(value.sum(), latent)
        best, best_value = _keep_better(best, best_value, latent.detach(), value.detach())
        optimiser.step()
    with torch.no_grad():
        return _keep_better(best, best_value, latent.detach(), objective(latent))[0]


def _keep_better(best: Tensor, best_value: Tensor, candidate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each row, whichever of the two has the lower value (B,), and that value."""
    better = value < best_value
    return torch.where(per_row(better, best), candidate, best), torch.where(better, value, best_value)
