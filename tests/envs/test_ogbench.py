"""Real environments, stepped for a few steps."""

import numpy as np
import pytest

from counterflow.envs import RenderSettings, env_names, families, family_of, make_env
from counterflow.envs.ogbench import FAMILIES, GOALS, OGBenchEnv, describe_once, names
from counterflow.errors import InvalidInputError, RenderingError, UnknownNameError
from counterflow.random import child_seed

SMALL = RenderSettings(width=64, height=48)


def rollout(env: OGBenchEnv, seed: int, steps: int = 12) -> np.ndarray:
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, 5))
    first = env.reset(seed).observation
    return np.stack([first, *(env.step(action).observation for action in actions)])


def test_every_family_has_five_tasks() -> None:
    assert len(names()) == 2 * 5 * len(FAMILIES) == 100  # single and goal-conditioned
    assert {*names()} < {*env_names()}
    assert {f"ogbench/{family}{goals}" for family in FAMILIES for goals in ("", GOALS)} < {*families()}
    assert family_of("ogbench/puzzle-4x5-task3") == "ogbench/puzzle-4x5"
    assert family_of("ogbench/cube-single-goals-task1") == "ogbench/cube-single-goals"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_steps(family: str) -> None:
    env = OGBenchEnv(f"ogbench/{family}-task2")
    moment = env.reset(0)
    assert moment.observation.shape == (env.spec.observation_dim,)
    assert moment.observation.dtype == np.float32
    after = env.step(np.zeros(5))
    assert np.isfinite(after.observation).all()
    assert any(name.startswith("goal/") for name in after.privileged)
    assert all(value.ndim == 1 and value.dtype == np.float64 for value in after.privileged.values())
    env.close()


@pytest.mark.parametrize(
    "name",
    [
        "ogbench/cube-double-task4",
        "ogbench/scene-task5",
        "ogbench/puzzle-3x3-task2",
        "ogbench/cube-single-goals-task1",
        "ogbench/cube-double-goals-task4",
        "ogbench/scene-goals-task5",
        "ogbench/puzzle-3x3-goals-task2",
    ],
)
def test_an_episode_depends_on_its_seed_alone(name: str) -> None:
    veteran = OGBenchEnv(name)
    rollout(veteran, 7, steps=40)
    rollout(veteran, 8, steps=15)
    fresh = OGBenchEnv(name)
    np.testing.assert_array_equal(rollout(veteran, 3), rollout(fresh, 3))
    assert not np.array_equal(rollout(veteran, 3), rollout(veteran, 4))


@pytest.mark.parametrize("family", ["cube-single", "cube-double", "scene", "puzzle-3x3"])
def test_goal_conditioned_tasks_are_ogbenchs_own(family: str) -> None:
    """The same as OGBench's environment by hand, given the same seeds."""
    import gymnasium
    import ogbench  # noqa: F401

    env = OGBenchEnv(f"ogbench/{family}-goals-task2")
    single = OGBenchEnv(f"ogbench/{family}-task2")
    dim = single.spec.observation_dim
    assert (env.spec.observation_dim, env.spec.goal_dim, single.spec.goal_dim) == (2 * dim, dim, 0)
    assert env.spec.family == f"ogbench/{family}-goals"
    moments = [env.reset(3), *(env.step(action) for action in np.random.default_rng(0).uniform(-1, 1, (4, 5)))]
    assert env.simulator.cur_task_id == 2

    official = gymnasium.make(f"{family}-v0").unwrapped
    # What it draws from an unseeded space, two steps to settle the goal, is the one thing that may differ.
    observation, info = official.reset(seed=child_seed(3, "episode"), options={"task_id": 2})
    assert moments[0].observation.dtype == np.float32
    np.testing.assert_allclose(moments[0].observation[:dim], observation, atol=2e-3)
    # The gripper may have moved in those two steps; what has to be reached has not.
    np.testing.assert_allclose(moments[0].observation[dim + 19 :], info["goal"][19:], atol=2e-2)
    for moment in moments:
        np.testing.assert_array_equal(moment.observation[dim:], moments[0].observation[dim:])
        assert (moment.reward, moment.success, moment.terminated) == (0.0, False, False)
    assert not np.array_equal(moments[1].observation[:dim], moments[0].observation[:dim])
    env.close()


def test_a_goal_is_reached_where_it_is_and_ends_the_episode() -> None:
    """Goal-conditioned tasks look at what an action led to, single tasks at where it was taken."""
    import mujoco

    moments = {}
    for name in ("ogbench/cube-single-goals-task1", "ogbench/cube-single-task1"):
        env = OGBenchEnv(name)
        goal = env.reset(0).privileged["goal/block_0_pos"]
        env.simulator._data.joint("object_joint_0").qpos[:3] = goal
        mujoco.mj_forward(env.simulator._model, env.simulator._data)
        moments[name] = [env.step(np.zeros(5)) for _ in range(2)]
    first, _ = moments["ogbench/cube-single-goals-task1"]
    assert (first.reward, first.success, first.terminated) == (1.0, True, True)
    dim = len(first.observation) // 2
    np.testing.assert_allclose(first.observation[19:22], first.observation[dim + 19 : dim + 22], atol=0.2)
    assert [moment.success for moment in moments["ogbench/cube-single-task1"]] == [False, True]


