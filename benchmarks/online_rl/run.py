"""Online reinforcement learning on frozen flows: DSRL, DSRL + FRS, residual RL, anchors and a critic, RFS.

    python benchmarks/online_rl/run.py

records what is missing into `data/`, trains what is missing into `runs/`, copies curves into `results/`, and writes tables and
figures beside it. Stages can be named, and `--only-report` leaves out the running. A run that was killed goes on. What was
recorded and trained is not committed: the same command makes it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from rich.console import Console

from counterflow.data.npz import save_npz
from counterflow.experiments.corrections import CorrectionsRun, train_corrections
from counterflow.experiments.dagger import dagger
from counterflow.experiments.demonstrate import demonstrate
from counterflow.experiments.distill import distill
from counterflow.experiments.evaluate import ReasonerSettings, evaluate, load_prior, machine, open_env
from counterflow.experiments.figures import success_curve
from counterflow.experiments.online import OnlineProgress, train_online
from counterflow.experiments.online_settings import Config, OnlineRun, online_preset
from counterflow.experiments.probe import probe
from counterflow.experiments.record import record
from counterflow.experiments.statistics import Rate, SeedsRate, SuccessRate
from counterflow.experiments.train import train_bc
from counterflow.files import write_between, write_json
from counterflow.learning.bc import BCConfig
from counterflow.learning.corrections import CorrectionsConfig
from counterflow.learning.dsbc import DSBCConfig
from counterflow.learning.dsrl import DSRLConfig, Variant
from counterflow.learning.residual import CriticSees
from counterflow.learning.rfs import RFSConfig
from counterflow.policies import FlowPolicy, NetworkConfig, load, save
from counterflow.steering import ChunkRegressor, MethodSettings, SteeringActor

HERE = Path(__file__).parent
COMMAND = "benchmarks/online_rl/run.py"
DATA, RUNS, RESULTS = HERE / "data", HERE / "runs", HERE / "results"
Stage = Literal["references", "works", "hardly", "draws", "rfs", "offline", "variants", "bounds", "shapes", "probe"]
STAGES: tuple[Stage, ...] = get_args(Stage)
SEEDS = (0, 1, 2)
# FRS works, the base is under 0.3.
WORKS = (
    "ogbench/cube-single-task2",
    "ogbench/cube-single-task4",
    "ogbench/cube-single-task5",
    "ogbench/scene-task1",
    "ogbench/cube-double-task1",
)
# With a reasoner that is always right FRS solves nearly every episode, and nothing is left to learn: here one direction in four
# is wrong, in what is recorded, in what FRS is measured with, and wherever a learner asks.
ERRING = ReasonerSettings(error=0.25)
# A bound of 2, the preset's, cuts a quarter of all numbers of the noises of steered successes on cube-single task 2.
SHOWN_BOUND = 4.0
# FRS hardly works: with so many wrong directions it solves at most one episode in ten, on tasks that plain DSRL does not solve
# in the budget either. With three of five wrong no episode of 150 on task 5 succeeded: there is no one success to begin with.
DEGRADED = {
    "ogbench/cube-single-task2": ReasonerSettings(error=0.75),
    "ogbench/cube-single-task3": ReasonerSettings(error=0.75),
    "ogbench/cube-single-task4": ReasonerSettings(error=0.55),
    "ogbench/cube-single-task5": ReasonerSettings(error=0.5),
    "ogbench/scene-task1": ReasonerSettings(error=0.65),
    "ogbench/puzzle-3x3-task1": ReasonerSettings(error=0.75),
    "ogbench/cube-double-task1": ReasonerSettings(error=0.75),
    "libero/90/LIVING_ROOM_SCENE6_put_the_chocolate_pudding_to_the_right_of_the_plate": ReasonerSettings(error=0.6),
}
HARDLY = tuple(DEGRADED)
# K, of FRS and of every latent that is learned there, where it is not 5: on what the generalist never saw it needs more.
REVERSALS = {"libero/90/LIVING_ROOM_SCENE6_put_the_chocolate_pudding_to_the_right_of_the_plate": 20}
ONE_TAUGHT = "DSBC, one success"
# Where 1,500 decisions are 37 episodes of a seed, of which one of three holds no success to go on from.
LONGER = {"ogbench/cube-single-task4": 3_000}
AGAIN = "DSRL + FRS, distilled again"
WIDER = f"DSRL, bound {SHOWN_BOUND:g}"  # with the room that what is taught has
# Where noise policies hold no episode out to stop by, as those that are distilled again: with a fifth held out, as elsewhere, the
# same twenty successes teach 24% in the place of 42.
HOLDS_NOTHING_OUT = ("ogbench/cube-double-task1",)
RETAUGHT = 150  # decisions after which a noise policy is distilled again, from what has succeeded since too
# What is swept begins as the noise policy of twenty successes: in a budget that eleven rows can have, plain DSRL finds too few
# successes of its own for any setting to show.
SWEPT = "ogbench/cube-single-task5"
SWEPT_DECISIONS = 600
UNCHANGED = f"sac, full, bound {SHOWN_BOUND:g}"  # the row that the three sweeps share
# RFS learns from what it does itself. From a sparse reward it learned nothing here in 8,000 decisions; Meta-World's is dense.
RFS_DECISIONS = {"metaworld/door-close-v3": 30_000, "metaworld/reach-v3": 30_000}
RFS_TASKS = tuple(RFS_DECISIONS)
# A prior of twenty demonstrations without what they did along z, its actions normalised by their deviations, that sees everything
# so many metres along x from where it is: whatever its noise it never moves up or down, and of what it does all the time a small
# residual undoes six centimetres.
BESIDE = {"metaworld/reach-v3": 0.1}
# With the preset's 0.08 of its bound a residual tries a quarter of a millimetre a step: little came of it in 20,000 decisions.
RESIDUAL_STD = {"metaworld/reach-v3": 0.4}
# Where positions begin in an observation of Meta-World's: the first object's, the same a step before, the goal's.
PLACES = (4, 22, 36)
VERTICAL = 2  # in an action
# Of an environment's step, eight a decision: with 0.99 the value of a reward between -1 and 0 a step is near -100, and PPO spends
# this budget on finding that out.
DENSE_DISCOUNT = 0.95
ROLLOUTS = 20
CORRECTED = 30  # episodes with an expert at hand
TAUGHT = 5  # successes from which the noise policy that is corrected was distilled: few, so that there is something to correct
UPDATES = 2_000
# Of RFS from corrections, what is compared: label -> weight of the value against the anchor, what the critic sees.
LEARNED_FROM: dict[str, tuple[float, CriticSees]] = {
    "imitation alone": (0.0, "executed"),
    "value 0.01, executed action": (0.01, "executed"),
    "value 0.01, residual alone": (0.01, "residual"),
    "value 0.01, both": (0.01, "both"),
    "value 2.5 (TD3+BC's), executed action": (2.5, "executed"),
}
METHODS = (
    "DSRL",
    WIDER,
    "residual",
    "DSRL + FRS",
    AGAIN,
    "DSRL + FRS, recorded noises",
    "DSRL + FRS, kept in action",
    "anchors + critic",
    "anchors + critic, reasoner",
)
BOUNDS = (0.5, 1.0, 1.5, 2.0, 3.0)
DECISIONS = 1_500
EVALUATIONS = 5  # of a run


@dataclass(frozen=True)
class Arguments:
    """Run the benchmark of online reinforcement learning."""

    stages: tuple[Stage, ...] = STAGES
    """references: base, FRS and DSBC; works: where FRS works; hardly: from a single success; draws: what DSRL + FRS has learned
    there, by its means and with latents drawn as in training; rfs: with its ablations; offline: RFS from corrections; variants:
    SAC against noise aliasing; bounds and shapes: of the latent; probe: steerability."""
    tasks: tuple[str, ...] = ()
    """Run the stages of a table for these tasks alone."""
    methods: tuple[str, ...] = ()
    """And for these methods, by their names in the table; none: for all."""
    decisions: int = DECISIONS
    """Chunks of each seed; the sweeps have fewer, RFS and rows that name their own more."""
    episodes: int = 10
    """Of an evaluation on the way, each seed."""
    final_episodes: int = 50
    """Of the evaluation at the end, each seed, and of the references."""
    seeds: tuple[int, ...] = SEEDS
    """Training seeds, side by side."""
    only_report: bool = False
    """Write tables and figures from the results that are there."""


@dataclass(frozen=True)
class Job:
    """What a stage is told.

    Attributes:
        console: where to say how far it is.
        arguments: of the command.
    """

    console: Console
    arguments: Arguments

    def tasks(self, known: Sequence[str]) -> list[str]:
        """Return the tasks to run."""
        return [task for task in known if not self.arguments.tasks or task in self.arguments.tasks]


def main() -> None:
    """Run what is missing, then report."""
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(1)  # the networks are small; the cores are the simulators'
    console = Console()
    if not arguments.only_report:
        for stage in arguments.stages:
            RUN[stage](Job(console, arguments))
    report()


def short(task: str) -> str:
    """Return a task's name without its benchmark and suite."""
    return task.split("/")[-1]


