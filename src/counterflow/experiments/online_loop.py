"""The loop of an online run: decisions, learning, evaluation on the way, and checkpoints to go on from with the same numbers."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.envs import VectorEnv
from counterflow.errors import TrainingError
from counterflow.experiments.evaluate import machine
from counterflow.experiments.figures import success_curve
from counterflow.experiments.inversion import InversionSettings
from counterflow.experiments.online_agents import Agent, OffPolicyAgent, RFSAgent, starting, starting_std, under
from counterflow.experiments.online_data import Prefilled, Recording
from counterflow.experiments.online_settings import Config, OnlineRun
from counterflow.experiments.online_teaching import Teachers
from counterflow.experiments.record import arrays_of
from counterflow.experiments.rollout import run_episodes
from counterflow.experiments.run import Run
from counterflow.experiments.statistics import SeedsRate, SuccessRate, tells
from counterflow.experiments.steering_env import SteeredRows, Taken
from counterflow.files import write_json
from counterflow.learning.dsrl import AnchorsLearner, DSRLConfig
from counterflow.learning.rfs import RFSConfig
from counterflow.random import child_seed
from counterflow.steering import AnchorsCritic, SteeredPolicy, SteeringSpace, describe_bound, mass_beyond

EVALUATED = "evaluation_episodes"  # the entry of the metrics that says how many episodes of each seed a rate is of
RECENT = 20
"""Episodes over which success in training is reported."""
MUCH = 0.2
"""From this share of its numbers beyond a bound on, what starts within it is not the prior's law (a bound of 1.28 has it)."""


