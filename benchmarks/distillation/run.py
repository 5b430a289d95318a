"""Distillation: noise policies (DSBC) against behaviour cloning from the same few rollouts or demonstrations.

    python benchmarks/distillation/run.py

records what is missing into `data/`, trains, evaluates into `results/`, and writes the tables and figures beside it. Stages can
be named, and `--only-report` leaves out the running. What was recorded and trained (`data/`) is not committed: the same command
makes it again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from rich.console import Console

from counterflow.data import SteeringDataset
from counterflow.envs import family_of
from counterflow.experiments.compare import Comparison, Contender, compare, comparison_of, read_results
from counterflow.experiments.dagger import dagger as run_dagger
from counterflow.experiments.demonstrate import demonstrate
from counterflow.experiments.distill import distill
from counterflow.experiments.evaluate import load_prior, machine, open_env
from counterflow.experiments.figures import mean_curve, success_bars, success_curve
from counterflow.experiments.inversion import InversionSettings, Method, invert_dataset
from counterflow.experiments.record import record
from counterflow.experiments.rollout import Episode, run_episodes
from counterflow.experiments.statistics import Difference, MeanRate, SuccessRate
from counterflow.files import write_between, write_json
from counterflow.learning import DSBCConfig
from counterflow.random import child_seed
from counterflow.steering import ChunkRegressor, Intention, RegressorConfig, steer_learned

HERE = Path(__file__).parent
COMMAND = "benchmarks/distillation/run.py"
DATA, RESULTS = HERE / "data", HERE / "results"
# The same prior and the same evaluation episodes.
ZERO_SHOT = HERE.parent / "zero_shot" / "results" / "tasks.json"
CUBE_TASKS = tuple(f"ogbench/cube-single-task{task}" for task in range(1, 6))
SCENE_TASKS = tuple(f"ogbench/scene-task{task}" for task in (1, 2, 3))
TASKS = (*CUBE_TASKS, *SCENE_TASKS)
ROLLOUTS, ROLLOUT_COUNTS, DEMONSTRATIONS = 18, (3, 10, 18, 50), 20
CURVE_TASKS = ("ogbench/cube-single-task1", "ogbench/cube-single-task4")
SEEDS, CURVE_SEEDS, OFFLINE_SEEDS = (0, 1, 2), (0, 1), (0,)
Stage = Literal["rollouts", "intention", "settings", "counts", "offline", "dagger", "drift", "cost"]
STAGES: tuple[Stage, ...] = get_args(Stage)
DAGGER_TASKS, DAGGER_FIRST, DAGGER_ROUNDS = ("ogbench/cube-single-task4", "ogbench/cube-single-task5"), 3, 4
DRIFT_TASKS = ("ogbench/cube-single-task4", "ogbench/scene-task2")
DRIFT_EPISODES, DRIFT_DECISIONS = 30, 40
FAMILIES = {"ogbench/cube-single": CUBE_TASKS, "ogbench/scene": SCENE_TASKS}
KINDS: tuple[Method, ...] = ("regularised", "exact", "euler")

DSBC = DSBCConfig()
BC = replace(DSBC, regressor=RegressorConfig(target="action", bound=None))
CONFIGS = {"dsbc": DSBC, "bc": BC}
# What a squared unit of noise costs beside an intention: chosen a family on one task of it, on other episodes (stage intention).
INTENDED = "dsbc with intention"
PENALTIES = {"ogbench/cube-single": 3.0, "ogbench/scene": 0.3}
INTENTION_TASKS, INTENTION_PENALTIES = ("ogbench/cube-single-task4", "ogbench/scene-task2"), (0.3, 1.0, 3.0, 10.0)
METHODS = ("bc", "dsbc", INTENDED)
INTENTION_SEED = 1  # other evaluation episodes than the table's

# What is changed, one thing at a time; the noises of the first are found anew by each of these.
SETTINGS_TASKS, SETTINGS_SEEDS = ("ogbench/cube-single-task5", "ogbench/scene-task1"), (0,)
NOISES: dict[str, InversionSettings] = {
    "noises: exact": InversionSettings.of("exact"),
    **{f"noises: penalty {one:g}": InversionSettings.of("regularised", penalty=one) for one in (0.01, 0.003, 0.0001)},
}
CHANGES: dict[str, DSBCConfig] = {
    "as it is": DSBC,
    "one network instead of five": replace(DSBC, regressor=RegressorConfig(members=1)),
    "width 256": replace(DSBC, regressor=RegressorConfig(width=256)),
    "no input noise": replace(DSBC, input_noise=0.0),
    "input noise 0.2": replace(DSBC, input_noise=0.2),
    "no dropout": replace(DSBC, dropout=0.0),
    "no held-out episodes": replace(DSBC, held_out=0.0),
}


@dataclass(frozen=True)
class Arguments:
    """Run the distillation benchmark."""

    stages: tuple[Stage, ...] = STAGES
    """rollouts: the main table; intention: how strongly the chunk that is meant should pull; settings: what each of them is
    worth; counts: against the number of rollouts; offline: from demonstrations; dagger: with an expert at hand; drift: how
    far policies stray from the training states; cost: time and memory."""
    tasks: tuple[str, ...] = TASKS
    """Run the stages of a table for these tasks alone."""
    methods: tuple[str, ...] = METHODS
    """Of the main table and of that from demonstrations, run these alone."""
    episodes: int = 50
    """Evaluation episodes for each policy on each task."""
    only_report: bool = False
    """Write tables and figures from the results that are there."""


def main() -> None:
    """Run what is missing, then report."""
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(1)  # the policies are small; the cores are the simulators'
    console = Console()
    if not arguments.only_report:
        for stage in arguments.stages:
            RUN[stage](Job(console, arguments.episodes, arguments.tasks, arguments.methods))
    report()


@dataclass(frozen=True)
class Job:
    """What a stage is told.

    Attributes:
        console: where to say how far it is.
        episodes: evaluation episodes for each policy on each task.
        tasks: the tasks of a table.
        methods: of the main table, and of that from demonstrations.
    """

    console: Console
    episodes: int
    tasks: Sequence[str]
    methods: Sequence[str]


def recording(task: str, successes: int) -> Path:
    """Return the folder of a task's steered rollouts, recorded as far as they are missing."""
    out = DATA / "rollouts" / task.split("/")[1]
    record(task, "frs", out, successes=successes)
    return out


