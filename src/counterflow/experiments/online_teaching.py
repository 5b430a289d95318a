"""The noise policy that an online learner imitates, and how it is distilled again as successes are found.

What the first recordings teach is as good as they are; from one success it may solve one episode in ten. Whatever succeeds while
learning is another example of the same kind, so every now and then each seed's teacher is distilled from all of its own (DSBC,
arXiv 2606.13675; that it is done again and again is ours, as in expert iteration). As in a recording, every step that was
executed is an example, whose noise is found by inversion: decisions alone are a fifth of them and teach far less.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.data import SteeringDataset
from counterflow.errors import CheckpointError, MismatchError
from counterflow.experiments.inversion import InversionSettings
from counterflow.experiments.record import step_noises
from counterflow.experiments.sight import looks
from counterflow.learning.dsbc import DSBCConfig, NoiseExamples, distil
from counterflow.policies import BasePolicy
from counterflow.random import child_seed
from counterflow.steering import ChunkRegressor, SteeringSpace

DISTILLED = DSBCConfig(held_out=0.0)
"""How, whatever the first one was made with. Of two or three successes a held-out one went another way, and members that stop
where it is told best stop at a constant (benchmarks/online_rl/README.md)."""
QUICKEST = 0.5
"""The share of the successes that are learned from, those of the fewest steps: one that wandered says less of where to go."""


@dataclass(frozen=True)
class Success:
    """What a successful episode teaches.

    Attributes:
        shown: (N, F) what a noise policy sees.
        noises: (N, H, A) what it should say there.
        steps: how long the episode took.
    """

    shown: Tensor
    noises: Tensor
    steps: int

    @classmethod
    def of(cls, arrays: Mapping[str, Any], dim: int) -> Success:
        """Return what recorded arrays of a steering dataset teach: at every step, where noises were found, else at decisions.

        Args:
            arrays: of one episode.
            dim: A; what lies beyond is padding.

        Raises:
            MismatchError: it was recorded without features.
        """
        by_step = "step_noise" in arrays and bool(
            arrays["step_noise_valid"].any()
        )  # an episode may be shorter than a chunk
        prefix = "step_" if by_step else ""
        if f"{prefix}features" not in arrays:
            raise MismatchError(
                "an episode was recorded without features, which a noise policy would be distilled from again. Record it anew, "
                "or leave reteach_every at 0."
            )
        usable = arrays["step_noise_valid"] if by_step else arrays["start_time"] == 0
        shown, noises = arrays[f"{prefix}features"], arrays[f"{prefix}noise"][..., :dim]
        seen, said = (torch.from_numpy(np.ascontiguousarray(one[usable])).float() for one in (shown, noises))
        return cls(seen.flatten(1), said, int(arrays["executed"].sum()))


def successes_in(
    path: Path | str, env: str, first: int | None, *, successes_only: bool, inversion: str | None = None
) -> list[Success]:
    """Return what the successful episodes of a recording teach, of the same episodes that a replay is prefilled with.

    Args:
        path: a steering dataset.
        env, first, successes_only: as for `prefill`.
        inversion: how the noises of later successes will be found ("regularised" or "exact"); None: there are none.

    Raises:
        MismatchError: the recording's were found otherwise; a regression of both would learn what lies between.
    """
    dataset = SteeringDataset.load(path)
    chosen = dataset.filter(success=True if successes_only else None, env=env, first=first)
    found = [one for one in chosen.episodes if one.success]
    for source in {one.source for one in found}:
        by_step = dataset.sources[source].get("every_step")  # None: only decisions teach, as they were recorded
        if by_step is not None and inversion not in (None, by_step["method"]):
            raise MismatchError(
                f"the noises of {dataset.path.name} were found by the inversion {by_step['method']!r}, and those of successes to "
                f"come would be by {inversion!r}: they would not be alike. Train with --set inversion={by_step['method']}, or "
                f"record with --inversion {inversion}."
            )
    every = [Success.of(one.arrays, dataset.binding.dim) for one in found]
    return [one for one in every if len(one.shown)]


class Teachers:
    """A noise policy for each seed, at first the same one.

    Args:
        first: what was distilled from the recordings.
        space: what an action means.
        seeds: of the learner.
        known: successes among the recordings that the replay begins with.
    """

    def __init__(
        self, first: ChunkRegressor, space: SteeringSpace, seeds: list[int], known: Sequence[Success] = ()
    ) -> None:
        self.space, self.seeds, self.known = space, seeds, list(known)
        if first.intention is not None:  # it is not imitated, nor distilled again
            first = copy.deepcopy(first)
            first.intention = None
        self.each = [first] * len(seeds)
        # All that succeed while learning, for any may be among the quickest, and how many a seed's teacher was distilled from.
        self.found: list[list[Success]] = [[] for _ in seeds]
        self.taught = [0] * len(seeds)

    def __call__(self, shown: Tensor) -> Tensor:
        """Return what each seed's teacher says (S, C, D) to what that seed has seen (S, C, F)."""
        said = [one(own) for one, own in zip(self.each, shown, strict=True)]
        return torch.stack([self.space.latent.project(one).flatten(1) for one in said])

    def see(self, index: int, arrays: Mapping[str, Any], inversion: InversionSettings) -> None:
        """Keep a success of one seed.

        Args:
            index: the seed's place.
            arrays: of the episode, as a recording's.
            inversion: how the noise of every executed step is found; a policy that looks through cameras, whose pictures are
                drawn where it decides, teaches at decisions alone.
        """
        policy: BasePolicy = self.space.policy
        if not looks(policy):
            arrays = {**arrays, **step_noises(policy, dict(arrays), inversion)}
        found = Success.of(arrays, policy.action_spec.dim)
        if len(found.shown):
            self.found[index].append(found)

    def teach_again(self, decision: int) -> list[int]:
        """Distil the teachers of those seeds that have new successes; return which.

        Args:
            decision: of each seed so far: what is random descends from it.
        """
        again = []
        for index, seed in enumerate(self.seeds):
            if len(self.found[index]) <= self.taught[index]:
                continue
            every = [*self.known, *self.found[index]]
            chosen = sorted(every, key=lambda one: one.steps)[: math.ceil(QUICKEST * len(every))]
            present = self.each[index]
            examples = NoiseExamples(
                torch.cat([one.shown for one in chosen]).numpy(),
                torch.cat([one.noises for one in chosen]).numpy(),
                np.repeat(np.arange(len(chosen)), [len(one.shown) for one in chosen]),
                present.binding,
            )
            config = replace(DISTILLED, regressor=replace(present.config, intention=None))
            own = child_seed(seed, "teacher", decision)
            self.each[index] = distil(examples, config, seed=own, device=next(present.parameters()).device)
            self.taught[index] = len(self.found[index])
            again.append(seed)
        return again

    def state(self) -> dict[str, Tensor]:
        """Return everything that going on needs, by name, on the CPU."""
        kept = {"taught": torch.tensor(self.taught)}
        for index, one in enumerate(self.each):
            kept |= {f"{index}.{name}": value.detach().cpu().clone() for name, value in one.state_dict().items()}
            if self.found[index]:
                kept[f"found.{index}.shown"] = torch.cat([success.shown for success in self.found[index]])
                kept[f"found.{index}.noises"] = torch.cat([success.noises for success in self.found[index]])
                counts = [[len(success.shown), success.steps] for success in self.found[index]]
                kept[f"found.{index}.counts"] = torch.tensor(counts)
        return kept

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned.

        Raises:
            CheckpointError: it is not of teachers like these.
        """
        try:
            taught = [int(one) for one in state["taught"]]
            each, every = [], []
            for index, one in enumerate(self.each):
                own = copy.deepcopy(one)
                prefix = f"{index}."
                own.load_state_dict(
                    {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
                )
                each.append(own)
                counts = state.get(f"found.{index}.counts", torch.zeros(0, 2)).tolist()
                rows = [int(count) for count, _ in counts]
                shown, noises = (
                    state[f"found.{index}.{name}"].split(rows) if rows else () for name in ("shown", "noises")
                )
                steps = [int(one) for _, one in counts]
                every.append([Success(*one) for one in zip(shown, noises, steps, strict=True)])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the teachers that were kept do not fit: {error}. Resume with the noise policy and seeds that the run began "
                "with, or begin a new run."
            ) from error
        self.taught, self.each, self.found = taught, each, every
