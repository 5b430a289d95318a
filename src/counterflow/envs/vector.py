"""Stepping many environments at once, in worker processes.

Each worker holds several environments and executes *whole action chunks* before it answers: a message costs as much as a
fifth of a simulation step, so one a chunk keeps the simulators busy and one a step would not. Frames, when asked for, are
drawn where the simulator lives.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from counterflow.checks import COUNT_OR_ZERO
from counterflow.envs.types import Batch, CameraView, EnvSpec, Image, Moment, SeenTaskEnv, Sights, TaskEnv
from counterflow.errors import CounterflowError, InvalidInputError, UnknownNameError, WorkerError
from counterflow.random import child_seed

MakeTask = Callable[[], TaskEnv]
PATIENCE = 600
"""Seconds within which a worker has to answer: many times what the slowest scene takes to be made."""


@dataclass(frozen=True)
class _Result:
    """What a worker reports of one environment."""

    moment: Moment
    rewards: list[float]
    success: bool
    frames: list[Image]
    path: list[npt.NDArray[np.float32]]


class _Host:
    """Several environments in one process: the part that is the same in a worker and in the caller's own process."""

    def __init__(self, makers: Sequence[MakeTask]) -> None:
        self._envs = [make() for make in makers]

    def spec(self) -> EnvSpec:
        return self._envs[0].spec

    def camera(self, row: int) -> CameraView:
        return self._envs[row].camera()

    def render(self, row: int) -> Image:
        return self._envs[row].render()

    def look(self, names: dict[int, tuple[str, ...]]) -> dict[int, Sights]:
        return {row: cast(SeenTaskEnv, self._envs[row]).look(wanted) for row, wanted in names.items()}

    def reset(self, seeds: dict[int, int]) -> dict[int, _Result]:
        return {row: _Result(self._envs[row].reset(seed), [], False, [], []) for row, seed in seeds.items()}

    def execute(self, chunks: dict[int, npt.NDArray[np.floating]], record: frozenset[int]) -> dict[int, _Result]:
        return {row: self._execute_one(self._envs[row], chunk, row in record) for row, chunk in chunks.items()}

    @staticmethod
    def _execute_one(env: TaskEnv, chunk: npt.NDArray[np.floating], record: bool) -> _Result:
        rewards: list[float] = []
        frames: list[Image] = []
        path: list[npt.NDArray[np.float32]] = []
        success = False
        for action in chunk:
            moment = env.step(action)
            rewards.append(moment.reward)
            path.append(moment.observation)
            success = success or moment.success
            if record:
                frames.append(env.render())
            if moment.terminated or moment.truncated:
                break
        return _Result(moment, rewards, success, frames, path)

    def close(self) -> None:
        for env in self._envs:
            env.close()


def _serve(connection: Connection, makers: Sequence[MakeTask]) -> None:
    """Run in the worker: make the environments, then answer calls until told to close or the caller is gone."""
    # One simulator a core: more threads in numpy's libraries would only contend.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    host: _Host | None = None
    try:
        while True:
            method, arguments = connection.recv()
            try:
                if host is None:
                    host = _Host(makers)
                if method == "close":
                    host.close()
                    return
                connection.send((None, getattr(host, method)(*arguments)))
            except CounterflowError as error:
                connection.send((error, traceback.format_exc()))
            except Exception as error:
                connection.send((WorkerError(f"{type(error).__name__}: {error}"), traceback.format_exc()))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass  # the caller is gone, or is interrupted itself


class _Worker:
    """The caller's end of one worker process."""

    def __init__(self, context: Any, makers: Sequence[MakeTask], first_row: int) -> None:
        self.rows = range(first_row, first_row + len(makers))
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_serve, args=(theirs, makers), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, method: str, *arguments: Any) -> None:
        try:
            self._connection.send((method, arguments))
        except (BrokenPipeError, OSError) as error:
            raise self._death() from error

    def receive(self) -> Any:
        try:
            # A second at a time, so that a run that was paused as a whole, its worker with it, has lost no more than one.
            if not any(self._connection.poll(1.0) for _ in range(PATIENCE)):
                self._process.kill()
                raise WorkerError(
                    f"the worker process of environments {self.rows.start} to {self.rows.stop - 1} did not answer within "
                    f"{PATIENCE} s, and was ended: its simulator hangs, or something stopped it. Make the environments anew."
                )
            error, result = self._connection.recv()
        except (EOFError, OSError) as lost:
            raise self._death() from lost
        if error is not None:
            error.add_note(f"In the worker process:\n{result}")
            raise error
        return result

    def close(self) -> None:
        try:
            self._connection.send(("close", ()))
            self._process.join(timeout=5)
        except (BrokenPipeError, OSError):
            pass  # dead already
        if self._process.is_alive():
            self._process.kill()  # which a process that was stopped can't put off
            self._process.join()
        self._connection.close()

    def _death(self) -> WorkerError:
        self._process.join(timeout=5)
        return WorkerError(
            f"the worker process of environments {self.rows.start} to {self.rows.stop - 1} died (exit code "
            f"{self._process.exitcode}). If that is 1 and this is a script, put its code under 'if __name__ == \"__main__\":' "
            "(worker processes import the script anew), or pass workers=0. If it is -9 the process was killed, often for "
            "want of memory: use fewer environments."
        )


