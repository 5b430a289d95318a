"""Training from a dataset to a policy: interrupted and resumed, refused where it can't be right."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from counterflow.errors import (
    CheckpointError,
    DatasetError,
    InvalidInputError,
    MismatchError,
    StorageError,
    TrainingError,
    UnknownNameError,
)
from counterflow.experiments.train import Progress, Trained, read_bc_settings, train_bc
from counterflow.learning import BCConfig
from counterflow.policies import NetworkConfig, load

ENV = "ogbench/cube-single"
CONFIG = BCConfig(network=NetworkConfig(width=16, depth=1), steps=40, batch_size=16, precision="float32", compile=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Synthetic episodes of the cube's shapes: the observation stays, and the action is a function of it."""
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((10, 28)).astype(np.float32).repeat(30, axis=0)
    actions = np.tanh(observations[:, :5])
    terminals = np.zeros(300, bool)
    terminals[29::30] = True
    np.savez(tmp_path / "data.npz", observations=observations, actions=actions, terminals=terminals)
    return tmp_path / "data.npz"


def train(data: Path, run: Path, config: BCConfig = CONFIG, **changes: Any) -> Trained:
    return train_bc(
        data, ENV, run, config, **{"validate_every": 10, "checkpoint_every": 10, "report_every": 5, **changes}
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load(run).tensors()


class TestResuming:
    @pytest.mark.parametrize("stop_at", [5, 20, 25])
    def test_an_interruption_changes_nothing(self, data: Path, tmp_path: Path, stop_at: int) -> None:
        whole = train(data, tmp_path / "whole")
        assert whole.steps_done == 40

        def interrupt(progress: Progress) -> None:
            if progress.step == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "cut", on_progress=interrupt)
        resumed = train(data, tmp_path / "cut")
        assert resumed.steps_done == 40 - stop_at // 10 * 10 + (10 if stop_at % 10 == 0 else 0)
        expected = weights(tmp_path / "whole")
        assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "cut").items())
        assert resumed.validation_loss == whole.validation_loss
        metrics = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut")]
        assert metrics[0] == metrics[1]

    def test_reports_are_not_doubled_when_they_lie_between_checkpoints(self, data: Path, tmp_path: Path) -> None:
        def interrupt(progress: Progress) -> None:
            if progress.step == 35:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "cut", on_progress=interrupt, checkpoint_every=20)
        train(data, tmp_path / "cut", checkpoint_every=20)
        lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(5, 41, 5))
        assert [line["step"] for line in lines if "validation_loss" in line] == [10, 20, 30, 40]

    def test_a_finished_run_whose_policy_was_deleted_writes_it_again(self, data: Path, tmp_path: Path) -> None:
        first = train(data, tmp_path / "run")
        expected = weights(tmp_path / "run")
        first.path.unlink()
        again = train(data, tmp_path / "run")
        assert again.steps_done == 0
        assert again.validation_loss == first.validation_loss
        assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "run").items())

    def test_a_state_from_another_kind_of_device_is_refused(self, data: Path, tmp_path: Path) -> None:
        """A generator's state is 16 bytes long on a GPU, and some thousands on a CPU."""
        train(data, tmp_path / "run")
        state = tmp_path / "run" / "checkpoints" / "state.safetensors"
        elsewhere = {"rng": torch.zeros(16, dtype=torch.uint8), "batches": torch.zeros(16, dtype=torch.uint8)}
        save_file({**load_file(state), **elsewhere}, state)
        with pytest.raises(CheckpointError, match="does not fit"):
            train(data, tmp_path / "run")

    def test_a_finished_run_is_left_alone(self, data: Path, tmp_path: Path) -> None:
        first = train(data, tmp_path / "run")
        again = train(data, tmp_path / "run")
        assert again.steps_done == 0
        assert again.validation_loss == first.validation_loss

    def test_another_seed_or_setting_needs_another_folder(self, data: Path, tmp_path: Path) -> None:
        train(data, tmp_path / "run")
        with pytest.raises(TrainingError, match="seed 0 there, 1 here"):
            train(data, tmp_path / "run", seed=1)

    def test_the_settings_can_be_read_back(self, data: Path, tmp_path: Path) -> None:
        train(data, tmp_path / "run", seed=3)
        assert read_bc_settings(tmp_path / "run") == (data, ENV, 3, CONFIG)


