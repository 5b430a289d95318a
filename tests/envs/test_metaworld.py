"""Meta-World: names and splits anywhere, the simulator where it is installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from counterflow.envs import (
    RenderSettings,
    describe,
    env_names,
    expand_tasks,
    families,
    family_of,
    groups,
    make_env,
)
from counterflow.envs.metaworld import GROUPS, MetaWorldEnv, names, observation_layout
from counterflow.errors import InvalidInputError, MissingDependencyError, RenderingError, UnknownNameError
from counterflow.experiments.evaluate import ReasonerSettings
from counterflow.reasoners import oracle_expert, scripted_reasoner

try:
    import metaworld  # noqa: F401
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True
needs_metaworld = pytest.mark.skipif(not INSTALLED, reason="Meta-World is not installed: counterflow[metaworld]")


def rollout(env: MetaWorldEnv, seed: int, steps: int = 12) -> np.ndarray:
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, 4))
    return np.stack([env.reset(seed).observation, *(env.step(action).observation for action in actions)])


class TestNames:
    def test_fifty_tasks_are_one_family(self) -> None:
        assert len(names()) == len(set(names())) == 50
        assert {*names()} < {*env_names()}
        assert family_of("metaworld/push-v3") == family_of("metaworld") == "metaworld"
        assert "metaworld" in families()
        assert expand_tasks(["metaworld"]) == names()

    def test_splits_are_the_benchmarks_own(self) -> None:
        sizes = {"mt10": 10, "mt50": 50, "ml10-train": 10, "ml10-test": 5, "ml45-train": 45, "ml45-test": 5}
        assert {name.removeprefix("metaworld/"): len(tasks) for name, tasks in GROUPS.items()} == sizes
        for split in ("ml10", "ml45"):
            assert not {*GROUPS[f"metaworld/{split}-train"]} & {*GROUPS[f"metaworld/{split}-test"]}
        assert GROUPS.items() <= groups().items()
        assert expand_tasks(["metaworld/mt10", "metaworld/push-v3"]) == [*GROUPS["metaworld/mt10"]]

    @needs_metaworld
    def test_they_are_those_of_the_package(self) -> None:
        from metaworld import env_dict

        assert {*names()} == {f"metaworld/{task}" for task in env_dict.ALL_V3_ENVIRONMENTS}
        own = {"mt10": env_dict.MT10_V3, "ml10-train": env_dict.ML10_V3["train"], "ml10-test": env_dict.ML10_V3["test"]}
        own |= {"ml45-train": env_dict.ML45_V3["train"], "ml45-test": env_dict.ML45_V3["test"]}
        for name, tasks in own.items():
            assert {*GROUPS[f"metaworld/{name}"]} == {f"metaworld/{task}" for task in tasks}

    def test_what_cannot_be_meant_is_refused(self) -> None:
        with pytest.raises(UnknownNameError, match="metaworld/push-back-v3|metaworld/push-v3"):
            make_env("metaworld/psh-v3")
        with pytest.raises(InvalidInputError, match=r"family of tasks.*50 in all"):
            make_env("metaworld")
        with pytest.raises(InvalidInputError, match=r"metaworld/drawer-open-v3"):
            make_env("metaworld/ml10-test")
        with pytest.raises(UnknownNameError, match="corner4"):
            MetaWorldEnv("metaworld/push-v3", RenderSettings(camera="corner9"))

    def test_without_the_package_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in [name for name in sys.modules if name.split(".")[0] == "metaworld"]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, "metaworld", None)
        with pytest.raises(MissingDependencyError, match=r"counterflow\[metaworld\]"):
            MetaWorldEnv("metaworld/push-v3")
        with pytest.raises(MissingDependencyError, match=r"counterflow\[metaworld\]"):
            oracle_expert("metaworld/push-v3")


def test_the_layout_covers_an_observation_once() -> None:
    for task, objects in (("push-v3", 1), ("hammer-v3", 2)):
        layout = observation_layout(task)
        told = [*layout.robot, *(c for entry in layout.objects for c in entry.columns if c is not None)]
        assert len(told) == len(set(told)) == 8 + 14 * objects + 3
        assert {len(entry.columns) for entry in layout.objects} == {layout.object_dim} == {14}


@needs_metaworld
class TestSimulator:
    @pytest.mark.parametrize("task", ["push-v3", "hammer-v3", "door-open-v3", "basketball-v3", "stick-pull-v3"])
    def test_an_episode_depends_on_its_seed_alone(self, task: str) -> None:
        veteran = MetaWorldEnv(f"metaworld/{task}")
        rollout(veteran, 7, steps=40)
        fresh = MetaWorldEnv(f"metaworld/{task}")
        np.testing.assert_array_equal(rollout(veteran, 3), rollout(fresh, 3))
        assert not np.array_equal(rollout(veteran, 3)[0], rollout(veteran, 4)[0])

    def test_the_observation_says_what_the_layout_says(self) -> None:
        env = MetaWorldEnv("metaworld/stick-push-v3")
        moment, layout = env.reset(0), env.spec.observation_layout
        assert layout is not None
        assert env.spec.observation_dim == len(moment.observation) == 39
        assert [entry.name for entry in layout.objects] == ["stick", "thermos", "goal"]
        told = [moment.observation[list(filter(None, entry.columns))[:3]] for entry in layout.objects]
        for seen, name in zip(told, ("privileged/object_0_pos", "privileged/object_1_pos", "goal/pos"), strict=True):
            np.testing.assert_allclose(seen, moment.privileged[name], atol=1e-5)
        np.testing.assert_allclose(
            moment.observation[list(layout.robot[:3])], moment.privileged["proprio/effector_pos"], atol=1e-6
        )
        assert all(value.ndim == 1 and value.dtype == np.float64 for value in moment.privileged.values())
        goal = env.step(np.zeros(4)).observation[36:39]  # the package hides it unless it is told not to
        np.testing.assert_allclose(goal, moment.privileged["goal/pos"], atol=1e-5)

    @pytest.mark.parametrize("task", ["reach-v3", "window-close-v3"])
    def test_expert_and_reasoner_reach_the_goal(self, task: str) -> None:
        env, expert = MetaWorldEnv(f"metaworld/{task}"), oracle_expert(f"metaworld/{task}", noise=0.1)
        moment = env.reset(0)
        expert.reset(0)
        assert moment.privileged["privileged/remaining"] > 0.02
        rewards = []
        while not (moment.terminated or moment.truncated):
            moment = env.step(expert.act(moment.privileged))
            rewards.append(moment.reward)
        assert max(rewards[:-1]) < 0 == rewards[-1]
        assert rewards[-2] > rewards[0] + 0.1  # it grows towards the goal
        assert (moment.success, moment.terminated, moment.reward) == (True, True, 0.0)

        ReasonerSettings().maker(f"metaworld/{task}")
        reasoner, moment = scripted_reasoner(f"metaworld/{task}"), env.reset(1)
        reasoner.reset(1)
        while not (moment.terminated or moment.truncated):
            said = reasoner.decide(moment.privileged)
            assert sum(map(abs, said.axes)) <= 1
            assert said.gripper != "policy"
            action = np.array([*0.7 * said.vector, {"close": 1.0, "open": -1.0}.get(said.gripper, 0.0)])
            for _ in range(5):
                moment = env.step(action)
                if moment.terminated or moment.truncated:
                    break
        assert moment.success

    def test_an_episode_ends_with_its_time(self) -> None:
        env = MetaWorldEnv("metaworld/assembly-v3")
        env.reset(0)
        moments = [env.step(np.zeros(4)) for _ in range(500)]
        assert [moment.truncated for moment in moments].index(True) == 499
        assert all(-1 <= moment.reward < 0 for moment in moments)

    @pytest.mark.parametrize("action", [np.zeros(3), np.full(4, np.nan), np.array([0, 0, 0, 1.5])])
    def test_actions_that_cannot_be_right_are_refused(self, action: np.ndarray) -> None:
        env = MetaWorldEnv("metaworld/reach-v3")
        env.reset(0)
        with pytest.raises(InvalidInputError, match="4 finite numbers"):
            env.step(action)

    def test_it_draws(self) -> None:
        with pytest.raises(RenderingError, match="without rendering"):
            MetaWorldEnv("metaworld/reach-v3").render()
        with make_env("metaworld/reach-v3", 1, render=RenderSettings(width=96, height=64)) as env:
            hand = env.reset([0]).view(0)["proprio/effector_pos"]
            frame = env.render()
            assert frame.shape == (64, 96, 3)
            assert frame.std() > 10
            assert (frame[:20].mean(), frame[-20:].mean()) != (0.0, 0.0)
            column, row = env.camera().project(hand[None])[0]
            assert 0 <= column < 96
            assert 0 <= row < 64

    def test_the_family_is_described_by_its_first_task(self) -> None:
        spec = describe("metaworld")
        assert (spec.family, spec.observation_dim, spec.goal_dim) == ("metaworld", 39, 3)
