"""The stage that measures how fast it all is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from counterflow.envs import make_env
from counterflow.envs.libero import SETTLING_STEPS, LiberoEnv
from counterflow.experiments.evaluate import ReasonerSettings, load_prior, machine
from counterflow.experiments.generalist_suite.suite import Suite
from counterflow.experiments.rollout import seen_by
from counterflow.experiments.sight import Eyes, looks
from counterflow.files import write_json
from counterflow.random import child_seed, global_numpy
from counterflow.reasoners import to_reference
from counterflow.steering import steer

SPEED_CHUNKS = 40
BESIDE_STEPS, BESIDE_RESETS = 200, 10


def speed(suite: Suite) -> None:
    """Measure environment steps a second, and where the time of a steered episode goes, unless that was done."""
    task = next(task for tasks in suite.held_out.values() for task in tasks)
    known = suite.read("speed")
    if known is not None and known["task"] == task and known.get("policy", suite.fingerprint) == suite.fingerprint:
        return
    prior = load_prior(task, suite.policy, suite.settings.device)
    spec = prior.action_spec
    length = spec.horizon if spec.executed is None else spec.executed
    found: dict[str, Any] = {
        "task": task,
        "policy": suite.fingerprint,
        "horizon": length,
        "machine": machine(),
        "rows": [],
    }
    for rows in (1, 4, 16):
        with make_env(task, rows) as env:
            batch = env.reset({row: child_seed(suite.settings.seed, row) for row in range(rows)})
            still = np.zeros((rows, length, spec.dim), np.float32)
            steps, began = 0, time.perf_counter()
            for _ in range(SPEED_CHUNKS):
                batch = env.execute(still, rows=list(range(rows)))
                steps += int(batch.steps.sum())
                if batch.done.any():
                    break
            simulating = (time.perf_counter() - began) / steps
            reasoner = ReasonerSettings().maker(task)()
            reasoner.reset(0)
            began = time.perf_counter()
            said = [reasoner.decide(seen_by(reasoner, env, batch, row)) for row in range(rows) for _ in range(10)]
            thinking = (time.perf_counter() - began) / len(said)
            eyes, every = Eyes(prior, env), list(range(rows))
            eyes.see(batch.observation, every)  # the first time makes what pictures are drawn with
            began = time.perf_counter()
            observation = eyes.see(batch.observation, every)
            looking = {"pictures": (time.perf_counter() - began) / rows} if looks(prior) else {}
            reference = to_reference(said[::10], spec)
            computing = {}
            for method in ("base", "frs"):
                policy = steer(prior, method)
                policy.act(observation, reference if method == "frs" else None, 0)
                began = time.perf_counter()
                for _ in range(10):
                    policy.act(observation, reference if method == "frs" else None, 0).actions.cpu()
                computing[method] = (time.perf_counter() - began) / 10 / rows
        found["rows"].append(
            {
                "environments": rows,
                "steps_per_second": 1 / simulating,
                "seconds_per_chunk": {
                    "simulator": simulating * length,
                    "reasoner": thinking,
                    **looking,
                    **{f"policy, {method}": seconds for method, seconds in computing.items()},
                },
            }
        )
        suite.log(f"speed: {rows} environments, {1 / simulating:.0f} steps a second")
    if suite.settings.family == "libero":
        found["beside_robosuite"] = beside_robosuite(task, suite.settings.seed)
    write_json(suite.results / "speed.json", found)


def beside_robosuite(task: str, seed: int) -> dict[str, dict[str, float]]:
    """Measure one environment of LIBERO's in this process, and the same with robosuite's own way to step and reset it.

    Returns:
        Seconds of a "step" and of a "reset", each for "counterflow" and for "robosuite".
    """
    env = LiberoEnv(task)
    still = np.append(np.zeros(6), -1.0)

    def seconds(does: Callable[[int], Any], count: int) -> float:
        does(0)  # the first time compiles
        began = time.perf_counter()
        for index in range(count):
            does(index)
        return (time.perf_counter() - began) / count

    found: dict[str, dict[str, float]] = {"step": {}, "reset": {}}
    try:
        found["reset"]["counterflow"] = seconds(lambda index: env.reset(child_seed(seed, index)), BESIDE_RESETS)
        found["step"]["counterflow"] = seconds(lambda _: env.step(still), BESIDE_STEPS)
        own = env.simulator
        found["step"]["robosuite"] = seconds(lambda _: own.step(still), BESIDE_STEPS)

        def reset(index: int) -> None:
            with global_numpy(child_seed(seed, index)):
                own.reset()
            for _ in range(SETTLING_STEPS):
                own.step(still)

        found["reset"]["robosuite"] = seconds(reset, BESIDE_RESETS)
    finally:
        env.close()
    return found
