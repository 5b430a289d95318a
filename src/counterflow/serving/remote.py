"""Policies of other servers: openpi's, or Counterflow's on another machine.

A server gives finished action chunks and no velocity field, so from here there is neither a start to choose nor a flow to guide.
What works from outside is to ask several times and keep the chunk that is nearest to a reference: `RankedRemote`.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import connect

from counterflow.errors import CounterflowError, InvalidInputError, MismatchError, ServingError
from counterflow.layout import ActionLayout
from counterflow.policies import ActionSpec, Normaliser
from counterflow.reasoners import OGBENCH, Convention, Direction, to_reference
from counterflow.serving.messages import MessageLimits, pack, unpack
from counterflow.serving.requests import RESERVED
from counterflow.serving.served import check_expected
from counterflow.steering import NearestToReference, Reference, SteeringContext

# A server of the protocol sends one map on connect; where the policy's identity stands in it is Counterflow's own.
BELONGS = "belongs"


def not_steerable(what: str) -> MismatchError:
    """Return the error that says why a remote policy can't be steered inside its flow, and what can be done."""
    return MismatchError(
        f"{what} is a policy server: it gives finished action chunks and offers no velocity field, so its flow can't be "
        "reversed, guided or started elsewhere from here. Sample-and-rank works from outside: "
        "counterflow.serving.RankedRemote(remote). Or steer where the field is: 'counterflow serve POLICY --steer frs' on that "
        "machine, and send 'steer' with the observation."
    )


