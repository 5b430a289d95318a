"""Online training on a small world: every algorithm learns, is evaluated, and goes on with the same numbers after a kill."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import counterflow.experiments.online as module
import counterflow.experiments.online_agents as agents
from counterflow.cli_options import load_learned
from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.envs import VectorEnv
from counterflow.errors import (
    DatasetError,
    InvalidInputError,
    MismatchError,
    TrainingError,
    UnknownNameError,
    WorkerError,
)
from counterflow.experiments import online_loop, online_teaching
from counterflow.experiments.distill import distill
from counterflow.experiments.evaluate import ReasonerSettings, evaluate, steered_by
from counterflow.experiments.online import OnlineTrained, read_online_settings, train_online
from counterflow.experiments.online_data import anchors_of, corrections, prefill
from counterflow.experiments.online_settings import OnlineRun, online_preset
from counterflow.experiments.online_teaching import Teachers
from counterflow.experiments.record import arrays_of
from counterflow.experiments.rollout import run_episodes
from counterflow.experiments.steering_env import RewardKind
from counterflow.learning.dsbc import DSBCConfig
from counterflow.learning.dsrl import DSRLConfig
from counterflow.learning.residual import ResidualConfig
from counterflow.learning.rfs import RFSConfig
from counterflow.policies import ActionSpec, FieldPolicy, FlowPolicy
from counterflow.policies.base import Prior
from counterflow.random import child_seed, generator
from counterflow.reasoners import Direction, to_reference
from counterflow.steering import (
    AnchorsCritic,
    ChunkRegressor,
    LatentShape,
    MethodSettings,
    Proposals,
    RegressorConfig,
    SteeredPolicy,
    SteeringActor,
    SteeringSpace,
    binding_of,
)

TINY: dict[str, Any] = {"width": 8, "depth": 1}
SAC: dict[str, Any] = {**TINY, "batch_size": 8, "update_ratio": 1, "warmup": 8, "compile": False}
CONFIGS: dict[str, Any] = {
    "dsrl": DSRLConfig(**SAC),
    "aliasing": DSRLConfig(**SAC, variant="aliasing", distill_steps=2),
    "anchors": DSRLConfig(**SAC, variant="anchors", judged="chunk", select="sample"),
    "residual": ResidualConfig(**SAC, ramp=20),
    "rfs": RFSConfig(width=8, depth=2, rollout=4, epochs=2),
}
RUN = OnlineRun(
    decisions=48,
    num_envs=2,
    steps=3,
    start_episodes=0,
    evaluate_every=24,
    episodes=2,
    checkpoint_every=8,
    report_every=8,
    capacity=200,
    particles=2,
)


@pytest.fixture
def world(plane: Callable[..., VectorEnv], prior: FlowPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plane in the place of a benchmark, and its small flow in the place of a shipped prior."""
    monkeypatch.setattr(module, "make_env", lambda name, rows, workers=None: plane(rows, spoil=name.partition("!")[2]))
    monkeypatch.setattr(module, "load_prior", lambda env, policy, device: prior)


class Alternating:
    """A reasoner that remembers: it says one way, then another."""

    def reset(self, seed: int) -> None:
        self.asked = 0

    def decide(self, view: Any) -> Direction:
        self.asked += 1
        return Direction([(1, 0, 0), (0, -1, 0), (-1, 0, 0)][self.asked % 3])


def kill(monkeypatch: pytest.MonkeyPatch, at: int, run: Callable[[], Any]) -> None:
    """Let a training end in the midst of its turn `at`."""
    turns = 0
    step = online_loop.OnlineLoop._turn

    def killed(self: Any, *arguments: Any) -> None:
        nonlocal turns
        turns += 1
        if turns == at:
            raise KeyboardInterrupt
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(online_loop.OnlineLoop, "_turn", killed)
        with pytest.raises(KeyboardInterrupt):
            run()


def evaluated(prior: FlowPolicy, method: str, made: Any, plane: Callable[..., VectorEnv]) -> list[Any]:
    """Run the episodes with which a training evaluates itself."""
    seeds = [child_seed(child_seed(0, "validation"), "episode", index) for index in range(RUN.episodes)]
    with plane(4) as env:
        return run_episodes(steered_by(prior, method, MethodSettings(), made), env, seeds)


def algorithm_of(name: str) -> str:
    return "dsrl" if name in ("aliasing", "anchors") else name


def still(prior: Prior = "gaussian") -> FieldPolicy:
    """A flow whose chunk is its noise; what it computes of an observation is not offered."""
    return FieldPolicy(lambda x, t, seen: 0 * x, ActionSpec(2, 2, (-1.0,) * 2, (1.0,) * 2, prior=prior))


def train(name: str, out: Path, settings: OnlineRun = RUN, **changes: Any) -> OnlineTrained:
    options = {"seeds": (0, 1), "config": CONFIGS[name], "env": "plane", **changes}
    env = options.pop("env")
    return train_online(algorithm_of(name), env, out, settings=settings, **options)


