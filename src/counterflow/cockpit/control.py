"""Whether the robot may move now, and where to: decided here, from what a page or a terminal reports.

A page reports which keys are held, again and again while any is; it decides nothing. Motion goes on only while the reports say
so and are fresh: letting go stops it (the dead man's handle), and so do a page that went away, a tab that fell asleep and a
network that hangs (the reports grow stale). Time is handed in, so nothing here looks at a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from counterflow.checks import Range, check_name
from counterflow.reasoners import Direction
from counterflow.reasoners.direction import GripperCommand
from counterflow.reasoners.words import Axes

Way = Literal["left", "right", "away", "nearer", "up", "down", "policy"]
"""What can be held: six directions as seen through the camera, and "let the policy decide"."""

LESS = 0.5  # what the paper calls "less"


@dataclass(frozen=True)
class Wish:
    """What somebody wants now.

    Attributes:
        kind: "hold": as long as the same keys are held; "tap": one whole chunk; "pilot": whoever was handed over to.
        direction: what is said; None for a pilot, who is yet to be asked.
        held: the keys that were held.
        sequence: number of the report that it came from.
    """

    kind: Literal["hold", "tap", "pilot"]
    direction: Direction | None
    held: frozenset[str] = frozenset()
    sequence: int = 0


@dataclass
class Control:
    """The driver's hands, as far as they are known.

    Args:
        ways: which world axis each direction is.
        stale_after: seconds after which a report no longer counts.
        gripper: the command that goes with every direction.

    Raises:
        InvalidInputError: the time-out is out of range.
    """

    ways: Mapping[str, Axes]
    stale_after: float = 0.6
    gripper: GripperCommand = "open"
    pilot: bool = False
    _held: frozenset[str] = field(default=frozenset(), init=False)
    _pressed: frozenset[str] = field(default=frozenset(), init=False)
    _tap: Direction | None = field(default=None, init=False)
    _less: bool = field(default=False, init=False)
    _reported: float = field(default=float("-inf"), init=False)
    _sequence: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Check the time-out."""
        Range(0.05, 60, unit="seconds").check("stale_after", self.stale_after)

    def report(self, held: Iterable[str], now: float, *, less: bool = False, sequence: int = 0) -> None:
        """Take in which keys are held now. A key that was let go before it could be acted on still counts once.

        Raises:
            UnknownNameError: there is no such direction; nothing is taken in.
        """
        keys = frozenset(_check_ways(held))
        self._pressed |= keys - self._held
        self._held, self._less, self._reported = keys, less, now
        self._sequence = max(self._sequence, sequence)

    def tap(self, held: Iterable[str], now: float, *, less: bool = False, sequence: int = 0) -> None:
        """Ask for one whole chunk. Taps are not queued: a new one takes the place of one that was not begun.

        Raises:
            UnknownNameError: there is no such direction.
        """
        self._tap = self._direction(frozenset(_check_ways(held)), less)
        self._reported = now
        self._sequence = max(self._sequence, sequence)

    def grip(self, command: str, now: float, *, sequence: int = 0) -> None:
        """Set what the gripper is told from now on; opening and closing ask for a chunk in which to do it.

        Raises:
            UnknownNameError: there is no such command.
        """
        check_name("gripper command", command, GripperCommand)
        self.gripper = command  # type: ignore[assignment]  # just checked
        self._reported = now
        self._sequence = max(self._sequence, sequence)
        if command in ("open", "close") and not self._held and not self.pilot:
            self._tap = Direction(gripper=self.gripper)

    def let_go(self) -> None:
        """Forget everything that is held or asked for: somebody paused, or the driver has gone."""
        self._held = self._pressed = frozenset()
        self._tap, self._reported = None, float("-inf")

    def is_fresh(self, now: float) -> bool:
        """Whether the last report still counts."""
        return now - self._reported <= self.stale_after

    def wish(self, now: float) -> Wish | None:
        """Return what is wanted now and take it as begun; None: stand still."""
        if not self.is_fresh(now):
            self._pressed, self._tap = frozenset(), None
            return None
        if self._tap is not None:
            tap, self._tap = self._tap, None
            return Wish("tap", tap, sequence=self._sequence)
        wanted, self._pressed = self._held or self._pressed, frozenset()
        direction = self._direction(wanted, self._less)
        if direction is not None:
            return Wish("hold", direction, wanted, self._sequence)
        return Wish("pilot", None, sequence=self._sequence) if self.pilot else None

    def goes_on(self, wish: Wish, now: float) -> bool:
        """Whether a chunk that was begun for a wish is still wanted."""
        if not self.is_fresh(now):
            return False
        if wish.kind == "tap":
            return True
        if wish.kind == "pilot":
            return self.pilot and not self._held and self._tap is None
        return self._tap is None and self._held == wish.held

    def _direction(self, held: frozenset[str], less: bool) -> Direction | None:
        """Return what a set of keys says; None where it says nothing (or opposites)."""
        if "policy" in held:
            return Direction(defer=True)
        total = np.clip(np.sum([self.ways[way] for way in held], axis=0) if held else np.zeros(3), -1, 1).astype(int)
        if not total.any():
            return None
        x, y, z = total.tolist()
        return Direction((x, y, z), LESS if less else 1.0, self.gripper)


def _check_ways(held: Iterable[str]) -> Iterable[str]:
    held = list(held)
    for way in held:
        check_name("direction", way, Way)
    return held
