"""Offline RL as a run: from data to policies and critics, interrupted and resumed, refused where it can't be right."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.cli_offline import changed
from counterflow.data import EpisodeDataset
from counterflow.envs import make_env
from counterflow.envs.registry import make_task
from counterflow.errors import (
    CheckpointError,
    DatasetError,
    InvalidInputError,
    MismatchError,
    TrainingError,
    UnknownNameError,
)
from counterflow.experiments.evaluate import evaluate
from counterflow.experiments.offline import (
    CONFIGS,
    Evaluations,
    OfflineProgress,
    OfflineRun,
    OfflineTrained,
    acting_of,
    read_offline_settings,
    train_offline,
)
from counterflow.experiments.presets import cloning_preset, preset
from counterflow.experiments.run import Run
from counterflow.learning.offline import BLOCK, OfflineConfig
from counterflow.policies import FlowPolicy, load
from counterflow.steering import ChunkCritic, SteeredPolicy, guide, steer
from counterflow.steering.guided import GuidanceSettings

ENV = "ogbench/cube-single-task1"
SMALL: dict[str, Any] = {"width": 8, "depth": 2, "batch_size": 8, "horizon": 5, "flow_steps": 3, "compile": False}
RUN = OfflineRun(steps=60, evaluate_every=0, episodes=0, checkpoint_every=20, report_every=10, slice_every=BLOCK)
ALGORITHMS = tuple(CONFIGS)
ACTING = acting_of(CONFIGS["rql"](flow_steps=3))


def config(algorithm: str, **changes: Any) -> OfflineConfig:
    members = {"members": 3} if algorithm == "rql" else {}
    return CONFIGS[algorithm](**{**SMALL, **members, **changes})


def archive(path: Path, seed: int = 0, observation: int = 28, **changes: Any) -> Path:
    """Synthetic episodes of the cube's shapes with rewards of their own."""
    rng = np.random.default_rng(seed)
    arrays = {
        "observations": rng.standard_normal((124, observation)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (124, 5)).astype(np.float32),
        "rewards": -rng.integers(0, 2, 124).astype(np.float32),
        "masks": np.ones(124, np.float32),
        "terminals": np.arange(124) % 31 == 30,
    }
    np.savez(path, **{**arrays, **changes})
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return archive(tmp_path / "data.npz")


def train(algorithm: str, data: Path, run: Path, **given: Any) -> OfflineTrained:
    settings = given.pop("settings", RUN)
    return train_offline(
        algorithm, data, given.pop("env", ENV), run, given.pop("config", config(algorithm)), settings, **given
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder).tensors()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_trained_can_be_loaded_steered_and_guided(algorithm: str, data: Path, tmp_path: Path) -> None:
    trained = train(algorithm, data, tmp_path / "run", seeds=[3, 5])
    assert list(trained.folders) == [3, 5]
    assert trained.steps_done == 60
    policy = load(trained.folders[5])
    assert isinstance(policy, FlowPolicy)
    assert policy.provenance["seed"] == 5
    observations = torch.randn(4, 28)
    plan = steer(policy, "base").act(observations, rng=0)
    assert plan.actions.shape == (4, 5, 5)
    assert plan.evaluations == (1 if algorithm == "fql" else 10)
    critic = ChunkCritic.load(trained.folders[5] / "checkpoints" / "critic.safetensors")
    values = critic.values(observations, plan.chunk)
    assert values.shape == (3 if algorithm == "rql" else 2, 4)
    if algorithm != "fql":
        guided = guide(SteeredPolicy(policy, steps=10), critic, GuidanceSettings(weight=1.0))
        assert not torch.equal(guided.act(observations, rng=0).chunk, plan.chunk)
    else:
        with pytest.raises(MismatchError, match="single step"):
            steer(policy, "frs")


def test_rqls_critic_says_what_its_value_says_of_complete_chunks(data: Path, tmp_path: Path) -> None:
    from counterflow.experiments.offline import LEARNERS
    from counterflow.learning.offline import Sizes

    train("rql", data, tmp_path / "run", seeds=[0, 1])
    learner = LEARNERS["rql"](Sizes(28, 5, 5), config("rql"), [0, 1])
    state = Run(tmp_path / "run", json.loads(json.dumps(_config(tmp_path / "run")))).load_state()
    assert state is not None
    learner.restore(state)
    observations, chunks = torch.randn(4, 28), torch.rand(4, 5, 5)
    inputs = torch.cat([observations, chunks.flatten(1), torch.ones(4, 1)], 1).expand(2, -1, -1)
    wanted = learner.networks["target_value"].ensemble(inputs)[1, ..., 0]
    critic = ChunkCritic.load(tmp_path / "run" / "seed-1" / "checkpoints" / "critic.safetensors")
    torch.testing.assert_close(critic.values(observations, chunks), wanted, rtol=1e-4, atol=1e-5)


