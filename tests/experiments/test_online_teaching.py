"""Teachers: one for all seeds at first; after new successes each seed's own, distilled of all that it has."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.errors import CheckpointError, MismatchError
from counterflow.experiments import online_teaching
from counterflow.experiments.inversion import InversionSettings
from counterflow.experiments.online_teaching import Success, Teachers, successes_in
from counterflow.flow import denoise
from counterflow.policies import FlowPolicy, Normaliser, bind
from counterflow.steering import ChunkRegressor, LatentShape, RegressorConfig, SteeringSpace, binding_of

SEEN, ONE = 4, 60  # numbers of an observation, examples of an episode


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def success(noise: float, steps: int, rng: torch.Generator) -> Success:
    """An episode in which every noise is `noise`."""
    return Success(torch.randn((ONE, SEEN), generator=rng), torch.full((ONE, 2, 2), noise), steps)


def teachers(prior: FlowPolicy, known: Success | None = None, latent: LatentShape | None = None) -> Teachers:
    space = SteeringSpace(prior, "latent", 3, "euler", 3.0, latent or LatentShape())
    config = RegressorConfig(members=2, width=16, depth=1, latent=space.latent)
    size = space.latent_size
    first = ChunkRegressor(
        config,
        Normaliser(torch.zeros(SEEN), torch.ones(SEEN)),
        Normaliser(torch.zeros(size), torch.ones(size)),
        binding_of(prior, 3),
    )
    return Teachers(first.requires_grad_(False).eval(), space, [0, 1], [] if known is None else [known])


def test_a_seed_learns_from_its_own_successes_alone(prior: FlowPolicy, rng: torch.Generator) -> None:
    made, shown = teachers(prior, success(0.5, 90, rng)), torch.randn((2, 5, SEEN), generator=rng)
    before = made(shown)
    torch.testing.assert_close(before[0], made.each[0](shown[0]).flatten(1))
    assert made.teach_again(10) == []  # there is nothing but what it was distilled from
    made.found[1].append(success(2.0, 80, rng))
    assert made.teach_again(20) == [1]
    after = made(shown)
    torch.testing.assert_close(after[0], before[0])
    assert after[1].mean().item() == pytest.approx(2, abs=0.2)  # of two the quicker one, whatever it saw
    assert made.teach_again(30) == []
    for found in made.found:
        found.append(success(1.0, 85, rng))
    assert made.teach_again(40) == [0, 1]
    said = made(shown).mean((1, 2)).tolist()
    assert said[0] == pytest.approx(1, abs=0.2)
    assert 1.2 < said[1] < 1.8  # the quicker two of three: between 2 and 1


def test_of_few_that_went_different_ways_all_are_learned(prior: FlowPolicy, rng: torch.Generator) -> None:
    """None says anything of the others: whoever stops where another is told best has learned a constant."""
    made, places, noises = teachers(prior), (-1.0, 0.0, 1.0), (2.0, -2.0, 2.0)
    for index, (place, noise) in enumerate(zip(places, noises, strict=True)):
        one = success(noise, 80 + index, rng)
        made.found[0] += [
            replace(one, shown=place + 0.1 * one.shown),
            success(0.0, 200, rng),
        ]  # the slower half is left out
    made.teach_again(20)
    said = made(torch.tensor(places)[:, None].expand(2, 3, SEEN))[0].mean(1)
    torch.testing.assert_close(said, torch.tensor(noises), atol=0.4, rtol=0)


def test_every_executed_step_is_an_example_whose_noise_gives_what_was_executed(
    prior: FlowPolicy, rng: torch.Generator
) -> None:
    made, steps, dim = teachers(prior), 12, prior.action_spec.dim
    observations = torch.randn((steps, SEEN), generator=rng)
    noises = 0.3 * torch.randn((steps, prior.action_spec.horizon, dim), generator=rng)
    with torch.no_grad():
        chunks = prior.action_spec.denormalise(denoise(bind(prior, prior.encode(observations)), noises, 3))
    arrays: dict[str, Any] = {"step_observations": observations.numpy(), "step_actions": chunks[:, 0].numpy()}
    arrays["executed"] = np.full(steps, 1)
    made.see(1, arrays, InversionSettings.of("exact", 3))
    (found,) = made.found[1]
    assert (made.found[0], found.steps) == ([], steps)
    assert found.noises.shape[1:] == noises.shape[1:]
    assert 0 < len(found.shown) <= steps
    with torch.no_grad():
        again = prior.action_spec.denormalise(denoise(bind(prior, prior.encode(found.shown)), found.noises, 3))
    executed = torch.stack([chunks[row : row + again.shape[1], 0] for row in range(steps - again.shape[1] + 1)])
    kept = [row for row in range(len(executed)) if (found.shown == observations[row]).all(1).any()]
    torch.testing.assert_close(again, executed[kept], atol=0.02, rtol=0)


def test_where_no_noise_of_steps_was_recorded_decisions_teach() -> None:
    arrays = {
        "features": np.ones((3, SEEN), np.float32),
        "noise": np.ones((3, 2, 5), np.float32),
        "start_time": np.array([0.0, 0.4, 0.0], np.float32),
        "executed": np.full(3, 3),
    }
    found = Success.of(arrays, 2)
    assert (found.shown.shape, found.noises.shape, found.steps) == ((2, SEEN), (2, 2, 2), 9)
    short = {**arrays, "step_noise": np.zeros((1, 2, 2)), "step_noise_valid": np.zeros(1, bool)}
    assert len(Success.of(short, 2).shown) == 2  # an episode that is shorter than a chunk, too
    with pytest.raises(MismatchError, match="without features"):
        Success.of({name: value for name, value in arrays.items() if name != "features"}, 2)


def test_what_nobody_decides_on_is_not_taught(prior: FlowPolicy, rng: torch.Generator) -> None:
    made = teachers(prior, latent=LatentShape("repeated"))
    for found in made.found:
        found.append(success(0.5, 80, rng))
    assert made.teach_again(1) == [0, 1]
    said = made(torch.randn((2, 5, SEEN), generator=rng))
    assert said.shape == (2, 5, 2)
    assert said.mean().item() == pytest.approx(0.5, abs=0.1)


def test_they_come_back_the_same(prior: FlowPolicy, rng: torch.Generator) -> None:
    known, shown = success(0.5, 90, rng), torch.randn((2, 5, SEEN), generator=rng)
    made, other = teachers(prior, known), teachers(prior, known)
    made.found[1] += [success(2.0, 80, rng), success(1.0, 70, rng)]
    made.teach_again(20)
    made.found[1].append(success(-1.0, 60, rng))  # of which it is not distilled yet
    other.restore(made.state())
    torch.testing.assert_close(other(shown), made(shown), atol=0, rtol=0)
    assert made.teach_again(30) == other.teach_again(30) == [1]
    torch.testing.assert_close(other(shown), made(shown), atol=0, rtol=0)
    with pytest.raises(CheckpointError, match="the noise policy and seeds that the run began with"):
        other.restore({"taught": torch.tensor([1, 1])})
    torch.testing.assert_close(other(shown), made(shown), atol=0, rtol=0)


def test_an_intention_is_left_out(prior: FlowPolicy, rng: torch.Generator) -> None:
    first = teachers(prior).each[0]
    first.intention = teachers(prior).each[0]
    made, other = (Teachers(first, teachers(prior).space, [0, 1]) for _ in range(2))
    made.found[1].append(success(2.0, 80, rng))
    made.teach_again(20)
    other.restore(made.state())  # of which one was distilled again, without an intention
    assert first.intention is not None


def test_a_policy_that_looks_teaches_where_it_decided(prior: FlowPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_teaching, "looks", lambda _: True)
    monkeypatch.setattr(online_teaching, "step_noises", lambda *_: pytest.fail("its pictures were not kept"))
    made = teachers(prior)
    made.see(0, recorded(2, 0.7), InversionSettings.of("exact", 3))
    (found,) = made.found[0]
    assert (found.shown.shape, found.steps, found.noises.max().item()) == ((2, SEEN), 4, pytest.approx(0.7))


def test_a_recording_teaches_by_the_episodes_that_the_replay_begins_with(prior: FlowPolicy, tmp_path: Path) -> None:
    with SteeringDataset.create_or_open(tmp_path, binding_of(prior, 3)) as dataset:
        source = dataset.add_source({"recording": "by hand"})
        for index, success in enumerate((False, True, True)):
            dataset.append(SteeringEpisode("plane", index, index, success, source, recorded(index + 1, 0.1 * index)))
    taught = partial(successes_in, tmp_path, "plane")
    assert [one.steps for one in taught(None, successes_only=False)] == [4, 6]
    assert [one.steps for one in taught(2, successes_only=False)] == [4]
    assert [one.steps for one in taught(1, successes_only=False)] == []
    assert [one.steps for one in taught(1, successes_only=True)] == [4]


def test_noises_that_were_found_otherwise_are_refused(prior: FlowPolicy, tmp_path: Path) -> None:
    with SteeringDataset.create_or_open(tmp_path, binding_of(prior, 3)) as dataset:
        source = dataset.add_source({"recording": "by hand", "every_step": {"method": "exact"}})
        dataset.append(SteeringEpisode("plane", 0, 0, True, source, recorded(2, 0.1)))
    taught = partial(successes_in, tmp_path, "plane", None, successes_only=True)
    assert len(taught()) == len(taught(inversion="exact")) == 1
    with pytest.raises(MismatchError, match="--set inversion=exact"):
        taught(inversion="regularised")


def recorded(decisions: int, noise: float) -> dict[str, Any]:
    """An episode of a recording, of decisions of two executed actions, without noises of steps."""
    chunk, steps = (decisions, 2, 2), 2 * decisions
    return {
        "observations": np.zeros((decisions, SEEN), np.float32),
        "references": np.zeros(chunk, np.float32),
        "active": np.zeros(decisions, bool),
        "steered": np.zeros(chunk, bool),
        "noise": np.full(chunk, noise, np.float32),
        "start_time": np.zeros(decisions, np.float32),
        "chunks": np.zeros(chunk, np.float32),
        "executed": np.full(decisions, 2),
        "intervened": np.zeros(decisions, bool),
        "features": np.ones((decisions, SEEN), np.float32),
        "step_observations": np.zeros((steps, SEEN), np.float32),
        "step_actions": np.zeros((steps, 2), np.float32),
        "rewards": np.zeros(steps, np.float32),
    }
