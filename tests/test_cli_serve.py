"""`counterflow serve` as a user meets it. What it serves is tested with openpi's client in tests/serving."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from counterflow.cli import main, parse
from counterflow.experiments.online_data import anchors_of
from counterflow.policies import Normaliser, load
from counterflow.serving import running
from counterflow.steering import (
    ActorConfig,
    AnchorsConfig,
    AnchorsCritic,
    ChunkRegressor,
    RegressorConfig,
    SteeringActor,
    binding_of,
)

KEY = "a-long-enough-key"


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail with a message and no traceback; return the message in one line."""
    capsys.readouterr()
    assert main(["serve", *(str(argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COUNTERFLOW_API_KEY", raising=False)


@pytest.fixture
def noise_policy(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = RegressorConfig(members=1, width=8, depth=1)
    sees, gives = Normaliser(torch.zeros(28), torch.ones(28)), Normaliser(torch.zeros(25), torch.ones(25))
    return ChunkRegressor(config, sees, gives, binding_of(load("cube-single"), 5)).save(tmp_path / "noise-policy")


class TestWhatIsServed:
    @pytest.mark.parametrize(
        ("method", "steerable", "candidates", "steps"),
        [
            ("base", False, 1, 10),
            ("direct", True, 1, 10),
            ("frs", True, 1, 5),
            ("partial", True, 1, 5),
            ("rank", True, 16, 10),
        ],
    )
    def test_methods(self, method: str, steerable: bool, candidates: int, steps: int) -> None:
        served = parse(["serve", "cube-single", "--steer", method]).served()
        steering = served.metadata["steering"]
        assert (steering["method"], steering["steerable"], steering["candidates"]) == (method, steerable, candidates)
        assert served.belongs["steps"] == steps
        assert served.belongs["policy"] == load("cube-single").fingerprint

    def test_settings_of_steering(self) -> None:
        served = parse(["serve", "scene", "--reversal-steps", "7", "--perturbation", "0.5"]).served()
        assert served.belongs["steps"] == 7
        assert served.policy.start.perturbation == 0.5

    def test_a_noise_policy(self, noise_policy: Path) -> None:
        served = parse(["serve", "cube-single", "--steer", "dsbc", "--noise-policy", str(noise_policy)]).served()
        assert served.belongs["noise_policy"] == ChunkRegressor.load(noise_policy).fingerprint

    @pytest.mark.parametrize(("weighted", "steerable"), [(False, False), (True, True)])
    def test_anchors_listen_where_they_were_trained_to(self, weighted: bool, steerable: bool, tmp_path: Path) -> None:
        prior = load("cube-single")
        config = AnchorsConfig(particles=2, hidden=(8,), weighted=weighted)
        critic = AnchorsCritic(config, anchors_of(prior.action_spec), 28 + 25, 2, binding_of(prior, 5))
        path = critic.save(tmp_path / "anchors")
        served = parse(["serve", "cube-single", "--steer", "anchors", "--noise-policy", str(path)]).served()
        assert served.belongs["noise_policy"] == critic.fingerprint
        assert served.metadata["steering"]["steerable"] == steerable
        assert not served.metadata["steering"]["noise"]

    def test_an_actor_is_served(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        config = ActorConfig(ports="both", residual_bound=(0.1,) * 5, hidden=(8,))
        actor = SteeringActor(config, 28, 50, binding_of(load("cube-single"), 5))
        path = actor.save(tmp_path / "actor")
        served = parse(["serve", "cube-single", "--steer", "actor", "--noise-policy", str(path)]).served()
        assert served.belongs["noise_policy"] == actor.fingerprint
        assert not served.metadata["steering"]["steerable"]

    def test_a_robots_own_names(self, capsys: pytest.CaptureFixture[str]) -> None:
        served = parse(["serve", "cube-single", "--rename", "robot/joints=observation"]).served()
        read = served.read({"robot": {"joints": torch.zeros(28).numpy()}})
        assert list(read.observation) == ["observation"]
        assert "did you mean 'observation'" in failure(capsys, "cube-single", "--rename", "joints=observations")
        for pairs in (("joints",), ("joints=observation", "joints=observation")):
            assert "expected pairs 'theirs=ours'" in failure(capsys, "cube-single", "--rename", *pairs)

    def test_settings_of_the_server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "key").write_text(f"{KEY}\n")
        arguments = f"serve scene --host 0.0.0.0 --port 81 --api-key-file {tmp_path / 'key'} --max-connections 5"
        settings = parse(f"{arguments} --max-batch 3 --max-message 2 --patience 7 --grace 8".split()).settings()
        assert (settings.host, settings.port, settings.api_key) == ("0.0.0.0", 81, KEY)
        assert (settings.max_connections, settings.max_batch, settings.limits.size) == (5, 3, 2 * 2**20)
        assert (settings.patience, settings.grace) == (7, 8)
        assert parse(["serve", "scene"]).settings().host == "127.0.0.1"
        assert parse(["serve", "scene"]).settings().api_key is None
        monkeypatch.setenv("COUNTERFLOW_API_KEY", "from-the-environment")
        assert parse(["serve", "scene"]).settings().api_key == "from-the-environment"


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("cube-singel",), "did you mean 'cube-single'"),
            (("cube-single", "--steer", "dsbc"), "none was given"),
            (("cube-single", "--steer", "dsbc", "--noise-policy", "none"), "no such file"),
            (("cube-single", "--host", "0.0.0.0"), "no API key is set"),
            (("cube-single", "--api-key-file", "none"), "the API key's file none can't be read"),
            (("cube-single", "--port", "99999"), "port is 99999"),
            (("cube-single", "--max-batch", "0"), "max_batch is 0"),
            (("cube-single", "--max-message", "0"), "size is 0"),
            (("cube-single", "--tls-certificate", "none.pem"), "none.pem can't be used"),
            (("cube-single", "--tls-key", "none.pem"), "without a certificate"),
            (("cube-single", "--seed", "-1"), "seed is -1"),
            (("cube-single", "--magnitude", "0"), "magnitude is 0"),
            (("cube-single", "--reversal-steps", "0"), "steps (K) is 0"),
            (("cube-single", "--device", "abacus"), "device 'abacus'"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_numbers_names_and_files(
        self,
        arguments: tuple[str, ...],
        words: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert words in failure(capsys, *arguments)

    def test_a_noise_policy_where_none_is_used_or_of_another_prior(
        self, noise_policy: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        message = failure(capsys, "cube-single", "--noise-policy", noise_policy)
        assert "--noise-policy is of no use to --steer frs" in message
        message = failure(capsys, "scene", "--steer", "dsbc", "--noise-policy", noise_policy)
        assert "belongs to another frozen policy" in message

    def test_an_empty_key_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "key").write_text("\n")
        assert "has 0 characters" in failure(capsys, "cube-single", "--api-key-file", tmp_path / "key")

    def test_a_port_that_is_taken(self, capsys: pytest.CaptureFixture[str]) -> None:
        command = parse(["serve", "cube-single", "--port", "0"])
        with running(command.served(), command.settings()) as server:
            message = failure(capsys, "cube-single", "--port", str(server.port))
        assert f"can't listen at 127.0.0.1 port {server.port}" in message

    def test_without_the_extra(self) -> None:
        """The message says what to install; nothing else of the library needs it."""
        code = (
            "import sys\nsys.modules['websockets'] = None\nfrom counterflow.cli import main\n"
            "sys.exit(main(['serve', 'cube-single']))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "pip install 'counterflow[serve]'" in done.stderr
        assert "Traceback" not in done.stderr
