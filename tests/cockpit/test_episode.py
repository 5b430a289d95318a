"""What is noted of an episode as it is driven."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from counterflow.cockpit.session import Session
from counterflow.experiments.evaluate import load_prior
from counterflow.policies import FieldPolicy
from counterflow.steering import MethodSettings

MakeSession = Callable[..., Session]
Hold = Callable[..., float]


def test_decisions_hold_what_was_executed_of_them(make_session: MakeSession, hold: Hold) -> None:
    session = make_session()
    session.resume()
    hold(session, "down", actions=7)
    executed = [len(one.step_actions) for one in session.episode.decisions]
    assert executed == [5, 2]
    assert [one.active for one in session.episode.decisions] == [True, True]


def test_what_the_flow_gave_is_kept_as_it_gave_it(make_session: MakeSession, hold: Hold) -> None:
    shipped = load_prior("ogbench/cube-single-task1")
    policy = FieldPolicy(lambda x, t, _: torch.full_like(x, 2.0), shipped.action_spec)  # whose flow leaves the limits
    session = make_session(policy=policy, method="base", steering=MethodSettings(steps=5))
    session.resume()
    hold(session, "up", actions=10)
    session.pause()
    assert len(session.episode.decisions) == 2
    for decision in session.episode.decisions:
        given = decision.noise + 2.0
        assert np.abs(given).max() > 1.5  # beyond the actions' limits, to which the chunk is held
        assert decision.base_chunk is not None
        np.testing.assert_allclose(decision.base_chunk, given, atol=1e-4)
        np.testing.assert_allclose(decision.chunk, given.clip(-1, 1), atol=1e-4)
