"""Serve a policy to robots, by openpi's protocol."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from counterflow.addresses import KEY_VARIABLE
from counterflow.cli_options import LearnedName, Steering, SteerName, load_learned
from counterflow.errors import InvalidInputError

if TYPE_CHECKING:
    from counterflow.serving import PolicyServer, ServedPolicy, ServerSettings

SWITCH_INTERVAL = 0.0005  # seconds


@dataclass(frozen=True)
class Serve:
    """Serve a policy, steered or not, to robots that speak openpi's websocket protocol. Stop it with Ctrl-C or SIGTERM."""

    policy: tyro.conf.Positional[str]
    """A shipped prior (cube-single, cube-double, scene, puzzle-3x3, metaworld, libero), a checkpoint, a run folder, or
    lerobot: and a hub id or folder."""
    steer: SteerName | LearnedName = "frs"
    """How it follows the references that clients send; dsbc, bc: what 'counterflow distill' learned, actor, anchors: what
    online learning made, see --noise-policy. A request without a reference gets what the policy does by
    itself."""
    noise_policy: Path | None = None
    """What was learned, for --steer dsbc, bc, actor or anchors, as in 'counterflow eval'."""
    host: str = "127.0.0.1"
    """The address to listen at. Beyond this machine only with a key (or --anyone)."""
    port: int = 8000
    """The port; 0 takes a free one."""
    api_key_file: Path | None = None
    """A file with the key that clients must present; default: the environment's COUNTERFLOW_API_KEY, if set. (As an argument,
    everybody on this machine could read it.)"""
    anyone: bool = False
    """Listen beyond this machine without a key."""
    tls_certificate: Path | None = None
    """PEM file of a certificate: clients then connect to wss://."""
    tls_key: Path | None = None
    """PEM file of its private key; default: it lies in the certificate's file."""
    max_connections: int = 64
    """Clients at a time."""
    max_batch: int = 32
    """Requests that are decided together; 1 for one after the other."""
    max_message: int = 16
    """Largest message, MiB."""
    patience: float = 60.0
    """Seconds after which a request that isn't answered is answered with an error."""
    grace: float = 10.0
    """Seconds that requests have to finish when the server is stopped."""
    seed: int = 0
    """What every client's draws descend from."""
    convention: Literal["ogbench", "paper"] = "ogbench"
    """How a direction becomes a reference chunk."""
    magnitude: float | None = None
    """Length of the reference's motion; default: the convention's."""
    rename: tuple[str, ...] = ()
    """What robots call the policy's entries, as theirs=ours; entries of inner maps are called outer/inner."""
    device: str = "cpu"
    """Where the policy computes."""
    steering: Annotated[Steering, tyro.conf.arg(name="")] = field(default_factory=Steering)

    def run(self, console: Console) -> None:
        """Serve until a signal comes."""
        served, settings = self.served(), self.settings()
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
        # One line for everybody who knocks is too many, and strangers decide how many.
        logging.getLogger("counterflow.serving.websockets").setLevel(logging.CRITICAL)
        # The thread that infers and the one that talks share the interpreter; by default either may keep it for 5 ms.
        sys.setswitchinterval(SWITCH_INTERVAL)
        asyncio.run(_serve(served, settings, console))
        console.print("stopped.")

    def served(self) -> ServedPolicy:
        """Load the policy and steer it."""
        from counterflow.experiments.evaluate import ReasonerSettings, steered_by
        from counterflow.policies.loading import load
        from counterflow.serving import ServedPolicy
        from counterflow.serving.remote import not_steerable

        if self.policy.startswith(("ws://", "wss://", "http://", "https://")):
            raise not_steerable(self.policy)
        prior = load(self.policy, self.device)
        learned = load_learned(self.steer, self.noise_policy, self.device)
        return ServedPolicy(
            steered_by(prior, self.steer, self.steering.settings(), learned),
            seed=self.seed,
            convention=ReasonerSettings(convention=self.convention, magnitude=self.magnitude).writing(),
            names=self._names(),
            name=Path(self.policy).name,
            method=self.steer,
        )

    def settings(self) -> ServerSettings:
        """Return where and for whom to serve."""
        from counterflow.serving import MessageLimits, ServerSettings

        return ServerSettings(
            host=self.host,
            port=self.port,
            api_key=self._api_key(),
            anyone=self.anyone,
            tls_certificate=self.tls_certificate,
            tls_key=self.tls_key,
            max_connections=self.max_connections,
            max_batch=self.max_batch,
            max_waiting=self.max_connections,
            patience=self.patience,
            grace=self.grace,
            limits=MessageLimits(size=self.max_message * 2**20),
        )

    def _names(self) -> dict[str, str]:
        names = dict(pair.split("=", 1) for pair in self.rename if "=" in pair)
        if len(names) != len(self.rename):
            raise InvalidInputError(
                f"--rename is {' '.join(self.rename)}; expected pairs 'theirs=ours', for example "
                "observation/image=observation.images.top, each name of theirs once."
            )
        return names

    def _api_key(self) -> str | None:
        if self.api_key_file is None:
            return os.environ.get(KEY_VARIABLE)
        try:
            return self.api_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"the API key's file {self.api_key_file} can't be read: {error}.") from error


async def _serve(served: ServedPolicy, settings: ServerSettings, console: Console) -> None:
    """Serve until SIGINT or SIGTERM; a second signal ends the process at once."""
    from counterflow.serving import PolicyServer

    server = PolicyServer(served, settings)
    await server.start()
    _say(console, server)
    loop = asyncio.get_running_loop()
    stopping: list[asyncio.Task[None]] = []

    def stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        stopping.append(loop.create_task(server.stop()))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    await server.wait_stopped()


def _say(console: Console, server: PolicyServer) -> None:
    settings, belongs = server.settings, server.served.belongs
    noise_policy = f", noise policy {belongs['noise_policy']}" if belongs["noise_policy"] else ""
    console.print(
        f"serving {server.served.name} ({server.served.method}) at {server.url}\n"
        f"  policy {belongs['policy']}, action space {belongs['action_space']}{noise_policy}\n"
        f"  /healthz and /metrics on the same port; {'with' if settings.api_key else 'without'} an API key",
        soft_wrap=True,
        highlight=False,
    )
