"""What is kept of the episodes that were driven."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.cockpit.background import Daemons, Here
from counterflow.cockpit.session import Session
from counterflow.data import SteeringDataset
from counterflow.flow import denoise
from counterflow.policies import bind

MakeSession = Callable[..., Session]
Hold = Callable[..., float]


def test_what_could_not_be_kept_can_be_tried_again(make_session: MakeSession, tmp_path: Path, hold: Hold) -> None:
    session = make_session()
    session.resume()
    hold(session, "up")
    session._finish()
    place = tmp_path / "run" / "recordings"
    place.parent.mkdir(exist_ok=True)
    place.write_text("in the way")
    session.keep()
    session.advance(0.0)
    assert session.notes[-1]["kind"] == "error"
    assert session.describe()["episode"]["kept"] == ""
    place.unlink()
    session.keep()
    session.advance(0.0)
    assert session.describe()["episode"]["kept"] == "kept"
    assert len(SteeringDataset.load(place)) == 1


def test_a_change_of_task_waits_for_what_is_being_kept(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, hold: Hold
) -> None:
    """Noises are found by inversion, with the policy as it was told of the episode's own task."""
    session, order = make_session(), list[str]()
    complete, fit = session.target.complete, session.target.fit
    let = threading.Event()

    def slow(*arguments: Any, **more: Any) -> None:
        let.wait(0.3)  # as long as an inversion may take: nobody sets it
        complete(*arguments, **more)
        order.append("complete")

    monkeypatch.setattr(session.target, "complete", slow)
    monkeypatch.setattr(session.target, "fit", lambda spec: (order.append("fit"), fit(spec)))
    monkeypatch.setattr(session.chores, "background", Daemons())
    session.resume()
    hold(session, "up")
    session._finish()
    session.go_to("ogbench/cube-single-task2")
    assert order == ["complete", "fit"]


def test_noises_of_other_methods_are_found_by_inversion(make_session: MakeSession, tmp_path: Path, hold: Hold) -> None:
    session = make_session(method="direct")
    session.resume()
    now = hold(session, "down")
    session.choose(method="frs", reversal_steps=10)
    hold(session, "down", now=now)
    session._finish()
    session.keep()
    session.chores.take_in()
    assert [note["kind"] for note in session.notes] == ["done"]
    (episode,) = SteeringDataset.load(tmp_path / "run" / "recordings")
    arrays = episode.arrays
    assert not episode.success
    usable = arrays["start_time"] == 0
    with torch.no_grad():
        context = session.target.policy.encode(torch.from_numpy(arrays["observations"]))
        made = denoise(bind(session.target.policy, context), torch.from_numpy(arrays["noise"]), 5).numpy()
    np.testing.assert_allclose(made[usable], arrays["chunks"][usable], atol=0.02)
    assert usable[1]  # what the flow itself made has a noise


def test_a_discarded_episode_is_counted_and_not_kept(make_session: MakeSession, hold: Hold) -> None:
    session = make_session()
    session.resume()
    hold(session, "up")
    session._finish()
    session.discard()
    session.keep()
    session.begin()
    session.advance(0.0)
    assert session.describe()["dataset"]["recordings"]["episodes"] == 0
    assert session.describe()["tallies"][0]["episodes"] == 1


def test_an_episode_that_is_being_kept_survives_a_change_of_task(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hold: Hold
) -> None:
    session = make_session()
    jobs: list[Callable[[], Any]] = []

    class Later:
        def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
            jobs.append(lambda: function(*arguments))
            return Here().submit(lambda: "later")

    monkeypatch.setattr(session.chores, "background", Later())
    session.resume()
    hold(session, "up")
    session._finish()
    session.go_to("ogbench/cube-single-task2")
    for job in jobs:
        job()
    (episode,) = SteeringDataset.load(tmp_path / "run" / "recordings")
    assert (episode.env, episode.steps) == ("ogbench/cube-single-task1", 5)
