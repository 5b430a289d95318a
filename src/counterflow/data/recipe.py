"""How one episode of OGBench's manipulation data is made.

The recipe is OGBench's own (arXiv 2410.20092, section "Dataset collection"; `data_gen_scripts/generate_manipspace.py` and
`commands.sh` of seohongpark/ogbench): a scripted oracle pursues one random sub-task after another for 1001 steps.

- *play*: an open-loop oracle follows a plan to which temporally correlated noise was added.
- *noisy*: a closed-loop oracle whose actions get Gaussian noise, its scale drawn once an episode, and are sometimes replaced
  by random ones.

One thing differs, on purpose: an episode here depends on (seed, index) alone, so it does not matter which process makes it,
after which others.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from counterflow.envs import families
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

ACTION_DIM = 5
NOISY_ACTION_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])  # of the noise on x, y, z, yaw, gripper, in normalised actions
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
        env: a family of `counterflow.envs.families()`, for example "ogbench/cube-single".
        kind: "play" or "noisy".
        seed: from which every episode descends.
        episodes: how many episodes to train on.
        validation_episodes: how many more to hold out.
        max_episode_steps: transitions in an episode.
        noise: scale of the noise on a plan ("play"), or the largest scale of the noise on actions ("noisy"); normalised.
        noise_smoothing: standard deviation, in steps, of the Gaussian that smooths a plan's noise.
        min_norm: the shortest way, in metres, that the closed-loop oracle aims for.
        p_random_action: how often a noisy action is replaced by a uniformly random one; negative for the official value.

    Raises:
        UnknownNameError: no such family or kind.
        InvalidInputError: a number is out of range.
    """

    env: str = "ogbench/cube-single"
    kind: Kind = "play"
    seed: int = 0
    episodes: int = 1000
    validation_episodes: int = 100
    max_episode_steps: int = 1001
    noise: float = 0.1
    noise_smoothing: float = 0.5
    min_norm: float = 0.4
    p_random_action: float = -1.0

    def __post_init__(self) -> None:
        """Check every value."""
        if self.env not in families():
            raise UnknownNameError("family of environments", self.env, families())
        if self.kind not in get_args(Kind):
            raise UnknownNameError("kind of data", self.kind, get_args(Kind))
        check_seed(self.seed)
        for name, least in (("episodes", 1), ("validation_episodes", 0), ("max_episode_steps", 2)):
            if getattr(self, name) < least:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected {least} or more.")
        if self.p_random_action < 0:
            puzzle = self.family.startswith("puzzle")
            official = 0.0 if self.kind == "play" else 0.2 if puzzle else 0.1
            object.__setattr__(self, "p_random_action", official)

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
        import gymnasium
        import ogbench.manipspace  # noqa: F401  # registers the environments

        self._recipe = recipe
        self._env: Any = gymnasium.make(
            f"{recipe.family}-v0", terminate_at_goal=False, mode="data_collection", disable_env_checker=True
        ).unwrapped
        self._oracles = _make_oracles(recipe, self._env)
        self._env.reset(seed=child_seed(recipe.seed, "first"))
        self._targets = {name: deepcopy(value) for name, value in vars(self._env).items() if name.startswith("_target_")}
        self._target_sites = self._env.model.site_pos.copy()

    def make(self, index: int) -> Episode:
        """Make episode `index`: `DTYPES` with a leading axis of `max_episode_steps` (button_states where the family has any).

        The scene is tried again until its cube stays in view or in the drawer: elsewhere images could not tell where it is.
        """
        attempt = 0
        while True:
            episode = self._attempt(child_seed(self._recipe.seed, "episode", index, attempt))
            if self._recipe.family != "scene" or _cube_stays_in_view(episode["qpos"][:, SCENE_CUBE]):
                return episode
            attempt += 1

    def _attempt(self, seed: int) -> Episode:
        recipe, env = self._recipe, self._env
        np.random.seed(child_seed(seed, "oracle"))  # noqa: NPY002  # the oracles draw from numpy's global generator
        rng = np.random.default_rng(child_seed(seed, "actions"))
        # Each sub-task sets its own targets and leaves those of others; an oracle acts on these once after it takes over.
        vars(env).update(deepcopy(self._targets))
        env.model.site_pos[:] = self._target_sites
        observation, info = env.reset(seed=child_seed(seed, "environment"))
        # The constraint solver starts from its last solution, and reset leaves one there that depends on the episode before.
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
    """Say whether the cube's `positions` (T, 3), metres, are never too far right, nor too far left outside the drawer."""
    _, y, z = positions.T
    too_far_right = y >= 0.29
    too_far_left = (y <= -0.3) & ((z < 0.06) | (z > 0.08))
    return not (too_far_right | too_far_left).any()
