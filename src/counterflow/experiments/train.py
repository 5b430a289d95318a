"""Training a prior by behaviour cloning: data in, a run folder with a policy out, resumable to the same numbers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from counterflow.checks import COUNT
from counterflow.data import ChunkSampler, EpisodeDataset
from counterflow.data.starts import Weighting
from counterflow.envs import EnvSpec, describe
from counterflow.errors import DatasetError, MismatchError, TrainingError
from counterflow.experiments.evaluate import machine
from counterflow.experiments.run import Run, read_config
from counterflow.learning import BCConfig, BCLearner
from counterflow.policies import (
    ActionSpec,
    FlowPolicy,
    GeneralistPolicy,
    NetworkConfig,
    Normaliser,
    as_device,
    load,
    save,
    save_generalist,
)
from counterflow.random import check_seed, child_seed, generator

VALIDATION_CHUNKS = 16_384
VALIDATION_BATCH = 4_096


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        step: updates done.
        steps: updates in all.
        loss: mean training loss since the last report.
        validation_loss: of the averaged weights on held-out episodes, when last computed.
        seconds: wall-clock time of this session.
    """

    step: int
    steps: int
    loss: float
    validation_loss: float
    seconds: float


@dataclass(frozen=True)
class Cadence:
    """How often something is done in a training.

    Attributes:
        validate: updates between two validation losses.
        checkpoint: updates between two checkpoints.
        report: updates between two reports.

    Raises:
        InvalidInputError: a number is not positive.
    """

    validate: int = 1000
    checkpoint: int = 1000
    report: int = 100

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("validate", "checkpoint", "report"):
            COUNT.check(f"{name}_every", getattr(self, name))


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Attributes:
        path: the policy's file.
        validation_loss: of the policy, on held-out episodes.
        seconds: wall-clock time of the updates in this session, compilation included.
        steps_done: updates in this session: fewer than all after an interruption, 0 if the run was finished.
    """

    path: Path
    validation_loss: float
    seconds: float
    steps_done: int


def train_bc(
    data: Path | str,
    env: str,
    run: Path | str,
    config: BCConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    validate_every: int = 1000,
    checkpoint_every: int = 1000,
    report_every: int = 100,
    on_progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train a prior on a dataset in OGBench's layout; called again after an interruption, go on with the same numbers.

    Args:
        data: the archive; held-out episodes are read from `X-val.npz` beside it, or split off.
        env: an environment, or a family of them, that says what the actions mean, for example "ogbench/cube-single".
        run: the run's folder.
        config: settings of the learning.
        seed: from which initial weights, batches and draws descend.
        device: where to train.
        validate_every: updates between two validation losses.
        checkpoint_every: updates between two checkpoints.
        report_every: updates between two reports.
        on_progress: called at each report.

    Raises:
        DatasetError: the dataset is damaged, or not in the expected layout.
        MismatchError: dataset and environment don't fit.
        TrainingError: the run's folder holds another run, or the loss is not finite any more.
        StorageError: a file can't be written; the last checkpoint is safe.
    """
    config = BCConfig() if config is None else config
    cadence = Cadence(validate_every, checkpoint_every, report_every)
    data, device = Path(data), as_device(device)
    spec = describe(env)
    settings = {"algorithm": "bc", "data": str(data), "env": spec.family, "seed": check_seed(seed), **asdict(config)}
    training, held_out = EpisodeDataset.load_with_validation(data, seed=seed)
    check_dataset(training, spec, data)
    with Run(run, settings) as folder:
        learner = BCLearner(make_policy(training, spec, config, seed).to(device), config, seed)
        provenance = {
            "algorithm": "bc",
            "data": _describe_data(data, training, held_out),
            "seed": seed,
            "settings": asdict(config),
            "precision": learner.precision,
            "machine": machine(),
        }
        return fit(folder, learner, training, held_out, provenance, seed, cadence, on_progress=on_progress)


