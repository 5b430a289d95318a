"""Success rates with honest intervals: one task, the mean over tasks, the difference of two.

*One task*: the Wilson score interval (Wilson 1927; recommended by Newcombe 1998a). It never leaves [0, 1] and stays
useful at 0 of 50 and 50 of 50, which evaluations of steering meet all the time.

*The mean over tasks* is stratified: p = sum_i p_i / T, each task weighing the same, with the variance of a stratified
mean, V = sum_i p_i (1 - p_i) / n_i / T^2. Its interval is Wilson's at the effective sample size n = p (1 - p) / V, the
number of episodes of a single task that would know p as well; surveys do the same with design effects (Dean and Pagano
2015; Franco, Little, Louis and Slud 2019). Inside V and n, rates are smoothed by half a success and half a failure,
because a task at 0% or 100% would otherwise count as known for certain. For one task it is Wilson's interval itself,
for equal tasks that of their pooled episodes. Simulated with up to 15 tasks of 50 episodes it covers the truth in 94%
to 98% of evaluations, where recovering the variance from the tasks' own Wilson limits (Zou, Huang and Zhang 2009) falls
to 88% when all rates are near 0.

*What training seeds vary* is a cluster sample: episodes of one seed's policy say more of it than of the algorithm.
Its interval is Wilson's at the effective sample size n = p (1 - p) / V, V the larger of what the episodes and what
the seeds' own spread say of the mean, the latter with Student's t of S - 1 degrees in the place of the normal (Korn
and Graubard 1998). In the simulations of its tests (3 or 5 seeds of 50 episodes, true rates around 0.4 to 0.8 that
spread by up to 0.35, or around 0.1 by 0.08) it covers the algorithm's rate in 92% of runs or more, where the pooled
episodes' interval falls below a third. Three seeds that disagree know little, and it says so. Near 0 and 1 three
seeds that agree know little, too, and it does *not* say so: of an algorithm that works with one seed in ten the first
three mostly agree on 0, and around 0.1 with a spread of 0.25 it covers in half of the runs.

*The difference of two* independent rates or means: Newcombe's hybrid score interval (1998b, method 10).

Sources: E. B. Wilson, JASA 22 (1927) 209-212. R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872 (a) and 873-890
(b). N. Dean, M. Pagano, Journal of Survey Statistics and Methodology 3 (2015) 484-503. C. Franco, R. J. A. Little,
T. A. Louis, E. V. Slud, the same 7 (2019) 334-364. G. Y. Zou, W. Huang, X. Zhang, Computational Statistics and Data
Analysis 53 (2009) 1080-1085. E. L. Korn, B. I. Graubard, Survey Methodology 24 (1998) 193-201.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple, Protocol

from scipy.special import stdtrit

from counterflow.checks import COUNT, FRACTION
from counterflow.errors import InvalidInputError

CONFIDENCE = 0.95
"""Probability that an interval covers the true rate, wherever none is named."""


class Interval(NamedTuple):
    """A confidence interval; a pair, so that JSON shows it as [low, high]."""

    low: float
    high: float


class Rate(Protocol):
    """A share of successes in [0, 1] and how well it is known: what tables and figures ask for."""

    @property
    def rate(self) -> float:
        """The estimate, in [0, 1]."""
        ...

    @property
    def interval(self) -> Interval:
        """The 95% interval around it, within [0, 1]."""
        ...


def wilson_interval(successes: int, episodes: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the Wilson score interval of a success rate.

    Args:
        successes: how many episodes succeeded, 0 to `episodes`.
        episodes: how many were run, at least 1.
        confidence: coverage, in (0, 1).

    Returns:
        The interval, within [0, 1], always containing successes / episodes.

    Raises:
        InvalidInputError: a count is not a whole number or out of range, or the confidence is not inside (0, 1).
    """
    successes, episodes = _checked_counts(successes, episodes)
    FRACTION.check("confidence", confidence)
    return _wilson(successes / episodes, episodes, confidence)