def test_spec_tells_the_time_limit_and_the_episode_ends_there() -> None:
    env = OGBenchEnv("ogbench/cube-single-task1")
    env.reset(0)
    moments = [env.step(np.zeros(5)) for _ in range(env.spec.max_episode_steps)]
    assert env.spec.max_episode_steps == 200
    assert [moment.truncated for moment in moments].index(True) == 199


def test_goal_of_a_slide_is_where_its_handle_will_be() -> None:
    env = OGBenchEnv("ogbench/scene-task1")
    before = env.reset(0).privileged
    env._env._data.joint("drawer_slide").qpos[0] = before["goal/drawer_pos"][0]
    env._env._data.joint("window_slide").qpos[0] = before["goal/window_pos"][0]
    import mujoco

    mujoco.mj_forward(env._env._model, env._env._data)
    after = env._privileged(env._env.get_step_info())
    for slide in ("drawer", "window"):
        np.testing.assert_allclose(
            before[f"goal/{slide}_handle_pos"], after[f"privileged/{slide}_handle_pos"], atol=2e-3
        )


@pytest.mark.parametrize(
    "action", [np.zeros(4), np.full(5, np.nan), np.array([0, 0, 0, 0, 1.5]), np.array([np.inf, 0, 0, 0, 0])]
)
def test_actions_that_cannot_be_right_are_refused(action: np.ndarray) -> None:
    env = OGBenchEnv("ogbench/cube-single-task1")
    env.reset(0)
    with pytest.raises(InvalidInputError, match="expected 5 finite numbers"):
        env.step(action)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="cube-single-task1"):
        make_env("ogbench/cube-singel-task1")
    with pytest.raises(InvalidInputError, match="scene-task1.*scene-task5"):
        make_env("ogbench/scene")


def test_rendering_quality_and_camera() -> None:
    env = OGBenchEnv("ogbench/cube-single-task1", SMALL)
    moment = env.reset(1)
    frame = env.render()
    assert frame.shape == (48, 64, 3)
    assert frame.dtype == np.uint8
    assert frame.std() > 10
    # The red cube must be where the camera says that it is.
    column, row = env.camera().project(moment.privileged["privileged/block_0_pos"][None])[0]
    patch = frame[int(row) - 2 : int(row) + 3, int(column) - 2 : int(column) + 3].reshape(-1, 3).astype(int)
    assert ((patch[:, 0] - patch[:, 1:].max(1)) > 60).any()
    env.close()
    with pytest.raises(RenderingError, match="without rendering"):
        OGBenchEnv("ogbench/cube-single-task1").render()


def test_fast_frames_differ_from_dataset_frames_only_in_shadows_and_edges() -> None:
    frames = []
    for quality in ("fast", "dataset"):
        env = OGBenchEnv("ogbench/cube-single-task1", RenderSettings(64, 64, quality))
        env.reset(1)
        frames.append(env.render().astype(int))
        assert (env._env.model.vis.quality.shadowsize == 0) == (quality == "fast")
        env.close()
    difference = np.abs(frames[0] - frames[1])
    assert 0 < difference.mean() < 25


def test_render_settings_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="16 to 4096"):
        RenderSettings(width=4)
    with pytest.raises(InvalidInputError, match="quality"):
        RenderSettings(quality="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["cube-double", "scene", "puzzle-3x3"])
def test_a_state_that_is_described_once_is_described_as_by_ogbench(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gymnasium
    import ogbench.manipspace  # noqa: F401  # registers the environments
    from gymnasium.utils import seeding

    # What is built begins an episode of its own, and a scene keeps that one's targets for whatever is no target now.
    seeded = seeding.np_random
    monkeypatch.setattr(seeding, "np_random", lambda seed=None: seeded(0 if seed is None else seed))

    def history(*, once: bool) -> list[dict[str, np.ndarray]]:
        np.random.seed(3)
        env = gymnasium.make(f"{family}-v0", terminate_at_goal=False, mode="data_collection").unwrapped
        described = []
        if once:
            describe = env.compute_ob_info
            env.compute_ob_info = lambda: described.append(0) or describe()
            describe_once(env)
        observation, info = env.reset(seed=1)
        found = [{"observation": observation, **info}]
        rng = np.random.default_rng(2)
        described.clear()
        for step in range(40):
            if step == 20:
                observation, info = env.set_new_target()
                found.append({"observation": observation, **info})
                described.clear()
            observation, reward, _, _, info = env.step(rng.uniform(-1, 1, 5))
            found.append({"observation": observation, "reward": np.array(reward), **info})
        if once:
            assert len(described) == 20 * (1 if family.startswith("cube") else 2)
        env.close()
        return found

    expected, given = history(once=False), history(once=True)
    for before, after in zip(expected, given, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)
