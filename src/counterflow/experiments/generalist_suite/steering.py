"""The stages that steer the generalist, distil it and guide it, and measure what comes of that."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

from counterflow.errors import DatasetError
from counterflow.experiments.compare import Contender
from counterflow.experiments.critic import train_critic
from counterflow.experiments.distill import distill
from counterflow.experiments.generalist_suite.settings import BOUND
from counterflow.experiments.generalist_suite.suite import Suite, slug
from counterflow.experiments.record import record
from counterflow.experiments.sight import looks
from counterflow.files import write_json
from counterflow.learning import ChunkCriticConfig, DSBCConfig
from counterflow.policies import load
from counterflow.steering import ChunkCritic, RegressorConfig

DSBC = DSBCConfig(RegressorConfig(bound=BOUND), held_out=0.0)
"""Nothing is held out: of eighteen successes the others may not tell of it, and what stops by it may stop too soon."""
BC = replace(DSBC, regressor=RegressorConfig(target="action", bound=None))
CRITIC = ChunkCriticConfig(method="monte_carlo")
"""Learned by temporal differences it was, held out, no better than a constant (benchmarks/metaworld/README.md)."""
DISTILLED = {"bc": BC, "dsbc": DSBC}
MOST_TRIES = 100  # episodes in which one success of a hard task is looked for


def base(suite: Suite) -> None:
    """Measure the generalist alone on every task."""
    for task in suite.tasks:
        suite.evaluate("base", task, [Contender("base", "base")])


def zero_shot(suite: Suite) -> None:
    """Steer every held-out task of the regime by all methods with every setting, the lowest base first."""
    every = [contender for grid in suite.grids.values() for contender in grid.values()]
    for task in suite.steered():
        suite.evaluate("zero_shot", task, every)


def steered_successes(suite: Suite, task: str, successes: int, folder: str = "steered") -> Path | None:
    """Return the folder of a task's FRS rollouts, recorded as far as they are missing; None: too few succeed."""
    steps, noise_steps = suite.chosen(task)["frs"], suite.settings.noise_steps
    kept = f"{steps}-exact" if noise_steps is None else f"{steps}-exact-{noise_steps}"
    out = suite.data / folder / f"{slug(task)}-{kept}-{suite.settings.seed}"
    try:
        record(
            task,
            "frs",
            out,
            successes=successes,
            seed=suite.settings.seed,
            settings=suite.contenders(task)["frs"].settings,
            reasoner=suite.reasoner,
            policy=suite.policy,
            device=suite.settings.device,
            num_envs=suite.settings.num_envs,
            max_episodes=MOST_TRIES if successes == 1 else 20 * successes,
            inversion="exact",  # the smallest noise would be searched by gradients through K steps of a transformer
            noise_steps=noise_steps,
        )
    except DatasetError as error:
        suite.log(f"{task}: {error}")
        return None
    return out


def distillation(suite: Suite) -> None:
    """Distil where FRS works: base, BC, DSBC, FRS."""
    settings = suite.settings
    for task in suite.working()[: settings.distilled]:
        rollouts = steered_successes(suite, task, settings.successes)
        if rollouts is None:
            continue
        found = suite.contenders(task)
        contenders = [found["base"], found["frs"]]
        for method in DISTILLED:
            learned = distilled(suite, rollouts, settings.successes, method)
            contenders.append(Contender(method, method, learned=str(learned)))
        suite.evaluate("distillation", task, contenders)


def distilled(suite: Suite, rollouts: Path, successes: int, method: str = "dsbc") -> Path:
    """Return what was distilled from the first so many successes of a recording, made if it is missing.

    Args:
        suite: the chain.
        rollouts: the recording.
        successes: how many of it.
        method: "dsbc" or "bc".
    """
    config = DISTILLED[method]
    kind = method if config.regressor.bound is None else f"{method}-{config.regressor.bound:g}"
    out = suite.data / "distilled" / f"{rollouts.name}-{successes}-{kind}-{config.held_out:g}.safetensors"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        distill([rollouts], out, config, first=successes, seed=suite.settings.seed)
    return out


def guidance(suite: Suite) -> None:
    """Guide by a critic that learned from the generalist's own rollouts, on tasks that it has seen and others."""
    settings = suite.settings
    if looks(load(suite.policy)):
        suite.log("guidance: left out, a critic learns at states, and this policy looks through cameras")
        return
    seen, unseen = suite.critics_tasks()
    if not seen:
        suite.log("guidance: the generalist always fails or always succeeds, so there is nothing to learn from")
        return
    folders = []
    for task in seen:
        suite.log(f"guidance: rollouts of {task}")
        folders.append(suite.data / "alone-for-critic" / f"{slug(task)}-{settings.seed}")
        record(
            task,
            "base",
            folders[-1],
            episodes=settings.rollouts,
            seed=settings.seed,
            policy=suite.policy,
            device=settings.device,
            num_envs=settings.num_envs,
            every_step=False,
        )
    tasks = zlib.crc32(" ".join(seen).encode())  # of other tasks it is another critic
    out = suite.data / f"critic-{CRITIC.method}-{tasks:08x}-{settings.rollouts}-{settings.seed}.safetensors"
    critic = ChunkCritic.load(out) if out.exists() else train_critic(folders, out, CRITIC, seed=settings.seed)
    write_json(suite.results / "critic.json", {"policy": suite.fingerprint, **critic.provenance})
    for task in (*seen, *unseen):
        suite.evaluate("guidance", task, [Contender("base", "base"), Contender("guided", "qgf", critic=str(out))])
    write_json(suite.results / "guidance-tasks.json", {"policy": suite.fingerprint, "seen": seen, "unseen": unseen})
