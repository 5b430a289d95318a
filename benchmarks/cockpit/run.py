"""How fast the cockpit's view is, and what ten steered successes of a clumsy person are worth.

    python benchmarks/cockpit/run.py

*speed* starts `counterflow cockpit` as a process of its own, once for each way of drawing that this machine has (EGL, OSMesa),
connects as a page does, and measures pictures a second while a key is held, and the time from a key's report to the first
picture in which that key has moved the robot; then the same in Chromium, where there is one, from the key's event to the drawn
canvas. It wants a machine that does nothing else. *person* drives through the page's own messages: coarse directions, one in ten
wrong, until ten episodes have succeeded; distils them; and evaluates base, steered and distilled. *vlm* runs `eval`'s own code
with a VLM as the reasoner: the endpoint is the tests' stand-in, a real HTTP server that answers what the scripted reasoner would
say and fails at every tenth question in one of five ways; it is compared with the scripted reasoner itself. *pictures* takes the
documentation's pictures of the page, in Chromium, and is left out unless it is named.

Results go to `results.json` and the tables of this folder's README and of the main one. `--only-report` leaves out the measuring;
`--out` takes another folder, and leaves the READMEs alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from websockets.sync.client import ClientConnection, connect

import counterflow.experiments.rollout as rollout
from counterflow.cockpit.driver import Driver
from counterflow.cockpit.server import Cockpit, CockpitSettings, make_server, unpack_frame
from counterflow.cockpit.session import Session, SessionSettings
from counterflow.envs.rendering import available_backends
from counterflow.experiments.distill import distill
from counterflow.experiments.evaluate import ReasonerSettings, evaluate, load_prior, machine, open_env
from counterflow.files import write_between, write_json
from counterflow.reasoners import UnreliableReasoner, scripted_reasoner
from counterflow.reasoners.vlm import VLMSettings
from counterflow.reasoners.words import OGBENCH_WAYS

HERE = Path(__file__).parent
RESULTS, FIGURES = "results.json", HERE.parents[1] / "docs" / "figures"
COMMAND = "benchmarks/cockpit/run.py"
ERROR = 0.1
VLM_ENV, VLM_EPISODES, EVERY = "ogbench/cube-single-task1", 20, 10


@dataclass(frozen=True)
class Arguments:
    """Run the cockpit's benchmark."""

    stages: tuple[Literal["speed", "person", "vlm", "pictures"], ...] = ("speed", "person", "vlm")
    """What to measure."""
    env: str = "ogbench/cube-single-task4"
    """The task."""
    seconds: float = 20.0
    """How long a key is held for pictures a second."""
    presses: int = 100
    """Key presses for the latency."""
    rate: float = 20.0
    """Actions a second of the cockpit (its default); pictures can't come faster."""
    successes: int = 10
    """Of the person."""
    episodes: int = 50
    """Of each evaluation."""
    only_report: bool = False
    """Write the tables from the results that are there."""
    out: Path | None = None
    """Where the results (and pictures) go; default: here, and into the READMEs."""


PERSON = {
    "base": "the frozen policy alone",
    "steered": "steered by the same clumsy hints",
    "distilled": "distilled from the ten, alone",
}
KEYS = ("up", "down")
PRESSES_OF_AN_EPISODE = 25  # after which a new one begins, so that none ends under a key
FASTEST = 200.0  # actions a second: more than comes
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Page:
    """What the page does, without a browser."""

    def __init__(self, port: int) -> None:
        self._open = contextlib.ExitStack()
        self._socket: ClientConnection = self._open.enter_context(connect(f"ws://127.0.0.1:{port}/drive"))
        self.state: dict[str, Any] = {}
        self.say(type="hello", client="benchmark-page")

    def say(self, **message: Any) -> None:
        """Send a message."""
        self._socket.send(json.dumps(message))

    def hear(self, timeout: float = 60.0) -> dict[str, Any] | None:
        """Take one message; return what is said of a picture, if it is one."""
        message = self._socket.recv(timeout=timeout)
        if isinstance(message, bytes):
            about, _ = unpack_frame(message)
            self.say(type="seen", frame=about["frame"])
            return about
        content = json.loads(message)
        if content["type"] == "state":
            self.state = content["state"]
        return None

    def picture(self) -> dict[str, Any]:
        """Return what is said of the next picture."""
        while (about := self.hear()) is None:
            pass
        return about

    def begin(self) -> None:
        """Begin an episode."""
        index = self.state["episode"]["index"] if self.state else -1
        self.say(type="command", name="reset")
        while self.state.get("state") != "driving" or self.state["episode"]["index"] == index:
            self.hear()

    def rest(self) -> None:
        """Take what is under way until nothing comes."""
        with contextlib.suppress(TimeoutError):
            while True:
                self.hear(0.12)

    def until(self, state: str) -> None:
        """Wait for a state."""
        while self.state.get("state") != state:
            self.hear()

    def close(self) -> None:
        """Leave."""
        self._open.close()


