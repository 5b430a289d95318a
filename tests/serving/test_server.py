"""The server, met by a plain websocket client that is hostile, slow, rude or early."""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
import ssl
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from counterflow.errors import InvalidInputError, ServingError
from counterflow.policies import ActionSpec, FieldPolicy, FlowPolicy
from counterflow.reasoners import Direction
from counterflow.serving import MessageLimits, PolicyServer, ServedPolicy, ServerSettings, pack, running, unpack
from counterflow.serving.batching import Batcher
from counterflow.serving.metrics import Metrics
from counterflow.serving.requests import Request
from counterflow.serving.server import KNOCKING, _Connection

Serve = Callable[..., PolicyServer]
KEY = "a-long-enough-key"
STATE = np.linspace(-1, 1, 6, dtype=np.float32)
NOISE = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


@contextmanager
def client(server: PolicyServer, path: str = "/", **options: Any) -> Iterator[ClientConnection]:
    """A connected client that has read the metadata."""
    with connect(server.url + path, compression=None, max_size=None, **options) as connection:
        connection.metadata = unpack(connection.recv(30))  # type: ignore[attr-defined, arg-type]
        yield connection


def ask(connection: ClientConnection, **message: Any) -> Any:
    """Send an observation (and more); return the answer, or the text of an error."""
    connection.send(pack({"observation": STATE, **message}))
    answer = connection.recv(30)
    return answer if isinstance(answer, str) else unpack(answer)


