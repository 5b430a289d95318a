"""Tables and figures of what `generalist_suite` measured; each is written from `results/` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterflow.errors import DatasetError
from counterflow.experiments.figures import success_bars, success_curve
from counterflow.experiments.generalist_suite import GAIN, Suite, slug
from counterflow.experiments.generalist_suite.suite import best_elsewhere
from counterflow.experiments.statistics import Difference, MeanRate, SuccessRate
from counterflow.files import write_between

Rates = Mapping[str, SuccessRate]
SOLVED = 0.8
NOT_YET = "Not measured yet."
PAPER_ZERO_SHOT = {"base": 8.6, "direct": 7.6, "partial": 9.2, "rank": 10.2, "frs": 13.2}
PAPER_GAINS = {"partial": 4, "rank": 3, "frs": 11}
NAMES = {"base": "base", "direct": "direct", "partial": "partial noising", "rank": "sample-and-rank", "frs": "FRS"}


@dataclass(frozen=True)
class Differs:
    """What is not as in the papers, in words, for the side-by-side table.

    Attributes:
        generalist: the policy here.
        observation: what it sees.
        reasoner: who gives directions.
    """

    generalist: str
    observation: str
    reasoner: str


def write_report(suite: Suite, document: Path | str | None, command: str, differs: Differs) -> dict[str, str]:
    """Put every table between its marks in a document, and draw the figures beside it.

    Args:
        suite: whose results.
        document: with marks `<!-- NAME: written by COMMAND -->` and `<!-- /NAME -->`; a table without marks is left out;
            None: nowhere.
        command: the script, as the marks name it.
        differs: for the side-by-side table.

    Returns:
        The tables by name, in Markdown. Of what has not been run a table says so.

    Raises:
        StorageError: the document can't be written.
    """
    writers: dict[str, Callable[[], str]] = {
        "experts": lambda: report_experts(suite),
        "generalist": lambda: report_generalist(suite),
        "choose": lambda: report_choose(suite),
        "zero_shot": lambda: report_zero_shot(suite),
        "distillation": lambda: report_distillation(suite),
        "rl": lambda: report_rl(suite),
        "guidance": lambda: report_guidance(suite),
        "paper": lambda: report_paper(suite, differs),
        "speed": lambda: report_speed(suite),
    }
    tables = {}
    for name, write in writers.items():
        try:
            tables[name] = write()
        except DatasetError:  # an earlier stage is not finished
            tables[name] = NOT_YET
    if document is not None and Path(document).exists():
        for name, table in tables.items():
            write_between(document, name, command, table)
    return tables


def report_experts(suite: Suite) -> str:
    """Return the table of the scripted experts."""
    found = {task: suite.read(f"experts/{slug(task)}") for task in suite.tasks}
    found = {task: one for task, one in found.items() if one is not None}
    if not found:
        return NOT_YET
    solved = sum(sum(one["successes"]) >= SOLVED * len(one["successes"]) for one in found.values())
    lines = [
        f"{solved} of {len(found)} tasks solved in at least {SOLVED:.0%} of the episodes.",
        "",
        "| task | split | solved | mean steps where solved |",
        "| --- | --- | ---: | ---: |",
    ]
    for task, one in found.items():
        taken = [steps for steps, success in zip(one["steps"], one["successes"], strict=True) if success]
        mean = f"{sum(taken) / len(taken):.0f}" if taken else ""
        lines.append(
            f"| {short(task)} | {suite.kind_of(task)} | {sum(one['successes'])} of {len(one['successes'])} | {mean} |"
        )
    return "\n".join(lines)


def report_generalist(suite: Suite) -> str:
    """Return what the generalist is, and its success on training and held-out tasks."""
    about = suite.read("generalist")
    if about is None:
        return NOT_YET
    lines = [_about(about), ""]
    rates = suite.rates("base").get("base", {})
    held_out = [task for several in suite.held_out.values() for task in several]
    groups = {"train": suite.training, **suite.held_out, "held-out": held_out}
    failing = f"failed: {100 * suite.settings.low:.0f}% or less"
    lines += [f"| tasks | how many | success | {failing} |", "| --- | ---: | ---: | ---: |"]
    for name, tasks in groups.items():
        there = [rates[task] for task in tasks if task in rates]
        if there:
            failed = sum(one.rate <= suite.settings.low for one in there)
            lines.append(f"| {name} | {len(there)} | {cell(MeanRate(tuple(there)))} | {failed} |")
    if len(rates) == 0:
        return f"{lines[0]}\n\nIts success is not measured yet."
    lines += ["", "| task | split | base |", "| --- | --- | ---: |"]
    lines += [
        f"| {short(task)} | {suite.kind_of(task)} | {cell(rates[task])} |" for task in suite.tasks if task in rates
    ]
    return "\n".join(lines)


def _about(about: Mapping[str, Any]) -> str:
    if "given" in about:
        return f"The policy is {about['given']} ({about['policy'][:12]})."
    made = about["provenance"]
    left_out = made["without_demonstrations"]
    minutes = about["seconds"] / 60
    timed = f"(the last {about['timed_updates']:,} took {minutes:.0f} minutes) " if about["timed_updates"] else ""
    return (
        f"{about['parameters'] / 1e6:.1f} million parameters, {about['megabytes']:g} MB; {made['steps']:,} updates of "
        f"{made['settings']['batch_size']} chunks {timed}"
        f"on {made['episodes']:,} demonstrations of {len(made['tasks'])} tasks, {made['transitions']:,} transitions; "
        f"held-out loss {made['validation_loss']:.3f}."
        + (
            f" Without demonstrations, because the expert succeeds too seldom: {', '.join(left_out)}."
            if left_out
            else ""
        )
    )


def report_choose(suite: Suite) -> str:
    """Return every setting's mean over the table's tasks, and for how many of these it was the best on the others."""
    found = suite.setting_rates()
    names = {"frs": "FRS, K", "partial": "partial noising, tau", "rank": "sample-and-rank, n"}
    tasks = suite.steered()
    chosen = [best_elsewhere(found, task) for task in tasks]
    lines = [f"| setting | mean success of {len(tasks)} | chosen for |", "| --- | ---: | ---: |"]
    for method, name in names.items():
        for value in sorted(found[method]):
            count = sum(one[method] == value for one in chosen)
            lines.append(f"| {name} = {value:g} | {cell(_mean(found[method][value], tasks))} | {count or ''} |")
    return "\n".join(lines)


def report_zero_shot(suite: Suite) -> str:
    """Return the zero-shot table with the counts of gains, and draw its figure."""
    rates, done = suite.steered_rates(), suite.steered()
    failed = suite.failed()
    lines = ["| task | split | " + " | ".join(NAMES.values()) + " |", "| --- | --- |" + " ---: |" * len(NAMES)]
    for task in done:
        cells = " | ".join(cell(rates[method][task]) for method in NAMES)
        lines.append(f"| {short(task)} | {suite.kind_of(task)} | {cells} |")
    groups = {f"the {len(failed)} that the base fails": failed, f"all {len(done)}": done}
    groups = {name: tasks for name, tasks in groups.items() if tasks}
    means = {name: {method: _mean(rates[method], tasks) for method in NAMES} for name, tasks in groups.items()}
    for name, found in means.items():
        lines.append(f"| **mean of {name}** | | " + " | ".join(f"**{cell(one)}**" for one in found.values()) + " |")
    for name, tasks in groups.items():
        counts = [str(gains(rates, method, tasks)) for method in NAMES]
        lines.append(f"| tasks of {name} that gain 10 points or more | | " + " | ".join(counts) + " |")
    lines.append("")
    for name, found in means.items():
        others = "; ".join(
            f"{NAMES[method]} {Difference(found['frs'], found[method])}" for method in NAMES if method != "frs"
        )
        lines.append(f"- {name}: FRS minus the others, points: {others}.")
    success_bars(
        means,
        suite.folder / "zero-shot.png",
        title="A generalist that fails, steered",
        subtitle=f"{suite.settings.family}, held-out tasks; K, tau and n of each from the others",
    )
    return "\n".join(lines)


def report_means(suite: Suite) -> str:
    """Return the zero-shot table's means alone, a row for the tasks that the generalist fails and one for all steered ones."""
    rates, every, failed = suite.steered_rates(), suite.steered(), suite.failed()
    lines = ["| held-out tasks | " + " | ".join(NAMES.values()) + " |", "| --- |" + " ---: |" * len(NAMES)]
    for name, tasks in ((f"the {len(failed)} that it fails", failed), (f"all {len(every)} that are steered", every)):
        if tasks:
            lines.append(f"| {name} | " + " | ".join(cell(_mean(rates[method], tasks)) for method in NAMES) + " |")
    return "\n".join(lines)


