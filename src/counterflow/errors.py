"""Everything that Counterflow raises on purpose.

All errors descend from `CounterflowError`, so one `except` catches the family. Every message says three things: what was
given, what was expected, and what to do about it. Where Python has a fitting built-in (`ValueError`, `ImportError`, ...)
the error descends from that too, so code that knows nothing of Counterflow still behaves.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CounterflowError(Exception):
    """Base of every error that Counterflow raises on purpose."""


class InvalidInputError(CounterflowError, ValueError):
    """A value is outside what the function accepts: shape, range, type, or not finite."""


class UnknownNameError(CounterflowError, LookupError):
    """A name (environment, task, policy, reasoner, ...) is not known; the message suggests the nearest that is."""

    def __init__(self, kind: str, given: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(name) for name in near)}?" if near else f"known: {', '.join(known)}."
        super().__init__(f"unknown {kind} {given!r}: {hint}")
        self.given, self.suggestions = given, near


class MismatchError(CounterflowError, ValueError):
    """Two things that must fit together do not: a policy and an environment, a reference and an action space."""


class CheckpointError(CounterflowError, ValueError):
    """A checkpoint is truncated, foreign, or written by a newer version."""


class DatasetError(CounterflowError, ValueError):
    """A dataset is truncated, corrupt, or not in the layout that was expected."""


class MissingDependencyError(CounterflowError, ImportError):
    """An optional package or a system library is missing; the message says how to install it."""


class RenderingError(CounterflowError, RuntimeError):
    """Frames can't be drawn on this machine; the message says which library to install."""


class WorkerError(CounterflowError, RuntimeError):
    """A worker process failed or died; the message carries its own account."""


class StorageError(CounterflowError, OSError):
    """Writing failed (for example a full disk); the message says what is safe and how to go on."""


class TrainingError(CounterflowError, RuntimeError):
    """Training can't go on: a loss is not finite, or a run folder holds another run."""


class ServingError(CounterflowError, RuntimeError):
    """A policy server could not begin, refused, failed or went away; the message carries its own account."""


class ReasonerError(CounterflowError, RuntimeError):
    """Whoever gives the references can't be asked: the message says why and what to set."""
