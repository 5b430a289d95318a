"""The steerability probe: known answers on a world where they can be worked out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from counterflow.errors import InvalidInputError
from counterflow.experiments.figures import steerability
from counterflow.experiments.online_agents import PriorLatent
from counterflow.experiments.probe import FixedNoise, RandomResidual, probe, reach_of, runs_of, worse
from counterflow.experiments.statistics import SuccessRate
from counterflow.layout import ActionLayout
from counterflow.policies import ActionSpec, FieldPolicy, FlowPolicy
from counterflow.random import generator
from counterflow.steering import LatentShape, SteeredPolicy, SteeringContext, SteeringSpace


def test_a_probe_answers_all_questions(plane: Any, prior: FlowPolicy, tmp_path: Path) -> None:
    counted = []
    with plane(4) as env:
        found = probe(env, prior, 4, draws=3, steps=2, on_episode=counted.append)
        again = probe(env, prior, 4, draws=3, steps=2)
    assert len(counted) == 4 * runs_of(3)
    assert found == again
    told = json.loads(json.dumps(found.to_json()))
    assert len(told["fixed"]) == 3
    assert set(told["recommended"]) == {"bound", "latent", "residual_std"}
    assert told["base"]["episodes"] == 4
    assert found.reach[0.5] < found.reach[3.0]
    assert steerability(found, tmp_path / "probe.png").stat().st_size > 10_000
    with pytest.raises(InvalidInputError, match="fixed noises"):
        probe(env, prior, 4, draws=0)


def test_a_flow_that_is_its_noise_reaches_as_far_as_the_bound() -> None:
    spec = ActionSpec(2, 3, (-1.0,) * 3, (1.0,) * 3, layout=ActionLayout((0, 1, 2)))
    still = FieldPolicy(lambda x, t, _: 0 * x, spec, encode=lambda seen: seen)
    found = reach_of(still, torch.zeros(5, 2), 3, generator(0))
    assert found[math.inf] == pytest.approx(1)
    assert found[1.0] == pytest.approx(1)
    assert found[0.5] == pytest.approx(0.5 / 0.7)


def test_a_noise_is_held_fixed(prior: FlowPolicy) -> None:
    noise = torch.randn(2, 2)
    plan = SteeredPolicy(prior, start=FixedNoise(noise), steps=2).act(torch.zeros(3, 4), rng=0)
    torch.testing.assert_close(plan.noise, noise.expand(3, 2, 2))


def test_a_random_residual_has_the_deviation_that_was_asked_for(prior: FlowPolicy) -> None:
    edit = RandomResidual(SteeringSpace(prior, "residual"), 0.05, 0)
    shaken = edit(torch.zeros(2000, 1, 2, 2), SteeringContext(None, 2000))
    assert shaken.std().item() == pytest.approx(0.05, rel=0.05)


def test_what_counts_as_worse() -> None:
    base = SuccessRate(10, 20)
    assert worse(SuccessRate(2, 20), base)
    assert not worse(SuccessRate(9, 20), base)
    assert worse(SuccessRate(0, 20), SuccessRate(0, 20))


@pytest.mark.parametrize("shape", [LatentShape("full"), LatentShape("repeated"), LatentShape("low_rank", 2, "zero")])
def test_latents_are_drawn_by_the_law_of_the_flow(shape: LatentShape) -> None:
    """EVO-1's noise is uniform: numbers beyond 1 would be states that it never saw."""
    spec = ActionSpec(4, 3, (-1.0,) * 3, (1.0,) * 3, prior="uniform")
    flow = FieldPolicy(lambda x, t, _: 0 * x, spec, encode=lambda seen: seen)
    start = PriorLatent(SteeringSpace(flow, bound=None, latent=shape))
    noise, _ = start(flow, SteeringContext(None, 500), generator(0))
    share = 0.5 if shape.kind == "low_rank" else 1.0  # two coefficients of four carry the energy, the rest is zero
    assert noise.square().mean().item() == pytest.approx(share / 3, rel=0.1)
    assert shape.kind == "low_rank" or noise.abs().max() <= 1
