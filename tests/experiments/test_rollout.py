"""Episodes in many environments at once: each depends on its seed alone, and its reasoner on it alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from counterflow.envs import VectorEnv, make_env
from counterflow.errors import InvalidInputError
from counterflow.experiments.evaluate import load_prior
from counterflow.experiments.rollout import Episode, run_episodes
from counterflow.random import child_seed
from counterflow.reasoners import Direction, View, scripted_reasoner
from counterflow.steering import steer

TASK = "ogbench/cube-single-task1"


@pytest.fixture(scope="module")
def env() -> Iterator[VectorEnv]:
    with make_env(TASK, 3, workers=0) as made:
        yield made


def run(env: VectorEnv, seeds: list[int], method: str = "rank", **changes: Any) -> list[Episode]:
    changes = {"make_reasoner": lambda: scripted_reasoner(TASK), "max_chunks": 6, **changes}
    return run_episodes(steer(load_prior(TASK), method), env, seeds, **changes)


def numbers(episode: Episode) -> list[float]:
    return [episode.rewards, episode.agreement, episode.round_trip_error, episode.noise_percentile]


class TestRows:
    def test_the_same_seeds_give_the_same_episodes_to_the_last_bit(self, env: VectorEnv) -> None:
        assert run(env, [1, 2, 3, 4]) == run(env, [1, 2, 3, 4])
        assert numbers(run(env, [1])[0]) != numbers(run(env, [2])[0])

    def test_an_episode_does_not_depend_on_its_neighbours_nor_its_row(self, env: VectorEnv) -> None:
        """To rounding: matrix products of another batch may sum in another order."""
        expected = run(env, [5])[0]
        for seeds in ([5, 1, 2], [1, 2, 5], [3, 1, 2, 4, 5]):
            found = run(env, seeds)[seeds.index(5)]
            assert (found.seed, found.success, found.steps) == (5, expected.success, expected.steps)
            np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-4)

    def test_rows_that_finish_take_the_next_and_order_is_kept(self, env: VectorEnv) -> None:
        told: list[Episode] = []
        episodes = run(env, [7, 6, 5, 4, 3, 2, 1], max_chunks=2, on_episode=told.append)
        assert [episode.seed for episode in episodes] == [7, 6, 5, 4, 3, 2, 1]
        assert [(episode.steps, episode.chunks) for episode in episodes] == [(10, 2)] * 7
        assert sorted(id(one) for one in told) == sorted(id(one) for one in episodes)


class TestReasoners:
    def test_each_row_has_its_own_reset_with_the_episodes_seed_and_asked_once_a_chunk(self, env: VectorEnv) -> None:
        made: list[Any] = []

        class Recording:
            def __init__(self) -> None:
                self.heard: list[tuple[str, Any]] = []
                made.append(self)

            def reset(self, seed: int) -> None:
                self.heard.append(("reset", seed))

            def decide(self, view: View) -> Direction:
                self.heard.append(("asked", view["proprio/effector_pos"].shape))
                return Direction((0, 0, 1))

        episodes = run(env, [1, 2, 3, 4], make_reasoner=Recording, max_chunks=3)
        assert [episode.queries for episode in episodes] == [3] * 4
        heard = [reasoner.heard for reasoner in made if reasoner.heard]
        assert len(heard) == 3
        resets = [what for one in heard for what in one if what[0] == "reset"]
        assert sorted(seed for _, seed in resets) == sorted(child_seed(seed, "reasoner") for seed in (1, 2, 3, 4))
        assert sorted(len(one) for one in heard) == [4, 4, 8]
        assert all(one[0][0] == "reset" and {what for _, what in one[1:4]} == {(3,)} for one in heard)

    def test_what_is_asked_for_is_executed(self, env: VectorEnv) -> None:
        class Up:
            def reset(self, seed: int) -> None: ...

            def decide(self, view: View) -> Direction:
                heights.append(float(view["proprio/effector_pos"][2]))
                return Direction((0, 0, 1), gripper="open")

        heights: list[float] = []
        episode = run(env, [1], "direct", make_reasoner=Up, max_chunks=3)[0]
        assert heights[0] < heights[1] < heights[2]
        assert heights[2] > heights[0] + 0.03
        assert episode.agreement == pytest.approx(1.0)
        assert episode.round_trip_error == pytest.approx(0.0, abs=1e-6)

    def test_who_defers_leaves_the_base_as_it_is(self, env: VectorEnv) -> None:
        class Silent:
            def reset(self, seed: int) -> None: ...

            def decide(self, view: View) -> Direction:
                return Direction(defer=True)

        silent = run(env, [1, 2], "direct", make_reasoner=Silent)
        alone = run(env, [1, 2], "base", make_reasoner=None)
        assert [one.rewards for one in silent] == [one.rewards for one in alone]
        assert [one.noise_percentile for one in silent] == [one.noise_percentile for one in alone]
        assert np.isnan([one.agreement for one in silent]).all()
        assert [one.queries for one in alone] == [0, 0]


@pytest.mark.parametrize(
    ("seeds", "changes", "message"),
    [([], {}, "no episodes"), ([1], {"max_chunks": 0}, "max_chunks is 0"), ([-1], {}, "seed is -1")],
)
def test_bad_input(env: VectorEnv, seeds: list[int], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        run(env, seeds, **changes)
