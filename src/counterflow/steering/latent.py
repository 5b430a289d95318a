"""The latent's shape: which part of a chunk's noise a learner decides on, and how large it may be.

The noise of a chunk has H x A dimensions. Three shapes, shared by DSBC, DSRL and RFS:

    full        every entry is decided on
    low_rank    the leading R rows of an orthonormal cosine basis over time (DCT-II) are; the rest is the prior's own, or zero
    repeated    one row, repeated over the chunk (DSRL on pi0 and DSBC's paper, arXiv 2506.15799 and 2606.13675)

The basis is orthonormal, so that N(0, I) coefficients with a Gaussian rest give exactly the prior's law: a learner that begins
there begins as the base policy. A repeated row has another law, and some policies do nothing sensible with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from counterflow.checks import COUNT, check_name
from counterflow.errors import InvalidInputError

LatentKind = Literal["full", "low_rank", "repeated"]
Rest = Literal["prior", "zero"]


@dataclass(frozen=True)
class LatentShape:
    """Which part of the noise is decided on.

    Attributes:
        kind: "full", "low_rank" or "repeated", see the top of this file.
        rank: R of "low_rank".
        rest: of "low_rank", what the other directions are: "prior", drawn afresh, or "zero", their mean.

    Raises:
        UnknownNameError: no such kind or rest.
        InvalidInputError: the rank is not positive.
    """

    kind: LatentKind = "full"
    rank: int = 2
    rest: Rest = "prior"

    def __post_init__(self) -> None:
        """Check names and rank."""
        check_name("latent shape", self.kind, LatentKind)
        check_name("rest of the latent", self.rest, Rest)
        COUNT.check("the latent's rank", self.rank, written=True)

    @property
    def keeps_prior(self) -> bool:
        """Whether N(0, I) coefficients give the prior's own law."""
        return self.kind == "full" or (self.kind == "low_rank" and self.rest == "prior")

    def rows(self, horizon: int) -> int:
        """Return R, the rows that are decided on, of a chunk of `horizon`."""
        return {"full": horizon, "low_rank": min(self.rank, horizon), "repeated": 1}[self.kind]

    def basis(self, horizon: int, like: Tensor) -> Tensor:
        """Return the orthonormal cosine basis over time (R, H)."""
        time = torch.arange(horizon, dtype=like.dtype, device=like.device)
        order = torch.arange(self.rows(horizon), dtype=like.dtype, device=like.device)[:, None]
        basis = torch.cos(math.pi * (time + 0.5) * order / horizon) * math.sqrt(2 / horizon)
        return torch.where(order == 0, basis / math.sqrt(2), basis)

    def expand(self, coefficients: Tensor, horizon: int, rest: Tensor | None = None) -> Tensor:
        """Return the noise (..., H, A) that coefficients (..., R, A) stand for.

        Args:
            coefficients: (..., R, A).
            horizon: H.
            rest: (..., H, A) a draw of the prior, of which the directions that nobody decides on are taken; None: zero.
        """
        if self.kind == "full":
            return coefficients
        if self.kind == "repeated":
            return coefficients.expand(*coefficients.shape[:-2], horizon, coefficients.shape[-1])
        basis = self.basis(horizon, coefficients)
        noise = basis.mT @ coefficients
        if rest is None or self.rest == "zero":
            return noise
        return noise + rest - basis.mT @ (basis @ rest)

    def project(self, noise: Tensor) -> Tensor:
        """Return the coefficients (..., R, A) nearest to a noise (..., H, A): the mean over time where it is repeated."""
        if self.kind == "full":
            return noise
        if self.kind == "repeated":
            return noise.mean(-2, keepdim=True)
        return self.basis(noise.shape[-2], noise) @ noise


FULL = LatentShape()


def to_shell(noise: Tensor) -> Tensor:
    """Scale every noise (B, ...) to the norm that Gaussian noise of its size nearly always has, the root of its size."""
    flat = noise.flatten(1)
    norm = flat.norm(dim=1, keepdim=True).clamp_min(1e-6)
    scaled: Tensor = flat * (math.sqrt(flat.shape[1]) / norm)
    return scaled.view_as(noise)


def mass_beyond(bound: float) -> float:
    """Return the share of a standard normal's entries that lies beyond +-bound: what a noise bound cuts off."""
    return math.erfc(bound / math.sqrt(2))


def suggest_bound(noises: Tensor, latent: LatentShape = FULL, quantile: float = 0.95) -> float:
    """Return a noise bound chosen from data: a quantile of the sizes of reversed noises' entries.

    Args:
        noises: (N, H, A) noises of successes, for example.
        latent: their shape: it is the coefficients that are bounded.
        quantile: the share of entries that the bound leaves as they are.

    Raises:
        InvalidInputError: there is no noise, or the quantile is out of range.
    """
    if noises.numel() == 0 or not 0 < quantile < 1:
        raise InvalidInputError(
            f"a bound was asked for from noises of shape {tuple(noises.shape)} at quantile {quantile}; expected at least one "
            "noise, and a quantile between 0 and 1."
        )
    sizes = latent.project(noises).abs().flatten().double()
    sizes = sizes[:: 1 + len(sizes) // 2**20]  # torch.quantile refuses many more
    return round(float(torch.quantile(sizes, quantile)), 3)


def describe_bound(bound: float, latent: LatentShape = FULL, noises: Tensor | None = None) -> dict[str, Any]:
    """Return what a noise bound does, as plain values.

    Returns:
        `prior_cut`: the share of the prior's entries that lies beyond it; with noises (N, H, A) also `noises_cut`, the
        share of theirs, `suggested_bound`, and `noises_norm`, their root mean square (1 is the prior's own).
    """
    told: dict[str, Any] = {"bound": bound, "prior_cut": round(mass_beyond(bound), 4)}
    if noises is not None:
        coefficients = latent.project(noises)
        told["noises_cut"] = round(float((coefficients.abs() > bound).float().mean()), 4)
        told["suggested_bound"] = suggest_bound(noises, latent)
        told["noises_norm"] = round(float(noises.square().mean().sqrt()), 4)
    return told
