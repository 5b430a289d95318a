"""Who drives while no key is held: the policy, a reasoner, or nobody.

A reasoner that looks at pictures may take seconds. It is asked beside the driving, its answer is taken in when it is there, and
whoever drives is heard meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from counterflow.cockpit.background import Background
from counterflow.cockpit.simulator import Simulator
from counterflow.errors import UnknownNameError
from counterflow.random import child_seed
from counterflow.reasoners import Direction, Reasoner, scripted_reasoner

MakeReasoner = Callable[[str], Reasoner]

MOST_ABANDONED = 3  # questions that nobody waits for any more and that aren't answered yet; beyond it none is asked


class Pilots:
    """Who can be handed over to, and who was.

    Args:
        makers: by name, besides "script" and "policy": functions that make a reasoner, given the task's name.
        questions: where one that may take seconds is asked.

    Attributes:
        name: who drives; None: nobody.
    """

    def __init__(self, makers: Mapping[str, MakeReasoner], questions: Background) -> None:
        self.makers: dict[str, MakeReasoner] = {"script": scripted_reasoner, **makers}
        self.name: str | None = None
        self.questions = questions
        self.reasoner: Reasoner | None = None
        self.question: tuple[Future[Direction], int] | None = None  # what it is asked, and at which step it was
        self.abandoned: list[Future[Direction]] = []

    @property
    def names(self) -> list[str]:
        """Who there is."""
        return ["policy", *self.makers]

    def hand_over(self, name: str, env: str, seed: int) -> None:
        """Let somebody drive, or nobody ("").

        Args:
            name: who.
            env: the task.
            seed: of the episode.

        Raises:
            UnknownNameError: nobody of that name; MissingDependencyError and others: who was meant can't come; nothing has
                changed.
        """
        if name and name not in self.names:
            raise UnknownNameError("pilot", name, self.names)
        reasoner = self.makers[name](env) if name in self.makers else None
        self._abandon_question()
        self.reasoner, self.name = reasoner, name or None
        self._reset(seed)

    def begin(self, env: str, seed: int) -> None:
        """Turn to a new episode: what was asked in the last one is nobody's."""
        if self.question is not None:
            self._abandon_question()
            if self.name in self.makers:  # the one that is thinking goes on doing so, and nobody listens
                self.reasoner = self.makers[self.name](env)
        self._reset(seed)

    def ask(self, simulator: Simulator, step: int) -> Direction | None:
        """Return what the pilot says at a step, or None while one that looks at pictures, and may take seconds, is thinking.

        Raises:
            CounterflowError: of the reasoner.
        """
        reasoner = self.reasoner
        if reasoner is None:
            return Direction(defer=True)
        if not getattr(reasoner, "looks", False):
            return reasoner.decide(simulator.shown_to(reasoner))
        if self.question is not None and self.question[0].done():
            (answer, asked_at), self.question = self.question, None
            if asked_at == step:
                return answer.result()
            answer.exception()  # the robot has moved since it was asked: whatever it was, it is nobody's
        if self.question is None:
            self.abandoned = [one for one in self.abandoned if not one.done()]
            if len(self.abandoned) >= MOST_ABANDONED:
                return None  # an endpoint that hangs is not asked ever more often
            self.question = (self.questions.submit(reasoner.decide, simulator.shown_to(reasoner)), step)
            if self.question[0].done():
                return self.ask(simulator, step)
        return None

    def describe(self) -> dict[str, Any]:
        """Return who there is and who drives, as plain values."""
        return {"pilot": self.name or "", "pilots": self.names, "thinking": self.question is not None}

    def _reset(self, seed: int) -> None:
        if self.reasoner is not None:
            self.reasoner.reset(child_seed(seed, "reasoner"))

    def _abandon_question(self) -> None:
        """Wait no longer for the pilot's answer. What it was asked goes on until it times out, in its own thread."""
        if self.question is not None and not self.question[0].cancel():
            self.abandoned.append(self.question[0])
        self.question = None
