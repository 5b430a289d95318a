"""The papers' ground as one chain of stages: a generalist, the tasks that it fails, and every way of steering it.

    experts, demonstrations -> generalist -> base -> zero_shot -> distillation -> rl; base -> guidance; speed

Each stage does what is missing in `results/` and keeps what it did as soon as it is known, a file a task, so that a chain that
was killed goes on. Which tasks a stage takes is decided by rules on the results of the stages before it, written down here, and
with other episodes than those in its table: whoever is chosen for failing would otherwise look better the second time. K, tau
and n of a task are those that do best on the others.

Sources: FRS (arXiv 2606.13675), its LIBERO tables; GAF (arXiv 2607.02092), the guidance table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from counterflow.errors import MismatchError, UnknownNameError
from counterflow.experiments.generalist_suite.learning import reinforcement
from counterflow.experiments.generalist_suite.making import demonstrations, experts, generalist
from counterflow.experiments.generalist_suite.settings import SuiteSettings
from counterflow.experiments.generalist_suite.steering import base, distillation, guidance, zero_shot
from counterflow.experiments.generalist_suite.suite import GAIN, SEEDS, Suite, partial, rank, reversal, slug
from counterflow.experiments.generalist_suite.timing import speed

__all__ = [
    "GAIN",
    "SEEDS",
    "STAGES",
    "Stage",
    "Suite",
    "SuiteSettings",
    "partial",
    "rank",
    "reversal",
    "run_suite",
    "slug",
]

Stage = Literal[
    "experts", "demonstrations", "generalist", "base", "zero_shot", "distillation", "rl", "guidance", "speed"
]
STAGES: tuple[Stage, ...] = get_args(Stage)
RUN: dict[Stage, Callable[[Suite], None]] = {
    "experts": experts,
    "demonstrations": demonstrations,
    "generalist": generalist,
    "base": base,
    "zero_shot": zero_shot,
    "distillation": distillation,
    "rl": reinforcement,
    "guidance": guidance,
    "speed": speed,
}


def run_suite(suite: Suite, stages: Sequence[Stage] = STAGES) -> None:
    """Run stages, each as far as it is missing.

    Must be called under `if __name__ == "__main__"` (see `make_env`).

    Raises:
        UnknownNameError: no such stage.
        DatasetError: a stage needs what an earlier one was to leave.
        MismatchError: the policy does not fit the tasks.
    """
    for stage in stages:
        if stage not in RUN:
            raise UnknownNameError("stage", stage, STAGES)
    if not suite.training or not any(suite.held_out.values()):
        raise MismatchError(
            f"of {', '.join(suite.settings.tasks)} {len(suite.training)} tasks are in the training split of "
            f"{suite.settings.family} and {len(suite.tasks) - len(suite.training)} are held out; expected some of both."
        )
    torch.set_num_threads(1)  # the policies are small; the cores are the simulators'
    for stage in stages:
        began = time.perf_counter()
        RUN[stage](suite)
        suite.log(f"{stage}: done in {time.perf_counter() - began:.0f} s")
