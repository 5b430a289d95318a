"""openpi's own client, unchanged, in an environment of its own as on a robot, against `counterflow serve`."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.policies import load
from counterflow.serving import PolicyServer
from counterflow.steering import MethodSettings, SteeredPolicy, steer

ROOT = Path(__file__).parents[2]
ROBOT = Path(__file__).with_name("openpi_robot.py")
# It pins numpy < 2, and does not say that it needs typing_extensions.
PACKAGES = ("openpi-client==0.1.2", "typing_extensions")
KEY = "a-long-enough-key"
STATE = np.linspace(-1, 1, 28).tolist()
NOISE = np.linspace(-1, 1, 25).reshape(5, 5).tolist()

Drive = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def robot_python() -> Path:
    """A Python with openpi's client, made once and kept beside the checkout; whoever comes second waits for the first."""
    home = ROOT / ".cache" / "openpi-client"
    home.parent.mkdir(exist_ok=True)
    python, done = home / "bin" / "python", home / f"made-of-{'-'.join(PACKAGES)}"
    with (home.parent / "openpi-client.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
            made = subprocess.run(install, capture_output=True, text=True, check=False)
            assert made.returncode == 0, f"openpi's client can't be installed:\n{made.stdout}{made.stderr}"
            done.touch()  # last: an installation that was interrupted is made again
    return python


@pytest.fixture
def drive(robot_python: Path) -> Drive:
    """Let a robot do something with the server at a host and port; return what it came to know."""

    def run(
        host: str, port: int | None, *do: tuple[str, Any], key: str | None = None, **options: Any
    ) -> dict[str, Any]:
        told = {"host": host, "port": port, "api_key": key, "do": do, **options}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [str(robot_python), str(ROBOT), json.dumps(told)],
            capture_output=True,
            text=True,
            env=clean,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


@pytest.fixture(scope="module")
def command() -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Run `counterflow serve` and return its process and port."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **environment: str) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [sys.executable, "-m", "counterflow.cli", "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving "):
            process.kill()
            pytest.fail(f"the server did not begin: {line}{process.communicate()}")
        return process, int(line.rsplit(":", 1)[1])

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def local(method: str, steps: int = 5) -> SteeredPolicy:
    return steer(load("cube-single"), method, MethodSettings(steps=10, reversal_steps=steps))


class TestCommand:
    def test_a_robot_drives_the_shipped_prior(self, command: Any, drive: Drive) -> None:
        """Metadata, inference, a noise that is honoured, steering, errors that leave the connection alive; then the end."""
        prior = load("cube-single")
        process, port = command("cube-single", "--steer", "frs")
        seen = {"observation": STATE}
        found = drive(
            "127.0.0.1",
            port,
            ("infer", seen),
            ("infer", {**seen, "noise": NOISE}),
            ("infer", {**seen, "noise": NOISE, "steer": {"axes": {"zeros": 3, "dtype": "int64"}, "gripper": "open"}}),
            ("infer", {"observation": STATE[:27]}),
            ("infer", {}),
            ("raw", [0xC1]),
            ("infer", {**seen, "expect": {"policy": "another"}}),
            ("infer", {**seen, "noise": NOISE}),
        )
        assert found["numpy"].startswith("1.")
        assert found["metadata"]["belongs"]["policy"] == prior.fingerprint
        first, given, steered, short, empty, raw, other, last = found["done"]
        assert np.shape(first["result"]["actions"]) == (5, 5)
        assert first["result"]["server_timing"]["infer_ms"] > 0

        def start(policy: Any, context: Any, rng: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor([NOISE], dtype=torch.float32), torch.zeros(1)

        expected = SteeredPolicy(prior, start=start, steps=5).act(torch.tensor([STATE], dtype=torch.float32))
        np.testing.assert_allclose(given["result"]["actions"], expected.actions[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(last["result"]["actions"], given["result"]["actions"], atol=1e-6)
        assert not np.allclose(steered["result"]["actions"], given["result"]["actions"])
        for one, words in (
            (short, "has shape (27,)"),
            (empty, "lacks 'observation'"),
            (other, "the client expects policy 'another'"),
        ):
            assert one["error"] == "RuntimeError"  # openpi's client, for an answer in text
            assert words in one["message"]
            assert "Traceback" not in one["message"]
        assert "can't be read" in raw["result"]

        drive("127.0.0.1", port, ("infer", seen), ("leave", seen))
        assert "result" in drive("127.0.0.1", port, ("infer", seen))["done"][0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30) as response:
            assert response.read() == b"OK\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "stopped." in out
        assert "Traceback" not in err

    def test_keys_sizes_and_expectations(self, command: Any, drive: Drive) -> None:
        _, port = command("cube-single", "--max-message", "1", COUNTERFLOW_API_KEY=KEY)
        seen = {"observation": STATE}
        for key in (None, "wrong-but-long-enough"):
            found = drive("127.0.0.1", port, key=key)
            assert "401" in found["message"]
        found = drive("ws://127.0.0.1:" + str(port) + "/?policy=another", None, key=KEY)
        assert "412" in found["message"]
        fingerprint = load("cube-single").fingerprint
        large = {"zeros": 300_000, "dtype": "float32"}
        found = drive(
            f"ws://127.0.0.1:{port}/?policy={fingerprint}",
            None,
            ("infer", seen),
            ("infer", {**seen, "large": large}),
            ("infer", seen),
            key=KEY,
        )
        first, second, third = found["done"]
        assert "result" in first
        assert "1009" in second["message"]
        assert "error" in third  # that connection is gone; the next is served
        assert "result" in drive("127.0.0.1", port, ("infer", seen), key=KEY)["done"][0]


def test_chunks_are_taken_apart_by_its_broker(serve: Callable[..., PolicyServer], drive: Drive) -> None:
    """Everything in an answer is a number, or an array of one row an action."""
    server = serve()
    seen = {"observation": [0.0] * 6, "noise": np.linspace(-1, 1, 12).reshape(3, 4).tolist()}
    found = drive("127.0.0.1", server.port, ("infer", seen), *[("step", seen)] * 4, horizon=3)
    whole, *steps = (one["result"]["actions"] for one in found["done"])
    np.testing.assert_allclose(steps[:3], whole, atol=1e-6)
    np.testing.assert_allclose(steps[3], whole[0], atol=1e-6)


def test_over_tls(serve: Callable[..., PolicyServer], drive: Drive, certificate: Path, monkeypatch: Any) -> None:
    server = serve(tls_certificate=certificate, api_key=KEY)
    seen = {"observation": [0.0] * 6}
    refused = drive(server.url, None, ("infer", seen), key=KEY)
    assert "certificate" in refused["message"].lower()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("ca.pem")))
    assert "result" in drive(server.url, None, ("infer", seen), key=KEY)["done"][0]