def gains(rates: Mapping[str, Rates], method: str, tasks: Sequence[str]) -> int:
    """Count the tasks where a method succeeds at least ten points more often than the base."""
    return sum(rates[method][task].rate - rates["base"][task].rate >= GAIN for task in tasks)


def report_distillation(suite: Suite) -> str:
    """Return the distillation table and draw its figure."""
    rates, done = _distilled(suite)
    if not done:
        return NOT_YET
    lines = ["| task | base | BC | DSBC | FRS |", "| --- |" + " ---: |" * len(rates)]
    lines += [f"| {short(task)} | " + " | ".join(cell(own[task]) for own in rates.values()) + " |" for task in done]
    means = {name: _mean(own, done) for name, own in rates.items()}
    lines.append(f"| **mean of {len(done)}** | " + " | ".join(f"**{cell(one)}**" for one in means.values()) + " |")
    lines += ["", f"DSBC minus BC: {Difference(means['dsbc'], means['bc'])} points."]
    success_bars(
        {f"mean of {len(done)} tasks": means},
        suite.folder / "distillation.png",
        title=f"Distilled from {suite.settings.successes} steered successes",
        subtitle=f"{suite.settings.family}, held-out tasks where FRS works",
    )
    return "\n".join(lines)


def _distilled(suite: Suite) -> tuple[dict[str, Rates], list[str]]:
    """Return base, bc, dsbc and frs of the distillation's tasks, and which of these are finished."""
    measured = suite.rates("distillation")
    rates: dict[str, dict[str, SuccessRate]] = {"base": {}, "bc": {}, "dsbc": {}, "frs": {}}
    tasks = suite.working()[: suite.settings.distilled]
    for task in tasks:
        labels = {name: name for name in rates} | {"frs": suite.contenders(task)["frs"].label}
        for name, label in labels.items():
            if task in measured.get(label, {}):
                rates[name][task] = measured[label][task]
    return dict(rates), _complete(tasks, rates, rates)


