"""Train online reinforcement learning on a frozen policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from counterflow.checks import COUNT
from counterflow.cli_options import Changes, changed
from counterflow.experiments.corrections import CorrectionsProgress, CorrectionsRun, train_corrections
from counterflow.experiments.online import OnlineProgress, train_online
from counterflow.experiments.online_settings import Config, OnlineRun, PresetName, online_preset
from counterflow.experiments.progress import progress_bar
from counterflow.learning.corrections import CorrectionsConfig


@dataclass(frozen=True)
class OnlineOptions:
    """What the online algorithms share."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/cube-single-task4."""
    preset: PresetName = "small"
    """small: for two cores; paper: the released settings."""
    out: Path | None = None
    """The run's folder; default: runs/<algorithm>-<task>-<preset>."""
    seed: int = 0
    """The first seed; weights, episodes and draws descend from it."""
    seeds: int = 1
    """How many seeds to train side by side: seed, seed + 1, ..."""
    decisions: int | None = None
    """Chunks of each seed in all; default: the preset's."""
    num_envs: int | None = None
    """Environments of each seed; default: the preset's."""
    reward: Literal["success", "cost", "dense"] | None = None
    """success: 1 where the task is solved; cost: -1 a chunk until then; dense: the environment's own; default: the preset's."""
    evaluate_every: int | None = None
    """Decisions between two evaluations; 0: none but at the end; default: the preset's."""
    episodes: int | None = None
    """Of an evaluation, each seed; 0: no evaluation; default: the preset's."""
    policy: str | None = None
    """A checkpoint, a run folder, or lerobot: and a hub id or folder; default: the shipped prior of the task's family."""
    record: Path | None = None
    """A folder into which every episode of the training goes, as 'counterflow record' writes them, for 'counterflow distill' and
    --prefill; made, or added to."""
    set: Changes = ()
    """Other settings to change, of the algorithm or of the run, each NAME=VALUE, for example update_ratio=5 bound=2."""
    device: str = "cpu"
    """Where to learn, for example cuda."""

    def train(
        self,
        console: Console,
        algorithm: str,
        preset: tuple[Config, OnlineRun],
        prefill: Path | None = None,
        noise_policy: Path | None = None,
        run: Sequence[str] = (),
    ) -> None:
        """Train, with progress."""
        config, settings = preset
        given = {
            name: getattr(self, name) for name in ("decisions", "num_envs", "reward", "evaluate_every", "episodes")
        }
        settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
        of_run = {field.name for field in fields(OnlineRun)}
        given_by_name = [*chain.from_iterable(self.set)]
        chosen = [one for one in given_by_name if one.partition("=")[0] in of_run]
        settings = changed(settings, [*run, *chosen])
        config = changed(config, [one for one in given_by_name if one not in chosen])
        out = self.out or Path("runs") / f"{algorithm}-{self.env.split('/')[-1]}-{self.preset}"
        COUNT.check("seeds", self.seeds)
        seeds = range(self.seed, self.seed + self.seeds)
        run_online(
            console,
            algorithm,
            self.env,
            out,
            config,
            settings,
            seeds,
            prefill,
            noise_policy,
            self.policy,
            self.device,
            self.record,
        )


@dataclass(frozen=True)
class TrainDSRL(OnlineOptions):
    """Reinforcement learning in the noise space of a frozen flow (DSRL), alone or begun from steered rollouts."""

    variant: Literal["sac", "aliasing", "anchors"] = "sac"
    """sac: the latent is SAC's action; aliasing: an action critic, and a noise critic regressed onto it; anchors: flow-reversed
    directions are the candidates, and a critic chooses."""
    prefill: Path | None = None
    """A folder of 'counterflow record', whose episodes the replay begins with."""
    noise_policy: Path | None = None
    """What 'counterflow distill' wrote: the actor begins as its imitation, and with preset small stays near (needs --prefill)."""
    bound: float | None = None
    """The largest latent; default: the preset's; 0: chosen from the recorded successes' noises."""
    latent: Literal["full", "low_rank", "repeated"] | None = None
    """Which part of the noise is decided on; default: the preset's."""

    def run(self, console: Console) -> None:
        """Train."""
        given = {"bound": self.bound, "latent": self.latent}
        run = [f"{name}={value}" for name, value in given.items() if value is not None]
        preset = online_preset("dsrl", self.preset, self.variant, taught=self.noise_policy is not None)
        self.train(console, "dsrl", preset, self.prefill, self.noise_policy, run)


