"""The command line: parses, calls the experiments, says what happened. Everything it does can be done from Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from counterflow import cli_dataset, cli_lerobot
from counterflow.cli_cockpit import Cockpit
from counterflow.cli_demonstrate import Demonstrate
from counterflow.cli_options import Asking, GuidedName, Guiding, LearnedName, Steering, SteerName, load_learned
from counterflow.cli_serve import Serve
from counterflow.errors import CounterflowError, InvalidInputError

if TYPE_CHECKING:
    from counterflow.experiments.evaluate import Evaluation, ReasonerSettings
    from counterflow.experiments.rollout import Episode

DESCRIPTION = """Steer frozen flow-matching robot policies without touching their weights.

Try 'counterflow demo' first. Then: 'counterflow eval ogbench/cube-single-task1 --steer frs'."""


@dataclass(frozen=True)
class Reasoning:
    """Who gives the coarse references, and how they are written."""

    reasoner: Literal["script", "vlm"] = "script"
    """script: one that knows the simulator's state; vlm: a vision-language model that sees images, see --vlm-model."""
    reasoner_error: float = 0.0
    """Probability that the reasoner names a wrong direction."""
    reasoner_delay: int = 0
    """Chunks that pass before a direction is acted on."""
    convention: Literal["ogbench", "paper"] = "ogbench"
    """How a direction becomes a reference chunk."""
    magnitude: float | None = None
    """Length of the reference's motion; default: the convention's."""
    gripper: Literal["said", "hold", "policy"] = "said"
    """What a reference says of the gripper: what the reasoner does; hold: never a command (FRS paper); policy: nothing."""
    asking: Annotated[Asking, tyro.conf.arg(name="")] = field(default_factory=Asking)

    def settings(self, run: Path | None = None) -> ReasonerSettings:
        """Return the reasoner's settings, given the run's folder, if it has one."""
        from counterflow.experiments.evaluate import ReasonerSettings

        vlm = self.asking.asked(needed=True) if self.reasoner == "vlm" else None
        folder = None if vlm is None else self.asking.folder(run)
        said = self.reasoner_error, self.reasoner_delay, self.convention, self.magnitude
        return ReasonerSettings(*said, vlm, folder, self.gripper)


