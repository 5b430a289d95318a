"""A training on a real simulator that is killed, or in which something breaks: the same command goes on to the same numbers."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from counterflow.envs import VectorEnv
from counterflow.errors import TrainingError
from counterflow.experiments.online import OnlineTrained, train_online
from counterflow.experiments.online_settings import OnlineRun
from counterflow.learning.dsrl import DSRLConfig
from counterflow.steering import SteeringSpace

CONFIG = DSRLConfig(width=16, depth=1, members=2, batch_size=8, update_ratio=1, warmup=8, compile=False)
EVERY = 3
RUN = OnlineRun(
    decisions=40,
    num_envs=1,
    steps=3,
    start_episodes=0,
    evaluate_every=20,
    episodes=1,
    checkpoint_every=EVERY,
    report_every=1,
    capacity=24,
)
KILLS = (range(4, 12), range(16, 24), range(28, 35))
"""Among which decisions a training is killed: around its first update, around an evaluation, with a replay that is full."""


def train(out: Path) -> OnlineTrained:
    return train_online("dsrl", "ogbench/cube-single-task1", out, CONFIG, RUN, workers=0)


def left(out: Path) -> dict[str, Any]:
    """Everything that a run leaves, but for the seconds that it took."""
    results = json.loads((out / "results.json").read_text())
    ledger = {name: value for name, value in results["ledger"].items() if name != "seconds"}
    state = load_file(out / "checkpoints" / "state.safetensors")
    actor = load_file(out / "seed-0" / "checkpoints" / "actor.safetensors")
    return {
        "metrics": (out / "metrics.jsonl").read_text().splitlines(),
        "curves": results["curves"],
        "ledger": ledger,
        "state": {name: values.numpy().tobytes() for name, values in state.items() if name != "loop.ledger"},
        "actor": {name: values.numpy().tobytes() for name, values in actor.items()},
    }


def killed(out: Path, decision: int, later: float) -> int:
    """Train in a process of its own, and kill it `later` seconds after it reported a decision; return how it ended."""
    metrics = out / "metrics.jsonl"
    with subprocess.Popen([sys.executable, __file__, str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None:
            reported = re.findall(r'"step": (\d+),', metrics.read_text()) if metrics.exists() else []
            if reported and int(reported[-1]) >= decision:
                time.sleep(later)
                process.kill()
                break
            time.sleep(0.002)
    return process.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a training leaves to which nothing happened."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out).decisions_done == RUN.decisions
    return left(out)


def test_a_training_that_is_killed_again_and_again_ends_as_one_that_is_not(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    chance = random.Random(0)
    for decisions in KILLS:
        at = chance.choice(decisions)
        assert killed(tmp_path / "run", at, chance.uniform(0, 0.05)) == -signal.SIGKILL
    done = train(tmp_path / "run").decisions_done
    assert 0 < done <= RUN.decisions - at + EVERY  # it went on from its last checkpoint
    assert left(tmp_path / "run") == whole


def broken(out: Path, after: int) -> bytes:
    """Train until the frozen flow breaks in its decision `after`; return the last checkpoint."""
    denoise, calls = SteeringSpace.denoise, 0

    def breaking(self: SteeringSpace, context: Any, noise: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return denoise(self, context, noise) * (torch.nan if calls > after else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SteeringSpace, "denoise", breaking)
        where = rf"the flow's chunk of environment 0 \(ogbench/cube-single-task1, seed \d+\) .* \(chunk {after + 1}\)"
        with pytest.raises(TrainingError, match=where):
            train(out)
    return (out / "checkpoints" / "state.safetensors").read_bytes()


def test_a_frozen_flow_that_breaks_leaves_the_last_checkpoint_to_go_on_from(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    broken(tmp_path / "run", 13)
    assert train(tmp_path / "run").decisions_done == RUN.decisions - 12
    assert left(tmp_path / "run") == whole


def test_a_simulator_that_does_not_come_back_is_not_gone_on_with(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    checkpoint = broken(out, 10)
    execute = VectorEnv.execute

    def drifting(self: VectorEnv, chunks: Any, *given: Any, **options: Any) -> Any:
        return execute(self, chunks * 0.99, *given, **options)

    state = out / "checkpoints" / "state.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(VectorEnv, "execute", drifting)
        with pytest.raises(
            TrainingError, match="did not come back to where it was left: the 9 chunks of its episode 0"
        ):
            train(out)
    assert state.read_bytes() == checkpoint
    # a checkpoint of before observations were kept says nothing of where it was left, and is gone on with
    save_file({name: value for name, value in load_file(state).items() if name != "loop.observations"}, state)
    assert train(out).decisions_done == RUN.decisions - 9
    assert left(out) == whole


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