@dataclass
class Ledger:
    """What a run has cost, all seeds together.

    Attributes:
        environment_steps: executed actions.
        field_evaluations: of the frozen flow, rows counted; without the inversions of `reteach_every`, some thousand rows for
            each success.
        reasoner_queries: questions to the reasoner.
        updates: gradient updates of each seed.
        episodes: finished ones.
        seconds: wall-clock time, sessions added up.
    """

    environment_steps: float = 0.0
    field_evaluations: float = 0.0
    reasoner_queries: float = 0.0
    updates: float = 0.0
    episodes: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Return plain values."""
        return {name: round(value, 1) if name == "seconds" else int(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class OnlineProgress:
    """How far a run is.

    Attributes:
        decision: chunks of each seed so far.
        decisions: in all.
        numbers: means over seeds of what the learner reports, since the last report.
        recent: success of each seed's last episodes in training.
        success: rates of the last evaluation, seed by seed; empty before.
        ledger: what it has cost.
    """

    decision: int
    decisions: int
    numbers: dict[str, float]
    recent: dict[int, float]
    success: dict[int, float]
    ledger: Ledger


@dataclass(frozen=True)
class OnlineTrained:
    """What came of a run.

    Attributes:
        folders: for each seed the folder of its actor.
        success: for each seed the success rate at the end (empty without evaluation).
        ledger: what it has cost.
        decisions_done: chunks of each seed in this session.
    """

    folders: dict[int, Path]
    success: dict[int, float]
    ledger: Ledger
    decisions_done: int


class OnlineLoop:
    """One run while it lasts.

    Args:
        algorithm: "dsrl", "residual" or "rfs".
        vector: the environments, `settings.num_envs` of each seed.
        space: what is steered.
        folder: the run's, opened.
        config: settings of the algorithm.
        settings: of the run.
        seeds: trained side by side.
        device: where to learn.
        data: what the replay begins with.
        recording: where the training's episodes go.
        teachers: the noise policies that are imitated, for each seed.
    """

    def __init__(
        self,
        algorithm: str,
        vector: VectorEnv,
        space: SteeringSpace,
        folder: Run,
        config: Config,
        settings: OnlineRun,
        seeds: list[int],
        device: torch.device,
        data: Prefilled | None,
        recording: Recording | None = None,
        teachers: Teachers | None = None,
    ) -> None:
        self.algorithm, self.vector, self.space, self.folder = algorithm, vector, space, folder
        self.config, self.settings, self.seeds, self.data = config, settings, seeds, data
        streams = [child_seed(seed, "stream", stream) for seed in seeds for stream in range(settings.num_envs)]
        self.recording = recording
        self.rows = SteeredRows(
            vector,
            space,
            streams,
            discount=config.discount,
            reward=settings.reward,
            recording=recording is not None or bool(settings.reteach_every),
        )
        self.rows.begin()
        self.agent: Agent
        if isinstance(config, RFSConfig):
            self.agent = RFSAgent(space, self.rows, config, settings, seeds, device)
        else:
            self.agent = OffPolicyAgent(vector, space, self.rows, config, settings, seeds, device, data)
        self.decision = 0
        self.ledger = Ledger()
        self.recent: list[list[float]] = [[] for _ in seeds]
        self.steps_of = [0] * len(seeds)
        self.success: dict[int, float] = {}
        self.teachers = teachers
        if teachers is not None and isinstance(self.agent, OffPolicyAgent):
            self.agent.taught_by(teachers)
        self.reported: list[dict[str, Tensor]] = []  # what was learned since the last report

    def go(self, on_progress: Callable[[OnlineProgress], None] | None) -> OnlineTrained:
        """Begin, or go on from the last checkpoint, to the end.

        Raises:
            TrainingError: a loss, the flow's chunk, a reward or an observation is not finite any more, or a simulator did not
                come back to where it was left.
            WorkerError: a simulator died; the last checkpoint is safe.
            StorageError: a file can't be written; the last checkpoint is safe.
        """
        settings, folder = self.settings, self.folder
        state = folder.load_state()
        if state is not None:
            self._restore(state)
        else:
            self._imitate()
            self._check_start()
        first = self.decision
        folder.forget_after(first)
        self.success = self._rates_so_far()
        began, spent = time.perf_counter(), self.ledger.seconds
        while self.decision < settings.decisions:
            before = self.decision
            self._turn()
            if self.teachers is not None and self._due(before, settings.reteach_every):
                self.teachers.teach_again(self.decision)
            self.ledger.seconds = spent + time.perf_counter() - began
            last = self.decision >= settings.decisions
            if self._due(before, settings.report_every) or last:
                self._report(on_progress)
            evaluating = bool(settings.episodes) and (self._due(before, settings.evaluate_every) or last)
            if evaluating:
                self._evaluate((last and settings.final_episodes) or settings.episodes)
                if last:
                    self._draw()
            elif last:
                self._write_results()
            if self._due(before, settings.checkpoint_every) or evaluating or last:
                self._checkpoint()
        return OnlineTrained(
            {seed: self._place(seed).parent for seed in self.seeds},
            dict(self.success),
            self.ledger,
            self.decision - first,
        )

    def _turn(self) -> None:
        """Make one decision on every row, and learn from it."""
        settings, rows, agent = self.settings, self.rows, self.agent
        streams = settings.num_envs
        shown = rows.shown
        actions = agent.act(rows, self.decision)
        made = rows.step(actions)
        numbers = agent.observe(shown, actions, made)
        if numbers:
            self.reported.append(numbers)
        self.decision += streams
        done = made.done.nonzero()[:, 0].tolist()
        for row in done:
            if self.recording is not None:
                self.recording.keep(rows, row, success=bool(made.success[row]))
            if self.teachers is not None and settings.reteach_every and bool(made.success[row]):
                of_steps = InversionSettings.of(settings.inversion, self.space.steps)
                self.teachers.see(row // streams, arrays_of(rows.decisions[row]), of_steps)
            recent = self.recent[row // streams]
            recent.append(float(made.success[row]))
            del recent[:-RECENT]
        if done:  # before costs are added up: where the base is shown this denoises, and a checkpoint begins without it
            rows.begin(done)
        for index, own in enumerate(made.steps.view(-1, streams).sum(1).tolist()):
            self.steps_of[index] += own
        self.ledger.environment_steps += float(made.steps.sum())
        self.ledger.episodes += len(done)
        self.ledger.field_evaluations += rows.evaluations + agent.evaluations
        self.ledger.reasoner_queries += agent.queries
        self.ledger.updates += agent.updates
        rows.evaluations, agent.evaluations, agent.queries, agent.updates = 0, 0.0, 0.0, 0

    def _due(self, before: int, every: int) -> bool:
        return bool(every) and before // every < self.decision // every

    def _report(self, on_progress: Callable[[OnlineProgress], None] | None) -> None:
        numbers: dict[str, float] = {}
        reported = self.reported
        if reported:
            names = sorted(reported[0])  # as they come back from a checkpoint, in whatever order that kept them
            table = torch.stack([torch.stack([one[name].float().cpu() for name in names]) for one in reported]).mean(0)
            broken = ~torch.isfinite(table).all(0)
            if bool(broken.any()):
                seed = self.seeds[int(broken.nonzero()[0])]
                raise self._diverged(f"what seed {seed} learns from is not finite before decision {self.decision}")
            numbers = dict(zip(names, table.mean(1).tolist(), strict=True))
            reported.clear()
        recent = {seed: float(np.mean(one)) for seed, one in zip(self.seeds, self.recent, strict=True) if one}
        told = {f"training/seed-{seed}": rate for seed, rate in recent.items()}
        self.folder.report(self.decision, **numbers, **told)
        if on_progress is not None:
            on_progress(
                OnlineProgress(self.decision, self.settings.decisions, numbers, recent, dict(self.success), self.ledger)
            )

    def _evaluate(self, count: int) -> None:
        """Evaluate every seed for `count` episodes in the environments at hand, and put these back to where they were."""
        episodes, history = list(self.rows.episodes), [list(one) for one in self.rows.history]
        seeds = [child_seed(child_seed(0, "validation"), "episode", index) for index in range(count)]
        told: dict[str, float] = {EVALUATED: float(count)}
        for index, seed in enumerate(self.seeds):
            acting = self.agent.acting(index, self.decision)
            found = run_episodes(acting, self.vector, seeds, self.agent.make_reasoner)
            rate = sum(one.success for one in found) / len(found)
            self.success[seed] = rate
            told[f"success/seed-{seed}"] = rate
            told[f"environment_steps/seed-{seed}"] = float(self.steps_of[index])
        self.rows.resume(episodes, history)
        self.rows.evaluations, self.agent.evaluations, self.agent.queries = 0, 0.0, 0.0  # of no account to the learning
        self.folder.report(self.decision, **told)
        self._write_results()

    def _write_results(self) -> None:
        curves: dict[str, list[dict[str, float]]] = {str(seed): [] for seed in self.seeds}
        for line in self.folder.metrics():
            for seed in self.seeds:
                if f"success/seed-{seed}" in line:
                    curves[str(seed)].append(
                        {
                            "decisions": line["step"],
                            "environment_steps": line[f"environment_steps/seed-{seed}"],
                            "success_rate": line[f"success/seed-{seed}"],
                            "episodes": line[EVALUATED],
                        }
                    )
        write_json(
            self.folder.folder / "results.json",
            {
                "algorithm": self.algorithm,
                "env": self.vector.spec.name,
                "curves": curves,
                "together": [
                    {"environment_steps": steps, **rate.to_json()} for steps, rate in self._together().items()
                ],
                "prefill": None if self.data is None else self.data.describe(),
                "ledger": self.ledger.to_json(),
                "machine": machine(),
            },
        )

    def _together(self) -> dict[float, SeedsRate]:
        """Return success by the environment steps of a seed, the mean over seeds."""
        found: dict[float, SeedsRate] = {}
        for line in self.folder.metrics():
            if all(f"success/seed-{seed}" in line for seed in self.seeds):
                steps = sum(line[f"environment_steps/seed-{seed}"] for seed in self.seeds) / len(self.seeds)
                rates = [line[f"success/seed-{seed}"] for seed in self.seeds]
                count = round(line[EVALUATED])
                found[round(steps)] = SeedsRate(tuple(SuccessRate(round(rate * count), count) for rate in rates))
        return found

    def _draw(self) -> None:
        """Draw the learning curve with its intervals."""
        place = self.folder.folder / "figures"
        place.mkdir(exist_ok=True)
        count = len(self.seeds)
        success_curve(
            {self.algorithm: self._together()},
            place / "learning-curve.png",
            xlabel="environment steps of a seed",
            title=self.vector.spec.name,
            subtitle=f"{count} training seed{'s' if count > 1 else ''}",
        )

    def _rates_so_far(self) -> dict[int, float]:
        found: dict[int, float] = {}
        for line in self.folder.metrics():
            found |= {seed: line[f"success/seed-{seed}"] for seed in self.seeds if f"success/seed-{seed}" in line}
        return found

    def _place(self, seed: int) -> Path:
        return self.folder.folder / f"seed-{seed}" / "checkpoints"

    def _checkpoint(self) -> None:
        """Keep every seed's actor, and the state."""
        if not self.agent.learner.finite():
            raise self._diverged(f"weights are not finite after decision {self.decision}")
        for index, seed in enumerate(self.seeds):
            made = self.agent.artefact(index, self.decision)
            made.provenance = {
                "algorithm": self.algorithm,
                "env": self.vector.spec.name,
                "seed": seed,
                "decisions": self.decision,
                "environment_steps": self.steps_of[index],
                "settings": asdict(self.config),
                "run": asdict(self.settings),
                "machine": machine(),
            }
            self._place(seed).mkdir(parents=True, exist_ok=True)
            made.save(self._place(seed) / ("anchors" if isinstance(made, AnchorsCritic) else "actor"))
        self.folder.save_state(self._state())

    def _state(self) -> dict[str, Tensor]:
        longest = max(1, *(len(one) for one in self.rows.history))
        spec = self.space.policy.action_spec
        flow = (spec.horizon, spec.state_dim)
        shapes = {"actions": (self.space.executed, spec.dim), "noise": flow, "base": flow, "chunk": flow}
        history = {name: torch.zeros((len(self.rows), longest, *shape)) for name, shape in shapes.items()}
        for row, several in enumerate(self.rows.history):
            for turn, taken in enumerate(several):
                for name in shapes:
                    history[name][row, turn] = torch.from_numpy(getattr(taken, name))
        recent = torch.full((len(self.seeds), RECENT), math.nan)
        for index, one in enumerate(self.recent):
            recent[index, : len(one)] = torch.tensor(one)
        return (
            self.agent.state()
            | {
                "loop.decision": torch.tensor(self.decision),
                "loop.ledger": torch.tensor(list(asdict(self.ledger).values()), dtype=torch.float64),
                "loop.steps": torch.tensor(self.steps_of),
                "loop.recent": recent,
                "loop.episodes": torch.tensor(self.rows.episodes),
                "loop.lengths": torch.tensor([len(one) for one in self.rows.history]),
                "loop.observations": torch.from_numpy(self.rows.observation.copy()),
            }
            | {f"loop.history.{name}": values for name, values in history.items()}
            | {
                f"loop.reported.{name}": torch.stack([one[name].float().cpu() for one in self.reported])
                for name in (self.reported[0] if self.reported else ())
            }
        )

    def _restore(self, state: dict[str, Tensor]) -> None:
        self.agent.restore(state)
        self.decision = int(state["loop.decision"])
        self.ledger = Ledger(*state["loop.ledger"].tolist())
        self.steps_of = state["loop.steps"].tolist()
        self.recent = [one[~one.isnan()].tolist() for one in state["loop.recent"]]
        numbers = under("loop.reported.", state)
        self.reported = [dict(zip(numbers, values, strict=True)) for values in zip(*numbers.values(), strict=True)]
        lengths = state["loop.lengths"].tolist()
        names = [field.name for field in fields(Taken)]
        history = [
            [Taken(*(state[f"loop.history.{name}"][row, turn].numpy() for name in names)) for turn in range(length)]
            for row, length in enumerate(lengths)
        ]

        def before(row: int, ago: int) -> None:
            self.agent.remind(self.rows, row, self.decision - ago * self.settings.num_envs)

        left = state.get("loop.observations")  # runs of before did not keep them
        reached = None if left is None else left.numpy()
        self.rows.resume(state["loop.episodes"].tolist(), history, before, reached)
        self.rows.evaluations = 0

    def _imitate(self) -> None:
        """Begin DSRL's actors as imitations of a noise policy, in the states that are there."""
        agent, data = self.agent, self.data
        if not isinstance(agent, OffPolicyAgent) or agent.learner.teacher is None or data is None:
            return
        assert isinstance(self.config, DSRLConfig)
        shown = data.recorded.observations.to(agent.device)
        agent.learner.imitate(shown, self.config.imitation)

    def _check_start(self) -> None:
        """Compare the steered start with the base policy, and warn where it is worse; write down what the bound cuts off."""
        settings, space = self.settings, self.space
        noises = None if self.data is None or not len(self.data.noises) else self.data.noises
        told: dict[str, Any] = {"latent": asdict(space.latent), "keeps_prior": space.latent.keeps_prior}
        if space.bound is not None and space.latent_size:
            told["bound"] = describe_bound(space.bound, space.latent, noises)
        if self.data is not None:
            self.data.check_kept(space)
            told["prefill"] = self.data.describe()
        if settings.start_episodes:
            seeds = [child_seed(child_seed(0, "start"), index) for index in range(settings.start_episodes)]
            start, said, cure = self._start()
            changed = "" if self._is_taught else _changed(space)
            policies = {"base": SteeredPolicy(space.policy, steps=space.steps), "start": start}
            rates = {
                name: SuccessRate.of(
                    one.success for one in run_episodes(policy, self.vector, seeds, self.agent.make_reasoner)
                )
                for name, policy in policies.items()
            }
            told |= {name: rate.to_json() for name, rate in rates.items()}
            base, count = rates["base"], settings.start_episodes
            told["tells"] = tells(base)
            if rates["start"].interval.high < base.rate:
                warnings.warn(
                    f"the base policy succeeds in {100 * base.rate:.0f}% of {count} episodes, and its steered start, {said}, in "
                    f"{100 * rates['start'].rate:.0f}%: the first success may never come. {cure}",
                    stacklevel=2,
                )
            elif not told["tells"] and changed:
                warnings.warn(
                    f"the base policy succeeds in {base.successes} of {count} episodes, too few to tell whether its steered "
                    f"start, {said}, does worse, and its noises are not the prior's any more ({changed}): the first success "
                    f"may never come. Compare them in more episodes (start_episodes). {cure}",
                    stacklevel=2,
                )
            self.rows.resume([0] * len(self.rows), [[] for _ in self.rows.seeds])
            self.rows.evaluations = 0
        write_json(self.folder.folder / "start.json", told)

    @property
    def _is_taught(self) -> bool:
        """Whether actors begin as imitations of a noise policy."""
        return isinstance(self.agent, OffPolicyAgent) and self.agent.learner.teacher is not None

    def _start(self) -> tuple[SteeredPolicy, str, str]:
        """Return what learners begin as, what to call it, and what helps where it is bad."""
        space = self.space
        if self._is_taught:
            cure = "See how the noise policy itself does ('counterflow eval --steer dsbc'), or give a larger bound."
            return self.agent.acting(0, self.decision), "an imitation of the noise policy", cure
        if isinstance(self.agent.learner, AnchorsLearner):
            cure = "Give a larger bound, or a smaller spread."
            return self.agent.acting(0, self.decision), "anchors among which critics choose that know nothing yet", cure
        start = starting(space, self.config, child_seed(0, "start", "residual"))
        return start, _said(space, self.config), _cure(space)

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what}. The last checkpoint in {self.folder.checkpoints} is safe; lower the learning rates, or raise the "
            "temperature's floor, in a new run."
        )


def _said(space: SteeringSpace, config: Config) -> str:
    """Return what a learner begins with, in words."""
    parts = [f"latent {space.latent.kind!r} with bound {space.bound}"] if space.latent_size else []
    if space.residual_size:
        parts.append(f"a residual with a deviation of {starting_std(config):g} of its bound")
    return " and ".join(parts)


def _changed(space: SteeringSpace) -> str:
    """Return in what the latents of a start differ much from the prior's noise, in words; empty: in nothing."""
    if not space.latent_size:
        return ""
    if not space.latent.keeps_prior:
        return f"latent {space.latent.kind!r}"
    cut = 0.0 if space.bound is None else mass_beyond(space.bound)
    return f"the bound cuts off {100 * cut:.0f}% of its numbers" if cut > MUCH else ""


def _cure(space: SteeringSpace) -> str:
    """Return what helps against a start that is worse than the base."""
    cures = ["Use latent 'full', or 'low_rank' with rest 'prior', or a larger bound."] if space.latent_size else []
    if space.residual_size:
        cures.append(
            "Begin with a smaller residual (residual_std of RFS, initial_std of residual RL), or ramp it up (ramp)."
        )
    return " ".join(cures)
