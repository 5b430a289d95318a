"""The log-probability that a flow gives to an action (continuous normalising flows, arXiv 1806.07366 and 1810.01367).

log p(a) = log N(x_0; 0, I) - integral over t in [0, 1] of div v(x_t, t), along the path x_t that ends in x_1 = a.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.flow.field import Field, check_count, check_differentiation, check_state, evaluate, flatten_rows
from counterflow.flow.solvers import integrate, time_grid

Divergence = Literal["auto", "exact", "hutchinson"]

EXACT_LIMIT = 128  # entries of a row up to which "auto" is exact: an evaluation then costs as many gradients


def log_prob(
    field: Field,
    action: Tensor,
    steps: int,
    solver: str = "rk4",
    *,
    divergence: Divergence = "auto",
    probes: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the log-density of `action` under the flow, in nats.

    The state and the divergence are integrated together, by the same solver, so the result has the solver's order of
    accuracy. It is the density of the continuous flow, of which a policy that denoises with K Euler steps is an
    approximation: choose `steps` for accuracy, not to match the policy. Differentiable in `action` and in the field's
    parameters; under `torch.no_grad` it keeps no graph.

    Args:
        field: velocity field, differentiable in x. Each evaluation adds one batched backward pass through it.
        action: (B, ...) in the space of the flow; a density in other units differs by the log-determinant of the map.
        steps: equal steps from t = 1 to t = 0.
        solver: "rk4", "midpoint" or "euler".
        divergence: "exact" takes as many gradients as a row has entries, all at once; "hutchinson" estimates it from
            `probes` random sign vectors (arXiv 1810.01367), unbiased for the integral of the divergence, drawn once and
            kept along the path; "auto" is exact up to 128 entries a row.
        probes: how many random vectors Hutchinson's estimate averages over.
        generator: where the probes are drawn from, on its own device; None: torch's global one.

    Returns:
        (B,) log-densities.

    Raises:
        InvalidInputError: an argument is not as described; the field can't be differentiated in x; or the call is
            inside `torch.inference_mode` (use `torch.no_grad`).
        MismatchError: the field's output is not shaped like its input.
        UnknownNameError: no such solver or divergence.
    """
    check_state(action, "action")
    check_differentiation("log_prob")
    size = math.prod(action.shape[1:])
    if divergence not in ("auto", "exact", "hutchinson"):
        raise UnknownNameError("divergence", str(divergence), ("auto", "exact", "hutchinson"))
    if divergence == "exact" or (divergence == "auto" and size <= EXACT_LIMIT):
        directions = torch.eye(size, dtype=action.dtype, device=action.device)[:, None].expand(-1, len(action), -1)
        weight = 1.0
    else:
        check_count(probes, "probes")
        directions = _random_signs((probes, len(action), size), generator).to(action)
        weight = 1.0 / probes
    directions = directions.reshape(directions.shape[:1] + action.shape)

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        """Return d/dt of (x, integral of the divergence), packed in one (B, n + 1) state for the solver."""
        x = state[:, :-1].reshape(action.shape)
        velocity, traces = _velocity_and_divergence(field, x, t, directions)
        return torch.cat([flatten_rows(velocity), weight * traces[:, None]], dim=1)

    start = torch.nn.functional.pad(flatten_rows(action), (0, 1))
    with (
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
    ):  # all that double gradients work through
        final = integrate(augmented, start, time_grid(action, steps).flip(0), solver)
    noise, integral = final[:, :-1], final[:, -1]  # backwards in time, so this is minus the integral from 0 to 1
    return -(noise**2).sum(1) / 2 - size * math.log(2 * math.pi) / 2 + integral


def _velocity_and_divergence(field: Field, x: Tensor, t: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return v (B, ...) and the sum over directions e (P, B, ...) of e . (dv/dx) e, (B,).

    Rows are independent of each other, so one gradient of sum(e * v) with respect to x holds every row's own e^T
    (dv/dx). The gradients of all directions are taken in one batch. A field closes over one context row for each row of
    x; so the batch of directions must not become rows of x.
    """
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        point = x if x.requires_grad and keep_graph else x.detach().requires_grad_()
        velocity = evaluate(field, point, t)
        traces = None
        if velocity.requires_grad:
            (gradients,) = torch.autograd.grad(
                velocity,
                point,
                directions.to(velocity.dtype),
                create_graph=keep_graph,
                allow_unused=True,
                is_grads_batched=True,
            )
            traces = None if gradients is None else flatten_rows((gradients * directions).sum(0)).sum(1)
    if traces is None:
        _check_constant(field, x, t, velocity)
        traces = x.new_zeros(len(x))
    return (velocity, traces) if keep_graph else (velocity.detach(), traces.detach())


def _check_constant(field: Field, x: Tensor, t: Tensor, velocity: Tensor) -> None:
    """Check that a velocity without a gradient in x really does not change with x.

    Raises:
        InvalidInputError: it does, so its divergence would silently be taken for zero.
    """
    with torch.no_grad():
        moved = field(x + 0.1, t)
    if not torch.equal(moved, velocity.detach()):
        raise InvalidInputError(
            "the field's velocity changes with x but has no gradient in x, which log_prob needs for the divergence. "
            "Give it a field that doesn't run under torch.no_grad or torch.inference_mode and doesn't detach x."
        )


def _random_signs(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draw -1 or +1 with equal chance, on the generator's device."""
    device = None if generator is None else generator.device
    return 2.0 * torch.randint(0, 2, shape, generator=generator, device=device) - 1.0
