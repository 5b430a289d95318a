"""Collecting from the real oracles: the layout, repeatability, interruptions."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.data import Recipe, collect
from counterflow.data.npz import save_npz
from counterflow.errors import InvalidInputError, MismatchError, StorageError, UnknownNameError, WorkerError

CUBE = "ogbench/cube-single"
SMALL: dict[str, Any] = {"episodes": 3, "validation_episodes": 1, "seed": 5, "max_episode_steps": 40}


def small(out: Path, env: str = CUBE, kind: Any = "play", **changes: Any) -> Any:
    return collect(env, kind, out=out, **{**SMALL, "workers": 0, **changes})


def content(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("collected") / "cube.npz"
    small(out)
    return out


class TestLayout:
    """What official downloads of OGBench hold."""

    @pytest.mark.parametrize("kind", ["play", "noisy"])
    @pytest.mark.parametrize(("env", "observation"), [(CUBE, 28), ("ogbench/scene", 40), ("ogbench/puzzle-3x3", 55)])
    def test_every_family_and_kind(self, env: str, observation: int, kind: str, tmp_path: Path) -> None:
        small(tmp_path / "x.npz", env, kind, episodes=1)
        arrays = content(tmp_path / "x.npz")
        steps = SMALL["max_episode_steps"]
        buttons = {"button_states"} if "cube" not in env else set()
        assert set(arrays) == {"observations", "actions", "terminals", "qpos", "qvel"} | buttons
        assert arrays["observations"].shape == (steps, observation)
        assert arrays["observations"].dtype == arrays["actions"].dtype == arrays["qpos"].dtype == np.float32
        assert arrays["terminals"].dtype == np.bool_
        assert np.flatnonzero(arrays["terminals"]).tolist() == [steps - 1]
        assert np.abs(arrays["actions"]).max() <= 1
        assert arrays["actions"].std(axis=0).max() > 0.05

    def test_held_out_episodes_and_provenance_lie_beside(self, collected: Path) -> None:
        assert content(collected)["terminals"].sum() == 3
        assert content(collected.with_name("cube-val.npz"))["terminals"].sum() == 1
        provenance = json.loads(collected.with_suffix(".json").read_text())
        assert provenance["recipe"]["env"] == CUBE
        assert provenance["recipe"]["noise"] == 0.1
        assert provenance["recipe"]["noise_smoothing"] == 0.5
        assert {"ogbench", "mujoco"} <= set(provenance["versions"])
        assert not collected.with_name("cube.partial").exists()

    def test_observations_follow_from_the_recorded_states(self, collected: Path) -> None:
        """Each observation belongs to its own row's state: joint angles are its first entries."""
        arrays = content(collected)
        np.testing.assert_allclose(arrays["observations"][:, :6], arrays["qpos"][:, :6], atol=1e-5)


class TestRepeatability:
    def test_worker_processes_change_nothing(self, collected: Path, tmp_path: Path) -> None:
        small(tmp_path / "cube.npz", workers=2)
        assert (tmp_path / "cube.npz").read_bytes() == collected.read_bytes()
        assert (tmp_path / "cube-val.npz").read_bytes() == collected.with_name("cube-val.npz").read_bytes()

    def test_another_seed_is_another_dataset(self, collected: Path, tmp_path: Path) -> None:
        small(tmp_path / "cube.npz", seed=6)
        assert not np.array_equal(content(tmp_path / "cube.npz")["actions"], content(collected)["actions"])

    def test_the_callers_random_numbers_are_left_alone(self, tmp_path: Path) -> None:
        np.random.seed(1)
        expected = np.random.rand()
        np.random.seed(1)
        small(tmp_path / "x.npz", episodes=1)
        assert np.random.rand() == expected


