"""Experts: scripted demonstrators that solve OGBench's single tasks precisely, one action at a time.

An expert chooses the next subgoal as the scripted reasoners do and pursues it with OGBench's own plan oracle for that
object (arXiv 2410.20092; package `ogbench.manipspace.oracles.plan`, with the noise of its play recipe). It sees what a
reasoner sees and holds no simulator, so it serves environments that run in other processes, and it can take over in the
middle of an episode: what is in the gripper it carries on or puts down, and it rises before it plans.

The oracles were made to give varied data, not to succeed. So, unlike there,

- a plan waits for an arm that can't keep up with it, instead of going down before the arm has arrived;
- the gripper turns the shorter way round: the oracles subtract yaws as if they did not wrap;
- a plan whose cube has slipped away is given up at once, and what has failed is tried again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from counterflow.checks import SHARE
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.random import check_seed
from counterflow.reasoners.cubes import CUBE_SIZE, FREE_SPOTS, REACHED, next_cube
from counterflow.reasoners.direction import View
from counterflow.reasoners.libero_expert import LiberoExpert
from counterflow.reasoners.metaworld import MetaWorldExpert
from counterflow.reasoners.motion import Point
from counterflow.reasoners.puzzle import GRIDS, solve_lights_out
from counterflow.reasoners.scene import next_subgoal

What = Literal["cube", "carry", "button", "drawer", "window"]
Action = npt.NDArray[np.float64]

KINDS = ("cube", "scene", "puzzle")  # how the names of the families with an expert begin
OPEN = 0.3  # a gripper less closed than this holds nothing
GRASPED = 0.03  # a cube this near to a gripper that touches something is in it, metres
LOST = 0.05  # a cube farther than this from the gripper that carries it is not in it, metres
MOVED = 0.03  # a cube this far from where it was when its plan was made needs a new one, metres
PATIENCE = 25  # steps that a plan waits for the arm at a stretch: the length of the table takes 14 at full speed
PREPARATION = 40  # steps after which letting go and rising are not waited for any longer
WOUND_UP = (
    4.7  # radians that the wrist may be turned at a plan's beginning; a quarter turn more reaches the joint's end
)
WRIST = 5  # which of the arm's joints turns the gripper
SPOT_IN_SCENE = np.array([0.375, 0.055, 0.02])  # the middle of where OGBench lays the scene's cube, metres


class Expert(Protocol):
    """Somebody who can solve a task alone. One expert serves one episode at a time."""

    def reset(self, seed: int) -> None:
        """Begin anew: with an episode, and whenever somebody else has acted since; `seed` feeds whatever is random."""
        ...

    def act(self, view: View) -> Action:
        """Return the action (A,) for the next single step, environment units, given the simulator's account of now."""
        ...


@dataclass(frozen=True)
class Pursuit:
    """What is being done, in the oracles' terms.

    Attributes:
        what: which oracle does it; "carry" brings a cube to its place that is in the gripper already.
        told: what the oracle is told beside the view, under the names of OGBench's data collection.
        cube: which cube it is about, if it is about one.
    """

    what: What
    told: Mapping[str, Any]
    cube: int | None = None


class StandIn:
    """What the oracles ask of an environment, without its simulator.

    Args:
        env: an environment of OGBench; its constants are copied.
    """

    def __init__(self, env: Any) -> None:
        self._class = type(env)
        self._control_timestep: float = env._control_timestep
        self._arm_sampling_bounds: npt.NDArray[np.float64] = env._arm_sampling_bounds.copy()
        self._workspace_bounds: npt.NDArray[np.float64] = env._workspace_bounds.copy()
        self.action_low: Action = env.action_low.copy()
        self.action_high: Action = env.action_high.copy()

    @property
    def unwrapped(self) -> StandIn:
        """Itself."""
        return self

    def normalize_action(self, action: Action) -> Action:
        """Turn x, y, z (metres), yaw (radians) and gripper (5,) into an action in [-1, 1]; the yaw the shorter way round."""
        turned = np.array(action)
        turned[3] = (turned[3] + np.pi) % (2 * np.pi) - np.pi
        normalised: Action = self._class.normalize_action(self, turned)
        return normalised


