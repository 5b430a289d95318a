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
from counterflow.reasoners.puzzle import PuzzleReasoner, solve_lights_out
from counterflow.reasoners.scene import SceneReasoner
from counterflow.reasoners.unreliable import UnreliableReasoner

SCRIPTED: dict[str, Callable[[], Reasoner]] = {
    "ogbench/cube": CubeReasoner,
    "ogbench/scene": SceneReasoner,
    "ogbench/puzzle": PuzzleReasoner,
}
"""The scripted reasoner of every kind of environment, by the beginning of its name."""


def scripted_reasoner(env: str) -> Reasoner:
    """Return the scripted reasoner for the environment called `env`.

    Raises:
        UnknownNameError: no script knows this environment.
    """
    for prefix, make in SCRIPTED.items():
        if env.startswith(prefix):
            return make()
    raise UnknownNameError("scripted reasoner for environment", env, SCRIPTED)


__all__ = [
    "CONVENTIONS",
    "OGBENCH",
    "PAPER",
    "SCRIPTED",
    "Convention",
    "CubeReasoner",
    "Direction",
    "Expert",
    "OracleExpert",
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
