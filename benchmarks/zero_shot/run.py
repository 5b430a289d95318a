"""Zero-shot steering: every method on cube-single, scene and puzzle-3x3, five tasks each, same prior, references, episodes.

    python benchmarks/zero_shot/run.py

runs what is missing in `results/` (about an hour on two cores), then writes the tables and figures beside it. `--only-report`
leaves out the running.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from counterflow.envs import expand_tasks
from counterflow.experiments.compare import Comparison, Contender, compare, comparison_of, read_results
from counterflow.experiments.evaluate import ReasonerSettings
from counterflow.experiments.figures import success_bars, success_curve
from counterflow.experiments.progress import progress_bar
from counterflow.experiments.rollout import Episode
from counterflow.experiments.statistics import Difference, MeanRate
from counterflow.files import write_between
from counterflow.reasoners import OGBENCH
from counterflow.steering import MethodSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FAMILIES = ("ogbench/cube-single", "ogbench/scene", "ogbench/puzzle-3x3")
# Robustness is studied on one task of each family, the one whose name says the most about it.
ROBUSTNESS_TASKS = ("ogbench/cube-single-task4", "ogbench/scene-task4", "ogbench/puzzle-3x3-task4")

TAUS = (0.5, 0.6, 0.7, 0.8)
RANKS = (4, 16, 64)
REVERSALS = (2, 3, 5, 7, 10, 20)
ERRORS = (0.0, 0.2, 0.4)
MAGNITUDES = (0.4, 0.7, 1.0)
MAIN_TAU, MAIN_REVERSAL = 0.8, 5
COMMAND = "benchmarks/zero_shot/run.py"
SLOW = 64  # candidates of sample-and-rank from which the policy, not the simulator, takes the time
TITLES = {
    "partial": "Partial noising",
    "rank": "Sample-and-rank",
    "frs": "Flow Reversal Steering",
    "reasoner-error": "When the reasoner is wrong",
    "magnitude": "When the reference is weak or strong",
}


@dataclass(frozen=True)
class Arguments:
    """Run the zero-shot benchmark."""

    episodes: int = 50
    """Episodes for each method on each task."""
    seed: int = 0
    """What every episode descends from."""
    only_report: bool = False
    """Write tables and figures from the results that are there."""


def tau(value: float, reasoner: ReasonerSettings | None = None) -> Contender:
    """Return partial noising at one noise level."""
    return Contender(f"partial, tau = {value:g}", "partial", MethodSettings(tau=value), reasoner or ReasonerSettings())


def rank(value: int) -> Contender:
    """Return sample-and-rank with one number of candidates."""
    return Contender(f"rank, n = {value}", "rank", MethodSettings(candidates=value))


def reversal(value: int, reasoner: ReasonerSettings | None = None) -> Contender:
    """Return Flow Reversal Steering with one K."""
    return Contender(f"FRS, K = {value}", "frs", MethodSettings(reversal_steps=value), reasoner or ReasonerSettings())


def direct(reasoner: ReasonerSettings | None = None) -> Contender:
    """Return direct execution."""
    return Contender("direct", "direct", reasoner=reasoner or ReasonerSettings())


MAIN = [Contender("base", "base"), direct(), *map(tau, TAUS), *map(rank, RANKS), *map(reversal, REVERSALS)]


def with_reasoner(name: str, reasoner: ReasonerSettings) -> list[Contender]:
    """Return the three methods that use the reference most, with a reasoner of another kind, labelled by it."""
    methods = [direct(reasoner), tau(MAIN_TAU, reasoner), reversal(MAIN_REVERSAL, reasoner)]
    return [Contender(f"{one.label}, {name}", one.method, one.settings, one.reasoner) for one in methods]


STUDIES: list[tuple[str, tuple[str, ...], list[Contender]]] = [
    ("tasks", FAMILIES, [one for one in MAIN if one.settings.candidates < SLOW]),
    (
        "reasoner-error",
        ROBUSTNESS_TASKS,
        [one for error in ERRORS if error for one in with_reasoner(f"error {error:g}", ReasonerSettings(error=error))],
    ),
    (
        "magnitude",
        ROBUSTNESS_TASKS,
        [
            one
            for size in MAGNITUDES
            if size != OGBENCH.magnitude
            for one in with_reasoner(f"magnitude {size:g}", ReasonerSettings(magnitude=size))
        ],
    ),
    ("tasks", FAMILIES, [one for one in MAIN if one.settings.candidates >= SLOW]),
]
"""The file of its results, its tasks and its contenders, the slowest last."""


def run_study(
    console: Console, name: str, tasks: tuple[str, ...], contenders: list[Contender], episodes: int, seed: int
) -> None:
    """Run what is missing of one study."""
    path = RESULTS / f"{name}.json"
    total = len(expand_tasks(tasks)) * len(contenders) * episodes
    with progress_bar(console, name, total, "episodes") as update:
        done, what = len(read_results(path)) * episodes, ""

        def say(task: str, contender: Contender) -> None:
            nonlocal what
            what = f"{task}, {contender.label}"
            console.log(what)

        def count(_: Episode) -> None:
            nonlocal done
            done += 1
            update(done, what)

        compare(tasks, contenders, episodes, seed, path=path, on_start=say, on_episode=count)


def best(comparison: Comparison, labels: list[str], family: str | None = None) -> tuple[str, MeanRate]:
    """Return the contender with the highest mean and that mean, of those that ran on all the tasks."""
    means = {label: comparison.mean(label, family) for label in labels if has_run(comparison, label, family)}
    label = max(means, key=lambda one: means[one].rate)
    return label, means[label]


def has_run(comparison: Comparison, label: str, family: str | None = None) -> bool:
    """Say whether a contender ran on every task, or on every task of a family."""
    return set(expand_tasks(FAMILIES if family is None else (family,))) <= set(comparison.rates.get(label, {}))


def report(episodes: int) -> str:
    """Write figures; return the table as Markdown."""
    comparison = comparison_of(read_results(RESULTS / "tasks.json"))
    sweeps = {"partial": [tau(one).label for one in TAUS], "rank": [rank(one).label for one in RANKS]}
    sweeps["frs"] = [reversal(one).label for one in REVERSALS]
    chosen = {"base": "base", "direct": "direct"}
    chosen |= {name: best(comparison, labels)[0] for name, labels in sweeps.items()}
    # The settings of the paper and of this library beside the best of each sweep.
    columns = ["base", "direct", rank(16).label, chosen["rank"], tau(0.5).label, chosen["partial"]]
    columns = list(dict.fromkeys([*columns, reversal(MAIN_REVERSAL).label, chosen["frs"]]))

    lines = [
        f"Success in percent with 95% intervals, {episodes} episodes a task, same prior, references and episodes for all.",
        "The paper's settings of sample-and-rank (n = 16) and partial noising (tau = 0.5) and this library's default of FRS",
        "(K = 5) stand beside each method's best setting over all 15 tasks; below, the best for each family.",
        "",
        "| task | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for family in (*FAMILIES, None):
        if family is not None:
            for task in (task for task in comparison.tasks if task.startswith(family)):
                rates = [comparison.rates[label][task] for label in columns]
                lines.append(f"| {task} | " + " | ".join(_cell(rate.rate, rate.interval) for rate in rates) + " |")
        means = [comparison.mean(label, family) for label in columns]
        name = f"**mean {family or 'of all 15'}**"
        lines.append(f"| {name} | " + " | ".join(f"**{_cell(mean.rate, mean.interval)}**" for mean in means) + " |")
    lines += [
        "",
        "| family | method | best setting | success | FRS at its best minus this |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for family in FAMILIES:
        steered = best(comparison, sweeps["frs"], family)[1]
        for name, labels in {"base": ["base"], "direct": ["direct"], **sweeps}.items():
            label, mean = best(comparison, labels, family)
            gap = "" if name == "frs" else str(Difference(steered, mean))
            lines.append(f"| {family} | {name} | {label} | {_cell(mean.rate, mean.interval)} | {gap} |")

    write_between(HERE.parent.parent / "README.md", "table", COMMAND, short_table(comparison, columns))
    groups = {family: {name: comparison.mean(label, family) for name, label in chosen.items()} for family in FAMILIES}
    settings = ", ".join(label for name, label in chosen.items() if name in sweeps)
    success_bars(
        groups,
        HERE / "success.png",
        title="Zero-shot steering of a frozen flow policy",
        subtitle=f"Mean over five tasks a family; {settings}",
    )
    curves: dict[str, tuple[str, tuple[float, ...], Callable[[float], str]]] = {
        "partial": ("noise level tau", TAUS, lambda value: tau(value).label),
        "rank": ("candidates n", RANKS, lambda value: rank(int(value)).label),
        "frs": ("steps K, back and forth", REVERSALS, lambda value: reversal(int(value)).label),
    }
    for name, (xlabel, values, label_of) in curves.items():
        lines_of = {
            family: {
                value: comparison.mean(label_of(value), family)
                for value in values
                if has_run(comparison, label_of(value), family)
            }
            for family in FAMILIES
        }
        success_curve(
            lines_of,
            HERE / f"sweep-{name}.png",
            xlabel=xlabel,
            title=TITLES[name],
            scale="linear" if name == "partial" else "log",
        )
    robustness("reasoner-error", "error", ERRORS, "probability that the reasoner names a wrong direction")
    robustness("magnitude", "magnitude", MAGNITUDES, "magnitude of the reference, environment units")
    return "\n".join(lines) + "\n"


def robustness(study: str, word: str, values: tuple[float, ...], xlabel: str) -> None:
    """Draw success, mean over the three tasks, against a property of the reasoner."""
    usual = comparison_of(read_results(RESULTS / "tasks.json"))
    changed = comparison_of(read_results(RESULTS / f"{study}.json"))
    methods = {"direct": direct().label, "partial": tau(MAIN_TAU).label, "frs": reversal(MAIN_REVERSAL).label}
    lines: dict[str, dict[float, MeanRate]] = {}
    for name, label in methods.items():
        lines[name] = {}
        for value in values:
            found = changed.rates.get(f"{label}, {word} {value:g}") or usual.rates[label]
            lines[name][value] = MeanRate(tuple(found[task] for task in ROBUSTNESS_TASKS))
    success_curve(
        lines,
        HERE / f"{study}.png",
        xlabel=xlabel,
        title=TITLES[study],
        subtitle=f"Mean over {', '.join(task.split('/')[1] for task in ROBUSTNESS_TASKS)}",
    )


def short_table(comparison: Comparison, columns: list[str]) -> str:
    """Return the table of the README: a row a family."""
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for family in (*FAMILIES, None):
        means = [comparison.mean(label, family) for label in columns]
        highest = max(mean.rate for mean in means)
        cells = [
            f"**{_cell(one.rate, one.interval)}**" if one.rate == highest else _cell(one.rate, one.interval)
            for one in means
        ]
        lines.append(f"| {family or 'mean of 15 tasks'} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(rate: float, interval: tuple[float, float]) -> str:
    return f"{100 * rate:.0f} ({100 * interval[0]:.0f}-{100 * interval[1]:.0f})"


def main() -> None:
    """Run what is missing, then report."""
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(1)  # the policy is small; the cores are the simulators'
    console = Console()
    if not arguments.only_report:
        for name, tasks, contenders in STUDIES:
            run_study(console, name, tasks, contenders, arguments.episodes, arguments.seed)
    text = report(arguments.episodes)
    write_between(HERE / "README.md", "table", COMMAND, text)
    console.print(text)
    machine = json.loads((RESULTS / "tasks.json").read_text())["machine"]
    console.print(f"measured with {machine}")


if __name__ == "__main__":
    main()