@dataclass(frozen=True)
class TrainResidual(OnlineOptions):
    """A bounded correction of the frozen policy's action, learned by SAC (residual RL)."""

    prefill: Path | None = None
    """A folder of 'counterflow record --steer base', whose episodes the replay begins with."""
    residual_bound: tuple[float, ...] = ()
    """The largest residual, units of the environment's actions: one number, or one a dimension; default: the preset's."""

    def run(self, console: Console) -> None:
        """Train."""
        bounds = [f"residual_bound={','.join(map(str, self.residual_bound))}"] if self.residual_bound else []
        self.train(console, "residual", online_preset("residual", self.preset), self.prefill, None, bounds)


@dataclass(frozen=True)
class TrainRFS(OnlineOptions):
    """Latent and residual together, learned by PPO (RFS)."""

    ports: Literal["both", "latent", "residual"] = "both"
    """What is decided on; latent and residual are the ablations."""
    residual_bound: tuple[float, ...] = ()
    """The largest residual, units of the environment's actions: one number, or one a dimension; default: the preset's."""

    def run(self, console: Console) -> None:
        """Train."""
        bounds = [f"residual_bound={','.join(map(str, self.residual_bound))}"] if self.residual_bound else []
        self.train(console, "rfs", online_preset("rfs", self.preset), run=[f"ports={self.ports}", *bounds])


@dataclass(frozen=True)
class TrainCorrections:
    """A residual learned from recorded corrections, without executing anything (offline RFS)."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/cube-single-task4."""
    data: Path
    """A folder of episodes in which somebody intervened, for example RUN/rollouts of 'counterflow dagger'."""
    out: Path | None = None
    """The run's folder; default: runs/corrections-<task>."""
    seed: int = 0
    """The first seed; weights and draws descend from it."""
    seeds: int = 1
    """How many seeds to train side by side: seed, seed + 1, ..."""
    steps: int | None = None
    """Updates in all."""
    residual_bound: tuple[float, ...] = ()
    """The largest residual, units of the environment's actions: one number, or one a dimension."""
    critic_sees: Literal["executed", "residual", "both"] = "executed"
    """What critics look at: the executed action; the residual alone, or base and residual, are the ablations."""
    anchor: Literal["residual", "executed"] = "residual"
    """What is held near the recorded."""
    first: int | None = None
    """Use the first so many recorded episodes; default: all."""
    evaluate_every: int | None = None
    """Updates between two evaluations; default: one at the end."""
    episodes: int | None = None
    """Of an evaluation, each seed; 0: no evaluation."""
    policy: str | None = None
    """A checkpoint, a run folder, or lerobot: and a hub id or folder; default: the shipped prior of the task's family."""
    noise_policy: Path | None = None
    """The noise policy that was driving when somebody intervened (a round of 'counterflow dagger'); default: none was."""
    set: Changes = ()
    """Other settings of the algorithm to change, each NAME=VALUE, for example alpha=1."""
    device: str = "cpu"
    """Where to learn, for example cuda."""

    def run(self, console: Console) -> None:
        """Train, with progress."""
        given = {name: getattr(self, name) for name in ("steps", "first", "evaluate_every", "episodes")}
        settings = replace(CorrectionsRun(), **{name: value for name, value in given.items() if value is not None})
        if self.residual_bound:
            settings = replace(settings, residual_bound=self.residual_bound)
        config = changed(
            CorrectionsConfig(critic_sees=self.critic_sees, anchor=self.anchor), [*chain.from_iterable(self.set)]
        )
        out = self.out or Path("runs") / f"corrections-{self.env.split('/')[-1]}"
        COUNT.check("seeds", self.seeds)
        seeds = range(self.seed, self.seed + self.seeds)
        sources = self.policy, self.noise_policy
        run_corrections(console, self.data, self.env, out, config, settings, seeds, *sources, self.device)


