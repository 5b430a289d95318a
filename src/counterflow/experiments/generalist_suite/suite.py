"""The chain in its folder: what was measured, and by which rules on that the next stages take their tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from counterflow.envs import expand_tasks
from counterflow.errors import CounterflowError, DatasetError
from counterflow.experiments.compare import Contender, compare, comparison_of, read_results
from counterflow.experiments.demonstrate import archive_of
from counterflow.experiments.evaluate import ReasonerSettings, policy_name
from counterflow.experiments.generalist_suite.settings import AGAIN, EVALUATIONS, SuiteSettings
from counterflow.experiments.statistics import SuccessRate
from counterflow.policies import load
from counterflow.steering import MethodSettings

KINDS = ("held-out-goals", "held-out-pairs", "held-out-scenes")
SEEDS: dict[str, int] = {"zero_shot": 0, "base": 1, "distillation": 2, "guidance": 3}
"""What is added to the seed: no table is made of the episodes by which its tasks were chosen."""
GAIN = 0.1 - 1e-9
"""Ten points more than the base: what counts as a task where a method works."""
REFERRING = ("direct", "partial", "rank", "frs")


class Suite:
    """The chain in a folder: results/ (to be kept), data/ and runs/ (made again by the same call).

    Args:
        settings: what it does.
        folder: where.
        log: where it says how far it is.
    """

    def __init__(self, settings: SuiteSettings, folder: Path | str, log: Callable[[str], None] = print) -> None:
        self.settings, self.folder, self.log = settings, Path(folder), log
        self.results = self.folder / "results"
        family = settings.family
        known = set(expand_tasks(settings.tasks)) if settings.tasks else None
        self.training = [task for task in expand_tasks([f"{family}/train"]) if known is None or task in known]
        self.held_out = {
            kind: [task for task in expand_tasks([f"{family}/{kind}"]) if known is None or task in known]
            for kind in KINDS
        }

    @property
    def tasks(self) -> list[str]:
        """Training tasks, then held-out ones."""
        return [*self.training, *(task for tasks in self.held_out.values() for task in tasks)]

    def kind_of(self, task: str) -> str:
        """Return the kind of a held-out task, or "train"."""
        return next((kind for kind, tasks in self.held_out.items() if task in tasks), "train")

    @property
    def policy(self) -> str:
        """The generalist: the one that was given, or the run in this folder."""
        return self.settings.policy or str(self.folder / "runs" / "generalist")

    @property
    def reasoner(self) -> ReasonerSettings:
        """Who gives the references, and how they are written."""
        settings = self.settings
        said = settings.reasoner_error, settings.reasoner_delay, settings.convention
        return ReasonerSettings(*said, gripper=settings.gripper)

    def asked_by(self, method: str) -> ReasonerSettings:
        """Return whom a method asks; of one that asks nobody, nothing that its results could depend on."""
        return self.reasoner if method in REFERRING else ReasonerSettings()

    @cached_property
    def fingerprint(self) -> str:
        """Which policy it is; of this folder's own that is not there any more, what the results say.

        Raises:
            CounterflowError: a policy was given, and it can't be loaded.
            DatasetError: none was given, and none was trained here yet.
        """
        try:
            return policy_name(load(self.policy))
        except CounterflowError as error:
            if self.settings.policy is not None:
                raise
            known = self.read("generalist")
            if known is None:
                raise DatasetError(f"there is no generalist yet ({error}) Run the stage 'generalist' first.") from error
            return str(known["policy"])

    @property
    def data(self) -> Path:
        """Where recordings of this policy and reasoner go, and what was learned from them: others are not taken for them."""
        said = self.reasoner
        return (
            self.folder
            / "data"
            / f"{self.fingerprint[:16]}-{said.convention}-{said.gripper}-{said.error:g}-{said.delay}"
        )

    def read(self, name: str) -> Any:
        """Return what results/<name>.json holds, or None."""
        path = self.results / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def rates(self, stage: str) -> dict[str, dict[str, SuccessRate]]:
        """Return what a stage measured of the present policy, as it is asked for: label -> task -> rate."""
        tasks, settings = set(self.tasks), self.settings
        seed = settings.seed + SEEDS[stage]
        return comparison_of(
            [
                result
                for path in sorted((self.results / stage).glob("*.json"))
                for result in read_results(path)
                if (result["policy"], result["asked"]["reasoner"])
                == (self.fingerprint, self.asked_by(result["steer"]).to_json())
                and (result["seed"], result["episodes"]) == (seed, settings.episodes)
                and result["env"] in tasks
            ]
        ).rates

    def evaluate(self, stage: str, task: str, contenders: Sequence[Contender], episodes: int | None = None) -> None:
        """Evaluate on one task what is missing."""
        settings = self.settings
        compare(
            [task],
            [replace(one, reasoner=self.asked_by(one.method)) for one in contenders],
            settings.episodes if episodes is None else episodes,
            settings.seed + SEEDS[stage],
            policy=self.policy,
            device=settings.device,
            num_envs=settings.num_envs,
            path=self.results / stage / f"{slug(task)}.json",
            on_start=lambda name, contender: self.log(f"{stage}: {name}, {contender.label}"),
        )

    def base_rates(self) -> dict[str, SuccessRate]:
        """Return the base's rates by which tasks are chosen.

        Raises:
            DatasetError: they were not measured yet.
        """
        rates = self.rates("base").get("base", {})
        missing = [task for task in self.tasks if task not in rates]
        if missing:
            raise DatasetError(
                f"the generalist was not measured on {len(missing)} tasks ({missing[0]} ...), by which the next stages choose "
                "theirs. Run the stage 'base' to its end first."
            )
        return {task: rates[task] for task in self.tasks}

    def steered(self) -> list[str]:
        """The held-out tasks in the zero-shot table: those with base success in the regime, the lowest first."""
        rates = self.base_rates()
        found = [task for tasks in self.held_out.values() for task in tasks if rates[task].rate <= self.settings.regime]
        return sorted(found, key=lambda task: (rates[task].rate, task))

    def failed(self) -> list[str]:
        """The tasks of the zero-shot table that the generalist fails."""
        rates = self.base_rates()
        return [task for task in self.steered() if rates[task].rate <= self.settings.low]

    @property
    def grids(self) -> dict[str, dict[Any, Contender]]:
        """What steers zero-shot, method by method, with each of its settings (K, tau, n); None where there is nothing to set."""
        settings = self.settings
        return {
            "base": {None: Contender("base", "base")},
            "direct": {None: Contender("direct", "direct")},
            "partial": {value: partial(value) for value in settings.taus},
            "rank": {value: rank(value) for value in settings.candidates},
            "frs": {value: reversal(value) for value in settings.reversals},
        }

    def setting_rates(self) -> dict[str, dict[Any, dict[str, SuccessRate]]]:
        """Return of every method and setting the rates on all tasks of the zero-shot table.

        Raises:
            DatasetError: they were not measured yet.
        """
        rates, tasks = self.rates("zero_shot"), self.steered()
        found: dict[str, dict[Any, dict[str, SuccessRate]]] = {}
        for method, grid in self.grids.items():
            found[method] = {}
            for value, contender in grid.items():
                own = rates.get(contender.label, {})
                missing = [task for task in tasks if task not in own]
                if missing:
                    raise DatasetError(
                        f"{missing[0]} was not steered by {contender.label} yet, and the best settings for a task are found on "
                        "the others. Run the stage 'zero_shot' to its end first."
                    )
                found[method][value] = {task: own[task] for task in tasks}
        return found

    def chosen(self, task: str) -> dict[str, Any]:
        """Return the settings for a task, "frs" K, "partial" tau, "rank" n: those with the best mean on the table's other tasks.

        Raises:
            DatasetError: they were not measured yet.
        """
        return best_elsewhere(self.setting_rates(), task)

    def contenders(self, task: str) -> dict[str, Contender]:
        """Return the five of the zero-shot table, with the settings for a task."""
        chosen = self.chosen(task)
        return {method: grid[chosen.get(method)] for method, grid in self.grids.items()}

    def steered_rates(self) -> dict[str, dict[str, SuccessRate]]:
        """Return the zero-shot table: method -> task -> rate, each with the settings for that task."""
        found, tasks = self.setting_rates(), self.steered()
        chosen = {task: best_elsewhere(found, task) for task in tasks}
        return {
            method: {task: rates[chosen[task].get(method)][task] for task in tasks} for method, rates in found.items()
        }

    def zero_shot_gains(self) -> dict[str, tuple[float, float]]:
        """Return of every task in the zero-shot table FRS's success, and how much more that is than the base's."""
        rates = self.steered_rates()
        base, steered = rates["base"], rates["frs"]
        return {task: (steered[task].rate, steered[task].rate - base[task].rate) for task in steered}

    def working(self) -> list[str]:
        """The tasks where FRS gains ten points or more, the greatest gain first."""
        gains = self.zero_shot_gains()
        return sorted((task for task in gains if gains[task][1] >= GAIN), key=lambda task: (-gains[task][1], task))

    def hardest(self) -> list[str]:
        """The tasks where FRS hardly works, those with a success first: reinforcement learning begins from one."""
        gains, works = self.zero_shot_gains(), self.working()
        return sorted(
            (task for task in gains if task not in works), key=lambda task: (gains[task][0] == 0, gains[task][0], task)
        )[: self.settings.hard]

    def noise_steps(self, task: str) -> int:
        """Return in how many steps the noises that are learned on a task are denoised."""
        own = self.settings.noise_steps
        return int(self.chosen(task)["frs"]) if own is None else own

    def asked_of_learning(self, task: str, kind: str) -> dict[str, Any]:
        """Return what must agree for a result of reinforcement learning on a task to count.

        Args:
            task: its name.
            kind: "works" or "hard": what the learner begins from.
        """
        settings = self.settings
        return {
            "kind": kind,
            "seed": settings.seed,
            "episodes": settings.episodes,
            "successes": settings.successes if kind == "works" else 1,
            "policy": self.fingerprint,
            "reasoner": self.reasoner.to_json(),
            "steps": self.noise_steps(task),
            "decisions": settings.decisions,
            "seeds": list(settings.learning_seeds),
            "evaluations": EVALUATIONS,
            **AGAIN,
        }

    def critics_tasks(self) -> tuple[list[str], list[str]]:
        """The tasks whose rollouts the critic learns from, and those that it never sees: by turns, the most even first.

        Only tasks where the generalist neither always fails nor always succeeds say anything of guidance.
        """
        rates = self.base_rates()
        even = sorted(
            (task for task, rate in rates.items() if 0.1 <= rate.rate <= 0.9),
            key=lambda task: (abs(rates[task].rate - 0.5), task),
        )[: 2 * self.settings.guided]
        return even[::2], even[1::2]


def best_elsewhere(rates: Mapping[str, Mapping[Any, Mapping[str, SuccessRate]]], task: str) -> dict[str, Any]:
    """Return of each method that has settings the one with the best mean on all tasks but this one.

    Args:
        rates: method -> setting -> task -> rate.
        task: the one that does not count.
    """

    def elsewhere(own: Mapping[str, SuccessRate]) -> float:
        return sum(rate.rate for other, rate in own.items() if other != task)

    return {
        method: max(own, key=lambda value: elsewhere(own[value])) for method, own in rates.items() if None not in own
    }


def slug(task: str) -> str:
    """Return a task's name as a file's."""
    return archive_of(Path(), task).stem


def reversal(steps: int) -> Contender:
    """Return Flow Reversal Steering with one K."""
    return Contender(f"FRS, K = {steps}", "frs", MethodSettings(reversal_steps=steps))


def partial(tau: float) -> Contender:
    """Return partial noising at one level."""
    return Contender(f"partial, tau = {tau:g}", "partial", MethodSettings(tau=tau))


def rank(candidates: int) -> Contender:
    """Return sample-and-rank with one number of candidates."""
    return Contender(f"rank, n = {candidates}", "rank", MethodSettings(candidates=candidates))
