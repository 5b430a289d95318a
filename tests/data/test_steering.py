"""Steering datasets: what was recorded comes back, whatever happens in between."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from counterflow.cli_dataset import DatasetCommand
from counterflow.data import Binding, SteeringDataset, SteeringEpisode, merge_steering, steering
from counterflow.data.steering import copy_filtered, repair
from counterflow.data.steering_episode import REQUIRED
from counterflow.errors import DatasetError, InvalidInputError, MismatchError, StorageError, UnknownNameError

BINDING = Binding("abc123", "ogbench/cube-single", 4, 2, 10, "euler")
TASK = "ogbench/cube-single-task1"
OTHER_TASK = "ogbench/cube-single-task2"
PROVENANCE = {"method": "frs", "seed": 0, "settings": {"steps": 5}}


def episode(index: int, source: str, env: str = TASK, *, success: bool = True, **changes: Any) -> SteeringEpisode:
    """An episode whose numbers its index determines; a change to None takes an array away."""
    rng = np.random.default_rng(index)
    decisions, horizon, dim = 3 + index % 2, BINDING.horizon, BINDING.dim

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    executed = rng.integers(1, horizon + 1, decisions)
    steps = int(executed.sum())
    arrays: dict[str, Any] = {
        "observations": normal(decisions, 5),
        "references": normal(decisions, horizon, dim),
        "active": rng.random(decisions) < 0.5,
        "steered": rng.random((decisions, horizon, dim)) < 0.5,
        "noise": normal(decisions, horizon, dim),
        "start_time": rng.random(decisions).astype(np.float32),
        "chunks": normal(decisions, horizon, dim),
        "executed": executed,
        "intervened": rng.random(decisions) < 0.5,
        "features": normal(decisions, 7),
        "step_observations": normal(steps, 5),
        "step_actions": normal(steps, dim),
        "rewards": normal(steps),
        "qpos": rng.standard_normal((steps, 2, 3)),
    }
    arrays = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
    return SteeringEpisode(env, 1000 + index, index, success, source, arrays)


def recorded(path: Path, indices: range = range(3), env: str = TASK, **changes: Any) -> str:
    """Record episodes; those with an odd index fail."""
    with SteeringDataset.create_or_open(path, BINDING) as dataset:
        source = dataset.add_source(PROVENANCE)
        for index in indices:
            dataset.append(episode(index, source, env, success=index % 2 == 0, **changes))
    return source


def files(path: Path) -> dict[str, bytes]:
    """Everything in a dataset's folder but the lock."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def same(first: SteeringEpisode, second: SteeringEpisode) -> bool:
    fields = ("env", "seed", "index", "success", "source")
    return all(getattr(first, name) == getattr(second, name) for name in fields) and (
        {name: (array.dtype, array.tolist()) for name, array in first.arrays.items()}
        == {name: (array.dtype, array.tolist()) for name, array in second.arrays.items()}
    )


