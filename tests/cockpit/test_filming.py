"""Films of what was driven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from counterflow.cockpit.background import Here
from counterflow.cockpit.session import Session

MakeSession = Callable[..., Session]
Hold = Callable[..., float]


def test_a_film_of_what_was_driven(make_session: MakeSession, tmp_path: Path, hold: Hold) -> None:
    session = make_session()
    session.resume()
    hold(session, "left", actions=3)
    session.export_video()
    session.advance(0.0)
    assert session.exports() == ["videos/episode-0.mp4"]
    assert (tmp_path / "run" / "videos" / "episode-0.mp4").stat().st_size > 1000


def test_a_film_is_of_the_task_that_was_driven(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, hold: Hold
) -> None:
    session, jobs, cameras = make_session(), list[Callable[[], Any]](), list[Any]()

    class Later:
        def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
            jobs.append(lambda: function(*arguments))
            return Here().submit(lambda: "later")

    monkeypatch.setattr(session.chores, "background", Later())
    monkeypatch.setattr("counterflow.cockpit.filming.write_film", lambda *arguments: cameras.append(arguments[2]))
    session.resume()
    hold(session, "left", actions=3)
    driven = session.simulator.camera
    session.export_video()
    session.go_to("ogbench/cube-single-task2")
    assert session.simulator.camera is not driven
    jobs[0]()
    assert cameras[0] is driven
