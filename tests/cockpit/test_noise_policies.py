"""From what was driven to noise policies that drive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.cockpit.session import Session
from counterflow.data import SteeringDataset
from counterflow.errors import InvalidInputError
from counterflow.flow import denoise
from counterflow.policies import bind
from counterflow.steering import ChunkRegressor, binding_of

MakeSession = Callable[..., Session]
MakePerson = Callable[[Session], Any]


def test_from_successes_to_a_noise_policy_that_is_helped(
    make_session: MakeSession, make_person: MakePerson, tmp_path: Path
) -> None:
    """The whole loop: drive to successes, keep, train, switch, help, train again."""
    session = make_session()
    run = tmp_path / "run"
    assert session.describe()["dataset"]["recordings"]["episodes"] == 0
    with pytest.raises(InvalidInputError, match="no noise policy yet"):
        session.choose(method="dsbc")

    session.resume()
    person = make_person(session)
    assert person.solve()
    assert (session.state, session.reason) == ("finished", "success")
    assert not session.advance(person.now)  # nothing moves when it is over
    session.keep()
    session.keep()  # a second click changes nothing
    session.begin()
    assert make_person(session).solve()
    session.begin()  # an undecided one is kept
    session.advance(0.0)
    assert session.describe()["dataset"]["recordings"]["successes"] == 2

    dataset = SteeringDataset.load(run / "recordings")
    assert dataset.binding == binding_of(session.target.policy, 5)
    for episode in dataset:
        arrays = episode.arrays
        with torch.no_grad():
            context = session.target.policy.encode(torch.from_numpy(arrays["observations"]))
            made = (
                denoise(bind(session.target.policy, context), torch.from_numpy(arrays["noise"]), 5).clamp(-1, 1).numpy()
            )
        np.testing.assert_allclose(made, arrays["chunks"], atol=1e-4)
        assert arrays["step_noise_valid"].any()

    session.start_training()
    session.advance(0.0)
    training = session.describe()["training"]
    assert (training["state"], training["algorithm"], training["name"]) == ("done", "dsbc", "noise-policy-1")
    assert len(training["curve"]) == 3
    assert training["curve"][-1][2] is not None
    ChunkRegressor.load(run / "policies" / "noise-policy-1.safetensors")
    assert "policies/noise-policy-1.safetensors" in session.describe()["exports"]

    session.choose(method="dsbc", noise_policy="noise-policy-1", pilot="policy")
    now = 100.0
    for _ in range(10):
        session.control.report([], now)
        session.advance(now)
        now += 0.05
    assert set(session.episode.methods) == {"dsbc"}
    assert not session.episode.decisions[0].intervened
    assert make_person(session).solve()
    assert any(one.intervened for one in session.episode.decisions)
    session.begin()
    session.advance(now)
    assert session.describe()["dataset"]["corrections"]["episodes"] == 1
    assert {one["method"] for one in session.describe()["tallies"]} == {"frs", "dsbc+help"}
    (helped,) = SteeringDataset.load(run / "corrections")
    intervened, apart = helped.arrays["intervened"], helped.arrays["base_chunks"].clip(-1, 1) - helped.arrays["chunks"]
    assert np.abs(apart[~intervened]).max() < 1e-6  # where nobody helped, the noise policy's own was executed
    assert np.abs(apart[intervened]).max((1, 2)).min() > 0.01
    with torch.no_grad():  # as the flow gave it, not yet limited
        context = session.target.policy.encode(torch.from_numpy(helped.arrays["observations"]))
        given = denoise(bind(session.target.policy, context), torch.from_numpy(helped.arrays["base_noise"]), 5).numpy()
    np.testing.assert_allclose(given, helped.arrays["base_chunks"], atol=1e-4)

    session.start_training()
    session.advance(now)
    training = session.describe()["training"]
    assert (training["state"], training["algorithm"]) == ("done", "dagger")
    assert (run / "policies" / "noise-policy-2.safetensors").exists()


def test_training_without_successes_says_so(make_session: MakeSession) -> None:
    session = make_session()
    session.start_training()
    session.advance(0.0)
    assert session.describe()["training"]["state"] == "failed"
    assert "no episode of this task was kept yet" in session.notes[-1]["text"]
