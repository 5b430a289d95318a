"""Recordings in a real environment: what is kept is what happened, and interruptions change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import counterflow.experiments.record as module
from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.envs import VectorEnv, make_env
from counterflow.errors import DatasetError, InvalidInputError, MismatchError, UnknownNameError
from counterflow.experiments.inversion import InversionSettings
from counterflow.experiments.record import Recorded, record, step_noises
from counterflow.experiments.rollout import run_episodes
from counterflow.flow import denoise
from counterflow.policies import ActionSpec, FieldPolicy, bind, load
from counterflow.random import child_seed
from counterflow.steering import ActorConfig, LatentShape, MethodSettings, SteeringActor, SteeringSpace, binding_of

TASK = "ogbench/cube-single-task1"


class Kept:
    """An environment that stays open for the next test: to make one takes longer than most of what is done in it."""

    def __init__(self, env: VectorEnv) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def envs() -> Iterator[dict[int, VectorEnv]]:
    made = {count: make_env(TASK, count, workers=0) for count in (1, 2)}
    yield made
    for env in made.values():
        env.close()


@pytest.fixture(scope="module")
def patched(envs: dict[int, VectorEnv]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_env", lambda name, episodes, num_envs: Kept(envs[num_envs]))
        yield


@pytest.fixture(scope="module")
def recorded(patched: None, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Two whole episodes of flow reversal steering, both successes."""
    return make(tmp_path_factory.mktemp("recorded") / "frs")


