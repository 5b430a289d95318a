"""What everything that is driven provides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from counterflow.binding import Binding
from counterflow.envs import EnvSpec, describe
from counterflow.errors import MismatchError
from counterflow.policies import ActionSpec
from counterflow.random import RowGenerators
from counterflow.steering import ChunkRegressor, MethodSettings, Plan, Reference
from counterflow.steering.steered import Inputs

METHODS = ("base", "direct", "partial", "rank", "frs", "dsbc", "guided")
FAN = 12  # samples of what the policy might do by itself

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Request:
    """What a chunk is asked for with.

    Attributes:
        method: one of `METHODS`.
        steering: settings of the methods.
        learned: the noise policy, for "dsbc".
        observation: (1, O).
        reference: what somebody said; None: nothing.
        rng: of one row, what is drawn from where it is drawn here.
    """

    method: str
    steering: MethodSettings
    learned: ChunkRegressor | None
    observation: npt.NDArray[np.float32]
    reference: Reference | None
    rng: RowGenerators


@dataclass(frozen=True)
class Decided:
    """A chunk, and whether it can be learned from.

    Attributes:
        plan: the chunk.
        reusable: whether the noise that is kept with it gives it, in as many steps as are recorded.
    """

    plan: Plan
    reusable: bool


class Target(Protocol):
    """What is driven.

    Attributes:
        action_spec: its action space.
        binding: what recorded noises belong to; None: they can't be had.
        inputs: what a noise policy can look at.
        settings: which of the settings of the methods count.
        slow: whether samples are to be asked for beside the driving.
        about: what it is, in words, where that isn't plain.
    """

    inputs: Inputs
    settings: frozenset[str]
    slow: bool
    about: str

    @property
    def action_spec(self) -> ActionSpec: ...  # noqa: D102

    @property
    def binding(self) -> Binding | None: ...  # noqa: D102

    @property
    def preferred(self) -> str:
        """The method to begin with."""
        ...

    def lacks(self, method: str) -> str:
        """Return why a method can't be offered; "" where it can."""
        ...

    def check(self, steering: MethodSettings) -> None:
        """Raise `InvalidInputError` where a setting is out of range."""
        ...

    def check_learned(self, learned: ChunkRegressor) -> None:
        """Raise `MismatchError` unless a noise policy is for this policy."""
        ...

    def fit(self, spec: EnvSpec) -> None:
        """Turn to a task.

        Raises:
            MismatchError: it does not fit.
        """
        ...

    def act(self, request: Request) -> Decided:
        """Decide on a chunk."""
        ...

    def fan(self, observation: npt.NDArray[np.float32], steering: MethodSettings, seed: int) -> npt.NDArray[np.float32]:
        """Return what the policy might do by itself, (N, H, A) in environment units, for an observation (O,)."""
        ...

    def complete(self, arrays: Arrays, reusable: npt.NDArray[np.bool_], *, steps: bool) -> None:
        """Add to an episode's arrays the noises that aren't known yet, and, where asked, those of every step."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def binding_for(target: Target, refused: str) -> Binding:
    """Return what the noises of what is driven belong to.

    Args:
        target: what is driven.
        refused: what can't be done without.

    Raises:
        MismatchError: they can't be had.
    """
    if target.binding is None:
        raise MismatchError(
            f"{refused}: what drives tells nothing of the noises of its flow, so there is nothing to learn from."
        )
    return target.binding


def check_directions(spec: ActionSpec, env: str) -> None:
    """Raise `MismatchError` unless keys can say something to an action."""
    if spec.layout is not None:
        return
    if describe(env).action_layout is None:
        raise MismatchError(
            f"the actions of {env} are no directions in space, so there is nothing that keys could say. Choose a manipulation "
            "task."
        )
    raise MismatchError(
        "the policy does not say which of its actions moves the robot where. Give its ActionSpec a layout "
        "(ActionLayout(translation=..., gripper=...)), as its environment has one."
    )
