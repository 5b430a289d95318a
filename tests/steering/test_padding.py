"""What the flow moves and nobody executes: padded dimensions, rows that lie in the past, chunks that are cut short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from counterflow.binding import Binding
from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.flow import denoise
from counterflow.policies import ActionLayout, ActionSpec, FieldPolicy, FlowPolicy, NetworkConfig, Normaliser, bind
from counterflow.random import draw_prior, generator
from counterflow.reasoners import Direction, to_reference
from counterflow.steering import (
    ChunkRegressor,
    ExecuteReference,
    FlowReversal,
    Limits,
    Reference,
    RegressorConfig,
    SteeredPolicy,
    binding_of,
    steer_learned,
)

HORIZON, DIM, PADDING = 4, 3, 2
SPEC = ActionSpec(
    HORIZON,
    DIM,
    (-9.0,) * DIM,
    (9.0,) * DIM,
    Normaliser(torch.tensor([0.1, 0.0, -0.1]), torch.tensor([2.0, 1.0, 0.5])),
    ActionLayout((0, 1, 2)),
    padding=PADDING,
)


def mixing(x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
    """A field in which padded dimensions move, and move the others."""
    return torch.sin(x.roll(1, dims=-1)) - 0.5 * x + observation[:, None, None]


class Seen(FieldPolicy):
    """Remembers the states at which it was evaluated."""

    def __init__(self, spec: ActionSpec = SPEC) -> None:
        super().__init__(self._remember, spec)
        self.states: list[tuple[Tensor, Tensor]] = []

    def _remember(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        self.states.append((x, t))
        return mixing(x, t, observation)

    def features(self, context: Tensor) -> Tensor:
        return context[:, None]


OBSERVATIONS = torch.tensor([0.0, 0.3])


class TestSpace:
    def test_actions_are_padded_with_zeros_and_cut_again(self) -> None:
        actions = torch.randn(2, HORIZON, DIM)
        state = SPEC.normalise(actions)
        assert state.shape == (2, HORIZON, DIM + PADDING) == (2, HORIZON, SPEC.state_dim)
        assert state[..., DIM:].eq(0).all()
        torch.testing.assert_close(SPEC.denormalise(state), actions)
        state[..., DIM:] = 7.0
        torch.testing.assert_close(SPEC.denormalise(state), actions)
        assert not SPEC.is_plain
        assert ActionSpec(2, 2).is_plain

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"padding": -1}, InvalidInputError),
            ({"past": HORIZON}, InvalidInputError),
            ({"past": -1}, InvalidInputError),
            ({"executed": 0}, InvalidInputError),
            ({"past": 2, "executed": 3}, InvalidInputError),
            ({"prior": "cauchy"}, UnknownNameError),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changes: dict[str, Any], error: type[Exception]) -> None:
        with pytest.raises(error):
            replace(SPEC, **changes)

    def test_a_policy_on_states_has_none_of_it(self) -> None:
        observations = Normaliser(torch.zeros(2), torch.ones(2))
        for spec in (ActionSpec(2, 2, padding=1), ActionSpec(2, 2, past=1), ActionSpec(2, 2, prior="uniform")):
            with pytest.raises(InvalidInputError, match="moves its chunk and nothing else"):
                FlowPolicy(NetworkConfig(width=4, depth=1), observations, spec)


class TestPrior:
    def test_the_uniform_prior_is_uniform(self) -> None:
        noise = draw_prior(generator(0), (1, 20_000), prior="uniform")
        assert noise.abs().max() <= 1
        torch.testing.assert_close(noise.mean(), torch.tensor(0.0), atol=0.02, rtol=0)
        torch.testing.assert_close(noise.var(), torch.tensor(1 / 3), atol=0.01, rtol=0)
        assert torch.equal(draw_prior(generator(0), (1, 5)), torch.randn((1, 5), generator=generator(0)))

    def test_a_policy_starts_from_its_own_prior(self) -> None:
        policy = FieldPolicy(mixing, ActionSpec(HORIZON, DIM, prior="uniform"))
        plan = SteeredPolicy(policy, steps=3).act(torch.zeros(500), rng=0)
        assert plan.noise.abs().max() <= 1
        assert plan.noise.std() < 0.6
        assert plan.noise_percentile.isnan().all()  # the chi distribution is that of Gaussian noise


class TestReversal:
    def reference(self) -> Tensor:
        return 0.4 * torch.ones(2, HORIZON, DIM)

    def test_a_chunk_of_actions_is_a_reference_and_speaks_for_no_padding(self) -> None:
        context = SteeredPolicy(Seen()).encode(OBSERVATIONS, Reference.of(self.reference()))
        assert context.reference is not None
        assert context.reference.chunk[..., DIM:].eq(0).all()
        assert context.reference.spoken[..., :DIM].all()
        assert not context.reference.spoken[..., DIM:].any()
        whole = Reference.of(torch.ones(2, HORIZON, DIM + PADDING))
        encoded = SteeredPolicy(Seen()).encode(OBSERVATIONS, whole).reference
        assert encoded is not None
        assert not encoded.spoken[..., DIM:].any()
        with pytest.raises(MismatchError, match="reference has shape"):
            SteeredPolicy(Seen()).encode(OBSERVATIONS, Reference.of(torch.ones(2, HORIZON, DIM + 1)))

    def test_fresh_padding_is_drawn_anew_after_the_reversal(self) -> None:
        plan = SteeredPolicy(Seen(), start=FlowReversal(4), steps=4).act(OBSERVATIONS, self.reference(), rng=5)
        fresh = torch.randn((2, HORIZON, DIM + PADDING), generator=generator(5))
        assert torch.equal(plan.noise[..., DIM:], fresh[..., DIM:])
        assert not torch.equal(plan.noise[..., :DIM], fresh[..., :DIM])

    def test_held_padding_never_drifts(self) -> None:
        """At every state that the network sees on the way back, the padding is where a training sample would have it."""
        policy = Seen()
        steered = SteeredPolicy(policy, start=FlowReversal(4, padding="held"), steps=4)
        plan = steered.act(OBSERVATIONS, self.reference(), rng=5)
        backwards = policy.states[:4]
        noise = plan.noise[..., DIM:]
        for x, t in backwards:
            torch.testing.assert_close(x[..., DIM:], (1 - t)[:, None, None] * noise, atol=1e-5, rtol=0)
        assert torch.equal(noise, torch.randn((2, HORIZON, DIM + PADDING), generator=generator(5))[..., DIM:])

    def test_without_holding_it_does_drift(self) -> None:
        policy = Seen()
        plan = SteeredPolicy(policy, start=FlowReversal(4, padding="reversed"), steps=4).act(
            OBSERVATIONS, self.reference(), rng=5
        )
        x, t = policy.states[3]
        assert (x[..., DIM:] - (1 - t)[:, None, None] * plan.noise[..., DIM:]).abs().max() > 0.01
        # What reversal gave is kept: no draw is in it.
        again = SteeredPolicy(Seen(), start=FlowReversal(4, padding="reversed"), steps=4)
        assert torch.equal(again.act(OBSERVATIONS, self.reference(), rng=6).noise, plan.noise)

    @pytest.mark.parametrize("padding", ["fresh", "held"])
    def test_a_partial_reversal_leaves_it_on_the_path_of_a_sample(self, padding: Any) -> None:
        start = FlowReversal(4, depth=0.5, padding=padding)
        plan = SteeredPolicy(Seen(), start=start, steps=4).act(OBSERVATIONS, self.reference(), rng=5)
        fresh = torch.randn((2, HORIZON, DIM + PADDING), generator=generator(5))[..., DIM:]
        torch.testing.assert_close(plan.noise[..., DIM:], 0.5 * fresh)

    def test_exact_reversal_with_held_padding_returns_the_reference(self) -> None:
        """Denoising from there with the padding held again: the actions of the reference, to the last step."""
        policy = Seen()
        plan = SteeredPolicy(policy, start=FlowReversal(6, "exact", padding="held"), steps=6).act(
            OBSERVATIONS, self.reference(), rng=5
        )
        noise = plan.noise

        def held(x: Tensor, t: Tensor) -> Tensor:
            x = torch.cat([x[..., :DIM], ((1 - t)[:, None, None] * noise)[..., DIM:]], dim=-1)
            return torch.cat([mixing(x, t, OBSERVATIONS)[..., :DIM], -noise[..., DIM:]], dim=-1)

        chunk = denoise(held, noise, 6)
        torch.testing.assert_close(chunk[..., :DIM], self.reference(), atol=1e-4, rtol=0)

    def test_an_unknown_treatment_is_refused(self) -> None:
        with pytest.raises(InvalidInputError, match="padding is 'zero'"):
            FlowReversal(padding="zero")  # type: ignore[arg-type]


class TestActing:
    def test_the_padding_takes_part_and_is_not_executed(self) -> None:
        policy = FieldPolicy(mixing, SPEC)
        plan = SteeredPolicy(policy, steps=5).act(OBSERVATIONS, rng=1)
        whole = denoise(bind(policy, OBSERVATIONS), plan.noise, 5)
        assert plan.noise.shape == (2, HORIZON, DIM + PADDING)
        assert plan.actions.shape == (2, HORIZON, DIM)
        torch.testing.assert_close(plan.actions, SPEC.denormalise(whole))
        other = plan.noise.clone()
        other[..., DIM:] += 1.0
        assert (denoise(bind(policy, OBSERVATIONS), other, 5) - whole)[..., :DIM].abs().max() > 0.01

    def test_diagnostics_leave_the_padding_out(self) -> None:
        policy = FieldPolicy(lambda x, t, o: torch.zeros_like(x), SPEC)
        reference = to_reference([Direction((1, 0, 0)), Direction(defer=True)], SPEC)
        plan = SteeredPolicy(policy, edit=ExecuteReference(), steps=1).act(OBSERVATIONS, reference, rng=0)
        assert plan.round_trip_error[0] == 0
        assert plan.agreement[0] == pytest.approx(1.0)
        squares = plan.noise[..., :DIM].square().flatten(1).sum(1)
        expected = torch.special.gammainc(torch.tensor(HORIZON * DIM / 2), squares / 2)
        torch.testing.assert_close(plan.noise_percentile, expected)

    def test_rows_in_the_past_are_decided_on_and_not_executed(self) -> None:
        spec = replace(SPEC, past=1, executed=2)
        policy = FieldPolicy(mixing, spec)
        reference = torch.zeros(2, HORIZON, DIM)
        reference[:, 0] = 5.0  # a reference can't change what is over
        plan = SteeredPolicy(policy, edit=ExecuteReference(), steps=3).act(OBSERVATIONS, reference, rng=1)
        assert plan.actions.shape == (2, HORIZON - 1, DIM)
        assert plan.chunk.shape == (2, HORIZON, DIM + PADDING)
        torch.testing.assert_close(plan.actions, spec.denormalise(torch.zeros(2, HORIZON - 1, DIM + PADDING)))
        assert (plan.chunk[:, 0, :DIM] - 5.0).abs().min() > 0.1

    def test_limits_of_an_action_say_nothing_of_the_padding(self) -> None:
        chunks = 3.0 * torch.ones(1, 1, HORIZON, DIM + PADDING)
        narrow = Limits(torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([1.0, 1.0, 2.0]))
        limited = narrow(chunks, None)  # type: ignore[arg-type]
        assert limited[0, 0, 0].tolist() == [1.0, 1.0, 2.0, 3.0, 3.0]
        assert Limits(-1.0, 1.0)(chunks, None).max() == 1.0  # type: ignore[arg-type]


class TestLearned:
    def made(self, policy: FieldPolicy, **changes: Any) -> ChunkRegressor:
        torch.manual_seed(0)
        size = HORIZON * DIM
        return ChunkRegressor(
            RegressorConfig(members=1, width=8, depth=1, **changes),
            Normaliser(torch.zeros(1), torch.ones(1)),
            Normaliser(torch.zeros(size), torch.ones(size)),
            binding_of(policy, 3),
        ).requires_grad_(False)

    def test_a_noise_policy_says_the_noise_of_actions_and_the_prior_that_of_the_padding(self) -> None:
        policy = Seen()
        regressor = self.made(policy)
        plan = steer_learned(policy, regressor).act(OBSERVATIONS, rng=4)
        torch.testing.assert_close(plan.noise[..., :DIM], regressor(OBSERVATIONS[:, None]))
        fresh = torch.randn((2, HORIZON, PADDING), generator=generator(4))
        assert torch.equal(plan.noise[..., DIM:], fresh)

    def test_a_learned_action_is_executed(self) -> None:
        policy = Seen()
        regressor = self.made(policy, target="action")
        plan = steer_learned(policy, regressor).act(OBSERVATIONS, rng=4)
        torch.testing.assert_close(plan.chunk[..., :DIM], regressor(OBSERVATIONS[:, None]), atol=1e-5, rtol=0)

    def test_the_binding_knows_the_padding(self) -> None:
        found = binding_of(Seen(), 3)
        assert (found.dim, found.padding, found.state_dim) == (DIM, PADDING, DIM + PADDING)
        assert Binding.from_json(found.to_json()) == found
        other = replace(found, padding=0)
        assert "padding" not in other.to_json()  # as it was written before padding was known
        with pytest.raises(MismatchError, match="padding 2, not 0"):
            found.check(other, "it")


def test_recording_and_inverting_keep_the_padding() -> None:
    """Arrays of an episode, inverted: the noise of what was executed gives it again, padding and past included."""
    from counterflow.data import EpisodeDataset
    from counterflow.experiments.inversion import InversionSettings, add_noises
    from counterflow.experiments.record import step_noises

    spec = replace(SPEC, past=1)
    policy = FieldPolicy(lambda x, t, o: 0.3 * torch.sin(x) + 0.1 * o.mean(1)[:, None, None], spec)
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(7, 2)).astype(np.float32)
    actions = rng.normal(size=(7, DIM)).astype(np.float32)
    dataset = EpisodeDataset({"observations": observations, "actions": actions}, np.zeros(1, np.int64), np.array([7]))
    settings = InversionSettings(steps=4)
    arrays, found = add_noises(dataset, policy, settings)
    assert found["chunks"] == 4
    assert arrays["noise_valid"].tolist() == [False, True, True, True, True, False, False]
    at = 2
    noise = torch.from_numpy(arrays["noise"][at])[None]
    chunk = denoise(bind(policy, policy.encode(torch.from_numpy(observations[at : at + 1]))), noise, 4)
    wanted = spec.normalise(torch.from_numpy(actions[at - 1 : at - 1 + HORIZON]))
    torch.testing.assert_close(chunk[0], wanted, atol=1e-4, rtol=0)
    steps = step_noises(policy, {"step_observations": observations, "step_actions": actions}, settings)
    assert steps["step_noise"].shape == (7, HORIZON, DIM + PADDING)
    torch.testing.assert_close(torch.from_numpy(steps["step_chunks"][at]), wanted)
    assert steps["step_noise_valid"].tolist() == arrays["noise_valid"].tolist()


def test_what_needs_gaussian_noise_or_one_observation_at_a_time_says_so(tmp_path: Path) -> None:
    from counterflow.experiments.analysis import analyse_reversal
    from counterflow.experiments.dagger import dagger

    uniform = FieldPolicy(mixing, ActionSpec(HORIZON, DIM, prior="uniform"))
    with pytest.raises(MismatchError, match="noise is uniform"):
        analyse_reversal(uniform, OBSERVATIONS, Reference.of(torch.zeros(2, HORIZON, DIM)), (2,))
    planning = FieldPolicy(mixing, replace(SPEC, past=1))
    with (
        mock.patch("counterflow.experiments.dagger.load_prior", return_value=planning),
        pytest.raises(MismatchError, match="plans 1 actions that are over"),
    ):
        dagger("ogbench/cube-single-task1", tmp_path / "data", tmp_path / "out")
