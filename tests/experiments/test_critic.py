"""From recordings to a critic on disk, and how strongly it guides: what is read, what is refused, what is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import counterflow.experiments.weight as weight_module
from counterflow.binding import Binding
from counterflow.cli import main
from counterflow.cli_options import Guiding
from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.envs import make_env
from counterflow.errors import CounterflowError, DatasetError, InvalidInputError, MismatchError
from counterflow.experiments.critic import rollouts_of, train_critic
from counterflow.experiments.evaluate import evaluate
from counterflow.experiments.rollout import Episode
from counterflow.experiments.weight import weigh
from counterflow.learning import ChunkCriticConfig, ChunkCriticLearner
from counterflow.policies import Normaliser, load, save
from counterflow.steering import (
    ChunkCritic,
    CriticBinding,
    CriticConfig,
    GuidanceSettings,
    MethodSettings,
    steer,
    task_embedding,
)

BINDING = Binding("abc", "ogbench/x", 3, 2, 5)
SMALL = ChunkCriticConfig(CriticConfig(members=2, width=16, depth=1), steps=5)
TASK = "ogbench/cube-single-task1"


def recorded(
    path: Path, outcomes: str = "sfsf", binding: Binding = BINDING, told: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Record an episode of three decisions for each letter: s for success, f for failure."""
    with SteeringDataset.create_or_open(path, binding) as dataset:
        source = dataset.add_source({"seed": 0} | (told or {}))
        for index, outcome in enumerate(outcomes):

            def marked(kind: int, *shape: int, index: int = index) -> Any:
                return (100 * kind + 10 * index + np.arange(np.prod(shape)).reshape(shape) / 100).astype(np.float32)

            horizon, size = binding.horizon, binding.state_dim
            arrays = {
                "observations": marked(1, 3, 4),
                "features": marked(2, 3, 5),
                "chunks": marked(3, 3, horizon, size),
                "noise": np.zeros((3, horizon, size), np.float32),
                "references": np.zeros((3, horizon, size), np.float32),
                "active": np.zeros(3, bool),
                "steered": np.zeros((3, horizon, size), bool),
                "start_time": np.zeros(3, np.float32),
                "executed": np.array([2, 2, 1], np.int64),
                "intervened": np.zeros(3, bool),
            }
            arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
            dataset.append(SteeringEpisode("ogbench/x-task1", index, index, outcome == "s", source, arrays))
    return path


