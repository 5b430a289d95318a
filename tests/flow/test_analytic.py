"""The closed forms themselves, against quadrature, statistics and the continuity equation."""

from __future__ import annotations

import math

import pytest
import torch

from counterflow.errors import InvalidInputError, MismatchError
from counterflow.flow import GaussianField, GaussianMixtureField, interpolate, log_prob


def test_velocity_is_the_conditional_mean(mixture: GaussianMixtureField) -> None:
    """E[a - x_0 | x_t], integrated numerically over the data a, with x_0 = (x - t a) / (1 - t)."""
    action = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    prior = mixture.log_prob(action).exp()
    for time in (0.0, 0.2, 0.5, 0.8):
        x = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
        noise = (x[:, None] - time * action) / (1 - time)
        weight = prior * (-(noise**2) / 2).exp()
        expected = (weight * (action - noise)).sum(1) / weight.sum(1)
        torch.testing.assert_close(mixture(x, torch.full_like(x, time)), expected, atol=1e-6, rtol=0)


def test_one_component_is_the_gaussian() -> None:
    """Velocity and density agree between the two classes, over chunks."""
    torch.manual_seed(0)
    mean, std = torch.randn(4, 3), torch.rand(4, 3) + 0.2
    gaussian, one = GaussianField(mean, std), GaussianMixtureField(mean[None], std[None])
    x, t = torch.randn(6, 4, 3), torch.rand(6)
    torch.testing.assert_close(one(x, t), gaussian(x, t))
    torch.testing.assert_close(one.log_prob(x), gaussian.log_prob(x))
    expected = torch.distributions.Normal(mean, std).log_prob(x).sum((1, 2))
    torch.testing.assert_close(gaussian.log_prob(x), expected)


def test_mixture_density_agrees_with_torch() -> None:
    """Against torch.distributions, with unequal weights that need normalising."""
    torch.manual_seed(0)
    means, stds, weights = torch.randn(3, 2), torch.rand(3, 2) + 0.2, torch.tensor([1.0, 2.0, 5.0])
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights),
        torch.distributions.Independent(torch.distributions.Normal(means, stds), 1),
    )
    x = torch.randn(20, 2)
    torch.testing.assert_close(GaussianMixtureField(means, stds, weights).log_prob(x), reference.log_prob(x))


def test_the_flow_carries_the_noise_density_to_the_data_density() -> None:
    """The continuity equation holds: density along the flow equals the data's, for a mixture over chunks."""
    torch.manual_seed(0)
    field = GaussianMixtureField(torch.randn(3, 2, 2).double(), torch.rand(3, 2, 2).double() + 0.3)
    action = field.sample(16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_prob(field, action, 100), field.log_prob(action), atol=1e-5, rtol=0)


def test_samples_follow_the_law() -> None:
    """Mean, spread and component frequencies, within five standard errors."""
    generator = torch.Generator().manual_seed(0)
    gaussian = GaussianField(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).sample(20_000, generator)
    torch.testing.assert_close(gaussian.mean(0), torch.tensor([1.0, -2.0]), atol=5 * 2 / 20_000**0.5, rtol=0)
    torch.testing.assert_close(gaussian.std(0), torch.tensor([0.5, 2.0]), atol=5 * 2 / 40_000**0.5, rtol=0)
    weights = torch.tensor([1.0, 3.0])
    mixture = GaussianMixtureField(torch.tensor([-5.0, 5.0]), 0.1, weights).sample(20_000, generator)
    assert (mixture > 0).float().mean().item() == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 20_000) ** 0.5)
    assert mixture[mixture > 0].std().item() == pytest.approx(0.1, abs=5 * 0.1 / 20_000**0.5)


def test_transport_at_a_time_has_the_marginal_spread() -> None:
    """x_t of the flow has the law of x_t of the straight path between independent noise and data."""
    field = GaussianField(torch.tensor([1.0]), torch.tensor([0.3]))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40_000, 1, generator=generator)
    path = interpolate(
        torch.randn(40_000, 1, generator=generator), field.sample(40_000, generator), torch.full((40_000,), 0.6)
    )
    assert field.transport(noise, 0.6).std().item() == pytest.approx(path.std().item(), rel=0.03)
    assert field.transport(noise, 0.6).mean().item() == pytest.approx(path.mean().item(), abs=0.02)


def test_fields_follow_the_type_of_their_input() -> None:
    """Parameters in float32 serve states in float64, and rows may be single numbers."""
    field = GaussianField(torch.tensor(1.0), 0.5)
    x = torch.zeros(3, dtype=torch.float64)
    assert field(x, x).dtype == torch.float64
    assert field.log_prob(x)[0].item() == pytest.approx(-2 - math.log(0.5) - math.log(2 * math.pi) / 2)


def test_parameters_are_checked() -> None:
    """Spreads and weights must be positive and fit, rows must have the data's shape."""
    with pytest.raises(InvalidInputError, match="smallest standard deviation is 0"):
        GaussianField(torch.zeros(2), torch.tensor([0.0, 1.0]))
    with pytest.raises(InvalidInputError, match=r"standard deviation has shape \(3,\)"):
        GaussianField(torch.zeros(2), torch.ones(3))
    with pytest.raises(InvalidInputError, match="expected 2 positive numbers"):
        GaussianMixtureField(torch.zeros(2, 1), 1.0, torch.tensor([1.0, -1.0]))
    with pytest.raises(InvalidInputError, match="expected 2 positive numbers"):
        GaussianMixtureField(torch.zeros(2, 1), 1.0, torch.ones(3))
    with pytest.raises(MismatchError, match=r"x has shape \(4, 3\); expected \(B, 2\)"):
        GaussianField(torch.zeros(2), 1.0)(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(MismatchError, match=r"x has shape \(4, 3\); expected \(B, 1\)"):
        GaussianMixtureField(torch.zeros(2, 1), 1.0).log_prob(torch.zeros(4, 3))