def trained(
    method: str, name: str, paths: Sequence[Path], seed: int, first: int | None, config: DSBCConfig | None = None
) -> str:
    """Return the file of a learned policy, trained if it is missing."""
    out = DATA / "policies" / f"{name}-{method}-{seed}.safetensors"
    if not out.exists():
        distill(paths, out, CONFIGS[method] if config is None else config, first=first, seed=seed)
    return str(out)


def evaluate_all(job: Job, path: Path, task: str, contenders: Sequence[Contender], seed: int = 0) -> None:
    """Evaluate on one task what is missing in the results; a file a task, so that stages and tasks may run side by side."""
    path = path / f"{task.split('/')[1]}.json"
    count, successes = 0, 0

    def start(name: str, contender: Contender) -> None:
        nonlocal count, successes
        job.console.log(f"{name}, {contender.label}")
        count, successes = 0, 0

    def finish(episode: Episode) -> None:
        nonlocal count, successes
        count, successes = count + 1, successes + episode.success
        if count == job.episodes:
            job.console.log(f"  {successes} of {count}")

    compare([task], contenders, job.episodes, seed, path=path, on_start=start, on_episode=finish)


def settings(job: Job) -> None:
    """Change one setting at a time, on two tasks."""
    for task in SETTINGS_TASKS:
        folder = recording(task, ROLLOUTS)
        contenders = []
        for label, config in CHANGES.items():
            for seed in SETTINGS_SEEDS:
                name = f"{folder.name}-{label.replace(' ', '-')}"
                learned = trained("dsbc", name, [folder], seed, ROLLOUTS, config)
                contenders.append(Contender(f"{label}, seed {seed}", "dsbc", learned=learned))
        for label, found_by in NOISES.items():
            archive = DATA / "settings" / f"{folder.name}-{label.replace(': ', '-').replace(' ', '-')}.npz"
            if not archive.exists():
                archive.parent.mkdir(parents=True, exist_ok=True)
                invert_dataset(folder, task, archive, found_by)
            for seed in SETTINGS_SEEDS:
                learned = trained("dsbc", archive.stem, [archive], seed, ROLLOUTS)
                contenders.append(Contender(f"{label}, seed {seed}", "dsbc", learned=learned))
        evaluate_all(job, RESULTS / "settings", task, contenders)