@dataclass(frozen=True)
class Collect:
    """Collect a dataset from OGBench's scripted oracles, by its official recipe. Run it again after an interruption."""

    env: tyro.conf.Positional[str]
    """A family of environments, for example ogbench/cube-single."""
    kind: Literal["play", "noisy"] = "play"
    """play: open-loop plans with smooth noise; noisy: a closed-loop oracle with noisy actions."""
    episodes: int = 300
    """Episodes to train on, of 1001 steps; a tenth as many more are held out."""
    seed: int = 0
    """What every episode descends from."""
    out: Path | None = None
    """Where to write it (.npz); default: data/<family>-<kind>.npz."""
    workers: int | None = None
    """Worker processes; default: one a core."""
    overwrite: bool = False
    """Replace another dataset that lies there."""

    def run(self, console: Console) -> None:
        """Collect, with progress."""
        from counterflow.data import collect
        from counterflow.experiments.progress import progress_bar

        out = self.out or Path("data") / f"{self.env.split('/')[-1]}-{self.kind}.npz"
        held_out = max(1, self.episodes // 10)
        with progress_bar(console, f"collecting {self.env}", self.episodes + held_out, "episodes") as update:
            made = collect(
                self.env,
                self.kind,
                episodes=self.episodes,
                validation_episodes=held_out,
                seed=self.seed,
                out=out,
                workers=self.workers,
                overwrite=self.overwrite,
                on_progress=lambda done, _, transitions: update(done, f"{transitions:,} transitions"),
            )
        console.print(
            f"{made.episodes} episodes, {made.transitions:,} transitions ({made.made} episodes made now):\n"
            f"  {made.path}\n  {made.validation_path}\n  {made.provenance_path}"
        )


@dataclass(frozen=True)
class Train:
    """Train a prior by behaviour cloning, or go on with a run: see 'counterflow train --help'."""


@dataclass(frozen=True)
class Eval:
    """Measure how often a policy succeeds at a task, steered or not."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/cube-single-task1."""
    steer: SteerName | LearnedName | GuidedName = "frs"
    """base: the policy alone; direct: the reference itself; frs: flow reversal steering; partial: partial noising; rank:
    sample-and-rank; dsbc, bc: what 'counterflow distill' learned, actor, anchors: what online learning made, see --noise-policy;
    qgf: guided by a critic's gradient, see --critic, which guides frs, dsbc and others, too."""
    episodes: int = 50
    """How many episodes."""
    seed: int = 0
    """What every episode descends from; the same seed gives the same result."""
    json: Path | None = None
    """Where to write the result."""
    policy: str | None = None
    """A checkpoint, a run folder, or lerobot: and a hub id or folder; default: the shipped prior of the task's family."""
    noise_policy: Path | None = None
    """What 'counterflow distill' wrote, for --steer dsbc or bc; or 'counterflow train dsrl' and its kin, for --steer actor, or
    anchors (of --variant anchors)."""
    corrects: Path | None = None
    """Of --steer actor, the noise policy that the actor corrects ('counterflow train corrections --noise-policy')."""
    drawn: bool = False
    """Of --steer actor, draw its latents from its law, as in training; else a SAC actor's mean acts."""
    num_envs: int | None = None
    """Environments stepped side by side; the result does not depend on it."""
    device: str = "cpu"
    """Where the policy computes."""
    steering: Annotated[Steering, tyro.conf.arg(name="")] = field(default_factory=Steering)
    reasoning: Annotated[Reasoning, tyro.conf.arg(name="")] = field(default_factory=Reasoning)
    guiding: Annotated[Guiding, tyro.conf.arg(name="")] = field(default_factory=Guiding)

    def run(self, console: Console) -> None:
        """Evaluate, with progress, and print the rate."""
        from counterflow.experiments.evaluate import evaluate, load_prior, open_env
        from counterflow.experiments.progress import progress_bar
        from counterflow.files import write_json
        from counterflow.steering import ChunkRegressor, steer_learned

        prior = load_prior(self.env, self.policy, self.device)
        learned = load_learned(self.steer, self.noise_policy, self.device)
        if self.corrects is not None:
            if self.steer != "actor":
                raise InvalidInputError(
                    f"--corrects is of no use to --steer {self.steer}; it says what an actor corrects."
                )
            prior = steer_learned(prior, ChunkRegressor.load(self.corrects, self.device))
        critic = self.guiding.load(self.policy, self.device, needed=self.steer == "qgf")
        reasoner = self.reasoning.settings()
        with (
            open_env(self.env, self.episodes, num_envs=self.num_envs, render=reasoner.render) as env,
            progress_bar(console, f"{self.env} {self.steer}", self.episodes, "episodes") as update,
        ):
            result = evaluate(
                env,
                prior,
                self.steer,
                self.episodes,
                self.seed,
                settings=self.steering.settings(),
                reasoner=reasoner,
                learned=learned,
                critic=critic,
                guidance=self.guiding.settings(),
                drawn=self.drawn,
                on_episode=_Count(update),
            )
        _say(console, result)
        if self.json is not None:
            write_json(self.json, result.to_json())
            console.print(f"  {self.json}")


@dataclass(frozen=True)
class Record:
    """Record steered rollouts until enough of them succeeded, as data for 'counterflow distill'. Run it again to go on."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/cube-single-task4."""
    out: Path
    """The dataset's folder; made, or added to."""
    steer: SteerName | LearnedName = "frs"
    """How the policy is steered, as in 'counterflow eval'."""
    successes: int = 18
    """How many successful episodes there should be; failed ones are kept, too, and left out when distilling."""
    episodes: int | None = None
    """Record so many episodes instead, whatever comes of them, as 'counterflow critic' wants them."""
    seed: int = 0
    """What every episode descends from."""
    max_episodes: int | None = None
    """After how many episodes to give up; default: ten times as many as successes, and twenty more."""
    every_step: bool = True
    """Also find the noise of what was executed from every step on: several times as many examples."""
    inversion: Literal["regularised", "exact"] = "regularised"
    """How that noise is found. regularised: a small one that comes near what was executed, far easier to learn; exact: the
    one that gives it exactly."""
    noise_steps: int | None = None
    """The steps in which noises that are kept will be denoised, found by inversion; default: those of the method."""
    policy: str | None = None
    """A checkpoint, a run folder, or lerobot: and a hub id or folder; default: the shipped prior of the task's family."""
    noise_policy: Path | None = None
    """What was learned, for --steer dsbc, bc, actor or anchors, as in 'counterflow eval'."""
    num_envs: int | None = None
    """Environments stepped side by side; what is recorded does not depend on it."""
    device: str = "cpu"
    """Where the policy computes."""
    steering: Annotated[Steering, tyro.conf.arg(name="")] = field(default_factory=Steering)
    reasoning: Annotated[Reasoning, tyro.conf.arg(name="")] = field(default_factory=Reasoning)

    def run(self, console: Console) -> None:
        """Record, with progress."""
        from counterflow.experiments.progress import progress_bar
        from counterflow.experiments.record import record

        total, unit = (self.successes, "successes") if self.episodes is None else (self.episodes, "episodes")
        with progress_bar(console, f"recording {self.env} {self.steer}", total, unit) as update:
            episodes = 0

            def show(_: Episode, successes: int) -> None:
                nonlocal episodes
                episodes += 1
                if self.episodes is None:
                    update(min(successes, self.successes), f"{episodes} episodes now")
                else:
                    update(episodes, f"{successes} succeeded")

            recorded = record(
                self.env,
                self.steer,
                self.out,
                successes=self.successes,
                episodes=self.episodes,
                seed=self.seed,
                settings=self.steering.settings(),
                reasoner=self.reasoning.settings(self.out),
                policy=self.policy,
                num_envs=self.num_envs,
                max_episodes=self.max_episodes,
                every_step=self.every_step,
                inversion=self.inversion,
                noise_steps=self.noise_steps,
                learned=load_learned(self.steer, self.noise_policy, self.device),
                device=self.device,
                on_episode=show,
            )
        command, made = ("distill", "noise-policy") if self.episodes is None else ("critic", "critic")
        console.print(
            f"{recorded.successes} of {recorded.episodes} episodes succeeded ({recorded.made} made now):\n  {recorded.path}\n"
            f"next: counterflow {command} {recorded.path} --env {self.env} --out {made}",
            soft_wrap=True,  # a command to copy stays in one line
        )


@dataclass(frozen=True)
class Invert:
    """Find the noise of every chunk of a dataset, so that demonstrations can be distilled, too."""

    data: tyro.conf.Positional[Path]
    """A dataset (.npz) in OGBench's layout, or a folder of 'counterflow record'."""
    env: str
    """The environment, or family, that the data are from, for example ogbench/cube-single."""
    out: Path
    """Where to write the dataset with its noises (.npz); its description goes beside it (.json)."""
    steps: int = 5
    """K, the denoising steps with which the noises will be used."""
    method: Literal["regularised", "exact", "euler"] = "regularised"
    """regularised: a small noise that comes near the chunk, the easiest to learn; exact: invert the discrete Euler map; euler:
    Euler reversal, which misses more."""
    refine: int | None = None
    """Adam updates: for the chunks that are beyond the tolerance (default 0), or, regularised, for all (default 30)."""
    penalty: float | None = None
    """What a squared unit of noise may cost in squared error while refining; default: 0.001 regularised, else 0."""
    tolerance: float | None = None
    """Largest reconstruction error, normalised units, of a chunk that may be learned from; default: 0.5 regularised, else
    0.01."""
    policy: str | None = None
    """A checkpoint, a run folder, or lerobot: and a hub id or folder; default: the shipped prior of the environment's family."""
    device: str = "cpu"
    """Where to compute."""

    def run(self, console: Console) -> None:
        """Invert, with progress."""
        from counterflow.experiments.inversion import InversionSettings, invert_dataset
        from counterflow.experiments.progress import progress_bar

        given = {"iterations": self.refine, "penalty": self.penalty, "tolerance": self.tolerance}
        settings = InversionSettings.of(
            self.method, self.steps, **{name: value for name, value in given.items() if value is not None}
        )
        with progress_bar(console, f"inverting {self.data.name}", 1, "chunks") as update:
            found = invert_dataset(
                self.data,
                self.env,
                self.out,
                settings,
                policy=self.policy,
                device=self.device,
                on_progress=lambda done, total: update(done, "", total),
            )
        errors = ", ".join(f"{share} {error:.1e}" for share, error in found.errors.items())
        console.print(
            f"{found.chunks:,} chunks, {found.flagged:,} of them beyond the tolerance of {settings.tolerance:g} and flagged\n"
            f"reconstruction error, largest entry of a chunk, by quantile: {errors}\n"
            f"noise, root mean square: {found.noise_norm:.2f} (1 is the prior's own)\n  {found.path}"
        )


@dataclass(frozen=True)
class Dataset:
    """Look at steering datasets, merge them, keep a part, mend a damaged one: see 'counterflow dataset --help'."""


@dataclass(frozen=True)
class LeRobot:
    """Steered policies and noises inside LeRobot: see 'counterflow lerobot --help'."""


@dataclass(frozen=True)
class Distill:
    """Distil recorded successes or inverted demonstrations into a noise policy: see 'counterflow distill --help'."""


@dataclass(frozen=True)
class Critic:
    """Train a critic on recorded successes and failures, to guide the policy with: see 'counterflow critic --help'."""


@dataclass(frozen=True)
class Dagger:
    """Improve a noise policy by an expert who takes over when it gets nowhere (DAgger in noise space). Resumable."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/cube-single-task5."""
    data: Path
    """What the first noise policy is distilled from: a folder of 'counterflow record', or an archive of 'counterflow invert'."""
    out: Path
    """The run's folder: noise policies of every round, rounds.json, and the rollouts."""
    rounds: int = 4
    """How many times to roll out and learn."""
    episodes: int = 10
    """Rollouts a round."""
    first: int | None = None
    """Use the first so many successful episodes of the data; default: all."""
    patience: int = 8
    """Decisions without progress after which the expert takes over."""
    hold: int = 16
    """Decisions that the expert makes before handing back."""
    seed: int = 0
    """What everything descends from."""
    policy: str | None = None
    """A checkpoint, a run folder, or lerobot: and a hub id or folder; default: the shipped prior of the task's family."""

    def run(self, console: Console) -> None:
        """Run the rounds, with what came of each."""
        from counterflow.experiments.dagger import Round, dagger
        from counterflow.experiments.progress import progress_bar
        from counterflow.learning.dagger import Stalled

        Stalled(self.patience, self.hold)  # refuse numbers out of range before anything is begun
        with progress_bar(console, f"DAgger on {self.env}", self.rounds, "rounds") as update:

            def show(found: Round) -> None:
                update(found.number + 1, f"{100 * found.interventions:.0f}% of decisions were the expert's")

            rounds = dagger(
                self.env,
                self.data,
                self.out,
                rounds=self.rounds,
                episodes=self.episodes,
                first=self.first,
                seed=self.seed,
                make_rule=lambda: Stalled(self.patience, self.hold),
                policy=self.policy,
                on_round=show,
            )
        for one in rounds:
            console.print(
                f"round {one.number}: {one.unaided} of {one.episodes} succeeded without help, {one.successes} in all; the expert "
                f"made {100 * one.interventions:.0f}% of the decisions, {one.corrections} corrections"
            )
        last = self.out / f"round-{self.rounds}.safetensors"
        console.print(f"  {last}\nnext: counterflow eval {self.env} --steer dsbc --noise-policy {last}", soft_wrap=True)


@dataclass(frozen=True)
class Compare:
    """Compare ways of steering over tasks, with the same prior, references and episodes."""

    envs: tyro.conf.Positional[tuple[str, ...]]
    """Tasks, families or groups, for example ogbench/cube-single (all five tasks) or metaworld/ml10-test."""
    methods: tuple[SteerName, ...] = ("base", "direct", "partial", "rank", "frs")
    """What to compare."""
    episodes: int = 50
    """Episodes for each method on each task."""
    seed: int = 0
    """What every episode descends from."""
    json: Path | None = None
    """Where to keep the results, written after every evaluation; what is there already is not run again."""
    figure: Path | None = None
    """Where to draw bars with intervals (.png or .svg)."""
    policy: str | None = None
    """A checkpoint for all tasks (or lerobot: and a hub id or folder); default: each family's shipped prior."""
    device: str = "cpu"
    """Where the policy computes."""
    num_envs: int | None = None
    """Environments stepped side by side; results do not depend on it. Fewer fit into less memory."""
    steering: Annotated[Steering, tyro.conf.arg(name="")] = field(default_factory=Steering)
    reasoning: Annotated[Reasoning, tyro.conf.arg(name="")] = field(default_factory=Reasoning)

    def run(self, console: Console) -> None:
        """Compare, with progress, and print the table."""
        from counterflow.envs import expand_tasks
        from counterflow.experiments.compare import Contender, compare, success_table
        from counterflow.experiments.figures import success_bars
        from counterflow.experiments.progress import progress_bar

        if not self.methods:
            raise InvalidInputError("no method was named; give --methods at least one, for example base frs.")
        settings, reasoner = self.steering.settings(), self.reasoning.settings()
        contenders = [Contender(name, name, settings, reasoner) for name in dict.fromkeys(self.methods)]
        total = len(expand_tasks(self.envs)) * len(contenders) * self.episodes
        with progress_bar(console, "comparing", total, "episodes") as update:
            count = _Count(update)
            comparison = compare(
                self.envs,
                contenders,
                self.episodes,
                self.seed,
                policy=self.policy,
                device=self.device,
                num_envs=self.num_envs,
                path=self.json,
                on_start=lambda task, contender: count.say(f"{task} {contender.label}"),
                on_episode=count,
            )
        console.print(success_table(comparison, f"Success, {self.episodes} episodes each"))
        if self.figure is not None:
            groups = {
                task: {label: rates[task] for label, rates in comparison.rates.items()} for task in comparison.tasks
            }
            console.print(f"  {success_bars(groups, self.figure)}")
        if self.json is not None:
            console.print(f"  {self.json}")


@dataclass(frozen=True)
class Film:
    """Film the same episode twice, side by side: the policy alone, and steered."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/scene-task4."""
    steer: SteerName = "frs"
    """How the right side is steered."""
    seed: int = 0
    """What the episode descends from."""
    out: Path | None = None
    """The video; default: videos/<task>-<steer>.mp4."""
    gif: Path | None = None
    """Also write a small moving picture, as for a README."""
    size: int = 384
    """Height and width of a side, pixels."""
    quality: Literal["fast", "dataset"] = "fast"
    """dataset: draw as the benchmark itself does (about ten times slower)."""
    tries: int = 16
    """How many episodes to try for one where the policy alone fails and the steered one succeeds; 1 films the first."""
    policy: str | None = None
    """A checkpoint, a run folder, or lerobot: and a hub id or folder; default: the shipped prior of the task's family."""
    steering: Annotated[Steering, tyro.conf.arg(name="")] = field(default_factory=Steering)
    reasoning: Annotated[Reasoning, tyro.conf.arg(name="")] = field(default_factory=Reasoning)

    def run(self, console: Console) -> None:
        """Film."""
        from counterflow.envs import RenderSettings
        from counterflow.experiments.film import film

        out = self.out or Path("videos") / f"{self.env.split('/')[-1]}-{self.steer}.mp4"
        with console.status(f"filming {self.env}"):
            film(
                self.env,
                out,
                method=self.steer,
                seed=self.seed,
                gif=self.gif,
                render=RenderSettings(self.size, self.size, self.quality),
                tries=self.tries,
                policy=self.policy,
                settings=self.steering.settings(),
                reasoner=self.reasoning.settings(),
            )
        console.print(f"  {out}")
        if self.gif is not None:
            console.print(f"  {self.gif}")


@dataclass(frozen=True)
class Analyse:
    """Measure what reversal does to references: displacement and log-probability gained, against K."""

    env: tyro.conf.Positional[str]
    """The task whose states and references are used."""
    references: int = 128
    """How many references."""
    seed: int = 0
    """What the states descend from."""
    json: Path | None = None
    """Where to write the numbers."""
    figure: Path | None = None
    """Where to draw both figures."""
    policy: str | None = None
    """A checkpoint, a run folder, or lerobot: and a hub id or folder; default: the shipped prior of the task's family."""

    def run(self, console: Console) -> None:
        """Analyse, with progress, and print the table."""
        from rich.table import Table

        from counterflow.experiments.analysis import PAPER_STEPS, analyse_reversal, gather_references
        from counterflow.experiments.evaluate import load_prior, open_env
        from counterflow.experiments.figures import reversal_analysis
        from counterflow.experiments.progress import progress_bar
        from counterflow.files import write_json

        prior = load_prior(self.env, self.policy)
        with open_env(self.env, 16) as env:
            observations, reference = gather_references(env, prior, self.references, self.seed)
        with progress_bar(console, f"reversing {self.references} references", len(PAPER_STEPS), "K") as update:
            found = analyse_reversal(
                prior,
                observations,
                reference,
                on_step=lambda steps: update(PAPER_STEPS.index(steps) + 1, f"K = {steps}"),
            )
        table = Table(title=f"Reversal of {self.references} references, {self.env}", title_justify="left")
        for name in ("K", "displacement", "log-probability gained", "noise percentile"):
            table.add_column(name, justify="right")
        for row in found.to_json():
            table.add_row(
                f"{row['K']:.0f}",
                f"{row['displacement']:.2f} ± {row['displacement_standard_error']:.2f}",
                f"{row['log_prob_gain']:.1f} ± {row['log_prob_gain_standard_error']:.1f}",
                f"{100 * row['noise_percentile']:.0f}%",
            )
        console.print(table)
        if self.json is not None:
            write_json(self.json, {"env": self.env, "seed": self.seed, "rows": found.to_json()})
            console.print(f"  {self.json}")
        if self.figure is not None:
            console.print(f"  {reversal_analysis(found.steps, found.displacement, found.log_prob_gain, self.figure)}")


@dataclass(frozen=True)
class Probe:
    """Measure how far a policy can be steered, before any training: by its noise, by residuals, by references."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/cube-single-task4."""
    policy: str | None = None
    """A checkpoint, a run folder, or lerobot: and a hub id or folder; default: the shipped prior of the task's family."""
    episodes: int = 20
    """For each way of steering."""
    draws: int = 6
    """Noises that are held fixed."""
    steps: int = 5
    """K, denoising steps."""
    seed: int = 0
    """What every episode descends from."""
    json: Path | None = None
    """Where to write the numbers."""
    figure: Path | None = None
    """Where to draw the page of figures (.png)."""
    num_envs: int | None = None
    """Environments stepped side by side."""

    def run(self, console: Console) -> None:
        """Probe, with progress, and print what is recommended."""
        from counterflow.experiments.evaluate import load_prior, open_env
        from counterflow.experiments.figures import steerability
        from counterflow.experiments.probe import probe, runs_of
        from counterflow.experiments.progress import progress_bar
        from counterflow.files import write_json

        prior = load_prior(self.env, self.policy)
        total = runs_of(self.draws) * self.episodes
        with (
            open_env(self.env, self.episodes, num_envs=self.num_envs) as env,
            progress_bar(console, f"probing {self.env}", total, "episodes") as update,
        ):
            found = probe(
                env, prior, self.episodes, self.seed, draws=self.draws, steps=self.steps, on_episode=_Count(update)
            )
        fixed = sorted(100 * rate.rate for rate in found.fixed)
        console.print(
            f"base {found.base}; noises held fixed {fixed[0]:.0f} to {fixed[-1]:.0f}%\n"
            f"recommended: bound {found.bound:g}, latent {found.latent}, residual deviation {found.residual_std:g}"
        )
        if self.json is not None:
            write_json(self.json, found.to_json())
            console.print(f"  {self.json}")
        if self.figure is not None:
            console.print(f"  {steerability(found, self.figure, title=self.env)}")


@dataclass(frozen=True)
class Demo:
    """See a frozen policy fail, and succeed when it is steered: a table, a figure and a video, in about two minutes."""

    out: Path = Path("demo")
    """Where to leave the figure, the video and the numbers."""
    episodes: int = 8
    """Episodes for each method on each task."""
    seed: int = 0
    """What every episode descends from."""

    def run(self, console: Console) -> None:
        """Run the demo."""
        from counterflow.experiments.demo import demo

        demo(console, self.out, self.episodes, self.seed)


Command = (
    Annotated[Collect, tyro.conf.subcommand("collect")]
    | Annotated[Demonstrate, tyro.conf.subcommand("demonstrate")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Record, tyro.conf.subcommand("record")]
    | Annotated[Invert, tyro.conf.subcommand("invert")]
    | Annotated[Dataset, tyro.conf.subcommand("dataset")]
    | Annotated[LeRobot, tyro.conf.subcommand("lerobot")]
    | Annotated[Distill, tyro.conf.subcommand("distill")]
    | Annotated[Critic, tyro.conf.subcommand("critic")]
    | Annotated[Dagger, tyro.conf.subcommand("dagger")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Film, tyro.conf.subcommand("film")]
    | Annotated[Analyse, tyro.conf.subcommand("analyse")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Cockpit, tyro.conf.subcommand("cockpit")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)

LEARNING = (["train"], ["distill"], ["critic"])


def parse(arguments: Sequence[str]) -> Any:
    """Return the command that is meant; it has a method `run(console)`."""
    group, rest = arguments[:1], arguments[1:]
    if group in LEARNING:
        # Their settings need torch, which the other commands' parsing, and simulators' worker processes, can do without.
        from counterflow import cli_train

        if group == ["distill"]:
            return tyro.cli(cli_train.Distill, prog="counterflow distill", args=rest)
        if group == ["critic"]:
            return tyro.cli(cli_train.Critic, prog="counterflow critic", args=rest)
        kind: Any = cli_train.TrainCommand
        return tyro.cli(kind, prog="counterflow train", description=cli_train.__doc__, args=rest)
    if group == ["dataset"]:
        kind = cli_dataset.DatasetCommand
        return tyro.cli(kind, prog="counterflow dataset", description=cli_dataset.__doc__, args=rest)
    if group == ["lerobot"]:
        kind = cli_lerobot.LeRobotCommand
        return tyro.cli(kind, prog="counterflow lerobot", description=cli_lerobot.__doc__, args=rest)
    kind = Command
    return tyro.cli(kind, prog="counterflow", description=DESCRIPTION, args=arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    console = Console()
    try:
        command = parse(arguments)
        if arguments[:1] not in LEARNING:
            # Before torch is imported. Priors are small, and a pool of threads that spins while it waits for them takes the
            # cores from the simulators: with others at work beside it, an evaluation took ten times as long.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        command.run(console)
    except CounterflowError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; what was finished is safe: run the same command again to go on.")
        return 130
    return 0


class _Count:
    """Counts episodes on a progress bar, with the successes so far."""

    def __init__(self, update: Callable[[int, str], None]) -> None:
        self._update = update
        self._done = self._successes = self._begun = 0
        self._what = ""

    def say(self, what: str) -> None:
        """Name what comes next, and count its successes anew."""
        self._what, self._successes, self._begun = what, 0, self._done

    def __call__(self, episode: Episode) -> None:
        """Count an episode."""
        self._done += 1
        self._successes += episode.success
        self._update(self._done, f"{self._what} {self._successes}/{self._done - self._begun} succeeded".strip())


def _say(console: Console, result: Evaluation) -> None:
    low, high = result.rate.interval
    console.print(
        f"{result.env} [bold]{result.steer}[/]: {result.rate.successes} of {result.rate.episodes} episodes succeeded, "
        f"[bold]{100 * result.rate.rate:.1f}%[/] (95% interval {100 * low:.1f} to {100 * high:.1f}), {result.seconds:.1f} s"
    )
    if "weight" in result.settings:
        console.print(f"guided with weight {result.settings['weight']['weight']:.4g}")


if __name__ == "__main__":
    sys.exit(main())
