"""Train: a prior, an offline RL algorithm, a noise policy; or go on with a run that was interrupted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from counterflow.cli_offline import TrainFQL, TrainIFQL, TrainQGF, TrainRQL, run_offline
from counterflow.cli_online import TrainCorrections, TrainDSRL, TrainResidual, TrainRFS, run_corrections, run_online
from counterflow.errors import InvalidInputError
from counterflow.experiments.corrections import read_corrections_settings
from counterflow.experiments.critic import train_critic
from counterflow.experiments.distill import Windows, distill
from counterflow.experiments.evaluate import SHIPPED_PRIORS
from counterflow.experiments.generalist import TRAINING, read_generalist_settings, train_generalist
from counterflow.experiments.offline import read_offline_settings
from counterflow.experiments.offline_data import find_data
from counterflow.experiments.online import read_online_settings
from counterflow.experiments.online_settings import CONFIGS as ONLINE
from counterflow.experiments.presets import PresetName, cloning_preset
from counterflow.experiments.progress import progress_bar
from counterflow.experiments.run import read_config
from counterflow.experiments.train import Progress, Trained, read_bc_settings, train_bc
from counterflow.learning import BCConfig, ChunkCriticConfig, DSBCConfig
from counterflow.learning.held_out import Progress as DistillationProgress
from counterflow.policies import GeneralistConfig
from counterflow.policies.described import weights_path
from counterflow.steering import Intention


@dataclass(frozen=True)
class TrainBC:
    """Train a prior by flow-matching behaviour cloning. Run it again after an interruption."""

    data: tyro.conf.Positional[str]
    """A dataset (.npz) in OGBench's layout, held-out episodes in NAME-val.npz beside it; or the environment, or family, itself:
    then OGBench's own where it was downloaded to (~/.ogbench/data), otherwise data/<family>-play.npz."""
    env: str | None = None
    """The environment, or family, that a dataset is from, for example ogbench/cube-single."""
    preset: PresetName | None = None
    """small: a prior for two cores; paper: the flow of QGF's official code. Default: the settings below."""
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
        data, env = Path(self.data), self.env
        if env is None:
            if data.suffix == ".npz":
                raise InvalidInputError(
                    f"the dataset {data} was given without its environment; say --env, for example ogbench/cube-single."
                )
            env, data = self.data, find_data(self.data)
        if self.preset is not None and self.config != BCConfig():
            raise InvalidInputError(
                f"the preset {self.preset!r} was named, and settings of the learning beside it; expected one or the other."
            )
        config = self.config if self.preset is None else cloning_preset(env, self.preset)
        out = self.out or Path("runs") / f"bc-{env.split('/')[-1]}-{self.seed}"
        _train(console, data, env, out, config, self.seed, self.device)