def report_rl(suite: Suite) -> str:
    """Return the table of reinforcement learning at its end, and draw the curves: where FRS works, and where it hardly does."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted((suite.results / "rl").glob("*.json")):
        content = suite.read(f"rl/{path.stem}")
        task, kind = content["task"], content["kind"]
        if task in suite.steered() and content["asked"] == suite.asked_of_learning(task, kind):
            found.setdefault(kind, {}).setdefault(task, {})[content["label"]] = content
    if not found:
        return NOT_YET
    order = ("residual", "DSRL", "DSRL + FRS")
    lines = ["| tasks | task | " + " | ".join(order) + " |", "| --- | --- |" + " ---: |" * len(order)]
    titles = {"works": "where FRS works", "hard": "where FRS hardly works"}
    for kind, title in titles.items():
        tasks = found.get(kind, {})
        for task, methods in tasks.items():
            cells = (cell(list(curve(methods[label]).values())[-1]) if label in methods else "" for label in order)
            lines.append(f"| {title} | {short(task)} | " + " | ".join(cells) + " |")
        # A mean over the same tasks for all: one that lacks a method (no success was found to begin with) is in none.
        whole = [methods for methods in tasks.values() if all(label in methods for label in order)]
        curves: dict[str, dict[float, Any]] = {}
        for label in order:
            several = [curve(methods[label]) for methods in whole]
            for point in sorted({point for one in several for point in one}):
                rates = tuple(one[point] for one in several if point in one)
                curves.setdefault(label, {})[point] = MeanRate(rates)
        if curves:
            ends = (cell(list(curves[label].values())[-1]) for label in order)
            lines.append(
                f"| {title} | **mean of {len(whole)} that have all** | "
                + " | ".join(f"**{one}**" for one in ends)
                + " |"
            )
            success_curve(
                curves,
                suite.folder / f"rl-{kind}.png",
                xlabel="decisions (chunks) of a seed",
                title=f"Reinforcement learning {title}",
                subtitle=f"{suite.settings.family}, mean of {len(whole)} tasks",
            )
    return "\n".join(lines)


def curve(content: Mapping[str, Any]) -> dict[float, SuccessRate]:
    """Return success against decisions, all seeds' episodes together."""
    points: dict[float, SuccessRate] = {}
    for several in zip(*content["curves"].values(), strict=True):
        successes = sum(round(one["success_rate"] * one["episodes"]) for one in several)
        points[several[0]["decisions"]] = SuccessRate(successes, sum(int(one["episodes"]) for one in several))
    return points


