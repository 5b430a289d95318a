"""From folders and archives to a network on disk: which examples are taken, and what is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from counterflow.binding import Binding
from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.errors import CounterflowError, DatasetError, InvalidInputError, MismatchError, UnknownNameError
from counterflow.experiments.distill import distill, examples_of
from counterflow.learning import DSBCConfig, NoiseExamples
from counterflow.learning.held_out import Progress
from counterflow.policies import FlowPolicy
from counterflow.steering import ChunkRegressor, Intention, RegressorConfig

BINDING = Binding("abc", "ogbench/x", 3, 2, 5)
TASK, OTHER_TASK = "ogbench/x-task1", "ogbench/x-task2"
NOISE = DSBCConfig(RegressorConfig(members=2, width=16, depth=1), steps=5)
OBSERVED = DSBCConfig(RegressorConfig(inputs="observation", members=2, width=16, depth=1), steps=5)
ACTION = DSBCConfig(RegressorConfig(target="action", members=2, width=16, depth=1), steps=5)
Arrays = dict[str, npt.NDArray[Any]]


def episode_arrays(index: int, **changes: Any) -> Arrays:
    """Three decisions (3, 3 and 2 executed actions); all numbers tell apart what they are."""

    def marked(kind: int, *shape: int) -> npt.NDArray[np.float32]:
        return (100 * kind + 10 * index + np.arange(np.prod(shape)).reshape(shape) / 100).astype(np.float32)

    arrays: dict[str, Any] = {
        "observations": marked(1, 3, 4),
        "features": marked(2, 3, 5),
        "noise": marked(3, 3, 3, 2),
        "chunks": marked(4, 3, 3, 2),
        "references": np.zeros((3, 3, 2), np.float32),
        "active": np.zeros(3, bool),
        "steered": np.zeros((3, 3, 2), bool),
        "start_time": np.array([0.0, 0.5, 0.0], np.float32),
        "executed": np.array([3, 3, 2], np.int64),
        "intervened": np.zeros(3, bool),
        "step_observations": marked(5, 8, 4),
        "step_features": marked(6, 8, 5),
        "step_noise": marked(7, 8, 3, 2),
        "step_chunks": marked(8, 8, 3, 2),
        "step_noise_valid": np.array([True, False, True, True, True, True, False, False]),
    }
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def recorded(path: Path, outcomes: str = "sfss", binding: Binding = BINDING, env: str = TASK, **changes: Any) -> Path:
    """Record an episode for each letter: s for success, f for failure."""
    with SteeringDataset.create_or_open(path, binding) as dataset:
        source = dataset.add_source({"seed": 0})
        for index, outcome in enumerate(outcomes):
            arrays = episode_arrays(index, **changes)
            dataset.append(SteeringEpisode(env, index, index, outcome == "s", source, arrays))
    return path


def archive(path: Path, binding: Binding = BINDING, **changes: Any) -> Path:
    """What an inversion leaves: two episodes of five and four steps, of each of which two chunks are usable."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        "observations": rng.standard_normal((9, 4)).astype(np.float32),
        "actions": rng.standard_normal((9, 2)).astype(np.float32),
        "terminals": np.arange(9) % 9 % 5 == 4,
        "noise": rng.standard_normal((9, 3, 2)).astype(np.float32),
        "features": rng.standard_normal((9, 5)).astype(np.float32),
        "normalised_actions": rng.standard_normal((9, 2)).astype(np.float32),
        "noise_valid": np.array([1, 0, 1, 0, 0, 1, 1, 0, 0], bool),
        **changes,
    }
    arrays["terminals"][-1] = True
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
    content = {"format": "counterflow/inverted-episodes", "format_version": 1, "binding": binding.to_json()}
    path.with_suffix(".json").write_text(json.dumps(content))
    return path


def read(path: Path) -> Arrays:
    with np.load(path) as content:
        return dict(content)


