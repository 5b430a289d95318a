"""A VLM as the reasoner, against a real HTTP server that fails in every way that servers do."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openai", reason="the VLM reasoner needs the extra 'vlm'")

import counterflow.experiments.rollout as rollout
from counterflow.cli import main
from counterflow.data import SteeringDataset
from counterflow.envs import RenderSettings, make_env
from counterflow.errors import InvalidInputError, MismatchError, ReasonerError, UnknownNameError
from counterflow.experiments.evaluate import ReasonerSettings, evaluate, load_prior
from counterflow.reasoners import CubeReasoner, Direction
from counterflow.reasoners.vlm import NonsenseError, VLMClient, VLMReasoner, VLMSettings, understand
from counterflow.reasoners.words import OGBENCH_WAYS

_spec = importlib.util.spec_from_file_location("stand_in", Path(__file__).parent / "stand_in.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
__import__("sys").modules["stand_in"] = _module
_spec.loader.exec_module(_module)
Fault, StandIn, stand_in = _module.Fault, _module.StandIn, _module.stand_in

KEY = "sk-very-secret-0123456789"
VIEW = {
    "image/front": np.full((32, 32, 3), 80, np.uint8),
    "proprio/gripper_opening": np.array([0.1]),
    "proprio/gripper_contact": np.array([0.0]),
}
DOWN = Direction((0, 0, -1), 1.0, "open")


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("STAND_IN_KEY", KEY)
    with stand_in() as made:
        yield made


Make = Callable[..., tuple[VLMReasoner, VLMClient, Clock]]


@pytest.fixture
def make(server: Any, tmp_path: Path) -> Make:
    def reasoner(**changes: Any) -> tuple[VLMReasoner, VLMClient, Clock]:
        clock = Clock()
        given = {"base_url": server.url, "key_variable": "STAND_IN_KEY", **changes}
        client = VLMClient(VLMSettings("a-model", **given), tmp_path / "vlm", clock, clock.sleep)
        return VLMReasoner(client, "move the cube"), client, clock

    return reasoner


def view(shade: int = 80) -> dict[str, np.ndarray]:
    return {**VIEW, "image/front": np.full((32, 32, 3), shade, np.uint8)}


def log(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "vlm" / "queries.jsonl").read_text().splitlines()]


class TestUnderstanding:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ('{"direction": "down", "gripper": "open", "amount": "full", "rationale": "x"}', DOWN),
            ('Sure!\n```json\n{"direction": "Down", "gripper": "OPEN"}\n```', DOWN),
            ('{"thought": {"a": 1}} {"direction": "up"}', None),
            ('{"direction": "forward", "gripper": "closed"}', Direction((-1, 0, 0), 1.0, "close")),
            ('{"move": ["left", "up"], "amount": "less"}', Direction((0, -1, 1), 0.5, "policy")),
            ('{"direction": "stay", "gripper": "close"}', Direction((0, 0, 0), 1.0, "close")),
            ('{"direction": "policy", "gripper": "nonsense"}', Direction(defer=True)),
            ('{"direction": "DEFER"}', Direction(defer=True)),
        ],
    )
    def test_what_can_be_mended_is(self, text: str, expected: Direction | None) -> None:
        if expected is None:
            with pytest.raises(NonsenseError):
                understand(text)
        else:
            assert understand(text)[0] == expected

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "go down",
            "{",
            "[1, 2]",
            "{}",
            '{"direction": "sideways"}',
            '{"direction": 7}',
            '{"direction": null}',
            '{"direction": "down", "gripper": "crush"}',
            "{" * 5000,
        ],
    )
    def test_what_cannot_says_why(self, text: str) -> None:
        with pytest.raises(NonsenseError):
            understand(text)


class TestAsking:
    def test_what_is_sent_and_what_comes_of_it(self, server: Any, make: Make) -> None:
        reasoner, client, _ = make()
        assert reasoner.decide(VIEW) == DOWN
        (request,) = server.requests
        text, image = request["messages"][0]["content"]
        assert "move the cube" in text["text"]
        assert "Gripper: open" in text["text"]
        assert "nothing yet" in text["text"]
        assert '"right"' in text["text"]
        sent = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(sent)).size == (32, 32)
        schema = request["response_format"]["json_schema"]["schema"]
        assert set(schema["properties"]["direction"]["enum"]) == {*OGBENCH_WAYS, "stay", "policy"}
        assert server.keys == [f"Bearer {KEY}"]
        assert (client.queries, client.tokens) == (1, 100)

    def test_history_is_shown_and_forgotten(self, server: Any, make: Make) -> None:
        reasoner, _, _ = make(history=2)
        for shade in range(4):
            reasoner.decide(view(shade))
        assert server.requests[-1]["messages"][0]["content"][0]["text"].count("- down, gripper open: the cube") == 2
        reasoner.reset(1)
        reasoner.decide(view(9))
        assert "nothing yet" in server.requests[-1]["messages"][0]["content"][0]["text"]

    def test_two_cameras_at_most(self, server: Any, make: Make) -> None:
        reasoner, _, _ = make()
        image = VIEW["image/front"]
        reasoner.decide({**VIEW, "image/wrist": image, "image/other": image})
        assert len(server.requests[0]["messages"][0]["content"]) == 3

    def test_every_so_many_chunks(self, server: Any, make: Make) -> None:
        reasoner, _, _ = make(every=3)
        assert [reasoner.decide(view(shade)) for shade in range(7)] == [DOWN] * 7
        assert len(server.requests) == 3

    def test_while_the_last_chunk_runs(self, server: Any, make: Make) -> None:
        reasoner, _, _ = make(asynchronous=True)
        assert reasoner.decide(view(1)) == Direction(defer=True)  # nothing was said yet
        assert reasoner._under_way is not None
        reasoner._under_way.result(30)
        assert reasoner.decide(view(2)) == DOWN
        reasoner.reset(1)
        assert reasoner.decide(view(3)) == Direction(defer=True)  # what was under way is nobody's

    def test_the_same_question_is_asked_once(self, server: Any, make: Make, tmp_path: Path) -> None:
        reasoner, client, _ = make(history=0)
        assert [reasoner.decide(VIEW), reasoner.decide(VIEW)] == [DOWN, DOWN]
        again, _, _ = make(history=0)  # another process, the same folder
        assert again.decide(VIEW) == DOWN
        assert len(server.requests) == 1
        assert client.cached == 1
        assert [entry["cached"] for entry in log(tmp_path)] == [False, True, True]
        other, _, _ = make(history=0, cache=False)
        other.decide(VIEW)
        assert len(server.requests) == 2

    def test_every_query_is_noted_with_its_image(self, make: Make, tmp_path: Path) -> None:
        reasoner, _, _ = make()
        reasoner.reset(7)
        reasoner.decide(VIEW)
        (entry,) = log(tmp_path)
        assert (entry["seed"], entry["chunk"], entry["direction"], entry["tokens"]) == (7, 0, [0, 0, -1], 100)
        assert entry["rationale"] == "the cube is lower"
        assert entry["seconds"] >= 0
        assert (tmp_path / "vlm" / entry["images"][0]).read_bytes().startswith(b"\xff\xd8")

    def test_without_an_image_there_is_nothing_to_see(self, make: Make) -> None:
        reasoner, _, _ = make()
        with pytest.raises(MismatchError, match="no image"):
            reasoner.decide({"proprio/gripper_opening": np.zeros(1)})


class TestFaults:
    @pytest.mark.parametrize(
        "fault",
        [
            Fault(429, {"retry-after": "2"}),
            Fault(500),
            Fault(503),
            Fault(200, body=b"<html>not the API</html>"),
            Fault(200, body=b'{"choices": []}'),
            Fault(text="I would go down."),
            Fault(text='{"direction": "sideways"}'),
        ],
        ids=lambda fault: str(fault.text or fault.body or fault.status),
    )
    def test_one_failure_is_got_over(self, server: Any, make: Make, tmp_path: Path, fault: Any) -> None:
        server.faults.append(fault)
        reasoner, client, clock = make()
        assert reasoner.decide(VIEW) == DOWN
        (entry,) = log(tmp_path)
        assert entry["attempts"] == 2
        assert len(entry["faults"]) == 1
        assert client.fallbacks == 0
        if fault.status == 429:
            assert clock.slept == [2.0]  # as the endpoint asked

    def test_waits_grow(self, server: Any, make: Make) -> None:
        server.faults.extend([Fault(500)] * 3)
        reasoner, _, clock = make(back_off=0.5)
        assert reasoner.decide(VIEW) == DOWN
        assert clock.slept == [0.5, 1.0, 2.0]

    def test_nonsense_goes_back_with_what_is_wrong(self, server: Any, make: Make) -> None:
        server.faults.append(Fault(text='{"direction": "sideways"}'))
        reasoner, _, _ = make()
        reasoner.decide(VIEW)
        told = server.requests[1]["messages"][-1]["content"]
        assert "sideways" in told
        assert '"left"' in told

    @pytest.mark.parametrize(("fallback", "expected"), [("defer", Direction(defer=True)), ("stay", Direction())])
    def test_what_fails_for_good_ends_in_the_fallback(
        self, server: Any, make: Make, tmp_path: Path, fallback: str, expected: Direction
    ) -> None:
        server.faults.extend([Fault(text="no idea")] * 4)
        reasoner, client, _ = make(fallback=fallback)
        assert reasoner.decide(VIEW) == expected
        assert (client.fallbacks, log(tmp_path)[0]["fallback"]) == (1, fallback)
        assert reasoner.decide(view(1)) == DOWN  # and the next is asked again

    def test_repeating_what_was_said_last(self, server: Any, make: Make) -> None:
        reasoner, _, _ = make(fallback="repeat")
        reasoner.decide(VIEW)
        server.faults.extend([Fault(500)] * 4)
        assert reasoner.decide(view(1)) == DOWN

    def test_a_server_that_hangs_is_not_waited_for(self, server: Any, make: Make, tmp_path: Path) -> None:
        server.faults.append(Fault(hang=True))
        reasoner, _, _ = make(timeout=0.3, retries=0)
        assert reasoner.decide(VIEW) == Direction(defer=True)
        assert "no answer within" in log(tmp_path)[0]["faults"][0]

    def test_a_wait_beyond_the_time_out_is_not_waited(self, server: Any, make: Make) -> None:
        server.faults.append(Fault(429, {"retry-after": "3600"}))
        reasoner, _, clock = make()
        assert reasoner.decide(VIEW) == Direction(defer=True)
        assert clock.slept == []

    def test_nobody_there(self, make: Make) -> None:
        reasoner, _, _ = make(base_url="http://127.0.0.1:9/v1", retries=1)
        assert reasoner.decide(VIEW) == Direction(defer=True)

    @pytest.mark.parametrize("status", [400, 401, 404])
    def test_a_refusal_is_an_error_that_does_not_hold_the_key(
        self, server: Any, make: Make, tmp_path: Path, status: int
    ) -> None:
        server.faults.append(Fault(status))
        reasoner, _, _ = make()
        with pytest.raises(ReasonerError, match="STAND_IN_KEY") as raised:
            reasoner.decide(VIEW)
        assert KEY not in str(raised.value)
        assert len(server.requests) == 1

    def test_the_key_is_nowhere(
        self, server: Any, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Even where the server sends it back."""
        server.faults.extend([Fault(500), Fault(429), Fault(text=f'{{"direction": "{KEY}"}}')])
        reasoner, client, _ = make()
        reasoner.decide(VIEW)
        assert log(tmp_path)[0]["attempts"] == 4
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or KEY.encode() not in file.read_bytes()
        assert KEY not in caplog.text
        assert KEY not in repr(client.settings)

    @pytest.mark.parametrize(
        "said",
        [
            f'{{"direction": "down", "rationale": "my key is {KEY}"}}',  # kept as an answer
            f'{{"direction": {{"key": "{KEY}"}}}}',  # repeated in the fault and in the warning
        ],
    )
    def test_a_model_that_says_the_key_is_not_quoted(
        self, server: Any, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, said: str
    ) -> None:
        server.faults.append(Fault(text=said))
        reasoner, _, _ = make()
        assert reasoner.decide(VIEW).axes == (0, 0, -1)
        assert list((tmp_path / "vlm" / "cache").glob("*.txt"))
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or KEY.encode() not in file.read_bytes()
        assert KEY not in caplog.text

    def test_a_refusal_meanwhile_is_an_error_once(self, server: Any, make: Make) -> None:
        server.faults.append(Fault(401))
        reasoner, _, _ = make(asynchronous=True)
        for expected in (None, DOWN):
            assert reasoner.decide(VIEW) == Direction(defer=True)
            assert reasoner._under_way is not None
            reasoner._under_way.exception(30)
            if expected is None:
                with pytest.raises(ReasonerError, match="401"):
                    reasoner.decide(VIEW)
            else:
                assert reasoner.decide(VIEW) == expected


