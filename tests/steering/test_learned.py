"""What was learned as a start (and, the baseline, as an edit): it composes, nests, and refuses what it wasn't made for."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from counterflow.binding import Binding
from counterflow.errors import CheckpointError, InvalidInputError, MismatchError, StorageError, UnknownNameError
from counterflow.flow import GaussianField
from counterflow.policies import ActionLayout, ActionSpec, FieldPolicy, FlowPolicy, NetworkConfig, Normaliser, save
from counterflow.random import RowGenerators
from counterflow.steering import (
    ChunkRegressor,
    ExecuteLearned,
    FlowReversal,
    FollowReference,
    Gaussian,
    Intention,
    LatentShape,
    LearnedNoise,
    Limits,
    NearestToReference,
    Reference,
    RegressorConfig,
    SteeredPolicy,
    SteeringContext,
    binding_of,
    features_of,
    steer_learned,
)

HORIZON, DIM, STD = 3, 4, 0.3
STEPS = 4


class Known(FieldPolicy):
    """The prior whose flow is known exactly, on observations (B, 2) whose first entry is its mean; with features."""

    def __init__(self, limit: float = 40.0) -> None:
        layout = ActionLayout(translation=(0, 1, 2), gripper=3)
        super().__init__(
            self._gaussian,
            ActionSpec(HORIZON, DIM, (-limit,) * DIM, (limit,) * DIM, layout=layout),
            self._mean,
            name="known",  # it counts, which would make it another policy after every call
        )
        self.asked = 0

    @staticmethod
    def _mean(observation: Tensor | np.ndarray) -> Tensor:
        return torch.as_tensor(observation).float()

    def _gaussian(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.asked += 1
        offset = context[:, :1, None] * torch.ones_like(x)
        return GaussianField(torch.zeros(HORIZON, DIM), STD)(x - t[:, None, None] * offset, t) + offset

    def features(self, context: Tensor) -> Tensor:
        return torch.cat([context, context.square()], dim=1)


@pytest.fixture
def known() -> Known:
    return Known()


@pytest.fixture
def observations() -> Tensor:
    return torch.tensor([[0.0, 1.0], [0.5, -1.0], [-0.5, 2.0], [1.0, 0.0], [0.2, 0.3]])


def regressor(policy: Any, steps: int = STEPS, seed: int = 0, count: int = 4, **changes: Any) -> ChunkRegressor:
    """An untrained network for a policy: what it says depends on its input all the same."""
    torch.manual_seed(seed)
    spec = policy.action_spec
    size = spec.horizon * spec.dim
    config = RegressorConfig(**{"members": 2, "width": 16, "depth": 1, **changes})
    return ChunkRegressor(
        config,
        Normaliser(torch.full((count,), 0.1), torch.full((count,), 1.5)),
        Normaliser(torch.linspace(-1, 1, size), torch.full((size,), 2.0)),
        binding_of(policy, steps),
    ).requires_grad_(False)


def saying(policy: Any, chunk: Tensor, spread: float = 0.0, **changes: Any) -> ChunkRegressor:
    """A network whose weights are set by hand: it says `chunk` (H, A), its two members that plus and minus the spread."""
    made = regressor(policy, **changes)
    for parameter in made.network.parameters():
        parameter.zero_()
    normalised = made.output_normaliser.normalise(chunk.flatten())
    signs = torch.tensor([1.0, -1.0])[:, None, None]
    made.network.biases[-1].copy_(normalised + signs * spread / made.output_normaliser.scale)
    return made


NOISE = torch.linspace(-1.2, 1.4, HORIZON * DIM).reshape(HORIZON, DIM)


def euler(policy: Any, observations: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Denoise, written out."""
    x = noise.expand(len(observations), -1, -1).clone()
    context = policy.encode(observations)
    for step in range(steps):
        x = x + policy.velocity(context, x, torch.full((len(x),), step / steps)) / steps
    return x


