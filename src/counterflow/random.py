"""Randomness that descends from one seed.

Two needs meet here. *Repeatability*: one integer seed gives every stream its own, independent child, named by what it is for, so
adding a stream never shifts another. *Batches*: when episodes are rolled out side by side, each keeps its own generator, so
an episode's draws do not depend on which others happen to share its batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from counterflow.checks import Range
from counterflow.errors import InvalidInputError

if TYPE_CHECKING:  # worker processes import this file without torch
    import torch

SEED_BOUND = 2**31 - 1


def check_seed(seed: int) -> int:
    """Return `seed`, or raise `InvalidInputError` unless it is an integer in [0, 2**31 - 1)."""
    Range(0, SEED_BOUND - 1, integer=True).check("seed", seed)
    return int(seed)


def child_seed(seed: int, *path: int | str) -> int:
    """Derive the seed of the stream called `path` from `seed`.

    The same arguments always give the same child, on every machine; different paths give independent ones
    (`numpy.random.SeedSequence`).
    """
    words = [int.from_bytes(hashlib.sha256(str(part).encode()).digest()[:4], "little") for part in path]
    return int(np.random.SeedSequence([check_seed(seed), *words]).generate_state(1)[0] % SEED_BOUND)


@contextmanager
def global_numpy(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator for a while: some simulators draw from it, and a caller's draws must not suffer."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator on `device`, seeded with `seed`."""
    import torch

    return torch.Generator(device=device).manual_seed(check_seed(seed))


class RowGenerators:
    """One CPU generator for each row of a batch: row b's draws depend on row b's seed alone.

    Args:
        seeds: one seed a row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._rows = [generator(seed) for seed in seeds]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def reseed(self, row: int, seed: int) -> None:
        """Give `row` a new stream, as when a new episode begins on it."""
        self._rows[row] = generator(seed)

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Draw N(0, I) of `shape` (B, ...), B = number of rows, float32, on the CPU."""
        import torch

        if shape[0] != len(self._rows):
            raise InvalidInputError(f"asked for {shape[0]} rows of noise from {len(self._rows)} row generators.")
        return torch.stack([torch.randn(tuple(shape[1:]), generator=row) for row in self._rows])


def draw_prior(
    rng: torch.Generator | RowGenerators,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    prior: str = "gaussian",
) -> torch.Tensor:
    """Draw noise of `shape` (B, ...) from a flow's prior: "gaussian", N(0, 1), or "uniform" on [-1, 1], entry by entry.

    Both take the same draws from the generator: the uniform is the Gaussian through its own distribution function.
    """
    import torch

    noise = draw_normal(rng, shape, device)
    return torch.erf(noise / math.sqrt(2.0)) if prior == "uniform" else noise


def draw_normal(
    rng: torch.Generator | RowGenerators, shape: Sequence[int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Draw N(0, I) of `shape` (B, ...) from either kind of generator and place it on `device`.

    With row generators B may be a multiple n of their number: each row of generators then draws for n neighbouring rows,
    as when every observation has n candidates.
    """
    import torch

    if not isinstance(rng, RowGenerators):
        return torch.randn(tuple(shape), generator=rng, device=rng.device).to(device)
    copies, remainder = divmod(shape[0], len(rng))
    if remainder or copies == 0:
        raise InvalidInputError(
            f"asked for {shape[0]} rows of noise from {len(rng)} row generators; expected a multiple."
        )
    return rng.normal((len(rng), copies, *shape[1:])).flatten(0, 1).to(device)
