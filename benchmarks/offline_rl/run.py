"""Offline RL on locally generated data: BC, IFQL, FQL, QGF and RQL, three seeds side by side.

    counterflow collect ogbench/cube-single --episodes 300 --out DATA/cube-single-play.npz
    counterflow collect ogbench/scene --episodes 300 --out DATA/scene-play.npz
    python benchmarks/offline_rl/run.py --data DATA

trains what is missing into `runs/`, evaluates into `results/` (a file a task), and writes the tables and figures of README.md.
Stages and tasks can be named, and `--only-report` leaves out the running. Runs are not committed: the same command makes them
again.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from rich.console import Console

from counterflow.envs import family_of
from counterflow.experiments.compare import Comparison, Contender, compare, comparison_of, read_results
from counterflow.experiments.figures import success_bars, success_curve
from counterflow.experiments.offline import OfflineProgress, acting_of, train_offline
from counterflow.experiments.presets import preset
from counterflow.experiments.statistics import MeanRate, SuccessRate
from counterflow.files import write_between, write_json
from counterflow.learning.bc import Precision
from counterflow.learning.offline import OfflineConfig
from counterflow.steering import GuidanceSettings

HERE = Path(__file__).parent
COMMAND = "benchmarks/offline_rl/run.py"
RUNS, RESULTS = HERE / "runs", HERE / "results"
CUBE_TASKS = tuple(f"ogbench/cube-single-task{task}" for task in range(1, 6))
SCENE_TASKS = tuple(f"ogbench/scene-task{task}" for task in (1, 2, 3))
TASKS = (*CUBE_TASKS, *SCENE_TASKS)
FAMILIES = {"ogbench/cube-single": CUBE_TASKS, "ogbench/scene": SCENE_TASKS}
SEEDS = (0, 1, 2)
CURVE_EPISODES = 10  # at each point of a learning curve, for each seed and task
ALGORITHMS = ("qgf", "ifql", "fql", "rql")
WEIGHTS = (0.01, 0.03, 0.1, 0.3)  # of QGF's sweep; the scale is that of the critic's gradient
WIDTHS = (64, 128, 256)  # of every network; the last is the small preset's
SCALED = ("ogbench/cube-single-task3", "ogbench/cube-single-task4")
GOAL_FAMILIES = ("cube-single", "scene")
LONGER = "80,000 updates"  # of 256 in the place of 128, one seed: whether goals at test time want no more than training
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
PRECISE_TASK, PRECISE = "ogbench/cube-single-task1", ("qgf", "rql")
Stage = Literal["train", "small", "prior", "goals", "longer", "scale", "precision", "parity"]
STAGES: tuple[Stage, ...] = get_args(Stage)
# Of QGF, what is compared: label -> how the critic takes part.
GUIDANCE: dict[str, GuidanceSettings] = {
    **{f"QGF, weight {weight:g}": GuidanceSettings(weight=weight) for weight in WEIGHTS},
    "QGF, auto": GuidanceSettings(),
    "QGF, auto, (1 - t)/t, Jacobian": GuidanceSettings(schedule="remaining", jacobian=True),
    "QGF, auto, best of 8": GuidanceSettings(best_of=8),
}
METHODS = (
    "BC",
    "IFQL",
    "FQL",
    "QGF, best weight",
    "QGF, auto",
    "QGF, auto, (1 - t)/t, Jacobian",
    "QGF, auto, best of 8",
    "RQL",
)


@dataclass(frozen=True)
class Arguments:
    """Run the benchmark of offline RL."""

    data: Path = HERE / "data"
    """The folder of the datasets, <family>-play.npz."""
    stages: tuple[Stage, ...] = STAGES
    """train: the small preset; small: evaluate it; prior: critics that guide the shipped prior; goals: goal-conditioned; longer:
    the same on cube-single, trained for longer; scale: three widths; precision: float32 beside bfloat16, trained anew; parity:
    golden numbers."""
    tasks: tuple[str, ...] = TASKS
    """For these tasks alone."""
    algorithms: tuple[str, ...] = ALGORITHMS
    """For these alone."""
    episodes: int = 50
    """Evaluation episodes for each policy on each task."""
    sweep_episodes: int = 0
    """Of each weight of QGF's sweep; 0: as many."""
    only_report: bool = False
    """Write tables and figures from the results that are there."""