class TestInterruption:
    def test_a_kill_costs_nothing_that_was_finished(self, collected: Path, tmp_path: Path) -> None:
        """The process is really killed in the middle; going on makes only what is missing, and the same bytes."""
        out = tmp_path / "cube.npz"
        script = tmp_path / "killed.py"
        script.write_text(
            "from counterflow.data import collect\n"
            f"collect({CUBE!r}, 'play', out={str(out)!r}, workers=0, **{SMALL!r})\n"
        )
        process = subprocess.Popen([sys.executable, str(script)])
        partial = tmp_path / "cube.partial"
        until = time.monotonic() + 60
        while not list(partial.glob("episode-*.npz")):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished = len(list(partial.glob("episode-*.npz")))
        assert 0 < finished < 4
        assert not out.exists()
        counted: list[int] = []
        result = small(out, on_progress=lambda done, total, transitions: counted.append(done))
        assert result.made == 4 - finished
        assert counted[0] == finished
        assert out.read_bytes() == collected.read_bytes()

    def test_a_damaged_episode_is_made_again(self, collected: Path, tmp_path: Path) -> None:
        out = tmp_path / "cube.npz"

        def stop(done: int, total: int, transitions: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            small(out, on_progress=stop)
        victim = tmp_path / "cube.partial" / "episode-000000.npz"
        victim.write_bytes(victim.read_bytes()[:-100])
        assert small(out).made == 3
        assert out.read_bytes() == collected.read_bytes()

    def test_a_finished_dataset_is_not_made_again(self, collected: Path) -> None:
        before = collected.stat().st_mtime_ns
        assert small(collected).made == 0
        assert collected.stat().st_mtime_ns == before

    def test_a_full_disk_is_explained_and_loses_nothing(
        self, collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, written = tmp_path / "cube.npz", []

        def full(path: Path, arrays: Any) -> None:
            if len(written) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(path)
            save_npz(path, arrays)

        monkeypatch.setattr("counterflow.data.store.save_npz", full)
        with pytest.raises(StorageError, match=r"the disk is full.*episodes finished so far are safe") as raised:
            small(out)
        assert str(raised.value).count("the disk is full") == 1
        monkeypatch.undo()
        assert small(out).made == 2
        assert out.read_bytes() == collected.read_bytes()

    def test_a_worker_that_dies_is_reported(self, tmp_path: Path) -> None:
        def kill_workers(done: int, total: int, transitions: int) -> None:
            if done:
                children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                for child in children:
                    if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                        os.kill(int(child), signal.SIGKILL)

        with pytest.raises(WorkerError, match=r"exit code -9.*safe in"):
            small(tmp_path / "cube.npz", workers=1, on_progress=kill_workers)
        assert list((tmp_path / "cube.partial").glob("episode-*.npz"))


class TestRefusals:
    def test_another_dataset_at_the_path(self, collected: Path) -> None:
        before = collected.read_bytes()
        with pytest.raises(MismatchError, match="seed is 5 there and 6 here"):
            small(collected, seed=6)
        assert collected.read_bytes() == before

    def test_overwriting_on_request(self, tmp_path: Path) -> None:
        small(tmp_path / "x.npz", episodes=1)
        assert small(tmp_path / "x.npz", episodes=1, seed=6, overwrite=True).made == 2

    def test_two_processes_at_one_place(self, tmp_path: Path) -> None:
        def again(done: int, total: int, transitions: int) -> None:
            with pytest.raises(StorageError, match="another process is collecting"):
                small(tmp_path / "x.npz", episodes=1)

        small(tmp_path / "x.npz", episodes=1, on_progress=again)

    def test_unknown_family_and_kind(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'ogbench/cube-single'"):
            small(tmp_path / "x.npz", "ogbench/cube-singel")
        with pytest.raises(UnknownNameError, match="play"):
            small(tmp_path / "x.npz", kind="plya")

    @pytest.mark.parametrize(
        "changes",
        [{"episodes": 0}, {"validation_episodes": -1}, {"max_episode_steps": 1}, {"workers": -1}, {"seed": -1}],
    )
    def test_numbers_out_of_range(self, changes: dict[str, int], tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="expected"):
            small(tmp_path / "x.npz", **changes)

    def test_a_path_that_is_no_npz(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match=r"end in '\.npz'"):
            small(tmp_path / "x.hdf5")


@pytest.mark.parametrize("env", ["ogbench/antmaze-large", "ogbench/cube-single-goals"])
def test_only_families_with_oracles_are_collected(env: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown family of environments with oracles"):
        Recipe.official(env, "play", seed=0, episodes=1, validation_episodes=0)
