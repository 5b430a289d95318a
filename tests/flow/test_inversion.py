"""The noise that reproduces an action: by fixed point and by gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.flow import GaussianField, GaussianMixtureField, denoise, inversion, invert, refine, reverse

MakeNetwork = Callable[..., torch.nn.Module]


def chunks(count: int, *row_shape: int, seed: int = 0) -> Tensor:
    """Return random action chunks."""
    return torch.randn(count, *row_shape, generator=torch.Generator().manual_seed(seed))


def worst(field: Any, noise: Tensor, action: Tensor, steps: int) -> float:
    """Return the largest entry by which denoising misses the action."""
    return (denoise(field, noise, steps) - action).abs().max().item()


class TestInvert:
    """The exact inverse of the discrete Euler map."""

    @pytest.mark.parametrize("gain", [1.0, 1.5, 2.0])
    def test_round_trip_on_a_policy_sized_network(self, make_network: MakeNetwork, gain: float) -> None:
        """4 x 512, chunks of 5 x 5, K = 10; at gain 2 |dv/dx|/K is about 0.25 and Euler reversal misses by 0.1."""
        network, action = make_network((5, 5), width=512, layers=4, gain=gain), chunks(32, 5, 5)
        with torch.no_grad():
            assert worst(network, invert(network, action, 10), action, 10) < 5e-5

    def test_is_far_better_than_reversal(self, make_network: MakeNetwork) -> None:
        """The Euler guess it begins with is not enough."""
        network, action = make_network((5, 5), width=512, layers=4, gain=2.0), chunks(32, 5, 5)
        with torch.no_grad():
            assert worst(network, reverse(network, action, 10), action, 10) > 1e-2
            noise = invert(network, action, 10, iterations=5, max_iterations=5)
            assert worst(network, noise, action, 10) < 1e-4

    def test_finds_the_noise_itself(self, make_network: MakeNetwork) -> None:
        """Where the Euler map is one to one, the inverse of denoised noise is that noise."""
        network, noise = make_network((3, 2)).double(), chunks(16, 3, 2).double()
        with torch.no_grad():
            action = denoise(network, noise, 10)
            torch.testing.assert_close(invert(network, action, 10, tolerance=1e-12), noise, atol=1e-9, rtol=0)

    def test_where_the_plain_fixed_point_diverges(self, mixture: GaussianMixtureField) -> None:
        """Between the modes h dv/dx is well above 1, so each step has a solution that plain iteration runs away from."""
        action = torch.linspace(-3, 3, 101, dtype=torch.float64)
        assert worst(mixture, invert(mixture, action, 10), action, 10) < 1e-4

    def test_where_a_step_nearly_collapses(self) -> None:
        """A data spread of 0.01 makes the last step shrink by almost everything."""
        field = GaussianField(torch.zeros(3), torch.tensor([0.01, 0.1, 3.0]))
        action = field.sample(32, torch.Generator().manual_seed(0))
        assert worst(field, invert(field, action, 10), action, 10) < 5e-5

    def test_in_many_dimensions(self) -> None:
        """A narrow mixture over 5 x 5 chunks."""
        field = GaussianMixtureField(torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0)), 0.1)
        action = field.sample(32, torch.Generator().manual_seed(1))
        assert worst(field, invert(field, action, 10), action, 10) < 1e-4

    @given(
        shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
        steps=st.integers(4, 12),
        seed=st.integers(0, 999),
    )
    @settings(max_examples=40, deadline=None)
    def test_round_trip_for_any_shape(self, shape: tuple[int, ...], steps: int, seed: int) -> None:
        """On a smooth field with |dv/dx|/K < 1."""
        action = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

        def field(x: Tensor, t: Tensor) -> Tensor:
            return torch.sin(2 * x) + t.reshape(t.shape + (1,) * (x.ndim - 1)) * x.cos()

        noise, residual = invert(field, action, steps, return_residual=True)
        assert noise.shape == action.shape
        assert residual.shape == action.shape[:1]
        assert residual.max() < 1e-4

    def test_rows_do_not_depend_on_their_batch(self, mixture: GaussianMixtureField) -> None:
        """A row that converges at once is not moved by the sweeps that its neighbour needs."""
        easy, hard = torch.tensor([-2.0]).double(), torch.tensor([0.3]).double()
        together = invert(mixture, torch.cat([easy, hard]), 10)
        torch.testing.assert_close(together[:1], invert(mixture, easy, 10), rtol=0, atol=1e-12)

    def test_residual_is_what_the_round_trip_misses(self, make_network: MakeNetwork) -> None:
        """Reported for each row, and large where sweeps are too few."""
        network, action = make_network((4,), gain=3.0), chunks(8, 4)
        noise, residual = invert(network, action, 10, 1, max_iterations=1, return_residual=True)
        with torch.no_grad():
            torch.testing.assert_close(residual, (denoise(network, noise, 10) - action).abs().amax(1))
        assert residual.max() > 1e-4

    def test_an_action_out_of_reach_is_reported(self) -> None:
        """tanh(4 x) / 1 with one step: x + v reaches everything, x - 5 tanh(x)... does not reach uniquely; a clamp does not."""

        def collapse(x: Tensor, t: Tensor) -> Tensor:
            return -x + x.clamp(-1, 1) if t[0] == 0 else torch.zeros_like(x)

        noise, residual = invert(collapse, torch.tensor([[0.5], [3.0]]), 1, return_residual=True)
        assert torch.isfinite(noise).all()
        assert residual[0] < 1e-6
        assert residual[1] == pytest.approx(2.0, abs=1e-5)

    def test_more_iterations_than_the_maximum_are_taken(self) -> None:
        """`iterations` wins over the default maximum."""
        calls = 0

        def field(x: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return -x if t[0] == 0 else torch.zeros_like(x)  # whatever x is, x + v is 0: nothing is found

        invert(field, torch.ones(1, 1), 1, 130)
        assert calls == 132  # the guess, its own miss, and 130 sweeps

    def test_stops_early_once_converged(self) -> None:
        """A constant field needs a single sweep a step, and on a CPU no more are taken, however many are asked for."""
        calls = 0

        def field(x: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.ones_like(x)

        invert(field, torch.ones(1, 1), 3, 5)
        assert calls == 3 * (2 + 1)

    def test_sweeps_of_what_has_converged_change_nothing(
        self, make_network: MakeNetwork, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Looking at the rows early saves time and nothing else: where the host does not look the noise is the same."""
        network, action = make_network((4,), gain=2.0), chunks(8, 4)
        calls = 0

        def field(x: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            moved: Tensor = network(x, t)
            return moved

        looked = invert(field, action, 10, 20)
        few, calls = calls, 0
        monkeypatch.setattr(inversion, "inspectable", lambda _: False)
        torch.testing.assert_close(looked, invert(field, action, 10, 20), rtol=0, atol=0)
        assert few < calls == 10 * 22

    def test_a_fixed_cost_can_be_compiled(self, make_network: MakeNetwork) -> None:
        """No look at the rows is left in it, on a CPU neither."""
        network, action = make_network((4,)), chunks(8, 4)
        compiled = torch.compile(lambda x: invert(network, x, 3, 2, max_iterations=2), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(action), invert(network, action, 3, 2, max_iterations=2))

    def test_is_detached_and_leaves_no_graph(self, make_network: MakeNetwork) -> None:
        """Parameters and action get no gradient through it."""
        assert not invert(make_network((2,)), chunks(2, 2).requires_grad_(), 3).requires_grad

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        """The tolerance gives way to the type's rounding."""
        action = chunks(4, 3).to(dtype)
        noise = invert(lambda x, _: -x, action, 4)
        assert noise.dtype == dtype
        torch.testing.assert_close(denoise(lambda x, _: -x, noise, 4), action, atol=0.05, rtol=0.05)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"steps": 0}, "steps is 0"),
            ({"steps": 3, "iterations": 0}, "iterations is 0"),
            ({"steps": 3, "max_iterations": 1.5}, "max_iterations is 1.5"),
            ({"steps": 3, "tolerance": 0.0}, "tolerance is 0.0"),
            ({"steps": 3, "tolerance": float("nan")}, "tolerance is nan"),
        ],
    )
    def test_settings_are_checked(self, arguments: dict[str, Any], message: str) -> None:
        """Each by its name."""
        with pytest.raises(InvalidInputError, match=message):
            invert(lambda x, _: x, torch.ones(1, 1), **arguments)

    def test_the_action_and_the_field_are_checked(self) -> None:
        """NaN and shapes."""
        with pytest.raises(InvalidInputError, match="action holds 1 values"):
            invert(lambda x, _: x, torch.tensor([[float("nan")]]), 3)
        with pytest.raises(MismatchError, match="velocity of shape"):
            invert(lambda x, _: x[:, :1], torch.ones(2, 3), 3)


