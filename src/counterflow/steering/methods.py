"""The five zero-shot ways to use a reference, by name: what the command line and the benchmarks compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from counterflow.errors import MismatchError, UnknownNameError
from counterflow.policies import BasePolicy
from counterflow.steering.edit import ExecuteReference, NearestToReference
from counterflow.steering.latent import LatentKind, LatentShape
from counterflow.steering.start import FlowReversal, Padding, PartialNoising
from counterflow.steering.steered import SteeredPolicy, check_steps

MethodName = Literal["base", "direct", "frs", "partial", "rank"]


@dataclass(frozen=True)
class MethodSettings:
    """The settings of all methods; each reads its own.

    Attributes:
        steps: denoising steps of base, direct (where nobody speaks), partial (scaled by 1 - tau) and rank.
        reversal_steps: K of FRS, back and forth.
        perturbation: of FRS, standard deviation of the noise added to the reversed noise.
        tau: of partial noising.
        candidates: n of sample-and-rank.
        distance: of sample-and-rank, "cosine" or "l2".
        padding: of FRS, what becomes of padded dimensions: "fresh", "held" or "reversed".
        latent: of FRS, the shape of the noise that is executed: "full", "low_rank" or "repeated".
        latent_rank: of "low_rank".
    """

    steps: int = 10
    reversal_steps: int = 5
    perturbation: float = 0.0
    tau: float = 0.5
    candidates: int = 16
    distance: Literal["cosine", "l2"] = "cosine"
    padding: Padding = "fresh"
    latent: LatentKind = "full"
    latent_rank: int = 2


def steer(base: BasePolicy, method: str, settings: MethodSettings | None = None) -> SteeredPolicy:
    """Return `base` steered by the method called `method`.

    Raises:
        UnknownNameError: no such method.
        InvalidInputError: a setting is out of range.
        MismatchError: the policy has no flow to steer (`FlowPolicy.has_flow`).
    """
    settings = MethodSettings() if settings is None else settings
    if not getattr(base, "has_flow", True):
        if method != "base":
            raise MismatchError(
                f"{method!r} was asked of a policy that makes its chunk in a single step; there is no flow on which it could be "
                "steered. Use 'base', or a policy that denoises."
            )
        return SteeredPolicy(base, steps=1)
    if method == "base":
        return SteeredPolicy(base, steps=settings.steps)
    if method == "direct":
        return SteeredPolicy(base, edit=ExecuteReference(), steps=settings.steps)
    if method == "frs":
        start = FlowReversal(
            settings.reversal_steps,
            perturbation=settings.perturbation,
            padding=settings.padding,
            latent=LatentShape(settings.latent, settings.latent_rank),
        )
        return SteeredPolicy(base, start=start, steps=settings.reversal_steps)
    if method == "partial":
        noising = PartialNoising(settings.tau)
        # The paper denoises from tau = 0.5 with half of its ten steps: the same step size as from t = 0.
        return SteeredPolicy(base, start=noising, steps=max(1, round(check_steps(settings.steps) * (1 - settings.tau))))
    if method == "rank":
        edit = NearestToReference(settings.candidates, settings.distance)
        return SteeredPolicy(base, edit=edit, steps=settings.steps)
    raise UnknownNameError("steering method", method, get_args(MethodName))
