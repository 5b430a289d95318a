"""Drawing action chunks from data that lies on the device.

Everything happens there: the draw of the starts, the gather of observations and chunks. Nothing goes back to the host,
so a compiled update never waits for its batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import COUNT
from counterflow.data.episodes import EpisodeDataset
from counterflow.data.starts import Weighting, WindowStarts
from counterflow.errors import DatasetError


@dataclass(frozen=True)
class ChunkBatch:
    """Observations, and the actions that were executed from there on.

    Args:
        observations: (B, *observation shape), as in the dataset; float32 unless they are images (uint8).
        actions: (B, H, A) float32, in the environment's units.
    """

    observations: Tensor
    actions: Tensor


class ChunkSampler:
    """Windows of `horizon` steps that never cross an episode's end.

    Args:
        dataset: the episodes; shorter ones than the horizon are left out, with a warning.
        horizon: H, the number of actions in a chunk.
        device: where data and batches lie.
        weighting: "windows" draws every window equally often; "episodes" draws an episode first and then a window in
            it, so that a short episode counts as much as a long one.

    Raises:
        InvalidInputError: the horizon is not positive.
        UnknownNameError: there is no such weighting.
        DatasetError: no episode is as long as the horizon.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        horizon: int,
        device: torch.device | str = "cpu",
        *,
        weighting: Weighting = "windows",
    ) -> None:
        COUNT.check("the horizon", horizon)
        long_enough = dataset.lengths >= horizon
        self.num_left_out = int((~long_enough).sum())
        if not long_enough.any():
            raise DatasetError(
                f"the horizon is {horizon} and the longest of {dataset.num_episodes} episodes has "
                f"{dataset.lengths.max()} steps. Shorten the horizon, or use longer episodes."
            )
        if self.num_left_out:
            warnings.warn(
                f"{self.num_left_out} of {dataset.num_episodes} episodes are shorter than the horizon of {horizon} and "
                "are left out.",
                stacklevel=2,
            )
        self.horizon = horizon
        self.device = torch.device(device)
        self.weighting = weighting

        first_rows = np.cumsum(dataset.lengths) - dataset.lengths
        windows = dataset.lengths[long_enough] - horizon + 1
        self._starts = WindowStarts(first_rows[long_enough], windows, weighting, self.device)
        self.num_windows = len(self._starts)
        self._steps = torch.arange(horizon, device=self.device)
        observations = dataset.gather("observations")
        observation_type = np.uint8 if observations.dtype == np.uint8 else np.float32
        self._observations = _to_device(observations, observation_type, self.device)
        self._actions = _to_device(dataset.gather("actions"), np.float32, self.device)

    def sample(self, batch_size: int, generator: torch.Generator) -> ChunkBatch:
        """Draw B windows with replacement.

        Args:
            batch_size: B.
            generator: a generator on the sampler's device.

        Raises:
            InvalidInputError: the batch size is not positive.
        """
        return self._gather(self._starts.draw(batch_size, generator))

    def ordered(self, batch_size: int, limit: int | None = None) -> Iterator[ChunkBatch]:
        """Pass over every window once in the dataset's order, as for a validation loss.

        Args:
            batch_size: B; the last batch may be smaller.
            limit: visit only this many windows, evenly spread.

        Raises:
            InvalidInputError: a number is not positive.
        """
        for name, value in (("batch_size", batch_size), ("limit", limit)):
            if value is not None:
                COUNT.check(name, value)
        count = self.num_windows if limit is None else min(limit, self.num_windows)
        window = torch.arange(count, device=self.device) * self.num_windows // count
        return (
            self._gather(self._starts.rows[window[first : first + batch_size]]) for first in range(0, count, batch_size)
        )

    def _gather(self, start: Tensor) -> ChunkBatch:
        return ChunkBatch(self._observations[start], self._actions[start[:, None] + self._steps])


def _to_device(array: np.ndarray, dtype: type[np.generic], device: torch.device) -> Tensor:
    # Torch shares memory with numpy and knows nothing of read-only arrays, so a mapped one has to be copied.
    return torch.from_numpy(np.require(array, dtype, ["C", "W"])).to(device)
