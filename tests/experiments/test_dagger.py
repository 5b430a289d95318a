"""DAgger end to end: who acts, what of it is learned, and a run that goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import counterflow.experiments.dagger as module
from counterflow.binding import Binding
from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.envs import EnvSpec, VectorEnv, make_env
from counterflow.envs.types import CameraView, Image, Moment
from counterflow.errors import InvalidInputError, MismatchError, TrainingError
from counterflow.experiments.dagger import Round, corrections_of, dagger, run_with_expert, usable_corrections
from counterflow.experiments.record import arrays_of, record
from counterflow.experiments.rollout import Episode
from counterflow.flow import denoise
from counterflow.layout import ActionLayout
from counterflow.learning import DSBCConfig
from counterflow.learning.dagger import ByHand, DAggerConfig, Situation, Stalled, learn
from counterflow.policies import ActionSpec, FlowPolicy, NetworkConfig, Normaliser, bind, load
from counterflow.random import child_seed
from counterflow.reasoners import oracle_expert
from counterflow.steering import ChunkRegressor, RegressorConfig, binding_of, steer_learned

HORIZON, DIM, LIMIT = 3, 3, 20


class Point:
    """A point in space that is to be brought to a goal, a tenth of a metre an action; LIMIT actions at most."""

    spec = EnvSpec("point", "point", "go there", 6, DIM, (-1.0,) * 3, (1.0,) * 3, ActionLayout((0, 1, 2)), LIMIT)

    def reset(self, seed: int) -> Moment:
        rng = np.random.default_rng(seed)
        self.at, self.goal, self.steps = np.zeros(3), rng.uniform(-1, 1, 3), 0
        return self.moment(0.0)

    def step(self, action: npt.NDArray[Any]) -> Moment:
        assert np.abs(action).max() <= 1
        self.at, self.steps = self.at + 0.1 * action, self.steps + 1
        return self.moment(-1.0)

    def moment(self, reward: float) -> Moment:
        there = bool(np.linalg.norm(self.at - self.goal) < 0.05)
        seen = np.concatenate([self.at, self.goal]).astype(np.float32)
        told = {"proprio/effector_pos": self.at, "privileged/block_0_pos": self.at, "goal/block_0_pos": self.goal}
        return Moment(seen, reward, there, there, not there and self.steps >= LIMIT, told)

    def render(self) -> Image:
        raise NotImplementedError

    def camera(self) -> CameraView:
        raise NotImplementedError

    def close(self) -> None: ...


@dataclass
class Guide:
    """An expert who knows the way; remembers the seeds it was reset with."""

    seeds: list[int] = field(default_factory=list)

    def reset(self, seed: int) -> None:
        self.seeds.append(seed)

    def act(self, view: Any) -> npt.NDArray[np.float32]:
        way = view["goal/block_0_pos"] - view["privileged/block_0_pos"]
        action: npt.NDArray[np.float32] = np.clip(way / 0.1, -1, 1).astype(np.float32)
        return action


@dataclass
class Alternating:
    """The expert makes every second pair of decisions; keeps what it was shown."""

    seen: list[Situation] = field(default_factory=list)

    def reset(self) -> None:
        self.count = -1

    def expert_should_act(self, situation: Situation) -> bool:
        self.seen.append(situation)
        self.count += 1
        return self.count // 2 % 2 == 1


@pytest.fixture(scope="module")
def policy() -> FlowPolicy:
    torch.manual_seed(0)
    spec = ActionSpec(HORIZON, DIM, (-1.0,) * DIM, (1.0,) * DIM)
    made = FlowPolicy(NetworkConfig(width=16, depth=1), Normaliser(torch.zeros(6), torch.ones(6)), spec, "point")
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def regressor(policy: FlowPolicy) -> ChunkRegressor:
    torch.manual_seed(1)
    size = HORIZON * DIM
    config = RegressorConfig(members=2, width=16, depth=1)
    normalisers = Normaliser(torch.zeros(6), torch.ones(6)), Normaliser(torch.zeros(size), torch.full((size,), 2.0))
    return ChunkRegressor(config, *normalisers, binding_of(policy, 4)).requires_grad_(False).eval()


def play(
    policy: FlowPolicy, regressor: ChunkRegressor, seeds: list[int], rows: int, make_rule: Any, make_expert: Any = Guide
) -> list[Episode]:
    with VectorEnv([Point] * rows, 0, workers=0) as env:
        return run_with_expert(steer_learned(policy, regressor), env, seeds, regressor, make_rule, make_expert)


class TestRollouts:
    def test_who_acts_is_the_rules_choice_and_each_does_what_they_do(
        self, policy: FlowPolicy, regressor: ChunkRegressor
    ) -> None:
        (episode,) = play(policy, regressor, [3], 1, Alternating)
        arrays = arrays_of(episode.decisions)
        pattern = np.arange(len(episode.decisions)) // 2 % 2 == 1
        assert pattern.any()
        np.testing.assert_array_equal(arrays["intervened"], pattern)
        plan = steer_learned(policy, regressor).act(torch.from_numpy(arrays["observations"]))
        ours = ~pattern
        np.testing.assert_allclose(arrays["noise"][ours], plan.noise.numpy()[ours], atol=1e-5)
        np.testing.assert_allclose(arrays["chunks"][ours], plan.chunk.numpy()[ours], atol=1e-5)
        begins = np.cumsum(arrays["executed"]) - arrays["executed"]
        for begin, count, theirs in zip(begins, arrays["executed"], pattern, strict=True):
            for step in range(begin, begin + count):
                seen, done = arrays["step_observations"][step], arrays["step_actions"][step]
                way = np.clip((seen[3:] - seen[:3]) / 0.1, -1, 1)
                assert np.allclose(done, way, atol=1e-5) == theirs

    def test_what_was_seen_is_what_happened(self, policy: FlowPolicy, regressor: ChunkRegressor) -> None:
        for seed, episode in zip([3, 4], play(policy, regressor, [3, 4], 2, Alternating), strict=True):
            arrays, env = arrays_of(episode.decisions), Point()
            moment = env.reset(child_seed(seed, "environment"))
            for observation, action in zip(arrays["step_observations"], arrays["step_actions"], strict=True):
                np.testing.assert_array_equal(moment.observation, observation)
                moment = env.step(action)
            assert (moment.success, moment.terminated or moment.truncated) == (episode.success, True)
            assert episode.steps == len(arrays["step_actions"]) == arrays["executed"].sum() == env.steps
            assert episode.chunks == len(arrays["executed"])
            assert episode.rewards == -episode.steps
            begins = np.cumsum(arrays["executed"]) - arrays["executed"]
            np.testing.assert_array_equal(arrays["observations"], arrays["step_observations"][begins])

    def test_an_episode_does_not_depend_on_how_many_are_played_at_once(
        self, policy: FlowPolicy, regressor: ChunkRegressor
    ) -> None:
        """Rows finish at different times and take the next; some wait for an expert while others don't."""
        seeds = [1, 2, 3, 4, 5]
        alone, together = (play(policy, regressor, seeds, rows, lambda: Stalled(1, 2)) for rows in (1, 3))
        assert [episode.seed for episode in together] == seeds
        assert len({episode.steps for episode in alone}) > 1
        for first, second in zip(alone, together, strict=True):
            assert (first.success, first.steps, first.chunks) == (second.success, second.steps, second.chunks)
            others = arrays_of(second.decisions)
            for name, array in arrays_of(first.decisions).items():
                np.testing.assert_allclose(others[name], array, atol=1e-4, err_msg=name)

    def test_an_episode_that_ends_in_the_experts_hands(self, policy: FlowPolicy, regressor: ChunkRegressor) -> None:
        """Its last chunk may be cut: the rest of it repeats the last action, and is not executed."""
        episodes = play(policy, regressor, list(range(8)), 2, lambda: ByHand(lambda: True))
        assert all(episode.success for episode in episodes)
        assert {len(episode.decisions[-1].step_actions) for episode in episodes} >= {1, 2}
        for episode in episodes:
            last = episode.decisions[-1]
            count = len(last.step_actions)
            np.testing.assert_array_equal(last.chunk[:count], last.step_actions)
            assert (last.chunk[count:] == last.chunk[count - 1]).all()

    def test_rules_see_what_is_left_who_acts_and_for_how_long(
        self, policy: FlowPolicy, regressor: ChunkRegressor
    ) -> None:
        rules: list[Alternating] = []
        experts: list[Guide] = []

        def make_rule() -> Alternating:
            rules.append(Alternating())
            return rules[-1]

        def make_expert() -> Guide:
            experts.append(Guide())
            return experts[-1]

        (episode,) = play(policy, regressor, [3], 1, make_rule, make_expert)
        (rule,), (expert,) = rules, experts
        assert len(rule.seen) == episode.chunks
        for one, decision in zip(rule.seen, episode.decisions, strict=True):
            seen = decision.observation
            assert one.remaining == pytest.approx(np.linalg.norm(seen[3:] - seen[:3]), abs=1e-5)
            members = regressor.members(policy.features(policy.encode(seen[None])))
            assert one.disagreement == pytest.approx(float((members[0] - members[1]).abs().mean() / 2), rel=1e-4)
        # Who acted when the rule was asked, and how many decisions they had made by then.
        assert [one.expert_acts for one in rule.seen[:7]] == [False, False, False, True, True, False, False]
        assert [one.decisions for one in rule.seen[:7]] == [0, 1, 2, 1, 2, 1, 2]
        # The expert begins anew at every take-over, from a seed of its own.
        starts = [index for index in range(episode.chunks) if index % 4 == 2]
        assert expert.seeds == [child_seed(3, "expert", index) for index in starts]

    def test_nobody_intervenes_where_no_rule_asks(self, policy: FlowPolicy, regressor: ChunkRegressor) -> None:
        (episode,) = play(policy, regressor, [3], 1, lambda: ByHand(lambda: False))
        assert not any(decision.intervened for decision in episode.decisions)