@cache
def stand_in(family: str) -> StandIn:
    """Return the constants of a family ("cube-single"), read from the installed package; takes a second the first time.

    Raises:
        UnknownNameError: the package has no such family, or there is no expert for it.
    """
    import gymnasium
    import ogbench.manipspace  # noqa: F401  # registers the environments
    from gymnasium.envs.registration import load_env_creator

    known = [name.removesuffix("-v0") for name in gymnasium.registry if name.startswith(KINDS) and "task" not in name]
    if family not in known:
        raise UnknownNameError("family of environments with an expert", family, known)
    spec = gymnasium.spec(f"{family}-v0")
    assert isinstance(spec.entry_point, str)
    return StandIn(load_env_creator(spec.entry_point)(**spec.kwargs))


def oracle_expert(env_name: str, noise: float = 0.1, *, noise_smoothing: float = 0.5) -> Expert:
    """Return the expert for an environment or a family.

    Make the environment first, or call `counterflow.envs.rendering.prepare_backend`, if this process is to draw: the
    oracles import mujoco, which chooses its way to draw as it is imported.

    Args:
        env_name: for example "ogbench/cube-single-task1".
        noise: scale of the noise on the plans, 0 to 1; 0.1 is that of OGBench's play data. Of Meta-World's and
            LIBERO's experts: on their actions.
        noise_smoothing: standard deviation, in steps, of the Gaussian that smooths it (OGBench only).

    Raises:
        UnknownNameError: there is no expert for this environment.
        MissingDependencyError: the environment's package is not installed.
        InvalidInputError: a number is out of range.
    """
    benchmark, _, rest = env_name.partition("/")
    family = rest.rsplit("-task", 1)[0]
    if benchmark == "metaworld":
        return MetaWorldExpert(env_name, noise)
    if benchmark == "libero":
        return LiberoExpert(env_name, noise)
    if benchmark != "ogbench" or not family.startswith(KINDS):
        raise UnknownNameError(
            "expert for environment",
            env_name,
            [*(f"ogbench/{kind}" for kind in KINDS), "metaworld/push-v3", "libero/90/..."],
        )
    return OracleExpert(family, noise, noise_smoothing)


