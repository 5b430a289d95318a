"""Intervals against published tables, and the properties that any of them must have."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import InvalidInputError
from counterflow.experiments.statistics import Difference, MeanRate, SeedsRate, SuccessRate, tells, wilson_interval


@st.composite
def success_rates(draw: st.DrawFn, most: int = 400) -> SuccessRate:
    episodes = draw(st.integers(1, most))
    return SuccessRate(draw(st.integers(0, episodes)), episodes)


# Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3 (score).
@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_matches_the_published_table(successes: int, episodes: int, low: float, high: float) -> None:
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=5e-5)


# Newcombe, Statistics in Medicine 17 (1998) 873-890, table II, method 10 (score).
@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_difference_matches_the_published_table(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    difference = Difference(SuccessRate(*first), SuccessRate(*second))
    assert difference.interval == pytest.approx((low, high), abs=5e-5)
    assert difference.value == pytest.approx(first[0] / first[1] - second[0] / second[1])


@given(success_rates(), st.floats(0.01, 0.999))
def test_wilson_interval_contains_the_rate_within_zero_and_one(rate: SuccessRate, confidence: float) -> None:
    low, high = wilson_interval(rate.successes, rate.episodes, confidence)
    assert 0 <= low <= rate.rate <= high <= 1
    assert low < high


@given(success_rates())
def test_wilson_interval_is_symmetric_in_success_and_failure(rate: SuccessRate) -> None:
    low, high = rate.interval
    mirrored = wilson_interval(rate.episodes - rate.successes, rate.episodes)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(success_rates(), st.integers(2, 50))
def test_wilson_interval_shrinks_with_more_episodes(rate: SuccessRate, times: int) -> None:
    few, many = rate.interval, wilson_interval(rate.successes * times, rate.episodes * times)
    assert many.high - many.low < few.high - few.low


@given(success_rates(), st.floats(0.1, 0.9))
def test_wilson_interval_grows_with_confidence(rate: SuccessRate, confidence: float) -> None:
    narrow = wilson_interval(rate.successes, rate.episodes, confidence)
    wide = wilson_interval(rate.successes, rate.episodes, confidence + 0.09)
    assert wide.low <= narrow.low <= narrow.high <= wide.high
    assert wide.high - wide.low > narrow.high - narrow.low


@given(success_rates())
def test_the_mean_of_one_task_is_the_task(rate: SuccessRate) -> None:
    mean = MeanRate((rate,))
    assert mean.rate == rate.rate
    assert mean.interval == pytest.approx(rate.interval, abs=1e-12)


@given(st.lists(success_rates(), min_size=1, max_size=15))
def test_the_mean_lies_in_its_interval_within_zero_and_one(rates: list[SuccessRate]) -> None:
    mean = MeanRate(tuple(rates))
    assert 0 <= mean.interval.low <= mean.rate <= mean.interval.high <= 1
    assert mean.rate == pytest.approx(np.mean([rate.rate for rate in rates]))


@given(success_rates(), st.integers(2, 20))
def test_the_mean_of_equal_tasks_is_known_as_well_as_their_pooled_episodes(rate: SuccessRate, tasks: int) -> None:
    pooled = wilson_interval(rate.successes * tasks, rate.episodes * tasks)
    assert MeanRate((rate,) * tasks).interval == pytest.approx(pooled, abs=1e-9)


def test_tasks_that_differ_are_known_better_than_their_pooled_episodes() -> None:
    mean = MeanRate((SuccessRate(2, 50), SuccessRate(48, 50)))
    pooled = wilson_interval(50, 100)
    assert mean.interval.high - mean.interval.low < 0.7 * (pooled.high - pooled.low)


def test_tasks_without_a_single_success_are_not_known_for_certain() -> None:
    assert MeanRate((SuccessRate(0, 50), SuccessRate(50, 50))).interval.high > 0.51


def test_every_task_weighs_the_same_whatever_its_episodes() -> None:
    assert MeanRate((SuccessRate(0, 10), SuccessRate(1000, 1000))).rate == 0.5


@given(success_rates(), success_rates())
def test_a_difference_changes_sign_with_its_order(first: SuccessRate, second: SuccessRate) -> None:
    forward, backward = Difference(first, second), Difference(second, first)
    assert -1 <= forward.interval.low <= forward.value <= forward.interval.high <= 1
    assert backward.interval == pytest.approx((-forward.interval.high, -forward.interval.low), abs=1e-12)


TRUTHS = [
    (0.02, 0.1, 0.5, 0.9, 1.0),
    (0.5, 0.5, 0.5),
    (0.05,) * 4,
    (0.02,) * 15,
    (0.98,) * 5,
    (0.0,) * 14 + (0.3,),
    (0.9, 0.2),
]


@pytest.mark.parametrize("truth", TRUTHS)
def test_the_mean_is_covered_about_as_often_as_promised(truth: tuple[float, ...]) -> None:
    rng = np.random.default_rng(7)
    table = [SuccessRate(successes, 50) for successes in range(51)]
    draws = rng.binomial(50, truth, size=(3000, len(truth)))
    intervals = [MeanRate(tuple(table[successes] for successes in row)).interval for row in draws]
    covered = np.mean([low <= np.mean(truth) <= high for low, high in intervals])
    assert 0.94 <= covered <= 0.985


@given(success_rates())
def test_an_algorithm_of_one_seed_is_known_as_its_episodes_are(rate: SuccessRate) -> None:
    assert SeedsRate((rate,)).interval == pytest.approx(rate.interval)


@given(st.lists(success_rates(), min_size=1, max_size=5))
def test_an_algorithms_rate_lies_in_its_interval_within_zero_and_one(rates: list[SuccessRate]) -> None:
    found = SeedsRate(tuple(rates))
    assert 0 <= found.interval.low <= found.rate <= found.interval.high <= 1


def test_seeds_that_agree_are_known_as_their_pooled_episodes_and_seeds_that_differ_are_not() -> None:
    agreeing, pooled = SeedsRate((SuccessRate(20, 50),) * 3), SuccessRate(60, 150)
    assert agreeing.interval == pytest.approx(pooled.interval)
    low, high = SeedsRate((SuccessRate(21, 50), SuccessRate(1, 50), SuccessRate(36, 50))).interval
    assert low < 0.05
    assert high > 0.85


@pytest.mark.parametrize(
    ("mean", "spread", "seeds", "least"),
    [
        (0.5, 0.0, 3, 0.92),
        (0.5, 0.1, 3, 0.92),
        (0.5, 0.25, 3, 0.92),
        (0.8, 0.15, 5, 0.92),
        (0.1, 0.08, 3, 0.92),
        (0.4, 0.35, 5, 0.92),
        (0.1, 0.25, 3, 0.4),  # most seeds have nothing, and agree on it
    ],
)
def test_an_algorithms_rate_is_covered_about_as_often_as_the_docstring_says(
    mean: float, spread: float, seeds: int, least: float
) -> None:
    rng = np.random.default_rng(9)
    if spread:
        strength = mean * (1 - mean) / spread**2 - 1
        truth = rng.beta(mean * strength, (1 - mean) * strength, (2000, seeds))
    else:
        truth = np.full((2000, seeds), mean)
    table = [SuccessRate(successes, 50) for successes in range(51)]
    rates = [SeedsRate(tuple(table[successes] for successes in row)) for row in rng.binomial(50, truth)]
    covered = np.mean([rate.interval.low <= mean <= rate.interval.high for rate in rates])
    assert least <= covered
    assert covered < 0.6 or least > 0.9
    pooled = [SuccessRate(rate.successes, rate.episodes).interval for rate in rates]
    assert (np.mean([low <= mean <= high for low, high in pooled]) < 1 / 3) == (spread > 0.3 or least < 0.9)


def test_the_difference_of_means_is_covered_about_as_often_as_promised() -> None:
    rng = np.random.default_rng(8)
    truth = np.array([[0.9, 1.0, 0.6, 0.95, 0.8], [0.25, 0.0, 0.0, 0.1, 0.4]])
    draws = rng.binomial(50, truth, size=(2000, 2, 5))
    differences = [
        Difference(*(MeanRate(tuple(SuccessRate(int(k), 50) for k in row)) for row in pair)) for pair in draws
    ]
    expected = truth[0].mean() - truth[1].mean()
    covered = np.mean([low <= expected <= high for low, high in (each.interval for each in differences)])
    assert 0.94 <= covered <= 0.985


def test_the_difference_is_covered_about_as_often_as_promised() -> None:
    # Exactly, by summing the probabilities of every outcome of 30 and 30 episodes.
    probabilities = {
        rate: [math.comb(30, k) * rate**k * (1 - rate) ** (30 - k) for k in range(31)] for rate in (0.3, 0.8)
    }
    covered = 0.0
    for first, second in itertools.product(range(31), repeat=2):
        low, high = Difference(SuccessRate(first, 30), SuccessRate(second, 30)).interval
        covered += probabilities[0.8][first] * probabilities[0.3][second] * (low <= 0.5 <= high)
    assert 0.94 <= covered <= 0.97


@pytest.mark.parametrize(
    ("successes", "episodes", "message"),
    [
        (3, 2, "successes is 3 of 2"),
        (-1, 2, "successes is -1"),
        (0, 0, "episodes is 0"),
        (0, -4, "episodes is -4"),
        (0.5, 2, "whole numbers"),
        (1, None, "whole numbers"),
    ],
)
def test_impossible_counts_are_refused(successes: int, episodes: int, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        SuccessRate(successes, episodes)
    with pytest.raises(InvalidInputError, match=message):
        wilson_interval(successes, episodes)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 95, math.nan])
def test_impossible_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(InvalidInputError, match="confidence"):
        wilson_interval(1, 2, confidence)


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no task"):
        MeanRate(())
    with pytest.raises(InvalidInputError, match="no seed"):
        SeedsRate(())
    with pytest.raises(InvalidInputError, match="episodes is 0"):
        SuccessRate.of([])


def test_results_are_written_as_json_and_as_text() -> None:
    rate = SuccessRate.of(np.array([True, False, True, True]))
    assert rate == SuccessRate(3, 4)
    counts: Any = np.array([81, 263])
    written = json.loads(json.dumps(SuccessRate(*counts).to_json()))
    assert (written["successes"], written["episodes"]) == (81, 263)
    assert written["success_rate"] == 81 / 263
    assert written["ci95"] == pytest.approx([0.2553, 0.3662], abs=5e-5)
    mean = MeanRate((rate, rate))
    assert (mean.to_json()["tasks"], mean.to_json()["episodes"]) == (2, 8)
    assert mean.to_json()["ci95"] == list(mean.interval)
    several = SeedsRate((rate, SuccessRate(0, 4)))
    written = json.loads(json.dumps(several.to_json()))
    assert (written["successes"], written["episodes"], written["each"]) == (3, 8, [0.75, 0.0])
    assert (written["success_rate"], written["ci95"]) == (0.375, list(several.interval))
    assert str(SuccessRate(81, 263)) == "30.8% [25.5, 36.6]"
    difference = Difference(SuccessRate(56, 70), SuccessRate(48, 80))
    assert str(difference) == "+20.0 [+5.2, +33.4]"
    assert json.loads(json.dumps(difference.to_json()))["ci95"] == pytest.approx([0.0524, 0.3339], abs=5e-5)


@pytest.mark.parametrize(
    ("successes", "episodes", "told"), [(1, 20, False), (4, 20, False), (5, 20, True), (1, 1, False)]
)
def test_a_base_that_hardly_succeeds_tells_nothing(successes: int, episodes: int, told: bool) -> None:
    assert tells(SuccessRate(successes, episodes)) == told