class TestRefine:
    """Search by gradient."""

    def error(self, field: Any, noise: Tensor, action: Tensor, steps: int, penalty: float = 0.0) -> Tensor:
        """Return the objective (B,)."""
        with torch.no_grad():
            return ((denoise(field, noise, steps) - action) ** 2).sum(1) + penalty * (noise**2).sum(1)

    def test_improves_on_the_euler_guess(self, make_network: MakeNetwork) -> None:
        """Every row, and most of the error is gone."""
        network, action = make_network((6,)), chunks(8, 6)
        with torch.no_grad():
            before = self.error(network, reverse(network, action, 5), action, 5)
        after = self.error(network, refine(network, action, 5, iterations=200), action, 5)
        assert (after < before).all()
        assert after.mean() < 0.01 * before.mean()

    def test_never_returns_worse_than_its_start(self, make_network: MakeNetwork) -> None:
        """Not even with a learning rate that throws it far away."""
        network, action = make_network((6,)), chunks(8, 6)
        start = invert(network, action, 5)
        refined = refine(network, action, 5, start, iterations=5, learning_rate=100.0)
        assert torch.equal(refined, start)

    def test_weights_and_a_centre_give_the_most_likely_noise(self) -> None:
        """Through the flow w + 1 the objective is p (w + 1 - a)^2 + lambda (w - c)^2, entry by entry."""
        action, centre = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[0.3, -0.2, 4.0]])
        weight, penalty = torch.tensor([[1.0, 8.0, 0.0]]), 2.0
        found = refine(
            lambda x, _: torch.ones_like(x),
            action,
            4,
            centre,
            iterations=600,
            learning_rate=0.02,
            penalty=penalty,
            weight=weight,
            centre=centre,
        )
        expected = (weight * (action - 1) + penalty * centre) / (weight + penalty)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        for name in ("weight", "centre"):
            with pytest.raises(MismatchError, match=name):
                refine(lambda x, _: x, action, 3, **{name: torch.ones(1, 2)})

    def test_keeps_its_best_and_not_its_last(self) -> None:
        """A start at the optimum of a quadratic is returned although Adam moves on."""
        start = torch.tensor([[1.0, -1.0], [3.0, 3.0]])
        refined = refine(lambda x, _: torch.zeros_like(x), torch.tensor([[1.0, -1.0], [0.0, 0.0]]), 2, start, 20)
        assert torch.equal(refined[0], start[0])
        assert refined[1].norm() < start[1].norm()

    def test_penalty_shrinks_the_noise(self) -> None:
        """For a field that does nothing the optimum is a / (1 + lambda)."""
        action = torch.tensor([[2.0, -1.0]])
        noise = refine(lambda x, _: torch.zeros_like(x), action, 3, iterations=500, penalty=1.0)
        torch.testing.assert_close(noise, action / 2, atol=1e-2, rtol=0)

    def test_approaches_what_inversion_can_not_reach(self) -> None:
        """The nearest reachable action is found where no exact noise exists."""

        def squash(x: Tensor, _: Tensor) -> Tensor:
            return torch.tanh(x) - x

        noise = refine(squash, torch.tensor([[3.0]]), 1, torch.tensor([[0.5]]), 300)
        assert denoise(squash, noise, 1).item() > 0.99

    def test_parameters_get_no_gradients(self, make_network: MakeNetwork) -> None:
        """The policy stays frozen, and the caller may be under no_grad."""
        network = make_network((2,))
        with torch.no_grad():
            noise = refine(network, chunks(2, 2), 3, iterations=2)
        assert not noise.requires_grad
        assert all(parameter.grad is None for parameter in network.parameters())

    def test_rows_do_not_influence_each_other(self, make_network: MakeNetwork) -> None:
        """One row alone ends where it ends in a batch."""
        network, action = make_network((3,)).double(), chunks(4, 3).double()
        torch.testing.assert_close(refine(network, action, 3)[:1], refine(network, action[:1], 3))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"iterations": 0}, "iterations is 0"),
            ({"learning_rate": 0.0}, "learning_rate is 0.0"),
            ({"penalty": -1.0}, "penalty is -1.0"),
        ],
    )
    def test_settings_are_checked(self, arguments: dict[str, Any], message: str) -> None:
        """Each by its name."""
        with pytest.raises(InvalidInputError, match=message):
            refine(lambda x, _: x, torch.ones(1, 1), 3, **arguments)

    def test_other_mistakes_are_named(self) -> None:
        """Shapes, solvers, inference mode."""
        with pytest.raises(MismatchError, match=r"noise has shape \(2, 1\), action \(1, 1\)"):
            refine(lambda x, _: x, torch.ones(1, 1), 3, torch.ones(2, 1))
        with pytest.raises(UnknownNameError, match="did you mean 'euler'"):
            refine(lambda x, _: x, torch.ones(1, 1), 3, solver="eular")
        with torch.inference_mode(), pytest.raises(InvalidInputError, match="use torch.no_grad instead"):
            refine(lambda x, _: x, torch.ones(1, 1), 3)