class TestReading:
    def test_every_decision_of_successes_and_failures(self, tmp_path: Path) -> None:
        found = rollouts_of([recorded(tmp_path / "d", "sf")], SMALL)
        np.testing.assert_allclose(found.inputs[:, 0], [200, 200.05, 200.1, 210, 210.05, 210.1])
        np.testing.assert_allclose(found.chunks[4, :, 0], [310.06, 310.08, 310.1])
        assert found.success.tolist() == [True] * 3 + [False] * 3
        assert found.episodes.tolist() == [0] * 3 + [1] * 3
        assert found.executed.tolist() == [2, 2, 1] * 2
        assert found.binding == CriticBinding("abc", "ogbench/x", 3, 2)
        seen = rollouts_of([tmp_path / "d"], ChunkCriticConfig(CriticConfig("observation")))
        assert seen.inputs[0, 0] == 100

    def test_decisions_know_their_task_where_the_critic_is_to(self, tmp_path: Path) -> None:
        config = ChunkCriticConfig(CriticConfig(members=2, width=16, depth=1, task_dim=4), steps=5)
        path = recorded(tmp_path / "d", "sf")
        found = rollouts_of([path], config)
        assert found.tasks is not None
        np.testing.assert_allclose(found.tasks, np.tile(task_embedding("ogbench/x-task1", 4).numpy(), (6, 1)))
        assert rollouts_of([path], SMALL).tasks is None
        critic = train_critic([path], tmp_path / "critic", config)
        inputs, chunks = torch.randn(2, 5), torch.randn(2, 3, 2)
        here, there = (critic.values(inputs, chunks, task_embedding(name, 4)) for name in ("ogbench/x-task1", "other"))
        assert not torch.allclose(here, there)
        with pytest.raises(InvalidInputError, match="task embeddings of 4"):
            ChunkCriticLearner(found, SMALL, 0)

    def test_the_rows_that_were_executed_without_padding(self, tmp_path: Path) -> None:
        binding = Binding("abc", "", 5, 2, 5, padding=3)
        path = recorded(tmp_path / "d", "sf", binding, {"past": 1, "executed": 2})
        found = rollouts_of([path], SMALL)
        assert found.binding == CriticBinding("abc", "", 2, 2, 1)
        np.testing.assert_allclose(found.chunks[0], [[300.05, 300.06], [300.1, 300.11]])

    def test_several_recordings_in_any_number_of_steps(self, tmp_path: Path) -> None:
        """How the policy was denoised and steered is not the critic's business; which policy it was is."""
        one = recorded(tmp_path / "one", "ss")
        other = recorded(tmp_path / "two", "ff", Binding("abc", "ogbench/x", 3, 2, 10))
        found = rollouts_of([one, other], SMALL)
        assert (len(found.inputs), int(found.last.sum())) == (12, 4)
        foreign = recorded(tmp_path / "three", "ff", Binding("xyz", "ogbench/x", 3, 2, 5))
        with pytest.raises(MismatchError, match="different policies: policy 'abc', not 'xyz'"):
            rollouts_of([one, foreign], SMALL)

    @pytest.mark.parametrize(
        ("outcomes", "changes", "error", "message"),
        [
            ("ss", {}, DatasetError, "none of the 2 episodes failed"),
            ("ff", {}, DatasetError, "none of the 2 episodes succeeded"),
            ("sf", {"features": None}, MismatchError, "recorded without features"),
        ],
    )
    def test_what_can_not_be_learned_from(
        self, outcomes: str, changes: dict[str, Any], error: type[CounterflowError], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(error, match=message):
            rollouts_of([recorded(tmp_path / "d", outcomes, **changes)], SMALL)
        with pytest.raises(InvalidInputError, match="no recording was named"):
            rollouts_of([], SMALL)


def test_training_writes_a_critic_that_says_what_it_is(tmp_path: Path) -> None:
    seen: list[int] = []
    made = train_critic(
        [recorded(tmp_path / "d")], tmp_path / "critic", SMALL, seed=3, on_progress=lambda one: seen.append(one.step)
    )
    found = ChunkCritic.load(tmp_path / "critic")
    assert found.fingerprint == made.fingerprint
    told = found.provenance
    assert (told["episodes"], told["successes"], told["decisions"], told["seed"]) == (4, 2, 12, 3)
    assert told["auc"] is not None
    assert seen == [5]


def critic_of_the_cube(**changes: Any) -> ChunkCritic:
    """A critic of the shipped prior with random weights."""
    prior = load("cube-single")
    torch.manual_seed(0)
    binding = {"policy": prior.fingerprint, "family": prior.family, "horizon": 5, "dim": 5, **changes}
    return ChunkCritic(
        CriticConfig(members=2, width=16, depth=1),
        CriticBinding(**binding),
        Normaliser(torch.zeros(28), torch.ones(28)),
    ).requires_grad_(False)


class TestChoosing:
    """Which episodes count, and which weight is taken; the rollouts themselves are stood in for."""

    @pytest.fixture
    def ran(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, list[int]]]:
        """The weight and the seeds of everything that was rolled out; episodes succeed the more, the nearer w is to 0.1."""
        done: list[tuple[float, list[int]]] = []

        def run(policy: Any, env: Any, seeds: Any, *_: Any, **__: Any) -> list[Episode]:
            weight = 0.0 if policy.guidance is None else policy.guidance.weight
            done.append((weight, list(seeds)))
            wins = {0.0: 1, 0.05: 3, 0.1: 4, 0.2: 4}.get(weight, 0)
            return [Episode(seed, success=index < wins, steps=7) for index, seed in enumerate(seeds)]

        monkeypatch.setattr(weight_module, "run_episodes", run)
        return done

    def test_a_number_costs_nothing(self, ran: list[Any]) -> None:
        found = weigh(None, steer(load("cube-single"), "base"), critic_of_the_cube(), GuidanceSettings(0.3), 0)  # type: ignore[arg-type]
        assert (found.weight, ran) == (0.3, [])

    def test_the_best_of_several(self, ran: list[tuple[float, list[int]]]) -> None:
        found = weigh(
            None,  # type: ignore[arg-type]
            steer(load("cube-single"), "base"),
            critic_of_the_cube(),
            GuidanceSettings("validate"),
            0,
            weights=(0.2, 0.0, 0.1, 0.05, 0.4),
            episodes=5,
        )
        assert found.weight == 0.1  # of equal ones the smallest
        assert [weight for weight, _ in ran] == [0.0, 0.05, 0.1, 0.2, 0.4]
        assert all(seeds == ran[0][1] and len(seeds) == 5 for _, seeds in ran)
        assert found.environment_steps == 5 * 5 * 7
        assert [rate.successes for rate in found.rates.values()] == [1, 3, 4, 4, 0]
        json.dumps(found.to_json(), allow_nan=False)

    def test_unknown(self) -> None:
        with pytest.raises(InvalidInputError, match="a number, 'auto' or 'validate'"):
            weigh(None, steer(load("cube-single"), "base"), critic_of_the_cube(), GuidanceSettings("best"), 0)  # type: ignore[arg-type]


