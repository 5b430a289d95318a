"""From steering datasets to prefilled replays, and flow-reversed candidates for those who choose among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from counterflow.data import SteeringDataset
from counterflow.data.replay import Recorded
from counterflow.errors import DatasetError, InvalidInputError, MismatchError
from counterflow.experiments.steering_env import RewardKind
from counterflow.policies import repeat_context
from counterflow.random import draw_normal
from counterflow.reasoners import OGBENCH, Convention, Direction, to_reference
from counterflow.steering import FlowReversal, Reference, Rng, SteeringContext, SteeringSpace, binding_of

AXES = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))


@dataclass(frozen=True)
class Prefilled:
    """Recorded episodes as a replay wants them.

    Attributes:
        recorded: their decisions.
        noises: (P, H, A) the noises of successful episodes' decisions, as they were recorded.
        episodes: how many there are.
        successes: how many of them succeeded.
        environment_steps: executed actions.
    """

    recorded: Recorded
    noises: Tensor
    episodes: int
    successes: int
    environment_steps: int

    def describe(self) -> dict[str, int]:
        """Return the counts."""
        return {
            "episodes": self.episodes,
            "successes": self.successes,
            "decisions": len(self.recorded),
            "environment_steps": self.environment_steps,
        }


def prefill(
    path: Path | str,
    space: SteeringSpace,
    env: str,
    *,
    discount: float = 0.99,
    reward: RewardKind = "success",
    first: int | None = None,
    successes_only: bool = False,
) -> Prefilled:
    """Read recorded steered rollouts as decisions in a steering space.

    The latent of a decision is the coefficients nearest to its noise, clipped to the bound; a residual is 0, what was executed
    being the base's (so residual RL wants rollouts of the base). A decision after which nothing was seen (the last one of an
    episode that ran out of time) is left out.

    Args:
        path: the dataset's folder.
        space: the actions.
        env: the task; other tasks' episodes are left out.
        discount: gamma of an environment step.
        reward: as for `SteeredRows`.
        first: use the first so many episodes (of those that are left).
        successes_only: leave failed episodes out.

    Raises:
        MismatchError: the dataset belongs to another policy or way of denoising, or its noises aren't at the flow's start.
        DatasetError: nothing is left, or rewards are asked for that weren't recorded.
    """
    dataset = SteeringDataset.load(path)
    dataset.binding.check(binding_of(space.policy, space.steps, space.solver), f"the steering dataset {path}")
    chosen = dataset.filter(success=True if successes_only else None, env=env, first=first)
    parts: list[dict[str, Tensor]] = []
    noises: list[Tensor] = []
    spec = space.policy.action_spec
    for number, episode in enumerate(chosen.episodes):
        arrays = episode.arrays
        if arrays["start_time"].any() and space.ports != "residual":
            raise MismatchError(
                f"{episode} of {path} holds decisions that don't come from a noise at t = 0 (partial noising, direct "
                "execution or an expert). Record with frs, base or rank."
            )
        executed = arrays["executed"]
        count = len(executed)
        noise = torch.from_numpy(arrays["noise"])[..., : spec.dim]
        chunks = torch.from_numpy(arrays["chunks"])
        _, shown = space.encode(torch.from_numpy(arrays["observations"]))
        shown = shown.cpu()
        if space.show_base:
            shown = torch.cat([shown, chunks.flatten(1)], 1)
        actions = torch.zeros(count, space.size)
        if space.latent_size:
            actions[:, : space.latent_size] = space.latent.project(noise).flatten(1)
            limits = space.limits
            actions = actions.clamp(-limits, limits)
        rewards = np.zeros(count)
        if reward == "dense":
            if "rewards" not in arrays:
                raise DatasetError(
                    f"{episode} of {path} was recorded without rewards; use sparse ones, or record again."
                )
            ends = np.cumsum(executed)
            for row, (begin, end) in enumerate(zip(ends - executed, ends, strict=True)):
                rewards[row] = (arrays["rewards"][begin:end] * discount ** np.arange(end - begin)).sum()
        elif reward == "cost":
            rewards -= 1.0
            rewards[-1] += episode.success
        elif episode.success:
            rewards[-1] = discount ** (executed[-1] - 1.0)
        discounts = discount ** executed.astype(np.float64)
        if episode.success:
            discounts[-1] = 0.0
            noises.append(noise)
        kept = count if episode.success else count - 1
        following = torch.cat([shown[1:], shown[-1:]])  # what follows a solved episode counts for nothing
        part = {
            "observations": shown,
            "actions": actions,
            "executed": executed_of(space, chunks),
            "rewards": torch.from_numpy(rewards).float(),
            "discounts": torch.from_numpy(discounts).float(),
            "next_observations": following,
            "episodes": torch.full((count,), number),
            "success": torch.full((count,), bool(episode.success)),
        }
        parts.append({name: values[:kept] for name, values in part.items()})
    recorded = Recorded(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    if len(recorded) == 0:
        raise DatasetError(f"{path} holds no decision whose outcome is known. Record longer episodes.")
    return Prefilled(
        recorded,
        torch.cat(noises) if noises else torch.zeros(0, spec.horizon, spec.dim),
        len(chosen),
        chosen.successes,
        sum(episode.steps for episode in chosen.episodes),
    )


def corrections(
    path: Path | str,
    space: SteeringSpace,
    env: str,
    *,
    discount: float = 0.99,
    reward: RewardKind = "success",
    first: int | None = None,
) -> Recorded:
    """Read rollouts in which somebody intervened as decisions of a residual on top of the policy (offline RFS).

    Where they did, the residual is what they did minus what the base would have done from the latent that it used, which
    `base_chunks` holds. Where no latent was recorded, ours: the exact inversion of what they did (the noise that is kept with
    it), clipped to the space's noise bound, gives the base, and the rest is the residual; where no noise gives it, nothing is
    corrected. Residuals are clipped to their bound. Rows of a chunk that were not executed are the base's own.

    Args:
        path: the dataset's folder, of 'counterflow dagger' for example.
        space: a residual's, with `show_base`.
        env, discount, reward, first: as for `prefill`.

    Raises:
        InvalidInputError: the space is not a residual's.
        MismatchError: the dataset belongs to another policy or way of denoising.
        DatasetError: nobody intervened.
    """
    if space.ports != "residual" or not space.show_base:
        raise InvalidInputError(
            f"corrections were asked for with ports {space.ports!r}, show_base {space.show_base}; expected 'residual', True."
        )
    plain = prefill(path, space, env, discount=discount, reward=reward, first=first).recorded
    dataset = SteeringDataset.load(path).filter(env=env, first=first)
    bases, actions, executed = [], [], []
    seen = 0
    for episode in dataset.episodes:
        arrays = episode.arrays
        count = len(arrays["executed"]) - (not episode.success)
        seen += int(arrays["intervened"][:count].sum())
        if "base_chunks" in arrays:
            base = torch.from_numpy(arrays["base_chunks"])
        else:
            context, _ = space.encode(torch.from_numpy(arrays["observations"]))
            bound = float("inf") if space.bound is None else space.bound
            noise = torch.from_numpy(arrays["noise"]).clamp(-bound, bound).to(space.device)
            found = space.denoise(context, noise).cpu()
            known = torch.from_numpy(arrays["intervened"] & (arrays["start_time"] == 0))[:, None, None]
            base = torch.where(known, found, torch.from_numpy(arrays["chunks"]))
        spec, chunks = space.policy.action_spec, torch.from_numpy(arrays["chunks"])
        own = slice(spec.past, spec.past + space.executed)
        raw, done = spec.denormalise(base), spec.denormalise(chunks)
        limited = spec.limit(raw)
        # Where only the limits of the actions made a difference nobody corrected anything, nor beyond what was executed.
        row = torch.arange(chunks.shape[1])[:, None] - spec.past
        counts = (row < torch.from_numpy(arrays["executed"])[:, None, None]) & ((done - limited).abs() > 1e-5)
        residual = torch.where(counts, done - raw, 0.0)[:, own].flatten(1)
        acted = spec.normalise(torch.where(counts, done, limited))
        bases.append(base[:count].flatten(1))
        actions.append(residual[:count].clamp(-space.limits, space.limits))
        executed.append(acted[:count, own, : spec.dim].flatten(1))
    if not seen:
        raise DatasetError(f"nobody intervened in {path}. Record with an expert at hand ('counterflow dagger').")
    size = bases[0].shape[1]
    shown = torch.cat([plain.observations[:, :-size], torch.cat(bases)], 1)
    goes_on = torch.cat([plain.episodes[1:] == plain.episodes[:-1], torch.zeros(1, dtype=torch.bool)])
    # After an episode's last decision nothing was planned: the base stands still in its place.
    next_base = torch.where(goes_on[:, None], shown.roll(-1, 0)[:, -size:], plain.next_observations[:, -size:])
    following = torch.cat([plain.next_observations[:, :-size], next_base], 1)
    return replace(
        plain,
        observations=shown,
        actions=torch.cat(actions),
        executed=torch.cat(executed),
        next_observations=following,
    )


def executed_of(space: SteeringSpace, chunks: Tensor) -> Tensor:
    """Return what is executed of chunks (B, H, A + padding), flat and normalised, (B, C)."""
    spec = space.policy.action_spec
    return chunks[:, spec.past : spec.past + space.executed, : spec.dim].flatten(1)


class Proposals:
    """Candidates of flow reversal: references, reversed, and noises near them.

    Args:
        space: the latents.
        particles: noises for each reference, the reversed one among them.
        spread: standard deviation of the others around it.
        steps: K of the reversal.
        convention: how directions are written.
    """

    def __init__(
        self,
        space: SteeringSpace,
        particles: int = 8,
        spread: float = 0.5,
        steps: int = 5,
        convention: Convention = OGBENCH,
    ) -> None:
        self.space, self.particles, self.spread = space, particles, spread
        self._start, self._convention = FlowReversal(steps), convention
        self._axes = [Direction(axis, gripper="policy") for axis in AXES]
        self.evaluations = 0  # of the field, a row each

    @torch.no_grad()
    def reverse(self, context: object, directions: Sequence[Direction], rng: Rng) -> Tensor:
        """Return the coefficients (B, R A) of the noise that each row's direction reverses to; fresh where nobody speaks."""
        spec = self.space.policy.action_spec
        reference = to_reference(directions, spec, self._convention)
        rows = len(directions)
        placed = Reference(
            *(one.to(self.space.device) for one in (reference.chunk, reference.active, reference.steered))
        )
        noise, _ = self._start(self.space.policy, SteeringContext(context, rows, placed), rng)
        self.evaluations += rows * self._start.steps
        return self.space.latent.project(noise[..., : spec.dim]).flatten(1)

    @torch.no_grad()
    def candidates(
        self, context: object, rows: int, rng: Rng, said: Sequence[Direction] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return candidates (B, N, R A) for every row, and what the reasoner thinks of them (B, N).

        All six directions and "defer" (the prior's own noise); where somebody has said one, also that, which then counts ten
        times as much as any other.
        """
        own = [*self._axes, Direction(defer=True)]
        asked = [[*own, *([] if said is None else [said[row]])] for row in range(rows)]
        anchors = len(asked[0])
        wide = repeat_context(context, anchors)
        centres = self.reverse(wide, [one for row in asked for one in row], rng).unflatten(0, (rows, anchors))
        noise = draw_normal(rng, (rows, anchors, self.particles, centres.shape[-1]))
        noise[:, :, 0] = 0
        limits = self.space.limits[: self.space.latent_size].to(centres)
        found = (centres[:, :, None] + self.spread * noise.to(centres)).clamp(-limits, limits)
        weights = torch.full((rows, anchors, self.particles), 0.1)
        if said is not None:
            weights[:, -1] = 1.0
        return found.flatten(1, 2), weights.flatten(1)
