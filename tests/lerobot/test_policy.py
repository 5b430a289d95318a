"""LeRobot's policies as base policies: what they do alone is what LeRobot does, and what they need is computed once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from counterflow.flow import denoise
from counterflow.policies import BasePolicy, bind
from counterflow.steering import (
    FlowReversal,
    LearnedNoise,
    NearestToReference,
    SteeredPolicy,
    binding_of,
    features_of,
    steer,
    steer_learned,
)

Make = Callable[..., Any]


def test_base_steering_is_the_policys_own_chunk(made: Any) -> None:
    """Normalisation, padding, sign, time, steps, solver and postprocessor: all of it, on the same noise."""
    policy, observation = made.wrapped(), made.observation(3)
    assert isinstance(policy, BasePolicy)
    plan = SteeredPolicy(policy, steps=policy.steps, solver=policy.solver).act(observation, rng=3)
    own = made.own_chunk(observation, plan.noise)
    rows = own.shape[1]
    torch.testing.assert_close(plan.actions[:, :rows], own, atol=1e-4, rtol=1e-4)
    # Where it would not have moved from the noise a wrong sign could not be seen.
    moved = plan.actions - policy.action_spec.denormalise(plan.noise)[:, policy.action_spec.past :]
    assert moved.abs().max() > 0.05


def test_time_matters(made: Any) -> None:
    policy = made.wrapped()
    context, spec = policy.encode(made.observation()), policy.action_spec
    x = torch.randn((2, spec.horizon, spec.state_dim), generator=torch.Generator().manual_seed(0))
    velocities = [policy.velocity(context, x, torch.full((2,), t)) for t in (0.0, 0.5, 1.0)]
    assert (velocities[0] - velocities[1]).abs().max() > 1e-4
    assert (velocities[1] - velocities[2]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("smolvla", (10, 4, 28, 0, 8, "gaussian", "mean_std")),
        ("pi0", (10, 4, 28, 0, 6, "gaussian", "mean_std")),
        ("pi05", (10, 4, 28, 0, 6, "gaussian", "quantile")),
        ("multi_task_dit", (8, 4, 0, 0, 5, "gaussian", "min_max")),
        ("history", (8, 4, 0, 2, 5, "gaussian", "min_max")),
        ("evo1", (6, 4, 4, 0, 4, "uniform", "min_max")),
    ],
)
def test_the_action_space_is_described(shared: Make, kind: str, expected: tuple[Any, ...]) -> None:
    policy = shared(kind).wrapped()
    spec = policy.action_spec
    kind_of = None if spec.normaliser is None else spec.normaliser.kind
    assert (spec.horizon, spec.dim, spec.padding, spec.past, spec.executed, spec.prior, kind_of) == expected
    action = policy.description()["action"]
    assert (action["padding"], action["past"], action["prior"]) == (spec.padding, spec.past, spec.prior)


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10", "IDENTITY"])
def test_every_normalisation_is_undone_as_lerobot_does(make: Make, mode: str) -> None:
    from lerobot.configs.types import NormalizationMode

    mapping = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": mode}
    mapped = {name: NormalizationMode(value) for name, value in mapping.items()}
    made = make("multi_task_dit", normalization_mapping=mapped)
    spec = made.wrapped().action_spec
    chunk = torch.randn(2, 3, 4)
    torch.testing.assert_close(spec.denormalise(chunk), made.postprocessor(chunk), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(spec.normalise(spec.denormalise(chunk)), chunk, atol=1e-5, rtol=1e-5)


def test_a_dimension_that_never_moved_is_harmless(make: Make) -> None:
    from .conftest import STATISTICS

    still = {
        **STATISTICS,
        "action": {**STATISTICS["action"], "min": torch.full((4,), 0.5), "max": torch.full((4,), 0.5)},
    }
    made = make("multi_task_dit", stats=still)
    policy = made.wrapped()
    plan = SteeredPolicy(policy, steps=2).act(made.observation(), rng=0)
    torch.testing.assert_close(plan.actions, torch.full_like(plan.actions, 0.5), atol=1e-4, rtol=0)
    assert plan.chunk.abs().max() < 10


class TestPrefix:
    def test_it_is_computed_once_whatever_is_done_with_it(self, made: Any) -> None:
        policy, observation = made.wrapped(), made.observation()
        spec = policy.action_spec
        reference = torch.zeros(2, spec.horizon, spec.dim)
        steered = SteeredPolicy(policy, start=FlowReversal(4), edit=NearestToReference(3), steps=4)
        with (
            mock.patch.object(policy._flow, "prefix", wraps=policy._flow.prefix) as prefix,
            mock.patch.object(policy, "preprocessor", wraps=policy.preprocessor) as preprocessor,
        ):
            plan = steered.act(observation, reference, rng=0)
        assert (prefix.call_count, preprocessor.call_count) == (1, 1)
        assert plan.evaluations == 3 * 8
        assert plan.features is not None

    def test_the_backbone_rests_while_denoising(self, shared: Make) -> None:
        """Not only our own method: the vision tower itself is asked once."""
        made = shared("smolvla")
        policy = made.wrapped()
        tower = made.policy.model.vlm_with_expert.get_vlm_model().vision_model
        calls = []
        hook = tower.register_forward_hook(lambda *_: calls.append(1))
        try:
            spec = policy.action_spec
            steer(policy, "frs").act(made.observation(), torch.zeros(2, spec.horizon, spec.dim), rng=0)
        finally:
            hook.remove()
        assert len(calls) == 1  # one camera

    def test_candidates_repeat_it_row_by_row(self, made: Any) -> None:
        policy, observation = made.wrapped(), made.observation()
        context, spec = policy.encode(observation), policy.action_spec
        x = torch.randn(6, spec.horizon, spec.state_dim)
        t = torch.full((6,), 0.3)
        found = policy.velocity(context.repeat_interleave(3), x, t)
        for row in range(2):
            one = {name: value[row : row + 1] for name, value in observation.items()}
            alone = policy.velocity(policy.encode(one).repeat_interleave(3), x[3 * row : 3 * row + 3], t[:3])
            torch.testing.assert_close(found[3 * row : 3 * row + 3], alone, atol=1e-5, rtol=1e-4)


class TestReentrancy:
    """SmolVLA's own cache is appended to in place and cropped; a context must not be."""

    def states(self, policy: Any, count: int) -> list[Tensor]:
        spec = policy.action_spec
        rng = torch.Generator().manual_seed(5)
        return [torch.randn((2, spec.horizon, spec.state_dim), generator=rng) for _ in range(count)]

    def test_two_contexts_by_turns(self, made: Any) -> None:
        policy = made.wrapped()
        first, second = (policy.encode(made.observation(seed=seed)) for seed in (1, 2))
        x, y = self.states(policy, 2)
        t = torch.tensor([0.2, 0.7])
        expected = policy.velocity(first, x, t)
        for _ in range(2):
            policy.velocity(second, y, t)
            assert torch.equal(policy.velocity(first, x, t), expected)
        assert (policy.velocity(second, x, t) - expected).abs().max() > 1e-5

    def test_a_context_in_several_threads(self, made: Any) -> None:
        policy = made.wrapped()
        context, t = policy.encode(made.observation()), torch.tensor([0.2, 0.7])
        states = self.states(policy, 4)
        expected = [policy.velocity(context, x, t) for x in states]

        def work(index: int) -> bool:
            found = [policy.velocity(context, states[index], t) for _ in range(8)]
            return all(torch.equal(one, expected[index]) for one in found)

        with ThreadPoolExecutor(4) as pool:  # hands on what a thread raises
            assert all(pool.map(work, range(4)))

    def test_gradients_flow_through_all_of_denoising(self, made: Any) -> None:
        """Each step's graph keeps what it needs, although the next step has used the same context."""
        policy = made.wrapped()
        context = policy.encode(made.observation())
        (noise,), (direction,) = self.states(policy, 1), self.states(policy, 2)[1:]
        noise = noise.requires_grad_(True)
        chunk = denoise(bind(policy, context), noise, 3)
        weight = torch.linspace(-1, 1, chunk.numel()).view_as(chunk)
        (gradient,) = torch.autograd.grad((chunk * weight).sum(), noise)
        with torch.no_grad():
            step = 1e-2
            ahead, behind = (denoise(bind(policy, context), noise + sign * step * direction, 3) for sign in (1, -1))
            numeric = float(((ahead - behind) * weight).double().sum() / (2 * step))
        assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=2e-2, abs=1e-2)
        assert gradient.abs().max() > 0
        assert all(parameter.grad is None for parameter in made.policy.parameters())


