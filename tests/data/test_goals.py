"""Goals are drawn where OGBench draws them, and rewarded as it rewards them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.data import ACTOR_GOALS, VALUE_GOALS, GoalSampler, GoalShares, TransitionDataset
from counterflow.errors import DatasetError, InvalidInputError


def transitions(lengths: list[int]) -> TransitionDataset:
    """Return episodes whose observations are their rows; the rewards would give themselves away."""
    rows = np.arange(sum(lengths), dtype=np.float32)[:, None]
    terminals = np.zeros(len(rows))
    terminals[np.cumsum(lengths) - 1] = 1
    sevens = np.full(len(rows), 7.0)
    return TransitionDataset(rows, rows + 100, rows + 1, sevens, np.zeros(len(rows)), terminals)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    horizon=st.integers(1, 5),
    discount=st.sampled_from([0.5, 0.99]),
)
@pytest.mark.filterwarnings("ignore:.*shorter than the horizon")
def test_rewards_and_masks_for_every_start_and_goal(lengths: list[int], horizon: int, discount: float) -> None:
    data = transitions([*lengths, 5])
    total = data.num_transitions
    sampler = GoalSampler(data, horizon, discount=discount)
    starts, goals = torch.arange(total)[:, None].expand(total, total), torch.arange(total).expand(total, total)
    chunks = sampler.chunks(starts, goals)
    for start in range(total):
        last = next(row for row in range(start, total) if data.terminals[row])
        for goal in range(total):
            reward, reached = 0.0, False
            for step in range(horizon):
                if start + step > last:
                    break
                reached = reached or start + step == goal
                reward -= 0.0 if reached else discount**step
            end = min(start + horizon - 1, last)
            assert chunks.rewards[start, goal].item() == pytest.approx(reward, abs=1e-5)
            assert chunks.masks[start, goal] == 1 - reached
            assert chunks.observations[start, goal].tolist() == [start, goal]
            assert chunks.next_observations[start, goal].tolist() == [end + 1, goal]
            assert chunks.valid[start, goal] == (start + horizon - 1 <= last)


def test_single_transitions_are_rewarded_as_in_ogbench() -> None:
    sampler = GoalSampler(transitions([6, 4]), 1)
    rng = torch.Generator().manual_seed(0)
    starts = sampler.draw(500, rng)
    goals = sampler.goals(starts, VALUE_GOALS, rng)
    chunks, success = sampler.chunks(starts, goals), (starts == goals).float()
    assert torch.equal(chunks.rewards, success - 1)
    assert torch.equal(chunks.masks, 1 - success)
    assert torch.equal(chunks.actions[:, 0, 0], starts + 100.0)
    assert 0 < success.mean() < 1


def test_the_shares_of_value_goals() -> None:
    sampler = GoalSampler(transitions([1000, 1000]), 1, discount=0.9)
    starts = torch.full((20_000,), 100)
    goals = sampler.goals(starts, VALUE_GOALS, torch.Generator().manual_seed(0))
    ahead = goals - starts
    assert (ahead == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert (goals >= 1000).float().mean().item() == pytest.approx(0.15, abs=0.01)  # random ones of the other episode
    near = ahead[(ahead > 0) & (ahead <= 100)]
    assert len(near) / 20_000 == pytest.approx(0.5 + 0.3 * 100 / 2000, abs=0.01)


def test_geometric_goals_follow_their_distribution() -> None:
    sampler = GoalSampler(transitions([500]), 1, discount=0.9)
    starts = torch.zeros(50_000, dtype=torch.int64)
    shares = GoalShares(current=0, trajectory=1, random=0, geometric=True)
    goals = sampler.goals(starts, shares, torch.Generator().manual_seed(1))
    assert goals.min() == 1
    for steps in (1, 2, 5, 20):
        assert (goals == steps).float().mean().item() == pytest.approx(0.1 * 0.9 ** (steps - 1), abs=0.006)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), geometric=st.booleans(), seed=st.integers(0, 99))
def test_goals_of_the_trajectory_lie_ahead_in_the_episode(lengths: list[int], geometric: bool, seed: int) -> None:
    data = transitions(lengths)
    sampler = GoalSampler(data, 1)
    starts = torch.arange(data.num_transitions).expand(4, -1)
    shares = GoalShares(current=0, trajectory=1, random=0, geometric=geometric)
    goals = sampler.goals(starts, shares, torch.Generator().manual_seed(seed))
    lasts = torch.from_numpy(np.repeat(data.lasts, data.lengths)).expand(4, -1)
    assert goals.shape == starts.shape
    assert (goals <= lasts).all()
    assert (goals >= torch.minimum(starts + 1, lasts)).all()


def test_actor_goals_are_spread_over_what_is_left_of_the_episode() -> None:
    sampler = GoalSampler(transitions([12, 5]), 1)
    starts = torch.full((40_000,), 1)
    counts = torch.bincount(sampler.goals(starts, ACTOR_GOALS, torch.Generator().manual_seed(0)), minlength=17)
    # OGBench rounds a uniform number from 2 to 11, so the two ends get half of what the others get.
    np.testing.assert_allclose(counts / 40_000, [0, 0, 1 / 18, *[1 / 9] * 8, 1 / 18, *[0] * 5], atol=0.01)


def test_settings_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="1 in all"):
        GoalShares(current=0.5, trajectory=0.6, random=0.0, geometric=True)
    with pytest.raises(InvalidInputError, match="none below 0"):
        GoalShares(current=-0.5, trajectory=1.5, random=0.0, geometric=True)
    with pytest.raises(InvalidInputError, match="discount is 1"):
        GoalSampler(transitions([4]), 1, discount=1.0)
    with pytest.raises(DatasetError, match="horizon is 5"):
        GoalSampler(transitions([4]), 5)
