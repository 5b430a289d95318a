"""What a LIBERO task asks for: the goal of its problem file, read from the installed package without importing it.

Source: LIBERO (arXiv 2306.03310); problems are written in BDDL, whose goals here are conjunctions of a few predicates.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from counterflow.errors import InvalidInputError, MissingDependencyError

PREDICATES = ("on", "in", "open", "close", "turnon", "turnoff")
# What has to be done before what: a drawer is opened before something is put in it, and closed after.
ORDER = {"turnoff": 0, "turnon": 1, "open": 2, "in": 3, "on": 3, "close": 5}


@dataclass(frozen=True)
class Goal:
    """One thing that has to be so at the end.

    Attributes:
        predicate: "on", "in", "open", "close", "turnon" or "turnoff".
        thing: what it is said of: an object, a fixture, or a fixture's region.
        place: on or in what, for "on" and "in"; else "".
    """

    predicate: str
    thing: str
    place: str = ""


@cache
def goals_of(env_name: str) -> tuple[Goal, ...]:
    """Return a task's goals, in an order in which nothing that is done has to be undone.

    Args:
        env_name: full name, "libero/90/KITCHEN_SCENE1_put_the_black_bowl_on_the_plate".

    Raises:
        InvalidInputError: not the name of a task, or its goal is of another kind.
        MissingDependencyError: the package is not installed.
    """
    parts = env_name.split("/")
    found = importlib.util.find_spec("libero")
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(
            "LIBERO's tasks are described in its package, which is not installed: pip install 'counterflow[libero]'"
        )
    file = Path(next(iter(found.submodule_search_locations))) / "libero" / "bddl_files"
    file = file / f"libero_{parts[1]}" / f"{parts[2]}.bddl" if len(parts) == 3 else file
    if parts[0] != "libero" or not file.is_file():
        raise InvalidInputError(f"{env_name!r} is no task of LIBERO's; expected 'libero/<suite>/<task>'.")
    return parse_goals(file.read_text())


def parse_goals(problem: str) -> tuple[Goal, ...]:
    """Return the goals of a problem in BDDL, ordered.

    Raises:
        InvalidInputError: it has none, or a predicate that isn't known.
    """
    start = problem.lower().find("(:goal")
    told = re.findall(r"\(\s*(\w+)((?:\s+\w+)+)\s*\)", problem[start:]) if start >= 0 else []
    goals = []
    for predicate, rest in told:
        words = rest.split()
        name = predicate.lower()
        if name not in PREDICATES or len(words) not in (1, 2):
            raise InvalidInputError(
                f"the goal '({predicate}{rest})' is of a kind that isn't known; expected {', '.join(PREDICATES)}."
            )
        goals.append(Goal(name, words[0], words[1] if len(words) == 2 else ""))
    if not goals:
        raise InvalidInputError("the problem has no goal; expected '(:goal (And (On thing place)))' or the like.")
    # Of two things to be put somewhere, the one that the other is put on comes first.
    supports = {goal.place for goal in goals}
    return tuple(sorted(goals, key=lambda goal: (ORDER[goal.predicate], goal.thing not in supports)))