class TestLimits:
    def test_a_budget_of_queries(self, server: Any, make: Make, tmp_path: Path) -> None:
        reasoner, _, _ = make(most_queries=2)
        assert [reasoner.decide(view(shade)).defer for shade in range(4)] == [False, False, True, True]
        assert len(server.requests) == 2
        assert "budget of 2 queries" in log(tmp_path)[-1]["faults"][0]

    def test_a_budget_of_tokens(self, server: Any, make: Make) -> None:
        reasoner, _, _ = make(most_tokens=150)
        assert [reasoner.decide(view(shade)).defer for shade in range(3)] == [False, False, True]

    def test_so_many_a_minute(self, server: Any, make: Make) -> None:
        reasoner, _, clock = make(per_minute=2, timeout=100)
        for shade in range(3):
            reasoner.decide(view(shade))
        assert clock.slept == [60.0]
        hasty, _, other = make(per_minute=1, timeout=5, cache=False)
        assert [hasty.decide(view(shade)).defer for shade in range(2)] == [False, True]
        assert other.slept == []

    def test_what_was_not_asked_is_not_counted(self, make: Make) -> None:
        hasty, client, clock = make(per_minute=1, timeout=5, most_queries=2)
        assert [hasty.decide(view(shade)).defer for shade in range(3)] == [False, True, True]
        clock.now += 60
        assert not hasty.decide(view(3)).defer
        assert client.queries == 2


