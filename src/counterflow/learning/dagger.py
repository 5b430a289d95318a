"""DAgger in noise space (FlowDAgger, arXiv 2607.08877): when an expert takes over, and what is learned from it.

The noise policy drives the frozen prior; where it gets nowhere an expert takes over and acts; the expert's chunks are
inverted exactly into noises; these join the data, and the noise policy goes on learning from all of it. The prior never
changes.

A rule decides who acts. Rules see what is left to do, how far the members of the noise policy disagree, and how long each has
acted; a person with a button is a rule, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from counterflow.checks import COUNT, NOT_NEGATIVE
from counterflow.learning.dsbc import DSBCConfig, NoiseExamples, distil, join
from counterflow.steering.learned import ChunkRegressor


@dataclass(frozen=True)
class Situation:
    """What a rule sees before each decision.

    Attributes:
        remaining: what is left to do, smaller is better (see `counterflow.reasoners.remaining`).
        disagreement: standard deviation between the members of the noise policy, mean over the chunk, units of the noise;
            0 for a single member.
        decisions: how many decisions the one who acts now has made since taking over (or since the episode began).
        expert_acts: whether the expert acts now.
    """

    remaining: float
    disagreement: float
    decisions: int
    expert_acts: bool


class InterventionRule(Protocol):
    """Decides, before each decision, whether the expert acts. One rule serves one episode at a time."""

    def reset(self) -> None:
        """Begin an episode."""
        ...

    def expert_should_act(self, situation: Situation) -> bool:
        """Say who makes the next decision."""
        ...


@dataclass
class Stalled:
    """The expert takes over when nothing has got better for a while, and hands back after a while.

    Attributes:
        patience: decisions without progress after which the expert takes over.
        hold: decisions that the expert makes before handing back.
        margin: by how much `remaining` must fall to count as progress, metres.
    """

    patience: int = 8
    hold: int = 16
    margin: float = 0.01
    _best: float = field(default=float("inf"), init=False)
    _since: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Check the numbers."""
        COUNT.check_all(self, "patience", "hold")
        NOT_NEGATIVE.check_all(self, "margin")

    def reset(self) -> None:
        """Forget the last episode."""
        self._best, self._since = float("inf"), 0

    def expert_should_act(self, situation: Situation) -> bool:
        """Count decisions without progress."""
        if situation.remaining < self._best - self.margin:
            self._best, self._since = situation.remaining, 0
        else:
            self._since += 1
        if situation.expert_acts:
            if situation.decisions < self.hold:
                return True
            self._best, self._since = situation.remaining, 0  # the policy's turn: its progress counts from here
            return False
        return self._since >= self.patience


@dataclass(frozen=True)
class Uncertain:
    """The expert takes over where the members of the noise policy disagree, and hands back after a while.

    Attributes:
        threshold: disagreement above which the expert takes over, units of the noise.
        hold: decisions that the expert makes before handing back.
    """

    threshold: float = 0.5
    hold: int = 16

    def reset(self) -> None:
        """Begin an episode."""

    def expert_should_act(self, situation: Situation) -> bool:
        """Compare with the threshold."""
        if situation.expert_acts and situation.decisions < self.hold:
            return True
        return situation.disagreement > self.threshold


@dataclass(frozen=True)
class ByHand:
    """Whoever watches decides: a function that is asked before each decision, for example whether a key is held."""

    asked: Callable[[], bool] = field(repr=False)

    def reset(self) -> None:
        """Begin an episode."""

    def expert_should_act(self, situation: Situation) -> bool:  # noqa: ARG002 - the person sees more than that
        """Ask."""
        return self.asked()


@dataclass(frozen=True)
class DAggerConfig:
    """Settings of the learning between rounds.

    Attributes:
        distillation: of the first noise policy.
        steps: updates at most in later rounds, which go on from the weights of the last.
        repeat: how often each correction counts beside an example of the first data.

    Raises:
        InvalidInputError: a number is out of range.
    """

    distillation: DSBCConfig = field(default_factory=DSBCConfig)
    steps: int = 2_000
    repeat: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        COUNT.check_all(self, "steps", "repeat")


def learn(
    first: NoiseExamples,
    corrections: list[NoiseExamples],
    config: DAggerConfig,
    *,
    seed: int,
    initial: ChunkRegressor | None = None,
    device: str = "cpu",
) -> ChunkRegressor:
    """Return the next noise policy: from nothing in the first round, from the last one's weights later.

    Raises:
        MismatchError: the data belong to different policies.
        DatasetError: they can't be learned from.
    """
    examples = join([first, *(one for one in corrections for _ in range(config.repeat))])
    if initial is None:
        return distil(examples, config.distillation, seed=seed, device=device)
    warm = replace(config.distillation, steps=config.steps)
    return distil(examples, warm, seed=seed, device=device, initial=initial)