class OracleExpert:
    """Solves cube, scene and puzzle tasks with OGBench's plan oracles.

    Args:
        family: for example "cube-single".
        noise: scale of the noise on the plans.
        noise_smoothing: standard deviation, in steps, of the Gaussian that smooths it.

    Raises:
        UnknownNameError: the installed package has no such family.
        InvalidInputError: a number is out of range.
    """

    def __init__(self, family: str, noise: float = 0.1, noise_smoothing: float = 0.5) -> None:
        SHARE.check("the expert's noise", noise)
        if not (np.isfinite(noise_smoothing) and 0 < noise_smoothing <= 10):
            raise InvalidInputError(
                f"the expert's noise_smoothing is {noise_smoothing!r}; expected more than 0 and at most 10 steps."
            )
        self._env = stand_in(family)
        self._kind = family.split("-")[0]
        self._oracles = _make_oracles(self._env, self._kind, noise, noise_smoothing)
        self._closed = self._kind == "puzzle"  # there the gripper stays closed, as in OGBench's data
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forget every plan; begin with what the next view shows, whatever state that is."""
        self._random = np.random.RandomState(check_seed(seed)).get_state()
        self._pursuit: Pursuit | None = None
        self._preparing = 0

    def act(self, view: View) -> Action:
        """Return the next action (5,) in [-1, 1].

        Args:
            view: the simulator's account, `Batch.view(row)` of the environment that the expert is for.
        """
        if self._pursuit is not None and (self._oracles[self._pursuit.what].done or self._lost(self._pursuit, view)):
            self._pursuit = None
        if self._pursuit is None:
            chosen = self._choose(view)
            preparation = None if chosen is not None and chosen.what == "carry" else self._prepare(view)
            if chosen is None or (preparation is not None and self._preparing < PREPARATION):
                self._preparing += 1
                return self._move(view) if preparation is None else preparation
            self._begin(chosen, view)
        return self._follow(view)

    def _choose(self, view: View) -> Pursuit | None:
        """Choose what to do next; None when all is done."""
        if self._kind == "puzzle":
            difference = (view["privileged/button_states"] != view["goal/button_states"]).astype(np.int64)
            presses = np.flatnonzero(solve_lights_out(difference, *GRIDS[len(difference)]))
            effector = view["proprio/effector_pos"]
            ways = [np.linalg.norm((view[f"privileged/button_{press}_top_pos"] - effector)[:2]) for press in presses]
            return _press(view, int(presses[np.argmin(ways)])) if ways else None
        cubes, goals = _positions(view, "privileged"), _positions(view, "goal")
        held = _held(view, cubes)
        if self._kind == "cube":
            target = next_cube(cubes, goals)
            if held is not None and (target is None or target[0] != held):
                target = (held, _free_spot(cubes, goals)) if _in_the_air(cubes[held], goals[held]) else target
            return None if target is None else _bring(view, *target, held)
        subgoal = next_subgoal(view)
        if subgoal.what == "cube":
            return _bring(view, 0, subgoal.place, held)
        if held is not None and _in_the_air(cubes[held], goals[held]):
            return _bring(view, held, SPOT_IN_SCENE, held)
        if subgoal.what == "button":
            return _press(view, subgoal.button)
        if subgoal.what == "done":
            return None
        return Pursuit(subgoal.what, {f"privileged/target_{subgoal.what}_handle_pos": subgoal.place})

    def _prepare(self, view: View) -> Action | None:
        """Let go of what is in the gripper, then rise, then unwind the wrist; None when that is done."""
        if not self._closed and view["proprio/gripper_opening"][0] > OPEN:  # 0 is open, 1 is closed
            return self._move(view)
        height, lowest = view["proprio/effector_pos"][2], self._env._arm_sampling_bounds[0, 2]
        if height < lowest - 0.02:
            return self._move(view, up=lowest - height + 0.02)
        wrist = view["proprio/joint_pos"][WRIST]
        return self._move(view, turn=float(np.sign(wrist))) if abs(wrist) > WOUND_UP else None

    def _move(self, view: View, up: float = 0.0, turn: float = 0.0) -> Action:
        """Return the action that goes up (metres) and turns (radians) on the spot, gripper open (closed in puzzles)."""
        gripper = float(self._closed) - view["proprio/gripper_opening"][0]
        return self._env.normalize_action(np.array([0.0, 0.0, up, turn, gripper]))

    def _begin(self, pursuit: Pursuit, view: View) -> None:
        self._pursuit, self._preparing, self._step, self._waited = pursuit, 0, 0, 0
        self._start = view
        with self._own_random_numbers():
            self._oracles[pursuit.what].reset(None, self._info(pursuit, view))

    def _follow(self, view: View) -> Action:
        """Take the plan's next step, or the same again while the arm is too far behind it to keep up."""
        assert self._pursuit is not None
        action: Action = self._oracles[self._pursuit.what].select_action(None, self._info(self._pursuit, view))
        if np.abs(action[:3]).max() < 1 or self._waited == PATIENCE:
            self._step, self._waited = self._step + 1, 0
        else:
            self._waited += 1
        return action

    def _info(self, pursuit: Pursuit, view: View) -> dict[str, Any]:
        return {**view, **pursuit.told, "time": np.array([self._step * self._env._control_timestep])}

    def _lost(self, pursuit: Pursuit, view: View) -> bool:
        """Say whether the plan is about a cube that is no longer where the plan takes it to be."""
        if pursuit.cube is None:
            return False
        name = f"privileged/block_{pursuit.cube}_pos"
        time, times = self._step * self._env._control_timestep, self._oracles[pursuit.what].times
        if time < times.get("pick_start", 0.0):
            return bool(np.linalg.norm(view[name] - self._start[name]) > MOVED)
        carrying = times.get("pick_end", 0.0) < time < times["place_start"]
        return carrying and bool(np.linalg.norm(view[name] - view["proprio/effector_pos"]) > LOST)

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Let the oracles, which draw from numpy's global generator, draw this expert's own numbers."""
        before = np.random.get_state()
        np.random.set_state(self._random)
        try:
            yield
        finally:
            self._random = np.random.get_state()
            np.random.set_state(before)


def _make_oracles(env: StandIn, kind: str, noise: float, noise_smoothing: float) -> dict[str, Any]:
    """Return the oracle of everything that may be pursued in this kind of environment."""
    from ogbench.manipspace.lie import SE3
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    class CubeOracle(CubePlanOracle):  # type: ignore[misc]
        """OGBench's, with keyframes that the arm can reach, and remembering when they are (`times`, seconds)."""

        times: Mapping[str, float]

        def compute_keyframes(self, plan_input: Any) -> tuple[dict[str, float], dict[str, Any], dict[str, float]]:
            times, poses, grasps = super().compute_keyframes(plan_input)
            low, high = env._workspace_bounds
            for name in times:
                # Of a plan that begins low the oracle would have the middle low, too.
                floor = np.array([*low[:2], env._arm_sampling_bounds[0, 2] if name == "clearance" else low[2]])
                if name != "initial":
                    poses[name] = SE3.from_rotation_and_translation(
                        rotation=poses[name].rotation(), translation=np.clip(poses[name].translation(), floor, high)
                    )
            self.times = times
            return times, poses, grasps

    class CarryOracle(CubeOracle):
        """The rest of the plan, for a cube that is in the gripper already."""

        def compute_keyframes(self, plan_input: Any) -> tuple[dict[str, float], dict[str, Any], dict[str, float]]:
            times, poses, grasps = super().compute_keyframes(plan_input)
            names = ["initial", *list(times)[list(times).index("postpick") :]]
            earlier = times["postpick"] - self._dt
            self.times = {name: times[name] - (earlier if name != "initial" else 0.0) for name in names}
            # OGBench makes its plan of what it is given, in this order.
            return (
                dict(self.times),
                {name: poses[name] for name in names},
                {name: grasps[name] if name != "initial" else 1.0 for name in names},
            )

    play: dict[str, Any] = {"env": env, "noise": noise, "noise_smoothing": noise_smoothing}
    if kind == "puzzle":
        return {"button": ButtonPlanOracle(**play, gripper_always_closed=True)}
    oracles: dict[str, Any] = {"cube": CubeOracle(**play), "carry": CarryOracle(**play)}
    if kind == "scene":
        oracles |= {
            "button": ButtonPlanOracle(**play),
            "drawer": DrawerPlanOracle(**play),
            "window": WindowPlanOracle(**play),
        }
    return oracles