def rollouts(job: Job) -> None:
    """Run BC and DSBC from 18 successful rollouts, three training seeds (base and FRS are the zero-shot benchmark's)."""
    for task in job.tasks:
        folder = recording(task, ROLLOUTS)
        name = f"{folder.name}-{ROLLOUTS}"
        contenders = []
        for seed in SEEDS:
            for method in job.methods:
                config = intended(PENALTIES[family_of(task)]) if method == INTENDED else CONFIGS[method]
                learned = trained(method.replace(" ", "-"), name, [folder], seed, ROLLOUTS, config)
                contenders.append(Contender(f"{method}, seed {seed}", method.split()[0], learned=learned))
        evaluate_all(job, RESULTS / "rollouts", task, contenders)


def intended(penalty: float) -> DSBCConfig:
    """Return the settings of a noise policy with an intention."""
    return replace(DSBC, regressor=replace(DSBC.regressor, intention=Intention(penalty=penalty)))


def intention(job: Job) -> None:
    """Run the strengths of an intention's pull, on one task of each family and other episodes than the table's."""
    for task in INTENTION_TASKS:
        folder = recording(task, ROLLOUTS)
        name = f"{folder.name}-{ROLLOUTS}"
        contenders = [
            Contender(method, method, learned=trained(method, name, [folder], 0, ROLLOUTS)) for method in ("bc", "dsbc")
        ]
        learned = trained(INTENDED.replace(" ", "-"), name, [folder], 0, ROLLOUTS, intended(PENALTIES[family_of(task)]))
        for penalty in INTENTION_PENALTIES:  # how strongly it pulls is not learned
            regressor = ChunkRegressor.load(learned)
            regressor.config = intended(penalty).regressor
            out = DATA / "intention" / f"{name}-{penalty:g}.safetensors"
            contenders.append(Contender(f"penalty {penalty:g}", "dsbc", learned=str(regressor.save(out))))
        evaluate_all(job, RESULTS / "intention", task, contenders, INTENTION_SEED)


def counts(job: Job) -> None:
    """Run both against the number of rollouts."""
    for task in CURVE_TASKS:
        folder = recording(task, max(ROLLOUT_COUNTS))
        contenders = []
        for count in ROLLOUT_COUNTS:
            for seed in CURVE_SEEDS:
                for method in ("bc", "dsbc"):
                    learned = trained(method, f"{folder.name}-{count}", [folder], seed, count)
                    contenders.append(Contender(f"{method}, {count} rollouts, seed {seed}", method, learned=learned))
        evaluate_all(job, RESULTS / "counts", task, contenders)


def offline(job: Job) -> None:
    """Run both on oracle demonstrations, with exact inversion and Euler reversal as the source of noises."""
    for task in job.tasks:
        name = task.split("/")[1]
        demonstrations = DATA / "demonstrations" / f"{name}.npz"
        demonstrate(task, demonstrations, episodes=DEMONSTRATIONS)
        archives = {kind: demonstrations.with_name(f"{name}-{kind}.npz") for kind in KINDS}
        described = RESULTS / "inversion" / f"{name}.json"
        inversions = json.loads(described.read_text()) if described.exists() else {}
        contenders = []
        for method in job.methods:
            for kind in KINDS if method == "dsbc" else (("regularised",) if method == INTENDED else ("exact",)):
                # Euler reversal has no tolerance to keep to: what it misses is what is measured.
                how = InversionSettings.of(kind, tolerance=100.0) if kind == "euler" else InversionSettings.of(kind)
                inversions[kind] = invert_dataset(demonstrations, task, archives[kind], how).to_json()
                label = method if method == "bc" else f"{method}, {kind}"
                config = intended(PENALTIES[family_of(task)]) if method == INTENDED else CONFIGS[method]
                suffix = "" if method == "bc" else f"-{kind}"
                for seed in OFFLINE_SEEDS:
                    stem = f"{name}-demonstrations{suffix}"
                    learned = trained(method.replace(" ", "-"), stem, [archives[kind]], seed, None, config)
                    contenders.append(Contender(f"{label}, seed {seed}", method.split()[0], learned=learned))
        evaluate_all(job, RESULTS / "offline", task, contenders)
        write_json(described, inversions)


def dagger(job: Job) -> None:
    """Run DAgger from few rollouts, and evaluate every round's noise policy without help."""
    found: dict[str, Any] = {}
    for task in DAGGER_TASKS:
        name = task.split("/")[1]
        folder = DATA / "dagger" / name
        done = run_dagger(task, recording(task, ROLLOUTS), folder, rounds=DAGGER_ROUNDS, first=DAGGER_FIRST)
        found[task] = [asdict(one) for one in done]
        contenders = [
            Contender(f"round {number}", "dsbc", learned=str(folder / f"round-{number}.safetensors"))
            for number in range(DAGGER_ROUNDS + 1)
        ]
        evaluate_all(job, RESULTS / "dagger", task, contenders)
        write_json(RESULTS / "dagger-rounds.json", found)


