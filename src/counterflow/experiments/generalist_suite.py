"""The papers' ground as one chain of stages: a generalist, the tasks that it fails, and every way of steering it.

    experts, demonstrations -> generalist -> base -> choose -> zero_shot -> distillation -> rl; base -> guidance; speed

Each stage does what is missing in `results/` and keeps what it did as soon as it is known, a file a task, so that a chain that
was killed goes on. Which tasks a stage takes is decided by rules on the results of the stages before it, written down here, and
with other episodes than those in its table: whoever is chosen for failing would otherwise look better the second time.

Sources: FRS (arXiv 2606.13675), its LIBERO tables; GAF (arXiv 2607.02092), the guidance table.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from counterflow.envs import expand_tasks, make_env
from counterflow.envs.registry import make_task
from counterflow.errors import CounterflowError, DatasetError, InvalidInputError, MismatchError, UnknownNameError
from counterflow.experiments.compare import Contender, compare, comparison_of, read_results
from counterflow.experiments.critic import train_critic
from counterflow.experiments.demonstrate import archive_of, demonstrate_tasks
from counterflow.experiments.distill import distill
from counterflow.experiments.evaluate import ReasonerSettings, load_prior, machine, policy_name
from counterflow.experiments.generalist import TRAINING, train_generalist
from counterflow.experiments.online import OnlineProgress, train_online
from counterflow.experiments.online_settings import Config, OnlineRun, online_preset
from counterflow.experiments.record import record
from counterflow.experiments.rollout import seen_by
from counterflow.experiments.sight import Eyes, looks
from counterflow.experiments.statistics import MeanRate, SuccessRate
from counterflow.experiments.train import Cadence, Progress
from counterflow.files import write_json
from counterflow.learning import BCConfig, ChunkCriticConfig, DSBCConfig
from counterflow.learning.dsrl import DSRLConfig
from counterflow.learning.rfs import RFSConfig
from counterflow.policies import GeneralistConfig, load
from counterflow.random import child_seed
from counterflow.reasoners import oracle_expert, to_reference
from counterflow.steering import MethodSettings, RegressorConfig, steer

Stage = Literal[
    "experts", "demonstrations", "generalist", "base", "choose", "zero_shot", "distillation", "rl", "guidance", "speed"
]
STAGES: tuple[Stage, ...] = get_args(Stage)
KINDS = ("held-out-goals", "held-out-pairs", "held-out-scenes")
SEEDS: dict[str, int] = {"zero_shot": 0, "base": 1, "choose": 1, "distillation": 2, "guidance": 3}
"""What is added to the seed: no table is made of the episodes by which its tasks were chosen."""
GAIN = 0.1 - 1e-9
"""Ten points more than the base: what counts as a task where a method works."""
REFERRING = ("direct", "partial", "rank", "frs")
DSBC = DSBCConfig()
BC = replace(DSBC, regressor=RegressorConfig(target="action", bound=None))
SPEED_CHUNKS = 40
MOST_TRIES = 100  # episodes in which one success of a hard task is looked for


@dataclass(frozen=True)
class SuiteSettings:
    """What the chain does.

    Attributes:
        family: "metaworld" or "libero"; its split is `counterflow/envs/tasks/held_out.json`.
        tasks: leave all other tasks out (for a trial); empty: all of the split.
        policy: another policy than the one that is trained here: a checkpoint or run folder, or lerobot: and a hub id or folder.
        device: where it computes.
        num_envs: environments stepped side by side; None: chosen.
        convention: how directions are written into references, "ogbench" or "paper".
        gripper: what references say of the gripper: what the reasoner does ("said"), or as in the paper nothing ("hold").
        reasoner_error, reasoner_delay: how often the reasoner is wrong, and how many chunks late it is.
        seed: what everything descends from.
        episodes: for each method on each task.
        expert_episodes: for each task's expert.
        demonstrations: successful ones, for each training task.
        noise: of the experts' motion, in the first two stages.
        architecture, learning: of the generalist.
        low: base success up to which a held-out task counts as one that the generalist fails.
        regime: base success up to which a held-out task is steered at all (the paper's 40%).
        choosing_tasks, choosing_episodes: with which K, tau and n are chosen.
        reversals, taus, candidates: among what; of equally good ones the first.
        distilled: how many tasks are distilled, at most.
        successes: how many steered successes each is distilled from.
        works, hard: how many tasks reinforcement learning is tried on, of those where FRS works and of the others.
        decisions: of reinforcement learning, for each seed.
        learning_seeds: of reinforcement learning.
        guided: for the guidance table, how many tasks the critic has seen, and as many that it hasn't.
        rollouts: of the generalist alone, for each task that the critic has seen.
        workers: processes of the first two stages.

    Raises:
        UnknownNameError: there is no split of that family.
        InvalidInputError: a number is out of range.
    """

    family: str = "metaworld"
    tasks: tuple[str, ...] = ()
    policy: str | None = None
    device: str = "cpu"
    num_envs: int | None = None
    convention: str = "ogbench"
    gripper: Literal["said", "hold", "policy"] = "said"
    reasoner_error: float = 0.0
    reasoner_delay: int = 0
    seed: int = 0
    episodes: int = 20
    expert_episodes: int = 10
    demonstrations: int = 50
    noise: float = 0.1
    architecture: GeneralistConfig = field(default_factory=lambda: GeneralistConfig(width=96, encoder_depth=2, depth=3))
    learning: BCConfig = field(default_factory=lambda: replace(TRAINING, steps=25_000))
    low: float = 0.1
    regime: float = 0.4
    choosing_tasks: int = 6
    choosing_episodes: int = 10
    reversals: tuple[int, ...] = (5, 3, 10, 20)
    taus: tuple[float, ...] = (0.5, 0.3, 0.7, 0.9)
    candidates: tuple[int, ...] = (16, 4, 8)
    distilled: int = 15
    successes: int = 18
    works: int = 6
    hard: int = 3
    decisions: int = 3_000
    learning_seeds: tuple[int, ...] = (0,)
    guided: int = 5
    rollouts: int = 50
    workers: int = 2

    def __post_init__(self) -> None:
        """Check family and numbers."""
        if self.family not in ("metaworld", "libero"):
            raise UnknownNameError("family with a split", self.family, ["metaworld", "libero"])
        for name in ("episodes", "expert_episodes", "demonstrations", "choosing_tasks", "choosing_episodes", "successes",
                     "decisions", "rollouts", "workers"):  # fmt: skip
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        for name in ("low", "regime"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected a rate from 0 to 1.")


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
        """Which policy it is; of one that is not there any more, what the results say."""
        try:
            return policy_name(load(self.policy))
        except CounterflowError as error:
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
        """Return what a stage measured of the present policy: label -> task -> rate."""
        tasks = set(self.tasks)
        return comparison_of(
            [
                result
                for path in sorted((self.results / stage).glob("*.json"))
                for result in read_results(path)
                if (result["policy"], result["asked"]["reasoner"])
                == (self.fingerprint, self.asked_by(result["steer"]).to_json())
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

    def choosing(self) -> list[str]:
        """The tasks on which K, tau and n are chosen: of the training split, those at which the generalist succeeds least."""
        rates = self.base_rates()
        return sorted(self.training, key=lambda task: (rates[task].rate, task))[: self.settings.choosing_tasks]

    def steered(self) -> list[str]:
        """The held-out tasks in the zero-shot table: those with base success in the regime, the lowest first."""
        rates = self.base_rates()
        found = [task for tasks in self.held_out.values() for task in tasks if rates[task].rate <= self.settings.regime]
        return sorted(found, key=lambda task: (rates[task].rate, task))

    def failed(self) -> list[str]:
        """The tasks of the zero-shot table that the generalist fails."""
        rates = self.base_rates()
        return [task for task in self.steered() if rates[task].rate <= self.settings.low]

    def chosen(self) -> dict[str, Any]:
        """Return the chosen settings: "frs" K, "partial" tau, "rank" n.

        Raises:
            DatasetError: they were not chosen yet, or for another policy.
        """
        found = self.read("chosen")
        if found is None or (found["policy"], found["reasoner"]) != (self.fingerprint, self.reasoner.to_json()):
            raise DatasetError(
                f"{self.results} holds no K, tau and n for this policy and reasoner. Run the stage 'choose' first."
            )
        return dict(found["settings"])

    def contenders(self) -> dict[str, Contender]:
        """Return the five of the zero-shot table, with the chosen settings."""
        chosen = self.chosen()
        return {
            "base": Contender("base", "base"),
            "direct": Contender("direct", "direct"),
            "partial": partial(chosen["partial"]),
            "rank": rank(chosen["rank"]),
            "frs": reversal(chosen["frs"]),
        }

    def zero_shot_gains(self) -> dict[str, tuple[float, float]]:
        """Return of every task in the zero-shot table FRS's success, and how much more that is than the base's."""
        rates, label = self.rates("zero_shot"), self.contenders()["frs"].label
        base, steered = rates.get("base", {}), rates.get(label, {})
        missing = [task for task in self.steered() if task not in base or task not in steered]
        if missing:
            raise DatasetError(f"{missing[0]} was not steered yet. Run the stage 'zero_shot' to its end first.")
        return {task: (steered[task].rate, steered[task].rate - base[task].rate) for task in self.steered()}

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

    def asked_of_learning(self) -> dict[str, Any]:
        """Return what must agree for a result of reinforcement learning to count."""
        settings = self.settings
        return {
            "policy": self.fingerprint,
            "reasoner": self.reasoner.to_json(),
            "steps": self.chosen()["frs"],
            "decisions": settings.decisions,
            "seeds": list(settings.learning_seeds),
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


def experts(suite: Suite) -> None:
    """Let every task's expert try, with the demonstrations' noise."""
    settings = suite.settings
    folder = suite.results / "experts"
    asked: dict[str, Any] = {
        "episodes": settings.expert_episodes,
        "noise": settings.noise,
        "seed": settings.seed,
    }
    left = []
    for task in suite.tasks:
        known = suite.read(f"experts/{slug(task)}")
        if known is None or known["asked"] != asked:
            left.append(task)
    context = multiprocessing.get_context("spawn")
    # LIBERO's simulator keeps some of every environment, so a worker is replaced now and then.
    with ProcessPoolExecutor(settings.workers, mp_context=context, max_tasks_per_child=8) as pool:
        futures = {pool.submit(try_expert, task, **asked): task for task in left}
        for future in as_completed(futures):
            task, found = futures[future], future.result()
            write_json(folder / f"{slug(task)}.json", {"task": task, "asked": asked, **found})
            suite.log(f"experts: {task}, {sum(found['successes'])} of {len(found['successes'])}")


def try_expert(task: str, episodes: int, noise: float, seed: int) -> dict[str, Any]:
    """Run one task's expert in this process; return `successes` and `steps`, an entry an episode, and `seconds`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one simulator a core
    env, expert = make_task(task), oracle_expert(task, noise)
    successes, steps, began = [], [], time.perf_counter()
    try:
        for episode in range(episodes):
            own = child_seed(seed, "expert", episode)
            moment = env.reset(child_seed(own, "environment"))
            expert.reset(child_seed(own, "expert"))
            count = 0
            while not (moment.terminated or moment.truncated):
                moment = env.step(expert.act(moment.privileged))
                count += 1
            successes.append(moment.success)
            steps.append(count)
    finally:
        env.close()
    return {"successes": successes, "steps": steps, "seconds": round(time.perf_counter() - began, 2)}


def demonstrations(suite: Suite) -> None:
    """Let the experts demonstrate the training tasks."""
    settings = suite.settings
    if settings.policy is not None:
        suite.log(f"demonstrations: none are needed, {settings.policy} was given")
        return
    asked = {"episodes": settings.demonstrations, "noise": settings.noise, "seed": settings.seed}
    folder, known = suite.folder / "data" / "demonstrations", suite.read("demonstrations")
    known = known if known is not None and known["asked"] == asked else None
    if known is not None and all(
        task in known["given_up"] or archive_of(folder, task).exists() for task in suite.training
    ):
        return
    began = time.perf_counter()
    made = demonstrate_tasks(
        suite.training,
        folder,
        episodes=settings.demonstrations,
        seed=settings.seed,
        noise=settings.noise,
        workers=settings.workers,
        on_task=lambda task, count: suite.log(f"demonstrations: {task}, {count} of {len(suite.training)}"),
    )
    write_json(
        suite.results / "demonstrations.json",
        {
            "asked": asked,
            "seconds_in_the_last_session": round(time.perf_counter() - began, 1),
            "tasks": {
                task: {"episodes": one.episodes, "attempts": one.attempts, "transitions": one.transitions}
                for task, one in made.made.items()
            },
            "given_up": made.given_up,
        },
    )


def generalist(suite: Suite) -> None:
    """Train the generalist on the training split; on all cores."""
    settings = suite.settings
    known = suite.read("generalist")
    if settings.policy is not None:
        write_json(suite.results / "generalist.json", {"policy": suite.fingerprint, "given": settings.policy})
        return

    def show(progress: Progress) -> None:
        if progress.step % 1_000 == 0:
            suite.log(f"generalist: {progress.step} of {progress.steps}, loss {progress.loss:.4f}")

    with _threads(os.cpu_count() or 1):
        trained = train_generalist(
            suite.folder / "data" / "demonstrations",
            suite.training,
            suite.policy,
            settings.architecture,
            settings.learning,
            seed=settings.seed,
            cadence=Cadence(validate=1_000, checkpoint=500, report=100),
            on_progress=show,
        )
    made = load(suite.policy)
    if not trained.steps_done and known is not None and known["policy"] == policy_name(made):
        return
    write_json(
        suite.results / "generalist.json",
        {
            "policy": policy_name(made),
            "parameters": sum(parameter.numel() for parameter in made.parameters()),
            "megabytes": round(trained.path.stat().st_size / 2**20, 1),
            "seconds": round(trained.seconds, 1),
            "timed_updates": trained.steps_done,  # fewer than all after an interruption
            "provenance": made.provenance,
        },
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Give torch so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def base(suite: Suite) -> None:
    """Measure the generalist alone on every task."""
    for task in suite.tasks:
        suite.evaluate("base", task, [Contender("base", "base")])


def choose(suite: Suite) -> None:
    """Choose K, tau and n on tasks that are in no table of steering."""
    settings, tasks = suite.settings, suite.choosing()
    grids: dict[str, dict[Any, Contender]] = {
        "frs": {value: reversal(value) for value in settings.reversals},
        "partial": {value: partial(value) for value in settings.taus},
        "rank": {value: rank(value) for value in settings.candidates},
    }
    for task in tasks:
        every = [contender for grid in grids.values() for contender in grid.values()]
        suite.evaluate("choose", task, every, settings.choosing_episodes)
    rates = suite.rates("choose")
    means = {
        method: {
            value: MeanRate(tuple(rates[contender.label][task] for task in tasks)) for value, contender in grid.items()
        }
        for method, grid in grids.items()
    }
    write_json(
        suite.results / "chosen.json",
        {
            "policy": suite.fingerprint,
            "reasoner": suite.reasoner.to_json(),
            "tasks": tasks,
            "settings": {method: max(found, key=lambda value: found[value].rate) for method, found in means.items()},
            "means": {
                method: [{"setting": value, **rate.to_json()} for value, rate in found.items()]
                for method, found in means.items()
            },
        },
    )


def zero_shot(suite: Suite) -> None:
    """Steer every held-out task of the regime by all methods, the lowest base first."""
    for task in suite.steered():
        suite.evaluate("zero_shot", task, list(suite.contenders().values()))


def steered_successes(suite: Suite, task: str, successes: int, folder: str = "steered") -> Path | None:
    """Return the folder of a task's FRS rollouts, recorded as far as they are missing; None: too few succeed."""
    out = suite.data / folder / f"{slug(task)}-{suite.chosen()['frs']}"
    try:
        record(
            task,
            "frs",
            out,
            successes=successes,
            seed=suite.settings.seed,
            settings=suite.contenders()["frs"].settings,
            reasoner=suite.reasoner,
            policy=suite.policy,
            device=suite.settings.device,
            num_envs=suite.settings.num_envs,
            max_episodes=MOST_TRIES if successes == 1 else 20 * successes,
        )
    except DatasetError as error:
        suite.log(f"{task}: {error}")
        return None
    return out


def distillation(suite: Suite) -> None:
    """Distil where FRS works: base, BC, DSBC, FRS."""
    settings = suite.settings
    for task in suite.working()[: settings.distilled]:
        rollouts = steered_successes(suite, task, settings.successes)
        if rollouts is None:
            continue
        found = suite.contenders()
        contenders = [found["base"], found["frs"]]
        for method, config in (("bc", BC), ("dsbc", DSBC)):
            out = suite.data / "distilled" / f"{rollouts.name}-{settings.successes}-{method}.safetensors"
            if not out.exists():
                out.parent.mkdir(parents=True, exist_ok=True)
                distill([rollouts], out, config, first=settings.successes, seed=settings.seed)
            contenders.append(Contender(method, method, learned=str(out)))
        suite.evaluate("distillation", task, contenders)


def reinforcement(suite: Suite) -> None:
    """Learn online where FRS works (from its successes), and where it hardly does (from one)."""
    settings = suite.settings
    for task in suite.working()[: settings.works]:
        alone = _alone(suite, task)
        _learn(suite, "works", task, "residual", "residual", online_preset("residual", "small"), alone)
        _learn(suite, "works", task, "DSRL", "dsrl", _plain_dsrl())
        steered = steered_successes(suite, task, settings.successes)
        if steered is not None:
            _learn(suite, "works", task, "DSRL + FRS", "dsrl", online_preset("dsrl", "small"), steered)
    for task in suite.hardest():
        alone = _alone(suite, task)
        _learn(suite, "hard", task, "residual", "residual", online_preset("residual", "small"), alone)
        _learn(suite, "hard", task, "DSRL", "dsrl", _plain_dsrl())
        one = steered_successes(suite, task, 1, "one")
        if one is not None:
            preset = online_preset("dsrl", "small")
            _learn(suite, "hard", task, "DSRL + FRS", "dsrl", preset, one, successes_only=True, first=1)


def _alone(suite: Suite, task: str) -> Path:
    """Return the folder of as many rollouts of the generalist alone, denoised in as many steps as the learning's."""
    steps = suite.chosen()["frs"]
    out = suite.data / "alone" / f"{slug(task)}-{steps}"
    record(
        task,
        "base",
        out,
        episodes=suite.settings.successes,
        seed=suite.settings.seed,
        settings=MethodSettings(steps=steps),
        policy=suite.policy,
        device=suite.settings.device,
        num_envs=suite.settings.num_envs,
        every_step=False,
    )
    return out


def _plain_dsrl() -> tuple[Config, OnlineRun]:
    """Return the small preset without what only recordings give."""
    config, run = online_preset("dsrl", "small")
    assert isinstance(config, DSRLConfig)
    return replace(config, bc_weight=0.0), run


def _learn(
    suite: Suite,
    kind: str,
    task: str,
    label: str,
    algorithm: str,
    preset: tuple[Config, OnlineRun],
    data: Path | None = None,
    **changes: Any,
) -> None:
    """Train what is missing and keep its curves."""
    settings = suite.settings
    name = f"{slug(task)}-{label.lower().replace(' + ', '-')}"
    asked = suite.asked_of_learning()
    known = suite.read(f"rl/{name}")
    if known is not None and known["asked"] == asked:
        return
    every = max(1, settings.decisions // 6)
    config, run = preset
    if not isinstance(config, RFSConfig):
        config = replace(config, warmup=min(config.warmup, every))
    run = replace(
        run,
        decisions=settings.decisions,
        episodes=settings.episodes,
        evaluate_every=every,
        capacity=20_000,
        steps=suite.chosen()["frs"],  # a noise is the same action in as many steps only
        **changes,
    )
    suite.log(f"rl: {task}, {label}")

    def show(progress: OnlineProgress) -> None:
        if progress.decision % every == 0:
            suite.log(f"  {progress.decision}: training {progress.recent}, evaluation {progress.success}")

    out = suite.data / "rl" / f"{name}-{run.steps}-{settings.decisions}"
    train_online(
        algorithm,
        task,
        out,
        config,
        run,
        prefill_from=data,
        policy=suite.policy,
        seeds=settings.learning_seeds,
        device=settings.device,
        on_progress=show,
    )
    content = json.loads((out / "results.json").read_text())
    kept = {"asked": asked, "kind": kind, "task": task, "label": label}
    write_json(suite.results / "rl" / f"{name}.json", {**content, **kept})


def guidance(suite: Suite) -> None:
    """Guide by a critic that learned from the generalist's own rollouts, on tasks that it has seen and others."""
    settings = suite.settings
    seen, unseen = suite.critics_tasks()
    if not seen:
        suite.log("guidance: the generalist always fails or always succeeds, so there is nothing to learn from")
        return
    folders = []
    for task in seen:
        suite.log(f"guidance: rollouts of {task}")
        folders.append(suite.data / "alone-for-critic" / slug(task))
        record(
            task,
            "base",
            folders[-1],
            episodes=settings.rollouts,
            seed=settings.seed,
            policy=suite.policy,
            device=settings.device,
            num_envs=settings.num_envs,
            every_step=False,
        )
    out = suite.data / f"critic-{len(seen)}-{settings.rollouts}.safetensors"
    if not out.exists():
        critic = train_critic(folders, out, ChunkCriticConfig(), seed=settings.seed)
        write_json(suite.results / "critic.json", {"policy": suite.fingerprint, **critic.provenance})
    for task in (*seen, *unseen):
        suite.evaluate("guidance", task, [Contender("base", "base"), Contender("guided", "qgf", critic=str(out))])
    write_json(suite.results / "guidance-tasks.json", {"policy": suite.fingerprint, "seen": seen, "unseen": unseen})


def speed(suite: Suite) -> None:
    """Measure environment steps a second, and where the time of a steered episode goes."""
    task = next(task for tasks in suite.held_out.values() for task in tasks)
    prior = load_prior(task, suite.policy, suite.settings.device)
    spec = prior.action_spec
    length = spec.horizon if spec.executed is None else spec.executed
    found: dict[str, Any] = {"task": task, "horizon": length, "machine": machine(), "rows": []}
    for rows in (1, 4, 16):
        with make_env(task, rows) as env:
            batch = env.reset({row: child_seed(suite.settings.seed, row) for row in range(rows)})
            still = np.zeros((rows, length, spec.dim), np.float32)
            steps, began = 0, time.perf_counter()
            for _ in range(SPEED_CHUNKS):
                batch = env.execute(still, rows=list(range(rows)))
                steps += int(batch.steps.sum())
                if batch.done.any():
                    break
            simulating = (time.perf_counter() - began) / steps
            reasoner = ReasonerSettings().maker(task)()
            reasoner.reset(0)
            began = time.perf_counter()
            said = [reasoner.decide(seen_by(reasoner, env, batch, row)) for row in range(rows) for _ in range(10)]
            thinking = (time.perf_counter() - began) / len(said)
            eyes, every = Eyes(prior, env), list(range(rows))
            eyes.see(batch.observation, every)  # the first time makes what pictures are drawn with
            began = time.perf_counter()
            observation = eyes.see(batch.observation, every)
            looking = {"pictures": (time.perf_counter() - began) / rows} if looks(prior) else {}
            reference = to_reference(said[::10], spec)
            computing = {}
            for method in ("base", "frs"):
                policy = steer(prior, method)
                policy.act(observation, reference if method == "frs" else None, 0)
                began = time.perf_counter()
                for _ in range(10):
                    policy.act(observation, reference if method == "frs" else None, 0).actions.cpu()
                computing[method] = (time.perf_counter() - began) / 10 / rows
        found["rows"].append(
            {
                "environments": rows,
                "steps_per_second": 1 / simulating,
                "seconds_per_chunk": {
                    "simulator": simulating * length,
                    "reasoner": thinking,
                    **looking,
                    **{f"policy, {method}": seconds for method, seconds in computing.items()},
                },
            }
        )
        suite.log(f"speed: {rows} environments, {1 / simulating:.0f} steps a second")
    write_json(suite.results / "speed.json", found)


RUN: dict[Stage, Callable[[Suite], None]] = {
    "experts": experts,
    "demonstrations": demonstrations,
    "generalist": generalist,
    "base": base,
    "choose": choose,
    "zero_shot": zero_shot,
    "distillation": distillation,
    "rl": reinforcement,
    "guidance": guidance,
    "speed": speed,
}


def run_suite(suite: Suite, stages: Sequence[Stage] = STAGES) -> None:
    """Run stages, each as far as it is missing.

    Must be called under `if __name__ == "__main__"` (see `make_env`).

    Raises:
        UnknownNameError: no such stage.
        DatasetError: a stage needs what an earlier one was to leave.
        MismatchError: the policy does not fit the tasks.
    """
    for stage in stages:
        if stage not in RUN:
            raise UnknownNameError("stage", stage, STAGES)
    if not suite.training or not any(suite.held_out.values()):
        raise MismatchError(
            f"of {', '.join(suite.settings.tasks)} {len(suite.training)} tasks are in the training split of "
            f"{suite.settings.family} and {len(suite.tasks) - len(suite.training)} are held out; expected some of both."
        )
    torch.set_num_threads(1)  # the policies are small; the cores are the simulators'
    for stage in stages:
        began = time.perf_counter()
        RUN[stage](suite)
        suite.log(f"{stage}: done in {time.perf_counter() - began:.0f} s")