class TestReversal:
    def test_an_exactly_reversed_chunk_comes_back(self, made: Any) -> None:
        policy, observation = made.wrapped(), made.observation()
        spec = policy.action_spec
        wanted = 0.3 * torch.randn((2, spec.horizon, spec.dim), generator=torch.Generator().manual_seed(2))
        start = FlowReversal(8, "exact", padding="reversed")
        plan = SteeredPolicy(policy, start=start, steps=8).act(observation, wanted, rng=0)
        # Rows in the past are drawn afresh, and the rest attends to them.
        if spec.past == 0:
            torch.testing.assert_close(plan.chunk[..., : spec.dim], wanted, atol=2e-3, rtol=0)

    @pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
    def test_padding_does_not_drift(self, shared: Make, kind: str) -> None:
        made = shared(kind)
        policy = made.wrapped()
        spec = policy.action_spec
        reference = torch.zeros(2, spec.horizon, spec.dim)
        states: list[tuple[Tensor, Tensor]] = []
        inner = policy.velocity

        def watched(context: Any, x: Tensor, t: Tensor) -> Tensor:
            states.append((x, t))
            return inner(context, x, t)

        with mock.patch.object(policy, "velocity", watched):
            steered = SteeredPolicy(policy, start=FlowReversal(4, padding="held"), steps=4)
            plan = steered.act(made.observation(), reference, rng=1)
        noise = plan.noise[..., spec.dim :]
        for x, t in states[:4]:
            torch.testing.assert_close(x[..., spec.dim :], (1 - t)[:, None, None] * noise, atol=1e-5, rtol=0)
        fresh = SteeredPolicy(policy, start=FlowReversal(4), steps=4).act(made.observation(), reference, rng=1)
        assert torch.equal(fresh.noise[..., spec.dim :], noise)
        assert abs(float(noise.std()) - 1) < 0.15

    def test_the_prior_is_the_policys(self, shared: Make) -> None:
        made = shared("evo1")
        plan = steer(made.wrapped(), "base").act(made.observation(64), rng=0)
        assert plan.noise.abs().max() <= 1
        assert abs(float(plan.noise.var()) - 1 / 3) < 0.05


