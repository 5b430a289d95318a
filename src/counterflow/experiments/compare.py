"""Comparing steering methods over tasks: every method with the same prior, the same references and the same episodes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from counterflow.envs import expand_tasks, family_of
from counterflow.errors import DatasetError
from counterflow.experiments.evaluate import (
    Evaluation,
    ReasonerSettings,
    adapted,
    evaluate,
    load_prior,
    machine,
    open_env,
    policy_name,
)
from counterflow.experiments.rollout import Episode
from counterflow.experiments.statistics import MeanRate, SuccessRate
from counterflow.files import write_json
from counterflow.policies import load
from counterflow.steering import ChunkCritic, ChunkRegressor, GuidanceSettings, MethodSettings


@dataclass(frozen=True)
class Contender:
    """One way to act, under the name that tables show.

    Attributes:
        label: for example "FRS, K = 5".
        method: "base", "direct", "frs", "partial" or "rank"; with `learned`, "dsbc" or "bc"; with `critic`, "qgf".
        settings: the method's.
        reasoner: who gives the references.
        learned: the file of what was learned.
        critic: the file of a critic that guides the flow, whatever the method.
        guidance: how it does.
    """

    label: str
    method: str
    settings: MethodSettings = field(default_factory=MethodSettings)
    reasoner: ReasonerSettings = field(default_factory=ReasonerSettings)
    learned: str | None = None
    critic: str | None = None
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)


@dataclass(frozen=True)
class Comparison:
    """The results of several contenders on several tasks.

    Attributes:
        rates: contender's label -> task's full name -> its rate.
        results: the complete json of every evaluation, with the contender's label.
    """

    rates: dict[str, dict[str, SuccessRate]]
    results: list[dict[str, Any]]

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order in which they were run."""
        return list(dict.fromkeys(task for rates in self.rates.values() for task in rates))

    def mean(self, label: str, family: str | None = None) -> MeanRate:
        """Return a contender's mean over its tasks, or over those of one family."""
        return MeanRate(
            tuple(rate for task, rate in self.rates[label].items() if family is None or family_of(task) == family)
        )


