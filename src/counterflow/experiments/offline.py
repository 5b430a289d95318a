"""Offline RL as a run: transitions in, policies and critics of every seed out, evaluated on the way, resumable.

    runs/<name>/config.yaml, metrics.jsonl, events.*     as every run
    runs/<name>/checkpoints/state.safetensors            all seeds, to go on from
    runs/<name>/seed-<n>/checkpoints/policy.safetensors  what acts: a `FlowPolicy`, which can be steered like any other
    runs/<name>/seed-<n>/checkpoints/critic.safetensors  what guides it or ranks its samples
    runs/<name>/evaluations/                             weights that wait for their evaluation; empty when a run has finished
    runs/<name>/diverged.json                            of a run whose loss became infinite: the update, and its batch's rows

Evaluation goes on in a process of its own while the training continues; its numbers are reported when they are there.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from counterflow.checks import check_numbers
from counterflow.data import ACTOR_GOALS, VALUE_GOALS, GoalSampler, SliceStream, TransitionDataset, WindowSampler
from counterflow.data.starts import Weighting
from counterflow.data.transitions import Chunks, Windows
from counterflow.envs import EnvSpec, describe, make_env
from counterflow.errors import InvalidInputError, MismatchError, TrainingError, UnknownNameError
from counterflow.experiments.evaluate import check_episodes, evaluate, machine
from counterflow.experiments.offline_data import load_transitions
from counterflow.experiments.run import Run, read_config
from counterflow.files import write_json
from counterflow.learning.fql import FQLConfig, FQLLearner
from counterflow.learning.ifql import IFQLConfig, IFQLLearner
from counterflow.learning.offline import BLOCK, OfflineConfig, OfflineLearner, Sizes
from counterflow.learning.qgf import QGFConfig, QGFLearner
from counterflow.learning.rql import RQLConfig, RQLLearner
from counterflow.policies import ActionSpec, FlowPolicy, Normaliser, as_device, save
from counterflow.policies.checkpoint import load
from counterflow.random import child_seed
from counterflow.steering import ChunkCritic, CriticBinding, CriticConfig, GuidanceSettings, MethodSettings

Algorithm = Literal["rql", "qgf", "fql", "ifql"]
LEARNERS: dict[str, type[OfflineLearner[Any, Any]]] = {
    "rql": RQLLearner,
    "qgf": QGFLearner,
    "fql": FQLLearner,
    "ifql": IFQLLearner,
}
EVALUATED_AT_ONCE = 4  # environments; each takes some 200 MB beside the training
CONFIGS: dict[str, type[OfflineConfig]] = {"rql": RQLConfig, "qgf": QGFConfig, "fql": FQLConfig, "ifql": IFQLConfig}


@dataclass(frozen=True)
class OfflineRun:
    """Settings of a run beside those of the algorithm.

    Attributes:
        steps: updates in all.
        sparse: rewards are -1 until everything is done, instead of minus how much is left to do.
        evaluate_every: updates between two evaluations; 0: none but at the end.
        episodes: of an evaluation, each seed; 0: no evaluation at all.
        checkpoint_every: updates between two checkpoints.
        report_every: updates between two reports.
        slice_every: updates for which a slice is used, where the data are a folder of slices.

    Raises:
        InvalidInputError: a number is out of range.
    """

    steps: int = 1_000_000
    sparse: bool = False
    evaluate_every: int = 100_000
    episodes: int = 50
    checkpoint_every: int = 10_000
    report_every: int = 1_000
    slice_every: int = 1_000

    def __post_init__(self) -> None:
        """Check every setting."""
        check_numbers(self, or_zero=("evaluate_every", "episodes"))
        if self.slice_every % BLOCK:
            raise InvalidInputError(
                f"slice_every is {self.slice_every}; expected a multiple of {BLOCK}, the updates that are drawn together."
            )


@dataclass(frozen=True)
class Acting:
    """How an algorithm's policy acts, as `evaluate` takes it.

    Attributes:
        method: how the policy is steered.
        settings: the method's: the denoising steps are those that it was trained for.
        guidance: how its critic takes part; None: it doesn't.
    """

    method: str
    settings: MethodSettings
    guidance: GuidanceSettings | None = None


def acting_of(config: OfflineConfig) -> Acting:
    """Return how the policy acts that was trained with these settings."""
    settings = MethodSettings(steps=config.flow_steps)
    if isinstance(config, QGFConfig):
        return Acting("qgf", settings, GuidanceSettings(aggregation=config.aggregation))
    if isinstance(config, IFQLConfig):
        return Acting("qgf", settings, GuidanceSettings(weight=0.0, best_of=config.candidates))
    return Acting("base", settings)


@dataclass(frozen=True)
class OfflineProgress:
    """How far a run is.

    Attributes:
        step: updates done.
        steps: updates in all.
        numbers: means over seeds of what the learner reports, since the last report.
        success: rates of the last evaluation that has finished, seed by seed; empty before.
        seconds: wall-clock time of this session.
    """

    step: int
    steps: int
    numbers: dict[str, float]
    success: dict[int, float]
    seconds: float


@dataclass(frozen=True)
class OfflineTrained:
    """What came of a run.

    Attributes:
        folders: for each seed the folder that `counterflow.load` takes.
        success: for each seed the success rate at the end (empty without evaluation).
        seconds: wall-clock time of this session.
        steps_done: updates in this session.
    """

    folders: dict[int, Path]
    success: dict[int, float]
    seconds: float
    steps_done: int


def train_offline(
    algorithm: str,
    data: Path | str,
    env: str,
    run: Path | str,
    config: OfflineConfig | None = None,
    settings: OfflineRun | None = None,
    *,
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
    on_progress: Callable[[OfflineProgress], None] | None = None,
) -> OfflineTrained:
    """Train an offline algorithm on one task; called again after an interruption, go on with the same numbers.

    Args:
        algorithm: "rql", "qgf", "fql" or "ifql".
        data: an archive in OGBench's layout with rewards, or with what the task's rewards are made from (qpos); or a folder of
            such archives (slices of a dataset larger than memory), each used for `settings.slice_every` updates.
        env: the task. For a goal-conditioned one goals are drawn from the data in hindsight.
        run: the run's folder.
        config: settings of the algorithm; None: its official defaults.
        settings: of the run.
        seeds: trained side by side, as a batch dimension.
        device: where to train.
        on_progress: called at each report.

    Raises:
        DatasetError, MismatchError: the data are damaged, or not this environment's, or shorter than a chunk.
        TrainingError: the folder holds another run, or a loss is not finite any more.
        StorageError: a file can't be written; the last checkpoint is safe.
        UnknownNameError: no such algorithm or environment.
    """
    if algorithm not in LEARNERS:
        raise UnknownNameError("offline algorithm", algorithm, LEARNERS)
    config = CONFIGS[algorithm]() if config is None else config
    if not isinstance(config, CONFIGS[algorithm]):
        raise InvalidInputError(
            f"{algorithm} was given {type(config).__name__}; expected {CONFIGS[algorithm].__name__}."
        )
    settings = OfflineRun() if settings is None else settings
    data, device, spec = Path(data), as_device(device), describe(env)
    if spec.goal_dim and LEARNERS[algorithm].batch_kind != "chunks":
        raise MismatchError(
            f"{algorithm} learns from windows of rewards, and {spec.name} has goals, drawn in hindsight. Use qgf, fql or ifql."
        )
    content = {
        "algorithm": algorithm,
        "data": str(data),
        "env": spec.name,
        "seeds": list(seeds),
        "run": asdict(settings),
        **asdict(config),
    }
    with (  # the data first: a run whose data can't be right leaves no folder
        _Source(data, spec, config, settings, LEARNERS[algorithm].batch_kind, device) as source,
        Run(run, content) as folder,
    ):
        return _Training(algorithm, source, spec, folder, config, settings, seeds, device).go(on_progress)


class _Source:
    """Where batches come from: one archive, or slices in turn; windows, chunks, or chunks with goals."""

    def __init__(
        self,
        data: Path,
        spec: EnvSpec,
        config: OfflineConfig,
        settings: OfflineRun,
        kind: str,
        device: torch.device,
    ) -> None:
        self._spec, self._config, self._settings, self._kind, self._device = spec, config, settings, kind, device
        self._data = data
        self._stream = SliceStream(data, self._load, settings.slice_every) if data.is_dir() else None
        self._sampler = self._load(data) if self._stream is None else self._stream.at(0)
        self.description = {"file": data.name, "transitions": self._count}

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    @property
    def file(self) -> str:
        """The archive whose rows are drawn."""
        return str(self._data if self._stream is None else self._stream.path)

    def turn_to(self, update: int) -> None:
        """Take the slice for the updates from `update` on."""
        if self._stream is not None:
            del self._sampler  # or three slices would be in memory while one is loaded
            self._sampler = self._stream.at(update)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw windows (count, ...): their starts, and goals of critic and policy where there are goals."""
        starts = self._sampler.draw(count, rng)
        if not isinstance(self._sampler, GoalSampler):
            return starts
        goals = [self._sampler.goals(starts, shares, rng) for shares in (VALUE_GOALS, ACTOR_GOALS)]
        return torch.stack([starts, *goals], -1)

    def batch(self, drawn: Tensor) -> Windows | Chunks:
        """Gather what was drawn."""
        if isinstance(self._sampler, GoalSampler):
            starts, judged, wanted = drawn.unbind(-1)
            own = self._sampler.chunks(starts, wanted).observations
            return replace(self._sampler.chunks(starts, judged), policy_observations=own)
        if self._kind == "windows":
            return self._sampler.windows(drawn)
        return self._sampler.chunks(drawn, self._config.discount)

    def _load(self, path: Path) -> WindowSampler | GoalSampler:
        dataset: TransitionDataset = load_transitions(path, self._spec.name, sparse=self._settings.sparse)
        self._count = dataset.num_transitions
        if self._spec.goal_dim:
            return GoalSampler(dataset, self._config.horizon, self._device, discount=self._config.discount)
        weighting: Weighting = "episodes" if self._kind == "windows" else "windows"
        return WindowSampler(dataset, self._config.horizon, self._device, weighting)


