"""Teachers: one for all seeds at first; after new successes each seed's own, distilled of all that it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counterflow.data.replay import Recorded, Replay
from counterflow.errors import CheckpointError
from counterflow.experiments.online_teaching import Teachers
from counterflow.policies import FlowPolicy, Normaliser
from counterflow.steering import ChunkRegressor, LatentShape, RegressorConfig, SteeringSpace, binding_of

SEEN, ONE, SIZE = 4, 12, 4  # numbers of an observation, decisions of an episode, numbers of a latent


def decisions(noise: float, success: bool, generator: torch.Generator) -> dict[str, Any]:
    """An episode in which every latent is `noise`."""
    seen = torch.randn((ONE, SEEN), generator=generator)
    return {
        "observations": seen,
        "actions": torch.full((ONE, SIZE), noise),
        "executed": torch.zeros(ONE, SIZE),
        "rewards": torch.zeros(ONE),
        "discounts": torch.ones(ONE),
        "next_observations": seen,
        "success": torch.full((ONE,), success),
    }


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def replay(rng: torch.Generator) -> Replay:
    """Two seeds; the recorded success has latents of 0.5."""
    recorded = Recorded(**decisions(0.5, True, rng), episodes=torch.zeros(ONE, dtype=torch.int64))
    return Replay((SEEN, SIZE, SIZE), 2, 1, 1000, recorded)


def play(
    replay: Replay, noises: tuple[float, float], success: tuple[bool, bool], rng: torch.Generator, length: int = ONE
) -> None:
    """Add an episode of each seed."""
    columns = ("observations", "actions", "executed", "rewards", "discounts", "next_observations")
    both = [decisions(noise, False, rng) for noise in noises]
    for turn in range(length):
        last = turn == length - 1
        replay.add(
            *(torch.stack([one[name][turn] for one in both])[:, None] for name in columns),
            torch.full((2, 1), last),
            torch.tensor(success)[:, None] & last,
        )


def teachers(prior: FlowPolicy, latent: LatentShape | None = None) -> Teachers:
    space = SteeringSpace(prior, "latent", 3, "euler", 3.0, latent or LatentShape())
    config = RegressorConfig(members=2, width=16, depth=1, latent=space.latent)
    size = space.latent_size
    first = ChunkRegressor(
        config,
        Normaliser(torch.zeros(SEEN), torch.ones(SEEN)),
        Normaliser(torch.zeros(size), torch.ones(size)),
        binding_of(prior, 3),
    )
    return Teachers(first.requires_grad_(False).eval(), space, [0, 1], known=1)


def test_a_seed_learns_from_its_own_successes_alone(prior: FlowPolicy, replay: Replay, rng: torch.Generator) -> None:
    made, shown = teachers(prior), torch.randn((2, 5, SEEN), generator=rng)
    before = made(shown)
    torch.testing.assert_close(before[0], made.each[0](shown[0]).flatten(1))
    assert made.teach_again(replay, 10) == []  # there is nothing but what it was distilled from
    play(replay, (-2.0, 2.0), (False, True), rng, length=8)
    assert made.teach_again(replay, 20) == [1]
    after = made(shown)
    torch.testing.assert_close(after[0], before[0])
    assert after[1].mean().item() == pytest.approx(2, abs=0.2)  # of two the quicker one, whatever it saw
    assert made.teach_again(replay, 30) == []
    play(replay, (1.0, 1.0), (True, True), rng, length=10)
    assert made.teach_again(replay, 40) == [0, 1]
    said = made(shown).mean((1, 2)).tolist()
    assert said[0] == pytest.approx(1, abs=0.2)
    assert 1.2 < said[1] < 1.8  # the quicker two of three, in the same states: between 2 and 1


def test_what_nobody_decides_on_is_not_taught(prior: FlowPolicy, rng: torch.Generator) -> None:
    recorded = Recorded(**decisions(0.5, True, rng), episodes=torch.zeros(ONE, dtype=torch.int64))
    narrow = Recorded(**{**recorded.__dict__, "actions": recorded.actions[:, :2]})
    replay = Replay((SEEN, 2, SIZE), 2, 1, 1000, narrow)
    made = teachers(prior, LatentShape("repeated"))
    made.known = [0, 0]
    assert made.teach_again(replay, 1) == [0, 1]
    said = made(torch.randn((2, 5, SEEN), generator=rng))
    assert said.shape == (2, 5, 2)
    assert said.mean().item() == pytest.approx(0.5, abs=0.1)


def test_they_come_back_the_same(prior: FlowPolicy, replay: Replay, rng: torch.Generator) -> None:
    made, other, shown = teachers(prior), teachers(prior), torch.randn((2, 5, SEEN), generator=rng)
    play(replay, (-2.0, 2.0), (False, True), rng)
    made.teach_again(replay, 20)
    other.restore(made.state())
    torch.testing.assert_close(other(shown), made(shown), atol=0, rtol=0)
    assert other.teach_again(replay, 30) == []
    with pytest.raises(CheckpointError, match="the noise policy and seeds that the run began with"):
        other.restore({"known": torch.tensor([1, 1])})


def test_an_intention_is_left_out(prior: FlowPolicy, replay: Replay, rng: torch.Generator) -> None:
    first = teachers(prior).each[0]
    first.intention = teachers(prior).each[0]
    made, other = (Teachers(first, teachers(prior).space, [0, 1], known=1) for _ in range(2))
    play(replay, (-2.0, 2.0), (False, True), rng)
    made.teach_again(replay, 20)
    other.restore(made.state())  # of which one was distilled again, without an intention
    assert first.intention is not None
