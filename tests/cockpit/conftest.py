"""A session over one simulator that stays open, and a scripted "person" who sees what the simulator tells."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from counterflow.cockpit.session import Session, SessionSettings
from counterflow.envs import RenderSettings, VectorEnv, make_env
from counterflow.learning.dsbc import DSBCConfig
from counterflow.reasoners import CubeReasoner
from counterflow.steering import RegressorConfig

TASK = "ogbench/cube-single-task1"
QUICK = DSBCConfig(RegressorConfig(members=2, width=16), steps=60, evaluate_every=20, patience=2)


class Kept:
    """An environment that stays open for the next test."""

    def __init__(self, env: VectorEnv) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def close(self) -> None: ...


@pytest.fixture(scope="session")
def simulator() -> Iterator[VectorEnv]:
    env = make_env(TASK, 1, workers=0, render=RenderSettings(64, 64))
    yield env
    env.close()


MakeSession = Callable[..., Session]


@pytest.fixture
def make_session(simulator: VectorEnv, tmp_path: Path) -> Iterator[MakeSession]:
    made: list[Session] = []

    def make(**changes: Any) -> Session:
        settings = SessionSettings(TASK, tmp_path / "run", size=64, distillation=QUICK)
        made.append(Session(replace(settings, **changes), make=lambda _: Kept(simulator)))
        return made[-1]

    yield make
    for session in made:
        session.close()


@pytest.fixture(scope="session")
def hold() -> Callable[..., float]:
    """Holds keys for so many actions, lets go, and returns what time it is then."""

    def hold(session: Session, *ways: str, actions: int = 5, now: float = 0.0) -> float:
        for _ in range(actions):
            session.control.report(ways, now)
            session.advance(now)
            now += 0.05
        session.control.report([], now)
        session.advance(now)
        return now

    return hold


class Person:
    """Presses the key that the scripted reasoner would name."""

    def __init__(self, session: Session) -> None:
        self.session, self._reasoner, self.now = session, CubeReasoner(), 0.0
        self._reasoner.reset(0)
        self._names = {axes: name for name, axes in session.control.ways.items()}

    def act(self) -> None:
        """Press for a chunk."""
        session = self.session
        direction = self._reasoner.decide(session.simulator.batch.view(0))
        if direction.gripper != session.control.gripper:
            session.control.grip(direction.gripper, self.now)
        held = [self._names[direction.axes]] if direction.axes in self._names else []
        if held:
            session.control.tap(held, self.now)
        else:
            session.control.grip(direction.gripper, self.now)
        session.advance(self.now)
        while session.state == "driving" and session.chunk is not None:
            self.now += 0.05
            session.advance(self.now)

    def solve(self, most: int = 80) -> bool:
        """Drive until the episode is over, or for so many chunks."""
        for _ in range(most):
            if self.session.state != "driving":
                break
            self.act()
        return self.session.state == "finished" and self.session.episode.success


@pytest.fixture
def make_person() -> type[Person]:
    return Person


@pytest.fixture(scope="session")
def stand_in() -> Any:
    """The module of the endpoint that stands in for a VLM."""
    place = Path(__file__).parents[1] / "reasoners" / "stand_in.py"
    spec = importlib.util.spec_from_file_location("cockpit_stand_in", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
