"""Anchors and their critics at a frozen policy's start: what is proposed, what is chosen, and on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.errors import CheckpointError, InvalidInputError, MismatchError, UnknownNameError
from counterflow.layout import ActionLayout
from counterflow.policies import ActionSpec, FlowPolicy, NetworkConfig, Normaliser
from counterflow.random import RowGenerators
from counterflow.reasoners import Direction, to_reference
from counterflow.steering import AnchorsConfig, AnchorsCritic, Reference, binding_of, steer_anchors

DIRECTIONS = [Direction((1, 0, 0)), Direction((-1, 0, 0)), Direction(defer=True)]
SMALL = AnchorsConfig(particles=2, spread=0.0, bound=3.0, hidden=(8,), norm="none")


@pytest.fixture(scope="module")
def policy() -> FlowPolicy:
    torch.manual_seed(0)
    spec = ActionSpec(3, 2, (-1.0,) * 2, (1.0,) * 2, layout=ActionLayout((0, 1)))
    made = FlowPolicy(NetworkConfig(width=8, depth=1), Normaliser(torch.zeros(4), torch.full((4,), 2.0)), spec)
    return made.requires_grad_(False).eval()


def make(policy: FlowPolicy, config: AnchorsConfig = SMALL, wish: Tensor | None = None) -> AnchorsCritic:
    """Critics that like what lies along `wish` (6,), as far as an activation of theirs tells."""
    torch.manual_seed(1)
    anchors = to_reference(DIRECTIONS, policy.action_spec)
    critic = AnchorsCritic(config, anchors, 4 + 6, 2, binding_of(policy, 4)).requires_grad_(False)
    if wish is not None:
        critic.network.weights[0].zero_()
        critic.network.weights[0][:, 4:, 0] = 0.1 * wish
        critic.network.weights[1].zero_()
        critic.network.weights[1][:, 0] = 1.0
    return critic


def moved(policy: FlowPolicy, critic: AnchorsCritic, reference: Reference | None = None) -> Tensor:
    """The motion along x that comes out, (5,)."""
    plan = steer_anchors(policy, critic).act(torch.zeros(5, 4), reference, rng=RowGenerators(list(range(5))))
    return plan.actions[..., 0].mean(1)


@pytest.mark.parametrize("judged", ["noise", "chunk"])
def test_what_the_critics_like_is_chosen_among_the_reversed_references(policy: FlowPolicy, judged: Any) -> None:
    right, left = (
        moved(policy, make(policy, replace(SMALL, judged=judged), way * torch.tensor([1.0, 0] * 3)))
        for way in (1.0, -1.0)
    )
    assert (right > left + 0.2).all()


def test_what_is_judged_as_a_chunk_is_what_is_executed(policy: FlowPolicy) -> None:
    critic = make(policy, replace(SMALL, judged="chunk", particles=1))
    seen: list[Tensor] = []
    scores = critic.scores

    def listening(shown: Tensor, latents: Tensor, executed: Tensor | None, limits: Tensor) -> Tensor:
        assert executed is not None
        seen.append(executed)
        return scores(shown, latents, executed, limits)

    critic.scores = listening  # type: ignore[method-assign]
    plan = steer_anchors(policy, critic).act(torch.randn(5, 4), rng=1)
    nearest = (seen[0] - plan.chunk.flatten(1)[:, None]).abs().amax(-1).amin(1)
    torch.testing.assert_close(nearest, torch.zeros(5), atol=1e-5, rtol=0)
    # 3 anchors are reversed in 4 steps and denoised in 4, and the chosen one is denoised
    assert plan.evaluations == 3 * 4 + 3 * 4 + 4


def test_a_row_does_not_depend_on_the_others(policy: FlowPolicy) -> None:
    critic = make(policy, replace(SMALL, spread=0.5, particles=3))
    observation = torch.randn(4, 4)
    together = steer_anchors(policy, critic).act(observation, rng=RowGenerators([3, 5, 7, 9]))
    alone = steer_anchors(policy, critic).act(observation[2:3], rng=RowGenerators([7]))
    torch.testing.assert_close(together.actions[2:3], alone.actions)


def test_somebodys_word_counts_where_it_was_trained_with(policy: FlowPolicy) -> None:
    said = to_reference([Direction((0, 1, 0))] * 5, policy.action_spec)
    for weighted in (True, False):
        critic = make(policy, replace(SMALL, weighted=weighted, select_temperature=1e3))
        own, told = (steer_anchors(policy, critic).act(torch.zeros(5, 4), given, rng=0).noise for given in (None, said))
        assert torch.equal(own, told) != weighted


def test_only_those_critics_count_that_are_to(policy: FlowPolicy) -> None:
    critic = make(policy, replace(SMALL, aggregation="min", counted=2))
    critic.network.biases[-1][1] -= 5.0
    space = critic.space(policy)
    arguments = torch.randn(3, 4), torch.randn(3, 7, 6), None, space.limits
    least = critic.scores(*arguments)
    one = make(policy, replace(SMALL, aggregation="min", counted=1)).scores(*arguments)
    assert (least < one - 2).all()
    with pytest.raises(InvalidInputError, match="no more than there are"):
        make(policy, replace(SMALL, counted=3))


def test_they_come_back_from_disk(policy: FlowPolicy, tmp_path: Path) -> None:
    critic = make(policy, replace(SMALL, spread=0.3))
    critic.provenance = {"seed": 4}
    path = critic.save(tmp_path / "anchors")
    again = AnchorsCritic.load(path)
    assert (again.config, again.fingerprint, again.provenance) == (critic.config, critic.fingerprint, {"seed": 4})
    torch.testing.assert_close(moved(policy, again), moved(policy, critic))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        AnchorsCritic.load(path)


def test_another_policy_or_another_setting_is_refused(policy: FlowPolicy) -> None:
    other = FlowPolicy(NetworkConfig(width=8, depth=2), policy.observation_normaliser, policy.action_spec)
    with pytest.raises(MismatchError, match="this critic of anchors belongs"):
        steer_anchors(other, make(policy))
    with pytest.raises(UnknownNameError, match="judged"):
        AnchorsConfig(judged="observation")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="select_temperature"):
        AnchorsConfig(select_temperature=0.0)
