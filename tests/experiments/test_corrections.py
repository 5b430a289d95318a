"""Offline RFS as a run: corrections are learned, evaluated beside the frozen policy, and gone on with after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import counterflow.experiments.corrections as module
from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.envs import VectorEnv
from counterflow.errors import DatasetError, InvalidInputError, MismatchError, TrainingError, UnknownNameError
from counterflow.experiments.corrections import (
    CorrectionsRun,
    CorrectionsTrained,
    read_corrections_settings,
    train_corrections,
)
from counterflow.experiments.record import arrays_of
from counterflow.experiments.rollout import Episode, run_episodes
from counterflow.learning.corrections import CorrectionsConfig
from counterflow.policies import FlowPolicy, Normaliser
from counterflow.random import child_seed
from counterflow.steering import (
    ChunkRegressor,
    RegressorConfig,
    SteeredPolicy,
    SteeringActor,
    SteeringContext,
    binding_of,
    steer_actor,
    steer_learned,
)

CONFIG = CorrectionsConfig(
    width=16, depth=1, batch_size=32, learning_rate=3e-3, actor_learning_rate=3e-3, compile=False, alpha=0.05
)
RUN = CorrectionsRun(steps=300, residual_bound=(3.0,), episodes=10, checkpoint_every=100)


class Towards:
    """An edit: whatever the base does, go to the corner."""

    candidates = 1

    def __call__(self, chunks: torch.Tensor, context: SteeringContext) -> torch.Tensor:
        return torch.full_like(chunks, 0.8)


@pytest.fixture
def world(plane: Callable[..., VectorEnv], prior: FlowPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_env", lambda name, rows: plane(rows))
    monkeypatch.setattr(module, "load_prior", lambda env, policy, device: prior)


@pytest.fixture
def data(plane: Callable[..., VectorEnv], prior: FlowPolicy, tmp_path: Path) -> Path:
    """Episodes in which somebody had the arm from the first decision to the last."""

    def arrays(episode: Episode) -> dict[str, Any]:
        found = arrays_of(episode.decisions)
        with torch.no_grad():
            base = SteeredPolicy(prior, steps=3).act(found["observations"], rng=0).base_chunk.numpy()
        found["intervened"] = np.ones(len(found["executed"]), bool)
        return found | {"base_chunks": base.astype(np.float32), "start_time": np.zeros_like(found["start_time"])}

    with SteeringDataset.create_or_open(tmp_path / "data", binding_of(prior, 3)) as dataset:
        source = dataset.add_source({"method": "by hand"})
        found = run_episodes(SteeredPolicy(prior, edit=Towards(), steps=3), plane(4), list(range(60)), record=True)
        for index, one in enumerate(found):
            dataset.append(SteeringEpisode("plane", one.seed, index, one.success, source, arrays(one)))
    return tmp_path / "data"


def train(data: Path, out: Path, settings: CorrectionsRun = RUN, **changes: Any) -> CorrectionsTrained:
    return train_corrections(data, "plane", out, **{"config": CONFIG, "settings": settings, "seeds": (0, 1), **changes})


def test_what_was_corrected_is_done(world: None, data: Path, tmp_path: Path, prior: FlowPolicy) -> None:
    before = prior.fingerprint
    done = train(data, tmp_path / "run", replace(RUN, steps=600), config=replace(CONFIG, alpha=0.0))
    assert prior.fingerprint == before
    assert done.base is not None
    assert done.base < 0.5
    assert min(done.success.values()) >= 0.6
    assert done.decisions > 20
    actor = SteeringActor.load(done.folders[1] / "checkpoints" / "actor.safetensors")
    assert actor.provenance["updates"] == 600
    curves = json.loads((tmp_path / "run" / "results.json").read_text())["curves"]
    assert curves["base"][-1]["success_rate"] == done.base
    assert curves["seed-1"][-1] == {"step": 600, "success_rate": done.success[1], "episodes": 10}


def test_a_noise_policy_that_was_corrected_must_drive_again(
    world: None, data: Path, tmp_path: Path, prior: FlowPolicy, plane: Callable[..., VectorEnv]
) -> None:
    """What is evaluated, and what the actor may be used on, is the noise policy that was driving."""
    normal, other = (Normaliser(torch.zeros(4), torch.ones(4)) for _ in range(2))
    config = RegressorConfig(inputs="observation", members=1, width=4, depth=1)
    regressor = ChunkRegressor(config, normal, other, binding_of(prior, 3))
    regressor.save(tmp_path / "noise.safetensors")
    settings = replace(RUN, steps=100, episodes=4)
    done = train(data, tmp_path / "run", settings, noise_policy=tmp_path / "noise.safetensors")
    driving = steer_learned(prior, regressor)
    seeds = [child_seed(child_seed(0, "validation"), "episode", index) for index in range(4)]
    assert done.base == sum(one.success for one in run_episodes(driving, plane(4), seeds)) / 4
    actor = SteeringActor.load(done.folders[0] / "checkpoints" / "actor.safetensors")
    assert actor.provenance["corrects"] == regressor.fingerprint
    with pytest.raises(MismatchError, match="corrects the noise policy"):
        steer_actor(prior, actor)
    found = run_episodes(steer_actor(driving, actor), plane(4), seeds)
    assert sum(one.success for one in found) / 4 == done.success[0]
    with pytest.raises(TrainingError, match="other settings"):
        train(data, tmp_path / "run", settings)


def test_a_run_that_was_killed_goes_on_with_the_same_numbers(
    world: None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(data, tmp_path / "whole")
    seen: list[int] = []

    def stop(progress: Any) -> None:
        seen.append(progress.step)
        if progress.step == 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "killed", on_progress=stop)
    done = train(data, tmp_path / "killed")
    assert seen == [100, 200]
    assert done.steps_done == 100
    for seed in (0, 1):
        actors = [SteeringActor.load(one.folders[seed] / "checkpoints" / "actor.safetensors") for one in (whole, done)]
        for name, tensor in actors[0].state_dict().items():
            torch.testing.assert_close(tensor, actors[1].state_dict()[name], rtol=0, atol=0)
    states = [load_file(tmp_path / name / "checkpoints" / "state.safetensors") for name in ("whole", "killed")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():  # critics, targets and optimiser, too
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=0)
    again = train(data, tmp_path / "killed")
    assert (again.steps_done, again.success, again.base) == (0, done.success, done.base)


def test_weights_that_are_no_numbers_stop_the_run(
    world: None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(data, tmp_path / "run", replace(RUN, steps=100, episodes=0))
    place = tmp_path / "run" / "seed-0" / "checkpoints" / "actor.safetensors"
    kept = place.read_bytes()
    update = module.CorrectionsLearner.update

    def broken(self: Any, *arguments: Any) -> Any:
        numbers = update(self, *arguments)
        with torch.no_grad():
            self.networks["actor"].weights[0].fill_(float("nan"))
        return numbers

    monkeypatch.setattr(module.CorrectionsLearner, "update", broken)
    with pytest.raises(TrainingError, match=r"not finite after update 100.*is safe"):
        train(data, tmp_path / "other", replace(RUN, steps=200, episodes=0))
    assert not (tmp_path / "other" / "seed-0").exists()
    assert place.read_bytes() == kept


def test_settings_are_read_back_and_other_ones_refused(world: None, data: Path, tmp_path: Path) -> None:
    settings = replace(RUN, steps=100, episodes=0)
    train(data, tmp_path / "run", settings)
    about, config, run = read_corrections_settings(tmp_path / "run")
    assert (about["env"], about["seeds"], about["data"]) == ("plane", [0, 1], str(data))
    assert (config, run) == (CONFIG, settings)
    with pytest.raises(TrainingError, match="other settings"):
        train(data, tmp_path / "run", replace(settings, steps=200))
    with pytest.raises(TrainingError):
        read_corrections_settings(tmp_path)


def test_nobody_intervened_or_it_is_another_task(world: None, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="elsewhere"):
        train_corrections(data, "elsewhere", tmp_path / "run", CONFIG, RUN)
    with pytest.raises(DatasetError):
        train(tmp_path / "nothing", tmp_path / "run")
    made = SteeringDataset.load(data)
    with SteeringDataset.create_or_open(tmp_path / "alone", made.binding) as dataset:
        dataset.add_source({"method": "by hand"})
        (episode, *_) = made.episodes
        nobody = {**episode.arrays, "intervened": np.zeros(episode.decisions, bool)}
        dataset.append(replace(episode, arrays=nobody))
    with pytest.raises(DatasetError, match="nobody intervened"):
        train(tmp_path / "alone", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"residual_bound": ()}, {"residual_bound": (0.0,)}, {"bound": -1.0}, {"episodes": -1}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        CorrectionsRun(**changes)
