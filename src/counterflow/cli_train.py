"""Train: a prior, an offline RL algorithm, a noise policy; or go on with a run that was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from counterflow.envs import family_of
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.experiments.distill import Windows, distill
from counterflow.experiments.offline import (
    OfflineProgress,
    OfflineRun,
    read_offline_settings,
    train_offline,
)
from counterflow.experiments.presets import PresetName, preset
from counterflow.experiments.progress import progress_bar
from counterflow.experiments.run import read_config
from counterflow.experiments.train import Progress, read_bc_settings, train_bc
from counterflow.learning import BCConfig, DSBCConfig
from counterflow.learning.dsbc import Progress as DistillationProgress
from counterflow.learning.offline import OfflineConfig
from counterflow.policies.described import weights_path


@dataclass(frozen=True)
class TrainBC:
    """Train a prior by flow-matching behaviour cloning. Run it again after an interruption."""

    data: tyro.conf.Positional[Path]
    """A dataset (.npz) in OGBench's layout; held-out episodes are read from NAME-val.npz beside it."""
    env: str
    """The environment, or family, that the data are from, for example ogbench/cube-single."""
    out: Path | None = None
    """The run's folder; default: runs/bc-<family>-<seed>."""
    seed: int = 0
    """What weights, batches and draws descend from."""
    device: str = "cpu"
    """Where to train, for example cuda."""
    config: Annotated[BCConfig, tyro.conf.arg(name="")] = field(default_factory=BCConfig)
    """Settings of the learning."""

    def run(self, console: Console) -> None:
        """Train, with progress."""
        out = self.out or Path("runs") / f"bc-{self.env.split('/')[-1]}-{self.seed}"
        _train(console, self.data, self.env, out, self.config, self.seed, self.device)


@dataclass(frozen=True)
class OfflineOptions:
    """What the offline algorithms share."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/cube-single-task1."""
    preset: PresetName = "small"
    """small: for two cores; paper: the official settings of this environment."""
    data: Path | None = None
    """A dataset (.npz) in OGBench's layout, official or collected; default: data/<family>-play.npz."""
    out: Path | None = None
    """The run's folder; default: runs/<algorithm>-<task>-<preset>."""
    seed: int = 0
    """The first seed; weights, batches and draws descend from it."""
    seeds: int = 1
    """How many seeds to train side by side: seed, seed + 1, ..."""
    steps: int | None = None
    """Updates in all; default: the preset's."""
    sparse: bool | None = None
    """Rewards are -1 until everything is done; default: as the official runs of this environment have it."""
    evaluate_every: int | None = None
    """Updates between two evaluations; 0: none but at the end; default: the preset's."""
    episodes: int | None = None
    """Of an evaluation, each seed; 0: no evaluation; default: the preset's."""
    set: tuple[str, ...] = ()
    """Settings of the algorithm to change, each NAME=VALUE, for example alpha=3 precision=bfloat16."""
    device: str = "cpu"
    """Where to train, for example cuda."""

    def train(self, console: Console, algorithm: str) -> None:
        """Train, with progress."""
        config, settings = preset(algorithm, self.env, self.preset)
        given = {name: getattr(self, name) for name in ("steps", "sparse", "evaluate_every", "episodes")}
        settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
        data = self.data or Path("data") / f"{family_of(self.env).split('/')[-1]}-play.npz"
        out = self.out or Path("runs") / f"{algorithm}-{self.env.split('/')[-1]}-{self.preset}"
        seeds = range(self.seed, self.seed + self.seeds)
        _train_offline(console, algorithm, data, self.env, out, changed(config, self.set), settings, seeds, self.device)


@dataclass(frozen=True)
class TrainRQL(OfflineOptions):
    """Offline RL over flow steps (RQL)."""

    def run(self, console: Console) -> None:
        """Train."""
        self.train(console, "rql")


@dataclass(frozen=True)
class TrainQGF(OfflineOptions):
    """A flow policy and critics that guide it at test time (QGF)."""

    def run(self, console: Console) -> None:
        """Train."""
        self.train(console, "qgf")


@dataclass(frozen=True)
class TrainFQL(OfflineOptions):
    """Flow Q-learning: a one-step policy distilled from a flow (FQL)."""

    def run(self, console: Console) -> None:
        """Train."""
        self.train(console, "fql")


@dataclass(frozen=True)
class TrainIFQL(OfflineOptions):
    """A flow policy whose best samples are kept by IQL's critics (IFQL)."""

    def run(self, console: Console) -> None:
        """Train."""
        self.train(console, "ifql")


@dataclass(frozen=True)
class TrainResume:
    """Go on with a run from its own config.yaml (or repeat it in another folder)."""

    run_folder: tyro.conf.Positional[Path]
    """The run's folder."""
    out: Path | None = None
    """Another folder, to repeat the run from the beginning; default: go on in the same."""
    device: str = "cpu"
    """Where to train, for example cuda."""

    def run(self, console: Console) -> None:
        """Train, with progress."""
        if read_config(self.run_folder / "config.yaml").get("algorithm") != "bc":
            algorithm, data, env, seeds, offline, settings = read_offline_settings(self.run_folder)
            out = self.out or self.run_folder
            _train_offline(console, algorithm, data, env, out, offline, settings, seeds, self.device)
            return
        data, env, seed, config = read_bc_settings(self.run_folder)
        _train(console, data, env, self.out or self.run_folder, config, seed, self.device)


