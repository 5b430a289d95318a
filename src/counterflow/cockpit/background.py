"""Where what takes long is done: in an executor's threads, in threads that nobody waits for, or right here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol


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


def _carry_out(future: Future[Any], function: Callable[..., Any], *arguments: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
