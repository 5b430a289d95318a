"""Requests of many clients, decided together: while one batch is decided, the next gathers.

Nothing waits for a batch to fill. What arrives during an inference makes up the next one, so a lone client is answered at once
and many share the work.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from counterflow.checks import COUNT
from counterflow.serving.metrics import Metrics
from counterflow.serving.requests import Request
from counterflow.serving.served import Answer

Act = Callable[[Sequence[Request]], list[Answer | Exception]]


class _EndedError(RuntimeError):
    """A policy raised what is not an error."""


@dataclass(eq=False)
class Ticket:
    """A request on its way.

    Attributes:
        request: what is to be decided.
        answer: becomes the answer, or the error; cancelled when nobody waits for it any more.
        arrived: when it was handed in, seconds of the performance counter.
        waited: seconds until its batch began.
    """

    request: Request
    answer: asyncio.Future[Answer]
    arrived: float = field(default_factory=time.perf_counter)
    waited: float = 0.0


class Batcher:
    """Decides requests in batches, in one thread, so that the event loop stays free.

    Args:
        act: decides on a batch; called in the thread. It returns errors.
        max_batch: the largest batch.
        capacity: how many requests may wait or be decided; who comes when it is full waits outside.
        metrics: counts.

    Raises:
        InvalidInputError: a number is not positive.
    """

    def __init__(self, act: Act, max_batch: int = 32, capacity: int = 64, metrics: Metrics | None = None) -> None:
        for name, value in (("max_batch", max_batch), ("capacity", capacity)):
            COUNT.check(name, value)
        self._act, self._max_batch = act, max_batch
        self._metrics = Metrics() if metrics is None else metrics
        self._room = asyncio.Semaphore(capacity)
        self._waiting: deque[Ticket] = deque()
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="counterflow-inference")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to decide. Call it inside the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Decide nothing more; what still waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for ticket in self._waiting:
            ticket.answer.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def decide(self, request: Request) -> tuple[Answer, float]:
        """Return the answer and how many seconds the request waited for its batch.

        Cancelling it drops the request, if its batch hasn't begun.

        Raises:
            Exception: whatever went wrong with this request.
        """
        self._metrics.waiting.add(1)
        try:
            async with self._room:
                ticket = Ticket(request, asyncio.get_running_loop().create_future())
                self._waiting.append(ticket)
                self._arrival.set()
                # Cancelling this coroutine cancels the future, and the loop below passes over it.
                return await ticket.answer, ticket.waited
        finally:
            self._metrics.waiting.add(-1)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrival.wait()
            batch = self._gather()
            if not batch:
                self._arrival.clear()
                continue
            began = time.perf_counter()
            for ticket in batch:
                ticket.waited = began - ticket.arrived
            answers = await loop.run_in_executor(self._thread, self._decide, [ticket.request for ticket in batch])
            self._metrics.batch.observe(len(batch))
            self._metrics.inference.observe(time.perf_counter() - began)
            for ticket, answer in zip(batch, answers, strict=True):
                if ticket.answer.done():
                    continue  # its client has gone
                if isinstance(answer, Exception):
                    ticket.answer.set_exception(answer)
                else:
                    ticket.answer.set_result(answer)

    def _decide(self, requests: Sequence[Request]) -> list[Answer | Exception]:
        """Decide; whatever a policy raises, even its wish to end the process, is an answer and not the end of this loop."""
        try:
            answers = self._act(requests)
        except BaseException as error:
            answers = [_EndedError(repr(error)).with_traceback(error.__traceback__)] * len(requests)
        # A future takes no StopIteration.
        return [_EndedError(repr(one)) if isinstance(one, StopIteration) else one for one in answers]

    def _gather(self) -> list[Ticket]:
        """Take the first request, and those after it that fit into its batch; the others keep their places."""
        batch: list[Ticket] = []
        others: deque[Ticket] = deque()
        while self._waiting and len(batch) < self._max_batch:
            ticket = self._waiting.popleft()
            if ticket.answer.done():
                continue
            if not batch or ticket.request.signature == batch[0].request.signature:
                batch.append(ticket)
            else:
                others.append(ticket)
        self._waiting.extendleft(reversed(others))
        return batch