class TestFeatures:
    def test_they_are_the_pooled_prefix_and_the_state(self, made: Any) -> None:
        policy, observation = made.wrapped(), made.observation()
        found = features_of(policy, SteeredPolicy(policy).encode(observation))
        assert found.shape[0] == 2
        assert found.dtype == torch.float32
        other = {**observation, "observation.state": observation["observation.state"] + 0.5}
        assert (policy.features(policy.encode(other)) - found).abs().max() > 1e-3
        looking = {**observation, "observation.images.top": 1 - observation["observation.images.top"]}
        assert (policy.features(policy.encode(looking)) - found).abs().max() > 1e-5

    def test_a_noise_policy_learns_from_them_without_the_policy(self, shared: Make) -> None:
        from counterflow.learning import DSBCConfig, NoiseExamples, distil
        from counterflow.steering import RegressorConfig

        made = shared("smolvla")
        policy = made.wrapped()
        spec = policy.action_spec
        features = policy.features(policy.encode(made.observation(24)))
        noises = torch.randn(24, spec.horizon, spec.dim)
        examples = NoiseExamples(
            features.numpy(), noises.numpy(), (torch.arange(24) // 4).numpy(), binding_of(policy, policy.steps)
        )
        config = DSBCConfig(RegressorConfig(members=2, width=16, depth=1), steps=20)
        with (
            mock.patch.object(made.policy.model, "denoise_step", side_effect=AssertionError("the VLA was asked")),
            mock.patch.object(made.policy.model, "embed_prefix", side_effect=AssertionError("the VLA was asked")),
        ):
            learned = distil(examples, config, seed=0)
        steered = steer_learned(policy, learned)
        assert isinstance(steered.start, LearnedNoise)
        plan = steered.act(made.observation(), rng=0)
        torch.testing.assert_close(plan.noise[..., : spec.dim], learned(plan.features))
        assert abs(float(plan.noise[..., spec.dim :].std()) - 1) < 0.15


@pytest.mark.parametrize("kind", ["smolvla", "pi05", "multi_task_dit"])
def test_a_compiled_step_is_the_same_step(shared: Any, kind: str) -> None:
    made = shared(kind)
    plain, compiled = made.wrapped(), made.wrapped()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    assert compiled.compile(backend=backend) is compiled
    observation, spec = made.observation(), plain.action_spec
    context, again = plain.encode(observation), compiled.encode(observation)
    x = torch.randn(2, spec.horizon, spec.state_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for time in (0.0, 0.5, 0.9):
            t = torch.full((2,), time)
            torch.testing.assert_close(compiled.velocity(again, x, t), plain.velocity(context, x, t), atol=1e-5, rtol=0)
    assert graphs
    point = x.clone().requires_grad_()
    compiled.velocity(again, point, t).sum().backward()
    assert point.grad is not None
    assert point.grad.abs().sum() > 0
