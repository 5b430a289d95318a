"""Flows whose field, transported points and log-density are known in closed form: the truth to test against.

For independent noise x_0 ~ N(0, I) and data a, the field that flow matching converges to is the conditional mean E[a -
x_0 | x_t = x] (arXiv 2210.02747). For Gaussian data, and mixtures of Gaussians, it can be written down. The
classes below are fields (see `counterflow.flow.Field`) over rows of any shape; they follow the type and device of what
they are called with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from counterflow.errors import InvalidInputError, MismatchError
from counterflow.flow.field import flatten_rows, per_row


class GaussianField:
    """The exact flow from N(0, I) to N(mean, diag(std^2)).

    With s_t^2 = (1 - t)^2 + t^2 std^2 the state is N(t mean, s_t^2), the velocity mean + (t std^2 - (1 - t)) / s_t^2 (x
    - t mean), and a point x_0 is carried to t mean + s_t x_0.

    Args:
        mean: (...) the data's mean; its shape is that of one row.
        std: (...) or a number: the data's standard deviation in each entry, positive.

    Raises:
        InvalidInputError: std is not positive, or does not fit mean.
    """

    def __init__(self, mean: Tensor, std: Tensor | float) -> None:
        """Check and keep the data's law."""
        self.mean = mean
        self.std = _positive_std(mean, std)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, ...) at state x (B, ...) and time t (B,)."""
        _check_rows(x, self.mean.shape)
        return _gaussian_velocity(x, per_row(t, x), self.mean.to(x), self.std.to(x))

    def transport(self, noise: Tensor, t: Tensor | float = 1.0) -> Tensor:
        """Carry `noise` (B, ...) from time 0 to time `t` (a number or (B,)), exactly."""
        _check_rows(noise, self.mean.shape)
        time = per_row(torch.as_tensor(t).to(noise).expand(len(noise)), noise)
        return time * self.mean.to(noise) + _spread(time, self.std.to(noise)).sqrt() * noise

    def log_prob(self, action: Tensor) -> Tensor:
        """Return the data's log-density (B,), in nats, at `action` (B, ...)."""
        _check_rows(action, self.mean.shape)
        return flatten_rows(_log_density(action, self.mean.to(action), self.std.to(action))).sum(1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `count` rows of data (count, ...) on the device of `mean`."""
        noise = torch.randn(
            (count, *self.mean.shape), generator=generator, dtype=self.mean.dtype, device=self.mean.device
        )
        return self.mean + self.std * noise


class GaussianMixtureField:
    """The exact flow from N(0, I) to a mixture of M Gaussians with diagonal covariances.

    The velocity is the mean of the components' (see `GaussianField`), weighted with the probability that x_t came from
    each. With modes at -2 and +2, variance 0.1 and weights 0.8 and 0.2 this is the one-dimensional toy of the Flow
    Reversal Steering project page (arXiv 2606.13675).

    Args:
        means: (M, ...) one mean for each component; means[0].shape is that of one row.
        stds: (M, ...), or a number for all: standard deviations, positive.
        weights: (M,) positive, normalised here; None: equal.

    Raises:
        InvalidInputError: a standard deviation or weight is not positive, or the shapes do not fit.
    """

    def __init__(self, means: Tensor, stds: Tensor | float, weights: Tensor | None = None) -> None:
        """Check and keep the data's law."""
        self.means = means
        self.stds = _positive_std(means, stds)
        weights = means.new_ones(len(means)) if weights is None else weights
        if weights.shape != means.shape[:1] or not (weights > 0).all():
            raise InvalidInputError(
                f"weights is {weights.tolist()}; expected {len(means)} positive numbers, one for each component."
            )
        self.log_weights = (weights / weights.sum()).log()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, ...) at state x (B, ...) and time t (B,)."""
        _check_rows(x, self.means.shape[1:])
        means, stds = self.means.to(x), self.stds.to(x)
        time = per_row(t, x)[:, None]
        velocities = _gaussian_velocity(x[:, None], time, means, stds)  # (B, M, ...)
        responsibilities = self._joint_log_prob(x, time * means, _spread(time, stds).sqrt()).softmax(1)  # (B, M)
        return (responsibilities.reshape(responsibilities.shape + (1,) * (x.ndim - 1)) * velocities).sum(1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Return the data's log-density (B,), in nats, at `action` (B, ...)."""
        _check_rows(action, self.means.shape[1:])
        return self._joint_log_prob(action, self.means.to(action), self.stds.to(action)).logsumexp(1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `count` rows of data (count, ...) on the device of `means`."""
        component = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(
            (count, *self.means.shape[1:]), generator=generator, dtype=self.means.dtype, device=self.means.device
        )
        return self.means[component] + self.stds[component] * noise

    def _joint_log_prob(self, x: Tensor, means: Tensor, stds: Tensor) -> Tensor:
        """Return log weight + log-density (B, M) of x (B, ...) for each component (M, ...) or (B, M, ...)."""
        entries = _log_density(x[:, None], means, stds)  # (B, M, ...)
        densities = flatten_rows(entries.flatten(0, 1)).sum(1)
        return self.log_weights.to(x) + densities.reshape(entries.shape[:2])


def _spread(time: Tensor, std: Tensor) -> Tensor:
    """Return the variance (1 - t)^2 + t^2 std^2 of x_t given the component that the data came from."""
    return (1 - time) ** 2 + (time * std) ** 2


def _gaussian_velocity(x: Tensor, time: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return E[a - x_0 | x_t = x] for Gaussian data; all arguments broadcast."""
    return mean + (time * std**2 - (1 - time)) / _spread(time, std) * (x - time * mean)


def _log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log N(x; mean, std^2) of every entry; all arguments broadcast."""
    return -(((x - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2


def _positive_std(mean: Tensor, std: Tensor | float) -> Tensor:
    """Return `std` as a positive tensor of mean's shape."""
    given = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
    try:
        given = given.expand_as(mean)
    except RuntimeError as error:
        raise InvalidInputError(
            f"the standard deviation has shape {tuple(given.shape)}; expected a number or {tuple(mean.shape)}."
        ) from error
    if not (given > 0).all():
        raise InvalidInputError(f"the smallest standard deviation is {given.min().item()}; expected positive numbers.")
    return given


def _check_rows(x: Tensor, row_shape: torch.Size) -> None:
    """Check that the rows of x have the shape of the data."""
    if x.shape[1:] != row_shape:
        raise MismatchError(f"x has shape {tuple(x.shape)}; expected (B, {', '.join(map(str, row_shape))}).")
