"""A prior whose flow is known exactly: Gaussian, around a mean that the observation gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterflow.flow import GaussianField
from counterflow.policies import ActionLayout, ActionSpec, FieldPolicy

HORIZON, DIM = 3, 4
STD = 0.3


def gaussian_velocity(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """The flow from N(0, I) to N(mean, 0.3^2), with one mean for each row (B,)."""
    field = GaussianField(torch.zeros(HORIZON, DIM, dtype=x.dtype), STD)
    offset = mean[:, None, None] * torch.ones_like(x)
    # Moving the data by a constant moves x_t by t times that, and the velocity by the constant.
    return field(x - t[:, None, None] * offset, t) + offset


@pytest.fixture
def prior() -> FieldPolicy:
    layout = ActionLayout(translation=(0, 1, 2), gripper=3)
    return FieldPolicy(gaussian_velocity, ActionSpec(HORIZON, DIM, (-4.0,) * DIM, (4.0,) * DIM, layout=layout))


@pytest.fixture
def means() -> Tensor:
    """Five observations: the mean of the prior's actions at each."""
    return torch.tensor([0.0, 0.5, -0.5, 1.0, 0.2])
