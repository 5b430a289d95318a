"""LIBERO: a generalist trained on 57 tasks of the suite of ninety, and steered on the 33 that were held out.

    python benchmarks/libero/run.py

runs what is missing: the experts' success, demonstrations, the generalist, its success alone, the choice of settings, zero-shot
steering, distillation, reinforcement learning, guidance by a critic, speed. Then it writes the tables and figures beside it.
Stages can be named (--stages base zero_shot), --only-report leaves out the running, --policy takes another policy than the one
that is trained here. What was killed goes on. Demonstrations, recordings and networks (data/, runs/) are not committed: the same
command makes them again. It needs LIBERO's assets (docs/generalist.md says how to get them).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from counterflow.experiments.generalist import TRAINING
from counterflow.experiments.generalist_report import Differs
from counterflow.experiments.generalist_script import script
from counterflow.experiments.generalist_suite import SuiteSettings
from counterflow.policies import GeneralistConfig

SETTINGS = SuiteSettings(
    family="libero",
    demonstrations=20,
    architecture=GeneralistConfig(width=128, encoder_depth=2, depth=3),
    learning=replace(TRAINING, steps=16_000),
    # README, "Zero-shot", says how the grids came about.
    reversals=(20, 80),
    taus=(0.9,),
    candidates=(16,),
    decisions=750,
)
DIFFERS = Differs(
    generalist="an object-centric transformer of two million parameters, trained here on scripted demonstrations",
    observation="where everything in the scene is, by name, the robot's state, a sentence",
    reasoner="the task's scripted expert, reduced to one axis and a gripper command",
)

if __name__ == "__main__":
    script(Path(__file__).parent, SETTINGS, __doc__ or "", DIFFERS)