def drift(job: Job) -> None:
    """Measure how far visited states are from the nearest training state, decision by decision."""
    found: dict[str, Any] = {}
    for task in DRIFT_TASKS:
        folder = recording(task, ROLLOUTS)
        training = SteeringDataset.load(folder).filter(success=True, first=ROLLOUTS).concatenated(("step_features",))
        known = torch.from_numpy(training["step_features"])
        found[task] = {}
        for method in ("dsbc", "bc"):
            regressor = ChunkRegressor.load(trained(method, f"{folder.name}-{ROLLOUTS}", [folder], 0, ROLLOUTS))
            seeds = [child_seed(0, "episode", index) for index in range(DRIFT_EPISODES)]
            with open_env(task, DRIFT_EPISODES) as env:
                played = run_episodes(steer_learned(load_prior(task), regressor), env, seeds, record=True)
            distances = []
            for episode in played:
                visited = torch.from_numpy(
                    np.stack([one.features for one in episode.decisions if one.features is not None])
                )
                distances.append([round(one, 4) for one in torch.cdist(visited, known).amin(1).tolist()])
            found[task][method] = {"success": [episode.success for episode in played], "distances": distances}
            job.console.log(f"{task} {method}: mean distance {np.mean(np.concatenate(distances)):.2f}")
        write_json(RESULTS / "drift.json", found)


def cost(job: Job) -> None:
    """Measure the time and memory of one distillation, in a process of its own."""
    measured = {}
    for task in ("ogbench/cube-single-task4", "ogbench/scene-task4"):
        folder = recording(task, ROLLOUTS)
        done = subprocess.run(
            [sys.executable, __file__.replace("run.py", "cost.py"), str(folder), str(ROLLOUTS)],
            check=True,
            capture_output=True,
            text=True,
        )
        measured[task] = json.loads(done.stdout.splitlines()[-1])
        job.console.log(f"{task}: {measured[task]}")
    write_json(RESULTS / "cost.json", {"machine": machine(), "results": measured})


RUN: dict[str, Callable[[Job], None]] = {
    "rollouts": rollouts,
    "intention": intention,
    "settings": settings,
    "counts": counts,
    "offline": offline,
    "dagger": dagger,
    "drift": drift,
    "cost": cost,
}


def report() -> None:
    """Write tables into the README and draw the figures, of what has been run."""
    for name, write in (
        ("rollouts", report_rollouts),
        ("intention", report_intention),
        ("settings", report_settings),
        ("counts", report_counts),
        ("offline", report_offline),
        ("dagger", report_dagger),
        ("drift", report_drift),
        ("cost", report_cost),
    ):
        measured = (RESULTS / name).is_dir() or (RESULTS / f"{name}.json").exists()
        if measured:
            write_between(HERE / "README.md", name, COMMAND, write())


def results_of(stage: str) -> Comparison:
    """Return all tasks' results of a stage; a task that is still being run is left out."""
    tasks = [read_results(path) for path in sorted((RESULTS / stage).glob("*.json"))]
    most = max(len(results) for results in tasks)
    return comparison_of([one for results in tasks if len(results) == most for one in results])


def pooled(comparison: Comparison, method: str, task: str) -> SuccessRate:
    """Return a method's rate on a task, all training seeds together."""
    rates = [
        rates[task]
        for label, rates in comparison.rates.items()
        if task in rates and (label == method or label.startswith(f"{method}, "))
    ]
    return SuccessRate(sum(one.successes for one in rates), sum(one.episodes for one in rates))


def table(comparison: Comparison, methods: Sequence[str]) -> list[str]:
    """Return the lines of a table: a row a task, means of families and of all below."""
    done = [task for task in TASKS if task in comparison.tasks]
    lines = ["| task | " + " | ".join(methods) + " |", "| --- |" + " ---: |" * len(methods)]
    lines += [
        f"| {task} | " + " | ".join(cell(pooled(comparison, one, task)) for one in methods) + " |" for task in done
    ]
    for family, tasks in {**FAMILIES, f"all {len(done)}": TASKS}.items():
        chosen = [task for task in tasks if task in done]
        if chosen:
            means = [MeanRate(tuple(pooled(comparison, one, task) for task in chosen)) for one in methods]
            lines.append(f"| **mean {family}** | " + " | ".join(f"**{cell(mean)}**" for mean in means) + " |")
    return lines


