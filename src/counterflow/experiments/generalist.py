"""Training a generalist: demonstrations of many tasks in, a run folder with one policy out, resumable to the same numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from counterflow.data import EpisodeDataset
from counterflow.envs import EnvSpec, describe, expand_tasks, family_of
from counterflow.errors import DatasetError, MismatchError, TrainingError
from counterflow.experiments.demonstrate import archive_of
from counterflow.experiments.evaluate import machine
from counterflow.experiments.run import Run, read_config
from counterflow.experiments.train import Cadence, Progress, Trained, check_dataset, fit
from counterflow.learning import BCConfig, BCLearner
from counterflow.policies import (
    ActionSpec,
    GeneralistConfig,
    GeneralistPolicy,
    NetworkConfig,
    Normaliser,
    TaskDescription,
    as_device,
)
from counterflow.policies.generalist import fit_normalisers, pack
from counterflow.random import check_seed, child_seed

HELD_OUT_EPISODES = 0.05  # of each task, for the validation loss

TRAINING = BCConfig(horizon=8, steps=60_000, batch_size=256, learning_rate=5e-4, gradient_norm=1.0, weight_decay=1e-4)
"""Settings for two cores."""


@dataclass(frozen=True)
class TaskData:
    """What a generalist learns from.

    Attributes:
        tasks: full names of the tasks, in the order of their numbers.
        descriptions: their sentences and layouts, in the same order.
        specs: their environments' descriptions.
        training: packed episodes of all.
        held_out: a few more, for the validation loss.
        digests: of each task's archive.
        missing: tasks that were asked for, and have no archive.
    """

    tasks: list[str]
    descriptions: list[TaskDescription]
    specs: list[EnvSpec]
    training: EpisodeDataset
    held_out: EpisodeDataset
    digests: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def load_tasks(folder: Path | str, names: Sequence[str], seed: int = 0) -> TaskData:
    """Read the demonstrations of many tasks and pack them into one dataset.

    Args:
        folder: what `demonstrate_tasks` wrote.
        names: tasks, groups, or families. Tasks without an archive are left out, and said to be.
        seed: decides which episodes are held out.

    Raises:
        DatasetError: there is no archive at all, or one is damaged.
        MismatchError: the tasks are of several families, or of one without observation layouts, or an archive is of another task.
        UnknownNameError: no such task.
    """
    asked = expand_tasks(names)
    if len({*map(family_of, asked)}) != 1:
        raise MismatchError(
            f"tasks of {', '.join(sorted({*map(family_of, asked)}))} were given; expected one family. Train a generalist for "
            "each."
        )
    tasks = [task for task in asked if archive_of(folder, task).exists()]
    if not tasks:
        raise DatasetError(
            f"{folder} holds no demonstrations of {', '.join(names)}; expected files like {archive_of(folder, asked[0]).name}. "
            f"Make them: counterflow demonstrate {names[0]} --out {folder}"
        )
    specs = [describe(task) for task in tasks]
    descriptions = []
    for spec in specs:
        if spec.observation_layout is None:
            raise MismatchError(
                f"{spec.name} does not say which numbers of its observations tell of which object, and a generalist has to know. "
                "Use tasks of metaworld or libero."
            )
        descriptions.append(TaskDescription(spec.task, spec.observation_layout))
    room = max(len(one.layout.objects) for one in descriptions)
    parts: dict[bool, list[dict[str, np.ndarray[Any, Any]]]] = {False: [], True: []}
    digests = {}
    for number, (task, spec, description) in enumerate(zip(tasks, specs, descriptions, strict=True)):
        path = archive_of(folder, task)
        dataset = EpisodeDataset.load(path)
        check_dataset(dataset, spec, path)
        digests[task] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        kept, held = (
            (dataset, None) if dataset.num_episodes < 2 else dataset.split(HELD_OUT_EPISODES, child_seed(seed, task))
        )
        for is_held, one in ((False, kept), (True, held)):
            for index in range(0 if one is None else one.num_episodes):
                episode = one.episode(index)  # type: ignore[union-attr]
                observations = pack(episode["observations"], number, description.layout, room)
                parts[is_held].append({"observations": observations, "actions": episode["actions"]})
    training = EpisodeDataset.from_episodes(parts[False])
    held_out = EpisodeDataset.from_episodes(parts[True]) if parts[True] else training
    return TaskData(tasks, descriptions, specs, training, held_out, digests, [one for one in asked if one not in tasks])


def make_generalist(data: TaskData, architecture: GeneralistConfig, config: BCConfig, seed: int) -> GeneralistPolicy:
    """Make an untrained generalist, normalised by what it will learn from; its weights descend from `seed`."""
    packed = data.training.gather("observations")
    actions = torch.from_numpy(data.training.gather("actions").astype("float32"))
    spec = data.specs[0]
    action_spec = ActionSpec(
        horizon=config.horizon,
        dim=spec.action_dim,
        low=spec.action_low,
        high=spec.action_high,
        normaliser=Normaliser.fit(actions, config.action_normalisation),
        layout=spec.action_layout,
    )
    robot, objects = fit_normalisers(packed, data.descriptions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(child_seed(seed, "weights"))
        policy = GeneralistPolicy(architecture, robot, objects, action_spec, spec.family)
    return policy.for_tasks(data.descriptions)


def train_generalist(
    folder: Path | str,
    names: Sequence[str],
    run: Path | str,
    architecture: GeneralistConfig | None = None,
    config: BCConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cadence: Cadence | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train a generalist on demonstrations of many tasks; called again after an interruption, go on with the same numbers.

    Every episode is drawn equally often, so that tasks of short episodes count as much as those of long ones.

    Args:
        folder: what `demonstrate_tasks` wrote.
        names: tasks, groups, or families to train on, for example ["metaworld/ml45-train"].
        run: the run's folder.
        architecture: of the policy.
        config: settings of the learning; its `network` and `observation_normalisation` are not used.
        seed: from which initial weights, batches and draws descend.
        device: where to train.
        cadence: how often to validate, report and keep.
        on_progress: called at each report.

    Raises:
        DatasetError, MismatchError, UnknownNameError: as for `load_tasks`.
        TrainingError: the run's folder holds another run, or the loss is not finite any more.
        StorageError: a file can't be written; the last checkpoint is safe.
    """
    architecture = GeneralistConfig() if architecture is None else architecture
    config, device = TRAINING if config is None else config, as_device(device)
    data = load_tasks(folder, names, seed)
    settings = {
        "algorithm": "generalist",
        "data": str(folder),
        "tasks": list(names),
        "seed": check_seed(seed),
        "architecture": asdict(architecture),
        "archives": data.digests,  # with others these were other normalisers, under weights that came of the old ones
        **asdict(config),
    }
    begun = Path(run) / "config.yaml"
    if begun.exists() and "archives" not in read_config(begun):
        settings.pop("archives")  # begun before they were noted
    with Run(run, settings) as opened:
        learner = BCLearner(make_generalist(data, architecture, config, seed).to(device), config, seed)
        provenance = {
            "algorithm": "generalist",
            "tasks": data.tasks,
            "without_demonstrations": data.missing,
            "archives": data.digests,
            "episodes": data.training.num_episodes,
            "transitions": data.training.num_steps,
            "seed": seed,
            "settings": asdict(config),
            "precision": learner.precision,
            "machine": machine(),
        }
        return fit(
            opened,
            learner,
            data.training,
            data.held_out,
            provenance,
            seed,
            Cadence() if cadence is None else cadence,
            weighting="episodes",
            on_progress=on_progress,
        )


def read_generalist_settings(folder: Path | str) -> tuple[Path, list[str], int, GeneralistConfig, BCConfig]:
    """Read a run's settings: the data's folder, the tasks, the seed, the architecture and the learning's settings.

    Raises:
        TrainingError: the folder holds no run of a generalist.
    """
    content = read_config(Path(folder) / "config.yaml")
    content.pop("archives", None)
    try:
        algorithm, data, tasks, seed, architecture = (
            content.pop(name) for name in ("algorithm", "data", "tasks", "seed", "architecture")
        )
        if algorithm != "generalist":
            raise TrainingError(f"{folder} holds a run of {algorithm!r}; expected 'generalist'.")
        network = NetworkConfig(**content.pop("network"))
        return Path(data), tasks, seed, GeneralistConfig(**architecture), replace(BCConfig(**content), network=network)
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{folder} holds no complete settings of a generalist: {error}.") from error
