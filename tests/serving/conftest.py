"""Small policies to serve, and servers that run in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme
from torch import Tensor

from counterflow.policies import ActionLayout, ActionSpec, BasePolicy, FlowPolicy, NetworkConfig, Normaliser
from counterflow.serving import PolicyServer, ServedPolicy, ServerSettings, running
from counterflow.steering import MethodSettings, steer

HORIZON, DIM, SEEN = 3, 4, 6
SPEC = ActionSpec(
    HORIZON,
    DIM,
    (-2.0,) * DIM,
    (2.0,) * DIM,
    Normaliser(torch.tensor([0.1, 0.0, 0.0, 0.0]), torch.tensor([0.5, 1.0, 1.0, 2.0])),
    ActionLayout(translation=(0, 1, 2), gripper=3),
)
MakeServed = Callable[..., ServedPolicy]
Serve = Callable[..., PolicyServer]


class HeldPolicy:
    """Another policy that, while it is held, doesn't come back from encoding; and that counts."""

    def __init__(self, policy: FlowPolicy) -> None:
        self.policy, self.action_spec = policy, policy.action_spec
        self.observation_dim, self.fingerprint = policy.observation_dim, policy.fingerprint
        self.go, self.begun = threading.Event(), threading.Event()
        self.go.set()
        self.batches: list[int] = []

    def encode(self, observation: Tensor) -> Any:
        self.batches.append(len(observation))
        self.begun.set()
        assert self.go.wait(60)
        return self.policy.encode(observation)

    def velocity(self, context: Any, x: Tensor, t: Tensor) -> Tensor:
        return self.policy.velocity(context, x, t)


@pytest.fixture(scope="session")
def prior() -> FlowPolicy:
    torch.manual_seed(0)
    network = NetworkConfig(width=32, depth=2)
    policy = FlowPolicy(network, Normaliser(torch.zeros(SEEN), torch.ones(SEEN)), SPEC, "tests/robot")
    return policy.requires_grad_(False).eval()


@pytest.fixture
def held(prior: FlowPolicy) -> Iterator[HeldPolicy]:
    policy = HeldPolicy(prior)
    yield policy
    policy.go.set()


@pytest.fixture
def make_served(prior: FlowPolicy) -> MakeServed:
    """Steer a policy (default: the prior) and make it ready to be served."""

    def make(policy: BasePolicy | None = None, method: str = "frs", **options: Any) -> ServedPolicy:
        settings = MethodSettings(steps=4, reversal_steps=4, candidates=8)
        return ServedPolicy(steer(prior if policy is None else policy, method, settings), method=method, **options)

    return make


@pytest.fixture
def serve(make_served: MakeServed) -> Iterator[Serve]:
    """Serve policies, each in a thread, until the test ends."""
    with ExitStack() as servers:

        def begin(
            policy: BasePolicy | None = None,
            method: str = "frs",
            *,
            reasoners: dict[str, Any] | None = None,
            seed: int = 0,
            **settings: Any,
        ) -> PolicyServer:
            served = make_served(policy, method, reasoners=reasoners, seed=seed)
            return servers.enter_context(running(served, ServerSettings(**{"port": 0, **settings})))

        yield begin


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for the loopback and its key, in one file; beside it, in ca.pem, whom to trust."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    path = folder / "server.pem"
    authority.issue_cert("127.0.0.1", "localhost").private_key_and_cert_chain_pem.write_to_path(str(path))
    return path
