"""The stage that learns online, where Flow Reversal Steering works and where it hardly does."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from counterflow.experiments.generalist_suite.settings import AGAIN, EVALUATIONS
from counterflow.experiments.generalist_suite.steering import distilled, steered_successes
from counterflow.experiments.generalist_suite.suite import Suite, slug
from counterflow.experiments.online import OnlineProgress, train_online
from counterflow.experiments.online_settings import Config, OnlineRun, online_preset
from counterflow.experiments.record import record
from counterflow.files import write_json
from counterflow.learning.dsrl import DSRLConfig
from counterflow.learning.rfs import RFSConfig
from counterflow.steering import MethodSettings


def reinforcement(suite: Suite) -> None:
    """Learn online where FRS works (from its successes), and where it hardly does (from one)."""
    settings, preset = suite.settings, online_preset("dsrl", "small", taught=True)
    for task in suite.working()[: settings.works]:
        alone = _alone(suite, task)
        _learn(suite, "works", task, "residual", "residual", online_preset("residual", "small"), alone)
        _learn(suite, "works", task, "DSRL", "dsrl", _plain_dsrl())
        steered = steered_successes(suite, task, settings.successes)
        if steered is not None:
            taught = distilled(suite, steered, settings.successes)
            _learn(suite, "works", task, "DSRL + FRS", "dsrl", preset, steered, taught, **AGAIN)
    for task in suite.hardest():
        alone = _alone(suite, task)
        _learn(suite, "hard", task, "residual", "residual", online_preset("residual", "small"), alone)
        _learn(suite, "hard", task, "DSRL", "dsrl", _plain_dsrl())
        one = steered_successes(suite, task, 1, "one")
        if one is not None:
            taught = distilled(suite, one, 1)
            _learn(
                suite, "hard", task, "DSRL + FRS", "dsrl", preset, one, taught, successes_only=True, first=1, **AGAIN
            )


def _alone(suite: Suite, task: str) -> Path:
    """Return the folder of as many rollouts of the generalist alone, denoised in as many steps as the learning's."""
    steps = suite.noise_steps(task)
    out = suite.data / "alone" / f"{slug(task)}-{steps}-{suite.settings.seed}"
    record(
        task,
        "base",
        out,
        episodes=suite.settings.successes,
        seed=suite.settings.seed,
        settings=MethodSettings(steps=steps),
        policy=suite.policy,
        device=suite.settings.device,
        num_envs=suite.settings.num_envs,
        every_step=False,
    )
    return out


def _plain_dsrl() -> tuple[Config, OnlineRun]:
    """Return the small preset without what only recordings give."""
    config, run = online_preset("dsrl", "small")
    assert isinstance(config, DSRLConfig)
    return replace(config, bc_weight=0.0), run


def _learn(
    suite: Suite,
    kind: str,
    task: str,
    label: str,
    algorithm: str,
    preset: tuple[Config, OnlineRun],
    data: Path | None = None,
    noise_policy: Path | None = None,
    **changes: Any,
) -> None:
    """Train what is missing and keep its curves."""
    settings = suite.settings
    name = f"{slug(task)}-{label.lower().replace(' + ', '-')}"
    asked = suite.asked_of_learning(task, kind)
    known = suite.read(f"rl/{name}")
    if known is not None and known["asked"] == asked:
        return
    every = max(1, settings.decisions // EVALUATIONS)
    config, run = preset
    if not isinstance(config, RFSConfig):
        config = replace(config, warmup=min(config.warmup, every))
    run = replace(
        run,
        decisions=settings.decisions,
        episodes=settings.episodes,
        evaluate_every=every,
        capacity=20_000,
        steps=suite.noise_steps(task),  # a noise is the same action in as many steps only
        **changes,
    )
    suite.log(f"rl: {task}, {label}")

    def show(progress: OnlineProgress) -> None:
        if progress.decision % every < run.report_every:  # the first report after an evaluation
            suite.log(f"  {progress.decision}: training {progress.recent}, evaluation {progress.success}")

    out = suite.data / "rl" / f"{name}-{zlib.crc32(json.dumps(asked, sort_keys=True).encode()):08x}"
    train_online(
        algorithm,
        task,
        out,
        config,
        run,
        prefill_from=data,
        noise_policy=noise_policy,
        policy=suite.policy,
        seeds=settings.learning_seeds,
        device=settings.device,
        on_progress=show,
    )
    content = json.loads((out / "results.json").read_text())
    kept = {"asked": asked, "kind": kind, "task": task, "label": label, "bound": run.bound}
    write_json(suite.results / "rl" / f"{name}.json", {**content, **kept})
