"""Transitions for offline reinforcement learning: episodes with rewards, and windows and chunks of them on the device.

A transition is one row: observation, action, next observation, reward, mask and terminal. `rewards` and `masks` belong to the
row's *observation* (OGBench's single tasks: -1 for each sub-goal that is not reached there; mask 0 where the task is
solved, so that nothing is bootstrapped from there), `terminals` is 1 at the last row of each episode, whether or not the task
was solved.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from counterflow.checks import COUNT, SHARE, check_name
from counterflow.data.episodes import Array, EpisodeDataset
from counterflow.data.starts import Weighting, WindowStarts
from counterflow.errors import DatasetError

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TransitionDataset:
    """Transitions of whole episodes, one after another: OGBench's "regular" layout, with rewards.

    Args:
        observations: (N, O), converted to float32 like all the others.
        actions: (N, A), in the environment's units.
        next_observations: (N, O); inside an episode the next row's observation.
        rewards: (N,).
        masks: (N,), 0 where the task is solved and 1 elsewhere.
        terminals: (N,), 1 at each episode's last row and 0 elsewhere.

    Raises:
        DatasetError: shapes don't fit together, a value is NaN or infinite, masks or terminals are not 0 or 1, or the last
            row is not terminal.
    """

    observations: Float32Array
    actions: Float32Array
    next_observations: Float32Array
    rewards: Float32Array
    masks: Float32Array
    terminals: Float32Array

    def __post_init__(self) -> None:
        """Convert to float32 and check everything that samplers rely on."""
        arrays: dict[str, Array] = {name: np.asarray(value) for name, value in vars(self).items()}
        for name, array in arrays.items():
            dimensions = 2 if name in ("observations", "actions", "next_observations") else 1
            if array.ndim != dimensions or array.dtype.kind not in "fiub":
                raise DatasetError(
                    f"{name} are of type {array.dtype} and shape {array.shape}; expected numbers, "
                    f"{'(transitions, dimensions)' if dimensions == 2 else 'one a transition'}."
                )
            arrays[name] = array.astype(np.float32, copy=False)
        lengths = {name: len(array) for name, array in arrays.items()}
        if len({*lengths.values()}) != 1 or 0 in lengths.values():
            listing = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise DatasetError(f"the arrays have these lengths: {listing}. Expected the same length, one or more.")
        observations, following = arrays["observations"], arrays["next_observations"]
        if observations.shape != following.shape:
            raise DatasetError(
                f"observations are {observations.shape} and next_observations {following.shape}; expected the same shape."
            )
        for name, array in arrays.items():
            finite = np.isfinite(array) if array.ndim == 1 else np.isfinite(array).all(axis=1)
            if not finite.all():
                raise DatasetError(
                    f"{name} are NaN or infinite, first at row {int(np.argmin(finite))}. Collect or download the data again, "
                    "or compute the rewards again."
                )
        for name in ("masks", "terminals"):
            strange = ~np.isin(arrays[name], (0, 1))
            if strange.any():
                row = int(np.argmax(strange))
                raise DatasetError(f"{name} are {arrays[name][row]:g} at row {row}; expected 0 or 1.")
        if not arrays["terminals"][-1]:
            raise DatasetError(
                "the last row is not terminal, so the last episode is cut off; expected terminals of 1 at the last row of "
                "each episode. Collect or download the data again."
            )
        for name, array in arrays.items():
            object.__setattr__(self, name, array)  # the dataclass is frozen for its users

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> TransitionDataset:
        """Make a dataset of arrays by their names, as in a file.

        Raises:
            DatasetError: an array is missing, or something about them is wrong; see the class.
        """
        names = list(cls.__dataclass_fields__)
        missing = [name for name in names if name not in arrays]
        if missing:
            raise DatasetError(
                f"the arrays {', '.join(missing)} are missing; there are {', '.join(sorted(arrays)) or 'none'}. Rewards and "
                "masks of an OGBench task are computed by `counterflow.envs.relabel`."
            )
        return cls(**{name: arrays[name] for name in names})

    @classmethod
    def from_episodes(cls, episodes: EpisodeDataset) -> TransitionDataset:
        """Make transitions of episodes as OGBench's archives keep them.

        An archive keeps one row more than an episode has transitions: its last row is the last observation beside an action
        that nothing came of. That row is dropped, as `ogbench.utils.load_dataset(compact_dataset=False)` does.

        Args:
            episodes: with the arrays rewards (N,) and masks (N,) beside observations and actions.

        Raises:
            DatasetError: there are no rewards or masks, or an episode has a single row, or something about the arrays is
                wrong; see the class.
        """
        missing = [name for name in ("rewards", "masks") if name not in episodes.arrays]
        if missing:
            raise DatasetError(
                f"the episodes have no {' and no '.join(missing)}; they have {', '.join(episodes.arrays)}. Compute both from "
                "qpos with `counterflow.envs.relabel`, or load the archive with `counterflow.experiments.offline_data`."
            )
        if (episodes.lengths < 2).any():
            raise DatasetError(
                f"episode {int(np.argmin(episodes.lengths))} has a single row, so there is no transition in it; expected two "
                "rows or more, the last of which holds the last observation. Check where the terminals lie."
            )
        lasts = np.cumsum(episodes.lengths) - 1
        kept = np.ones(episodes.num_steps, bool)
        kept[lasts] = False
        following = np.ones(episodes.num_steps, bool)
        following[lasts - episodes.lengths + 1] = False
        terminals = np.zeros(episodes.num_steps, np.float32)
        terminals[lasts - 1] = 1
        observations = episodes.gather("observations")
        others = {name: episodes.gather(name)[kept] for name in ("actions", "rewards", "masks")}
        return cls(
            observations=observations[kept],
            next_observations=observations[following],
            terminals=terminals[kept],
            **others,
        )

    @property
    def num_transitions(self) -> int:
        """N."""
        return len(self.terminals)

    @property
    def observation_dim(self) -> int:
        """O."""
        return int(self.observations.shape[1])

    @property
    def action_dim(self) -> int:
        """A."""
        return int(self.actions.shape[1])

    @property
    def lasts(self) -> npt.NDArray[np.int64]:
        """(E,) the last row of each episode."""
        return np.flatnonzero(self.terminals).astype(np.int64)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(E,) the number of transitions of each episode."""
        return np.diff(self.lasts, prepend=-1)

    def sparse(self) -> TransitionDataset:
        """Return the same transitions with rewards of -1 wherever they are not 0 (QGF's sparse variant)."""
        rewards = np.where(self.rewards != 0, -1.0, 0.0).astype(np.float32)
        return TransitionDataset.of({**vars(self), "rewards": rewards})


