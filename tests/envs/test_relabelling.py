"""Rewards of recorded states are what the environment itself gives for them."""

from __future__ import annotations

import numpy as np
import pytest

from counterflow.envs import relabel
from counterflow.envs.registry import make_task
from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError

Arrays = dict[str, np.ndarray]


def recorded(name: str, steps: int = 25, seed: int = 0) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Return states of a rollout, as the archives keep them, and what the environment said of each."""
    env = make_task(name)
    env.reset(seed)
    simulator = env.simulator  # type: ignore[attr-defined]
    rng = np.random.default_rng(seed)
    states: dict[str, list[np.ndarray]] = {}
    rewards, solved = [], []
    for _ in range(steps):
        states.setdefault("qpos", []).append(simulator.data.qpos.copy())
        if hasattr(simulator, "_num_buttons"):
            states.setdefault("button_states", []).append(simulator._cur_button_states.copy())
        moment = env.step(rng.uniform(-1, 1, env.spec.action_dim))
        rewards.append(moment.reward)
        solved.append(moment.success)
    env.close()
    return {key: np.stack(values) for key, values in states.items()}, np.array(rewards), np.array(solved)


@pytest.mark.parametrize(
    "name",
    [
        "ogbench/cube-double-task2",
        "ogbench/scene-task3",
        "ogbench/puzzle-3x3-task4",
        "ogbench/pointmaze-medium-task1",
        "ogbench/antsoccer-arena-task1",
    ],
)
def test_rewards_are_the_environments_own(name: str) -> None:
    states, rewards, solved = recorded(name)
    ours, masks = relabel(name, **states)
    assert ours.dtype == masks.dtype == np.float32
    # A single task rewards the state that an action was taken in, so rows and states agree.
    np.testing.assert_array_equal(ours, rewards)
    np.testing.assert_array_equal(masks, 1.0 - solved)


def test_solved_states_are_rewarded() -> None:
    states, _, _ = recorded("ogbench/cube-double-task1", steps=3)
    env = make_task("ogbench/cube-double-task1")
    goal = env.reset(5).privileged
    for block in range(2):
        first = 14 + 7 * block
        states["qpos"][1:, first : first + 3] = goal[f"goal/block_{block}_pos"] + [0.01 * block, 0.02, 0.0]
    states["qpos"][2, 14] += 0.05
    rewards, masks = relabel("ogbench/cube-double-task1", **states)
    assert rewards[1:].tolist() == [0, -1]
    assert masks.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "name",
    ["ogbench/cube-triple-task3", "ogbench/scene-task5", "ogbench/antmaze-medium-task2", "ogbench/puzzle-3x3-task2"],
)
def test_rewards_do_not_depend_on_the_episode(name: str) -> None:
    """The goal of a single task is the same whatever the seed, so the seed with which relabelling resets is no choice."""
    env = make_task(name)
    goals = []
    for seed in (0, 1):
        privileged = env.reset(seed).privileged
        goals.append(np.concatenate([privileged[key] for key in sorted(privileged) if _is_goal(key)]))
    np.testing.assert_array_equal(*goals)
    env.close()


def _is_goal(key: str) -> bool:
    return key.startswith("goal/") and "handle" not in key


def test_what_cannot_be_relabelled_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"qpos are \(4, 9\); ogbench/cube-single-task1 expects \(4, 21\)"):
        relabel("ogbench/cube-single-task1", np.zeros((4, 9)))
    with pytest.raises(InvalidInputError, match="no button_states were given"):
        relabel("ogbench/puzzle-3x3-task1", np.zeros((4, 23)))
    with pytest.raises(MismatchError, match=r"button_states are \(4, 2\)"):
        relabel("ogbench/puzzle-3x3-task1", np.zeros((4, 23)), np.zeros((4, 2)))
    with pytest.raises(InvalidInputError, match="single task, such as 'ogbench/cube-single-task1'.*GoalSampler"):
        relabel("ogbench/cube-single-goals-task1", np.zeros((4, 21)))
    with pytest.raises(InvalidInputError, match="family of tasks"):
        relabel("ogbench/cube-single", np.zeros((4, 21)))
    with pytest.raises(UnknownNameError):
        relabel("ogbench/cube-sinlge-task1", np.zeros((4, 21)))
