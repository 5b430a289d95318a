"""Data for offline reinforcement learning: an archive and a task in, transitions with rewards out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from counterflow.data import EpisodeDataset, TransitionDataset
from counterflow.data.episodes import array_names
from counterflow.envs import check_env_name, describe, env_names, families, family_of, relabel
from counterflow.envs.ogbench import FAMILIES, GOALS
from counterflow.errors import DatasetError, UnknownNameError
from counterflow.experiments.train import check_dataset


def find_data(env: str) -> Path:
    """Return where the data of an environment of OGBench's lie: its own download if it is there, otherwise what was collected.

    That is `~/.ogbench/data/<family>-<kind>-v0.npz`, where `ogbench.make_env_and_datasets` puts them, or
    `data/<family>-<kind>.npz`, where `counterflow collect` does. The kind is play for manipulation, navigate for the others.

    Raises:
        DatasetError: neither is there, or the environment is of another benchmark.
        UnknownNameError: no such environment or family.
    """
    from ogbench.utils import DEFAULT_DATASET_DIR

    known = [*env_names(), *families()]
    if env not in known:
        raise UnknownNameError("environment or family", env, known)
    if not env.startswith("ogbench/"):
        raise DatasetError(f"{env} has no place where its data are looked for; give the path of an archive.")
    family = family_of(env).removesuffix(GOALS)
    name = family.split("/")[-1]
    made_here = name in FAMILIES
    kind = "play" if made_here else "navigate"
    official = Path(DEFAULT_DATASET_DIR).expanduser() / f"{name}-{kind}-v0.npz"
    collected = Path("data") / f"{name}-{kind}.npz"
    found = next((path for path in (official, collected) if path.is_file()), None)
    if found is None:
        collect = f"Make some: 'counterflow collect {family} --episodes 1000'; or fetch" if made_here else "Fetch"
        raise DatasetError(
            f"there are no data of {family}: neither {official} nor {collected} is there. {collect} OGBench's own: "
            f"python -c \"import ogbench; ogbench.download_datasets(['{name}-{kind}-v0'])\". Or say where they are (--data)."
        )
    return found


def load_transitions(path: Path | str, env: str, *, sparse: bool = False) -> TransitionDataset:
    """Load an archive in OGBench's layout as transitions with the rewards of a task.

    Rewards and masks are the archive's own where it holds them, one a row, and otherwise computed for the task from the
    recorded states (`counterflow.envs.relabel`). For a goal-conditioned environment there is nothing to compute before goals
    are drawn (`counterflow.data.GoalSampler`): rewards are -1 and masks 1 throughout.

    Args:
        path: an official download, or what 'counterflow collect' wrote.
        env: a task, for example "ogbench/cube-single-task2"; a family will do if the archive has its own rewards, or the
            environment is goal-conditioned.
        sparse: replace rewards by -1 wherever they are not 0.

    Raises:
        DatasetError: the archive is damaged, not in the expected layout, or holds neither rewards nor what they are computed
            from.
        MismatchError: archive and environment don't fit.
        UnknownNameError, InvalidInputError: there is no such environment, or it is a family and rewards need a task.
    """
    path, spec = Path(path), describe(env)
    names = array_names(path)
    own: list[str] = [name for name in ("rewards", "masks") if name in names]
    if len(own) == 1:
        raise DatasetError(
            f"{path} holds {own[0]} alone; expected both rewards and masks (0 where the task is solved), or neither and qpos, "
            "from which they are computed."
        )
    if own or spec.goal_dim:
        keys = own
    elif "qpos" in names:
        check_env_name(env)
        keys = [name for name in ("qpos", "button_states") if name in names]
    else:
        raise DatasetError(
            f"{path} holds no rewards and masks, and no qpos to compute them from; it has {', '.join(names)}. Use an archive "
            "with qpos, as OGBench's own and those of 'counterflow collect'."
        )
    episodes = EpisodeDataset.load(path, keys=keys)
    check_dataset(episodes, replace(spec, observation_dim=spec.observation_dim - spec.goal_dim), path)
    if not own:
        ones = np.ones(episodes.num_steps, np.float32)
        if spec.goal_dim:
            rewards, masks = -ones, ones
        else:
            rewards, masks = relabel(env, episodes.arrays["qpos"], episodes.arrays.get("button_states"))
        episodes.arrays |= {"rewards": rewards, "masks": masks}
    transitions = TransitionDataset.from_episodes(episodes)
    return transitions.sparse() if sparse else transitions
