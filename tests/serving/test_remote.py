"""Policies of other servers: what they are, that they can't be steered inside, and what can be done from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_websocket

from counterflow.cli import main
from counterflow.errors import CounterflowError, InvalidInputError, MismatchError, ServingError
from counterflow.policies import ActionLayout, ActionSpec, FlowPolicy, Normaliser
from counterflow.reasoners import Direction, to_reference
from counterflow.serving import PolicyServer, RankedRemote, RemotePolicy, pack, unpack
from counterflow.steering import FlowReversal, SteeredPolicy, steer

Serve = Callable[..., PolicyServer]
STATE = {"observation": np.linspace(-1, 1, 6, dtype=np.float32)}
SPEC = ActionSpec(3, 4, layout=ActionLayout(translation=(0, 1, 2), gripper=3))


@contextmanager
def plain_server(answer: Callable[[Any], Any], metadata: Any = None) -> Iterator[str]:
    """A server of openpi's protocol that is not ours: no word about its policy, and whatever answers the test wants."""

    def meet(connection: ServerConnection) -> None:
        connection.send(pack({} if metadata is None else metadata))
        for message in connection:
            said = answer(unpack(message))  # type: ignore[arg-type]
            if said is None:
                connection.close()
                return
            connection.send(said if isinstance(said, str | bytes) else pack(said))

    with serve_websocket(meet, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def drawing(seed: int = 0) -> Callable[[Any], Any]:
    """A policy that answers with fresh chunks."""
    rng = np.random.default_rng(seed)
    return lambda _: {"actions": rng.standard_normal((3, 4)).astype(np.float32)}


class TestNotSteerable:
    @pytest.mark.parametrize("method", ["base", "frs", "partial", "rank", "direct"])
    def test_it_says_so_and_what_to_do(self, serve: Serve, method: str) -> None:
        with RemotePolicy(serve().url) as remote:
            steered = steer(remote, method)
            with pytest.raises(MismatchError, match=r"offers no velocity field.*RankedRemote\(remote\).*--steer frs"):
                steered.act({"observation": torch.zeros(1, 6)}, torch.zeros(1, 3, 4))
            with pytest.raises(MismatchError, match="offers no velocity field"):
                remote.velocity(None, torch.zeros(1, 3, 4), torch.zeros(1))

    def test_on_the_command_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["serve", "ws://robot.example:8000", "--steer", "frs"]) == 2
        printed = " ".join(capsys.readouterr().err.split())
        assert "ws://robot.example:8000 is a policy server" in printed
        assert "RankedRemote" in printed


