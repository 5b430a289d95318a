"""The page in a real browser (Debian's Chromium through Playwright). Skipped where no browser is found.

The "person" looks at the simulator through the session and presses keys of the page; nothing else reaches the robot.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="browser tests need the package playwright")
pytest.importorskip("fastapi", reason="the cockpit's page needs the extra 'cockpit'")

from playwright.sync_api import sync_playwright

from counterflow.cockpit.driver import Driver
from counterflow.cockpit.server import Cockpit, CockpitSettings, make_server
from counterflow.cockpit.session import Session, SessionSettings
from counterflow.learning.dsbc import DSBCConfig
from counterflow.reasoners import CubeReasoner
from counterflow.steering import RegressorConfig

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine; 'apt-get install chromium' brings one"
)
TASK = "ogbench/cube-single-task1"
KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "away": "ArrowUp", "nearer": "ArrowDown", "up": "w", "down": "s"}
PATIENCE = 120_000  # milliseconds; a machine that is busy is no failure
QUICK = DSBCConfig(RegressorConfig(members=2, width=16), steps=60, evaluate_every=20, patience=2)


class Served:
    """The cockpit with a simulator in a process of its own."""

    def __init__(self, out: Path, policy: str | None = None) -> None:
        self.session: Session | None = None

        def make(background: Any) -> Session:
            settings = SessionSettings(TASK, out, policy=policy, size=96, stale_after=2, distillation=QUICK)
            self.session = Session(settings, background)
            return self.session

        self.driver = Driver(make)
        self.driver.start()
        self.server = make_server(Cockpit(self.driver, CockpitSettings(port=0)))
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.thread.start()
        while not self.server.started:
            threading.Event().wait(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.server.serve()

    @property
    def cockpit(self) -> Cockpit:
        made: Cockpit = self.server.config.app.state.cockpit  # type: ignore[union-attr]
        return made

    def cut(self) -> None:
        """Cut every line, as a network does that fails."""
        for client in list(self.cockpit._clients):
            asyncio.run_coroutine_threadsafe(client.socket.close(1011), self.loop).result(30)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("browser") / "run")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield made
        made.close()


@pytest.fixture
def open_page(browser: Any, served: Served) -> Iterator[Callable[..., Any]]:
    pages: list[Any] = []
    faults: list[str] = []

    def open_one(
        width: int = 1280, height: int = 720, *, strict: bool = False, url: str = served.url, script: str = ""
    ) -> Any:
        # Playwright's own waiting evaluates strings, which the page's security policy forbids: `strict` leaves it in force.
        context = browser.new_context(viewport={"width": width, "height": height}, bypass_csp=not strict)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        if script:
            page.add_init_script(script)
        page.goto(url)
        page.wait_for_selector("#picture[data-frame]")
        pages.append(page)
        return page

    yield open_one
    for page in pages:
        page.context.close()
    for _ in range(600):
        if not served.cockpit.seats.people:
            break
        threading.Event().wait(0.05)
    assert not served.cockpit.seats.people
    # The seat is kept for who might come back; the next test's page is somebody else.
    served.cockpit.seats.driver = None
    assert not faults


def state_of(page: Any, *states: str) -> None:
    page.wait_for_function(f"{list(states)}.includes(document.querySelector('#stage').dataset.state)")


def reach(page: Any, selector: str) -> None:
    """Go to an element with the Tab key alone."""
    for _ in range(80):
        if page.evaluate(f"document.activeElement?.matches({selector!r})"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {selector}")


def drive(page: Any, served: Served, most: int = 150) -> bool:
    """Press the keys of a coarse person in tap mode, one chunk each, until the episode is over."""
    session, reasoner = served.session, CubeReasoner()
    assert session is not None
    reasoner.reset(0)
    names = {axes: name for name, axes in session.control.ways.items()}
    if page.get_attribute("#tap", "aria-checked") == "false":
        reach(page, "#tap")
        page.keyboard.press("Enter")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement === document.body")
    for _ in range(most):
        if session.state not in ("driving", "paused"):
            break
        before = session.episode.steps
        direction = reasoner.decide(session.simulator.batch.view(0))
        if direction.gripper != session.control.gripper or direction.axes not in names:
            page.keyboard.press("Space")
        else:
            page.keyboard.press(KEYS[names[direction.axes]])
        for _ in range(600):
            if session.state == "finished" or (session.episode.steps > before and not session.is_moving):
                break
            page.wait_for_timeout(10)
    return session.state == "finished" and session.episode.success


def test_from_key_presses_to_a_trained_policy(open_page: Callable[..., Any], served: Served) -> None:
    """With the keyboard alone: drive to success, keep, again, train, switch to what was trained, film, download."""
    page = open_page()
    assert drive(page, served)
    page.wait_for_selector("#banner:has-text('Success')")
    page.keyboard.press("k")
    page.wait_for_selector("#notes li.done:has-text('kept')")
    page.keyboard.press("r")
    state_of(page, "driving")
    assert drive(page, served)
    page.keyboard.press("k")
    page.wait_for_selector("#dataset:has-text('2 successes')")
    page.wait_for_selector("#tallies :text('2 of 2')")
    page.keyboard.press("t")
    page.wait_for_selector("#training-text:has-text('is ready')")
    assert page.locator("#curve polyline").count() == 2
    reach(page, "#use")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-method=dsbc][aria-checked=true]")
    page.keyboard.press("r")
    page.wait_for_function("Number(document.querySelector('#picture').dataset.step) > 5")
    page.keyboard.press("f")
    page.wait_for_selector("#exports :text('.mp4')")
    reach(page, "#exports button")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert Path(download.value.path()).stat().st_size > 1000
    page.keyboard.press("a")  # nobody drives on
    page.keyboard.press("5")
    page.wait_for_selector("[data-method=frs][aria-checked=true]")


def steps_at_rest(page: Any, session: Session) -> int:
    """Wait until the robot hasn't moved for half a second, short of the episode's end, and return its steps.

    The page says "your turn" as soon as nobody holds a key there; on a busy machine the session hears of it a little later.
    """
    steps = -1
    while session.episode.steps != steps:
        steps = session.episode.steps
        page.wait_for_timeout(500)
    assert session.state == "driving"
    assert steps < session.simulator.spec.max_episode_steps
    return steps


def test_a_held_key_moves_and_letting_go_stops(open_page: Callable[..., Any], served: Served) -> None:
    page = open_page()
    session = served.session
    assert session is not None
    page.keyboard.press("r")
    page.wait_for_function("document.querySelector('#picture').dataset.step === '0'")
    page.keyboard.down("s")
    page.wait_for_function("Number(document.querySelector('#picture').dataset.step) > 12")
    assert page.locator("#overlay polyline.fan").count() == 12
    assert page.locator("#overlay polyline.reference-path").count() == 1
    assert page.locator("#overlay polyline.chunk-path").count() == 1
    page.keyboard.up("s")
    page.wait_for_selector("#state:has-text('your turn')")
    steps = steps_at_rest(page, session)
    pad = page.locator("[data-way=up]")
    pad.dispatch_event("pointerdown", {"pointerId": 1})
    page.wait_for_function(f"Number(document.querySelector('#picture').dataset.step) > {steps + 5}")
    pad.dispatch_event("pointerup", {"pointerId": 1})
    page.wait_for_selector("#state:has-text('your turn')")


def test_pause_settings_and_the_next_task(open_page: Callable[..., Any], served: Served) -> None:
    page = open_page()
    session = served.session
    assert session is not None
    page.keyboard.press("r")
    state_of(page, "driving")
    page.keyboard.press("p")
    state_of(page, "paused")
    page.keyboard.press("p")
    state_of(page, "driving")
    reach(page, "#reversal_steps")
    page.keyboard.press("ArrowRight")  # moves the slider, and not the robot
    page.wait_for_selector("#method-pill:has-text('K 6')")
    page.focus("#magnitude")
    before = session.helm.choice.magnitude
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    page.wait_for_selector("[data-method=direct][aria-checked=true]")
    assert session.helm.choice.magnitude != before
    assert session.episode.steps == 0
    page.keyboard.press("n")
    page.wait_for_function("document.querySelector('#task').value.endsWith('task2')")
    state_of(page, "driving")
    page.select_option("#task", TASK)
    page.wait_for_function("document.querySelector('#task').value.endsWith('task1')")
    page.keyboard.press("5")
    page.wait_for_selector("[data-method=frs][aria-checked=true]")


def test_a_second_page_watches_and_a_reload_goes_on(open_page: Callable[..., Any], served: Served) -> None:
    page = open_page()
    page.keyboard.press("r")
    page.keyboard.press("s")
    page.wait_for_function("Number(document.querySelector('#picture').dataset.step) > 0")
    second = open_page(390, 844)
    second.wait_for_selector("#seat-text:has-text('somebody else drives')")
    assert second.locator("[data-way=up]").is_disabled()
    session = served.session
    assert session is not None
    index = session.episode.index
    page.reload()
    page.wait_for_selector("#seat-text:has-text('you drive')")
    state_of(page, "driving")
    assert session.episode.index == index
    page.click("#seat-button")  # hand over
    second.click("#seat-button")
    second.wait_for_selector("#seat-text:has-text('you drive')")
    page.wait_for_selector("#seat-text:has-text('you are watching')")
    second.keyboard.press("r")
    state_of(page, "driving")
    second.close()  # the driver's tab
    page.wait_for_selector("#banner:has-text('the driver\\'s page has gone')")
    steps = session.episode.steps
    page.wait_for_timeout(300)
    assert session.episode.steps == steps


def test_a_lost_line_stands_still_says_so_and_comes_back(open_page: Callable[..., Any], served: Served) -> None:
    page = open_page()
    session = served.session
    assert session is not None
    page.keyboard.press("r")
    state_of(page, "driving")
    page.keyboard.down("s")
    page.wait_for_function("Number(document.querySelector('#picture').dataset.step) > 2")
    index = session.episode.index
    served.cut()
    page.wait_for_selector("#curtain:has-text('The robot stands still')")
    page.wait_for_selector("#curtain", state="hidden")
    page.wait_for_selector("#seat-text:has-text('you drive')")
    state_of(page, "driving")
    page.wait_for_selector("#state:has-text('your turn')")  # the key was let go with the line, though it is still down
    assert session.episode.index == index
    steps = session.episode.steps
    page.wait_for_timeout(300)
    assert session.episode.steps == steps
    page.keyboard.up("s")
    page.keyboard.down("w")
    page.wait_for_function(f"Number(document.querySelector('#picture').dataset.step) > {steps}")
    page.keyboard.up("w")


def test_a_page_on_its_way_out_does_not_come_back_for_the_wheel(open_page: Callable[..., Any], served: Served) -> None:
    page = open_page()
    page.wait_for_selector("#seat-text:has-text('you drive')")
    page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', {persisted: true}))")
    page.wait_for_selector("#curtain")
    page.wait_for_timeout(2000)  # it tries after 0.8 seconds where a line was lost
    assert page.is_visible("#curtain")
    assert served.cockpit.seats.people == 0
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
    page.wait_for_selector("#curtain", state="hidden")
    page.wait_for_selector("#seat-text:has-text('you drive')")


def test_a_gamepad_drives(open_page: Callable[..., Any], served: Served) -> None:
    """Chromium without hands has no gamepad: its API is given one, as a real one would be reported."""
    pad = """window.pad = {axes: [0, 0, 0, 0], buttons: Array.from({length: 17}, () => ({pressed: false, value: 0}))};
    navigator.getGamepads = () => [null, window.pad];"""
    page = open_page(script=pad)
    session = served.session
    assert session is not None
    page.keyboard.press("r")
    state_of(page, "driving")
    page.evaluate("window.pad.axes[0] = -0.9")
    page.wait_for_selector("[data-way=left].on")
    page.wait_for_function("Number(document.querySelector('#picture').dataset.step) > 3")
    page.evaluate("window.pad.axes[0] = 0.1")
    page.wait_for_selector("#state:has-text('your turn')")
    told = page.inner_text("#gripper-state")
    page.evaluate("window.pad.buttons[0].pressed = true")
    page.wait_for_function(f"document.querySelector('#gripper-state').textContent !== '{told}'")
    page.evaluate("window.pad.buttons[0].pressed = false")


def test_what_a_server_does_not_offer_is_greyed_out_with_the_reason(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    from counterflow.experiments.evaluate import load_prior
    from counterflow.serving import ServedPolicy, ServerSettings, running
    from counterflow.steering import steer

    steered = ServedPolicy(steer(load_prior(TASK), "base"), name="cube-single", method="base")
    with running(steered, ServerSettings(port=0)) as server:
        served = Served(tmp_path / "run", server.url)
        try:
            page = open_page(url=served.url)
            assert server.url in page.inner_text("#target")
            disabled = "[...document.querySelectorAll('#methods [disabled]')].map((one) => one.dataset.method)"
            assert page.evaluate(disabled) == ["partial", "frs", "dsbc", "guided"]
            page.click("#lacking summary")
            assert "start it with 'counterflow serve ... --steer frs'" in page.inner_text("#lacking ul")
            assert page.locator("#reversal_steps").is_disabled()
            assert page.locator("#candidates").is_enabled()
            page.keyboard.press("5")
            page.wait_for_selector("#alert:has-text('--steer frs')")  # the keyboard is told, too
            page.keyboard.down("w")
            page.wait_for_function("Number(document.querySelector('#picture').dataset.step) > 3")
            page.keyboard.up("w")
            page.wait_for_selector("#state:has-text('your turn')")
            page.context.close()
        finally:
            served.stop()


def test_a_killed_simulator_shows_and_comes_back(open_page: Callable[..., Any], served: Served) -> None:
    page = open_page()
    page.keyboard.press("r")
    state_of(page, "driving")
    session = served.session
    assert session is not None
    assert session.simulator.env is not None
    os.kill(session.simulator.env._workers[0]._process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    page.keyboard.down("s")
    state_of(page, "failed")
    page.keyboard.up("s")
    page.wait_for_selector("#banner:has-text('died')")
    page.click("#restart")
    state_of(page, "driving")
    page.keyboard.down("s")
    page.wait_for_function("Number(document.querySelector('#picture').dataset.step) > 3")
    page.keyboard.up("s")


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (390, 844)])
def test_everything_can_be_read(open_page: Callable[..., Any], width: int, height: int) -> None:
    page = open_page(width, height, strict=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    smallest = page.evaluate(
        """Math.min(...[...document.querySelectorAll('body *')].filter((one) => one.offsetParent && one.childNodes.length
        && [...one.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
        .map((one) => parseFloat(getComputedStyle(one).fontSize)))"""
    )
    assert smallest >= 11
    picture = page.locator("#stage").bounding_box()
    assert picture["width"] >= 300
    assert picture["y"] + picture["height"] <= height
    for control in ("[data-way=nearer]", "#gripper", "#pause", "#reset"):
        box = page.locator(control).bounding_box()
        assert box["y"] + box["height"] <= height  # nobody scrolls while driving
        assert box["height"] >= 36  # a finger's
    page.click("#methods [data-method=base]")
    # At once: the next state that arrives takes the button back.
    page.evaluate(
        "(() => { const one = document.querySelector('#methods [data-method=guided]'); one.disabled = false; one.click() })()"
    )
    page.locator("#alert:has-text('needs a critic')").wait_for()  # what is refused is said where one looks
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