def in_another_process(code: str, **names: Any) -> list[str]:
    """A command that runs `code` with this file's helpers at hand."""
    prelude = (
        f"import importlib.util, signal, resource\nspec = importlib.util.spec_from_file_location('t', {__file__!r})\n"
        "t = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(t)\n"
    )
    assignments = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return [sys.executable, "-c", prelude + assignments + code]


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A dataset of one episode, and the bytes of that."""
    path = tmp_path_factory.mktemp("one")
    recorded(path, range(1))
    (file,) = (path / "episodes").iterdir()
    return file, file.read_bytes()


class TestRecording:
    def test_what_was_recorded_comes_back(self, tmp_path: Path) -> None:
        source = recorded(tmp_path / "d")
        dataset = SteeringDataset.load(tmp_path / "d")
        assert dataset.binding == BINDING
        assert dataset.sources == {source: PROVENANCE}
        assert len(dataset) == 3
        assert dataset.successes == 2
        for index, found in enumerate(dataset.episodes):
            assert same(found, episode(index, source, success=index % 2 == 0))
            assert (found.decisions, found.steps) == (3 + index % 2, len(found.arrays["rewards"]))

    def test_what_is_optional_may_be_left_out(self, tmp_path: Path) -> None:
        without = dict.fromkeys(("features", "step_observations", "step_actions", "rewards", "qpos"))
        recorded(tmp_path, range(1), **without)
        assert set(SteeringDataset.load(tmp_path).episodes[0].arrays) == set(REQUIRED)

    def test_recording_goes_on_after_reopening(self, tmp_path: Path) -> None:
        source = recorded(tmp_path, range(2))
        with SteeringDataset.create_or_open(tmp_path, BINDING) as dataset:
            assert dataset.add_source(PROVENANCE) == source
            assert dataset.has(source, TASK, 1)
            assert not dataset.has(source, TASK, 2)
            assert not dataset.has(source, OTHER_TASK, 1)
            dataset.append(episode(2, source))
            assert [found.index for found in dataset] == [0, 1, 2]
        assert [found.index for found in SteeringDataset.load(tmp_path)] == [0, 1, 2]

    def test_the_same_data_are_the_same_bytes_in_any_order(self, tmp_path: Path) -> None:
        first, second = tmp_path / "a", tmp_path / "b"
        source = recorded(first, range(4))
        with SteeringDataset.create_or_open(second, BINDING) as dataset:
            dataset.add_source(dict(reversed(PROVENANCE.items())))
            for index in (3, 1, 0, 2):
                made = episode(index, source, success=index % 2 == 0)
                dataset.append(dataclasses.replace(made, arrays=dict(reversed(made.arrays.items()))))
        assert files(first) == files(second)
        assert len(files(first)) == 5

    def test_environments_with_similar_names_are_kept_apart(self, tmp_path: Path) -> None:
        names = ["a/b", "a+b", "a%2Bb", "a b", "a-b", "../a"]
        for env in names:
            recorded(tmp_path / "d", range(2), env)
        dataset = SteeringDataset.load(tmp_path / "d")
        assert [found.env for found in dataset] == sorted(names * 2)
        assert sorted(tmp_path.iterdir()) == [tmp_path / "d"]

    def test_the_callers_arrays_stay_the_callers(self, tmp_path: Path) -> None:
        with SteeringDataset.create_or_open(tmp_path, BINDING) as dataset:
            made = episode(0, dataset.add_source(PROVENANCE))
            dataset.append(made)
            made.arrays["noise"][:] = 0
            assert np.abs(dataset.episodes[0].arrays["noise"]).min() > 0

    def test_sources(self, tmp_path: Path) -> None:
        with SteeringDataset.create_or_open(tmp_path, BINDING) as dataset:
            first = dataset.add_source(PROVENANCE)
            assert dataset.add_source({**PROVENANCE, "seed": 1}) != first
            assert dataset.add_source(json.loads(json.dumps(PROVENANCE))) == first
            assert len(SteeringDataset.load(tmp_path).sources) == 2  # known on disk before any episode
            for wrong in ({"x": object()}, {"x": float("nan")}):
                with pytest.raises(InvalidInputError, match="can't be written as json"):
                    dataset.add_source(wrong)
            with pytest.raises(InvalidInputError, match=r"source that .* doesn't know.*add_source"):
                dataset.append(episode(0, "nobody"))

    def test_an_episode_is_there_once(self, tmp_path: Path) -> None:
        source = recorded(tmp_path)
        before = files(tmp_path)
        with (
            SteeringDataset.create_or_open(tmp_path, BINDING) as dataset,
            pytest.raises(InvalidInputError, match=r"episode 1 of .*task1 .* already"),
        ):
            dataset.append(episode(1, source, noise=np.ones((4, 4, 2), np.float32)))
        assert files(tmp_path) == before

    def test_only_an_open_dataset_is_recorded_to(self, tmp_path: Path) -> None:
        source = recorded(tmp_path)
        with SteeringDataset.create_or_open(tmp_path, BINDING) as closed:
            pass
        for dataset in (closed, SteeringDataset.load(tmp_path), closed.filter(success=True)):
            with pytest.raises(InvalidInputError, match="isn't open for recording"):
                dataset.append(episode(5, source))
            with pytest.raises(InvalidInputError, match="isn't open for recording"):
                dataset.add_source({})
        assert len(closed) == 3


class TestChecks:
    """Everything is refused where it enters, and nothing of it reaches the disk."""

    def refused(self, path: Path, made: Callable[[str], SteeringEpisode]) -> str:
        with SteeringDataset.create_or_open(path, BINDING) as dataset:
            source = dataset.add_source(PROVENANCE)
            before = files(path)
            with pytest.raises((InvalidInputError, MismatchError)) as error:
                dataset.append(made(source))
            assert files(path) == before
            assert not dataset.has(source, TASK, 0)
        return str(error.value)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize(
        "name", ["observations", "references", "noise", "start_time", "chunks", "features", "step_actions", "rewards"]
    )
    def test_not_a_number(self, name: str, value: float, tmp_path: Path) -> None:
        array = episode(0, "").arrays[name]
        array.reshape(len(array), -1)[1, -1] = value
        message = self.refused(tmp_path, lambda source: episode(0, source, **{name: array}))
        assert f"{name} of episode 0 of {TASK}" in message
        assert "NaN or infinite, first in row 1" in message

    @pytest.mark.parametrize("name", [*REQUIRED])
    def test_an_array_is_missing_or_of_another_type_or_shape(self, name: str, tmp_path: Path) -> None:
        array = episode(0, "").arrays[name]
        assert f"has no {name}" in self.refused(tmp_path, lambda source: episode(0, source, **{name: None}))
        other = array.astype(np.float64 if array.dtype != np.float64 else np.int64)
        message = self.refused(tmp_path, lambda source: episode(0, source, **{name: other}))
        assert f"{name} of episode 0" in message
        assert f"expected {array.dtype}" in message
        for wrong in (array[..., None], array[:-1], array[..., :0]):
            assert "expected" in self.refused(tmp_path, lambda source, w=wrong: episode(0, source, **{name: w}))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"observations": np.zeros((0, 5), np.float32)}, "has no decisions"),
            ({"executed": np.array([1, 0, 1])}, "executed of .* goes from 0 to 1; expected 1 to 4"),
            ({"executed": np.array([1, 5, 1])}, "goes from 1 to 5"),
            ({"start_time": np.array([0, 0, 1.5], np.float32)}, "start_time of .* expected 0 to 1"),
            ({"rewards": np.zeros(2, np.float32)}, r"rewards of .* is float32 \(2\); expected float32 \(\d+\)"),
            (
                {"step_actions": np.zeros((6, 3), np.float32)},
                r"expected float32 \(\d+, 2\), where the axes are \(T, A\)",
            ),
            ({"qpos": np.zeros((1, 2))}, "one a decision"),
            ({"qpos": np.array(["a", "b", "c"])}, "expected numbers"),
            ({"qpos": np.array([None] * 3)}, "expected numbers"),
            ({"qpos": [1, 2, 3]}, "is a list; expected a numpy array"),
            ({"episode": np.zeros(3)}, "called 'episode'"),
            ({"../qpos": np.zeros(3)}, "called '../qpos'"),
        ],
    )
    def test_contents(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        assert re.search(message, self.refused(tmp_path, lambda source: episode(0, source, **changes)))

    @pytest.mark.parametrize(
        ("field", "value"), [("index", -1), ("index", 1.5), ("seed", -1), ("success", 1.0), ("env", "")]
    )
    def test_fields(self, field: str, value: Any, tmp_path: Path) -> None:
        made = lambda source: dataclasses.replace(episode(0, source), **{field: value})  # noqa: E731
        assert repr(value) in self.refused(tmp_path, made)

    def test_episodes_must_be_alike(self, tmp_path: Path) -> None:
        recorded(tmp_path, range(1, 3))
        for name in ("observations", "features", "qpos"):
            array = episode(0, "").arrays[name]
            wider = np.concatenate([array, array], axis=1)
            changes = {name: wider, **({"step_observations": None} if name == "observations" else {})}
            message = self.refused(tmp_path, lambda source, c=changes: episode(0, source, **c))
            assert f"{name} of episode 0" in message
            assert "record these into another folder" in message


class TestInterruption:
    def test_a_kill_between_episodes_costs_nothing(self, tmp_path: Path) -> None:
        """The process is really killed; the same lines make what is missing, and the same bytes."""
        path, indices = tmp_path / "d", range(60)
        code = "t.recorded(t.Path(path), range(60))"
        process = subprocess.Popen(in_another_process(code, path=str(path)))
        until = time.monotonic() + 60
        while len(list(path.glob("episodes/[!.]*.npz"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert 3 <= len(SteeringDataset.load(path)) < len(indices)
        with SteeringDataset.create_or_open(path, BINDING) as dataset:
            source = dataset.add_source(PROVENANCE)
            for index in indices:
                if not dataset.has(source, TASK, index):
                    dataset.append(episode(index, source, success=index % 2 == 0))
        recorded(tmp_path / "whole", indices)
        assert files(path) == files(tmp_path / "whole")

    def test_a_kill_in_the_middle_of_an_episode(self, tmp_path: Path) -> None:
        """The system ends the process while it writes the third episode, which leaves half of a file."""
        code = (
            "source = t.recorded(t.Path(path), range(2))\n"
            "dataset = t.SteeringDataset.create_or_open(path, t.BINDING)\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
            "dataset.append(t.episode(2, source))"
        )
        ended = subprocess.run(in_another_process(code, path=str(tmp_path)), check=False)
        assert ended.returncode == -signal.SIGXFSZ
        halves = list(tmp_path.glob("episodes/.*.npz"))
        assert [half.stat().st_size for half in halves] == [3000]
        assert [found.index for found in SteeringDataset.load(tmp_path)] == [0, 1]
        assert recorded(tmp_path, range(2, 3))
        assert not halves[0].exists()
        assert [found.index for found in SteeringDataset.load(tmp_path)] == [0, 1, 2]

    def test_a_kill_before_the_manifest(self, tmp_path: Path) -> None:
        (tmp_path / ".lock").touch()
        (tmp_path / ".manifest.partial-1.json").write_text("{")
        recorded(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "episodes", "manifest.json"]

    def test_a_full_disk(self, tmp_path: Path, largest_file: Callable[[int], AbstractContextManager[None]]) -> None:
        source = recorded(tmp_path, range(2))
        before = files(tmp_path)
        with SteeringDataset.create_or_open(tmp_path, BINDING) as dataset:
            with largest_file(3000), pytest.raises(StorageError, match=r"File too large.*2 episodes.* are safe"):
                dataset.append(episode(2, source))
            with largest_file(100), pytest.raises(StorageError, match="are safe"):
                dataset.add_source({"another": 1})
            assert files(tmp_path) == before
            assert list(dataset.sources) == [source]
            dataset.append(episode(2, source))  # once there is room again
        assert len(SteeringDataset.load(tmp_path)) == 3

    def test_one_process_records_at_a_time(self, tmp_path: Path) -> None:
        code = (
            "with t.SteeringDataset.create_or_open(path, t.BINDING) as dataset:\n"
            "    dataset.append(t.episode(0, dataset.add_source(t.PROVENANCE)))\n"
            "    print('recording', flush=True)\n    input()"
        )
        with subprocess.Popen(
            in_another_process(code, path=str(tmp_path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "recording\n"
            for opening in (lambda: SteeringDataset.create_or_open(tmp_path, BINDING), lambda: repair(tmp_path)):
                with pytest.raises(StorageError, match="another process is recording to"):
                    opening()
            assert len(SteeringDataset.load(tmp_path)) == 1  # reading goes on
            other.kill()
        recorded(tmp_path, range(1, 2))

    def test_reading_while_a_new_recording_begins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another process names a source and records its first episode while this one looks at the files."""
        recorded(tmp_path)

        def meanwhile(path: Path, original: Any = steering._episode_files) -> list[Path]:
            monkeypatch.setattr(steering, "_episode_files", original)
            with SteeringDataset.create_or_open(tmp_path, BINDING) as dataset:
                dataset.append(episode(0, dataset.add_source({"another": 1})))
            return original(path)

        monkeypatch.setattr(steering, "_episode_files", meanwhile)
        assert len(SteeringDataset.load(tmp_path)) == 4

    def test_a_failure_to_open_lets_others_in(self, tmp_path: Path) -> None:
        recorded(tmp_path)
        with pytest.raises(MismatchError):
            SteeringDataset.create_or_open(tmp_path, dataclasses.replace(BINDING, steps=3))
        recorded(tmp_path, range(3, 4))


