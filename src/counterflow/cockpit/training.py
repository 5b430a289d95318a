"""Learning from what was driven: DSBC from the successes, DAgger once a noise policy was helped. Runs beside the driving.

`RUN/recordings/` holds the episodes that somebody steered, `RUN/corrections/` those that a noise policy drove and somebody may
have helped with, `RUN/policies/noise-policy-<n>.safetensors` what was learned: the same files that `counterflow record`,
`distill` and `dagger` read and write.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from counterflow.data import SteeringDataset
from counterflow.errors import CounterflowError, DatasetError
from counterflow.experiments.dagger import corrections_of
from counterflow.experiments.distill import examples_of
from counterflow.learning.dagger import DAggerConfig
from counterflow.learning.dsbc import DSBCConfig, distil, join
from counterflow.learning.held_out import Progress
from counterflow.steering import ChunkRegressor

RECORDINGS, CORRECTIONS, POLICIES = "recordings", "corrections", "policies"


class CancelledError(CounterflowError):
    """Somebody pressed "stop"."""


@dataclass
class Training:
    """How far a training is; written by the thread that trains, read by others.

    Attributes:
        name: of the noise policy that is being made.
        algorithm: "dsbc" or "dagger".
        state: "running", "done", "failed" or "cancelled".
        step: updates done.
        steps: updates at most.
        examples: how many pairs are learned from.
        curve: (step, training loss, held-out loss or None) at every report.
        message: why it failed.
    """

    name: str
    algorithm: str = "dsbc"
    state: str = "running"
    step: int = 0
    steps: int = 0
    examples: int = 0
    curve: list[tuple[int, float, float | None]] = field(default_factory=list)
    message: str = ""
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def report(self, progress: Progress) -> None:
        """Take in how far it is.

        Raises:
            CancelledError: it is to end.
        """
        if self.stop.is_set():
            raise CancelledError("the training was stopped. What was there before is untouched.")
        held_out = None if math.isnan(progress.held_out_loss) else round(progress.held_out_loss, 5)
        self.step, self.steps = progress.step, progress.steps
        self.curve.append((progress.step, round(progress.loss, 5), held_out))

    def to_json(self) -> dict[str, Any]:
        """Return everything that is to be shown."""
        return {
            "name": self.name,
            "algorithm": self.algorithm,
            "state": self.state,
            "step": self.step,
            "steps": self.steps,
            "examples": self.examples,
            "curve": [list(point) for point in self.curve],
            "message": self.message,
        }


def train(
    run: Path,
    env: str,
    training: Training,
    *,
    config: DSBCConfig | None = None,
    initial: ChunkRegressor | None = None,
    seed: int = 0,
    on_done: Callable[[ChunkRegressor], None] | None = None,
) -> ChunkRegressor | None:
    """Learn from a run's folder, and put the noise policy into it; what goes wrong is noted in `training`, not raised.

    Args:
        run: the run's folder.
        env: the task whose episodes are learned from.
        training: where to note how far it is.
        config: of the distillation.
        initial: the noise policy that was helped; with it, and with corrections, this is a round of DAgger.
        seed: what weights and draws descend from.
        on_done: called with the noise policy.
    """
    config = DSBCConfig() if config is None else config
    try:
        if not (run / RECORDINGS).is_dir():
            raise DatasetError(f"no episode of this task was kept yet ({env}). Drive one to success, and keep it.")
        corrections = _corrections(run, env, config)
        if initial is not None and initial.config != config.regressor:
            initial = None  # of another architecture, made elsewhere: begin anew
        beginning = examples_of(run / RECORDINGS, config, env=env)
        if corrections:
            # learn() reports no progress, so its two halves are called here.
            training.algorithm = "dagger"
            config = config if initial is None else _warm(config)
            beginning = join([beginning, *corrections])
        else:
            initial = None
        training.examples, training.steps = len(beginning.inputs), config.steps
        regressor = distil(beginning, config, seed=seed, initial=initial, on_progress=training.report)
        regressor.provenance = {
            "algorithm": training.algorithm,
            "datasets": [RECORDINGS, *([CORRECTIONS] if corrections else [])],
            "env": env,
            "seed": seed,
            "settings": asdict(config),
            **regressor.provenance,
        }
        regressor.save(run / POLICIES / f"{training.name}.safetensors")
    except CancelledError as error:
        training.state, training.message = "cancelled", str(error)
        return None
    except Exception as error:  # a thread's exception would end nowhere
        training.state, training.message = "failed", str(error)
        return None
    training.state = "done"
    if on_done is not None:
        on_done(regressor)
    return regressor


def _warm(config: DSBCConfig) -> DSBCConfig:
    """Return the settings with which DAgger goes on from the last weights."""
    return replace(config, steps=min(config.steps, DAggerConfig().steps))


def _corrections(run: Path, env: str, config: DSBCConfig) -> list[Any]:
    try:
        dataset = SteeringDataset.load(run / CORRECTIONS).filter(env=env)
    except (DatasetError, LookupError):
        return []  # nobody has helped a noise policy yet
    return corrections_of(dataset, config.regressor)