def report_guidance(suite: Suite) -> str:
    """Return the guidance table: tasks whose rollouts the critic has seen, and others."""
    about, tasks = suite.read("critic"), suite.read("guidance-tasks")
    if about is None or tasks is None or {about["policy"], tasks["policy"]} != {suite.fingerprint}:
        return NOT_YET
    rates = suite.rates("guidance")
    lines = ["| critic | task | base | guided |", "| --- | --- | ---: | ---: |"]
    for kind, title in (("seen", "has seen it"), ("unseen", "has not seen it")):
        done = _complete(tasks[kind], rates, ("base", "guided"))
        lines += [
            f"| {title} | {short(task)} | {cell(rates['base'][task])} | {cell(rates['guided'][task])} |"
            for task in done
        ]
        if done:
            means = [_mean(rates[label], done) for label in ("base", "guided")]
            lines.append(
                f"| {title} | **mean of {len(done)}** | " + " | ".join(f"**{cell(one)}**" for one in means) + " |"
            )
            lines.append(f"| {title} | guided minus base, points | | {Difference(means[1], means[0])} |")
    lines += [
        "",
        f"The critic learned from {about['episodes']} rollouts of the generalist, {about['successes']} successes.",
    ]
    return "\n".join(lines)


def report_paper(suite: Suite, differs: Differs) -> str:
    """Return the side-by-side table of the FRS paper and what was measured here."""
    rates, done = suite.steered_rates(), suite.steered()
    failed = suite.failed()
    settings, given = suite.settings, suite.settings.policy
    about = suite.read("generalist")
    if about is not None and "provenance" in about and about["policy"] == suite.fingerprint:
        given = None  # it is the one that was trained here, as it was shipped
    rows: list[tuple[str, str, str]] = [
        ("generalist", "pi0.5, a vision-language-action model", differs.generalist if given is None else given),
        (
            "it sees",
            "camera images, the robot's state, a sentence",
            differs.observation if given is None else "its own inputs",
        ),
        ("reasoner", "a vision-language model on one image (Gemini Robotics-ER)", differs.reasoner),
        ("tasks", "92 of LIBERO with base success of 40% or less", f"{len(done)} held out, by the same rule"),
        ("episodes for each", "50", str(settings.episodes)),
    ]
    for name, own in rates.items():
        rows.append((f"{NAMES[name]}, mean", f"{PAPER_ZERO_SHOT[name]:g}", cell(_mean(own, done))))
    for name, count in PAPER_GAINS.items():
        here = f"{gains(rates, name, failed)} of {len(failed)}"
        rows.append((f"{NAMES[name]}, tasks failed by the base that gain 10 points or more", f"{count} of 42", here))
    rows.append(("the base fails a task", "success of 2% or less", f"success of {settings.low:.0%} or less"))
    distilled, steered = _distilled(suite)
    if steered:
        for name, label, paper in (("BC", "bc", 28), ("DSBC", "dsbc", 36), ("FRS", "frs", 37)):
            here = f"{cell(_mean(distilled[label], steered))}, {len(steered)} tasks"
            rows.append((f"distilled: {name}", f"{paper}, 15 tasks", here))
    lines = ["| | paper | here |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def report_speed(suite: Suite) -> str:
    """Return the table of speed."""
    found = suite.read("speed")
    if found is None:
        return NOT_YET
    parts = list(found["rows"][0]["seconds_per_chunk"])
    lines = [
        f"{short(found['task'])}, chunks of {found['horizon']} actions, {found['machine']['cores']} cores, milliseconds a chunk "
        "and environment:",
        "",
        "| environments | steps a second | " + " | ".join(parts) + " |",
        "| ---: | ---: |" + " ---: |" * len(parts),
    ]
    for row in found["rows"]:
        times = " | ".join(f"{1000 * row['seconds_per_chunk'][part]:.2f}" for part in parts)
        lines.append(f"| {row['environments']} | {row['steps_per_second']:,.0f} | {times} |")
    beside = found.get("beside_robosuite")
    if beside is not None:
        lines += [
            "",
            "One environment alone, milliseconds:",
            "",
            "| | counterflow | robosuite's own |",
            "| --- | ---: | ---: |",
        ]
        lines += [
            f"| a {what} | {1000 * one['counterflow']:.1f} | {1000 * one['robosuite']:.1f} |"
            for what, one in beside.items()
        ]
    return "\n".join(lines)


def cell(rate: SuccessRate | MeanRate) -> str:
    """Write a rate in percent with its interval."""
    return f"{100 * rate.rate:.0f} ({100 * rate.interval.low:.0f}-{100 * rate.interval.high:.0f})"


def short(task: str) -> str:
    """Return a task's name without its benchmark."""
    return task.split("/", 1)[1]


def _complete(tasks: Sequence[str], rates: Mapping[str, Rates], labels: Iterable[str]) -> list[str]:
    """Return the tasks on which everything that has one of these labels was measured."""
    labels = list(labels)
    return [task for task in tasks if all(task in rates.get(label, {}) for label in labels)]


def _mean(rates: Rates, tasks: Sequence[str]) -> MeanRate:
    return MeanRate(tuple(rates[task] for task in tasks))