class TestSettings:
    @pytest.mark.parametrize(
        "wrong",
        [{"every": 0}, {"timeout": 0.0}, {"retries": -1}, {"most_queries": 0}, {"model": ""}, {"back_off": -1.0}],
    )
    def test_numbers_out_of_range(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError):
            VLMSettings(**{"model": "m", **wrong})

    @pytest.mark.parametrize("url", [f"http://me:{KEY}@host/v1", f"https://host/v1?api_key={KEY}"])
    def test_secrets_do_not_go_into_an_address(self, url: str) -> None:
        with pytest.raises(InvalidInputError, match="environment") as raised:
            VLMSettings("m", url)
        assert KEY not in str(raised.value)

    @pytest.mark.parametrize("url", ["", "localhost:8000/v1", "ftp://host/v1", "http://[::1/v1"])
    def test_an_endpoint_is_a_web_address(self, url: str) -> None:
        with pytest.raises(InvalidInputError, match="web address"):
            VLMSettings("m", url)

    def test_unknown_names(self) -> None:
        with pytest.raises(UnknownNameError):
            VLMSettings("m", fallback="pray")  # type: ignore[arg-type]

    def test_a_prompt_of_ones_own(self, server: Any, make: Make, tmp_path: Path) -> None:
        prompt = tmp_path / "mine.md"
        prompt.write_text("Do: $task")
        reasoner, _, _ = make(prompt=prompt)
        reasoner.decide(VIEW)
        assert server.requests[0]["messages"][0]["content"][0]["text"] == "Do: move the cube"
        for wrong in ("$task and $secret", "no place", "$task costs 5$"):
            prompt.write_text(wrong)
            with pytest.raises(InvalidInputError, match="names"):
                make(prompt=prompt)
        with pytest.raises(InvalidInputError, match="can't be read"):
            make(prompt=tmp_path / "missing.md")

    def test_openai_itself_wants_a_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NOBODYS_KEY", raising=False)
        with pytest.raises(InvalidInputError, match="NOBODYS_KEY"):
            VLMClient(VLMSettings("m", key_variable="NOBODYS_KEY"))