class Shifted(Known):
    """Its flow adds one to whatever noise it is given."""

    def velocity(self, context: Any, x: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(x)


def intending(policy: Any, noise: Tensor, chunk: Tensor, disagreement: float, **settings: Any) -> ChunkRegressor:
    """A noise policy that says `noise`, its intention `chunk`, the latter's two members that plus and minus the disagreement."""
    made = saying(policy, noise, intention=Intention(**settings), bound=None)
    made.intention = saying(policy, chunk, disagreement, target="action", bound=None)
    return made


CHUNK = torch.linspace(2.0, -1.5, HORIZON * DIM).reshape(HORIZON, DIM)


class TestIntention:
    @pytest.mark.parametrize(("members", "deviation"), [(0.4, 0.8), (0.01, 0.25)])
    def test_the_flow_starts_at_the_most_likely_noise(
        self, observations: Tensor, members: float, deviation: float
    ) -> None:
        """D(w) = w + 1, so it is a mean of the noise that was said and of a - 1, weighted by 1 / deviation^2 and the penalty."""
        policy = Shifted()
        settings = {"spread": 2.0, "floor": 0.25, "penalty": 3.0, "iterations": 800, "learning_rate": 0.02}
        plan = steer_learned(policy, intending(policy, NOISE, CHUNK, members, **settings)).act(observations)
        weight = deviation**-2
        expected = (weight * (CHUNK - 1) + 3.0 * NOISE) / (weight + 3.0)
        torch.testing.assert_close(plan.noise, expected.expand(5, -1, -1), atol=2e-3, rtol=0)
        torch.testing.assert_close(plan.chunk, plan.noise + 1)
        assert plan.start_time.eq(0).all()

    def test_a_high_penalty_leaves_the_noise_policy_alone(self, known: Known, observations: Tensor) -> None:
        plan = steer_learned(known, intending(known, NOISE, CHUNK, 0.1, penalty=1e6)).act(observations)
        torch.testing.assert_close(plan.noise, NOISE.expand(5, -1, -1), atol=2e-3, rtol=0)

    def test_saved_and_loaded_it_does_the_same(self, known: Known, observations: Tensor, tmp_path: Path) -> None:
        made = intending(known, NOISE, CHUNK, 0.1, penalty=0.5, iterations=7)
        loaded = ChunkRegressor.load(made.save(tmp_path / "intending"))
        assert loaded.config == made.config
        assert loaded.intention is not None
        assert loaded.fingerprint == made.fingerprint
        plans = [steer_learned(known, one).act(observations).noise for one in (made, loaded)]
        assert torch.equal(plans[0], plans[1])
        assert not torch.allclose(plans[0], NOISE.expand(5, -1, -1), atol=0.1)
        assert made.intention is not None
        made.intention.network.biases[-1].add_(1.0)
        assert loaded.fingerprint != made.fingerprint

    def test_it_is_for_noises_of_whole_chunks(self) -> None:
        for changes in ({"target": "action"}, {"latent": LatentShape("repeated")}):
            with pytest.raises(InvalidInputError, match="an intention was asked for"):
                RegressorConfig(intention=Intention(), **changes)  # type: ignore[arg-type]
        for name in ("spread", "floor", "penalty", "learning_rate", "iterations"):
            with pytest.raises(InvalidInputError, match=name):
                Intention(**{name: 0})


class TestStart:
    def test_the_flow_starts_where_the_network_says_and_nothing_else_happens(
        self, known: Known, observations: Tensor
    ) -> None:
        steered = steer_learned(known, saying(known, NOISE))
        known.asked = 0
        plan = steered.act(observations)
        assert known.asked == plan.evaluations == STEPS
        torch.testing.assert_close(plan.noise, NOISE.expand(5, -1, -1))
        torch.testing.assert_close(plan.chunk, euler(known, observations, NOISE, STEPS))
        assert plan.start_time.eq(0).all()
        assert torch.equal(plan.chunk, steered.act(observations, rng=7).chunk)  # nothing is left to chance

    def test_many_steps_carry_the_noise_to_mean_plus_std_times_noise(self, known: Known, observations: Tensor) -> None:
        plan = steer_learned(known, saying(known, NOISE, steps=500)).act(observations)
        expected = observations[:, 0, None, None] + STD * NOISE
        torch.testing.assert_close(plan.chunk, expected, atol=5e-3, rtol=0)

    def test_the_members_mean_counts(self, known: Known, observations: Tensor) -> None:
        made = saying(known, NOISE, spread=0.7)
        shown = features_of(known, SteeredPolicy(known).encode(observations))
        torch.testing.assert_close(made.members(shown)[0], (NOISE + 0.7).expand(5, -1, -1))
        torch.testing.assert_close(made.members(shown)[1], (NOISE - 0.7).expand(5, -1, -1))
        torch.testing.assert_close(made(shown), NOISE.expand(5, -1, -1))
        torch.testing.assert_close(steer_learned(known, made).act(observations).noise, NOISE.expand(5, -1, -1))

    def test_every_row_gets_the_noise_of_its_own_observation(self, known: Known, observations: Tensor) -> None:
        made = regressor(known)
        expected = made(known.features(known.encode(observations)))
        assert expected.std(0).min() > 1e-3
        torch.testing.assert_close(steer_learned(known, made).act(observations).noise, expected)

    @pytest.mark.parametrize("solver", ["midpoint", "rk4"])
    def test_it_denoises_as_its_binding_says(self, known: Known, observations: Tensor, solver: str) -> None:
        made = saying(known, NOISE)
        made.binding = replace(made.binding, steps=3, solver=solver)
        steered = steer_learned(known, made)
        assert (steered.steps, steered.solver) == (3, solver)
        expected = SteeredPolicy(known, start=LearnedNoise(made), steps=3, solver=solver).act(observations).chunk
        torch.testing.assert_close(steered.act(observations).chunk, expected)
        assert not torch.allclose(expected, euler(known, observations, NOISE, 3), atol=1e-3)

    def test_perturbation_spreads_it_as_told_and_row_by_row(self, known: Known) -> None:
        many = torch.zeros(400, 2)
        steered = steer_learned(known, saying(known, NOISE), perturbation=0.5)
        added = steered.act(many, rng=RowGenerators(range(400))).noise - NOISE
        assert added.std().item() == pytest.approx(0.5, abs=0.02)
        torch.testing.assert_close(added, 0.5 * RowGenerators(range(400)).normal((400, HORIZON, DIM)))

    def test_candidates_are_drawn_around_the_noise_of_their_own_row(self, known: Known, observations: Tensor) -> None:
        """Four candidates a row: each row's four share its learned noise, so the edit can choose among perturbations."""
        for inputs, count in (("features", 4), ("observation", 2)):
            made = regressor(known, count=count, inputs=inputs)
            own = made(made.inputs_of(known, SteeredPolicy(known).encode(observations)))
            start = LearnedNoise(made, perturbation=0.01)
            steered = SteeredPolicy(known, start=start, edit=NearestToReference(4), steps=STEPS)
            plan = steered.act(observations, torch.ones(5, HORIZON, DIM), 0)
            torch.testing.assert_close(plan.noise, own, atol=0.06, rtol=0)
            assert not torch.allclose(plan.noise, own, atol=1e-4)
            assert plan.evaluations == 4 * STEPS

    def test_numpy_observations_are_as_good_as_tensors(self, known: Known, observations: Tensor) -> None:
        for inputs, count in (("features", 4), ("observation", 2)):
            made = regressor(known, count=count, inputs=inputs)
            expected = steer_learned(known, made).act(observations).chunk
            for given_as in (observations.numpy(), observations.double().numpy()):
                torch.testing.assert_close(steer_learned(known, made).act(given_as).chunk, expected)

    def test_observations_of_several_dimensions_are_flattened(self) -> None:
        images = FieldPolicy(lambda x, t, o: o.mean((1, 2))[:, None, None] - x, ActionSpec(2, 2))
        made = regressor(images, count=6, inputs="observation")
        shown = torch.arange(12.0).reshape(2, 2, 3)
        torch.testing.assert_close(steer_learned(images, made).act(shown).noise, made(shown.reshape(2, 6)))

    def test_an_observation_may_be_a_single_number(self, prior: FieldPolicy, means: Tensor) -> None:
        made = regressor(prior, count=1, inputs="observation")
        torch.testing.assert_close(steer_learned(prior, made).act(means).noise, made(means[:, None]))

    def test_the_bound_clamps_every_member(self, known: Known, observations: Tensor) -> None:
        chunk = torch.full((HORIZON, DIM), 2.5)
        bounded = saying(known, chunk, spread=2.0, bound=3.0)  # members say 4.5 and 0.5; the first is brought to 3
        torch.testing.assert_close(
            steer_learned(known, bounded).act(observations).noise, torch.full((5, HORIZON, DIM), 1.75)
        )
        low = saying(known, -chunk, spread=2.0, bound=1.0)
        torch.testing.assert_close(
            steer_learned(known, low).act(observations).noise, torch.full((5, HORIZON, DIM), -0.75)
        )
        free = saying(known, 4 * chunk, bound=None)
        torch.testing.assert_close(steer_learned(known, free).act(observations).noise, (4 * chunk).expand(5, -1, -1))

    def test_inputs_far_off_look_all_the_same(self, known: Known) -> None:
        made = regressor(known)
        far, farther = torch.full((1, 4), 100.0), torch.full((1, 4), 1e6)
        assert torch.equal(made(far), made(farther))
        assert not torch.equal(made(far), made(-far))

    def test_a_nan_does_not_reach_an_action(self, known: Known, observations: Tensor) -> None:
        observations[2, 1] = torch.nan
        with pytest.raises(InvalidInputError, match="NaN"):
            steer_learned(known, regressor(known)).act(observations)


class TestComposing:
    def test_with_an_edit(self, known: Known, observations: Tensor) -> None:
        free = steer_learned(known, saying(known, NOISE)).act(observations).chunk
        edited = SteeredPolicy(known, start=LearnedNoise(saying(known, NOISE)), edit=Limits(-0.2, 0.1), steps=STEPS)
        assert not torch.equal(free, free.clamp(-0.2, 0.1))
        torch.testing.assert_close(edited.act(observations).chunk, free.clamp(-0.2, 0.1))

    def test_with_a_guidance(self, known: Known, observations: Tensor) -> None:
        """The guided entries end at the reference; in this prior entries are independent, so the others don't notice."""
        spoken = torch.zeros(5, HORIZON, DIM, dtype=torch.bool)
        spoken[..., 0] = True
        reference = Reference.of(torch.full((5, HORIZON, DIM), 0.7), steered=spoken)
        start = LearnedNoise(saying(known, NOISE))
        plan = SteeredPolicy(known, start=start, guidance=FollowReference(), steps=STEPS).act(observations, reference)
        torch.testing.assert_close(plan.chunk[..., 0], torch.full((5, HORIZON), 0.7))
        free = euler(known, observations, NOISE, STEPS)
        torch.testing.assert_close(plan.chunk[..., 1:], free[..., 1:])

    @pytest.mark.parametrize("inputs", ["features", "observation"])
    def test_what_it_drives_can_be_steered_again(self, known: Known, observations: Tensor, inputs: Any) -> None:
        made = regressor(known, count=4 if inputs == "features" else 2, inputs=inputs)
        driven = steer_learned(known, made)
        expected = driven.act(observations)
        outer = SteeredPolicy(driven, steps=STEPS).act(observations)
        torch.testing.assert_close(outer.noise, expected.noise)
        torch.testing.assert_close(outer.chunk, expected.chunk)
        limited = SteeredPolicy(SteeredPolicy(driven, edit=Limits(-0.1, 0.1), steps=STEPS), steps=STEPS)
        torch.testing.assert_close(limited.act(observations).chunk, expected.chunk.clamp(-0.1, 0.1))
        reversed_again = SteeredPolicy(driven, start=FlowReversal(STEPS, "exact"), steps=STEPS)
        wanted = torch.full((5, HORIZON, DIM), 0.4)
        torch.testing.assert_close(reversed_again.act(observations, wanted).chunk, wanted, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("inputs", ["features", "observation"])
    def test_it_may_drive_what_is_steered_already(self, known: Known, observations: Tensor, inputs: Any) -> None:
        """The start of an outer policy replaces that of the inner one, and its features are still the frozen policy's."""
        made = regressor(known, count=4 if inputs == "features" else 2, inputs=inputs)
        inner = SteeredPolicy(SteeredPolicy(known, start=Gaussian(), steps=9), edit=Limits(-0.1, 0.1), steps=9)
        assert binding_of(inner, STEPS) == binding_of(known, STEPS)
        plan = steer_learned(inner, made).act(observations)
        expected = steer_learned(known, made).act(observations)
        torch.testing.assert_close(plan.noise, expected.noise)
        torch.testing.assert_close(plan.chunk, expected.chunk.clamp(-0.1, 0.1))

    def test_features_are_those_of_the_frozen_policy_however_deep(self, known: Known, observations: Tensor) -> None:
        policy: Any = known
        for _ in range(3):
            policy = SteeredPolicy(policy)
            found = features_of(policy, policy.encode(observations))
            torch.testing.assert_close(found, torch.cat([observations, observations.square()], dim=1))

    def test_a_policy_without_features(self, prior: FieldPolicy, means: Tensor) -> None:
        with pytest.raises(MismatchError, match=r"FieldPolicy offers no features.*record and train with observations"):
            features_of(prior, SteeredPolicy(prior).encode(means))
        with pytest.raises(MismatchError, match="offers no features"):
            steer_learned(prior, regressor(prior, count=1)).act(means)


class TestExecuteLearned:
    def test_the_learned_chunk_is_executed_whatever_the_flow_gave(self, known: Known, observations: Tensor) -> None:
        made = regressor(known, target="action")
        plan = steer_learned(known, made).act(observations)
        expected = made(known.features(known.encode(observations)))
        torch.testing.assert_close(plan.chunk, expected)
        assert plan.evaluations == 1
        assert torch.equal(plan.chunk, steer_learned(known, made).act(observations, rng=9).chunk)

    def test_it_ends_within_the_limits_and_in_the_environments_units(self, observations: Tensor) -> None:
        tight = Known(limit=0.5)
        normaliser = Normaliser(torch.full((DIM,), 0.1), torch.full((DIM,), 2.0))
        tight.action_spec = replace(tight.action_spec, normaliser=normaliser)
        made = regressor(tight, target="action")
        plan = steer_learned(tight, made).act(observations)
        wanted = 0.1 + 2.0 * made(tight.features(tight.encode(observations)))
        assert wanted.abs().max() > 0.5
        torch.testing.assert_close(plan.actions, wanted.clamp(-0.5, 0.5))

    @pytest.mark.parametrize("inputs", ["features", "observation"])
    def test_it_nests(self, known: Known, observations: Tensor, inputs: Any) -> None:
        made = regressor(known, target="action", count=4 if inputs == "features" else 2, inputs=inputs)
        alone = steer_learned(known, made).act(observations).chunk
        inner = SteeredPolicy(known, edit=Limits(-9, 9))
        torch.testing.assert_close(steer_learned(inner, made).act(observations).chunk, alone)
        outer = SteeredPolicy(steer_learned(known, made), edit=Limits(-0.3, 0.2))
        torch.testing.assert_close(outer.act(observations).chunk, alone.clamp(-0.3, 0.2))
        several = SteeredPolicy(steer_learned(known, made), edit=NearestToReference(3))
        torch.testing.assert_close(several.act(observations, torch.ones(5, HORIZON, DIM), 0).chunk, alone)


class TestRefusals:
    def test_the_wrong_target(self, known: Known) -> None:
        with pytest.raises(MismatchError, match=r"trained on actions; a start needs one that was trained on noises"):
            LearnedNoise(regressor(known, target="action"))
        with pytest.raises(MismatchError, match=r"trained on noises; executing needs one trained on actions"):
            ExecuteLearned(regressor(known), known)

    @pytest.mark.parametrize("perturbation", [-0.1, 10.5, float("nan")])
    def test_perturbations_out_of_range(self, known: Known, perturbation: float) -> None:
        with pytest.raises(InvalidInputError, match="expected a number from 0 to 10"):
            LearnedNoise(regressor(known), perturbation)

    @pytest.mark.parametrize("target", ["noise", "action"])
    def test_another_frozen_policy(self, target: Any) -> None:
        policies = [flow_policy(seed) for seed in (0, 1)]
        made = regressor(policies[0], count=2, target=target)
        steer_learned(policies[0], made)
        steer_learned(SteeredPolicy(policies[0]), made)
        for other in (policies[1], SteeredPolicy(policies[1])):
            with pytest.raises(MismatchError, match=rf"this {target} policy belongs to .*policy '\w+', not '\w+'"):
                steer_learned(other, made)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"horizon": 6, "dim": 2}, "horizon 6, not 3; dim 2, not 4"),
            ({"family": "ogbench/scene"}, "family 'ogbench/scene', not ''"),
        ],
    )
    def test_another_action_space_or_family(self, known: Known, change: dict[str, Any], words: str) -> None:
        made = regressor(known)
        made.binding = replace(made.binding, **change)
        with pytest.raises(MismatchError, match=words):
            steer_learned(known, made)

    def test_inputs_of_another_size(self, known: Known, observations: Tensor) -> None:
        made = regressor(known, count=3)
        with pytest.raises(MismatchError, match=r"the features have shape \(5, 4\); this noise policy .*\(B, 3\)"):
            steer_learned(known, made).act(observations)
        with pytest.raises(MismatchError, match=r"have shape \(3,\)"):
            made(torch.zeros(3))

    @pytest.mark.parametrize("observation", [None, {"state": torch.zeros(2, 3), "image": torch.zeros(2, 3)}])
    def test_observations_that_are_not_there_or_several(self, known: Known, observation: Any) -> None:
        made = regressor(known, inputs="observation")
        with pytest.raises(MismatchError, match="none, or several kinds"):
            made.inputs_of(known, SteeringContext(torch.zeros(2, 3), 2, None, observation))

    def test_an_output_normaliser_of_another_size(self) -> None:
        with pytest.raises(InvalidInputError, match=r"has 5 entries; expected 6, as many as a chunk of 2 x 3"):
            ChunkRegressor(
                RegressorConfig(),
                Normaliser(torch.zeros(2), torch.ones(2)),
                Normaliser(torch.zeros(5), torch.ones(5)),
                Binding("x", "", 2, 3, 5),
            )

    @pytest.mark.parametrize(
        "changes",
        [
            {"members": 0},
            {"width": True},
            {"depth": 1.5},
            {"bound": 0.0},
            {"bound": float("inf")},
            {"bound": float("nan")},
        ],
    )
    def test_settings_out_of_range(self, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match=f"{next(iter(changes))} is .*; expected a"):
            RegressorConfig(**changes)

    def test_unknown_names(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'noise'"):
            RegressorConfig(target="noises")  # type: ignore[arg-type]
        with pytest.raises(UnknownNameError, match="did you mean 'features'"):
            RegressorConfig(inputs="feature")  # type: ignore[arg-type]


def flow_policy(seed: int) -> FlowPolicy:
    torch.manual_seed(seed)
    spec = ActionSpec(HORIZON, DIM, (-4.0,) * DIM, (4.0,) * DIM)
    return FlowPolicy(NetworkConfig(width=8, depth=1), Normaliser(torch.zeros(2), torch.ones(2)), spec, "ogbench/x")


@pytest.fixture
def made(known: Known) -> ChunkRegressor:
    made = regressor(known)
    made.provenance = {"algorithm": "dsbc", "seed": 3}
    return made


@pytest.fixture
def saved(made: ChunkRegressor, tmp_path: Path) -> Path:
    return made.save(tmp_path / "noise-policy")


class TestOnDisk:
    def test_everything_comes_back(self, made: ChunkRegressor, saved: Path) -> None:
        assert saved.name == "noise-policy.safetensors"
        loaded = ChunkRegressor.load(saved)
        shown = torch.randn(6, 4)
        assert torch.equal(loaded.members(shown), made.members(shown))
        assert (loaded.config, loaded.binding, loaded.provenance) == (made.config, made.binding, made.provenance)
        assert loaded.fingerprint == made.fingerprint
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())

    @pytest.mark.parametrize("changes", [{"bound": None}, {"target": "action", "depth": 3, "members": 1}])
    def test_whatever_its_settings(self, known: Known, tmp_path: Path, changes: dict[str, Any]) -> None:
        made = regressor(known, **changes)
        loaded = ChunkRegressor.load(made.save(tmp_path / "x.safetensors"))
        assert loaded.config == made.config
        assert torch.equal(loaded(torch.ones(2, 4)), made(torch.ones(2, 4)))

    def test_what_comes_back_drives_the_policy_as_before(
        self, known: Known, made: ChunkRegressor, saved: Path, observations: Tensor
    ) -> None:
        plan = steer_learned(known, ChunkRegressor.load(saved)).act(observations)
        assert torch.equal(plan.chunk, steer_learned(known, made).act(observations).chunk)

    def test_every_way_to_name_it(self, made: ChunkRegressor, saved: Path) -> None:
        ways = (saved, str(saved), saved.with_suffix(""), saved.with_suffix(".json"))
        assert {ChunkRegressor.load(way).fingerprint for way in ways} == {made.fingerprint}
        dotted = made.save(saved.with_name("noise-policy.v2"))
        assert dotted.name == "noise-policy.v2.safetensors"
        assert ChunkRegressor.load(saved.with_name("noise-policy.v2")).fingerprint == made.fingerprint

    def test_the_json_tells_a_reader_everything(self, made: ChunkRegressor, saved: Path) -> None:
        content = json.loads(saved.with_suffix(".json").read_text())
        assert content["format"] == "counterflow/chunk-regressor"
        assert content["regressor"]["target"] == "noise"
        assert content["binding"] == made.binding.to_json()
        assert content["provenance"] == {"algorithm": "dsbc", "seed": 3}

    def test_fingerprints_tell_networks_apart(self, known: Known, made: ChunkRegressor) -> None:
        assert regressor(known).fingerprint == made.fingerprint
        others = [regressor(known, seed=1), regressor(known, bound=2.0), regressor(known, steps=5)]
        assert len({made.fingerprint, *(other.fingerprint for other in others)}) == 4

    @pytest.mark.parametrize("size", [0, 4, 500, -1])
    def test_truncated(self, saved: Path, size: int) -> None:
        saved.write_bytes(saved.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=r"noise-policy\.safetensors .*truncated, damaged"):
            ChunkRegressor.load(saved)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"none\.safetensors \(no such file\)"):
            ChunkRegressor.load(tmp_path / "none")

    def test_foreign(self, tmp_path: Path) -> None:
        save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match="Noise policies are made by 'counterflow distill'"):
            ChunkRegressor.load(tmp_path / "other")

    def test_a_prior_is_no_noise_policy(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"holds a 'counterflow/flow-policy'.*'counterflow/chunk-regressor'"):
            ChunkRegressor.load(save(flow_policy(0), tmp_path / "prior"))

    def test_newer(self, saved: Path) -> None:
        rewrite(saved, format_version=2, counterflow_version="9.0")
        with pytest.raises(CheckpointError, match=r"format 2 by Counterflow 9\.0.*Upgrade"):
            ChunkRegressor.load(saved)

    def test_numbers_changed_by_hand(self, saved: Path) -> None:
        with safe_open(saved, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        tensors["output_normaliser.offset"] += 1
        save_file(tensors, saved, metadata)
        with pytest.raises(CheckpointError, match="fingerprint differs"):
            ChunkRegressor.load(saved)

    @pytest.mark.parametrize(
        ("part", "change"),
        [("binding", {"policy": "other"}), ("regressor", {"bound": 9.0}), ("regressor", {"target": "action"})],
    )
    def test_a_description_changed_by_hand(self, saved: Path, part: str, change: dict[str, Any]) -> None:
        """Whom it belongs to is part of what it is: it can't be made to fit another policy with an editor."""
        content = json.loads(saved.with_suffix(".json").read_text())
        changed: dict[str, Any] = {part: {**content[part], **change}}
        rewrite(saved, **changed)
        with pytest.raises(CheckpointError, match="fingerprint differs"):
            ChunkRegressor.load(saved)

    @pytest.mark.parametrize(
        "change",
        [
            {"regressor": {"target": "noise", "width": 32}},
            {"regressor": {"colour": "blue"}},
            {"binding": {"policy": "x"}},
            {"input": None},
        ],
    )
    def test_a_description_that_is_not_the_weights(self, saved: Path, change: dict[str, Any]) -> None:
        rewrite(saved, **change)
        with pytest.raises(CheckpointError, match="does not hold the network that it describes"):
            ChunkRegressor.load(saved)

    def test_a_description_without_a_provenance(self, saved: Path) -> None:
        rewrite(saved, drop=("provenance",))
        with pytest.raises(CheckpointError):
            ChunkRegressor.load(saved)

    def test_pairs_that_do_not_belong_together(self, known: Known, saved: Path, tmp_path: Path) -> None:
        other = regressor(known, seed=1).save(tmp_path / "other")
        other.with_suffix(".json").replace(saved.with_suffix(".json"))
        with pytest.raises(CheckpointError, match=r"describes another policy.*Delete it"):
            ChunkRegressor.load(saved)

    def test_a_full_disk_leaves_the_old_one(
        self, known: Known, made: ChunkRegressor, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(StorageError, match="the disk is full"):
            regressor(known, seed=1).save(saved)
        assert ChunkRegressor.load(saved).fingerprint == made.fingerprint

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(place=st.integers(0, 1_000_000), bit=st.integers(0, 7))
    def test_a_flipped_bit_never_changes_what_it_says(
        self, made: ChunkRegressor, saved: Path, place: int, bit: int
    ) -> None:
        """It is refused in plain words, or it fell where nothing depends on it."""
        whole = saved.read_bytes()
        name = whole.index(b"provenance")  # the test above is about its loss
        assume(not name <= place % len(whole) < name + len("provenance"))
        damaged = bytearray(whole)
        damaged[place % len(whole)] ^= 1 << bit
        target = saved.with_name("damaged.safetensors")
        target.write_bytes(damaged)
        try:
            loaded = ChunkRegressor.load(target)
        except CheckpointError:
            return
        assert torch.equal(loaded(torch.ones(2, 4)), made(torch.ones(2, 4)))
        assert loaded.binding == made.binding


def rewrite(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Change the description inside the weights' file, and drop the one beside it."""
    path.with_suffix(".json").unlink(missing_ok=True)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(file.metadata()["counterflow"])
    content = {name: value for name, value in {**content, **changes}.items() if name not in drop}
    save_file(tensors, path, {"counterflow": json.dumps(content)})