def reversals(task: str) -> int:
    """Return K."""
    return REVERSALS.get(task, OnlineRun().steps)


def prior_of(task: str) -> str | None:
    """Return the policy of a task's own (see `BESIDE`), made if it is missing; None: what is shipped."""
    if task not in BESIDE:
        return None
    own = DATA / "policies" / f"{short(task)}-beside-{BESIDE[task]:g}.safetensors"
    if not own.exists():
        demonstrations = DATA / "policies" / f"{short(task)}.npz"
        demonstrate(task, demonstrations, episodes=20)
        with np.load(demonstrations) as archive:
            arrays = dict(archive)
        arrays["actions"][:, VERTICAL] = 0.0
        planar = demonstrations.with_stem(f"{demonstrations.stem}-planar")
        save_npz(planar, arrays)
        few = BCConfig(horizon=8, network=NetworkConfig(width=256), steps=3_000, batch_size=256)
        few = replace(few, action_normalisation="mean_std")
        policy = load(train_bc(planar, task, RUNS / "policies" / short(task), few).path)
        assert isinstance(policy, FlowPolicy)
        for first in PLACES:
            policy.observation_normaliser.offset[first] += BESIDE[task]  # what is subtracted from what is seen
        save(policy, own)
    return str(own)


def recording(task: str, method: str, successes: int, reasoner: ReasonerSettings | None = None) -> Path:
    """Return the folder of a task's rollouts, recorded as far as they are missing."""
    out = DATA / (method if reasoner is None else f"{method}-error-{reasoner.error:g}") / short(task)
    # Noises of other steps would be other noises.
    settings = MethodSettings(steps=reversals(task), reversal_steps=reversals(task))
    if method == "base":
        record(task, "base", out, episodes=successes, settings=settings, every_step=False)
    else:
        most = 50 * successes + 100
        record(task, method, out, successes=successes, reasoner=reasoner, settings=settings, max_episodes=most)
    return out