class TestBinding:
    @pytest.mark.parametrize(
        ("field", "value"),
        [("policy", "def"), ("family", "x"), ("horizon", 5), ("dim", 3), ("steps", 11), ("solver", "rk4")],
    )
    def test_every_field_must_agree(self, field: str, value: Any, tmp_path: Path) -> None:
        recorded(tmp_path / "d")
        before = files(tmp_path / "d")
        other = dataclasses.replace(BINDING, **{field: value})
        for opening in (
            lambda: SteeringDataset.create_or_open(tmp_path / "d", other),
            lambda: self.merged_with(other, tmp_path),
        ):
            with pytest.raises(MismatchError) as error:
                opening()
            message = str(error.value)
            assert field in message
            assert repr(value) in message
            assert repr(getattr(BINDING, field)) in message
        assert files(tmp_path / "d") == before
        assert not (tmp_path / "out").exists()

    @staticmethod
    def merged_with(other: Binding, path: Path) -> None:
        SteeringDataset.create_or_open(path / "other", other).close()
        merge_steering([path / "d", path / "other"], path / "out")

    @pytest.mark.parametrize(("field", "value"), [("horizon", 0), ("dim", True), ("steps", 1.0), ("solver", "eulr")])
    def test_nonsense(self, field: str, value: Any, tmp_path: Path) -> None:
        with pytest.raises((InvalidInputError, UnknownNameError), match=repr(value)):
            SteeringDataset.create_or_open(tmp_path / "d", dataclasses.replace(BINDING, **{field: value}))
        assert not (tmp_path / "d").exists()