def mean(comparison: Comparison, method: str, tasks: Sequence[str]) -> MeanRate:
    """Return a method's mean over tasks, all training seeds together."""
    return MeanRate(tuple(pooled(comparison, method, task) for task in tasks if task in comparison.tasks))


def report_rollouts() -> str:
    """Return the main table and draw its figure."""
    learned = results_of("rollouts")
    zero_shot = [
        one for one in read_results(ZERO_SHOT) if one["label"] in ("base", "FRS, K = 5") and one["env"] in learned.tasks
    ]
    comparison = comparison_of([*zero_shot, *learned.results])
    methods = {"base": "base", "frs": "FRS", "bc": "bc", "dsbc": "dsbc", INTENDED: INTENDED}
    success_bars(
        {
            family: {name: mean(comparison, label, tasks) for name, label in methods.items()}
            for family, tasks in FAMILIES.items()
            if any(task in comparison.tasks for task in tasks)
        },
        HERE / "success.png",
        title=f"Distilled from {ROLLOUTS} steered successes",
        subtitle=f"Mean over tasks of a family, {len(SEEDS)} training seeds",
    )
    lines = [*table(comparison, list(methods.values())), ""]
    for name, tasks in {**FAMILIES, "all": TASKS}.items():
        frs, bc = mean(comparison, "FRS", tasks), mean(comparison, "bc", tasks)
        for label, method in (("DSBC", "dsbc"), ("DSBC with intention", INTENDED)):
            own = mean(comparison, method, tasks)
            lines.append(
                f"- {name}: {label} reaches {100 * own.rate / frs.rate:.0f}% of FRS's success; {label} minus BC: "
                f"{Difference(own, bc)} points."
            )
    return "\n".join(lines)


def report_intention() -> str:
    """Return the table of the intention's strengths."""
    comparison = results_of("intention")
    done = [task for task in INTENTION_TASKS if task in comparison.tasks]
    lines = ["| policy | " + " | ".join(done) + " |", "| --- |" + " ---: |" * len(done)]
    rows = {
        label: " | ".join(cell(pooled(comparison, label, task)) for task in done)
        for label in ("bc", "dsbc", *(f"penalty {penalty:g}" for penalty in INTENTION_PENALTIES))
    }
    return "\n".join([*lines, *(f"| {label} | {cells} |" for label, cells in rows.items())])


def report_settings() -> str:
    """Return the table of settings."""
    comparison = results_of("settings")
    done = [task for task in SETTINGS_TASKS if task in comparison.tasks]
    lines = ["| what is changed | " + " | ".join(done) + " |", "| --- |" + " ---: |" * len(done)]
    rows = {label: " | ".join(cell(pooled(comparison, label, task)) for task in done) for label in (*CHANGES, *NOISES)}
    return "\n".join([*lines, *(f"| {label} | {cells} |" for label, cells in rows.items())])


def report_counts() -> str:
    """Return the table against the number of rollouts and draw its figure."""
    comparison = results_of("counts")
    done = [task for task in CURVE_TASKS if task in comparison.tasks]
    lines: dict[str, dict[float, Any]] = {
        method: {count: mean(comparison, f"{method}, {count} rollouts", done) for count in ROLLOUT_COUNTS}
        for method in ("dsbc", "bc")
    }
    success_curve(
        lines,
        HERE / "counts.png",
        xlabel="successful rollouts",
        title="Against the number of rollouts",
        subtitle=f"Mean over {', '.join(task.split('/')[1] for task in done)}, {len(CURVE_SEEDS)} training seeds",
        scale="log",
    )
    rows = ["| rollouts | bc | dsbc |", "| ---: | ---: | ---: |"]
    return "\n".join(
        rows + [f"| {count} | {cell(lines['bc'][count])} | {cell(lines['dsbc'][count])} |" for count in ROLLOUT_COUNTS]
    )