class TestIntention:
    CONFIG = replace(NOISE, regressor=replace(NOISE.regressor, intention=Intention(penalty=2.0)))

    @pytest.mark.parametrize(
        ("windows", "key", "rows"), [("steps", "step_chunks", [0, 2, 3, 4, 5]), ("decisions", "chunks", [0, 2])]
    )
    def test_recorded_noises_come_with_their_chunks(
        self, tmp_path: Path, windows: Any, key: str, rows: list[int]
    ) -> None:
        found = examples_of(recorded(tmp_path / "d"), self.CONFIG, windows=windows)
        expected = np.concatenate([episode_arrays(index)[key][rows] for index in (0, 2, 3)])
        np.testing.assert_array_equal(found.chunks, expected)
        assert examples_of(recorded(tmp_path / "e"), NOISE, windows=windows).chunks is None

    def test_inverted_noises_come_with_their_chunks(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "inverted.npz")
        found = examples_of(path, self.CONFIG)
        np.testing.assert_array_equal(found.chunks, examples_of(path, ACTION).targets)
        np.testing.assert_array_equal(found.targets, examples_of(path, NOISE).targets)
        assert examples_of(path, NOISE).chunks is None

    def test_distilled_and_written(self, tmp_path: Path) -> None:
        made = distill([recorded(tmp_path / "d")], tmp_path / "p", self.CONFIG)
        loaded = ChunkRegressor.load(tmp_path / "p.safetensors")
        assert loaded.config.intention == Intention(penalty=2.0)
        assert loaded.fingerprint == made.fingerprint


