"""Following a field: the known trace, exact transports, orders of convergence, properties, bad input."""

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
from counterflow.flow import (
    SOLVERS,
    Field,
    GaussianField,
    GaussianMixtureField,
    denoise,
    integrate,
    reverse,
    time_grid,
    trajectory,
)


def double(*values: float) -> Tensor:
    """Return a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def wave(x: Tensor, t: Tensor) -> Tensor:
    """Return a smooth nonlinear velocity for rows of any shape that mixes the entries of a row, not the rows."""
    time = t.reshape(t.shape + (1,) * (x.ndim - 1))
    total = x.reshape(len(x), math.prod(x.shape[1:])).sum(1).reshape(time.shape)
    return torch.sin(2 * x + total) + time * torch.cos(x)


class Recorder:
    """A field that remembers the times it was called with."""

    def __init__(self) -> None:
        """Start with none."""
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return a velocity."""
        self.times.append(t)
        return -x


class TestKnownTrace:
    """The 1-D toy of arXiv 2606.13675's project page, to 4 digits."""

    def test_reverses_in_three_steps(self, toy: Field) -> None:
        """Steps of 1/2.4 from t = 1; the last is partial."""
        states = trajectory(toy, double(3.0), [1.0, 1 - 1 / 2.4, 1 - 2 / 2.4, 0.0])
        torch.testing.assert_close(states[:, 0], double(3.0, 1.7500, 1.3362, 1.6186), atol=5e-5, rtol=0)

    def test_denoises_in_steps_of_0_1389(self, toy: Field) -> None:
        """Steps of 1/7.2 from t = 0; the last is partial."""
        noise = integrate(toy, double(3.0), [1.0, 1 - 1 / 2.4, 1 - 2 / 2.4, 0.0])
        states = trajectory(toy, noise, [*(i / 7.2 for i in range(8)), 1.0])
        expected = double(1.6186, 1.2272, 0.9588, 0.8991, 1.1112, 1.3889, 1.6667, 1.9444, 2.0000)
        torch.testing.assert_close(states[:, 0], expected, atol=5e-5, rtol=0)

    @pytest.mark.parametrize(("steps", "expected"), [(5, -1.42), (10, 1.63)])
    def test_few_steps_flip_a_reference_to_the_heavier_mode(self, toy: Field, steps: int, expected: float) -> None:
        """A reference of 2.0 ends at the other mode with K = 5, not with K = 10."""
        chunk = denoise(toy, reverse(toy, double(2.0), steps), steps)
        assert chunk.item() == pytest.approx(expected, abs=5e-3)


class TestEuler:
    """What flow policies are deployed with, step by step."""

    def test_denoising_leaves_from_the_earlier_point(self) -> None:
        """The field is asked at t = 0, 1/K, ..., (K-1)/K."""
        field = Recorder()
        result = denoise(field, torch.ones(2, 3), 4)
        torch.testing.assert_close(torch.stack(field.times)[:, 0], torch.tensor([0.0, 0.25, 0.5, 0.75]))
        torch.testing.assert_close(result, torch.full((2, 3), 0.75**4))

    def test_reversal_leaves_from_the_later_point(self) -> None:
        """The field is asked at t = 1, ..., 1/K."""
        field = Recorder()
        result = reverse(field, torch.ones(2, 3), 4)
        torch.testing.assert_close(torch.stack(field.times)[:, 0], torch.tensor([1.0, 0.75, 0.5, 0.25]))
        torch.testing.assert_close(result, torch.full((2, 3), 1.25**4))

    @pytest.mark.parametrize(("solver", "evaluations"), [("euler", 5), ("midpoint", 10), ("rk4", 20)])
    def test_asks_the_field_as_often_as_documented(self, solver: str, evaluations: int) -> None:
        """One, two and four evaluations a step."""
        field = Recorder()
        denoise(field, torch.ones(1, 1), 5, solver)
        assert len(field.times) == evaluations


