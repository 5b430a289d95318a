"""Hindsight relabelling: goals for goal-conditioned reinforcement learning, drawn from the data itself.

Source: OGBench's `GCDataset` (seohongpark/ogbench, impls/utils/datasets.py) with `gc_negative`: the goal of a transition is its
own row, a later row of its episode, or any row of the dataset; the reward is 0 at the goal's row and -1 elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from counterflow.checks import FRACTION
from counterflow.data.transitions import Chunks, TransitionDataset, WindowSampler
from counterflow.errors import InvalidInputError


@dataclass(frozen=True)
class GoalShares:
    """Where goals come from.

    Args:
        current: share of goals that are the observation itself.
        trajectory: share of goals that lie later in the episode (at its last row, there).
        random: share of goals that are any row of the dataset.
        geometric: how far ahead a goal of the trajectory lies: geometrically distributed with the discount, and no further
            than the episode's end; or else uniformly between here and there.

    Raises:
        InvalidInputError: a share is negative, or they don't add up to 1.
    """

    current: float
    trajectory: float
    random: float
    geometric: bool

    def __post_init__(self) -> None:
        """Check the shares."""
        shares = (self.current, self.trajectory, self.random)
        if min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise InvalidInputError(
                f"the shares of goals are current {self.current}, trajectory {self.trajectory} and random {self.random}; "
                "expected none below 0, and 1 in all."
            )


VALUE_GOALS = GoalShares(current=0.2, trajectory=0.5, random=0.3, geometric=True)
"""OGBench's for critics."""

ACTOR_GOALS = GoalShares(current=0.0, trajectory=1.0, random=0.0, geometric=False)
"""OGBench's for policies."""


class GoalSampler:
    """Chunks of transitions with goals from the data, on the device; the rewards of the dataset are not looked at.

    A goal is a row of the dataset: its observation is what is to be reached. Starts and goals are drawn first and gathered
    second, so one start can be gathered with a goal for the critic and another for the policy.

    Args:
        dataset: the transitions.
        horizon: h, the number of actions in a chunk; 1 for single transitions.
        device: where data, draws and batches lie.
        discount: of a step, between 0 and 1: of the rewards, and of how far ahead geometrically drawn goals lie.

    Raises:
        InvalidInputError: the horizon is not positive, or the discount not between 0 and 1.
        DatasetError: no episode is as long as the horizon.
    """

    def __init__(
        self, dataset: TransitionDataset, horizon: int, device: torch.device | str = "cpu", *, discount: float = 0.99
    ) -> None:
        FRACTION.check("the discount", discount)
        self._sampler = WindowSampler(dataset, horizon, device, "windows")
        self.horizon = horizon
        self.device = self._sampler.device
        self.discount = discount

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw the starts of whole chunks (B,), each equally often; see `WindowSampler.draw`."""
        return self._sampler.draw(batch_size, generator)

    def goals(self, starts: Tensor, shares: GoalShares, generator: torch.Generator) -> Tensor:
        """Draw a goal for each start.

        Args:
            starts: (...) int64, rows of the dataset.
            shares: where goals come from, for example `VALUE_GOALS`.
            generator: a generator on the sampler's device.

        Returns:
            (...) int64, rows of the dataset.
        """

        def uniform() -> Tensor:
            return torch.rand(starts.shape, generator=generator, device=self.device, dtype=torch.float64)

        lasts = self._sampler.lasts[starts]
        if shares.geometric:
            # P(steps > k) = discount^k; the draw is turned round because rand can give 0 and not 1.
            steps = 1 + torch.floor((1 - uniform()).log() / math.log(self.discount))
            later = torch.minimum(starts + steps.long(), lasts)
        else:
            share = uniform()
            later = torch.round(torch.minimum(starts + 1, lasts) * share + lasts * (1 - share)).long()
        anywhere = torch.randint(self._sampler.num_rows, starts.shape, generator=generator, device=self.device)
        source = uniform()
        elsewhere = torch.where(source < shares.current + shares.trajectory, later, anywhere)
        return torch.where(source < shares.current, starts, elsewhere)

    def chunks(self, starts: Tensor, goals: Tensor) -> Chunks:
        """Gather chunks whose observations are (observation, goal), rewarded for reaching the goal.

        The goal is reached inside a chunk if its row is one of the chunk's h rows that lie in the episode. With k* rows until
        then (infinitely many if it isn't),

            reward = sum over k < h of discount^k (-1 if k < k*, else 0),    mask = 0 if reached, else 1;

        for h = 1 that is OGBench's reward success - 1 and mask 1 - success. Being at the goal pays, as in OGBench's tasks,
        so a goal that is the observation after the chunk is not yet reached in it.

        Args:
            starts: (...) int64, as for `WindowSampler.chunks`.
            goals: (...) int64, rows of the dataset.

        Returns:
            The chunks; observations and next observations are (..., 2 O).
        """
        sampler = self._sampler
        rows, inside = sampler.chunk_rows(starts)
        here = inside & (rows == goals[..., None])
        reached = here.any(-1)
        pending = inside & (here.cumsum(-1) == 0)
        weights = self.discount ** sampler.steps[:-1]
        goal = sampler.observations[goals]
        return Chunks(
            observations=torch.cat([sampler.observations[starts], goal], -1),
            actions=sampler.actions[rows],
            next_observations=torch.cat([sampler.next_observations[sampler.end_of(starts)], goal], -1),
            rewards=-(pending * weights).sum(-1),
            masks=(~reached).to(goal),
            valid=inside[..., -1].to(goal),
        )
