"""From steering datasets or inverted demonstrations to a noise policy on disk (or to the baseline, BC)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from counterflow.checks import check_name
from counterflow.data import EpisodeDataset, SteeringDataset
from counterflow.errors import DatasetError, InvalidInputError, MismatchError
from counterflow.experiments.inversion import read_binding
from counterflow.experiments.lerobot_data import is_augmented, lerobot_examples
from counterflow.learning.dsbc import DSBCConfig, NoiseExamples, distil, join
from counterflow.learning.held_out import Progress
from counterflow.steering import ChunkRegressor

Windows = Literal["auto", "steps", "decisions"]
MOST_CUT = 0.1
"""What a bound may cut off without being told of. Of cube-single's noises it is 3%; of Meta-World's 12 to 35%, where a larger
bound was worth 70 points on one of eight tasks, cost some on others, and made 57% of 55 on the mean."""


def examples_of(
    path: Path | str, config: DSBCConfig, *, env: str | None = None, first: int | None = None, windows: Windows = "auto"
) -> NoiseExamples:
    """Read what there is to learn from.

    Args:
        path: the folder of a steering dataset, whose successful episodes are used; or an archive of 'counterflow invert', or a
            LeRobotDataset of 'counterflow lerobot augment', of which every chunk is used whose noise was found.
        config: says which inputs and targets are wanted.
        env: of a steering dataset, use this task's episodes alone.
        first: use the first so many (successful) episodes; of a steering dataset, of every task.
        windows: of a steering dataset, "decisions" takes the chunks that were decided on, "steps" the actions that were
            executed from every step on, "auto" the latter where they were recorded. An archive has a chunk at every step.

    Raises:
        DatasetError: nothing there can be learned from, or it is damaged.
        MismatchError: the inputs that were asked for weren't recorded.
    """
    path = Path(path)
    check_name("windows", windows, Windows)
    if is_augmented(path):
        return lerobot_examples(path, config, first)
    if path.is_dir():
        return _of_steering(SteeringDataset.load(path), config, env, first, windows)
    return _of_archive(path, config, first)


def _of_steering(
    dataset: SteeringDataset, config: DSBCConfig, env: str | None, first: int | None, windows: Windows
) -> NoiseExamples:
    wanted = dataset.filter(success=True, env=env, first=first)
    inputs = "features" if config.regressor.inputs == "features" else "observations"
    target = "noise" if config.regressor.target == "noise" else "chunks"
    if windows == "auto":
        windows = "steps" if all("step_noise" in episode.arrays for episode in wanted.episodes) else "decisions"
    prefix, usable_name = ("step_", "step_noise_valid") if windows == "steps" else ("", "start_time")
    chunks_name = f"{prefix}chunks"
    names = tuple(
        dict.fromkeys((f"{prefix}{inputs}", f"{prefix}{target}", usable_name, *_with_intention(config, chunks_name)))
    )
    missing = sorted({name for name in names for episode in wanted.episodes if name not in episode.arrays})
    if missing:
        raise MismatchError(
            f"{dataset.path} was recorded without {', '.join(missing)}. Record with a policy that offers features and with "
            "every step, or learn from observations, or from decisions alone."
        )
    arrays = wanted.concatenated(names)
    if windows == "steps":
        usable = arrays["step_noise_valid"]
    else:
        usable = np.ones(len(arrays["start_time"]), bool) if target == "chunks" else arrays["start_time"] == 0
    if not usable.any():
        raise DatasetError(f"no chunk of {dataset.path} came from a noise at t = 0. Record with another method.")
    shown = arrays[names[0]][usable]
    return NoiseExamples(
        shown.reshape(len(shown), -1),
        arrays[names[1]][usable][..., : dataset.binding.dim],  # nobody could learn the padding: it is drawn afresh
        arrays["episode"][usable],
        dataset.binding,
        *(arrays[name][usable][..., : dataset.binding.dim] for name in _with_intention(config, chunks_name)),
    )


def _with_intention(config: DSBCConfig, name: str) -> tuple[str, ...]:
    """Return the name of what an intention is learned from, where there is to be one."""
    return () if config.regressor.intention is None else (name,)


def _of_archive(path: Path, config: DSBCConfig, first: int | None) -> NoiseExamples:
    binding = read_binding(path)
    inputs = "features" if config.regressor.inputs == "features" else "observations"
    keys = ("noise", "noise_valid", "normalised_actions", *(("features",) if inputs == "features" else ()))
    dataset = EpisodeDataset.load(path, keys=keys)
    count = dataset.num_episodes if first is None else first
    if not 1 <= count <= dataset.num_episodes:
        raise InvalidInputError(f"the first {count} episodes were asked for; {path} has {dataset.num_episodes}.")
    shown, targets, chunks, episodes = [], [], [], []
    for index in range(count):
        episode = dataset.episode(index)
        starts = np.flatnonzero(episode["noise_valid"])
        shown.append(episode[inputs][starts].reshape(len(starts), math.prod(episode[inputs].shape[1:])))
        if config.regressor.target == "noise":
            targets.append(episode["noise"][starts])
        if config.regressor.target == "action" or config.regressor.intention is not None:
            chunks.append(episode["normalised_actions"][starts[:, None] + np.arange(binding.horizon)])
        episodes.append(np.full(len(starts), index, np.int64))
    return NoiseExamples(
        np.concatenate(shown).astype(np.float32),
        np.concatenate(targets or chunks)[..., : binding.dim].astype(np.float32),
        np.concatenate(episodes),
        binding,
        None if config.regressor.intention is None else np.concatenate(chunks)[..., : binding.dim].astype(np.float32),
    )


def distill(
    paths: Sequence[Path | str],
    out: Path | str,
    config: DSBCConfig | None = None,
    *,
    env: str | None = None,
    first: int | None = None,
    windows: Windows = "auto",
    seed: int = 0,
    device: str = "cpu",
    initial: ChunkRegressor | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ChunkRegressor:
    """Train a noise policy (or BC) on one or several datasets and write it to `out`.

    Raises:
        DatasetError: there is nothing to learn from, for example no successful episode.
        MismatchError: the datasets belong to different policies.
        StorageError: the policy can't be written; what stood at `out` is untouched.
    """
    config = DSBCConfig() if config is None else config
    if not paths:
        raise InvalidInputError("no dataset was named; give at least one.")
    parts = [examples_of(path, config, env=env, first=first, windows=windows) for path in paths]
    examples = join(parts, [str(path) for path in paths])
    regressor = distil(examples, config, seed=seed, device=device, initial=initial, on_progress=on_progress)
    regressor.provenance = {
        "algorithm": "dsbc" if config.regressor.target == "noise" else "bc on the same data",
        "datasets": [Path(path).name for path in paths],
        "env": env,
        "episodes": len(np.unique(examples.episodes)),
        "seed": seed,
        "settings": asdict(config),
        **regressor.provenance,
    }
    regressor.save(out)
    cut, bound = regressor.provenance["cut"], config.regressor.bound
    if bound is not None and cut > MOST_CUT:
        warnings.warn(
            f"{100 * cut:.0f}% of the numbers that are to be learned lie beyond the bound of {bound}, where they are cut off. "
            f"Try a larger one (--regressor.bound {3 * bound:g}), or None.",
            stacklevel=2,
        )
    return regressor
