"""Replay on the device: decisions of many seeds, linked into episodes, drawn without going back to the host.

A decision is one chunk: what was seen, the action that steered it, what was executed, its discounted reward, what the next value
counts, and what was seen afterwards. Every decision knows the one that followed, so that n-step returns and the action that was
taken next (SARSA) are gathered when a batch is. An episode's decisions are marked once it has succeeded.

Decisions that were there before (prefilled, from recorded episodes) are kept for good; the others make room for newer ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterflow.errors import CheckpointError, DatasetError, InvalidInputError


@dataclass(frozen=True)
class Recorded:
    """Recorded decisions, one after another, to be prefilled.

    Attributes:
        observations: (P, F) what the learner sees.
        actions: (P, D) what steered.
        executed: (P, C) what was executed.
        rewards: (P,) discounted sums over the chunk.
        discounts: (P,) what the next value counts; 0 where the task was solved.
        next_observations: (P, F).
        episodes: (P,) int64, the number of each decision's episode; those of an episode lie together, in order.
        success: (P,) bool, whether that episode succeeded.
    """

    observations: Tensor
    actions: Tensor
    executed: Tensor
    rewards: Tensor
    discounts: Tensor
    next_observations: Tensor
    episodes: Tensor
    success: Tensor

    def __len__(self) -> int:
        """Return P."""
        return len(self.observations)


@dataclass(frozen=True)
class ReplayBatch:
    """Decisions, seeds first; returns over n of them.

    Attributes:
        observations: (S, B, F).
        actions: (S, B, D).
        executed: (S, B, C).
        rewards: (S, B) discounted sums over the n decisions, or as many as the episode had.
        discounts: (S, B) what the value of `next_observations` counts.
        next_observations: (S, B, F) after them.
        next_actions: (S, B, D) what was done there; zero where nothing was.
        next_executed: (S, B, C).
        followed: (S, B) 1 where something was done there, or nothing is to come; 0 where it isn't known.
    """

    observations: Tensor
    actions: Tensor
    executed: Tensor
    rewards: Tensor
    discounts: Tensor
    next_observations: Tensor
    next_actions: Tensor
    next_executed: Tensor
    followed: Tensor


@dataclass(frozen=True)
class Mix:
    """What a batch is made of.

    Attributes:
        prefilled: share of the batch from prefilled decisions, where there are both kinds (0.5: symmetric sampling, RLPD).
        successes: share from successful episodes, of either kind, once there is one.

    Raises:
        InvalidInputError: a share is out of range.
    """

    prefilled: float = 0.5
    successes: float = 0.0

    def __post_init__(self) -> None:
        """Check the shares."""
        if not (0 <= self.prefilled <= 1 and 0 <= self.successes <= 1):
            raise InvalidInputError(
                f"a batch was to be {self.prefilled} prefilled and {self.successes} successes; expected shares from 0 to 1."
            )


_COLUMNS = ("observations", "actions", "executed", "rewards", "discounts", "next_observations")


class Replay:
    """The decisions of S seeds, each with E episodes side by side.

    Args:
        sizes: F, D and C: of an observation, an action, and what is executed.
        seeds: S.
        streams: E.
        capacity: decisions of a seed, prefilled ones included.
        prefilled: decisions to begin with; every seed gets all of them.
        device: where it lies.

    Raises:
        InvalidInputError: a number is out of range, or the prefilled decisions leave no room.
        DatasetError: prefilled decisions have other sizes, or are not finite.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int],
        seeds: int = 1,
        streams: int = 1,
        capacity: int = 100_000,
        prefilled: Recorded | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.prefilled = 0 if prefilled is None else len(prefilled)
        if min(*sizes[:2], seeds, streams) < 1 or capacity - self.prefilled < streams:
            raise InvalidInputError(
                f"a replay was asked for with sizes {sizes}, {seeds} seeds, {streams} streams and room for {capacity}, "
                f"{self.prefilled} of them prefilled; expected positive numbers, and room for more than what is prefilled."
            )
        self.seeds, self.streams, self.capacity, self.device = seeds, streams, capacity, torch.device(device)
        shapes = dict(zip(_COLUMNS, [(sizes[0],), (sizes[1],), (sizes[2],), (), (), (sizes[0],)], strict=True))
        self._columns = {
            name: torch.zeros((seeds, capacity, *shape), device=self.device) for name, shape in shapes.items()
        }
        self._done = torch.zeros((seeds, capacity), dtype=torch.bool, device=self.device)
        self._success = torch.zeros((seeds, capacity), dtype=torch.bool, device=self.device)
        self._following = torch.full((seeds, capacity), -1, dtype=torch.int64, device=self.device)
        self._episode = torch.full((seeds, capacity), -1, dtype=torch.int64, device=self.device)
        self._present = torch.zeros((seeds, streams), dtype=torch.int64, device=self.device)
        self._present += torch.arange(streams, device=self.device)  # numbers of the episodes that go on
        self._last = torch.full((streams,), -1, dtype=torch.int64, device=self.device)
        self._rows = torch.arange(seeds, device=self.device)[:, None]
        self._lists: list[list[Tensor]] | None = None
        self.added = 0  # decisions of each seed that were added beside the prefilled ones
        if prefilled is not None:
            self._prefill(prefilled, shapes)

    @property
    def size(self) -> int:
        """How many decisions a seed has."""
        return self.prefilled + min(self.added, self.capacity - self.prefilled)

    def _prefill(self, recorded: Recorded, shapes: dict[str, tuple[int, ...]]) -> None:
        count = len(recorded)
        for name, shape in shapes.items():
            values: Tensor = getattr(recorded, name)
            if tuple(values.shape) != (count, *shape):
                raise DatasetError(
                    f"{name} to prefill are {tuple(values.shape)}; expected {(count, *shape)}. They were recorded with another "
                    "policy, or for another way of steering."
                )
            if not bool(torch.isfinite(values).all()):
                raise DatasetError(f"{name} to prefill are NaN or infinite. Record them again.")
            self._columns[name][:, :count] = values.to(self.device, torch.float32)
        episodes = recorded.episodes.to(self.device)
        goes_on = episodes[1:] == episodes[:-1]
        following = torch.arange(1, count, device=self.device)
        self._following[:, : count - 1] = torch.where(goes_on, following, -1)
        self._done[:, :count] = ~torch.cat([goes_on, goes_on.new_zeros(1)])
        self._success[:, :count] = recorded.success.to(self.device)
        self._episode[:, :count] = -1 - episodes  # those that are added count from 0

    def add(
        self,
        observations: Tensor,
        actions: Tensor,
        executed: Tensor,
        rewards: Tensor,
        discounts: Tensor,
        next_observations: Tensor,
        done: Tensor,
        success: Tensor,
    ) -> None:
        """Add one decision of every seed's every stream.

        Args:
            observations, actions, executed, rewards, discounts, next_observations: (S, E, ...) as in a batch.
            done: (S, E) bool, whether the episode is over.
            success: (S, E) bool, whether it has succeeded; counts for all its decisions.
        """
        given = (observations, actions, executed, rewards, discounts, next_observations)
        ring = self.capacity - self.prefilled
        streams = torch.arange(self.streams, device=self.device)
        slots = self.prefilled + (self.added + streams) % ring
        if self._lists is not None and self.added + self.streams > ring and bool(self._success[:, slots].any()):
            self._lists = None
        for name, values in zip(_COLUMNS, given, strict=True):
            self._columns[name][:, slots] = values.to(self.device, torch.float32)
        if self.added:
            before = self._last
            self._following[:, before] = torch.where(self._done[:, before], -1, slots)
        self._following[:, slots] = -1
        self._success[:, slots] = False
        self._episode[:, slots] = self._present
        self._done[:, slots] = done.to(self.device)
        self._last = slots
        self.added += self.streams
        for seed, stream in (success & done).nonzero().tolist():
            self._success[seed] |= self._episode[seed] == self._present[seed, stream]
            self._lists = None
        self._present += self.streams * done.to(self.device)

    def successes(self, *, prefilled_only: bool = False) -> list[Tensor]:
        """Return for each seed the places of decisions of successful episodes."""
        if self._lists is None:
            own = [one.nonzero()[:, 0] for one in self._success]
            self._lists = [own, [places[places < self.prefilled] for places in own]]
        return self._lists[int(prefilled_only)]

    def draw(self, rngs: Sequence[torch.Generator], updates: int, batch_size: int, mix: Mix) -> Tensor:
        """Draw decisions for several updates, (U, S, B), with replacement.

        Args:
            rngs: one a seed, on the replay's device; a seed's draws depend on its own alone.
            updates: U.
            batch_size: B.
            mix: what a batch is made of.

        Raises:
            InvalidInputError: nothing is there to draw from.
        """
        if self.size == 0:
            raise InvalidInputError("the replay is empty; add decisions, or prefill it, before drawing.")
        online = self.size - self.prefilled
        found = []
        for rng, places in zip(rngs, self.successes(), strict=True):
            from_successes = round(mix.successes * batch_size) if len(places) else 0
            rest = batch_size - from_successes
            share = 1.0 if not online else mix.prefilled if self.prefilled else 0.0
            from_prefilled = round(share * rest)
            parts = [
                self._uniform(rng, updates, from_prefilled, self.prefilled),
                self.prefilled + self._uniform(rng, updates, rest - from_prefilled, online),
            ]
            if from_successes:
                parts.append(places[self._uniform(rng, updates, from_successes, len(places))])
            found.append(torch.cat(parts, 1))
        return torch.stack(found, 1)

    def draw_successes(
        self, rngs: Sequence[torch.Generator], updates: int, batch_size: int, *, prefilled_only: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Draw decisions of successful episodes, (U, S, B), and say which seeds have any, (S,) 0 or 1."""
        lists = self.successes(prefilled_only=prefilled_only)
        known = torch.tensor([float(len(places) > 0) for places in lists], device=self.device)
        drawn = []
        for rng, places in zip(rngs, lists, strict=True):
            some = places if len(places) else places.new_zeros(1)
            drawn.append(some[self._uniform(rng, updates, batch_size, len(some))])
        return torch.stack(drawn, 1), known

    def gather(self, places: Tensor, steps: int = 1) -> ReplayBatch:
        """Gather decisions (S, B) by their places, with returns over `steps` decisions."""
        rows, columns = self._rows, self._columns
        rewards, discounts, last = columns["rewards"][rows, places], columns["discounts"][rows, places], places
        for _ in range(steps - 1):
            following = self._following[rows, last]
            goes_on = following >= 0
            following = following.clamp_min(0)
            rewards = rewards + goes_on * discounts * columns["rewards"][rows, following]
            discounts = torch.where(goes_on, discounts * columns["discounts"][rows, following], discounts)
            last = torch.where(goes_on, following, last)
        following = self._following[rows, last]
        known = (following >= 0).float()
        following = following.clamp_min(0)
        return ReplayBatch(
            columns["observations"][rows, places],
            columns["actions"][rows, places],
            columns["executed"][rows, places],
            rewards,
            discounts,
            columns["next_observations"][rows, last],
            columns["actions"][rows, following] * known[..., None],
            columns["executed"][rows, following] * known[..., None],
            torch.where(discounts == 0, 1.0, known),
        )

    def state(self) -> dict[str, Tensor]:
        """Return everything that going on needs, by name, on the CPU."""
        size = self.size
        found = {name: values[:, :size] for name, values in self._columns.items()}
        found |= {
            "done": self._done[:, :size],
            "success": self._success[:, :size],
            "following": self._following[:, :size],
            "episode": self._episode[:, :size],
            "present": self._present,
            "last": self._last,
            "added": torch.tensor(self.added),
            "prefilled": torch.tensor(self.prefilled),
        }
        return {name: value.detach().cpu().clone() for name, value in found.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned.

        Raises:
            CheckpointError: it is not of a replay like this one.
        """
        try:
            if int(state["prefilled"]) != self.prefilled:
                raise ValueError(f"{int(state['prefilled'])} decisions were prefilled there, {self.prefilled} here")
            size = state["done"].shape[1]
            for name, own in {
                **self._columns,
                "done": self._done,
                "success": self._success,
                "following": self._following,
                "episode": self._episode,
            }.items():
                if state[name].shape[0] != self.seeds or state[name].shape[2:] != own.shape[2:] or size > self.capacity:
                    raise ValueError(f"{name} there are {tuple(state[name].shape)}, here {tuple(own.shape)}")
                own[:, :size] = state[name].to(self.device)
            self._present = state["present"].to(self.device)
            self._last = state["last"].to(self.device)
            self.added, self._lists = int(state["added"]), None
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the replay that was kept does not fit: {error}. Resume with the settings, seeds and data that the run began "
                "with, or begin a new run."
            ) from error

    def _uniform(self, rng: torch.Generator, updates: int, count: int, bound: int) -> Tensor:
        # In float64 the share is below 1 by more than rounding could undo, so the floor stays inside.
        share = torch.rand((updates, count), generator=rng, device=self.device, dtype=torch.float64)
        return (share * bound).long()
