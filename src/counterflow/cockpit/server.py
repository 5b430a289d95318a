"""The cockpit's web server: one page, one websocket, and the files that were made.

The page reports and the server decides (`control`, `seats`). Pictures are dropped, not queued: a page says when it has drawn
one, and at most two are under way to it, so that a slow line sees fewer pictures, not old ones. By default only this machine
can connect; beyond it everybody must present a token. The websocket refuses pages of other origins.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from counterflow.addresses import PORT, is_loopback
from counterflow.cockpit.driver import Driver
from counterflow.cockpit.picture import Frame
from counterflow.cockpit.seats import Seats
from counterflow.cockpit.session import Session
from counterflow.errors import InvalidInputError, MissingDependencyError, ServingError

try:
    import uvicorn
    from fastapi import FastAPI, Request, WebSocket
    from fastapi.responses import FileResponse, PlainTextResponse, Response
    from fastapi.staticfiles import StaticFiles
    from pydantic import ValidationError
    from starlette.websockets import WebSocketDisconnect, WebSocketState

    from counterflow.cockpit.messages import (
        LARGEST,
        MESSAGE,
        Choose,
        Command,
        Grip,
        Hello,
        Report,
        Seat,
        Seen,
        Tap,
        Task,
    )
except ImportError as error:
    raise MissingDependencyError(
        f"the cockpit needs the packages fastapi, uvicorn and websockets ({error}). Install them: pip install "
        "'counterflow[cockpit]'. 'counterflow cockpit ENV --terminal' needs none of them."
    ) from error

STATIC = Path(__file__).parent / "static"
UNDER_WAY = 2  # pictures that were sent and not yet drawn
PATIENCE = 10.0  # seconds for a first message, and for a page to take what it is sent
MOST_PEOPLE = 32
POLICY_VIOLATION, TRY_AGAIN = 1008, 1013  # close codes (RFC 6455, IANA)
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' ws: wss:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

logger = logging.getLogger("counterflow.cockpit")


@dataclass(frozen=True)
class CockpitSettings:
    """Where and for whom the page is there.

    Attributes:
        host: the address to listen at.
        port: 0 takes a free one.
        token: what a page must present; None: nothing, which is allowed on the loopback only.

    Raises:
        InvalidInputError: everybody could drive.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check that strangers stay out."""
        PORT.check_all(self, "port")
        if self.token is not None and not (16 <= len(self.token) <= 1024 and self.token.isascii()):
            raise InvalidInputError(
                f"the token has {len(self.token)} characters; expected 16 to 1024 ASCII ones. Leave it out to have one made."
            )
        if self.token is None and not is_loopback(self.host):
            raise InvalidInputError(
                f"{self.host or 'every address'} can be reached from other machines, and no token is set: anybody there could "
                "drive. Set one, or listen at 127.0.0.1 (and tunnel)."
            )


def make_token() -> str:
    """Return a token that nobody guesses."""
    return secrets.token_urlsafe(24)


@dataclass(eq=False)
class _Client:
    """A connection."""

    socket: WebSocket
    name: str
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    sent_frame: int = 0
    seen_frame: int = 0
    under_way: int = 0
    sent_version: int = -1
    sent_seat: str = ""


class Cockpit:
    """The server over a driver.

    Args:
        driver: the session in its thread; it is started and stopped with the server.
        settings: where and for whom.
        clock: seconds that only grow.
    """

    def __init__(
        self, driver: Driver, settings: CockpitSettings | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.driver = driver
        self.settings = CockpitSettings() if settings is None else settings
        self.seats = Seats()
        self._clock = clock
        self._clients: set[_Client] = set()
        self.app = self._make_app()

    def _make_app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            loop = asyncio.get_running_loop()

            def changed() -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody watches any more
                    loop.call_soon_threadsafe(self._wake)

            self.driver.on_change = changed
            yield
            await asyncio.to_thread(self.driver.stop)

        app = FastAPI(title="Counterflow cockpit", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
        app.state.cockpit = self

        @app.middleware("http")
        async def guard(request: Request, call_next: Callable[[Request], Any]) -> Response:
            if not self._is_known_host(request.headers.get("host", "")):
                return PlainTextResponse("this server does not go by that name", 421)
            response: Response = await call_next(request)
            response.headers.update(HEADERS)
            return response

        @app.get("/")
        async def page() -> FileResponse:
            return FileResponse(STATIC / "index.html")

        @app.get("/healthz")
        async def health() -> PlainTextResponse:
            return PlainTextResponse("OK\n")

        @app.get("/export/{name:path}")
        async def export(name: str, request: Request) -> Response:
            presented = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not self._is_right(presented):
                return PlainTextResponse("a token is needed", 401)
            # Only what is listed: no name that a page makes up reaches the file system.
            if name not in self.driver.exports:
                return PlainTextResponse("there is no such file", 404)
            path = await asyncio.to_thread(self._export_path, name)
            return FileResponse(path, filename=path.name)

        app.mount("/static", StaticFiles(directory=STATIC), name="static")
        app.add_api_websocket_route("/drive", self._meet)
        return app

    def _export_path(self, name: str) -> Path:
        return self.out / name

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.driver.out

    # Who may come in

    def _is_known_host(self, host: str) -> bool:
        """Whether a request is for this server: a page elsewhere could have its name point here."""
        name = urlsplit(f"//{host}").hostname or ""
        if not is_loopback(self.settings.host):
            return True  # a token is asked for
        return is_loopback(name)

    def _is_known_origin(self, socket: WebSocket) -> bool:
        host, origin = socket.headers.get("host", ""), socket.headers.get("origin")
        if not self._is_known_host(host):
            return False
        return origin is None or urlsplit(origin).netloc == host  # programs send none

    def _is_right(self, token: str | None) -> bool:
        if self.settings.token is None:
            return True
        return hmac.compare_digest((token or "").encode(), self.settings.token.encode())

    # A connection

    async def _meet(self, socket: WebSocket) -> None:
        if not self._is_known_origin(socket):
            await socket.close(POLICY_VIOLATION)
            return
        await socket.accept()
        try:
            async with asyncio.timeout(PATIENCE):
                hello = MESSAGE.validate_json(await socket.receive_text())
        except (TimeoutError, ValidationError, WebSocketDisconnect, KeyError):
            await _close(socket, POLICY_VIOLATION, "expected a hello")
            return
        if not isinstance(hello, Hello):
            await _close(socket, POLICY_VIOLATION, "expected a hello")
            return
        if not self._is_right(hello.token):
            await _close(socket, POLICY_VIOLATION, "the token is missing or wrong")
            return
        if len(self._clients) >= MOST_PEOPLE:
            await _close(socket, TRY_AGAIN, "too many people are here")
            return
        client = _Client(socket, hello.client)
        self._clients.add(client)
        came_back = self.seats.driver == hello.client
        role = self.seats.join(hello.client, self._clock(), watch=hello.watch)
        if role == "driver" and came_back:
            self.driver.submit(_come_back, urgent=True)
        sender = asyncio.create_task(self._send(client))
        self._wake()
        try:
            await self._listen(client)
        except (WebSocketDisconnect, RuntimeError, TimeoutError):
            pass
        except KeyError:  # bytes, which no page sends
            await _close(socket, POLICY_VIOLATION, "expected text")
        finally:
            sender.cancel()
            self._clients.discard(client)
            if self.seats.leave(client.name, self._clock()):
                self.driver.submit(lambda session, _: session.pause(GONE), urgent=True)
            self._wake()

    async def _listen(self, client: _Client) -> None:
        while True:
            text = await client.socket.receive_text()
            try:
                message = MESSAGE.validate_json(text)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                await self._tell(client, {"type": "error", "text": f"not understood: {first['loc']}: {first['msg']}"})
                continue
            if isinstance(message, Seen):
                client.under_way = max(0, client.under_way - 1)
                client.seen_frame = max(client.seen_frame, message.frame)
                client.wake.set()
            elif isinstance(message, Seat):
                await self._seat(client, take=message.take)
            elif not isinstance(message, Hello):
                if self.seats.role(client.name) != "driver":
                    if not isinstance(message, Report):
                        await self._tell(client, {"type": "error", "text": "somebody else drives; you are watching."})
                elif not self.driver.submit(_command(message)):
                    await self._tell(client, {"type": "error", "text": "the simulator is busy; that was left out."})

    async def _seat(self, client: _Client, *, take: bool) -> None:
        if take and not self.seats.take(client.name, self._clock()):
            await self._tell(client, {"type": "error", "text": "somebody else drives; ask them to hand over."})
        if not take and self.seats.give(client.name):
            self.driver.submit(lambda session, _: session.pause("the driver handed over"), urgent=True)
        self._wake()

    async def _tell(self, client: _Client, content: dict[str, Any]) -> None:
        async with asyncio.timeout(PATIENCE):
            await client.socket.send_text(json.dumps(content))

    async def _send(self, client: _Client) -> None:
        """Send what is new, as far as the page keeps up."""
        try:
            while True:
                published = self.driver.published
                seat = json.dumps(
                    {
                        "type": "seat",
                        "role": self.seats.role(client.name),
                        "free": self.seats.is_free(self._clock()),
                        "people": self.seats.people,
                    }
                )
                async with asyncio.timeout(PATIENCE):
                    if seat != client.sent_seat:
                        client.sent_seat = seat
                        await client.socket.send_text(seat)
                    if published.version != client.sent_version:
                        client.sent_version = published.version
                        await client.socket.send_text('{"type": "state", "state": ' + published.state + "}")
                    frame = published.frame
                    if frame is not None and frame.number != client.sent_frame and client.under_way < UNDER_WAY:
                        client.sent_frame = frame.number
                        client.under_way += 1
                        await client.socket.send_bytes(pack_frame(frame))
                with contextlib.suppress(TimeoutError):  # now and then, because a seat grows free by itself
                    async with asyncio.timeout(1.0):
                        await client.wake.wait()
                client.wake.clear()
        except (WebSocketDisconnect, RuntimeError, TimeoutError):
            await _close(client.socket, POLICY_VIOLATION, "too slow")

    def _wake(self) -> None:
        for client in self._clients:
            client.wake.set()


GONE = "the driver's page has gone"


def _come_back(session: Session, _: float) -> None:
    """Go on with the episode of a driver who is back; nobody but a key moves the robot."""
    if session.state == "paused" and session.reason == GONE:
        session.hand_over("")
        session.resume()


def _command(message: Report | Tap | Grip | Choose | Task | Command) -> Callable[[Session, float], None]:
    """Return what a message asks of the session."""

    def carry_out(session: Session, now: float) -> None:
        control = session.control
        if isinstance(message, Report):
            control.report(message.held, now, less=message.less, sequence=message.sequence)
        elif isinstance(message, Tap):
            control.tap(message.held, now, less=message.less, sequence=message.sequence)
        elif isinstance(message, Grip):
            control.grip(message.command, now, sequence=message.sequence)
        elif isinstance(message, Choose):
            session.choose(**message.model_dump(exclude={"type"}))
        elif isinstance(message, Task):
            session.go_to(message.env)
        else:
            actions: dict[str, Callable[[], None]] = {
                "pause": session.pause,
                "resume": session.resume,
                "reset": session.begin,
                "keep": session.keep,
                "discard": session.discard,
                "restart": session.restart,
                "train": session.start_training,
                "stop_training": session.stop_training,
                "film": session.export_video,
            }
            actions[message.name]()

    return carry_out


def pack_frame(frame: Frame) -> bytes:
    """Return a picture as a message: the length of the json (4 bytes, little-endian), the json, the JPEG."""
    about = json.dumps(
        {"frame": frame.number, "step": frame.step, "sequence": frame.sequence, "overlay": frame.overlay}
    ).encode()
    return struct.pack("<I", len(about)) + about + frame.jpeg


def unpack_frame(message: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the json and the JPEG of a picture's message."""
    (length,) = struct.unpack("<I", message[:4])
    about: dict[str, Any] = json.loads(message[4 : 4 + length])
    return about, message[4 + length :]


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    if socket.application_state == WebSocketState.CONNECTED:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await socket.close(code, reason)


def make_server(cockpit: Cockpit) -> uvicorn.Server:
    """Return the web server, which is not running yet."""
    settings = cockpit.settings
    return uvicorn.Server(
        uvicorn.Config(
            cockpit.app,
            host=settings.host,
            port=settings.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws_max_size=LARGEST,
            ws_max_queue=16,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=3,
        )
    )


def check_port(settings: CockpitSettings) -> None:
    """Find out before the simulator starts whether the address can be had.

    Raises:
        ServingError: it can't.
    """
    import socket

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ServingError(
                f"can't listen at {settings.host} port {settings.port}: {error.strerror or error}. Choose another --port."
            ) from error
