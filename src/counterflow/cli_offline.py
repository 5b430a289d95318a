"""Train offline reinforcement learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import tyro
from rich.console import Console

from counterflow.cli_options import Changes, changed
from counterflow.experiments.offline import OfflineProgress, OfflineRun, acting_of, train_offline
from counterflow.experiments.offline_data import find_data
from counterflow.experiments.presets import PresetName, preset
from counterflow.experiments.progress import progress_bar
from counterflow.learning.offline import OfflineConfig


@dataclass(frozen=True)
class OfflineOptions:
    """What the offline algorithms share."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/cube-single-task1."""
    preset: PresetName = "small"
    """small: for two cores; paper: the official settings of this environment."""
    data: Path | None = None
    """A dataset (.npz) in OGBench's layout, or a folder of its slices; default: OGBench's own where it was downloaded to
    (~/.ogbench/data), otherwise data/<family>-play.npz."""
    out: Path | None = None
    """The run's folder; default: runs/<algorithm>-<task>-<preset>."""
    seed: int = 0
    """The first seed; weights, batches and draws descend from it."""
    seeds: int = 1
    """How many seeds to train side by side: seed, seed + 1, ..."""
    steps: int | None = None
    """Updates in all; default: the preset's."""
    sparse: bool | None = None
    """Rewards are -1 until everything is done; default: the preset's."""
    evaluate_every: int | None = None
    """Updates between two evaluations; 0: none but at the end; default: the preset's."""
    episodes: int | None = None
    """Of an evaluation, each seed; 0: no evaluation; default: the preset's."""
    set: Changes = ()
    """Settings of the algorithm to change, each NAME=VALUE, for example alpha=3 precision=bfloat16."""
    device: str = "cpu"
    """Where to train, for example cuda."""

    def train(self, console: Console, algorithm: str) -> None:
        """Train, with progress."""
        config, settings = preset(algorithm, self.env, self.preset)
        given = {name: getattr(self, name) for name in ("steps", "sparse", "evaluate_every", "episodes")}
        settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
        data = self.data or find_data(self.env)
        out = self.out or Path("runs") / f"{algorithm}-{self.env.split('/')[-1]}-{self.preset}"
        seeds = range(self.seed, self.seed + self.seeds)
        config = changed(config, [*chain.from_iterable(self.set)])
        run_offline(console, algorithm, data, self.env, out, config, settings, seeds, self.device)


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


def run_offline(
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
    """Train, with progress, and say where the policies lie."""
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
    acting = acting_of(config)
    steer = f"{acting.method} --steps {acting.settings.steps}"
    if acting.guidance is not None:
        steer += "" if acting.guidance.weight == "auto" else f" --weight {acting.guidance.weight}"
        steer += f" --best-of {acting.guidance.best_of}" if acting.guidance.best_of > 1 else ""
        steer += "" if acting.guidance.aggregation == "min" else f" --aggregation {acting.guidance.aggregation}"
    for seed, folder in trained.folders.items():
        rate = f"  success {100 * trained.success[seed]:.0f} %" if seed in trained.success else ""
        console.print(f"  {folder}{rate}", soft_wrap=True)
    console.print(f"next: counterflow eval {env} --steer {steer} --policy {folder}", soft_wrap=True)