class RemotePolicy:
    """A policy on a server that speaks openpi's protocol. One connection, one question at a time.

    It looks like a base policy so that steering it says why it can't be: `encode` and `velocity` raise `MismatchError`.

    Args:
        url: ws://host:port or wss://host:port.
        api_key: what the server wants to be presented, or None.
        expect: what the policy must be, some of what the server's metadata hold under "belongs" (for example
            {"policy": fingerprint, "action_space": fingerprint}); checked on connecting and sent along with every request.
        spec: its action space; None: as the server says, if it does.
        tls: a context that trusts the server's certificate; None: the system's.
        timeout: seconds to wait for the connection and for an answer.
        limits: how large an answer may be.

    Raises:
        ServingError: the server can't be reached, or refuses.
        MismatchError: the policy is not the one that is expected, or the server says nothing of its policy.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        expect: Mapping[str, Any] | None = None,
        spec: ActionSpec | None = None,
        tls: ssl.SSLContext | None = None,
        timeout: float = 60.0,
        limits: MessageLimits | None = None,
    ) -> None:
        self.url, self._timeout = url, timeout
        self._limits = MessageLimits() if limits is None else limits
        self._expect = None if expect is None else dict(expect)
        self._shape: tuple[int, ...] | None = None
        headers = {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        try:
            self._socket = connect(
                url,
                additional_headers=headers,
                compression=None,
                max_size=self._limits.size,
                open_timeout=timeout,
                ssl=tls,
            )
        except InvalidStatus as error:
            body = bytes(error.response.body or b"").decode("utf-8", "replace").strip()
            raise ServingError(f"{url} refused: HTTP {error.response.status_code} {body[:500]}") from error
        except (OSError, ValueError, WebSocketException) as error:
            raise ServingError(
                f"{url} can't be reached: {error}. Is the server running, and is this its address (ws://host:port)?"
            ) from error
        try:
            metadata = self._receive()
            if not isinstance(metadata, dict):
                raise ServingError(f"{url} began with a {type(metadata).__name__}; expected a map of metadata.")
            self.metadata: dict[str, Any] = metadata
            self._check_identity()
            self._spec = self._told_spec() if spec is None else spec
        except BaseException:
            self.close()
            raise

    @property
    def action_spec(self) -> ActionSpec:
        """Its action space, as given or as the server says.

        Raises:
            MismatchError: neither says.
        """
        if self._spec is None:
            raise MismatchError(
                f"{self.url} does not say what its actions are (plain openpi servers don't). Give spec=ActionSpec(horizon, dim, "
                "...), with a normaliser and a layout where directions are to be used."
            )
        return self._spec

    def encode(self, observation: Any) -> NoReturn:  # noqa: ARG002 - the signature of a base policy
        """Say that there is no field to steer.

        Raises:
            MismatchError: always.
        """
        raise not_steerable(self.url)

    def velocity(self, context: Any, x: Tensor, t: Tensor) -> NoReturn:  # noqa: ARG002
        """Say that there is no field to steer.

        Raises:
            MismatchError: always.
        """
        raise not_steerable(self.url)

    def infer(
        self, observation: Mapping[str, Any], *, steer: Any = None, noise: Any = None, view: Any = None
    ) -> dict[str, Any]:
        """Ask for an action chunk.

        Args:
            observation: arrays, numbers and texts by name, of one moment.
            steer: for a Counterflow server: a `Direction`, a reference chunk (H, A) in environment units, a reasoner's name, or
                a map (see `requests.read_steer`).
            noise: for a Counterflow server: where the flow starts, (H, A).
            view: for a Counterflow server: what a reasoner sees.

        Returns:
            The answer: `actions` (H, A) and whatever else the server says.

        Raises:
            ServingError: the server answered with an error, or went away.
            MismatchError: the actions are of another shape than the action space or earlier answers; `steer`, `noise` or `view`
                were given to a server that would overlook them.
            InvalidInputError: the message can't be written, or the actions are not finite numbers.
        """
        message = dict(observation)
        given = {"steer": plain_steer(steer), "noise": noise, "view": view}
        asked = {name: value for name, value in given.items() if value is not None}
        if asked and self.metadata.get("server") != "counterflow":
            raise MismatchError(
                f"{self.url} is not a Counterflow server and would overlook {', '.join(asked)}. Leave it out; to steer, use "
                "RankedRemote."
            )
        clash = [name for name in RESERVED if name in message]
        if clash:
            raise InvalidInputError(f"the observation has an entry {clash[0]!r}; give it as an argument instead.")
        if self._expect is not None:
            asked["expect"] = self._expect
        try:
            self._socket.send(pack(message | asked))
            answer = self._receive()
        except (ConnectionClosed, OSError) as error:
            raise ServingError(f"{self.url} went away: {error}. Connect again, and see its log.") from error
        return self._checked(answer)

    def close(self) -> None:
        """Leave."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> Any:
        try:
            message = self._socket.recv(self._timeout)
        except TimeoutError as error:
            self.close()  # the answer may still come, and would be taken for the next one
            raise ServingError(f"{self.url} did not answer within {self._timeout:g} s. Connect again.") from error
        except ConnectionClosed as error:
            raise ServingError(f"{self.url} went away: {error}. Connect again, and see its log.") from error
        if isinstance(message, str):
            raise ServingError(f"{self.url} answered with an error: {message[:2000]}")
        return unpack(message, self._limits)

    def _check_identity(self) -> None:
        if self._expect is None:
            return
        belongs = self.metadata.get(BELONGS)
        if not isinstance(belongs, dict):
            raise MismatchError(
                f"{self.url} does not say which policy it serves (plain openpi servers don't), and {self._expect} is expected. "
                "Connect without expecting anything if you trust it."
            )
        check_expected(self._expect, belongs, self.url)

    def _told_spec(self) -> ActionSpec | None:
        told = self.metadata.get("actions")
        if self.metadata.get("server") != "counterflow" or not isinstance(told, dict):
            return None
        try:
            layout, scaled = told["layout"], told.get("normalisation")  # older servers don't tell the latter
            return ActionSpec(
                told["horizon"],
                told["dim"],
                None if told["low"] is None else tuple(told["low"]),
                None if told["high"] is None else tuple(told["high"]),
                None
                if scaled is None
                else Normaliser(torch.tensor(scaled["offset"]), torch.tensor(scaled["scale"]), scaled["kind"]),
                executed=told.get("executed"),
                layout=None
                if layout is None
                else ActionLayout(
                    tuple(layout["translation"]),
                    tuple(layout["rotation"]),
                    layout["gripper"],
                    layout["gripper_close_sign"],
                ),
            )
        except (KeyError, TypeError, CounterflowError) as error:
            raise ServingError(f"{self.url} describes its actions in a way that can't be used: {error}.") from error

    def _checked(self, answer: Any) -> dict[str, Any]:
        actions = answer.get("actions") if isinstance(answer, dict) else None
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind != "f":
            raise ServingError(f"{self.url} answered without an array of actions (H, A).")
        if not np.isfinite(actions).all():
            raise InvalidInputError(f"{self.url} answered with actions that are NaN or infinite; don't execute them.")
        expected = self._shape if self._spec is None else (self._spec.horizon, self._spec.dim)
        if expected is not None and actions.shape != expected:
            raise MismatchError(
                f"{self.url} answered with actions of shape {actions.shape}; expected {expected} (horizon, action size). Another "
                "policy may be served there now."
            )
        self._shape = actions.shape
        return dict(answer)


