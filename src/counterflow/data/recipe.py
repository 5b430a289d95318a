"""How one episode of OGBench's manipulation data is made.

The recipe is OGBench's own (arXiv 2410.20092; `data_gen_scripts/generate_manipspace.py` and `commands.sh` of
seohongpark/ogbench): a scripted oracle pursues one random sub-task after another for 1001 steps.

- *play*: an open-loop oracle follows a plan to which temporally correlated noise was added.
- *noisy*: a closed-loop oracle whose actions get Gaussian noise, its scale drawn once an episode, and are sometimes
  replaced by random ones.

One thing differs, on purpose: an episode here depends on (seed, index) alone, so it does not matter which process makes
it, after which others.
"""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from counterflow.checks import check_name
from counterflow.envs.ogbench import FAMILIES, describe_once
from counterflow.envs.rendering import prepare_backend
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.random import check_seed, child_seed

Kind = Literal["play", "noisy"]
Episode = dict[str, npt.NDArray[Any]]

DTYPES = {
    "observations": np.float32,
    "actions": np.float32,
    "terminals": np.bool_,
    "qpos": np.float32,
    "qvel": np.float32,
    "button_states": np.int64,
}

COLLECTED = tuple(f"ogbench/{family}" for family in FAMILIES)  # the walking robots' data come of trained policies
ACTION_DIM = 5
NOISY_ACTION_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])  # of the noise on normalised x, y, z, yaw, gripper
SCENE_ORACLE_STEPS = 100  # after which the noisy scene's cube oracle gives up
STACKING = {  # from what range an episode's probability of stacking a cube on another is drawn
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0.0, 0.35),
}
STACKING_ELSEWHERE = (0.5, 0.5)
SCENE_CUBE = slice(14, 17)  # where qpos holds the position of the scene's cube, metres


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a dataset's content.

    Args:
        env: a family of manipulation environments, for example "ogbench/cube-single".
        kind: "play" or "noisy".
        seed: from which every episode descends.
        episodes: how many episodes to train on.
        validation_episodes: how many more to hold out.
        max_episode_steps: transitions in an episode.
        noise: scale of the noise on a plan ("play"), or the largest scale of the noise on normalised actions ("noisy").
        noise_smoothing: standard deviation, in steps, of the Gaussian that smooths a plan's noise.
        min_norm: the shortest way, in metres, that the closed-loop oracle aims for.
        p_random_action: how often an action is replaced by a uniformly random one.

    Raises:
        UnknownNameError: no such family or kind.
        InvalidInputError: a number is out of range.
    """

    env: str
    kind: Kind
    seed: int
    episodes: int
    validation_episodes: int
    max_episode_steps: int = 1001
    noise: float = 0.1
    noise_smoothing: float = 0.5
    min_norm: float = 0.4
    p_random_action: float = 0.0

    @classmethod
    def official(
        cls, env: str, kind: Kind, *, seed: int, episodes: int, validation_episodes: int, max_episode_steps: int = 1001
    ) -> Recipe:
        """Return the recipe with OGBench's own noise for this family and kind."""
        p_random_action = 0.0
        if kind == "noisy":
            p_random_action = 0.2 if env.startswith("ogbench/puzzle") else 0.1
        return cls(env, kind, seed, episodes, validation_episodes, max_episode_steps, p_random_action=p_random_action)

    def __post_init__(self) -> None:
        """Check every value."""
        if self.env not in COLLECTED:
            raise UnknownNameError("family of environments with oracles", self.env, COLLECTED)
        check_name("kind of data", self.kind, Kind)
        check_seed(self.seed)
        for name, least in (("episodes", 1), ("validation_episodes", 0), ("max_episode_steps", 2)):
            if getattr(self, name) < least:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected {least} or more.")

    @property
    def family(self) -> str:
        """The family's name without its benchmark."""
        return self.env.split("/")[1]

    @property
    def total_episodes(self) -> int:
        """Episodes of both files together."""
        return self.episodes + self.validation_episodes


