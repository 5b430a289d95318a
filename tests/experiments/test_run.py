"""A run's folder survives kills, keeps to one set of settings, and one process."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from counterflow.errors import CheckpointError, InvalidInputError, MismatchError, StorageError, TrainingError
from counterflow.experiments.run import Run, read_config

CONFIG = {"algorithm": "bc", "seed": 1, "network": {"name": "mlp", "width": 8}}


def test_settings_are_kept_and_compared(tmp_path: Path) -> None:
    with Run(tmp_path / "run", CONFIG):
        pass
    assert read_config(tmp_path / "run" / "config.yaml") == CONFIG
    with Run(tmp_path / "run", CONFIG):
        pass
    with pytest.raises(TrainingError, match="seed 1 there, 2 here"), Run(tmp_path / "run", {**CONFIG, "seed": 2}):
        pass


def test_settings_that_were_refused_leave_the_folder_free(tmp_path: Path) -> None:
    """Unless something came of them, or they lay there before."""
    for error in (InvalidInputError, MismatchError):
        with pytest.raises(error, match="no"), Run(tmp_path / "run", CONFIG):
            raise error("no")

    def refused_late(run: Run) -> None:
        run.report(1, loss=0.5)
        raise InvalidInputError("no")

    with pytest.raises(InvalidInputError, match="no"), Run(tmp_path / "run", {**CONFIG, "seed": 2}) as run:
        refused_late(run)
    with pytest.raises(TrainingError, match="seed 2 there"), Run(tmp_path / "run", CONFIG):
        pass
    with Run(tmp_path / "other", CONFIG):
        pass
    with pytest.raises(InvalidInputError, match="no"), Run(tmp_path / "other", CONFIG):
        raise InvalidInputError("no")
    assert read_config(tmp_path / "other" / "config.yaml") == CONFIG


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        Run(tmp_path, CONFIG),
        pytest.raises(TrainingError, match="another process is training"),
        Run(tmp_path, CONFIG),
    ):
        pass
    with Run(tmp_path, CONFIG):
        pass


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import os, sys; from counterflow.experiments.run import Run\n"
        f"try: Run({str(tmp_path)!r}, {CONFIG!r})\n"
        "except Exception as error: print(type(error).__name__)\n"
        "else: os.kill(os.getpid(), 9)\n"
    )

    def elsewhere() -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)

    with Run(tmp_path, CONFIG):
        assert elsewhere().stdout == "TrainingError\n"
    assert elsewhere().returncode == -9
    with Run(tmp_path, CONFIG):
        pass


def test_numbers_are_reported_once_even_after_a_kill(tmp_path: Path) -> None:
    with Run(tmp_path, CONFIG) as run:
        for step in (10, 20, 30):
            run.report(step, loss=1 / step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # cut off by a kill
    with Run(tmp_path, CONFIG) as run:
        assert [entry["step"] for entry in run.metrics()] == [10, 20, 30]
        run.forget_after(20)
        run.report(30, loss=0.5)
        assert run.metrics() == [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05}, {"step": 30, "loss": 0.5}]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_state_comes_back_and_damage_is_named(tmp_path: Path) -> None:
    with Run(tmp_path, CONFIG) as run:
        assert run.load_state() is None
        run.save_state({"x": torch.arange(3)})
        loaded = run.load_state()
        assert loaded is not None
        assert loaded["x"].tolist() == [0, 1, 2]
        state = run.checkpoints / "state.safetensors"
        state.write_bytes(state.read_bytes()[:10])
        with pytest.raises(CheckpointError, match="Delete it to begin the run anew"):
            run.load_state()


def test_a_full_disk_is_named_and_keeps_the_last_state(
    tmp_path: Path, largest_file: Callable[[int], AbstractContextManager[None]]
) -> None:
    with Run(tmp_path, CONFIG) as run:
        run.save_state({"x": torch.ones(10)})
        with largest_file(500), pytest.raises(StorageError, match=r"state\.safetensors: File too large"):
            run.save_state({"x": torch.zeros(1000)})
        state = run.load_state()
        assert state is not None
        assert state["x"].tolist() == [1.0] * 10
        run.report(1, loss=1.0)
        run._board.flush()  # TensorBoard's thread must not be the one that meets the limit: this is about the metrics
        with largest_file(1), pytest.raises(StorageError, match=r"metrics\.jsonl: File too large"):
            run.report(2, loss=1.0)
        assert run.metrics() == [{"step": 1, "loss": 1.0}]


def test_what_tensorboard_could_not_write_is_named_and_frees_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer works in a thread of its own and hands a full disk on at a later call, or at the end."""
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def report_and_close(broken: str) -> None:
        with Run(tmp_path, CONFIG) as run:
            run.report(1, loss=1.0)
            monkeypatch.setattr(SummaryWriter, broken, full)
            run.report(2, loss=1.0)

    for broken in ("add_scalar", "close"):
        with pytest.raises(StorageError, match="the disk is full"):
            report_and_close(broken)
        monkeypatch.undo()
    with Run(tmp_path, CONFIG):
        pass


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="can't be read"):
        read_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("just words")
    with pytest.raises(TrainingError, match="holds no settings"):
        read_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("{ broken: [")
    with pytest.raises(TrainingError, match="can't be read"):
        Run(tmp_path, CONFIG)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write"):
        Run(tmp_path / "file" / "run", CONFIG)


def test_metrics_are_json_lines(tmp_path: Path) -> None:
    with Run(tmp_path, CONFIG) as run:
        run.report(1, loss=0.25, validation_loss=0.5)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.25, "validation_loss": 0.5}
