"""The server: openpi's websocket protocol, so that its client drives a Counterflow policy unchanged.

A client is sent the metadata as it connects, and then, for every message (an observation, see `requests`), either a binary
answer (`actions` (H, A) in environment units, `server_timing`, `noise`, `diagnostics`) or a text that says what was wrong. A
wrong message ends neither its connection nor anybody else's, except where the protocol demands it (a message beyond the size
that is allowed: close code 1009). `GET /healthz` and `GET /metrics` are answered on the same port.

One message of a connection is worked on at a time and the next is not read before its answer has gone: whoever sends faster
than is decided, or does not read, is held back by TCP, and the memory of a connection stays bounded.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import logging
import secrets
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from counterflow.addresses import PORT, is_loopback
from counterflow.checks import COUNT, Range
from counterflow.errors import CounterflowError, InvalidInputError, ServingError
from counterflow.serving.batching import Batcher
from counterflow.serving.messages import MessageLimits, pack, unpack
from counterflow.serving.metrics import Metrics
from counterflow.serving.requests import Asked, Request
from counterflow.serving.served import ServedPolicy, Session

LONGEST_ERROR = 2000  # characters of what a client is told
LONGEST_KEY = 1024
REASONING_THREADS = 4
KNOCKING = 64  # connections beyond those of clients: handshakes, questions for health and metrics, strangers
GOING_AWAY, TRY_AGAIN = 1001, 1013  # close codes (RFC 6455, IANA)

logger = logging.getLogger("counterflow.serving")


@dataclass(frozen=True)
class ServerSettings:
    """Where and for whom a server is there.

    Attributes:
        host: the address to listen at; the loopback, unless there is a key (or `anyone` is welcome).
        port: 0 takes a free one.
        api_key: what clients must present (`Authorization: Api-Key ...`), or None.
        anyone: listen beyond the loopback without a key.
        tls_certificate: PEM file of the certificate and its chain; with it clients connect to wss://.
        tls_key: PEM file of its private key; None: it lies in the same file.
        max_connections: clients at a time; more are refused (503).
        max_batch: requests that are decided together.
        max_waiting: requests that wait or are decided; others are held back at their connections.
        patience: seconds after which a request that isn't answered is answered with an error, and a client that doesn't
            read what it is sent is cut off.
        grace: seconds that requests have to finish when the server stops.
        limits: how large a message may be.

    Raises:
        InvalidInputError: a number is out of range; a certificate can't be used; or everybody could connect.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    anyone: bool = False
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    max_connections: int = 64
    max_batch: int = 32
    max_waiting: int = 64
    patience: float = 60.0
    grace: float = 10.0
    limits: MessageLimits = field(default_factory=MessageLimits)

    def __post_init__(self) -> None:
        """Check everything but the certificate."""
        PORT.check_all(self, "port")
        COUNT.check_all(self, "max_connections", "max_batch", "max_waiting")
        Range(0, 3600, above=True, unit="seconds").check_all(self, "patience", "grace")
        if self.api_key is not None and not (
            8 <= len(self.api_key) <= LONGEST_KEY and self.api_key.isascii() and self.api_key.isprintable()
        ):
            raise InvalidInputError(
                f"the API key has {len(self.api_key)} characters; expected 8 to {LONGEST_KEY} printable ASCII ones. Python's "
                "secrets.token_hex(32) makes a good one."
            )
        if self.tls_key is not None and self.tls_certificate is None:
            raise InvalidInputError("a TLS key was given without a certificate; give both, or neither.")
        if self.api_key is None and not self.anyone and not is_loopback(self.host):
            raise InvalidInputError(
                f"{self.host or 'every address'} can be reached from other machines, and no API key is set: anybody there could "
                "drive the policy. Set a key, listen at 127.0.0.1 (and tunnel), or say that anyone is welcome."
            )

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context, or None without a certificate.

        Raises:
            InvalidInputError: the files can't be read, or don't belong together.
        """
        if self.tls_certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.tls_certificate, self.tls_key, password="")  # never ask at the terminal
        except (OSError, ValueError) as error:
            raise InvalidInputError(
                f"the TLS certificate {self.tls_certificate} can't be used: {error}. Expected PEM files of a certificate and of "
                "its private key, without a password."
            ) from error
        return context


class _Connection(ServerConnection):
    """A connection that stops reading while the client does not read, and is cut off when that lasts.

    The library answers pings by itself, and would keep the answers for a client that never takes them. It also keeps whoever
    knocks for as long as a handshake may take, however many they are.
    """

    patience: ClassVar[float]
    most: ClassVar[int]
    everybody: ClassVar[set[_Connection]]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let somebody knock, unless too many do."""
        super().connection_made(transport)
        self.everybody.add(self)
        if len(self.everybody) > self.most:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget them."""
        self.everybody.discard(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Stop reading, too: the buffer of what is to be sent is full."""
        super().pause_writing()
        self.transport.pause_reading()
        self._cut_off = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self._cut_off.cancel()
        if not self.recv_messages.paused:
            self.transport.resume_reading()


