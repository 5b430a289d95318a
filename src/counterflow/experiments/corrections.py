"""Offline RFS as a run: a residual learned from episodes in which somebody corrected the frozen policy.

    runs/<name>/config.yaml, metrics.jsonl, events.*    as every run
    runs/<name>/checkpoints/state.safetensors           the learner, to go on from
    runs/<name>/seed-<n>/checkpoints/actor.safetensors  what corrects: `counterflow.steering.steer_actor`
    runs/<name>/results.json                            success of the frozen policy and of every seed, at each evaluation

Nothing is executed while it learns: the recordings are all there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from counterflow.checks import check_numbers
from counterflow.data import SteeringDataset
from counterflow.data.replay import Recorded, Replay
from counterflow.envs import VectorEnv
from counterflow.errors import InvalidInputError, TrainingError
from counterflow.experiments.evaluate import load_prior, machine, open_env, policy_name
from counterflow.experiments.online_agents import actor_of, composing
from counterflow.experiments.online_data import corrections
from counterflow.experiments.rollout import run_episodes
from counterflow.experiments.run import Run, read_config
from counterflow.experiments.statistics import SuccessRate
from counterflow.experiments.steering_env import RewardKind
from counterflow.files import write_json
from counterflow.learning.corrections import CorrectionsConfig, CorrectionsLearner
from counterflow.learning.sac import ActionSizes
from counterflow.policies import BasePolicy, as_device
from counterflow.random import child_seed
from counterflow.steering import (
    ChunkRegressor,
    SteeredPolicy,
    SteeringActor,
    SteeringSpace,
    steer_actor,
    steer_learned,
)

ALGORITHM = "corrections"


@dataclass(frozen=True)
class CorrectionsRun:
    """Settings of a run beside those of the algorithm.

    Attributes:
        steps: gradient updates.
        residual_bound: largest residual, units of the environment's actions: one number, or one a dimension.
        bound: where no latent was recorded, the inverted noise of a correction is clipped to +-bound, and what the base makes
            of it is what was corrected; 0: not clipped.
        reward: "success", "cost" or "dense", see `SteeredRows`.
        first: use the first so many recorded episodes; 0: all.
        evaluate_every: updates between evaluations; 0: none but at the end.
        episodes: of an evaluation, each seed; 0: no evaluation at all.
        checkpoint_every: updates between checkpoints.

    Raises:
        InvalidInputError: a number is out of range.
    """

    steps: int = 4_000
    residual_bound: tuple[float, ...] = (0.3,)
    bound: float = 3.0
    reward: RewardKind = "success"
    first: int = 0
    evaluate_every: int = 0
    episodes: int = 50
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        """Check every setting."""
        check_numbers(self, or_zero=("first", "evaluate_every", "episodes"))
        if not self.residual_bound or not all(0 < one < float("inf") for one in self.residual_bound):
            raise InvalidInputError(
                f"residual_bound is {self.residual_bound}; expected one positive number, or one for each action dimension."
            )

    def space(self, policy: BasePolicy, steps: int, solver: str) -> SteeringSpace:
        """Return the residual's space on top of a policy that denoises like that."""
        residual = self.residual_bound[0] if len(self.residual_bound) == 1 else self.residual_bound
        return SteeringSpace(
            policy, "residual", steps, solver, self.bound or None, residual_bound=residual, show_base=True
        )


@dataclass(frozen=True)
class CorrectionsProgress:
    """How far a run is.

    Attributes:
        step: updates done.
        steps: updates in all.
        numbers: means over seeds of what the learner reports, since the last report.
        success: rates of the last evaluation, seed by seed; empty before.
    """

    step: int
    steps: int
    numbers: dict[str, float]
    success: dict[int, float]


@dataclass(frozen=True)
class CorrectionsTrained:
    """What came of a run.

    Attributes:
        folders: for each seed the folder of its actor.
        base: success of what is corrected, in the episodes of the evaluation; None without one.
        success: for each seed the success rate at the end (empty without evaluation).
        decisions: recorded decisions that were learned from.
        steps_done: updates in this session.
    """

    folders: dict[int, Path]
    base: float | None
    success: dict[int, float]
    decisions: int
    steps_done: int