def recorded(
    out: Path,
    prior: FlowPolicy,
    plane: Callable[..., VectorEnv],
    episodes: int = 6,
    only: str = "",
    noise: tuple[float, float] = (2.0, 2.0),
    bases: bool = False,
    **about: Any,
) -> Path:
    """Episodes of a start that always goes the right way, by a chunk of rows of `noise`, and of the base; or of one alone."""
    rows = torch.tensor(noise)[:, None].expand(-1, 2)
    binding = binding_of(prior, 3)
    ways = {
        "right": SteeredPolicy(
            prior, start=lambda p, c, r: (rows.repeat(c.batch_size, 1, 1), torch.zeros(c.batch_size)), steps=3
        ),
        "base": SteeredPolicy(prior, steps=3),
    }
    with SteeringDataset.create_or_open(out, binding) as dataset:
        for way in [only] if only else ways:
            source = dataset.add_source({"method": way, **about})
            found = run_episodes(ways[way], plane(2), list(range(episodes)), record=True)
            for index, one in enumerate(found):
                arrays = arrays_of(one.decisions, bases=bases)
                dataset.append(SteeringEpisode("plane", one.seed, index, one.success, source, arrays))
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_evaluates_and_leaves_what_it_learned(
    name: str, world: None, prior: FlowPolicy, plane: Callable[..., VectorEnv], tmp_path: Path
) -> None:
    before = prior.fingerprint
    done = train(name, tmp_path / "run", replace(RUN, final_episodes=3))
    assert prior.fingerprint == before
    assert done.decisions_done == 48
    assert set(done.success) == {0, 1}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    curve = results["curves"]["0"]
    assert [point["decisions"] for point in curve] == [24, 48]
    assert 48 < curve[-1]["environment_steps"] <= 96
    last = results["together"][-1]
    assert last["environment_steps"] == round(
        sum(results["curves"][seed][-1]["environment_steps"] for seed in "01") / 2
    )
    assert [point["episodes"] for point in curve] == [2, 3]
    assert (last["episodes"], last["success_rate"]) == (6, pytest.approx(sum(done.success.values()) / 2))
    assert last["ci95"][0] < last["success_rate"] + 1e-9
    assert (tmp_path / "run" / "figures" / "learning-curve.png").stat().st_size > 1000
    ledger = results["ledger"]
    assert ledger["environment_steps"] == sum(results["curves"][seed][-1]["environment_steps"] for seed in "01")
    # a decision denoises once; noise aliasing, anchors, and what is shown to a residual cost more
    least = 2 * 48 * 3
    assert ledger["field_evaluations"] == least if name in ("dsrl", "rfs") else ledger["field_evaluations"] > least
    assert ledger["updates"] > 0
    kind = "anchors" if name == "anchors" else "actor"
    made = load_learned(kind, done.folders[1] / "checkpoints" / f"{kind}.safetensors", "cpu")
    assert made is not None
    assert made.provenance["decisions"] == 48
    # what lies there is what was evaluated
    found = evaluated(prior, kind, made, plane)
    assert sum(one.success for one in found) / len(found) == done.success[1]


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in CONFIGS), ("rfs", {"rollout": 5})])
def test_a_run_that_was_killed_goes_on_with_the_same_numbers(
    name: str, changes: dict[str, Any], world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of RFS also where a rollout is open at every checkpoint, and at the end."""
    config = replace(CONFIGS[name], **changes)
    train(name, tmp_path / "whole", config=config)
    kill(monkeypatch, 18, lambda: train(name, tmp_path / "killed", config=config))
    done = train(name, tmp_path / "killed", config=config)
    assert 0 < done.decisions_done < 48
    whole, again = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "killed")
    )
    assert whole == again
    ledgers = [json.loads((tmp_path / run / "results.json").read_text())["ledger"] for run in ("whole", "killed")]
    assert {**ledgers[0], "seconds": 0} == {**ledgers[1], "seconds": 0}
    assert train(name, tmp_path / "killed", config=config).decisions_done == 0


def test_a_finished_run_of_rfs_is_left_as_it_is(world: None, tmp_path: Path) -> None:
    """It ends in the midst of its first rollout, which is longer than the run."""
    config = replace(CONFIGS["rfs"], rollout=64)
    done = train("rfs", tmp_path / "run", config=config)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = train("rfs", tmp_path / "run", config=config)
    assert again.decisions_done == 0
    assert (again.success, again.ledger) == (done.success, done.ledger)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize("turn", [4, 6, 8, 10])
def test_what_a_run_cost_does_not_depend_on_where_it_was_killed(
    turn: int, world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the base is shown, beginning an episode denoises; and a run without evaluation says what it cost, too."""
    settings = replace(RUN, checkpoint_every=2, decisions=24, episodes=0)
    train("residual", tmp_path / "whole", settings)
    kill(monkeypatch, turn, lambda: train("residual", tmp_path / "killed", settings))
    train("residual", tmp_path / "killed", settings)
    whole, again = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "killed"))
    assert whole["ledger"]["field_evaluations"] == again["ledger"]["field_evaluations"] > 0
    assert whole["curves"] == {"0": [], "1": []}


@pytest.mark.parametrize("name", ["residual", "rfs"])
def test_during_a_ramp_what_is_kept_is_what_acts(
    name: str, world: None, prior: FlowPolicy, plane: Callable[..., VectorEnv], tmp_path: Path
) -> None:
    """A residual that has grown to half of its size is saved, and evaluated, with half of its bound."""
    settings = replace(RUN, residual_bound=(0.2, 0.4), ports="residual")
    done = train(name, tmp_path / "run", settings, config=replace(CONFIGS[name], ramp=96))
    made = SteeringActor.load(done.folders[1] / "checkpoints" / "actor.safetensors")
    assert made.config.residual_bound == pytest.approx((0.1, 0.2))
    found = evaluated(prior, "actor", made, plane)
    assert sum(one.success for one in found) / len(found) == done.success[1]


def test_rfs_latents_within_a_bound_are_kept_with_it(
    world: None, prior: FlowPolicy, plane: Callable[..., VectorEnv], tmp_path: Path
) -> None:
    """What was learned with clipped latents is recorded, evaluated and saved with them."""
    settings = replace(RUN, bound=0.3, ports="latent")
    done = train("rfs", tmp_path / "run", settings, record_to=tmp_path / "seen")
    made = SteeringActor.load(done.folders[1] / "checkpoints" / "actor.safetensors")
    assert made.config.bound == 0.3
    noises = SteeringDataset.load(tmp_path / "seen").concatenated(("noise",))["noise"]
    assert np.abs(noises).max() == pytest.approx(0.3)
    found = evaluated(prior, "actor", made, plane)
    assert sum(one.success for one in found) / len(found) == done.success[1]