class TestAgainstClosedForms:
    """Transported points that are known."""

    @pytest.mark.parametrize("solver", ["midpoint", "rk4"])
    def test_carries_noise_to_a_gaussian(self, solver: str) -> None:
        """Anisotropic, over chunks (B, H, A)."""
        torch.manual_seed(0)
        field = GaussianField(torch.randn(4, 3).double(), torch.rand(4, 3).double() + 0.3)
        noise = torch.randn(16, 4, 3).double()
        torch.testing.assert_close(denoise(field, noise, 200, solver), field.transport(noise), atol=2e-3, rtol=0)
        torch.testing.assert_close(reverse(field, field.transport(noise), 200, solver), noise, atol=2e-3, rtol=0)

    def test_carries_quantiles_of_noise_to_quantiles_of_a_mixture(self, mixture: GaussianMixtureField) -> None:
        """In one dimension paths can't cross, so every quantile stays what it was."""
        noise = torch.linspace(-3, 3, 61, dtype=torch.float64)
        action = denoise(mixture, noise, 400, "rk4")
        normal = torch.distributions.Normal(double(0.0), double(1.0))
        quantile = 0.8 * normal.cdf((action + 2) / 0.1**0.5) + 0.2 * normal.cdf((action - 2) / 0.1**0.5)
        torch.testing.assert_close(quantile, normal.cdf(noise), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
    @pytest.mark.parametrize("direction", ["denoise", "reverse"])
    def test_converges_with_its_order(self, solver: str, order: int, direction: str) -> None:
        """The error's slope against the number of steps, log-log.

        A single Gaussian would not do: there the midpoint rule happens to be of order three.
        """
        field = GaussianMixtureField(double(-1.0, 1.0), double(0.5, 0.8), double(0.7, 0.3))
        follow, start = (denoise, double(0.7, -1.2)) if direction == "denoise" else (reverse, double(0.3, -1.4))
        exact = follow(field, start, 2000, "rk4")
        steps = [64, 128, 256]
        errors = double(*((follow(field, start, count, solver) - exact).norm().item() for count in steps)).log()
        slopes = (errors[:-1] - errors[1:]) / torch.tensor(2.0).log()
        torch.testing.assert_close(slopes, torch.full_like(slopes, order), atol=0.12, rtol=0)


class TestStartAndEnd:
    """Entering and leaving the flow part of the way."""

    def test_starts_on_the_way(self) -> None:
        """A state at time t goes where its noise would have gone; each row may have its own t."""
        field = GaussianField(double(1.0, -0.5), double(0.5, 1.5))
        noise = torch.linspace(-2, 2, 10, dtype=torch.float64).reshape(5, 2)
        start = double(0.0, 0.25, 0.5, 0.9, 1.0)
        states = field.transport(noise, start)
        torch.testing.assert_close(
            denoise(field, states, 20, "rk4", start=start), field.transport(noise), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            reverse(field, field.transport(noise), 20, "rk4", end=start), states, atol=1e-5, rtol=0
        )

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_a_number_and_a_tensor_mean_the_same(self, solver: str) -> None:
        """Per-row times equal calls with one number."""
        x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
        together = denoise(wave, x, 7, solver, start=torch.tensor([0.0, 0.3, 0.6]))
        alone = torch.cat([denoise(wave, x[i : i + 1], 7, solver, start=0.3 * i) for i in range(3)])
        torch.testing.assert_close(together, alone)

    def test_a_row_at_the_end_stays(self) -> None:
        """There is nothing left to follow at t = 1."""
        x = torch.tensor([[1.0, 2.0]])
        assert torch.equal(denoise(wave, x, 5, start=1.0), x)
        assert torch.equal(reverse(wave, x, 5, end=1.0), x)

    def test_time_grid_is_what_denoising_visits(self) -> None:
        """Equal steps from the start to 1."""
        grid = time_grid(torch.zeros(2, 3), 4, torch.tensor([0.0, 0.5]))
        expected = torch.tensor([[0.0, 0.5], [0.25, 0.625], [0.5, 0.75], [0.75, 0.875], [1.0, 1.0]])
        torch.testing.assert_close(grid, expected)
        torch.testing.assert_close(
            integrate(wave, torch.ones(2, 3), grid),
            denoise(wave, torch.ones(2, 3), 4, start=torch.tensor([0.0, 0.5])),
        )


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
solver_names = st.sampled_from(sorted(SOLVERS))


class TestProperties:
    """What must hold for every shape, solver and number of steps."""

    @given(shape=shapes, solver=solver_names, steps=st.integers(1, 6), seed=st.integers(0, 999))
    @settings(max_examples=60, deadline=None)
    def test_shape_type_and_finiteness_are_kept(
        self, shape: tuple[int, ...], solver: str, steps: int, seed: int
    ) -> None:
        """Any (B, ...) comes back as it went in, and the input is left alone."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        before = x.clone()
        for result in (denoise(wave, x, steps, solver), reverse(wave, x, steps, solver)):
            assert result.shape == x.shape
            assert result.dtype == x.dtype
            assert torch.isfinite(result).all()
        assert torch.equal(x, before)

    @given(shape=shapes, solver=solver_names, steps=st.integers(1, 6), seed=st.integers(0, 999))
    @settings(max_examples=60, deadline=None)
    def test_rows_do_not_influence_each_other(self, shape: tuple[int, ...], solver: str, steps: int, seed: int) -> None:
        """The first row alone gives what it gives in a batch."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator).double()
        start = torch.rand(len(x), generator=generator).double()
        whole = denoise(wave, x, steps, solver, start=start)
        torch.testing.assert_close(denoise(wave, x[:1], steps, solver, start=start[:1]), whole[:1])

    @given(solver=solver_names, seed=st.integers(0, 999))
    @settings(max_examples=30, deadline=None)
    def test_round_trip_error_falls_with_steps(self, solver: str, seed: int) -> None:
        """Reversing and denoising in 16 times as many steps loses at most a quarter as much."""
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).double()
        errors = [(denoise(wave, reverse(wave, x, k, solver), k, solver) - x).norm().item() for k in (16, 256)]
        assert errors[1] < errors[0] / 4

    def test_an_empty_batch_is_fine(self) -> None:
        """No rows in, no rows out."""
        assert denoise(wave, torch.zeros(0, 5, 2), 3, "rk4", start=torch.zeros(0)).shape == (0, 5, 2)


