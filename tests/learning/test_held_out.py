"""Whole episodes are held out, each member keeps its best weights, and the training stops when none improves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from counterflow.errors import DatasetError
from counterflow.learning.held_out import HeldOut, Progress, fit, hold_out


class TestHoldOut:
    @given(
        episodes=st.lists(st.integers(0, 15), min_size=1, max_size=60),
        members=st.integers(1, 6),
        fraction=st.floats(0.01, 0.9),
        seed=st.integers(0, 1000),
    )
    def test_whole_episodes_others_for_each_member(
        self, episodes: list[int], members: int, fraction: float, seed: int
    ) -> None:
        array = np.array(episodes, np.int64)
        names = np.unique(array)
        held_out = hold_out(array, members, fraction, seed)
        assert held_out.shape == (members, len(array))
        if len(names) == 1:
            assert not held_out.any()
            return
        chosen = [set(array[held_out[member]].tolist()) for member in range(members)]
        for member in range(members):
            assert not chosen[member] & set(array[~held_out[member]].tolist())
            assert 1 <= len(chosen[member]) < len(names)
            assert abs(len(chosen[member]) - fraction * len(names)) <= 1
        if sum(map(len, chosen)) <= len(names):
            assert len(set.union(*chosen)) == sum(map(len, chosen))
        else:
            assert set.union(*chosen) == set(names.tolist())

    def test_nothing_is_held_out_at_zero(self) -> None:
        assert not hold_out(np.arange(5), 3, 0.0, 0).any()

    def test_it_depends_on_the_seed_and_not_on_the_order_of_the_examples(self) -> None:
        episodes = np.repeat(np.arange(10), 3)
        assert (hold_out(episodes, 2, 0.2, 0) == hold_out(episodes, 2, 0.2, 0)).all()
        assert any((hold_out(episodes, 2, 0.2, 0) != hold_out(episodes, 2, 0.2, seed)).any() for seed in (1, 2, 3))
        np.testing.assert_array_equal(hold_out(episodes[::-1], 2, 0.2, 0), hold_out(episodes, 2, 0.2, 0)[:, ::-1])


class Weights(nn.Module):
    """Two members of one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(2, 1))


@dataclass(frozen=True)
class Stopping:
    steps: int = 50
    evaluate_every: int = 1
    patience: int = 3


MASK = np.array([[True, False, False, False], [False, True, False, False]])


def test_draws_are_even_and_from_what_a_member_learns_from() -> None:
    drawn = HeldOut(Weights(), MASK, "cpu").draw(3000, torch.Generator().manual_seed(0))
    counts = torch.stack([torch.bincount(row, minlength=4) for row in drawn])
    assert (counts[torch.from_numpy(MASK)] == 0).all()
    assert (counts[torch.from_numpy(~MASK)] - 1000).abs().max() < 150


def test_each_member_ends_with_its_own_best_weights() -> None:
    """Held-out errors fall until 2 and 5 and rise after that; three judgements without an improvement end it."""
    network, told = Weights(), list[Progress]()
    held_out = HeldOut(network, MASK, "cpu")

    def update() -> Tensor:
        with torch.no_grad():
            network.value += 1
        return torch.tensor(1.0)

    def evaluate() -> bool:
        goals = torch.tensor([[2.0], [5.0]])
        return held_out.judge((network.value - goals).square().expand(2, 4))

    fit(update, evaluate, held_out, Stopping(), told.append)
    assert network.value.flatten().tolist() == [2.0, 5.0]
    assert held_out.loss.tolist() == [0.0, 0.0]
    assert told[-1].step == 8


def test_without_held_out_episodes_the_last_weights_stay() -> None:
    network = Weights()
    held_out = HeldOut(network, np.zeros_like(MASK), "cpu")

    def update() -> Tensor:
        with torch.no_grad():
            network.value += 1
        return torch.tensor(1.0)

    fit(update, lambda: pytest.fail("there is nothing to judge"), held_out, Stopping(steps=7))
    assert network.value.flatten().tolist() == [7.0, 7.0]


def test_a_loss_that_is_not_finite_ends_it() -> None:
    held_out = HeldOut(Weights(), np.zeros_like(MASK), "cpu")
    with pytest.raises(DatasetError, match="update 1"):
        fit(lambda: torch.tensor(float("nan")), lambda: None, held_out, Stopping())
