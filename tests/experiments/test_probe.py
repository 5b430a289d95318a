"""The steerability probe: known answers on a world where they can be worked out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from counterflow.errors import InvalidInputError
from counterflow.experiments.figures import steerability
from counterflow.experiments.online_agents import PriorLatent
from counterflow.experiments.probe import FixedNoise, RandomResidual, probe, reach_of, recommend, runs_of, worse
from counterflow.experiments.rollout import run_episodes
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
    assert set(told["recommended"]) == {"bound", "latent", "residual_std", "tells"}
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
    edit, context = RandomResidual(SteeringSpace(prior, "residual"), 0.05), SteeringContext(None, 2000)
    noise, _ = edit.begin(prior, context, generator(0))
    assert noise.std().item() == pytest.approx(1, rel=0.05)
    shaken = edit(torch.zeros(2000, 1, 2, 2), context)
    assert shaken.std().item() == pytest.approx(0.05, rel=0.05)


def test_an_episode_has_its_random_residuals_whatever_runs_beside_it(plane: Any, prior: FlowPolicy) -> None:
    shaken = RandomResidual(SteeringSpace(prior, "residual", 2), 0.3)
    policy = SteeredPolicy(prior, start=shaken.begin, edit=shaken, steps=2)

    def executed(rows: int) -> list[npt.NDArray[np.float32]]:
        with plane(rows) as env:
            episodes = run_episodes(policy, env, [1, 2, 3], record=True)
        return [np.concatenate([one.step_actions for one in episode.decisions]) for episode in episodes]

    for alone, beside in zip(executed(1), executed(3), strict=True):
        np.testing.assert_allclose(alone, beside, atol=1e-5)


def test_what_counts_as_worse() -> None:
    base = SuccessRate(10, 20)
    assert worse(SuccessRate(2, 20), base)
    assert not worse(SuccessRate(9, 20), base)
    assert worse(SuccessRate(0, 20), SuccessRate(0, 20))
    assert worse(SuccessRate(160, 200), SuccessRate(180, 200))  # more than 0.7 of it, and clearly less
    assert worse(SuccessRate(1, 20), SuccessRate(1, 20))  # nobody can tell


REACH = {0.5: 0.1, 1.0: 0.2, 1.5: 0.3, 2.0: 0.37, 3.0: 0.4, math.inf: 0.4}


def recommended(
    base: int, residual: tuple[int, ...], shapes: tuple[int, int], reach: dict[float, float] = REACH
) -> tuple[float, str, float]:
    stds = dict(zip((0.02, 0.05, 0.1, 0.2, 0.4), (SuccessRate(one, 20) for one in residual), strict=True))
    by_shape = {name: SuccessRate(one, 20) for name, one in zip(("repeated", "low_rank 2"), shapes, strict=True)}
    return recommend(SuccessRate(base, 20), stds, by_shape, reach)


class TestWhatIsRecommended:
    def test_keeps_most_of_the_reach_and_of_the_success(self) -> None:
        assert recommended(10, (10, 9, 8, 3, 0), (2, 9)) == (2.0, "low_rank 2", 0.1)
        assert recommended(10, (10, 9, 8, 9, 8), (9, 2)) == (2.0, "repeated", 0.4)
        assert recommended(10, (3, 9, 9, 9, 9), (2, 3)) == (2.0, "full", 0.01)

    def test_is_no_residual_beyond_one_that_did_harm(self) -> None:
        assert recommended(10, (10, 0, 0, 10, 0), (10, 10))[2] == 0.02

    def test_is_safe_where_nothing_can_be_told(self) -> None:
        assert recommended(1, (3, 1, 1, 1, 1), (1, 1)) == (2.0, "full", 0.01)

    def test_ends_where_the_noise_of_the_prior_does(self) -> None:
        assert recommended(10, (10,) * 5, (10, 10), {**REACH, math.inf: 0.8})[0] == 3.0


def test_a_probe_says_that_it_could_not_tell(plane: Any, prior: FlowPolicy) -> None:
    with plane(1) as env, pytest.warns(UserWarning, match=r"of 1 episodes, too few to tell.*--episodes"):
        found = probe(env, prior, 1, draws=1, steps=1)
    assert found.to_json()["recommended"] == {
        "bound": found.bound,
        "latent": "full",
        "residual_std": 0.01,
        "tells": False,
    }


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