def train_corrections(
    data: Path | str,
    env: str,
    run: Path | str,
    config: CorrectionsConfig | None = None,
    settings: CorrectionsRun | None = None,
    *,
    policy: str | None = None,
    noise_policy: Path | str | None = None,
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
    on_progress: Callable[[CorrectionsProgress], None] | None = None,
) -> CorrectionsTrained:
    """Learn a residual from corrections; called again after an interruption, go on with the same numbers.

    Args:
        data: a steering dataset in which somebody intervened, for example `RUN/rollouts` of 'counterflow dagger'.
        env: the task; other tasks' episodes are left out.
        run: the run's folder.
        config: settings of the algorithm; None: its defaults.
        settings: of the run.
        policy: the frozen policy; None: the shipped prior of the task's family.
        noise_policy: what 'counterflow distill' or 'dagger' wrote, if that was driving when somebody intervened: the residual
            corrects what *it* makes of the frozen policy, and is evaluated, and must be used, on top of it. None: the frozen
            policy drove by itself, from fresh noise.
        seeds: trained side by side.
        device: where to learn.
        on_progress: called at each checkpoint.

    Raises:
        MismatchError: policy, task and recordings don't fit.
        DatasetError: recordings are damaged, or nobody intervened in them.
        UnknownNameError: no episode is of that task.
        TrainingError: the folder holds another run, or a loss is not finite any more.
        StorageError: a file can't be written; the last checkpoint is safe.
    """
    config = CorrectionsConfig() if config is None else config
    settings = CorrectionsRun() if settings is None else settings
    device = as_device(device)
    prior = load_prior(env, policy, str(device))
    dataset = SteeringDataset.load(data)
    binding, regressor = dataset.binding, None
    driving: BasePolicy = prior
    if noise_policy is not None:
        regressor = ChunkRegressor.load(noise_policy, device)
        driving = steer_learned(prior, regressor)
    content = {
        "algorithm": ALGORITHM,
        "env": env,
        "data": str(data),
        "policy": policy,
        "policy_fingerprint": policy_name(prior),
        "noise_policy": None if noise_policy is None else str(noise_policy),
        "noise_policy_fingerprint": None if regressor is None else regressor.fingerprint,
        "episodes": len(dataset),  # a dataset that has grown is other data
        "seeds": list(seeds),
        "run": asdict(settings),
        **asdict(config),
    }
    space = settings.space(prior, binding.steps, binding.solver)
    first = settings.first or None
    recorded = corrections(data, space, env, discount=config.discount, reward=settings.reward, first=first)
    learner = _learner(space, recorded, config, seeds, device)
    sizes = learner.sizes
    room = len(recorded) + 1  # nothing is ever added
    replay = Replay((sizes.observation, sizes.action, sizes.executed), len(seeds), 1, room, recorded, device)
    with Run(run, content) as folder:
        corrects = None if regressor is None else regressor.fingerprint
        training = _Training(learner, replay, space, folder, settings, list(seeds), env, driving, corrects)
        return training.go(on_progress)


def _learner(
    space: SteeringSpace, recorded: Recorded, config: CorrectionsConfig, seeds: Sequence[int], device: torch.device
) -> CorrectionsLearner:
    base, compose = composing(space)
    executed = space.executed * space.policy.action_spec.dim
    sizes = ActionSizes(recorded.observations.shape[1], space.limits, executed)
    return CorrectionsLearner(sizes, config, seeds, device, base=base, compose=compose)


