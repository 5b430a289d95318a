"""How it is driven: what was chosen, and the chunk that becomes of a direction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from counterflow.cockpit.control import Wish
from counterflow.cockpit.episode import Chunk, Episode
from counterflow.cockpit.noise_policies import NoisePolicies
from counterflow.cockpit.settings import SessionSettings
from counterflow.cockpit.targets import METHODS, Decided, Request, Target
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.experiments.evaluate import ReasonerSettings
from counterflow.random import RowGenerators
from counterflow.reasoners import Convention, Direction, to_reference
from counterflow.steering import ChunkRegressor, MethodSettings, Reference

HELPING = ("frs", "rank", "direct")
"""How somebody helps a noise policy: by the first of these that there is."""


@dataclass(frozen=True)
class Choice:
    """What can be changed while driving.

    Attributes:
        method: one of `METHODS`.
        steering: settings of the methods.
        magnitude: length of the reference's motion; None: the convention's.
        noise_policy: the name of the one that drives with "dsbc"; None: there is none.
    """

    method: str
    steering: MethodSettings
    magnitude: float | None
    noise_policy: str | None


class Helm:
    """Turns directions into chunks, in the way that was chosen.

    Args:
        settings: what is chosen at first, and how references are written.
        target: what is driven.
        noise_policies: among which one can be chosen.

    Attributes:
        choice: what is chosen; `changed` makes another.

    Raises:
        InvalidInputError: the first method can't be driven with.
    """

    def __init__(self, settings: SessionSettings, target: Target, noise_policies: NoisePolicies) -> None:
        self._settings, self._target, self._noise_policies = settings, target, noise_policies
        method = target.preferred if settings.method is None else settings.method
        self.choice = Choice(method, settings.steering, settings.magnitude, noise_policies.newest)
        self._check_offered(method)

    @property
    def convention(self) -> Convention:
        """How directions are written into chunks now."""
        return self._writing(self.choice.magnitude)

    @property
    def noise_policy(self) -> ChunkRegressor | None:
        """The noise policy that is chosen, if there is one."""
        return self._noise_policies.get(self.choice.noise_policy)

    def lacks(self, method: str) -> str:
        """Return why a method can't be driven with; "" where it can."""
        lacking = self._target.lacks(method)
        if not lacking and method == "dsbc" and not self._noise_policies.learned:
            return "there is no noise policy yet: keep successes and press 'train', or start with --noise-policy"
        return lacking

    def changed(
        self,
        *,
        method: str | None = None,
        magnitude: float | None = None,
        noise_policy: str | None = None,
        **steering: float | None,
    ) -> Choice:
        """Return another choice. What isn't given stays.

        Args:
            method: one of `METHODS`.
            magnitude: length of the reference's motion.
            noise_policy: the name of one that was learned here or loaded.
            steering: fields of `MethodSettings`.

        Raises:
            UnknownNameError, InvalidInputError, MismatchError: a value can't be right.
        """
        chosen, learned = self.choice, self._noise_policies.learned
        given: dict[str, Any] = {name: value for name, value in steering.items() if value is not None}
        settings = replace(chosen.steering, **given)
        if noise_policy is not None and noise_policy not in learned:
            raise UnknownNameError("noise policy", noise_policy, learned)
        name = noise_policy or chosen.noise_policy or self._noise_policies.newest
        wanted = chosen.method if method is None else method
        if wanted not in METHODS:
            raise UnknownNameError("method", wanted, METHODS)
        for field in given:
            if field not in self._target.settings:
                raise InvalidInputError(f"{field} is set where the policy runs ({self._target.about}), not here.")
        self._target.check(settings)
        if magnitude is not None:
            self._writing(magnitude)
        self._check_offered(wanted)
        if wanted == "dsbc":
            self._target.check_learned(learned[str(name)])
        return Choice(wanted, settings, chosen.magnitude if magnitude is None else magnitude, name)

    def decide(self, wish: Wish, direction: Direction, observation: npt.NDArray[np.float32], episode: Episode) -> Chunk:
        """Return the chunk that becomes of a direction.

        Args:
            wish: what it is for.
            direction: what was said.
            observation: (1, O).
            episode: what its noise is drawn from.

        Raises:
            CounterflowError: of what is driven.
        """
        spec, method = self._target.action_spec, self.choice.method
        speaks = not direction.defer
        intervened = method == "dsbc" and speaks
        if intervened:
            method = next(name for name in HELPING if not self._target.lacks(name))
        reference = to_reference([direction], spec, self.convention) if speaks else None
        decided = self._act(method, observation, reference, episode.noise)
        plan = base = decided.plan
        if intervened:  # what the noise policy would have done here by itself: what a correction corrects
            base = self._act("dsbc", observation, None, episode.generators("uncorrected", episode.steps)).plan
        actions = plan.actions[0, : spec.executed].float().cpu().numpy()
        return Chunk(wish, direction, plan, method, decided.reusable, intervened, observation[0], actions, base)

    def describe(self) -> dict[str, Any]:
        """Return what is chosen and what could be, as plain values."""
        chosen, target = self.choice, self._target
        own = chosen.steering.reversal_steps
        recorded = own if target.binding is None else target.binding.steps
        return {
            "method": chosen.method,
            "methods": [{"name": name, "lacks": self.lacks(name)} for name in METHODS],
            "target": target.about,
            "keeps": target.binding is not None,
            "adjustable": sorted(target.settings),
            "settings": {
                "reversal_steps": own if "reversal_steps" in target.settings else recorded,
                "steps": chosen.steering.steps,
                "tau": chosen.steering.tau,
                "candidates": chosen.steering.candidates,
                "magnitude": self.convention.magnitude,
                "recorded_steps": recorded,
            },
            "noise_policy": chosen.noise_policy,
            "noise_policies": list(self._noise_policies.learned),
        }

    def _act(
        self, method: str, observation: npt.NDArray[np.float32], reference: Reference | None, rng: RowGenerators
    ) -> Decided:
        steering, binding = self.choice.steering, self._target.binding
        if method == "frs" and self.choice.method == "dsbc" and binding is not None:
            # Somebody helps: with the recorded K, so that the noise is what the noise policy should have said.
            steering = replace(steering, reversal_steps=binding.steps)
        learned = self.noise_policy if method == "dsbc" else None
        return self._target.act(Request(method, steering, learned, observation, reference, rng))

    def _check_offered(self, method: str) -> None:
        if lacking := self.lacks(method):
            raise InvalidInputError(f"{method!r} can't be chosen: {lacking}.")

    def _writing(self, magnitude: float | None) -> Convention:
        return ReasonerSettings(convention=self._settings.convention, magnitude=magnitude).writing()