def report_offline() -> str:
    """Return the tables of learning from demonstrations and of what inversion misses."""
    comparison = results_of("offline")
    methods = ["bc", *(f"dsbc, {kind}" for kind in KINDS[::-1])]
    contestants = {"DSBC": "dsbc, regularised", "DSBC with intention": f"{INTENDED}, regularised"}
    done = [task for task in TASKS if task in comparison.tasks]
    if all(task in comparison.rates.get(f"{contestants['DSBC with intention']}, seed 0", {}) for task in done):
        methods.append(contestants["DSBC with intention"])
    contestants = {label: method for label, method in contestants.items() if method in methods}
    differences = []
    for name, tasks in {**FAMILIES, "all": TASKS}.items():
        bc = mean(comparison, "bc", tasks)
        for label, method in contestants.items():
            own = mean(comparison, method, tasks)
            differences.append(f"- {name}: {label} (regularised noises) minus BC: {Difference(own, bc)} points.")
    names = {task: RESULTS / "inversion" / f"{task.split('/')[1]}.json" for task in TASKS}
    found = {task: json.loads(path.read_text()) for task, path in names.items() if path.exists()}
    lines = [*table(comparison, methods), "", *differences, ""]
    lines += ["| task | noises by | error, median | 90% | 99% | flagged | noise, root mean square |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for task, kinds in found.items():
        for kind, one in kinds.items():
            errors = " | ".join(f"{one['errors'][share]:.1e}" for share in ("50%", "90%", "99%"))
            flagged = f"{one['flagged']} of {one['chunks']}" if kind != "euler" else ""
            lines.append(f"| {task} | {kind} | {errors} | {flagged} | {one['noise_norm']:.2f} |")
    return "\n".join(lines)


def report_dagger() -> str:
    """Return the table of rounds and draw its figure."""
    comparison = results_of("dagger")
    rounds = json.loads((RESULTS / "dagger-rounds.json").read_text())
    lines = ["| task | round | success without help | expert's share of decisions | corrections |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    curves: dict[str, dict[float, Any]] = {}
    for task, found in rounds.items():
        for number in range(DAGGER_ROUNDS + 1):
            rate = comparison.rates[f"round {number}"][task]
            curves.setdefault(task.split("/")[1], {})[number] = rate
            share = f"{100 * found[number]['interventions']:.0f}%" if number < len(found) else ""
            corrections = f"{found[number]['corrections']}" if number < len(found) else ""
            lines.append(f"| {task} | {number} | {cell(rate)} | {share} | {corrections} |")
    success_curve(
        curves,
        HERE / "dagger.png",
        xlabel="rounds of DAgger",
        title="DAgger in noise space",
        subtitle=f"The noise policy alone, after each round; begun with {DAGGER_FIRST} rollouts",
    )
    return "\n".join(lines)


def report_drift() -> str:
    """Draw how far policies stray and return the means."""
    found = json.loads((RESULTS / "drift.json").read_text())
    lines = ["| task | policy | mean distance | first quarter | last quarter |", "| --- | --- | ---: | ---: | ---: |"]
    for task, methods in found.items():
        curves: dict[str, tuple[Any, Any]] = {}
        for method, one in methods.items():
            longest = max(len(distances) for distances in one["distances"])
            padded = np.full((longest, len(one["distances"])), np.nan)
            for index, distances in enumerate(one["distances"]):
                padded[: len(distances), index] = distances
            shown = min(longest, DRIFT_DECISIONS)
            curves[method] = np.arange(shown), padded[:shown]
            everything = [value for distances in one["distances"] for value in distances]
            first = [value for distances in one["distances"] for value in distances[: max(1, len(distances) // 4)]]
            last = [value for distances in one["distances"] for value in distances[-max(1, len(distances) // 4) :]]
            numbers = " | ".join(f"{np.mean(values):.2f}" for values in (everything, first, last))
            lines.append(f"| {task} | {method} | {numbers} |")
        mean_curve(
            curves,
            HERE / f"drift-{task.split('/')[1]}.png",
            xlabel="decisions (chunks of five actions) in the episode",
            ylabel="distance to the nearest training state",
            title="Compounding error",
            subtitle=f"{task}, {DRIFT_EPISODES} episodes, normalised observations",
        )
    return "\n".join(lines)


def report_cost() -> str:
    """Return the table of time and memory."""
    found = json.loads((RESULTS / "cost.json").read_text())["results"]
    lines = ["| data | examples | updates | seconds to train | to import | MB above the interpreter |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {ROLLOUTS} rollouts of {task} | {one['examples']} | {one['updates']} | {one['seconds_to_train']} | "
        f"{one['seconds_to_import']} | {one['megabytes_above_interpreter']} |"
        for task, one in found.items()
    ]
    return "\n".join(lines)


def cell(rate: SuccessRate | MeanRate) -> str:
    """Write a rate in percent with its interval."""
    return f"{100 * rate.rate:.0f} ({100 * rate.interval.low:.0f}-{100 * rate.interval.high:.0f})"


if __name__ == "__main__":
    main()
