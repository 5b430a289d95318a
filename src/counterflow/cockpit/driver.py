"""A session in a thread of its own: paced, fed with commands, published picture by picture. The web loop never waits for it."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterflow.cockpit.picture import Frame
from counterflow.cockpit.session import Session
from counterflow.errors import CounterflowError, WorkerError

MOST_WAITING = 256  # commands; a page that sends more while the simulator is busy is not listened to
STATE_EVERY = 0.2  # seconds between two descriptions while driving
IDLE = 0.1  # seconds to wait for a command while nothing moves

Clock = Callable[[], float]
Command = Callable[[Session, float], None]

logger = logging.getLogger("counterflow.cockpit")


@dataclass(frozen=True)
class Published:
    """What there is to be seen.

    Attributes:
        frame: the newest picture; older ones are gone.
        state: everything else, as json.
        version: of the state; it only grows.
    """

    frame: Frame | None
    state: str
    version: int


class Driver:
    """Runs a session in a thread.

    Args:
        make_session: makes the session, in that thread, given where to do what takes long.
        clock: seconds that only grow.
        on_change: called, from that thread, whenever there is something new to be seen.
    """

    def __init__(
        self,
        make_session: Callable[[ThreadPoolExecutor], Session],
        clock: Clock = time.monotonic,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self._make_session, self._clock = make_session, clock
        self.on_change = on_change
        self._commands: queue.Queue[tuple[Command, float] | None] = queue.Queue()
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._background = ThreadPoolExecutor(2, thread_name_prefix="counterflow-cockpit-background")
        self._thread = threading.Thread(target=self._run, name="counterflow-cockpit", daemon=True)
        self.published = Published(None, "{}", 0)
        self.exports: list[str] = []
        self.out = Path()
        self.frames_drawn = 0

    def start(self, patience: float = 300.0) -> None:
        """Begin; return when the first picture is there.

        Raises:
            CounterflowError: the session can't be made.
        """
        self._thread.start()
        if not self._ready.wait(patience):
            raise WorkerError(
                f"the simulator was not ready after {patience:g} seconds. Try again when the machine is less busy."
            )
        if self._failure is not None:
            raise self._failure

    def submit(self, command: Command, *, urgent: bool = False) -> bool:
        """Hand a command to the session; return False where too many wait and it was left out.

        Args:
            command: called with the session and the time at which it was handed over (that is when a report arrived).
            urgent: it is never left out: for what the server says and must not be lost, such as that the driver has gone.
        """
        if not urgent and self._commands.qsize() >= MOST_WAITING:
            return False
        self._commands.put((command, self._clock()))
        return True

    def stop(self) -> None:
        """End the session: an undecided episode that is over is kept, trainings are stopped."""
        self._stop.set()
        self._commands.put(None)
        self._thread.join()
        self._background.shutdown(wait=True)

    def _run(self) -> None:
        try:
            session = self._make_session(self._background)
        except BaseException as error:
            self._failure = error
            self._ready.set()
            return
        try:
            self.out = session.settings.out
            self._publish(session, _write(session))
            self._ready.set()
            self._drive(session)
        finally:
            session.close()

    def _drive(self, session: Session) -> None:
        period = 1.0 / session.settings.rate
        due = described = self._clock()
        while not self._stop.is_set():
            moved = self._advance(session)
            now = self._clock()
            # Whoever falls behind does not catch up: the robot would run.
            due = max(due + period, now) if moved else now
            commanded = self._listen(session, due if moved else now if session.is_moving else now + IDLE)
            now = self._clock()
            if commanded or not moved or session.state != "driving" or now - described >= STATE_EVERY:
                described = now
                self._publish(session, _write(session))

    def _advance(self, session: Session) -> bool:
        try:
            moved = session.advance(self._clock())
        except Exception as error:  # the thread must live: whoever watches is told, and can restart
            logger.exception("the session failed")
            session.note(f"{type(error).__name__}: {error}", "error")
            session.state, session.reason = "failed", f"{type(error).__name__}: {error}"
            return False
        if moved and session.frame is not None and session.frame is not self.published.frame:
            self._publish(session, self.published.state)  # the picture goes out before the rest is waited for
        return moved

    def _listen(self, session: Session, until: float) -> bool:
        """Carry out commands until a time; return whether there was one. While nothing moves, the first ends the waiting."""
        commanded = False
        while not self._stop.is_set():
            left = until - self._clock()
            try:
                entry = self._commands.get(timeout=max(0.0, left)) if left > 0 else self._commands.get_nowait()
            except queue.Empty:
                return commanded
            if entry is None:
                return commanded
            command, now = entry
            commanded = True
            try:
                command(session, now)
            except CounterflowError as error:
                session.note(str(error), "error")
            except Exception as error:
                logger.exception("a command failed")
                session.note(f"{type(error).__name__}: {error}", "error")
            if not session.is_moving:
                return commanded  # at rest: act on it at once
        return commanded

    def _publish(self, session: Session, state: str) -> None:
        before = self.published
        if state == before.state and session.frame is before.frame:
            return
        if session.frame is not before.frame:
            self.frames_drawn += 1
        if state != before.state:
            self.exports = session.exports()
        self.published = Published(session.frame, state, before.version + (state != before.state))
        if self.on_change is not None:
            self.on_change()


def _write(session: Session) -> str:
    described: dict[str, Any] = session.describe()
    return json.dumps(described)
