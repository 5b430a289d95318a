"""Collecting a dataset in parallel worker processes, so that it may be interrupted at any moment.

Every finished episode is a small file in `<out>.partial/`, put there whole or not at all; the archives in OGBench's
layout are assembled from them at the end. What was killed goes on where it stopped and gives the same bytes as if it
had not been.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path

import numpy as np

from counterflow.checks import COUNT_OR_ZERO
from counterflow.data.recipe import EpisodeMaker, Kind, Recipe
from counterflow.data.store import EpisodeStore
from counterflow.errors import CounterflowError, WorkerError

Progress = Callable[[int, int, int], None]

SECONDS_TO_FINISH = 30.0  # how long a worker may take over the episode in its hands before it is stopped


@dataclass(frozen=True)
class Collected:
    """What `collect` left on disk.

    Args:
        path: the archive to train on.
        validation_path: the archive held out; None if it was asked to hold out nothing.
        provenance_path: how both were made (json).
        episodes: number of episodes in both archives together.
        transitions: number of transitions in both archives together.
        made: how many of the episodes this call made: fewer than all after an interruption, 0 if all was there before.
    """

    path: Path
    validation_path: Path | None
    provenance_path: Path
    episodes: int
    transitions: int
    made: int


def collect(
    env: str = "ogbench/cube-single",
    kind: Kind = "play",
    *,
    episodes: int = 1000,
    validation_episodes: int | None = None,
    seed: int = 0,
    out: Path | str,
    workers: int | None = None,
    max_episode_steps: int = 1001,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Collected:
    """Collect demonstrations from OGBench's scripted oracles, following its official recipe.

    Leaves `out` (X.npz), X-val.npz and X.json (provenance). The data depends on the arguments that describe it, not on
    `workers` or interruptions. A call after an interruption goes on; a call after completion does nothing. Scripts
    must call this under `if __name__ == "__main__"`, because worker processes import the script anew.

    Args:
        env: a family of manipulation environments, for example "ogbench/cube-single".
        kind: "play" (open-loop oracle with correlated noise) or "noisy" (closed-loop oracle, noisier).
        episodes: how many episodes to train on.
        validation_episodes: how many more to hold out; default a tenth of `episodes`, at least one.
        seed: from which every episode descends.
        out: where the dataset goes, ending in ".npz"; its folder is made if it is missing. While episodes are made,
            the disk needs room for the dataset twice.
        workers: processes to use; 0 for none (everything in this process); default one a core.
        max_episode_steps: transitions in every episode.
        overwrite: replace another dataset, finished or not, that lies at `out`.
        on_progress: called in this process as `on_progress(episodes_done, episodes_in_all, transitions_done)`, once at
            the start and once after every episode.

    Raises:
        UnknownNameError: no such family or kind; the nearest are suggested.
        InvalidInputError: a number is out of range, or `out` doesn't end in ".npz".
        MismatchError: another dataset, finished or not, lies at `out`.
        StorageError: writing failed, or another process is collecting to `out`; finished episodes are safe.
        WorkerError: a worker failed or died; finished episodes are safe.
    """
    if validation_episodes is None:
        validation_episodes = max(1, episodes // 10)
    recipe = Recipe.official(
        env,
        kind,
        seed=seed,
        episodes=episodes,
        validation_episodes=validation_episodes,
        max_episode_steps=max_episode_steps,
    )
    if workers is None:
        workers = os.cpu_count() or 1
    COUNT_OR_ZERO.check("workers", workers)
    store = EpisodeStore(Path(out), recipe)

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(done, recipe.total_episodes, done * recipe.max_episode_steps)

    if not overwrite and store.is_complete():
        store.discard_partial()
        report(recipe.total_episodes)
        return _collected(store, made=0)
    with store.locked():
        store.prepare(overwrite)
        missing = [index for index in range(recipe.total_episodes) if not store.has_episode(index)]
        already = recipe.total_episodes - len(missing)
        report(already)
        with contextlib.closing(_make_episodes(store, missing, workers)) as finished:
            for count, _ in enumerate(finished, start=1):
                report(already + count)
        store.assemble()
        store.discard_partial()
    return _collected(store, made=len(missing))


def _collected(store: EpisodeStore, made: int) -> Collected:
    return Collected(
        path=store.path,
        validation_path=store.validation_path if store.recipe.validation_episodes else None,
        provenance_path=store.provenance_path,
        episodes=store.recipe.total_episodes,
        transitions=store.transitions,
        made=made,
    )


def _make_episodes(store: EpisodeStore, missing: Sequence[int], workers: int) -> Generator[int]:
    """Make the `missing` episodes and yield the index of each once it is safe on disk."""
    if workers == 0:
        yield from _make_episodes_here(store, missing)
        return
    # "spawn" gives workers a clean start: a fork would carry the caller's threads' locks with it.
    context = multiprocessing.get_context("spawn")
    todo = iter(missing)
    crew: list[_Worker] = []
    try:
        for index in itertools.islice(todo, workers):
            crew.append(_Worker(context, store))
            crew[-1].send(index)
        busy = list(crew)
        while busy:
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                yield worker.receive()
                following = next(todo, None)
                if following is None:
                    busy.remove(worker)
                else:
                    worker.send(following)
    finally:
        for worker in crew:
            worker.dismiss()
        for worker in crew:
            worker.join()


def _make_episodes_here(store: EpisodeStore, missing: Sequence[int]) -> Generator[int]:
    """Do the same in this process, and leave numpy's global generator, from which the oracles draw, as it was."""
    before = np.random.get_state()
    try:
        maker = EpisodeMaker(store.recipe)
        for index in missing:
            store.write_episode(index, maker.make(index))
            yield index
    finally:
        np.random.set_state(before)


