"""From steering datasets to prefilled replays, from trainings to steering datasets, and the anchors of those who choose."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.data.replay import Recorded
from counterflow.errors import DatasetError, InvalidInputError, MismatchError
from counterflow.experiments.record import arrays_of, inverted
from counterflow.experiments.sight import check_on_states, looks
from counterflow.experiments.steering_env import RewardKind, SteeredRows
from counterflow.policies import ActionSpec
from counterflow.reasoners import OGBENCH, Convention, Direction, to_reference
from counterflow.steering import Reference, SteeringSpace, binding_of

AXES = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
KEPT = 0.5
"""The share of recorded noises' power below which there is a warning: less was kept than lost.

What is ordinary lies above: of the prior's own noise a bound of 1 keeps 0.52, and of reversed noises on cube-single, whose few
large numbers have much of the power, the 95% quantile keeps about 0.8.
"""


@dataclass(frozen=True)
class Prefilled:
    """Recorded episodes as a replay wants them.

    Attributes:
        recorded: their decisions.
        noises: (P, H, A) the noises of successful episodes' decisions, as they were recorded.
        episodes: how many there are.
        successes: how many of them succeeded.
        environment_steps: executed actions.
        noises_kept: of the recorded noises' power, the sum of squares over all decisions, what their latents give back within
            shape and bound; None where no latent is decided on. Where the other directions are the prior's own (`rest` of a
            low-rank latent), what lies there counts as kept, as far as the prior has as much.
    """

    recorded: Recorded
    noises: Tensor
    episodes: int
    successes: int
    environment_steps: int
    noises_kept: float | None = None

    def describe(self) -> dict[str, float]:
        """Return the counts, and what was kept of the noises."""
        told: dict[str, float] = {
            "episodes": self.episodes,
            "successes": self.successes,
            "decisions": len(self.recorded),
            "environment_steps": self.environment_steps,
        }
        return told if self.noises_kept is None else told | {"noises_kept": round(self.noises_kept, 4)}

    def check_kept(self, space: SteeringSpace) -> None:
        """Warn where the replay says of latents what other noises did: less than half of the noises' power is left.

        Args:
            space: the actions that the decisions were read for.
        """
        if self.noises_kept is None or self.noises_kept >= KEPT:
            return
        warnings.warn(
            f"of the power of the {len(self.recorded)} recorded noises that the replay begins with, latents "
            f"{space.latent.kind!r} with bound {space.bound} keep {100 * self.noises_kept:.0f}%: it says of these latents what "
            "larger or other noises did. Use latent 'full', or a larger bound (--bound; start.json has a suggested_bound where "
            "episodes succeeded), or record with such latents ('counterflow record --latent', or 'counterflow train dsrl "
            "--record').",
            stacklevel=2,
        )


def prefill(
    path: Path | str,
    space: SteeringSpace,
    env: str,
    *,
    discount: float = 0.99,
    reward: RewardKind = "success",
    first: int | None = None,
    successes_only: bool = False,
    corrected: bool = False,
) -> Prefilled:
    """Read recorded steered rollouts as decisions in a steering space.

    The latent of a decision is the coefficients nearest to its noise, clipped to the bound; `Prefilled.noises_kept` says what
    that leaves of the noises. A residual is what was executed beyond the base's chunk, where that was recorded; else it is 0,
    what was executed being the base's (so residual RL wants rollouts of the base, or of residual RL). A decision after which
    nothing was seen (the last one of an episode that ran out of time) is left out.

    Args:
        path: the dataset's folder.
        space: the actions.
        env: the task; other tasks' episodes are left out.
        discount: gamma of an environment step.
        reward: as for `SteeredRows`.
        first: use the first so many episodes (of those that are left).
        successes_only: leave failed episodes out.
        corrected: somebody may have intervened, and `corrections` says what they corrected: anybody's chunks are taken as the
            base's.

    Raises:
        MismatchError: the dataset belongs to another policy or way of denoising, its noises aren't at the flow's start, or a
            residual is learned and the chunks are of a base that was steered.
        DatasetError: nothing is left, or rewards are asked for that weren't recorded.
    """
    dataset = SteeringDataset.load(path)
    dataset.binding.check(binding_of(space.policy, space.steps, space.solver), f"the steering dataset {path}")
    chosen = dataset.filter(success=True if successes_only else None, env=env, first=first)
    parts: list[dict[str, Tensor]] = []
    noises: list[Tensor] = []
    stored: list[Tensor] = []
    spec = space.policy.action_spec
    for number, episode in enumerate(chosen.episodes):
        arrays = episode.arrays
        if arrays["start_time"].any() and space.ports != "residual":
            raise MismatchError(
                f"{episode} of {path} holds decisions that don't come from a noise at t = 0 (partial noising, direct "
                "execution or an expert). Record with frs, base or rank."
            )
        source = chosen.sources[episode.source]
        if space.ports == "residual" and not corrected and not _is_the_bases(source, arrays):
            told = [f"{name} {source[name]!r}" for name in ("recording", "method", "algorithm") if name in source]
            raise MismatchError(
                f"{episode} of {path} is of {', '.join(told) or 'nobody knows what'}, and a residual is learned on top of the "
                "base's own chunks, which it doesn't hold; expected method 'base', or residual RL's own recordings. Record them "
                f"in a folder of their own: 'counterflow record {env} --steer base --steps {space.steps} --episodes 20 "
                "--no-every-step --out base'."
            )
        executed = arrays["executed"]
        count = len(executed)
        noise = torch.from_numpy(arrays["noise"])[..., : spec.dim]
        chunks = torch.from_numpy(arrays["chunks"])
        shown = _shown(space, arrays, path).cpu()
        acted = space.executed_part(chunks)
        base = torch.from_numpy(arrays["base_chunks"]) if "base_chunks" in arrays else chunks
        if space.show_base:
            shown = torch.cat([shown, base.flatten(1)], 1)
        actions = torch.zeros(count, space.size)
        if space.latent_size:
            actions[:, : space.latent_size] = space.latent.project(noise).flatten(1)
            limits = space.limits
            actions = actions.clamp(-limits, limits)
        if space.residual_size and "base_chunks" in arrays:
            actions[:, space.latent_size :], acted = residuals_of(space, base, chunks, torch.from_numpy(executed))
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
        stored.append(noise[:kept])
        following = torch.cat([shown[1:], shown[-1:]])  # what follows a solved episode counts for nothing
        part = {
            "observations": shown,
            "actions": actions,
            "executed": acted,
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
        _kept(space, recorded.actions, torch.cat(stored)) if space.latent_size else None,
    )


def _is_the_bases(source: Mapping[str, Any], arrays: Mapping[str, Any]) -> bool:
    """Return whether the base's chunks are there, from the prior's own noise, beside what was executed or as it.

    Of corrected noise policies, and where a latent is decided on beside the residual, `base_chunks` come of steered noise.
    """
    if "base_chunks" not in arrays:
        return source.get("method") == "base"
    return source.get("algorithm") == "residual" or source.get("ports") == "residual"


def _kept(space: SteeringSpace, actions: Tensor, noises: Tensor) -> float:
    """Return the share of the power of noises (P, H, A) that actions (P, D) keep, see `Prefilled`."""
    latent, (count, horizon, dim) = space.latent, noises.shape
    noises = noises.double()
    power = float(noises.square().sum())
    coefficients = actions[:, : space.latent_size].double().unflatten(1, (-1, dim))
    kept = float(latent.expand(coefficients, horizon).square().sum())
    if latent.keeps_prior:
        rest = power - float(latent.project(noises).square().sum())
        kept += min(rest, float(count * (horizon - latent.rows(horizon)) * dim))
    return kept / power if power else 1.0


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
    plain = prefill(path, space, env, discount=discount, reward=reward, first=first, corrected=True).recorded
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
        residual, acted = residuals_of(
            space, base, torch.from_numpy(arrays["chunks"]), torch.from_numpy(arrays["executed"])
        )
        bases.append(base[:count].flatten(1))
        actions.append(residual[:count])
        executed.append(acted[:count])
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


def _shown(space: SteeringSpace, arrays: Mapping[str, Any], path: Path | str) -> Tensor:
    """Return what a learner sees of recorded decisions (B, F): of a policy that looks, what was kept of its pictures."""
    if "features" not in arrays:
        check_on_states(space.policy, f"{path} holds no features, which would be computed", "Record again.")
    elif looks(space.policy):
        return torch.from_numpy(arrays["features"]).flatten(1).float()
    return space.encode(torch.from_numpy(arrays["observations"]))[1]


def residuals_of(space: SteeringSpace, base: Tensor, chunks: Tensor, executed: Tensor) -> tuple[Tensor, Tensor]:
    """Return residuals (N, E A), within their bounds, and what was executed (N, E A), normalised.

    Where only the limits of the actions made a difference nobody added anything, nor beyond what was executed: these rows of a
    chunk are the base's own.

    Args:
        space: a residual's.
        base: (N, H, A + padding) what the flow gave, normalised.
        chunks: (N, H, A + padding) what was to be executed, normalised.
        executed: (N,) how many of its actions were.
    """
    spec = space.policy.action_spec
    raw, done = spec.denormalise(base), spec.denormalise(chunks)
    limited = spec.limit(raw)
    row = torch.arange(chunks.shape[1])[:, None] - spec.past
    counts = (row < executed[:, None, None]) & ((done - limited).abs() > 1e-5)
    own = slice(spec.past, spec.past + space.executed)
    residual = torch.where(counts, done - raw, 0.0)[:, own].flatten(1)
    limits = space.limits[space.latent_size :]
    return residual.clamp(-limits, limits), space.executed_part(spec.normalise(torch.where(counts, done, limited)))


def anchors_of(spec: ActionSpec, convention: Convention = OGBENCH) -> Reference:
    """Return the six directions and "defer" as references, (7, H, A + padding); the gripper is the policy's."""
    return to_reference(
        [*(Direction(axis, gripper="policy") for axis in AXES), Direction(defer=True)], spec, convention
    )


