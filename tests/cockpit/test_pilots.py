"""Who drives while no key is held: a script, and reasoners that take their time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from counterflow.cockpit.background import Daemons
from counterflow.cockpit.pilots import MOST_ABANDONED
from counterflow.cockpit.session import Session
from counterflow.envs import describe
from counterflow.errors import ReasonerError
from counterflow.reasoners import Direction
from counterflow.reasoners.vlm import VLMClient, VLMReasoner, VLMSettings

MakeSession = Callable[..., Session]
Hold = Callable[..., float]


class Slow:
    """A reasoner that looks, and answers when it is let."""

    looks = True

    def __init__(self) -> None:
        self.asked = 0
        self.begun, self.let = threading.Event(), threading.Event()
        self.fails = False

    def reset(self, seed: int) -> None: ...

    def decide(self, view: Any) -> Direction:
        assert any(name.startswith("image/") for name in view)
        self.asked += 1
        self.begun.set()
        assert self.let.wait(20)
        if self.fails:
            raise ReasonerError("the endpoint refuses.")
        return Direction((0, 0, 1), 1.0, "open")


class TestASlowPilot:
    @pytest.fixture
    def driven(
        self, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[tuple[Session, list[Slow]]]:
        session, made = make_session(stale_after=60.0), list[Slow]()

        def slow(_: str) -> Slow:
            made.append(Slow())
            return made[-1]

        monkeypatch.setattr(session.pilots, "questions", Daemons())
        session.pilots.makers["vlm"] = slow
        session.choose(pilot="vlm")
        session.resume()
        session.control.report([], 0.0)
        yield session, made
        for one in made:
            one.let.set()

    def settle(self, session: Session) -> None:
        """Wait for the answer, and take it in."""
        assert session.pilots.question is not None
        session.pilots.question[0].exception(20)
        session.control.report([], 0.0)
        session.advance(0.0)

    def test_is_waited_for_without_standing_in_the_way(self, driven: Any) -> None:
        session, (slow,) = driven
        for _ in range(3):
            assert not session.advance(0.0)
        assert slow.begun.wait(20)
        assert slow.asked == 1
        assert session.describe()["thinking"]
        assert not session.is_moving
        slow.let.set()
        self.settle(session)
        assert session.is_moving
        assert not session.describe()["thinking"]

    def test_keys_count_meanwhile_and_what_was_asked_before_is_asked_again(self, driven: Any, hold: Hold) -> None:
        session, (slow,) = driven
        session.advance(0.0)
        hold(session, "up", actions=5)
        assert session.episode.steps == 5
        slow.let.set()
        self.settle(session)
        if session.pilots.question is not None:
            session.pilots.question[0].result(20)
        assert slow.asked == 2

    def test_an_answer_to_an_earlier_episode_is_nobodys(self, driven: Any) -> None:
        session, made = driven
        session.advance(0.0)
        session.begin()
        assert len(made) == 2
        assert session.pilots.question is None
        made[0].let.set()
        session.control.report([], 0.0)
        session.advance(0.0)
        assert not session.is_moving
        made[1].let.set()
        self.settle(session)
        assert session.is_moving
        assert (made[0].asked, made[1].asked) == (1, 1)

    def test_questions_that_hang_hold_up_nothing_and_do_not_pile_up(self, driven: Any, hold: Hold) -> None:
        session, made = driven
        for episode in range(MOST_ABANDONED + 2):
            session.advance(0.0)
            assert (session.pilots.question is not None) == (episode < MOST_ABANDONED)
            assert episode >= MOST_ABANDONED or made[episode].begun.wait(20)
            assert sum(one.asked for one in made) == min(episode + 1, MOST_ABANDONED)
            session.begin()
            session.control.report([], 0.0)
        hold(session, "up")  # keys go on to move the robot
        assert session.episode.steps == 5
        for one in made[:-1]:
            one.let.set()
        for future in session.pilots.abandoned:
            future.result(20)
        session.control.report([], 0.0)
        session.advance(0.0)
        assert session.pilots.question is not None

    def test_what_it_fails_with_pauses(self, driven: Any) -> None:
        session, (slow,) = driven
        slow.fails = True
        session.advance(0.0)
        slow.let.set()
        self.settle(session)
        assert session.state == "paused"
        assert "refuses" in session.reason


def test_a_pilot_who_cannot_come_changes_nothing(make_session: MakeSession) -> None:
    def absent(_: str) -> Any:
        raise ReasonerError("there is nobody.")

    session = make_session()
    session.choose(pilot="script")
    session.pilots.makers["vlm"] = absent
    before, pilot = session.describe(), session.pilots.reasoner
    with pytest.raises(ReasonerError):
        session.choose(method="base", reversal_steps=2, magnitude=0.3, pilot="vlm")
    assert session.describe() == before
    assert session.pilots.reasoner is pilot


def test_a_script_can_be_handed_the_wheel(make_session: MakeSession) -> None:
    session = make_session()
    session.choose(pilot="script")
    session.resume()
    now = 0.0
    for _ in range(300):
        if session.state != "driving":
            break
        session.control.report([], now)
        session.advance(now)
        now += 0.05
    assert session.state == "finished"
    assert session.episode.success
    assert session.episode.method == "frs"


def test_nothing_moves_when_the_driver_went_while_a_reasoner_thought(make_session: MakeSession) -> None:
    session = make_session(stale_after=0.5)
    session.choose(pilot="script")
    session.resume()
    session.control.report([], 0.0)
    assert not session.advance(0.0)  # asked, and answered late
    assert session.is_moving
    assert not session.advance(5.0)
    assert session.episode.steps == 0


def test_a_vlm_is_handed_the_wheel(make_session: MakeSession, stand_in: Any, tmp_path: Path) -> None:
    """The real reasoner, over a real line, and an endpoint that fails once and answers "down" otherwise."""
    pytest.importorskip("openai", reason="a VLM as the reasoner needs the extra 'vlm'")
    with stand_in.stand_in() as server:
        server.faults.append(stand_in.Fault(status=500))
        client = VLMClient(VLMSettings("stand-in", server.url, back_off=0.01, cache=False), tmp_path / "vlm")
        session = make_session()
        session.pilots.makers["vlm"] = lambda env: VLMReasoner(client, describe(env).task)
        session.choose(pilot="vlm")
        session.resume()
        before = session.effector[2]
        for tick in range(12):
            session.control.report([], 0.05 * tick)
            session.advance(0.05 * tick)
        assert session.effector[2] < before - 0.02
        assert len(server.requests) >= 3
        assert (tmp_path / "vlm" / "queries.jsonl").exists()
        assert session.episode.decisions[0].active
