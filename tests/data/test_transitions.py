"""Windows and chunks against plain loops that say what the official samplers do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.data import EpisodeDataset, TransitionDataset, WindowSampler
from counterflow.errors import DatasetError, InvalidInputError, UnknownNameError

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def transitions(lengths: list[int], seed: int = 0) -> TransitionDataset:
    """Return episodes whose observations are (episode, step), with random rewards and masks."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    observations = np.stack([episode, step], 1).astype(np.float32)
    terminals = np.zeros(total, np.float32)
    terminals[np.cumsum(lengths) - 1] = 1
    return TransitionDataset(
        observations=observations,
        actions=rng.normal(size=(total, 3)),
        next_observations=observations + np.array([0, 1]),
        rewards=rng.normal(size=total),
        masks=rng.integers(0, 2, total),
        terminals=terminals,
    )


def official_chunk(data: TransitionDataset, start: int, horizon: int, discount: float) -> dict[str, np.ndarray]:
    """Say in a plain loop what QGF's `sample_sequence` and `get_flat_batch` make of one start."""
    reward, mask, ended, valid = 0.0, 1.0, 0.0, 1.0
    following = data.next_observations[start]
    for step in range(horizon):
        row = start + step
        if step == 0:
            reward, mask = data.rewards[row], data.masks[row]
        else:
            valid = 1.0 - ended
            reward = reward + data.rewards[row] * discount**step * valid
            mask = min(mask, data.masks[row]) * valid + mask * (1.0 - valid)
            following = data.next_observations[row] * valid + following * (1.0 - valid)
        ended = max(ended, data.terminals[row])
    return {
        "observations": data.observations[start],
        "actions": data.actions[start : start + horizon],
        "next_observations": following,
        "rewards": np.asarray(reward),
        "masks": np.asarray(mask),
        "valid": np.asarray(valid),
    }


@given(
    lengths=LENGTHS, horizon=st.integers(1, 6), discount=st.sampled_from([0.0, 0.5, 0.99, 1.0]), seed=st.integers(0, 99)
)
@pytest.mark.filterwarnings("ignore:.*shorter than the horizon")
def test_chunks_are_qgfs_whatever_the_start(lengths: list[int], horizon: int, discount: float, seed: int) -> None:
    data = transitions([*lengths, 6], seed)
    sampler = WindowSampler(data, horizon)
    starts = torch.arange(data.num_transitions - horizon + 1)
    chunks = sampler.chunks(starts, discount)
    for row, start in enumerate(starts.tolist()):
        for name, expected in official_chunk(data, start, horizon, discount).items():
            np.testing.assert_allclose(getattr(chunks, name)[row].numpy(), expected, atol=1e-5, err_msg=name)


