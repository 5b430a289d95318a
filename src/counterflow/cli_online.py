"""Train online reinforcement learning on a frozen policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from counterflow.cli_options import changed
from counterflow.experiments.online import OnlineProgress, train_online
from counterflow.experiments.online_settings import Config, OnlineRun, PresetName, online_preset
from counterflow.experiments.progress import progress_bar


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
    set: tuple[str, ...] = ()
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
        chosen = [one for one in self.set if one.partition("=")[0] in of_run]
        settings = changed(settings, [*run, *chosen])
        config = changed(config, [one for one in self.set if one not in chosen])
        out = self.out or Path("runs") / f"{algorithm}-{self.env.split('/')[-1]}-{self.preset}"
        seeds = range(self.seed, self.seed + self.seeds)
        run_online(
            console, algorithm, self.env, out, config, settings, seeds, prefill, noise_policy, self.policy, self.device
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
    """What 'counterflow distill' wrote: the actor begins as an imitation of it (with --prefill)."""
    bound: float | None = None
    """The largest latent; default: the preset's; 0: chosen from the recorded successes' noises."""
    latent: Literal["full", "low_rank", "repeated"] | None = None
    """Which part of the noise is decided on; default: the preset's."""

    def run(self, console: Console) -> None:
        """Train."""
        given = {"bound": self.bound, "latent": self.latent}
        run = [f"{name}={value}" for name, value in given.items() if value is not None]
        preset = online_preset("dsrl", self.preset, self.variant)
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
    for seed, folder in trained.folders.items():
        rate = f"  success {100 * trained.success[seed]:.0f} %" if seed in trained.success else ""
        console.print(f"  {folder}{rate}", soft_wrap=True)
    actor = folder / "checkpoints" / "actor.safetensors"
    if actor.exists():
        console.print(f"next: counterflow eval {env} --steer actor --noise-policy {actor}", soft_wrap=True)