def distilled(task: str, *, one: bool = False) -> Path:
    """Return the noise policy of a task's steered successes, or of one with the worse reasoner, made if it is missing."""
    policy = DATA / "policies" / f"{short(task)}{'-one' if one else ''}.safetensors"
    if not policy.exists():
        source = recording(task, "frs", 1, DEGRADED[task]) if one else recording(task, "frs", ROLLOUTS, ERRING)
        held_out = 0.0 if task in HOLDS_NOTHING_OUT else DSBCConfig().held_out
        distill([source], policy, DSBCConfig(held_out=held_out))
    return policy


def trained(
    job: Job,
    stage: str,
    label: str,
    task: str,
    algorithm: str,
    preset: tuple[Config, OnlineRun],
    data: Path | None = None,
    noise_policy: Path | None = None,
    **changes: Any,
) -> None:
    """Train what is missing and keep its curves."""
    arguments = job.arguments
    out = RUNS / stage / f"{short(task)}-{label.replace(' ', '-')}"
    kept = RESULTS / stage / f"{out.name}.json"
    if kept.exists() or (arguments.methods and label not in arguments.methods):
        return
    config, settings = preset
    settings = replace(
        settings,
        decisions=arguments.decisions,
        episodes=arguments.episodes,
        final_episodes=arguments.final_episodes,
        evaluate_every=arguments.decisions // EVALUATIONS,
        steps=reversals(task),
    )
    settings = replace(settings, **changes)
    job.console.log(f"{stage}: {task}, {label}")

    def show(progress: OnlineProgress) -> None:
        if progress.decision % settings.evaluate_every < settings.report_every:  # the first report after an evaluation
            job.console.log(f"  {progress.decision}: training {progress.recent}, evaluation {progress.success}")

    train_online(
        algorithm,
        task,
        out,
        config,
        settings,
        prefill_from=data,
        noise_policy=noise_policy,
        policy=prior_of(task),
        seeds=arguments.seeds,
        on_progress=show,
    )
    content = json.loads((out / "results.json").read_text())
    write_json(kept, {"label": label, "task": task, "start": json.loads((out / "start.json").read_text()), **content})