@given(lengths=LENGTHS, horizon=st.integers(1, 6), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:.*shorter than the horizon")
def test_windows_are_rqls_whatever_the_start(lengths: list[int], horizon: int, seed: int) -> None:
    data = transitions([*lengths, 6], seed)
    starts = torch.arange(data.num_transitions)
    windows = WindowSampler(data, horizon, weighting="episodes").windows(starts)
    for start in starts.tolist():
        last = next(row for row in range(start, data.num_transitions) if data.terminals[row])
        rows = [min(start + step, last) for step in range(horizon + 1)]
        for name in ("observations", "actions", "rewards", "terminals", "masks"):
            np.testing.assert_array_equal(
                getattr(windows, name)[start].numpy(), getattr(data, name)[rows], err_msg=name
            )


@given(lengths=LENGTHS, horizon=st.integers(1, 6), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:.*shorter than the horizon")
def test_what_is_drawn_stays_in_its_episode(lengths: list[int], horizon: int, seed: int) -> None:
    data = transitions([*lengths, 6])
    rng = torch.Generator().manual_seed(seed)
    whole = WindowSampler(data, horizon, weighting="windows")
    starts = whole.draw(64, rng)
    assert whole.chunks(starts, 0.9).valid.all()
    rows = starts[:, None] + torch.arange(horizon)
    assert (data.observations[rows, 0] == data.observations[rows[:, :1], 0]).all()
    sampler = WindowSampler(data, horizon, weighting="episodes")
    starts = sampler.draw(64, rng)
    windows = sampler.windows(starts)
    assert (windows.observations[..., 0] == windows.observations[:, :1, 0]).all()
    assert not windows.terminals[:, 0].any()  # the terminal row is no start


def test_episodes_and_their_starts_are_drawn_alike() -> None:
    data = transitions([3, 1, 33])
    starts = WindowSampler(data, 2, weighting="episodes").draw(6000, torch.Generator().manual_seed(0))
    counts = torch.bincount(starts, minlength=37)
    assert not counts[[2, 3, 36]].any()  # the episodes' last rows, one of them the episode of a single row
    assert counts[:3].sum().item() == pytest.approx(3000, abs=200)
    np.testing.assert_allclose(counts[:2], 1500, atol=150)
    assert (counts[4:36] > 50).all()
    with pytest.warns(UserWarning, match="1 of 3 episodes are shorter than the horizon of 2"):
        sampler = WindowSampler(data, 2)
    counts = torch.bincount(sampler.draw(6800, torch.Generator().manual_seed(0)), minlength=37)
    np.testing.assert_allclose(counts[counts > 0], 200, atol=70)
    assert (counts > 0).sum() == sampler.num_starts == 2 + 32


def test_seeds_are_a_leading_axis() -> None:
    data = transitions([9, 7])
    sampler = WindowSampler(data, 3)
    starts = torch.stack([sampler.draw(5, torch.Generator().manual_seed(seed)) for seed in range(4)])
    chunks, windows = sampler.chunks(starts, 0.9), sampler.windows(starts)
    assert chunks.actions.shape == (4, 5, 3, 3)
    assert chunks.rewards.shape == chunks.masks.shape == chunks.valid.shape == (4, 5)
    assert windows.observations.shape == (4, 5, 4, 2)
    assert torch.equal(sampler.chunks(starts[2], 0.9).rewards, chunks.rewards[2])
    with pytest.raises(InvalidInputError, match="discount is 2"):
        sampler.chunks(starts, 2)


@given(lengths=st.lists(st.integers(2, 7), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_from_episodes_is_ogbenchs_regular_layout(lengths: list[int], seed: int, tmp_path_factory: object) -> None:
    from ogbench.utils import load_dataset

    path = Path(tmp_path_factory.mktemp("data")) / "x.npz"  # type: ignore[attr-defined]
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    arrays = {"observations": rng.normal(size=(total, 2)), "actions": rng.normal(size=(total, 1))}
    labels = {"rewards": rng.normal(size=total).astype(np.float32), "masks": np.ones(total, np.float32)}
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    EpisodeDataset(arrays | labels, starts, np.array(lengths, np.int64)).save(path)
    ours = TransitionDataset.from_episodes(EpisodeDataset.load_all(path))
    official = load_dataset(path, compact_dataset=False)
    for name, expected in official.items():
        np.testing.assert_array_equal(getattr(ours, name), expected, err_msg=name)
    kept = np.setdiff1d(np.arange(total), np.cumsum(lengths) - 1)
    np.testing.assert_array_equal(ours.rewards, labels["rewards"][kept])
    np.testing.assert_array_equal(ours.lengths, np.array(lengths) - 1)


def test_sparse_rewards() -> None:
    data = transitions([4])
    rewards = np.array([-2, 0, -1, 0])
    sparse = TransitionDataset.of({**vars(data), "rewards": rewards}).sparse()
    assert sparse.rewards.tolist() == [-1, 0, -1, 0]
    assert sparse.rewards.dtype == np.float32
    assert sparse.masks.tolist() == data.masks.tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rewards": np.ones(4)}, "these lengths: .*rewards 4"),
        ({"rewards": np.array([0, 0, np.nan, 0, 0])}, "rewards are NaN or infinite, first at row 2"),
        ({"observations": np.full((5, 2), np.inf)}, "observations are NaN or infinite, first at row 0"),
        ({"actions": np.ones(5)}, r"shape \(5,\); expected numbers, \(transitions, dimensions\)"),
        ({"actions": np.array([["a"]] * 5)}, "expected numbers"),
        ({"next_observations": np.ones((5, 3))}, "expected the same shape"),
        ({"masks": np.full(5, 0.5)}, "masks are 0.5 at row 0; expected 0 or 1"),
        ({"terminals": np.array([0, 2, 0, 0, 1])}, "terminals are 2 at row 1; expected 0 or 1"),
        ({"terminals": np.array([0, 1, 0, 0, 0])}, "last row is not terminal"),
        (
            {name: np.ones((0, 2)) for name in ("observations", "next_observations")},
            "expected the same length, one or more",
        ),
    ],
)
def test_arrays_that_cannot_be_right_are_refused(changed: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(
        DatasetError, match=message.replace("Expected", "[Ee]xpected").replace("expected", "[Ee]xpected")
    ):
        TransitionDataset.of({**vars(transitions([2, 3])), **changed})


def test_missing_arrays_and_episodes_of_one_row_are_refused() -> None:
    arrays = dict(vars(transitions([2, 3])))
    del arrays["rewards"]
    with pytest.raises(DatasetError, match="arrays rewards are missing.*relabel"):
        TransitionDataset.of(arrays)
    rows = np.ones((3, 2), np.float32)
    lengths = np.array([2, 1], np.int64)
    episodes = EpisodeDataset({"observations": rows, "actions": rows}, np.array([0, 2]), lengths)
    with pytest.raises(DatasetError, match="no rewards and no masks"):
        TransitionDataset.from_episodes(episodes)
    episodes.arrays |= {"rewards": rows[:, 0], "masks": rows[:, 0]}
    with pytest.raises(DatasetError, match="episode 1 has a single row"):
        TransitionDataset.from_episodes(episodes)


def test_a_sampler_checks_its_settings() -> None:
    data = transitions([4])
    with pytest.raises(DatasetError, match="horizon is 5 and the longest of 1 episodes has 4"):
        WindowSampler(data, 5)
    with pytest.raises(DatasetError, match="horizon is 5"):
        WindowSampler(data, 5, weighting="episodes")
    with pytest.raises(DatasetError, match="one with 2 or more"):
        WindowSampler(transitions([1, 1]), 1, weighting="episodes")
    with pytest.raises(InvalidInputError, match="horizon is 0"):
        WindowSampler(data, 0)
    with pytest.raises(UnknownNameError, match="windows"):
        WindowSampler(data, 2, weighting="window")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="batch_size is 0"):
        WindowSampler(data, 2).draw(0, torch.Generator())
