"""From recordings and demonstrations to a policy, on the command line: real commands, real files, real environments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.cli import main
from counterflow.data import EpisodeDataset, SteeringDataset
from counterflow.experiments.online_data import anchors_of
from counterflow.learning import DSBCConfig
from counterflow.learning.dagger import DAggerConfig
from counterflow.policies import Normaliser, load
from counterflow.steering import (
    ActorConfig,
    AnchorsConfig,
    AnchorsCritic,
    ChunkRegressor,
    RegressorConfig,
    SteeringActor,
    SteeringSpace,
    binding_of,
)

TASK = "ogbench/cube-single-task1"
SMALL = ("--regressor.members", "2", "--regressor.width", "32", "--regressor.depth", "1", "--steps", "20")


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail with a message and no traceback; return the message in one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


def success(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must succeed; return what it printed in one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def evaluation(path: Path, *arguments: str | Path) -> dict[str, Any]:
    command = ["eval", TASK, "--episodes", "1", "--json", path, *arguments]
    assert main([str(argument) for argument in command]) == 0
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One successful steered episode."""
    out = tmp_path_factory.mktemp("recorded") / "steered"
    arguments = ["record", TASK, "--out", str(out), "--successes", "1", "--max-episodes", "1", "--num-envs", "1"]
    assert main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def noise_policy(recorded: Path) -> Path:
    """What was distilled from it."""
    out = recorded.with_name("noise-policy")
    assert main(["distill", str(recorded), "--out", str(out), "--env", TASK, *SMALL]) == 0
    return out


def foreign(path: Path, **changes: Any) -> Path:
    """A noise policy for the cube with other settings than the real one."""
    prior = load("cube-single")
    binding = binding_of(prior, 5)
    content = {**binding.to_json(), **changes}
    torch.manual_seed(0)
    return ChunkRegressor(
        RegressorConfig(members=1, width=8, depth=1),
        Normaliser(torch.zeros(28), torch.ones(28)),
        Normaliser(torch.zeros(25), torch.ones(25)),
        type(binding).from_json(content),
    ).save(path)


