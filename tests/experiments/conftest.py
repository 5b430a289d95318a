"""A world in which online learning can be watched: a point on a plane, and a small frozen flow that moves it about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from counterflow.envs import EnvSpec, VectorEnv
from counterflow.envs.types import CameraView, Image, Moment
from counterflow.layout import ActionLayout
from counterflow.policies import ActionSpec, FlowPolicy, NetworkConfig, Normaliser


class Plane:
    """A point that is to be brought near a corner, 0.2 an action; 12 actions at most."""

    spec = EnvSpec("plane", "plane", "go there", 4, 2, (-1.0,) * 2, (1.0,) * 2, ActionLayout((0, 1)), 12)
    spoil: str = ""

    def reset(self, seed: int) -> Moment:
        rng = np.random.default_rng(seed)
        self.at, self.goal, self.steps = rng.uniform(-0.2, 0.2, 2), np.array([0.6, 0.6]), 0
        return self.moment(0.0)

    def step(self, action: npt.NDArray[Any]) -> Moment:
        assert np.abs(action).max() <= 1 + 1e-6
        self.at, self.steps = self.at + 0.2 * np.asarray(action, np.float64), self.steps + 1
        return self.moment(-1.0)

    def moment(self, reward: float) -> Moment:
        there = bool(np.abs(self.at - self.goal).max() < 0.25)
        seen = np.concatenate([self.at, self.goal]).astype(np.float32)
        if self.spoil == "reward" and self.steps >= 3:
            reward = float("nan")
        if self.spoil == "observation" and self.steps >= 3:
            seen = seen * np.nan
        return Moment(seen, reward, there, there, not there and self.steps >= 12, {"goal": self.goal})

    def render(self) -> Image:
        raise NotImplementedError

    def camera(self) -> CameraView:
        raise NotImplementedError

    def close(self) -> None: ...


@pytest.fixture
def plane() -> Callable[..., VectorEnv]:
    """Make vector environments of so many rows, in this process."""

    def make(rows: int = 1, spoil: str = "") -> VectorEnv:
        kind = type("Spoilt", (Plane,), {"spoil": spoil})
        return VectorEnv([kind] * rows, 0, workers=0)

    return make


@pytest.fixture(scope="session")
def prior() -> FlowPolicy:
    """A frozen flow of two-action chunks, never trained: its chunk is not far from its noise."""
    torch.manual_seed(0)
    spec = ActionSpec(2, 2, (-1.0,) * 2, (1.0,) * 2, layout=ActionLayout((0, 1)))
    made = FlowPolicy(NetworkConfig(width=16, depth=1), Normaliser(torch.zeros(4), torch.ones(4)), spec, "plane")
    return made.requires_grad_(False).eval()
