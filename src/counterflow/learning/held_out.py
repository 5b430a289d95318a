"""What the ensembles that learn from a fixed set of examples share: held-out episodes, the best weights, an early stop.

Every member holds out other episodes and is kept as it was where its own held-out loss was lowest; the training stops when no
member has improved for a while.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from counterflow.errors import DatasetError
from counterflow.random import child_seed


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        step: updates done.
        steps: updates at most.
        loss: mean training loss since the last report.
        held_out_loss: mean over the members of the lowest so far; NaN without held-out episodes.
    """

    step: int
    steps: int
    loss: float
    held_out_loss: float


def hold_out(episodes: npt.NDArray[np.int64], members: int, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Say which examples each member holds out, (M, N): whole episodes, others for each member as far as there are.

    Nothing is held out where there is a single episode, or the fraction is 0.
    """
    held_out = np.zeros((members, len(episodes)), dtype=bool)
    names = np.unique(episodes)
    if fraction == 0 or len(names) < 2:
        return held_out
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    order = np.random.default_rng(child_seed(seed, "held out")).permutation(names)
    for member in range(members):
        chosen = np.take(order, range(member * count, (member + 1) * count), mode="wrap")
        held_out[member] = np.isin(episodes, chosen)
    return held_out


class HeldOut:
    """The examples of each member, and the weights with which it did best on those that it doesn't learn from.

    Args:
        network: the ensemble; every parameter has the members (M, ...) as its first dimension.
        mask: (M, N) which examples each member holds out.
        device: where the network computes.

    Attributes:
        loss: (M,) each member's lowest held-out loss so far.
        any: whether every member holds something out; without that nothing can be judged.
        unimproved: judgements since a member improved.
    """

    def __init__(self, network: nn.Module, mask: npt.NDArray[np.bool_], device: torch.device | str) -> None:
        self.network, self.any, self.unimproved = network, bool(mask.any(1).all()), 0
        self.loss = torch.full((len(mask),), torch.inf, device=device)
        self.mask = torch.from_numpy(mask).to(device)
        # Each member's own examples first, for an even draw from them; how many they are, (M,).
        self._order = torch.from_numpy(np.argsort(mask, axis=1, kind="stable")).to(device)
        self._counts = torch.from_numpy((~mask).sum(1)).to(device)
        self._best = [weight.detach().clone() for weight in network.parameters()]

    def draw(self, batch_size: int, rng: torch.Generator) -> Tensor:
        """Draw (M, B) examples, evenly from those that each member learns from."""
        shape, device = (len(self._order), batch_size), self._order.device
        share = torch.rand(shape, generator=rng, device=device, dtype=torch.float64)
        return self._order.gather(1, (share * self._counts[:, None]).long())

    @torch.no_grad()
    def judge(self, errors: Tensor) -> bool:
        """Keep the weights of members whose mean of `errors` (M, N) over what they hold out improved; return whether any did."""
        losses = (errors * self.mask).sum(1) / self.mask.sum(1)
        improved = losses < self.loss
        self.loss = torch.where(improved, losses, self.loss)
        for best, weight in zip(self._best, self.network.parameters(), strict=True):
            best.copy_(torch.where(improved.view(-1, *[1] * (weight.ndim - 1)), weight, best))
        found = bool(improved.any())
        self.unimproved = 0 if found else self.unimproved + 1
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """Give every member its best weights back."""
        for best, weight in zip(self._best, self.network.parameters(), strict=True):
            weight.copy_(best)


class Stopping(Protocol):
    """The settings of an early stop: updates at most, updates between judgements, judgements to wait for an improvement."""

    @property
    def steps(self) -> int: ...  # noqa: D102

    @property
    def evaluate_every(self) -> int: ...  # noqa: D102

    @property
    def patience(self) -> int: ...  # noqa: D102


def fit(
    update: Callable[[], Tensor],
    evaluate: Callable[[], object],
    held_out: HeldOut,
    stopping: Stopping,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Update until no member improves any more, or the updates are used up; leave every member with its best weights.

    Args:
        update: takes one step and returns the loss () without waiting for the device.
        evaluate: judges the members (see `HeldOut.judge`).
        held_out: of the members.
        stopping: when to judge, and to stop.
        on_progress: told after each judgement.

    Raises:
        DatasetError: the loss is not finite: the examples hold values that no network can learn.
    """
    losses: list[Tensor] = []
    for step in range(1, stopping.steps + 1):
        losses.append(update())
        if step % stopping.evaluate_every and step < stopping.steps:
            continue
        if held_out.any:
            evaluate()
        loss = float(torch.stack(losses).mean())
        losses.clear()
        if not math.isfinite(loss):
            raise DatasetError(
                f"the loss is {loss} at update {step}. Lower the learning rate, or look for extreme values in the data."
            )
        if on_progress is not None:
            best = float(held_out.loss.mean()) if held_out.any else math.nan
            on_progress(Progress(step, stopping.steps, loss, best))
        if held_out.any and held_out.unimproved >= stopping.patience:
            break
    if held_out.any:
        held_out.restore()