class TestEvaluating:
    def test_methods_and_critics(self) -> None:
        with make_env(TASK, 1, workers=0) as env:
            prior, critic = load("cube-single"), critic_of_the_cube()
            with pytest.raises(InvalidInputError, match="'qgf' needs a critic"):
                evaluate(env, prior, "qgf", 1, 0)
            with pytest.raises(InvalidInputError, match="'direct' executes something else"):
                evaluate(env, prior, "direct", 1, 0, critic=critic)
            foreign, how = critic_of_the_cube(policy="xyz"), GuidanceSettings(0.1)
            with pytest.raises(MismatchError, match="the critic was made for other chunks: policy 'xyz'"):
                evaluate(env, prior, "qgf", 1, 0, critic=foreign, guidance=how)
            # Reversed references and a critic together; a weight of 0 changes nothing.
            settings, zero = MethodSettings(reversal_steps=3), GuidanceSettings(0.0)
            found = evaluate(env, prior, "frs", 1, 0, settings=settings, critic=critic, guidance=zero)
            plain = evaluate(env, prior, "frs", 1, 0, settings=settings)
        assert found.outcomes == plain.outcomes
        told = found.to_json()["settings"]
        assert told["critic"] == critic.fingerprint
        assert told["guidance"]["aggregation"] == "min"
        assert told["weight"]["weight"] == 0.0
        assert "weight" not in plain.to_json()["settings"]

    def test_a_run_carries_its_critic(self, tmp_path: Path) -> None:
        folder = tmp_path / "run" / "checkpoints"
        save(load("cube-single"), folder / "policy")
        critic = critic_of_the_cube()
        critic.save(folder / "critic")
        for policy in (tmp_path / "run", folder / "policy.safetensors", folder):
            found = Guiding().load(str(policy), "cpu", needed=True)
            assert found is not None
            assert found.fingerprint == critic.fingerprint
        assert Guiding().load(str(tmp_path / "run"), "cpu", needed=False) is None  # only where it was asked for
        with pytest.raises(InvalidInputError, match="none was given. Make one"):
            Guiding().load(None, "cpu", needed=True)

    def test_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Record failures, and successes beside them; train; guide with the weight that the trust region gives."""

        def run(*arguments: str | Path) -> str:
            capsys.readouterr()
            assert main([str(argument) for argument in arguments]) == 0
            return " ".join(capsys.readouterr().out.split())

        common = ("--num-envs", "1", "--no-every-step")
        said = run("record", TASK, "--steer", "frs", "--out", tmp_path / "frs", "--episodes", "1", *common)
        assert "1 of 1 episodes succeeded" in said
        assert "next: counterflow critic" in said
        said = run("record", TASK, "--steer", "base", "--out", tmp_path / "base", "--episodes", "2", *common)
        assert " of 2 episodes succeeded (2 made now)" in said
        said = run("record", TASK, "--steer", "base", "--out", tmp_path / "base", "--episodes", "2", *common)
        assert "(0 made now)" in said
        critic = tmp_path / "run" / "checkpoints" / "critic"
        small = ("--critic.members", "2", "--critic.width", "16", "--critic.depth", "1", "--steps", "20")
        said = run("critic", tmp_path / "frs", tmp_path / "base", "--out", critic, "--method", "monte_carlo", *small)
        assert "3 episodes" in said
        assert f"--steer qgf --critic {critic}.safetensors" in said
        result = tmp_path / "result.json"
        arguments = ("--episodes", "1", "--num-envs", "2", "--json", result, "--best-of", "2", "--aggregation", "mean")
        run("eval", TASK, "--steer", "qgf", "--critic", f"{critic}.safetensors", *arguments)
        told = json.loads(result.read_text())["settings"]
        assert told["guidance"]["weight"] == "auto"
        assert told["weight"]["weight"] > 0
        assert told["weight"]["radius"] == 0.5
        capsys.readouterr()
        assert main(["eval", TASK, "--steer", "qgf", "--policy", "cube-single"]) == 2
        assert "no critic.safetensors lies beside" in " ".join(capsys.readouterr().err.split())