def _config(folder: Path) -> dict[str, Any]:
    import yaml

    content: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return content


@pytest.mark.parametrize("stop_at", [20, 30, 50])
def test_an_interruption_changes_nothing(data: Path, tmp_path: Path, stop_at: int) -> None:
    train("rql", data, tmp_path / "whole", seeds=[0, 1])

    def interrupt(progress: OfflineProgress) -> None:
        if progress.step == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("rql", data, tmp_path / "cut", seeds=[0, 1], on_progress=interrupt)
    resumed = train("rql", data, tmp_path / "cut", seeds=[0, 1])
    assert resumed.steps_done > 0
    for seed in (0, 1):
        expected = tensors(tmp_path / "whole" / f"seed-{seed}")
        found = tensors(tmp_path / "cut" / f"seed-{seed}")
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    assert lines[0] == lines[1]
    assert train("rql", data, tmp_path / "cut", seeds=[0, 1]).steps_done == 0


def test_seeds_beside_each_other_are_the_seeds_alone(data: Path, tmp_path: Path) -> None:
    train("qgf", data, tmp_path / "both", seeds=[0, 7])
    train("qgf", data, tmp_path / "one", seeds=[7])
    expected = tensors(tmp_path / "one" / "seed-7")
    for name, value in tensors(tmp_path / "both" / "seed-7").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_slices_take_turns_and_a_resumed_run_gets_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "slices"
    folder.mkdir()
    for index in range(3):
        archive(folder / f"data-{index}.npz", seed=index)
    settings = replace(RUN, steps=2 * BLOCK + 20, checkpoint_every=BLOCK)
    train("qgf", folder, tmp_path / "whole", settings=settings)

    def interrupt(progress: OfflineProgress) -> None:
        if progress.step == BLOCK + 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("qgf", folder, tmp_path / "cut", settings=settings, on_progress=interrupt)
    train("qgf", folder, tmp_path / "cut", settings=settings)
    expected = tensors(tmp_path / "whole" / "seed-0")
    assert all(torch.equal(value, expected[name]) for name, value in tensors(tmp_path / "cut" / "seed-0").items())
    train("qgf", folder / "data-0.npz", tmp_path / "first", settings=settings)
    other = tensors(tmp_path / "first" / "seed-0")
    assert any(not torch.equal(value, expected[name]) for name, value in other.items())


def test_goals_are_part_of_what_the_networks_see(tmp_path: Path) -> None:
    data = archive(tmp_path / "data.npz")
    env = "ogbench/cube-single-goals-task1"
    trained = train("qgf", data, tmp_path / "run", env=env)
    policy = load(trained.folders[0])
    assert isinstance(policy, FlowPolicy)
    assert (policy.observation_dim, policy.family) == (56, "ogbench/cube-single-goals")
    with pytest.raises(MismatchError, match="goals"):
        train("rql", data, tmp_path / "other", env=env)
    # The goal is given when it acts: flow and guidance turn to another one.
    critic = ChunkCritic.load(trained.folders[0] / "checkpoints" / "critic.safetensors")
    guided = guide(SteeredPolicy(policy, steps=3), critic, GuidanceSettings(weight=1.0))
    seen, goals = torch.randn(1, 28), torch.randn(2, 28)
    for acting in (SteeredPolicy(policy, steps=3), guided):
        chunks = [acting.act(torch.cat([seen, goal[None]], 1), rng=0).chunk for goal in goals]
        assert not torch.allclose(*chunks)