@dataclass(frozen=True)
class SuccessRate:
    """How often one task succeeded.

    Attributes:
        successes: how many episodes succeeded.
        episodes: how many were run.

    Raises:
        InvalidInputError: a count is not a whole number, no episode was run, or successes are not in [0, episodes].
    """

    successes: int
    episodes: int

    def __post_init__(self) -> None:
        """Check the counts, and keep them as plain integers (NumPy's are not JSON)."""
        successes, episodes = _checked_counts(self.successes, self.episodes)
        object.__setattr__(self, "successes", successes)
        object.__setattr__(self, "episodes", episodes)

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> SuccessRate:
        """Count the outcomes of episodes, one bool each.

        Raises:
            InvalidInputError: there is no outcome.
        """
        counted = [bool(outcome) for outcome in outcomes]
        return cls(sum(counted), len(counted))

    @property
    def rate(self) -> float:
        """Successes per episode."""
        return self.successes / self.episodes

    @property
    def interval(self) -> Interval:
        """The Wilson 95% interval."""
        return wilson_interval(self.successes, self.episodes)

    def to_json(self) -> dict[str, int | float | list[float]]:
        """Return what result files hold of a task: counts, rate and interval."""
        return {
            "episodes": self.episodes,
            "successes": self.successes,
            "success_rate": self.rate,
            "ci95": list(self.interval),
        }

    def __str__(self) -> str:
        """Write the rate and its interval in percent."""
        return _in_percent(self)


@dataclass(frozen=True)
class MeanRate:
    """The mean of several tasks' success rates, every task weighing the same whatever its number of episodes.

    The interval says how well the mean over *these* tasks is known; it does not speak of tasks that were not run.

    Attributes:
        tasks: the tasks' rates, at least one.

    Raises:
        InvalidInputError: there is no task.
    """

    tasks: tuple[SuccessRate, ...]

    def __post_init__(self) -> None:
        """Check that there is something to average."""
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks:
            raise InvalidInputError("the mean over tasks was asked of no task; expected at least one SuccessRate.")

    @property
    def rate(self) -> float:
        """The mean of the tasks' rates."""
        return math.fsum(task.rate for task in self.tasks) / len(self.tasks)

    @property
    def interval(self) -> Interval:
        """The 95% interval of a stratified mean: Wilson's at the effective sample size (see the module's docstring)."""
        smoothed = [(task.successes + 0.5) / (task.episodes + 1) for task in self.tasks]
        rates = zip(smoothed, self.tasks, strict=True)
        variance = math.fsum(rate * (1 - rate) / task.episodes for rate, task in rates) / len(self.tasks) ** 2
        mean = math.fsum(smoothed) / len(smoothed)
        return _wilson(self.rate, mean * (1 - mean) / variance, CONFIDENCE)

    def to_json(self) -> dict[str, int | float | list[float]]:
        """Return what result files hold of a mean: tasks and episodes behind it, rate and interval."""
        return {
            "tasks": len(self.tasks),
            "episodes": sum(task.episodes for task in self.tasks),
            "success_rate": self.rate,
            "ci95": list(self.interval),
        }

    def __str__(self) -> str:
        """Write the rate and its interval in percent."""
        return _in_percent(self)


