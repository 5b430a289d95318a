"""Critics from successes and failures: targets computed by hand, what is learned, and what is held out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from counterflow.errors import CounterflowError, DatasetError, InvalidInputError, UnknownNameError
from counterflow.learning import ChunkCriticConfig, ChunkCriticLearner, Rollouts
from counterflow.learning.chunk_critic import Decisions, Draws, area_under_curve, monte_carlo_loss, td_loss
from counterflow.steering import CriticBinding, CriticConfig

H, A, F = 2, 1, 3
SMALL = CriticConfig(members=2, width=16, depth=1)


def rollouts(outcomes: str = "sf", length: int = 3, signal: float = 2.0, seed: int = 0, **changes: Any) -> Rollouts:
    """An episode a letter, s for success and f for failure; the first input, and the chunk, tell which."""
    rng = np.random.default_rng(seed)
    success = np.repeat([letter == "s" for letter in outcomes], length)
    count = len(success)
    inputs = rng.standard_normal((count, F)).astype(np.float32)
    chunks = 0.3 * rng.standard_normal((count, H, A)).astype(np.float32)
    inputs[:, 0] += signal * success
    chunks += (0.3 * signal * success)[:, None, None]
    content = {
        "inputs": inputs,
        "chunks": chunks.astype(np.float32),
        "executed": np.full(count, H),
        "success": success,
        "episodes": np.repeat(np.arange(len(outcomes)), length),
        "binding": CriticBinding("abc", "", H, A),
    }
    return Rollouts(**{**content, **changes})


class TestTargets:
    def test_outcomes_by_hand(self) -> None:
        """Discounted by the actions that were executed after a chunk; 0 where the episode failed."""
        made = rollouts("sfs", 2, executed=np.array([2, 1, 2, 2, 2, 2]))
        np.testing.assert_allclose(made.outcomes(0.5), [0.5, 1, 0, 0, 0.25, 1])
        assert made.last.tolist() == [False, True] * 3

    def test_what_td_needs(self) -> None:
        made = rollouts("sf", 3, executed=np.array([2, 2, 1, 2, 2, 2]))
        found = ChunkCriticLearner(made, ChunkCriticConfig(SMALL, discount=0.5), 0).decisions
        assert found.rewards.tolist() == [0, 0, 1, 0, 0, 0]
        assert found.discounts.tolist() == [0.25, 0.25, 0, 0.25, 0.25, 0.25]  # a failure only ran out of time
        assert found.following.tolist() == [1, 2, 2, 4, 5, 5]

    def test_losses_by_hand(self) -> None:
        """The network says the sum of what it is given, the target network ten times that."""

        class Sum(nn.Module):
            def __init__(self, factor: float) -> None:
                super().__init__()
                self.factor = factor

            def forward(self, wide: Tensor) -> Tensor:
                members = 1.0 + torch.arange(len(wide))[:, None, None]
                return self.factor * members * wide.sum(-1, keepdim=True)

        decisions = Decisions(
            inputs=torch.tensor([[1.0], [2.0]]),
            chunks=torch.tensor([[0.5], [1.0]]),
            outcomes=torch.tensor([0.0, 4.0]),
            rewards=torch.tensor([0.0, 1.0]),
            discounts=torch.tensor([0.1, 0.0]),
            following=torch.tensor([1, 1]),
            tasks=torch.zeros(2, 0),
        )
        draws = Draws(torch.tensor([[0, 1], [0, 0]]), torch.ones(2, 2, 1), torch.ones(2, 2, 1))
        config = ChunkCriticConfig(input_noise=0.5, chunk_noise=0.25)
        # What is seen: 1.5 + 0.5 + 0.25 = 2.25 and 3.75; twice that by the second member.
        expected = torch.tensor([(2.25**2 + (3.75 - 4) ** 2) / 2, 4.5**2])
        torch.testing.assert_close(monte_carlo_loss(Sum(1), decisions, draws, config), expected)
        # Decision 0 is followed by 1, which the members' targets value at 30 and 60; decision 1 has earned 1 and is over.
        expected = torch.tensor([((2.25 - 3) ** 2 + (3.75 - 1) ** 2) / 2, (4.5 - 6) ** 2])
        torch.testing.assert_close(td_loss(Sum(1), Sum(10), decisions, draws, config), expected)
        for backup, ahead in (("min", 3.0), ("mean", 4.5), ("lower_confidence", 3.0)):
            found = td_loss(Sum(1), Sum(10), decisions, draws, replace(config, backup=backup))
            expected = torch.tensor([((2.25 - ahead) ** 2 + 2.75**2) / 2, (4.5 - ahead) ** 2])
            torch.testing.assert_close(found, expected)


class TestLearning:
    CONFIG = ChunkCriticConfig(SMALL, steps=600, evaluate_every=50, batch_size=64, discount=0.9, learning_rate=3e-3)

    @pytest.mark.parametrize("method", ["td", "monte_carlo"])
    def test_successes_are_told_from_failures(self, method: Any) -> None:
        config = replace(self.CONFIG, method=method, target_rate=0.05)
        made = rollouts("sf" * 12, 4, signal=3.0)
        learner = ChunkCriticLearner(made, config, 0)
        critic = learner.fit()
        report = learner.report()
        assert report["auc"] > 0.9
        assert report["held_out_error"] < 0.5 * report["constant_error"]
        calibration = report["calibration"]
        assert [group[0] for group in calibration] == sorted(group[0] for group in calibration)
        assert calibration[-1][1] > 0.5 > calibration[0][1]
        values = critic.value(torch.from_numpy(made.inputs), torch.from_numpy(made.chunks), "mean")
        assert values[made.success].mean() > values[~made.success].mean() + 0.3
        assert not any(parameter.requires_grad for parameter in critic.parameters())

    def test_where_nothing_tells_them_apart_it_says_so(self) -> None:
        learner = ChunkCriticLearner(rollouts("sf" * 12, 4, signal=0.0), self.CONFIG, 0)
        learner.fit()
        report = learner.report()
        assert report["auc"] < 0.75
        assert report["held_out_error"] > 0.5 * report["constant_error"]

    def test_td_carries_success_backwards(self) -> None:
        """Along an episode the value rises by 1 / gamma^executed a decision, though only the end was rewarded."""
        made = rollouts("sf" * 10, 4, signal=3.0)
        made.inputs[:, 1] = np.tile(np.arange(4), 20)
        config = replace(self.CONFIG, target_rate=0.1, steps=1500, held_out=0.0, input_noise=0.0, weight_decay=0.0)
        critic = ChunkCriticLearner(made, config, 0).fit()
        values = critic.value(torch.from_numpy(made.inputs), torch.from_numpy(made.chunks), "mean")
        means = [float(values[made.success][place::4].mean()) for place in range(4)]
        assert means == pytest.approx([0.81**3, 0.81**2, 0.81, 1.0], abs=0.12)

    def test_held_out_episodes_are_whole_and_of_both_outcomes(self) -> None:
        made = rollouts("ssssffff", 3)
        learner = ChunkCriticLearner(made, replace(self.CONFIG, held_out=0.25), 0)
        drawn = [set(made.episodes[learner.draw().rows[member]]) for member in range(2)]
        for member, seen in enumerate(drawn):
            held = set(range(8)) - seen
            assert len(held) == 2, member
            assert sorted(number < 4 for number in held) == [False, True]
        assert drawn[0] != drawn[1]

    def test_the_same_seed_gives_the_same_critic(self) -> None:
        config = replace(self.CONFIG, steps=20)
        one, same, other = (ChunkCriticLearner(rollouts("sfsf"), config, seed).fit() for seed in (1, 1, 2))
        assert one.fingerprint == same.fingerprint != other.fingerprint

    def test_without_held_out_episodes(self) -> None:
        learner = ChunkCriticLearner(rollouts(), replace(self.CONFIG, steps=10), 0)
        learner.fit()
        assert learner.report() == {
            "updates": 10,
            "decisions": 6,
            "held_out_error": None,
            "constant_error": None,
            "auc": None,
            "calibration": None,
        }


class TestAreaUnderCurve:
    def test_by_hand(self) -> None:
        def area(scores: list[float], positive: list[bool]) -> float:
            return area_under_curve(np.array(scores), np.array(positive))

        assert area([1, 2, 3, 4], [False, False, True, True]) == 1
        assert area([1, 2, 3, 4], [True, False, True, False]) == 0.25
        assert area([1, 1, 1], [True, False, False]) == 0.5
        assert area([1, 2, 2, 3], [False, True, False, True]) == 0.875
        assert math.isnan(area([1, 2], [True, True]))

    def test_agrees_with_counting(self) -> None:
        rng = np.random.default_rng(0)
        scores, positive = rng.integers(0, 8, 60).astype(float), rng.random(60) < 0.4
        pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
        assert area_under_curve(scores, positive) == pytest.approx(np.mean(pairs))


class TestRefusals:
    @pytest.mark.parametrize(
        ("outcomes", "changes", "message"),
        [
            ("ss", {}, "none of the 2 episodes failed"),
            ("fff", {}, "none of the 3 episodes succeeded"),
            ("sf", {"chunks": np.zeros((6, H, A + 1), np.float32)}, r"chunks have shape \(6, 2, 2\)"),
            ("sf", {"executed": np.ones(5, np.int64)}, "executed have shape"),
            ("sf", {"inputs": np.zeros((0, 3), np.float32)}, "inputs to learn from have shape"),
            ("sf", {"inputs": np.full((6, 3), np.nan, np.float32)}, "first in decision 0"),
        ],
    )
    def test_rollouts(self, outcomes: str, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            rollouts(outcomes, **changes)

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"method": "guess"}, UnknownNameError),
            ({"backup": "max"}, UnknownNameError),
            ({"discount": 1.5}, InvalidInputError),
            ({"steps": 0}, InvalidInputError),
            ({"held_out": 1.0}, InvalidInputError),
        ],
    )
    def test_settings(self, changes: dict[str, Any], error: type[CounterflowError]) -> None:
        with pytest.raises(error):
            ChunkCriticConfig(**changes)

    def test_a_loss_that_is_no_number(self) -> None:
        made = rollouts()
        made.chunks[:] = 1e30
        with pytest.raises(DatasetError, match="the loss is"):
            ChunkCriticLearner(made, ChunkCriticConfig(SMALL, steps=5), 0).fit()
