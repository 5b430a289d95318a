"""`ServedPolicy`: a policy as clients of a server meet it. It knows nothing of networks.

Requests come one by one and are decided in batches; what a client is told does not depend on who else is in its batch. Every
request draws from its own generator, and what must be remembered between requests (a reasoner's episode) belongs to a `Session`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import counterflow
from counterflow.errors import CounterflowError, InvalidInputError, MismatchError, ServingError, UnknownNameError
from counterflow.policies import ActionSpec, BasePolicy
from counterflow.policies.described import fingerprint
from counterflow.policies.observation import ObservationEntry
from counterflow.random import RowGenerators, check_seed, child_seed
from counterflow.reasoners import OGBENCH, SCRIPTED, Convention, Direction, Reasoner, to_reference
from counterflow.serving.requests import (
    PLAIN,
    RESERVED,
    Asked,
    Observation,
    ReasonerCall,
    Request,
    read_noise,
    read_observation,
    read_steer,
    stack,
)
from counterflow.steering import (
    AnchorsCritic,
    Chain,
    ChunkRegressor,
    ExecuteLearned,
    Gaussian,
    LearnedNoise,
    Limits,
    Plan,
    Reference,
    SteeredPolicy,
    SteeringActor,
    Together,
    binding_of,
)
from counterflow.steering.actor import ActorLatent, ActorResidual
from counterflow.steering.anchors import AnchorStart
from counterflow.steering.steered import frozen

MakeReasoner = Callable[[], Reasoner]

# What is known to look at no reference; whatever else stands at a port may.
DEAF = (Gaussian, LearnedNoise, ExecuteLearned, ActorLatent, ActorResidual, Limits)


@dataclass(frozen=True)
class Answer:
    """What was decided for one request.

    Attributes:
        actions: (H, A) environment units, what to execute.
        noise: (H, A) where the flow started.
        diagnostics: start time, noise percentile, round-trip error and agreement (see `Plan`); NaN where there is none.
        seconds: that the batch took to decide.
        batch_size: how many requests were decided together.
    """

    actions: npt.NDArray[np.float32]
    noise: npt.NDArray[np.float32]
    diagnostics: dict[str, float]
    seconds: float
    batch_size: int


class RequestDraws(RowGenerators):
    """One generator a request; where a request brought its noise, that takes the place of its first draw.

    Args:
        seeds: one a row.
        noises: for each row (1, H, A) or (N, H, A), or None.
    """

    def __init__(self, seeds: Sequence[int], noises: Sequence[Tensor | None]) -> None:
        super().__init__(seeds)
        self._noises = list(noises)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw (B, N, H, A) on the CPU, or return what was given.

        Raises:
            MismatchError: the first draw is not of chunks.
        """
        drawn = super().normal(shape)
        for row, noise in enumerate(self._noises):
            if noise is not None:
                if tuple(shape[2:]) != tuple(noise.shape[1:]) or shape[1] % len(noise):
                    raise MismatchError(_NO_PLACE)
                drawn[row] = noise.repeat(shape[1] // len(noise), 1, 1)
                self._noises[row] = None
        return drawn

    def check_used(self) -> None:
        """Raise `MismatchError` unless every noise that was given was asked for."""
        if any(noise is not None for noise in self._noises):
            raise MismatchError(_NO_PLACE)


_NO_PLACE = (
    "a noise was given, and this policy's flow does not start at a fresh draw that it could replace. Leave it out, or serve the "
    "policy with --steer base."
)


class Session:
    """What belongs to one client: its draws and its reasoner.

    Args:
        seed: what both descend from.
        reasoners: how to make each.
    """

    def __init__(self, seed: int, reasoners: Mapping[str, MakeReasoner]) -> None:
        self._seed, self._makers = seed, reasoners
        self._requests = self._episodes = 0
        self._reasoner: tuple[str, Reasoner] | None = None

    def next_seed(self) -> int:
        """Return the seed of the next request."""
        self._requests += 1
        return child_seed(self._seed, "request", self._requests)

    def decide(self, call: ReasonerCall) -> Direction:
        """Ask a reasoner; it is made when it is first named, and begins a new episode then and when it is told to.

        Raises:
            UnknownNameError: no such reasoner.
            InvalidInputError: it can't use the view.
        """
        if call.name not in self._makers:
            raise UnknownNameError("reasoner", call.name[:80], self._makers)
        if call.reset or self._reasoner is None or self._reasoner[0] != call.name:
            reasoner = self._makers[call.name]()
            self._episodes += 1
            reasoner.reset(child_seed(self._seed, "reasoner", self._episodes))
            self._reasoner = call.name, reasoner
        try:
            return self._reasoner[1].decide(call.view)
        except CounterflowError:
            raise
        except (LookupError, ValueError) as error:
            lacking = (
                f"it lacks {error}" if isinstance(error, KeyError) else "an entry is missing or has another length"
            )
            raise InvalidInputError(
                f"the reasoner {call.name!r} can't use the view: {lacking}. Send, under 'view', what it looks at; it was sent "
                f"{', '.join(sorted(call.view)) or 'nothing'}."
            ) from error

    def forget(self) -> None:
        """Let go of the reasoner, as when nobody knows what became of its last decision."""
        self._reasoner = None


class ServedPolicy:
    """A policy as clients meet it: what it says of itself, how their messages are read, what they are answered.

    Args:
        policy: a base policy or a steered one.
        seed: what all draws descend from.
        convention: how directions become references.
        reasoners: who may be named in `steer`, and how each is made; None: the scripted ones.
        names: the policy's names for entries that robots call something else; openpi's "prompt" is a declared "task".
        name: what to call the policy.
        method: how it is steered, in a word.

    Attributes:
        belongs: what this policy is, by name, and what a client may therefore expect of it: the fields of its `Binding`
            (fingerprint of the frozen policy, family, horizon, dim, steps, solver), the fingerprint of the action space (sizes,
            limits, layout, normalisation), and that of the noise policy, "" where there is none.
        steerable: whether anything listens to references.
        declared: the entries of an observation, or None where the policy declares nothing.

    Raises:
        InvalidInputError: the seed is out of range, or the policy declares an entry with a reserved name.
    """

    def __init__(
        self,
        policy: BasePolicy,
        *,
        seed: int = 0,
        convention: Convention = OGBENCH,
        reasoners: Mapping[str, MakeReasoner] | None = None,
        names: Mapping[str, str] | None = None,
        name: str = "",
        method: str = "",
    ) -> None:
        self.policy = policy if isinstance(policy, SteeredPolicy) else SteeredPolicy(policy)
        self.name, self.method = name, method
        self._seed, self._convention = check_seed(seed), convention
        self._reasoners = dict(SCRIPTED if reasoners is None else reasoners)
        self._sessions = 0
        ports = list(_ports(self.policy))
        self.steerable = any(not _is_deaf(port) for port in ports)
        learned = [one for port in ports if (one := _learned_at(port)) is not None]
        self._draws = not learned
        self.belongs: dict[str, Any] = {  # once: it looks at every weight
            **binding_of(self.policy, self.policy.steps, self.policy.solver).to_json(),
            "action_space": action_space_fingerprint(self.action_spec),
            "noise_policy": "+".join(dict.fromkeys(one.fingerprint for one in learned)),
        }
        self.declared = declared_entries(frozen(self.policy))
        self._names = dict({} if names is None else names)
        if self.declared is not None:
            for own in self._names.values():
                if own not in self.declared:
                    raise UnknownNameError("observation entry", own, self.declared)
            if "task" in self.declared and "prompt" not in self.declared:
                self._names.setdefault("prompt", "task")
        clash = [] if self.declared is None else [name for name in RESERVED if name in self.declared]
        if clash:
            raise InvalidInputError(
                f"the policy sees an entry called {clash[0]!r}, which a server keeps for itself. Rename the entry."
            )

    @property
    def action_spec(self) -> ActionSpec:
        """The action space."""
        return self.policy.action_spec

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client is told as it connects, as plain values."""
        spec = self.action_spec
        return {
            "server": "counterflow",
            "version": counterflow.__version__,
            "name": self.name,
            "belongs": self.belongs,
            "actions": {
                "horizon": spec.horizon - spec.past,
                "dim": spec.dim,
                "executed": spec.executed,
                "low": None if spec.low is None else list(spec.low),
                "high": None if spec.high is None else list(spec.high),
                "normalisation": None
                if spec.normaliser is None
                else {
                    "offset": spec.normaliser.offset.tolist(),
                    "scale": spec.normaliser.scale.tolist(),
                    "kind": spec.normaliser.kind,
                },
                "layout": None
                if spec.layout is None
                else {
                    name: list(value) if isinstance(value, tuple) else value
                    for name, value in asdict(spec.layout).items()
                },
            },
            "observation": None
            if self.declared is None
            else {
                name: {"dtype": entry.dtype, "shape": list(entry.shape), "optional": entry.optional}
                for name, entry in self.declared.items()
            },
            "steering": {
                "method": self.method,
                "steerable": self.steerable,
                "directions": self.steerable and spec.layout is not None,
                "reasoners": sorted(self._reasoners) if self.steerable and spec.layout is not None else [],
                "noise": self._draws,
                "candidates": self.policy.candidates,
            },
        }

    def session(self) -> Session:
        """Begin with another client."""
        self._sessions += 1
        return Session(child_seed(self._seed, "client", self._sessions), self._reasoners)

    def check_expected(self, expected: Any) -> None:
        """Refuse a client that expects another policy.

        Args:
            expected: some of the names of `belongs`, each with the value that it must have.

        Raises:
            MismatchError: this policy is another.
            UnknownNameError: an expectation has a name that is none of `belongs`.
            InvalidInputError: it is not a map of names.
        """
        check_expected(expected, self.belongs, "this server")

    def read(self, message: Any) -> Asked:
        """Check an unpacked message.

        Raises:
            InvalidInputError: something is missing, or of the wrong type, or NaN, or out of range.
            MismatchError: a shape is another than the policy's; the policy can't be steered, or does not draw its noise; it is
                not the one that the client expects.
            UnknownNameError: an entry or a name is not known.
        """
        if not isinstance(message, dict):
            raise InvalidInputError(
                f"a message is a {type(message).__name__}; expected a map: an observation's entries by name."
            )
        if message.get("expect") is not None:
            self.check_expected(message["expect"])
        steer, noise = message.get("steer"), message.get("noise")
        if steer is not None and not self.steerable:
            raise MismatchError(
                f"the request says how to steer, and this policy{f' ({self.method})' if self.method else ''} does not listen. "
                "Leave it out, or serve the policy with --steer frs, partial, rank or direct."
            )
        if noise is not None and not self._draws:
            raise MismatchError(_NO_PLACE)
        observation = read_observation(
            {name: value for name, value in message.items() if name not in RESERVED}, self.declared, self._names
        )
        return Asked(
            observation,
            read_steer(steer, message.get("view"), observation, self.action_spec, self._convention),
            read_noise(noise, self.action_spec, self.policy.candidates),
        )

    def complete(self, asked: Asked, session: Session) -> Request:
        """Ask the reasoner where one is named, and give the request its seed. It may take as long as the reasoner does.

        Raises:
            UnknownNameError: no such reasoner.
            InvalidInputError: the reasoner can't use the view.
            MismatchError: the action space has no layout, or no gripper to command.
        """
        steer = asked.steer
        if isinstance(steer, ReasonerCall):
            steer = to_reference([session.decide(steer)], self.action_spec, self._convention)
        return Request(asked.observation, steer, asked.noise, session.next_seed())

    def act(self, requests: Sequence[Request]) -> list[Answer | Exception]:
        """Decide on requests of the same signature together.

        Returns:
            For each, in order, the answer or what went wrong with it; one that fails does not fail the others.
        """
        try:
            return self._decide(requests)
        except Exception as error:
            if len(requests) == 1:
                return [error]
            return [self.act([one])[0] for one in requests]

    def _decide(self, requests: Sequence[Request]) -> list[Answer | Exception]:
        began = time.perf_counter()
        observation = stack([one.observation for one in requests], self._is_plain(requests[0].observation))
        draws = RequestDraws([one.seed for one in requests], [one.noise for one in requests])
        plan = self.policy.act(observation, self._reference(requests), draws)
        draws.check_used()
        actions, noise = _array(plan.actions), _array(plan.noise)
        spec = self.action_spec
        expected = (len(requests), spec.horizon - spec.past, spec.dim)
        if actions.shape != expected:
            raise ServingError(f"the policy gave actions of shape {actions.shape}; expected {expected}.")
        diagnostics = _diagnostics(plan)
        seconds = time.perf_counter() - began
        answers: list[Answer | Exception] = []
        for row in range(len(requests)):
            if np.isfinite(actions[row]).all():
                told = {name: float(values[row]) for name, values in diagnostics.items()}
                answers.append(Answer(actions[row], noise[row], told, seconds, len(requests)))
            else:
                answers.append(
                    ServingError("the policy gave actions that are NaN or infinite; none are sent. Look at its input.")
                )
        return answers

    def _is_plain(self, observation: Observation) -> bool:
        if self.declared is not None:
            return not hasattr(frozen(self.policy), "observation_entries")
        return list(observation) == [PLAIN] and not isinstance(observation[PLAIN], str)

    def _reference(self, requests: Sequence[Request]) -> Reference | None:
        """Put the references of all rows together; rows without one are inactive."""
        given = [one.reference for one in requests]
        if all(one is None for one in given):
            return None
        chunk = torch.zeros(1, self.action_spec.horizon, self.action_spec.dim)
        silent = Reference(chunk, torch.zeros(1, dtype=torch.bool), torch.ones_like(chunk, dtype=torch.bool))
        rows = [(silent if one is None else one).within(self.action_spec) for one in given]
        return Reference(
            torch.cat([one.chunk for one in rows]),
            torch.cat([one.active for one in rows]),
            torch.cat([one.steered for one in rows]),
        )


def declared_entries(policy: Any) -> dict[str, ObservationEntry] | None:
    """Return what a policy declares about its observations, or None: its `observation_entries`, or its `observation_dim`."""
    entries = getattr(policy, "observation_entries", None)
    if entries is not None:
        return dict(entries)
    dim = getattr(policy, "observation_dim", None)
    return None if dim is None else {PLAIN: ObservationEntry("float32", (int(dim),))}


def action_space_fingerprint(spec: ActionSpec) -> str:
    """Return 16 hexadecimal digits that depend on sizes, limits, layout and normalisation."""
    description = {
        "horizon": spec.horizon,
        "dim": spec.dim,
        **({} if spec.is_plain else {"padding": spec.padding, "past": spec.past}),
        "low": spec.low,
        "high": spec.high,
        "layout": None if spec.layout is None else asdict(spec.layout),
    }
    numbers = {} if spec.normaliser is None else spec.normaliser.state_dict()
    return fingerprint(description, {name: value.detach().cpu().contiguous() for name, value in numbers.items()})


def check_expected(expected: Any, belongs: Mapping[str, Any], whose: str) -> None:
    """Raise unless everything that is expected is so (values may be given as text).

    Raises:
        MismatchError: something differs.
        UnknownNameError: an expectation has a name that is none of `belongs`.
        InvalidInputError: it is not a map of names.
    """
    if not isinstance(expected, Mapping):
        raise InvalidInputError(
            f"expect is a {type(expected).__name__}; expected a map, for example {{'policy': ...}}."
        )
    for name in expected:
        if name not in belongs:
            raise UnknownNameError("expectation", str(name)[:80], belongs)
    differing = [
        f"{name} {str(value)[:80]!r}, and {whose} has {str(belongs[name])!r}"
        for name, value in expected.items()
        if str(value) != str(belongs[name])
    ]
    if differing:
        raise MismatchError(
            f"the client expects {'; '.join(differing)}. The same observation would become other actions, so none are sent. "
            "Connect to the server of the policy that is expected, or expect what this one's metadata say."
        )


def _is_deaf(port: Any) -> bool:
    """Whether it looks at no reference."""
    return isinstance(port, DEAF) or (isinstance(port, AnchorStart) and not port.critic.config.weighted)


def _learned_at(port: Any) -> ChunkRegressor | SteeringActor | AnchorsCritic | None:
    """Return what was learned that stands at a port."""
    if isinstance(port, LearnedNoise | ExecuteLearned):
        return port.regressor
    if isinstance(port, ActorLatent | ActorResidual):
        return port.actor
    return port.critic if isinstance(port, AnchorStart) else None


def _ports(policy: BasePolicy) -> Iterator[Any]:
    """Yield whatever stands at a port, the base's too."""
    while isinstance(policy, SteeredPolicy):
        for port in (policy.start, policy.guidance, policy.edit):
            yield from _parts(port)
        policy = policy.base


def _parts(port: Any) -> Iterator[Any]:
    if isinstance(port, Chain | Together):
        for part in port.edits if isinstance(port, Chain) else port.guidances:
            yield from _parts(part)
    elif port is not None:
        yield port


def _diagnostics(plan: Plan) -> dict[str, npt.NDArray[np.float32]]:
    names = ("start_time", "noise_percentile", "round_trip_error", "agreement")
    return {name: _array(getattr(plan, name)) for name in names}


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.float().cpu().numpy()
    return array
