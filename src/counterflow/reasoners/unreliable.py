"""A reasoner that says less on purpose: wrong now and then, late, or nothing of the gripper. For studying robustness."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from counterflow.checks import SHARE, Range, check_name
from counterflow.random import child_seed
from counterflow.reasoners.direction import Direction, GripperCommand, Reasoner, View

SINGLE_AXES = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))


class UnreliableReasoner:
    """Wraps a reasoner: with probability `error` its axis is replaced by a wrong one, and it speaks `delay` chunks late.

    Args:
        reasoner: the one to make worse.
        error: probability, chunk by chunk, of naming another of the six single axes (uniform among the wrong ones). The
            gripper command stays.
        delay: how many chunks pass before what it says is acted on; until then it defers.

    Raises:
        InvalidInputError: a setting is out of range.
    """

    def __init__(self, reasoner: Reasoner, error: float = 0.0, delay: int = 0) -> None:
        SHARE.check("reasoner error", error)
        Range(0, 1000, integer=True).check("reasoner delay", delay)
        self._reasoner, self._error, self._delay = reasoner, error, delay
        self.looks = bool(getattr(reasoner, "looks", False))
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin a new episode; which chunks go wrong depends on `seed` alone."""
        self._reasoner.reset(seed)
        self._random = np.random.default_rng(child_seed(seed, "unreliable"))
        self._said = deque([Direction(defer=True)] * self._delay)

    def decide(self, view: View) -> Direction:
        """Say what the wrapped reasoner says, wrong or late."""
        self._said.append(self._reasoner.decide(view))
        direction = self._said.popleft()
        # Drawn at every chunk, so that raising the probability only adds mistakes.
        draw, choice = self._random.random(), self._random.random()
        if draw >= self._error or direction.defer:
            return direction
        wrong = [axes for axes in SINGLE_AXES if axes != direction.axes]
        return replace(direction, axes=wrong[int(choice * len(wrong))])


class OverruledGripper:
    """Wraps a reasoner: whatever it says of the gripper, `command` is said instead.

    "hold" is the FRS paper's reference (arXiv 2606.13675): raw zero in the gripper's dimension, of which a reversal leaves what
    the policy makes of it, and direct execution nothing that grasps. "policy" draws its noise afresh.

    Args:
        reasoner: the one to overrule.
        command: what is said of the gripper.

    Raises:
        UnknownNameError: no such command.
    """

    def __init__(self, reasoner: Reasoner, command: GripperCommand) -> None:
        check_name("gripper command", command, GripperCommand)
        self._reasoner, self._command = reasoner, command
        self.looks = bool(getattr(reasoner, "looks", False))

    def reset(self, seed: int) -> None:
        """Begin a new episode."""
        self._reasoner.reset(seed)

    def decide(self, view: View) -> Direction:
        """Say what the wrapped reasoner says of the direction."""
        return replace(self._reasoner.decide(view), gripper=self._command)
