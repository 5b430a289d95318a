"""The steerability probe: how far a frozen policy can be moved, before any training.

Four questions, each of a few episodes or of no more than the states that they visit:

    noise       how much success depends on the noise: some draws, each held fixed for whole episodes
    residual    how much random residual it tolerates: Gaussian, on every action, by its deviation
    latent      which latent shapes keep the base policy's success under coefficients drawn as the prior's noise
    reach       how much of a reference's motion comes out of reversing and denoising it, by the noise bound

From the answers: a noise bound, a latent shape, a residual deviation to begin with. Where the policy succeeds too rarely for
so many episodes to tell, it says so, and recommends what is safe: the full latent, hardly any residual.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import COUNT
from counterflow.envs import VectorEnv
from counterflow.experiments.evaluate import check_episodes, policy_name
from counterflow.experiments.online_agents import PriorLatent
from counterflow.experiments.online_data import AXES
from counterflow.experiments.rollout import Episode, run_episodes
from counterflow.experiments.sight import check_on_states
from counterflow.experiments.statistics import Difference, SuccessRate, tells
from counterflow.flow import denoise
from counterflow.policies import BasePolicy, bind, repeat_context
from counterflow.random import check_seed, child_seed, draw_normal, draw_prior, generator
from counterflow.reasoners import Direction, to_reference
from counterflow.steering import FlowReversal, LatentShape, SteeredPolicy, SteeringContext, SteeringSpace
from counterflow.steering.start import Rng

STDS = (0.02, 0.05, 0.1, 0.2, 0.4)
BOUNDS = (0.5, 1.0, 1.5, 2.0, 3.0)
SHAPES = {
    "repeated": LatentShape("repeated"),
    "low_rank 2": LatentShape("low_rank", 2),
    "low_rank 2, rest zero": LatentShape("low_rank", 2, "zero"),
}
STATES = 64
ENOUGH = 0.9
"""Share of the unbounded reach that a recommended bound keeps, unless it is the largest: the prior's own noise ends there."""


@dataclass(frozen=True)
class Steerability:
    """What a probe found.

    Attributes:
        env: the task.
        policy: which policy it was.
        base: the policy's own success.
        fixed: success with each noise held fixed.
        residual: success by the deviation of a random residual, units of the environment's actions.
        shapes: success by latent shape, under coefficients drawn as the prior's noise.
        reach: by noise bound (infinite: none) the mean share of a reference's motion that comes out, over six directions.
        bound: recommended.
        latent: recommended.
        residual_std: recommended, units of the environment's actions.

    `tells` says whether the episodes tell anything of latent and residual; if not, these are what is safe.
    """

    env: str
    policy: str
    base: SuccessRate
    fixed: list[SuccessRate]
    residual: dict[float, SuccessRate]
    shapes: dict[str, SuccessRate]
    reach: dict[float, float]
    bound: float
    latent: str
    residual_std: float

    @property
    def tells(self) -> bool:
        """Whether the base succeeds often enough to tell a policy that never does from it."""
        return tells(self.base)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "env": self.env,
            "policy": self.policy,
            "base": self.base.to_json(),
            "fixed": [rate.to_json() for rate in self.fixed],
            "residual": {f"{std:g}": rate.to_json() for std, rate in self.residual.items()},
            "shapes": {name: rate.to_json() for name, rate in self.shapes.items()},
            "reach": {f"{bound:g}": round(share, 4) for bound, share in self.reach.items()},
            "recommended": {
                "bound": self.bound,
                "latent": self.latent,
                "residual_std": self.residual_std,
                "tells": self.tells,
            },
        }


def runs_of(draws: int) -> int:
    """Return how many ways of steering are tried in episodes."""
    return 1 + draws + len(STDS) + len(SHAPES)