def test_evaluation_with_faults_injected(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path: images are drawn, sent, answered by what the scripted reasoner would say, and followed."""
    script, seen = CubeReasoner(), dict[str, Any]()
    names = {axes: name for name, axes in OGBENCH_WAYS.items()}
    shown = rollout.seen_by

    def stash(*arguments: Any) -> Any:
        seen.update(shown(*arguments))
        return seen

    def answer(_: Any) -> str:
        direction = script.decide(seen)
        if len(server.requests) % 4 == 0:
            server.faults.append(
                [Fault(429), Fault(500), Fault(text="{broken"), Fault(text='{"direction": "x"}')][
                    len(server.requests) // 4 % 4
                ]
            )
        return json.dumps({"direction": names.get(direction.axes, "stay"), "gripper": direction.gripper})

    monkeypatch.setattr(rollout, "seen_by", stash)
    server.answer = answer
    task = "ogbench/cube-single-task1"
    settings = VLMSettings("m", server.url, "STAND_IN_KEY", back_off=0.0)
    reasoner = ReasonerSettings(vlm=settings, vlm_folder=tmp_path / "vlm")
    with make_env(task, 1, workers=0, render=RenderSettings(64, 64)) as env:
        result = evaluate(env, load_prior(task), "frs", 1, 0, reasoner=reasoner)
    assert result.rate.successes == 1
    assert result.settings["vlm"]["model"] == "m"
    entries = log(tmp_path)
    assert result.queries == len(entries)
    assert any(entry["faults"] for entry in entries)
    assert not any(entry["fallback"] for entry in entries)


def test_recording_with_a_vlm_notes_its_queries_in_the_recording(server: Any, tmp_path: Path) -> None:
    """The command itself, run twice: the notes in its folder are nothing foreign to the dataset."""
    out = tmp_path / "recorded"
    command = ["record", "ogbench/cube-single-task1", "--out", str(out), "--no-every-step", "--num-envs", "1"]
    command += ["--reasoner", "vlm", "--vlm-model", "m", "--vlm-url", server.url, "--vlm-most-queries", "2"]
    for episodes in (1, 2):
        assert main([*command, "--episodes", str(episodes)]) == 0
        entries = [json.loads(line) for line in (out / "vlm" / "queries.jsonl").read_text().splitlines()]
        dataset = SteeringDataset.load(out)
        assert len(dataset) == episodes
        assert sum(episode.decisions for episode in dataset) == len(entries)
        assert entries[0]["direction"] == [0, 0, -1]
        assert "budget of 2 queries" in entries[-1]["faults"][0]