@dataclass(frozen=True)
class SeedsRate:
    """How often policies succeed that an algorithm trained from several seeds, each weighing the same.

    The interval speaks of the algorithm, seeds that were not run included. Of one seed nothing is known of the others: its
    interval is that of its episodes.

    Attributes:
        seeds: each seed's rate, at least one.

    Raises:
        InvalidInputError: there is no seed.
    """

    seeds: tuple[SuccessRate, ...]

    def __post_init__(self) -> None:
        """Check that there is something to average."""
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if not self.seeds:
            raise InvalidInputError("the rate of an algorithm was asked of no seed; expected at least one SuccessRate.")

    @property
    def rate(self) -> float:
        """The mean of the seeds' rates."""
        return math.fsum(seed.rate for seed in self.seeds) / len(self.seeds)

    @property
    def successes(self) -> int:
        """Of all seeds."""
        return sum(seed.successes for seed in self.seeds)

    @property
    def episodes(self) -> int:
        """Of all seeds."""
        return sum(seed.episodes for seed in self.seeds)

    @property
    def interval(self) -> Interval:
        """The 95% interval of a cluster sample: Wilson's at the effective sample size (see the module's docstring)."""
        count = len(self.seeds)
        smoothed = (self.successes + 0.5) / (self.episodes + 1)
        # A mean of seeds with unlike numbers of episodes is known as the harmonic mean of these says.
        each = math.fsum(1 / seed.episodes for seed in self.seeds) / count**2
        variance = smoothed * (1 - smoothed) * each
        if count > 1:
            spread = math.fsum((seed.rate - self.rate) ** 2 for seed in self.seeds) / (count - 1)
            wider = stdtrit(count - 1, 0.5 + CONFIDENCE / 2) / NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
            variance = max(variance, wider**2 * spread / count)
        return _wilson(self.rate, smoothed * (1 - smoothed) / variance, CONFIDENCE)

    def to_json(self) -> dict[str, int | float | list[float]]:
        """Return what result files hold: counts of all seeds, the mean rate and its interval, and each seed's rate."""
        return {
            "episodes": self.episodes,
            "successes": self.successes,
            "success_rate": self.rate,
            "ci95": list(self.interval),
            "each": [seed.rate for seed in self.seeds],
        }

    def __str__(self) -> str:
        """Write the rate and its interval in percent."""
        return _in_percent(self)


@dataclass(frozen=True)
class Difference:
    """How much more often the first succeeds than the second: Newcombe's hybrid score interval.

    The two are taken as independent. Evaluations that share their seeds are usually positively correlated, and then the
    interval is on the safe side: wider than it need be.

    Attributes:
        first: a task's rate, or a mean over tasks.
        second: what it is compared with.
    """

    first: Rate
    second: Rate

    @property
    def value(self) -> float:
        """The first rate minus the second, in [-1, 1]."""
        return self.first.rate - self.second.rate

    @property
    def interval(self) -> Interval:
        """The 95% interval, within [-1, 1]; where it holds no 0 the two differ."""
        below = math.hypot(self.first.rate - self.first.interval.low, self.second.interval.high - self.second.rate)
        above = math.hypot(self.first.interval.high - self.first.rate, self.second.rate - self.second.interval.low)
        return Interval(max(-1.0, self.value - below), min(1.0, self.value + above))

    def to_json(self) -> dict[str, float | list[float]]:
        """Return what result files hold of a comparison."""
        return {"difference": self.value, "ci95": list(self.interval)}

    def __str__(self) -> str:
        """Write the difference and its interval in percentage points, with signs."""
        low, high = self.interval
        return f"{100 * self.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def tells(base: SuccessRate) -> bool:
    """Say whether so many episodes would tell a policy that never succeeds from the base (of 20 or more it takes five)."""
    return Difference(SuccessRate(0, base.episodes), base).interval.high < 0


def _wilson(rate: float, episodes: float, confidence: float) -> Interval:
    """Wilson's interval; `episodes` may be an effective, fractional number."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (rate * episodes + z * z / 2) / (episodes + z * z)
    spread = z * math.sqrt(episodes * rate * (1 - rate) + z * z / 4) / (episodes + z * z)
    # At 0 and at 1 one limit is the rate itself; rounding must not push it past.
    return Interval(max(0.0, min(rate, centre - spread)), min(1.0, max(rate, centre + spread)))


def _in_percent(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.rate:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _checked_counts(successes: int, episodes: int) -> tuple[int, int]:
    try:
        successes, episodes = operator.index(successes), operator.index(episodes)
    except TypeError:
        raise InvalidInputError(
            f"successes and episodes are {successes!r} and {episodes!r}; expected whole numbers, not rates."
        ) from None
    COUNT.check("episodes", episodes, "Nothing is known without an episode.")
    if not 0 <= successes <= episodes:
        raise InvalidInputError(f"successes is {successes} of {episodes} episodes; expected 0 to {episodes}.")
    return successes, episodes