def rollout(intervened: list[bool], valid: list[bool]) -> SteeringEpisode:
    steps = len(intervened)
    arrays: dict[str, npt.NDArray[Any]] = {
        "step_intervened": np.array(intervened),
        "step_noise_valid": np.array(valid),
        "step_noise": np.arange(steps * HORIZON * DIM, dtype=np.float32).reshape(steps, HORIZON, DIM),
        "step_features": np.arange(steps * 2, dtype=np.float32).reshape(steps, 2),
        "step_observations": np.arange(steps * 6, dtype=np.float32).reshape(steps, 6),
    }
    return SteeringEpisode("point", 0, 0, False, "x", arrays)


class TestCorrections:
    def test_only_whole_chunks_of_the_experts_whose_noise_was_found(self) -> None:
        no, yes = False, True
        episode = rollout([no, yes, yes, yes, yes, no, yes, yes], [yes, yes, no, yes, yes, yes, yes, yes])
        assert usable_corrections(episode).tolist() == [no, yes, no, no, no, no, no, no]
        assert not usable_corrections(rollout([yes, yes], [yes, yes])).any()
        assert usable_corrections(rollout([yes] * 5, [yes] * 5)).tolist() == [yes] * 3 + [no] * 2

    @pytest.mark.parametrize(("inputs", "name"), [("features", "step_features"), ("observation", "step_observations")])
    def test_what_they_teach(self, inputs: str, name: str) -> None:
        episodes = [rollout([False] * 4, [True] * 4), rollout([True] * 4, [True] * 4)]
        binding = Binding("x", "point", HORIZON, DIM, 4)
        dataset = SteeringDataset(Path("nowhere"), binding, {"x": {}})
        dataset._episodes = episodes
        (found,) = corrections_of(dataset, RegressorConfig(inputs=inputs))
        np.testing.assert_array_equal(found.inputs, episodes[1].arrays[name][:2])
        np.testing.assert_array_equal(found.targets, episodes[1].arrays["step_noise"][:2])
        assert found.episodes.tolist() == [1, 1]
        dataset._episodes = episodes[:1]
        assert corrections_of(dataset, RegressorConfig(inputs=inputs)) == []


