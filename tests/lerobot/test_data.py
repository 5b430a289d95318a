"""LeRobotDatasets in and out: recordings become datasets, demonstrations get noises, and both can be distilled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from counterflow.binding import Binding
from counterflow.cli import main
from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.errors import DatasetError, InvalidInputError, MismatchError, StorageError
from counterflow.experiments.distill import distill, examples_of
from counterflow.experiments.lerobot_data import (
    CHUNK,
    FEATURES,
    NOISE,
    VALID,
    augment_dataset,
    convert_steering,
    lerobot_examples,
    open_dataset,
    read_about,
)
from counterflow.flow import denoise
from counterflow.learning import DSBCConfig
from counterflow.policies import bind
from counterflow.policies.lerobot import load_lerobot
from counterflow.steering import ChunkRegressor, RegressorConfig, binding_of, steer_learned

Make = Callable[..., Any]
LENGTHS = (14, 9, 20)
SMALL = DSBCConfig(RegressorConfig(members=2, width=16, depth=1), steps=10)


@pytest.fixture(scope="module")
def demonstrations(shared: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three demonstrations with a camera, as LeRobot records them (its images stored losslessly)."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("data") / "demonstrations"
    described = {
        "observation.state": {"dtype": "float32", "shape": (5,), "names": None},
        "action": {"dtype": "float32", "shape": (4,), "names": None},
        "observation.images.top": {"dtype": "image", "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
    }
    dataset = LeRobotDataset.create("test/demonstrations", fps=10, features=described, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        for _ in range(length):
            dataset.add_frame(
                {
                    "observation.state": rng.normal(size=5).astype(np.float32),
                    "action": rng.normal(size=4).astype(np.float32),
                    "observation.images.top": rng.integers(0, 255, (48, 64, 3), dtype=np.uint8),
                    "task": "push the cube",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def base(shared: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared("smolvla").save(tmp_path_factory.mktemp("base") / "policy")


@pytest.fixture(scope="module")
def augmented(demonstrations: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("augmented") / "noises"
    augment_dataset(demonstrations, str(base), out, steps=5, tolerance=0.05, batch_size=7)
    return out


class TestAugment:
    def test_a_noise_gives_the_chunk_that_begins_at_its_frame(self, augmented: Path, base: Path) -> None:
        policy = load_lerobot(base)
        spec = policy.action_spec
        dataset = open_dataset(augmented)
        actions = np.stack([dataset[index]["action"].numpy() for index in range(sum(LENGTHS))])
        first = LENGTHS[0] + LENGTHS[1] + 3  # in the third episode
        frame = dataset[first]
        assert bool(frame[VALID])
        chunk = spec.normalise(torch.from_numpy(actions[first : first + spec.horizon]))
        torch.testing.assert_close(frame[CHUNK].view(spec.horizon, spec.dim), chunk[:, : spec.dim])
        seen = {name: frame[name][None] for name in ("observation.state", "observation.images.top")} | {
            "task": "push the cube"
        }
        context = policy.encode(seen)
        torch.testing.assert_close(frame[FEATURES][None], policy.features(context), atol=1e-4, rtol=1e-4)
        # The noise of the padding is left out, as it is drawn afresh; with what inversion found there the chunk is exact.
        from counterflow.experiments.inversion import InversionSettings, invert_field

        noise, missed = invert_field(bind(policy, context), chunk[None], InversionSettings(steps=5))
        torch.testing.assert_close(noise[0, :, : spec.dim].flatten(), frame[NOISE], atol=1e-3, rtol=1e-3)
        again = denoise(bind(policy, context), noise, 5)
        assert float((again - chunk).abs().max()) == pytest.approx(float(missed), abs=1e-5)

    def test_only_whole_chunks_of_an_episode_count(self, augmented: Path) -> None:
        valid = np.stack(
            [np.asarray(value) for value in open_dataset(augmented).hf_dataset.with_format("numpy")[VALID]]
        )
        whole = np.concatenate([np.arange(length) <= length - 10 for length in LENGTHS])
        assert not valid.reshape(-1)[~whole].any()
        assert valid.reshape(-1)[whole].mean() > 0.9

    def test_what_was_there_is_kept(self, augmented: Path, demonstrations: Path) -> None:
        before, after = open_dataset(demonstrations), open_dataset(augmented)
        assert len(after) == len(before)
        for index in (0, 20, 42):
            for name in ("action", "observation.state", "observation.images.top", "episode_index"):
                assert torch.equal(before[index][name], after[index][name])
            assert after[index]["task"] == "push the cube"

    def test_it_remembers_whose_noises_they_are(self, augmented: Path, base: Path, make: Make) -> None:
        binding = read_about(augmented)
        assert binding == binding_of(load_lerobot(base), 5)
        other = make("smolvla")
        with torch.no_grad():
            other.policy.model.action_out_proj.bias.add_(0.1)
        with pytest.raises(MismatchError, match="another frozen policy"):
            binding.check(binding_of(other.wrapped(), 5), "the noises")

    def test_from_the_command_line_to_a_noise_policy(
        self, demonstrations: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "noises"
        arguments = ["lerobot", "augment", str(demonstrations), "--policy", f"lerobot:{base}", "--out", str(out)]
        assert main([*arguments, "--steps", "5", "--tolerance", "0.05"]) == 0
        assert "43 frames" in capsys.readouterr().out
        learned = tmp_path / "noise-policy"
        assert main(["distill", str(out), "--out", str(learned), "--steps", "10"]) == 0
        policy = load_lerobot(base, task="push")
        plan = steer_learned(policy, ChunkRegressor.load(learned)).act(
            {"observation.state": torch.zeros(1, 5), "observation.images.top": torch.zeros(1, 3, 48, 64)}, rng=0
        )
        assert plan.actions.shape == (1, 10, 4)

    def test_history_is_that_of_the_episode(self, demonstrations: Path, make: Make, tmp_path: Path) -> None:
        from lerobot.configs.types import FeatureType, PolicyFeature

        inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (5,))}
        policy = make("history", input_features=inputs).wrapped()
        seen: list[Any] = []
        inner = policy.encode
        with (
            mock.patch("counterflow.experiments.lerobot_data.load", return_value=policy),
            mock.patch.object(policy, "encode", side_effect=lambda o: (seen.append(o), inner(o))[1]),
        ):
            made = augment_dataset(demonstrations, "it", tmp_path / "out", steps=4, batch_size=64)
        states = np.stack([open_dataset(demonstrations)[index]["observation.state"].numpy() for index in range(43)])
        # The first chunk that can be decided on begins two steps into the episode: its two oldest actions are over.
        expected = np.stack([states[0], states[1], states[2]])
        np.testing.assert_allclose(seen[0]["observation.state"][0].numpy(), expected)
        assert made.frames == 43

    def test_what_does_not_fit_is_refused(
        self, demonstrations: Path, augmented: Path, base: Path, make: Make, tmp_path: Path
    ) -> None:
        from lerobot.configs.types import FeatureType, PolicyFeature

        with pytest.raises(DatasetError, match="has noises already"):
            augment_dataset(augmented, str(base), tmp_path / "out")
        with pytest.raises(InvalidInputError, match="exists already"):
            augment_dataset(demonstrations, str(base), demonstrations, tolerance=0.05)
        with pytest.raises(DatasetError, match="there is no folder"):
            augment_dataset(tmp_path / "nothing", str(base), tmp_path / "out")
        with pytest.raises(DatasetError, match="can't be read as a LeRobotDataset"):
            augment_dataset(base, str(base), tmp_path / "out")
        with pytest.raises(InvalidInputError, match="batch_size is 0"):
            augment_dataset(demonstrations, str(base), tmp_path / "out", batch_size=0)
        wide = {"action": PolicyFeature(FeatureType.ACTION, (7,))}
        stats = {"action": {"min": -torch.ones(7), "max": torch.ones(7)}}
        policies = {
            r"actions .* have shape \(4,\) and the policy acts in 7": make("multi_task_dit", output_features=wide, stats=stats),
            "no episode of .* is as long": make("multi_task_dit", horizon=40),
            r"no camera observation\.images\.wrist": make(
                "multi_task_dit", input_features={
                    "observation.state": PolicyFeature(FeatureType.STATE, (5,)),
                    "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
                },
            ),
        }  # fmt: skip
        for message, made in policies.items():
            with (
                mock.patch("counterflow.experiments.lerobot_data.load", return_value=made.wrapped()),
                pytest.raises((MismatchError, DatasetError), match=message),
            ):
                augment_dataset(demonstrations, "it", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_failure_while_writing_leaves_nothing(self, demonstrations: Path, base: Path, tmp_path: Path) -> None:
        with (
            mock.patch(
                "lerobot.datasets.dataset_tools.add_features", side_effect=OSError(28, "No space left on device")
            ),
            pytest.raises(StorageError, match="disk is full"),
        ):
            augment_dataset(demonstrations, str(base), tmp_path / "out", steps=2, tolerance=9.0)
        assert list(tmp_path.iterdir()) == []


class TestExamples:
    def test_they_are_read_without_policy_or_images(self, augmented: Path) -> None:
        with (
            mock.patch(
                "counterflow.experiments.lerobot_data.load", side_effect=AssertionError("the policy was loaded")
            ),
            mock.patch("lerobot.policies.smolvla.modeling_smolvla.SmolVLAPolicy", side_effect=AssertionError("built")),
        ):
            examples = examples_of(augmented, SMALL)
        assert examples.targets.shape[1:] == (10, 4)
        assert examples.inputs.shape[1] == 96 + 5
        assert set(examples.episodes.tolist()) == {0, 2}  # the second is shorter than a chunk
        states = examples_of(augmented, DSBCConfig(RegressorConfig(inputs="observation")))
        assert states.inputs.shape == (len(examples.inputs), 5)
        actions = examples_of(augmented, DSBCConfig(RegressorConfig(target="action")))
        assert not np.allclose(actions.targets, examples.targets)
        one = examples_of(augmented, SMALL, first=1)
        assert set(one.episodes.tolist()) == {0}

    def test_distilled_like_any_other_dataset(self, augmented: Path, tmp_path: Path) -> None:
        made = distill([augmented], tmp_path / "noise-policy", SMALL)
        assert made.binding == read_about(augmented)

    def test_what_is_missing_or_damaged_is_named(self, augmented: Path, tmp_path: Path) -> None:
        copied = Path(shutil.copytree(augmented, tmp_path / "copied"))
        with pytest.raises(InvalidInputError, match=r"the first 9 episodes .* has 2 that can be learned from"):
            lerobot_examples(copied, SMALL, first=9)
        about = copied / "meta" / "counterflow.json"
        content = json.loads(about.read_text())
        for damaged in ("", "{}", json.dumps(content | {"format_version": 99})):
            about.write_text(damaged)
            with pytest.raises(DatasetError, match=r"counterflow\.json"):
                lerobot_examples(copied, SMALL)


class TestConvert:
    BINDING = Binding("abc", "ogbench/cube-single", 5, 5, 5)

    def recorded(self, path: Path, every_step: bool = True) -> Path:
        rng = np.random.default_rng(0)
        with SteeringDataset.create_or_open(path, self.BINDING) as dataset:
            source = dataset.add_source({"method": "frs"})
            for index, executed in enumerate(([5, 5, 3], [5, 2], [5])):
                count, steps = len(executed), sum(executed)
                arrays: dict[str, Any] = {
                    "observations": rng.normal(size=(count, 28)).astype(np.float32),
                    "references": np.zeros((count, 5, 5), np.float32),
                    "active": np.ones(count, bool),
                    "steered": np.ones((count, 5, 5), bool),
                    "noise": rng.normal(size=(count, 5, 5)).astype(np.float32),
                    "start_time": np.zeros(count, np.float32),
                    "chunks": rng.normal(size=(count, 5, 5)).astype(np.float32),
                    "executed": np.array(executed, np.int64),
                    "intervened": np.arange(count) == 1,
                    "features": rng.normal(size=(count, 3)).astype(np.float32),
                    "step_observations": rng.normal(size=(steps, 28)).astype(np.float32),
                    "step_actions": rng.normal(size=(steps, 5)).astype(np.float32),
                    "rewards": rng.normal(size=steps).astype(np.float32),
                }
                if every_step and index < 2:  # the last one fails, and nobody learns from it
                    arrays["step_noise"] = rng.normal(size=(steps, 5, 5)).astype(np.float32)
                    arrays["step_chunks"] = rng.normal(size=(steps, 5, 5)).astype(np.float32)
                    arrays["step_noise_valid"] = np.arange(steps) < steps - 4
                    arrays["step_features"] = rng.normal(size=(steps, 3)).astype(np.float32)
                dataset.append(SteeringEpisode("ogbench/cube-single-task1", index, index, index < 2, source, arrays))
        return path

    def test_every_step_is_a_frame(self, tmp_path: Path) -> None:
        recorded = SteeringDataset.load(self.recorded(tmp_path / "steered"))
        assert main(["lerobot", "convert", str(tmp_path / "steered"), "--out", str(tmp_path / "out")]) == 0
        dataset = open_dataset(tmp_path / "out")
        assert (dataset.num_episodes, len(dataset)) == (3, 25)
        first = recorded.episodes[0].arrays
        for step in (0, 4, 5, 12):
            frame = dataset[step]
            np.testing.assert_allclose(frame["observation.state"].numpy(), first["step_observations"][step])
            np.testing.assert_allclose(frame["action"].numpy(), first["step_actions"][step])
            np.testing.assert_allclose(frame["next.reward"].item(), first["rewards"][step])
            np.testing.assert_allclose(frame[NOISE].numpy(), first["step_noise"][step].reshape(-1))
            assert bool(frame["counterflow.decision"]) == (step in (0, 5, 10))
            assert bool(frame["counterflow.intervened"]) == (5 <= step < 10)
        assert bool(dataset[12]["next.done"])
        assert bool(dataset[12]["next.success"])
        assert not bool(dataset[11]["next.done"])
        assert not bool(dataset[24]["next.success"])
        assert "cube" in dataset[0]["task"]
        assert read_about(tmp_path / "out") == self.BINDING

    @pytest.mark.parametrize("success_only", [True, False])
    def test_what_is_distilled_from_it_is_what_was_recorded(self, tmp_path: Path, success_only: bool) -> None:
        path = self.recorded(tmp_path / "steered")
        convert_steering(path, tmp_path / "out", success_only=success_only)
        before, after = examples_of(path, SMALL), examples_of(tmp_path / "out", SMALL)
        np.testing.assert_allclose(after.targets, before.targets)
        np.testing.assert_allclose(after.inputs, before.inputs)
        assert after.binding == before.binding
        with pytest.raises(InvalidInputError, match=r"the first 3 episodes .* has 2 that can be learned from"):
            lerobot_examples(tmp_path / "out", SMALL, first=3)

    def test_decisions_alone(self, tmp_path: Path) -> None:
        path = self.recorded(tmp_path / "steered", every_step=False)
        made = convert_steering(path, tmp_path / "out")
        assert (made.frames, made.noises) == (25, 5)
        before = examples_of(path, SMALL, windows="decisions")
        after = examples_of(tmp_path / "out", SMALL)
        np.testing.assert_allclose(after.targets, before.targets)

    def test_refused(self, tmp_path: Path) -> None:
        path = self.recorded(tmp_path / "steered")
        with pytest.raises(InvalidInputError, match="fps is 0"):
            convert_steering(path, tmp_path / "out", fps=0)
        with pytest.raises(InvalidInputError, match="exists already"):
            convert_steering(path, path)
        with pytest.raises(DatasetError, match="no steering dataset"):
            convert_steering(tmp_path / "nothing", tmp_path / "out")
