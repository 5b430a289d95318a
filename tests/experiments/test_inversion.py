"""Noises for demonstrations: denoising them gives the chunks, and those of which that isn't true are flagged."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import counterflow.experiments.inversion as module
from counterflow.binding import Binding
from counterflow.data import EpisodeDataset, SteeringDataset, SteeringEpisode
from counterflow.envs import describe
from counterflow.errors import (
    CounterflowError,
    DatasetError,
    InvalidInputError,
    MismatchError,
    StorageError,
    UnknownNameError,
)
from counterflow.experiments.demonstrate import demonstrate
from counterflow.experiments.inversion import (
    InversionSettings,
    Inverted,
    add_noises,
    invert_chunks,
    invert_dataset,
    read_binding,
    step_episodes,
)
from counterflow.flow import denoise
from counterflow.learning import DSBCConfig, NoiseExamples, distil
from counterflow.policies import ActionSpec, FieldPolicy, FlowPolicy, NetworkConfig, Normaliser, bind, load, save
from counterflow.steering import RegressorConfig, binding_of, steer_learned

TASK = "ogbench/cube-single-task1"
ADDED = ("noise", "features", "reconstruction_error", "normalised_actions", "noise_valid")
Arrays = dict[str, npt.NDArray[Any]]
DESCRIBE = cache(describe)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two episodes of the expert in the real environment the last 45 and the last 46 steps."""
    folder = tmp_path_factory.mktemp("data")
    made = EpisodeDataset.load(demonstrate(TASK, folder / "all.npz", episodes=2, num_envs=1).path, keys=("rewards",))
    episodes = [{name: array[-45 - index :] for name, array in made.episode(index).items()} for index in range(2)]
    EpisodeDataset.from_episodes(episodes).save(folder / "x.npz")
    return folder / "x.npz"


