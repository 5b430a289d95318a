"""Behaviour cloning: the loss by hand, learning, precision, schedules, state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from counterflow.data import ChunkBatch
from counterflow.errors import CheckpointError, InvalidInputError, UnknownNameError
from counterflow.learning import BCConfig, BCLearner
from counterflow.learning.bc import Draws, bc_loss, learning_rate_at
from counterflow.policies import ActionSpec, FlowPolicy, NetworkConfig, Normaliser


def policy(width: int = 32, seed: int = 0) -> FlowPolicy:
    torch.manual_seed(seed)
    spec = ActionSpec(2, 1, normaliser=Normaliser(torch.tensor([1.0]), torch.tensor([2.0])))
    observations = Normaliser(torch.zeros(1), torch.ones(1))
    return FlowPolicy(NetworkConfig("mlp", width, 2), observations, spec)


def batch(count: int, rng: torch.Generator) -> ChunkBatch:
    """Observations of -1 and 1; the right chunk is the observation three times over, in environment units."""
    observations = torch.randint(0, 2, (count, 1), generator=rng).float() * 2 - 1
    return ChunkBatch(observations, 1 + 3 * observations[:, None].expand(count, 2, 1))


def trained(config: BCConfig, steps: int, learner: BCLearner | None = None, seed: int = 0) -> BCLearner:
    learner = BCLearner(policy(), config, seed) if learner is None else learner
    for step in range(learner.step, steps):
        learner.update(batch(64, torch.Generator().manual_seed(step)))
    return learner


CONFIG = BCConfig(
    horizon=2, steps=200, batch_size=64, learning_rate=1e-2, average=0.9, precision="float32", compile=False
)


def test_the_loss_by_hand() -> None:
    """With a network that says zero the loss is the mean square of (normalised action - noise)."""
    silent = policy()
    torch.nn.init.zeros_(silent.network.out.weight)  # type: ignore[union-attr, arg-type]
    torch.nn.init.zeros_(silent.network.out.bias)  # type: ignore[union-attr, arg-type]
    actions, noise = torch.tensor([[[3.0], [5.0]]]), torch.tensor([[[0.5], [-1.0]]])
    loss = bc_loss(silent, ChunkBatch(torch.zeros(1, 1), actions), Draws(noise, torch.tensor([0.3])))
    assert loss.item() == pytest.approx(((1.0 - 0.5) ** 2 + (2.0 + 1.0) ** 2) / 2)


class TestLearning:
    @pytest.mark.parametrize("settings", [{"precision": "float32"}, {"precision": "bfloat16"}, {"compile": True}])
    def test_the_held_out_loss_falls_in_every_mode(self, settings: dict[str, Any]) -> None:
        config = BCConfig(**{**vars(CONFIG), **settings})
        learner = BCLearner(policy(), config, 0)
        held_out = [batch(256, torch.Generator().manual_seed(999))]
        before = learner.validation_loss(held_out, 0)
        trained(config, 200, learner)
        assert learner.validation_loss(held_out, 0) < 0.25 < 1.0 < before
        assert learner.precision == config.precision
        assert next(learner.averaged.network.parameters()).dtype == torch.float32

    @pytest.mark.parametrize("settings", [{"precision": "bfloat16"}, {"compile": True}])
    def test_the_modes_agree(self, settings: dict[str, Any]) -> None:
        """Three digits in bfloat16; a compiled loss differs by rounding."""
        plain, other = (BCLearner(policy(), BCConfig(**{**vars(CONFIG), **changes}), 0) for changes in ({}, settings))
        losses = [
            [float(learner.update(batch(64, torch.Generator().manual_seed(step)))) for step in range(20)]
            for learner in (plain, other)
        ]
        tolerance = 0.03 if "precision" in settings else 1e-4
        assert losses[1] == pytest.approx(losses[0], rel=tolerance)
        if "precision" in settings:
            assert losses[1] != losses[0]

    def test_what_it_learned_depends_on_the_observation(self) -> None:
        from counterflow.steering import SteeredPolicy

        actions = (
            SteeredPolicy(trained(CONFIG, 200).averaged, steps=10).act(torch.tensor([[-1.0], [1.0]]), rng=0).actions
        )
        torch.testing.assert_close(actions[..., 0], torch.tensor([[-2.0, -2.0], [4.0, 4.0]]), atol=0.6, rtol=0)

    def test_validation_is_repeatable_and_changes_nothing(self) -> None:
        learner, held_out = trained(CONFIG, 5), [batch(64, torch.Generator().manual_seed(1))]
        state = learner.state()
        assert learner.validation_loss(held_out, 0) == learner.validation_loss(held_out, 0)
        assert all(torch.equal(value, state[name]) for name, value in learner.state().items())

    def test_the_average_is_the_average(self) -> None:
        learner = trained(BCConfig(**{**vars(CONFIG), "average": 0.0}), 20)
        for average, last in zip(learner.averaged.parameters(), learner.policy.parameters(), strict=True):
            assert torch.equal(average, last)

    @pytest.mark.parametrize("average", [0.2, 0.9])
    def test_the_average_forgets_its_random_start_quickly(self, average: float) -> None:
        """Its decay is (1 + n) / (10 + n) after n updates, until that reaches the one that was asked for."""
        learner = BCLearner(policy(), BCConfig(**{**vars(CONFIG), "average": average}), 0)
        expected = [weight.detach().clone() for weight in learner.policy.network.parameters()]
        for step in range(12):
            trained(CONFIG, step + 1, learner)
            decay = min(average, (1 + step) / (10 + step))
            for mean, weight in zip(expected, learner.policy.network.parameters(), strict=True):
                mean.mul_(decay).add_(weight.detach(), alpha=1 - decay)
        for mean, found in zip(expected, learner.averaged.network.parameters(), strict=True):
            torch.testing.assert_close(found, mean)

    @pytest.mark.parametrize(("limit", "clipped"), [(0.0, False), (1e-3, True)])
    def test_gradients_are_clipped_to_their_norm(self, limit: float, clipped: bool) -> None:
        learner = trained(BCConfig(**{**vars(CONFIG), "gradient_norm": limit}), 1)
        gradients = [weight.grad for weight in learner.policy.network.parameters() if weight.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-3) if clipped else norm > 0.1

    def test_weights_decay(self) -> None:
        """AdamW shrinks a weight by rate * decay an update, apart from the gradient's step, which does not depend on it."""
        constant = {"schedule": "constant", "learning_rate": 1e-2}
        plain, decayed = (
            trained(BCConfig(**{**vars(CONFIG), **constant, "weight_decay": decay}), 1) for decay in (0.0, 0.5)
        )
        start = policy().network.parameters()
        pairs = zip(plain.policy.network.parameters(), decayed.policy.network.parameters(), strict=True)
        for before, (without, with_decay) in zip(start, pairs, strict=True):
            torch.testing.assert_close(without - with_decay, before * 0.005, atol=1e-6, rtol=1e-3)