class _Training:
    """One run while it lasts."""

    def __init__(
        self,
        learner: CorrectionsLearner,
        replay: Replay,
        space: SteeringSpace,
        folder: Run,
        settings: CorrectionsRun,
        seeds: list[int],
        env: str,
        driving: BasePolicy,
        corrects: str | None,
    ) -> None:
        self.driving, self.corrects = driving, corrects
        self.learner, self.replay, self.space, self.folder = learner, replay, space, folder
        self.settings, self.seeds, self.env = settings, seeds, env
        self.success: dict[int, float] = {}
        self.base: float | None = None

    def go(self, on_progress: Callable[[CorrectionsProgress], None] | None) -> CorrectionsTrained:
        settings, learner = self.settings, self.learner
        state = self.folder.load_state()
        if state is not None:
            learner.restore(state)
        first = learner.step
        self.folder.forget_after(first)
        self._rates_so_far()
        began = time.perf_counter()
        while learner.step < settings.steps:
            stops = [settings.checkpoint_every] + [settings.evaluate_every] * bool(settings.evaluate_every)
            ahead = min(settings.steps, *((learner.step // every + 1) * every for every in stops))
            found = learner.update(self.replay, ahead - learner.step)
            numbers = {name: float(value.float().mean()) for name, value in found.items()}
            if not learner.finite():
                raise TrainingError(
                    f"weights are not finite after update {learner.step}. The last checkpoint in {self.folder.checkpoints} "
                    "is safe; lower the learning rates in a new run."
                )
            self.folder.report(learner.step, **numbers, seconds=time.perf_counter() - began)
            last = learner.step == settings.steps
            due = bool(settings.evaluate_every) and learner.step % settings.evaluate_every == 0
            if settings.episodes and (due or last):
                self._evaluate()
            if last or learner.step % settings.checkpoint_every == 0:
                self._checkpoint()
            if on_progress is not None:
                on_progress(CorrectionsProgress(learner.step, settings.steps, numbers, dict(self.success)))
        folders = {seed: self._place(seed).parent for seed in self.seeds}
        return CorrectionsTrained(folders, self.base, dict(self.success), self.replay.prefilled, learner.step - first)

    def actor(self, index: int) -> SteeringActor:
        """Return a seed's actor; what it says is squashed like SAC's, and its mean is what counts."""
        return actor_of(self.space, self.learner.networks["actor"].part(index, 1), "squashed")

    def _evaluate(self) -> None:
        """Evaluate what is corrected once, and every seed on top of it, in the same episodes."""
        seeds = [child_seed(child_seed(0, "validation"), "episode", index) for index in range(self.settings.episodes)]

        def rate(policy: SteeredPolicy, env: VectorEnv) -> float:
            return SuccessRate.of(one.success for one in run_episodes(policy, env, seeds)).rate

        with open_env(self.env, len(seeds)) as env:
            if self.base is None:
                alone = SteeredPolicy(self.driving, steps=self.space.steps, solver=self.space.solver)
                self.base = rate(alone, env)
            for index, seed in enumerate(self.seeds):
                self.success[seed] = rate(steer_actor(self.driving, self.actor(index)), env)
        told = {f"success/seed-{seed}": one for seed, one in self.success.items()}
        self.folder.report(self.learner.step, **told, **{"success/base": self.base})
        self._write_results()

    def _write_results(self) -> None:
        lines = [line for line in self.folder.metrics() if "success/base" in line]
        curves: dict[str, list[dict[str, Any]]] = {
            name: [
                {"step": line["step"], "success_rate": line[f"success/{name}"], "episodes": self.settings.episodes}
                for line in lines
            ]
            for name in ("base", *(f"seed-{seed}" for seed in self.seeds))
        }
        write_json(
            self.folder.folder / "results.json",
            {
                "algorithm": ALGORITHM,
                "env": self.env,
                "decisions": self.replay.prefilled,
                "curves": curves,
                "machine": machine(),
            },
        )

    def _rates_so_far(self) -> None:
        for line in self.folder.metrics():
            if "success/base" in line:
                self.base = line["success/base"]
                self.success = {seed: line[f"success/seed-{seed}"] for seed in self.seeds}

    def _place(self, seed: int) -> Path:
        return self.folder.folder / f"seed-{seed}" / "checkpoints"

    def _checkpoint(self) -> None:
        """Keep every seed's actor, and the learner."""
        for index, seed in enumerate(self.seeds):
            actor = self.actor(index)
            actor.provenance = {
                "algorithm": ALGORITHM,
                "env": self.env,
                "seed": seed,
                "updates": self.learner.step,
                "corrects": self.corrects,
                "settings": asdict(self.learner.config),
                "run": asdict(self.settings),
                "machine": machine(),
            }
            self._place(seed).mkdir(parents=True, exist_ok=True)
            actor.save(self._place(seed) / "actor.safetensors")
        self.folder.save_state(self.learner.state())


def read_corrections_settings(folder: Path | str) -> tuple[dict[str, Any], CorrectionsConfig, CorrectionsRun]:
    """Read a run's settings: env, data, policy, noise_policy and seeds; the algorithm's; the run's.

    Raises:
        TrainingError: the folder holds no run of offline RFS.
    """
    content = read_config(Path(folder) / "config.yaml")
    try:
        about = {name: content.pop(name) for name in ("env", "data", "policy", "noise_policy", "seeds")}
        for name in ("algorithm", "policy_fingerprint", "noise_policy_fingerprint", "episodes"):
            content.pop(name)
        run = content.pop("run")
        run["residual_bound"] = tuple(run["residual_bound"])
        return about, CorrectionsConfig(**content), CorrectionsRun(**run)
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{folder} holds no complete settings of offline RFS: {error}.") from error
