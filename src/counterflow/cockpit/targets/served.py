"""A policy on a server, as far as it can be driven from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from counterflow.addresses import websocket_of
from counterflow.binding import Binding
from counterflow.cockpit.targets.line import Line
from counterflow.cockpit.targets.protocol import FAN, Arrays, Decided, Request, check_directions
from counterflow.envs import EnvSpec, describe
from counterflow.errors import MismatchError
from counterflow.policies import ActionSpec
from counterflow.steering import (
    ChunkRegressor,
    ExecuteReference,
    MethodSettings,
    NearestToReference,
    Plan,
    Reference,
    SteeringContext,
)
from counterflow.steering.steered import Inputs, with_diagnostics

PATIENCE = 15.0  # seconds for a server's answer; meanwhile the robot stands still, and nobody is heard
STEERED = ("frs", "partial", "rank", "direct")
"""Methods of a server that follow a reference."""


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
        self._line = Line(websocket_of(address), patience)
        self._env = describe(env)
        told = self._line.remote.metadata
        self._ours = told.get("server") == "counterflow"
        steering = told.get("steering") if self._ours else None
        self._told: Mapping[str, Any] = steering if isinstance(steering, Mapping) else {}
        self.method = str(self._told.get("method", ""))
        self._entries = told.get("observation") if self._ours else None
        self._name = self._observation_name()
        if self._ours:
            belongs = told["belongs"]
            self._line.expect = {name: belongs[name] for name in ("policy", "action_space", "noise_policy")}
            self._belongs = Binding.from_json(
                {name: value for name, value in belongs.items() if name not in ("action_space", "noise_policy")}
            )
        else:
            self._learn_sizes()
        try:
            self._spec = self._line.remote.action_spec
            check_directions(self._spec, env)
        except BaseException:
            self.close()
            raise
        # A flow of more than the actions (padding, a past) starts at noises that the actions don't tell of.
        self._plain = self._ours and (self._belongs.horizon, self._belongs.padding) == (self._spec.horizon, 0)
        self.settings = frozenset({"candidates", "magnitude"})
        self.about = self._line.address + (
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
            raise MismatchError(f"{self._line.address} can't be driven by a noise policy: {self.lacks('dsbc')}.")
        learned.binding.check(self.binding, "this noise policy")

    def fit(self, spec: EnvSpec) -> None:
        """Turn to a task: only its sentence changes."""
        self._env = spec

    def act(self, request: Request) -> Decided:
        """Ask the server.

        Raises:
            ServingError: it went away, or refuses; the next call connects again.
            MismatchError: it does not listen to this, or another policy is served by now.
        """
        method, steering, reference = request.method, request.steering, request.reference
        seen = self._message(request.observation[0])
        if method == "rank" and reference is not None and bool(reference.active.any()):
            from counterflow.serving import RankedRemote

            ranked = self._line.ask(
                lambda remote: RankedRemote(remote, steering.candidates, steering.distance).act(seen, reference)
            )
            return self._decided({"actions": ranked.actions, "noise": ranked.noise}, reference)
        if method in ("frs", "partial") and reference is not None:
            steered = self._line.ask(lambda remote: remote.infer(seen, steer=self._chunk_of(reference)))
            return self._decided(steered, reference)
        if method == "dsbc":
            assert request.learned is not None
            with torch.no_grad():
                noise = request.learned(torch.from_numpy(request.observation).flatten(1))[0].cpu().numpy()
            return self._decided(self._line.ask(lambda remote: remote.infer(seen, noise=noise)), None)
        decided = self._decided(self._line.ask(lambda remote: remote.infer(seen)), reference)
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
        count = 1 if self.lacks("rank") else FAN
        seen = self._message(observation)
        answers = self._line.ask_beside(lambda remote: [remote.infer(seen)["actions"] for _ in range(count)])
        return np.stack(answers).astype(np.float32)

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
        self._line.close()

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
        state = np.zeros(self._env.observation_dim, np.float32)
        horizon, dim = self._line.remote.infer(self._message(state))["actions"].shape
        if dim != self._env.action_dim:
            self.close()
            raise MismatchError(
                f"{self._line.address} gives actions of {dim} numbers and {self._env.name} expects {self._env.action_dim}. "
                "Serve a policy that was trained for this task."
            )
        self._line.spec = ActionSpec(
            horizon, dim, self._env.action_low, self._env.action_high, layout=self._env.action_layout
        )
        self.close()  # what comes next knows the sizes