@pytest.fixture(autouse=True)
def described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To describe an environment takes making one."""
    monkeypatch.setattr(module, "describe", DESCRIBE)


@pytest.fixture(scope="module")
def inverted(demonstrations: Path) -> Inverted:
    return invert_dataset(demonstrations, TASK, demonstrations.with_name("inverted.npz"))


def read(path: Path) -> Arrays:
    with np.load(path) as archive:
        return dict(archive)


def redenoised(arrays: Arrays, rows: npt.NDArray[Any], steps: int = 5) -> Tensor:
    """What the shipped prior makes of the noises of these rows."""
    prior = load("cube-single")
    field = bind(prior, prior.encode(torch.from_numpy(arrays["observations"][rows])))
    return denoise(field, torch.from_numpy(arrays["noise"][rows]), steps)


class TestRealDemonstrations:
    def test_denoising_a_valid_noise_gives_the_chunk(self, inverted: Inverted) -> None:
        arrays = read(inverted.path)
        rows = np.flatnonzero(arrays["noise_valid"])
        assert len(rows) > 0.8 * inverted.chunks
        chunks = torch.from_numpy(np.stack([arrays["actions"][row : row + 5] for row in rows]))
        errors = (redenoised(arrays, rows) - chunks).abs().amax((1, 2))
        assert errors.max() <= 0.01 + 1e-4
        torch.testing.assert_close(errors, torch.from_numpy(arrays["reconstruction_error"][rows]), atol=1e-4, rtol=0)

    def test_no_chunk_crosses_an_episodes_end(self, demonstrations: Path, inverted: Inverted) -> None:
        lengths = EpisodeDataset.load(demonstrations).lengths
        whole = np.concatenate([np.arange(length) <= length - 5 for length in lengths])
        arrays = read(inverted.path)
        np.testing.assert_array_equal(np.isfinite(arrays["reconstruction_error"]), whole)
        assert not arrays["noise_valid"][~whole].any()
        assert not arrays["noise"][~whole].any()
        assert arrays["noise"][whole].any((1, 2)).all()
        assert inverted.chunks == whole.sum() == lengths.sum() - 4 * len(lengths)

    def test_it_is_the_dataset_itself_with_more_arrays(self, demonstrations: Path, inverted: Inverted) -> None:
        before, after = EpisodeDataset.load(demonstrations), EpisodeDataset.load(inverted.path, keys=ADDED)
        np.testing.assert_array_equal(after.lengths, before.lengths)
        for name in ("observations", "actions"):
            np.testing.assert_array_equal(after.arrays[name], before.arrays[name])
        prior = load("cube-single")
        shown = torch.from_numpy(before.arrays["observations"])
        np.testing.assert_array_equal(after.arrays["features"], prior.features(prior.encode(shown)).numpy())

    def test_further_arrays_stay(self, demonstrations: Path, inverted: Inverted) -> None:
        np.testing.assert_array_equal(read(inverted.path)["rewards"], read(demonstrations)["rewards"])

    def test_what_is_said_of_it(self, inverted: Inverted) -> None:
        arrays = read(inverted.path)
        errors = arrays["reconstruction_error"][np.isfinite(arrays["reconstruction_error"])]
        assert inverted.flagged == (errors > 0.01).sum() == inverted.chunks - arrays["noise_valid"].sum()
        assert list(inverted.errors) == ["50%", "90%", "99%", "100%"]
        assert inverted.errors["50%"] == pytest.approx(np.median(errors))
        assert inverted.errors["100%"] == pytest.approx(errors.max())
        expected = np.sqrt(np.square(arrays["noise"][arrays["noise_valid"]]).mean())
        assert inverted.noise_norm == pytest.approx(expected, rel=1e-4)
        content = json.loads(inverted.path.with_suffix(".json").read_text())
        assert (content["chunks"], content["flagged"]) == (inverted.chunks, inverted.flagged)
        assert content["from"] == "x.npz"
        assert read_binding(inverted.path) == binding_of(load("cube-single"), 5)

    def test_euler_reversal_misses_more(self, demonstrations: Path, inverted: Inverted, tmp_path: Path) -> None:
        euler = invert_dataset(demonstrations, TASK, tmp_path / "e.npz", InversionSettings(method="euler"))
        assert euler.chunks == inverted.chunks
        assert euler.errors["50%"] > 100 * inverted.errors["50%"]
        assert euler.flagged > inverted.flagged

    def test_batches_and_progress(self, demonstrations: Path, inverted: Inverted, tmp_path: Path) -> None:
        told: list[tuple[int, int]] = []
        found = invert_dataset(
            demonstrations,
            TASK,
            tmp_path / "b.npz",
            InversionSettings(batch_size=30),
            on_progress=lambda done, total: told.append((done, total)),
        )
        assert told[-1] == (inverted.chunks, inverted.chunks)
        assert [done for done, _ in told[:-1]] == [30 * (index + 1) for index in range(len(told) - 1)]
        one, other = read(inverted.path), read(found.path)
        assert (one["noise_valid"] == other["noise_valid"]).mean() > 0.98
        both = one["noise_valid"] & other["noise_valid"]
        np.testing.assert_allclose(one["noise"][both], other["noise"][both], atol=1e-2)

    def test_another_number_of_steps_gives_other_noises(self, demonstrations: Path, tmp_path: Path) -> None:
        found = invert_dataset(demonstrations, TASK, tmp_path / "s.npz", InversionSettings(steps=3))
        assert read_binding(found.path).steps == 3
        arrays = read(found.path)
        rows = np.flatnonzero(arrays["noise_valid"])[:20]
        chunks = torch.from_numpy(np.stack([arrays["actions"][row : row + 5] for row in rows]))
        torch.testing.assert_close(redenoised(arrays, rows, steps=3), chunks, atol=0.011, rtol=0)
        assert (redenoised(arrays, rows, steps=5) - chunks).abs().amax() > 0.02


SPEC = ActionSpec(2, 1)


def squashing(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
    """Four Euler steps of it are tanh four times: no noise whatever gives a chunk beyond 0.73 or so."""
    return 4 * (x.tanh() - x)


def straight(x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
    return observation[:, :1, None] - x.sin()


def rollouts(values: list[list[float]], observation_dim: int = 2) -> EpisodeDataset:
    """Episodes whose actions are given."""
    return EpisodeDataset.from_episodes(
        [
            {
                "observations": np.full((len(actions), observation_dim), 0.1 * index, np.float32),
                "actions": np.array(actions, np.float32)[:, None],
            }
            for index, actions in enumerate(values)
        ]
    )


def linear(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
    """One Euler step of it multiplies the first entry of a chunk by 0.1 and the second by 1."""
    return torch.tensor([[-0.9], [0.0]]) * x


class TestRegularised:
    def test_entries_that_hardly_move_the_action_are_left_out(self) -> None:
        # Ridge regression in closed form: w = g a / (g^2 + penalty) for an entry that the flow multiplies by g.
        policy = FieldPolicy(linear, SPEC)
        data = rollouts([[0.3, 0.5], [-0.1, 0.2], [0.2, -0.4]])
        settings = InversionSettings.of("regularised", 1, iterations=400, penalty=0.05)
        arrays, found = add_noises(data, policy, settings)
        chunks = np.array([[0.3, 0.5], [-0.1, 0.2], [0.2, -0.4]])
        gain = np.array([0.1, 1.0])
        expected = gain * chunks / (gain**2 + 0.05)
        np.testing.assert_allclose(arrays["noise"][::2, :, 0], expected, atol=0.02)
        missed = np.abs(gain * expected - chunks).max(1)
        np.testing.assert_allclose(arrays["reconstruction_error"][::2], missed, atol=0.02)
        assert arrays["noise_valid"][::2].all()
        assert found["noise_norm"] < add_noises(data, policy, InversionSettings(1))[1]["noise_norm"] / 2

    def test_on_a_real_prior_they_are_smaller_and_miss_little(
        self, demonstrations: Path, inverted: Inverted, tmp_path: Path
    ) -> None:
        found = invert_dataset(demonstrations, TASK, tmp_path / "r.npz", InversionSettings.of("regularised"))
        assert found.noise_norm < 0.8 * inverted.noise_norm
        assert 0.01 < found.errors["50%"] < 0.5
        exact, small = read(inverted.path), read(found.path)
        rows = np.flatnonzero(exact["noise_valid"] & small["noise_valid"])
        chunks = torch.from_numpy(np.stack([exact["normalised_actions"][row : row + 5] for row in rows]))

        def cost(arrays: dict[str, np.ndarray]) -> Tensor:
            made = redenoised(arrays, rows, steps=5)
            noise = torch.from_numpy(arrays["noise"][rows])
            return (made - chunks).square().sum((1, 2)) + 0.001 * noise.square().sum((1, 2))

        assert (cost(small) <= cost(exact) + 1e-4).float().mean() > 0.95

    def test_a_reversal_that_runs_away_is_no_beginning(self) -> None:
        def runaway(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
            return -1e30 * x * (t[:, None, None] > 0.5)

        arrays, _ = add_noises(
            rollouts([[0.5, 0.5]]), FieldPolicy(runaway, SPEC), InversionSettings.of("regularised", 2)
        )
        assert np.isfinite(arrays["noise"]).all()
        assert np.abs(arrays["noise"]).max() <= 5.1

    def test_its_own_settings(self) -> None:
        own = InversionSettings.of("regularised", 3)
        assert (own.steps, own.iterations, own.penalty, own.tolerance) == (3, 30, 0.001, 0.5)
        assert InversionSettings.of("regularised", penalty=0.3).penalty == 0.3
        assert InversionSettings.of("exact") == InversionSettings()
        with pytest.raises(InvalidInputError, match="iterations"):
            InversionSettings(method="regularised")


class TestFlags:
    def test_chunks_that_no_noise_gives_are_flagged_and_the_others_are_not(self) -> None:
        policy = FieldPolicy(squashing, SPEC)
        actions = [0.1, 0.2, -0.3, 0.95, 0.2, 0.1]
        arrays, found = add_noises(rollouts([actions]), policy, InversionSettings(steps=4))
        assert arrays["noise_valid"].tolist() == [True, True, False, False, True, False]
        assert (found["chunks"], found["flagged"]) == (5, 2)
        assert arrays["reconstruction_error"][2] > 0.1
        noise = arrays["noise"][0, :, 0]
        np.testing.assert_allclose(np.tanh(np.tanh(np.tanh(np.tanh(noise)))), actions[:2], atol=1e-3)
        assert "features" not in arrays

    def test_the_tolerance_decides(self) -> None:
        data, policy = rollouts([np.linspace(-1, 1, 9).tolist()]), FieldPolicy(straight, SPEC)
        loose, tight = (
            add_noises(data, policy, InversionSettings(steps=3, method="euler", tolerance=tolerance))[0]
            for tolerance in (0.1, 1e-3)
        )
        np.testing.assert_array_equal(loose["reconstruction_error"], tight["reconstruction_error"])
        assert 0 <= tight["noise_valid"].sum() < loose["noise_valid"].sum()
        np.testing.assert_array_equal(loose["noise_valid"], loose["reconstruction_error"] <= 0.1)

    def test_refining_helps_those_beyond_the_tolerance_and_leaves_the_others_alone(self) -> None:
        data, policy = rollouts([np.linspace(-1.5, 1.5, 12).tolist()]), FieldPolicy(straight, SPEC)
        settings: dict[str, Any] = {"steps": 3, "method": "euler", "tolerance": 0.05}
        rough, found = add_noises(data, policy, InversionSettings(**settings))
        fine, refined = add_noises(data, policy, InversionSettings(**settings, iterations=150))
        assert 0 < found["flagged"] < found["chunks"]
        assert refined["flagged"] == 0
        untouched = rough["noise_valid"]
        np.testing.assert_array_equal(fine["noise"][untouched], rough["noise"][untouched])
        beyond = rough["reconstruction_error"] > 0.05
        assert (fine["reconstruction_error"][beyond] < rough["reconstruction_error"][beyond]).all()

    def test_a_penalty_keeps_refined_noises_small(self) -> None:
        """Beyond the flow's reach only ever larger noises come nearer."""
        data, policy = rollouts([[0.9, 0.9]]), FieldPolicy(squashing, SPEC)
        sizes = [
            np.abs(
                add_noises(data, policy, InversionSettings(4, "euler", iterations=100, penalty=penalty))[0]["noise"]
            ).max()
            for penalty in (0.0, 1.0)
        ]
        assert sizes[1] < 0.7 * sizes[0]

    def test_each_chunk_is_inverted_at_its_own_observation(self) -> None:
        policy = FieldPolicy(straight, SPEC)
        arrays, _ = add_noises(rollouts([[0.5, 0.2, 0.1], [0.5, 0.2]]), policy, InversionSettings())
        assert arrays["noise_valid"].tolist() == [True, True, False, True, False]
        assert not np.allclose(
            arrays["noise"][0], arrays["noise"][3], atol=1e-2
        )  # the same actions, another observation
        field = bind(policy, torch.full((1, 2), 0.1))
        back = denoise(field, torch.from_numpy(arrays["noise"][3:4]), 5)
        torch.testing.assert_close(back[0, :, 0], torch.tensor([0.5, 0.2]), atol=1e-4, rtol=0)

    def test_noises_are_those_of_normalised_actions(self) -> None:
        spec = ActionSpec(2, 1, normaliser=Normaliser(torch.tensor([10.0]), torch.tensor([4.0])))
        policy = FieldPolicy(straight, spec)
        arrays, _ = add_noises(rollouts([[12.0, 8.0]]), policy, InversionSettings())
        np.testing.assert_allclose(arrays["normalised_actions"][:, 0], [0.5, -0.5])
        plain, _ = add_noises(rollouts([[0.5, -0.5]]), FieldPolicy(straight, SPEC), InversionSettings())
        np.testing.assert_allclose(arrays["noise"], plain["noise"], atol=1e-6)

    def test_a_flow_that_runs_away_is_flagged_and_spoils_nothing(self) -> None:
        def away(x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
            return torch.where(observation[:, :1, None] > 0, -1e30 * x, straight(x, t, observation))

        settings = InversionSettings(steps=3, method="euler", tolerance=1.0)
        arrays, found = add_noises(rollouts([[0.5, 0.2], [0.5, 0.2]]), FieldPolicy(away, SPEC), settings)
        assert arrays["noise_valid"].tolist() == [True, False, False, False]
        assert np.isfinite(arrays["noise"]).all()
        assert found["flagged"] == 1

    def test_episodes_shorter_than_a_chunk(self) -> None:
        policy = FieldPolicy(straight, SPEC)
        arrays, found = add_noises(rollouts([[0.5], [0.5, 0.2]]), policy, InversionSettings())
        assert arrays["noise_valid"].tolist() == [False, True, False]
        assert found["chunks"] == 1
        with pytest.raises(DatasetError, match=r"a chunk has 2 actions and the longest of 2 episodes 1 steps"):
            add_noises(rollouts([[0.5], [0.2]]), policy, InversionSettings())

    def test_part_of_a_dataset(self) -> None:
        """A split shares its arrays with the rest, of which nothing may be seen."""
        policy, data = FieldPolicy(straight, SPEC), rollouts([[0.5, 0.2, 0.1], [0.3, 0.2], [0.9, 0.8]])
        part = EpisodeDataset(data.arrays, data.starts[1:2], data.lengths[1:2])
        arrays, _ = add_noises(part, policy, InversionSettings())
        assert arrays["actions"][:, 0].tolist() == pytest.approx([0.3, 0.2])
        whole, _ = add_noises(data, policy, InversionSettings())
        np.testing.assert_allclose(arrays["noise"], whole["noise"][3:5], atol=1e-6)

    def test_gradients_are_not_kept(self) -> None:
        noise, errors = invert_chunks(
            FieldPolicy(straight, SPEC), torch.zeros(1, 2), torch.full((1, 2, 1), 0.3), InversionSettings()
        )
        assert not noise.requires_grad
        assert errors.shape == (1,)


class TestSettings:
    @pytest.mark.parametrize(
        "changes",
        [
            {"steps": 0},
            {"iterations": -1},
            {"batch_size": 0},
            {"tolerance": 0.0},
            {"tolerance": float("nan")},
            {"penalty": -1.0},
        ],
        ids=str,
    )
    def test_numbers_out_of_range(self, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match=rf"{next(iter(changes))}( is)? .*expected"):
            InversionSettings(**changes)

    def test_an_unknown_method(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'exact'"):
            InversionSettings(method="exakt")  # type: ignore[arg-type]


class TestRefusals:
    def test_data_of_another_environment(self, demonstrations: Path, tmp_path: Path) -> None:
        with pytest.raises(MismatchError, match=r"observations \(28,\)"):
            invert_dataset(demonstrations, "ogbench/scene", tmp_path / "o.npz")
        assert not list(tmp_path.iterdir())

    def test_a_policy_for_another_environment(self, demonstrations: Path, tmp_path: Path) -> None:
        with pytest.raises(MismatchError, match="sees"):
            invert_dataset(demonstrations, TASK, tmp_path / "o.npz", policy="scene")
        assert not list(tmp_path.iterdir())

    def test_a_path_without_its_ending_and_data_that_are_not_there(self, demonstrations: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match=r"ends in '\.npz'"):
            invert_dataset(demonstrations, TASK, tmp_path / "inverted")
        with pytest.raises(DatasetError, match="there is no dataset"):
            invert_dataset(tmp_path / "none.npz", TASK, tmp_path / "o.npz")
        (tmp_path / "cut.npz").write_bytes(demonstrations.read_bytes()[:-100])
        with pytest.raises(DatasetError, match="truncated"):
            invert_dataset(tmp_path / "cut.npz", TASK, tmp_path / "o.npz")

    def test_a_target_that_cannot_be_written(self, demonstrations: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="can't write"):
            invert_dataset(demonstrations, TASK, tmp_path / "file" / "o.npz")

    def test_a_kill_between_the_two_files_is_noticed(
        self, demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Noises for three steps must not pass for those for five that lay there before."""
        out = tmp_path / "o.npz"
        invert_dataset(demonstrations, TASK, out)
        before = out.read_bytes()

        def kill(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "write_json", kill)
        with pytest.raises(KeyboardInterrupt):
            invert_dataset(demonstrations, TASK, out, InversionSettings(steps=3))
        if out.read_bytes() != before:
            with pytest.raises(DatasetError):
                read_binding(out)


class TestBinding:
    def test_none(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"no description of its noises.*'counterflow invert'"):
            read_binding(tmp_path / "x.npz")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", "JSONDecodeError"),
            ("[]", "TypeError"),
            ("{}", "KeyError"),
            ('{"format": "other", "format_version": 1}', "is 'other', version 1; expected"),
            ('{"format": "counterflow/inverted-episodes", "format_version": 2}', "version 2.*Upgrade"),
            ('{"format": "counterflow/inverted-episodes", "format_version": 1}', "KeyError 'binding'"),
            ('{"format": "counterflow/inverted-episodes", "format_version": 1, "binding": {"x": 1}}', "TypeError"),
        ],
    )
    def test_damaged_foreign_or_newer(self, tmp_path: Path, content: str, words: str) -> None:
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(DatasetError, match=words):
            read_binding(tmp_path / "x.npz")

    def test_it_is_read(self, tmp_path: Path) -> None:
        binding = Binding("abc", "ogbench/x", 5, 3, 7)
        content = {"format": "counterflow/inverted-episodes", "format_version": 1, "binding": binding.to_json()}
        (tmp_path / "x.json").write_text(json.dumps(content))
        assert read_binding(tmp_path / "x.npz") == binding


def steering_episode(
    index: int, source: str, steps: int, *, success: bool = True, short: bool = False
) -> SteeringEpisode:
    """An episode of the cube's sizes, one chunk of which is executed at a time."""
    rng = np.random.default_rng(index)
    chunks = -(-steps // 5)
    executed = np.full(chunks, 5, np.int64)
    executed[-1] = steps - 5 * (chunks - 1)
    arrays: Arrays = {
        "observations": rng.standard_normal((chunks, 28)).astype(np.float32),
        **{name: np.zeros((chunks, 5, 5), np.float32) for name in ("references", "noise", "chunks")},
        "active": np.zeros(chunks, bool),
        "steered": np.zeros((chunks, 5, 5), bool),
        "start_time": np.zeros(chunks, np.float32),
        "executed": executed,
        "intervened": np.zeros(chunks, bool),
    }
    if not short:
        arrays["step_observations"] = rng.standard_normal((steps, 28)).astype(np.float32)
        arrays["step_actions"] = rng.uniform(-0.5, 0.5, (steps, 5)).astype(np.float32)
    return SteeringEpisode(TASK, index, index, success, source, arrays)


class TestSteeringDatasets:
    def recorded(self, path: Path, **changes: Any) -> Path:
        with SteeringDataset.create_or_open(path, Binding("x", "ogbench/cube-single", 5, 5, 5)) as dataset:
            source = dataset.add_source({"seed": 0})
            for index, (steps, success) in enumerate(((8, True), (6, False), (11, True))):
                dataset.append(steering_episode(index, source, steps, success=success, **changes))
        return path

    def test_the_steps_of_successful_episodes_are_demonstrations(self, tmp_path: Path) -> None:
        found = step_episodes(self.recorded(tmp_path / "d"))
        assert found.lengths.tolist() == [8, 11]
        episodes = [one for one in SteeringDataset.load(tmp_path / "d") if one.success]
        for index, episode in enumerate(episodes):
            np.testing.assert_array_equal(found.episode(index)["actions"], episode.arrays["step_actions"])
            np.testing.assert_array_equal(found.episode(index)["observations"], episode.arrays["step_observations"])

    def test_a_folder_is_inverted_like_an_archive(self, tmp_path: Path) -> None:
        result = invert_dataset(self.recorded(tmp_path / "d"), TASK, tmp_path / "o.npz")
        assert result.chunks == 8 - 4 + 11 - 4
        assert EpisodeDataset.load(result.path, keys=ADDED).lengths.tolist() == [8, 11]

    def test_one_without_its_steps(self, tmp_path: Path) -> None:
        with pytest.raises(CounterflowError, match="step_observations"):
            step_episodes(self.recorded(tmp_path / "d", short=True))


class TestGymnasium:
    def test_rollouts_of_any_environment_become_a_noise_policy(self, tmp_path: Path) -> None:
        """A pendulum that is pushed the way it swings: rollouts, dataset on disk, noises, distillation, and back."""
        env = gymnasium.make("Pendulum-v1")
        episodes = []
        for seed in range(4):
            observation, _ = env.reset(seed=seed)
            seen, acted = [], []
            for _ in range(20 + seed):
                action = np.clip(observation[2:], -1.5, 1.5).astype(np.float32)
                seen.append(observation)
                acted.append(action)
                observation, *_ = env.step(action)
            episodes.append({"observations": np.array(seen), "actions": np.array(acted)})
        EpisodeDataset.from_episodes(episodes).save(tmp_path / "pendulum.npz")
        data = EpisodeDataset.load(tmp_path / "pendulum.npz")
        assert data.lengths.tolist() == [20, 21, 22, 23]
        for index, episode in enumerate(episodes):
            np.testing.assert_array_equal(data.episode(index)["observations"], episode["observations"])
            np.testing.assert_array_equal(data.episode(index)["actions"], episode["actions"])

        torch.manual_seed(0)
        observations = torch.from_numpy(data.arrays["observations"])
        spec = ActionSpec(3, 1, (-2.0,), (2.0,), Normaliser(torch.zeros(1), torch.tensor([2.0])))
        policy = FlowPolicy(NetworkConfig(width=32, depth=1), Normaliser.fit(observations), spec, "Pendulum-v1")
        policy = load(save(policy, tmp_path / "policy"))
        arrays, found = add_noises(data, policy, InversionSettings(steps=4))
        assert (found["chunks"], found["flagged"]) == (86 - 4 * 2, 0)
        starts = np.flatnonzero(arrays["noise_valid"])
        examples = NoiseExamples(
            arrays["features"][starts],
            arrays["noise"][starts],
            np.searchsorted(np.cumsum(data.lengths), starts, side="right"),
            binding_of(policy, 4),
        )
        config = DSBCConfig(RegressorConfig(members=2, width=64, depth=1), steps=300, learning_rate=1e-2)
        plan = steer_learned(policy, distil(examples, config)).act(observations[starts])
        wanted = np.stack([data.arrays["actions"][start : start + 3] for start in starts])
        misses = np.abs(plan.actions.numpy() - wanted).mean()
        assert misses < 0.5 * np.abs(wanted - wanted.mean()).mean()