@dataclass(frozen=True)
class Windows:
    """h + 1 successive rows of one episode each; where it ends before, its last row is repeated.

    Args:
        observations: (..., h + 1, O) float32.
        actions: (..., h + 1, A) float32.
        rewards: (..., h + 1) float32.
        terminals: (..., h + 1) float32.
        masks: (..., h + 1) float32.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminals: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Chunks:
    """Action chunks as single transitions of h steps.

    Args:
        observations: (..., O) float32, where the chunk begins.
        actions: (..., h, A) float32.
        next_observations: (..., O) float32, after the chunk, or at the episode's end if that comes first.
        rewards: (...) float32, the discounted sum of the rewards inside the episode, sum over k < h of discount^k r_k.
        masks: (...) float32, 0 if one of those rows has mask 0: nothing is bootstrapped from the next observation.
        valid: (...) float32, 1 if all h rows lie in the episode, 0 if it ended before the last.
        policy_observations: (..., O) float32, what a policy is to learn from where that differs, as with goals of its own.
    """

    observations: Tensor
    actions: Tensor
    next_observations: Tensor
    rewards: Tensor
    masks: Tensor
    valid: Tensor
    policy_observations: Tensor | None = None

    @property
    def seen_by_policy(self) -> Tensor:
        """What a policy learns from (..., O): its own observations where there are any."""
        return self.observations if self.policy_observations is None else self.policy_observations


class WindowSampler:
    """Windows and chunks of transitions that lie on the device; nothing goes back to the host.

    The starts are drawn first and gathered second, so that several seeds' starts, (S, B), are gathered at once.

    Two ways of drawing:

    - "episodes", RQL's (`sample_traj` of aoberai/rql, utils/datasets.py): an episode uniformly among those with more than
      one row, then a start in it, uniformly from the first row to the one before the last. RQL draws episodes without
      replacement where there are more of them than the batch has rows; here always with.
    - "windows", nearly QGF's (`sample_sequence` of zhouzypaul/qgf, utils/datasets.py). The official one draws starts
      uniformly over all rows, and where a window crosses an episode's end its chunk goes on with the next episode's actions
      and counts as not valid. Here only whole windows are drawn, each equally often, so `valid` is always 1: no chunk holds
      another episode's actions, and no row of a batch is wasted.

    Args:
        dataset: the transitions.
        horizon: h, the number of actions in a chunk.
        device: where data, starts and batches lie.
        weighting: "episodes" or "windows", see above. With "windows" shorter episodes than the horizon are left out, with a
            warning.

    Raises:
        InvalidInputError: the horizon is not positive.
        UnknownNameError: there is no such weighting.
        DatasetError: no episode is as long as the horizon, or none has two rows though "episodes" needs that.
    """

    def __init__(
        self,
        dataset: TransitionDataset,
        horizon: int,
        device: torch.device | str = "cpu",
        weighting: Weighting = "windows",
    ) -> None:
        COUNT.check("the horizon", horizon)
        check_name("weighting", weighting, Weighting)
        lengths, lasts = dataset.lengths, dataset.lasts
        least = max(horizon, 2) if weighting == "episodes" else horizon
        if lengths.max() < least:
            raise DatasetError(
                f"the horizon is {horizon} and the longest of {len(lengths)} episodes has {lengths.max()} transitions; expected "
                f"one with {least} or more. Shorten the horizon, or use longer episodes."
            )
        eligible = lengths >= (2 if weighting == "episodes" else horizon)
        if weighting == "windows" and not eligible.all():
            warnings.warn(
                f"{int((~eligible).sum())} of {len(lengths)} episodes are shorter than the horizon of {horizon} and are "
                "left out.",
                stacklevel=2,
            )
        self.horizon = horizon
        self.device = torch.device(device)
        self.weighting = weighting
        self.num_rows = dataset.num_transitions

        firsts = lasts - lengths + 1
        # How many starts an episode has: all but the last row, or those of whole windows.
        counts = (lengths - 1 if weighting == "episodes" else lengths - horizon + 1)[eligible]
        self._starts = WindowStarts(firsts[eligible], counts, weighting, self.device)
        self.num_starts = len(self._starts)
        self.lasts = self._place(np.repeat(lasts, lengths))
        self.steps = torch.arange(horizon + 1, device=self.device)
        self.observations = self._place(dataset.observations)
        self.actions = self._place(dataset.actions)
        self.next_observations = self._place(dataset.next_observations)
        self._rewards = self._place(dataset.rewards)
        self._masks = self._place(dataset.masks)
        self._terminals = self._place(dataset.terminals)

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw window starts (B,), rows of the dataset, with replacement.

        Args:
            batch_size: B.
            generator: a generator on the sampler's device.

        Raises:
            InvalidInputError: the batch size is not positive.
        """
        return self._starts.draw(batch_size, generator)

    def windows(self, starts: Tensor) -> Windows:
        """Gather windows of h + 1 rows, min(start + i, the episode's last row) for i = 0 .. h.

        Args:
            starts: (...) int64, any rows of the dataset; they are not checked, which would wait for the device.
        """
        rows = torch.minimum(starts[..., None] + self.steps, self.lasts[starts][..., None])
        return Windows(
            observations=self.observations[rows],
            actions=self.actions[rows],
            rewards=self._rewards[rows],
            terminals=self._terminals[rows],
            masks=self._masks[rows],
        )

    def chunks(self, starts: Tensor, discount: float) -> Chunks:
        """Gather chunks of h actions, with what QGF's `get_flat_batch` keeps of `sample_sequence`.

        Args:
            starts: (...) int64, any rows of the dataset; they are not checked, which would wait for the device. From a
                start within h rows of its episode's end the chunk goes on with what follows in the dataset, as in QGF's,
                and is not valid; all else is of the episode alone.
            discount: of a step, in [0, 1].

        Raises:
            InvalidInputError: the discount is out of range.
        """
        SHARE.check("the discount", discount)
        rows, inside = self.chunk_rows(starts)
        weights = discount ** self.steps[:-1]
        return Chunks(
            observations=self.observations[starts],
            actions=self.actions[rows],
            next_observations=self.next_observations[self.end_of(starts)],
            rewards=(self._rewards[rows] * weights * inside).sum(-1),
            masks=torch.where(inside, self._masks[rows], 1.0).amin(-1),
            valid=inside[..., -1].to(self._rewards),
        )

    def chunk_rows(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of chunks, (..., h), and whether they lie in the episode that the start lies in."""
        rows = starts[..., None] + self.steps[:-1]
        return rows.clamp(max=self.num_rows - 1), rows <= self.lasts[starts][..., None]

    def end_of(self, starts: Tensor) -> Tensor:
        """Return the last row (...) of chunks that stop where their episode does."""
        return torch.minimum(starts + self.horizon - 1, self.lasts[starts])

    def _place(self, array: Array) -> Tensor:
        # Torch shares memory with numpy and knows nothing of read-only arrays, so a mapped one has to be copied.
        return torch.from_numpy(np.require(array, array.dtype, ["C", "W"])).to(self.device)