class TestCounterflowServer:
    def test_its_answers_are_those_of_the_policy(self, serve: Serve, prior: FlowPolicy) -> None:
        noise = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)

        def start(policy: Any, context: Any, rng: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.from_numpy(noise)[None], torch.zeros(1)

        expected = SteeredPolicy(prior, start=start, steps=4).act(torch.from_numpy(STATE["observation"])[None])
        with RemotePolicy(serve().url) as remote:
            np.testing.assert_allclose(remote.infer(STATE, noise=noise)["actions"], expected.actions[0], atol=1e-6)

    def test_a_direction_and_a_chunk(self, serve: Serve, prior: FlowPolicy) -> None:
        direction = Direction((0, 1, 0), 0.5, "open")
        reference = to_reference([direction], prior.action_spec)
        expected = prior.action_spec.denormalise(reference.chunk)[0]
        with RemotePolicy(serve(method="direct").url) as remote:
            np.testing.assert_allclose(remote.infer(STATE, steer=direction)["actions"], expected, atol=1e-5)
            np.testing.assert_allclose(remote.infer(STATE, steer=expected.numpy())["actions"], expected, atol=1e-5)

    def test_it_says_what_its_actions_are(self, serve: Serve, prior: FlowPolicy) -> None:
        with RemotePolicy(serve().url) as remote:
            spec, own = remote.action_spec, prior.action_spec
            assert (spec.horizon, spec.dim, spec.low, spec.high) == (own.horizon, own.dim, own.low, own.high)
            assert spec.layout == own.layout
            chunk = torch.linspace(-1, 1, 12).reshape(3, 4)
            torch.testing.assert_close(
                spec.normalise(chunk), own.normalise(chunk)
            )  # distances are measured in these units
            plan = RankedRemote(remote, candidates=3).act(STATE, Direction((0, 1, 0)))
            assert plan.noise is not None  # of the candidate that was kept
            np.testing.assert_allclose(remote.infer(STATE, noise=plan.noise)["actions"], plan.actions, atol=1e-6)

    def test_what_is_expected_is_checked(self, serve: Serve, prior: FlowPolicy) -> None:
        server = serve()
        with RemotePolicy(server.url, expect={"policy": prior.fingerprint, "noise_policy": ""}) as remote:
            remote.infer(STATE)
        with pytest.raises(MismatchError, match=f"expects policy '0123', and ws://.* has '{prior.fingerprint}'"):
            RemotePolicy(server.url, expect={"policy": "0123"})
        assert server.metrics.requests.read("answered") == 1

    def test_what_is_expected_goes_along_with_every_request(self, serve: Serve, prior: FlowPolicy) -> None:
        """A proxy, or a new start, may put another policy behind the same address."""
        server = serve()
        with RemotePolicy(server.url, expect={"policy": prior.fingerprint}) as remote:
            server.served.belongs["policy"] = "0123"
            with pytest.raises(ServingError, match="so none are sent"):
                remote.infer(STATE)

    def test_errors_of_the_server(self, serve: Serve) -> None:
        server = serve(api_key="a-long-enough-key")
        with pytest.raises(ServingError, match="HTTP 401 a valid API key is needed"):
            RemotePolicy(server.url, api_key="another-long-key")
        with pytest.raises(ServingError, match="HTTP 412 the client expects horizon '7'"):
            RemotePolicy(server.url + "/?horizon=7", api_key="a-long-enough-key")
        with RemotePolicy(server.url, api_key="a-long-enough-key") as remote:
            with pytest.raises(ServingError, match=r"answered with an error: .* has shape \(5,\)"):
                remote.infer({"observation": np.zeros(5, np.float32)})
            with pytest.raises(InvalidInputError, match="give it as an argument"):
                remote.infer({**STATE, "noise": np.zeros((3, 4))})
            with pytest.raises(InvalidInputError, match="can't be written"):
                remote.infer({"observation": object()})
            remote.infer(STATE)

    def test_nobody_there(self) -> None:
        for url in ("ws://127.0.0.1:9", "nowhere", "http://127.0.0.1:9"):
            with pytest.raises(ServingError, match="can't be reached"):
                RemotePolicy(url, timeout=10)


class TestOtherServers:
    def test_a_plain_one_is_driven(self) -> None:
        with plain_server(drawing()) as url, RemotePolicy(url) as remote:
            assert remote.infer(STATE)["actions"].shape == (3, 4)
            with pytest.raises(MismatchError, match="does not say what its actions are"):
                _ = remote.action_spec

    def test_it_can_not_be_checked_nor_told_how_to_steer(self) -> None:
        with plain_server(drawing()) as url:
            with pytest.raises(MismatchError, match="does not say which policy it serves"):
                RemotePolicy(url, expect={"policy": "0123"})
            with RemotePolicy(url) as remote:
                for asked in ({"steer": Direction((0, 0, 1))}, {"noise": np.zeros((3, 4))}, {"view": {}}):
                    with pytest.raises(MismatchError, match=f"would overlook {next(iter(asked))}"):
                        remote.infer(STATE, **asked)

    @pytest.mark.parametrize(
        ("answer", "words"),
        [
            ("it broke", "answered with an error: it broke"),
            ({}, "without an array of actions"),
            ([1], "without an array of actions"),
            ({"actions": [[0.0] * 4] * 3}, "without an array of actions"),
            ({"actions": np.zeros(4, np.float32)}, "without an array of actions"),
            ({"actions": np.zeros((3, 4), int)}, "without an array of actions"),
            ({"actions": np.full((3, 4), np.nan)}, "NaN or infinite; don't execute"),
            ({"actions": np.zeros((2, 4), np.float32)}, r"shape \(2, 4\); expected \(3, 4\)"),
            ({"actions": np.zeros((3, 5), np.float32)}, r"shape \(3, 5\); expected \(3, 4\)"),
            (b"\xc1", "can't be read"),
            (None, "went away"),
        ],
    )
    def test_bad_answers(self, answer: Any, words: str) -> None:
        with (
            plain_server(lambda _: answer) as url,
            RemotePolicy(url, spec=SPEC) as remote,
            pytest.raises(CounterflowError, match=words),
        ):
            remote.infer(STATE)

    def test_a_horizon_that_changes_on_the_way(self) -> None:
        sizes = iter([(3, 4), (3, 4), (2, 4)])
        with (
            plain_server(lambda _: {"actions": np.zeros(next(sizes), np.float32)}) as url,
            RemotePolicy(url) as remote,
        ):
            remote.infer(STATE)
            remote.infer(STATE)
            with pytest.raises(MismatchError, match=r"shape \(2, 4\); expected \(3, 4\)"):
                remote.infer(STATE)

    def test_one_that_does_not_answer(self) -> None:
        go = threading.Event()

        def wait(_: Any) -> Any:
            go.wait(60)
            return {}

        with plain_server(wait) as url, RemotePolicy(url, timeout=0.2) as remote:
            with pytest.raises(ServingError, match=r"did not answer within 0\.2 s"):
                remote.infer(STATE)
            go.set()
            with pytest.raises(ServingError, match="went away"):
                remote.infer(STATE)

    @pytest.mark.parametrize(
        "metadata", [[1], {"server": "counterflow", "actions": {}}, {"server": "counterflow", "actions": {"layout": 1}}]
    )
    def test_metadata_that_are_none(self, metadata: Any) -> None:
        with (
            plain_server(drawing(), metadata) as url,
            pytest.raises(ServingError, match=r"map of metadata|can't be used"),
        ):
            RemotePolicy(url)


class TestSampleAndRank:
    @pytest.mark.parametrize("distance", ["cosine", "l2"])
    def test_the_nearest_is_kept(self, distance: Any) -> None:
        with plain_server(drawing()) as url, RemotePolicy(url, spec=SPEC) as remote:
            plan = RankedRemote(remote, 12, distance).act(STATE, Direction((0, 0, 1), gripper="hold"))
        assert plan.candidates.shape == (12, 3, 4)
        wanted = np.tile([0, 0, 0.7, 0], 3)
        flat = plan.candidates.reshape(12, -1)
        if distance == "cosine":
            best = (flat @ wanted / np.linalg.norm(flat, axis=1)).argmax()
        else:
            best = np.linalg.norm(flat - wanted, axis=1).argmin()
        assert plan.chosen == best
        np.testing.assert_array_equal(plan.actions, plan.candidates[best])

    def test_distances_are_measured_in_normalised_units(self) -> None:
        """What is large in the environment's units may be small in the policy's."""
        scale = torch.tensor([100.0, 1.0, 1.0, 1.0])
        chunks = [np.zeros((3, 4), np.float32) for _ in range(2)]
        chunks[0][:, 0], chunks[1][:, 1] = 50.0, 2.0  # 0.5 and 2 normalised
        for normaliser, kept in ((None, 1), (Normaliser(torch.zeros(4), scale), 0)):
            answers = iter(chunks)
            spec = ActionSpec(3, 4, normaliser=normaliser)
            with (
                plain_server(lambda _, answers=answers: {"actions": next(answers)}) as url,  # type: ignore[misc]
                RemotePolicy(url, spec=spec) as remote,
            ):
                assert RankedRemote(remote, 2, "l2").act(STATE, np.full((3, 4), 1e-3)).chosen == kept

    def test_over_a_counterflow_server(self, serve: Serve) -> None:
        server = serve(method="base")
        with RemotePolicy(server.url) as remote:
            ranked = RankedRemote(remote, 8)
            up, down = (ranked.act(STATE, Direction((0, 0, sign))).actions[:, 2].sum() for sign in (1, -1))
        assert up > down
        assert server.metrics.requests.read("answered") == 16

    def test_where_nobody_speaks_it_is_asked_once(self, serve: Serve) -> None:
        server = serve(method="base")
        with RemotePolicy(server.url) as remote:
            for steer_ in (None, Direction(defer=True)):
                assert RankedRemote(remote, 8).act(STATE, steer_).candidates.shape == (1, 3, 4)
        assert server.metrics.requests.read("answered") == 2

    def test_a_server_that_does_not_draw_anew(self) -> None:
        same = {"actions": np.ones((3, 4), np.float32)}
        with (
            plain_server(lambda _: same) as url,
            RemotePolicy(url, spec=SPEC) as remote,
            pytest.raises(MismatchError, match="gave the same chunk 4 times"),
        ):
            RankedRemote(remote, 4).act(STATE, Direction((0, 0, 1)))

    def test_bad_input(self) -> None:
        with plain_server(drawing()) as url:
            with RemotePolicy(url) as remote, pytest.raises(MismatchError, match="does not say what its actions are"):
                RankedRemote(remote)
            with RemotePolicy(url, spec=SPEC) as remote:
                with pytest.raises(InvalidInputError, match="n is 0"):
                    RankedRemote(remote, 0)
                with pytest.raises(MismatchError, match=r"shape \(1, 2, 4\)"):
                    RankedRemote(remote).act(STATE, np.zeros((2, 4)))
                with pytest.raises(InvalidInputError, match="NaN"):
                    RankedRemote(remote).act(STATE, np.full((3, 4), np.nan))


def test_a_local_policy_is_still_steered(prior: FlowPolicy) -> None:
    """What a remote policy refuses works where the field is."""
    plan = SteeredPolicy(prior, start=FlowReversal(4), steps=4).act(torch.zeros(1, 6), torch.zeros(1, 3, 4), rng=0)
    assert plan.actions.shape == (1, 3, 4)
