"""How fast the cockpit's view is, and what ten steered successes of a clumsy person are worth.

    python benchmarks/cockpit/run.py

*speed* starts `counterflow cockpit` as a process of its own, once for each way of drawing that this machine has (EGL, OSMesa),
connects as a page does, and measures pictures a second while a key is held, and the time from a key's report to the first
picture in which that key has moved the robot. *person* drives through the page's own messages: coarse directions, one in ten
wrong, until ten episodes have succeeded; distils them; and evaluates base, steered and distilled. Results go to `results.json`
and the README's tables. `--only-report` leaves out the measuring. *vlm* runs `eval`'s own code with a VLM as the reasoner: the
endpoint is the tests' stand-in, a real HTTP server that answers what the scripted reasoner would say and fails at every tenth
question in one of five ways; it is compared with the scripted reasoner itself.
"""

from __future__ import annotations

import asyncio
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
from rich.console import Console
from websockets.sync.client import ClientConnection, connect

import counterflow.experiments.rollout as rollout
from counterflow.cockpit.driver import Driver
from counterflow.cockpit.server import Cockpit, CockpitSettings, make_server, unpack_frame
from counterflow.cockpit.session import Session, SessionSettings
from counterflow.envs.rendering import available_backends
from counterflow.experiments.distill import distill
from counterflow.experiments.evaluate import ReasonerSettings, evaluate, load_prior, machine, open_env
from counterflow.files import write_json
from counterflow.reasoners import UnreliableReasoner, scripted_reasoner
from counterflow.reasoners.vlm import VLMSettings
from counterflow.reasoners.words import OGBENCH_WAYS

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
BEGIN, END = "<!-- table: written by benchmarks/cockpit/run.py -->", "<!-- /table -->"
ERROR = 0.1
VLM_ENV, VLM_EPISODES, EVERY = "ogbench/cube-single-task1", 20, 10


@dataclass(frozen=True)
class Arguments:
    """Run the cockpit's benchmark."""

    stages: tuple[Literal["speed", "person", "vlm"], ...] = ("speed", "person", "vlm")
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


class Page:
    """What the page does, without a browser."""

    def __init__(self, port: int) -> None:
        self._socket: ClientConnection = connect(f"ws://127.0.0.1:{port}/drive")
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

    def until(self, state: str) -> None:
        """Wait for a state."""
        while self.state.get("state") != state:
            self.hear()

    def close(self) -> None:
        """Leave."""
        self._socket.close()