@pytest.mark.parametrize("name", ["anchors", "dsrl"])
def test_a_reasoner_that_remembers_goes_on_too(
    name: str, world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says depends on how often it was asked in the episode; a new process has to ask as often."""
    monkeypatch.setattr(ReasonerSettings, "maker", lambda self, env: Alternating)
    settings = replace(RUN, checkpoint_every=2, decisions=32, episodes=0)
    settings = replace(settings, reasoner=True) if name == "anchors" else replace(settings, keep_steering=True)
    config = replace(CONFIGS[name], warmup=10)
    train(name, tmp_path / "whole", settings, config=config)
    for turn in (8, 14):  # in the midst of episodes, the first of which began in the warm-up
        out = tmp_path / f"killed-{turn}"
        kill(monkeypatch, turn, partial(train, name, out, settings, config=config))
        train(name, out, settings, config=config)
        assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("reward", "bounds"), [("success", (0.0, 1.0)), ("cost", (-1 / (1 - 0.99**5), 0.0)), ("dense", (None, None))]
)
def test_values_are_kept_within_what_the_reward_allows(
    reward: RewardKind, bounds: tuple[float | None, float | None]
) -> None:
    config, settings = online_preset("dsrl", "small")
    assert isinstance(config, DSRLConfig)
    found = replace(settings, reward=reward).bounded(config, 5)
    assert (found.lowest_value, found.highest_value) == pytest.approx(bounds)
    own = replace(config, highest_value=0.5)
    assert settings.bounded(own, 5) is own
    with_entropy = replace(config, entropy_backup=True)
    assert settings.bounded(with_entropy, 5) is with_entropy
    assert replace(settings, clip_values=False).bounded(config, 5) is config


def test_a_run_says_within_what_values_were_kept(world: None, tmp_path: Path) -> None:
    config = replace(CONFIGS["dsrl"], entropy_backup=False)
    train("dsrl", tmp_path / "run", replace(RUN, clip_values=True, reward="success", decisions=8), config=config)
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (kept["lowest_value"], kept["highest_value"]) == (0.0, 1.0)


def test_a_reasoner_may_err(world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[float] = []
    monkeypatch.setattr(ReasonerSettings, "maker", lambda self, env: errors.append(self.error) or Alternating)
    settings = replace(RUN, reasoner=True, reasoner_error=0.25, decisions=24)
    train("anchors", tmp_path / "anchors", settings)
    train("dsrl", tmp_path / "dsrl", replace(settings, keep_steering=True))
    assert len(errors) >= 3  # while learning and while evaluated
    assert {*errors} == {0.25}
    with pytest.raises(InvalidInputError, match="reasoner_error"):
        OnlineRun(reasoner_error=1.5)


def test_anchors_that_listen_to_a_reasoner_are_evaluated_with_it(
    world: None, prior: FlowPolicy, plane: Callable[..., VectorEnv], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReasonerSettings, "maker", lambda self, env: Alternating)
    settings = replace(RUN, reasoner=True, decisions=24)
    done = train("anchors", tmp_path / "run", settings)
    made = AnchorsCritic.load(done.folders[0] / "checkpoints" / "anchors")
    assert made.config.weighted
    with plane(2) as env:
        result = evaluate(env, prior, "anchors", 2, 0, learned=made)
    assert result.queries > 0
    unheard = AnchorsCritic.load(train("anchors", tmp_path / "deaf", RUN).folders[0] / "checkpoints" / "anchors")
    with plane(2) as env:
        assert evaluate(env, prior, "anchors", 2, 0, learned=unheard).queries == 0


def test_a_simulator_that_dies_leaves_the_last_checkpoint_and_the_run_goes_on(
    world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(RUN, decisions=24, checkpoint_every=4, episodes=0)
    train("dsrl", tmp_path / "whole", settings)
    calls, execute = 0, VectorEnv.execute

    def dying(self: VectorEnv, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise WorkerError("the worker process of environments 0 to 1 died (exit code -9).")
        return execute(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(VectorEnv, "execute", dying)
        with pytest.raises(WorkerError):
            train("dsrl", tmp_path / "killed", settings)
    assert 0 < train("dsrl", tmp_path / "killed", settings).decisions_done < 24
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "killed" / "metrics.jsonl").read_text()


def test_a_run_is_not_resumed_on_another_prior(
    world: None, prior: FlowPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(RUN, decisions=8, episodes=0)
    train("dsrl", tmp_path / "run", settings)
    other = copy.deepcopy(prior)
    with torch.no_grad():
        next(iter(other.parameters())).add_(0.1)
    monkeypatch.setattr(module, "load_prior", lambda env, policy, device: other)
    with pytest.raises(TrainingError, match="policy_fingerprint"):
        train("dsrl", tmp_path / "run", settings)


class TestRecording:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_every_episode_is_kept_and_nothing_is_lost_at_a_kill(
        self, name: str, world: None, prior: FlowPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train(name, tmp_path / "run", record_to=tmp_path / "whole")
        whole = SteeringDataset.load(tmp_path / "whole")
        ledger = json.loads((tmp_path / "run" / "results.json").read_text())["ledger"]
        assert len(whole) == ledger["episodes"] > 0
        assert {source["seed"] for source in whole.sources.values()} == {0, 1}
        space = RUN.space(algorithm_of(name), prior)
        assert whole.binding == binding_of(prior, 3)
        for episode in whole:
            arrays = episode.arrays
            assert not arrays["intervened"].any()
            context, _ = space.encode(torch.from_numpy(arrays["observations"]))
            base = arrays["base_chunks"] if space.residual_size else arrays["chunks"]
            latent = arrays["base_noise"] if space.residual_size else arrays["noise"]
            made = space.denoise(context, torch.from_numpy(latent)).clamp(-1, 1).numpy()
            np.testing.assert_allclose(np.clip(base, -1, 1), made, atol=1e-5)
            # the plane's actions are the chunk's rows, 0.2 of each, and what was seen before each is there
            steps = arrays["executed"].sum()
            assert arrays["step_actions"].shape == (steps, 2)
            np.testing.assert_allclose(arrays["step_actions"][:2], arrays["chunks"][0], atol=1e-6)
            travelled = arrays["step_observations"][0, :2] + 0.2 * arrays["step_actions"].cumsum(0)[:-1]
            np.testing.assert_allclose(arrays["step_observations"][1:, :2], travelled, atol=1e-5)
            assert (np.abs(arrays["step_observations"][-1, :2] - 0.6).max() < 0.5) or not episode.success
        kill(monkeypatch, 18, lambda: train(name, tmp_path / "killed", record_to=tmp_path / "again"))
        there = len(SteeringDataset.load(tmp_path / "again"))
        train(name, tmp_path / "killed", record_to=tmp_path / "again")
        again = SteeringDataset.load(tmp_path / "again")
        assert 0 < there < len(again) == len(whole)
        for one, other in zip(whole, again, strict=True):
            assert (one.key, one.seed, one.success) == (other.key, other.seed, other.success)
            assert one.arrays.keys() == other.arrays.keys()
            for field, values in one.arrays.items():
                np.testing.assert_array_equal(values, other.arrays[field], field)

    def test_what_was_recorded_is_distilled_and_prefilled(
        self, world: None, plane: Any, prior: FlowPolicy, tmp_path: Path
    ) -> None:
        for name in ("dsrl", "residual"):
            data = tmp_path / name
            settings = replace(RUN, episodes=0, decisions=80)
            train(name, tmp_path / f"run-{name}", settings, record_to=data)
            assert SteeringDataset.load(data).successes > 0
            small = DSBCConfig(RegressorConfig(members=1, width=8, depth=1, inputs="observation"), steps=5)
            made = distill([data], tmp_path / f"policy-{name}", small)
            assert made.binding == binding_of(prior, 3)
            train(name, tmp_path / f"next-{name}", replace(settings, decisions=8), prefill_from=data)
            told = json.loads((tmp_path / f"next-{name}" / "start.json").read_text())
            assert name == "residual" or "noises_cut" in told["bound"]
        # residuals come back as they were, on top of what the base gave
        space = RUN.space("residual", prior)
        with pytest.raises(MismatchError, match=r"'online training', algorithm 'dsrl', .* expected method 'base'"):
            prefill(tmp_path / "dsrl", space, "plane")
        found = prefill(tmp_path / "residual", space, "plane").recorded
        assert (found.actions != 0).any()
        shown, base = found.observations[:, :4], found.observations[:, 4:]
        composed = space.compose(base.unflatten(1, (2, 2)), found.actions.unflatten(1, (2, 2))).flatten(1)
        torch.testing.assert_close(composed, found.executed, atol=1e-4, rtol=0)
        assert shown.abs().max() < 4

    def test_where_it_cannot_be_recorded(self, world: None, plane: Any, prior: FlowPolicy, tmp_path: Path) -> None:
        path = recorded(tmp_path / "data", prior, plane)
        with pytest.raises(InvalidInputError, match="folder of its own"):
            train("dsrl", tmp_path / "run", prefill_from=path, record_to=tmp_path / "data" / ".")
        with pytest.raises(MismatchError, match="another way of denoising"):
            train("dsrl", tmp_path / "other", replace(RUN, steps=4), record_to=path)


class TestTaught:
    """A noise policy at hand: actors begin as it and imitate it wherever the replay has been."""

    CONFIG = replace(CONFIGS["dsrl"], bc_weight=0.5, bc_from="teacher", bc_batch=8, actor_delay=20, imitation=1000)
    SETTINGS = replace(RUN, bound=3.0)

    @pytest.fixture
    def sources(self, prior: FlowPolicy, plane: Any, tmp_path: Path) -> dict[str, Path]:
        """Recordings, and what was distilled from them: a noise of 2 everywhere."""
        data, out = recorded(tmp_path / "data", prior, plane), tmp_path / "taught.safetensors"
        distill([data], out, DSBCConfig(RegressorConfig(members=2, width=16, depth=1), steps=200, batch_size=16))
        return {"prefill_from": data, "noise_policy": out}

    def test_its_actors_begin_as_the_noise_policy(
        self, world: None, prior: FlowPolicy, plane: Any, sources: dict[str, Path], tmp_path: Path
    ) -> None:
        said: list[torch.Tensor] = []
        acted: list[torch.Tensor] = []
        regressor = ChunkRegressor.load(sources["noise_policy"])

        def seen(self: Any, rows: Any, decision: int) -> torch.Tensor:
            said.append(regressor(rows.shown).detach().flatten(1))
            acted.append(original(self, rows, decision))
            return acted[-1]

        original = agents.OffPolicyAgent.act
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(agents.OffPolicyAgent, "act", seen)
            train("dsrl", tmp_path / "run", replace(self.SETTINGS, decisions=24), config=self.CONFIG, **sources)
        told, early = (
            torch.cat(said[:4]),
            torch.cat(acted[:4]),
        )  # of the warm-up; untaught actors draw from the prior there
        assert told.mean().item() > 0.8
        assert (early - told).mean().item() == pytest.approx(0, abs=0.2)
        assert 0.1 < (early - told).std().item() < 0.6

    @pytest.mark.parametrize("every", [0, 8])
    def test_one_that_was_killed_goes_on_with_the_same_numbers(
        self, every: int, world: None, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = partial(
            train, "dsrl", settings=replace(self.SETTINGS, reteach_every=every), config=self.CONFIG, **sources
        )
        taught: list[int] = []
        original = Teachers.teach_again

        def again(self: Teachers, decision: int) -> list[int]:
            taught.extend(original(self, decision))
            return taught

        monkeypatch.setattr(Teachers, "teach_again", again)
        monkeypatch.setattr(online_teaching, "DISTILLED", DSBCConfig(steps=20, batch_size=16))
        run(out=tmp_path / "whole")
        assert bool(taught) == bool(every)
        kill(monkeypatch, 18, lambda: run(out=tmp_path / "killed"))
        assert 0 < run(out=tmp_path / "killed").decisions_done < 48
        assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "killed" / "metrics.jsonl").read_text()

    def test_where_it_is_of_no_use(
        self, world: None, prior: FlowPolicy, plane: Any, sources: dict[str, Path], tmp_path: Path
    ) -> None:
        """Said before anything is begun: the mended call may use the same folder."""
        out, run = tmp_path / "run", replace(self.SETTINGS, decisions=8, episodes=0)
        with pytest.raises(MismatchError, match="no actor that could imitate it"):
            train("anchors", out, run, **sources)
        with pytest.raises(MismatchError, match="no states to do so in"):
            train("dsrl", out, run, noise_policy=sources["noise_policy"])
        with pytest.raises(MismatchError, match="noise policy to begin from"):
            train("dsrl", out, replace(run, steps=4), **sources)
        with pytest.raises(InvalidInputError, match="of no use to residual"):
            train("residual", out, noise_policy=sources["noise_policy"])
        with pytest.raises(InvalidInputError, match="nothing imitates it"):
            train("dsrl", out, run, config=replace(CONFIGS["dsrl"], imitation=0), **sources)
        with pytest.raises(InvalidInputError, match="reteach_every is 8"):
            train("dsrl", out, replace(run, reteach_every=8), **sources)
        for name in ("dsrl", "residual"):
            with pytest.raises(InvalidInputError, match="there is none"):
                train(name, out, run, config=replace(CONFIGS[name], bc_from="teacher"))
        other = {**sources, "prefill_from": recorded(tmp_path / "other", prior, plane, every_step={"method": "exact"})}
        with pytest.raises(MismatchError, match="found by the inversion 'exact'"):
            train("dsrl", out, replace(run, reteach_every=8), config=self.CONFIG, **other)
        assert not out.exists()
        assert train("dsrl", out, run, config=self.CONFIG, **sources).decisions_done == 8
        about, config, settings = read_online_settings(out)
        assert about["noise_policy"] == str(sources["noise_policy"])
        assert (config, settings) == (self.CONFIG, run)

    @pytest.mark.parametrize("changes", [{"target": "action", "bound": None}, {"inputs": "observation"}])
    def test_another_kind_of_network_is_refused(
        self, changes: dict[str, Any], world: None, sources: dict[str, Path], tmp_path: Path
    ) -> None:
        other = tmp_path / "other.safetensors"
        small = RegressorConfig(members=2, width=8, depth=1, **changes)
        distill([sources["prefill_from"]], other, DSBCConfig(small, steps=20, batch_size=16))
        with pytest.raises(MismatchError, match="expected a noise for the frozen policy's features"):
            train("dsrl", tmp_path / "run", self.SETTINGS, config=self.CONFIG, **{**sources, "noise_policy": other})

    def test_another_noise_policy_in_its_place_is_noticed(
        self, world: None, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = partial(train, "dsrl", tmp_path / "run", self.SETTINGS, config=self.CONFIG, **sources)
        kill(monkeypatch, 18, run)
        small = RegressorConfig(members=2, width=8, depth=1)
        distill([sources["prefill_from"]], sources["noise_policy"], DSBCConfig(small, steps=20, batch_size=16))
        with pytest.raises(TrainingError, match="noise_policy_fingerprint"):
            run()

    def test_a_reasoner_is_not_asked_in_the_warm_up(
        self, world: None, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor is it when a run goes on, or it would have been asked less often than before."""
        monkeypatch.setattr(ReasonerSettings, "maker", lambda self, env: Alternating)
        settings = replace(self.SETTINGS, checkpoint_every=2, decisions=32, episodes=0, keep_steering=True)
        config = replace(self.CONFIG, warmup=10)
        train("dsrl", tmp_path / "whole", settings, config=config, **sources)
        kill(monkeypatch, 8, lambda: train("dsrl", tmp_path / "killed", settings, config=config, **sources))
        train("dsrl", tmp_path / "killed", settings, config=config, **sources)
        assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "killed" / "metrics.jsonl").read_text()

    def test_its_start_is_that_of_the_imitation(self, world: None, sources: dict[str, Path], tmp_path: Path) -> None:
        settings = replace(self.SETTINGS, start_episodes=8, decisions=8, episodes=0)
        rates = {}
        for name, config, given in (("taught", self.CONFIG, sources), ("alone", CONFIGS["dsrl"], {})):
            train("dsrl", tmp_path / name, settings, config=config, **given)
            rates[name] = json.loads((tmp_path / name / "start.json").read_text())["start"]["success_rate"]
        assert rates["taught"] > rates["alone"]

    def test_the_small_preset_imitates_it(self) -> None:
        config, _ = online_preset("dsrl", "small", taught=True)
        assert isinstance(config, DSRLConfig)
        assert config.bc_from == "teacher"
        assert config.actor_delay > 0
        assert online_preset("dsrl", "paper", taught=True) == online_preset("dsrl", "paper")