def compare(
    tasks: Sequence[str],
    contenders: Sequence[Contender],
    episodes: int,
    seed: int,
    *,
    policy: str | None = None,
    device: str = "cpu",
    num_envs: int | None = None,
    path: Path | str | None = None,
    on_start: Callable[[str, Contender], None] | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> Comparison:
    """Run every contender on every task.

    Args:
        tasks: full names, groups or families.
        contenders: what to compare.
        episodes: for each contender on each task; the same ones for all.
        seed: what the episodes descend from.
        policy: a checkpoint for all tasks, loaded once; None: the shipped prior of each task's family.
        device: where it computes, and what was learned beside it.
        num_envs: environments stepped side by side, which results don't depend on; None: chosen.
        path: where to keep the results, written after every evaluation. What is there already, from the same seed,
            settings and policy, is not run again; so an interrupted comparison goes on where it stopped, and one that is
            asked for more episodes runs those that are missing.
        on_start: called before each evaluation that is run.
        on_episode: called after each episode.

    Raises:
        UnknownNameError, MismatchError, InvalidInputError: a task, policy or number can't be right.
        DatasetError: the file at `path` is not one of a comparison.
        StorageError: the results can't be written; those written before are safe.
    """
    results = [] if path is None else read_results(path)
    done = {_key(result): result for result in results}
    fewer = {_key(result, episodes=False): result for result in results if 0 < len(_outcomes(result)) < episodes}
    rates: dict[str, dict[str, SuccessRate]] = {contender.label: {} for contender in contenders}
    kept: list[dict[str, Any]] = []
    render = next((one.reasoner.render for one in contenders if one.reasoner.render is not None), None)
    drawn: dict[str, Any] = {} if render is None else {"render": render}
    expanded = expand_tasks(tasks)
    given = None if policy is None else load(policy, device)
    for task in expanded:
        prior = load_prior(task, device=device) if given is None else adapted(given, task)
        env = None
        try:
            for contender in contenders:
                learned = None if contender.learned is None else ChunkRegressor.load(contender.learned, device)
                settings: dict[str, Any] = {
                    "method": asdict(contender.settings),
                    "reasoner": contender.reasoner.to_json(),
                }
                if learned is not None:
                    settings["learned"] = learned.fingerprint
                critic = None if contender.critic is None else ChunkCritic.load(contender.critic, device)
                if critic is not None:
                    settings |= {"critic": critic.fingerprint, "guidance": asdict(contender.guidance)}
                wanted = {
                    "label": contender.label,
                    "env": task,
                    "steer": contender.method,
                    "episodes": episodes,
                    "seed": seed,
                    "policy": policy_name(prior),
                    "asked": settings,
                }
                result = done.get(_key(wanted))
                if result is None:
                    if on_start is not None:
                        on_start(task, contender)
                    env = open_env(task, episodes, num_envs=num_envs, **drawn) if env is None else env
                    begun = fewer.get(_key(wanted, episodes=False))
                    first = 0 if begun is None else begun["episodes"]
                    found = _run(env, prior, contender, learned, critic, range(first, episodes), seed, on_episode)
                    result = {**wanted, **(found.to_json() if begun is None else _pooled(begun, found.to_json()))}
                    results = [one for one in results if one is not begun] + [result]
                    if path is not None:
                        write_json(path, {"machine": machine(), "results": results})
                kept.append(result)
                rates[contender.label][task] = SuccessRate(result["successes"], result["episodes"])
        finally:
            if env is not None:
                env.close()
    return Comparison(rates, kept)


def read_results(path: Path | str) -> list[dict[str, Any]]:
    """Read what a comparison wrote; an empty list where there is no file yet.

    Raises:
        DatasetError: the file is damaged, or not one of a comparison.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_text())["results"]
        for result in results:
            _key(result)
            SuccessRate(result["successes"], result["episodes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} does not hold the results of a comparison ({type(error).__name__}: {error}). Choose another path, or "
            "delete it to run everything anew."
        ) from error
    return list(results)


def comparison_of(results: Sequence[dict[str, Any]]) -> Comparison:
    """Return results that were read from a file as a comparison."""
    rates: dict[str, dict[str, SuccessRate]] = {}
    for result in results:
        rates.setdefault(result["label"], {})[result["env"]] = SuccessRate(result["successes"], result["episodes"])
    return Comparison(rates, list(results))


def success_table(comparison: Comparison, title: str) -> Table:
    """Return a table of success in percent with 95% intervals: a row a task, a column a contender, means below."""
    table = Table(title=title, title_justify="left", header_style="bold", caption_justify="left")
    table.add_column("task")
    for label in comparison.rates:
        table.add_column(label, justify="right")
    best = {task: max(rates[task].rate for rates in comparison.rates.values()) for task in comparison.tasks}
    for task in comparison.tasks:
        table.add_row(task, *(_cell(rates[task], best[task]) for rates in comparison.rates.values()))
    if len(comparison.tasks) > 1:
        table.add_section()
        means = {label: comparison.mean(label) for label in comparison.rates}
        highest = max(mean.rate for mean in means.values())
        table.add_row("mean", *(_cell(mean, highest) for mean in means.values()))
    return table


def _cell(rate: SuccessRate | MeanRate, best: float) -> str:
    low, high = rate.interval
    number = f"{100 * rate.rate:.0f}%"
    return f"{f'[bold green]{number}[/]' if rate.rate == best else number} [dim]{100 * low:.0f}-{100 * high:.0f}[/]"


def _run(
    env: Any,
    prior: Any,
    contender: Contender,
    learned: ChunkRegressor | None,
    critic: ChunkCritic | None,
    episodes: range,
    seed: int,
    on_episode: Callable[[Episode], None] | None,
) -> Evaluation:
    return evaluate(
        env,
        prior,
        contender.method,
        episodes.stop,
        seed,
        first=episodes.start,
        settings=contender.settings,
        reasoner=contender.reasoner,
        learned=learned,
        critic=critic,
        guidance=contender.guidance,
        on_episode=on_episode,
    )


def _outcomes(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a result's episodes one by one; none where it did not keep every one of them."""
    outcomes: list[dict[str, Any]] = result.get("outcomes") or []
    return outcomes if len(outcomes) == result["episodes"] else []


def _pooled(begun: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation's first episodes and the rest of them as one result."""
    parts = (begun, rest)
    rate = SuccessRate(sum(part["successes"] for part in parts), sum(part["episodes"] for part in parts))
    diagnostics: dict[str, float | None] = {}
    for name in rest["diagnostics"]:
        known = [(part["diagnostics"].get(name), part["episodes"]) for part in parts]
        known = [(value, episodes) for value, episodes in known if value is not None]
        total = sum(episodes for _, episodes in known)
        diagnostics[name] = round(sum(value * episodes for value, episodes in known) / total, 6) if known else None
    return {
        **rest,
        "episodes": rate.episodes,
        "successes": rate.successes,
        "success_rate": rate.rate,
        "ci95": list(rate.interval),
        "seconds": round(sum(part["seconds"] for part in parts), 3),
        "ledger": {name: sum(part["ledger"][name] for part in parts) for name in rest["ledger"]},
        "diagnostics": diagnostics,
        "outcomes": begun["outcomes"] + rest["outcomes"],
    }


def _key(result: dict[str, Any], *, episodes: bool = True) -> str:
    """Return what must agree for a result to be used again, without `episodes` for it to be gone on with."""
    names = ("label", "env", "steer", "seed", "policy", *(("episodes",) if episodes else ()))
    asked = result["asked"]
    # A setting that came after a result was written had its default then.
    asked = {**asked, "method": asdict(MethodSettings()) | asked["method"]}
    if "guidance" in asked:
        asked["guidance"] = asdict(GuidanceSettings()) | asked["guidance"]
    return json.dumps({"asked": asked, **{name: result[name] for name in names}}, sort_keys=True)
