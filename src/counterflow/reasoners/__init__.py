"""Reasoners: who gives the coarse reference."""

from collections.abc import Callable

from counterflow.errors import UnknownNameError
from counterflow.reasoners.cubes import CubeReasoner
from counterflow.reasoners.direction import (
    CONVENTIONS,
    OGBENCH,
    PAPER,
    Convention,
    Direction,
    Reasoner,
    View,
    to_reference,
)
from counterflow.reasoners.expert import Expert, OracleExpert, oracle_expert
from counterflow.reasoners.libero_expert import LiberoExpert, LiberoReasoner
from counterflow.reasoners.metaworld import MetaWorldExpert, MetaWorldReasoner
from counterflow.reasoners.puzzle import PuzzleReasoner, solve_lights_out
from counterflow.reasoners.scene import SceneReasoner
from counterflow.reasoners.unreliable import OverruledGripper, UnreliableReasoner

SCRIPTED: dict[str, Callable[[], Reasoner]] = {
    "ogbench/cube": CubeReasoner,
    "ogbench/scene": SceneReasoner,
    "ogbench/puzzle": PuzzleReasoner,
}
"""The scripted reasoner of every kind of environment, by the beginning of its name."""

OF_A_TASK: dict[str, Callable[[str], Reasoner]] = {"metaworld/": MetaWorldReasoner, "libero/": LiberoReasoner}
"""Scripted reasoners that have to know which task it is: they are made of that task's expert."""


def scripted_reasoner(env: str) -> Reasoner:
    """Return the scripted reasoner for the environment called `env`.

    Raises:
        UnknownNameError: no script knows this environment.
        MissingDependencyError: the script is made of a package that is not installed.
    """
    for prefix, make_for in OF_A_TASK.items():
        if env.startswith(prefix):
            return make_for(env)
    for prefix, make in SCRIPTED.items():
        if env.startswith(prefix):
            return make()
    raise UnknownNameError("scripted reasoner for environment", env, [*SCRIPTED, *OF_A_TASK])


__all__ = [
    "CONVENTIONS",
    "OF_A_TASK",
    "OGBENCH",
    "PAPER",
    "SCRIPTED",
    "Convention",
    "CubeReasoner",
    "Direction",
    "Expert",
    "LiberoExpert",
    "LiberoReasoner",
    "MetaWorldExpert",
    "MetaWorldReasoner",
    "OracleExpert",
    "OverruledGripper",
    "PuzzleReasoner",
    "Reasoner",
    "SceneReasoner",
    "UnreliableReasoner",
    "View",
    "oracle_expert",
    "scripted_reasoner",
    "solve_lights_out",
    "to_reference",
]