@contextmanager
def started(arguments: Arguments, backend: str, rate: float) -> Iterator[int]:
    """Run `counterflow cockpit`; yield its port."""
    out = tempfile.mkdtemp()
    command = [sys.executable, "-m", "counterflow.cli", "cockpit", arguments.env, "--port", "0", "--out", out]
    command += ["--rate", str(rate), "--stale-after", "5"]
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://127.0.0.1:(\d+)/", line):
                yield int(found[1])
                break
        else:
            raise SystemExit("the cockpit did not start; see above")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        shutil.rmtree(out, ignore_errors=True)


def measure_speed(arguments: Arguments, backend: str) -> dict[str, Any]:
    """Measure pictures a second and the latency from a key to motion, for one way of drawing."""
    with started(arguments, backend, arguments.rate) as port:
        latencies = press_keys(port, arguments.presses)
        pictures = count_pictures(port, arguments.seconds)
    in_browser: list[float] = []
    if BROWSER is not None:
        with started(
            arguments, backend, arguments.rate
        ) as port:  # a new one: the server remembers the presses that it saw
            in_browser = press_keys_in_browser(port, arguments.presses)
    with started(arguments, backend, FASTEST) as port:
        most = count_pictures(port, arguments.seconds)
    return {
        "backend": backend,
        "renderer": renderer_of(backend),
        "pictures_a_second": round(pictures, 2),
        "most_pictures_a_second": round(most, 2),
        **quantiles(latencies),
        **({"browser": quantiles(in_browser)} if in_browser else {}),
        "load": [round(value, 1) for value in os.getloadavg()],
    }


def renderer_of(backend: str) -> str:
    """Return what draws: a graphics card, or a library on the processor (llvmpipe, softpipe)."""
    code = (
        "import mujoco; context = mujoco.GLContext(64, 64); context.make_current()\n"
        "from OpenGL.GL import GL_RENDERER, glGetString; print(glGetString(GL_RENDERER).decode())"
    )
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def quantiles(seconds: list[float]) -> dict[str, Any]:
    """Return the latencies' quantiles."""
    p50, p99 = np.percentile(np.array(seconds) * 1000, [50, 99])
    return {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1), "presses": len(seconds)}


def press_keys(port: int, presses: int) -> list[float]:
    """Press keys as the page reports them; return the seconds until a picture shows that each has moved the robot."""
    page = Page(port)
    page.picture()
    sequence, latencies = 0, list[float]()
    while len(latencies) < presses:
        if sequence % PRESSES_OF_AN_EPISODE == 0:
            page.begin()
        sequence += 1
        began = time.perf_counter()
        page.say(type="report", held=[KEYS[sequence % 2]], sequence=sequence)
        while page.picture()["sequence"] < sequence:
            pass
        latencies.append(time.perf_counter() - began)
        page.say(type="report", held=[], sequence=sequence)
        page.rest()
    page.close()
    return latencies


