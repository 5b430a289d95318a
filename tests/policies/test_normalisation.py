"""Normalisation is reversible, and fitted to what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.policies import NormalisationKind, Normaliser


def data(seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(500, 3, generator=rng) * torch.tensor([0.1, 1.0, 50.0]) + torch.tensor([0.0, -3.0, 7.0])


@given(seed=st.integers(0, 1000), kind=st.sampled_from(["none", "mean_std", "min_max", "quantile"]))
def test_there_and_back(seed: int, kind: NormalisationKind) -> None:
    values = data(seed)
    normaliser = Normaliser.fit(values, kind)
    torch.testing.assert_close(normaliser.denormalise(normaliser.normalise(values)), values, atol=1e-4, rtol=1e-5)


def test_each_kind_does_what_it_says() -> None:
    values = data()
    standard = Normaliser.fit(values, "mean_std").normalise(values)
    torch.testing.assert_close(standard.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    bounded = Normaliser.fit(values, "min_max").normalise(values)
    torch.testing.assert_close(bounded.amin(0), -torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(bounded.amax(0), torch.ones(3), atol=1e-4, rtol=0)
    share_inside = (Normaliser.fit(values, "quantile").normalise(values).abs() <= 1).float().mean(0)
    torch.testing.assert_close(share_inside, torch.full((3,), 0.98), atol=0.005, rtol=0)
    assert torch.equal(Normaliser.fit(values, "none").normalise(values), values)


def test_a_dimension_that_never_moved_does_not_blow_up() -> None:
    values = torch.full((10, 1), 2.0)
    assert Normaliser.fit(values).normalise(values + 0.001).abs().max() <= 1.01


def test_bad_input() -> None:
    with pytest.raises(UnknownNameError, match="mean_std"):
        Normaliser.fit(data(), "mean-std")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"\(N, D\)"):
        Normaliser.fit(torch.zeros(3))
    with pytest.raises(InvalidInputError, match="scale positive"):
        Normaliser(torch.zeros(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(InvalidInputError, match="finite"):
        Normaliser.fit(torch.tensor([[float("nan")], [1.0]]))
    with pytest.raises(MismatchError, match=r"expected \(\.\.\., 3\)"):
        Normaliser.fit(data()).normalise(torch.zeros(2, 4))
