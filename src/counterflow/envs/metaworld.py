"""Meta-World: fifty tasks of one robot arm on one table, with its splits into tasks to train on and to hold out.

Source: Meta-World (arXiv 1910.10897) and Meta-World+ (arXiv 2505.11289), package `metaworld` 3.1 (extra `metaworld`), whose
names the tasks have: "metaworld/push-v3". All fifty are one family, "metaworld": they share actions and what an observation
tells, and one prior is made for many of them.

An observation is Meta-World's own (39,), goal visible: hand (3), gripper opening (1), two objects' positions and quaternions
(14), the same 18 numbers one step earlier, and the goal's position (3). Actions are displacements of the hand along x, y and z
and the gripper's effort (positive closes), all in [-1, 1]; 1 is a centimetre. Where objects and goal lie descends from the
episode's seed. Unlike in the package, an episode ends when the goal is reached, which it would not pay to do if rewards were
positive: Meta-World's own dense reward, 0 to 10, is brought to -1 to 0, and 0 is that of the step that reaches the goal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from counterflow.envs.rendering import asked_for, drawing, hurry, prepare_backend, require_backend
from counterflow.envs.types import CameraView, EnvSpec, FloatArray, Image, Moment, Privileged, RenderSettings
from counterflow.errors import MissingDependencyError, UnknownNameError
from counterflow.layout import ActionLayout, ObjectEntry, ObservationLayout
from counterflow.random import child_seed

FAMILY = "metaworld"
ACTION_LAYOUT = ActionLayout(translation=(0, 1, 2), gripper=3, gripper_close_sign=1)
MAX_EPISODE_STEPS = 500
BEST_REWARD = 10.0
"""The most that Meta-World's dense rewards give for a step."""
CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
CAMERA = "corner2"
TESTED_MUJOCO = "3.3.0"

_PREVIOUS = 18  # how much later in the observation the step before is told


@dataclass(frozen=True)
class _Task:
    """A task in words: the sentence, and what the objects are called that the observation tells of."""

    sentence: str
    objects: tuple[str, ...]


_TASKS = {
    "assembly-v3": _Task("pick up the ring and place it onto the peg", ("ring",)),
    "basketball-v3": _Task("dunk the basketball into the basket", ("basketball",)),
    "bin-picking-v3": _Task("pick up the puck from one bin and put it into the other", ("puck",)),
    "box-close-v3": _Task("pick up the lid and close the box with it", ("box lid",)),
    "button-press-topdown-v3": _Task("press the button from the top", ("button",)),
    "button-press-topdown-wall-v3": _Task("reach over the wall and press the button from the top", ("button",)),
    "button-press-v3": _Task("press the button", ("button",)),
    "button-press-wall-v3": _Task("reach around the wall and press the button", ("button",)),
    "coffee-button-v3": _Task("press the button of the coffee machine", ("coffee machine button",)),
    "coffee-pull-v3": _Task("pull the mug away from the coffee machine", ("mug",)),
    "coffee-push-v3": _Task("push the mug under the coffee machine", ("mug",)),
    "dial-turn-v3": _Task("turn the dial", ("dial",)),
    "disassemble-v3": _Task("pick up the ring and take it off the peg", ("ring",)),
    "door-close-v3": _Task("close the door", ("door handle",)),
    "door-lock-v3": _Task("lock the door by turning the lock", ("door lock",)),
    "door-open-v3": _Task("open the door", ("door handle",)),
    "door-unlock-v3": _Task("unlock the door by turning the lock", ("door lock",)),
    "hand-insert-v3": _Task("push the block into the hole with the hand", ("block",)),
    "drawer-close-v3": _Task("close the drawer", ("drawer handle",)),
    "drawer-open-v3": _Task("open the drawer", ("drawer handle",)),
    "faucet-open-v3": _Task("turn the faucet on", ("faucet handle",)),
    "faucet-close-v3": _Task("turn the faucet off", ("faucet handle",)),
    "hammer-v3": _Task("pick up the hammer and hit the nail", ("hammer", "nail")),
    "handle-press-side-v3": _Task("press the handle down from the side", ("handle",)),
    "handle-press-v3": _Task("press the handle down", ("handle",)),
    "handle-pull-side-v3": _Task("pull the handle up from the side", ("handle",)),
    "handle-pull-v3": _Task("pull the handle up", ("handle",)),
    "lever-pull-v3": _Task("pull the lever up", ("lever",)),
    "pick-place-wall-v3": _Task("pick up the puck and place it at the goal behind the wall", ("puck",)),
    "pick-out-of-hole-v3": _Task("pick the block out of the hole", ("block",)),
    "pick-place-v3": _Task("pick up the puck and place it at the goal", ("puck",)),
    "plate-slide-v3": _Task("slide the plate into the cabinet", ("plate",)),
    "plate-slide-side-v3": _Task("slide the plate into the cabinet sideways", ("plate",)),
    "plate-slide-back-v3": _Task("slide the plate out of the cabinet", ("plate",)),
    "plate-slide-back-side-v3": _Task("slide the plate out of the cabinet sideways", ("plate",)),
    "peg-insert-side-v3": _Task("insert the peg into the hole from the side", ("peg",)),
    "peg-unplug-side-v3": _Task("unplug the peg from the side", ("peg",)),
    "soccer-v3": _Task("push the ball into the goal", ("soccer ball",)),
    "stick-push-v3": _Task("pick up the stick and push the thermos with it", ("stick", "thermos")),
    "stick-pull-v3": _Task("pick up the stick and pull the thermos with it", ("stick", "thermos")),
    "push-v3": _Task("push the puck to the goal", ("puck",)),
    "push-wall-v3": _Task("push the puck around the wall to the goal", ("puck",)),
    "push-back-v3": _Task("push the puck back to the goal", ("puck",)),
    "reach-v3": _Task("reach the goal with the hand", ("puck",)),
    "reach-wall-v3": _Task("reach the goal behind the wall with the hand", ("puck",)),
    "shelf-place-v3": _Task("pick up the block and place it on the shelf", ("block",)),
    "sweep-into-v3": _Task("sweep the block into the hole", ("block",)),
    "sweep-v3": _Task("sweep the block off the table", ("block",)),
    "window-open-v3": _Task("slide the window open", ("window handle",)),
    "window-close-v3": _Task("slide the window closed", ("window handle",)),
}

_MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)
_ML10_TRAIN = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "sweep-v3",
    "basketball-v3",
)
_ML10_TEST = ("drawer-open-v3", "door-close-v3", "shelf-place-v3", "sweep-into-v3", "lever-pull-v3")
_ML45_TEST = ("bin-picking-v3", "box-close-v3", "hand-insert-v3", "door-lock-v3", "door-unlock-v3")


def names() -> list[str]:
    """Return every task by its full name."""
    return [f"{FAMILY}/{task}" for task in _TASKS]


def _full(tasks: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{FAMILY}/{task}" for task in tasks)


GROUPS: dict[str, tuple[str, ...]] = {
    f"{FAMILY}/mt10": _full(_MT10),
    f"{FAMILY}/mt50": tuple(names()),
    f"{FAMILY}/ml10-train": _full(_ML10_TRAIN),
    f"{FAMILY}/ml10-test": _full(_ML10_TEST),
    f"{FAMILY}/ml45-train": _full(tuple(task for task in _TASKS if task not in _ML45_TEST)),
    f"{FAMILY}/ml45-test": _full(_ML45_TEST),
}
"""The benchmark's own splits: MT are trained on and tested, ML are trained on one part and tested on the other."""


def observation_layout(task: str) -> ObservationLayout:
    """Say where an observation of the task called `task` ("push-v3") tells of what.

    The robot: hand, gripper opening, and both one step earlier. An object: position, quaternion, and both one step earlier; of
    the goal only the position is known.
    """
    robot = (0, 1, 2, 3)
    objects = []
    for index, name in enumerate(_TASKS[task].objects):
        now = range(4 + 7 * index, 11 + 7 * index)
        objects.append(ObjectEntry(name, (*now, *(column + _PREVIOUS for column in now))))
    goal = ObjectEntry("goal", (36, 37, 38, *(None,) * 11))
    return ObservationLayout((*robot, *(column + _PREVIOUS for column in robot)), (*objects, goal))


class MetaWorldEnv:
    """One Meta-World task, seeded completely and with goal and object state laid open.

    Args:
        name: "metaworld/<task>", one of `names()`.
        render: how to draw frames; None if they will not be asked for.

    Raises:
        UnknownNameError: there is no such task or camera.
        MissingDependencyError: the package is not installed, or a version of MuJoCo that it does not run with.
        RenderingError: frames are wanted and this machine can't draw them.
    """

    def __init__(self, name: str, render: RenderSettings | None = None) -> None:
        self._task = name.removeprefix(f"{FAMILY}/")
        if self._task not in _TASKS:
            raise UnknownNameError("task of Meta-World's", name, names())
        if render is not None and render.camera not in (None, *CAMERAS):
            raise UnknownNameError(f"camera of {name}", str(render.camera), CAMERAS)
        self._name, self._render = name, render
        prepare_backend()  # before the first import of mujoco
        if render is not None:
            require_backend()
        drawing: dict[str, Any] = {}
        if render is not None:
            drawing = {"render_mode": "rgb_array", "camera_name": render.camera or CAMERA}
            drawing |= {"width": render.width, "height": render.height}
        self._env: Any = _make_simulator(self._task, drawing)
        self._steps = 0
        self._drawn_before = False

    @cached_property
    def spec(self) -> EnvSpec:
        """The description."""
        return EnvSpec(
            name=self._name,
            family=FAMILY,
            task=_TASKS[self._task].sentence,
            observation_dim=39,
            action_dim=4,
            action_low=(-1.0,) * 4,
            action_high=(1.0,) * 4,
            action_layout=ACTION_LAYOUT,
            max_episode_steps=MAX_EPISODE_STEPS,
            goal_dim=3,
            observation_layout=observation_layout(self._task),
        )

    @property
    def simulator(self) -> Any:
        """Meta-World's own environment."""
        return self._env

    def reset(self, seed: int) -> Moment:
        """Begin the episode that `seed` names: it decides where the objects and the goal lie."""
        self._env.seed(child_seed(seed, "episode"))
        observation, _ = self._env.reset()
        self._steps = 0
        return self._moment(observation, {}, 0.0)

    def step(self, action: FloatArray) -> Moment:
        """Execute one action (4,) in [-1, 1].

        Raises:
            InvalidInputError: the action's shape is wrong, or it is not finite, or it is outside [-1, 1].
        """
        observation, reward, _, _, info = self._env.step(self.spec.check_action(action))
        self._steps += 1
        return self._moment(observation, info, float(reward))

    def render(self) -> Image:
        """Draw the present state: (height, width, 3) uint8."""
        settings = asked_for(self._render, self._name)
        with drawing(self._name):
            if not self._drawn_before:
                hurry(self._env.model, settings)
            self._drawn_before = True
            frame: Image = self._env.render()
        return (frame[::-1, ::-1] if self._is_upside_down else frame).copy()

    def camera(self) -> CameraView:
        """Describe the camera that `render` draws with."""
        settings = self._render or RenderSettings()
        name = settings.camera or CAMERA
        rotation = self._env.data.camera(name).xmat.reshape(3, 3).copy()
        if self._is_upside_down:
            rotation[:, :2] *= -1  # turned half round, as the frames are
        return CameraView(
            position=self._env.data.camera(name).xpos.copy(),
            rotation=rotation,
            fovy=float(self._env.model.camera(name).fovy[0]),
            width=settings.width,
            height=settings.height,
        )

    def close(self) -> None:
        """Free the simulator and its renderer."""
        self._env.close()

    @property
    def _is_upside_down(self) -> bool:
        """Whether the camera hangs upside down in Meta-World's scene, so that its frames have to be turned half round."""
        settings = self._render or RenderSettings()
        up = self._env.data.camera(settings.camera or CAMERA).xmat.reshape(3, 3)[:, 1]
        return bool(up[2] < -0.1)

    def _moment(self, observation: FloatArray, info: dict[str, Any], reward: float) -> Moment:
        success = bool(info.get("success", 0.0) > 0.5)
        state = np.asarray(observation, dtype=np.float32)
        return Moment(
            observation=state,
            reward=0.0 if self._steps == 0 or success else min(max(reward, 0.0), BEST_REWARD) / BEST_REWARD - 1.0,
            success=success,
            terminated=success,
            truncated=not success and self._steps >= MAX_EPISODE_STEPS,
            privileged=self._privileged(np.asarray(observation, dtype=np.float64), info),
        )

    def _privileged(self, state: npt.NDArray[np.float64], info: dict[str, Any]) -> Privileged:
        """Name what the observation tells (metres, world frame), and add what the simulator says besides."""
        goal = np.array(self._env._target_pos, dtype=np.float64)
        remaining = float(info.get("obj_to_target", np.linalg.norm(state[4:7] - goal)))
        told: Privileged = {
            "proprio/effector_pos": state[:3].copy(),
            "proprio/gripper_opening": np.array([1.0 - state[3]]),  # 0 is open, 1 is closed, as everywhere here
            "goal/pos": goal,
            "privileged/state": state.copy(),
            "privileged/remaining": np.array([remaining]),
        }
        for index in range(len(_TASKS[self._task].objects)):
            told[f"privileged/object_{index}_pos"] = state[4 + 7 * index : 7 + 7 * index].copy()
        return told


def _make_simulator(task: str, drawing: dict[str, Any]) -> Any:
    """Make the package's environment with the goal visible and new places at every reset.

    Raises:
        MissingDependencyError: the package is not installed, or does not run with the MuJoCo that is.
    """
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    except ImportError as error:
        raise MissingDependencyError(
            f"Meta-World is not installed ({error}). Install it together with the MuJoCo that it needs: pip install "
            f"'counterflow[metaworld]' mujoco=={TESTED_MUJOCO}"
        ) from error
    try:
        env: Any = ALL_V3_ENVIRONMENTS[task](**drawing)
    except ValueError as error:  # a model that another version of MuJoCo lays out differently
        import mujoco

        raise MissingDependencyError(
            f"Meta-World can't load {task} with MuJoCo {mujoco.__version__} ({error}). Expected MuJoCo {TESTED_MUJOCO}: pip "
            f"install mujoco=={TESTED_MUJOCO} metaworld==3.1.1"
        ) from error
    env._partially_observable = False
    # Computed while the goal was hidden, and remembered: observations are clipped to it, the goal to nothing.
    vars(env).pop("sawyer_observation_space", None)
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    return env
