"""Normalisation owned by the policy: an affine map an entry, fitted to data, reversible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError

NormalisationKind = Literal["none", "mean_std", "min_max", "quantile"]

SMALLEST_SCALE = 1e-3  # a dimension that hardly moved in the data must not blow up what differs from it a little
QUANTILES = (0.01, 0.99)  # openpi's
LARGEST_QUANTILE_SAMPLE = 2**20  # rows; torch.quantile refuses much more, and more change nothing


class Normaliser(nn.Module):
    """The map (x - offset) / scale of each dimension, and back.

    Args:
        offset: (D,).
        scale: (D,) positive.
        kind: how it was fitted, for provenance.

    Raises:
        InvalidInputError: the shapes differ, or a scale is not positive, or something is not finite.
    """

    def __init__(self, offset: Tensor, scale: Tensor, kind: NormalisationKind = "mean_std") -> None:
        if offset.ndim != 1 or offset.shape != scale.shape:
            raise InvalidInputError(
                f"offset has shape {tuple(offset.shape)}, scale {tuple(scale.shape)}; expected (D,) for both."
            )
        if not bool(torch.isfinite(offset).all() and torch.isfinite(scale).all() and (scale > 0).all()):
            raise InvalidInputError("offset and scale must be finite and the scale positive; check the data.")
        super().__init__()
        self.kind = kind
        self.offset: Tensor
        self.scale: Tensor
        self.register_buffer("offset", offset.float())
        self.register_buffer("scale", scale.float())

    @classmethod
    def fit(cls, values: Tensor, kind: NormalisationKind = "mean_std") -> Normaliser:
        """Fit to data (N, D).

        Args:
            values: (N, D).
            kind: "mean_std" (zero mean, unit deviation), "min_max" or "quantile" (1 % to 99 %, as openpi) to [-1, 1], or
                "none".

        Raises:
            UnknownNameError: no such kind.
            InvalidInputError: the data are not (N, D).
        """
        if values.ndim != 2 or len(values) == 0:
            raise InvalidInputError(f"data of shape {tuple(values.shape)} were given to normalise; expected (N, D).")
        values = values.double()
        if kind == "none":
            offset, scale = torch.zeros(values.shape[1]), torch.ones(values.shape[1])
        elif kind == "mean_std":
            offset, scale = values.mean(0), values.std(0, correction=0)
        elif kind in ("min_max", "quantile"):
            if kind == "min_max":
                low, high = values.amin(0), values.amax(0)
            else:
                sample = values[:: 1 + len(values) // LARGEST_QUANTILE_SAMPLE]
                low, high = torch.quantile(sample, torch.tensor(QUANTILES, dtype=sample.dtype), dim=0)
            offset, scale = (low + high) / 2, (high - low) / 2
        else:
            raise UnknownNameError("normalisation", str(kind), get_args(NormalisationKind))
        return cls(offset, scale.clamp_min(SMALLEST_SCALE), kind)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str, kind: NormalisationKind) -> Normaliser:
        """Make the one that `tensors(name)` gave."""
        return cls(tensors[f"{name}.offset"], tensors[f"{name}.scale"], kind)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return its numbers, named after `name`."""
        return {f"{name}.offset": self.offset, f"{name}.scale": self.scale}

    @property
    def dim(self) -> int:
        """D, the number of dimensions."""
        return len(self.offset)

    def normalise(self, values: Tensor) -> Tensor:
        """Map (..., D) to normalised units.

        Raises:
            MismatchError: the last dimension is not D.
        """
        self._check(values)
        return (values - self.offset.to(values)) / self.scale.to(values)

    def denormalise(self, values: Tensor) -> Tensor:
        """Map (..., D) back.

        Raises:
            MismatchError: the last dimension is not D.
        """
        self._check(values)
        return values * self.scale.to(values) + self.offset.to(values)

    def _check(self, values: Tensor) -> None:
        if values.shape[-1:] != self.offset.shape:
            raise MismatchError(f"values have shape {tuple(values.shape)}; expected (..., {self.dim}).")
