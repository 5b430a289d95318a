"""`make_env`: one door to every benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from counterflow.checks import Range
from counterflow.envs import libero, metaworld, ogbench, ogbench_locomotion
from counterflow.envs.types import EnvSpec, RenderSettings, TaskEnv
from counterflow.envs.vector import VectorEnv
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.random import check_seed

# A benchmark, or a part of one, is the names it offers and how one of them is made.
_BENCHMARKS: tuple[tuple[Callable[[], list[str]], Callable[[str, RenderSettings | None], TaskEnv]], ...] = (
    (ogbench.names, ogbench.OGBenchEnv),
    (ogbench_locomotion.names, ogbench_locomotion.OGBenchLocomotionEnv),
    (metaworld.names, metaworld.MetaWorldEnv),
    (libero.names, libero.LiberoEnv),
)

# In these benchmarks one prior is made for many different tasks, which are called by their own names.
_MULTI_TASK = (metaworld.FAMILY, libero.FAMILY)

MAX_ENVS = 1024
SHOWN = 10  # names of tasks that a message lists


def env_names() -> list[str]:
    """Return the full name of every environment that `make_env` knows."""
    return [name for names, _ in _BENCHMARKS for name in names()]


def families() -> list[str]:
    """Return every family of environments (what a prior is trained for), for example "ogbench/cube-single"."""
    return sorted({family_of(name) for name in env_names()})


def family_of(name: str) -> str:
    """Return the family of an environment's full name; a family is its own family.

    Five tasks of OGBench's make a family, "ogbench/scene-task1" to "ogbench/scene". A benchmark of many different tasks that one
    prior is made for is a family as a whole: "metaworld/push-v3" is of "metaworld".
    """
    benchmark = name.split("/", 1)[0]
    return benchmark if benchmark in _MULTI_TASK else name.rsplit("-task", 1)[0]


def groups() -> dict[str, tuple[str, ...]]:
    """Return the named groups of tasks smaller than a family, for example "metaworld/mt10" or "libero/90", and their tasks.

    Beside the benchmarks' own there are those of this project's split, fixed in tasks/held_out.json before any generalist was
    trained: of metaworld, and of LIBERO's suite of ninety, "train", "held-out", and three kinds of held-out tasks.
    """
    return {**metaworld.GROUPS, **libero.groups(), **_split()}


@cache
def _split() -> dict[str, tuple[str, ...]]:
    content = json.loads((Path(__file__).parent / "tasks" / "held_out.json").read_text())
    found: dict[str, tuple[str, ...]] = {}
    for family, everything in ((metaworld.FAMILY, metaworld.names()), (libero.FAMILY, [*libero.groups()["libero/90"]])):
        kinds: dict[str, list[str]] = content[family]
        held_out = [task for tasks in kinds.values() for task in tasks]
        found |= {f"{family}/{kind}": tuple(tasks) for kind, tasks in kinds.items()}
        found[f"{family}/held-out"] = tuple(held_out)
        found[f"{family}/train"] = tuple(task for task in everything if task not in held_out)
    return found


def check_env_name(name: str) -> str:
    """Return `name`, or raise `UnknownNameError` with the nearest known names."""
    known = env_names()
    if name in known:
        return name
    tasks = groups().get(name) or [other for other in known if family_of(other) == name]
    if tasks:
        shown = tasks if len(tasks) <= SHOWN else [*tasks[:SHOWN], f"... ({len(tasks)} in all)"]
        raise InvalidInputError(f"{name!r} is a family of tasks, expected one of its tasks: {', '.join(shown)}.")
    raise UnknownNameError("environment", name, known)


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Return tasks for a list of tasks, groups and families; a group or family stands for all of its tasks.

    Raises:
        UnknownNameError: neither a task nor a group nor a family; the nearest are suggested.
        InvalidInputError: nothing was named.
    """
    if not names:
        raise InvalidInputError("no task was named; give at least one, for example ogbench/cube-single-task1.")
    known, grouped = env_names(), groups()
    tasks: list[str] = []
    for name in names:
        if name in grouped:
            tasks += grouped[name]
        elif name in known:
            tasks.append(name)
        elif name in families():
            tasks += [task for task in known if family_of(task) == name]
        else:
            raise UnknownNameError("environment or family", name, [*known, *grouped, *families()])
    return list(dict.fromkeys(tasks))


def describe(name: str) -> EnvSpec:
    """Describe an environment, or the first task of a family, by its full name.

    Raises:
        UnknownNameError: no such environment or family; the nearest names are suggested.
    """
    known = env_names()
    tasks = [other for other in known if name in (other, family_of(other))]
    if not tasks:
        raise UnknownNameError("environment or family", name, [*known, *families()])
    env = make_task(tasks[0])
    try:
        return env.spec
    finally:
        env.close()


def make_task(name: str, render: RenderSettings | None = None) -> TaskEnv:
    """Make one environment in this process, without a vector around it.

    Raises:
        UnknownNameError, InvalidInputError: as for `make_env`.
    """
    check_env_name(name)
    make = next(make for names, make in _BENCHMARKS if name in names())
    return make(name, render)


def make_env(
    name: str,
    num_envs: int = 1,
    seed: int = 0,
    *,
    workers: int | None = None,
    render: RenderSettings | None = None,
) -> VectorEnv:
    """Make `num_envs` copies of an environment, stepped side by side in worker processes.

    Args:
        name: full name, for example "ogbench/cube-single-task1"; `env_names()` lists them.
        num_envs: N, how many copies.
        seed: the seed from which resets without explicit seeds descend.
        workers: processes to use; 0 for none (everything in this process); default one a core, at most N, and none
            for a single environment. A script that uses processes must have its code under
            `if __name__ == "__main__":`, because they import it anew.
        render: size and quality of frames; None if none will be drawn.

    Raises:
        UnknownNameError: no such environment; the nearest names are suggested.
        InvalidInputError: a number is out of range, or `name` is a family rather than a task.
        WorkerError: a worker process failed to start.
    """
    check_env_name(name)
    Range(1, MAX_ENVS, integer=True).check("num_envs", num_envs)
    return VectorEnv([partial(make_task, name, render)] * num_envs, check_seed(seed), workers)