class TestForeign:
    def test_there_is_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "empty").mkdir()
        for name in ("none", "file", "empty"):
            with pytest.raises(DatasetError, match=rf"no steering dataset at .*{name}.*check the path"):
                SteeringDataset.load(tmp_path / name)
            with pytest.raises(DatasetError, match="no steering dataset"):
                repair(tmp_path / name)
        with pytest.raises(DatasetError, match="is a file"):
            SteeringDataset.create_or_open(tmp_path / "file", BINDING)

    def test_another_folder_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years")
        with pytest.raises(DatasetError, match=r"holds thesis\.tex.*new folder"):
            SteeringDataset.create_or_open(tmp_path, BINDING)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_one_may_ask_first_and_leaves_no_trace(self, tmp_path: Path) -> None:
        recorded(tmp_path / "there")
        before = files(tmp_path)
        for name in ("there", "new"):
            SteeringDataset.check_recordable(tmp_path / name, BINDING)
        with pytest.raises(MismatchError, match="way of denoising"):
            SteeringDataset.check_recordable(tmp_path / "there", dataclasses.replace(BINDING, steps=3))
        with pytest.raises(DatasetError, match="so it is no steering dataset"):
            SteeringDataset.check_recordable(tmp_path / "there" / "episodes", BINDING)
        assert files(tmp_path) == before
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "lerobot"}, "is no steering dataset"),
            ({"format_version": 2, "counterflow_version": "9.1"}, "written by counterflow 9.1.*Update counterflow"),
            ({"format_version": None}, "format None"),
            ({"binding": {"policy": "x"}}, "changed or damaged"),
            ({"binding": {**BINDING.to_json(), "horizon": "4"}}, "changed or damaged.*horizon is '4'"),
            ({"sources": {"abc": PROVENANCE}}, "changed or damaged.*sources"),
            ({"sources": []}, "changed or damaged.*sources"),
        ],
    )
    def test_another_manifest(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        recorded(tmp_path)
        manifest = tmp_path / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
        before = files(tmp_path)
        for opening in (SteeringDataset.load, lambda path: SteeringDataset.create_or_open(path, BINDING), repair):
            with pytest.raises(DatasetError, match=message):
                opening(tmp_path)
        assert files(tmp_path) == before

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
    def test_no_json(self, content: bytes, tmp_path: Path) -> None:
        recorded(tmp_path)
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(DatasetError, match="can't be read|is no steering dataset"):
            SteeringDataset.load(tmp_path)


class TestDamage:
    @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_damage_is_found_or_harmless(self, data: st.DataObject, one_file: tuple[Path, bytes]) -> None:
        """Cut the file off, or change any of its bytes: never other numbers, never another error."""
        file, content = one_file
        place = data.draw(st.integers(0, len(content) - 1), label="place")
        if data.draw(st.booleans(), label="cut"):
            damaged = content[:place]
        else:
            byte = data.draw(st.integers(1, 255), label="change") ^ content[place]
            damaged = content[:place] + bytes([byte]) + content[place + 1 :]
        file.write_bytes(damaged)
        message = ""
        try:
            (found,) = SteeringDataset.load(file.parent.parent)
        except DatasetError as error:
            message = str(error)
        finally:
            file.write_bytes(content)
        if message:
            assert str(file) in message
            assert "counterflow dataset repair" in message
        else:
            assert len(damaged) == len(content)
            assert same(found, episode(0, found.source))

    def test_a_size_that_was_damaged_is_not_believed(self, one_file: tuple[Path, bytes]) -> None:
        """A member that claims to be larger than any memory."""
        true, false = b"'shape': (3, 4, 2), }" + b" " * 10, b"'shape': (10000000000000, 4, 2), }"
        file, content = one_file
        assert true in content
        file.write_bytes(content.replace(true, false[: len(true)].ljust(len(true))))
        try:
            with pytest.raises(DatasetError, match=r"checksum of \w+\.npy is wrong"):
                SteeringDataset.load(file.parent.parent)
        finally:
            file.write_bytes(content)

    def test_repair_sets_aside_what_is_damaged(self, tmp_path: Path) -> None:
        source = recorded(tmp_path, range(4))
        whole = files(tmp_path)
        assert repair(tmp_path) == []
        assert files(tmp_path) == whole
        paths = sorted((tmp_path / "episodes").iterdir())
        paths[1].write_bytes(paths[1].read_bytes()[:-300])
        (tmp_path / "episodes" / "stranger.npz").write_bytes(b"not a zip")
        (tmp_path / "episodes" / ".x.partial-1.npz").write_bytes(b"half")
        with pytest.raises(DatasetError, match=re.escape(paths[1].name)):
            SteeringDataset.load(tmp_path)
        with pytest.raises(DatasetError, match=re.escape(paths[1].name)):
            SteeringDataset.create_or_open(tmp_path, BINDING)
        assert repair(tmp_path) == [tmp_path / "damaged" / paths[1].name, tmp_path / "damaged" / "stranger.npz"]
        assert (tmp_path / "damaged" / "stranger.npz").read_bytes() == b"not a zip"
        assert [found.index for found in SteeringDataset.load(tmp_path)] == [0, 2, 3]
        recorded(tmp_path, range(1, 2))
        assert {name: content for name, content in files(tmp_path).items() if "damaged" not in name} == whole
        assert SteeringDataset.load(tmp_path).has(source, TASK, 1)

    def test_files_that_were_exchanged_or_renamed(self, tmp_path: Path) -> None:
        recorded(tmp_path, range(2))
        first, second = sorted((tmp_path / "episodes").iterdir())
        second.write_bytes(first.read_bytes())
        with pytest.raises(DatasetError, match="belongs into"):
            SteeringDataset.load(tmp_path)

    def test_an_episode_of_an_unknown_recording(self, tmp_path: Path) -> None:
        recorded(tmp_path)
        manifest = tmp_path / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "sources": {}}))
        with pytest.raises(DatasetError, match="doesn't know its source"):
            SteeringDataset.load(tmp_path)

    def test_numbers_that_fit_another_action_space(self, tmp_path: Path) -> None:
        recorded(tmp_path)
        manifest = tmp_path / "manifest.json"
        changed = {**BINDING.to_json(), "dim": 3}
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "binding": changed}))
        with pytest.raises(
            DatasetError, match=r"references of .* is float32 \(3, 4, 2\); expected float32 \(3, 4, 3\)"
        ):
            SteeringDataset.load(tmp_path)


