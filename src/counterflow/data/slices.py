"""Datasets larger than memory, in slices that take turns."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from counterflow.checks import COUNT, COUNT_OR_ZERO
from counterflow.errors import DatasetError

Loaded = TypeVar("Loaded")


class SliceStream(Generic[Loaded]):
    """The archives of a folder one after another, each for so many updates, then from the beginning.

    OGBench's 100M datasets come as such folders (of 1M transitions a file); QGF changes over every 1000 updates. Which slice it
    is depends on the number of updates alone, so a run that is resumed goes on with the slice that it would have had.

    While one slice is in use the next is loaded by a thread. That begins at the second call of `at` for a slice, when the
    caller no longer holds the slice before, so never more than two are in memory.

    Args:
        folder: its `*.npz` are the slices, in the order of their names; `*-val.npz` are held out and not among them.
        load: reads one, for example into a `WindowSampler`; called in another thread too.
        every: updates for which a slice is used.

    Raises:
        DatasetError: the folder holds no slice.
        InvalidInputError: `every` is not positive.
    """

    def __init__(self, folder: Path | str, load: Callable[[Path], Loaded], every: int = 1000) -> None:
        COUNT.check("every", every)
        folder = Path(folder)
        self.paths = sorted(path for path in folder.glob("*.npz") if not path.stem.endswith("-val"))
        if not self.paths:
            raise DatasetError(
                f"{folder} holds no slices of a dataset; expected files *.npz besides those that end in '-val.npz'. Check the "
                "path, or download the dataset again."
            )
        self.every = every
        self._load = load
        self._thread = ThreadPoolExecutor(1, "slices")
        self._index: int | None = None
        self._current: Loaded | None = None
        self._next: tuple[int, Future[Loaded]] | None = None

    def at(self, update: int) -> Loaded:
        """Return what is loaded of the slice for an update. Call it at each update and keep nothing of an earlier one.

        Args:
            update: how many updates were done before.

        Raises:
            InvalidInputError: the number is negative.
            Exception: whatever `load` raised, when the slice's turn has come; calling again tries again.
        """
        COUNT_OR_ZERO.check("update", update)
        index = update // self.every % len(self.paths)
        if index != self._index or self._current is None:
            self._index, self._current = index, None  # let go before anything else is loaded
            self._current = self._take(index)
        elif self._next is None and len(self.paths) > 1:
            following = (index + 1) % len(self.paths)
            self._next = following, self._thread.submit(self._load, self.paths[following])
        return self._current

    @property
    def path(self) -> Path:
        """The archive that `at` returned last, or the first."""
        return self.paths[self._index or 0]

    def close(self) -> None:
        """Let go of everything and wait for the thread; safe to call twice."""
        self._thread.shutdown(cancel_futures=True)
        self._index, self._current, self._next = None, None, None

    def __enter__(self) -> SliceStream[Loaded]:
        """Return self; the thread ends when the block does."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _take(self, index: int) -> Loaded:
        """Return a slice: the one that the thread has loaded, or one loaded now."""
        coming, self._next = self._next, None
        if coming is not None and coming[0] == index:
            return coming[1].result()
        if coming is not None and not coming[1].cancel():
            coming[1].exception()  # it can't be stopped, so wait until it is out of the way
            del coming
        return self._load(self.paths[index])
