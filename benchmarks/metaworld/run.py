"""Meta-World: a generalist trained on 34 tasks, and steered on the 16 that were held out.

    python benchmarks/metaworld/run.py

runs what is missing: the experts' success, demonstrations, the generalist, its success alone, the choice of settings, zero-shot
steering, distillation, reinforcement learning, guidance by a critic, speed. Then it writes the tables and figures beside it.
Stages can be named (--stages base zero_shot), --only-report leaves out the running, --policy takes another policy than the one
that is trained here. What was killed goes on. Demonstrations, recordings and networks (data/, runs/) are not committed: the same
command makes them again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from counterflow.experiments.generalist import TRAINING
from counterflow.experiments.generalist_report import Differs
from counterflow.experiments.generalist_script import script
from counterflow.experiments.generalist_suite import SuiteSettings

# As in the paper a reference says nothing of the gripper.
SETTINGS = SuiteSettings(family="metaworld", gripper="hold", learning=replace(TRAINING, steps=16_000), decisions=750)
DIFFERS = Differs(
    generalist="an object-centric transformer of about a million parameters, trained here on scripted demonstrations",
    observation="where the objects and the goal are, the robot's state, a sentence",
    reasoner="the task's scripted expert, reduced to one axis; nothing of the gripper",
)

if __name__ == "__main__":
    script(Path(__file__).parent, SETTINGS, __doc__ or "", DIFFERS)