@dataclass(eq=False)
class _Client:
    """A connection and what belongs to it."""

    connection: ServerConnection
    session: Session
    work: asyncio.Task[bytes | str] | None = None
    previous_seconds: float | None = None

    def leave(self, _: Any) -> None:
        """Drop the work for a client that has gone."""
        if self.work is not None:
            self.work.cancel()


class PolicyServer:
    """Serves a policy. Use it inside an event loop, or through `running`.

    Args:
        served: the policy.
        settings: where and for whom.
    """

    def __init__(self, served: ServedPolicy, settings: ServerSettings | None = None) -> None:
        self.served = served
        self.settings = ServerSettings() if settings is None else settings
        self.metrics = Metrics()
        self._clients: set[_Client] = set()
        self._server: Server | None = None
        self._port = self.settings.port
        self._stopped: asyncio.Event | None = None
        self._stopping = False

    @property
    def port(self) -> int:
        """The port that it listens at."""
        return self._port

    @property
    def url(self) -> str:
        """Where openpi's client connects to."""
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"{'ws' if self.settings.tls_certificate is None else 'wss'}://{host}:{self.port}"

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            ServingError: the address can't be had.
            InvalidInputError: the certificate can't be used.
        """
        settings = self.settings
        tls = settings.tls()
        self._metadata = pack(self.served.metadata)
        self._batcher = Batcher(self.served.act, settings.max_batch, settings.max_waiting, self.metrics)
        # A reasoner may take seconds (a model elsewhere); it holds up neither the event loop nor other clients' inference.
        self._reasoning = ThreadPoolExecutor(REASONING_THREADS, thread_name_prefix="counterflow-reasoner")
        self._stopped = asyncio.Event()
        own = {"patience": settings.patience, "most": settings.max_connections + KNOCKING, "everybody": set()}
        connection_type = type("Connection", (_Connection,), own)
        try:
            self._server = await serve(
                self._meet,
                settings.host,
                settings.port,
                ssl=tls,
                process_request=self._admit,
                origins=[None],  # a web page that somebody has open must not reach the robot's server
                compression=None,  # openpi's client uses none, and a small message could unpack to a huge one
                max_size=settings.limits.size,
                max_queue=1,
                create_connection=connection_type,
                server_header=None,
                logger=logging.getLogger("counterflow.serving.websockets"),
            )
        except OSError as error:
            raise ServingError(
                f"can't listen at {settings.host} port {settings.port}: {error.strerror or error}. Choose another --port, or an "
                "address of this machine."
            ) from error
        self._port = int(self._server.sockets[0].getsockname()[1])
        self._batcher.start()
        logger.info("serving %s at %s", self.served.name or "a policy", self.url)

    async def stop(self) -> None:
        """Take no more clients, let requests that are there finish (for `grace` seconds), close connections, and end."""
        if self._server is None or self._stopping:
            return
        self._stopping = True
        logger.info("stopping: %d connections", len(self._clients))
        self._server.close(close_connections=False)
        farewells = [
            asyncio.ensure_future(client.connection.close(GOING_AWAY, "the server stops"))
            for client in self._clients
            if client.work is None
        ]
        _, late = await asyncio.wait([asyncio.ensure_future(self._server.wait_closed())], timeout=self.settings.grace)
        if late:
            for client in self._clients:
                client.connection.transport.abort()
            await asyncio.wait(late, timeout=self.settings.grace)
        for farewell in farewells:
            farewell.cancel()
        await self._batcher.stop()
        self._reasoning.shutdown(wait=False, cancel_futures=True)
        assert self._stopped is not None
        self._stopped.set()

    async def wait_stopped(self) -> None:
        """Wait until `stop` is done."""
        assert self._stopped is not None
        await self._stopped.wait()

    # Before a connection is a websocket

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer a plain question, refuse, or (None) let the client in."""
        address = urlsplit(request.path)
        if address.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._is_authorised(request):
            self.metrics.clients.add(1, "unauthorised")
            refusal = connection.respond(
                http.HTTPStatus.UNAUTHORIZED, "a valid API key is needed: Authorization: Api-Key ...\n"
            )
            refusal.headers["WWW-Authenticate"] = "Api-Key"
            return refusal
        if address.path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self.metrics.text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return response
        if address.path not in ("", "/"):
            return connection.respond(http.HTTPStatus.NOT_FOUND, "there are /, /healthz and /metrics\n")
        try:
            self.served.check_expected(dict(parse_qsl(address.query, keep_blank_values=True, max_num_fields=32)))
        except (CounterflowError, ValueError) as error:
            self.metrics.clients.add(1, "mismatched")
            return connection.respond(http.HTTPStatus.PRECONDITION_FAILED, f"{_told(error)}\n")
        if len(self._clients) >= self.settings.max_connections:
            self.metrics.clients.add(1, "full")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "all places are taken; try again later\n")
        return None

    def _is_authorised(self, request: HttpRequest) -> bool:
        if self.settings.api_key is None:
            return True
        given = request.headers.get_all("Authorization")
        expected = f"Api-Key {self.settings.api_key}".encode()
        presented = given[0].encode("utf-8", "surrogateescape") if len(given) == 1 else b""
        return hmac.compare_digest(presented, expected)

    # One client

    async def _meet(self, connection: ServerConnection) -> None:
        """Serve one client until it leaves or the server stops."""
        if len(self._clients) >= self.settings.max_connections:  # several were let in at once
            self.metrics.clients.add(1, "full")
            await connection.close(TRY_AGAIN, "all places are taken")
            return
        client = _Client(connection, self.served.session())
        self._clients.add(client)
        self.metrics.clients.add(1, "accepted")
        self.metrics.connections.add(1)
        gone = asyncio.ensure_future(connection.wait_closed())
        gone.add_done_callback(client.leave)
        try:
            await connection.send(self._metadata)
            while not self._stopping:
                message = await connection.recv()
                client.work = asyncio.ensure_future(self._answer(client, message))
                await connection.send(await client.work)
                client.work = None
            await connection.close(GOING_AWAY, "the server stops")
        except ConnectionClosed:
            pass
        except asyncio.CancelledError:
            if not gone.done():
                raise  # not the client's leaving, but the server's own end
            self.metrics.requests.add(1, "dropped")
        finally:
            gone.remove_done_callback(client.leave)
            gone.cancel()
            self._clients.discard(client)
            self.metrics.connections.add(-1)

    async def _answer(self, client: _Client, message: bytes | str) -> bytes | str:
        """Return the answer to a message: bytes, or a text that says what was wrong."""
        began = time.perf_counter()
        self.metrics.received.add(len(message))
        try:
            if isinstance(message, str):
                raise InvalidInputError("a text was sent; expected a binary message, as openpi's client packs it.")
            async with asyncio.timeout(self.settings.patience):
                request = await self._complete(client, self.served.read(unpack(message, self.settings.limits)))
                answer, waited = await self._batcher.decide(request)
        except TimeoutError:
            client.session.forget()  # its reasoner may still be at work
            self.metrics.requests.add(1, "timed_out")
            return f"no answer within {self.settings.patience:g} s: the server is overloaded. Try again, with fewer clients."
        except ServingError as error:
            self.metrics.requests.add(1, "failed")
            logger.error("a request failed: %s", error)
            return _told(error)
        except CounterflowError as error:
            self.metrics.requests.add(1, "refused")
            return _told(error)
        except Exception:
            self.metrics.requests.add(1, "failed")
            incident = secrets.token_hex(4)
            logger.exception("incident %s", incident)
            return f"the server failed at this request (incident {incident}); its log says why. Other requests are not affected."
        timing = {
            "infer_ms": 1000 * answer.seconds,
            "wait_ms": 1000 * waited,
            "batch_size": answer.batch_size,
        }
        if client.previous_seconds is not None:
            timing["prev_total_ms"] = 1000 * client.previous_seconds
        reply = pack(
            {
                "actions": answer.actions,
                "server_timing": timing,
                "noise": answer.noise,
                "diagnostics": answer.diagnostics,
            }
        )
        client.previous_seconds = time.perf_counter() - began
        self.metrics.requests.add(1, "answered")
        self.metrics.total.observe(client.previous_seconds)
        return reply

    async def _complete(self, client: _Client, asked: Asked) -> Request:
        """Ask the reasoner in a thread, where one is named."""
        if not asked.needs_reasoner:
            return self.served.complete(asked, client.session)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reasoning, self.served.complete, asked, client.session)


def _told(error: Exception) -> str:
    return str(error)[:LONGEST_ERROR]


@contextmanager
def running(served: ServedPolicy, settings: ServerSettings | None = None) -> Iterator[PolicyServer]:
    """Serve in a thread while the block runs, as in a notebook or a test.

    Args:
        served: the policy.
        settings: where and for whom.

    Yields:
        The server, listening; `url` says where.

    Raises:
        ServingError: the address can't be had.
        InvalidInputError: the certificate can't be used.
    """
    server = PolicyServer(served, settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="counterflow-server", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        try:
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
