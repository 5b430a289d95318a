"""The log-probability of an action: against exact densities, its order, its estimator, its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.flow import Field, GaussianField, GaussianMixtureField, denoise, log_prob, reverse

MakeNetwork = Callable[..., torch.nn.Module]


def double(*values: float) -> Tensor:
    """Return a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


class TestAgainstExactDensities:
    """Flows whose density is known."""

    def test_gaussian_over_chunks(self) -> None:
        """Anisotropic, (B, H, A), in float32."""
        torch.manual_seed(0)
        field = GaussianField(torch.randn(5, 4), torch.rand(5, 4) + 0.3)
        action = field.sample(16)
        torch.testing.assert_close(log_prob(field, action, 30), field.log_prob(action), atol=1e-3, rtol=0)

    def test_mixture_in_one_dimension(self, mixture: GaussianMixtureField) -> None:
        """At the modes, between them and outside; rows are single numbers."""
        action = torch.linspace(-3.5, 3.5, 29, dtype=torch.float64)
        torch.testing.assert_close(log_prob(mixture, action, 200), mixture.log_prob(action), atol=1e-4, rtol=0)

    def test_mixture_in_many_dimensions(self) -> None:
        """Off-diagonal Jacobians count."""
        torch.manual_seed(0)
        field = GaussianMixtureField(torch.randn(4, 6).double(), torch.rand(4, 6).double() + 0.4)
        action = field.sample(12, torch.Generator().manual_seed(0))
        torch.testing.assert_close(log_prob(field, action, 60), field.log_prob(action), atol=1e-4, rtol=0)

    def test_a_shift_has_no_divergence(self) -> None:
        """A field that ignores x moves the noise's density."""
        action = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        expected = torch.distributions.Normal(2.0, 1.0).log_prob(action).sum(1)
        torch.testing.assert_close(log_prob(lambda x, _: torch.full_like(x, 2.0), action, 4), expected)

    def test_density_of_a_network_integrates_to_one(self, make_network: MakeNetwork) -> None:
        """Over a fine grid in the plane."""
        network = make_network((2,), gain=1.5)
        axis = torch.linspace(-6, 6, 121)
        grid = torch.cartesian_prod(axis, axis)
        with torch.no_grad():
            total = log_prob(network, grid, 10).exp().sum() * (axis[1] - axis[0]) ** 2
        assert total.item() == pytest.approx(1.0, abs=2e-3)

    @pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
    def test_converges_with_the_solvers_order(self, solver: str, order: int) -> None:
        """State and divergence together."""
        field = GaussianField(double(1.0, -0.5), double(0.5, 1.5))
        action = field.transport(double(0.7, -1.2)[None])
        steps = (128, 256, 512)
        errors = [(log_prob(field, action, count, solver) - field.log_prob(action)).abs().item() for count in steps]
        slopes = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
        assert slopes == pytest.approx([order, order], abs=0.15)

    def test_steering_by_reversal_gains_probability(self, mixture: GaussianMixtureField) -> None:
        """What arXiv 2606.13675 shows: the round trip pulls towards the modes, more with fewer steps."""
        reference = torch.linspace(2.5, 3.5, 11, dtype=torch.float64)
        gains = []
        for steps in (5, 10, 50):
            steered = denoise(mixture, reverse(mixture, reference, steps), steps)
            gains.append((log_prob(mixture, steered, 100) - log_prob(mixture, reference, 100)).mean().item())
        assert gains[0] > gains[1] > gains[2] > 0