def _press(view: View, button: int) -> Pursuit:
    return Pursuit("button", {"privileged/target_button_top_pos": view[f"privileged/button_{button}_top_pos"]})


def _bring(view: View, cube: int, place: Point, held: int | None) -> Pursuit:
    """Bring a cube to `place` (3,), by picking it up or, if it is `held`, from where it is."""
    # The plans are of the gripper: a cube that is held off its centre is let go as much off the place.
    offset = view["proprio/effector_pos"] - view[f"privileged/block_{cube}_pos"] if cube == held else np.zeros(3)
    told = {
        "privileged/target_block": cube,
        "privileged/target_block_pos": place + offset,
        # Where a cube lies is all that counts: its own yaw spares a turn.
        "privileged/target_block_yaw": view[f"privileged/block_{cube}_yaw"],
    }
    return Pursuit("carry" if cube == held else "cube", told, cube)


def _positions(view: View, whose: Literal["privileged", "goal"]) -> npt.NDArray[np.float64]:
    """Return where the cubes are, or should be: (N, 3) metres."""
    count = sum(name.startswith("goal/block_") for name in view)
    return np.stack([view[f"{whose}/block_{cube}_pos"] for cube in range(count)])


def _held(view: View, cubes: npt.NDArray[np.float64]) -> int | None:
    """Say which of the cubes (N, 3) is in the gripper."""
    distances = np.linalg.norm(cubes - view["proprio/effector_pos"], axis=1)
    gripping = view["proprio/gripper_contact"][0] > 0.3 and view["proprio/gripper_opening"][0] > OPEN
    return int(distances.argmin()) if gripping and distances.min() < GRASPED else None


def _in_the_air(cube: Point, goal: Point) -> bool:
    """Say whether a held cube would fall if it were let go of, as far as can be told from where it is."""
    return bool(cube[2] > CUBE_SIZE and np.linalg.norm(cube - goal) > REACHED)


def _free_spot(cubes: npt.NDArray[np.float64], goals: npt.NDArray[np.float64]) -> Point:
    """Return the spot on the table that is farthest from every cube and goal (N, 3)."""
    taken = np.concatenate([cubes, goals])[:, None, :2]
    return np.asarray(FREE_SPOTS[np.linalg.norm(taken - FREE_SPOTS[None, :, :2], axis=-1).min(axis=0).argmax()])
