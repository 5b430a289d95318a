"""The regression that a field is trained with, and the times it is trained at."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.flow import GaussianMixtureField, interpolate, matching_error, matching_loss, sample_time


def still(x: Tensor, _: Tensor) -> Tensor:
    """Return no velocity."""
    return torch.zeros_like(x)


class TestLoss:
    """The squared error of the velocity."""

    def test_interpolation_goes_from_noise_to_action(self) -> None:
        """t = 0 is noise, t = 1 is action."""
        noise, action = torch.zeros(3, 2), torch.ones(3, 2)
        path = interpolate(noise, action, torch.tensor([0.0, 0.25, 1.0]))
        torch.testing.assert_close(path[:, 0], torch.tensor([0.0, 0.25, 1.0]))

    def test_the_straight_velocity_has_no_loss(self) -> None:
        """At x_t the target is a - x_0, whatever t is."""
        noise, action = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
        assert matching_loss(lambda x, _: action - noise, action, noise, torch.rand(4)).item() == 0

    def test_by_hand(self) -> None:
        """The field gets x_t and t; the error is squared and averaged over every entry."""
        noise, action, t = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [-2.0]]), torch.tensor([0.5, 0.25])

        def field(x: Tensor, time: Tensor) -> Tensor:
            torch.testing.assert_close(x, torch.tensor([[2.0], [1.0]]))
            torch.testing.assert_close(time, t)
            return x

        torch.testing.assert_close(matching_error(field, action, noise, t), torch.tensor([[0.0], [25.0]]))
        assert matching_loss(field, action, noise, t).item() == pytest.approx(12.5)

    def test_the_exact_field_minimises_it(self, mixture: GaussianMixtureField) -> None:
        """On samples, any nudge of the conditional mean costs more."""
        generator = torch.Generator().manual_seed(0)
        action = mixture.sample(20_000, generator)
        noise = torch.randn(20_000, generator=generator, dtype=torch.float64)
        t = sample_time(20_000, generator=generator, dtype=torch.float64)
        best = matching_loss(mixture, action, noise, t)
        for nudge in (-0.1, 0.1):
            assert matching_loss(lambda x, t, nudge=nudge: mixture(x, t) + nudge, action, noise, t) > best
            assert matching_loss(lambda x, t, nudge=nudge: mixture(x, t) * (1 + nudge), action, noise, t) > best

    @given(rows=st.integers(1, 5), horizon=st.integers(1, 5), seed=st.integers(0, 99))
    @settings(max_examples=30, deadline=None)
    def test_masked_entries_do_not_count(self, rows: int, horizon: int, seed: int) -> None:
        """The mean is over what is kept; what is masked may even be NaN."""
        generator = torch.Generator().manual_seed(seed)
        action, noise = torch.randn(2, rows, horizon, 3, generator=generator)
        t = torch.rand(rows, generator=generator)
        mask = torch.rand(rows, horizon, generator=generator) < 0.5
        expected = (action - noise)[mask].square().mean() if mask.any() else torch.tensor(0.0)
        damaged = torch.where(mask[:, :, None], action, torch.nan)
        torch.testing.assert_close(matching_loss(still, damaged, noise, t, mask), expected)

    def test_a_mask_may_be_by_row_by_step_by_entry_or_weights(self) -> None:
        """All leading shapes agree, booleans with numbers."""
        action, noise, t = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.rand(4)
        keep = torch.tensor([True, False, True, True])
        results = [
            matching_loss(still, action, noise, t, mask)
            for mask in (keep, keep[:, None].expand(4, 3), keep.float()[:, None, None].expand(4, 3, 2))
        ]
        torch.testing.assert_close(results[0], (action - noise)[keep].square().mean())
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(results[2], results[0])

    def test_nan_in_padding_leaves_gradients_finite(self) -> None:
        """Masked rows pass nothing back to the parameters."""
        scale = torch.tensor(0.5, requires_grad=True)
        action = torch.tensor([[[1.0], [float("nan")]]])
        mask = torch.tensor([[True, False]])
        noise = torch.zeros(1, 2, 1)
        matching_loss(lambda x, _: scale * torch.nan_to_num(x), action, noise, torch.ones(1), mask).backward()
        assert scale.grad is not None
        assert scale.grad.item() == pytest.approx(2 * (0.5 - 1.0))

    def test_shapes_are_checked(self) -> None:
        """Noise, times, mask and velocity."""
        action, noise, t = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)
        with pytest.raises(MismatchError, match=r"noise \(2, 1\)"):
            matching_loss(still, action, noise[:, :1], t)
        with pytest.raises(MismatchError, match=r"expected noise like action and t \(2,\)"):
            matching_loss(still, action, noise, t[:, None])
        with pytest.raises(MismatchError, match=r"mask has shape \(3,\)"):
            matching_loss(still, action, noise, t, torch.ones(3))
        with pytest.raises(MismatchError, match="velocity of shape"):
            matching_loss(lambda x, _: x[:, :1], action, noise, t)


class TestTimes:
    """The laws of training times."""

    def test_uniform(self) -> None:
        """Mean a half, all quarters equally full."""
        t = sample_time(40_000, generator=torch.Generator().manual_seed(0))
        counts = torch.histc(t, 4, 0, 1) / len(t)
        torch.testing.assert_close(counts, torch.full((4,), 0.25), atol=0.01, rtol=0)

    def test_beta_prefers_noisy_times(self) -> None:
        """(0.999 - t) / 0.999 follows Beta(1.5, 1), as pi0 has it; our t = 0 is noise."""
        t = sample_time(40_000, "beta", generator=torch.Generator().manual_seed(0)).double()
        u = 1 - t / 0.999
        law = torch.distributions.Beta(1.5, 1.0)
        assert u.mean().item() == pytest.approx(law.mean.item(), abs=5 * law.stddev.item() / 200)
        for level in (0.2, 0.5, 0.8):
            assert (u <= level).double().mean().item() == pytest.approx(level**1.5, abs=0.0125)
        assert t.mean() < 0.42
        assert t.max() <= 0.999

    def test_grid(self) -> None:
        """{0, 1/K, ..., 1}, both ends included, equally often."""
        t = sample_time(40_000, "grid", steps=4, generator=torch.Generator().manual_seed(0))
        values, counts = t.unique(return_counts=True)
        torch.testing.assert_close(values, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        torch.testing.assert_close(counts / len(t), torch.full((5,), 0.2), atol=0.01, rtol=0)

    @pytest.mark.parametrize("law", ["uniform", "beta", "grid"])
    def test_range_type_and_repeatability(self, law: str) -> None:
        """In [0, 1], of the type asked for, the same from the same seed."""
        draws = [
            sample_time(
                100,
                law,  # type: ignore[arg-type]
                generator=torch.Generator().manual_seed(0),
                dtype=torch.float64,
            )
            for _ in range(2)
        ]
        assert torch.equal(*draws)
        assert draws[0].dtype == torch.float64
        assert ((draws[0] >= 0) & (draws[0] <= 1)).all()

    def test_mistakes_are_named(self) -> None:
        """Law, count, steps."""
        with pytest.raises(UnknownNameError, match="did you mean 'uniform'"):
            sample_time(3, "unifrom")  # type: ignore[arg-type]
        with pytest.raises(InvalidInputError, match="count is 0"):
            sample_time(0)
        with pytest.raises(InvalidInputError, match="steps is 0"):
            sample_time(3, "grid", steps=0)