@contextmanager
def started(arguments: Arguments, backend: str) -> Iterator[int]:
    """Run `counterflow cockpit`; yield its port."""
    out = tempfile.mkdtemp()
    command = [sys.executable, "-m", "counterflow.cli", "cockpit", arguments.env, "--port", "0", "--out", out]
    command += ["--rate", str(arguments.rate), "--stale-after", "5"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MUJOCO_GL": backend, "OMP_NUM_THREADS": "1"}
    )
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
    """Measure pictures a second and the latency from a key to motion."""
    with started(arguments, backend) as port:
        page = Page(port)
        page.picture()
        sequence, keys = 0, ["up", "down"]
        latencies: list[float] = []
        page.say(type="command", name="reset")
        page.until("driving")
        for press in range(arguments.presses):
            if page.state["state"] != "driving":
                page.say(type="command", name="reset")
                page.until("driving")
            sequence += 1
            began = time.perf_counter()
            page.say(type="report", held=[keys[press % 2]], sequence=sequence)
            while page.picture()["sequence"] < sequence:
                pass
            latencies.append(time.perf_counter() - began)
            page.say(type="report", held=[], sequence=sequence)
            for _ in range(3):  # stand still again; what was under way is taken
                try:
                    page.hear(0.1)
                except TimeoutError:
                    break
        page.say(type="command", name="reset")
        page.until("driving")
        pictures, began, said, flips = 0, time.perf_counter(), 0.0, 0
        while (now := time.perf_counter()) - began < arguments.seconds:
            if now - said > 0.1:
                said, flips = now, flips + 1
                if page.state["state"] != "driving":
                    page.say(type="command", name="reset")
                page.say(type="report", held=[keys[flips // 10 % 2]], sequence=sequence)
            try:
                pictures += page.hear(0.1) is not None
            except TimeoutError:
                continue
        seconds = time.perf_counter() - began
        page.close()
    p50, p99 = np.percentile(np.array(latencies) * 1000, [50, 99])
    return {
        "backend": backend,
        "pictures_a_second": round(pictures / seconds, 2),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "presses": len(latencies),
        "load": [round(value, 1) for value in os.getloadavg()],
    }


def drive_as_person(arguments: Arguments, out: Path) -> dict[str, Any]:
    """Drive to so many successes through the page's messages; return how it went."""
    session: list[Session] = []

    def make(background: Any) -> Session:
        settings = SessionSettings(arguments.env, out, rate=200, stale_after=30)
        session.append(Session(settings, background))
        return session[0]

    driver = Driver(make)
    driver.start()
    server = make_server(Cockpit(driver, CockpitSettings(port=0)))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    page = Page(server.servers[0].sockets[0].getsockname()[1])
    page.picture()
    names = {axes: name for name, axes in session[0].control.ways.items()}
    reasoner = UnreliableReasoner(scripted_reasoner(arguments.env), ERROR)
    episodes = successes = presses = 0
    try:
        while successes < arguments.successes:
            page.say(type="command", name="reset")
            page.until("driving")
            reasoner.reset(episodes)
            episodes += 1
            while session[0].state == "driving":
                # A person looks; this one looks at the simulator. What it does goes through the page's messages alone.
                direction = reasoner.decide(session[0]._batch.view(0))
                presses += 1
                before = session[0]._episode.steps
                if direction.gripper != session[0].control.gripper:
                    page.say(type="grip", command=direction.gripper, sequence=presses)
                if direction.axes in names:
                    page.say(type="tap", held=[names[direction.axes]], sequence=presses)
                elif direction.gripper == session[0].control.gripper:
                    page.say(type="grip", command=direction.gripper, sequence=presses)
                while session[0].state == "driving" and (session[0]._episode.steps == before or session[0].is_moving):
                    page.hear()
            success = session[0]._episode.success
            successes += success
            page.say(type="command", name="keep" if success else "discard")
            page.until("finished")
    finally:
        page.close()
        server.should_exit = True
        thread.join()
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


def tables(results: dict[str, Any]) -> str:
    """Return the README's tables."""
    lines = []
    if "speed" in results:
        lines += ["| drawn with | pictures a second | key to motion, p50, ms | p99 |", "| --- | ---: | ---: | ---: |"]
        lines += [
            f"| {one['backend']} | {one['pictures_a_second']:.1f} | {one['p50_ms']:.0f} | {one['p99_ms']:.0f} |"
            for one in results["speed"]
        ]
        loads = [one["load"][0] for one in results["speed"]]
        lines += [
            "",
            f"256 x 256 pixels, at most {results['rate']:g} actions a second, {results['machine']['cores']} cores, load average "
            f"{min(loads)} to {max(loads)}.",
        ]
    if "person" in results:
        person = results["person"]
        lines += ["", "| | success, % (95% interval) |", "| --- | ---: |"]
        for name, rate in person["rates"].items():
            low, high = rate["ci95"]
            lines.append(
                f"| {name} | {100 * rate['successes'] / rate['episodes']:.0f} ({100 * low:.0f}-{100 * high:.0f}) |"
            )
        lines += [
            "",
            f"{person['env']}: {person['successes']} successes in {person['episodes']} episodes and {person['key_presses']} key "
            f"presses, one in ten wrong; trained in {person['training_seconds']:.0f} seconds.",
        ]
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


def main(arguments: Arguments) -> None:
    """Measure, write, report."""
    console = Console()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.only_report:
        results |= {"machine": machine(), "rate": arguments.rate}
        if "speed" in arguments.stages:
            results["speed"] = [measure_speed(arguments, backend) for backend in available_backends()]
            write_json(RESULTS, results)
        if "person" in arguments.stages:
            results["person"] = measure_person(arguments)
            write_json(RESULTS, results)
        if "vlm" in arguments.stages:
            results["vlm"] = measure_vlm()
            write_json(RESULTS, results)
    table = tables(results)
    text = README.read_text()
    README.write_text(text[: text.index(BEGIN) + len(BEGIN)] + "\n" + table + "\n" + text[text.index(END) :])
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
