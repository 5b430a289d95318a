"""LIBERO as LeRobot's evaluation has it, and one of its policies steered in it by `counterflow eval`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.cli import main
from counterflow.data import SteeringDataset
from counterflow.envs import describe, make_env
from counterflow.envs.libero import STEP_LIMITS, LiberoEnv, assets_folder
from counterflow.errors import MissingDependencyError
from counterflow.experiments.sight import Eyes
from counterflow.random import child_seed

SUITE, NAME = "90", "KITCHEN_SCENE1_put_the_black_bowl_on_the_plate"
TASK = f"libero/{SUITE}/{NAME}"
IMAGE, IMAGE2, STATE = "observation.images.image", "observation.images.image2", "observation.state"


@pytest.fixture(scope="module", autouse=True)
def libero() -> None:
    """Skip where the simulator or its assets are not."""
    if importlib.util.find_spec("libero") is None:
        pytest.skip("LIBERO is not installed beside LeRobot: requirements-libero.txt")
    try:
        assets_folder()
    except MissingDependencyError:
        pytest.skip("LIBERO's assets are not here: set COUNTERFLOW_LIBERO_ASSETS")


@pytest.fixture(scope="module")
def policy(make: Callable[..., Any]) -> Any:
    """A small pi0.5 with LIBERO's inputs and actions."""
    from lerobot.configs.types import FeatureType, PolicyFeature

    pictures = dict.fromkeys((IMAGE, IMAGE2), PolicyFeature(FeatureType.VISUAL, (3, 256, 256)))
    low, high = torch.full((7,), -1.0), torch.full((7,), 1.0)
    stats = {
        STATE: {"q01": torch.full((8,), -2.0), "q99": torch.full((8,), 4.0)},
        "action": {"q01": low, "q99": high},
    }
    return make(
        "pi05",
        input_features={STATE: PolicyFeature(FeatureType.STATE, (8,)), **pictures},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        stats=stats,
    )


def test_the_policy_is_handed_what_lerobots_evaluation_hands_it(policy: Any) -> None:
    """Their environment, their conversion and their processor against ours, in the same episode."""
    ours = make_env(TASK, 1, workers=0)  # first: LIBERO then knows where its assets are, and its import asks nothing
    from lerobot.envs import libero as their
    from lerobot.envs.utils import preprocess_observation
    from lerobot.processor.env_processor import LiberoProcessorStep

    def batched(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: batched(one) for name, one in value.items()}
        return np.asarray(value)[None]

    seed, step = 11, LiberoProcessorStep()
    batch = ours.reset([seed])
    suite = their._get_suite(f"libero_{SUITE}")
    number = next(index for index, task in enumerate(suite.tasks) if task.name == NAME)
    start = child_seed(seed, "start") % 50
    theirs = their.LiberoEnv(suite, number, f"libero_{SUITE}", obs_type="pixels_agent_pos", episode_index=start)
    eyes = Eyes(policy.wrapped(task=None), ours)
    try:
        assert (ours.spec.task, STEP_LIMITS[SUITE]) == (theirs.task_description, theirs._max_episode_steps)
        raw, _ = theirs.reset(seed=child_seed(seed, "places"))
        rng = np.random.default_rng(0)
        for length in (1, 1, 6, 3):
            expected = step.observation(preprocess_observation(batched(raw)))
            seen = eyes.see(batch.observation, [0])
            assert isinstance(seen, dict)
            assert seen.pop("task") == theirs.task_description
            assert {*seen} == {*expected} == {IMAGE, IMAGE2, STATE}
            for name in (IMAGE, IMAGE2):
                torch.testing.assert_close(seen[name], expected[name], rtol=0, atol=0)
            torch.testing.assert_close(
                seen[STATE], expected[STATE], rtol=3e-7, atol=1e-7
            )  # the last bit of an arccosine
            chunk = rng.uniform(-1, 1, (length, 7))
            batch = ours.execute(chunk[None])
            for action in chunk:
                raw, *_ = theirs.step(action)
        host = ours._host
        assert host is not None
        (inside,) = host._envs
        assert isinstance(inside, LiberoEnv)
        # Not to the last bit: robosuite solves the contacts of a step three times over (counterflow.envs.libero_physics).
        np.testing.assert_allclose(inside.simulator.sim.data.qpos, theirs._env.env.sim.data.qpos, atol=1e-9)
    finally:
        ours.close()
        theirs.close()


def test_pi05_is_steered_by_one_command(policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluated and recorded, in the real simulator; with random weights nothing is solved."""
    monkeypatch.setitem(STEP_LIMITS, SUITE, 12)  # two chunks
    folder = policy.save(tmp_path / "pi05")
    common = ["--policy", f"lerobot:{folder}", "--num-envs", "1"]
    out = tmp_path / "frs.json"
    assert main(["eval", TASK, *common, "--steer", "frs", "--episodes", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["episodes"], found["ledger"]["environment_steps"], found["ledger"]["reasoner_queries"]) == (1, 12, 2)
    assert found["diagnostics"]["round_trip_error"] > 0
    data = tmp_path / "data"
    assert main(["record", TASK, *common, "--steer", "frs", "--episodes", "1", "--out", str(data)]) == 0
    (episode,) = SteeringDataset.load(data).episodes
    assert episode.arrays["features"].shape[0] == 2
    assert episode.arrays["observations"].shape == (2, describe(TASK).observation_dim)
    assert "step_noise" not in episode.arrays