def probe(
    env: VectorEnv,
    policy: BasePolicy,
    episodes: int = 20,
    seed: int = 0,
    *,
    draws: int = 6,
    steps: int = 5,
    on_episode: Callable[[Episode], None] | None = None,
) -> Steerability:
    """Probe a policy on a task. Warns where the policy succeeds too rarely for so many episodes to tell anything.

    Args:
        env: the task.
        policy: the frozen policy.
        episodes: for each way of steering; all begin in the same states.
        seed: what they descend from.
        draws: how many noises are held fixed.
        steps: K, denoising steps.
        on_episode: called as each episode finishes.

    Raises:
        InvalidInputError: a number is out of range.
        MismatchError: policy and environment don't fit, or nobody knows which of its actions move the robot.
    """
    check_episodes(episodes)
    COUNT.check("the number of fixed noises", draws)
    check_on_states(policy, "how far references get through is measured", "Try 'counterflow eval --steer frs' instead.")
    seeds = [child_seed(check_seed(seed), "probe", index) for index in range(episodes)]
    spec = policy.action_spec
    visited: list[Tensor] = []

    def success(steered: SteeredPolicy, *, keep: bool = False) -> SuccessRate:
        found = run_episodes(steered, env, seeds, record=keep, on_episode=on_episode)
        if keep:
            shown = np.concatenate([[one.observation for one in episode.decisions] for episode in found])
            visited.append(torch.from_numpy(shown[:: 1 + len(shown) // STATES]))
        return SuccessRate.of(one.success for one in found)

    base = success(SteeredPolicy(policy, steps=steps), keep=True)
    rng = generator(child_seed(seed, "fixed"))
    noises = [draw_prior(rng, (spec.horizon, spec.state_dim), "cpu", spec.prior) for _ in range(draws)]
    fixed = [success(SteeredPolicy(policy, start=FixedNoise(noise), steps=steps)) for noise in noises]
    residual = {}
    for std in STDS:
        shaken = RandomResidual(SteeringSpace(policy, "residual", steps), std)
        residual[std] = success(SteeredPolicy(policy, start=shaken.begin, edit=shaken, steps=steps))
    shapes = {
        name: success(
            SteeredPolicy(
                policy, start=PriorLatent(SteeringSpace(policy, steps=steps, bound=None, latent=shape)), steps=steps
            )
        )
        for name, shape in SHAPES.items()
    }
    reach = reach_of(policy, visited[0], steps, generator(child_seed(seed, "reach")))
    if not tells(base):
        warnings.warn(
            f"the base policy succeeds in {base.successes} of {episodes} episodes, too few to tell which latents and residuals "
            "keep its success: what is recommended of them is what is safe. Run more (--episodes), until some five succeed.",
            stacklevel=2,
        )
    recommended = recommend(base, residual, shapes, reach)
    return Steerability(env.spec.name, policy_name(policy), base, fixed, residual, shapes, reach, *recommended)


def recommend(
    base: SuccessRate,
    residual: Mapping[float, SuccessRate],
    shapes: Mapping[str, SuccessRate],
    reach: Mapping[float, float],
) -> tuple[float, str, float]:
    """Return what to begin with: a noise bound, a latent shape, a residual deviation (units of the environment's actions).

    The smallest bound that keeps most of the unbounded reach; the smallest latent that keeps the base's success; the largest
    deviation that does, as all smaller ones do.

    Args:
        base: the policy's own success.
        residual: success by deviation.
        shapes: success by latent shape.
        reach: by noise bound, the infinite one among them.
    """
    enough = ENOUGH * reach[float("inf")]
    return (
        next((bound for bound in BOUNDS if reach[bound] >= enough), BOUNDS[-1]),
        next((name for name in ("repeated", "low_rank 2") if not worse(shapes[name], base)), "full"),
        max(takewhile(lambda std: not worse(residual[std], base), sorted(residual)), default=STDS[0] / 2),
    )


def worse(rate: SuccessRate, base: SuccessRate) -> bool:
    """Say whether a rate is clearly below the base's, or well below it by its mean, or nothing can be told."""
    return not tells(base) or Difference(rate, base).interval.high < 0 or rate.rate < 0.7 * base.rate


@torch.no_grad()
def reach_of(policy: BasePolicy, observations: Tensor, steps: int, rng: torch.Generator) -> dict[float, float]:
    """Return by noise bound the mean share of a reference's motion that comes out of reversing and denoising it.

    Args:
        policy: the frozen policy.
        observations: (B, O) where to ask.
        steps: K of both ways.
        rng: of what the references don't speak for.
    """
    spec = policy.action_spec
    directions = [Direction(axes) for _ in range(len(observations)) for axes in AXES]
    reference = to_reference(directions, spec)
    context = repeat_context(policy.encode(observations), len(AXES))
    noise, _ = FlowReversal(steps)(policy, SteeringContext(context, len(directions), reference), rng)
    layout = spec.layout
    assert layout is not None  # or there would be no reference
    axes = list(layout.translation)
    asked = spec.denormalise(reference.chunk)[..., axes].sum(1)
    shares = {}
    for bound in (*BOUNDS, float("inf")):
        made = denoise(bind(policy, context), noise.clamp(-bound, bound), steps)
        moved = spec.limit(spec.denormalise(made))[..., axes].sum(1)
        along = (moved * asked).sum(-1) / asked.square().sum(-1).clamp_min(1e-9)
        shares[bound] = float(along.mean())
    return shares


@dataclass(frozen=True, eq=False)
class FixedNoise:
    """A start: always the same noise (H, A + padding)."""

    noise: Tensor

    def __call__(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return it for every row."""
        noise = self.noise.to(getattr(policy, "device", "cpu")).expand(context.batch_size, -1, -1).clone()
        return noise, noise.new_zeros(context.batch_size)


class RandomResidual:
    """A Gaussian residual on every action: an edit, and the start that draws it.

    Only a start is given the episodes' own generators; drawn from any other, an episode's residuals would depend on which
    episodes share its batch.

    Args:
        space: whose units the residual has.
        std: its deviation, units of the environment's actions.
    """

    candidates = 1

    def __init__(self, space: SteeringSpace, std: float) -> None:
        self._space, self._std = space, std

    def begin(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        """Start as the policy does, and draw the residuals of this decision."""
        begun = SteeredPolicy(policy).begin(context, rng)
        shape = (context.batch_size, self._space.executed, policy.action_spec.dim)
        self._residual = self._std * draw_normal(rng, shape)
        return begun

    def __call__(self, chunks: Tensor, context: SteeringContext) -> Tensor:  # noqa: ARG002 - the port's signature
        """Shake the first candidate."""
        space, spec, base = self._space, self._space.policy.action_spec, chunks[:, 0]
        chunk = base.clone()
        executed = slice(spec.past, spec.past + space.executed)
        chunk[:, executed] = spec.normalise(space.compose(base, self._residual.to(base))).to(base)
        return chunk[:, None]
