"""Demonstrations: the expert's successful episodes of one task, or of many, in OGBench's layout.

Sources: the experts of `counterflow.reasoners.oracle_expert`, made of OGBench's scripted oracles (arXiv 2410.20092) and
Meta-World's (arXiv 1910.10897).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import counterflow
from counterflow.checks import Range
from counterflow.data.npz import save_npz
from counterflow.envs import VectorEnv, check_env_name, expand_tasks, family_of, make_env
from counterflow.envs.rendering import prepare_backend
from counterflow.errors import InvalidInputError, MismatchError, TrainingError
from counterflow.experiments.workers import in_workers
from counterflow.files import replacing, write_json
from counterflow.random import check_seed, child_seed
from counterflow.reasoners import Expert, oracle_expert

Progress = Callable[[int, int], None]

MAX_EPISODES = 100_000
ATTEMPTS = 5  # for each episode that is wanted, before the expert is given up
FIRST = 20  # attempts after which it is given up, too, if it succeeds more seldom than that
PACKAGES = {"ogbench": "ogbench", "metaworld": "metaworld", "libero": "hf-libero"}
SOURCES = {
    "ogbench": "scripted oracles of the ogbench package (arXiv 2410.20092), pursuing the task's own goal",
    "metaworld": "scripted experts of the metaworld package (arXiv 1910.10897)",
    "libero": "scripted expert for LIBERO's goals (counterflow.reasoners.libero_expert)",
}


@dataclass(frozen=True)
class Demonstrated:
    """What `demonstrate` left on disk.

    Attributes:
        path: the archive (X.npz).
        provenance_path: how it was made (X.json).
        episodes: how many episodes it holds, each a success.
        attempts: how many the expert needed for them.
        transitions: how many steps it holds.
        made: whether this call made it; False if all was there before.
    """

    path: Path
    provenance_path: Path
    episodes: int
    attempts: int
    transitions: int
    made: bool


@dataclass
class _Attempt:
    """One episode of the expert's: a row a step, T of them; float32."""

    observations: list[npt.NDArray[np.float32]] = field(default_factory=list)
    actions: list[npt.NDArray[np.float32]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    success: bool = False


def demonstrate(
    env_name: str,
    out: Path | str,
    *,
    episodes: int = 20,
    seed: int = 0,
    noise: float = 0.1,
    num_envs: int | None = None,
    overwrite: bool = False,
    on_episode: Progress | None = None,
) -> Demonstrated:
    """Let the expert solve a task until there are `episodes` successes, and write them in OGBench's layout.

    Leaves `out` (X.npz: observations (N, O) before each action, actions (N, A), rewards (N,), and terminals (N,), true at
    each episode's last step, the one at which the goal was reached) and X.json (provenance). The content depends on task,
    episodes, seed and noise, not on `num_envs`. A call after completion does nothing. A call that is killed leaves what
    lay at `out`. Scripts must call this under `if __name__ == "__main__"` (see `make_env`).

    Args:
        env_name: the task, for example "ogbench/cube-single-task1".
        out: where the archive goes, ending in ".npz"; its folder is made if it is missing.
        episodes: how many successful episodes.
        seed: from which every episode descends.
        noise: scale of the noise on the expert's plans, 0 to 1.
        num_envs: environments stepped side by side; default: one a core, at most one an episode.
        overwrite: replace another file that lies at `out`.
        on_episode: called after every finished attempt as `on_episode(successes, attempts)`.

    Raises:
        UnknownNameError: no such task, or no expert for it.
        InvalidInputError: a number is out of range, or `out` doesn't end in ".npz".
        MismatchError: another file lies at `out`.
        TrainingError: the expert succeeds too seldom; nothing was written.
        StorageError: writing failed; what lay at `out` is untouched.
        WorkerError: a simulator failed.
    """
    check_env_name(env_name)
    Range(1, MAX_EPISODES, integer=True).check("episodes", episodes, written=True)
    path = Path(out)
    if path.suffix != ".npz":
        raise InvalidInputError(f"the demonstrations' path is {str(path)!r}; expected it to end in '.npz'.")
    request = {"env": env_name, "episodes": episodes, "seed": check_seed(seed), "noise": noise}
    prepare_backend()  # the expert imports mujoco, and this process may want to draw later
    expert = oracle_expert(env_name, noise)  # before anything is looked up or begun: it checks the noise
    if not overwrite and path.exists():
        return _found(path, request)
    count = min(episodes, os.cpu_count() or 1) if num_envs is None else num_envs
    with make_env(env_name, count) as env:
        experts = [expert, *(oracle_expert(env_name, noise) for _ in range(count - 1))]
        attempts = _attempt(env, experts, episodes, seed, on_episode)
    successes = [attempt for attempt in attempts if attempt.success]
    if len(successes) < episodes:
        raise TrainingError(
            f"the expert succeeded in {len(successes)} of {len(attempts)} episodes of {env_name}; expected {episodes} "
            f"successes in at most {ATTEMPTS * episodes}, one in {ATTEMPTS} of the first {max(episodes, FIRST)}, and nothing was "
            f"written. Choose less noise (it was {noise}) or another task."
        )
    return _write(path, request, successes, len(attempts))


@dataclass(frozen=True)
class DemonstratedTasks:
    """What `demonstrate_tasks` left in its folder.

    Attributes:
        folder: where the archives lie.
        made: by task, what there is of it, whether this call made it or an earlier one.
        given_up: by task, why there is nothing: its expert succeeds too seldom.
    """

    folder: Path
    made: dict[str, Demonstrated]
    given_up: dict[str, str]


def archive_of(folder: Path | str, env_name: str) -> Path:
    """Return where `demonstrate_tasks` writes a task's archive."""
    return Path(folder) / f"{env_name.replace('/', '-')}.npz"


def demonstrate_tasks(
    env_names: Sequence[str],
    folder: Path | str,
    *,
    episodes: int = 20,
    seed: int = 0,
    noise: float = 0.1,
    workers: int | None = None,
    overwrite: bool = False,
    on_task: Callable[[str, int], None] | None = None,
) -> DemonstratedTasks:
    """Let the experts solve many tasks, one task a worker process at a time; each archive is what `demonstrate` writes.

    What was killed goes on where it stopped: a task's archive is there whole or not at all, and one that is there is kept. A task
    whose expert succeeds too seldom is left out, and said to be. Scripts must call this under `if __name__ == "__main__"`.

    Args:
        env_names: tasks, groups of them, or families, for example ["metaworld"].
        folder: where the archives go, one a task (`archive_of`).
        episodes, seed, noise, overwrite: as for `demonstrate`, for every task.
        workers: processes; default: one a core. The content does not depend on it.
        on_task: called as each task is done, with its name and how many are.

    Raises:
        UnknownNameError: no such task, or no expert for it.
        InvalidInputError: a number is out of range.
        MismatchError: another file lies in an archive's place.
        StorageError: writing failed; the archives written before are safe.
        WorkerError: a worker process died.
    """
    tasks = expand_tasks(env_names)
    for family in dict.fromkeys(map(family_of, tasks)):  # a missing expert or package is said here, not in a worker
        oracle_expert(next(task for task in tasks if family_of(task) == family), noise)
    settings: dict[str, Any] = {"episodes": episodes, "seed": seed, "noise": noise, "overwrite": overwrite}
    made: dict[str, Demonstrated] = {}
    given_up: dict[str, str] = {}
    for task, found in in_workers(partial(_demonstrate_alone, folder=folder, settings=settings), tasks, workers):
        if isinstance(found, str):
            given_up[task] = found
        else:
            made[task] = found
        if on_task is not None:
            on_task(task, len(made) + len(given_up))
    ordered = {task: made[task] for task in tasks if task in made}
    return DemonstratedTasks(Path(folder), ordered, given_up)


def _demonstrate_alone(env_name: str, folder: Path | str, settings: dict[str, Any]) -> Demonstrated | str:
    """Run in a worker: one task, in this process; return why, if its expert is given up."""
    try:
        return demonstrate(env_name, archive_of(folder, env_name), num_envs=1, **settings)
    except TrainingError as error:
        return str(error)


def _benchmark(env_name: str) -> str:
    return env_name.split("/", 1)[0]


def _attempt(
    env: VectorEnv, experts: Sequence[Expert], episodes: int, seed: int, on_episode: Progress | None
) -> list[_Attempt]:
    """Let the expert try until it has succeeded `episodes` times, or has tried often enough.

    An attempt begins only while those that are being played would not be enough, all of them successes. So the successes
    are the first ones in the order of the seeds, and which attempts are made depends on nothing else.

    Returns:
        The attempts in the order of their seeds; no more successes than were asked for. Too few, where it was given up.
    """
    patience = max(episodes, FIRST)
    least = patience / ATTEMPTS
    playing: dict[int, int] = {}
    tries = [_Attempt() for _ in range(ATTEMPTS * episodes)]
    begun = finished = successes = 0

    def begin(row: int) -> int:
        nonlocal begun
        playing[row] = begun
        own = child_seed(seed, "demonstration", begun)
        experts[row].reset(child_seed(own, "expert"))
        begun += 1
        return child_seed(own, "environment")

    fresh = {row: begin(row) for row in range(min(env.num_envs, episodes))}
    batch = env.reset({row: fresh.get(row, 0) for row in range(env.num_envs)})
    actions = np.zeros((env.num_envs, 1, env.spec.action_dim), dtype=np.float32)
    while playing:
        active = sorted(playing)
        for row in active:
            actions[row, 0] = experts[row].act(batch.view(row))
            tries[playing[row]].observations.append(batch.observation[row])
            tries[playing[row]].actions.append(actions[row, 0].copy())
        batch = env.execute(actions, rows=active)
        fresh, first = {}, tries[:patience]
        for row in active:
            current = tries[playing[row]]
            current.rewards.append(float(batch.rewards[row, 0]))
            current.success = bool(batch.success[row])
            if not (current.success or batch.done[row]):
                continue
            del playing[row]
            finished += 1
            successes += current.success
            if on_episode is not None:
                on_episode(successes, finished)
            in_vain = min(playing.values(), default=begun) >= patience and sum(one.success for one in first) < least
            if successes + len(playing) < episodes and begun < len(tries) and not in_vain:
                fresh[row] = begin(row)
        if fresh:
            batch = env.reset(fresh)
    return tries[:begun]


def _write(path: Path, request: dict[str, Any], successes: Sequence[_Attempt], attempts: int) -> Demonstrated:
    lengths = [len(attempt.actions) for attempt in successes]
    terminals = np.zeros(sum(lengths), dtype=np.bool_)
    terminals[np.cumsum(lengths) - 1] = True
    arrays: dict[str, npt.NDArray[Any]] = {
        "observations": np.concatenate([np.stack(attempt.observations) for attempt in successes]),
        "actions": np.concatenate([np.stack(attempt.actions) for attempt in successes]),
        "rewards": np.concatenate([np.asarray(attempt.rewards, dtype=np.float32) for attempt in successes]),
        "terminals": terminals,
    }
    made = Demonstrated(path, path.with_suffix(".json"), len(successes), attempts, len(terminals), made=True)
    with replacing(path) as temporary:
        save_npz(temporary, arrays)
        # First, and with the archive's digest: whenever this process is killed, no archive is taken for another one.
        write_json(
            made.provenance_path,
            {
                "request": request,
                "versions": {"counterflow": counterflow.__version__}
                | {name: version(name) for name in (PACKAGES[_benchmark(request["env"])], "mujoco", "numpy")},
                "attempts": attempts,
                "successes": made.episodes,
                "transitions": made.transitions,
                "sha256": _digest(temporary),
                "source": SOURCES[_benchmark(request["env"])],
            },
        )
    return made


def _found(path: Path, request: dict[str, Any]) -> Demonstrated:
    """Return what lies at `path` if it is what `request` asks for.

    Raises:
        MismatchError: it is something else.
    """
    provenance_path = path.with_suffix(".json")
    way_out = "Choose another path, remove the file, or pass overwrite=True (--overwrite) to replace it."
    try:
        provenance = json.loads(provenance_path.read_text())
        found, attempts, digest = provenance["request"], int(provenance["attempts"]), provenance["sha256"]
        difference = ", ".join(
            f"{name} is {found.get(name)!r} there and {value!r} here"
            for name, value in request.items()
            if found.get(name) != value
        )
        transitions = int(provenance["transitions"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise MismatchError(
            f"{path} exists, and no {provenance_path.name} beside it says how it was made. {way_out}"
        ) from None
    if difference:
        raise MismatchError(f"{path} holds other demonstrations: {difference}. {way_out}")
    if _digest(path) != digest:
        raise MismatchError(f"{path} is not the file that {provenance_path.name} describes. {way_out}")
    return Demonstrated(path, provenance_path, request["episodes"], attempts, transitions, made=False)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