TASK = "ogbench/cube-single-task1"
CONFIG = DAggerConfig(DSBCConfig(RegressorConfig(members=2, width=16, depth=1), steps=10), steps=5)


class CutShortError(Exception):
    """What ends a run here."""


class Kept:
    """An environment that stays open for the next call."""

    def __init__(self, env: VectorEnv) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def opened() -> Iterator[list[int]]:
    """Real environments, kept open; how often one was asked for."""
    asked: list[int] = []

    def open_env(name: str, episodes: int, num_envs: int | None = None) -> Kept:
        assert name == TASK
        asked.append(episodes)
        return Kept(env)

    with make_env(TASK, 1) as env, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_env", open_env)
        patch.setattr("counterflow.experiments.record.open_env", open_env)
        yield asked


@pytest.fixture(scope="module")
def data(opened: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dagger") / "steered"
    return record(TASK, "frs", out, successes=1, max_episodes=1, num_envs=1).path


def run(data: Path, out: Path, **changes: Any) -> list[Round]:
    """One round of one episode, which the expert finishes."""
    settings = {"rounds": 1, "episodes": 1, "config": CONFIG, "make_rule": lambda: Stalled(1, 60), **changes}
    return dagger(TASK, data, out, **settings)


@pytest.fixture(scope="module")
def ran(data: Path) -> tuple[Path, list[Round]]:
    out = data.parent / "run"
    told: list[Round] = []
    rounds = run(data, out, on_round=told.append)
    assert rounds == told
    return out, rounds


def files(path: Path) -> dict[str, bytes]:
    found = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


class TestRun:
    def test_the_expert_took_over_and_solved_it(self, ran: tuple[Path, list[Round]]) -> None:
        out, (first,) = ran
        assert (first.number, first.episodes, first.successes, first.unaided) == (0, 1, 1, 0)
        assert 0.5 < first.interventions < 1
        assert first.corrections > 20
        content = json.loads((out / "rounds.json").read_text())
        assert [Round(**one) for one in content["rounds"]] == [first]
        assert content["settings"]["rule"] == repr(Stalled(1, 60))
        (episode,) = SteeringDataset.load(out / "rollouts").episodes
        assert episode.arrays["intervened"].mean() == pytest.approx(first.interventions)
        assert usable_corrections(episode).sum() == first.corrections
        assert not episode.arrays["intervened"][0]

    def test_noises_of_corrections_reproduce_the_experts_chunks(self, ran: tuple[Path, list[Round]]) -> None:
        prior = load("cube-single")
        (episode,) = SteeringDataset.load(ran[0] / "rollouts").episodes
        arrays = episode.arrays

        def again(observations: npt.NDArray[Any], noise: npt.NDArray[Any]) -> npt.NDArray[Any]:
            context = prior.encode(torch.from_numpy(observations))
            return denoise(bind(prior, context), torch.from_numpy(noise), 5).numpy()

        rows = np.flatnonzero(usable_corrections(episode))
        wanted = np.stack([arrays["step_actions"][row : row + 5] for row in rows])
        found = again(arrays["step_observations"][rows], arrays["step_noise"][rows])
        np.testing.assert_allclose(found, wanted, atol=0.501)  # regularised: they come near
        decided = np.flatnonzero(arrays["intervened"] & (arrays["start_time"] == 0))
        assert len(decided) > 5
        found = again(arrays["observations"][decided], arrays["noise"][decided])
        np.testing.assert_allclose(found, arrays["chunks"][decided], atol=0.011)

    def test_decisions_at_the_beginning_of_the_flow_have_a_noise_that_gives_them(
        self, ran: tuple[Path, list[Round]]
    ) -> None:
        """It is what `distill --windows decisions` relies on."""
        prior = load("cube-single")
        (episode,) = SteeringDataset.load(ran[0] / "rollouts").episodes
        arrays = episode.arrays
        rows = np.flatnonzero(arrays["start_time"] == 0)
        context = prior.encode(torch.from_numpy(arrays["observations"][rows]))
        found = denoise(bind(prior, context), torch.from_numpy(arrays["noise"][rows]), 5).clamp(-1, 1).numpy()
        np.testing.assert_allclose(found, arrays["chunks"][rows], atol=0.011)

    def test_each_round_leaves_its_noise_policy(self, ran: tuple[Path, list[Round]]) -> None:
        out, _ = ran
        before, after = (ChunkRegressor.load(out / f"round-{number}") for number in (0, 1))
        assert before.binding == after.binding == binding_of(load("cube-single"), 5)
        assert (after.provenance["algorithm"], after.provenance["round"]) == ("dagger", 1)
        assert after.provenance["updates"] == 5
        assert after.provenance["examples"] > before.provenance["examples"]
        weights = zip(before.network.parameters(), after.network.parameters(), strict=True)
        assert 0 < max(float((one - other).abs().max()) for one, other in weights) < 0.02  # it went on

    def test_called_again_it_does_nothing(
        self, ran: tuple[Path, list[Round]], data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, rounds = ran
        before = files(out)
        monkeypatch.setattr(module, "learn", lambda *_, **__: pytest.fail("nothing was left to do"))
        monkeypatch.setattr(module, "open_env", lambda *_, **__: pytest.fail("nothing was left to do"))
        assert run(data, out, on_round=lambda _: pytest.fail("no round was made")) == rounds
        assert files(out) == before

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({"seed": 1}, "seed"),
            ({"episodes": 2}, "episodes"),
            ({"first": 1}, "first"),
            ({"config": DAggerConfig(CONFIG.distillation, steps=6)}, "config"),
            ({"make_rule": lambda: Stalled(2, 60)}, "rule"),
        ],
    )
    def test_other_settings_need_another_folder(
        self, ran: tuple[Path, list[Round]], data: Path, changes: dict[str, Any], name: str
    ) -> None:
        before = files(ran[0])
        with pytest.raises(TrainingError, match=rf"other settings \({name}\)"):
            run(data, ran[0], **changes)
        assert files(ran[0]) == before

    def test_an_interruption_after_a_rollout_changes_nothing(
        self, ran: tuple[Path, list[Round]], data: Path, opened: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was played is not played again, and what is learned from it is the same."""
        out, rounds = ran
        learned: list[int] = []

        def interrupt(*arguments: Any, **settings: Any) -> ChunkRegressor:
            if learned:
                raise KeyboardInterrupt
            learned.append(1)
            return learn(*arguments, **settings)

        monkeypatch.setattr(module, "learn", interrupt)
        cut = data.parent / "cut"
        with pytest.raises(KeyboardInterrupt):
            run(data, cut)
        monkeypatch.setattr(module, "learn", learn)
        count = len(opened)
        assert run(data, cut) == rounds
        assert len(opened) == count
        assert files(cut) == files(out)

    def test_other_settings_are_refused_after_an_interrupted_first_round(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its noise policy is there already, and belongs to the settings that it was distilled with."""

        def interrupt(*_: Any, **__: Any) -> None:
            raise CutShortError

        monkeypatch.setattr(module, "run_with_expert", interrupt)
        with pytest.raises(CutShortError):
            run(data, tmp_path)
        with pytest.raises(TrainingError, match="other settings"):
            run(data, tmp_path, config=DAggerConfig(DSBCConfig(CONFIG.distillation.regressor, steps=3), steps=5))

    @pytest.mark.parametrize("kind", ["own", "by hand"])
    def test_rules_of_ones_own_can_be_gone_on_with(
        self, kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Own:
            def reset(self) -> None: ...

            def expert_should_act(self, situation: Situation) -> bool:
                return False

        kept: list[Any] = []  # so that no two rules ever lie at the same address

        def make_rule() -> Any:
            kept.append(Own() if kind == "own" else ByHand(lambda: False))
            return kept[-1]

        seen: list[dict[str, Any]] = []
        rounds_so_far = module._rounds_so_far

        def look(out: Path, settings: dict[str, Any]) -> list[Round]:
            seen.append(settings)
            rounds_so_far(out, settings)
            raise CutShortError

        monkeypatch.setattr(module, "_rounds_so_far", look)
        with pytest.raises(CutShortError):
            run(data, tmp_path, make_rule=make_rule)
        (tmp_path / "rounds.json").write_text(json.dumps({"settings": seen[0], "rounds": []}))
        with pytest.raises(CutShortError):
            run(data, tmp_path, make_rule=make_rule)


class TestRefusals:
    @pytest.mark.parametrize("changes", [{"rounds": 0}, {"episodes": 0}, {"seed": -1}], ids=str)
    def test_numbers_out_of_range(self, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match=f"{next(iter(changes))} is"):
            run(data, tmp_path, **changes)

    def test_data_of_another_policy(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(MismatchError, match="belongs to another frozen policy"):
            run(data, tmp_path, policy="scene")

    @pytest.mark.parametrize("content", ["", "[]", '{"settings": {}}', '{"settings": {}, "rounds": [{"x": 1}]}'])
    def test_a_damaged_account_of_earlier_rounds(self, data: Path, tmp_path: Path, content: str) -> None:
        (tmp_path / "rounds.json").write_text(content)
        with pytest.raises(Exception, match=r"rounds\.json can't be read"):
            run(data, tmp_path)


def test_the_oracle_is_the_expert_unless_another_is_given(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def catch(policy: Any, env: Any, seeds: Any, regressor: Any, make_rule: Any, make_expert: Any) -> None:
        made.append(make_expert())
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_with_expert", catch)
    for settings in ({}, {"make_expert": Guide}):
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, **settings)
    assert type(made[0]) is type(oracle_expert(TASK))
    assert isinstance(made[1], Guide)
