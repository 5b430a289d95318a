"""Calls in worker processes that are replaced now and then, for simulators that leave something behind in theirs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from counterflow.checks import COUNT
from counterflow.errors import WorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")

EACH = 8  # calls of a worker before it is replaced


def in_workers(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None, each: int = EACH
) -> Iterator[tuple[Item, Result]]:
    """Call `function` on every item in worker processes, one core each; yield each item with its result, as they are done.

    What was begun is finished when the caller stops early, and nothing more is begun. Scripts must call this under
    `if __name__ == "__main__"`.

    Args:
        function: picklable, as are items and results.
        items: what to call it on.
        workers: processes; default: one a core, no more than there are items.
        each: calls of a worker before it is replaced: robosuite, for one, keeps some of every environment.

    Raises:
        InvalidInputError: a number is out of range.
        WorkerError: a worker died. What `function` raises is raised here, too.
    """
    workers = min(len(items), os.cpu_count() or 1) or 1 if workers is None else workers
    COUNT.check("workers", workers)
    COUNT.check("each", each)
    context = multiprocessing.get_context("spawn")
    # By a new pool: a worker that ends at `max_tasks_per_child` is not always replaced, and the pool waits for ever (CPython
    # issue 115634, in 3.11 to 3.14).
    for first in range(0, len(items), each * workers):
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_core) as pool:
            futures = {pool.submit(function, item): item for item in items[first : first + each * workers]}
            try:
                for future in as_completed(futures):
                    try:
                        result = future.result()
                    except BrokenProcessPool as error:
                        raise WorkerError(
                            f"a worker process died at {futures[future]}, or beside it: often for want of memory. What was "
                            "finished before is kept; run the same again to go on, with fewer workers."
                        ) from error
                    yield futures[future], result
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _one_core() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
