"""Evaluation: success of steering methods on tasks, with intervals, exactly repeatable from a seed."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import counterflow
from counterflow.checks import Range
from counterflow.envs import RenderSettings, VectorEnv, check_env_name, describe, family_of, groups, make_env
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.experiments.rollout import Episode, MakeReasoner, run_episodes
from counterflow.experiments.statistics import SuccessRate
from counterflow.experiments.weight import task_of, weigh
from counterflow.policies import BasePolicy, GeneralistPolicy, load
from counterflow.random import check_seed, child_seed
from counterflow.reasoners import (
    CONVENTIONS,
    Convention,
    OverruledGripper,
    Reasoner,
    UnreliableReasoner,
    scripted_reasoner,
)
from counterflow.reasoners.vlm import VLMClient, VLMReasoner, VLMSettings
from counterflow.steering import (
    AnchorsCritic,
    ChunkCritic,
    ChunkRegressor,
    GuidanceSettings,
    MethodSettings,
    SteeredPolicy,
    SteeringActor,
    guide,
    steer,
    steer_actor,
    steer_anchors,
    steer_learned,
)
from counterflow.steering.steered import frozen

MAX_EPISODES = 100_000
VLM_SIZE = 384  # pixels: what a model is shown
LEARNED = {"dsbc": "noise", "bc": "action"}
"""Methods that are driven by a learned chunk, and what it was trained on."""
ACTOR = "actor"
"""What reinforcement learning made: a latent, a residual, or both."""
ANCHORS = "anchors"
"""Critics that choose among what flow reversal proposes."""
GUIDED = "qgf"
"""The policy alone, guided by a critic; with a critic the other methods are guided, too."""
Learned = ChunkRegressor | SteeringActor | AnchorsCritic
UNGUIDED = ("direct", "bc")
"""Methods that execute something else than what the flow gives: there is nothing to guide."""
SHIPPED_PRIORS = {
    "ogbench/cube-single": "cube-single",
    "ogbench/cube-double": "cube-double",
    "ogbench/scene": "scene",
    "ogbench/puzzle-3x3": "puzzle-3x3",
    "metaworld": "metaworld",
    "libero": "libero",
}


@dataclass(frozen=True)
class ReasonerSettings:
    """Who gives the references, and how they are written.

    Attributes:
        error: probability that a direction is wrong.
        delay: chunks that pass before a direction is acted on.
        convention: "ogbench" or "paper".
        magnitude: overrides the convention's magnitude.
        vlm: a vision-language model that is asked instead of the script; None: the script.
        vlm_folder: where its queries are noted, and answers kept; None: nowhere.
        gripper: "said" as the reasoner says it; "hold" (the paper's reference) or "policy": whatever it says.
    """

    error: float = 0.0
    delay: int = 0
    convention: str = "ogbench"
    magnitude: float | None = None
    vlm: VLMSettings | None = None
    vlm_folder: Path | None = None
    gripper: Literal["said", "hold", "policy"] = "said"

    @property
    def render(self) -> RenderSettings | None:
        """How frames are drawn for a reasoner that looks; None: it doesn't."""
        return None if self.vlm is None else RenderSettings(VLM_SIZE, VLM_SIZE)

    def to_json(self) -> dict[str, Any]:
        """Return what determines the references, as plain values."""
        content: dict[str, Any] = {name: getattr(self, name) for name in ("error", "delay", "convention", "magnitude")}
        # Left out where there is none, so that recordings made before it was known go on.
        content |= {} if self.gripper == "said" else {"gripper": self.gripper}
        return content | ({} if self.vlm is None else {"vlm": self.vlm.to_json()})

    def maker(self, env: str) -> MakeReasoner:
        """Return a function that makes the reasoner for the environment called `env`."""
        client = None if self.vlm is None else VLMClient(self.vlm, self.vlm_folder)
        task = "" if client is None else describe(env).task

        def make() -> Reasoner:
            reasoner: Reasoner = scripted_reasoner(env) if client is None else VLMReasoner(client, task)
            if self.gripper != "said":
                reasoner = OverruledGripper(reasoner, self.gripper)
            return UnreliableReasoner(reasoner, self.error, self.delay) if self.error or self.delay else reasoner

        make()  # settings out of range are refused here, not in the middle of a run
        return make

    def writing(self) -> Convention:
        """Return the convention."""
        if self.convention not in CONVENTIONS:
            raise InvalidInputError(f"convention is {self.convention!r}; expected one of {', '.join(CONVENTIONS)}.")
        chosen = CONVENTIONS[self.convention]
        if self.magnitude is None:
            return chosen
        return Convention(self.magnitude, chosen.units, chosen.gripper_magnitude, chosen.rotation, chosen.rows)


@dataclass
class Evaluation:
    """What came of one method on one task.

    Attributes:
        env: the environment's full name.
        steer: the method.
        settings: the method's settings, as plain values.
        policy: which policy it was: its fingerprint, or its class's name.
        seed: what every episode descends from.
        rate: successes of episodes.
        seconds: wall-clock time.
        environment_steps: executed actions.
        evaluations: field evaluations, all episodes.
        queries: questions to the reasoner, all episodes.
        agreement: mean cosine between asked and executed motion.
        round_trip_error: mean distance between reference and executed chunk, normalised units.
        noise_percentile: mean percentile of the start noise's norm under the prior.
        outcomes: for each episode its seed, success and steps.
    """

    env: str
    steer: str
    settings: dict[str, Any]
    policy: str
    seed: int
    rate: SuccessRate
    seconds: float
    environment_steps: int
    evaluations: int
    queries: int
    agreement: float
    round_trip_error: float
    noise_percentile: float
    outcomes: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        low, high = self.rate.interval
        return {
            "env": self.env,
            "steer": self.steer,
            "episodes": self.rate.episodes,
            "successes": self.rate.successes,
            "success_rate": self.rate.rate,
            "ci95": [low, high],
            "seconds": round(self.seconds, 3),
            "seed": self.seed,
            "policy": self.policy,
            "settings": self.settings,
            "ledger": {
                "environment_steps": self.environment_steps,
                "field_evaluations": self.evaluations,
                "reasoner_queries": self.queries,
            },
            "diagnostics": {
                name: None if np.isnan(value) else round(value, 6)
                for name, value in (
                    ("agreement", self.agreement),
                    ("round_trip_error", self.round_trip_error),
                    ("noise_percentile", self.noise_percentile),
                )
            },
            "outcomes": self.outcomes,
        }


def load_prior(env: str, policy: str | None = None, device: str = "cpu") -> BasePolicy:
    """Load the base policy for an environment: the one at `policy`, or the shipped prior of its family.

    What a policy of another library doesn't say (which dimension does what, limits, the task in words) is the environment's
    to say, and so is the task that a generalist is to act in.

    Raises:
        UnknownNameError: no such environment, or no such policy.
        CheckpointError: the policy can't be read.
        MismatchError: no prior is shipped for this family and none was given.
    """
    check_env_name(env)
    if policy is not None:
        return adapted(load(policy, device), env)
    family = family_of(env)
    if family not in SHIPPED_PRIORS:
        make = (
            f"'counterflow demonstrate {family}/train' and 'counterflow train generalist'"
            if f"{family}/train" in groups()
            else f"'counterflow collect {family}' and 'counterflow train bc'"
        )
        raise MismatchError(
            f"no prior is shipped for {family} (there are priors for {', '.join(SHIPPED_PRIORS)}). Make one: {make}, then pass "
            "it with --policy."
        )
    return adapted(load(SHIPPED_PRIORS[family], device), env)


def adapted(policy: BasePolicy, env: str) -> BasePolicy:
    """Return a policy as it acts in an environment: LeRobot's with layout and limits, a generalist for the task."""
    if hasattr(policy, "for_environment"):
        spec = describe(env)
        fitted: BasePolicy = policy.for_environment(spec.action_layout, spec.action_low, spec.action_high, spec.task)
        return fitted
    if isinstance(policy, GeneralistPolicy):
        spec = describe(env)
        return policy.for_task(spec.task, spec.observation_layout)
    return policy


def check_episodes(episodes: int) -> int:
    """Return `episodes`, or raise `InvalidInputError` unless it is a sensible number."""
    Range(1, MAX_EPISODES, integer=True).check("episodes", episodes, written=True)
    return episodes


def evaluate(
    env: VectorEnv,
    policy: BasePolicy,
    method: str,
    episodes: int,
    seed: int,
    *,
    settings: MethodSettings | None = None,
    reasoner: ReasonerSettings | None = None,
    learned: Learned | None = None,
    critic: ChunkCritic | None = None,
    guidance: GuidanceSettings | None = None,
    first: int = 0,
    drawn: bool = False,
    on_episode: Callable[[Episode], None] | None = None,
) -> Evaluation:
    """Run `episodes` episodes of one method on one task.

    The episodes of every method begin in the same states: they descend from the same seeds, whatever else is run.

    Args:
        env: the task, vectorised; it stays open.
        policy: the frozen base policy.
        method: "base", "direct", "frs", "partial" or "rank"; with `learned`, "dsbc", "bc", "actor" or "anchors"; with `critic`,
            "qgf".
        episodes: how many.
        seed: what they descend from.
        settings: of the method.
        reasoner: who gives references; nobody does for "base", "qgf", "dsbc", "bc", "actor", and "anchors" that were trained
            without.
        learned: the noise policy of "dsbc", the action policy of "bc", the actor of "actor", or critics and anchors.
        critic: what guides the flow: that of the policy alone ("qgf"), or, beside it, of "frs", "dsbc" and others.
        guidance: how; a weight that is to be found costs episodes of its own, which aren't counted as results.
        first: leave out the episodes before this one, which have been run.
        drawn: of an actor: draw its latents from its law, as in training, in the place of its law's own choice (SAC's: the mean).
        on_episode: called as each episode finishes.

    Raises:
        MismatchError: policy, environment and what was learned don't fit.
        InvalidInputError: a number is out of range, or nothing was given for a method that needs something learned, or latents
            are to be drawn where no actor decides on them.
    """
    check_episodes(episodes)
    Range(0, episodes - 1, integer=True).check("first", first)
    settings = MethodSettings() if settings is None else settings
    reasoner = ReasonerSettings() if reasoner is None else reasoner
    steered = steered_by(policy, method, settings, learned, drawn=drawn)
    make_reasoner = reasoner.maker(env.spec.name) if asks(method, learned) else None
    own = own_settings(method, settings) | ({} if learned is None else {"learned": learned.fingerprint})
    own |= {"drawn": True} if drawn else {}
    if critic is not None or method == GUIDED:
        critic, guidance = _guiding(method, critic), GuidanceSettings() if guidance is None else guidance
        found = weigh(env, steered, critic, guidance, seed, make_reasoner=make_reasoner, convention=reasoner.writing())
        steered = guide(steered, critic, guidance.with_weight(found.weight), task_of(critic, env))
        own |= {"critic": critic.fingerprint, "guidance": asdict(guidance), "weight": found.to_json()}
    seeds = [child_seed(check_seed(seed), "episode", index) for index in range(first, episodes)]
    began = time.perf_counter()
    finished = run_episodes(
        steered,
        env,
        seeds,
        make_reasoner,
        convention=reasoner.writing(),
        on_episode=on_episode,
    )
    seconds = time.perf_counter() - began

    def mean(name: str) -> float:
        values = [getattr(episode, name) for episode in finished if not np.isnan(getattr(episode, name))]
        return float(np.mean(values)) if values else float("nan")

    return Evaluation(
        env=env.spec.name,
        steer=method,
        settings={**own, **({} if make_reasoner is None else reasoner.to_json())},
        policy=policy_name(frozen(policy)),
        seed=seed,
        rate=SuccessRate(sum(episode.success for episode in finished), len(finished)),
        seconds=seconds,
        environment_steps=sum(episode.steps for episode in finished),
        evaluations=sum(episode.evaluations for episode in finished),
        queries=sum(episode.queries for episode in finished),
        agreement=mean("agreement"),
        round_trip_error=mean("round_trip_error"),
        noise_percentile=mean("noise_percentile"),
        outcomes=[{"seed": one.seed, "success": one.success, "steps": one.steps} for one in finished],
    )


def steered_by(
    policy: BasePolicy,
    method: str,
    settings: MethodSettings,
    learned: Learned | None = None,
    *,
    drawn: bool = False,
) -> SteeredPolicy:
    """Return `policy` steered by any method that has a name, zero-shot or learned; a critic goes on top (`guide`).

    Raises:
        UnknownNameError: no such method.
        MismatchError: what was learned belongs to another policy, or serves another method.
        InvalidInputError: a setting is out of range, or nothing was given for a method that needs something learned, or latents
            are to be drawn where no actor decides on them.
    """
    if drawn and method != ACTOR:
        raise InvalidInputError(
            f"only an actor's latents can be drawn from its law; the method is {method!r}. Leave out --drawn, or use --steer "
            "actor with what 'counterflow train dsrl' made."
        )
    if method == ACTOR:
        if not isinstance(learned, SteeringActor):
            raise InvalidInputError(
                "'actor' needs an actor, and none was given. Train one: 'counterflow train dsrl', 'residual' or 'rfs', and pass "
                "it with --noise-policy."
            )
        if drawn and learned.config.ports == "residual":
            raise InvalidInputError(
                "this actor decides on residuals alone, and has no latents to draw. Leave out --drawn."
            )
        return steer_actor(policy, learned, sample=drawn or None)
    if method == ANCHORS:
        if not isinstance(learned, AnchorsCritic):
            raise InvalidInputError(
                "'anchors' needs critics and their anchors, and none were given. Train them: 'counterflow train dsrl --variant "
                "anchors', and pass them with --noise-policy."
            )
        return steer_anchors(policy, learned)
    if isinstance(learned, SteeringActor):
        raise MismatchError(f"an actor was given for {method!r}; use {ACTOR!r}.")
    if isinstance(learned, AnchorsCritic):
        raise MismatchError(f"critics and anchors were given for {method!r}; use {ANCHORS!r}.")
    if method in LEARNED:
        return _learned(policy, method, settings, learned)
    return steer(policy, "base" if method == GUIDED else method, settings)


def asks(method: str, learned: Learned | None = None) -> bool:
    """Say whether a method wants somebody to give references."""
    if isinstance(learned, AnchorsCritic):
        return learned.config.weighted
    return method not in ("base", GUIDED, ACTOR, *LEARNED)


def _learned(
    policy: BasePolicy, method: str, settings: MethodSettings, learned: ChunkRegressor | None
) -> SteeredPolicy:
    if learned is None:
        raise InvalidInputError(
            f"{method!r} needs a policy that was learned, and none was given. Make one: 'counterflow record', then 'counterflow "
            "distill', and pass it with --noise-policy."
        )
    if learned.config.target != LEARNED[method]:
        raise MismatchError(
            f"{method!r} needs a policy trained on {LEARNED[method]}s; this one was trained on {learned.config.target}s. Use "
            f"{next(name for name, target in LEARNED.items() if target == learned.config.target)!r}."
        )
    return steer_learned(policy, learned, settings.perturbation)


def _guiding(method: str, critic: ChunkCritic | None) -> ChunkCritic:
    """Return the critic, after checking that the method is one that it can guide."""
    if critic is None:
        raise InvalidInputError(
            f"{method!r} needs a critic, and none was given. Make one: 'counterflow record TASK --steer base --episodes 50', "
            "then 'counterflow critic', and pass it with --critic."
        )
    if method in UNGUIDED:
        raise InvalidInputError(
            f"a critic was given, and {method!r} executes something else than what the flow gives, so nothing would be "
            f"guided. Use {GUIDED!r}, or 'frs' or 'dsbc' with a critic."
        )
    return critic


def own_settings(method: str, settings: MethodSettings) -> dict[str, Any]:
    """Return the settings that `method` reads."""
    own: dict[str, Any] = {
        "base": {"steps": settings.steps},
        GUIDED: {"steps": settings.steps},
        "direct": {"steps": settings.steps},
        "frs": {
            "reversal_steps": settings.reversal_steps,
            "perturbation": settings.perturbation,
            # Left out where it is the default, so that recordings made before it was known go on.
            **({} if settings.padding == "fresh" else {"padding": settings.padding}),
            **({} if settings.latent == "full" else {"latent": settings.latent}),
            **({"latent_rank": settings.latent_rank} if settings.latent == "low_rank" else {}),
        },
        "partial": {"steps": settings.steps, "tau": settings.tau},
        "rank": {"steps": settings.steps, "candidates": settings.candidates, "distance": settings.distance},
        "dsbc": {"perturbation": settings.perturbation},
        "bc": {},
        ACTOR: {},
        ANCHORS: {},
    }
    return dict(own[method])


def policy_name(policy: BasePolicy) -> str:
    """Return a name that tells this policy from others: its fingerprint where it has one, else its class's name."""
    return str(getattr(policy, "fingerprint", type(policy).__name__))


def default_num_envs(episodes: int) -> int:
    """Choose how many environments to step side by side: enough to fill the batch, few enough to start quickly."""
    return min(episodes, 8 * (os.cpu_count() or 1))


def open_env(
    name: str, episodes: int, *, num_envs: int | None = None, seed: int = 0, render: RenderSettings | None = None
) -> VectorEnv:
    """Open a task for `episodes` episodes; the number of environments is chosen unless it is given."""
    check_env_name(name)
    check_episodes(episodes)
    return make_env(name, default_num_envs(episodes) if num_envs is None else num_envs, seed, render=render)


def machine() -> dict[str, Any]:
    """Describe what numbers depend on: versions, cores, device."""
    return {
        "counterflow": counterflow.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
