"""A scripted expert for LIBERO: from the goal's predicates to pick, place, pull, push and turn, and coarse words of the same.

It looks at the state of everything by name, and chooses of several grasps the one that a past failure does not speak against: the
rim of what is hollow, the thin side of what is not, the handle of a pan. What it does is written as plans, one step at a time,
that look again at every step, so a thing that slips is picked up again.

Source: none; LIBERO (arXiv 2306.03310) has demonstrations by people and no experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from counterflow.checks import COUNT, SHARE
from counterflow.errors import MismatchError
from counterflow.random import check_seed
from counterflow.reasoners.direction import Direction, View
from counterflow.reasoners.libero_goals import Goal, goals_of
from counterflow.reasoners.libero_hand import BASE, DOWN, Action, LiberoHand, Matrix, facing_along, facing_down
from counterflow.reasoners.metaworld import SMOOTHNESS
from counterflow.reasoners.motion import Point, along, still

PREFIX = "libero/"
OPEN, CLOSE = -1.0, 1.0
WIDEST = 0.072  # metres between the open fingers, with a little to spare
HOVER = 0.12  # metres above a thing from where the gripper comes down
CARRY = 0.14  # metres above the place at which a thing is carried
LOST = 0.06  # metres from a handle at which it isn't held any more
LIFTED = 0.03  # metres by which a thing has risen that was taken hold of
HAND_HALF = 0.11  # metres from a hand's middle to its sides, along its fingers' motion
ACROSS = 0.5  # cosine below which fingers move across a direction
LEAN = 0.45  # metres to the side for a metre up, of a hand that leans
FAR = 0.77  # metres from the robot, from where on a hand leans back
GRIPPING_STEPS = 12
LETTING_GO_STEPS = 8
HOLLOW = ("bowl", "mug", "ramekin")
LONG_HANDLED = ("frypan", "pan")
CADDY = "desk_caddy"
OPEN_ENOUGH = 0.15  # metres that a drawer is pulled out; it counts as open from 0.14
MICROWAVE_HANDLE = (0.2375, -0.05, 0.0)
KNOB_ON, KNOB_OFF = 0.7, -0.05  # radians to turn the stove's knob to


@dataclass(frozen=True)
class Grasp:
    """A way to take hold of something.

    Attributes:
        offset: (3,) metres from the thing's origin to where the gripper closes, world frame.
        closing: (2,) the direction in which the fingers close, horizontal, unit length.
    """

    offset: Point
    closing: npt.NDArray[np.float64]


class LiberoExpert(LiberoHand):
    """Solves a task of LIBERO's. One expert serves one episode at a time.

    Args:
        env_name: the task's full name, "libero/90/KITCHEN_SCENE1_put_the_black_bowl_on_the_plate".
        noise: standard deviation of the smooth noise on its motion, in the action's units, 0 to 1.
        stride: how many steps pass between two questions; more than one where it is asked once a chunk.

    Raises:
        InvalidInputError: no such task, or a number is out of range.
        MissingDependencyError: the package is not installed.
    """

    def __init__(self, env_name: str, noise: float = 0.1, stride: int = 1) -> None:
        SHARE.check("the expert's noise", noise)
        COUNT.check("the expert's stride", stride)
        super().__init__(stride)
        self.goals, self._noise = goals_of(env_name), noise
        # An open drawer is in the way of what is beside it and below: it is shut first, unless something is to go in.
        self.goals = tuple(sorted(self.goals, key=lambda goal: not self._shut_first(goal)))
        self._close_by = 0.012 if stride == 1 else 0.03
        self.reset(0)

    def _shut_first(self, goal: Goal) -> bool:
        return goal.predicate == "close" and not any(other.place.startswith(goal.thing) for other in self.goals)

    def reset(self, seed: int) -> None:
        """Begin anew; `seed` feeds the noise and the choice among grasps that are equally good."""
        self._random = np.random.default_rng(check_seed(seed))
        self._drift = np.zeros(3)
        self._plan: Iterator[Action] | None = None
        self._view = {}
        self._ceiling = np.inf

    def wanted(self, view: View) -> Action:
        """Return what it wants to do (7,), without noise and not limited.

        Raises:
            MismatchError: the view is not one of this task's.
        """
        for goal in self.goals:
            missing = [name for name in (goal.thing, goal.place) if name and f"privileged/{name}_pos" not in view]
            if missing and not self._joint_names(view, missing[0]):
                raise MismatchError(
                    f"the view says nothing of {missing[0]}; use the expert of the task that is being run."
                )
        self._view = view
        if self._plan is None:
            self._plan, self._ceiling = self._solve(), float(self._hand[2]) + 0.1
        return next(self._plan)

    def act(self, view: View) -> Action:
        """Return the action (7,) for the next single step, in [-1, 1]."""
        action = np.clip(self.wanted(view), -1.0, 1.0)
        fresh = self._random.normal(size=3) * np.sqrt(1 - SMOOTHNESS**2)
        self._drift = SMOOTHNESS * self._drift + fresh
        action[:3] += self._noise * self._drift
        limited: Action = np.clip(action, -1.0, 1.0)
        return limited

    def _is_region(self, name: str) -> bool:
        return name.endswith(("_region", "_side"))

    # What it does: each of these yields one action at a time.

    def _solve(self) -> Iterator[Action]:
        """Do one goal after another, and again whatever is undone."""
        while True:
            for goal in self.goals:
                for _ in range(3 if goal.predicate == "open" else 1):  # what is to go in has to wait for it
                    if not self._is_done(goal):
                        yield from self._achieve(goal)
            yield from self._wait(OPEN, 5)

    def _is_done(self, goal: Goal) -> bool:
        """Say whether a goal is fulfilled, as far as can be told from where things are."""
        if goal.predicate in ("on", "in"):
            offset = self._at(goal.thing) - self._at(goal.place)
            near = 0.028 if goal.predicate == "on" and not self._is_region(goal.place) else 0.05
            let_go = np.linalg.norm(self._hand - self._at(goal.thing)) > 0.08
            most = 0.03 if CADDY in goal.place else 0.12  # it may have stayed on top of a wall
            return bool(np.abs(offset[:2]).max() < near and offset[2] < most and let_go)
        moved = self._joint(self._moving(goal.thing))
        if "microwave" in goal.thing:
            return moved < -1.35 if goal.predicate == "open" else moved > -0.004
        if goal.predicate == "open":
            return moved < -OPEN_ENOUGH + 0.005
        if goal.predicate == "close":
            return moved > 0.001
        return moved > 0.55 if goal.predicate == "turnon" else moved < -0.001

    def _achieve(self, goal: Goal) -> Iterator[Action]:
        if goal.predicate in ("on", "in"):
            yield from self._bring(goal)
        elif goal.predicate in ("turnon", "turnoff"):
            yield from self._turn_knob(goal)
        elif "microwave" in goal.thing:
            yield from self._swing_door(goal)
        elif goal.predicate == "open":
            yield from self._pull_drawer(goal.thing)
        else:
            yield from self._push_drawer(goal.thing)

    def _bring(self, goal: Goal) -> Iterator[Action]:
        """Pick a thing up and put it down, trying one grasp after another."""
        yield from self._make_room(goal.thing)
        for grasp in self._grasps(goal.thing):
            lying = self._at(goal.thing)[2]
            yield from self._pick(goal.thing, grasp)
            if self._holds(goal.thing) and self._at(goal.thing)[2] > lying + LIFTED:
                yield from self._place(goal, grasp)
            yield from self._rise()
            if self._is_done(goal):
                return

    def _beside_drawer(self, name: str) -> tuple[float, Point] | None:
        """Say how far a thing lies in front of a drawer that is open, or is to be, metres, and where "in front" is.

        None: there is none, or the thing lies above it, or well to the side.
        """
        to_open = [
            self._moving(goal.thing) for goal in self.goals if goal.predicate == "open" and not self._is_done(goal)
        ]
        found: tuple[float, Point] | None = None
        for key in self._view:
            part = key.removeprefix("privileged/").removesuffix("_joint")
            if not key.endswith("_level_joint") or (self._joint(part) > -0.03 and part not in to_open):
                continue
            outwards, sideways = self._turn(part) @ np.array([0.0, -1.0, 0.0]), self._turn(part)[:, 0]
            handle = self._drawer_handle(part)
            if part in to_open:
                handle = handle + max(OPEN_ENOUGH + self._joint(part), 0.0) * outwards
            offset = self._at(name) - handle
            gap = float(offset @ outwards)
            near = abs(float(offset @ sideways)) < 0.17 and -0.1 < gap < 0.2 and offset[2] < 0.0
            if near and (found is None or gap < found[0]):
                found = gap, outwards
        return found

    def _make_room(self, name: str) -> Iterator[Action]:
        """Draw a thing away from a drawer that would keep the hand from it."""
        for _ in range(2):
            beside = self._beside_drawer(name)
            if beside is None:
                return
            gap, outwards = beside
            along_fingers = abs(float(self._grasps(name)[0].closing @ outwards[:2]))
            needed = 0.03 if along_fingers < ACROSS else HAND_HALF + 0.02
            if gap >= needed:
                return
            yield from self._draw(name, outwards, needed - gap + 0.02)

    def _draw(self, name: str, way: Point, distance: float) -> Iterator[Action]:
        """Draw a thing over the table with shut fingers: by its wall from inside if it is hollow, else pressed down."""
        facing = self._beside(name, np.array([-way[1], way[0]]))
        low, high = self._box(name)
        bottom, top = self._heights(name)
        middle = self._turn(name) @ ((low + high) / 2)
        hollow = any(word in name for word in HOLLOW)
        depth = bottom + 0.03 if hollow else top

        def over(height: float) -> Callable[[], Point]:
            return lambda: self._at(name) + np.array([middle[0], middle[1], depth + height])

        yield from self._go(over(HOVER), facing, CLOSE, near=0.02)
        yield from self._go(over(0.0), facing, CLOSE, near=0.012, patience=40)
        before, start = self._at(name), self._hand.copy()
        press = np.array([0.0, 0.0, 0.0 if hollow else -0.05])
        for step in range(self._calls(60)):
            drawn = float((self._at(name) - before) @ way)
            if drawn > distance:
                break
            ahead = min(0.006 * (step + 1) * self._stride, distance + 0.12)
            yield self._towards(start + ahead * way + press, facing, CLOSE)
        yield from self._rise()

    def _grasps(self, name: str) -> list[Grasp]:
        """Return ways to take hold of a thing, the best first."""
        low, high = self._box(name)
        turn, (bottom, top) = self._turn(name), self._heights(name)
        if any(word in name for word in HOLLOW):
            # The rim: fingers inside and outside. Sideways first: there the hand turns least.
            centre = (turn @ ((low + high) / 2))[:2]
            half = float(np.sort(high - low)[1:].min()) / 2 if "bowl" in name else float((high - low)[:2].min()) / 2
            radius = max(half - 0.008, 0.015)
            angles = np.radians([90, -90, 60, -60, 120, -120, 0, 180])
            directions = [np.array([np.cos(angle), np.sin(angle)]) for angle in angles]
            height = top - 0.018
            rim = [Grasp(np.array([*(centre + radius * way), height]), way) for way in directions]
            return self._thin_side_first(name, rim)
        vertical = int(np.abs(turn[2]).argmax())  # which of its own axes stands upright
        lying = [axis for axis in range(3) if axis != vertical]
        lying.sort(key=lambda axis: high[axis] - low[axis])
        middle = turn @ ((low + high) / 2)
        found = []
        long = lying[1]
        shifts = [0.0, 0.02, -0.02]
        if any(word in name for word in LONG_HANDLED):
            # The origin is the pan's, and the handle is where the box reaches farther from it.
            reach = high[long] if high[long] > -low[long] else low[long]
            shifts = [share * reach - (low[long] + high[long]) / 2 for share in (0.65, 0.8, 0.9)]
        for axis in lying if (high - low)[lying[1]] < WIDEST else lying[:1]:
            closing = turn[:2, axis] / max(float(np.linalg.norm(turn[:2, axis])), 1e-6)
            for shift in shifts:
                side = turn[:, long] * shift
                height = max((bottom + top) / 2, top - 0.03)
                found.append(Grasp(np.array([middle[0] + side[0], middle[1] + side[1], height]), closing))
        return self._thin_side_first(name, found)

    def _thin_side_first(self, name: str, grasps: list[Grasp]) -> list[Grasp]:
        """Return grasps in another order beside an open drawer: a hand is wide along its fingers' motion."""
        beside = self._beside_drawer(name)
        if beside is None:
            return grasps
        outwards = beside[1][:2]
        return sorted(grasps, key=lambda grasp: round(abs(float(grasp.closing @ outwards)), 1))

    def _beside(self, name: str, closing: npt.NDArray[np.float64]) -> Matrix:
        """Return the hand's rotation over a thing: downwards; leaning, across its fingers' motion, where that helps.

        Away from an open drawer; and back towards the robot over things that are far, lest the arm is stretched.
        """
        beside, reach = self._beside_drawer(name), self._at(name)[:2] - BASE
        distance = float(np.linalg.norm(reach))
        if beside is not None:
            lean = beside[1]
        elif distance > FAR:
            lean = -np.array([*reach, 0.0]) / distance
        else:
            return facing_down(closing)
        if abs(float(closing @ lean[:2])) > ACROSS:
            return facing_down(closing)
        forward = np.array([0.0, 0.0, -1.0]) - LEAN * lean
        return facing_along(forward, np.cross([closing[0], closing[1], 0.0], forward))

    def _pick(self, name: str, grasp: Grasp) -> Iterator[Action]:
        facing = self._beside(name, grasp.closing)
        above = np.array([0.0, 0.0, HOVER])
        yield from self._go(lambda: self._at(name) + grasp.offset + above, facing, OPEN, near=0.02)
        yield from self._go(lambda: self._at(name) + grasp.offset, facing, OPEN, near=self._close_by, patience=60)
        yield from self._wait(CLOSE, GRIPPING_STEPS)
        start = self._hand.copy()
        yield from self._go(lambda: start + np.array([0.0, 0.0, 0.10]), facing, CLOSE, near=0.03, patience=40)

    def _holds(self, name: str) -> bool:
        """Say whether a thing is in the hand: near it, and the fingers not quite shut."""
        low, high = self._box(name)
        reach = float(np.linalg.norm(high - low)) / 2 + 0.06
        shut = self._view["proprio/gripper_opening"][0] > 0.98
        return bool(np.linalg.norm(self._hand - self._at(name)) < reach and not shut)

    def _put_across(self, goal: Goal, closing: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the direction (2,) of the fingers' motion with which a thing goes in: a book along its compartment's walls."""
        fixture = goal.place.rpartition("_contain_region")[0].rpartition("_")[0]
        if "book" not in goal.thing or f"privileged/{fixture}_quat" not in self._view:
            return closing
        axes = self._turn(fixture)[:2, :2].T
        narrow = any(side in goal.place for side in ("_front_contain", "_back_contain"))
        axis = axes[0] if narrow else max(axes, key=lambda one: abs(float(one @ closing)))
        chosen: npt.NDArray[np.float64] = axis if axis @ closing >= 0 else -axis
        return chosen

    def _place(self, goal: Goal, grasp: Grasp) -> Iterator[Action]:
        facing = facing_down(self._put_across(goal, grasp.closing), near=self._facing())
        bottom, _ = self._heights(goal.thing)
        surface = self._heights(goal.place)[1] if not self._is_region(goal.place) else 0.0
        if any(word in goal.place for word in ("plate", "bowl")):
            surface = min(surface, 0.02)  # inside of the rim
        drop = 0.035 if goal.predicate == "in" else 0.012

        def above(height: float) -> Callable[[], Point]:
            def target() -> Point:
                carried = self._hand - self._at(goal.thing)  # what is held off its middle is put down as much off
                if CADDY in goal.place:  # its compartments are hardly wider than what goes in
                    low, high = self._box(goal.thing)
                    carried[:2] -= (self._turn(goal.thing) @ ((low + high) / 2))[:2]
                place = self._at(goal.place)
                return np.array([*(place + carried)[:2], place[2] + surface - bottom + carried[2] + height])

            return target

        start, held = self._hand.copy(), float(np.linalg.norm(self._hand - self._at(goal.thing)))

        def lost() -> bool:
            return bool(np.linalg.norm(self._hand - self._at(goal.thing)) > held + LOST)

        high_up, near = above(CARRY), 0.012 if self._stride == 1 else 0.03
        yield from self._go(
            lambda: np.array([*start[:2], max(high_up()[2], start[2])]), facing, CLOSE, near=0.03, unless=lost
        )
        over = self._hand[2]  # what it was taken from may be higher than where it goes

        def across() -> Point:
            target = high_up()
            return np.array([*target[:2], max(target[2], over)])

        yield from self._go(across, facing, CLOSE, near=near, patience=120, unless=lost)
        yield from self._go(above(drop), facing, CLOSE, near=near, patience=80, unless=lost)
        yield from self._wait(OPEN, LETTING_GO_STEPS)

    def _rise(self) -> Iterator[Action]:
        up = np.array([*self._hand[:2], max(min(self._hand[2] + 0.12, self._ceiling), self._hand[2])])
        yield from self._go(lambda: up, None, OPEN, near=0.03, patience=40)

    def _pull_drawer(self, thing: str) -> Iterator[Action]:
        """Take a drawer's handle from the front, tilted, and pull it out."""
        for goal in self.goals:
            if goal.predicate in ("on", "in") and not self._is_done(goal):
                yield from self._make_room(goal.thing)
        part = self._moving(thing)
        outwards = self._turn(part) @ np.array([0.0, -1.0, 0.0])
        facing = facing_along(-outwards + np.array([0.0, 0.0, -0.35]), self._turn(part)[:, 0])
        before = 0.10 * facing[:, 2]
        yield from self._go(lambda: self._drawer_handle(part) - before + 0.08 * outwards, facing, OPEN, near=0.03)
        yield from self._go(lambda: self._drawer_handle(part) - before, facing, OPEN, near=0.02)
        yield from self._go(lambda: self._drawer_handle(part), facing, OPEN, near=0.01, patience=60)
        yield from self._wait(CLOSE, GRIPPING_STEPS)
        for _ in range(self._calls(120)):
            if self._joint(part) < -OPEN_ENOUGH or np.linalg.norm(self._hand - self._drawer_handle(part)) > LOST:
                break
            yield self._towards(self._hand + 0.08 * outwards, facing, CLOSE)
        yield from self._wait(OPEN, LETTING_GO_STEPS)
        left = self._hand.copy()
        yield from self._go(lambda: left - before, facing, OPEN, near=0.03, patience=40)
        yield from self._rise()

    def _push_drawer(self, thing: str) -> Iterator[Action]:
        """Push a drawer shut with the closed fingers, in front of its handle."""
        part = self._moving(thing)
        outwards, sideways = self._turn(part) @ np.array([0.0, -1.0, 0.0]), self._turn(part)[:, 0]
        facing = DOWN
        if "_top_level" not in part:  # thin side ahead, and leaning back: handles of other drawers are above
            forward = -0.6 * outwards + np.array([0.0, 0.0, -1.0])
            facing = facing_along(forward, np.cross(sideways, forward))
        up = np.array([0.0, 0.0, 0.22])
        yield from self._go(lambda: self._drawer_handle(part) + 0.09 * outwards + up, facing, CLOSE, near=0.03)
        yield from self._go(lambda: self._drawer_handle(part) + 0.07 * outwards, facing, CLOSE, near=0.03)
        for _ in range(self._calls(160)):
            if self._joint(part) > 0.003:
                break
            yield self._towards(self._drawer_handle(part) - 0.06 * outwards, facing, CLOSE)
        left = self._hand.copy()
        yield from self._go(lambda: left + 0.06 * outwards, facing, CLOSE, near=0.03, patience=30)
        yield from self._rise()

    def _swing_door(self, goal: Goal) -> Iterator[Action]:
        """Push the microwave's door shut, or take its handle and pull it along its arc."""
        part = self._moving(goal.thing)

        def handle(inside: float = 0.0) -> Point:
            offset = np.array(MICROWAVE_HANDLE) + np.array([0.0, inside, 0.0])
            place: Point = self._at(part) + self._turn(part) @ offset
            return place

        front = self._turn(goal.thing) @ np.array([0.0, -1.0, 0.0])
        if goal.predicate == "close":
            yield from self._go(lambda: handle(-0.08) + np.array([0.0, 0.0, 0.2]), DOWN, CLOSE, near=0.03)
            yield from self._go(lambda: handle(-0.08), DOWN, CLOSE, near=0.03)
            for _ in range(self._calls(200)):
                if self._is_done(goal):
                    break
                yield self._towards(handle(0.06), DOWN, CLOSE)
            yield from self._rise()
            return
        facing = facing_along(-front + np.array([0.0, 0.0, -0.6]), np.array([0.0, 0.0, 1.0]))
        yield from self._go(lambda: handle(-0.10) + np.array([0.0, 0.0, 0.05]), facing, OPEN, near=0.03)
        yield from self._go(handle, facing, OPEN, near=0.012, patience=60)
        yield from self._wait(CLOSE, GRIPPING_STEPS)
        for _ in range(self._calls(220)):
            if self._is_done(goal):
                break
            yield self._towards(handle(-0.08), facing, CLOSE)
        yield from self._wait(OPEN, LETTING_GO_STEPS)
        yield from self._rise()

    def _turn_knob(self, goal: Goal) -> Iterator[Action]:
        """Take the stove's knob from above and turn the hand, again and again until it is far enough."""
        part = self._moving(goal.thing)
        sign = 1.0 if goal.predicate == "turnon" else -1.0

        def knob() -> Point:
            low, high = self._box(part)
            place: Point = self._at(part) + self._turn(part) @ ((low + high) / 2) + np.array([0.0, 0.0, 0.005])
            return place

        along_knob = self._turn(part)[:2, 1]
        angle = float(np.arctan2(along_knob[1], along_knob[0]))
        begin = facing_down(np.array([np.cos(angle), np.sin(angle)]))
        yield from self._go(lambda: knob() + np.array([0.0, 0.0, HOVER]), begin, OPEN, near=0.02)
        yield from self._go(knob, begin, OPEN, near=0.01, patience=60)
        yield from self._wait(CLOSE, GRIPPING_STEPS)
        for step in range(self._calls(60)):
            if self._is_done(goal):
                break
            turned = angle + sign * min(1.3, 0.05 * (step + 1) * self._stride)
            facing = facing_down(np.array([np.cos(turned), np.sin(turned)]), near=begin)
            yield self._towards(knob(), facing, CLOSE)
        yield from self._wait(OPEN, LETTING_GO_STEPS)
        yield from self._rise()


class LiberoReasoner:
    """Says of what the expert wants the one axis that matters most, and what the gripper should do.

    Where the hand only has to turn there is nothing that an axis could say, and the policy acts alone.

    Args:
        env_name: the task's full name.
        stride: how many steps pass between two questions: as many as are executed of a chunk.

    Raises:
        InvalidInputError, MissingDependencyError: as for `LiberoExpert`.
    """

    def __init__(self, env_name: str, stride: int = 8) -> None:
        self._expert = LiberoExpert(env_name, noise=0.0, stride=stride)

    def reset(self, seed: int) -> None:
        """Begin a new episode."""
        self._expert.reset(seed)

    def decide(self, view: View) -> Direction:
        """Say the direction for the next chunk."""
        wanted = self._expert.wanted(view)
        gripper = "close" if wanted[6] > 0 else "open"
        farthest, turning = float(np.abs(wanted[:3]).max()), float(np.abs(wanted[3:6]).max())
        if farthest < 0.1:
            return Direction(defer=True) if turning > 0.2 else still(gripper)  # type: ignore[arg-type]
        direction = along(wanted[:3], gripper)  # type: ignore[arg-type]
        return direction if farthest > 0.6 else Direction(direction.axes, 0.5, direction.gripper)