class _Worker:
    """The caller's end of one worker process, which makes one episode at a time."""

    def __init__(self, context: SpawnContext, store: EpisodeStore) -> None:
        self._partial = store.partial
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, store), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, index: int) -> None:
        try:
            self.connection.send(index)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> int:
        """Return the index of the episode that was finished, or raise what went wrong."""
        try:
            answer: int | CounterflowError = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(answer, CounterflowError):
            raise answer
        return answer

    def dismiss(self) -> None:
        """Let the process end after the episode in its hands."""
        self.connection.close()

    def join(self) -> None:
        """Wait until the process has ended, and end it if that takes too long."""
        self._process.join(SECONDS_TO_FINISH)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _death(self) -> WorkerError:
        self._process.join(SECONDS_TO_FINISH)
        return WorkerError(
            f"a worker process died (exit code {self._process.exitcode}; -9 means it was killed, often for want of "
            f"memory). Finished episodes are safe in {self._partial}; run the same command again to go on, with fewer "
            "workers if memory is short."
        )


def _work(connection: Connection, store: EpisodeStore) -> None:
    """Run in the worker: make the episodes asked for until the caller hangs up."""
    # Ctrl-C reaches every process of the terminal; the caller alone decides what happens, and hangs up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing is drawn; without this dm_control looks for a screen and complains that there is none.
    os.environ.setdefault("MUJOCO_GL", "disable")
    try:
        maker = EpisodeMaker(store.recipe)
        while True:
            index = connection.recv()
            store.write_episode(index, maker.make(index))
            connection.send(index)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the caller has hung up, or is gone
    except Exception as error:
        told = error if isinstance(error, CounterflowError) else _failure(error, store)
        told.add_note(f"In the worker process:\n{traceback.format_exc()}")
        with contextlib.suppress(OSError):
            connection.send(told)


def _failure(error: Exception, store: EpisodeStore) -> WorkerError:
    return WorkerError(
        f"a worker process failed with {type(error).__name__}: {error}. Finished episodes are safe in {store.partial}; "
        "mend the cause and run the same command again to go on."
    )