def plain_dsrl(variant: Variant = "sac") -> tuple[Config, OnlineRun]:
    """Return the small preset without what only recordings give."""
    config, settings = online_preset("dsrl", "small", variant)
    assert isinstance(config, DSRLConfig)
    return replace(config, bc_weight=0.0), settings


def references(job: Job) -> None:
    """Run what online learning is compared with: base, FRS with both reasoners, and DSBC from the better one's rollouts."""
    episodes = job.arguments.final_episodes
    for task in job.tasks(tuple(dict.fromkeys((*WORKS, *HARDLY, *RFS_TASKS)))):
        path = RESULTS / "references" / f"{short(task)}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        wanted = ["base", *(["FRS", "DSBC"] if task in WORKS else [])]
        wanted += ["FRS, degraded", ONE_TAUGHT] if task in HARDLY else []
        missing = [name for name in wanted if name not in found]
        if not missing:
            continue
        prior = load_prior(task, prior_of(task))
        with open_env(task, episodes) as env:
            for name in missing:
                job.console.log(f"references: {task}, {name}")
                if name.startswith("DSBC"):
                    learned = ChunkRegressor.load(distilled(task, one=name == ONE_TAUGHT))
                    result = evaluate(env, prior, "dsbc", episodes, 0, learned=learned)
                else:
                    reasoner = DEGRADED[task] if name == "FRS, degraded" else ERRING
                    method = "base" if name == "base" else "frs"
                    steered = MethodSettings(reversal_steps=reversals(task))
                    result = evaluate(env, prior, method, episodes, 0, reasoner=reasoner, settings=steered)
                content = result.to_json()
                found[name] = {key: content[key] for key in content if key != "outcomes"}
                write_json(path, found)


def works(job: Job) -> None:
    """Run all online algorithms where FRS works."""
    for task in job.tasks(WORKS):
        steered, base = recording(task, "frs", ROLLOUTS, ERRING), recording(task, "base", ROLLOUTS)
        shown: dict[str, Any]
        asking: dict[str, Any]
        shown, asking = {"bound": SHOWN_BOUND}, {"bound": SHOWN_BOUND, "reasoner_error": ERRING.error}
        recorded, both, anchors = (
            online_preset("dsrl", "small"),
            online_preset("dsrl", "small", taught=True),
            plain_dsrl("anchors"),
        )
        shown_by = distilled(task)
        trained(job, "works", "residual", task, "residual", online_preset("residual", "small"), base)
        trained(job, "works", "DSRL", task, "dsrl", plain_dsrl())
        trained(job, "works", WIDER, task, "dsrl", plain_dsrl(), **shown)
        trained(job, "works", "DSRL + FRS", task, "dsrl", both, steered, shown_by)
        trained(job, "works", AGAIN, task, "dsrl", both, steered, shown_by, reteach_every=RETAUGHT)
        trained(job, "works", "DSRL + FRS, recorded noises", task, "dsrl", recorded, steered, **shown)
        trained(
            job,
            "works",
            "DSRL + FRS, kept in action",
            task,
            "dsrl",
            both,
            steered,
            shown_by,
            keep_steering=True,
            **asking,
        )
        trained(job, "works", "anchors + critic", task, "dsrl", anchors, steered, **shown)
        trained(job, "works", "anchors + critic, reasoner", task, "dsrl", anchors, steered, reasoner=True, **asking)


