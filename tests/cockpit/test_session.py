"""A session in a real simulator, advanced by hand with a clock that is handed in."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from counterflow.cockpit.background import Daemons, Here
from counterflow.cockpit.session import MOST_ABANDONED, Session, SessionSettings
from counterflow.cockpit.targets import METHODS
from counterflow.data import SteeringDataset
from counterflow.envs import describe
from counterflow.errors import InvalidInputError, MismatchError, ReasonerError, UnknownNameError, WorkerError
from counterflow.experiments.evaluate import load_prior
from counterflow.flow import denoise
from counterflow.policies import FieldPolicy, bind
from counterflow.reasoners import Direction
from counterflow.reasoners.vlm import VLMClient, VLMReasoner, VLMSettings
from counterflow.steering import ChunkRegressor, MethodSettings, binding_of

MakeSession = Callable[..., Session]
MakePerson = Callable[[Session], Any]


def hold(session: Session, *ways: str, actions: int = 5, now: float = 0.0) -> float:
    """Hold keys for so many actions, and let go."""
    for _ in range(actions):
        session.control.report(ways, now)
        session.advance(now)
        now += 0.05
    session.control.report([], now)
    session.advance(now)
    return now


def height(session: Session) -> float:
    return float(session.effector[2])


def test_keys_move_the_robot_and_letting_go_stops_it(make_session: MakeSession) -> None:
    session = make_session()
    assert session.state == "paused"
    session.resume()
    assert not session.advance(0.0)
    before = height(session)
    now = hold(session, "down", actions=10)
    assert height(session) < before - 0.02
    steps = session._episode.steps
    assert not session.advance(now)
    assert session._episode.steps == steps == 10


def test_a_page_that_falls_silent_stops_the_robot_within_a_chunk(make_session: MakeSession) -> None:
    session = make_session(stale_after=0.12)
    session.resume()
    session.control.report(["down"], 0.0)
    moved = [session.advance(0.05 * tick) for tick in range(5)]
    assert moved == [True, True, True, False, False]


def test_decisions_hold_what_was_executed_of_them(make_session: MakeSession) -> None:
    session = make_session()
    session.resume()
    hold(session, "down", actions=7)
    executed = [len(one.step_actions) for one in session._episode.decisions]
    assert executed == [5, 2]
    assert [one.active for one in session._episode.decisions] == [True, True]


def test_what_the_flow_gave_is_kept_as_it_gave_it(make_session: MakeSession) -> None:
    shipped = load_prior("ogbench/cube-single-task1")
    policy = FieldPolicy(lambda x, t, _: torch.full_like(x, 2.0), shipped.action_spec)  # whose flow leaves the limits
    session = make_session(policy=policy, method="base", steering=MethodSettings(steps=5))
    session.resume()
    hold(session, "up", actions=10)
    session.pause()
    assert len(session._episode.decisions) == 2
    for decision in session._episode.decisions:
        given = decision.noise + 2.0
        assert np.abs(given).max() > 1.5  # beyond the actions' limits, to which the chunk is held
        assert decision.base_chunk is not None
        np.testing.assert_allclose(decision.base_chunk, given, atol=1e-4)
        np.testing.assert_allclose(decision.chunk, given.clip(-1, 1), atol=1e-4)


def test_pictures_and_paths(make_session: MakeSession) -> None:
    session = make_session()
    session.resume()
    hold(session, "left", actions=3)
    frame = session.frame
    assert frame is not None
    assert Image.open(io.BytesIO(frame.jpeg)).size == (64, 64)
    (reference,), (chunk,) = frame.overlay["reference"], frame.overlay["chunk"]
    assert reference[-1][0] < reference[0][0] - 0.02  # to the left in the picture
    assert len(reference) == len(chunk) == 6
    assert len(frame.overlay["fan"]) == 12
    assert all(0 <= value <= 1 for value in frame.overlay["gripper"])
    assert abs(frame.overlay["agreement"]) <= 1


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("dsbc", "guided")])
def test_methods_are_switched_while_driving(make_session: MakeSession, method: str) -> None:
    session = make_session()
    session.resume()
    now = hold(session, "down")
    session.choose(method=method, reversal_steps=3, magnitude=0.5)
    hold(session, "down", now=now)
    assert session._episode.methods == ["frs", method]
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


def test_a_pilot_who_cannot_come_changes_nothing(make_session: MakeSession) -> None:
    def absent(_: str) -> Any:
        raise ReasonerError("there is nobody.")

    session = make_session()
    session.choose(pilot="script")
    session._reasoners["vlm"] = absent
    before, pilot = session.describe(), session._reasoner
    with pytest.raises(ReasonerError):
        session.choose(method="base", reversal_steps=2, magnitude=0.3, pilot="vlm")
    assert session.describe() == before
    assert session._reasoner is pilot


def test_what_could_not_be_kept_can_be_tried_again(make_session: MakeSession, tmp_path: Path) -> None:
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
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
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
    monkeypatch.setattr(session, "_background", Daemons())
    session.resume()
    hold(session, "up")
    session._finish()
    session.go_to("ogbench/cube-single-task2")
    assert order == ["complete", "fit"]


def test_resetting_a_driven_episode_counts_as_a_failure_and_one_that_was_not_driven_does_not(
    make_session: MakeSession,
) -> None:
    session = make_session()
    session.begin()
    assert session.describe()["tallies"] == []
    hold(session, "up")
    session.begin()
    (tally,) = session.describe()["tallies"]
    assert (tally["method"], tally["successes"], tally["episodes"]) == ("frs", 0, 1)
    assert tally["interval"][1] > 0.5


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
    assert set(session._episode.methods) == {"dsbc"}
    assert not session._episode.decisions[0].intervened
    assert make_person(session).solve()
    assert any(one.intervened for one in session._episode.decisions)
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


def test_noises_of_other_methods_are_found_by_inversion(make_session: MakeSession, tmp_path: Path) -> None:
    session = make_session(method="direct")
    session.resume()
    now = hold(session, "down")
    session.choose(method="frs", reversal_steps=10)
    hold(session, "down", now=now)
    session._finish()
    session.keep()
    session._take_in()
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


def test_a_discarded_episode_is_counted_and_not_kept(make_session: MakeSession) -> None:
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


def test_a_run_is_gone_on_with(make_session: MakeSession) -> None:
    first = make_session()
    first.resume()
    hold(first, "up")
    first.begin()
    again = make_session()
    assert again.describe()["tallies"][0]["episodes"] == 1
    assert again._episode.index == 1
    assert again._episode.seed != first.tallies.outcomes[0].seed


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
    assert session._episode.success
    assert session._episode.method == "frs"


def test_a_simulator_that_dies_is_started_anew(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session()
    session.resume()
    with monkeypatch.context() as patch:

        def die(*_: Any, **__: Any) -> Any:
            raise WorkerError("the worker process died (exit code -9).")

        patch.setattr(session._env, "execute", die, raising=False)
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
    assert session._episode.steps == 5


def test_an_episode_that_is_being_kept_survives_a_change_of_task(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = make_session()
    jobs: list[Callable[[], Any]] = []

    class Later:
        def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
            jobs.append(lambda: function(*arguments))
            return Here().submit(lambda: "later")

    monkeypatch.setattr(session, "_background", Later())
    session.resume()
    hold(session, "up")
    session._finish()
    session.go_to("ogbench/cube-single-task2")
    for job in jobs:
        job()
    (episode,) = SteeringDataset.load(tmp_path / "run" / "recordings")
    assert (episode.env, episode.steps) == ("ogbench/cube-single-task1", 5)


def test_nothing_moves_when_the_driver_went_while_a_reasoner_thought(make_session: MakeSession) -> None:
    session = make_session(stale_after=0.5)
    session.choose(pilot="script")
    session.resume()
    session.control.report([], 0.0)
    assert not session.advance(0.0)  # asked, and answered late
    assert session.is_moving
    assert not session.advance(5.0)
    assert session._episode.steps == 0


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

        monkeypatch.setattr(session, "_questions", Daemons())
        session._reasoners["vlm"] = slow
        session.choose(pilot="vlm")
        session.resume()
        session.control.report([], 0.0)
        yield session, made
        for one in made:
            one.let.set()

    def settle(self, session: Session) -> None:
        """Wait for the answer, and take it in."""
        assert session._question is not None
        session._question[0].exception(20)
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

    def test_keys_count_meanwhile_and_what_was_asked_before_is_asked_again(self, driven: Any) -> None:
        session, (slow,) = driven
        session.advance(0.0)
        hold(session, "up", actions=5)
        assert session._episode.steps == 5
        slow.let.set()
        self.settle(session)
        if session._question is not None:
            session._question[0].result(20)
        assert slow.asked == 2

    def test_an_answer_to_an_earlier_episode_is_nobodys(self, driven: Any) -> None:
        session, made = driven
        session.advance(0.0)
        session.begin()
        assert len(made) == 2
        assert session._question is None
        made[0].let.set()
        session.control.report([], 0.0)
        session.advance(0.0)
        assert not session.is_moving
        made[1].let.set()
        self.settle(session)
        assert session.is_moving
        assert (made[0].asked, made[1].asked) == (1, 1)

    def test_questions_that_hang_hold_up_nothing_and_do_not_pile_up(self, driven: Any) -> None:
        session, made = driven
        for episode in range(MOST_ABANDONED + 2):
            session.advance(0.0)
            assert (session._question is not None) == (episode < MOST_ABANDONED)
            assert episode >= MOST_ABANDONED or made[episode].begun.wait(20)
            assert sum(one.asked for one in made) == min(episode + 1, MOST_ABANDONED)
            session.begin()
            session.control.report([], 0.0)
        hold(session, "up")  # keys go on to move the robot
        assert session._episode.steps == 5
        for one in made[:-1]:
            one.let.set()
        for future in session._abandoned:
            future.result(20)
        session.control.report([], 0.0)
        session.advance(0.0)
        assert session._question is not None

    def test_what_it_fails_with_pauses(self, driven: Any) -> None:
        session, (slow,) = driven
        slow.fails = True
        session.advance(0.0)
        slow.let.set()
        self.settle(session)
        assert session.state == "paused"
        assert "refuses" in session.reason


def test_a_vlm_is_handed_the_wheel(make_session: MakeSession, stand_in: Any, tmp_path: Path) -> None:
    """The real reasoner, over a real line, and an endpoint that fails once and answers "down" otherwise."""
    pytest.importorskip("openai", reason="a VLM as the reasoner needs the extra 'vlm'")
    with stand_in.stand_in() as server:
        server.faults.append(stand_in.Fault(status=500))
        client = VLMClient(VLMSettings("stand-in", server.url, back_off=0.01, cache=False), tmp_path / "vlm")
        session = make_session()
        session._reasoners["vlm"] = lambda env: VLMReasoner(client, describe(env).task)
        session.choose(pilot="vlm")
        session.resume()
        before = height(session)
        for tick in range(12):
            session.control.report([], 0.05 * tick)
            session.advance(0.05 * tick)
        assert height(session) < before - 0.02
        assert len(server.requests) >= 3
        assert (tmp_path / "vlm" / "queries.jsonl").exists()
        assert session._episode.decisions[0].active


def test_training_without_successes_says_so(make_session: MakeSession) -> None:
    session = make_session()
    session.start_training()
    session.advance(0.0)
    assert session.describe()["training"]["state"] == "failed"
    assert "no episode of this task was kept yet" in session.notes[-1]["text"]


def test_a_film_of_what_was_driven(make_session: MakeSession, tmp_path: Path) -> None:
    session = make_session()
    session.resume()
    hold(session, "left", actions=3)
    session.export_video()
    session.advance(0.0)
    assert session.exports() == ["videos/episode-0.mp4"]
    assert (tmp_path / "run" / "videos" / "episode-0.mp4").stat().st_size > 1000


def test_a_film_is_of_the_task_that_was_driven(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session, jobs, cameras = make_session(), list[Callable[[], Any]](), list[Any]()

    class Later:
        def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
            jobs.append(lambda: function(*arguments))
            return Here().submit(lambda: "later")

    monkeypatch.setattr(session, "_background", Later())
    monkeypatch.setattr("counterflow.cockpit.filming.write_film", lambda *arguments: cameras.append(arguments[2]))
    session.resume()
    hold(session, "left", actions=3)
    driven = session.camera
    session.export_video()
    session.go_to("ogbench/cube-single-task2")
    assert session.camera is not driven
    jobs[0]()
    assert cameras[0] is driven


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