class TestFromRecordingToPolicy:
    def test_record_again_makes_nothing(self, recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
        printed = success(
            capsys, "record", TASK, "--out", recorded, "--successes", "1", "--max-episodes", "1", "--num-envs", "1"
        )
        assert "1 of 1 episodes succeeded (0 made now)" in printed
        assert f"counterflow distill {recorded} --env {TASK}" in printed

    def test_dataset_summary(self, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        printed = success(capsys, "dataset", "summary", recorded, "--json", tmp_path / "summary.json")
        assert TASK in printed
        content = json.loads((tmp_path / "summary.json").read_text())
        assert (content["episodes"], content["successes"]) == (1, 1)
        assert content["binding"] == binding_of(load("cube-single"), 5).to_json()

    def test_distill_says_what_it_learned_from_and_what_comes_next(
        self, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "x"
        printed = success(capsys, "distill", recorded, "--out", out, "--windows", "decisions", "--seed", "3", *SMALL)
        (episode,) = SteeringDataset.load(recorded).episodes
        assert f"{episode.decisions} examples of 1 episodes, 20 updates" in printed
        assert f"--steer dsbc --noise-policy {out}.safetensors" in printed
        made = ChunkRegressor.load(out)
        assert (made.config.members, made.config.width, made.provenance["seed"]) == (2, 32, 3)

    def test_eval_of_what_was_distilled(self, noise_policy: Path, tmp_path: Path) -> None:
        result = evaluation(tmp_path / "x.json", "--steer", "dsbc", "--noise-policy", noise_policy)
        assert (result["steer"], result["episodes"]) == ("dsbc", 1)
        assert result["policy"] == load("cube-single").fingerprint
        assert ChunkRegressor.load(noise_policy).fingerprint in result["settings"].values()
        assert result["ledger"]["reasoner_queries"] == 0
        again = evaluation(tmp_path / "y.json", "--steer", "dsbc", "--noise-policy", f"{noise_policy}.safetensors")
        assert again["outcomes"] == result["outcomes"]


class TestFromDemonstrationsToPolicy:
    def test_demonstrate_invert_distill_eval(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data, inverted, policy = tmp_path / "d.npz", tmp_path / "i.npz", tmp_path / "bc"
        made = success(capsys, "demonstrate", TASK, "--episodes", "1", "--num-envs", "1", "--out", data)
        assert "1 demonstrations (1 attempts)" in made
        found = success(capsys, "invert", data, "--env", TASK, "--out", inverted, "--steps", "4")
        chunks = EpisodeDataset.load(data).num_steps - 4
        assert f"{chunks:,} chunks, " in found
        assert "beyond the tolerance of 0.5 and flagged" in found
        printed = success(capsys, "distill", inverted, "--out", policy, "--regressor.target", "action", *SMALL)
        with np.load(inverted) as arrays:
            assert f"{arrays['noise_valid'].sum()} examples of 1 episodes" in printed
        assert "--steer bc" in printed
        result = evaluation(tmp_path / "x.json", "--steer", "bc", "--noise-policy", policy)
        assert result["steer"] == "bc"
        assert ChunkRegressor.load(policy).binding.steps == 4
        message = failure(capsys, "eval", TASK, "--episodes", "1", "--steer", "dsbc", "--noise-policy", policy)
        assert "trained on noises; this one was trained on actions" in message

    def test_a_recording_can_be_inverted_too(
        self, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (episode,) = SteeringDataset.load(recorded).episodes
        printed = success(
            capsys, "invert", recorded, "--env", TASK, "--out", tmp_path / "i.npz", "--method", "euler", "--steps", "3"
        )
        assert f"{episode.steps - 4} chunks" in printed


class TestDagger:
    def test_one_round(
        self,
        recorded: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The command has no settings of the learning, whose own would take a minute here."""
        small = DAggerConfig(DSBCConfig(RegressorConfig(members=2, width=16, depth=1), steps=10), steps=5)
        monkeypatch.setattr("counterflow.experiments.dagger.DAggerConfig", lambda: small)
        arguments: list[str | Path] = [
            "dagger",
            TASK,
            "--data",
            recorded,
            "--out",
            tmp_path / "run",
            "--rounds",
            "1",
            "--episodes",
            "1",
        ]
        arguments += ["--patience", "1", "--hold", "60"]
        printed = success(capsys, *arguments)
        assert "round 0: 0 of 1 succeeded without help, 1 in all" in printed
        assert f"--steer dsbc --noise-policy {tmp_path}/run/round-1.safetensors" in printed
        assert {"round-0.safetensors", "round-1.safetensors", "rounds.json", "rollouts"} <= {
            path.name for path in (tmp_path / "run").iterdir()
        }
        before = (tmp_path / "run" / "round-1.safetensors").read_bytes()
        assert success(capsys, *arguments) == printed
        assert (tmp_path / "run" / "round-1.safetensors").read_bytes() == before
        assert "other settings (rule)" in failure(capsys, *arguments[:-1], "61")


class TestBadInput:
    def test_a_noise_policy_of_another_prior(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = foreign(tmp_path / "x", policy="0123456789abcdef")
        message = failure(capsys, "eval", TASK, "--episodes", "1", "--steer", "dsbc", "--noise-policy", path)
        assert "belongs to another frozen policy" in message
        assert "policy '0123456789abcdef', not '" in message
        message = failure(
            capsys,
            "eval",
            "ogbench/scene-task1",
            *("--episodes", "1", "--steer", "dsbc", "--noise-policy", foreign(tmp_path / "y")),
        )
        assert "family 'ogbench/cube-single', not 'ogbench/scene'" in message

    def test_a_noise_policy_where_none_is_used_and_none_where_one_is(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = foreign(tmp_path / "x")
        message = failure(capsys, "eval", TASK, "--episodes", "1", "--steer", "frs", "--noise-policy", path)
        assert "--noise-policy is of no use to --steer frs; did you mean --steer dsbc?" in message
        message = failure(capsys, "eval", TASK, "--episodes", "1", "--steer", "dsbc")
        assert "none was given" in message
        assert "counterflow distill" in message

    def test_a_target_for_the_other_method(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        message = failure(
            capsys, "eval", TASK, "--episodes", "1", "--steer", "bc", "--noise-policy", foreign(tmp_path / "x")
        )
        assert "'bc' needs a policy trained on actions; this one was trained on noises. Use 'dsbc'" in message

    def test_files_that_are_missing_or_damaged(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        flags = ("eval", TASK, "--episodes", "1", "--steer", "dsbc", "--noise-policy")
        assert "no such file" in failure(capsys, *flags, tmp_path / "none")
        path = foreign(tmp_path / "x")
        path.write_bytes(path.read_bytes()[:300])
        assert "truncated" in failure(capsys, *flags, path)
        assert "holds a 'counterflow/flow-policy'" in failure(
            capsys, *flags, Path(__file__).parent.parent / "src/counterflow/policies/priors/cube-single"
        )
        for data in (tmp_path / "none", tmp_path / "none.npz"):
            message = failure(capsys, "distill", data, "--out", tmp_path / "o", *SMALL)
            assert "none" in message
        (tmp_path / "folder").mkdir()
        message = failure(capsys, "distill", tmp_path / "folder", "--out", tmp_path / "o", *SMALL)
        assert "there is no steering dataset" in message
        message = failure(capsys, "invert", tmp_path / "none.npz", "--env", TASK, "--out", tmp_path / "o.npz")
        assert "there is no dataset" in message
        message = failure(capsys, "dagger", TASK, "--data", tmp_path / "folder", "--out", tmp_path / "run")
        assert "there is no steering dataset" in message
        assert not (tmp_path / "run").exists()

    def test_no_success_to_learn_from(self, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        dataset = SteeringDataset.load(recorded)
        with SteeringDataset.create_or_open(tmp_path / "failed", dataset.binding) as copy:
            source = copy.add_source({"seed": 0})
            (episode,) = dataset.episodes
            copy.append(type(episode)(TASK, 0, 0, False, source, episode.arrays))
        message = failure(capsys, "distill", tmp_path / "failed", "--out", tmp_path / "o", *SMALL)
        assert "no successful episode" in message
        assert not (tmp_path / "o.safetensors").exists()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("record", TASK, "--out", "x", "--successes", "0"), "successes is 0; expected an integer of at least 1"),
            (("record", "ogbench/cube-single", "--out", "x"), "is a family of tasks"),
            (("record", TASK, "--out", "x", "--successes", "2", "--max-episodes", "1"), "max_episodes is 1"),
            (("invert", "x.npz", "--env", TASK, "--out", "o.npz", "--steps", "0"), "denoising steps is 0"),
            (("invert", "x.npz", "--env", TASK, "--out", "o"), "ends in '.npz'"),
            (("invert", "x.npz", "--env", "ogbench/cub", "--out", "o.npz"), "did you mean"),
            (("dagger", TASK, "--data", "x", "--out", "o", "--patience", "0"), "patience is 0"),
            (("dagger", TASK, "--data", "x", "--out", "o", "--rounds", "0"), "rounds is 0"),
            (("distill", "x", "--out", "o", "--dropout", "1"), "dropout is 1"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_numbers_and_names(
        self,
        arguments: tuple[str, ...],
        words: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert words in failure(capsys, *arguments)
        assert not list(tmp_path.iterdir())


class TestOnline:
    def test_settings_reach_the_run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Every option lands where it belongs: the algorithm's settings, the run's, the seeds, the sources."""
        import counterflow.cli_online as module

        seen: dict[str, Any] = {}

        def keep(console: Any, algorithm: str, env: str, out: Path, config: Any, settings: Any, *rest: Any) -> None:
            seen.update(algorithm=algorithm, env=env, out=out, config=config, settings=settings, rest=rest)

        monkeypatch.setattr(module, "run_online", keep)
        arguments = ["train", "dsrl", TASK, "--variant", "aliasing", "--seeds", "2", "--seed", "5", "--bound", "1.25"]
        arguments += [
            "--prefill",
            str(tmp_path),
            "--record",
            str(tmp_path / "episodes"),
            "--set",
            "update_ratio=3",
            "rank=4",
            "--latent",
            "low_rank",
            "--set",  # again: plain tyro would keep this one alone
            "target_entropy=-2",
        ]
        assert main(arguments) == 0
        config, settings = seen["config"], seen["settings"]
        assert (config.variant, config.update_ratio, config.target_entropy) == ("aliasing", 3, -2.0)
        assert (settings.bound, settings.latent, settings.rank) == (1.25, "low_rank", 4)
        assert [*seen["rest"][0]] == [5, 6]
        assert seen["rest"][1] == tmp_path
        assert seen["rest"][-1] == tmp_path / "episodes"
        assert (
            main(["train", "rfs", TASK, "--ports", "latent", "--residual-bound", "0.1", "0.2", "--preset", "paper"])
            == 0
        )
        assert (seen["algorithm"], seen["settings"].ports, seen["settings"].residual_bound) == (
            "rfs",
            "latent",
            (0.1, 0.2),
        )
        assert main(["train", "residual", TASK, "--reward", "dense", "--decisions", "7", "--num-envs", "3"]) == 0
        assert (seen["settings"].reward, seen["settings"].decisions, seen["settings"].num_envs) == ("dense", 7, 3)

    def test_corrections_and_their_ablations(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import counterflow.cli_online as module

        seen: list[Any] = []
        monkeypatch.setattr(module, "run_corrections", lambda *arguments: seen.extend(arguments[1:]))
        arguments = ["train", "corrections", TASK, "--data", str(tmp_path), "--critic-sees", "both", "--set", "alpha=1"]
        arguments += ["--noise-policy", str(tmp_path / "noise")]
        assert (
            main([*arguments, "--residual-bound", "0.1", "0.2", "--steps", "7", "--seeds", "2", "--first", "20"]) == 0
        )
        data, env, out, config, settings, seeds, policy, noise_policy, device = seen
        assert noise_policy == tmp_path / "noise"
        assert (data, env, out, policy, device) == (
            tmp_path,
            TASK,
            Path("runs/corrections-cube-single-task1"),
            None,
            "cpu",
        )
        assert (config.critic_sees, config.anchor, config.alpha) == ("both", "residual", 1.0)
        assert (settings.steps, settings.residual_bound, settings.first, settings.episodes) == (7, (0.1, 0.2), 20, 50)
        assert [*seeds] == [0, 1]

    def test_settings_of_algorithm_and_run_have_different_names(self) -> None:
        from dataclasses import fields

        from counterflow.experiments.online_settings import CONFIGS, OnlineRun

        of_run = {field.name for field in fields(OnlineRun)}
        for config in CONFIGS.values():
            assert not of_run & {field.name for field in fields(config)}

    def test_a_setting_that_is_not_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "unknown setting 'updates'" in failure(capsys, "train", "dsrl", TASK, "--set", "updates=3")
        assert "seeds is 0" in failure(capsys, "train", "dsrl", TASK, "--seeds", "0")
        assert "expected a int" in failure(capsys, "train", "dsrl", TASK, "--set", "update_ratio=x")

    def test_anchors_are_evaluated_recorded_and_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """What training leaves is what eval and record take, and no other method does."""
        prior = load("cube-single")
        binding = binding_of(prior, 5)
        config = AnchorsConfig(particles=2, hidden=(8,), weighted=True)
        critic = AnchorsCritic(config, anchors_of(prior.action_spec), 28 + 25, 2, binding)
        critic.requires_grad_(False)
        path = critic.save(tmp_path / "anchors")
        content = evaluation(tmp_path / "result.json", "--steer", "anchors", "--noise-policy", path, "--num-envs", "1")
        assert content["settings"]["learned"] == critic.fingerprint
        # 7 anchors and the reasoner's are reversed, and one candidate is denoised, 5 steps each
        chunks = content["ledger"]["reasoner_queries"]
        assert content["ledger"]["field_evaluations"] == chunks * 5 * (8 + 1) > 0
        out = tmp_path / "recorded"
        success(
            capsys, "record", TASK, "--out", out, "--steer", "anchors", "--noise-policy", path, "--episodes", "1",
            "--num-envs", "1", "--no-every-step",
        )  # fmt: skip
        (episode,) = SteeringDataset.load(out).episodes
        assert np.isfinite(episode.arrays["noise"]).all()
        assert (episode.arrays["start_time"] == 0).all()
        few = ("--episodes", "1", "--num-envs", "1")
        assert "needs critics and their anchors" in failure(capsys, "eval", TASK, "--steer", "anchors", *few)
        message = failure(capsys, "eval", TASK, "--steer", "actor", "--noise-policy", path, *few)
        assert "holds a 'counterflow/anchors'; expected a 'counterflow/steering-actor'" in message

    def test_an_actors_latents_are_drawn_where_that_is_asked_for(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prior = load("cube-single")
        torch.manual_seed(0)
        space = SteeringSpace(prior, bound=1.5)
        actor = SteeringActor(ActorConfig(hidden=(8,)), 28, space.size, binding_of(prior, 5)).requires_grad_(False)
        own = ("--steer", "actor", "--noise-policy", actor.save(tmp_path / "actor"), "--num-envs", "1")
        mean = evaluation(tmp_path / "mean.json", *own)
        drawn = evaluation(tmp_path / "drawn.json", *own, "--drawn")
        assert drawn["settings"] == {**mean["settings"], "drawn": True}
        # The deviation before the squashing is 1 in an actor that has learned nothing: noises are larger than its mean's.
        assert drawn["diagnostics"]["noise_percentile"] > mean["diagnostics"]["noise_percentile"]
        few = ("--drawn", "--episodes", "1", "--num-envs", "1")
        assert "needs an actor" in failure(capsys, "eval", TASK, "--steer", "actor", *few)
        residual = ActorConfig(ports="residual", residual_bound=(0.1,) * 5, hidden=(8,))
        other_space = residual.space(prior, 5, "euler")
        made = SteeringActor(residual, 28, other_space.size, binding_of(prior, 5)).requires_grad_(False)
        path = made.save(tmp_path / "residual")
        assert "no latents to draw" in failure(capsys, "eval", TASK, "--steer", "actor", "--noise-policy", path, *few)
        for other in ("frs", "base"):
            message = failure(capsys, "eval", TASK, "--steer", other, *few)
            assert f"only an actor's latents can be drawn from its law; the method is '{other}'" in message

    def test_an_actor_is_asked_for_and_not_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "needs an actor" in failure(
            capsys, "eval", TASK, "--steer", "actor", "--episodes", "1", "--num-envs", "1"
        )