class VectorEnv:
    """N environments stepped side by side; rows keep their order, whichever process they live in.

    Args:
        makers: one picklable function a row, each making its environment.
        seed: the seed from which `reset()` without seeds descends.
        workers: how many processes to use; 0 keeps every environment in the caller's process. Default: the number of
            cores, at most N; 0 for a single environment.

    Raises:
        WorkerError: a worker died or an environment failed in it (from any method).
    """

    def __init__(self, makers: Sequence[MakeTask], seed: int, workers: int | None = None) -> None:
        if workers is None:
            workers = 0 if len(makers) == 1 else min(os.cpu_count() or 1, len(makers))
        COUNT_OR_ZERO.check("workers", workers)
        self.num_envs = len(makers)
        self._seed, self._resets = seed, 0
        self._last: dict[int, _Result] = {}
        self._host: _Host | None = None
        self._workers: list[_Worker] = []
        try:
            if workers == 0:
                self._host = _Host(makers)
                self.spec: EnvSpec = self._host.spec()
                return
            # "spawn" gives workers a clean start: a fork would carry the caller's threads' locks with it.
            context = multiprocessing.get_context("spawn")
            edges = np.linspace(0, len(makers), min(workers, len(makers)) + 1).astype(int).tolist()
            for first, last in pairwise(edges):
                self._workers.append(_Worker(context, makers[first:last], first))
            for worker in self._workers:
                worker.send("spec")
            specs = [worker.receive() for worker in self._workers]  # all answer, so that no pipe holds an old one
            self.spec = specs[0]
        except BaseException:
            self.close()
            raise

    def reset(self, seeds: Sequence[int] | dict[int, int] | None = None) -> Batch:
        """Begin new episodes.

        Args:
            seeds: one seed a row, or {row: seed} to begin anew on some rows only; None draws fresh ones from the seed
                that the environment was made with. An episode depends on its seed alone.

        Returns:
            The batch of all rows (rows that were not reset keep their last state).
        """
        if seeds is None:
            seeds = [child_seed(self._seed, "reset", self._resets, row) for row in range(self.num_envs)]
            self._resets += 1
        chosen = dict(seeds) if isinstance(seeds, dict) else dict(enumerate(seeds))
        if not isinstance(seeds, dict) and len(seeds) != self.num_envs:
            raise InvalidInputError(f"{len(seeds)} seeds were given for {self.num_envs} environments; give one each.")
        self._check_rows(chosen)
        self._last.update(self._call("reset", chosen))
        if len(self._last) < self.num_envs:
            raise InvalidInputError("the first reset must cover every environment; call reset() without rows first.")
        return self._batch(horizon=0, fresh=frozenset(chosen))

    def step(self, actions: npt.NDArray[np.floating]) -> Batch:
        """Execute one action (N, A) in every environment."""
        return self.execute(np.asarray(actions)[:, None])

    def execute(
        self,
        chunks: npt.NDArray[np.floating],
        rows: Sequence[int] | None = None,
        record: Sequence[int] = (),
    ) -> Batch:
        """Execute action chunks, open loop, each until its end or the episode's.

        Args:
            chunks: (N, H, A), environment units, one chunk a row (rows left out are ignored).
            rows: the rows to step; None steps all. Rows whose episode is over must be reset before they step again.
            record: rows to draw a frame of after every action.

        Returns:
            The batch of all rows; rows left out report `steps` = 0 and their last state.
        """
        chunks = np.asarray(chunks)
        expected = (self.num_envs, self.spec.action_dim)
        if chunks.ndim != 3 or (chunks.shape[0], chunks.shape[2]) != expected or chunks.shape[1] == 0:
            raise InvalidInputError(
                f"action chunks have shape {chunks.shape}; {self.spec.name} with {self.num_envs} environments expects "
                f"({self.num_envs}, H, {self.spec.action_dim}) with H at least 1."
            )
        chosen = range(self.num_envs) if rows is None else rows
        self._check_rows(chosen)
        over = [row for row in chosen if self._last[row].moment.terminated or self._last[row].moment.truncated]
        if over:
            raise InvalidInputError(f"the episodes of rows {over} are over; reset them before stepping.")
        results = self._call("execute", {row: chunks[row] for row in chosen}, frozenset(record))
        self._last.update(results)
        return self._batch(horizon=chunks.shape[1], fresh=frozenset(chosen))

    def present(self) -> Batch:
        """Return the present state of all rows, as after stepping none of them."""
        return self._batch(horizon=0, fresh=frozenset())

    def render(self, row: int = 0) -> Image:
        """Draw one environment: (height, width, 3) uint8."""
        image: Image = self._ask(row, "render")
        return image

    def look(self, names: Sequence[str], rows: Sequence[int] | None = None) -> Sights:
        """Show what a policy that looks is to see, as it is now, all workers at the same time.

        Args:
            names: some of `spec.sights`; only these are drawn.
            rows: R rows; None: all.

        Returns:
            By name, pictures (R, H, W, 3) uint8 and numbers (R, D) float32, in the order of `rows`.

        Raises:
            UnknownNameError: this environment does not show that.
            RenderingError: this machine can't draw.
        """
        unknown = next((name for name in names if name not in self.spec.sights), None)
        if unknown is not None:
            raise UnknownNameError(f"sight of {self.spec.name}", unknown, list(self.spec.sights))
        chosen = list(range(self.num_envs) if rows is None else rows)
        self._check_rows(chosen)
        shown = self._call("look", dict.fromkeys(chosen, tuple(names)))
        return {name: np.stack([shown[row][name] for row in chosen]) for name in names}

    def camera(self, row: int = 0) -> CameraView:
        """Describe the camera of one environment."""
        view: CameraView = self._ask(row, "camera")
        return view

    def close(self) -> None:
        """End the workers; safe to call twice."""
        if self._host is not None:
            self._host.close()
            self._host = None
        for worker in self._workers:
            worker.close()
        self._workers = []

    def __enter__(self) -> VectorEnv:
        """Return self; the environments close when the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the environments."""
        self.close()

    def _check_rows(self, rows: Sequence[int] | dict[int, int] | range) -> None:
        wrong = [row for row in rows if not 0 <= row < self.num_envs]
        if wrong:
            raise InvalidInputError(f"rows {wrong} do not exist; there are {self.num_envs} environments.")

    def _ask(self, row: int, method: str) -> Any:
        self._check_rows([row])
        if self._host is not None:
            return getattr(self._host, method)(row)
        worker = next(worker for worker in self._workers if row in worker.rows)
        worker.send(method, row - worker.rows.start)
        return worker.receive()

    def _call(self, method: str, inputs: dict[int, Any], *shared: Any) -> dict[int, Any]:
        """Call `method` on every host that has rows in `inputs`; all workers run at the same time."""
        if self._host is not None:
            return getattr(self._host, method)(inputs, *shared)  # type: ignore[no-any-return]
        busy = []
        for worker in self._workers:
            first = worker.rows.start
            own = {row - first: value for row, value in inputs.items() if row in worker.rows}
            local = [frozenset(row - first for row in group if row in worker.rows) for group in shared]
            if own:
                worker.send(method, own, *local)
                busy.append(worker)
        results: dict[int, Any] = {}
        failure: CounterflowError | None = None
        for worker in busy:  # every answer is taken, so that after an error the next call finds empty pipes
            try:
                results.update({worker.rows.start + row: result for row, result in worker.receive().items()})
            except CounterflowError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return results

    def _batch(self, horizon: int, fresh: frozenset[int]) -> Batch:
        ordered = [self._last[row] for row in range(self.num_envs)]
        rewards = np.zeros((self.num_envs, horizon))
        steps = np.zeros(self.num_envs, dtype=np.int64)
        for row in fresh:
            steps[row] = len(ordered[row].rewards)
            rewards[row, : steps[row]] = ordered[row].rewards
        moments = [result.moment for result in ordered]
        nothing = np.zeros((0, self.spec.observation_dim), np.float32)
        return Batch(
            observation=np.stack([moment.observation for moment in moments]),
            rewards=rewards,
            steps=steps,
            success=np.array([result.success for result in ordered]),
            terminated=np.array([moment.terminated for moment in moments]),
            truncated=np.array([moment.truncated for moment in moments]),
            privileged={
                name: np.stack([moment.privileged[name] for moment in moments]) for name in moments[0].privileged
            },
            frames=[result.frames if row in fresh else [] for row, result in enumerate(ordered)],
            paths=[
                np.stack(result.path) if row in fresh and result.path else nothing for row, result in enumerate(ordered)
            ],
        )
