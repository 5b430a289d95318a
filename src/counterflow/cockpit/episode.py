"""An episode as it is driven: the chunk that is being executed, and what was executed before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from counterflow.cockpit.control import Wish
from counterflow.cockpit.tallies import MIXED, Outcome
from counterflow.experiments.rollout import Decision, decision_from
from counterflow.random import RowGenerators, child_seed
from counterflow.reasoners import Direction
from counterflow.steering import Plan

MOST_FRAMES = 4000  # of an episode's film


@dataclass
class Chunk:
    """A chunk that is being executed.

    Attributes:
        wish: what it was begun for.
        direction: what was said.
        plan: what was decided.
        method: by which it was decided.
        reusable: whether the noise that is kept with it gives it.
        intervened: whether somebody helped a noise policy.
        observation: (O,) what it was decided on.
        actions: (H, A) what is to be executed, environment units.
        base: what the policy would have done by itself: another plan only where somebody helped.
        seen: (O,) each, before every action that was executed so far.
        rewards: of the actions so far.
    """

    wish: Wish
    direction: Direction
    plan: Plan
    method: str
    reusable: bool
    intervened: bool
    observation: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    base: Plan
    seen: list[npt.NDArray[np.float32]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def decision(self) -> Decision:
        """Return it as far as it was executed."""
        rewards = np.asarray(self.rewards, np.float32)
        return decision_from(self.plan, 0, np.stack(self.seen), rewards, intervened=self.intervened, base=self.base)


@dataclass(frozen=True)
class Shot:
    """A frame of the film.

    Attributes:
        jpeg: the picture.
        method: by which the robot was moved; "" where it wasn't.
        direction: what was said, if anything.
        effector: (3,) where the gripper is, metres.
    """

    jpeg: bytes
    method: str
    direction: Direction | None
    effector: npt.NDArray[np.float64]


@dataclass
class Episode:
    """What was driven so far.

    Attributes:
        env: the task.
        seed: what it descends from.
        index: its number in this run.
        decisions: the chunks, as far as each was executed.
        methods: how each was decided; "dsbc" also where somebody helped.
        reusable: of each, whether the noise that is kept with it gives it.
        shots: the film.
        success: whether the task was solved.
        steps: executed actions.
        kept: what became of it when it was over.
        closed: it was left behind.
        noise: what its chunks are drawn from.
    """

    env: str
    seed: int
    index: int
    decisions: list[Decision] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    reusable: list[bool] = field(default_factory=list)
    shots: list[Shot] = field(default_factory=list)
    success: bool = False
    steps: int = 0
    kept: Literal["", "kept", "discarded"] = ""
    closed: bool = False
    noise: RowGenerators = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Begin with what chunks are drawn from."""
        self.noise = self.generators("policy")

    def generators(self, *path: int | str) -> RowGenerators:
        """Return generators, of one row, that descend from the episode's seed."""
        return RowGenerators([child_seed(self.seed, *path)])

    def add(self, chunk: Chunk) -> None:
        """Note a decision, as far as it was executed; of one that nothing was executed of, nothing."""
        if not chunk.rewards:
            return
        self.decisions.append(chunk.decision())
        self.methods.append("dsbc" if chunk.intervened else chunk.method)
        self.reusable.append(chunk.reusable)

    def film(self, jpeg: bytes, chunk: Chunk | None, effector: npt.NDArray[np.float64]) -> None:
        """Add a frame to the film, while there is room."""
        if len(self.shots) < MOST_FRAMES:
            method, direction = ("", None) if chunk is None else (chunk.method, chunk.direction)
            self.shots.append(Shot(jpeg, method, direction, effector))

    @property
    def method(self) -> str:
        """How it was driven, in a word."""
        used = set(self.methods)
        if "dsbc" in used:
            helped = any(one.intervened for one in self.decisions)
            return "dsbc+help" if helped or len(used) > 1 else "dsbc"
        return used.pop() if len(used) == 1 else MIXED

    def outcome(self, *, success: bool) -> Outcome:
        """Return what is counted of it."""
        return Outcome(self.env, self.seed, self.index, self.method, success, self.steps, len(self.decisions))

    def describe(self) -> dict[str, Any]:
        """Return what is shown of it, as plain values."""
        return {
            "index": self.index,
            "step": self.steps,
            "decisions": len(self.decisions),
            "success": self.success,
            "kept": self.kept,
            "method": self.method if self.methods else "",
        }