@pytest.fixture
def short(patched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes end after six decisions (and fail)."""
    monkeypatch.setattr(module, "run_episodes", partial(run_episodes, max_chunks=6))


def make(out: Path, method: str = "frs", env: str = TASK, **changes: Any) -> Recorded:
    return record(env, method, out, **{"successes": 2, "max_episodes": 2, "num_envs": 1, **changes})


def failed(out: Path, method: str, **changes: Any) -> list[SteeringEpisode]:
    """Record episodes of which none succeeds."""
    with pytest.raises(DatasetError, match="only 0 succeeded"):
        make(out, method, **{"successes": 1, "max_episodes": 1, **changes})
    return SteeringDataset.load(out).episodes


def files(path: Path) -> dict[str, bytes]:
    """Everything in a dataset's folder but the lock."""
    found = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def redenoised(observations: Any, noise: Any, steps: int) -> Any:
    """What the shipped prior makes of noises, within the limits of actions (its actions have no units of their own)."""
    prior = load("cube-single")
    with torch.no_grad():
        context = prior.encode(torch.from_numpy(observations))
        return denoise(bind(prior, context), torch.from_numpy(noise), steps).clamp(-1, 1).numpy()


def actor_of(ports: Any) -> SteeringActor:
    """An actor that always says 0.3 before it is squashed."""
    prior = load("cube-single")
    space = SteeringSpace(prior, ports, steps=6, residual_bound=0.2)
    config = ActorConfig("squashed", ports, 1.5, residual_bound=(0.2,) * 5, hidden=(4,))
    made = SteeringActor(config, space.encode(torch.zeros(1, 28))[1].shape[1], space.size, binding_of(prior, 6))
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.zero_()
        made.network.biases[-1][..., : space.size] = 0.3
    return made.eval()


class TestContent:
    def test_how_many_there_are_and_how_they_were_made(self, recorded: Recorded) -> None:
        assert (recorded.episodes, recorded.successes, recorded.made) == (2, 2, 2)
        dataset = SteeringDataset.load(recorded.path)
        assert (len(dataset), dataset.successes) == (2, 2)
        assert dataset.binding == binding_of(load("cube-single"), 5)
        (provenance,) = dataset.sources.values()
        assert (provenance["env"], provenance["method"], provenance["seed"]) == (TASK, "frs", 0)
        assert provenance["settings"] == {"reversal_steps": 5, "perturbation": 0.0}
        assert provenance["reasoner"]["convention"] == "ogbench"

    def test_the_noise_of_a_decision_gives_its_chunk(self, recorded: Recorded) -> None:
        for episode in SteeringDataset.load(recorded.path):
            arrays = episode.arrays
            assert not arrays["start_time"].any()
            assert not arrays["intervened"].any()
            found = redenoised(arrays["observations"], arrays["noise"], 5)
            np.testing.assert_allclose(found, arrays["chunks"], atol=1e-4)
            assert (redenoised(arrays["observations"], arrays["noise"], 4) - arrays["chunks"]).max() > 0.05

    def test_what_was_seen_and_done_is_what_happened(self, recorded: Recorded, envs: dict[int, VectorEnv]) -> None:
        """Replaying the actions from the episode's seed gives every observation and reward, and the success at the end."""
        episode = SteeringDataset.load(recorded.path).episodes[0]
        assert episode.seed == child_seed(0, "recording", 0)
        batch = envs[1].reset([child_seed(episode.seed, "environment")])
        steps = zip(
            *(episode.arrays[f"{name}"] for name in ("step_observations", "step_actions", "rewards")), strict=True
        )
        for observation, action, reward in steps:
            assert not batch.done[0]
            np.testing.assert_array_equal(batch.observation[0], observation)
            batch = envs[1].step(action[None])
            assert batch.rewards[0, 0] == reward
        assert batch.success[0]

    def test_decisions_and_steps_fit_together(self, recorded: Recorded) -> None:
        for episode in SteeringDataset.load(recorded.path):
            arrays = episode.arrays
            begins = np.cumsum(arrays["executed"]) - arrays["executed"]
            np.testing.assert_array_equal(arrays["observations"], arrays["step_observations"][begins])
            np.testing.assert_array_equal(arrays["features"], arrays["step_features"][begins])
            assert (arrays["executed"][:-1] == 5).all()
            for begin, count, chunk in zip(begins, arrays["executed"], arrays["chunks"], strict=True):
                np.testing.assert_allclose(arrays["step_actions"][begin : begin + count], chunk[:count], atol=1e-6)

    def test_features_are_the_priors(self, recorded: Recorded) -> None:
        prior, arrays = load("cube-single"), SteeringDataset.load(recorded.path).episodes[0].arrays
        for prefix in ("", "step_"):
            expected = prior.features(prior.encode(torch.from_numpy(arrays[f"{prefix}observations"])))
            np.testing.assert_array_equal(arrays[f"{prefix}features"], expected.numpy())

    def test_references_are_the_reasoners(self, recorded: Recorded) -> None:
        """Somebody always speaks on this task; what is not spoken for doesn't count, and what is differs over time."""
        arrays = SteeringDataset.load(recorded.path).episodes[0].arrays
        assert arrays["active"].all()
        assert arrays["steered"][..., :3].all()
        assert len(np.unique(arrays["references"][:, 0], axis=0)) > 2

    @pytest.mark.parametrize(("inversion", "most"), [("exact", 0.011), ("regularised", 0.501)])
    def test_the_noise_of_a_step_gives_what_was_executed_from_there(
        self, recorded: Recorded, inversion: str, most: float, tmp_path: Path
    ) -> None:
        path = recorded.path if inversion == "regularised" else make(tmp_path, inversion="exact").path
        dataset = SteeringDataset.load(path)
        (provenance,) = dataset.sources.values()
        assert provenance["every_step"]["method"] == inversion
        for episode in dataset:
            arrays, steps = episode.arrays, episode.steps
            valid = arrays["step_noise_valid"]
            assert valid[:-4].mean() > 0.9
            assert not valid[-4:].any()
            rows = np.flatnonzero(valid)
            windows = np.stack([arrays["step_actions"][row : row + 5] for row in rows])
            np.testing.assert_array_equal(arrays["step_chunks"][rows], windows)
            found = redenoised(arrays["step_observations"][rows], arrays["step_noise"][rows], 5)
            np.testing.assert_allclose(found, windows, atol=most)
            typical = np.sqrt(np.square(arrays["step_noise"][rows]).mean())
            assert typical < 1.8 if inversion == "regularised" else typical > 2
            assert arrays["step_noise"].shape == (steps, 5, 5)


class TestGoingOn:
    def test_a_second_call_makes_nothing(
        self, recorded: Recorded, monkeypatch: pytest.MonkeyPatch, envs: dict[int, VectorEnv]
    ) -> None:
        before = files(recorded.path)
        monkeypatch.setattr(module, "open_env", lambda *_, **__: pytest.fail("nothing was left to do"))
        again = make(recorded.path)
        assert (again.episodes, again.successes, again.made) == (2, 2, 0)
        assert files(recorded.path) == before

    def test_an_interruption_changes_nothing(self, recorded: Recorded, tmp_path: Path) -> None:
        def interrupt(episode: Any, successes: int) -> None:
            assert (episode.success, successes) == (True, 1)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "cut", on_episode=interrupt)
        assert len(SteeringDataset.load(tmp_path / "cut")) == 1
        told: list[int] = []
        resumed = make(tmp_path / "cut", on_episode=lambda _, successes: told.append(successes))
        assert (resumed.episodes, resumed.made, told) == (2, 1, [2])
        assert files(tmp_path / "cut") == files(recorded.path)

    def test_a_deleted_episode_is_made_again(self, short: None, tmp_path: Path) -> None:
        failed(tmp_path / "x", "frs", max_episodes=2)
        before = files(tmp_path / "x")
        next(iter((tmp_path / "x" / "episodes").iterdir())).unlink()
        failed(tmp_path / "x", "frs", max_episodes=2)
        assert files(tmp_path / "x") == before

    def test_the_number_of_environments_changes_nothing_but_rounding(self, short: None, tmp_path: Path) -> None:
        one, two = (failed(tmp_path / str(count), "frs", num_envs=count, max_episodes=3) for count in (1, 2))
        assert [episode.key for episode in one] == [episode.key for episode in two]
        assert [episode.index for episode in one] == [0, 1, 2]
        for first, second in zip(one, two, strict=True):
            assert (first.seed, first.success) == (second.seed, second.success)
            for name, array in first.arrays.items():
                if "noise" not in name:  # what is out of the flow's reach has none, and rounding decides on some
                    np.testing.assert_allclose(second.arrays[name], array, atol=1e-3, err_msg=name)
            np.testing.assert_allclose(second.arrays["noise"], first.arrays["noise"], atol=1e-3)

    def test_other_settings_are_another_recording_in_the_same_folder(self, short: None, tmp_path: Path) -> None:
        failed(tmp_path, "frs")
        failed(tmp_path, "frs", seed=1)
        failed(tmp_path, "rank", settings=MethodSettings(steps=5, candidates=2))
        dataset = SteeringDataset.load(tmp_path)
        assert len(dataset) == len(dataset.sources) == 3
        assert len({episode.seed for episode in dataset}) == 2  # methods with the same seed begin in the same states


