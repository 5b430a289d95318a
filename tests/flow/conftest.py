"""Fields that the tests of the flow core share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from counterflow.flow import Field, GaussianMixtureField

torch.set_num_threads(1)


class Network(torch.nn.Module):
    """A GELU network v(x, t) over rows of any shape, orthogonally initialised with a gain that sets how steep it is."""

    def __init__(self, row_shape: tuple[int, ...], width: int, layers: int, gain: float) -> None:
        """Build the layers."""
        super().__init__()
        size = torch.Size(row_shape).numel()
        widths = [size + 1, *[width] * layers, size]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(before, after) for before, after in pairwise(widths))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                torch.nn.init.orthogonal_(parameter, gain)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity."""
        hidden = torch.cat([x.reshape(len(x), -1), t[:, None]], dim=1)
        for layer in self.layers[:-1]:
            hidden = torch.nn.functional.gelu(layer(hidden))
        return self.layers[-1](hidden).reshape(x.shape)  # type: ignore[no-any-return]


@pytest.fixture
def make_network() -> Callable[..., Network]:
    """Return a maker of reproducible random networks."""

    def make(
        row_shape: tuple[int, ...], *, width: int = 32, layers: int = 2, gain: float = 2.0, seed: int = 0
    ) -> Network:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Network(row_shape, width, layers, gain)

    return make


@pytest.fixture
def toy() -> Field:
    """Return the one-dimensional toy of the project page of arXiv 2606.13675, which clips t at 1 - 1e-5."""
    exact = two_modes()
    return lambda x, t: exact(x, t.clamp(max=1 - 1e-5))


@pytest.fixture
def mixture() -> GaussianMixtureField:
    """Return the same mixture without the clip."""
    return two_modes()


def two_modes() -> GaussianMixtureField:
    """Return the flow to modes at -2 and +2, variance 0.1, weights 0.8 and 0.2, over rows that are single numbers."""
    weights = torch.tensor([0.8, 0.2], dtype=torch.float64)
    return GaussianMixtureField(torch.tensor([-2.0, 2.0], dtype=torch.float64), 0.1**0.5, weights)