def count_pictures(port: int, seconds: float) -> float:
    """Hold a key, up and down by turns; return pictures a second."""
    page = Page(port)
    page.picture()
    page.begin()
    pictures, began, said, flips = 0, time.perf_counter(), 0.0, 0
    while (now := time.perf_counter()) - began < seconds:
        if now - said > 0.1:
            said, flips = now, flips + 1
            if page.state["state"] == "finished":
                page.say(type="command", name="reset")
            page.say(type="report", held=[KEYS[flips // 10 % 2]], sequence=1)
        try:
            pictures += page.hear(0.1) is not None
        except TimeoutError:
            continue
    took = time.perf_counter() - began
    page.close()
    return pictures / took


def press_keys_in_browser(port: int, presses: int) -> list[float]:
    """Press keys of the page in Chromium; return the seconds from each key's event to the canvas that shows its motion."""
    from playwright.sync_api import sync_playwright

    # The page numbers its presses, and writes onto the canvas which press a drawn picture has answered.
    watch = """
        window.pressed = []; window.answered = [];
        addEventListener("keydown", ({code}) => /Key[WS]/.test(code) && window.pressed.push(performance.now()), true);
        const canvas = document.getElementById("picture");
        new MutationObserver(() => {
            while (window.answered.length < Number(canvas.dataset.sequence)) window.answered.push(performance.now());
        }).observe(canvas, {attributes: true, attributeFilter: ["data-sequence"]});
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        page = browser.new_context(viewport={"width": 1280, "height": 720}, bypass_csp=True).new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#picture[data-frame]")
        page.evaluate(watch)
        for press in range(1, presses + 1):
            if press % PRESSES_OF_AN_EPISODE == 1:
                page.keyboard.press("r")
                page.wait_for_selector("#clock:has-text('0.0 s')")
            page.wait_for_selector("#state:has-text('your turn')")
            key = "ws"[press % 2]
            page.keyboard.down(key)
            page.wait_for_function(f"window.answered.length >= {press}")
            page.keyboard.up(key)
        found: list[float] = page.evaluate("window.answered.map((end, index) => (end - window.pressed[index]) / 1000)")
        browser.close()
    return found


@contextmanager
def cockpit_of(settings: SessionSettings) -> Iterator[tuple[Session, int]]:
    """Serve a session's page from here; yield the session and the port."""
    made: list[Session] = []

    def make(background: Any) -> Session:
        made.append(Session(settings, background))
        return made[0]

    driver = Driver(make)
    driver.start()
    server = make_server(Cockpit(driver, CockpitSettings(port=0)))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield made[0], server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def drive_as_person(arguments: Arguments, out: Path) -> dict[str, Any]:
    """Drive to so many successes through the page's messages; return how it went."""
    reasoner = UnreliableReasoner(scripted_reasoner(arguments.env), ERROR)
    episodes = successes = presses = 0
    with cockpit_of(SessionSettings(arguments.env, out, rate=200, stale_after=30)) as (session, port):
        page = Page(port)
        page.picture()
        names = {axes: name for name, axes in session.control.ways.items()}
        while successes < arguments.successes:
            page.begin()
            reasoner.reset(episodes)
            episodes += 1
            while session.state == "driving":
                # A person looks; this one looks at the simulator. What it does goes through the page's messages alone.
                direction = reasoner.decide(session.simulator.batch.view(0))
                presses += 1
                before = session.episode.steps
                # One key at a time: what comes of it then does not depend on how fast messages travel.
                if direction.gripper != session.control.gripper or direction.axes not in names:
                    page.say(type="grip", command=direction.gripper, sequence=presses)
                else:
                    page.say(type="tap", held=[names[direction.axes]], sequence=presses)
                while session.state == "driving" and (session.episode.steps == before or session.is_moving):
                    page.hear()
            success = session.episode.success
            successes += success
            page.say(type="command", name="keep" if success else "discard")
            page.until("finished")
        page.close()
    return {"episodes": episodes, "successes": successes, "key_presses": presses}


def measure_person(arguments: Arguments) -> dict[str, Any]:
    """Drive, distil, evaluate."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        driven = drive_as_person(arguments, out)
        began = time.perf_counter()
        learned = distill([out / "recordings"], out / "noise-policy", env=arguments.env)
        seconds = time.perf_counter() - began
    prior = load_prior(arguments.env)
    rates: dict[str, Any] = {}
    with open_env(arguments.env, arguments.episodes) as env:
        for name, method, given in (("base", "base", None), ("steered", "frs", None), ("distilled", "dsbc", learned)):
            found = evaluate(
                env, prior, method, arguments.episodes, 0, learned=given, reasoner=ReasonerSettings(error=ERROR)
            )
            rates[name] = found.rate.to_json()
    return {"env": arguments.env, **driven, "training_seconds": round(seconds, 1), "rates": rates}


def load_stand_in() -> Any:
    """Return the module of the endpoint that stands in, which is part of the tests."""
    spec = importlib.util.spec_from_file_location("stand_in", HERE.parents[1] / "tests/reasoners/stand_in.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["stand_in"] = module
    spec.loader.exec_module(module)
    return module


def measure_vlm() -> dict[str, Any]:
    """Evaluate with a VLM whose endpoint fails, and with the scripted reasoner that answers behind it."""
    module = load_stand_in()
    faults = {
        "HTTP 429": module.Fault(429, {"Retry-After": "0"}),
        "HTTP 500": module.Fault(500),
        "no answer": module.Fault(hang=True),
        "malformed JSON": module.Fault(text='{"direction": '),
        "nonsense direction": module.Fault(text='{"direction": "sideways-ish", "gripper": "open"}'),
    }
    names = {axes: name for name, axes in OGBENCH_WAYS.items()}
    script, seen = scripted_reasoner(VLM_ENV), dict[str, Any]()
    injected = dict.fromkeys(faults, 0)
    shown = rollout.seen_by

    def stash(*given: Any) -> Any:
        seen.clear()
        seen.update(shown(*given))
        return seen

    prior = load_prior(VLM_ENV)
    with tempfile.TemporaryDirectory() as folder, module.stand_in() as server:

        def answer(_: Any) -> str:
            direction = script.decide(seen)
            if len(server.requests) % EVERY == 0:
                name = [*faults][len(server.requests) // EVERY % len(faults)]
                injected[name] += 1
                server.faults.append(faults[name])
            return json.dumps({"direction": names.get(direction.axes, "stay"), "gripper": direction.gripper})

        server.answer = answer
        settings = VLMSettings("stand-in", server.url, timeout=2.0, back_off=0.05, cache=False)
        reasoner = ReasonerSettings(vlm=settings, vlm_folder=Path(folder))
        # The stand-in looks at what the reasoner is shown, not at the picture.
        with (
            patch.object(rollout, "seen_by", stash),
            open_env(VLM_ENV, VLM_EPISODES, num_envs=1, render=reasoner.render) as env,
        ):
            asked = evaluate(env, prior, "frs", VLM_EPISODES, 0, reasoner=reasoner)
        entries = [json.loads(line) for line in (Path(folder) / "queries.jsonl").read_text().splitlines()]
    with open_env(VLM_ENV, VLM_EPISODES) as env:
        scripted = evaluate(env, prior, "frs", VLM_EPISODES, 0)
    return {
        "env": VLM_ENV,
        "episodes": VLM_EPISODES,
        "queries": len(entries),
        "injected": injected,
        "logged": sum(len(entry["faults"]) for entry in entries),
        "fallbacks": sum(entry["fallback"] is not None for entry in entries),
        "asked": asked.rate.to_json(),
        "scripted": scripted.rate.to_json(),
    }


def speed_table(results: dict[str, Any]) -> list[str]:
    """Return pictures a second and latencies."""
    rate = results["rate"]
    heads = [f"pictures a second at {rate:g} actions a second", "as fast as it goes", "key to motion, p50, ms", "p99"]
    lines = [
        f"| drawn with | {' | '.join([*heads, 'in Chromium, p50, ms', 'p99'])} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in results["speed"]:
        browser = one.get("browser", {})
        cells = [f"{one[name]:.1f}" for name in ("pictures_a_second", "most_pictures_a_second")]
        cells += [
            f"{place[name]:.0f}" if name in place else "-" for place in (one, browser) for name in ("p50_ms", "p99_ms")
        ]
        lines.append(f"| {one['backend'].upper()} | {' | '.join(cells)} |")
    loads = [one["load"][0] for one in results["speed"]]
    drawn = "; ".join(f"{one['backend'].upper()}: {one['renderer']}" for one in results["speed"])
    software = all(one["renderer"].startswith(("llvmpipe", "softpipe", "swrast")) for one in results["speed"])
    note = ". All of it is software on the processor; no graphics card was there to be measured" if software else ""
    return [
        *lines,
        "",
        f"256 x 256 pixels, {results['machine']['cores']} cores, {results['speed'][0]['presses']} presses, load average "
        f"{min(loads)} to {max(loads)}. What drew: {drawn}{note}.",
    ]


def person_table(results: dict[str, Any]) -> list[str]:
    """Return what the person's successes are worth."""
    person = results["person"]
    lines = ["| | success, % (95% interval) |", "| --- | ---: |"]
    for name, rate in person["rates"].items():
        low, high = rate["ci95"]
        lines.append(
            f"| {PERSON[name]} | {100 * rate['successes'] / rate['episodes']:.0f} ({100 * low:.0f}-{100 * high:.0f}) |"
        )
    return [
        *lines,
        "",
        f"{person['env']}, {person['rates']['base']['episodes']} episodes each; {person['successes']} successes in "
        f"{person['episodes']} driven episodes and {person['key_presses']} key presses, one in ten wrong; trained in "
        f"{person['training_seconds']:.0f} seconds.",
    ]


def tables(results: dict[str, Any]) -> str:
    """Return the README's tables."""
    lines = []
    if "speed" in results:
        lines += speed_table(results)
    if "person" in results:
        lines += ["", *person_table(results)]
    if "vlm" in results:
        vlm = results["vlm"]
        lines += ["", "| reasoner | success, % (95% interval) |", "| --- | ---: |"]
        for name, rate in (("VLM's endpoint, failing", vlm["asked"]), ("the script behind it", vlm["scripted"])):
            low, high = rate["ci95"]
            lines.append(
                f"| {name} | {100 * rate['successes'] / rate['episodes']:.0f} ({100 * low:.0f}-{100 * high:.0f}) |"
            )
        injected = ", ".join(f"{name} {count}" for name, count in vlm["injected"].items())
        lines += [
            "",
            f"{vlm['env']}, FRS, {vlm['episodes']} episodes, {vlm['queries']} queries. Faults injected: {injected} "
            f"({sum(vlm['injected'].values())} in all); faults in the log: {vlm['logged']}; queries that ended in the fallback "
            f"(defer to the policy): {vlm['fallbacks']}.",
        ]
    return "\n".join(lines)


def take_pictures(arguments: Arguments, figures: Path) -> None:
    """Take the pictures of the documentation: driving, a success, a noise policy that was trained and drives, a phone."""
    from playwright.sync_api import Page as BrowserPage
    from playwright.sync_api import sync_playwright

    if BROWSER is None:
        raise SystemExit("pictures need Chromium; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        out = Path(folder)
        drive_as_person(arguments, out)
        with cockpit_of(SessionSettings(arguments.env, out, size=384, stale_after=5)) as (_, port):
            browser = playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)

            def opened(width: int, height: int) -> BrowserPage:
                page = browser.new_context(viewport={"width": width, "height": height}, bypass_csp=True).new_page()
                page.set_default_timeout(120_000)
                page.goto(f"http://127.0.0.1:{port}/")
                page.wait_for_selector("#picture[data-frame]")
                return page

            def begin(page: BrowserPage) -> None:
                page.keyboard.press("r")
                page.wait_for_function("document.querySelector('#picture').dataset.step === '0'")

            def step(page: BrowserPage, steps: int) -> None:
                page.wait_for_function(f"Number(document.querySelector('#picture').dataset.step) >= {steps}")

            page = opened(1280, 800)
            begin(page)
            page.keyboard.down("ArrowLeft")
            step(page, 9)
            page.screenshot(path=figures / "cockpit.png")
            page.keyboard.up("ArrowLeft")
            begin(page)
            page.select_option("#pilot", "script")
            page.wait_for_selector("#banner:has-text('Success')")
            page.screenshot(path=figures / "cockpit-success.png")
            page.keyboard.press("k")
            page.wait_for_selector("#notes li.done:has-text('kept')")
            page.select_option("#pilot", "")
            page.keyboard.press("t")
            page.wait_for_selector("#training-text:has-text('is ready')")
            page.set_viewport_size({"width": 1280, "height": 930})
            page.click("#use")
            page.keyboard.press("r")
            page.wait_for_selector("#banner", state="hidden")
            page.wait_for_selector("#banner:visible")  # how it went is in the tallies
            page.keyboard.press("x")
            page.keyboard.press("r")
            page.wait_for_selector("#banner", state="hidden")
            step(page, 40)
            page.screenshot(path=figures / "cockpit-trained.png")
            page.select_option("#pilot", "")
            page.context.close()
            phone = opened(390, 844)
            phone.wait_for_selector("#seat-button:visible")
            phone.click("#seat-button")
            phone.wait_for_selector("#seat-text:has-text('you drive')")
            phone.keyboard.press("5")
            begin(phone)
            phone.keyboard.down("s")
            step(phone, 9)
            phone.screenshot(path=figures / "cockpit-phone.png")
            phone.keyboard.up("s")
            browser.close()
    for picture in figures.glob("cockpit*.png"):
        with Image.open(picture) as image:
            image.convert("RGB").save(picture, optimize=True)


def main(arguments: Arguments) -> None:
    """Measure, write, report."""
    console = Console()
    place = HERE if arguments.out is None else arguments.out
    place.mkdir(parents=True, exist_ok=True)
    file = place / RESULTS
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if not arguments.only_report:
        if "pictures" in arguments.stages:
            take_pictures(arguments, FIGURES if arguments.out is None else place)
        results["machine"] = machine()
        if "speed" in arguments.stages:
            results["rate"] = arguments.rate
            results["speed"] = [measure_speed(arguments, backend) for backend in available_backends()]
            write_json(file, results)
        if "person" in arguments.stages:
            results["person"] = measure_person(arguments)
            write_json(file, results)
        if "vlm" in arguments.stages:
            results["vlm"] = measure_vlm()
            write_json(file, results)
    table = tables(results)
    if arguments.out is None:
        write_between(HERE / "README.md", "table", COMMAND, table)
        if "person" in results:
            write_between(HERE.parents[1] / "README.md", "person", COMMAND, "\n" + "\n".join(person_table(results)))
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
