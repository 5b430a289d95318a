"""Who acts, and what is learned from it: rules on sequences of situations, and learning that goes on from the last weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import counterflow.learning.dagger as module
from counterflow.binding import Binding
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.learning import DSBCConfig, NoiseExamples
from counterflow.learning.dagger import ByHand, DAggerConfig, InterventionRule, Situation, Stalled, Uncertain, learn
from counterflow.steering import ChunkRegressor, RegressorConfig

BINDING = Binding("abc", "ogbench/x", 2, 3, 5)


def who_acts(rule: InterventionRule, remaining: list[float], disagreement: list[float] | None = None) -> str:
    """Go through an episode: "p" where the policy makes the decision, "e" where the expert does."""
    rule.reset()
    acted, decisions, expert = "", 0, False
    for index, left in enumerate(remaining):
        doubt = 0.0 if disagreement is None else disagreement[index]
        acts = rule.expert_should_act(Situation(left, doubt, decisions, expert))
        if acts != expert:
            expert, decisions = acts, 0
        decisions += 1
        acted += "e" if acts else "p"
    return acted


class TestStalled:
    def test_the_expert_takes_over_after_so_many_decisions_without_progress_and_hands_back(self) -> None:
        assert who_acts(Stalled(patience=3, hold=2), [1.0] * 12) == "pppeepppeepp"

    def test_only_progress_of_more_than_the_margin_counts(self) -> None:
        assert who_acts(Stalled(2, 9, margin=0.1), [1.0, 0.95, 0.91]) == "ppe"
        assert who_acts(Stalled(2, 9, margin=0.1), [1.0, 0.95, 0.89, 0.85, 0.8]) == "ppppe"
        assert who_acts(Stalled(2, 9, margin=0.0), [1.0, 0.95, 0.91]) == "ppp"

    def test_slow_progress_adds_up(self) -> None:
        """Each decision brings less than the margin, but they all bring something."""
        assert who_acts(Stalled(4, 9, margin=0.1), [1 - 0.04 * index for index in range(20)]) == "p" * 20

    def test_what_gets_worse_and_better_again_is_no_progress(self) -> None:
        assert who_acts(Stalled(3, 9), [1.0, 2.0, 1.5, 1.0]) == "pppe"

    def test_after_the_hand_back_progress_counts_from_there(self) -> None:
        """The expert left things worse (it lifts a cube first): the policy is measured from that point on."""
        assert who_acts(Stalled(2, 1), [1.0, 1.0, 1.0, 5.0, 4.0, 3.0, 2.0]) == "ppepppp"

    def test_an_episode_begins_anew(self) -> None:
        rule = Stalled(2, 3)
        first = who_acts(rule, [1.0, 1.0, 1.0])
        assert first == who_acts(rule, [1.0, 1.0, 1.0]) == "ppe"

    @given(
        steps=st.lists(st.floats(0.011, 1.0), min_size=1, max_size=40),
        patience=st.integers(1, 5),
        hold=st.integers(1, 5),
    )
    def test_never_while_progress_is_made(self, steps: list[float], patience: int, hold: int) -> None:
        remaining = (100 - np.cumsum(steps)).tolist()
        assert who_acts(Stalled(patience, hold), remaining) == "p" * len(steps)

    @given(
        remaining=st.lists(st.floats(0, 2), min_size=1, max_size=60),
        patience=st.integers(1, 6),
        hold=st.integers(1, 6),
    )
    def test_the_expert_always_makes_as_many_decisions_as_it_may(
        self, remaining: list[float], patience: int, hold: int
    ) -> None:
        acted = who_acts(Stalled(patience, hold), remaining)
        runs = acted.replace("ep", "e p").replace("pe", "p e").split()
        assert all(len(run) == hold for run in runs[:-1] if "e" in run)
        assert len(runs[-1]) <= hold or "p" in runs[-1]
        assert all(len(run) >= patience for run in runs[:-1] if "p" in run)

    @pytest.mark.parametrize(
        "changes", [{"patience": 0}, {"hold": 0}, {"margin": -0.1}, {"margin": float("nan")}], ids=str
    )
    def test_numbers_out_of_range(self, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match="expected a.* of at least"):
            Stalled(**changes)


class TestUncertain:
    def test_the_expert_takes_over_where_members_disagree_and_hands_back(self) -> None:
        doubt = [0.1, 0.5, 0.6, 0.1, 0.1, 0.1, 0.1]
        assert who_acts(Uncertain(0.5, 3), [1.0] * 7, doubt) == "ppeeepp"

    def test_it_stays_where_they_still_disagree(self) -> None:
        assert who_acts(Uncertain(0.5, 2), [1.0] * 7, [0.9] * 5 + [0.1] * 2) == "eeeeepp"

    @given(st.lists(st.floats(0, 0.5), max_size=30), st.floats(0, 9))
    def test_never_where_they_agree(self, doubt: list[float], left: float) -> None:
        assert who_acts(Uncertain(0.5, 3), [left] * len(doubt), doubt) == "p" * len(doubt)


def test_by_hand_whoever_watches_decides() -> None:
    held = iter([False, True, True, False])
    assert who_acts(ByHand(lambda: next(held)), [1.0] * 4) == "peep"


SMALL = DSBCConfig(RegressorConfig(members=2, width=16, depth=1), steps=60, learning_rate=1e-2, evaluate_every=20)


def examples(offset: float, count: int = 40, seed: int = 0) -> NoiseExamples:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((count, 4)).astype(np.float32)
    targets = np.full((count, 2, 3), offset, np.float32) + 0.1 * inputs[:, :2, None]
    return NoiseExamples(inputs, targets, np.arange(count, dtype=np.int64) // 10, BINDING)


def weights(regressor: ChunkRegressor) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in regressor.network.parameters()])


class TestLearn:
    def test_the_first_round_begins_from_nothing(self) -> None:
        config = DAggerConfig(SMALL, steps=1)
        assert learn(examples(0.0), [], config, seed=0).provenance["updates"] == 60

    def test_later_rounds_go_on_from_the_last_weights(self) -> None:
        first = learn(examples(0.0), [], DAggerConfig(SMALL), seed=0)
        before = weights(first).clone()
        again = learn(examples(0.0), [examples(1.0)], DAggerConfig(SMALL, steps=1), seed=1, initial=first)
        assert again.provenance["updates"] == 1
        assert again.provenance["examples"] == 80
        assert 0 < (weights(again) - before).abs().max() < 0.02  # AdamW: at most about its learning rate an update
        assert (weights(learn(examples(0.0), [], DAggerConfig(SMALL), seed=1)) - before).abs().max() > 0.2

    def test_corrections_are_learned(self) -> None:
        """In inputs of their own; what was known before stays."""
        corrected = examples(1.0, seed=1)
        corrected.inputs[:] += 3.0
        first = learn(examples(0.0), [], DAggerConfig(SMALL), seed=0)
        shown, known = torch.from_numpy(corrected.inputs), torch.from_numpy(examples(0.0).inputs)
        before = first(shown).mean()
        again = learn(examples(0.0), [corrected], DAggerConfig(SMALL, steps=150), seed=1, initial=copy.deepcopy(first))
        assert abs(again(shown).mean() - 1.0) < 0.4 * abs(before - 1.0)
        assert again(known).mean() < 0.3

    @pytest.mark.parametrize("repeat", [1, 3])
    def test_corrections_count_as_often_as_told(self, repeat: int, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[NoiseExamples] = []

        def catch(found: NoiseExamples, *_: Any, **__: Any) -> ChunkRegressor:
            seen.append(found)
            return made

        made = learn(examples(0.0), [], DAggerConfig(SMALL, steps=1), seed=0)
        monkeypatch.setattr(module, "distil", catch)
        learn(examples(0.0), [examples(1.0), examples(2.0)], DAggerConfig(SMALL, repeat=repeat), seed=0)
        rounded = seen[0].targets.mean((1, 2)).round()
        assert [int((rounded == value).sum()) for value in (0, 1, 2)] == [40, 40 * repeat, 40 * repeat]
        # However often they are there, they are the same episodes: they are held out together.
        assert len(np.unique(seen[0].episodes)) == 12

    def test_corrections_of_another_policy_are_refused(self) -> None:
        other = examples(0.0)
        other = NoiseExamples(other.inputs, other.targets, other.episodes, Binding("def", "ogbench/x", 2, 3, 5))
        with pytest.raises(MismatchError, match="policy 'abc', not 'def'"):
            learn(examples(0.0), [other], DAggerConfig(SMALL), seed=0)

    @pytest.mark.parametrize("changes", [{"steps": 0}, {"repeat": 0}], ids=str)
    def test_numbers_out_of_range(self, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match="expected an integer of at least 1"):
            DAggerConfig(**changes)
