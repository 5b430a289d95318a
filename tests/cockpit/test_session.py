"""A session in a real simulator, advanced by hand with a clock that is handed in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from counterflow.cockpit.session import Session, SessionSettings
from counterflow.errors import MismatchError, UnknownNameError, WorkerError

MakeSession = Callable[..., Session]
Hold = Callable[..., float]


def height(session: Session) -> float:
    return float(session.effector[2])


def test_keys_move_the_robot_and_letting_go_stops_it(make_session: MakeSession, hold: Hold) -> None:
    session = make_session()
    assert session.state == "paused"
    session.resume()
    assert not session.advance(0.0)
    before = height(session)
    now = hold(session, "down", actions=10)
    assert height(session) < before - 0.02
    steps = session.episode.steps
    assert not session.advance(now)
    assert session.episode.steps == steps == 10


def test_a_page_that_falls_silent_stops_the_robot_within_a_chunk(make_session: MakeSession) -> None:
    session = make_session(stale_after=0.12)
    session.resume()
    session.control.report(["down"], 0.0)
    moved = [session.advance(0.05 * tick) for tick in range(5)]
    assert moved == [True, True, True, False, False]


def test_resetting_a_driven_episode_counts_as_a_failure_and_one_that_was_not_driven_does_not(
    make_session: MakeSession,
    hold: Hold,
) -> None:
    session = make_session()
    session.begin()
    assert session.describe()["tallies"] == []
    hold(session, "up")
    session.begin()
    (tally,) = session.describe()["tallies"]
    assert (tally["method"], tally["successes"], tally["episodes"]) == ("frs", 0, 1)
    assert tally["interval"][1] > 0.5


def test_a_run_is_gone_on_with(make_session: MakeSession, hold: Hold) -> None:
    first = make_session()
    first.resume()
    hold(first, "up")
    first.begin()
    again = make_session()
    assert again.describe()["tallies"][0]["episodes"] == 1
    assert again.episode.index == 1
    assert again.episode.seed != first.tallies.outcomes[0].seed


def test_a_simulator_that_dies_is_started_anew(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, hold: Hold
) -> None:
    session = make_session()
    session.resume()
    with monkeypatch.context() as patch:

        def die(*_: Any, **__: Any) -> Any:
            raise WorkerError("the worker process died (exit code -9).")

        patch.setattr(session.simulator.env, "execute", die, raising=False)
        session.control.report(["up"], 0.0)
        session.advance(0.0)
    assert session.state == "failed"
    assert "-9" in session.reason
    session.control.report(["up"], 0.1)
    assert not session.advance(0.1)
    session.restart()
    assert session.state == "driving"
    assert session.describe()["tallies"] == []
    hold(session, "up")
    assert session.episode.steps == 5


def test_tasks_are_those_of_the_family(make_session: MakeSession) -> None:
    session = make_session()
    assert session.tasks == [f"ogbench/cube-single-task{number}" for number in range(1, 6)]
    with pytest.raises(UnknownNameError, match="task of this family"):
        session.go_to("ogbench/scene-task1")
    session.go_to("ogbench/cube-single-task3")
    assert session.env_name == "ogbench/cube-single-task3"


def test_torques_have_no_directions(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="prior"):
        Session(SessionSettings("ogbench/antmaze-medium-task1", tmp_path))