def fit(
    folder: Run,
    learner: BCLearner,
    training: EpisodeDataset,
    held_out: EpisodeDataset,
    provenance: dict[str, Any],
    seed: int,
    cadence: Cadence,
    *,
    weighting: Weighting = "windows",
    on_progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Run a learner of behaviour cloning to its last update in a run's folder, from the last checkpoint there.

    Args:
        folder: the run, open.
        learner: new; it is restored where the run has a checkpoint.
        training, held_out: what it learns from, and what the validation loss is computed on.
        provenance: what the policy's description is to say of its making.
        seed: from which batches and validation draws descend.
        cadence: how often to validate, report and keep.
        weighting: whether windows or episodes are drawn equally often.
        on_progress: called at each report.

    Raises:
        TrainingError: the loss or the weights are not finite any more.
        StorageError: a file can't be written; the last checkpoint is safe.
    """
    config, device = learner.config, learner.policy.device
    rng = generator(child_seed(seed, "batches"), device)
    state = folder.load_state()
    if state is not None:
        learner.restore(state)  # first: it explains what does not fit, as a state from another kind of device
        rng.set_state(state["batches"])
    first = learner.step
    if first >= config.steps and folder.policy_path.exists():
        finished = load(folder.policy_path)
        return Trained(folder.policy_path, finished.provenance["validation_loss"], 0.0, 0)
    folder.forget_after(first)
    sampler = ChunkSampler(training, config.horizon, device, weighting=weighting)
    validation = list(ChunkSampler(held_out, config.horizon, device).ordered(VALIDATION_BATCH, VALIDATION_CHUNKS))

    def checkpoint(validation_loss: float) -> None:
        _check_weights(learner, folder)
        learner.averaged.provenance = {**provenance, "steps": learner.step, "validation_loss": validation_loss}
        if isinstance(learner.averaged, GeneralistPolicy):
            save_generalist(learner.averaged, folder.policy_path)
        else:
            save(learner.averaged, folder.policy_path)
        folder.save_state({**learner.state(), "batches": rng.get_state()})

    began = time.perf_counter()
    losses: list[torch.Tensor] = []
    validation_loss = learner.validation_loss(validation, seed)
    while learner.step < config.steps:
        losses.append(learner.update(sampler.sample(config.batch_size, rng)))
        step, last = learner.step, learner.step == config.steps
        if step % cadence.validate == 0 or last:
            validation_loss = learner.validation_loss(validation, seed)
            folder.report(step, validation_loss=validation_loss)
        if step % cadence.report == 0 or last:
            loss = float(torch.stack(losses).mean())
            losses.clear()
            _check_finite(loss, step, folder)
            folder.report(step, loss=loss)
            if on_progress is not None:
                seconds = time.perf_counter() - began
                on_progress(Progress(step, config.steps, loss, validation_loss, seconds))
        if step % cadence.checkpoint == 0 or last:
            checkpoint(validation_loss)
    if not folder.policy_path.exists():  # a finished run whose policy was deleted
        checkpoint(validation_loss)
    return Trained(folder.policy_path, validation_loss, time.perf_counter() - began, config.steps - first)


def read_bc_settings(folder: Path | str) -> tuple[Path, str, int, BCConfig]:
    """Read a run's settings: the data's path, the environment, the seed and the learning's settings.

    Raises:
        TrainingError: the folder holds no run of behaviour cloning.
    """
    content = read_config(Path(folder) / "config.yaml")
    try:
        algorithm, data, env, seed = (content.pop(name) for name in ("algorithm", "data", "env", "seed"))
        if algorithm != "bc":
            raise TrainingError(f"{folder} holds a run of {algorithm!r}; expected 'bc'.")
        return Path(data), env, seed, BCConfig(**{**content, "network": NetworkConfig(**content["network"])})
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{folder} holds no complete settings of behaviour cloning: {error}.") from error


def make_policy(dataset: EpisodeDataset, spec: EnvSpec, config: BCConfig, seed: int) -> FlowPolicy:
    """Make an untrained policy for an environment, normalised by a dataset; its weights descend from `seed`."""
    observations = torch.from_numpy(dataset.gather("observations").astype("float32"))
    actions = torch.from_numpy(dataset.gather("actions").astype("float32"))
    action_spec = ActionSpec(
        horizon=config.horizon,
        dim=spec.action_dim,
        low=spec.action_low,
        high=spec.action_high,
        normaliser=Normaliser.fit(actions, config.action_normalisation),
        layout=spec.action_layout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(child_seed(seed, "weights"))
        normaliser = Normaliser.fit(observations, config.observation_normalisation)
        return FlowPolicy(config.network, normaliser, action_spec, spec.family)


def check_dataset(dataset: EpisodeDataset, spec: EnvSpec, path: Path) -> None:
    """Check that a dataset is one of this environment.

    Raises:
        MismatchError: observations or actions have another size.
        DatasetError: actions lie outside the environment's limits.
    """
    expected = (spec.observation_dim,), spec.action_dim
    if (dataset.observation_shape, dataset.action_dim) != expected:
        raise MismatchError(
            f"{path} has observations {dataset.observation_shape} and actions ({dataset.action_dim},); {spec.family} has "
            f"{expected[0]} and ({expected[1]},). Use the environment that the data were collected in."
        )
    actions = dataset.gather("actions")
    if (actions < min(spec.action_low) - 1e-4).any() or (actions > max(spec.action_high) + 1e-4).any():
        raise DatasetError(
            f"{path} has actions from {actions.min():.3g} to {actions.max():.3g}; {spec.family} takes "
            f"{min(spec.action_low):g} to {max(spec.action_high):g}. The data are in other units."
        )


def _check_finite(loss: float, step: int, folder: Run) -> None:
    if not math.isfinite(loss):
        raise _diverged(f"the loss is {loss} at update {step}", folder)


def _check_weights(learner: BCLearner, folder: Run) -> None:
    """Refuse to put weights that are not finite in the place of a sound checkpoint, whatever the last reported loss was."""
    if not all(bool(torch.isfinite(weight).all()) for weight in learner.policy.parameters()):
        raise _diverged(f"weights are not finite after update {learner.step}", folder)


def _diverged(what: str, folder: Run) -> TrainingError:
    return TrainingError(
        f"{what}. The last checkpoint in {folder.checkpoints} is safe; lower the learning rate "
        "or clip gradients, in a new run."
    )


def _describe_data(path: Path, training: EpisodeDataset, held_out: EpisodeDataset) -> dict[str, Any]:
    """Say what the data are: the recipe, where one lies beside them, and how much there is."""
    beside = path.with_suffix(".json")
    try:
        recipe = json.loads(beside.read_text())
    except (OSError, ValueError):
        recipe = None
    return {
        "file": path.name,
        "episodes": training.num_episodes,
        "transitions": training.num_steps,
        "held_out_episodes": held_out.num_episodes,
        "made_by": recipe,
    }
