"""Replay: links, returns, success labels, mixtures, resumption."""

from __future__ import annotations

import pytest
import torch

from counterflow.data import Mix, Recorded, Replay
from counterflow.errors import CheckpointError, DatasetError, InvalidInputError

SIZES = (1, 1, 2)


def recorded(lengths: tuple[int, ...] = (3, 2), success: tuple[bool, ...] = (True, False)) -> Recorded:
    count = sum(lengths)
    numbers = torch.arange(count, dtype=torch.float32)
    episodes = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Recorded(
        -numbers[:, None],
        numbers[:, None],
        numbers[:, None].expand(count, 2),
        torch.ones(count),
        torch.full((count,), 0.5),
        -numbers[:, None] - 0.5,
        episodes,
        torch.tensor(success)[episodes],
    )


def feed(replay: Replay, turns: int, first: int = 0, ends: int = 4, won: bool = True) -> None:
    """Episodes of `ends` decisions; the reward is the number of the turn, seeds differ by a hundred."""
    for turn in range(first, first + turns):
        value = torch.full((replay.seeds, replay.streams), float(turn))
        value += 100 * torch.arange(replay.seeds)[:, None] + 1000 * torch.arange(replay.streams)
        done = torch.full(value.shape, turn % ends == ends - 1)
        solved = done & won
        discounts = torch.where(solved, 0.0, 0.5)
        wide = value[..., None]
        replay.add(wide, wide, wide.expand(-1, -1, 2), value, discounts, wide + 0.5, done, solved)


def test_returns_stop_where_the_episode_does() -> None:
    replay = Replay(SIZES, capacity=20)
    feed(replay, 6)
    batch = replay.gather(torch.tensor([[0, 2, 3, 4, 5]]), steps=3)
    # decisions 0 to 3 are an episode whose last is solved; 4 and 5 go on
    assert batch.rewards[0].tolist() == [0 + 0.5 + 0.5, 2 + 1.5, 3, 4 + 2.5, 5]
    assert batch.discounts[0].tolist() == [0.125, 0, 0, 0.25, 0.5]
    assert batch.next_observations[0, :, 0].tolist() == [2.5, 3.5, 3.5, 5.5, 5.5]
    assert batch.next_actions[0, :, 0].tolist() == [3, 0, 0, 0, 0]
    assert batch.followed[0].tolist() == [1, 1, 1, 0, 0]


def test_streams_are_kept_apart() -> None:
    replay = Replay(SIZES, seeds=2, streams=2, capacity=20)
    feed(replay, 3)
    batch = replay.gather(torch.tensor([[0, 1], [0, 1]]), steps=2)
    assert batch.observations[..., 0].tolist() == [[0, 1000], [100, 1100]]
    assert batch.next_observations[..., 0].tolist() == [[1.5, 1001.5], [101.5, 1101.5]]
    assert batch.next_actions[..., 0].tolist() == [[2, 1002], [102, 1102]]


def test_an_episodes_decisions_are_marked_once_it_succeeded() -> None:
    replay = Replay(SIZES, capacity=20)
    feed(replay, 3)
    assert len(replay.successes()[0]) == 0
    feed(replay, 1, first=3)
    feed(replay, 4, first=4, won=False)
    assert replay.successes()[0].tolist() == [0, 1, 2, 3]


def test_the_oldest_make_room_and_what_was_prefilled_stays() -> None:
    replay = Replay(SIZES, capacity=5 + 6, prefilled=recorded())
    feed(replay, 9)
    assert replay.size == 11
    batch = replay.gather(torch.arange(11)[None], steps=2)
    assert batch.observations[0, :, 0].tolist() == [0, -1, -2, -3, -4, 6, 7, 8, 3, 4, 5]
    # of the first episode, 0 to 3, one decision is left at place 8, and the second, 4 to 7, lies at 9, 10, 5, 6
    assert replay.successes()[0].tolist() == [0, 1, 2, 5, 6, 8, 9, 10]
    assert replay.successes(prefilled_only=True)[0].tolist() == [0, 1, 2]
    # links within what was prefilled end with its episodes; the link from 5 to 6 crosses the ring's end
    assert batch.next_actions[0, :3, 0].tolist() == [2, 0, 0]
    assert batch.next_observations[0, 10, 0] == 6.5


def test_batches_are_mixed_as_asked() -> None:
    replay = Replay(SIZES, capacity=100, prefilled=recorded())
    rngs = [torch.Generator().manual_seed(0)]
    assert (replay.draw(rngs, 2, 8, Mix()) < 5).all()
    feed(replay, 10, won=False)
    drawn = replay.draw(rngs, 3, 8, Mix(0.25))
    assert drawn.shape == (3, 1, 8)
    assert ((drawn < 5).sum(-1) == 2).all()
    assert drawn.max() < 15
    successes = replay.draw(rngs, 50, 8, Mix(0.0, successes=0.5))[..., 4:]
    assert set(successes.flatten().tolist()) == {0, 1, 2}
    assert (replay.draw(rngs, 50, 8, Mix(0.0)) >= 5).all()


def test_a_seeds_draws_are_its_own() -> None:
    def rngs(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    two, one = Replay(SIZES, seeds=2, capacity=50), Replay(SIZES, capacity=50)
    feed(two, 10)
    feed(one, 10)
    mix = Mix(successes=0.25)
    assert torch.equal(two.draw(rngs(3, 4), 2, 8, mix)[:, 1], one.draw(rngs(4), 2, 8, mix)[:, 0])
    places, known = two.draw_successes(rngs(3, 4), 2, 8, prefilled_only=True)
    assert known.tolist() == [0, 0]
    places, known = two.draw_successes(rngs(3, 4), 2, 8, prefilled_only=False)
    assert known.tolist() == [1, 1]
    assert places.max() <= 7


def test_a_replay_goes_on_from_its_state() -> None:
    def make() -> Replay:
        return Replay(SIZES, seeds=2, streams=2, capacity=25, prefilled=recorded())

    whole, first, second = make(), make(), make()
    feed(whole, 14)
    feed(first, 9)
    second.restore(first.state())
    feed(second, 5, first=9)
    for name, value in whole.state().items():
        assert torch.equal(value, second.state()[name]), name


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="room"):
        Replay(SIZES, capacity=5, prefilled=recorded())
    with pytest.raises(DatasetError, match="another policy"):
        Replay((2, 1, 2), prefilled=recorded())
    with pytest.raises(InvalidInputError, match="empty"):
        Replay(SIZES).draw([torch.Generator()], 1, 2, Mix())
    with pytest.raises(InvalidInputError, match="shares"):
        Mix(1.5)
    with pytest.raises(CheckpointError, match="prefilled"):
        Replay(SIZES).restore(Replay(SIZES, prefilled=recorded()).state())
