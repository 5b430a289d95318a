"""The expert in real environments: it solves them, from any state, on what the view tells alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from counterflow.envs import VectorEnv, make_env
from counterflow.envs.ogbench import OGBenchEnv
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.random import child_seed
from counterflow.reasoners import Expert, oracle_expert
from counterflow.reasoners.expert import LOST, PATIENCE, WOUND_UP, OracleExpert, stand_in

CUBE = "ogbench/cube-single-task1"
SCENE = "ogbench/scene-task4"
PUZZLE = "ogbench/puzzle-3x3-task1"


@pytest.fixture(scope="module")
def cube() -> Iterator[VectorEnv]:
    with make_env(CUBE, 1) as made:
        yield made


@pytest.fixture(scope="module")
def scene() -> Iterator[VectorEnv]:
    with make_env(SCENE, 1) as made:
        yield made


def finish(env: VectorEnv, expert: Expert, batch: Any, limit: int = 10_000) -> tuple[bool, int]:
    """Let the expert act to the episode's end; return whether it succeeded and after how many steps."""
    for step in range(limit):
        if batch.done[0]:
            return bool(batch.success[0]), step
        batch = env.step(expert.act(batch.view(0))[None])
    return False, limit


class TestStandIn:
    @pytest.mark.parametrize("name", [CUBE, SCENE, PUZZLE])
    def test_its_constants_are_those_of_the_real_environment(self, name: str) -> None:
        env = OGBenchEnv(name)
        real, copied = env._env, stand_in(name.split("/")[1].rsplit("-task")[0])
        for constant in ("_control_timestep", "_arm_sampling_bounds", "_workspace_bounds", "action_low", "action_high"):
            np.testing.assert_array_equal(getattr(copied, constant), getattr(real, constant))
        for motion in np.random.default_rng(0).uniform(-0.4, 0.4, (20, 5)):
            np.testing.assert_allclose(copied.normalize_action(motion), real.normalize_action(motion), atol=1e-12)
        assert copied.unwrapped is copied
        env.close()

    def test_it_turns_the_shorter_way_round(self) -> None:
        """From a yaw of -3 to one of 3 is a little backwards, not nearly a whole turn forwards."""
        motion = np.array([0.0, 0.0, 0.0, 6.0, 0.0])
        assert stand_in("cube-single").normalize_action(motion)[3] == pytest.approx((6.0 - 2 * np.pi) / 0.3)


class TestSolving:
    @pytest.mark.parametrize(("name", "limit"), [(CUBE, 100), (PUZZLE, 80), ("ogbench/cube-double-task5", 250)])
    def test_it_solves_a_task_quickly(self, name: str, limit: int) -> None:
        """Two cubes that must swap places need one to be put aside; a puzzle must be solved, not tried."""
        with make_env(name, 1) as env:
            success, steps = finish(env, oracle_expert(name), env.reset([1]))
        assert success
        assert steps < limit

    def test_it_solves_a_scene_where_one_thing_needs_another(self, scene: VectorEnv) -> None:
        """Unlock the drawer, open it, put the cube in, close it."""
        assert finish(scene, oracle_expert(SCENE), scene.reset([1]))[0]

    def test_when_all_is_done_it_stays(self, cube: VectorEnv) -> None:
        view = cube.reset([1]).view(0)
        view["privileged/block_0_pos"] = view["goal/block_0_pos"]
        np.testing.assert_allclose(oracle_expert(CUBE).act(view), 0.0, atol=1e-9)

    def test_a_plan_waits_for_the_arm_but_not_forever(self, cube: VectorEnv) -> None:
        """An arm that does not move at all is waited for; the plan comes to its end all the same."""
        view = cube.reset([1]).view(0)
        expert = OracleExpert("cube-single")
        for _ in range(PATIENCE):
            expert.act(view)
        assert expert._step < PATIENCE
        before = expert._step
        for _ in range(PATIENCE + 2):
            expert.act(view)
        assert before < expert._step < before + PATIENCE