class TestReading:
    @pytest.fixture(scope="class")
    def dataset(self, tmp_path_factory: pytest.TempPathFactory) -> SteeringDataset:
        """Two recordings of two tasks; even episodes succeed."""
        path = tmp_path_factory.mktemp("read")
        recorded(path, range(6))
        recorded(path, range(4), OTHER_TASK)
        with SteeringDataset.create_or_open(path, BINDING) as dataset:
            source = dataset.add_source({"method": "human"})
            for index in range(3):
                dataset.append(episode(index, source, success=index == 0))
        return SteeringDataset.load(path)

    def test_order(self, dataset: SteeringDataset) -> None:
        keys = [(found.env, found.source, found.index) for found in dataset.episodes]
        assert keys == sorted(keys)
        assert len(keys) == len(dataset) == 13

    def test_filter(self, dataset: SteeringDataset) -> None:
        assert len(dataset.filter()) == 13
        assert len(dataset.filter(success=True)) == dataset.successes == dataset.require_successes().successes == 6
        assert len(dataset.filter(success=False)) == 7
        assert {found.env for found in dataset.filter(env=OTHER_TASK)} == {OTHER_TASK}
        part = dataset.filter(success=True, env=OTHER_TASK)
        assert [(found.env, found.index) for found in part] == [(OTHER_TASK, 0), (OTHER_TASK, 2)]
        assert part.episodes[0] is dataset.filter(env=OTHER_TASK).episodes[0]  # nothing is copied
        assert part.binding == BINDING

    def test_first_counts_what_the_other_filters_leave_of_each_task(self, dataset: SteeringDataset) -> None:
        failed = [found for found in dataset if not found.success]
        expected = [next(found for found in failed if found.env == env) for env in (TASK, OTHER_TASK)]
        assert dataset.filter(success=False, first=1).episodes == expected
        for first in range(1, 12):
            kept = dataset.filter(first=first).episodes
            for env, count in ((TASK, 9), (OTHER_TASK, 4)):
                of_task = [found for found in dataset if found.env == env]
                assert [found for found in kept if found.env == env] == of_task[: min(first, count)]

    def test_filters_that_leave_nothing(self, dataset: SteeringDataset, tmp_path: Path) -> None:
        with pytest.raises(UnknownNameError, match=f"did you mean .*{OTHER_TASK}"):
            dataset.filter(env="ogbench/cube-single-task3")
        with pytest.raises(InvalidInputError, match="first episodes is 0"):
            dataset.filter(first=0)
        failed = dataset.filter(success=False)
        for asking in (lambda: failed.filter(success=True), failed.require_successes):
            with pytest.raises(DatasetError, match=r"no successful episode: all 7 of .* failed\. Record more"):
                asking()
        with pytest.raises(DatasetError, match="no failed episode"):
            dataset.filter(success=True).filter(success=False)
        with SteeringDataset.create_or_open(tmp_path, BINDING) as empty:
            for asking in (empty.filter, empty.require_successes, lambda: empty.concatenated(["noise"])):
                with pytest.raises(DatasetError, match="no episodes"):
                    asking()

    @given(fraction=st.floats(0.001, 0.999), seed=st.integers(0, 1000))
    def test_split(self, dataset: SteeringDataset, fraction: float, seed: int) -> None:
        rest, part = dataset.split(fraction, seed)
        assert sorted([*rest, *part], key=dataset.episodes.index) == dataset.episodes
        assert len(part) == min(max(1, round(13 * fraction)), 12)
        again, repeated = dataset.split(fraction, seed)
        assert (again.episodes, repeated.episodes) == (rest.episodes, part.episodes)

    def test_seeds_split_differently(self, dataset: SteeringDataset) -> None:
        assert len({tuple(map(id, dataset.split(0.5, seed)[1])) for seed in range(10)}) > 5

    def test_what_cannot_be_split(self, dataset: SteeringDataset) -> None:
        for fraction in (0, 1, -1, float("nan")):
            with pytest.raises(InvalidInputError, match="fraction"):
                dataset.split(fraction)
        with pytest.raises(InvalidInputError, match="1 episodes; expected two"):
            dataset.filter(env=OTHER_TASK, first=1).split(0.5)

    def test_concatenated(self, dataset: SteeringDataset) -> None:
        part = dataset.filter(success=True)
        joined = part.concatenated(["noise", "intervened"])
        assert set(joined) == {"noise", "intervened", "episode"}
        assert joined["episode"].dtype == np.int64
        for index, found in enumerate(part):
            for name in ("noise", "intervened"):
                np.testing.assert_array_equal(joined[name][joined["episode"] == index], found.arrays[name])
        assert len(joined["noise"]) == sum(found.decisions for found in part)
        steps = part.concatenated(["rewards", "qpos"])
        assert len(steps["episode"]) == len(steps["qpos"]) == sum(found.steps for found in part)
        joined["noise"][:] = 0
        assert np.abs(part.episodes[0].arrays["noise"]).min() > 0

    def test_what_cannot_be_concatenated(self, dataset: SteeringDataset, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="one row an executed action"):
            dataset.concatenated(["noise", "rewards"])
        with pytest.raises(UnknownNameError, match="did you mean 'rewards'"):
            dataset.concatenated(["reward"])
        with pytest.raises(InvalidInputError, match="no array was asked for"):
            dataset.concatenated([])
        recorded(tmp_path, range(1))
        recorded(tmp_path, range(1, 2), features=None)
        with pytest.raises(DatasetError, match="episode 1 .* has no features, and others do"):
            SteeringDataset.load(tmp_path).concatenated(["features"])

    def test_summary(self, tmp_path: Path) -> None:
        noise = np.zeros((3, 4, 2), np.float32)
        noise[0] = 0.5  # norm 0.5 * sqrt(8)
        noise[1, 0] = 1.5, -3.5  # norm sqrt(14.5)
        intervened, executed = np.array([True, False, False]), np.array([4, 4, 1])
        none = dict.fromkeys(("step_observations", "step_actions", "rewards", "qpos"))
        with SteeringDataset.create_or_open(tmp_path, BINDING) as dataset:
            empty = dataset.summary()
            assert (empty["episodes"], empty["noise_norm"]) == (0, None)
            source, silent = dataset.add_source(PROVENANCE), dataset.add_source({})
            changes = {"noise": noise, "intervened": intervened, "executed": executed, **none}
            dataset.append(episode(0, source, **changes))
            dataset.append(episode(0, source, OTHER_TASK, success=False, **changes))
        found = json.loads(json.dumps(SteeringDataset.load(tmp_path).summary()))
        one = {"episodes": 1, "successes": 1, "decisions": 3, "steps": 9}
        both = {"episodes": 2, "successes": 1, "decisions": 6, "steps": 18}
        assert {name: found[name] for name in both} == both
        assert found["environments"] == {TASK: one, OTHER_TASK: {**one, "successes": 0}}
        assert found["sources"][source] == {**both, "provenance": PROVENANCE}
        assert found["sources"][silent]["episodes"] == 0
        assert found["interventions"] == pytest.approx(1 / 3)
        assert found["noise_norm"] == pytest.approx((0.5 * 8**0.5 + 14.5**0.5) / 3)
        assert found["noise_beyond"] == pytest.approx({"1": 2 / 24, "2": 1 / 24, "3": 1 / 24})
        assert found["binding"] == BINDING.to_json()


