"""OGBench's locomotion environments: a point, an ant or a humanoid in a maze, and an ant with a ball, five single tasks each.

Source: OGBench (arXiv 2410.20092), package `ogbench`; the tasks are its own `*-singletask-task{1..5}-v0`, whose datasets are
the "navigate" ones. State observations; actions are in [-1, 1]: displacements of the point, torques of the others. To a torque
a direction in words means nothing, so only the point has an action layout.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
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
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.layout import ActionLayout
from counterflow.random import child_seed, global_numpy

FAMILIES = (
    "pointmaze-medium",
    "pointmaze-large",
    "pointmaze-giant",
    "antmaze-medium",
    "antmaze-large",
    "antmaze-giant",
    "humanoidmaze-medium",
    "humanoidmaze-large",
    "antsoccer-arena",
    "antsoccer-medium",
)
TASKS = (1, 2, 3, 4, 5)
POINT_LAYOUT = ActionLayout(translation=(0, 1))

_SENTENCES = {
    "pointmaze": "move through the maze to the marked place",
    "antmaze": "walk through the maze to the marked place",
    "humanoidmaze": "walk through the maze to the marked place",
    "antsoccer": "push the ball to the marked place",
}


def names() -> list[str]:
    """Return every locomotion task by its full name."""
    return [f"ogbench/{family}-task{task}" for family in FAMILIES for task in TASKS]


class OGBenchLocomotionEnv:
    """One OGBench locomotion task, seeded completely and with goal and positions laid open.

    Args:
        name: "ogbench/<family>-task<1..5>", one of `names()`.
        render: how to draw frames; None if they will not be asked for.

    Raises:
        InvalidInputError: there is no such task.
        UnknownNameError: there is no such camera.
        RenderingError: frames are wanted and this machine can't draw them.
    """

    def __init__(self, name: str, render: RenderSettings | None = None) -> None:
        match = re.fullmatch(r"ogbench/(.+)-task([1-5])", name)
        if match is None or match[1] not in FAMILIES:
            raise InvalidInputError(
                f"{name!r} is not a locomotion task of OGBench's; expected 'ogbench/<family>-task<1..5>'."
            )
        self._name, self._family, self._task = name, match[1], int(match[2])
        self._render = render
        prepare_backend()  # before the first import of mujoco
        if render is not None:
            require_backend()

        import gymnasium
        import ogbench  # noqa: F401  # registers the environments
        from gymnasium.envs.registration import load_env_creator

        spec = gymnasium.spec(f"{self._family}-singletask-task{self._task}-v0")
        assert isinstance(spec.entry_point, str)
        assert spec.max_episode_steps is not None
        drawing: dict[str, Any] = {}
        if render is not None:
            drawing = {"width": render.width, "height": render.height, "camera_name": render.camera}
        make: Any = load_env_creator(spec.entry_point)
        self._env: Any = make(**{**spec.kwargs, **drawing})
        # The maze is written to a temporary file, read, and left lying there.
        Path(self._env.fullpath).unlink(missing_ok=True)
        if render is not None and render.camera is not None:
            cameras = [self._env.model.camera(index).name for index in range(self._env.model.ncam)]
            if render.camera not in cameras:
                raise UnknownNameError(f"camera of {name}", render.camera, cameras)
        self._max_episode_steps = spec.max_episode_steps
        self._steps = 0

    @cached_property
    def spec(self) -> EnvSpec:
        """The description."""
        actions = self._env.action_space
        return EnvSpec(
            name=self._name,
            family=f"ogbench/{self._family}",
            task=_SENTENCES[self._family.split("-")[0]],
            observation_dim=int(self._env.observation_space.shape[0]),
            action_dim=int(actions.shape[0]),
            action_low=tuple(float(value) for value in actions.low),
            action_high=tuple(float(value) for value in actions.high),
            action_layout=POINT_LAYOUT if self._family.startswith("pointmaze") else None,
            max_episode_steps=self._max_episode_steps,
        )

    @property
    def simulator(self) -> Any:
        """OGBench's own environment."""
        return self._env

    def reset(self, seed: int) -> Moment:
        """Begin the episode that `seed` names."""
        # OGBench also takes a few random actions first, to see what a walker looks like at the goal; it then resets the
        # simulator, so unlike in the manipulation environments they leave no trace.
        with global_numpy(child_seed(seed, "places")):
            observation, _ = self._env.reset(seed=child_seed(seed, "episode"))
        self._steps = 0
        return self._moment(observation, 0.0, success=False, terminated=False)

    def step(self, action: FloatArray) -> Moment:
        """Execute one action (A,) in [-1, 1].

        Raises:
            InvalidInputError: the action's shape is wrong, or it is not finite, or it is outside [-1, 1].
        """
        observation, reward, terminated, _, info = self._env.step(self.spec.check_action(action))
        self._steps += 1
        return self._moment(observation, float(reward), bool(info["success"]), bool(terminated))

    def render(self) -> Image:
        """Draw the present state: (height, width, 3) uint8."""
        settings = asked_for(self._render, self._name)
        with drawing(self._name):
            if self._env.custom_renderer is None:
                hurry(self._env.model, settings)
            frame: Image = self._env.render()
        return frame.copy()

    def camera(self) -> CameraView:
        """Describe the camera that `render` draws with: above the maze's middle, unless another was asked for."""
        settings = self._render or RenderSettings()
        if settings.camera is None:
            above = self._env.custom_camera
            position = above.lookat + np.array([0.0, 0.0, above.distance])  # it looks straight down, north is up
            rotation, fovy = np.eye(3), float(self._env.model.vis.global_.fovy)
        else:
            camera = self._env.data.camera(settings.camera)
            position, rotation = camera.xpos.copy(), camera.xmat.reshape(3, 3).copy()
            fovy = float(self._env.model.camera(settings.camera).fovy[0])
        return CameraView(position, rotation, fovy, settings.width, settings.height)

    def close(self) -> None:
        """Free the simulator and its renderer."""
        if self._env.custom_renderer is not None:
            self._env.custom_renderer.close()
            self._env.custom_renderer = None
        self._env.close()

    def _moment(self, observation: FloatArray, reward: float, success: bool, terminated: bool) -> Moment:
        return Moment(
            observation=np.asarray(observation, dtype=np.float32),
            reward=reward,
            success=success,
            terminated=terminated,
            truncated=not terminated and self._steps >= self._max_episode_steps,
            privileged=self._privileged(),
        )

    def _privileged(self) -> Privileged:
        """Collect where everything is (metres, world frame), and the simulator's state as the archives keep it."""
        env = self._env
        state: Privileged = {
            "privileged/qpos": np.array(env.data.qpos, dtype=np.float64),
            "privileged/qvel": np.array(env.data.qvel, dtype=np.float64),
            "privileged/agent_xy": np.array(env.data.qpos[:2], dtype=np.float64),
            "goal/xy": np.array(env.cur_goal_xy, dtype=np.float64),
        }
        if self._family.startswith("antsoccer"):
            state["privileged/ball_xy"] = np.array(env.get_agent_ball_xy()[1], dtype=np.float64)
        return state