class _Training:
    """One run while it lasts."""

    def __init__(
        self,
        algorithm: str,
        source: _Source,
        spec: EnvSpec,
        folder: Run,
        config: OfflineConfig,
        settings: OfflineRun,
        seeds: Sequence[int],
        device: torch.device,
    ) -> None:
        self.algorithm, self.spec, self.folder, self.config, self.settings = algorithm, spec, folder, config, settings
        sizes = Sizes(spec.observation_dim, spec.action_dim, config.horizon)
        self.learner = LEARNERS[algorithm](sizes, config, seeds, device)
        self.source = source
        self.provenance = {
            "algorithm": algorithm,
            "env": spec.name,
            "data": source.description,
            "settings": asdict(config),
            "run": asdict(settings),
            "precision": self.learner.precision,
            "machine": machine(),
        }

    def go(self, on_progress: Callable[[OfflineProgress], None] | None) -> OfflineTrained:
        learner, settings, folder = self.learner, self.settings, self.folder
        state = folder.load_state()
        if state is not None:
            learner.restore(state)
        first, began = learner.step, time.perf_counter()
        folder.forget_after(first)
        with Evaluations(
            folder, self.spec.name, acting_of(self.config), settings.episodes, on_rates=self._report_rates
        ) as judge:
            reported: list[dict[str, Tensor]] = []
            while learner.step < settings.steps:
                self.source.turn_to(learner.step)
                starts = learner.block(self.source.draw)[: settings.steps - learner.step]
                losses: list[Tensor] = []
                begin = learner.step
                for row in starts:
                    numbers = learner.update(self.source.batch(row))
                    losses.append(numbers["loss"])
                    reported.append(numbers)
                    step, last = learner.step, learner.step == settings.steps
                    if step % settings.report_every == 0 or last:
                        means = _means(reported)
                        reported.clear()
                        folder.report(step, **means)
                        judge.collect()
                        if on_progress is not None:
                            seconds = time.perf_counter() - began
                            on_progress(OfflineProgress(step, settings.steps, means, dict(judge.success), seconds))
                    due = settings.evaluate_every and step % settings.evaluate_every == 0
                    saving = step % settings.checkpoint_every == 0 or last
                    if due or saving:
                        self._check(losses, starts, begin)
                    if saving:
                        self._checkpoint()
                    if settings.episodes and (due or last):
                        for index, seed in enumerate(learner.seeds):
                            self._export(index, judge.place(step, seed))
                        judge.submit()
                self._check(losses, starts, begin)
            if not all((one / "policy.safetensors").exists() for one in self._places().values()):
                self._checkpoint()  # a finished run whose policies were deleted
            judge.wait()
            folders = {seed: place.parent for seed, place in self._places().items()}
            return OfflineTrained(folders, dict(judge.success), time.perf_counter() - began, settings.steps - first)

    def _places(self) -> dict[int, Path]:
        return {seed: self.folder.folder / f"seed-{seed}" / "checkpoints" for seed in self.learner.seeds}

    def _checkpoint(self) -> None:
        """Keep the state and every seed's policy and critic."""
        if not self.learner.finite():
            raise self._diverged(f"weights are not finite after update {self.learner.step}")
        for index, place in enumerate(self._places().values()):
            self._export(index, place)
        self.folder.save_state(self.learner.state())

    def _export(self, index: int, place: Path) -> None:
        """Write what acts and what judges of one seed."""
        learner, spec = self.learner, self.spec
        provenance = {**self.provenance, "seed": learner.seeds[index], "steps": learner.step}
        place.mkdir(parents=True, exist_ok=True)
        field, critic = learner.field(), learner.critic()
        action_spec = ActionSpec(
            self.config.horizon, spec.action_dim, spec.action_low, spec.action_high, layout=spec.action_layout
        )
        nothing = Normaliser(torch.zeros(spec.observation_dim), torch.ones(spec.observation_dim), "none")
        policy = FlowPolicy(field.network, nothing, action_spec, spec.family)
        policy.network.get_submodule("stack").load_state_dict(field.stack.part(index, 1).state_dict())
        policy.provenance = provenance
        if critic is not None:
            members = critic.stack.count // len(learner.seeds)
            stack = critic.stack.part(index * members, members).folded(critic.constants).cpu()
            judge = ChunkCritic(
                CriticConfig("observation", members, self.config.width, self.config.depth, stack.norm),
                CriticBinding("", spec.family, self.config.horizon, spec.action_dim),
                nothing,
                stack,
            )
            judge.provenance = provenance
            judge.save(place / "critic.safetensors")
        save(policy, place / "policy.safetensors")

    def _check(self, losses: Sequence[Tensor], starts: Tensor, begin: int) -> None:
        """Stop at the first loss that is not finite, and say where it came from: the whole batch in `diverged.json`."""
        sound = torch.isfinite(torch.stack(list(losses)))  # (U, S)
        if bool(sound.all()):
            return
        update, seed = (int(value) for value in (~sound).nonzero()[0])
        rows = starts[update, seed].tolist()
        listing = ", ".join(str(row) for row in rows[:8])
        value, step, path = float(losses[update][seed]), begin + update + 1, self.folder.folder / "diverged.json"
        where = {"update": step, "seed": self.learner.seeds[seed], "loss": str(value), "rows": rows}
        write_json(path, where | {"data": self.source.file})
        raise self._diverged(
            f"the loss of seed {self.learner.seeds[seed]} is {value} at update {step}, whose windows begin at rows "
            f"{listing}{', ...' if len(rows) > 8 else ''} of {self.source.file} (all of them in {path})"
        )

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what}. The last checkpoint in {self.folder.checkpoints} is safe; look at those rows, or lower the learning "
            "rate in a new run."
        )

    def _report_rates(self, step: int, rates: dict[int, float]) -> None:
        self.folder.report(step, **{f"success/seed-{seed}": rate for seed, rate in rates.items()})


