"""The noise policy that an online learner imitates, and how it is distilled again as successes are found.

What the first recordings teach is as good as they are; from one success it may solve one episode in ten. Whatever succeeds while
learning is another example of the same kind, so every now and then each seed's teacher is distilled from all of its own (DSBC,
arXiv 2606.13675; that it is done again and again is ours, as in expert iteration).
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor

from counterflow.data.replay import Replay
from counterflow.errors import CheckpointError
from counterflow.learning.dsbc import DSBCConfig, NoiseExamples, distil
from counterflow.random import child_seed
from counterflow.steering import ChunkRegressor, SteeringSpace

DISTILLED = DSBCConfig()
"""How, whatever the first one was made with."""
QUICKEST = 0.5
"""The share of the successes that are learned from, those of the fewest decisions: one that wandered says less of where to go."""


class Teachers:
    """A noise policy for each seed, at first the same one.

    Args:
        first: what was distilled from the recordings.
        space: what an action means.
        seeds: of the learner.
        known: successful episodes that the first one is made of.
    """

    def __init__(self, first: ChunkRegressor, space: SteeringSpace, seeds: list[int], known: int) -> None:
        self.space, self.seeds = space, seeds
        if first.intention is not None:  # it is not imitated, nor distilled again
            first = copy.deepcopy(first)
            first.intention = None
        self.each = [first] * len(seeds)
        self.known = [known] * len(seeds)

    def __call__(self, shown: Tensor) -> Tensor:
        """Return what each seed's teacher says (S, C, D) to what that seed has seen (S, C, F)."""
        said = [one(own) for one, own in zip(self.each, shown, strict=True)]
        return torch.stack([self.space.latent.project(one).flatten(1) for one in said])

    def teach_again(self, replay: Replay, decision: int) -> list[int]:
        """Distil the teachers of those seeds that have new successes; return which.

        Args:
            replay: with the latents of every success.
            decision: of each seed so far: what is random descends from it.
        """
        taught = []
        for index, seed in enumerate(self.seeds):
            shown, actions, episodes = replay.successful(index)
            numbers, lengths = episodes.unique(return_counts=True)
            count = len(numbers)
            if count <= self.known[index]:
                continue
            best = numbers[lengths.argsort(stable=True)[: math.ceil(QUICKEST * count)]]
            shown, actions, episodes = (one[torch.isin(episodes, best)] for one in (shown, actions, episodes))
            device, present = shown.device, self.each[index]
            rest = shown.new_zeros((len(shown), present.binding.horizon, present.binding.dim))
            noises = self.space.noise(self.space.split(actions.to(self.space.device))[0], rest.to(self.space.device))
            examples = NoiseExamples(
                shown.cpu().numpy(), noises.float().cpu().numpy(), episodes.cpu().numpy(), present.binding
            )
            own = child_seed(seed, "teacher", decision)
            config = replace(DISTILLED, regressor=replace(present.config, intention=None))
            self.each[index] = distil(examples, config, seed=own, device=device)
            self.known[index] = count
            taught.append(seed)
        return taught

    def state(self) -> dict[str, Tensor]:
        """Return everything that going on needs, by name, on the CPU."""
        found = {"known": torch.tensor(self.known)}
        for index, one in enumerate(self.each):
            found |= {f"{index}.{name}": value.detach().cpu().clone() for name, value in one.state_dict().items()}
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned.

        Raises:
            CheckpointError: it is not of teachers like these.
        """
        try:
            self.known = [int(one) for one in state["known"]]
            each = []
            for index, one in enumerate(self.each):
                own = copy.deepcopy(one)
                prefix = f"{index}."
                own.load_state_dict(
                    {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
                )
                each.append(own)
            self.each = each
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the teachers that were kept do not fit: {error}. Resume with the noise policy and seeds that the run began "
                "with, or begin a new run."
            ) from error
