"""The web server, over a real simulator: roles, drops, refusals. Nothing here looks at a clock."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the cockpit's page needs the extra 'cockpit'")
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import counterflow.cockpit.server as cockpit_server
from counterflow.cli import parse
from counterflow.cli_cockpit import Cockpit as CockpitCommand
from counterflow.cockpit.driver import MOST_WAITING, Driver
from counterflow.cockpit.seats import Seats
from counterflow.cockpit.server import Cockpit, CockpitSettings, make_server, unpack_frame
from counterflow.cockpit.session import Session, SessionSettings
from counterflow.errors import InvalidInputError, UnknownNameError

TASK = "ogbench/cube-single-task1"
TOKEN = "a-token-of-some-length"


@contextmanager
def served(out: Path, **settings: Any) -> Iterator[tuple[Cockpit, int]]:
    driver = Driver(
        lambda background: Session(SessionSettings(TASK, out, size=64, workers=0, stale_after=5, rate=200), background)
    )
    driver.start()
    cockpit = Cockpit(driver, CockpitSettings(port=0, **settings))
    server = make_server(cockpit)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    try:
        yield cockpit, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cockpit, int]]:
    with served(tmp_path_factory.mktemp("cockpit")) as made:
        yield made


class Page:
    """What the page does, without a browser."""

    def __init__(self, port: int, name: str, token: str | None = None, watch: bool = False, draws: bool = True) -> None:
        self.socket: ClientConnection = connect(f"ws://127.0.0.1:{port}/drive", origin=f"http://127.0.0.1:{port}")  # type: ignore[arg-type]
        self.say(type="hello", client=name, token=token, watch=watch)
        self.state: dict[str, Any] = {}
        self.role = ""
        self.errors: list[str] = []
        self.frames: list[dict[str, Any]] = []
        self.draws = draws

    def say(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def until(self, what: Callable[[Page], bool]) -> None:
        while not what(self):
            message = self.socket.recv(timeout=30)
            if isinstance(message, bytes):
                about, jpeg = unpack_frame(message)
                assert jpeg.startswith(b"\xff\xd8")
                self.frames.append(about)
                if self.draws:
                    self.say(type="seen", frame=about["frame"])
                continue
            content = json.loads(message)
            if content["type"] == "state":
                self.state = content["state"]
            elif content["type"] == "seat":
                self.role = content["role"]
            else:
                self.errors.append(content["text"])

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def test_one_drives_and_others_watch(place: tuple[Cockpit, int]) -> None:
    _, port = place
    with Page(port, "driver-0001") as driver, Page(port, "viewer-0001") as viewer:
        driver.until(lambda page: page.role == "driver" and bool(page.state) and bool(page.frames))
        viewer.until(lambda page: page.role == "viewer" and bool(page.frames))
        viewer.say(type="command", name="reset")
        viewer.until(lambda page: bool(page.errors))
        assert "somebody else drives" in viewer.errors[0]
        viewer.say(type="seat", take=True)
        viewer.until(lambda page: len(page.errors) == 2)

        driver.say(type="command", name="resume")
        step = driver.state["episode"]["step"]
        driver.say(type="report", held=["down"], sequence=1)
        viewer.until(lambda page: page.frames[-1]["step"] > step + 3 and page.frames[-1]["sequence"] == 1)
        driver.say(type="report", held=[], sequence=2)
        driver.say(type="choose", method="rank", candidates=4)
        viewer.until(lambda page: page.state.get("method") == "rank")
        driver.say(type="choose", method="magic")
        viewer.until(lambda page: any("magic" in note["text"] for note in page.state["notes"]))

        driver.say(type="seat", take=False)
        driver.until(lambda page: page.role == "viewer")
        viewer.say(type="seat", take=True)
        viewer.until(lambda page: page.role == "driver")
        assert viewer.state["state"] in ("driving", "paused")
        viewer.say(type="seat", take=False)
        viewer.until(lambda page: page.role == "viewer")


def test_closing_the_tab_pauses_and_coming_back_goes_on(place: tuple[Cockpit, int]) -> None:
    _, port = place
    with Page(port, "watcher-001", watch=True) as watcher:
        with Page(port, "driver-0002") as driver:
            driver.until(lambda page: page.role == "driver" and bool(page.state))
            driver.say(type="choose", pilot="policy", method="frs")
            driver.say(type="command", name="resume")
            driver.say(type="report", held=[])
            driver.until(lambda page: page.state["state"] == "driving" and page.frames[-1]["step"] > 0)
        watcher.until(lambda page: page.state.get("state") == "driving")
        watcher.until(lambda page: page.state["state"] == "paused" and "gone" in page.state["reason"])
        index = watcher.state["episode"]["index"]
        with Page(port, "somebody-01") as other:
            other.until(lambda page: page.role == "viewer")  # the seat is kept for a while
        with Page(port, "driver-0002") as driver:
            driver.until(lambda page: page.role == "driver" and page.state.get("state") == "driving")
            assert driver.state["episode"]["index"] == index
            assert driver.state["pilot"] == ""  # nobody but a key moves the robot now
            driver.say(type="seat", take=False)
            driver.until(lambda page: page.role == "viewer")


def test_pictures_are_dropped_for_a_page_that_does_not_draw(place: tuple[Cockpit, int]) -> None:
    _, port = place
    with Page(port, "driver-0003") as driver, Page(port, "slow-page-1", draws=False) as slow:
        driver.until(lambda page: page.role == "driver" and bool(page.frames))
        driver.say(type="command", name="reset")
        driver.say(type="report", held=["up"], sequence=1)
        driver.until(lambda page: page.frames[-1]["step"] > 20)
        driver.say(type="report", held=[], sequence=2)
        driver.say(type="command", name="pause")
        slow.until(lambda page: page.state.get("state") == "driving")
        slow.until(lambda page: page.state["state"] == "paused")
        assert len(slow.frames) == 2
        slow.draws = True
        slow.say(type="seen", frame=slow.frames[-1]["frame"])
        slow.until(lambda page: len(page.frames) == 3)
        assert slow.frames[-1]["step"] > 20  # the newest, not the next
        driver.say(type="seat", take=False)
        driver.until(lambda page: page.role == "viewer")


@pytest.mark.parametrize(
    "message",
    [
        "not json",
        "[]",
        '{"type": "report", "held": ["sideways"]}',
        '{"type": "report", "held": [], "sequence": -1}',
        '{"type": "command", "name": "format the disk"}',
        '{"type": "choose", "reversal_steps": 1e9}',
        '{"type": "choose", "magnitude": NaN}',
        '{"type": "task", "env": "../../etc", "extra": 1}',
    ],
)
def test_nonsense_is_answered_and_harms_nobody(place: tuple[Cockpit, int], message: str) -> None:
    _, port = place
    with Page(port, "nonsense-01", watch=True) as page:
        page.socket.send(message)
        page.until(lambda page: bool(page.errors))
        assert "not understood" in page.errors[0]


def test_bytes_end_only_that_connection(place: tuple[Cockpit, int], caplog: pytest.LogCaptureFixture) -> None:
    _, port = place
    with Page(port, "with-bytes1", watch=True) as page:
        page.socket.send(b"\x00\xff")
        with pytest.raises(ConnectionClosed, match="expected text"):
            page.until(lambda _: False)
    with Page(port, "afterwards0", watch=True) as page:
        page.until(lambda page: bool(page.state))
    assert "Traceback" not in caplog.text


def test_a_page_is_left_out_where_too_much_waits_and_the_server_is_not() -> None:
    driver = Driver(lambda _: pytest.fail("it is not started"))
    while driver.submit(lambda *_: None):
        assert driver._commands.qsize() <= MOST_WAITING
    assert driver._commands.qsize() == MOST_WAITING
    assert driver.submit(lambda session, _: session.pause(), urgent=True)
    assert driver._commands.qsize() == MOST_WAITING + 1


def test_messages_are_bounded(place: tuple[Cockpit, int]) -> None:
    _, port = place
    with Page(port, "too-large-1", watch=True) as page:
        page.socket.send("x" * 100_000)
        with pytest.raises(ConnectionClosed, match="1009"):
            page.until(lambda _: False)
    with Page(port, "afterwards1", watch=True) as page:
        page.until(lambda page: bool(page.state))


def test_pages_of_other_origins_and_names_are_refused(place: tuple[Cockpit, int]) -> None:
    _, port = place
    for origin in ("http://evil.example", f"http://127.0.0.1:{port + 1}", "null"):
        with pytest.raises(InvalidStatus):
            connect(f"ws://127.0.0.1:{port}/drive", origin=origin)  # type: ignore[arg-type]
    # A name of somebody else's that points here: host and origin agree, and are not this server's.
    line = socket.create_connection(("127.0.0.1", port))
    with pytest.raises(InvalidStatus):
        connect(f"ws://evil.example:{port}/drive", sock=line, origin=f"http://evil.example:{port}")  # type: ignore[arg-type]
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="421"):
        urllib.request.urlopen(request)


def test_the_page_and_its_headers(place: tuple[Cockpit, int]) -> None:
    _, port = place
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
        assert b"Counterflow" in answer.read()
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    for name in ("cockpit.js", "cockpit.css", "icon.svg"):
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/static/{name}").status == 200


def test_so_many_people_and_no_more(place: tuple[Cockpit, int], monkeypatch: pytest.MonkeyPatch) -> None:
    _, port = place
    with Page(port, "the-first-1", watch=True) as page:
        page.until(lambda page: bool(page.state))
        monkeypatch.setattr(cockpit_server, "MOST_PEOPLE", 1)
        with Page(port, "the-second1", watch=True) as other, pytest.raises(ConnectionClosed, match="too many"):
            other.until(lambda _: False)


def test_the_command_stays_at_home_or_asks_for_a_token(tmp_path: Path) -> None:
    def settings(*arguments: str) -> CockpitSettings:
        command = parse(["cockpit", TASK, *arguments])
        assert isinstance(command, CockpitCommand)
        return command.page_settings()

    assert (settings().host, settings().token) == ("127.0.0.1", None)
    made = settings("--host", "0.0.0.0").token
    assert made is not None
    assert len(made) >= 32
    assert settings("--host", "0.0.0.0").token != made
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert settings("--token-file", str(tmp_path / "token")).token == TOKEN
    with pytest.raises(InvalidInputError, match="can't be read"):
        settings("--token-file", str(tmp_path / "missing"))


def test_a_vlm_is_offered_where_one_is_named_and_noted_in_the_run(
    tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai", reason="a VLM as the reasoner needs the extra 'vlm'")
    monkeypatch.chdir(tmp_path)

    def asked(*arguments: str) -> set[str]:
        command = parse(["cockpit", TASK, "--vlm-model", "m", "--vlm-url", server.url, *arguments])
        assert isinstance(command, CockpitCommand)
        pilot = command.reasoners()["vlm"](TASK)
        assert pilot.decide({"image/front": np.zeros((8, 8, 3), np.uint8)}).axes == (0, 0, -1)
        return {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("queries.jsonl")}

    without = parse(["cockpit", TASK])
    assert isinstance(without, CockpitCommand)
    assert without.reasoners() == {}
    with stand_in.stand_in() as server:
        assert asked("--out", "mine") == {"mine/vlm"}
        assert asked() == {"mine/vlm", "runs/cockpit-cube-single/vlm"}
        assert asked("--out", "mine", "--vlm-log", "log") == {"mine/vlm", "runs/cockpit-cube-single/vlm", "log"}


def test_no_file_is_reached_by_a_name_from_the_page(place: tuple[Cockpit, int]) -> None:
    _, port = place
    with Page(port, "namer-00001") as page:
        page.until(lambda page: page.role == "driver" and bool(page.state))
        page.say(type="choose", method="dsbc", noise_policy="../../elsewhere")
        page.until(lambda page: any("elsewhere" in note["text"] for note in page.state["notes"]))
        page.say(type="task", env="../../elsewhere")
        page.until(lambda page: any("task of this family" in note["text"] for note in page.state["notes"]))
        page.say(type="seat", take=False)
        page.until(lambda page: page.role == "viewer")


@pytest.mark.parametrize(
    "name", ["tallies.json", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "policies/../tallies.json"]
)
def test_only_files_that_are_listed_leave_the_run_folder(place: tuple[Cockpit, int], name: str) -> None:
    _, port = place
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/export/{name}")


def test_beyond_the_loopback_a_token_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no token"):
        CockpitSettings(host="0.0.0.0")
    with pytest.raises(InvalidInputError, match="16 to 1024"):
        CockpitSettings(token="short")
    assert TOKEN not in repr(CockpitSettings(token=TOKEN))
    with served(tmp_path, token=TOKEN) as (cockpit, port):
        for wrong in (None, "wrong"):
            with Page(port, "stranger-01", token=wrong) as page, pytest.raises(ConnectionClosed, match="token"):
                page.until(lambda _: False)
        with Page(port, "friend-0001", token=TOKEN) as page:
            page.until(lambda page: page.role == "driver")
        cockpit.driver.exports = ["tallies.json"]
        (tmp_path / "tallies.json").write_text("{}")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/export/tallies.json")
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/export/tallies.json", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        assert urllib.request.urlopen(request).read() == b"{}"


def test_a_session_that_cannot_begin_says_why(tmp_path: Path) -> None:
    driver = Driver(lambda background: Session(SessionSettings("ogbench/cube-single-task9", tmp_path), background))
    with pytest.raises(UnknownNameError, match="task9"):
        driver.start()


class TestSeats:
    def test_the_first_drives_and_a_second_is_told(self) -> None:
        seats = Seats(reserved=10)
        assert seats.join("a", 0.0) == "driver"
        assert seats.join("b", 1.0) == "viewer"
        assert not seats.take("b", 2.0)

    def test_who_only_watches_does_not_get_the_wheel(self) -> None:
        seats = Seats()
        assert seats.join("a", 0.0, watch=True) == "viewer"
        assert seats.join("b", 0.0) == "driver"

    def test_the_wheel_is_kept_for_who_comes_back_and_free_after_a_while(self) -> None:
        seats = Seats(reserved=10)
        seats.join("a", 0.0)
        seats.join("b", 0.0)
        assert seats.leave("a", 5.0)
        assert not seats.take("b", 14.0)
        assert seats.join("a", 14.5) == "driver"
        seats.leave("a", 20.0)
        assert seats.take("b", 30.0)
        assert seats.join("a", 31.0) == "viewer"

    def test_a_reload_that_overlaps_is_no_farewell(self) -> None:
        seats = Seats()
        seats.join("a", 0.0)
        seats.join("a", 1.0)
        assert not seats.leave("a", 1.5)
        assert seats.role("a") == "driver"
        assert seats.leave("a", 2.0)
