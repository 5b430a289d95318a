"""Following the scripted reasoners in the simulator leads to the goal."""

from __future__ import annotations

import numpy as np
import pytest

from counterflow.envs import make_env
from counterflow.errors import UnknownNameError
from counterflow.experiments.evaluate import ReasonerSettings, evaluate, load_prior
from counterflow.reasoners import CubeReasoner, PuzzleReasoner, SceneReasoner, scripted_reasoner


@pytest.mark.parametrize("env", ["cube-single-task2", "puzzle-3x3-task1", "scene-task3"])
def test_following_them_with_the_shipped_prior_succeeds(env: str) -> None:
    """The whole of it: reasoner, reference, reversal, prior, simulator."""
    name = f"ogbench/{env}"
    with make_env(name, 4, workers=2) as vector:
        result = evaluate(vector, load_prior(name), "frs", 4, 0, reasoner=ReasonerSettings())
    assert result.rate.successes >= 3
    assert result.agreement > 0.7


def test_every_single_axis_is_coarse() -> None:
    """They name one axis at a time, never a diagonal."""
    with make_env("ogbench/cube-double-task3", 1) as env:
        batch, reasoner = env.reset([1]), CubeReasoner()
        reasoner.reset(0)
        for _ in range(20):
            said = reasoner.decide(batch.view(0))
            assert sum(map(abs, said.axes)) <= 1
            action = np.zeros((1, 5, 5))
            action[..., :3] = 0.7 * said.vector
            batch = env.execute(action)


def test_every_environment_has_its_own() -> None:
    assert isinstance(scripted_reasoner("ogbench/cube-octuple-task5"), CubeReasoner)
    assert isinstance(scripted_reasoner("ogbench/puzzle-4x6-task1"), PuzzleReasoner)
    assert isinstance(scripted_reasoner("ogbench/scene-task1"), SceneReasoner)
    with pytest.raises(UnknownNameError, match="scripted reasoner"):
        scripted_reasoner("maniskill/reach")
