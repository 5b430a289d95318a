"""Meta-World's fifty scripted experts, as demonstrators and, said coarsely, as reasoners.

Source: package `metaworld.policies` (arXiv 1910.10897). An expert there is a function of the observation alone, so it can take
over at any moment, and what it would do next is a direction: the axis along which it wants to go farthest, and whether its
gripper pushes shut or open.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from counterflow.checks import SHARE
from counterflow.errors import MismatchError, MissingDependencyError, UnknownNameError
from counterflow.random import check_seed
from counterflow.reasoners.direction import Direction, View
from counterflow.reasoners.motion import along, still

PREFIX = "metaworld/"
SMOOTHNESS = 0.8  # how much of a step's noise is left in the next
# In the experts' own units, ten to twenty-five times the metres that are left: nearer than this they have arrived, ...
ARRIVED = 0.08
NEAR = 0.5  # ... and nearer than this a whole chunk of full size would carry the hand too far.
PUSHING = 0.05  # effort of the gripper above which it counts as told to move


class MetaWorldExpert:
    """The package's expert for one task, with smooth noise on its motion.

    Args:
        env_name: the task's full name, "metaworld/push-v3".
        noise: standard deviation of the noise on x, y and z, in the action's units, 0 to 1; 0.1 is a millimetre.

    Raises:
        UnknownNameError: there is no such task.
        InvalidInputError: the noise is out of range.
        MissingDependencyError: the package is not installed.
    """

    def __init__(self, env_name: str, noise: float = 0.1) -> None:
        SHARE.check("the expert's noise", noise)
        self._policy, self._noise = _policy(env_name), noise
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin anew; `seed` feeds the noise."""
        self._random = np.random.default_rng(check_seed(seed))
        self._drift = np.zeros(3)

    def wanted(self, view: View) -> npt.NDArray[np.float64]:
        """Return what the expert wants to do (4,): x, y, z (not limited) and the gripper's effort, without noise.

        Raises:
            MismatchError: the view is not one of Meta-World's.
        """
        if "privileged/state" not in view:
            raise MismatchError(
                f"Meta-World's experts look at 'privileged/state'; there are {', '.join(sorted(view))}. Use the expert of the "
                "environment that is being run."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its motion will be limited is known
            action: npt.NDArray[np.float64] = np.asarray(
                self._policy.get_action(view["privileged/state"]), dtype=np.float64
            )
        return action

    def act(self, view: View) -> npt.NDArray[np.float64]:
        """Return the action (4,) for the next single step, in [-1, 1]."""
        action = np.clip(self.wanted(view), -1.0, 1.0)
        # Of constant variance whatever the smoothness.
        fresh = self._random.normal(size=3) * np.sqrt(1 - SMOOTHNESS**2)
        self._drift = SMOOTHNESS * self._drift + fresh
        action[:3] += self._noise * self._drift
        limited: npt.NDArray[np.float64] = np.clip(action, -1.0, 1.0)
        return limited


class MetaWorldReasoner:
    """Says of what the task's expert wants the one axis that matters most, and what the gripper should do.

    Args:
        env_name: the task's full name, "metaworld/push-v3".

    Raises:
        UnknownNameError, MissingDependencyError: as for `MetaWorldExpert`.
    """

    def __init__(self, env_name: str) -> None:
        self._expert = MetaWorldExpert(env_name, noise=0.0)

    def reset(self, seed: int) -> None:
        """Begin a new episode."""
        self._expert.reset(seed)

    def decide(self, view: View) -> Direction:
        """Say the direction for the next chunk."""
        return coarse(self._expert.wanted(view))


def coarse(wanted: npt.NDArray[np.float64]) -> Direction:
    """Reduce what an expert wants, (4,), to one axis and a gripper command."""
    effort = float(wanted[3])
    gripper = "close" if effort > PUSHING else "open" if effort < -PUSHING else "hold"
    farthest = float(np.abs(wanted[:3]).max())
    if farthest < ARRIVED:
        return still(gripper)  # type: ignore[arg-type]
    direction = along(wanted[:3], gripper)  # type: ignore[arg-type]
    return direction if farthest > NEAR else Direction(direction.axes, 0.5, direction.gripper)


def _policy(env_name: str) -> Any:
    """Make the package's expert for a task."""
    try:
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise MissingDependencyError(
            f"Meta-World's experts need its package ({error}): pip install 'counterflow[metaworld]' mujoco==3.3.0"
        ) from error
    task = env_name.removeprefix(PREFIX)
    if task not in ENV_POLICY_MAP:
        raise UnknownNameError("task of Meta-World's", env_name, [PREFIX + name for name in ENV_POLICY_MAP])
    policy: Any = ENV_POLICY_MAP[task]  # declared as the abstract base, though each is one of its children
    return policy()
