"""What is driven: a policy that was loaded here, or one that runs on a policy server.

A policy that is here is steered in every way that there is. Of a server's the prior lives elsewhere: it gives finished chunks,
so only what a server lets a client do can be offered. From outside a server can be asked as it is ("base"), overruled
("direct"), and asked several times ("rank"); a server of Counterflow's also steers by its own method when it is sent a
reference, and starts its flow at a noise that it is sent, so that noise policies can be recorded, trained here, and driven with.
"""

from __future__ import annotations

from collections.abc import Callable

from counterflow.addresses import is_server
from counterflow.cockpit.targets.local import LocalTarget
from counterflow.cockpit.targets.protocol import METHODS, Decided, Request, Target, binding_for
from counterflow.cockpit.targets.served import ServedTarget
from counterflow.errors import InvalidInputError
from counterflow.policies import BasePolicy
from counterflow.steering import ChunkCritic

__all__ = [
    "METHODS",
    "Decided",
    "LocalTarget",
    "Request",
    "ServedTarget",
    "Target",
    "binding_for",
    "open_target",
]


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
