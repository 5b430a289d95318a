"""OGBench's manipulation environments: cube, scene and puzzle, each with five tasks, single or goal-conditioned.

Source: OGBench (arXiv 2410.20092), package `ogbench`. "ogbench/<family>-task<k>" are its `<family>-singletask-task<k>-v0`: the
task is always the same, and what is rewarded is the state that an action was taken in. "ogbench/<family>-goals-task<k>" are
its evaluation of goal-conditioned policies, `<family>-v0` reset with `task_id=k`: the goal is part of the observation, the
blocks change places from episode to episode, and success is what an action leads to.

State observations; actions are five relative end-effector commands in [-1, 1]: x, y, z, yaw, gripper (positive closes).
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import numpy as np

from counterflow.envs.rendering import asked_for, drawing, hurry, prepare_backend, require_backend
from counterflow.envs.types import (
    CameraView,
    EnvSpec,
    FloatArray,
    Image,
    Moment,
    Privileged,
    RenderSettings,
)
from counterflow.errors import InvalidInputError
from counterflow.layout import ActionLayout
from counterflow.random import child_seed

FAMILIES = (
    "cube-single",
    "cube-double",
    "cube-triple",
    "cube-quadruple",
    "cube-octuple",
    "scene",
    "puzzle-3x3",
    "puzzle-4x4",
    "puzzle-4x5",
    "puzzle-4x6",
)
GOALS = "-goals"  # after a family's name: its tasks with the goal in the observation
TASKS = (1, 2, 3, 4, 5)
ACTION_LAYOUT = ActionLayout(translation=(0, 1, 2), rotation=(3,), gripper=4, gripper_close_sign=1)

_SENTENCES = {
    "cube": "move the cubes to their marked places",
    "scene": "bring cube, buttons, drawer and window into the goal state",
    "puzzle": "press buttons (each flips its neighbours too) until the lights show the goal pattern",
}


def names() -> list[str]:
    """Return every environment of this benchmark by its full name."""
    return [f"ogbench/{family}{goals}-task{task}" for goals in ("", GOALS) for family in FAMILIES for task in TASKS]


def describe_once(env: Any) -> None:
    """Have a simulator of OGBench's describe its state once a step in the place of three times, with the same numbers.

    Its `step` describes the state before the physics, for the observation, and for the info: a tenth of a step in all. The
    last two are the same, and the first is looked at where there are buttons alone.

    Args:
        env: OGBench's own environment, without wrappers.
    """
    describe, observe = env.compute_ob_info, env.compute_observation
    kept: list[dict[str, Any]] = []

    def compute_ob_info() -> dict[str, Any]:
        kept[:] = [describe()]
        return kept[0]

    def compute_observation() -> Any:
        kept.clear()  # an observation of pixels describes nothing
        return observe()

    def get_step_info() -> dict[str, Any]:
        # Somebody may have moved things since the observation.
        same = kept and np.array_equal(kept[0]["qpos"], env._data.qpos)
        info: dict[str, Any] = kept.pop() if same else describe()
        return info

    def pre_step() -> None:
        env._prev_qpos, env._prev_qvel = env._data.qpos.copy(), env._data.qvel.copy()

    env.compute_ob_info, env.compute_observation, env.get_step_info = (
        compute_ob_info,
        compute_observation,
        get_step_info,
    )
    if not hasattr(env, "_num_buttons"):
        env.pre_step = pre_step


class OGBenchEnv:
    """One OGBench manipulation task, seeded completely and with goal and object state laid open.

    Args:
        name: "ogbench/<family>-task<1..5>" or "ogbench/<family>-goals-task<1..5>", one of `names()`.
        render: how to draw frames; None if they will not be asked for.

    Raises:
        RenderingError: frames are wanted and this machine can't draw them.
    """

    def __init__(self, name: str, render: RenderSettings | None = None) -> None:
        match = re.fullmatch(rf"ogbench/(.+?)({GOALS})?-task([1-5])", name)
        if match is None or match[1] not in FAMILIES:
            raise InvalidInputError(
                f"{name!r} is not a manipulation task of OGBench's; expected 'ogbench/<family>-task<1..5>' or "
                f"'ogbench/<family>{GOALS}-task<1..5>'."
            )
        self._name, self._family, self._has_goals, self._task = name, match[1], match[2] is not None, int(match[3])
        self._goal = np.zeros(0, np.float32)
        self._render = render
        prepare_backend()  # before the first import of mujoco
        if render is not None:
            require_backend()

        import gymnasium
        import ogbench  # noqa: F401  # registers the environments
        from gymnasium.envs.registration import load_env_creator
        from gymnasium.spaces import Box

        variant = "" if self._has_goals else f"-singletask-task{self._task}"
        spec = gymnasium.spec(f"{self._family}{variant}-v0")
        assert isinstance(spec.entry_point, str)
        assert spec.max_episode_steps is not None
        base: Any = load_env_creator(spec.entry_point)

        class Seeded(base):  # type: ignore[misc]
            """The environment with an action space that descends from the episode's seed.

            OGBench's reset executes a few random actions to settle the goal state, drawn from a space that is made anew,
            unseeded, at every access; they leave traces in the simulator's time and controls.
            """

            action_space = Box(-1.0, 1.0, (5,), np.float32)

        size = {} if render is None else {"width": render.width, "height": render.height}
        self._env: Any = Seeded(**{**spec.kwargs, **size})
        describe_once(self._env)
        self._max_episode_steps = spec.max_episode_steps
        self._steps = 0
        self._drawn_before = False

    @cached_property
    def spec(self) -> EnvSpec:
        """The description."""
        state_dim = int(self._env.observation_space.shape[0])
        goal_dim = state_dim if self._has_goals else 0
        return EnvSpec(
            name=self._name,
            family=f"ogbench/{self._family}{GOALS if self._has_goals else ''}",
            task=_SENTENCES[self._family.split("-")[0]],
            observation_dim=state_dim + goal_dim,
            action_dim=5,
            action_low=(-1.0,) * 5,
            action_high=(1.0,) * 5,
            action_layout=ACTION_LAYOUT,
            max_episode_steps=self._max_episode_steps,
            goal_dim=goal_dim,
        )

    @property
    def simulator(self) -> Any:
        """OGBench's own environment."""
        return self._env

    def reset(self, seed: int) -> Moment:
        """Begin the episode that `seed` names."""
        self._env.action_space.seed(child_seed(seed, "settle"))
        options = {"task_id": self._task} if self._has_goals else None
        observation, info = self._env.reset(seed=child_seed(seed, "episode"), options=options)
        if self._has_goals:
            self._goal = np.asarray(info["goal"], dtype=np.float32)
        self._steps = 0
        return self._moment(observation, 0.0, success=False, terminated=False, info=info)

    def step(self, action: FloatArray) -> Moment:
        """Execute one action (5,) in [-1, 1].

        Raises:
            InvalidInputError: the action's shape is wrong, or it is not finite, or it is outside [-1, 1].
        """
        observation, reward, terminated, _, info = self._env.step(self.spec.check_action(action))
        self._steps += 1
        return self._moment(observation, float(reward), bool(info["success"]), bool(terminated), info)

    def render(self) -> Image:
        """Draw the present state: (height, width, 3) uint8."""
        settings = asked_for(self._render, self._name)
        with drawing(self._name):
            if not self._drawn_before:
                hurry(self._env.model, settings)
            self._drawn_before = True
            frame: Image = self._env.render(camera=settings.camera)
        return frame.copy()

    def camera(self) -> CameraView:
        """Describe the camera that `render` draws with."""
        settings = self._render or RenderSettings()
        camera = self._env.data.camera(settings.camera or "front")
        return CameraView(
            position=camera.xpos.copy(),
            rotation=camera.xmat.reshape(3, 3).copy(),
            fovy=float(self._env.model.camera(settings.camera or "front").fovy[0]),
            width=settings.width,
            height=settings.height,
        )

    def close(self) -> None:
        """Free the simulator and its renderer."""
        if self._drawn_before:
            self._env._renderer.close()
            self._env._renderer = None
        self._env.close()

    def _moment(self, observation: FloatArray, reward: float, success: bool, terminated: bool, info: Any) -> Moment:
        return Moment(
            observation=np.concatenate([np.asarray(observation, dtype=np.float32), self._goal]),
            reward=reward,
            success=success,
            terminated=terminated,
            truncated=not terminated and self._steps >= self._max_episode_steps,
            privileged=self._privileged(info),
        )

    def _privileged(self, info: dict[str, Any]) -> Privileged:
        """Collect what the simulator tells, and add the goal in the same terms (metres, world frame; joints in metres)."""
        env = self._env
        state: Privileged = {
            name: np.atleast_1d(np.asarray(value, dtype=np.float64))
            for name, value in info.items()
            if name.startswith(("proprio/", "privileged/"))
        }
        if self._family == "scene" or self._family.startswith("cube"):
            for block, mocap in enumerate(env._cube_target_mocap_ids):
                state[f"goal/block_{block}_pos"] = env._data.mocap_pos[mocap].copy()
        if self._family == "scene" or self._family.startswith("puzzle"):
            state["privileged/button_states"] = env._cur_button_states.astype(np.float64)
            state["goal/button_states"] = env._target_button_states.astype(np.float64)
            for button, site in enumerate(env._button_site_ids):
                state[f"privileged/button_{button}_top_pos"] = env._data.site_xpos[site].copy()
        if self._family == "scene":
            for slide, target in (("drawer", env._target_drawer_pos), ("window", env._target_window_pos)):
                joint = env._data.joint(f"{slide}_slide")
                state[f"goal/{slide}_pos"] = np.array([target], dtype=np.float64)
                # The target's site moves with the slide, so the goal is the handle plus the travel that remains.
                state[f"goal/{slide}_handle_pos"] = state[f"privileged/{slide}_handle_pos"] + joint.xaxis * (
                    target - joint.qpos[0]
                )
            state["privileged/drawer_center"] = env._drawer_center.copy()
        return state
