"""What a policy is shown of the environments that it acts in: their state, or what it looks for, drawn where it decides.

A policy that says what it sees (`observation_entries`, by LeRobot's names, or `cameras`) gets that from what the environment can
show (`EnvSpec.sights`), as LeRobot's evaluation would hand it over: pictures (B, 3, H, W) float in [0, 1], numbers (B, D), the
task's sentence. All others see the state, and nothing is drawn for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from counterflow.envs import EnvSpec, VectorEnv
from counterflow.errors import MismatchError
from counterflow.policies import ActionSpec, BasePolicy
from counterflow.policies.observation import ObservationEntry
from counterflow.steering.steered import frozen

TASK = "task"
"""The name under which policies are told what to do."""


class Acts(Protocol):
    """Anything with an action space."""

    @property
    def action_spec(self) -> ActionSpec:
        """The action space."""
        ...


def looks(policy: Any) -> bool:
    """Say whether a policy, or the frozen one under its steering, looks at more than a state."""
    return _entries(policy) is not None


def check_on_states(policy: Any, what: str, hint: str) -> None:
    """Raise `MismatchError` for a policy that looks, where `what` computes at recorded observations: they hold no pictures."""
    if looks(policy):
        raise MismatchError(
            f"{what} at recorded observations; this policy looks through cameras, and recordings keep no pictures. {hint}"
        )


def check_fit(policy: Acts, spec: EnvSpec) -> None:
    """Raise `MismatchError` unless the policy's actions are the environment's, and it sees the environment's state.

    For whoever can show a policy states alone; `Eyes` shows pictures, too.
    """
    _check_actions(policy, spec)
    entries = _entries(policy)
    if entries is not None:
        cameras = [name for name, entry in entries.items() if entry.dtype in ("image", "uint8") and not entry.optional]
        seen = f"{len(cameras)} cameras ({', '.join(cameras)})" if cameras else ", ".join(entries)
        raise MismatchError(
            f"the policy looks through {seen}, and what was asked for shows it {spec.name}'s state of {spec.observation_dim} "
            "numbers and no images. Use a policy on states; 'eval', 'compare', 'record', 'film' and 'train dsrl' show images "
            "where the environment has them."
        )
    observation_dim = getattr(policy, "observation_dim", None)
    if observation_dim is not None and observation_dim != spec.observation_dim:
        raise MismatchError(
            f"the policy sees {observation_dim} numbers and {spec.name} shows {spec.observation_dim}. "
            f"Use a policy that was trained for {spec.family}."
        )


class Eyes:
    """A policy's eyes on the rows of an environment.

    Rows keep what was last seen of them, so that a batch never changes its shape; a row that was never looked at is all black
    and zero.

    Args:
        policy: who is to see, steered or not.
        env: what there is to see.

    Raises:
        MismatchError: its actions are others than the environment's, or it needs to see what the environment doesn't show.
    """

    def __init__(self, policy: BasePolicy, env: VectorEnv) -> None:
        self._env, spec = env, env.spec
        self._entries = _entries(policy)
        self._seen: dict[str, npt.NDArray[Any]] = {}
        self._said: dict[str, str] = {}
        if self._entries is None:
            check_fit(frozen(policy), spec)
            return
        _check_actions(policy, spec)
        missing = []
        for name, entry in self._entries.items():
            if name in spec.sights and entry.fits(_handed(entry, spec.sights[name])):
                self._seen[name] = np.zeros(
                    (env.num_envs, *spec.sights[name]), np.uint8 if len(spec.sights[name]) == 3 else np.float32
                )
            elif not entry.optional:
                if name == TASK and entry.dtype == "text":
                    self._said[name] = spec.task
                else:
                    missing.append(f"{name} ({entry})")
        if missing:
            shown = ", ".join(f"{name} {shape}" for name, shape in spec.sights.items())
            raise MismatchError(
                f"the policy wants to see {', '.join(missing)}; {spec.name} shows {shown or 'no images'}, and a state of "
                f"{spec.observation_dim} numbers to policies that see nothing else. Rename the policy's features "
                "(rename_map of LeRobot's preprocessor), or use a policy that was trained for these."
            )

    def see(self, states: npt.NDArray[np.float32], rows: Sequence[int]) -> Tensor | dict[str, Any]:
        """Return what the policy is to decide on, all N rows.

        Args:
            states: (N, O) the environments' present state.
            rows: those on which a decision is due; only these are looked at.

        Returns:
            States (N, O); or, for a policy that looks, pictures (N, 3, H, W) in [0, 1], numbers (N, D), and the task.

        Raises:
            RenderingError: this machine can't draw.
        """
        if self._entries is None:
            return torch.from_numpy(states)
        if self._seen and len(rows):
            for name, values in self._env.look(list(self._seen), rows).items():
                self._seen[name][list(rows)] = values
        return {name: _as_input(self._entries[name], values) for name, values in self._seen.items()} | self._said


def _entries(policy: Any) -> dict[str, ObservationEntry] | None:
    """Return what a policy looks for, by name; None: it sees a state."""
    policy = frozen(policy)
    if getattr(policy, "observation_dim", None) is not None:
        return None
    entries = getattr(policy, "observation_entries", None)
    if entries is None:
        entries = {name: ObservationEntry("image", (3, None, None)) for name in getattr(policy, "cameras", ())}
    return dict(entries) or None


def _check_actions(policy: Acts, spec: EnvSpec) -> None:
    if policy.action_spec.dim != spec.action_dim:
        raise MismatchError(
            f"the policy acts in {policy.action_spec.dim} dimensions and {spec.name} expects {spec.action_dim}. "
            f"Use a policy that was trained for {spec.family}."
        )


def _handed(entry: ObservationEntry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which a policy gets what has `shape` in the environment."""
    return (shape[2], *shape[:2]) if entry.dtype == "image" and len(shape) == 3 else shape


def _as_input(entry: ObservationEntry, values: npt.NDArray[Any]) -> Tensor:
    """Return what was seen (N, ...) as the policy takes it, in memory of its own."""
    seen = torch.tensor(values)
    return seen.permute(0, 3, 1, 2).contiguous().float() / 255 if entry.dtype == "image" else seen