@dataclass(frozen=True)
class RankedPlan:
    """What was kept, and from what.

    Attributes:
        actions: (H, A) environment units, what to execute.
        candidates: (N, H, A) all that the server gave.
        chosen: which of them.
        noise: (H, A + padding) where its flow started, normalised; None where the server doesn't say.
    """

    actions: npt.NDArray[np.float32]
    candidates: npt.NDArray[np.float32]
    chosen: int
    noise: npt.NDArray[np.float32] | None = None


class RankedRemote:
    """Sample-and-rank over a server: ask n times, keep the chunk that is nearest to the reference.

    The server must draw anew each time. The distance is measured in the action space's normalised units, which a Counterflow
    server tells; for others give the `RemotePolicy` a spec with a normaliser where the dimensions' sizes differ.

    Args:
        remote: the policy.
        candidates: n.
        distance: "cosine" or "l2", over the entries that the reference speaks for.
        convention: how a direction becomes a reference.

    Raises:
        InvalidInputError: a setting is out of range.
        MismatchError: nobody says what the actions are.
    """

    def __init__(
        self,
        remote: RemotePolicy,
        candidates: int = 16,
        distance: Literal["cosine", "l2"] = "cosine",
        convention: Convention = OGBENCH,
    ) -> None:
        self.remote, self.spec, self._convention = remote, remote.action_spec, convention
        self._edit = NearestToReference(candidates, distance)

    def act(
        self, observation: Mapping[str, Any], steer: Direction | Reference | npt.NDArray[Any] | None = None
    ) -> RankedPlan:
        """Decide on a chunk.

        Args:
            observation: arrays, numbers and texts by name, of one moment.
            steer: a direction, a reference of one row, or a chunk (H, A) in environment units; None: nobody speaks, and the
                server is asked once.

        Raises:
            MismatchError: the reference does not fit, or the server gives the same chunk every time.
            ServingError: the server answered with an error, or went away.
        """
        reference = self._reference(steer)
        silent = reference is None or not bool(reference.active.any())
        count = 1 if silent else self._edit.candidates
        answers = [self.remote.infer(observation) for _ in range(count)]
        chunks = np.stack([answer["actions"] for answer in answers]).astype(np.float32)
        if count > 1 and (chunks == chunks[0]).all():
            raise MismatchError(
                f"{self.remote.url} gave the same chunk {count} times: it does not draw its noise anew, so there is nothing to "
                "choose from. Serve the policy with random draws."
            )
        normalised = self.spec.normalise(torch.from_numpy(chunks))[None]
        kept = self._edit(normalised, SteeringContext(None, 1, reference))[0, 0]
        chosen = int((normalised[0] == kept).flatten(1).all(1).int().argmax())
        return RankedPlan(chunks[chosen], chunks, chosen, answers[chosen].get("noise"))

    def _reference(self, steer: Direction | Reference | npt.NDArray[Any] | None) -> Reference | None:
        if steer is None:
            return None
        if isinstance(steer, Direction):
            steer = to_reference([steer], self.spec, self._convention)
        elif not isinstance(steer, Reference):
            chunk = torch.from_numpy(np.asarray(steer, np.float32))
            steer = Reference.of(self.spec.normalise(chunk)[None] if chunk.ndim == 2 else chunk)
        steer.check(self.spec, 1)
        return steer


def plain_steer(steer: Any) -> Any:
    """Return what is sent for `steer`: a `Direction` as a map, everything else as it is."""
    if not isinstance(steer, Direction):
        return steer
    axes: Sequence[int] = [int(axis) for axis in steer.axes]
    return {"axes": axes, "amount": float(steer.amount), "gripper": steer.gripper, "defer": bool(steer.defer)}
