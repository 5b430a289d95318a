"""A policy that is here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from counterflow.binding import Binding
from counterflow.cockpit.overlay import executable
from counterflow.cockpit.targets.protocol import FAN, METHODS, Arrays, Decided, Request, check_directions
from counterflow.envs import EnvSpec
from counterflow.experiments.evaluate import adapted, load_prior, steered_by
from counterflow.experiments.inversion import InversionSettings, invert_chunks
from counterflow.experiments.record import step_noises
from counterflow.flow import denoise
from counterflow.policies import ActionSpec, BasePolicy, bind
from counterflow.steering import (
    ChunkCritic,
    ChunkRegressor,
    GuidanceSettings,
    MethodSettings,
    SteeredPolicy,
    binding_of,
    choose_weight,
    guide,
    steer,
)
from counterflow.steering.steered import Inputs

NOISY = ("base", "rank", "frs", "dsbc")
"""Methods whose chunk is what the flow makes of the noise that is kept."""
SEEN = 64  # observations that are remembered, to weigh a critic by


class LocalTarget:
    """A policy that is here: Counterflow's own, a generalist, LeRobot's, or an object with a field.

    Args:
        policy: the policy, its name or path, or None (see `open_target`).
        env: the first task.
        device: where it computes.
        recorded_steps: K of the noises that are recorded.
        critic: for "guided".
        note: told which weight was found for the critic.

    Raises:
        CounterflowError: it can't be loaded, or its actions are no directions in space.
    """

    slow = False
    about = ""
    preferred = "frs"

    def __init__(
        self,
        policy: str | BasePolicy | None,
        env: str,
        device: str = "cpu",
        recorded_steps: int = 5,
        critic: ChunkCritic | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        given = load_prior(env, policy, device) if policy is None or isinstance(policy, str) else policy
        self._given: Any = given
        self._task = None if isinstance(policy, str) else getattr(given, "task", None)  # a name's was the first task's
        self.policy: BasePolicy = adapted(given, env)
        self.critic, self._note = critic, note
        self.settings = frozenset({"reversal_steps", "steps", "tau", "candidates", "magnitude"})
        self._has_flow = getattr(self.policy, "has_flow", True)
        self._binding = binding_of(self.policy, recorded_steps)
        self.inputs: Inputs = "features" if hasattr(self.policy, "features") else "observation"
        self.weight: float | None = None
        self._seen: deque[npt.NDArray[np.float32]] = deque(maxlen=SEEN)
        self._steered: tuple[Any, SteeredPolicy] | None = None
        check_directions(self.action_spec, env)

    @property
    def action_spec(self) -> ActionSpec:
        """The policy's."""
        return self.policy.action_spec

    @property
    def binding(self) -> Binding | None:
        """What recorded noises belong to."""
        return self._binding if self._has_flow else None

    @property
    def observation_dim(self) -> int | None:
        """How many numbers it sees, where it says."""
        return getattr(self.policy, "observation_dim", None)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Through which cameras it looks."""
        return tuple(getattr(self.policy, "cameras", ()))

    def lacks(self, method: str) -> str:
        """Return why a method can't be offered; "" where it can."""
        if not self._has_flow and method != "base":
            return "this policy makes its chunk in a single step: there is no flow to steer"
        if method == "guided" and self.critic is None:
            return "it needs a critic; start the cockpit with --critic"
        return ""

    def check(self, steering: MethodSettings) -> None:
        """Raise `InvalidInputError` where a setting is out of range."""
        for method in METHODS:
            if method not in ("dsbc", "guided") and not self.lacks(method):
                steer(self.policy, method, steering)

    def check_learned(self, learned: ChunkRegressor) -> None:
        """Raise `MismatchError` unless a noise policy is for this policy."""
        steered_by(self.policy, "dsbc", MethodSettings(), learned)

    def fit(self, spec: EnvSpec) -> None:
        """Turn to a task: what a policy is told of it (its sentence, where its objects are) is another."""
        if hasattr(self._given, "for_environment"):
            self._given.task = self._task  # what it was told of the last task is not of this one
        self.policy = adapted(self._given, spec.name)
        self._seen.clear()
        self.weight, self._steered = None, None

    def act(self, request: Request) -> Decided:
        """Decide on a chunk."""
        self._seen.append(request.observation[0])
        method, steering, learned = request.method, request.steering, request.learned
        key = (method, steering, id(learned))
        if self._steered is None or self._steered[0] != key:
            guided = method == "guided"
            policy = self._guided(steering) if guided else steered_by(self.policy, method, steering, learned)
            self._steered = (key, policy)
        steered = self._steered[1]
        plan = steered.act(torch.from_numpy(request.observation), request.reference, request.rng)
        return Decided(plan, method in NOISY and steered.steps == self._binding.steps)

    def _guided(self, steering: MethodSettings) -> SteeredPolicy:
        assert self.critic is not None
        if self.weight is None:
            seen = torch.from_numpy(np.stack(list(self._seen)))
            self.weight = choose_weight(self.policy, self.critic, seen, GuidanceSettings()).weight
            self._note(f"the critic guides with weight {self.weight:.3g}")
        return guide(steer(self.policy, "frs", steering), self.critic, GuidanceSettings().with_weight(self.weight))

    def fan(self, observation: npt.NDArray[np.float32], steering: MethodSettings, seed: int) -> npt.NDArray[np.float32]:
        """Return what the policy might do by itself, (N, H, A) in environment units."""
        base = SteeredPolicy(self.policy, steps=steering.reversal_steps if self._has_flow else 1)
        context = base.encode(torch.from_numpy(observation[None])).repeat_interleave(FAN)
        with torch.no_grad():
            noise, _ = base.begin(context, torch.Generator().manual_seed(seed))
            chunks = denoise(bind(base, context), noise, base.steps)
        return executable(chunks, self.action_spec)

    def complete(self, arrays: Arrays, reusable: npt.NDArray[np.bool_], *, steps: bool) -> None:
        """Find by inversion the noises that aren't known, and, where asked, those of every step."""
        foreign = np.flatnonzero(~reusable)
        if len(foreign):
            exact = InversionSettings(steps=self._binding.steps)
            found, missed = (
                one.float().cpu().numpy()
                for one in invert_chunks(
                    self.policy,
                    torch.from_numpy(arrays["observations"][foreign]),
                    torch.from_numpy(arrays["chunks"][foreign]),
                    exact,
                )
            )
            known = np.isfinite(found).all((1, 2)) & (missed <= exact.tolerance)
            # What no noise gives must not be learned from: no noise lies at t = 1.
            arrays["noise"][foreign] = np.where(known[:, None, None], found, 0.0)
            arrays["start_time"][foreign] = np.where(known, 0.0, 1.0)
        if steps:
            arrays |= step_noises(self.policy, arrays, InversionSettings.of("regularised", self._binding.steps))

    def close(self) -> None:
        """There is nothing to let go of."""