def run_corrections(
    console: Console,
    data: Path,
    env: str,
    out: Path,
    config: CorrectionsConfig,
    settings: CorrectionsRun,
    seeds: Sequence[int],
    policy: str | None,
    noise_policy: Path | None,
    device: str,
) -> None:
    """Train, with progress, and say where the actors lie."""
    with progress_bar(console, f"corrections on {env}", settings.steps, "updates") as update:

        def show(progress: CorrectionsProgress) -> None:
            rates = " ".join(f"{100 * rate:.0f}" for _, rate in sorted(progress.success.items()))
            update(progress.step, f"evaluation {rates} %" if rates else "")

        trained = train_corrections(
            data,
            env,
            out,
            config,
            settings,
            policy=policy,
            noise_policy=noise_policy,
            seeds=seeds,
            device=device,
            on_progress=show,
        )
    if trained.steps_done == 0:
        console.print("this run was finished before; nothing was left to do.")
    base = "" if trained.base is None else f"; what is corrected succeeds in {100 * trained.base:.0f} % by itself"
    console.print(f"{trained.decisions:,} recorded decisions{base}")
    more = ("" if policy is None else f" --policy {policy}") + (
        "" if noise_policy is None else f" --corrects {noise_policy}"
    )
    _say_actors(console, env, trained.folders, trained.success, more)


def run_online(
    console: Console,
    algorithm: str,
    env: str,
    out: Path,
    config: Config,
    settings: OnlineRun,
    seeds: Sequence[int],
    prefill: Path | None,
    noise_policy: Path | None,
    policy: str | None,
    device: str,
    record: Path | None = None,
) -> None:
    """Train, with progress, and say where the actors lie."""
    with progress_bar(console, f"{algorithm} on {env}", settings.decisions, "decisions") as update:

        def show(progress: OnlineProgress) -> None:
            recent = " ".join(f"{100 * rate:.0f}" for _, rate in sorted(progress.recent.items()))
            rates = " ".join(f"{100 * rate:.0f}" for _, rate in sorted(progress.success.items()))
            note = [f"training {recent} %" if recent else "", f"evaluation {rates} %" if rates else ""]
            update(progress.decision, ", ".join(part for part in note if part))

        trained = train_online(
            algorithm,
            env,
            out,
            config,
            settings,
            prefill_from=prefill,
            noise_policy=noise_policy,
            record_to=record,
            policy=policy,
            seeds=seeds,
            device=device,
            on_progress=show,
        )
    if trained.decisions_done == 0:
        console.print("this run was finished before; nothing was left to do.")
    told = trained.ledger.to_json()
    console.print(
        f"{told['environment_steps']:,} environment steps, {told['field_evaluations']:,} field evaluations, "
        f"{told['reasoner_queries']:,} questions to a reasoner, {told['seconds']:.0f} s"
    )
    more = "" if policy is None else f" --policy {policy}"
    _say_actors(console, env, trained.folders, trained.success, more)


def _say_actors(
    console: Console, env: str, folders: Mapping[int, Path], success: Mapping[int, float], more: str
) -> None:
    for seed, folder in folders.items():
        rate = f"  success {100 * success[seed]:.0f} %" if seed in success else ""
        console.print(f"  {folder}{rate}", soft_wrap=True)
    for name in ("actor", "anchors"):
        made = folder / "checkpoints" / f"{name}.safetensors"
        if made.exists():
            console.print(f"next: counterflow eval {env} --steer {name} --noise-policy {made}{more}", soft_wrap=True)
