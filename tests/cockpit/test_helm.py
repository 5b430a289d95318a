"""How it is driven is chosen while driving."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from counterflow.cockpit.session import Session
from counterflow.cockpit.targets import METHODS
from counterflow.errors import InvalidInputError, UnknownNameError

MakeSession = Callable[..., Session]
Hold = Callable[..., float]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("dsbc", "guided")])
def test_methods_are_switched_while_driving(make_session: MakeSession, method: str, hold: Hold) -> None:
    session = make_session()
    session.resume()
    now = hold(session, "down")
    session.choose(method=method, reversal_steps=3, magnitude=0.5)
    hold(session, "down", now=now)
    assert session.episode.methods == ["frs", method]
    assert session.describe()["method"] == method


def test_choices_that_cannot_be_right_change_nothing(make_session: MakeSession) -> None:
    session = make_session()
    before = session.describe()
    for wrong, error in (
        ({"method": "magic"}, UnknownNameError),
        ({"method": "dsbc"}, InvalidInputError),
        ({"method": "guided"}, InvalidInputError),
        ({"reversal_steps": 0}, InvalidInputError),
        ({"tau": 1.5}, InvalidInputError),
        ({"magnitude": -1.0}, InvalidInputError),
        ({"pilot": "nobody"}, UnknownNameError),
        ({"noise_policy": "missing"}, UnknownNameError),
    ):
        with pytest.raises(error):
            session.choose(**wrong)  # type: ignore[arg-type]
    assert session.describe() == before