@dataclass(frozen=True)
class TrainGeneralist:
    """Train one policy on demonstrations of many tasks. Run it again after an interruption."""

    data: tyro.conf.Positional[Path]
    """The folder that 'counterflow demonstrate' wrote for a group or family of tasks."""
    tasks: tuple[str, ...]
    """Tasks, groups or families to train on, for example metaworld/ml45-train."""
    out: Path | None = None
    """The run's folder; default: runs/generalist-<seed>."""
    seed: int = 0
    """What weights, batches and draws descend from."""
    device: str = "cpu"
    """Where to train, for example cuda."""
    architecture: GeneralistConfig = field(default_factory=GeneralistConfig)
    """The policy."""
    config: Annotated[BCConfig, tyro.conf.arg(name="")] = TRAINING
    """Settings of the learning."""

    def run(self, console: Console) -> None:
        """Train, with progress."""
        out = self.out or Path("runs") / f"generalist-{self.seed}"
        _train_generalist(
            console, self.data, list(self.tasks), out, self.architecture, self.config, self.seed, self.device
        )


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
        algorithm = read_config(self.run_folder / "config.yaml").get("algorithm")
        if algorithm in ONLINE:
            about, online, run = read_online_settings(self.run_folder)
            prefill, noise, record = (
                None if about[name] is None else Path(about[name]) for name in ("prefill", "noise_policy", "record")
            )
            out, seeds = self.out or self.run_folder, about["seeds"]
            sources = prefill, noise, about["policy"]
            run_online(console, str(algorithm), about["env"], out, online, run, seeds, *sources, self.device, record)
            return
        if algorithm == "corrections":
            about, corrections, settled = read_corrections_settings(self.run_folder)
            out, data = self.out or self.run_folder, Path(about["data"])
            run_corrections(
                console,
                data,
                about["env"],
                out,
                corrections,
                settled,
                about["seeds"],
                about["policy"],
                None if about["noise_policy"] is None else Path(about["noise_policy"]),
                self.device,
            )
            return
        if algorithm == "generalist":
            folder, tasks, seed, architecture, config = read_generalist_settings(self.run_folder)
            out = self.out or self.run_folder
            _train_generalist(console, folder, tasks, out, architecture, config, seed, self.device)
            return
        if algorithm != "bc":
            algorithm, data, env, seeds, offline, settings = read_offline_settings(self.run_folder)
            out = self.out or self.run_folder
            run_offline(console, algorithm, data, env, out, offline, settings, seeds, self.device)
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
    intention: float | None = None
    """Also learn what chunk is meant, and start at the most likely noise given both; the number is what a squared unit of noise
    costs (1 is a beginning; less where the policy hardly listens to its noise). The policy must have gradients. Default: DSBC as
    in the paper."""
    device: str = "cpu"
    """Where to train."""
    config: Annotated[DSBCConfig, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = field(
        default_factory=DSBCConfig
    )
    """Settings of the learning; --regressor.target action gives the baseline BC."""

    def run(self, console: Console) -> None:
        """Distil, with progress."""
        config = self.config
        if self.intention is not None:
            wanted = replace(config.regressor, intention=Intention(penalty=self.intention))
            config = replace(config, regressor=wanted)
        with progress_bar(console, "distilling", config.steps, "updates") as update:

            def show(progress: DistillationProgress) -> None:
                update(progress.step, f"loss {progress.loss:.3f}, held-out {progress.held_out_loss:.3f}")

            regressor = distill(
                self.data,
                self.out,
                config,
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
            f"next: counterflow eval {self.env or 'TASK'} --steer {steer} --noise-policy {weights_path(self.out)}"
            f"{_whose(regressor.binding.family)}",
            soft_wrap=True,  # a command to copy stays in one line
        )


@dataclass(frozen=True)
class Critic:
    """Train a critic of a frozen policy on its own recorded successes and failures, to guide it with (GAF)."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of 'counterflow record', all of one policy, however it was steered."""
    out: Path
    """Where to write the critic (.safetensors, and .json beside it)."""
    env: str | None = None
    """Use this task's episodes alone; default: all."""
    seed: int = 0
    """What weights, held-out episodes and draws descend from."""
    device: str = "cpu"
    """Where to train."""
    config: Annotated[ChunkCriticConfig, tyro.conf.arg(name="")] = field(default_factory=ChunkCriticConfig)
    """Settings of the learning."""

    def run(self, console: Console) -> None:
        """Train, with progress."""
        with progress_bar(console, "training a critic", self.config.steps, "updates") as update:

            def show(progress: DistillationProgress) -> None:
                update(progress.step, f"loss {progress.loss:.4f}, held-out {progress.held_out_loss:.4f}")

            critic = train_critic(
                self.data, self.out, self.config, env=self.env, seed=self.seed, device=self.device, on_progress=show
            )
        made = critic.provenance
        console.print(
            f"{made['decisions']:,} decisions of {made['episodes']} episodes, {made['successes']} of them successes, "
            f"{made['updates']} updates"
        )
        if made["held_out_error"] is not None:
            auc = "" if made["auc"] is None else f"; success told from failure (AUC) {made['auc']:.2f}"
            console.print(
                f"held-out error {made['held_out_error']:.4f}, a constant's {made['constant_error']:.4f}{auc}"
            )
        console.print(
            f"  {weights_path(self.out)}\n"
            f"next: counterflow eval {self.env or 'TASK'} --steer qgf --critic {weights_path(self.out)}"
            f"{_whose(critic.binding.family)}",
            soft_wrap=True,  # a command to copy stays in one line
        )


TrainCommand = (
    Annotated[TrainBC, tyro.conf.subcommand("bc")]
    | Annotated[TrainRQL, tyro.conf.subcommand("rql")]
    | Annotated[TrainQGF, tyro.conf.subcommand("qgf")]
    | Annotated[TrainFQL, tyro.conf.subcommand("fql")]
    | Annotated[TrainIFQL, tyro.conf.subcommand("ifql")]
    | Annotated[TrainDSRL, tyro.conf.subcommand("dsrl")]
    | Annotated[TrainResidual, tyro.conf.subcommand("residual")]
    | Annotated[TrainRFS, tyro.conf.subcommand("rfs")]
    | Annotated[TrainCorrections, tyro.conf.subcommand("corrections")]
    | Annotated[TrainGeneralist, tyro.conf.subcommand("generalist")]
    | Annotated[TrainResume, tyro.conf.subcommand("resume")]
)


def _train_generalist(
    console: Console,
    data: Path,
    tasks: list[str],
    out: Path,
    architecture: GeneralistConfig,
    config: BCConfig,
    seed: int,
    device: str,
) -> None:
    with progress_bar(console, f"training on {', '.join(tasks)}", config.steps, "updates") as update:

        def show(progress: Progress) -> None:
            update(progress.step, f"loss {progress.loss:.4f}, held-out {progress.validation_loss:.4f}")

        trained = train_generalist(data, tasks, out, architecture, config, seed=seed, device=device, on_progress=show)
    _say_trained(console, trained)


def _whose(family: str) -> str:
    """Return what a command must be told of the frozen policy, where no prior is shipped for its family."""
    return "" if family in SHIPPED_PRIORS else " --policy ITS-POLICY"


def _train(console: Console, data: Path, env: str, out: Path, config: BCConfig, seed: int, device: str) -> None:
    with progress_bar(console, f"training on {data.name}", config.steps, "updates") as update:

        def show(progress: Progress) -> None:
            update(progress.step, f"loss {progress.loss:.4f}, held-out {progress.validation_loss:.4f}")

        trained = train_bc(data, env, out, config, seed=seed, device=device, on_progress=show)
    _say_trained(console, trained)


def _say_trained(console: Console, trained: Trained) -> None:
    if trained.steps_done == 0:
        console.print("this run was finished before; nothing was left to do.")
    else:
        console.print(f"{trained.steps_done} updates in {trained.seconds:.0f} s.")
    console.print(f"held-out loss {trained.validation_loss:.4f}\n  {trained.path}")