@pytest.mark.parametrize("family", ["antmaze-medium", "humanoidmaze-medium", "antsoccer-arena", "pointmaze-medium"])
def test_locomotion_from_a_recording_to_a_policy_that_acts(family: str, tmp_path: Path) -> None:
    """A few random steps in the layout of OGBench's own archives, which hold no rewards, and the official settings."""
    name = f"ogbench/{family}-task3"
    env, episodes = make_task(name), []
    for seed in range(2):
        rng, moment = np.random.default_rng(seed), env.reset(seed)
        rows: dict[str, list[np.ndarray]] = {"observations": [], "actions": [], "qpos": [], "qvel": []}
        for _ in range(12):
            rows["observations"].append(moment.observation)
            rows["actions"].append(rng.uniform(-1, 1, env.spec.action_dim).astype(np.float32))
            for key in ("qpos", "qvel"):
                rows[key].append(moment.privileged[f"privileged/{key}"].astype(np.float32))
            moment = env.step(rows["actions"][-1])
        episodes.append({key: np.stack(values) for key, values in rows.items()})
    EpisodeDataset.from_episodes(episodes).save(tmp_path / f"{family}-navigate-v0.npz")
    official, _ = preset("rql", name, "paper")
    tiny = replace(official, width=8, depth=2, batch_size=8, flow_steps=3, compile=False)
    settings = replace(RUN, steps=5)
    data = tmp_path / f"{family}-navigate-v0.npz"
    trained = train("rql", data, tmp_path / "run", env=name, config=tiny, settings=settings)
    policy = load(trained.folders[0])
    steered = SteeredPolicy(policy, steps=3)
    moment = env.reset(7)
    for step in range(3):
        actions = steered.act(moment.observation[None], rng=step).actions[0]
        assert actions.shape == (1, env.spec.action_dim)
        moment = env.step(actions[0].numpy())
        assert np.isfinite(moment.observation).all()
    env.close()
    if family == "pointmaze-medium":  # whose simulator is quick enough for a whole episode
        with make_env(name, 1, workers=0) as vector:
            found = evaluate(vector, policy, "base", 1, 0)
        assert 0 < found.environment_steps <= 1000


def test_a_run_of_one_seed_is_found_by_its_folder(data: Path, tmp_path: Path) -> None:
    train("rql", data, tmp_path / "run", seeds=[4])
    policy = load(tmp_path / "run")
    assert isinstance(policy, FlowPolicy)
    assert policy.provenance["seed"] == 4
    train("rql", data, tmp_path / "two", seeds=[4, 5])
    with pytest.raises(CheckpointError, match=r"policies of 2 seeds; name one of them: .*seed-4, .*seed-5"):
        load(tmp_path / "two")


@pytest.mark.parametrize("algorithm", ["qgf", "rql"])
def test_evaluation_goes_on_beside_the_training_and_is_reported(algorithm: str, data: Path, tmp_path: Path) -> None:
    settings = replace(RUN, steps=20, evaluate_every=10, episodes=1)
    trained = train(algorithm, data, tmp_path / "run", settings=settings, seeds=[0, 1])
    assert set(trained.success) == {0, 1}
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {(one["step"], name) for one in found for name in one if name.startswith("success/")}
    assert rates == {(step, f"success/seed-{seed}") for step in (10, 20) for seed in (0, 1)}
    assert not any((tmp_path / "run" / "evaluations").iterdir())


def test_an_evaluation_that_was_cut_off_is_done_when_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    settings = replace(RUN, steps=20, evaluate_every=0, episodes=0)
    train("rql", data, tmp_path / "run", settings=settings)
    content = _config(tmp_path / "run")
    reported = {}
    with Run(tmp_path / "run", content) as folder:
        with Evaluations(folder, ENV, ACTING, 1, lambda step, rates: reported.update({step: rates})) as judge:
            waiting = judge.place(20, 0)
        waiting.mkdir(parents=True)
        for file in (tmp_path / "run" / "seed-0" / "checkpoints").iterdir():
            (waiting / file.name).write_bytes(file.read_bytes())
        with Evaluations(folder, ENV, ACTING, 1, lambda step, rates: reported.update({step: rates})) as judge:
            judge.wait()
    assert list(reported) == [20]
    assert not waiting.exists()


def test_what_can_not_be_evaluated_does_not_stop_the_training(data: Path, tmp_path: Path) -> None:
    """A critic that says the same of every chunk can't guide: no weight moves anything."""
    trained = train("qgf", data, tmp_path / "run", settings=replace(RUN, steps=10))
    reported: list[int] = []
    acting = acting_of(config("qgf"))
    with (
        Run(tmp_path / "run", _config(tmp_path / "run")) as folder,
        Evaluations(folder, ENV, acting, 1, lambda step, rates: reported.append(step)) as judge,
    ):
        waiting = judge.place(10, 0)
        waiting.mkdir(parents=True)
        checkpoints = trained.folders[0] / "checkpoints"
        for file in checkpoints.glob("policy.*"):
            (waiting / file.name).write_bytes(file.read_bytes())
        critic = ChunkCritic.load(checkpoints / "critic.safetensors")
        for parameter in critic.parameters():
            parameter.zero_()
        critic.save(waiting / "critic.safetensors")
        judge.submit()
        with pytest.warns(
            UserWarning, match="seed 0 was not evaluated after 10 updates: weights from .* move the chunks"
        ):
            judge.wait()
    assert reported == []
    assert not waiting.exists()