def test_evaluation_changes_nothing(world: None, tmp_path: Path) -> None:
    for name, episodes in (("with", 2), ("without", 0)):
        train("dsrl", tmp_path / name, replace(RUN, episodes=episodes))
    found = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if "loss" in line]
        for name in ("with", "without")
    ]
    assert found[0] == found[1]


def test_a_refused_call_leaves_the_folder_free_for_the_corrected_one(
    world: None, prior: FlowPolicy, plane: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "run", replace(RUN, decisions=8, episodes=0)
    data = recorded(tmp_path / "data", prior, plane, 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("no dataset")
    refused: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (DatasetError, "no steering dataset", lambda: train("dsrl", out, settings, prefill_from=tmp_path / "nothing")),
        (MismatchError, "way of denoising", lambda: train("rfs", out, replace(settings, steps=4), record_to=data)),
        (DatasetError, "letter.txt", lambda: train("rfs", out, settings, record_to=tmp_path / "other")),
        (InvalidInputError, "keep_steering", lambda: train("residual", out, replace(settings, keep_steering=True))),
        (UnknownNameError, "scripted reasoner", lambda: train("dsrl", out, replace(settings, keep_steering=True))),
        (InvalidInputError, "bound is 2", lambda: train("rfs", out, replace(settings, bound=2.0, ports="residual"))),
        (InvalidInputError, "residual_bound", lambda: train("rfs", out, replace(settings, residual_bound=(0.2, 0.0)))),
        (UnknownNameError, "reward", lambda: train("rfs", out, replace(settings, reward="costs"))),  # type: ignore[arg-type]
        (UnknownNameError, "ports", lambda: train("dsrl", out, replace(settings, ports="all"))),  # type: ignore[arg-type]
    ]
    for error, match, call in refused:
        with pytest.raises(error, match=match):
            call()
        assert not out.exists(), match
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_prior", lambda env, policy, device: still())
        with pytest.raises(MismatchError, match="can't denoise from its features"):
            train("aliasing", out, settings)
    assert not out.exists()
    assert train("rfs", out, settings).decisions_done == 8


def test_a_uniform_prior_is_refused_where_the_latent_is_learned(
    world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A residual leaves the latent to the prior, whatever that is."""
    monkeypatch.setattr(module, "load_prior", lambda env, policy, device: still("uniform"))
    settings = replace(RUN, decisions=8, episodes=0)
    for name in ("dsrl", "rfs"):
        with pytest.raises(MismatchError, match="'uniform'.*expected 'gaussian'.*residual"):
            train(name, tmp_path / "run", settings)
    assert train("residual", tmp_path / "run", settings).decisions_done == 8
    assert train("rfs", tmp_path / "alone", replace(settings, ports="residual")).decisions_done == 8


def test_a_seed_does_not_depend_on_the_others(world: None, tmp_path: Path) -> None:
    settings = replace(RUN, decisions=12)
    together = train("dsrl", tmp_path / "both", settings)
    alone = train("dsrl", tmp_path / "one", settings, seeds=(1,))
    both, one = (
        SteeringActor.load(run.folders[1] / "checkpoints" / "actor.safetensors").state_dict()
        for run in (together, alone)
    )
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=1e-5)


def test_dsrl_learns_to_go_the_right_way(world: None, plane: Any, prior: FlowPolicy, tmp_path: Path) -> None:
    """From recorded rollouts to a policy that succeeds where the base does not."""
    data = recorded(tmp_path / "data", prior, plane)
    config = DSRLConfig(
        **{**SAC, "width": 32, "update_ratio": 4, "batch_size": 32, "warmup": 0, "learning_rate": 3e-3},
        actor_learning_rate=3e-3,
        initial_temperature=0.05,
        bc_weight=1.0,
    )
    settings = replace(RUN, decisions=120, episodes=10, evaluate_every=0, report_every=40, bound=2.0)
    done = train("dsrl", tmp_path / "run", settings, config=config, prefill_from=data, seeds=(0,))
    with plane(2) as env:
        base = run_episodes(SteeredPolicy(prior, steps=3), env, list(range(10)))
    assert done.success[0] >= 0.8
    assert sum(one.success for one in base) < 8
    told = json.loads((tmp_path / "run" / "results.json").read_text())
    assert told["prefill"]["episodes"] == 12


class TestPrefill:
    def test_decisions_are_those_of_the_recording(self, plane: Any, prior: FlowPolicy, tmp_path: Path) -> None:
        path = recorded(tmp_path / "data", prior, plane)
        space = SteeringSpace(prior, steps=3, bound=1.5)
        found = prefill(path, space, "plane", discount=0.9, reward="success")
        dataset = SteeringDataset.load(path)
        episodes = dataset.episodes
        assert found.episodes == 12
        assert found.successes == dataset.successes >= 6
        first = next(one for one in episodes if one.success)
        at = sum(one.decisions - (not one.success) for one in episodes[: episodes.index(first)])
        own = slice(at, at + first.decisions)
        one = found.recorded
        np.testing.assert_allclose(
            one.actions[own].numpy(), np.clip(first.arrays["noise"].reshape(first.decisions, -1), -1.5, 1.5)
        )
        assert one.success[own].all()
        last = int(first.arrays["executed"][-1])
        assert one.rewards[own][-1].item() == pytest.approx(0.9 ** (last - 1))
        assert one.discounts[own].tolist() == pytest.approx([0.81] * (first.decisions - 1) + [0])
        np.testing.assert_allclose(one.next_observations[own][:-1], one.observations[own][1:])
        # what happened after the last decision of a failure was not recorded
        lost = sum(not episode.success for episode in episodes)
        assert len(one) == sum(episode.decisions for episode in episodes) - lost

    @pytest.mark.parametrize(("reward", "expected"), [("cost", [-1.0, 0.0]), ("dense", [-1.9, None])])
    def test_other_rewards(
        self, reward: Any, expected: list[Any], plane: Any, prior: FlowPolicy, tmp_path: Path
    ) -> None:
        path = recorded(tmp_path / "data", prior, plane)
        space = SteeringSpace(prior, steps=3)
        options: dict[str, Any] = {"discount": 0.9, "reward": reward, "first": 1, "successes_only": True}
        one = prefill(path, space, "plane", **options).recorded
        assert one.rewards[0].item() == pytest.approx(expected[0])
        if expected[1] is not None:
            assert one.rewards[-1].item() == expected[1]
        assert one.discounts[-1] == 0

    @pytest.mark.parametrize(
        ("way", "noise", "latent", "bound", "kept", "warned"),
        [
            ("right", (2.0, 2.0), LatentShape(), 2.0, 1.0, False),
            ("right", (2.0, 2.0), LatentShape(), 0.5, 1 / 16, True),
            ("right", (2.0, 2.0), LatentShape("repeated"), 1.6, 0.64, False),
            ("right", (2.0, -2.0), LatentShape("repeated"), 4.0, 0.0, True),
            ("right", (2.0, -2.0), LatentShape("low_rank", 1, "zero"), 4.0, 0.0, True),
            # of what lies in the other directions the prior has an eighth
            ("right", (2.0, -2.0), LatentShape("low_rank", 1, "prior"), 4.0, 0.125, True),
            ("base", (2.0, 2.0), LatentShape("low_rank", 1, "prior"), 4.0, 1.0, False),
        ],
    )
    def test_what_latents_keep_of_the_noises_is_told(
        self,
        way: str,
        noise: tuple[float, float],
        latent: LatentShape,
        bound: float,
        kept: float,
        warned: bool,
        plane: Any,
        prior: FlowPolicy,
        tmp_path: Path,
        recwarn: pytest.WarningsRecorder,
    ) -> None:
        path = recorded(tmp_path / "data", prior, plane, 40 if way == "base" else 2, only=way, noise=noise)
        space = SteeringSpace(prior, steps=3, bound=bound, latent=latent)
        found = prefill(path, space, "plane")
        assert found.noises_kept == pytest.approx(kept, abs=0.1 if way == "base" else 1e-5)
        assert found.describe()["noises_kept"] == pytest.approx(found.noises_kept, abs=1e-4)
        found.check_kept(space)
        told = [str(one.message) for one in recwarn if "recorded noises" in str(one.message)]
        said = f"latents '{latent.kind}' with bound {bound} keep {100 * kept:.0f}%"
        assert [said in one and "--bound" in one and "'full'" in one for one in told] == [True] * warned

    def test_a_run_warns_of_noises_that_its_latents_do_not_keep_and_goes_on(
        self, world: None, plane: Any, prior: FlowPolicy, tmp_path: Path
    ) -> None:
        path, settings = recorded(tmp_path / "data", prior, plane, only="right"), replace(RUN, decisions=8, episodes=0)
        with pytest.warns(UserWarning, match="keep 6%"):
            train("dsrl", tmp_path / "run", replace(settings, bound=0.5), prefill_from=path)
        told = json.loads((tmp_path / "run" / "start.json").read_text())
        assert told["prefill"]["noises_kept"] == 0.0625
        assert told["bound"]["noises_cut"] == 1
        assert json.loads((tmp_path / "run" / "results.json").read_text())["prefill"] == told["prefill"]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "of the power")
            train("dsrl", tmp_path / "chosen", settings, prefill_from=path)  # within a bound of the noises' own

    def test_a_residual_wants_rollouts_of_the_base(
        self, world: None, plane: Any, prior: FlowPolicy, tmp_path: Path
    ) -> None:
        """What was steered is not the base's; a base's chunk beside what was executed serves, unless it was steered too."""
        settings, out = replace(RUN, decisions=8, episodes=0), tmp_path / "run"
        both = recorded(tmp_path / "both", prior, plane, 2)
        with pytest.raises(MismatchError, match=r"method 'right', .*'base'.*--steer base --steps 3 .*--no-every-step"):
            train("residual", out, settings, prefill_from=both)
        steered: tuple[dict[str, str], ...] = (
            {"recording": "dagger"},
            {"algorithm": "rfs"},
            {"method": "actor", "ports": "both"},
        )
        for number, about in enumerate(steered):
            helped = recorded(tmp_path / f"{number}", prior, plane, 2, only="right", bases=True, **about)
            with pytest.raises(MismatchError, match=("dagger", "rfs", "actor")[number]):
                train("residual", out, settings, prefill_from=helped)
        assert not out.exists()
        base = recorded(tmp_path / "base", prior, plane, 2, only="base")
        assert train("residual", out, settings, prefill_from=base).decisions_done == 8
        assert "noises_kept" not in json.loads((out / "start.json").read_text())["prefill"]
        for name, about in (
            ("beside", {"algorithm": "residual"}),
            ("learned", {"method": "actor", "ports": "residual"}),
        ):
            beside = recorded(tmp_path / name, prior, plane, 2, only="right", bases=True, **about)
            assert len(prefill(beside, RUN.space("residual", prior), "plane").recorded)

    def test_what_is_prefilled_leaves_room(self, world: None, plane: Any, prior: FlowPolicy, tmp_path: Path) -> None:
        path, out = recorded(tmp_path / "data", prior, plane), tmp_path / "run"
        settings = replace(RUN, decisions=8, episodes=0)
        count = len(prefill(path, RUN.space("dsrl", prior), "plane").recorded)
        for room in (0, 7):  # a batch of `SAC` has eight
            with pytest.raises(
                InvalidInputError, match=rf"capacity = {count + room} .* {count} of .*={count + 8} holds"
            ):
                train("dsrl", out, replace(settings, capacity=count + room), prefill_from=path)
        assert not out.exists()
        assert train("dsrl", out, replace(settings, capacity=count + 8), prefill_from=path).decisions_done == 8

    def test_a_residuals_observations_end_with_the_chunk(self, plane: Any, prior: FlowPolicy, tmp_path: Path) -> None:
        path = recorded(tmp_path / "data", prior, plane, only="base")
        space = SteeringSpace(prior, "residual", steps=3, show_base=True)
        one = prefill(path, space, "plane").recorded
        assert one.observations.shape[1] == 4 + 4
        torch.testing.assert_close(one.observations[:, 4:], one.executed)
        assert (one.actions == 0).all()

    def test_another_policys_recordings_are_refused(
        self, world: None, plane: Any, prior: FlowPolicy, tmp_path: Path
    ) -> None:
        path = recorded(tmp_path / "data", prior, plane)
        with pytest.raises(MismatchError, match="belongs to another frozen policy or another way of denoising"):
            train("dsrl", tmp_path / "run", replace(RUN, steps=4), prefill_from=path)
        with pytest.raises(InvalidInputError, match="no replay to prefill"):
            train("rfs", tmp_path / "other", prefill_from=path)
        with pytest.raises(DatasetError):
            train("dsrl", tmp_path / "third", prefill_from=tmp_path / "nothing")


class TestCorrections:
    def corrected(
        self, plane: Any, prior: FlowPolicy, path: Path, *, latents: bool
    ) -> tuple[Path, list[SteeringEpisode]]:
        """Recordings in whose every second decision somebody did 0.05 more than the base, along both axes."""
        made = SteeringDataset.load(recorded(path / "plain", prior, plane, 2))
        out = path / f"corrected-{latents}"
        with SteeringDataset.create_or_open(out, made.binding) as dataset:
            for way in made.sources.values():
                dataset.add_source(way)
            for episode in made.episodes:
                arrays = dict(episode.arrays)
                intervened = np.arange(episode.decisions) % 2 == 1
                base = 0.9 * arrays["chunks"]
                arrays["chunks"] = np.where(intervened[:, None, None], base + 0.05, base).astype(np.float32)
                arrays["intervened"] = intervened
                if latents:
                    arrays["base_chunks"] = base.astype(np.float32)
                dataset.append(replace(episode, arrays=arrays))
            return out, dataset.episodes

    def test_a_residual_is_what_was_done_beyond_the_base(self, plane: Any, prior: FlowPolicy, tmp_path: Path) -> None:
        path, episodes = self.corrected(plane, prior, tmp_path, latents=True)
        space = SteeringSpace(prior, "residual", steps=3, residual_bound=0.1, show_base=True)
        found = corrections(path, space, "plane")
        first = episodes[0]
        count = first.decisions - (not first.success)
        wanted = np.where(first.arrays["intervened"][:count, None], 0.05, 0.0)
        np.testing.assert_allclose(found.actions[:count], np.broadcast_to(wanted, (count, 4)), atol=1e-6)
        np.testing.assert_allclose(
            found.observations[:count, 4:], first.arrays["base_chunks"][:count].reshape(count, -1), atol=1e-6
        )
        torch.testing.assert_close(found.next_observations[: count - 1], found.observations[1:count])
        narrow = corrections(path, replace(space, residual_bound=0.02), "plane")
        assert narrow.actions.abs().max().item() == pytest.approx(0.02)

    def test_where_no_latent_was_recorded_the_inversion_gives_the_base(
        self, plane: Any, prior: FlowPolicy, tmp_path: Path
    ) -> None:
        path, episodes = self.corrected(plane, prior, tmp_path, latents=False)
        space = SteeringSpace(prior, "residual", steps=3, bound=1.0, residual_bound=5.0, show_base=True)
        found, first = corrections(path, space, "plane"), episodes[0]
        context, _ = space.encode(torch.from_numpy(first.arrays["observations"]))
        base = space.denoise(context, torch.from_numpy(first.arrays["noise"]).clamp(-1, 1)).flatten(1)
        torch.testing.assert_close(found.observations[1, 4:], base[1])
        chunk = torch.from_numpy(first.arrays["chunks"][1]).flatten()
        torch.testing.assert_close(found.actions[1], chunk - base[1])
        assert (found.actions[0] == 0).all()

    def test_nobody_intervened(self, plane: Any, prior: FlowPolicy, tmp_path: Path) -> None:
        path = recorded(tmp_path / "data", prior, plane, 2)
        with pytest.raises(DatasetError, match="nobody intervened"):
            corrections(path, SteeringSpace(prior, "residual", steps=3, show_base=True), "plane")
        with pytest.raises(InvalidInputError, match="show_base"):
            corrections(path, SteeringSpace(prior, "residual", steps=3), "plane")


class TestProposals:
    def test_candidates_lie_around_reversed_references(self, prior: FlowPolicy) -> None:
        space = SteeringSpace(prior, steps=3, bound=3.0)
        proposals = Proposals(space, anchors_of(prior.action_spec), particles=3, spread=0.01, steps=3)
        context, _ = space.encode(torch.zeros(2, 4))
        said = to_reference([Direction((1, 0, 0)), Direction((0, -1, 0))], prior.action_spec)
        found, weights = proposals.candidates(context, 2, generator(0), said)
        assert found.shape == (2, 8 * 3, 4)
        assert (weights[:, -3:] == 1).all()
        assert (weights[:, :-3] < 1).all()
        # what was said is one of the axes: its particles lie where that axis's do
        torch.testing.assert_close(found[0, -3:].mean(0), found[0, :3].mean(0), atol=0.05, rtol=0)
        torch.testing.assert_close(found[1, -3:].mean(0), found[1, 9:12].mean(0), atol=0.05, rtol=0)
        assert (found[0, :3].mean(0) - found[0, 3:6].mean(0)).abs().max() > 0.3
        assert proposals.evaluations == 2 * 8 * 3


class TestStart:
    def test_the_bound_comes_from_the_noises_of_successes(self, plane: Any, prior: FlowPolicy) -> None:
        noises = torch.full((10, 2, 2), 2.5)
        assert OnlineRun().space("dsrl", prior, noises).bound == 2.5
        assert OnlineRun(bound=1.0).space("dsrl", prior, noises).bound == 1.0
        assert OnlineRun().space("dsrl", prior).bound == 1.5
        assert OnlineRun().space("rfs", prior).bound is None
        assert OnlineRun(bound=1.0).space("rfs", prior, noises).bound == 1.0
        assert OnlineRun(latent="repeated").space("dsrl", prior).size == 2

    def test_a_start_that_is_worse_than_the_base_is_told(
        self, world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = replace(RUN, decisions=8, start_episodes=8, bound=0.05, episodes=0)
        monkeypatch.setattr(online_loop, "run_episodes", _by_bound)
        with pytest.warns(UserWarning, match="the first success may never come"):
            train("dsrl", tmp_path / "run", settings)
        told = json.loads((tmp_path / "run" / "start.json").read_text())
        assert told["bound"]["prior_cut"] == pytest.approx(0.96, abs=0.01)
        assert told["base"]["success_rate"] == 1
        assert told["start"]["success_rate"] == 0

    @pytest.mark.parametrize(
        ("changes", "said"), [({"bound": 0.5}, "cuts off 62%"), ({"latent": "repeated"}, "'repeated'"), ({}, "")]
    )
    def test_where_the_base_hardly_succeeds_nothing_can_be_told_and_what_changes_the_noise_is_named(
        self,
        changes: dict[str, Any],
        said: str,
        world: None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        recwarn: Any,
    ) -> None:
        """20 episodes of which one succeeds are no better than none."""
        monkeypatch.setattr(online_loop, "run_episodes", _hardly)
        train(
            "dsrl",
            tmp_path / "run",
            replace(RUN, decisions=8, start_episodes=8, episodes=0, **({"bound": 3.0} | changes)),
        )
        assert json.loads((tmp_path / "run" / "start.json").read_text())["tells"] is False
        told = [str(one.message) for one in recwarn if "too few to tell" in str(one.message)]
        assert [said in one and "1 of 8" in one for one in told] == ([True] if said else [])

    def test_anchors_start_as_they_are_chosen(
        self, world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[SteeredPolicy] = []

        def watch(policy: SteeredPolicy, *given: Any) -> list[Any]:
            asked.append(policy)
            return run_episodes(policy, *given)

        monkeypatch.setattr(online_loop, "run_episodes", watch)
        train("anchors", tmp_path / "run", replace(RUN, decisions=8, start_episodes=4, episodes=0))
        assert [type(one.start).__name__ for one in asked] == ["NoneType", "AnchorStart"]

    def test_the_random_residual_is_part_of_the_start(self, prior: FlowPolicy) -> None:
        """A start that shakes the robot is not the base's."""
        for config, name in (
            (RFSConfig(residual_std=0.5), "rfs"),
            (ResidualConfig(initial_std=0.5, ramp=200), "residual"),
        ):
            space = replace(RUN, residual_bound=(0.1, 0.4)).space(name, prior)
            observation = torch.zeros(4000, 4)
            still = agents.starting(space, replace(config, **START[name]), 7).act(observation, rng=0).actions
            moved = agents.starting(space, config, 7).act(observation, rng=0).actions - still
            assert moved.mean().abs() < 0.01
            share = 0.5 if name == "residual" else 1.0  # of its ramp, when the warm-up is over
            wanted = share * torch.tensor([0.1, 0.4]) * torch.tanh(0.5 * torch.randn(100_000)).std()
            inside = (still.abs() < 0.5).all(-1)
            torch.testing.assert_close(moved[inside].std(0), wanted, rtol=0.08, atol=0)

    def test_an_equal_start_is_not(self, world: None, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        train("dsrl", tmp_path / "run", replace(RUN, decisions=8, start_episodes=6, bound=6.0, episodes=0))
        assert not [one for one in recwarn if "first success" in str(one.message)]


START: dict[str, dict[str, Any]] = {"rfs": {"residual_std": 1e-6}, "residual": {"initial_std": 0.0068}}


def _hardly(policy: SteeredPolicy, env: VectorEnv, seeds: list[int], *rest: Any) -> list[Any]:
    found = run_episodes(policy, env, seeds)
    for index, one in enumerate(found):
        one.success = index == 0
    return found


def _by_bound(policy: SteeredPolicy, env: VectorEnv, seeds: list[int], *rest: Any) -> list[Any]:
    found = run_episodes(policy, env, seeds)
    for one in found:
        one.success = policy.start is None
    return found


@pytest.mark.parametrize("spoil", ["reward", "observation"])
def test_what_is_no_number_stops_the_run_and_leaves_the_last_checkpoint(
    spoil: str, world: None, tmp_path: Path
) -> None:
    settings = replace(RUN, reward="dense", checkpoint_every=2, episodes=0)
    with pytest.raises(TrainingError, match=f"the {spoil} of environment 0"):
        train("dsrl", tmp_path / "run", settings, env=f"plane!{spoil}")
    assert (tmp_path / "run" / "checkpoints" / "state.safetensors").exists()


def test_a_loss_that_is_no_number_stops_the_run(world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIGS["dsrl"], learning_rate=1.0, actor_learning_rate=1.0)
    monkeypatch.setattr(
        "counterflow.learning.sac.critic_loss",
        lambda *given: (given[0].weights[0].sum((1, 2))[:2] * torch.nan, {"value": torch.zeros(2)}),
    )
    with pytest.raises(TrainingError, match="not finite"):
        train("dsrl", tmp_path / "run", config=replace(config, members=1))


def test_a_runs_settings_are_read_back(world: None, tmp_path: Path) -> None:
    settings = replace(RUN, residual_bound=(0.1, 0.2))
    train("residual", tmp_path / "run", settings)
    about, config, run = read_online_settings(tmp_path / "run")
    assert (about["algorithm"], about["env"], about["seeds"]) == ("residual", "plane", [0, 1])
    assert (config, run) == (CONFIGS["residual"], settings)
    with pytest.raises(TrainingError, match="other settings"):
        train("residual", tmp_path / "run", replace(settings, steps=2))


@pytest.mark.parametrize(
    "changes", [{"decisions": 0}, {"bound": -1.0}, {"residual_bound": ()}, {"num_envs": 0}, {"spread": float("nan")}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        replace(OnlineRun(), **changes)
    assert LatentShape().keeps_prior


@pytest.mark.parametrize("name", ["small", "paper"])
@pytest.mark.parametrize(
    ("algorithm", "variant"),
    [("dsrl", "sac"), ("dsrl", "aliasing"), ("dsrl", "anchors"), ("residual", "sac"), ("rfs", "sac")],
)
def test_presets_are_settings(algorithm: str, variant: Any, name: Any, prior: FlowPolicy) -> None:
    config, settings = online_preset(algorithm, name, variant)
    assert settings.space(algorithm, prior).size > 0
    assert getattr(config, "variant", variant) == variant
    with pytest.raises(UnknownNameError, match="inversion"):
        OnlineRun(inversion="smallest")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="preset"):
        online_preset(algorithm, "large")  # type: ignore[arg-type]
