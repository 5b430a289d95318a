"""What is driven: a policy that was loaded here, or one that runs on a policy server.

A policy that is here is steered in every way that there is. Of a server's the prior lives elsewhere: it gives finished chunks,
so only what a server lets a client do can be offered. From outside a server can be asked as it is ("base"), overruled
("direct"), and asked several times ("rank"); a server of Counterflow's also steers by its own method when it is sent a
reference, and starts its flow at a noise that it is sent, so that noise policies can be recorded, trained here, and driven with.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from counterflow.addresses import KEY_VARIABLE, is_server, websocket_of
from counterflow.binding import Binding
from counterflow.cockpit.overlay import executable
from counterflow.envs import EnvSpec, describe
from counterflow.errors import InvalidInputError, MismatchError, ServingError
from counterflow.experiments.evaluate import adapted, load_prior, steered_by
from counterflow.experiments.inversion import InversionSettings, invert_chunks
from counterflow.experiments.record import step_noises
from counterflow.flow import denoise
from counterflow.policies import ActionSpec, BasePolicy, bind
from counterflow.random import RowGenerators
from counterflow.steering import (
    ChunkCritic,
    ChunkRegressor,
    ExecuteReference,
    GuidanceSettings,
    MethodSettings,
    NearestToReference,
    Plan,
    Reference,
    SteeredPolicy,
    SteeringContext,
    binding_of,
    choose_weight,
    guide,
    steer,
)
from counterflow.steering.steered import Inputs, with_diagnostics

if TYPE_CHECKING:
    from counterflow.serving import RemotePolicy

METHODS = ("base", "direct", "partial", "rank", "frs", "dsbc", "guided")
NOISY = ("base", "rank", "frs", "dsbc")
"""Methods whose chunk is what the flow makes of the noise that is kept."""
SEEN = 64  # observations that are remembered, to weigh a critic by
FAN = 12
PATIENCE = 15.0  # seconds for a server's answer; meanwhile the robot stands still, and nobody is heard
STEERED = ("frs", "partial", "rank", "direct")
"""Methods of a server that follow a reference."""

Arrays = dict[str, npt.NDArray[Any]]


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

    def act(
        self,
        method: str,
        steering: MethodSettings,
        learned: ChunkRegressor | None,
        observation: npt.NDArray[np.float32],
        reference: Reference | None,
        rng: RowGenerators,
    ) -> Decided:
        """Decide on a chunk for an observation (1, O)."""
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


def open_target(
    policy: str | BasePolicy | None,
    env: str,
    device: str,
    recorded_steps: int,
    critic: ChunkCritic | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Target:
    """Return what is to be driven.

    Args:
        policy: a policy; or a name or path (see `policies.load`), or a server's address (serve://host:port, ws://, wss://); None:
            the shipped prior of the task's family.
        env: the first task.
        device: where a policy that is loaded computes.
        recorded_steps: K of the noises that are recorded; a server has its own.
        critic: for "guided".
        note: told what was found out on the way.

    Raises:
        CounterflowError: it can't be had, or it does not fit the task.
    """
    if isinstance(policy, str) and is_server(policy):
        if critic is not None:
            raise InvalidInputError(
                f"a critic guides a flow, and that of {policy} is on the server. Start the cockpit without --critic, or with "
                "the policy itself."
            )
        return ServedTarget(policy, env)
    return LocalTarget(policy, env, device, recorded_steps, critic, note)


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

    def act(
        self,
        method: str,
        steering: MethodSettings,
        learned: ChunkRegressor | None,
        observation: npt.NDArray[np.float32],
        reference: Reference | None,
        rng: RowGenerators,
    ) -> Decided:
        """Decide on a chunk for an observation (1, O)."""
        self._seen.append(observation[0])
        key = (method, steering, id(learned))
        if self._steered is None or self._steered[0] != key:
            guided = method == "guided"
            policy = self._guided(steering) if guided else steered_by(self.policy, method, steering, learned)
            self._steered = (key, policy)
        steered = self._steered[1]
        plan = steered.act(torch.from_numpy(observation), reference, rng)
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


class ServedTarget:
    """A policy on a server: Counterflow's own, or any that speaks openpi's protocol.

    Args:
        address: serve://host:port (or ws://), wss:// for TLS. A key is read from the environment's COUNTERFLOW_API_KEY.
        env: the first task.
        patience: seconds for an answer.

    Raises:
        ServingError: it can't be reached, or refuses.
        MismatchError: what it serves does not fit the task.
    """

    slow = True
    inputs: Inputs = "observation"  # of the policy's own features a server tells nothing

    def __init__(self, address: str, env: str, patience: float = PATIENCE) -> None:
        self.address, self._patience = websocket_of(address), patience
        self._env = describe(env)
        self._expect: dict[str, Any] | None = None
        self._given: ActionSpec | None = None
        self._remote: RemotePolicy | None = None
        self._beside: RemotePolicy | None = None  # on which samples are asked for meanwhile
        told = self._connected().metadata
        self._ours = told.get("server") == "counterflow"
        steering = told.get("steering") if self._ours else None
        self._told: Mapping[str, Any] = steering if isinstance(steering, Mapping) else {}
        self.method = str(self._told.get("method", ""))
        self._entries = told.get("observation") if self._ours else None
        self._name = self._observation_name()
        if self._ours:
            belongs = told["belongs"]
            self._expect = {name: belongs[name] for name in ("policy", "action_space", "noise_policy")}
            self._belongs = Binding.from_json(
                {name: value for name, value in belongs.items() if name not in ("action_space", "noise_policy")}
            )
        else:
            self._learn_sizes()
        try:
            self._spec = self._connected().action_spec
            check_directions(self._spec, env)
        except BaseException:
            self.close()
            raise
        # A flow of more than the actions (padding, a past) starts at noises that the actions don't tell of.
        self._plain = self._ours and (self._belongs.horizon, self._belongs.padding) == (self._spec.horizon, 0)
        self.settings = frozenset({"candidates", "magnitude"})
        self.about = f"{self.address}" + (
            f", {told.get('name') or 'a policy'} ({self.method or 'as it is'})" if self._ours else ", not Counterflow's"
        )

    @property
    def action_spec(self) -> ActionSpec:
        """As the server says; of one that isn't ours, from its first answer and the task."""
        return self._spec

    @property
    def binding(self) -> Binding | None:
        """What recorded noises belong to: the server's policy, in the server's steps; None where it tells no noises."""
        return self._belongs if self._plain and self.method != "bc" else None

    @property
    def preferred(self) -> str:
        """What the server does itself."""
        if self.method in STEERED and not self.lacks(self.method):
            return self.method
        return "base" if self.lacks("rank") else "rank"

    @property
    def observation_dim(self) -> int | None:
        """How many numbers it sees, where it says."""
        entry = (self._entries or {}).get(self._name)
        return None if entry is None else int(entry["shape"][0])

    @property
    def cameras(self) -> tuple[str, ...]:
        """Through which cameras it must look."""
        entries: Mapping[str, Any] = self._entries or {}
        return tuple(
            name for name, entry in entries.items() if entry["dtype"] == "image" and not entry.get("optional", False)
        )

    def lacks(self, method: str) -> str:
        """Return why a method can't be offered; "" where it can."""
        if method in ("base", "direct"):
            return ""
        if method == "rank":
            if self._ours and not self._told.get("noise"):
                return f"the server's policy ({self.method}) gives the same chunk every time: nothing to choose from"
            return ""
        if method in ("frs", "partial"):
            if self.method == method:
                return ""
            if not self._ours:
                return "this server takes no references: its flow can't be steered from here"
            return f"the server steers by '{self.method}'; for this, start it with 'counterflow serve ... --steer {method}'"
        if method == "dsbc":
            if not self._ours:
                return "this server takes no noise, so no noise policy can drive it from here"
            if not self._told.get("noise"):
                return f"the server's policy ({self.method}) chooses its noise itself"
            return (
                ""
                if self._plain
                else "the server's flow moves more than its actions; its noises can't be recorded here"
            )
        return "a critic guides a flow, and that is on the server"

    def check(self, steering: MethodSettings) -> None:
        """Raise `InvalidInputError` where a setting is out of range."""
        NearestToReference(steering.candidates, steering.distance)

    def check_learned(self, learned: ChunkRegressor) -> None:
        """Raise `MismatchError` unless a noise policy is for the server's policy, and looks at observations."""
        if learned.config.target != "noise":
            raise MismatchError("this was trained on actions; to drive a server's flow a noise policy is needed.")
        if learned.config.inputs != "observation":
            raise MismatchError(
                "this noise policy looks at the policy's own features, of which a server tells nothing. Serve it on that side "
                "('counterflow serve ... --steer dsbc --noise-policy'), or train one here."
            )
        if learned.config.intention is not None:
            raise MismatchError(
                "this noise policy has an intention, which needs the gradient of the flow, and a server gives none. Serve it on "
                "that side ('counterflow serve ... --steer dsbc --noise-policy'), or distil one without."
            )
        if self.binding is None:
            raise MismatchError(f"{self.address} can't be driven by a noise policy: {self.lacks('dsbc')}.")
        learned.binding.check(self.binding, "this noise policy")

    def fit(self, spec: EnvSpec) -> None:
        """Turn to a task: only its sentence changes."""
        self._env = spec

    def act(
        self,
        method: str,
        steering: MethodSettings,
        learned: ChunkRegressor | None,
        observation: npt.NDArray[np.float32],
        reference: Reference | None,
        rng: RowGenerators,  # noqa: ARG002 - the server draws
    ) -> Decided:
        """Ask the server.

        Raises:
            ServingError: it went away, or refuses; the next call connects again.
            MismatchError: it does not listen to this, or another policy is served by now.
        """
        seen = self._message(observation[0])
        if method == "rank" and reference is not None and bool(reference.active.any()):
            from counterflow.serving import RankedRemote

            ranked = self._asking(
                lambda remote: RankedRemote(remote, steering.candidates, steering.distance).act(seen, reference)
            )
            return self._decided({"actions": ranked.actions, "noise": ranked.noise}, reference)
        if method in ("frs", "partial") and reference is not None:
            return self._decided(
                self._asking(lambda remote: remote.infer(seen, steer=self._chunk_of(reference))), reference
            )
        if method == "dsbc":
            assert learned is not None
            with torch.no_grad():
                noise = learned(torch.from_numpy(observation).flatten(1))[0].cpu().numpy()
            return self._decided(self._asking(lambda remote: remote.infer(seen, noise=noise)), None)
        answer = self._asking(lambda remote: remote.infer(seen))
        decided = self._decided(answer, reference)
        if method != "direct" or reference is None:
            return decided
        context = SteeringContext(None, 1, reference)
        chunk = ExecuteReference()(decided.plan.chunk[:, None], context)[:, 0]
        actions = self._spec.limit(self._spec.denormalise(chunk)).numpy()[0]
        return Decided(self._plan(actions, None, 1.0, reference), reusable=False)

    def _decided(self, answer: Mapping[str, Any], reference: Reference | None) -> Decided:
        """Return a server's answer as a plan; what it doesn't say of the noise is that none is known."""
        noise = answer.get("noise")
        shape = (self._spec.horizon, self._spec.dim)
        known = isinstance(noise, np.ndarray) and noise.shape == shape and bool(np.isfinite(noise).all())
        told = answer.get("diagnostics")
        start = float(told.get("start_time", 0.0)) if isinstance(told, Mapping) else 0.0
        plan = self._plan(answer["actions"], noise if known else None, start if known else 1.0, reference)
        return Decided(plan, known and start == 0 and self.binding is not None)

    def _plan(
        self,
        actions: npt.NDArray[np.float32],
        noise: npt.NDArray[np.float32] | None,
        start_time: float,
        reference: Reference | None,
    ) -> Plan:
        spec = self._spec
        limited = spec.limit(torch.from_numpy(np.array(actions, np.float32))[None])
        chunk, nothing = spec.normalise(limited), torch.empty(0)
        plan = Plan(
            actions=limited,
            chunk=chunk,
            base_chunk=chunk,  # as far as anybody here knows: the server limits what its flow gives
            noise=torch.zeros_like(chunk) if noise is None else torch.from_numpy(np.array(noise, np.float32))[None],
            start_time=torch.tensor([start_time]),
            reference=reference,
            noise_percentile=nothing,
            round_trip_error=nothing,
            agreement=nothing,
            evaluations=0,
        )
        return with_diagnostics(plan, spec)

    def _chunk_of(self, reference: Reference) -> dict[str, Any]:
        """Return a reference as it is sent: rows of the server's flow that lie in the past are nobody's to steer."""
        past = self._belongs.horizon - self._spec.horizon
        chunk = np.pad(reference.chunk[0].numpy(), ((past, 0), (0, 0)))
        steered = np.pad(reference.spoken[0].numpy(), ((past, 0), (0, 0)))
        return {"chunk": chunk, "units": "normalised", "steered": steered}

    def fan(
        self,
        observation: npt.NDArray[np.float32],
        steering: MethodSettings,  # noqa: ARG002 - the server has its own
        seed: int,  # noqa: ARG002 - the server draws
    ) -> npt.NDArray[np.float32]:
        """Ask the server several times what it does by itself, on a connection of its own: beside the driving."""
        if self._beside is None:
            self._beside = self._connect()
        count = 1 if self.lacks("rank") else FAN
        seen = self._message(observation)
        try:
            return np.stack([self._beside.infer(seen)["actions"] for _ in range(count)]).astype(np.float32)
        except (ServingError, MismatchError):
            self._beside.close()
            self._beside = None
            raise

    def complete(self, arrays: Arrays, reusable: npt.NDArray[np.bool_], *, steps: bool) -> None:
        """Mark what can't be learned from; of the steps, those with which a chunk began that was executed whole are known."""
        # What no noise is known of must not be learned from: no noise lies at t = 1.
        arrays["noise"][~reusable] = 0.0
        arrays["start_time"][~reusable] = 1.0
        if not (steps and arrays["intervened"].any()):
            return  # decisions are what is learned from
        executed = arrays["executed"]
        first = np.cumsum(executed) - executed
        whole = reusable & (executed == self._spec.horizon)
        total = int(executed.sum())
        shape = (total, self._spec.horizon, self._spec.dim)
        for name, source in (("step_noise", "noise"), ("step_chunks", "chunks")):
            arrays[name] = np.zeros(shape, np.float32)
            arrays[name][first[whole]] = arrays[source][whole]
        arrays["step_noise_valid"] = np.zeros(total, bool)
        arrays["step_noise_valid"][first[whole]] = True

    def close(self) -> None:
        """Leave."""
        for remote in (self._remote, self._beside):
            if remote is not None:
                remote.close()
        self._remote = self._beside = None

    # The line

    def _connect(self) -> RemotePolicy:
        from counterflow.serving import RemotePolicy

        key = os.environ.get(KEY_VARIABLE) or None
        return RemotePolicy(self.address, api_key=key, expect=self._expect, spec=self._given, timeout=self._patience)

    def _connected(self) -> RemotePolicy:
        if self._remote is None:
            self._remote = self._connect()
        return self._remote

    def _asking(self, ask: Callable[[RemotePolicy], Any]) -> Any:
        """Ask; after a failure the next one begins with a new connection."""
        try:
            return ask(self._connected())
        except ServingError:
            if self._remote is not None:
                self._remote.close()
                self._remote = None
            raise

    def _observation_name(self) -> str:
        """Return under which name the server takes a state."""
        entries: Mapping[str, Any] = self._entries or {}
        states = [name for name, entry in entries.items() if entry["dtype"] == "float32" and len(entry["shape"]) == 1]
        return states[0] if states else "observation"

    def _message(self, observation: npt.NDArray[np.float32]) -> dict[str, Any]:
        message: dict[str, Any] = {self._name: observation.astype(np.float32)}
        if "task" in (self._entries or {}):
            message["task"] = self._env.task
        return message

    def _learn_sizes(self) -> None:
        """Ask a server that does not say what its actions are once, to see how many come."""
        remote = self._connected()
        state = np.zeros(self._env.observation_dim, np.float32)
        horizon, dim = remote.infer(self._message(state))["actions"].shape
        if dim != self._env.action_dim:
            self.close()
            raise MismatchError(
                f"{self.address} gives actions of {dim} numbers and {self._env.name} expects {self._env.action_dim}. Serve a "
                "policy that was trained for this task."
            )
        self._given = ActionSpec(
            horizon, dim, self._env.action_low, self._env.action_high, layout=self._env.action_layout
        )
        self.close()  # what comes next knows the sizes


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