class TestSteeringDatasets:
    def test_the_steps_of_successes_whose_noise_was_found(self, tmp_path: Path) -> None:
        found = examples_of(recorded(tmp_path / "d"), NOISE)
        rows = [0, 2, 3, 4, 5]
        for name, key in (("inputs", "step_features"), ("targets", "step_noise")):
            expected = np.concatenate([episode_arrays(index)[key][rows] for index in (0, 2, 3)])
            np.testing.assert_array_equal(getattr(found, name), expected)
        assert found.episodes.tolist() == [0] * 5 + [1] * 5 + [2] * 5
        assert found.binding == BINDING

    def test_decisions_whose_noise_lies_at_the_beginning_of_the_flow(self, tmp_path: Path) -> None:
        found = examples_of(recorded(tmp_path / "d"), NOISE, windows="decisions")
        for name, key in (("inputs", "features"), ("targets", "noise")):
            expected = np.concatenate([episode_arrays(index)[key][[0, 2]] for index in (0, 2, 3)])
            np.testing.assert_array_equal(getattr(found, name), expected)

    @pytest.mark.parametrize(
        ("config", "windows", "inputs", "target", "rows"),
        [
            (ACTION, "steps", "step_features", "step_chunks", [0, 2, 3, 4, 5]),
            (ACTION, "decisions", "features", "chunks", [0, 1, 2]),
            (OBSERVED, "steps", "step_observations", "step_noise", [0, 2, 3, 4, 5]),
            (OBSERVED, "decisions", "observations", "noise", [0, 2]),
        ],
    )
    def test_actions_and_observations(
        self, config: DSBCConfig, windows: Any, inputs: str, target: str, rows: list[int], tmp_path: Path
    ) -> None:
        found = examples_of(recorded(tmp_path / "d", "s"), config, windows=windows)
        np.testing.assert_array_equal(found.inputs, episode_arrays(0)[inputs][rows])
        np.testing.assert_array_equal(found.targets, episode_arrays(0)[target][rows])

    def test_without_its_steps_the_decisions_are_taken(self, tmp_path: Path) -> None:
        path = recorded(tmp_path / "d", "s", step_noise=None)
        np.testing.assert_array_equal(examples_of(path, NOISE).targets, episode_arrays(0)["noise"][[0, 2]])
        with pytest.raises(MismatchError, match="recorded without step_noise"):
            examples_of(path, NOISE, windows="steps")

    def test_the_first_so_many_successes_of_a_task(self, tmp_path: Path) -> None:
        path = recorded(recorded(tmp_path / "d"), "fss", env=OTHER_TASK)
        assert len(np.unique(examples_of(path, NOISE).episodes)) == 5
        assert len(np.unique(examples_of(path, NOISE, first=1).episodes)) == 2
        found = examples_of(path, NOISE, env=OTHER_TASK, first=1)
        np.testing.assert_array_equal(found.inputs, episode_arrays(1)["step_features"][[0, 2, 3, 4, 5]])
        two = examples_of(path, NOISE, env=TASK, first=2)
        np.testing.assert_array_equal(np.unique(two.inputs[:, 0] // 10 % 10), [0, 2])

    def test_no_success(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"no successful episode: all 2 of .* failed"):
            examples_of(recorded(tmp_path / "d", "ff"), NOISE)
        recorded(tmp_path / "d", "s", env=OTHER_TASK)
        with pytest.raises(DatasetError, match=rf"no successful episode: all 2 of .*{TASK} failed"):
            examples_of(tmp_path / "d", NOISE, env=TASK)

    def test_no_usable_noise(self, tmp_path: Path) -> None:
        late = recorded(tmp_path / "late", "s", start_time=np.full(3, 0.5, np.float32))
        with pytest.raises(DatasetError, match="no chunk of .* came from a noise at t = 0"):
            examples_of(late, NOISE, windows="decisions")
        none = recorded(tmp_path / "none", "s", step_noise_valid=np.zeros(8, bool))
        with pytest.raises(DatasetError, match="no chunk"):
            examples_of(none, NOISE)

    def test_without_features(self, tmp_path: Path) -> None:
        path = recorded(tmp_path / "d", "s", features=None, step_features=None)
        with pytest.raises(MismatchError, match=r"recorded without step_features\. .*learn from observations"):
            examples_of(path, NOISE)
        assert len(examples_of(path, OBSERVED).inputs) == 5

    def test_further_names_and_damage(self, tmp_path: Path) -> None:
        path = recorded(tmp_path / "d")
        with pytest.raises(UnknownNameError, match="did you mean 'decisions'"):
            examples_of(path, NOISE, windows="decision")  # type: ignore[arg-type]
        with pytest.raises(UnknownNameError, match="did you mean"):
            examples_of(path, NOISE, env="ogbench/x-task3")
        with pytest.raises(InvalidInputError, match="number of first episodes is 0"):
            examples_of(path, NOISE, first=0)
        file = sorted((path / "episodes").iterdir())[1]
        file.write_bytes(file.read_bytes()[:-30])
        with pytest.raises(DatasetError, match="damaged"):
            examples_of(path, NOISE)

    def test_a_nan_in_the_features_of_steps(self, tmp_path: Path) -> None:
        features = episode_arrays(0)["step_features"]
        features[3, 1] = np.nan
        path = recorded(tmp_path / "d", "s", step_features=features)
        with pytest.raises(DatasetError, match=r"inputs hold NaN .*first in example 2 \(episode 0\)"):
            examples_of(path, NOISE)


class TestArchives:
    def test_every_chunk_whose_noise_was_found(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "x.npz")
        found, rows = examples_of(path, NOISE), [0, 2, 5, 6]
        np.testing.assert_array_equal(found.inputs, read(path)["features"][rows])
        np.testing.assert_array_equal(found.targets, read(path)["noise"][rows])
        assert found.episodes.tolist() == [0, 0, 1, 1]
        assert found.binding == BINDING

    def test_actions_are_those_of_the_chunk_that_begins_there(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "x.npz")
        actions = read(path)["normalised_actions"]
        expected = np.stack([actions[row : row + 3] for row in (0, 2, 5, 6)])
        np.testing.assert_array_equal(examples_of(path, ACTION).targets, expected)

    def test_observations(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "x.npz", features=None)
        np.testing.assert_array_equal(examples_of(path, OBSERVED).inputs, read(path)["observations"][[0, 2, 5, 6]])
        with pytest.raises(DatasetError, match="has no features"):
            examples_of(path, NOISE)

    def test_the_first_so_many_episodes(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "x.npz")
        assert len(examples_of(path, NOISE, first=1).inputs) == 2
        for first in (0, 3):
            with pytest.raises(InvalidInputError, match=f"the first {first} episodes were asked for; .* has 2"):
                examples_of(path, NOISE, first=first)

    def test_an_episode_without_a_usable_chunk_is_left_out(self, tmp_path: Path) -> None:
        """As one that is shorter than a chunk, or all of whose chunks were flagged."""
        path = archive(tmp_path / "x.npz", noise_valid=np.arange(9) < 3)
        found = examples_of(path, NOISE)
        np.testing.assert_array_equal(found.inputs, read(path)["features"][:3])
        assert found.episodes.tolist() == [0, 0, 0]

    def test_no_usable_chunk_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError):
            examples_of(archive(tmp_path / "x.npz", noise_valid=np.zeros(9, bool)), NOISE)

    def test_nan_truncated_or_without_description(self, tmp_path: Path) -> None:
        features = read(archive(tmp_path / "x.npz"))["features"]
        features[5] = np.nan
        with pytest.raises(DatasetError, match=r"inputs hold NaN .*first in example 2 \(episode 1\)"):
            examples_of(archive(tmp_path / "nan.npz", features=features), NOISE)
        cut = archive(tmp_path / "cut.npz")
        cut.write_bytes(cut.read_bytes()[:-40])
        with pytest.raises(DatasetError, match="truncated"):
            examples_of(cut, NOISE)
        with pytest.raises(DatasetError, match="no description of its noises"):
            examples_of(tmp_path / "missing.npz", NOISE)
        bare = archive(tmp_path / "bare.npz")
        bare.with_suffix(".json").unlink()
        with pytest.raises(DatasetError, match="no description of its noises"):
            examples_of(bare, NOISE)

    def test_noises_that_are_not_of_the_described_horizon(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "x.npz", Binding("abc", "ogbench/x", 4, 2, 5))
        with pytest.raises(DatasetError, match=r"expected \(4, 4, 2\)"):
            examples_of(path, NOISE)


class TestDistill:
    def test_a_folder_becomes_a_network_on_disk(self, tmp_path: Path) -> None:
        told: list[Progress] = []
        path = recorded(tmp_path / "d")
        made = distill([path], tmp_path / "noise-policy", NOISE, seed=3, on_progress=told.append)
        loaded = ChunkRegressor.load(tmp_path / "noise-policy")
        shown = torch.from_numpy(examples_of(path, NOISE).inputs)
        assert torch.equal(loaded(shown), made(shown))
        assert (loaded.binding, loaded.config) == (BINDING, NOISE.regressor)
        assert told[-1].step == 5
        said = loaded.provenance
        assert (said["algorithm"], said["datasets"], said["seed"], said["env"]) == ("dsbc", ["d"], 3, None)
        assert (said["episodes"], said["examples"], said["updates"]) == (3, 15, 5)
        assert said["settings"]["learning_rate"] == NOISE.learning_rate

    def test_the_baseline_says_what_it_is(self, tmp_path: Path) -> None:
        made = distill([archive(tmp_path / "x.npz")], tmp_path / "bc", ACTION, first=1)
        assert made.config.target == "action"
        assert (made.provenance["algorithm"], made.provenance["episodes"]) == ("bc on the same data", 1)

    def test_the_options_reach_the_data(self, tmp_path: Path) -> None:
        path = recorded(recorded(tmp_path / "d"), "s", env=OTHER_TASK)
        made = distill([path], tmp_path / "x", NOISE, env=TASK, first=2, windows="decisions")
        assert (made.provenance["episodes"], made.provenance["examples"], made.provenance["env"]) == (2, 4, TASK)

    def test_several_datasets_of_both_kinds(self, tmp_path: Path) -> None:
        made = distill([recorded(tmp_path / "d"), archive(tmp_path / "x.npz")], tmp_path / "both", NOISE)
        assert made.provenance["datasets"] == ["d", "x.npz"]
        assert (made.provenance["examples"], made.provenance["episodes"]) == (19, 5)

    def test_datasets_of_different_policies_are_refused_and_nothing_is_written(self, tmp_path: Path) -> None:
        other = archive(tmp_path / "x.npz", Binding("def", "ogbench/x", 3, 2, 10))
        with pytest.raises(
            MismatchError, match=r"d \(compared with .*x\.npz\).*policy 'abc', not 'def'; steps 5, not 10"
        ):
            distill([recorded(tmp_path / "d"), other], tmp_path / "out" / "both", NOISE)
        assert not (tmp_path / "out").exists()

    def test_what_stood_there_stays_where_nothing_can_be_learned(self, tmp_path: Path) -> None:
        path = distill([recorded(tmp_path / "d")], tmp_path / "p", NOISE).save(tmp_path / "p")
        before = path.read_bytes()
        with pytest.raises(DatasetError, match="no successful episode"):
            distill([recorded(tmp_path / "f", "f")], tmp_path / "p", NOISE)
        with pytest.raises(InvalidInputError, match="no dataset was named"):
            distill([], tmp_path / "p", NOISE)
        assert path.read_bytes() == before

    def test_the_same_seed_gives_the_same_file(self, tmp_path: Path) -> None:
        path = recorded(tmp_path / "d")
        one, same, other = (distill([path], tmp_path / str(n), NOISE, seed=n // 2).fingerprint for n in range(3))
        assert one == same != other

    def test_no_flow_policy_is_touched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            pytest.fail("a prior was loaded or asked")

        monkeypatch.setattr(FlowPolicy, "__init__", refuse)
        monkeypatch.setattr("counterflow.policies.checkpoint.load", refuse)
        monkeypatch.setattr("counterflow.experiments.evaluate.load", refuse)
        distill([recorded(tmp_path / "d"), archive(tmp_path / "x.npz")], tmp_path / "p", NOISE)

    @pytest.mark.parametrize("what", ["d", "x.npz"])
    def test_every_error_is_of_the_family(self, what: str, tmp_path: Path) -> None:
        """Cut anywhere, a dataset is refused in plain words."""
        path = recorded(tmp_path / "d", "s") if what == "d" else archive(tmp_path / what)
        file = next(iter((path / "episodes").iterdir())) if what == "d" else path
        whole = file.read_bytes()
        for share in (0.0, 0.1, 0.5, 0.9, 0.999):
            file.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(CounterflowError):
                examples_of(path, NOISE)
        file.write_bytes(whole)
        assert isinstance(examples_of(path, NOISE), NoiseExamples)


def test_a_bound_that_cuts_off_what_is_to_be_learned_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def noises(scale: float) -> Arrays:
        return {"step_noise": (scale * rng.uniform(-1, 1, (8, 3, 2))).astype(np.float32)}

    wide = recorded(tmp_path / "wide", "ss", **noises(6.0))
    with pytest.warns(UserWarning, match=r"(4|5)\d% of the numbers .* beyond the bound of 3.0"):
        made = distill([wide], tmp_path / "made", NOISE)
    assert 0.4 < made.provenance["cut"] < 0.6
    narrow = recorded(tmp_path / "narrow", "ss", **noises(3.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        distill([narrow], tmp_path / "made", NOISE)
        distill([wide], tmp_path / "made", replace(NOISE, regressor=replace(NOISE.regressor, bound=None)))