class TestMethods:
    @pytest.mark.parametrize("method", ["base", "rank"])
    def test_the_noise_that_was_used_is_kept(self, method: str, short: None, tmp_path: Path) -> None:
        (episode,) = failed(tmp_path, method, settings=MethodSettings(steps=4, candidates=3))
        assert SteeringDataset.load(tmp_path).binding.steps == 4
        arrays = episode.arrays
        np.testing.assert_allclose(redenoised(arrays["observations"], arrays["noise"], 4), arrays["chunks"], atol=1e-4)
        assert arrays["active"].any() == (method == "rank")
        (provenance,) = SteeringDataset.load(tmp_path).sources.values()
        assert (provenance["reasoner"] is None) == (method == "base")

    @pytest.mark.parametrize("method", ["direct", "partial"])
    def test_a_noise_is_found_for_chunks_that_came_from_none(self, method: str, short: None, tmp_path: Path) -> None:
        (episode,) = failed(tmp_path, method)
        assert SteeringDataset.load(tmp_path).binding.steps == 10
        arrays = episode.arrays
        assert not arrays["start_time"].any()
        misses = np.abs(redenoised(arrays["observations"], arrays["noise"], 10) - arrays["chunks"]).max((1, 2))
        assert np.median(misses) < 1e-3
        if method == "direct":
            np.testing.assert_allclose(arrays["chunks"][..., :3], arrays["references"][..., :3], atol=1e-6)

    @pytest.mark.parametrize("ports", ["latent", "residual", "both"])
    def test_latent_base_and_what_was_executed_of_an_actor(self, ports: Any, short: None, tmp_path: Path) -> None:
        """RFS's record: the latent, what the base makes of it, and what was executed on top."""
        (episode,) = failed(tmp_path / "actor", "actor", learned=actor_of(ports), every_step=False)
        arrays = episode.arrays
        assert not arrays["intervened"].any()
        assert not arrays["start_time"].any()
        assert SteeringDataset.load(tmp_path / "actor").binding.steps == 6  # the actor's own
        if ports == "latent":
            made = redenoised(arrays["observations"], arrays["noise"], 6)
            np.testing.assert_allclose(made, arrays["chunks"], atol=1e-4)
            assert "base_chunks" not in arrays
            assert np.abs(arrays["noise"] - 1.5 * np.tanh(0.3)).max() < 1e-5
            return
        base = redenoised(arrays["observations"], arrays["base_noise"], 6)
        np.testing.assert_allclose(base, np.clip(arrays["base_chunks"], -1, 1), atol=1e-4)
        wanted = np.clip(arrays["base_chunks"] + 0.2 * np.tanh(0.3), -1, 1)
        np.testing.assert_allclose(arrays["chunks"], wanted, atol=1e-4)
        dataset = SteeringDataset.load(tmp_path / "actor")
        assert next(iter(dataset.sources.values()))["learned"] == actor_of(ports).fingerprint

    def test_noises_for_other_steps_than_the_methods(self, patched: None, tmp_path: Path) -> None:
        """FRS in five steps; its noises, of decisions and of steps, give in eight what was done, and in five they don't."""
        made = make(tmp_path, successes=1, max_episodes=1, inversion="exact", noise_steps=8)
        dataset = SteeringDataset.load(made.path)
        (episode,), (provenance,) = dataset.episodes, dataset.sources.values()
        assert dataset.binding == binding_of(load("cube-single"), 8)
        assert (provenance["settings"]["reversal_steps"], provenance["noise_steps"]) == (5, 8)
        assert provenance["every_step"]["steps"] == 8
        arrays, valid = episode.arrays, episode.arrays["step_noise_valid"]
        assert valid.mean() > 0.9
        for observations, noise, chunks in (
            (arrays["observations"], arrays["noise"], arrays["chunks"]),
            (arrays["step_observations"][valid], arrays["step_noise"][valid], arrays["step_chunks"][valid].clip(-1, 1)),
        ):
            np.testing.assert_allclose(redenoised(observations, noise, 8), chunks, atol=0.02)
            assert np.abs(redenoised(observations, noise, 5) - chunks).max() > 0.05

    def test_the_methods_own_steps_said_aloud(self, short: None, tmp_path: Path) -> None:
        one, two = (failed(tmp_path / str(steps), "frs", noise_steps=steps)[0] for steps in (None, 5))
        np.testing.assert_array_equal(one.arrays["noise"], two.arrays["noise"])

    def test_what_is_learned_is_needed_and_must_fit(self, short: None, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="needs an actor"):
            make(tmp_path / "none", "actor")
        with pytest.raises(MismatchError, match="use 'actor'"):
            make(tmp_path / "other", "dsbc", learned=actor_of("latent"))
        with pytest.raises(InvalidInputError, match="something that was learned"):
            make(tmp_path / "third", "frs", learned=actor_of("latent"))
        assert not list(tmp_path.iterdir())

    def test_without_every_step(self, patched: None, tmp_path: Path) -> None:
        made = make(tmp_path, every_step=False, successes=1, max_episodes=1)
        (episode,) = SteeringDataset.load(made.path).episodes
        assert episode.success
        assert "step_observations" in episode.arrays
        assert not {"step_noise", "step_features", "step_chunks"} & set(episode.arrays)

    @pytest.mark.parametrize(("latent", "noted"), [("repeated", {}), ("low_rank", {"latent_rank": 2})])
    def test_noises_in_a_latents_shape(self, latent: Any, noted: dict[str, int], patched: None, tmp_path: Path) -> None:
        settings = MethodSettings(latent=latent)
        made = make(tmp_path, successes=1, max_episodes=1, settings=settings)
        dataset = SteeringDataset.load(made.path)
        (episode,), (provenance,) = dataset.episodes, dataset.sources.values()
        assert provenance["settings"] == {"reversal_steps": 5, "perturbation": 0.0, "latent": latent, **noted}
        noise = torch.from_numpy(episode.arrays["noise"])[episode.arrays["active"]]
        if latent == "repeated":
            assert torch.equal(noise, noise[:, :1].expand_as(noise))
        else:
            steered = LatentShape("low_rank", 2)
            assert not torch.allclose(
                noise, steered.expand(steered.project(noise), 5), atol=0.1
            )  # the rest is the prior's
        assert "step_noise" not in episode.arrays  # no inversion finds noises of the shape
        made_again = redenoised(episode.arrays["observations"], episode.arrays["noise"], 5)
        np.testing.assert_allclose(made_again, episode.arrays["chunks"], atol=1e-4)
        with pytest.raises(InvalidInputError, match=f"latent '{latent}' .* in 8 steps"):
            make(tmp_path / "other", settings=settings, noise_steps=8)

    def test_a_failed_episode_has_none(self, short: None, tmp_path: Path) -> None:
        (episode,) = failed(tmp_path, "frs")
        assert "step_observations" in episode.arrays
        assert not {"step_noise", "step_features", "step_chunks"} & set(episode.arrays)

    def test_another_policy(self, patched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that offers no features: they are left out, and everything else is there."""
        prior = load("cube-single")
        plain = FieldPolicy(lambda x, t, o: prior.velocity(o, x, t), prior.action_spec, prior.encode)
        monkeypatch.setattr(module, "load_prior", lambda *_: plain)
        (episode,) = SteeringDataset.load(make(tmp_path, successes=1, max_episodes=1).path).episodes
        assert not {"features", "step_features"} & set(episode.arrays)
        assert "step_noise" in episode.arrays
        assert SteeringDataset.load(tmp_path).binding.policy == plain.fingerprint


class TestGivingUp:
    def test_when_too_few_succeed(self, short: None, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"after 3 episodes of .* only 0 succeeded; 1 were asked for.*safe in"):
            make(tmp_path, "base", successes=1, max_episodes=3)
        assert len(SteeringDataset.load(tmp_path)) == 3

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"successes": 0}, "successes is 0; expected an integer of at least 1"),
            ({"successes": 3, "max_episodes": 2}, "at least as many as successes, 3"),
            ({"seed": -1}, "seed is -1"),
            ({"noise_steps": 0}, "steps"),
        ],
    )
    def test_numbers_out_of_range(self, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match=words):
            make(tmp_path / "x", **changes)
        assert not (tmp_path / "x").exists()

    def test_names_and_folders(self, recorded: Recorded, tmp_path: Path) -> None:
        with pytest.raises(UnknownNameError, match="did you mean"):
            make(tmp_path / "x", env="ogbench/cube-singel-task1")
        with pytest.raises(UnknownNameError, match="steering method"):
            make(tmp_path / "x", method="fsr")
        with pytest.raises(MismatchError, match="steps 5, not 3"):
            make(recorded.path, settings=MethodSettings(reversal_steps=3))
        (tmp_path / "letter.txt").write_text("dear")
        with pytest.raises(DatasetError, match="is no steering dataset"):
            make(tmp_path)

    def test_a_policy_for_another_environment(self, patched: None, tmp_path: Path) -> None:
        with pytest.raises(MismatchError, match="sees 40 numbers"):
            make(tmp_path / "x", policy="scene")


def test_steps_fewer_than_a_chunk_have_no_noise() -> None:
    policy = FieldPolicy(lambda x, t, o: -x, ActionSpec(3, 2))
    arrays = {"step_observations": np.zeros((2, 4), np.float32), "step_actions": np.ones((2, 2), np.float32)}
    found = step_noises(policy, arrays, InversionSettings())
    assert not found["step_noise_valid"].any()
    assert found["step_noise"].shape == found["step_chunks"].shape == (2, 3, 2)
