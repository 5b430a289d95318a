"""Demonstrations: only successes, in OGBench's layout, the same however many simulators there are."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.data import EpisodeDataset
from counterflow.envs import make_env
from counterflow.errors import InvalidInputError, MismatchError, TrainingError, UnknownNameError
from counterflow.experiments import demonstrate as module
from counterflow.experiments.demonstrate import Demonstrated, demonstrate
from counterflow.random import child_seed
from counterflow.reasoners import oracle_expert

TASK = "ogbench/cube-single-task1"


def two(out: Path, **changes: Any) -> Demonstrated:
    return demonstrate(changes.pop("env_name", TASK), out, **{"episodes": 2, "num_envs": 1, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Demonstrated:
    return two(tmp_path_factory.mktemp("demonstrations") / "x.npz")


class TestLayout:
    def test_it_loads_and_says_how_it_was_made(self, made: Demonstrated) -> None:
        dataset = EpisodeDataset.load(made.path, keys=("rewards",))
        assert (dataset.num_episodes, dataset.observation_shape, dataset.action_dim) == (2, (28,), 5)
        assert dataset.num_steps == made.transitions
        assert {array.dtype for array in dataset.arrays.values()} == {np.dtype(np.float32)}
        provenance = json.loads(made.provenance_path.read_text())
        assert provenance["request"] == {"env": TASK, "episodes": 2, "seed": 0, "noise": 0.1}
        assert (provenance["attempts"], provenance["successes"]) == (made.attempts, 2)
        assert {"counterflow", "ogbench", "mujoco"} <= set(provenance["versions"])

    def test_replaying_the_actions_gives_the_observations_and_ends_at_the_goal(self, made: Demonstrated) -> None:
        """Each observation was seen before its action; success comes with the last step, and not before."""
        episode = EpisodeDataset.load(made.path, keys=("rewards",)).episode(0)
        with make_env(TASK, 1) as env:
            batch = env.reset([child_seed(child_seed(0, "demonstration", 0), "environment")])
            for step, (observation, action) in enumerate(zip(episode["observations"], episode["actions"], strict=True)):
                np.testing.assert_array_equal(batch.observation[0], observation)
                assert not batch.success[0]
                batch = env.step(action[None])
                assert batch.rewards[0, 0] == episode["rewards"][step]
        assert batch.success[0]


class TestRepeatability:
    def test_the_number_of_environments_changes_nothing(
        self, made: Demonstrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "make_env", partial(make_env, workers=0))
        told: list[tuple[int, int]] = []
        again = two(tmp_path / "x.npz", num_envs=2, on_episode=lambda *numbers: told.append(numbers))
        assert again.path.read_bytes() == made.path.read_bytes()
        assert again.provenance_path.read_text() == made.provenance_path.read_text()
        assert told == [(1, 1), (2, 2)]

    def test_what_is_there_is_not_made_again(self, made: Demonstrated, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "make_env", lambda *_: pytest.fail("nothing was left to do"))
        again = two(made.path)
        assert not again.made
        assert (again.episodes, again.attempts, again.transitions) == (2, made.attempts, made.transitions)


class Clumsy:
    """An expert that does nothing at all in every episode whose number is in `fails`."""

    fails: frozenset[int] = frozenset()

    def __init__(self, env_name: str, noise: float) -> None:
        self._expert, self._numbers = oracle_expert(env_name, noise), {}
        for number in range(20):
            self._numbers[child_seed(child_seed(0, "demonstration", number), "expert")] = number

    def reset(self, seed: int) -> None:
        self._fails = self._numbers[seed] in self.fails
        self._expert.reset(seed)

    def act(self, view: Any) -> Any:
        return np.zeros(5) if self._fails else self._expert.act(view)


class TestFailures:
    def test_only_successes_are_kept_in_the_order_of_their_seeds(
        self, made: Demonstrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first fails, long after the second has succeeded; a third is made only then."""
        monkeypatch.setattr(module, "oracle_expert", Clumsy)
        monkeypatch.setattr(module, "make_env", partial(make_env, workers=0))
        monkeypatch.setattr(Clumsy, "fails", frozenset({0}))
        told: list[tuple[int, int]] = []
        result = two(tmp_path / "x.npz", num_envs=3, on_episode=lambda *numbers: told.append(numbers))
        assert (result.episodes, result.attempts) == (2, 3)
        assert told == [(1, 1), (1, 2), (2, 3)]
        kept, all_good = EpisodeDataset.load(result.path), EpisodeDataset.load(made.path)
        np.testing.assert_array_equal(kept.episode(0)["actions"], all_good.episode(1)["actions"])
        assert not np.array_equal(kept.episode(1)["actions"][:10], all_good.episode(0)["actions"][:10])
        assert kept.lengths.max() < 150  # the failure took 200

    def test_an_expert_that_fails_too_often_is_given_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "oracle_expert", Clumsy)
        monkeypatch.setattr(Clumsy, "fails", frozenset(range(20)))
        monkeypatch.setattr(module, "ATTEMPTS", 2)
        with pytest.raises(TrainingError, match=r"succeeded in 0 of 2 episodes of .*expected 1 .*nothing was written"):
            two(tmp_path / "x.npz", episodes=1)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("num_envs", [1, 2])
    def test_one_with_hardly_a_success_in_the_first_attempts_is_given_up_early(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_envs: int
    ) -> None:
        monkeypatch.setattr(module, "oracle_expert", Clumsy)
        monkeypatch.setattr(module, "FIRST", 3)
        monkeypatch.setattr(module, "ATTEMPTS", 2)  # so half of them must succeed
        monkeypatch.setattr(Clumsy, "fails", frozenset(range(1, 20)))
        with pytest.raises(
            TrainingError, match=r"succeeded in 1 of [34] episodes .* at most 4, one in 2 of the first 3,"
        ):
            demonstrate(TASK, tmp_path / "x.npz", episodes=2, num_envs=num_envs)
        monkeypatch.setattr(Clumsy, "fails", frozenset({1}))
        assert demonstrate(TASK, tmp_path / "x.npz", episodes=2, num_envs=num_envs).attempts == 3

    def test_an_interruption_leaves_what_lay_there(self, tmp_path: Path) -> None:
        out = tmp_path / "x.npz"
        two(out, episodes=1)
        before = out.read_bytes(), out.with_suffix(".json").read_bytes()

        def interrupt(successes: int, attempts: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            two(out, episodes=2, overwrite=True, on_episode=interrupt)
        assert (out.read_bytes(), out.with_suffix(".json").read_bytes()) == before
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_kill_between_the_two_files_is_noticed(self, made: Demonstrated, tmp_path: Path) -> None:
        """The description of the new archive beside the old one must not pass for it."""
        out = tmp_path / "x.npz"
        out.write_bytes(made.path.read_bytes()[:-1])
        out.with_suffix(".json").write_text(made.provenance_path.read_text())
        with pytest.raises(MismatchError, match="is not the file that"):
            two(out)


class TestRefusals:
    def test_other_demonstrations_at_the_path(self, made: Demonstrated) -> None:
        before = made.path.read_bytes()
        with pytest.raises(MismatchError, match=r"seed is 0 there and 1 here.*overwrite"):
            two(made.path, seed=1)
        assert made.path.read_bytes() == before

    def test_a_file_of_somebody_elses(self, tmp_path: Path) -> None:
        (tmp_path / "x.npz").write_bytes(b"mine")
        with pytest.raises(MismatchError, match="no x.json beside it"):
            two(tmp_path / "x.npz")
        two(tmp_path / "x.npz", episodes=1, overwrite=True)
        assert EpisodeDataset.load(tmp_path / "x.npz").num_episodes == 1

    @pytest.mark.parametrize(
        "changes", [{"episodes": 0}, {"episodes": 1.5}, {"seed": -1}, {"noise": 2.0}, {"num_envs": 0}]
    )
    def test_numbers_out_of_range(self, changes: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="expected"):
            two(tmp_path / "x.npz", **changes)
        assert not list(tmp_path.iterdir())

    def test_names_and_paths(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownNameError, match="did you mean"):
            two(tmp_path / "x.npz", env_name="ogbench/cube-singel-task1")
        with pytest.raises(InvalidInputError, match="expected one of its tasks"):
            two(tmp_path / "x.npz", env_name="ogbench/cube-single")
        with pytest.raises(InvalidInputError, match=r"end in '\.npz'"):
            two(tmp_path / "x.hdf5")
