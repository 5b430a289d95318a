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
from counterflow.errors import CheckpointError
from counterflow.experiments.inversion import InversionSettings
from counterflow.experiments.record import step_noises
from counterflow.experiments.sight import looks
from counterflow.learning.dsbc import DSBCConfig, NoiseExamples, distil
from counterflow.policies import BasePolicy
from counterflow.random import child_seed
from counterflow.steering import ChunkRegressor, SteeringSpace

DISTILLED = DSBCConfig()
"""How, whatever the first one was made with."""
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
            arrays: of one episode, with features.
            dim: A; what lies beyond is padding.
        """
        if "step_noise" in arrays:
            usable, shown, noises = (arrays[name] for name in ("step_noise_valid", "step_features", "step_noise"))
        else:
            usable, shown, noises = arrays["start_time"] == 0, arrays["features"], arrays["noise"]
        found = (torch.from_numpy(np.ascontiguousarray(one[usable])).float() for one in (shown, noises[..., :dim]))
        seen, said = found
        return cls(seen.flatten(1), said, len(arrays["step_actions"]))


def successes_in(path: Path | str, env: str, first: int | None, *, successes_only: bool) -> list[Success]:
    """Return what the successful episodes of a recording teach, of the same episodes that a replay is prefilled with.

    Args:
        path: a steering dataset.
        env, first, successes_only: as for `prefill`.
    """
    dataset = SteeringDataset.load(path)
    chosen = dataset.filter(success=True if successes_only else None, env=env, first=first)
    return [Success.of(one.arrays, dataset.binding.dim) for one in chosen.episodes if one.success]


class Teachers:
    """A noise policy for each seed, at first the same one.

    Args:
        first: what was distilled from the recordings.
        space: what an action means.
        seeds: of the learner.
        known: the successes that the first one was distilled from.
    """

    def __init__(
        self, first: ChunkRegressor, space: SteeringSpace, seeds: list[int], known: Sequence[Success] = ()
    ) -> None:
        self.space, self.seeds, self.known = space, seeds, list(known)
        if first.intention is not None:  # it is not imitated, nor distilled again
            first = copy.deepcopy(first)
            first.intention = None
        self.each = [first] * len(seeds)
        self.found: list[list[Success]] = [[] for _ in seeds]  # since then
        self.taught = [0] * len(seeds)  # how many of these its teacher was distilled from

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
        self.found[index].append(Success.of(arrays, policy.action_spec.dim))

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
            self.each[index] = distil(examples, config, seed=own, device=self.space.device)
            self.taught[index] = len(self.found[index])
            again.append(seed)
        return again

    def state(self) -> dict[str, Tensor]:
        """Return everything that going on needs, by name, on the CPU."""
        found = {"taught": torch.tensor(self.taught)}
        for index, one in enumerate(self.each):
            found |= {f"{index}.{name}": value.detach().cpu().clone() for name, value in one.state_dict().items()}
            if self.found[index]:
                found[f"found.{index}.shown"] = torch.cat([success.shown for success in self.found[index]])
                found[f"found.{index}.noises"] = torch.cat([success.noises for success in self.found[index]])
                counts = [[len(success.shown), success.steps] for success in self.found[index]]
                found[f"found.{index}.counts"] = torch.tensor(counts)
        return found

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
