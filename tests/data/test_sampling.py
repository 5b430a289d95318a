"""Chunks never cross an episode's end, whatever the episodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.data import ChunkSampler, EpisodeDataset
from counterflow.errors import DatasetError, InvalidInputError, UnknownNameError


def numbered(lengths: list[int]) -> EpisodeDataset:
    """Return episodes whose actions say (episode, step) and whose observations say the step."""
    episode = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    actions = np.stack([episode, step], axis=1).astype(np.float32)
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    return EpisodeDataset({"observations": actions * 1.0, "actions": actions}, starts, np.array(lengths, np.int64))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda lengths: max(lengths) >= 3),
    horizon=st.integers(1, 3),
    weighting=st.sampled_from(["windows", "episodes"]),
    seed=st.integers(0, 100),
)
@pytest.mark.filterwarnings("ignore:.*shorter than the horizon")
def test_a_chunk_stays_in_its_episode(lengths: list[int], horizon: int, weighting: str, seed: int) -> None:
    sampler = ChunkSampler(numbered(lengths), horizon, weighting=weighting)  # type: ignore[arg-type]
    batch = sampler.sample(64, torch.Generator().manual_seed(seed))
    assert batch.actions.shape == (64, horizon, 2)
    assert torch.equal(batch.observations, batch.actions[:, 0])
    assert (batch.actions[..., 0] == batch.actions[:, :1, 0]).all()
    assert (batch.actions[..., 1].diff(dim=1) == 1).all()


@given(lengths=st.lists(st.integers(3, 9), min_size=1, max_size=5), batch_size=st.integers(1, 20))
def test_a_pass_visits_every_window_once(lengths: list[int], batch_size: int) -> None:
    sampler = ChunkSampler(numbered(lengths), 3)
    seen = torch.cat([batch.observations for batch in sampler.ordered(batch_size)])
    expected = [(episode, step) for episode, length in enumerate(lengths) for step in range(length - 2)]
    assert [tuple(map(int, row)) for row in seen] == expected
    assert sampler.num_windows == len(expected)


def test_episodes_weighed_alike_and_windows_weighed_alike() -> None:
    dataset, rng = numbered([3, 30]), torch.Generator().manual_seed(0)
    short = {
        weighting: (ChunkSampler(dataset, 3, weighting=weighting).sample(4000, rng).actions[:, 0, 0] == 0)
        .float()
        .mean()  # type: ignore[arg-type]
        for weighting in ("windows", "episodes")
    }
    assert short["windows"].item() == pytest.approx(1 / 29, abs=0.01)
    assert short["episodes"].item() == pytest.approx(1 / 2, abs=0.03)


def test_only_the_datasets_own_episodes_are_drawn() -> None:
    """A split shares its arrays with the other part."""
    first, second = numbered([4] * 10).split(0.3)
    rng = torch.Generator().manual_seed(0)
    drawn = [set(ChunkSampler(part, 2).sample(500, rng).actions[:, 0, 0].tolist()) for part in (first, second)]
    assert len(drawn[0]) == 7
    assert len(drawn[1]) == 3
    assert not drawn[0] & drawn[1]


def test_a_limit_spreads_evenly() -> None:
    steps = torch.cat([batch.observations[:, 1] for batch in ChunkSampler(numbered([101]), 2).ordered(3, limit=10)])
    assert steps.tolist() == list(range(0, 100, 10))


def test_short_episodes_are_left_out_aloud() -> None:
    with pytest.warns(UserWarning, match="1 of 2 episodes are shorter than the horizon of 5"):
        sampler = ChunkSampler(numbered([3, 8]), 5)
    assert sampler.num_left_out == 1


def test_bad_input() -> None:
    dataset = numbered([4])
    with pytest.raises(DatasetError, match="horizon is 5 and the longest"):
        ChunkSampler(dataset, 5)
    with pytest.raises(InvalidInputError, match="horizon is 0"):
        ChunkSampler(dataset, 0)
    with pytest.raises(UnknownNameError, match="windows"):
        ChunkSampler(dataset, 2, weighting="window")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="batch_size is 0"):
        ChunkSampler(dataset, 2).sample(0, torch.Generator())
    with pytest.raises(InvalidInputError, match="limit is 0"):
        ChunkSampler(dataset, 2).ordered(1, limit=0)
