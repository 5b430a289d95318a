"""From recorded rollouts of a frozen policy, failures and successes, to a critic on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np
import numpy.typing as npt

from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.errors import DatasetError, InvalidInputError, MismatchError
from counterflow.learning.chunk_critic import ChunkCriticConfig, ChunkCriticLearner, Rollouts
from counterflow.learning.held_out import Progress
from counterflow.steering import ChunkCritic, CriticBinding, task_embedding


def rollouts_of(paths: Sequence[Path | str], config: ChunkCriticConfig, *, env: str | None = None) -> Rollouts:
    """Read the decisions of every episode of one or several recordings, failed and successful.

    How a policy was steered, and in how many steps it was denoised, does not matter: what was executed is judged.

    Args:
        paths: folders of 'counterflow record', all of one frozen policy.
        config: says which inputs are wanted, and whether task embeddings are.
        env: use this task's episodes alone.

    Raises:
        DatasetError: a recording is damaged or empty, or there is no success or no failure in all of them.
        MismatchError: they are of different policies, or the inputs that were asked for weren't recorded.
        UnknownNameError: no episode is of that task.
    """
    if not paths:
        raise InvalidInputError("no recording was named; give at least one folder of 'counterflow record'.")
    datasets = [SteeringDataset.load(path) for path in paths]
    bindings = {}
    episodes: list[SteeringEpisode] = []
    for dataset in datasets:
        part = dataset.filter(env=env)
        episodes += part.episodes
        for source in {episode.source for episode in part.episodes}:
            bindings[dataset.path, source] = _binding(dataset, source)
    (first, binding), *others = bindings.items()
    for (path, _), other in others:
        differing = [
            f"{name} {mine!r}, not {theirs!r}"
            for name, mine, theirs in zip(asdict(binding), astuple(binding), astuple(other), strict=True)
            if mine != theirs
        ]
        if differing:
            raise MismatchError(
                f"{first[0]} and {path} hold rollouts of different policies: {'; '.join(differing)}. Train a critic on each by "
                "itself."
            )
    name = "features" if config.critic.inputs == "features" else "observations"
    lacking = [episode for episode in episodes if name not in episode.arrays]
    if lacking:
        raise MismatchError(
            f"{lacking[0]} was recorded without {name}. Record with a policy that offers features, or learn from "
            "observations (--critic.inputs observation)."
        )
    sizes = sorted({episode.arrays[name].shape[1] for episode in episodes})
    if len(sizes) > 1:
        raise MismatchError(
            f"the {name} of these episodes have {' or '.join(map(str, sizes))} numbers; expected the same. Train a critic on "
            "each task by itself (--env)."
        )
    lengths = [episode.decisions for episode in episodes]
    rows = slice(binding.past, binding.past + binding.horizon)
    return Rollouts(
        inputs=np.concatenate([episode.arrays[name] for episode in episodes]),
        chunks=np.concatenate([episode.arrays["chunks"][:, rows, : binding.dim] for episode in episodes]),
        executed=np.concatenate([episode.arrays["executed"] for episode in episodes]),
        success=np.repeat([bool(episode.success) for episode in episodes], lengths),
        episodes=np.repeat(np.arange(len(episodes)), lengths),
        binding=binding,
        tasks=_tasks([episode.env for episode in episodes], lengths, config.critic.task_dim),
    )


def _tasks(names: Sequence[str], lengths: Sequence[int], size: int) -> npt.NDArray[np.float32] | None:
    """Return the embeddings (N, E) of every decision's task, or None where the critic is to know none."""
    if not size:
        return None
    return np.repeat(np.stack([task_embedding(name, size).numpy() for name in names]), lengths, axis=0)


def _binding(dataset: SteeringDataset, source: str) -> CriticBinding:
    """Return whose chunks a recording holds; which of their rows are executed is noted where it is not all of them."""
    noises, told = dataset.binding, dataset.sources[source]
    past, executed = told.get("past", 0), told.get("executed")
    rows = noises.horizon - past if executed is None else executed
    try:
        return CriticBinding(noises.policy, noises.family, rows, noises.dim, past)
    except InvalidInputError as error:
        raise DatasetError(f"{dataset.path} says of source {source} what can't be: {error}") from error


def train_critic(
    paths: Sequence[Path | str],
    out: Path | str,
    config: ChunkCriticConfig | None = None,
    *,
    env: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Callable[[Progress], None] | None = None,
) -> ChunkCritic:
    """Train a critic on recordings of a frozen policy and write it to `out`; its provenance says how good it is.

    Raises:
        DatasetError: there is nothing to learn from, for example no failure, or no success.
        MismatchError: the recordings are of different policies, or lack what the critic is to look at.
        StorageError: the critic can't be written; what stood at `out` is untouched.
    """
    config = ChunkCriticConfig() if config is None else config
    rollouts = rollouts_of(paths, config, env=env)
    learner = ChunkCriticLearner(rollouts, config, seed, device)
    critic = learner.fit(on_progress)
    ends = rollouts.success[rollouts.last]
    critic.provenance = {
        "algorithm": f"critic of a frozen policy, {config.method}",
        "datasets": [Path(path).name for path in paths],
        "env": env,
        "episodes": len(ends),
        "successes": int(ends.sum()),
        "seed": seed,
        "settings": asdict(config),
        **learner.report(),
    }
    critic.save(out)
    return critic