class TestWhatComesOut:
    def test_a_policy_that_learned_and_says_where_it_is_from(self, data: Path, tmp_path: Path) -> None:
        config = BCConfig(
            network=NetworkConfig(width=64, depth=2), steps=300, batch_size=64, learning_rate=5e-3, compile=False
        )
        seen: list[Progress] = []
        trained = train(data, tmp_path / "run", config, validate_every=100, report_every=100, on_progress=seen.append)
        assert seen[-1].loss < 0.5 * seen[0].loss
        policy = load(trained.path)
        assert policy.family == ENV
        assert policy.action_spec.layout is not None
        assert policy.action_spec.low == (-1.0,) * 5
        assert policy.provenance["data"]["episodes"] == 9
        assert policy.provenance["data"]["held_out_episodes"] == 1
        assert policy.provenance["steps"] == 300

    def test_actions_can_be_normalised(self, data: Path, tmp_path: Path) -> None:
        config = BCConfig(**{**vars(CONFIG), "action_normalisation": "mean_std", "steps": 2})
        normaliser = load(train(data, tmp_path / "run", config).path).action_spec.normaliser
        assert normaliser is not None
        assert normaliser.scale.max() < 0.8


class TestRefusals:
    def test_data_of_another_environment(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(MismatchError, match=r"observations \(28,\).*ogbench/scene has \(40,\)"):
            train_bc(data, "ogbench/scene", tmp_path / "run", CONFIG)

    def test_actions_in_other_units(self, data: Path, tmp_path: Path) -> None:
        with np.load(data) as archive:
            content = dict(archive)
        np.savez(data, **{**content, "actions": content["actions"] * 100})
        with pytest.raises(DatasetError, match="other units"):
            train(data, tmp_path / "run")

    def test_an_unknown_environment(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(UnknownNameError, match="ogbench/cube-single"):
            train_bc(data, "ogbench/cube-singel", tmp_path / "run", CONFIG)

    def test_a_loss_that_runs_away_ends_the_run_and_keeps_the_checkpoint(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from counterflow.learning import BCLearner

        update = BCLearner.update

        def diverge(learner: BCLearner, batch: Any) -> torch.Tensor:
            loss = update(learner, batch)
            return loss * float("nan") if learner.step > 20 else loss

        monkeypatch.setattr(BCLearner, "update", diverge)
        with pytest.raises(TrainingError, match=r"loss is nan at update 25.*checkpoint .* is safe"):
            train(data, tmp_path / "run")
        monkeypatch.undo()
        assert train(data, tmp_path / "run").steps_done == 20

    def test_weights_that_run_away_between_two_reports_never_reach_a_checkpoint(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from counterflow.learning import BCLearner

        update = BCLearner.update

        def diverge(learner: BCLearner, batch: Any) -> torch.Tensor:
            loss = update(learner, batch)
            if learner.step == 20:  # the loss was still finite: it is computed before the step
                next(learner.policy.network.parameters()).data.fill_(float("inf"))
            return loss

        monkeypatch.setattr(BCLearner, "update", diverge)
        with pytest.raises(TrainingError, match=r"weights are not finite after update 20.*checkpoint .* is safe"):
            train(data, tmp_path / "run", report_every=40, validate_every=40)
        monkeypatch.undo()
        assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
        assert train(data, tmp_path / "run").steps_done == 30

    def test_a_full_disk_keeps_the_last_checkpoint(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import counterflow.experiments.run as module

        save, saved = module.save_tensors, []

        def full(tensors: Any, path: Path) -> None:
            if len(saved) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            saved.append(path)
            save(tensors, path)

        monkeypatch.setattr(module, "save_tensors", full)
        with pytest.raises(StorageError, match="the disk is full"):
            train(data, tmp_path / "run")
        monkeypatch.undo()
        assert train(data, tmp_path / "run").steps_done == 20

    @pytest.mark.parametrize("name", ["validate_every", "checkpoint_every", "report_every"])
    def test_intervals(self, data: Path, tmp_path: Path, name: str) -> None:
        with pytest.raises(InvalidInputError, match=f"{name} is 0"):
            train(data, tmp_path / "run", **{name: 0})