class EpisodeMaker:
    """A simulator and its oracles, ready to make any episode of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._env = _make_simulator(recipe)
        self._oracles = _make_oracles(recipe, self._env)
        self._env.reset(seed=child_seed(recipe.seed, "first"))
        self._targets = {
            name: deepcopy(value) for name, value in vars(self._env).items() if name.startswith("_target_")
        }
        self._target_sites = self._env.model.site_pos.copy()

    def make(self, index: int) -> Episode:
        """Make episode `index`.

        A scene is made again until its cube stays in view or in the drawer: elsewhere, images can't tell where it is.

        Returns:
            The arrays named in `DTYPES`, each with a leading axis of `max_episode_steps`; button_states only where the
            family has buttons.
        """
        for attempt in itertools.count():
            episode = self._attempt(child_seed(self._recipe.seed, "episode", index, attempt))
            if self._recipe.family != "scene" or _cube_stays_in_view(episode["qpos"][:, SCENE_CUBE]):
                break
        return episode

    def _attempt(self, seed: int) -> Episode:
        recipe, env = self._recipe, self._env
        np.random.seed(child_seed(seed, "oracle"))  # the oracles draw from numpy's global generator
        rng = np.random.default_rng(child_seed(seed, "actions"))
        # A sub-task sets its own targets and leaves those of others, and OGBench shows an oracle that takes over what
        # was there before it: without this an episode would depend on the one before.
        vars(env).update(deepcopy(self._targets))
        env.model.site_pos[:] = self._target_sites
        observation, info = env.reset(seed=child_seed(seed, "environment"))
        # For the same reason: the constraint solver starts from its last solution.
        env.data.qacc_warmstart[:] = 0.0

        p_stack = rng.uniform(*STACKING.get(recipe.family, STACKING_ELSEWHERE))
        action_noise = rng.uniform(0.0, recipe.noise) * NOISY_ACTION_SCALE
        oracle = self._oracles[info["privileged/target_task"]]
        oracle.reset(observation, info)

        rows: dict[str, list[Any]] = {name: [] for name in DTYPES}
        for step in range(recipe.max_episode_steps):
            if rng.uniform() < recipe.p_random_action:
                action = rng.uniform(-1.0, 1.0, ACTION_DIM)
            else:
                action = np.asarray(oracle.select_action(observation, info))
                if recipe.kind == "noisy":
                    action = action + rng.normal(0.0, action_noise)
            action = np.clip(action, -1.0, 1.0)

            rows["observations"].append(observation)
            observation, _, _, _, info = env.step(action)
            rows["actions"].append(action)
            rows["terminals"].append(step == recipe.max_episode_steps - 1)
            rows["qpos"].append(info["prev_qpos"])
            rows["qvel"].append(info["prev_qvel"])
            if "prev_button_states" in info:
                rows["button_states"].append(info["prev_button_states"])

            if oracle.done:
                target_observation, target_info = env.set_new_target(p_stack=p_stack)
                oracle = self._oracles[target_info["privileged/target_task"]]
                oracle.reset(target_observation, target_info)
        return {name: np.asarray(values, DTYPES[name]) for name, values in rows.items() if values}


def _make_simulator(recipe: Recipe) -> Any:
    """Return the family's environment as it is when data is collected: without a goal, a time limit or wrappers."""
    prepare_backend()  # nothing is drawn here, but the same process may want to draw later, and mujoco asks only once

    import gymnasium
    import ogbench.manipspace  # noqa: F401  # registers the environments

    gymnasium.logger.min_level = (
        gymnasium.logger.ERROR
    )  # it warns of the precision of OGBench's spaces, in every process
    env: Any = gymnasium.make(f"{recipe.family}-v0", terminate_at_goal=False, mode="data_collection").unwrapped
    describe_once(env)
    return env


def _make_oracles(recipe: Recipe, env: Any) -> dict[str, Any]:
    """Return the oracle of every sub-task that the family draws."""
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
    from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    play: dict[str, Any] = {"env": env, "noise": recipe.noise, "noise_smoothing": recipe.noise_smoothing}
    noisy: dict[str, Any] = {"env": env, "min_norm": recipe.min_norm}
    if recipe.family.startswith("puzzle"):
        if recipe.kind == "play":
            return {"button": ButtonPlanOracle(**play, gripper_always_closed=True)}
        return {"button": ButtonMarkovOracle(**noisy, gripper_always_closed=True)}
    if recipe.family.startswith("cube"):
        return {"cube": CubePlanOracle(**play) if recipe.kind == "play" else CubeMarkovOracle(**noisy)}
    if recipe.kind == "play":
        return {
            "cube": CubePlanOracle(**play),
            "button": ButtonPlanOracle(**play),
            "drawer": DrawerPlanOracle(**play),
            "window": WindowPlanOracle(**play),
        }
    return {
        "cube": CubeMarkovOracle(**noisy, max_step=SCENE_ORACLE_STEPS),
        "button": ButtonMarkovOracle(**noisy),
        "drawer": DrawerMarkovOracle(**noisy),
        "window": WindowMarkovOracle(**noisy),
    }


def _cube_stays_in_view(positions: npt.NDArray[np.floating]) -> bool:
    """Say whether the cube, at `positions` (T, 3) in metres, is never too far right, nor too far left of the drawer."""
    _, y, z = positions.T
    too_far_right = y >= 0.29
    too_far_left = (y <= -0.3) & ((z < 0.06) | (z > 0.08))
    return not (too_far_right | too_far_left).any()
