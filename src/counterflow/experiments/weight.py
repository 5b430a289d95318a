"""How strongly a critic guides: chosen by how far it moves the prior, or by episodes that no evaluation counts.

Both ways roll out episodes whose seeds descend from the evaluation's, by another name: they are other episodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.envs import VectorEnv
from counterflow.errors import InvalidInputError
from counterflow.experiments.rollout import Episode, MakeReasoner, run_episodes
from counterflow.experiments.sight import check_on_states
from counterflow.experiments.statistics import SuccessRate
from counterflow.random import check_seed, child_seed
from counterflow.reasoners import OGBENCH, Convention
from counterflow.steering import ChunkCritic, GuidanceSettings, SteeredPolicy, choose_weight, guide, task_embedding

OBSERVED_EPISODES = 8
OBSERVATIONS = 64
MULTIPLES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the weight that "auto" finds: what "validate" tries. 0 is in it, so that a critic that only harms is left out."""


@dataclass(frozen=True)
class Weighing:
    """A weight for guidance, and what it was chosen by.

    Attributes:
        weight: what to guide with.
        radius: of the trust region that was measured, or None.
        spread: of the prior's chunks there, normalised units.
        curve: (weight, change / spread) of the weights that were tried there.
        rates: weight -> its rate in the validation episodes, where there were any.
        environment_steps: executed actions that the choice has cost.
    """

    weight: float
    radius: float | None = None
    spread: float | None = None
    curve: tuple[tuple[float, float], ...] = ()
    rates: dict[float, SuccessRate] = field(default_factory=dict)
    environment_steps: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        rates = [[weight, rate.successes, rate.episodes] for weight, rate in self.rates.items()]
        curve = [[weight, change if math.isfinite(change) else None] for weight, change in self.curve]
        return {**asdict(self), "curve": curve, "rates": rates}


def weigh(
    env: VectorEnv,
    policy: SteeredPolicy,
    critic: ChunkCritic,
    settings: GuidanceSettings,
    seed: int,
    *,
    make_reasoner: MakeReasoner | None = None,
    convention: Convention = OGBENCH,
    weights: Sequence[float] | None = None,
    episodes: int = 20,
    on_episode: Callable[[Episode], None] | None = None,
) -> Weighing:
    """Find the weight that `settings` ask for.

    Args:
        env: the task; it stays open.
        policy: the steered policy that is to be guided.
        critic: Q.
        settings: with a number, that is the weight; "auto": `choose_weight` on observations of unguided episodes; "validate":
            of several weights the one with the most successes, the smallest of equal ones.
        seed: of the evaluation; what is rolled out here are other episodes.
        make_reasoner: as for `run_episodes`.
        convention: as for `run_episodes`.
        weights: what "validate" tries; None: `MULTIPLES` of the weight that "auto" finds.
        episodes: of "validate", for each weight; the same ones for all.
        on_episode: called with each finished episode.

    Raises:
        InvalidInputError: a number is out of range, or no weight has the effect that was asked for.
        MismatchError: the critic was made for other chunks, or the policy looks through cameras and a weight is to be found.
    """
    if not isinstance(settings.weight, str):
        return Weighing(settings.weight)
    if settings.weight not in ("auto", "validate"):
        raise InvalidInputError(f"the weight is {settings.weight!r}; expected a number, 'auto' or 'validate'.")
    if weights is not None and not weights:
        raise InvalidInputError("no weight was given to validate; give at least one, for example 0.03.")

    def run(steered: SteeredPolicy, count: int, record: bool) -> list[Episode]:
        seeds = [child_seed(check_seed(seed), "validation", index) for index in range(count)]
        return run_episodes(
            steered, env, seeds, make_reasoner, convention=convention, record=record, on_episode=on_episode
        )

    if settings.weight == "auto" or weights is None:
        check_on_states(policy, "a weight is found", "Give it as a number.")
    found, steps, task = Weighing(0.0), 0, task_of(critic, env)
    if settings.weight == "auto" or weights is None:
        observed = run(policy, OBSERVED_EPISODES, True)
        steps += sum(episode.steps for episode in observed)
        chosen = choose_weight(policy, critic, _some(observed), settings, steps=policy.steps, seed=seed, task=task)
        found = Weighing(chosen.weight, settings.radius, chosen.spread, chosen.curve, environment_steps=steps)
    if settings.weight == "auto":
        return found
    rates: dict[float, SuccessRate] = {}
    for weight in sorted([multiple * found.weight for multiple in MULTIPLES] if weights is None else set(weights)):
        finished = run(guide(policy, critic, settings.with_weight(weight), task), episodes, False)
        steps += sum(episode.steps for episode in finished)
        rates[weight] = SuccessRate.of(episode.success for episode in finished)
    best = max(rates, key=lambda weight: (rates[weight].successes, -abs(weight)))
    return Weighing(best, found.radius, found.spread, found.curve, rates, steps)


def task_of(critic: ChunkCritic, env: VectorEnv) -> Tensor | None:
    """Return the embedding of a task for a critic that was made with one (as `train_critic` makes it), else None."""
    size = critic.config.task_dim
    return task_embedding(env.spec.name, size) if size else None


def _some(episodes: Sequence[Episode]) -> Tensor:
    """Return observations of some decisions, evenly from all."""
    observations = np.stack([decision.observation for episode in episodes for decision in episode.decisions])
    chosen = np.linspace(0, len(observations) - 1, min(OBSERVATIONS, len(observations))).round().astype(int)
    return torch.from_numpy(observations[chosen])