def hardly(job: Job) -> None:
    """Run DSRL alone, and from one success."""
    for task in job.tasks(HARDLY):
        one = recording(task, "frs", 1, DEGRADED[task])
        if task not in WORKS:  # where the same run is asked for
            trained(job, "hardly", "DSRL", task, "dsrl", plain_dsrl())
        both = online_preset("dsrl", "small", taught=True)
        changes: dict[str, Any] = {"successes_only": True, "first": 1}
        teaching = distilled(task, one=True)
        trained(job, "hardly", "DSRL + FRS", task, "dsrl", both, one, teaching, **changes)
        trained(job, "hardly", AGAIN, task, "dsrl", both, one, teaching, reteach_every=RETAUGHT, **changes)
        if task in LONGER:
            longer: dict[str, Any] = {"decisions": LONGER[task], "evaluate_every": LONGER[task] // EVALUATIONS}
            trained(job, "hardly", f"DSRL, {LONGER[task]:,} decisions", task, "dsrl", plain_dsrl(), **longer)
            changes |= {"reteach_every": RETAUGHT, **longer}
            label = f"{AGAIN}, {LONGER[task]:,} decisions"
            trained(job, "hardly", label, task, "dsrl", both, one, teaching, **changes)


def rfs(job: Job) -> None:
    """Run RFS and its ablations, PPO on the environment's dense reward."""
    for task in job.tasks(RFS_TASKS):
        config, settings = online_preset("rfs", "small")
        assert isinstance(config, RFSConfig)
        config = replace(config, discount=DENSE_DISCOUNT)
        config = replace(config, residual_std=RESIDUAL_STD.get(task, config.residual_std))
        for ports in ("both", "latent", "residual"):
            trained(
                job,
                "rfs",
                f"RFS {ports}",
                task,
                "rfs",
                (config, settings),
                ports=ports,
                reward="dense",
                decisions=RFS_DECISIONS[task],
                evaluate_every=RFS_DECISIONS[task] // EVALUATIONS,
            )


def offline(job: Job) -> None:
    """Correct a noise policy that was taught by few successes, by what an expert did differently; the critic's input ablated."""
    arguments = job.arguments
    for task in job.tasks(WORKS[:2]):
        helped = DATA / "helped" / short(task)
        dagger(task, recording(task, "frs", ROLLOUTS), helped, rounds=1, episodes=CORRECTED, first=TAUGHT)
        for label, (alpha, seen) in LEARNED_FROM.items():
            kept = RESULTS / "offline" / f"{short(task)}-{seen}-{alpha:g}.json"
            if kept.exists() or (arguments.methods and label not in arguments.methods):
                continue
            out = RUNS / "offline" / kept.stem
            job.console.log(f"offline: {task}, {label}")
            train_corrections(
                helped / "rollouts",
                task,
                out,
                CorrectionsConfig(alpha=alpha, critic_sees=seen),
                CorrectionsRun(UPDATES, residual_bound=(0.5,), episodes=arguments.final_episodes),
                noise_policy=helped / "round-0.safetensors",
                seeds=arguments.seeds,
            )
            rounds = json.loads((helped / "rounds.json").read_text())["rounds"]
            content = json.loads((out / "results.json").read_text())
            write_json(kept, {"task": task, "label": label, "round": rounds[0], **content})


def swept(job: Job, stage: str, label: str, variant: Variant = "sac", **changes: Any) -> None:
    """Run DSRL + FRS on one task with something changed."""
    preset = online_preset("dsrl", "small", variant, taught=True)
    changes = {"bound": SHOWN_BOUND, **changes}
    steered, taught = recording(SWEPT, "frs", ROLLOUTS, ERRING), distilled(SWEPT)
    shorter = min(SWEPT_DECISIONS, job.arguments.decisions)
    every = shorter // EVALUATIONS
    trained(
        job, stage, label, SWEPT, "dsrl", preset, steered, taught, decisions=shorter, evaluate_every=every, **changes
    )


def variants(job: Job) -> None:
    """Run the SAC variant against noise aliasing, same settings otherwise."""
    swept(job, "variants", UNCHANGED)
    swept(job, "variants", "aliasing", "aliasing")


def bounds(job: Job) -> None:
    """Sweep the noise bound."""
    for bound in BOUNDS:
        swept(job, "bounds", f"bound {bound:g}", bound=bound)


def shapes(job: Job) -> None:
    """Compare the latent's shapes."""
    for latent, rest in (("low_rank", "prior"), ("low_rank", "zero"), ("repeated", "prior")):
        label = latent if latent != "low_rank" else f"low_rank, rest {rest}"
        swept(job, "shapes", label, latent=latent, rest=rest)


def steerabilities(job: Job) -> None:
    """Probe every task."""
    for task in job.tasks((*WORKS, *RFS_TASKS)):
        path = RESULTS / "probe" / f"{short(task)}.json"
        if not path.exists():
            job.console.log(f"probe: {task}")
            with open_env(task, 20) as env:
                found = probe(env, load_prior(task, prior_of(task)))
            write_json(path, {**found.to_json(), "machine": machine()})


def draws(job: Job) -> None:
    """Let what DSRL + FRS has learned act by its means, and draw its latents, in the same episodes; of runs still there."""
    episodes = job.arguments.final_episodes
    for stage in ("works", "hardly"):
        for task in job.tasks(tuple(dict.fromkeys((*WORKS, *HARDLY)))):
            for path in sorted((RESULTS / stage).glob(f"{short(task)}-DSRL-+-FRS*.json")):
                content = json.loads(path.read_text())
                actors = sorted((RUNS / stage / path.stem).glob("seed-*/checkpoints/actor.safetensors"))
                learned = [SteeringActor.load(actor) for actor in actors]
                ended = [points[-1]["decisions"] for points in content["curves"].values()]
                wanted = not job.arguments.methods or content["label"] in job.arguments.methods
                if not wanted or "drawn" in content or [one.provenance["decisions"] for one in learned] != ended:
                    continue
                job.console.log(f"draws: {task}, {content['label']}")
                prior = load_prior(task)
                found: dict[str, list[Any]] = {"mean": [], "drawn": []}
                with open_env(task, episodes) as env:
                    for index, actor in enumerate(learned):
                        for name in found:
                            drawn = name == "drawn"
                            result = evaluate(env, prior, "actor", episodes, index, learned=actor, drawn=drawn)
                            found[name].append(result.rate.to_json())
                write_json(path, {**content, **found})


RUN: dict[str, Callable[[Job], None]] = {
    "references": references,
    "works": works,
    "hardly": hardly,
    "draws": draws,
    "rfs": rfs,
    "offline": offline,
    "variants": variants,
    "bounds": bounds,
    "shapes": shapes,
    "probe": steerabilities,
}


def results_of(stage: str) -> dict[str, dict[str, Any]]:
    """Return what a stage left: task -> label -> content."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((RESULTS / stage).glob("*.json")):
        content = json.loads(path.read_text())
        found.setdefault(content["task"], {})[content["label"]] = content
    return found


def counted(point: Mapping[str, Any]) -> SuccessRate:
    """Return the success of an evaluation of one seed."""
    return SuccessRate(round(point["success_rate"] * point["episodes"]), int(point["episodes"]))


def curve(content: Mapping[str, Any]) -> dict[float, SeedsRate]:
    """Return success against environment steps, a seed's mean."""
    points: dict[float, SeedsRate] = {}
    for several in zip(*content["curves"].values(), strict=True):
        steps = sum(one["environment_steps"] for one in several) / len(several)
        points[round(steps)] = SeedsRate(tuple(counted(one) for one in several))
    return points


def report() -> None:
    """Write tables into the README and draw the figures, of what has been run."""
    report_offline()
    report_probe()
    for stage in ("works", "hardly", "rfs", "variants", "bounds", "shapes"):
        found = results_of(stage)
        if not found:
            continue
        if stage in ("bounds", "shapes"):
            for task, methods in found.items():
                shared = results_of("variants").get(task, {})
                methods.update({label: shared[label] for label in (UNCHANGED,) if label in shared})
                found[task] = dict(sorted(methods.items()))
        if stage == "hardly":
            for task, methods in found.items():
                alone = results_of("works").get(task, {})
                methods.update({label: alone[label] for label in ("DSRL",) if label in alone})
        drawing = any("drawn" in content for methods in found.values() for content in methods.values())
        heads = ["task", "method", "success at the end", "each seed", *(["mean, drawn"] if drawing else [])]
        heads += ["recorded steps", "environment steps a seed", "seconds, all seeds"]
        lines = ["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
        for task, methods in found.items():
            levels = levels_of(task, stage)
            success_curve(
                {label: curve(content) for label, content in methods.items()},
                HERE / f"{stage}-{short(task)}.png",
                xlabel="environment steps of a seed",
                title=task,
                subtitle=f"{len(next(iter(methods.values()))['curves'])} training seeds",
                levels=levels,
            )
            empty = " |" * (len(heads) - 3)
            lines += [f"| {task} | {label} | {cell(rate)} |{empty}" for label, rate in levels.items()]
            for label, content in methods.items():
                steps, rate = list(curve(content).items())[-1]
                cells = [task, label, cell(rate), each(rate), *([drawn_rate(content)] if drawing else [])]
                cells += [recorded_steps(content), f"{steps:,.0f}", f"{content['ledger']['seconds']:.0f}"]
                lines.append("| " + " | ".join(cells) + " |")
        write_between(HERE / "README.md", stage, COMMAND, "\n".join(lines))
        if stage == "works":
            write_between(HERE.parents[1] / "README.md", "rl", COMMAND, summary(found))


def each(rate: SeedsRate) -> str:
    """Write the rates of single seeds."""
    return ", ".join(f"{100 * one.rate:.0f}" for one in rate.seeds)


def recorded_steps(content: Mapping[str, Any]) -> str:
    """Write how many environment steps the recording has that the replay begins with, of all seeds the same one."""
    return f"{content['prefill']['environment_steps']:,}" if content["prefill"] else ""


def drawn_rate(content: Mapping[str, Any]) -> str:
    """Write the success of means and of drawn latents; nothing where it was not measured."""
    return ", ".join(
        cell(SeedsRate(tuple(SuccessRate(one["successes"], one["episodes"]) for one in content[name])))
        for name in ("mean", "drawn")
        if content.get(name)
    )


def summary(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return success at the end, a row a task, for the project's README."""
    rows: dict[str, dict[str, Rate]] = {
        task: levels_of(task, "works")
        | {label: list(curve(content).values())[-1] for label, content in methods.items()}
        for task, methods in found.items()
    }
    labels = [one for one in ("base", "FRS", "DSBC", *METHODS) if any(one in row for row in rows.values())]
    lines = ["| task | " + " | ".join(labels) + " |", "| --- |" + " ---: |" * len(labels)]
    for task, row in rows.items():
        lines.append(f"| {task} | " + " | ".join(cell(row[one]) if one in row else "" for one in labels) + " |")
    return "\n".join(lines)


def report_offline() -> None:
    """Write the table of RFS from corrections."""
    found = results_of("offline")
    if not found:
        return
    lines = ["| task | learned by | what is corrected | with the residual | each seed | corrected decisions |"]
    lines += ["| --- | --- | ---: | ---: | --- | ---: |"]
    for task, contents in found.items():
        for label, content in sorted(contents.items(), key=lambda one: list(LEARNED_FROM).index(one[0])):
            last = {name: points[-1] for name, points in content["curves"].items()}
            base = last.pop("base")
            rate, share = SeedsRate(tuple(map(counted, last.values()))), content["round"]["interventions"]
            cells = [task, label, cell(counted(base)), cell(rate), each(rate), f"{100 * share:.0f}%"]
            lines.append("| " + " | ".join(cells) + " |")
    write_between(HERE / "README.md", "offline", COMMAND, "\n".join(lines))


def report_probe() -> None:
    """Write the table of what the steerability probe found, a row a task."""
    found = [json.loads(path.read_text()) for path in sorted((RESULTS / "probe").glob("*.json"))]
    if not found:
        return

    def percent(one: Mapping[str, Any]) -> str:
        return f"{100 * one['successes'] / one['episodes']:.0f}"

    heads = ["task", "base", "one noise, held fixed"]
    heads += [f"residual {std}" for std in found[0]["residual"]] + list(found[0]["shapes"])
    heads += [f"reach, bound {bound}" for bound in found[0]["reach"]] + ["recommended"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 2) + " --- |"]
    for one in found:
        said = one["recommended"]
        cells = [one["env"], percent(one["base"]), ", ".join(map(percent, one["fixed"]))]
        cells += [percent(rate) for rate in (*one["residual"].values(), *one["shapes"].values())]
        cells += [f"{100 * share:.0f}" for share in one["reach"].values()]
        told = "" if said["tells"] else " (neither could be told)"
        cells.append(f"bound {said['bound']:g}; latent {said['latent']}, residual {said['residual_std']:g}{told}")
        lines.append("| " + " | ".join(cells) + " |")
    write_between(HERE / "README.md", "probe", COMMAND, "\n".join(lines))


def levels_of(task: str, stage: str) -> dict[str, SuccessRate]:
    """Return the rates of a task that do not depend on environment steps."""
    path = RESULTS / "references" / f"{short(task)}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    shown = ("base", "FRS", "DSBC")
    names = {"hardly": ("base", "FRS, degraded", ONE_TAUGHT), "rfs": ("base",)}.get(stage, shown)
    return {name: SuccessRate(found[name]["successes"], found[name]["episodes"]) for name in names if name in found}


def cell(rate: Rate) -> str:
    """Write a rate in percent with its interval."""
    return f"{100 * rate.rate:.0f} ({100 * rate.interval.low:.0f}-{100 * rate.interval.high:.0f})"


if __name__ == "__main__":
    main()