class TestState:
    def test_going_on_gives_the_same_numbers(self) -> None:
        whole = trained(CONFIG, 30)
        first = trained(CONFIG, 12)
        second = BCLearner(policy(seed=5), CONFIG, seed=7)  # everything of it is to be replaced
        second.restore(first.state())
        assert second.step == 12
        trained(CONFIG, 30, second)
        assert all(torch.equal(value, whole.state()[name]) for name, value in second.state().items())

    def test_a_state_of_another_network_is_refused(self) -> None:
        other = BCLearner(policy(width=16), CONFIG, 0)
        with pytest.raises(CheckpointError, match="does not fit"):
            trained(CONFIG, 1).restore(other.state())
        with pytest.raises(CheckpointError, match="does not fit"):
            trained(CONFIG, 1).restore({})

    def test_seeds(self) -> None:
        one, same, other = (trained(CONFIG, 3, seed=seed).state() for seed in (1, 1, 2))
        assert all(torch.equal(value, same[name]) for name, value in one.items())
        assert not torch.equal(one["network.out.bias"], other["network.out.bias"])


class TestSchedules:
    def test_one_cycle(self) -> None:
        config = BCConfig(steps=1000, learning_rate=1e-3)
        rates = [learning_rate_at(step, config) for step in range(1000)]
        assert rates[0] == pytest.approx(1e-3 / 25)
        assert max(rates) == rates[100] == pytest.approx(1e-3)
        assert rates[550] == pytest.approx(5e-4)
        assert rates[-1] < 1e-8

    def test_cosine_and_constant(self) -> None:
        cosine = BCConfig(steps=100, schedule="cosine", learning_rate=1.0)
        assert learning_rate_at(0, cosine) == 1.0
        assert learning_rate_at(50, cosine) == pytest.approx(0.5)
        assert learning_rate_at(99, BCConfig(steps=100, schedule="constant", learning_rate=0.5)) == 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"horizon": 0},
        {"steps": 0},
        {"batch_size": True},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"average": 1.0},
        {"weight_decay": -1.0},
        {"gradient_norm": math.inf},
    ],
)
def test_settings_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        BCConfig(**changes)


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="one_cycle"):
        BCConfig(schedule="one-cycle")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="bfloat16"):
        BCConfig(precision="bf16")  # type: ignore[arg-type]
