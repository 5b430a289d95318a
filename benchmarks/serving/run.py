"""How fast a server answers sixteen robots at once, with batches and without.

    python benchmarks/serving/run.py

starts `counterflow serve` twice, as two processes (deciding requests together, and one after the other), lets the same clients
ask each in turns, and writes `results.json` and the table of the README beside it. `--only-report` leaves out the measuring.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from websockets.asyncio.client import connect

from counterflow.experiments.evaluate import machine
from counterflow.files import write_between, write_json
from counterflow.serving import pack, unpack

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
OBSERVATION = 28  # numbers that the cube's policy sees
AXES = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
CASES = {"batched": ("--max-batch", "32"), "unbatched": ("--max-batch", "1")}


@dataclass(frozen=True)
class Arguments:
    """Run the serving benchmark."""

    seconds: float = 60.0
    """How long each case is measured."""
    clients: int = 16
    """Clients at once, each of which asks again as soon as it is answered."""
    turns: int = 3
    """In how many turns the cases alternate, so that what else the machine does falls on both."""
    policy: str = "cube-single"
    """What is served."""
    steer: str = "frs"
    """How it is steered; every request holds a direction."""
    only_report: bool = False
    """Write the table from the results that are there."""


@dataclass
class Measured:
    """What the clients of one case came to know.

    Attributes:
        latencies: seconds from sending to the answer.
        inference: seconds that the server needed to decide on the request's batch.
        batches: sizes of the batches.
        seconds: how long was measured.
        load: the system's load average (1 minute) at the end of each turn.
    """

    latencies: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    seconds: float = 0.0
    load: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return what is reported."""
        p50, p90, p99 = (1000 * float(np.percentile(self.latencies, share)) for share in (50, 90, 99))
        return {
            "requests": len(self.latencies),
            "seconds": round(self.seconds, 2),
            "requests_per_second": round(len(self.latencies) / self.seconds, 1),
            "latency_ms": {
                "p50": round(p50, 2),
                "p90": round(p90, 2),
                "p99": round(p99, 2),
                "largest": round(1000 * max(self.latencies), 2),
            },
            "inference_ms": round(1000 * float(np.median(self.inference)), 2),
            "mean_batch": round(float(np.mean(self.batches)), 2),
            "load_average": [round(one, 2) for one in self.load],
        }


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    """Run `counterflow serve` in a process of its own and yield its address."""
    command = [sys.executable, "-m", "counterflow.cli", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at ws://" not in line:
            raise SystemExit(f"the server did not begin: {line}")
        try:
            yield line.rsplit(" ", 1)[1].strip()
        finally:
            process.send_signal(signal.SIGTERM)


async def ask(url: str, seed: int, until: float, measured: Measured) -> None:
    """Ask again and again, each time something else."""
    rng = np.random.default_rng(seed)
    async with connect(url, compression=None) as connection:
        await connection.recv()
        while time.perf_counter() < until:
            observation = rng.standard_normal(OBSERVATION).astype(np.float32)
            message = pack({"observation": observation, "steer": {"axes": AXES[int(rng.integers(len(AXES)))]}})
            began = time.perf_counter()
            await connection.send(message)
            reply = await connection.recv()
            measured.latencies.append(time.perf_counter() - began)
            if isinstance(reply, str):
                raise SystemExit(f"the server answered: {reply}")
            timing = unpack(reply)["server_timing"]
            measured.inference.append(timing["infer_ms"] / 1000)
            measured.batches.append(timing["batch_size"])


async def turn(url: str, clients: int, seconds: float, measured: Measured) -> None:
    """Let all clients ask for some seconds."""
    began = time.perf_counter()
    await asyncio.gather(*(ask(url, client, began + seconds, measured) for client in range(clients)))
    measured.seconds += time.perf_counter() - began
    measured.load.append(os.getloadavg()[0])


def measure(console: Console, arguments: Arguments) -> dict[str, Any]:
    """Measure all cases in turns."""
    found = {name: Measured() for name in CASES} | {"one client": Measured()}
    with (
        server(arguments.policy, "--steer", arguments.steer, *CASES["batched"]) as batched,
        server(arguments.policy, "--steer", arguments.steer, *CASES["unbatched"]) as unbatched,
    ):
        urls = {"batched": batched, "unbatched": unbatched, "one client": batched}
        for url in (batched, unbatched):
            asyncio.run(turn(url, arguments.clients, 2.0, Measured()))  # first calls are slow
        for _ in range(arguments.turns):
            for name, measured in found.items():
                alone = name == "one client"
                # One client alone needs fewer seconds for as good an estimate of its latency.
                seconds = arguments.seconds / arguments.turns / (6 if alone else 1)
                asyncio.run(turn(urls[name], 1 if alone else arguments.clients, seconds, measured))
                console.log(f"{name}: {measured.to_json()}")
    cases = {name: measured.to_json() for name, measured in found.items()}
    return {
        "machine": machine(),
        "arguments": {name: value for name, value in asdict(arguments).items() if name != "only_report"},
        "cases": cases,
        "throughput_ratio": round(
            cases["batched"]["requests_per_second"] / cases["unbatched"]["requests_per_second"], 2
        ),
    }


def report() -> None:
    """Write the table into the README."""
    found = json.loads(RESULTS.read_text())
    cases, clients = found["cases"], found["arguments"]["clients"]
    labels = {
        "batched": f"{clients} clients, decided together",
        "unbatched": f"{clients} clients, one after the other",
        "one client": "one client alone",
    }
    lines = [
        "| | requests a second | p50, ms | p90 | p99 | mean batch | inference, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, label in labels.items():
        one = cases[name]
        latency = " | ".join(f"{one['latency_ms'][share]:.1f}" for share in ("p50", "p90", "p99"))
        lines.append(
            f"| {label} | {one['requests_per_second']:.0f} | {latency} | {one['mean_batch']:.1f} | {one['inference_ms']:.1f} |"
        )
    loads = [load for one in cases.values() for load in one["load_average"]]
    lines += [
        "",
        f"Deciding together answers {found['throughput_ratio']:.1f} times as many requests. Measured on "
        f"{found['machine']['cores']} cores, which the server, the clients and whatever else ran there share: load average "
        f"{min(loads):.1f} to {max(loads):.1f}.",
    ]
    write_between(README, "table", "benchmarks/serving/run.py", "\n".join(lines))


def main() -> None:
    """Measure, then report."""
    arguments = tyro.cli(Arguments)
    if not arguments.only_report:
        write_json(RESULTS, measure(Console(), arguments))
    report()


if __name__ == "__main__":
    main()