class TestTakingOver:
    @pytest.mark.parametrize("seed", [3, 4])
    def test_from_wherever_forty_other_actions_have_led(self, cube: VectorEnv, seed: int) -> None:
        random, batch = np.random.default_rng(seed), cube.reset([seed])
        for action in np.repeat(random.uniform(-1, 1, (5, 5)), 8, axis=0):
            batch = cube.step(action[None])
        expert = oracle_expert(CUBE)
        expert.reset(seed)
        assert finish(cube, expert, batch)[0]

    def test_from_low_down_it_lets_go_and_rises_first(self, cube: VectorEnv) -> None:
        batch = cube.reset([1])
        for _ in range(12):
            batch = cube.step(np.array([[0, 0, -1.0, 0, 1.0]]))
        expert = oracle_expert(CUBE)
        assert batch.view(0)["proprio/effector_pos"][2] < 0.1
        first = expert.act(batch.view(0))
        assert first[4] < 0
        assert np.abs(first[:4]).max() < 1e-9
        place = batch.view(0)["proprio/effector_pos"]
        while batch.view(0)["proprio/effector_pos"][2] < 0.18:
            batch = cube.step(expert.act(batch.view(0))[None])
            np.testing.assert_allclose(batch.view(0)["proprio/effector_pos"][:2], place[:2], atol=0.05)
        assert finish(cube, expert, batch)[0]

    def test_a_cube_in_the_gripper_is_carried_on(self, cube: VectorEnv) -> None:
        batch, expert = cube.reset([2]), oracle_expert(CUBE)
        while batch.view(0)["privileged/block_0_pos"][2] < 0.1:
            batch = cube.step(expert.act(batch.view(0))[None])
        expert.reset(7)
        for _ in range(12):
            batch = cube.step(expert.act(batch.view(0))[None])
            assert batch.view(0)["privileged/block_0_pos"][2] > 0.08
        success, steps = finish(cube, expert, batch)
        assert success
        assert steps < 40

    def test_a_cube_that_is_in_the_way_of_what_comes_first_is_put_down(self, scene: VectorEnv) -> None:
        """The drawer must be unlocked and opened before the cube may go in; it is not dropped meanwhile."""
        batch = scene.reset([2])
        expert = oracle_expert(SCENE)
        # Somebody lifts the cube at once: an expert whose goal lies on the table.
        while batch.view(0)["privileged/block_0_pos"][2] < 0.2:
            view = {**batch.view(0), "goal/block_0_pos": np.array([0.4, 0.15, 0.02])}
            batch = scene.step(expert.act(view)[None])
        expert.reset(0)
        while (view := batch.view(0))["privileged/block_0_pos"][2] > 0.05:
            assert np.linalg.norm(view["privileged/block_0_pos"] - view["proprio/effector_pos"]) < LOST
            batch = scene.step(expert.act(view)[None])
        assert finish(scene, expert, batch)[0]

    def test_a_cube_that_slips_away_is_picked_up_again_at_once(self, cube: VectorEnv) -> None:
        batch, expert = cube.reset([2]), oracle_expert(CUBE)
        while batch.view(0)["privileged/block_0_pos"][2] < 0.08:
            batch = cube.step(expert.act(batch.view(0))[None])
        view = batch.view(0)
        view["privileged/block_0_pos"] = view["proprio/effector_pos"] - np.array([0.0, 0.0, 1.2 * LOST])
        letting_go = expert.act(view)
        assert letting_go[4] < -0.1
        np.testing.assert_allclose(letting_go[:4], 0.0, atol=1e-9)

    def test_a_wound_up_wrist_is_unwound_before_a_plan(self, cube: VectorEnv) -> None:
        """An action that turns is of the opposite sign to the wrist's own angle."""
        view = cube.reset([1]).view(0)
        joints = view["proprio/joint_pos"].copy()
        joints[5] = WOUND_UP + 0.1
        action = oracle_expert(CUBE).act({**view, "proprio/joint_pos": joints})
        assert action[3] == 1
        assert np.abs(action[:3]).max() < 1e-9
        before = cube.step(action[None]).view(0)["proprio/joint_pos"][5]
        assert cube.step(action[None]).view(0)["proprio/joint_pos"][5] < before


class TestRandomness:
    def actions(self, env: VectorEnv, expert: Expert, seed: int) -> np.ndarray:
        batch = env.reset([1])
        expert.reset(seed)
        taken = []
        for _ in range(15):
            taken.append(expert.act(batch.view(0)))
            batch = env.step(taken[-1][None])
        return np.stack(taken)

    def test_the_same_seed_gives_the_same_actions_and_another_gives_others(self, cube: VectorEnv) -> None:
        expert = oracle_expert(CUBE)
        first = self.actions(cube, expert, 5)
        np.testing.assert_array_equal(first, self.actions(cube, expert, 5))
        np.testing.assert_array_equal(first, self.actions(cube, oracle_expert(CUBE), 5))
        assert not np.array_equal(first, self.actions(cube, expert, 6))
        assert np.abs(first).max() <= 1

    def test_without_noise_it_still_succeeds(self, cube: VectorEnv) -> None:
        assert finish(cube, oracle_expert(CUBE, noise=0.0), cube.reset([3]))[0]

    def test_numpys_global_generator_neither_matters_nor_changes(self, cube: VectorEnv) -> None:
        np.random.seed(1)
        first = self.actions(cube, oracle_expert(CUBE), 5)
        np.random.seed(2)
        expected = np.random.get_state()[1].copy()
        np.testing.assert_array_equal(first, self.actions(cube, oracle_expert(CUBE), 5))
        np.testing.assert_array_equal(np.random.get_state()[1], expected)

    def test_the_second_plan_of_an_episode_has_its_own_noise(self, cube: VectorEnv) -> None:
        view, expert = cube.reset([1]).view(0), OracleExpert("cube-single")
        plans = []
        for _ in range(2):
            expert._pursuit = None
            expert.act(view)
            plans.append(expert._oracles["cube"]._plan[:20].copy())
        assert not np.array_equal(*plans)

    def test_two_experts_do_not_disturb_each_other(self, cube: VectorEnv) -> None:
        view = cube.reset([1]).view(0)
        one, other = oracle_expert(CUBE), oracle_expert(CUBE)
        one.reset(child_seed(0, "one"))
        expected = [one.act(view).tolist() for _ in range(3)]
        one.reset(child_seed(0, "one"))
        other.reset(3)
        found = []
        for _ in range(3):
            other.act(view)
            found.append(one.act(view).tolist())
        assert found == expected


class TestRefusals:
    @pytest.mark.parametrize("name", ["maniskill/reach", "ogbench/antmaze-task1", "cube-single-task1"])
    def test_environments_without_an_expert(self, name: str) -> None:
        with pytest.raises(UnknownNameError, match="expert for environment"):
            oracle_expert(name)

    def test_a_misspelt_family(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'cube-single'"):
            oracle_expert("ogbench/cube-singel-task1")

    @pytest.mark.parametrize("changes", [{"noise": -0.1}, {"noise": float("nan")}, {"noise_smoothing": 0.0}])
    def test_numbers_out_of_range(self, changes: dict[str, float]) -> None:
        with pytest.raises(InvalidInputError, match="expected"):
            oracle_expert(CUBE, **changes)

    def test_a_seed_that_is_none(self) -> None:
        with pytest.raises(InvalidInputError, match="seed is -1"):
            oracle_expert(CUBE).reset(-1)
