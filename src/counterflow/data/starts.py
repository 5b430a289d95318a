"""Where windows of consecutive rows begin, and how they are drawn."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from counterflow.checks import COUNT, check_name

Weighting = Literal["windows", "episodes"]


class WindowStarts:
    """The rows in which a window may begin, numbered through all episodes.

    Args:
        firsts: (E,) int64, the first row of each episode.
        counts: (E,) int64, how many windows begin in it: in its first row, the next one, and so on.
        weighting: "windows" draws every start equally often; "episodes" draws an episode first and then a start in it, so that
            a short episode counts as much as a long one.
        device: where they lie and are drawn.

    Attributes:
        rows: (N,) int64, all of them in their order.

    Raises:
        UnknownNameError: there is no such weighting.
    """

    def __init__(
        self, firsts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], weighting: Weighting, device: torch.device
    ) -> None:
        check_name("weighting", weighting, Weighting)
        self.weighting, self.device = weighting, device
        first_starts = np.cumsum(counts) - counts
        rows = np.arange(counts.sum()) + np.repeat(firsts - first_starts, counts)
        self.rows, self._firsts, self._counts = (torch.from_numpy(one).to(device) for one in (rows, firsts, counts))

    def __len__(self) -> int:
        """Return N."""
        return len(self.rows)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw starts (count,) int64 with replacement.

        Args:
            count: how many.
            generator: a generator on the device.

        Raises:
            InvalidInputError: the count is not positive.
        """
        COUNT.check("batch_size", count)
        if self.weighting == "windows":
            return self.rows[torch.randint(len(self), (count,), generator=generator, device=self.device)]
        episode = torch.randint(len(self._counts), (count,), generator=generator, device=self.device)
        # In float64 the share is below 1 by more than rounding could undo, so the floor stays inside the episode.
        share = torch.rand(count, generator=generator, device=self.device, dtype=torch.float64)
        return self._firsts[episode] + (share * self._counts[episode]).long()