def _means(reported: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Return means over updates and seeds, in one wait for the device."""
    names = list(reported[0])
    table = torch.stack([torch.stack([one[name].float().mean() for name in names]) for one in reported]).mean(0)
    return dict(zip(names, table.tolist(), strict=True))


class Evaluations:
    """Evaluates weights in a process of its own, one lot after the other, while the training goes on.

    What waits is on disk (`evaluations/<step>-seed-<n>/`), so that a run that was killed evaluates it when it goes on.

    Args:
        folder: the run.
        env: the task.
        acting: how the policy acts.
        episodes: of each evaluation; 0: nothing is ever evaluated.
        on_rates: called with a step and the rates that became known, seed by seed.
    """

    def __init__(
        self,
        folder: Run,
        env: str,
        acting: Acting,
        episodes: int,
        on_rates: Callable[[int, dict[int, float]], None],
    ) -> None:
        self._root, self._env, self._acting = folder.folder / "evaluations", env, acting
        self._episodes, self._on_rates = episodes, on_rates
        self._pool: ProcessPoolExecutor | None = None
        self._pending: dict[Path, Future[float]] = {}
        self._steps: dict[int, int] = {}
        self.success: dict[int, float] = {}
        for line in folder.metrics():
            for name, value in line.items():
                if name.startswith("success/seed-"):
                    self.success[int(name.rsplit("-", 1)[1])] = value

    def __enter__(self) -> Evaluations:
        """Take up what a killed run left."""
        if self._episodes:
            check_episodes(self._episodes)
            self.submit()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop evaluating; what has not been done stays on disk."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def place(self, step: int, seed: int) -> Path:
        """Return the folder in which the weights of a seed after `step` updates wait."""
        return self._root / f"{step:09d}-seed-{seed}"

    def submit(self) -> None:
        """Have everything evaluated that waits."""
        for place in sorted(self._root.glob("*-seed-*")):
            if place in self._pending or not (place / "policy.safetensors").exists():
                continue
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=leave_with, initargs=(os.getpid(),))
            arguments = (self._env, self._acting, str(place), self._episodes)
            self._pending[place] = self._pool.submit(success_of, *arguments)

    def collect(self) -> None:
        """Report what is finished; what can't be evaluated is left out with a warning, for the training is worth more."""
        for place, future in list(self._pending.items()):
            if future.done():
                step, seed = (int(part) for part in place.name.split("-seed-"))
                try:
                    self.success[seed] = future.result()
                except InvalidInputError as error:  # of a critic, for example, that does not depend on the chunk
                    self.success.pop(seed, None)  # the last known rate is of other weights
                    warnings.warn(f"seed {seed} was not evaluated after {step} updates: {error}", stacklevel=2)
                else:
                    self._on_rates(step, {seed: self.success[seed]})
                del self._pending[place]
                shutil.rmtree(place)

    def wait(self) -> None:
        """Wait for all that is being evaluated, and report it."""
        wait(self._pending.values())
        self.collect()


def leave_with(parent: int) -> None:
    """Have this process end soon after its parent did, however that came about: a pool's worker would wait for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def success_of(env: str, acting: Acting, place: str, episodes: int) -> float:
    """Return the success rate of the policy in `place`; runs in a process of its own."""
    torch.set_num_threads(1)
    policy = load(Path(place) / "policy.safetensors")
    critic = None if acting.guidance is None else ChunkCritic.load(Path(place) / "critic.safetensors")
    # Seeds of the evaluations on the way differ from those of results: a choice made by these must not colour them.
    seed = child_seed(0, "validation")
    with make_env(env, min(episodes, EVALUATED_AT_ONCE), workers=0) as vector:
        found = evaluate(
            vector,
            policy,
            acting.method,
            episodes,
            seed,
            settings=acting.settings,
            critic=critic,
            guidance=acting.guidance,
        )
    return found.rate.rate


def read_offline_settings(
    folder: Path | str,
) -> tuple[str, Path, str, list[int], OfflineConfig, OfflineRun]:
    """Read a run's settings: algorithm, data, environment, seeds, and the settings of both kinds.

    Raises:
        TrainingError: the folder holds no run of an offline algorithm.
    """
    content = read_config(Path(folder) / "config.yaml")
    try:
        algorithm, data, env, seeds, run = (content.pop(name) for name in ("algorithm", "data", "env", "seeds", "run"))
        return algorithm, Path(data), env, list(seeds), CONFIGS[algorithm](**content), OfflineRun(**run)
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{folder} holds no complete settings of an offline algorithm: {error}.") from error