class TestBadInput:
    def test_data_without_rewards(self, tmp_path: Path) -> None:
        with np.load(archive(tmp_path / "whole.npz")) as whole:
            kept = {name: whole[name] for name in ("observations", "actions", "terminals")}
        np.savez(tmp_path / "data.npz", **kept)
        with pytest.raises(DatasetError, match="rewards"):
            train("rql", tmp_path / "data.npz", tmp_path / "run")

    def test_terminals_in_the_wrong_place(self, tmp_path: Path) -> None:
        data = archive(tmp_path / "data.npz", terminals=np.arange(124) % 31 == 5)
        with pytest.raises(DatasetError, match="terminal"):
            train("rql", data, tmp_path / "run")

    def test_a_horizon_longer_than_every_episode(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="horizon is 40"):
            train("qgf", data, tmp_path / "run", config=config("qgf", horizon=40))

    def test_observations_of_another_environment(self, tmp_path: Path) -> None:
        with pytest.raises(MismatchError, match="observations"):
            train("rql", archive(tmp_path / "data.npz", observation=30), tmp_path / "run")

    def test_actions_of_another_environment(self, tmp_path: Path) -> None:
        actions = np.zeros((124, 4), np.float32)
        with pytest.raises(MismatchError, match=r"actions \(4,\); ogbench/cube-single has \(28,\) and \(5,\)"):
            train("rql", archive(tmp_path / "data.npz", actions=actions), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_horizon_that_is_not_the_runs(self, data: Path, tmp_path: Path) -> None:
        trained = train("qgf", data, tmp_path / "run")
        with pytest.raises(TrainingError, match="horizon 5 there, 4 here"):
            train("qgf", data, tmp_path / "run", config=config("qgf", horizon=4))
        other = train("qgf", data, tmp_path / "short", config=config("qgf", horizon=4))
        critic = ChunkCritic.load(other.folders[0] / "checkpoints" / "critic.safetensors")
        with pytest.raises(MismatchError, match="rows 0 to 4 of 5 numbers, not 5 rows"):
            guide(SteeredPolicy(load(trained.folders[0])), critic, GuidanceSettings(weight=1.0))

    def test_data_of_other_sizes_than_the_run_was_trained_on(self, data: Path, tmp_path: Path) -> None:
        """Slices are checked one by one, also those that are reached late."""
        folder = tmp_path / "slices"
        folder.mkdir()
        archive(folder / "0.npz")
        archive(folder / "1.npz", observation=30)
        with pytest.raises(MismatchError, match=r"1\.npz has observations \(30,\)"):
            train("qgf", folder, tmp_path / "run", settings=replace(RUN, steps=2 * BLOCK))
        assert load(tmp_path / "run").provenance["steps"] == 40

    def test_a_run_with_other_settings(self, data: Path, tmp_path: Path) -> None:
        train("rql", data, tmp_path / "run")
        with pytest.raises(TrainingError, match="alpha"):
            train("rql", data, tmp_path / "run", config=config("rql", alpha=5.0))

    def test_another_algorithms_settings(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="RQLConfig"):
            train("rql", data, tmp_path / "run", config=config("qgf"))
        with pytest.raises(UnknownNameError, match="rql"):
            train_offline("rqll", data, ENV, tmp_path / "run", config("rql"), RUN)

    def test_a_loss_that_is_not_finite_names_the_update_and_the_rows_and_keeps_the_checkpoint(
        self, tmp_path: Path
    ) -> None:
        """The second slice's rewards are finite themselves, but not what becomes of them."""
        folder = tmp_path / "slices"
        folder.mkdir()
        archive(folder / "0.npz")
        archive(folder / "1.npz", rewards=np.full(124, -3e38, np.float32))
        run, settings = tmp_path / "run", replace(RUN, steps=2 * BLOCK)
        with pytest.raises(
            TrainingError, match=r"seed 7 is .* at update 51, whose windows begin at rows \d+, .*1\.npz"
        ):
            train("qgf", folder, run, settings=settings, seeds=[7])
        told = json.loads((run / "diverged.json").read_text())
        assert (told["update"], told["seed"], Path(told["data"]).name) == (51, 7, "1.npz")
        assert len(told["rows"]) == 8
        assert all(0 <= row < 120 for row in told["rows"])
        policy = load(run)
        assert policy.provenance["steps"] == 40
        assert all(value.isfinite().all() for value in policy.tensors().values())
        state = Run(run, _config(run)).load_state()
        assert state is not None
        assert int(state["step"]) == 40

    def test_settings_of_a_run_out_of_range(self) -> None:
        with pytest.raises(InvalidInputError, match="steps"):
            OfflineRun(steps=0)
        with pytest.raises(InvalidInputError, match="multiple"):
            OfflineRun(slice_every=BLOCK + 1)


def test_settings_are_read_back(data: Path, tmp_path: Path) -> None:
    train("fql", data, tmp_path / "run", seeds=[2, 4])
    assert read_offline_settings(tmp_path / "run") == ("fql", data, ENV, [2, 4], config("fql"), RUN)


class TestPresets:
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    @pytest.mark.parametrize("family", ["cube-single", "scene", "puzzle-3x3", "antmaze-giant", "humanoidmaze-large"])
    def test_every_algorithm_has_settings_for_every_family(self, algorithm: str, family: str) -> None:
        for name in ("small", "paper"):
            found, run = preset(algorithm, f"ogbench/{family}-task1", name)
            assert isinstance(found, CONFIGS[algorithm])
            # Only RQL's official runs make rewards sparse; the small ones are to be compared with each other.
            sparse = family.startswith(("scene", "puzzle")) and (name == "small" or algorithm == "rql")
            assert run.sparse == sparse

    @pytest.mark.parametrize(
        ("family", "alpha", "expectile", "rho", "horizon", "discount", "sparse"),
        [
            ("antmaze-large", 0.1, 0.5, 0.5, 1, 0.99, False),
            ("antmaze-giant", 0.1, 0.5, 0.5, 1, 0.995, False),
            ("humanoidmaze-medium", 0.3, 0.5, 0.0, 1, 0.995, False),
            ("humanoidmaze-large", 0.3, 0.5, 0.0, 1, 0.995, False),
            ("scene", 3.0, 0.7, 0.5, 5, 0.99, True),
            ("puzzle-3x3", 1.0, 0.7, 0.5, 5, 0.99, True),
            ("puzzle-4x4", 1.0, 0.9, 0.5, 5, 0.99, True),
            ("cube-double", 10.0, 0.9, 0.5, 5, 0.99, False),
            ("cube-triple", 1.0, 0.9, 0.5, 5, 0.99, False),
            ("cube-quadruple", 1.0, 0.7, 0.5, 5, 0.99, False),
        ],
    )
    def test_rqls_official_settings(
        self, family: str, alpha: float, expectile: float, rho: float, horizon: int, discount: float, sparse: bool
    ) -> None:
        """hyperparameters.sh of aoberai/rql, and its agent's defaults."""
        own = {"alpha": alpha, "expectile": expectile, "rho": rho, "horizon": horizon, "discount": discount}
        shared = {"width": 512, "depth": 4, "flow_steps": 10, "learning_rate": 3e-4, "batch_size": 256}
        shared |= {"target_rate": 0.005, "average": 0.999, "members": 10, "precision": "float32"}
        for task in (1, 5):
            found, run = preset("rql", f"ogbench/{family}-task{task}", "paper")
            assert vars(found) == {**shared, **own, "compile": True}
            assert (run.steps, run.episodes, run.sparse) == (1_000_000, 50, sparse)

    @pytest.mark.parametrize("family", ["cube-triple", "cube-quadruple", "puzzle-4x4", "scene"])
    def test_qgfs_official_settings(self, family: str) -> None:
        """scripts/bc_iql_train.py of zhouzypaul/qgf, and its agent's defaults."""
        found, run = preset("qgf", f"ogbench/{family}-task1", "paper")
        own = {"width": 1024, "batch_size": 1024, "discount": 0.999, "horizon": 5, "expectile": 0.9, "members": 2}
        shared = {"depth": 4, "flow_steps": 10, "learning_rate": 3e-4, "target_rate": 0.005, "aggregation": "min"}
        assert vars(found) == {**shared, **own, "precision": "float32", "compile": True}
        assert (run.steps, run.episodes, run.sparse) == (500_000, 30, False)
        cloning = cloning_preset(f"ogbench/{family}-task1", "paper")
        assert (cloning.network.width, cloning.batch_size, cloning.horizon) == (1024, 1024, 5)
        assert (cloning.steps, cloning.time_law, cloning.weight_decay) == (500_000, "grid", 0.0)

    @pytest.mark.parametrize(
        ("family", "alpha", "discount", "aggregation"),
        [
            ("antmaze-large", 10.0, 0.99, "min"),
            ("antmaze-giant", 10.0, 0.995, "min"),
            ("humanoidmaze-medium", 30.0, 0.995, "mean"),
            ("humanoidmaze-large", 30.0, 0.995, "mean"),
            ("antsoccer-arena", 10.0, 0.995, "mean"),
            ("cube-single", 300.0, 0.99, "mean"),
            ("cube-double", 300.0, 0.99, "mean"),
            ("scene", 300.0, 0.99, "mean"),
            ("puzzle-3x3", 1000.0, 0.99, "mean"),
            ("puzzle-4x4", 1000.0, 0.99, "mean"),
        ],
    )
    def test_fqls_official_settings(self, family: str, alpha: float, discount: float, aggregation: str) -> None:
        """The README of seohongpark/fql, and its agents' defaults."""
        found, run = preset("fql", f"ogbench/{family}-task1", "paper")
        own = {"alpha": alpha, "discount": discount, "aggregation": aggregation, "normalise_q": False, "horizon": 1}
        shared = {"width": 512, "depth": 4, "flow_steps": 10, "learning_rate": 3e-4, "batch_size": 256}
        assert vars(found) == {**shared, **own, "target_rate": 0.005, "precision": "float32", "compile": True}
        assert (run.steps, run.episodes, run.sparse) == (1_000_000, 50, False)
        ranked, _ = preset("ifql", f"ogbench/{family}-task1", "paper")
        own = {"discount": discount, "expectile": 0.9, "candidates": 32, "horizon": 1}
        assert vars(ranked) == {**shared, **own, "target_rate": 0.005, "precision": "float32", "compile": True}

    def test_unknown_names(self) -> None:
        with pytest.raises(UnknownNameError, match="preset"):
            preset("rql", ENV, "large")  # type: ignore[arg-type]
        with pytest.raises(UnknownNameError, match="preset"):
            cloning_preset(ENV, "large")  # type: ignore[arg-type]


class TestChangedSettings:
    def test_values_get_their_kind(self) -> None:
        found = changed(config("rql"), ["alpha=3", "members=7", "compile=true", "precision=bfloat16"])
        assert (found.alpha, found.members, found.compile, found.precision) == (3.0, 7, True, "bfloat16")  # type: ignore[attr-defined]

    @pytest.mark.parametrize("given", ["alpha", "alpha=much", "compile=perhaps"])
    def test_what_is_no_setting_is_refused(self, given: str) -> None:
        with pytest.raises(InvalidInputError):
            changed(config("rql"), [given])
        with pytest.raises(UnknownNameError, match="alpha"):
            changed(config("rql"), ["alhpa=1"])


def test_a_policy_acts_as_its_own_settings_say() -> None:
    rql = acting_of(config("rql", flow_steps=7))
    assert (rql.method, rql.settings.steps, rql.guidance) == ("base", 7, None)
    ifql = acting_of(config("ifql", candidates=5)).guidance
    assert ifql is not None
    assert (ifql.weight, ifql.best_of) == (0.0, 5)
    qgf = acting_of(config("qgf", aggregation="mean")).guidance
    assert qgf is not None
    assert (qgf.weight, qgf.aggregation) == ("auto", "mean")


def test_a_worker_ends_with_its_parent() -> None:
    """However that came about: the parent is killed, and cannot shut its pool down."""
    script = (
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from counterflow.experiments.offline import leave_with\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, mp_context=context, initializer=leave_with, initargs=(os.getpid(),))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parent.py"
        path.write_text(script)
        with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            worker = int(parent.stdout.readline())
            assert Path(f"/proc/{worker}").exists()
            parent.kill()
    for _ in range(600):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    pytest.fail(f"the worker {worker} is still there a minute after its parent was killed")