class TestHutchinson:
    """The estimate for large rows."""

    def test_is_unbiased_within_its_standard_error(self, make_network: MakeNetwork) -> None:
        """4000 single-probe estimates of one action, as rows of a batch."""
        network = make_network((6,))
        action = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            exact = log_prob(network, action, 3, divergence="exact")
            estimates = log_prob(
                network,
                action.expand(4000, 6),
                3,
                divergence="hutchinson",
                probes=1,
                generator=torch.Generator().manual_seed(1),
            )
        error = estimates.std().item() / 4000**0.5
        assert error > 1e-4  # the field is not one on which every probe is exact
        assert estimates.mean().item() == pytest.approx(exact.item(), abs=4 * error)

    def test_more_probes_spread_less(self, make_network: MakeNetwork) -> None:
        """By the square root of their number."""
        network, action = make_network((6,)), torch.ones(500, 6)
        with torch.no_grad():
            spread = [
                log_prob(
                    network,
                    action,
                    3,
                    divergence="hutchinson",
                    probes=probes,
                    generator=torch.Generator().manual_seed(probes),
                ).std()
                for probes in (1, 16)
            ]
        assert (spread[0] / spread[1]).item() == pytest.approx(4.0, rel=0.25)

    def test_auto_is_exact_when_small_and_estimated_when_large(self, make_network: MakeNetwork) -> None:
        """The limit is 128 entries a row."""
        for size, exact in ((128, True), (129, False)):
            network, action = make_network((size,)), torch.zeros(2, size)
            with torch.no_grad():
                results = [log_prob(network, action, 1, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
            assert torch.equal(*results) == exact

    def test_repeats_from_a_seed(self, make_network: MakeNetwork) -> None:
        """The same generator state gives the same estimate."""
        network, action = make_network((3,)), torch.ones(2, 3)
        first, second = (
            log_prob(network, action, 2, divergence="hutchinson", generator=torch.Generator().manual_seed(0))
            for _ in range(2)
        )
        assert torch.equal(first, second)


class TestAnyField:
    """Shapes, modules and modes."""

    @given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 999))
    @settings(max_examples=30, deadline=None)
    def test_rows_of_any_shape(self, shape: tuple[int, ...], seed: int) -> None:
        """One number a row, independent of the other rows, and of how the row is folded."""
        action = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()

        def field(x: Tensor, t: Tensor) -> Tensor:
            flat = x.reshape(len(x), -1)
            return (torch.sin(flat + flat.sum(1, keepdim=True)) + t[:, None]).reshape(x.shape)

        result = log_prob(field, action, 2)
        assert result.shape == shape[:1]
        torch.testing.assert_close(log_prob(field, action[:1], 2), result[:1])
        torch.testing.assert_close(log_prob(field, action.reshape(len(action), -1), 2), result)

    def test_a_field_may_close_over_one_context_row_for_each_row(self) -> None:
        """As every policy does: rows are never repeated or mixed."""
        mean = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
        fields = [GaussianField(row, 0.5) for row in mean]

        def together(x: Tensor, t: Tensor) -> Tensor:
            assert len(x) == len(mean)
            return GaussianField(torch.zeros(3), 0.5)(x - t[:, None] * mean, t) + mean

        result = log_prob(together, mean + 0.3, 20)
        expected = torch.cat([field.log_prob(row[None] + 0.3) for field, row in zip(fields, mean, strict=True)])
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)

    def test_a_transformer_and_its_gradients(self) -> None:
        """Attention's fused kernels can't be differentiated twice; log_prob sees to it."""
        torch.manual_seed(0)
        encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        inward, outward = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)

        def field(x: Tensor, t: Tensor) -> Tensor:
            tokens = torch.cat([x, t[:, None, None].expand(-1, x.shape[1], 1)], dim=2)
            return outward(encoder(inward(tokens)))  # type: ignore[no-any-return]

        action = torch.randn(3, 4, 2)
        result = log_prob(field, action, 2)
        result.sum().backward()
        assert torch.isfinite(result).all()
        assert inward.weight.grad is not None
        assert inward.weight.grad.abs().sum() > 0

    def test_a_compiled_module(self, make_network: MakeNetwork) -> None:
        """Policies are compiled for speed; the divergence is taken of the module underneath."""
        network, action = make_network((3,)), torch.ones(2, 3)
        compiled = torch.compile(network, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(log_prob(compiled, action, 2), log_prob(network, action, 2))

    def test_no_grad_keeps_no_graph(self, make_network: MakeNetwork) -> None:
        """The divergence's own gradients stay inside."""
        network = make_network((3,))
        with torch.no_grad():
            assert not log_prob(network, torch.ones(2, 3), 2).requires_grad
        assert log_prob(network, torch.ones(2, 3), 2).requires_grad

    def test_gradients(self) -> None:
        """With respect to the action and to the parameters, through the divergence."""
        action = torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        weight = double(0.7, -1.1).requires_grad_()

        def run(action: Tensor, weight: Tensor) -> Tensor:
            def field(x: Tensor, t: Tensor) -> Tensor:
                return torch.sin(weight * x + x.sum(1, keepdim=True)) + t[:, None] * x

            return log_prob(field, action, 3)

        assert torch.autograd.gradcheck(run, (action, weight))

    def test_gradient_in_the_action_is_the_score(self) -> None:
        """For a Gaussian, (mean - a) / std^2."""
        field = GaussianField(double(1.0, -1.0), double(0.5, 2.0))
        action = double(0.8, 0.5)[None].requires_grad_()
        (score,) = torch.autograd.grad(log_prob(field, action, 50).sum(), action)
        torch.testing.assert_close(score, (field.mean - action.detach()) / field.std**2, atol=1e-3, rtol=0)


class TestBadInput:
    """Every mistake is named where it enters."""

    @pytest.mark.parametrize("detach", [torch.no_grad(), torch.inference_mode()])
    def test_a_field_without_gradients_is_refused(self, mixture: Field, detach: Any) -> None:
        """A deployed policy under no_grad would otherwise count as divergence-free."""

        def frozen(x: Tensor, t: Tensor) -> Tensor:
            with detach:
                return mixture(x, t)

        with pytest.raises(InvalidInputError, match="no gradient in x"):
            log_prob(frozen, torch.ones(2), 3)

    def test_a_field_that_detaches_x_is_refused(self, make_network: MakeNetwork) -> None:
        """Also when its parameters do have gradients."""
        network = make_network((2,))
        with pytest.raises(InvalidInputError, match="no gradient in x"):
            log_prob(lambda x, t: network(x.detach(), t), torch.ones(2, 2), 3)

    def test_inference_mode_is_refused(self, mixture: Field) -> None:
        """With the way out."""
        with torch.inference_mode(), pytest.raises(InvalidInputError, match="use torch.no_grad instead"):
            log_prob(mixture, torch.ones(2), 3)

    def test_unknown_names_get_suggestions(self, mixture: Field) -> None:
        """Of the divergence and of the solver."""
        with pytest.raises(UnknownNameError, match="did you mean 'hutchinson'"):
            log_prob(mixture, torch.ones(2), 3, divergence="hutchison")  # type: ignore[arg-type]
        with pytest.raises(UnknownNameError, match="did you mean 'rk4'"):
            log_prob(mixture, torch.ones(2), 3, "rk45")

    def test_counts_values_and_shapes_are_checked(self, mixture: Field) -> None:
        """Each by its name."""
        with pytest.raises(InvalidInputError, match="steps is 0"):
            log_prob(mixture, torch.ones(2), 0)
        with pytest.raises(InvalidInputError, match="probes is 0"):
            log_prob(mixture, torch.ones(2), 1, divergence="hutchinson", probes=0)
        with pytest.raises(InvalidInputError, match="action holds 1 values"):
            log_prob(mixture, torch.tensor([float("nan")]), 3)
        with pytest.raises(MismatchError, match="velocity of shape"):
            log_prob(lambda x, _: x[:, :1], torch.ones(2, 3), 3)