class TestTypesAndGradients:
    """Precision, autocast, autograd, compilation."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("solver", SOLVERS)
    def test_the_field_sees_one_type(self, dtype: torch.dtype, solver: str) -> None:
        """State and time reach the field in the type of the noise at every stage, and the result has it."""

        def field(x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == t.dtype == dtype
            return -x.float()

        assert denoise(field, torch.ones(2, 3, dtype=dtype), 4, solver).dtype == dtype

    def test_works_under_autocast(self, make_network: Callable[..., torch.nn.Module]) -> None:
        """A network answering in bfloat16 leaves a float32 state in float32."""
        network = make_network((3,))
        noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            result = denoise(network, noise, 5)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, denoise(network, noise, 5), atol=0.1, rtol=0.1)

    @pytest.mark.parametrize("solver", SOLVERS)
    @pytest.mark.parametrize("follow", [denoise, reverse])
    def test_gradients(self, solver: str, follow: Callable[..., Tensor]) -> None:
        """With respect to the state and to the field's parameters."""
        x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        weight = torch.tensor([0.7, -1.1], dtype=torch.float64, requires_grad=True)

        def run(x: Tensor, weight: Tensor) -> Tensor:
            return follow(lambda state, t: weight * wave(state, t), x, 3, solver)

        assert torch.autograd.gradcheck(run, (x, weight))

    def test_compiles_as_one_graph(self) -> None:
        """The checks do not break the caller's graph."""

        def run(x: Tensor, start: Tensor) -> Tensor:
            return reverse(wave, denoise(wave, x, 3, "rk4", start=start), 3)

        x, start = torch.ones(2, 3), torch.tensor([0.0, 0.5])
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(x, start), run(x, start))


class TestBadInput:
    """Every mistake is named where it enters."""

    def test_an_unknown_solver_gets_a_suggestion(self) -> None:
        """The nearest name is offered."""
        with pytest.raises(UnknownNameError, match="did you mean 'midpoint'"):
            denoise(wave, torch.ones(1, 1), 3, "midpiont")

    @pytest.mark.parametrize("steps", [0, -3, 2.5, True, "10", None])
    def test_steps_must_be_a_positive_integer(self, steps: Any) -> None:
        """Zero, fractions and other types are refused."""
        with pytest.raises(InvalidInputError, match="steps is .*an integer of at least 1"):
            denoise(wave, torch.ones(1, 1), steps)

    @pytest.mark.parametrize(
        ("noise", "message"),
        [
            (torch.ones(2, 3, dtype=torch.int64), "noise has type torch.int64; expected floating point"),
            (torch.tensor([[1.0, float("nan")]]), "noise holds 1 values of 2 that are NaN or infinite"),
            (torch.tensor([[float("inf")]]), "noise holds 1 values of 1"),
            (torch.tensor(1.0), "leading batch dimension"),
            ([[1.0]], "noise is a list; expected a torch tensor"),
        ],
    )
    def test_the_state_must_be_finite_floats_in_a_batch(self, noise: Any, message: str) -> None:
        """Type, shape and values are looked at."""
        with pytest.raises(InvalidInputError, match=message):
            denoise(wave, noise, 3)
        with pytest.raises(InvalidInputError, match=message.replace("noise", "action")):
            reverse(wave, noise, 3)
        with pytest.raises(InvalidInputError, match=message.replace("noise", "x")):
            integrate(wave, noise, [0.0, 1.0])

    def test_the_velocity_must_be_shaped_like_the_state(self) -> None:
        """A field that would broadcast is refused."""
        with pytest.raises(MismatchError, match=r"velocity of shape \(2, 1\) for a state of shape \(2, 3\)"):
            denoise(lambda x, _: x[:, :1], torch.ones(2, 3), 3)

    @pytest.mark.parametrize("start", [-0.1, 1.1, float("nan"), "0", True, torch.tensor([0.0, 2.0])])
    def test_times_must_be_in_the_unit_interval(self, start: Any) -> None:
        """For denoising and for reversal, each by its own name."""
        with pytest.raises(InvalidInputError, match="start .*in \\[0, 1\\]"):
            denoise(wave, torch.ones(2, 3), 3, start=start)
        with pytest.raises(InvalidInputError, match="end .*in \\[0, 1\\]"):
            reverse(wave, torch.ones(2, 3), 3, end=start)

    def test_one_time_for_each_row(self) -> None:
        """A tensor of starts has the batch's length."""
        with pytest.raises(InvalidInputError, match=r"start has shape \(3,\).*\(2,\)"):
            denoise(wave, torch.ones(2, 3), 3, start=torch.zeros(3))

    @pytest.mark.parametrize("times", [[0.5], [], [0.0, 1.5], torch.zeros(3, 5)])
    def test_a_grid_has_two_times_and_fits_the_batch(self, times: Any) -> None:
        """Explicit grids are checked too."""
        with pytest.raises(InvalidInputError, match="times"):
            trajectory(wave, torch.ones(2, 3), times)