def main() -> None:
    """Run what is missing, then report."""
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(1)  # evaluations and trainings may run side by side
    console = Console()
    if not arguments.only_report:
        for stage in arguments.stages:
            RUN[stage](arguments, console)
    report()


def folder_of(algorithm: str, task: str) -> Path:
    """Return the folder of a run."""
    return RUNS / f"{algorithm}-{task.split('/')[1]}"


def train(arguments: Arguments, console: Console) -> None:
    """Train every algorithm on every task, three seeds side by side."""
    for task in arguments.tasks:
        data = arguments.data / f"{family_of(task).split('/')[1]}-play.npz"
        for algorithm in arguments.algorithms:
            config, run = preset(algorithm, task, "small")
            # Four points of a curve that all tasks of cube-single share; scene's episodes are too long for that.
            run = replace(run, evaluate_every=2_000, episodes=CURVE_EPISODES if task in CUBE_TASKS else 0)
            console.log(f"{algorithm} on {task}")

            def show(progress: OfflineProgress) -> None:
                if progress.step % 2_000 == 0:
                    console.log(f"  {progress.step}, {progress.seconds:.0f} s, {progress.success}")

            folder = folder_of(algorithm, task)
            train_offline(algorithm, data, task, folder, config, run, seeds=SEEDS, on_progress=show)
            keep_curve(folder)


