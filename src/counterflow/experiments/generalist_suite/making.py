"""The stages that make the generalist: experts, demonstrations, its training."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from counterflow.envs.libero import LiberoEnv
from counterflow.envs.registry import make_task
from counterflow.experiments.demonstrate import archive_of, demonstrate_tasks
from counterflow.experiments.evaluate import policy_name
from counterflow.experiments.generalist import train_generalist
from counterflow.experiments.generalist_suite.suite import Suite, slug
from counterflow.experiments.train import Cadence, Progress
from counterflow.experiments.workers import in_workers
from counterflow.files import write_json
from counterflow.policies import load
from counterflow.random import child_seed
from counterflow.reasoners import oracle_expert


def experts(suite: Suite) -> None:
    """Let every task's expert try, with the demonstrations' noise."""
    settings = suite.settings
    folder = suite.results / "experts"
    asked: dict[str, Any] = {
        "episodes": settings.expert_episodes,
        "noise": settings.noise,
        "seed": settings.seed,
    }
    left = []
    for task in suite.tasks:
        known = suite.read(f"experts/{slug(task)}")
        if known is None or known["asked"] != asked:
            left.append(task)
    for task, found in in_workers(partial(try_expert, **asked), left, settings.workers):
        write_json(folder / f"{slug(task)}.json", {"task": task, "asked": asked, **found})
        suite.log(f"experts: {task}, {sum(found['successes'])} of {len(found['successes'])}")


def try_expert(task: str, episodes: int, noise: float, seed: int) -> dict[str, Any]:
    """Run one task's expert in this process; return `successes` and `steps`, an entry an episode, and `seconds`.

    At most fifty episodes of a task of LIBERO's: one from each of its initial states.
    """
    env, expert = make_task(task), oracle_expert(task, noise)
    successes, steps, began = [], [], time.perf_counter()
    try:
        for episode in range(episodes):
            own = child_seed(seed, "expert", episode)
            start = child_seed(own, "environment")
            # LIBERO's tasks have numbered initial states, and as many are wanted as there are episodes.
            moment = env.reset_to(episode, start) if isinstance(env, LiberoEnv) else env.reset(start)
            expert.reset(child_seed(own, "expert"))
            count = 0
            while not (moment.terminated or moment.truncated):
                moment = env.step(expert.act(moment.privileged))
                count += 1
            successes.append(moment.success)
            steps.append(count)
    finally:
        env.close()
    return {"successes": successes, "steps": steps, "seconds": round(time.perf_counter() - began, 2)}


def demonstrations(suite: Suite) -> None:
    """Let the experts demonstrate the training tasks."""
    settings = suite.settings
    if settings.policy is not None:
        suite.log(f"demonstrations: none are needed, {settings.policy} was given")
        return
    asked = {"episodes": settings.demonstrations, "noise": settings.noise, "seed": settings.seed}
    folder, known = suite.folder / "data" / "demonstrations", suite.read("demonstrations")
    known = known if known is not None and known["asked"] == asked else None
    if known is not None and all(
        task in known["given_up"] or archive_of(folder, task).exists() for task in suite.training
    ):
        return
    began = time.perf_counter()
    made = demonstrate_tasks(
        suite.training,
        folder,
        episodes=settings.demonstrations,
        seed=settings.seed,
        noise=settings.noise,
        workers=settings.workers,
        on_task=lambda task, count: suite.log(f"demonstrations: {task}, {count} of {len(suite.training)}"),
    )
    write_json(
        suite.results / "demonstrations.json",
        {
            "asked": asked,
            "seconds_in_the_last_session": round(time.perf_counter() - began, 1),
            "tasks": {
                task: {"episodes": one.episodes, "attempts": one.attempts, "transitions": one.transitions}
                for task, one in made.made.items()
            },
            "given_up": made.given_up,
        },
    )


def generalist(suite: Suite) -> None:
    """Train the generalist on the training split; on all cores."""
    settings = suite.settings
    known = suite.read("generalist")
    if settings.policy is not None:
        fingerprint = suite.fingerprint  # it loads
        if known is None or known["policy"] != fingerprint:  # of the one that was trained here more is known
            write_json(suite.results / "generalist.json", {"policy": fingerprint, "given": settings.policy})
        return

    def show(progress: Progress) -> None:
        if progress.step % 1_000 == 0:
            suite.log(f"generalist: {progress.step} of {progress.steps}, loss {progress.loss:.4f}")

    with _threads(_cores()):
        trained = train_generalist(
            suite.folder / "data" / "demonstrations",
            suite.training,
            suite.policy,
            settings.architecture,
            settings.learning,
            seed=settings.seed,
            cadence=Cadence(validate=1_000, checkpoint=500, report=100),
            on_progress=show,
        )
    made = load(suite.policy)
    if not trained.steps_done and known is not None and known["policy"] == policy_name(made):
        return
    write_json(
        suite.results / "generalist.json",
        {
            "policy": policy_name(made),
            "parameters": sum(parameter.numel() for parameter in made.parameters()),
            "megabytes": round(trained.path.stat().st_size / 2**20, 1),
            "seconds": round(trained.seconds, 1),
            "timed_updates": trained.steps_done,  # fewer than all after an interruption
            "provenance": made.provenance,
        },
    )


def _cores() -> int:
    """Return how many cores this process may use, as far as the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Give torch so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
