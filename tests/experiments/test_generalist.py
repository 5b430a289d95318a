"""Training a generalist: many tasks in, one policy out, the same numbers after an interruption, and evaluation by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import counterflow
from counterflow.data.npz import save_npz
from counterflow.envs import make_env
from counterflow.envs.libero import assets_folder
from counterflow.errors import DatasetError, MismatchError, MissingDependencyError, TrainingError
from counterflow.experiments.demonstrate import archive_of
from counterflow.experiments.evaluate import SHIPPED_PRIORS, evaluate, load_prior
from counterflow.experiments.generalist import (
    TRAINING,
    load_tasks,
    read_generalist_settings,
    train_generalist,
)
from counterflow.experiments.train import Cadence
from counterflow.policies import GeneralistConfig, GeneralistPolicy

TASKS = ["metaworld/drawer-close-v3", "metaworld/hammer-v3"]
SMALL = GeneralistConfig(width=16, encoder_depth=1, depth=1, heads=2, name_dim=8, sentence_dim=8, max_objects=4)
CONFIG = replace(TRAINING, horizon=4, steps=6, batch_size=16, compile=False, average=0.5)
OFTEN = Cadence(validate=3, checkpoint=3, report=3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two tasks' archives of made-up episodes."""
    pytest.importorskip("metaworld", reason="Meta-World is not installed: counterflow[metaworld]")
    folder = tmp_path / "data"
    folder.mkdir()
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng(number)
        save_npz(
            archive_of(folder, task),
            {
                "observations": rng.normal(size=(60, 39)).astype(np.float32),
                "actions": rng.uniform(-1, 1, (60, 4)).astype(np.float32),
                "terminals": np.arange(60) % 20 == 19,
            },
        )
    return folder


def test_tasks_share_one_dataset(data: Path) -> None:
    read = load_tasks(data, [*TASKS, "metaworld/push-v3"])
    assert (read.tasks, read.missing) == (TASKS, ["metaworld/push-v3"])
    packed = read.training.gather("observations")
    assert packed.shape[1] == 1 + 8 + 3 * 14  # the hammer's task has two objects and a goal
    assert {*np.unique(packed[:, 0])} == {0.0, 1.0}
    assert (
        packed[packed[:, 0] == 0][:, 1 + 8 + 2 * 14 :] == 0
    ).all()  # the drawer's has one, and its goal comes second


def test_an_interrupted_run_ends_with_the_same_policy(data: Path, tmp_path: Path) -> None:
    whole = train_generalist(data, TASKS, tmp_path / "whole", SMALL, CONFIG, cadence=OFTEN)

    class Killed(BaseException):
        pass

    def kill(progress: object) -> None:
        if progress.step == 6:  # type: ignore[attr-defined]
            raise Killed

    with pytest.raises(Killed):
        train_generalist(data, TASKS, tmp_path / "killed", SMALL, CONFIG, cadence=OFTEN, on_progress=kill)
    resumed = train_generalist(data, TASKS, tmp_path / "killed", SMALL, CONFIG, cadence=OFTEN)
    assert resumed.steps_done == 3
    policy = counterflow.load(resumed.path)
    assert isinstance(policy, GeneralistPolicy)
    assert policy.fingerprint == counterflow.load(whole.path).fingerprint
    assert policy.provenance["tasks"] == TASKS
    assert train_generalist(data, TASKS, tmp_path / "killed", SMALL, CONFIG, cadence=OFTEN).steps_done == 0
    found = read_generalist_settings(tmp_path / "whole")
    assert found == (data, TASKS, 0, SMALL, CONFIG)
    with pytest.raises(TrainingError, match="other settings"):
        train_generalist(data, TASKS, tmp_path / "whole", SMALL, replace(CONFIG, steps=7), cadence=OFTEN)

    # Nor with other demonstrations: their normalisers would be put under weights that came of these.
    archive = archive_of(data, TASKS[0])
    kept = archive.read_bytes()
    archive.write_bytes(archive_of(data, TASKS[1]).read_bytes())
    with pytest.raises(TrainingError, match="archives"):
        train_generalist(data, TASKS, tmp_path / "whole", SMALL, CONFIG, cadence=OFTEN)
    archive.write_bytes(kept)
    settings = tmp_path / "whole" / "config.yaml"
    settings.write_text(re.sub(r"archives:\n(  .*\n)+", "", settings.read_text()))
    assert train_generalist(data, TASKS, tmp_path / "whole", SMALL, CONFIG, cadence=OFTEN).steps_done == 0

    # One prior for tasks that it has never seen, too, steered by the commands' own code.
    task = "metaworld/window-open-v3"
    prior = load_prior(task, str(tmp_path / "whole"))
    with make_env(task, 1) as env:
        result = evaluate(env, prior, "frs", 1, 0)
    assert (result.env, result.policy, result.rate.episodes) == (task, policy.fingerprint, 1)
    assert result.queries > 10


def test_without_a_prior_the_way_to_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SHIPPED_PRIORS, "libero")
    with pytest.raises(
        MismatchError, match="'counterflow demonstrate libero/train' and 'counterflow train generalist'"
    ):
        load_prior("libero/90/KITCHEN_SCENE7_open_the_microwave")


def test_what_cannot_be_trained_on_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="counterflow demonstrate metaworld/reach-v3"):
        load_tasks(data, ["metaworld/reach-v3"])
    with pytest.raises(MismatchError, match="expected one family"):
        load_tasks(data, [*TASKS, "ogbench/scene-task1"])
    save_npz(
        archive_of(data, "ogbench/cube-single-task1"),
        {"observations": np.zeros((9, 28)), "actions": np.zeros((9, 5)), "terminals": np.arange(9) == 8},
    )
    with pytest.raises(MismatchError, match="which object"):
        load_tasks(data, ["ogbench/cube-single-task1"])


def test_the_shipped_generalist_closes_a_drawer_that_it_was_trained_to_close() -> None:
    pytest.importorskip("metaworld", reason="Meta-World is not installed: counterflow[metaworld]")
    with make_env("metaworld/drawer-close-v3", 2) as env:
        result = evaluate(env, load_prior("metaworld/drawer-close-v3"), "base", 2, 0)
    assert result.to_json()["successes"] == 2


def test_and_liberos_in_libero() -> None:
    task = "libero/90/KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet"
    try:
        assets_folder()
        pytest.importorskip("robosuite", reason="LIBERO is not installed: counterflow[libero]")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    with make_env(task, 1) as env:
        result = evaluate(env, load_prior(task), "base", 2, 0)
    assert result.to_json()["successes"] >= 1