def keep_curve(folder: Path) -> None:
    """Keep what a run's evaluations on the way found, which runs that aren't committed would take with them."""
    points: dict[str, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():  # a seed's evaluation may be a line of its own
        found = json.loads(line)
        rates = [value for name, value in found.items() if name.startswith("success/")]
        if rates:
            points.setdefault(str(found["step"]), []).extend(rates)
    if points:
        write_json(RESULTS / "curves" / f"{folder.name}.json", points)


def small(arguments: Arguments, console: Console) -> None:
    """Evaluate what was trained."""
    for task in arguments.tasks:
        path = RESULTS / "small" / f"{task.split('/')[1]}.json"
        for seed in SEEDS:
            for algorithm in arguments.algorithms:
                folder = folder_of(algorithm, task) / f"seed-{seed}"
                if (folder / "checkpoints" / "policy.safetensors").exists():
                    contenders = contenders_of(algorithm, task, seed, folder / "checkpoints" / "critic.safetensors")
                    swept = [one for one in contenders if one.label.startswith("QGF, weight")]
                    others = [one for one in contenders if one not in swept]
                    run(console, task, others, arguments.episodes, path, str(folder))
                    run(console, task, swept, arguments.sweep_episodes or arguments.episodes, path, str(folder))


def contenders_of(algorithm: str, task: str, seed: int, critic: Path) -> list[Contender]:
    """Return what is evaluated of one run."""
    if algorithm == "qgf":
        guided = [
            Contender(f"{label}, seed {seed}", "qgf", critic=str(critic), guidance=settings)
            for label, settings in GUIDANCE.items()
        ]
        return [Contender(f"BC, seed {seed}", "base"), *guided]
    own = acting_of(preset(algorithm, task, "small")[0])
    label = f"{algorithm.upper()}, seed {seed}"
    if own.guidance is None:
        return [Contender(label, own.method, own.settings)]
    return [Contender(label, own.method, own.settings, critic=str(critic), guidance=own.guidance)]


def prior(arguments: Arguments, console: Console) -> None:
    """Guide one frozen play prior by the critics of the QGF runs, alone and together with FRS: nothing is trained for it."""
    for task in arguments.tasks:
        path = RESULTS / "prior" / f"{task.split('/')[1]}.json"
        for seed in SEEDS:
            critic = folder_of("qgf", task) / f"seed-{seed}" / "checkpoints" / "critic.safetensors"
            if not critic.exists():
                continue
            contenders = [
                Contender("prior", "base"),
                Contender("FRS", "frs"),
                Contender(f"prior + QGF, seed {seed}", "qgf", critic=str(critic)),
                Contender(
                    f"prior + QGF, best of 8, seed {seed}",
                    "qgf",
                    critic=str(critic),
                    guidance=GuidanceSettings(best_of=8),
                ),
                Contender(f"FRS + QGF, seed {seed}", "frs", critic=str(critic)),
            ]
            run(console, task, contenders, arguments.episodes, path)


def goals(arguments: Arguments, console: Console) -> None:
    """Train one goal-conditioned flow and critic a family, and evaluate it on OGBench's five goals."""
    for name in GOAL_FAMILIES:
        tasks = [f"ogbench/{name}-goals-task{task}" for task in range(1, 6)]
        if not any(task.replace("-goals", "") in arguments.tasks for task in tasks):
            continue
        config, settings = preset("qgf", tasks[0], "small")
        settings = replace(settings, steps=2 * settings.steps, episodes=0)  # five tasks' worth of goals in one network
        folder = RUNS / f"qgf-{name}-goals"
        console.log(f"goal-conditioned QGF on {name}")
        train_offline("qgf", arguments.data / f"{name}-play.npz", tasks[0], folder, config, settings, seeds=SEEDS)
        evaluate_goals(tasks, folder, SEEDS, "", arguments, console)


def longer(arguments: Arguments, console: Console) -> None:
    """Train one seed of the goal-conditioned flow and critic of cube-single on twenty times the samples."""
    tasks = [f"ogbench/cube-single-goals-task{task}" for task in range(1, 6)]
    config, settings = preset("qgf", tasks[0], "small")
    config, settings = replace(config, batch_size=256), replace(settings, steps=80_000, episodes=0)
    folder = RUNS / "qgf-cube-single-goals-longer"
    console.log("goal-conditioned QGF on cube-single, longer")

    def show(progress: OfflineProgress) -> None:
        if progress.step % 10_000 == 0:
            console.log(f"  {progress.step}, {progress.seconds:.0f} s")

    data = arguments.data / "cube-single-play.npz"
    train_offline("qgf", data, tasks[0], folder, config, settings, seeds=SEEDS[:1], on_progress=show)
    evaluate_goals(tasks, folder, SEEDS[:1], f", {LONGER}", arguments, console)


def evaluate_goals(
    tasks: Sequence[str], folder: Path, seeds: Sequence[int], budget: str, arguments: Arguments, console: Console
) -> None:
    """Evaluate goal-conditioned runs on a family's goals."""
    for task in tasks:
        for seed in seeds:
            own = folder / f"seed-{seed}"
            critic = str(own / "checkpoints" / "critic.safetensors")
            end = f"{budget}, seed {seed}"
            contenders = [
                Contender(f"flow BC{end}", "base"),
                Contender(f"QGF{end}", "qgf", critic=critic, guidance=GuidanceSettings()),
                Contender(f"QGF, best of 8{end}", "qgf", critic=critic, guidance=GuidanceSettings(best_of=8)),
            ]
            path = RESULTS / "goals" / f"{task.split('/')[1]}.json"
            run(console, task, contenders, arguments.episodes, path, str(own))


def scale(arguments: Arguments, console: Console) -> None:
    """Train QGF and RQL at three widths; the small preset's is that of the main table."""
    for task in SCALED:
        if task not in arguments.tasks:
            continue
        path = RESULTS / "scale" / f"{task.split('/')[1]}.json"
        for width in WIDTHS:
            for algorithm in ("qgf", "rql"):
                config, settings = preset(algorithm, task, "small")
                folder = folder_of(algorithm, task)
                if width != config.width:
                    folder = folder.with_name(f"{folder.name}-width{width}")
                    console.log(f"{algorithm} on {task}, width {width}")
                    config, settings = replace(config, width=width), replace(settings, episodes=0)
                    data = arguments.data / f"{family_of(task).split('/')[1]}-play.npz"
                    train_offline(algorithm, data, task, folder, config, settings, seeds=SEEDS)
                evaluate_trained(f"{algorithm.upper()}, width {width}", folder, config, task, path, arguments, console)


def precision(arguments: Arguments, console: Console) -> None:
    """Train in float32 and in bfloat16 on the same machine, from the same seeds."""
    data = arguments.data / f"{family_of(PRECISE_TASK).split('/')[1]}-play.npz"
    for algorithm in PRECISE:
        if algorithm not in arguments.algorithms:
            continue
        config, settings = preset(algorithm, PRECISE_TASK, "small")
        settings = replace(settings, episodes=0)
        for kind in PRECISIONS:
            folder = folder_of(algorithm, PRECISE_TASK)
            folder, own = folder.with_name(f"{folder.name}-{kind}"), replace(config, precision=kind)
            console.log(f"{algorithm} on {PRECISE_TASK}, {kind}")
            train_offline(algorithm, data, PRECISE_TASK, folder, own, settings, seeds=SEEDS)
            path = RESULTS / "precision" / f"{algorithm}.json"  # a file each, so that they may run side by side
            evaluate_trained(f"{algorithm.upper()}, {kind}", folder, own, PRECISE_TASK, path, arguments, console)


def evaluate_trained(
    label: str, folder: Path, config: OfflineConfig, task: str, path: Path, arguments: Arguments, console: Console
) -> None:
    """Evaluate what a run trained as its algorithm acts, every seed of it."""
    own = acting_of(config)
    for seed in SEEDS:
        place = folder / f"seed-{seed}"
        critic = None if own.guidance is None else str(place / "checkpoints" / "critic.safetensors")
        guidance = own.guidance or GuidanceSettings()
        contender = Contender(f"{label}, seed {seed}", own.method, own.settings, critic=critic, guidance=guidance)
        run(console, task, [contender], arguments.episodes, path, str(place))


def run(
    console: Console, task: str, contenders: Sequence[Contender], episodes: int, path: Path, policy: str | None = None
) -> None:
    """Evaluate what is missing in a file of results."""
    compare(
        [task],
        contenders,
        episodes,
        0,
        policy=policy,
        path=path,
        on_start=lambda name, contender: console.log(f"{name}, {contender.label}"),
    )


def parity(_: Arguments, console: Console) -> None:
    """Compare with the official numbers, quantity by quantity (the tests do the same, and fail beyond the tolerances)."""
    # The mapping of the official parameters is part of the tests.
    spec = importlib.util.spec_from_file_location("test_golden", HERE.parents[1] / "tests/learning/test_golden.py")
    assert spec is not None
    assert spec.loader is not None
    test_golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(test_golden)
    found = test_golden.deviations()
    write_json(RESULTS / "parity.json", found)
    console.log(f"largest deviation {max(max(one.values()) for one in found.values()):.1e}")


RUN: dict[str, Callable[[Arguments, Console], None]] = {
    "train": train,
    "small": small,
    "prior": prior,
    "goals": goals,
    "longer": longer,
    "scale": scale,
    "precision": precision,
    "parity": parity,
}


def report() -> None:
    """Write tables into the README and draw the figures, of what has been run."""
    draw_curves()
    for name, write in (
        ("parity", report_parity),
        ("small", report_small),
        ("prior", report_prior),
        ("goals", report_goals),
        ("scale", report_scale),
        ("precision", report_precision),
        ("speed", report_speed),
    ):
        write_between(HERE / "README.md", name, COMMAND, write())
    write_between(HERE.parents[1] / "README.md", "critics", COMMAND, report_prior())


def results_of(stage: str) -> Comparison | None:
    """Return all tasks' results of a stage; None if there are none."""
    results = [one for path in sorted((RESULTS / stage).glob("*.json")) for one in read_results(path)]
    return comparison_of(results) if results else None


def pooled(comparison: Comparison, label: str, task: str) -> SuccessRate | None:
    """Return a method's rate on a task, all training seeds together; None where it was not evaluated."""
    rates = [
        rates[task]
        for name, rates in comparison.rates.items()
        if task in rates and (name == label or name.startswith(f"{label}, seed "))
    ]
    return SuccessRate(sum(one.successes for one in rates), sum(one.episodes for one in rates)) if rates else None


def best_weight(comparison: Comparison, task: str) -> SuccessRate | None:
    """Return the rate with the best of the swept weights on a task: chosen on the evaluation itself, so a bound."""
    rates = [pooled(comparison, f"QGF, weight {weight:g}", task) for weight in WEIGHTS]
    known = [rate for rate in rates if rate is not None]
    return max(known, key=lambda rate: rate.rate) if known else None


def rate_of(comparison: Comparison, label: str, task: str) -> SuccessRate | None:
    """Return a method's rate, the best swept weight's among them."""
    return best_weight(comparison, task) if label == "QGF, best weight" else pooled(comparison, label, task)


def mean(comparison: Comparison, label: str, tasks: Iterable[str]) -> MeanRate | None:
    """Return a method's mean over those tasks of a list that have been evaluated; None unless all of them have been."""
    rates = [rate_of(comparison, label, task) for task in tasks if task in comparison.tasks]
    known = tuple(rate for rate in rates if rate is not None)
    return MeanRate(known) if known and len(known) == len(rates) else None


def report_small() -> str:
    """Return the main table and draw its figure."""
    comparison = results_of("small")
    if comparison is None:
        return ""
    lines = table(comparison, METHODS)
    success_bars(
        {
            family: found
            for family, tasks in FAMILIES.items()
            if (found := {one: rate for one in METHODS if (rate := mean(comparison, one, tasks)) is not None})
        },
        HERE / "success.png",
        title="Offline RL, small preset",
        subtitle=f"Mean over the tasks that were run, {len(SEEDS)} training seeds",
    )
    return "\n".join(lines)


def table(
    comparison: Comparison,
    methods: Sequence[str],
    known: Sequence[str] = TASKS,
    families: Mapping[str, Sequence[str]] = FAMILIES,
) -> list[str]:
    """Return the lines of a table: a row a task, means of families below."""
    done = [task for task in known if task in comparison.tasks]
    lines = ["| task | " + " | ".join(methods) + " |", "| --- |" + " ---: |" * len(methods)]
    lines += [
        f"| {task} | " + " | ".join(cell(rate_of(comparison, one, task)) for one in methods) + " |" for task in done
    ]
    for family, tasks in families.items():
        if sum(task in done for task in tasks) > 1:
            means = " | ".join(f"**{text}**" if (text := cell(mean(comparison, one, tasks))) else "" for one in methods)
            lines.append(f"| **mean {family}** | {means} |")
    return lines


def draw_curves() -> None:
    """Draw success against updates, as the runs reported it on the way (other episodes than the table's)."""
    curves: dict[str, dict[float, Any]] = {}
    for algorithm in ALGORITHMS:
        rates: dict[float, list[float]] = {}
        for task in CUBE_TASKS:
            path = RESULTS / "curves" / f"{folder_of(algorithm, task).name}.json"
            for step, values in (json.loads(path.read_text()) if path.exists() else {}).items():
                rates.setdefault(float(step), []).extend(values)
        points = {
            step: SuccessRate(round(float(np.sum(values)) * CURVE_EPISODES), CURVE_EPISODES * len(values))
            for step, values in rates.items()
        }
        if points:
            curves[algorithm.upper()] = points
    if curves:
        success_curve(
            curves,
            HERE / "curves.png",
            xlabel="updates",
            title="Learning curves",
            subtitle="cube-single, all tasks and seeds that were run, episodes of their own",
        )


def report_prior() -> str:
    """Return the table of the guided prior."""
    comparison = results_of("prior")
    if comparison is None:
        return ""
    methods = ("prior", "prior + QGF", "prior + QGF, best of 8", "FRS", "FRS + QGF")
    return "\n".join(table(comparison, methods))


def report_goals() -> str:
    """Return the table of the goal-conditioned policies."""
    comparison = results_of("goals")
    if comparison is None:
        return ""
    families = {
        f"ogbench/{name}-goals": [f"ogbench/{name}-goals-task{task}" for task in range(1, 6)] for name in GOAL_FAMILIES
    }
    tasks = [task for family in families.values() for task in family]
    methods = ("flow BC", "QGF", "QGF, best of 8")
    methods_longer = [f"{one}, {LONGER}" for one in methods]
    known = [one for one in (*methods, *methods_longer) if any(pooled(comparison, one, task) for task in tasks)]
    return "\n".join(table(comparison, known, tasks, families))


def report_scale() -> str:
    """Return the table of the widths and draw its figure."""
    comparison = results_of("scale")
    if comparison is None:
        return ""
    labels = {algorithm: [f"{algorithm}, width {width}" for width in WIDTHS] for algorithm in ("QGF", "RQL")}
    curves: dict[str, dict[float, Any]] = {}
    for algorithm, several in labels.items():
        points = {}
        for width, label in zip(WIDTHS, several, strict=True):
            rates = [rate for task in SCALED if (rate := pooled(comparison, label, task)) is not None]
            if rates:
                points[float(width)] = SuccessRate(
                    sum(one.successes for one in rates), sum(one.episodes for one in rates)
                )
        if points:
            curves[algorithm] = points
    success_curve(
        curves,
        HERE / "scale.png",
        xlabel="neurons of a hidden layer",
        title="Model size",
        subtitle="QGF and RQL, small preset otherwise, "
        + " and ".join(task.split("/")[1] for task in comparison.tasks),
    )
    return "\n".join(table(comparison, [label for several in labels.values() for label in several]))


def report_precision() -> str:
    """Return the table of the precisions."""
    comparison = results_of("precision")
    if comparison is None:
        return ""
    lines = ["| algorithm | " + " | ".join(PRECISIONS) + " |", "| --- |" + " ---: |" * len(PRECISIONS)]
    for algorithm in PRECISE:
        rates = [pooled(comparison, f"{algorithm.upper()}, {kind}", PRECISE_TASK) for kind in PRECISIONS]
        lines.append(f"| {algorithm.upper()} | " + " | ".join(cell(rate) for rate in rates) + " |")
    return "\n".join(lines)


def report_parity() -> str:
    """Return the table of the largest deviations from the official numbers."""
    path = RESULTS / "parity.json"
    if not path.exists():
        return ""
    lines = ["| file | quantity | largest deviation |", "| --- | --- | ---: |"]
    for name, quantities in json.loads(path.read_text()).items():
        lines += [f"| {name} | {quantity} | {value:.1e} |" for quantity, value in quantities.items()]
    return "\n".join(lines)


def report_speed() -> str:
    """Return the table of times."""
    path = RESULTS / "speed.json"
    if not path.exists():
        return ""
    content = json.loads(path.read_text())
    medians = {name: float(np.median(values)) for name, values in content["milliseconds"].items()}
    official = medians.get("official (JAX)")
    lines = ["| code | milliseconds an update | of the official code's speed |", "| --- | ---: | ---: |"]
    for name, median in medians.items():
        seeds = int(name.split(", ")[-1].split()[0]) if name.startswith("ours") else 1
        times = "" if official is None else f"{seeds * official / median:.2f}"
        lines.append(f"| {name} | {median:.0f} | {times} |")
    return "\n".join(lines)


def cell(rate: SuccessRate | MeanRate | None) -> str:
    """Write a rate in percent with its interval."""
    if rate is None:
        return ""
    return f"{100 * rate.rate:.0f} ({100 * rate.interval.low:.0f}-{100 * rate.interval.high:.0f})"


if __name__ == "__main__":
    main()
