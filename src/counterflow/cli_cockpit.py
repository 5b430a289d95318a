"""Steer by hand: a web page, or the keys of a terminal."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from counterflow.cli_options import Asking, Steering
from counterflow.errors import InvalidInputError

if TYPE_CHECKING:
    from counterflow.cockpit.driver import Driver
    from counterflow.cockpit.server import CockpitSettings
    from counterflow.cockpit.session import Session, SessionSettings
    from counterflow.reasoners import Reasoner

SWITCH_INTERVAL = 0.0005  # seconds: the thread that infers and the one that talks share the interpreter


@dataclass(frozen=True)
class Cockpit:
    """Drive a policy by hand in a web page (or a terminal): keep successes, train a noise policy on them, help it, export it."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/cube-single-task4; others of its family can be chosen on the page."""
    policy: str | None = None
    """A checkpoint, a run folder, lerobot: and a hub id or folder, or the address of a policy server (serve://host:port, wss://...;
    its key is read from the environment's COUNTERFLOW_API_KEY); default: the shipped prior of the task's family."""
    steer: Literal["base", "direct", "frs", "partial", "rank", "dsbc", "guided"] | None = None
    """How keys are followed at first; it can be switched while driving. Default: frs; of a server, what it was started with."""
    noise_policy: Path | None = None
    """What 'counterflow distill' wrote, to drive with, and to help."""
    critic: Path | None = None
    """What 'counterflow critic' wrote, for the method 'guided'."""
    out: Path | None = None
    """The run's folder: recordings, noise policies, films, tallies; default: runs/cockpit-<family>. Run again, it goes on."""
    host: str = "127.0.0.1"
    """The address to listen at. Beyond this machine a token is asked for, and made if none is given."""
    port: int = 8080
    """The port; 0 takes a free one."""
    token_file: Path | None = None
    """A file with the token that a page must present."""
    terminal: bool = False
    """Drive with this terminal's keys, without a web page (and without the extra 'cockpit')."""
    rate: float = 20.0
    """Actions a second."""
    size: int = 256
    """Height and width of the picture, pixels."""
    stale_after: float = 0.6
    """Seconds after which the page's last word no longer counts and the robot stands still."""
    convention: Literal["ogbench", "paper"] = "ogbench"
    """How a direction becomes a reference chunk."""
    magnitude: float | None = None
    """Length of the reference's motion; default: the convention's."""
    seed: int = 0
    """What every episode descends from."""
    device: str = "cpu"
    """Where the policy computes."""
    steering: Annotated[Steering, tyro.conf.arg(name="")] = field(default_factory=Steering)
    asking: Annotated[Asking, tyro.conf.arg(name="")] = field(default_factory=Asking)

    def run(self, console: Console) -> None:
        """Drive until a signal comes."""
        settings = self.session_settings()
        if self.terminal:
            from counterflow.cockpit.terminal import drive_in_terminal

            drive_in_terminal(settings, console, self.reasoners())
            return
        # First what can be wrong at once, then the simulator, which takes seconds.
        from counterflow.cockpit.server import check_port

        where = self.page_settings()
        check_port(where)
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.WARNING)
        sys.setswitchinterval(SWITCH_INTERVAL)
        driver = self.driver(settings)
        with console.status(f"starting the simulator of {self.env}"):
            driver.start()
        asyncio.run(_serve(driver, where, console))
        console.print(f"stopped. What was kept lies in {settings.out}")

    def session_settings(self) -> SessionSettings:
        """Return what is driven, and how."""
        from counterflow.cockpit.session import SessionSettings
        from counterflow.envs import check_env_name

        check_env_name(self.env)
        return SessionSettings(
            self.env,
            self._folder(),
            policy=self.policy,
            noise_policy=self.noise_policy,
            critic=self.critic,
            seed=self.seed,
            method=self.steer,
            steering=self.steering.settings(),
            convention=self.convention,
            magnitude=self.magnitude,
            stale_after=self.stale_after,
            rate=self.rate,
            size=self.size,
            device=self.device,
        )

    def _folder(self) -> Path:
        from counterflow.envs import family_of

        return self.out or Path("runs") / f"cockpit-{family_of(self.env).split('/')[-1]}"

    def page_settings(self) -> CockpitSettings:
        """Return where and for whom the page is there."""
        from counterflow.addresses import is_loopback
        from counterflow.cockpit.server import CockpitSettings, make_token

        token = None
        if self.token_file is not None:
            try:
                token = self.token_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidInputError(f"the token's file {self.token_file} can't be read: {error}.") from error
        elif not is_loopback(self.host):
            token = make_token()
        return CockpitSettings(self.host, self.port, token)

    def reasoners(self) -> dict[str, Callable[[str], Reasoner]]:
        """Return who can be handed over to, besides the script: a VLM, where one is named."""
        from counterflow.reasoners.vlm import VLMClient, VLMReasoner

        settings = self.asking.asked(needed=False)
        if settings is None:
            return {}
        client = VLMClient(settings, self.asking.folder(self._folder()))

        def make(env: str) -> Reasoner:
            from counterflow.envs import describe

            return VLMReasoner(client, describe(env).task)

        return {"vlm": make}

    def driver(self, settings: SessionSettings) -> Driver:
        """Return the driver, which is not started yet."""
        from counterflow.cockpit.driver import Driver
        from counterflow.cockpit.session import Session

        def make(background: ThreadPoolExecutor) -> Session:
            return Session(settings, background, self.reasoners())

        return Driver(make)


async def _serve(driver: Driver, settings: CockpitSettings, console: Console) -> None:
    """Serve until SIGINT or SIGTERM."""
    from counterflow.cockpit.server import Cockpit as CockpitServer
    from counterflow.cockpit.server import make_server

    server = make_server(CockpitServer(driver, settings))
    task = asyncio.create_task(server.serve())
    while not server.started and not task.done():
        await asyncio.sleep(0.02)
    if server.started:
        port = server.servers[0].sockets[0].getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        secret = "" if settings.token is None else f"#token={settings.token}"
        console.print(
            f"the cockpit is at http://{host}:{port}/{secret}\n  Ctrl-C ends it; what was kept is safe in {driver.out}",
            soft_wrap=True,
            highlight=False,
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: setattr(server, "should_exit", True))
    await task