def check_recordable(path: Path | str, space: SteeringSpace) -> None:
    """Raise what a `Recording` would that is not fit for its folder or its space; nothing is made or changed.

    Raises:
        MismatchError: the folder holds noises of another policy, or of another way of denoising, or noises would have to be
            found without the pictures that they are of.
        DatasetError: the folder holds something else.
    """
    if space.residual_size:
        check_on_states(space.policy, "the noise of corrected chunks is found", "Train without recording.")
    SteeringDataset.check_recordable(path, binding_of(space.policy, space.steps, space.solver))


class Recording:
    """The episodes of an online training as they come to their end, in a steering dataset; a context manager.

    Episodes of a seed are known by their row and number, so those that a run makes again after a kill are there already. As in
    every steering dataset the noise that is kept with a chunk gives that chunk: where a residual was added it is found by exact
    inversion, and `base_noise` and `base_chunks` hold where the flow started and what it gave.

    Args:
        path: the dataset's folder; made, or added to.
        space: what an action means.
        about: what determines the training, beside the seed.
        seeds: trained side by side.
        streams: environments of each.

    Raises:
        MismatchError: the folder holds noises of another policy, or of another way of denoising.
        StorageError: it can't be written, or another process records there.
    """

    def __init__(
        self, path: Path | str, space: SteeringSpace, about: Mapping[str, Any], seeds: Sequence[int], streams: int
    ) -> None:
        check_recordable(path, space)
        self._space, self._streams = space, streams
        self._binding = binding_of(space.policy, space.steps, space.solver)
        self.dataset = SteeringDataset.create_or_open(path, self._binding)
        kind = {"recording": "online training"}
        self._sources = [self.dataset.add_source({**kind, **about, "seed": seed}) for seed in seeds]

    def __enter__(self) -> Recording:
        """Return self; others may record once the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the dataset."""
        self.dataset.close()

    def keep(self, rows: SteeredRows, row: int, *, success: bool) -> None:
        """Keep a row's episode, which is over.

        Raises:
            StorageError: it can't be written; those before are safe.
        """
        source, env = self._sources[row // self._streams], rows.env.spec.name
        index = rows.episodes[row] * self._streams + row % self._streams
        if self.dataset.has(source, env, index):
            return
        edited = self._space.residual_size > 0
        arrays = arrays_of(rows.decisions[row], bases=edited)
        if edited:
            arrays |= inverted(self._space.policy, arrays, self._binding)
        self.dataset.append(SteeringEpisode(env, rows.seed_of(row), index, success, source, arrays))