def get(server: PolicyServer, path: str, key: str | None = None) -> str:
    headers = {} if key is None else {"Authorization": f"Api-Key {key}"}
    request = urllib.request.Request(server.url.replace("ws", "http", 1) + path, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def counted(server: PolicyServer, name: str) -> float:
    """A number of /metrics."""
    (line,) = [line for line in get(server, "/metrics").splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[-1])


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what must come about; only a server that never gets there fails."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


PINGS = (struct.pack("!BB", 0x89, 0x80 | 125) + bytes(4) + bytes(125)) * 1000


@contextmanager
def rude(server: PolicyServer) -> Iterator[socket.socket]:
    """A websocket client that speaks without ever listening, unless somebody reads for it."""
    with socket.socket() as stranger:
        stranger.settimeout(30)
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        stranger.connect(("127.0.0.1", server.port))
        stranger.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        eventually(lambda: len(server._clients) == 1)
        yield stranger


def ping_until_unheard(stranger: socket.socket, server: PolicyServer) -> None:
    """Send pings until the network takes no more because the server has stopped reading; what was begun is sent whole."""
    (met,) = server._clients
    stranger.settimeout(0.5)
    unsent, deadline = memoryview(PINGS), time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            unsent = unsent[stranger.send(unsent) :] or memoryview(PINGS)
        except TimeoutError:
            if not met.connection.transport.is_reading():  # or else the server only hasn't had its turn
                break
    assert not met.connection.transport.is_reading()


def outcome(name: str) -> str:
    return f'counterflow_requests_total{{outcome="{name}"}}'


class TestProtocol:
    def test_metadata_then_answers(self, serve: Serve, prior: FlowPolicy) -> None:
        server = serve()
        with client(server) as connection:
            assert connection.metadata == server.served.metadata  # type: ignore[attr-defined]
            answer = ask(connection, noise=NOISE, steer={"axes": [0, 0, 1]})
            assert answer["actions"].shape == (3, 4)
            assert answer["actions"].dtype == np.float32
            assert set(answer["server_timing"]) == {"infer_ms", "wait_ms", "batch_size"}
            assert set(answer["diagnostics"]) == {"start_time", "noise_percentile", "round_trip_error", "agreement"}
            again = ask(connection, noise=NOISE, steer={"axes": [0, 0, 1]})
            np.testing.assert_array_equal(again["actions"], answer["actions"])
            assert "prev_total_ms" in again["server_timing"]

    def test_what_a_client_says_reaches_the_policy(self, serve: Serve) -> None:
        """Executed directly, the reference comes back; a reasoner is asked with the view."""

        class Upwards:
            def reset(self, seed: int) -> None: ...

            def decide(self, view: Any) -> Direction:
                return Direction((0, 0, 1), float(view["height"][0]), "hold")

        server = serve(method="direct", reasoners={"upwards": Upwards})
        wanted = np.full((3, 4), 0.25, np.float32)
        with client(server) as connection:
            np.testing.assert_allclose(ask(connection, steer=wanted)["actions"], wanted, atol=1e-6)
            up = ask(connection, steer="upwards", view={"height": np.array([0.5])})["actions"]
            np.testing.assert_allclose(up, [[0, 0, 0.35, 0]] * 3, atol=1e-6)

    def test_healthz(self, serve: Serve) -> None:
        server = serve(api_key=KEY)
        assert get(server, "/healthz") == "OK\n"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(server, "/policy", KEY)

    def test_metrics(self, serve: Serve) -> None:
        server = serve()
        with client(server) as connection:
            for _ in range(3):
                ask(connection)
            assert "NaN" in ask(connection, observation=STATE * np.nan)
            assert counted(server, outcome("answered")) == 3
            assert counted(server, outcome("refused")) == 1
            assert counted(server, "counterflow_connections") == 1
            assert counted(server, "counterflow_batch_size_count") == 3
            assert counted(server, 'counterflow_request_seconds_bucket{le="+Inf"}') == 3
            assert counted(server, "counterflow_received_bytes_total") > 4 * STATE.nbytes
        eventually(lambda: counted(server, "counterflow_connections") == 0)

    def test_metrics_want_the_key(self, serve: Serve) -> None:
        server = serve(api_key=KEY)
        assert "counterflow_connections 0" in get(server, "/metrics", KEY)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(server, "/metrics")


class TestKeys:
    @pytest.mark.parametrize(
        "header",
        [
            None,
            "",
            "Api-Key",
            "Api-Key ",
            f"Api-Key {KEY}x",
            f"Api-Key {KEY[:-1]}",
            f"Bearer {KEY}",
            KEY,
            "Api-Key k\xe9y",
        ],
    )
    def test_wrong_ones(self, serve: Serve, header: str | None) -> None:
        server = serve(api_key=KEY)
        headers = None if header is None else {"Authorization": header}
        with pytest.raises(InvalidStatus, match="401"), client(server, additional_headers=headers):
            pass
        assert server.metrics.clients.read("unauthorised") == 1

    def test_two_headers_are_none(self, serve: Serve) -> None:
        server = serve(api_key=KEY)
        headers = [("Authorization", f"Api-Key {KEY}"), ("Authorization", "Api-Key other")]
        with pytest.raises(InvalidStatus, match="401"), client(server, additional_headers=headers):
            pass

    def test_the_right_one(self, serve: Serve) -> None:
        server = serve(api_key=KEY)
        with client(server, additional_headers={"Authorization": f"Api-Key {KEY}"}) as connection:
            assert ask(connection)["actions"].shape == (3, 4)

    def test_keys_are_compared_in_constant_time(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        compared: list[tuple[bytes, bytes]] = []

        def compare(presented: bytes, expected: bytes) -> bool:
            compared.append((presented, expected))
            return False

        monkeypatch.setattr("counterflow.serving.server.hmac.compare_digest", compare)
        server = serve(api_key=KEY)
        headers = {"Authorization": f"Api-Key {KEY}"}
        with pytest.raises(InvalidStatus, match="401"), client(server, additional_headers=headers):
            pass
        assert compared == [(f"Api-Key {KEY}".encode(), f"Api-Key {KEY}".encode())]

    def test_a_key_is_not_shown(self) -> None:
        assert KEY not in repr(ServerSettings(api_key=KEY))

    def test_pages_of_a_browser_are_refused(self, serve: Serve) -> None:
        with pytest.raises(InvalidStatus, match="403"), client(serve(), origin="http://evil.example"):
            pass


class TestExpectations:
    def test_on_connect(self, serve: Serve, prior: FlowPolicy) -> None:
        server = serve()
        with client(server, f"/?policy={prior.fingerprint}&horizon=3&noise_policy=") as connection:
            ask(connection)
        for query in ("policy=0123", "noise_policy=0123", "polcy=0123", "&".join(f"a{n}=1" for n in range(40))):
            with pytest.raises(InvalidStatus, match="412"), client(server, f"/?{query}"):
                pass
        assert server.metrics.clients.read("mismatched") == 4

    def test_in_a_request(self, serve: Serve, prior: FlowPolicy) -> None:
        with client(serve()) as connection:
            assert "so none are sent" in ask(connection, expect={"policy": "0123"})
            assert "actions" in ask(connection, expect={"policy": prior.fingerprint})


class TestHostile:
    def test_every_malformed_message_is_answered_and_harms_nobody(self, serve: Serve) -> None:
        server = serve()
        array = {b"__ndarray__": True, b"data": bytes(24), b"dtype": "<f4", b"shape": [6]}
        messages: list[bytes | str] = [
            "hello",
            "",
            b"",
            b"\xc1",
            b"\x00" * 1000,
            b"\x91" * 10_000,
            pack({"observation": STATE})[:-1],
            pack({"observation": STATE}) + b"\x00",
            pack([1, 2, 3]),
            pack("observation"),
            pack(None),
            pack({"observation": STATE[:5]}),
            pack({"observation": STATE, "noise": STATE}),
            pack({"observation": STATE, "steer": {"axes": [[[]]]}}),
            pack({"observation": STATE, "steer": "\x00" * 1000}),
            pack({"observation": STATE, "expect": {"policy": {"a": []}}}),
            msgpack.packb({"observation": {**array, b"dtype": "|O"}}),
            msgpack.packb({"observation": {**array, b"shape": [2**62]}}),
            msgpack.packb({"observation": {**array, b"data": b""}}),
            msgpack.packb({"observation": msgpack.Timestamp(0)}),
            msgpack.packb({b"observation": 1}),
            msgpack.packb({"observation": array, "steer": {**array, b"shape": [6]}}),
        ]
        with client(server) as hostile, client(server) as other:
            expected = ask(other, noise=NOISE)["actions"]
            for message in messages:
                hostile.send(message)
                answer = hostile.recv(30)
                assert isinstance(answer, str), message
                assert "Traceback" not in answer
                assert ".py" not in answer
                np.testing.assert_array_equal(ask(other, noise=NOISE)["actions"], expected)
            np.testing.assert_array_equal(ask(hostile, noise=NOISE)["actions"], expected)
            assert server.metrics.requests.read("refused") == len(messages)
            assert server.metrics.requests.read("failed") == 0

    def test_a_message_that_is_too_large(self, serve: Serve) -> None:
        server = serve(limits=MessageLimits(size=10_000))
        with client(server) as hostile, client(server) as other:
            with pytest.raises(ConnectionClosed) as closed:
                ask(hostile, big=np.zeros(3000, np.float32))
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009
            ask(other)

    def test_one_in_many_fragments(self, serve: Serve) -> None:
        server = serve(limits=MessageLimits(size=10_000))
        with client(server) as hostile, client(server) as other:
            whole = pack({"observation": STATE, "noise": NOISE})
            hostile.send(iter([whole[:10], whole[10:50], whole[50:]]))
            assert not isinstance(hostile.recv(30), str)
            with suppress(ConnectionClosed):  # when it is cut off depends on how fast it sends
                hostile.send(iter([b"x" * 1000] * 11))
            with pytest.raises(ConnectionClosed):
                hostile.recv(30)
            ask(other)

    def test_a_long_error_is_shortened(self, serve: Serve) -> None:
        with client(serve()) as connection:
            answer = ask(connection, **{f"{'x' * 120}{number}": 1 for number in range(200)})
            assert isinstance(answer, str)
            assert len(answer) <= 2000

    def test_what_goes_wrong_inside_stays_inside(self, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
        def field(x: torch.Tensor, t: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
            if bool((observation > 5).any()):
                raise RuntimeError("a secret path /home/someone")
            if bool((observation < -5).any()):
                raise SystemExit(3)
            if bool((observation == 5).any()):
                raise StopIteration
            return -x

        server = serve(FieldPolicy(field, ActionSpec(3, 4)))
        with client(server) as connection, client(server) as other, caplog.at_level(logging.ERROR):
            for value in (6.0, -6.0, 5.0):
                answer = ask(connection, observation=np.full(6, value))
                assert "the server failed at this request (incident " in answer
                assert "secret" not in answer
                assert answer.split("incident ")[1][:8] in caplog.text
            assert "a secret path" in caplog.text
            assert ask(connection)["actions"].shape == ask(other)["actions"].shape == (3, 4)
        assert server.metrics.requests.read("failed") == 3

    def test_bytes_that_are_no_http(self, serve: Serve) -> None:
        server = serve()
        for sent in (
            b"\x00" * 1000 + b"\r\n",
            b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
            b"GET " + b"x" * 100_000,
        ):
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as stranger:
                try:
                    stranger.sendall(sent)
                    while stranger.recv(4096):
                        pass
                except OSError:
                    pass  # cut off, which is an answer too
        with client(server) as connection:
            ask(connection)

    def test_strangers_who_only_knock_are_bounded(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        knocked: list[tuple[int, bool]] = []
        meet = _Connection.connection_made

        def count(self: _Connection, transport: asyncio.BaseTransport) -> None:
            meet(self, transport)
            knocked.append((len(self.everybody), self.transport.is_closing()))

        monkeypatch.setattr(_Connection, "connection_made", count)
        server = serve(max_connections=1, max_waiting=1)
        with client(server) as connection, ExitStack() as strangers:
            for _ in range(100):
                strangers.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            eventually(lambda: len(knocked) == 101)
            assert max(number for number, _ in knocked) > 1 + KNOCKING
            assert all(closing == (number > 1 + KNOCKING) for number, closing in knocked)
            ask(connection)

    def test_pings_without_reading_do_not_fill_the_memory(self, serve: Serve) -> None:
        """A client that never reads the answers to its pings is no longer listened to."""
        server = serve()
        with rude(server) as stranger:
            ping_until_unheard(stranger, server)
            (met,) = server._clients
            assert 0 < met.connection.transport.get_write_buffer_size() < 2_000_000
            with client(server) as other:
                ask(other)

    def test_a_client_that_does_not_read_is_cut_off(self, serve: Serve) -> None:
        server = serve(patience=0.2)
        with rude(server) as stranger:
            cut_off = False
            while not cut_off:
                try:
                    stranger.sendall(PINGS)
                except (ConnectionResetError, BrokenPipeError):
                    cut_off = True
        eventually(lambda: len(server._clients) == 0)

    def test_a_client_that_reads_again_is_listened_to_again(self, serve: Serve) -> None:
        server = serve()
        with rude(server) as stranger:
            ping_until_unheard(stranger, server)
            (met,) = server._clients
            stranger.settimeout(30)
            while not met.connection.transport.is_reading():
                assert stranger.recv(1_000_000)


class TestManyClients:
    def test_their_requests_are_decided_together(self, serve: Serve, held: Any) -> None:
        """While one is decided the others gather, and their answers are those that each gets alone."""
        server = serve(held)
        noises = [NOISE * scale for scale in np.linspace(-1, 1, 6, dtype=np.float32)]
        connections = [connect(server.url, compression=None) for _ in noises]
        try:
            for connection in connections:
                connection.recv(30)
            alone = [ask(connections[0], noise=noise)["actions"] for noise in noises]
            held.batches.clear()
            held.go.clear()
            held.begun.clear()
            connections[0].send(pack({"observation": STATE, "noise": noises[0]}))
            assert held.begun.wait(30)
            for connection, noise in zip(connections[1:], noises[1:], strict=True):
                connection.send(pack({"observation": STATE, "noise": noise}))
            eventually(lambda: counted(server, "counterflow_waiting_requests") == 6)
            held.go.set()
            together = [unpack(connection.recv(30)) for connection in connections]  # type: ignore[arg-type]
        finally:
            for connection in connections:
                connection.close()
        assert held.batches == [1, 5]
        assert [answer["server_timing"]["batch_size"] for answer in together] == [1, 5, 5, 5, 5, 5]
        for answer, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(answer["actions"], expected, atol=1e-5)

    def test_the_server_answers_while_it_thinks(self, serve: Serve, held: Any) -> None:
        server = serve(held)
        held.go.clear()
        with client(server) as connection:
            held.begun.clear()
            connection.send(pack({"observation": STATE}))
            assert held.begun.wait(30)
            assert get(server, "/healthz") == "OK\n"
            with client(server) as other:
                assert "NaN" in ask(other, observation=STATE * np.nan)
            held.go.set()
            connection.recv(30)

    def test_a_slow_reasoner_holds_up_nobody(self, serve: Serve) -> None:
        go, begun = threading.Event(), threading.Event()

        class Slow:
            def reset(self, seed: int) -> None: ...

            def decide(self, view: Any) -> Direction:
                begun.set()
                assert go.wait(60)
                return Direction((0, 0, 1))

        server = serve(reasoners={"slow": Slow})
        with client(server) as waiting, client(server) as other:
            waiting.send(pack({"observation": STATE, "steer": "slow"}))
            assert begun.wait(30)
            assert "actions" in ask(other)
            go.set()
            assert "actions" in unpack(waiting.recv(30))  # type: ignore[arg-type]

    def test_whoever_goes_in_mid_request_is_dropped(self, serve: Serve, held: Any) -> None:
        server = serve(held)
        held.go.clear()
        with client(server) as first, client(server) as leaving, client(server) as staying:
            held.begun.clear()
            first.send(pack({"observation": STATE}))
            assert held.begun.wait(30)
            for connection in (leaving, staying):
                connection.send(pack({"observation": STATE}))
            eventually(lambda: counted(server, "counterflow_waiting_requests") == 3)
            leaving.socket.shutdown(socket.SHUT_RDWR)  # without a word, as when a cable is pulled
            eventually(lambda: counted(server, outcome("dropped")) == 1)
            held.go.set()
            first.recv(30)
            staying.recv(30)
        assert held.batches == [1, 1]  # what nobody waited for was not computed

    def test_whoever_goes_while_being_decided_harms_nobody(self, serve: Serve, held: Any) -> None:
        server = serve(held)
        held.go.clear()
        held.begun.clear()
        with client(server) as leaving, client(server) as staying:
            leaving.send(pack({"observation": STATE}))
            assert held.begun.wait(30)
            leaving.close()
            eventually(lambda: counted(server, outcome("dropped")) == 1)
            held.go.set()
            assert "actions" in ask(staying)

    def test_who_sends_ahead_is_held_back(self, serve: Serve, held: Any) -> None:
        """A client that doesn't wait for answers: one request is in work, the rest stays in the network."""
        server = serve(held)
        held.go.clear()
        with client(server) as connection:
            message = pack({"observation": STATE, "noise": NOISE})
            for _ in range(20):
                connection.send(message)
            held.begun.wait(30)
            assert counted(server, "counterflow_waiting_requests") == 1
            held.go.set()
            answers = [unpack(connection.recv(30)) for _ in range(20)]  # type: ignore[arg-type]
            assert len({answer["actions"].tobytes() for answer in answers}) == 1
        assert held.batches == [1] * 20

    def test_a_full_queue_holds_others_back_and_loses_none(self, serve: Serve, held: Any) -> None:
        server = serve(held, max_waiting=2, max_batch=8)
        held.go.clear()
        connections = [connect(server.url, compression=None) for _ in range(5)]
        try:
            for connection in connections:
                connection.recv(30)
                connection.send(pack({"observation": STATE}))
            eventually(lambda: counted(server, "counterflow_waiting_requests") == 5)
            held.go.set()
            for connection in connections:
                assert "actions" in unpack(connection.recv(30))  # type: ignore[arg-type]
        finally:
            for connection in connections:
                connection.close()
        assert max(held.batches) <= 2

    def test_patience(self, serve: Serve, held: Any) -> None:
        server = serve(held, patience=0.2)
        held.go.clear()
        with client(server) as connection:
            assert "no answer within 0.2 s" in ask(connection)
            held.go.set()
        assert server.metrics.requests.read("timed_out") == 1

    def test_a_limit_on_connections(self, serve: Serve) -> None:
        server = serve(max_connections=2)
        with client(server), client(server) as second:
            with pytest.raises(InvalidStatus, match="503"), client(server):
                pass
            ask(second)
        eventually(lambda: len(server._clients) == 0)
        with client(server) as connection:
            ask(connection)
        assert server.metrics.clients.read("full") == 1

    def test_a_batch_is_no_larger_than_allowed(self) -> None:
        async def run() -> list[int]:
            sizes: list[int] = []

            def act(requests: Any) -> Any:
                sizes.append(len(requests))
                return [ValueError("no answer")] * len(requests)

            batcher = Batcher(act, max_batch=4)
            request = Request({"x": np.zeros(1)}, None, None, 0)
            other = Request({"x": np.zeros(2)}, None, None, 0)
            waiting = [asyncio.ensure_future(batcher.decide(one)) for one in [request, other] * 5]
            await asyncio.sleep(0)
            batcher.start()
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(one, ValueError) for one in found)
            await batcher.stop()
            return sizes

        assert asyncio.run(run()) == [4, 4, 1, 1]


class TestStopping:
    def test_who_is_being_served_is_answered_first(self, prior: FlowPolicy, held: Any, make_served: Any) -> None:
        held.go.clear()
        connections: list[ClientConnection] = []
        with running(make_served(held), ServerSettings(port=0)) as server:
            for _ in range(3):
                connections.append(connect(server.url, compression=None))
                connections[-1].recv(30)
            held.begun.clear()
            connections[0].send(pack({"observation": STATE}))
            assert held.begun.wait(30)
            connections[1].send(pack({"observation": STATE}))
            eventually(lambda: counted(server, "counterflow_waiting_requests") == 2)
            threading.Timer(0.2, held.go.set).start()
        for connection in connections[:2]:
            assert "actions" in unpack(connection.recv(30))  # type: ignore[arg-type]
        for connection in connections:
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(30)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1001
        with pytest.raises(OSError, match="refused"):
            connect(server.url, open_timeout=5)

    def test_who_takes_too_long_is_not_waited_for(self, held: Any, make_served: Any) -> None:
        held.go.clear()
        with running(make_served(held), ServerSettings(port=0, grace=0.2)) as server:
            connection = connect(server.url, compression=None)
            connection.recv(30)
            held.begun.clear()
            connection.send(pack({"observation": STATE}))
            assert held.begun.wait(30)
        with pytest.raises(ConnectionClosed):
            connection.recv(30)


class TestTLS:
    def test_a_certificate(self, serve: Serve, certificate: Path) -> None:
        server = serve(tls_certificate=certificate)
        assert server.url.startswith("wss://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(certificate.with_name("ca.pem")))
        with client(server, ssl=trusting) as connection:
            ask(connection)
        with pytest.raises(ssl.SSLError), client(server):
            pass
        with pytest.raises((OSError, http.client.HTTPException)):  # plain text is not understood
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=30)

    def test_files_that_are_none(self, make_served: Any, tmp_path: Path, certificate: Path) -> None:
        (tmp_path / "x.pem").write_text("nothing")
        for settings in (
            {"tls_certificate": tmp_path / "missing.pem"},
            {"tls_certificate": tmp_path / "x.pem"},
            {"tls_certificate": certificate, "tls_key": tmp_path / "x.pem"},
        ):
            with (
                pytest.raises(InvalidInputError, match="can't be used"),
                running(make_served(), ServerSettings(port=0, **settings)),
            ):
                pass
        with pytest.raises(InvalidInputError, match="without a certificate"):
            ServerSettings(tls_key=certificate)


class TestSettings:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.0.7", "robot.example"])
    def test_beyond_the_loopback_a_key_is_needed(self, host: str) -> None:
        with pytest.raises(InvalidInputError, match="no API key is set: anybody there could drive the policy"):
            ServerSettings(host=host)
        ServerSettings(host=host, api_key=KEY)
        ServerSettings(host=host, anyone=True)

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
    def test_on_the_loopback_none_is(self, host: str) -> None:
        ServerSettings(host=host)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"port": -1}, "port is -1"),
            ({"port": 65536}, "port is 65536"),
            ({"max_connections": 0}, "max_connections is 0"),
            ({"max_batch": 0}, "max_batch is 0"),
            ({"max_waiting": 0}, "max_waiting is 0"),
            ({"patience": 0}, "patience is 0"),
            ({"grace": float("nan")}, "grace is nan"),
            ({"api_key": ""}, "has 0 characters"),
            ({"api_key": "short"}, "has 5 characters"),
            ({"api_key": "a key\nwith lines"}, "printable"),
            ({"api_key": "schlüssel" * 3}, "ASCII"),
        ],
    )
    def test_out_of_range(self, settings: dict[str, Any], words: str) -> None:
        with pytest.raises(InvalidInputError, match=words):
            ServerSettings(**settings)

    def test_a_port_that_is_taken(self, serve: Serve, make_served: Any) -> None:
        server = serve()
        with (
            pytest.raises(ServingError, match=f"can't listen at 127.0.0.1 port {server.port}"),
            running(make_served(), ServerSettings(port=server.port)),
        ):
            pass


def test_the_format_of_metrics() -> None:
    """As Prometheus reads it: help and type before every metric, buckets cumulative up to +Inf."""
    metrics = Metrics()
    for size in (1, 3, 3, 500):
        metrics.batch.observe(size)
    lines = metrics.text().splitlines()
    assert [line for line in lines if line.startswith("counterflow_batch_size")] == [
        *(f'counterflow_batch_size_bucket{{le="{bound}"}} {count}' for bound, count in ((1, 1), (2, 1), (4, 3))),
        *(f'counterflow_batch_size_bucket{{le="{bound}"}} 3' for bound in (8, 16, 32, 64, 128)),
        'counterflow_batch_size_bucket{le="+Inf"} 4',
        "counterflow_batch_size_sum 507",
        "counterflow_batch_size_count 4",
    ]
    assert "# TYPE counterflow_batch_size histogram" in lines
    assert metrics.text().endswith("\n")


def test_a_policy_without_steering_is_served_too(prior: FlowPolicy) -> None:
    with running(ServedPolicy(prior), ServerSettings(port=0)) as server, client(server) as connection:
        assert "does not listen" in ask(connection, steer={"axes": [0, 0, 1]})
        assert "actions" in ask(connection)
