"""Any steered policy, guided by a critic, from one set of settings; and how strongly, without trial and error.

The scale of a critic's gradient says nothing by itself: that of a sparse reward's value differs from that of a dense one's by
orders of magnitude. What does say something is how far the guided chunk moves away from the prior's own, compared with how far
the prior's own chunks lie apart. `choose_weight` finds the weight at which the two have a given ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from counterflow.checks import Range
from counterflow.errors import InvalidInputError
from counterflow.flow import Field, denoise
from counterflow.policies import BasePolicy, bind
from counterflow.random import draw_prior, generator
from counterflow.steering.aggregation import Aggregation
from counterflow.steering.critic import ChunkCritic
from counterflow.steering.edit import HighestValue
from counterflow.steering.guidance import CriticGuidance, Estimate, WeightSchedule
from counterflow.steering.steered import SteeredPolicy, frozen

RUNG = 4.0  # factor between two weights of the ladder
RUNGS = 25
CLOSE = 0.02  # of the radius; more exact than a batch of observations can say


@dataclass(frozen=True)
class GuidanceSettings:
    """How a critic guides: the settings of `CriticGuidance` and `HighestValue`, and how the weight is found.

    Attributes:
        weight: a number; "auto": by `choose_weight`; "validate": the best in episodes that are nobody's evaluation.
        estimate: "clean" or "noisy".
        jacobian: pull the gradient back through the estimate.
        schedule: "constant" or "remaining".
        largest_factor: of "remaining".
        clip: whether the clean estimate is clipped to the action space's limits.
        aggregation: "min", "mean" or "lower_confidence".
        rho: of "lower_confidence".
        best_of: n candidates, of which the one with the highest value is kept.
        radius: of "auto", how far the guided chunk may move, in units of the prior's own spread.
    """

    weight: float | Literal["auto", "validate"] = "auto"
    estimate: Estimate = "clean"
    jacobian: bool = False
    schedule: WeightSchedule = "constant"
    largest_factor: float = 10.0
    clip: bool = True
    aggregation: Aggregation = "min"
    rho: float = 1.0
    best_of: int = 1
    radius: float = 0.5

    def with_weight(self, weight: float) -> GuidanceSettings:
        """Return the same settings with a weight that is a number."""
        return replace(self, weight=weight)


@dataclass(frozen=True)
class Chosen:
    """A weight, and what it was chosen by.

    Attributes:
        weight: the weight whose change is `radius` times the spread.
        spread: root mean square, over observations and entries, of the standard deviation of the prior's chunks.
        curve: (weight, change / spread) of every weight that was tried, ascending.
    """

    weight: float
    spread: float
    curve: tuple[tuple[float, float], ...]


def guide(
    policy: SteeredPolicy, critic: ChunkCritic, settings: GuidanceSettings, task: Tensor | None = None
) -> SteeredPolicy:
    """Return a steered policy, guided by a critic on top of whatever steers it: a reversed reference, a learned noise.

    Raises:
        MismatchError: the critic was made for other chunks.
        InvalidInputError: a setting is out of range, or the weight is still to be found.
        UnknownNameError: a name is not known.
    """
    if isinstance(settings.weight, str):
        raise InvalidInputError(
            f"the guidance's weight is {settings.weight!r}; expected a number here. Find one with choose_weight."
        )
    inner = frozen(policy)
    guidance = CriticGuidance(
        critic,
        inner,
        settings.weight,
        settings.estimate,
        settings.jacobian,
        settings.schedule,
        settings.largest_factor,
        settings.clip,
        settings.aggregation,
        settings.rho,
        task,
    )
    edit = HighestValue(critic, inner, settings.best_of, settings.aggregation, settings.rho, task)
    return SteeredPolicy(
        policy,
        guidance=guidance if settings.weight else None,
        edit=edit if settings.best_of > 1 else None,
        steps=policy.steps,
        solver=policy.solver,
    )


@torch.no_grad()
def choose_weight(
    policy: BasePolicy,
    critic: ChunkCritic,
    observations: Any,
    settings: GuidanceSettings | None = None,
    *,
    draws: int = 16,
    steps: int = 10,
    seed: int = 0,
    task: Tensor | None = None,
) -> Chosen:
    """Find the weight with which guidance moves the prior's chunks by `settings.radius` times their own spread.

    For every observation `draws` noises are denoised with and without guidance. The spread is the standard deviation of what
    the prior makes of them, the change the difference that guidance makes to the same noise, both root mean squares over the
    entries that the critic judges, within the action limits, as they would be executed.

    Args:
        policy: the frozen policy (steering on top of it is looked through: a learned noise has no spread).
        critic: Q.
        observations: leading dimension B; some dozens, from the states in which it will act.
        settings: how the critic guides, and the radius; the weight in them is not looked at.
        draws: noises an observation.
        steps: denoising steps.
        seed: what the noises descend from.
        task: the task embedding of a critic that was made with one.

    Raises:
        InvalidInputError: a number is out of range, or no weight has such an effect: the prior does not vary, or the critic
            does not depend on the chunk.
        MismatchError: the critic was made for other chunks.
    """
    settings = GuidanceSettings() if settings is None else settings
    Range(0, 100, above=True, below=True).check("the radius", settings.radius)
    if not (isinstance(draws, int) and draws >= 2):
        raise InvalidInputError(f"{draws!r} draws were asked for; expected 2 or more, to see how far they lie apart.")
    base = SteeredPolicy(frozen(policy), steps=steps)
    spec = base.action_spec

    def guided(weight: float) -> SteeredPolicy:
        return guide(base, critic, replace(settings, weight=weight, best_of=1), task)

    context = guided(1.0).encode(observations).repeat_interleave(draws)
    noise = draw_prior(generator(seed), (context.batch_size, spec.horizon, spec.state_dim), base.device, spec.prior)

    def executed(field: Field) -> Tensor:
        return spec.limit_normalised(critic.judged(denoise(field, noise, steps)))

    own = executed(bind(base, context.features))
    spread = float(own.unflatten(0, (-1, draws)).var(1, correction=1).mean().sqrt())
    if not spread > 1e-6:
        raise InvalidInputError(
            f"the prior's chunks differ by {spread:.1e} from one noise to another, so nothing says how far guidance may move "
            "them. Give the weight as a number."
        )
    tried: dict[float, float] = {}

    def change(weight: float) -> float:
        moved = float((executed(bind(guided(weight), context)) - own).square().mean().sqrt()) / spread
        tried[weight] = moved if math.isfinite(moved) else math.inf
        return tried[weight]

    low = high = 1.0
    if change(1.0) > settings.radius:
        while change(low := low / RUNG) > settings.radius and len(tried) < RUNGS:
            pass
        high = low * RUNG
    else:
        while change(high := high * RUNG) <= settings.radius and len(tried) < RUNGS:
            pass
        low = high / RUNG
    if not tried[low] <= settings.radius < tried[high]:
        raise InvalidInputError(
            f"weights from {min(tried):.0e} to {max(tried):.0e} move the chunks by {min(tried.values()):.2g} to "
            f"{max(tried.values()):.2g} times the prior's spread; {settings.radius:g} was wanted. "
            "A critic that does not depend on the chunk can't guide; else ask for another radius, or give the weight."
        )
    while tried[low] < (1 - CLOSE) * settings.radius and high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if change(middle) <= settings.radius else (low, middle)
    return Chosen(low, spread, tuple(sorted(tried.items())))
