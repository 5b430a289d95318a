"""What takes long: where it is done (an executor's threads, threads that nobody waits for, right here), and what came of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

Note = Callable[[str, str], None]
"""Says something: the text, and of which kind it is ("done", "error", ...)."""


class Background(Protocol):
    """Somebody who does things: a `concurrent.futures` executor, or one of those below."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Do it, sooner or later."""
        ...


class Here:
    """Does everything at once."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Do it now."""
        future: Future[Any] = Future()
        _carry_out(future, function, *arguments)
        return future


class Daemons:
    """Does everything in a thread of its own, which the process's end doesn't wait for: for answers that may never come."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Begin with it."""
        future: Future[Any] = Future()
        name = "counterflow-cockpit-question"
        threading.Thread(target=_carry_out, args=(future, function, *arguments), name=name, daemon=True).start()
        return future


class Chores:
    """What is being done in the background, and who is told of it.

    Args:
        background: where it is done.
        note: told what came of each, from `take_in`.
    """

    def __init__(self, background: Background, note: Note) -> None:
        self.background, self._note = background, note
        self._pending: list[tuple[str, Future[str]]] = []

    @property
    def busy(self) -> list[str]:
        """What is being done."""
        return [what for what, _ in self._pending]

    def begin(self, what: str, function: Callable[..., str], *arguments: Any) -> None:
        """Have something done; the function returns what to say of it."""
        self._pending.append((what, self.background.submit(function, *arguments)))

    def wait_for(self, what: str) -> None:
        """Wait until everything of that name is done, well or not."""
        for name, future in self._pending:
            if name == what:
                future.exception()

    def take_in(self) -> None:
        """Say what became of what is done by now."""
        for entry in [entry for entry in self._pending if entry[1].done()]:
            self._pending.remove(entry)
            what, future = entry
            error = future.exception()
            if error is None:
                self._note(str(future.result()), "done")
            else:
                self._note(f"{what}: {error}", "error")


def _carry_out(future: Future[Any], function: Callable[..., Any], *arguments: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
