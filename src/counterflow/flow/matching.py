"""Flow matching: the regression that a velocity field is trained with (arXiv 2210.02747; pi0, arXiv 2410.24164).

E ||v(x_t, t) - (a - x_0)||^2 with x_t = (1 - t) x_0 + t a and x_0 ~ N(0, I). Draws are made outside and passed in.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from counterflow.errors import MismatchError, UnknownNameError
from counterflow.flow.field import Field, check_count, evaluate, per_row

TimeLaw = Literal["uniform", "beta", "grid"]

BETA_ALPHA = 1.5  # arXiv 2410.24164, and pi0.py in Physical Intelligence's openpi
BETA_SCALE = 0.999


def sample_time(
    count: int,
    law: TimeLaw = "uniform",
    *,
    steps: int = 10,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw times to train at.

    Args:
        count: B, how many.
        law: "uniform" on [0, 1]; "beta": t = 0.999 (1 - u) with u ~ Beta(1.5, 1), which pi0 uses to train more at noisy
            times (its code counts time the other way round: 0.999 u + 0.001); "grid": uniform on {0, 1/K, ..., 1},
            which QGF uses (arXiv 2606.11087).
        steps: K of the grid.
        generator: where to draw from; None: torch's global one of `device`.
        device: where to draw; None: the generator's device, else the CPU.
        dtype: type of the result.

    Returns:
        (B,) times in [0, 1].

    Raises:
        UnknownNameError: no such law.
        InvalidInputError: `count` or `steps` is not a positive integer.
    """
    check_count(count, "count")
    if device is None and generator is not None:
        device = generator.device
    if law == "grid":
        check_count(steps, "steps")
        return torch.randint(0, steps + 1, (count,), generator=generator, device=device).to(dtype) / steps
    uniform = torch.rand(count, generator=generator, device=device, dtype=dtype)
    if law == "uniform":
        return uniform
    if law == "beta":
        # Beta(alpha, 1) has the distribution function u^alpha, so its inverse makes it from a uniform draw.
        return BETA_SCALE * (1 - uniform ** (1 / BETA_ALPHA))
    raise UnknownNameError("time law", str(law), ("uniform", "beta", "grid"))


def interpolate(noise: Tensor, action: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) noise + t action, (B, ...), for t (B,)."""
    time = per_row(t, action)
    return (1 - time) * noise + time * action


def matching_error(field: Field, action: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the squared error (v(x_t, t) - (action - noise))^2 of every entry.

    Args:
        field: velocity field.
        action: (B, ...) data.
        noise: (B, ...) draws of N(0, I).
        t: (B,) times in [0, 1], see `sample_time`.

    Returns:
        (B, ...), for callers that weigh or reduce it in their own way; `matching_loss` is its mean.

    Raises:
        MismatchError: shapes don't fit together.
    """
    if noise.shape != action.shape or t.shape != action.shape[:1]:
        raise MismatchError(
            f"action has shape {tuple(action.shape)}, noise {tuple(noise.shape)}, t {tuple(t.shape)}; "
            f"expected noise like action and t ({len(action)},)."
        )
    return (evaluate(field, interpolate(noise, action, t), t) - (action - noise)) ** 2


def matching_loss(field: Field, action: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the flow-matching loss: the mean squared error of the velocity.

    Args:
        field: velocity field.
        action: (B, ...) data, e.g. chunks (B, H, A).
        noise: (B, ...) draws of N(0, I).
        t: (B,) times in [0, 1], see `sample_time`.
        mask: which entries count (true or 1), in the leading dimensions of `action`: (B,), (B, H) for the rows of a
            chunk that lie before its episode's end, or (B, H, A). The mean is over what counts; zero when nothing does.

    Returns:
        A single number (), differentiable.

    Raises:
        MismatchError: shapes don't fit together.
    """
    if mask is None:
        return matching_error(field, action, noise, t).mean()
    if mask.shape != action.shape[: mask.ndim]:
        raise MismatchError(
            f"mask has shape {tuple(mask.shape)}; expected leading dimensions of action's {tuple(action.shape)}."
        )
    weight = mask.reshape(mask.shape + (1,) * (action.ndim - mask.ndim)).to(action.dtype).expand_as(action)
    # Padding may hold anything, and 0 * NaN is NaN, in gradients too: it is taken out before the field sees it.
    action = torch.where(weight > 0, action, 0.0)
    return (matching_error(field, action, noise, t) * weight).sum() / weight.sum().clamp(min=1)