@dataclass(frozen=True)
class Distill:
    """Distil recorded successes, or inverted demonstrations, into a small noise policy (DSBC)."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of 'counterflow record', archives of 'counterflow invert', or datasets of 'counterflow lerobot augment'."""
    out: Path
    """Where to write the noise policy (.safetensors, and .json beside it)."""
    env: str | None = None
    """Of recorded data, use this task's episodes alone; default: all."""
    first: int | None = None
    """Use the first so many successful episodes (of every task); default: all."""
    windows: Windows = "auto"
    """Of recorded data: the chunks that were decided on (decisions), or what was executed from every step on (steps)."""
    seed: int = 0
    """What weights, held-out episodes and draws descend from."""
    device: str = "cpu"
    """Where to train."""
    config: Annotated[DSBCConfig, tyro.conf.arg(name="")] = field(default_factory=DSBCConfig)
    """Settings of the learning; --regressor.target action gives the baseline BC."""

    def run(self, console: Console) -> None:
        """Distil, with progress."""
        with progress_bar(console, "distilling", self.config.steps, "updates") as update:

            def show(progress: DistillationProgress) -> None:
                update(progress.step, f"loss {progress.loss:.3f}, held-out {progress.held_out_loss:.3f}")

            regressor = distill(
                self.data,
                self.out,
                self.config,
                env=self.env,
                first=self.first,
                windows=self.windows,
                seed=self.seed,
                device=self.device,
                on_progress=show,
            )
        made = regressor.provenance
        steer = "dsbc" if self.config.regressor.target == "noise" else "bc"
        console.print(
            f"{made['examples']:,} examples of {made['episodes']} episodes, {made['updates']} updates\n"
            f"  {weights_path(self.out)}\n"
            f"next: counterflow eval {self.env or 'TASK'} --steer {steer} --noise-policy {weights_path(self.out)}",
            soft_wrap=True,  # a command to copy stays in one line
        )


TrainCommand = (
    Annotated[TrainBC, tyro.conf.subcommand("bc")]
    | Annotated[TrainRQL, tyro.conf.subcommand("rql")]
    | Annotated[TrainQGF, tyro.conf.subcommand("qgf")]
    | Annotated[TrainFQL, tyro.conf.subcommand("fql")]
    | Annotated[TrainIFQL, tyro.conf.subcommand("ifql")]
    | Annotated[TrainResume, tyro.conf.subcommand("resume")]
)


def changed(config: OfflineConfig, settings: Sequence[str]) -> OfflineConfig:
    """Return the settings with some of them changed, each given as NAME=VALUE.

    Raises:
        InvalidInputError: one is not written so, or its value is not of the setting's kind.
        UnknownNameError: no such setting.
    """
    values: dict[str, Any] = {}
    for one in settings:
        name, equals, text = one.partition("=")
        if not equals:
            raise InvalidInputError(f"a setting was given as {one!r}; expected NAME=VALUE, for example alpha=3.")
        if name not in {field.name for field in fields(config)}:
            raise UnknownNameError("setting", name, [field.name for field in fields(config)])
        kind = type(getattr(config, name))
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise InvalidInputError(f"the setting {name} was given as {text!r}; expected a {kind.__name__}.") from None
    return replace(config, **values)


def _train_offline(
    console: Console,
    algorithm: str,
    data: Path,
    env: str,
    out: Path,
    config: OfflineConfig,
    settings: OfflineRun,
    seeds: Sequence[int],
    device: str,
) -> None:
    with progress_bar(console, f"{algorithm} on {env}", settings.steps, "updates") as update:

        def show(progress: OfflineProgress) -> None:
            note = ", ".join(f"{name} {value:.3g}" for name, value in list(progress.numbers.items())[:4])
            rates = [f"{100 * rate:.0f}" for _, rate in sorted(progress.success.items())]
            update(progress.step, note + (f", success {' '.join(rates)} %" if rates else ""))

        trained = train_offline(
            algorithm, data, env, out, config, settings, seeds=seeds, device=device, on_progress=show
        )
    if trained.steps_done == 0:
        console.print("this run was finished before; nothing was left to do.")
    else:
        console.print(f"{trained.steps_done} updates of {len(seeds)} seeds in {trained.seconds:.0f} s.")
    steer = "qgf" if algorithm == "qgf" else "base"
    for seed, folder in trained.folders.items():
        rate = f"  success {100 * trained.success[seed]:.0f} %" if seed in trained.success else ""
        console.print(f"  {folder}{rate}", soft_wrap=True)
    console.print(f"next: counterflow eval {env} --steer {steer} --policy {folder}", soft_wrap=True)


def _train(console: Console, data: Path, env: str, out: Path, config: BCConfig, seed: int, device: str) -> None:
    with progress_bar(console, f"training on {data.name}", config.steps, "updates") as update:

        def show(progress: Progress) -> None:
            update(progress.step, f"loss {progress.loss:.4f}, held-out {progress.validation_loss:.4f}")

        trained = train_bc(data, env, out, config, seed=seed, device=device, on_progress=show)
    if trained.steps_done == 0:
        console.print("this run was finished before; nothing was left to do.")
    else:
        console.print(f"{trained.steps_done} updates in {trained.seconds:.0f} s.")
    console.print(f"held-out loss {trained.validation_loss:.4f}\n  {trained.path}")
