"""Real locomotion environments, stepped for a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from counterflow.envs import RenderSettings, describe, env_names, make_env
from counterflow.envs.ogbench_locomotion import FAMILIES, OGBenchLocomotionEnv, names
from counterflow.errors import InvalidInputError, MismatchError, RenderingError, UnknownNameError

ONE_OF_EACH = ("pointmaze-medium", "antmaze-medium", "humanoidmaze-medium", "antsoccer-arena")


def rollout(env: OGBenchLocomotionEnv, seed: int, steps: int = 8) -> np.ndarray:
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, env.spec.action_dim))
    first = env.reset(seed)
    moments = [first, *(env.step(action) for action in actions)]
    return np.stack([np.concatenate([one.observation, one.privileged["goal/xy"]]) for one in moments])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_steps(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = OGBenchLocomotionEnv(f"ogbench/{family}-task2")
    assert not list(tmp_path.iterdir())  # OGBench leaves the maze's description lying about
    spec = env.spec
    sizes = {"pointmaze": (2, 2), "antmaze": (29, 8), "humanoidmaze": (69, 21), "antsoccer": (42, 8)}
    assert (spec.observation_dim, spec.action_dim) == sizes[family.split("-")[0]]
    assert spec.family == f"ogbench/{family}"
    assert spec.max_episode_steps == (2000 if family.startswith("humanoid") else 1000)
    assert (spec.action_layout is None) == (not family.startswith("pointmaze"))
    assert env.reset(0).observation.shape == (spec.observation_dim,)
    moment = env.step(np.zeros(spec.action_dim))
    assert np.isfinite(moment.observation).all()
    assert (moment.reward, moment.success, moment.terminated, moment.truncated) == (-1.0, False, False, False)
    assert all(value.ndim == 1 and value.dtype == np.float64 for value in moment.privileged.values())
    env.close()


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_an_episode_depends_on_its_seed_alone(family: str) -> None:
    veteran = OGBenchLocomotionEnv(f"ogbench/{family}-task3")
    rollout(veteran, 7, steps=20)
    fresh = OGBenchLocomotionEnv(f"ogbench/{family}-task3")
    np.random.seed(4)  # OGBench draws from numpy's global generator
    first = rollout(veteran, 3)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    np.testing.assert_array_equal(first, rollout(fresh, 3))
    assert not np.array_equal(rollout(veteran, 3), rollout(veteran, 4))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]


def test_a_point_that_stands_at_the_goal_has_solved_the_task() -> None:
    env = OGBenchLocomotionEnv("ogbench/pointmaze-medium-task1")
    goal = env.reset(0).privileged["goal/xy"]
    env.simulator.set_xy(goal + np.array([2.0, 0.0]))
    left = env.step(np.array([-1.0, 0.0]))
    assert (left.reward, left.success, left.terminated) == (-1.0, False, False)
    while np.linalg.norm(left.observation - goal) > 1.0:
        left = env.step(np.array([-1.0, 0.0]))
    assert not left.success  # a single task looks at where the action was taken
    there = env.step(np.array([-1.0, 0.0]))
    assert (there.reward, there.success, there.terminated) == (0.0, True, True)


def test_an_episode_ends_with_its_time() -> None:
    env = OGBenchLocomotionEnv("ogbench/pointmaze-medium-task1")
    env.reset(0)
    moments = [env.step(np.zeros(2)) for _ in range(1000)]
    assert [moment.truncated for moment in moments].index(True) == 999


@pytest.mark.parametrize("action", [np.zeros(3), np.full(2, np.nan), np.array([0, 1.5])])
def test_actions_that_cannot_be_right_are_refused(action: np.ndarray) -> None:
    env = OGBenchLocomotionEnv("ogbench/pointmaze-medium-task1")
    env.reset(0)
    with pytest.raises(InvalidInputError, match=r"expected 2 finite numbers in \[-1, 1\]"):
        env.step(action)


def test_one_door_to_all() -> None:
    assert len(names()) == 50
    assert {*names()} < {*env_names()}
    assert describe("ogbench/antmaze-large").name == "ogbench/antmaze-large-task1"
    with make_env("ogbench/antsoccer-arena-task4", 2) as env:
        env.reset([0, 1])
        assert env.execute(np.zeros((2, 3, 8))).steps.tolist() == [3, 3]
    with pytest.raises(InvalidInputError, match="not a locomotion task"):
        OGBenchLocomotionEnv("ogbench/cube-single-task1")


def test_a_direction_means_nothing_to_torques() -> None:
    from counterflow.policies import ActionSpec
    from counterflow.reasoners.direction import Direction, to_reference

    spec = describe("ogbench/antmaze-medium")
    action_spec = ActionSpec(1, spec.action_dim, low=spec.action_low, high=spec.action_high, layout=spec.action_layout)
    with pytest.raises(MismatchError, match="does not say which dimensions move the robot"):
        to_reference([Direction((1, 0, 0))], action_spec)


def test_frames_show_the_point_where_the_camera_says() -> None:
    env = OGBenchLocomotionEnv("ogbench/pointmaze-medium-task1", RenderSettings(96, 64))
    moment = env.reset(1)
    frame = env.render()
    assert frame.shape == (64, 96, 3)
    assert frame.std() > 5
    point = np.append(moment.privileged["privileged/agent_xy"], 0.5)
    env.simulator.set_xy(moment.privileged["goal/xy"])
    changed = np.abs(env.render().astype(int) - frame).sum(-1)
    column, row = env.camera().project(point[None])[0]
    assert changed[int(row) - 1 : int(row) + 2, int(column) - 1 : int(column) + 2].max() > 30
    assert env.simulator.model.vis.quality.shadowsize == 0
    env.close()
    with pytest.raises(RenderingError, match="without rendering"):
        OGBenchLocomotionEnv("ogbench/pointmaze-medium-task1").render()


def test_a_camera_of_the_robots() -> None:
    env = OGBenchLocomotionEnv("ogbench/antmaze-medium-task1", RenderSettings(96, 64, camera="back"))
    moment = env.reset(1)
    assert env.render().shape == (64, 96, 3)
    pixel = env.camera().project(moment.privileged["privileged/qpos"][None, :3])[0]
    assert (np.abs(pixel - [48, 32]) < 16).all()  # it follows the ant
    env.close()
    with pytest.raises(UnknownNameError, match="unknown camera of ogbench/antmaze-medium-task1 'front': known: back"):
        OGBenchLocomotionEnv("ogbench/antmaze-medium-task1", RenderSettings(camera="front"))
