"""Offline RL from the command line: train, go on, evaluate with guidance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from counterflow.cli import main

ENV = "ogbench/cube-single-task1"
TINY = ("width=8", "depth=2", "batch_size=8", "flow_steps=3", "compile=false")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Synthetic episodes of the cube's shapes, with rewards."""
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "cube-single-play.npz",
        observations=rng.standard_normal((124, 28)).astype(np.float32),
        actions=rng.uniform(-1, 1, (124, 5)).astype(np.float32),
        rewards=-rng.integers(0, 2, 124).astype(np.float32),
        masks=np.ones(124, np.float32),
        terminals=np.arange(124) % 31 == 30,
    )
    return tmp_path / "cube-single-play.npz"


def train(data: Path, out: Path, algorithm: str = "qgf", *more: str) -> int:
    command = ["train", algorithm, ENV, "--data", str(data), "--out", str(out), "--steps", "60", "--episodes", "0"]
    return main([*command, "--set", *TINY, *more])


def test_train_evaluate_and_go_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, tmp_path / "run", "qgf", "--seeds", "2", "--seed", "3") == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'run' / 'seed-4'}" in said
    assert "next: counterflow eval ogbench/cube-single-task1 --steer qgf --steps 3 --policy" in said
    result = tmp_path / "result.json"
    command = ["eval", ENV, "--policy", str(tmp_path / "run" / "seed-3"), "--episodes", "1", "--json", str(result)]
    guided = ["--steer", "qgf", "--weight", "0.5", "--best-of", "2", "--aggregation", "lower_confidence", "--rho", "2"]
    guided += ["--jacobian", "--schedule", "remaining", "--largest-factor", "5", "--no-clip"]
    assert main([*command, *guided]) == 0
    found = json.loads(result.read_text())
    assert found["settings"]["guidance"] == {
        "weight": 0.5,
        "estimate": "clean",
        "jacobian": True,
        "schedule": "remaining",
        "largest_factor": 5.0,
        "clip": False,
        "aggregation": "lower_confidence",
        "rho": 2.0,
        "best_of": 2,
        "radius": 0.5,
    }
    assert found["settings"]["weight"]["weight"] == 0.5
    assert main(["train", "resume", str(tmp_path / "run")]) == 0
    assert "nothing was left to do" in capsys.readouterr().out


def test_mistakes_are_explained(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # runs go to a folder here unless one is named
    assert train(data, tmp_path / "run", "rql", "--preset", "small") == 0
    capsys.readouterr()
    for arguments, words in (
        (["train", "rql", "ogbench/cube-singel-task1", "--data", str(data)], "did you mean"),
        (["train", "rql", ENV, "--data", str(tmp_path / "none.npz")], "there is no dataset"),
        (["train", "rql", ENV, "--data", str(data), "--set", "alhpa=3"], "did you mean 'alpha'"),
        (["train", "bc", str(data)], "--env"),
        (["eval", ENV, "--steer", "qgf"], "needs a critic"),
    ):
        assert main(arguments) != 0
        error = capsys.readouterr()
        assert words in " ".join((error.out + error.err).split()), arguments
    assert not (tmp_path / "runs").exists()