class TestMerge:
    @pytest.fixture
    def parts(self, tmp_path: Path) -> list[Path]:
        """Two datasets that share episode 2, and one of another recording."""
        recorded(tmp_path / "a", range(3))
        recorded(tmp_path / "b", range(2, 5))
        with SteeringDataset.create_or_open(tmp_path / "c", BINDING) as dataset:
            dataset.append(episode(0, dataset.add_source({"method": "human"}), OTHER_TASK))
        return [tmp_path / name for name in "abc"]

    def test_every_episode_once(self, parts: list[Path], tmp_path: Path) -> None:
        before = [files(path) for path in parts]
        merged = merge_steering(parts, tmp_path / "out")
        assert [(found.env, found.index) for found in merged] == [(TASK, i) for i in range(5)] + [(OTHER_TASK, 0)]
        assert list(map(same, SteeringDataset.load(tmp_path / "out"), merged)) == [True] * 6
        assert len(merged.sources) == 2
        assert [files(path) for path in parts] == before
        once = files(tmp_path / "out")
        merge_steering(parts, tmp_path / "out")
        merge_steering(list(reversed(parts)), tmp_path / "reversed")
        assert files(tmp_path / "out") == files(tmp_path / "reversed") == once

    def test_an_interrupted_merge_is_completed(
        self, parts: list[Path], tmp_path: Path, largest_file: Callable[[int], AbstractContextManager[None]]
    ) -> None:
        large = np.zeros((3, 5000))
        recorded(parts[1], range(6, 7), frames=large)
        with largest_file(large.nbytes), pytest.raises(StorageError, match=r"5 episodes recorded so far are safe"):
            merge_steering(parts, tmp_path / "out")
        assert len(SteeringDataset.load(tmp_path / "out")) == 5
        merge_steering(parts, tmp_path / "out")
        merge_steering(parts, tmp_path / "whole")
        assert files(tmp_path / "out") == files(tmp_path / "whole")

    def test_episodes_that_contradict_each_other(self, parts: list[Path], tmp_path: Path) -> None:
        recorded(tmp_path / "d", range(1, 2), noise=np.ones((4, 4, 2), np.float32))
        with pytest.raises(MismatchError, match="episode 1 .* differs from the one.*Leave one of them out"):
            merge_steering([parts[0], tmp_path / "d"], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_episodes_that_cannot_be_joined(self, parts: list[Path], tmp_path: Path) -> None:
        recorded(tmp_path / "d", range(7, 8), observations=np.ones((4, 6), np.float32), step_observations=None)
        with pytest.raises(MismatchError, match="observations of episode 7"):
            merge_steering([parts[0], tmp_path / "d"], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_place_that_is_taken(self, parts: list[Path], tmp_path: Path) -> None:
        before = files(parts[0])
        with pytest.raises(InvalidInputError, match="read and written at once"):
            merge_steering(parts, parts[0].parent / "x" / ".." / "a")
        recorded(tmp_path / "full", range(9, 10))
        with pytest.raises(MismatchError, match="holds episode 9 .*new folder"):
            merge_steering(parts, tmp_path / "full")
        with pytest.raises(InvalidInputError, match="no dataset to merge"):
            merge_steering([], tmp_path / "out")
        assert files(parts[0]) == before
        assert len(SteeringDataset.load(tmp_path / "full")) == 1

    def test_copy_filtered(self, parts: list[Path], tmp_path: Path) -> None:
        merge_steering(parts, tmp_path / "all")
        for _ in range(2):
            copied = copy_filtered(tmp_path / "all", tmp_path / "out", success=True, env=TASK, first=2)
            assert [(found.env, found.index) for found in copied] == [(TASK, 0), (TASK, 2)]
        assert list(map(same, SteeringDataset.load(tmp_path / "out"), copied)) == [True] * 2
        assert list(copied.sources.values()) == [PROVENANCE]
        with pytest.raises(MismatchError, match="Choose a new folder"):
            copy_filtered(tmp_path / "all", tmp_path / "out", env=TASK, first=1)
        with pytest.raises(InvalidInputError, match="read and written at once"):
            copy_filtered(tmp_path / "all", tmp_path / "all")


class TestCommandLine:
    def run(self, *arguments: object) -> str:
        console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
        kind: Any = DatasetCommand
        tyro.cli(kind, args=[str(argument) for argument in arguments]).run(console)
        console.file.close()
        return console.export_text()

    def test_summary(self, tmp_path: Path) -> None:
        recorded(tmp_path / "d")
        said = self.run("summary", tmp_path / "d", "--json", tmp_path / "x.json")
        counts = json.loads((tmp_path / "x.json").read_text())
        assert counts == json.loads(json.dumps(SteeringDataset.load(tmp_path / "d").summary()))
        row = next(line for line in said.splitlines() if TASK in line)
        assert [int(word) for word in row.split() if word.isdigit()] == [3, 2, counts["decisions"], counts["steps"]]
        assert f"norm {counts['noise_norm']:.2f} (Gaussian about 2.83)" in said
        assert f"{counts['noise_beyond']['1']:.1%} of its numbers beyond 1 (Gaussian 31.7%)" in said
        assert "abc123 for ogbench/cube-single" in said

    def test_merge_filter_repair(self, tmp_path: Path) -> None:
        recorded(tmp_path / "a", range(3))
        recorded(tmp_path / "b", range(3, 6), OTHER_TASK)
        self.run("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
        assert len(SteeringDataset.load(tmp_path / "out")) == 6
        said = self.run(
            *("filter", tmp_path / "out", "--out", tmp_path / "f", "--success-only", "--env", TASK, "--first", 2)
        )
        assert str(tmp_path / "f") in said
        assert [(found.env, found.index) for found in SteeringDataset.load(tmp_path / "f")] == [(TASK, 0), (TASK, 2)]
        self.run("filter", tmp_path / "out", "--out", tmp_path / "g")
        assert len(SteeringDataset.load(tmp_path / "g")) == 6
        victim = min((tmp_path / "a" / "episodes").iterdir())
        victim.write_bytes(b"")
        assert f"{tmp_path / 'a' / 'damaged' / victim.name}" in self.run("repair", tmp_path / "a")
        assert "all 2 episodes are good" in self.run("repair", tmp_path / "a")

    def test_an_empty_dataset(self, tmp_path: Path) -> None:
        SteeringDataset.create_or_open(tmp_path, BINDING).close()
        assert "Gaussian" not in self.run("summary", tmp_path)

    @pytest.mark.parametrize("command", [[], ["summary"], ["merge"], ["filter"], ["repair"]])
    def test_help(self, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            self.run(*command, "--help")
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert ("merge" if not command else "folder") in said

    def test_it_does_without_torch(self) -> None:
        code = "import sys, counterflow.cli_dataset, counterflow.data.steering; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)
