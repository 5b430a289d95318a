"""The simulator that is driven, and what it showed last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from counterflow.cockpit.settings import SessionSettings
from counterflow.envs import Batch, CameraView, EnvSpec, RenderSettings, VectorEnv, env_names, family_of, make_env
from counterflow.errors import WorkerError
from counterflow.experiments.rollout import seen_by
from counterflow.reasoners import Reasoner, View

MakeEnv = Callable[[SessionSettings], VectorEnv]


class Simulator:
    """One environment of a family, which can be exchanged for another.

    It is opened in two steps, because a policy is fitted to a task before anything moves: `open`, then `stand`.

    Args:
        settings: the first task, and how it is drawn.
        make: makes an environment; None: `make_env`.

    Attributes:
        name: the task, also where its simulator could not be started.
        env: the environment; None: there is none.
        spec: the task's.
        batch: what was seen last.
        camera: through which it is drawn.
    """

    spec: EnvSpec
    batch: Batch
    camera: CameraView

    def __init__(self, settings: SessionSettings, make: MakeEnv | None = None) -> None:
        self._settings = settings
        self._make = _make_env if make is None else make
        self.name = settings.env
        self.env: VectorEnv | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks of this family."""
        return [name for name in env_names() if family_of(name) == family_of(self._settings.env)]

    def open(self, name: str) -> None:
        """Start a task's environment.

        Raises:
            CounterflowError: it can't be started.
        """
        self.close()
        self.name = name
        self.env = self._make(replace(self._settings, env=name))
        self.spec = self.env.spec

    def stand(self) -> None:
        """Reset it once: cameras stand where they stand only after a reset."""
        env = self._require()
        self.batch = env.reset([0])
        self.camera = env.camera()

    def reset(self, seed: int) -> None:
        """Begin an episode.

        Raises:
            WorkerError: it died.
        """
        self.batch = self._require().reset([seed])

    def execute(self, action: npt.NDArray[np.float32]) -> None:
        """Execute one action (A,), in environment units.

        Raises:
            WorkerError: it died.
        """
        self.batch = self._require().execute(action[None, None], rows=[0], record=[0])

    def render(self) -> npt.NDArray[np.uint8]:
        """Return a picture of how it stands."""
        return self._require().render()

    def shown_to(self, reasoner: Reasoner) -> View:
        """Return what a reasoner is shown of it."""
        return seen_by(reasoner, self._require(), self.batch, 0)

    @property
    def effector(self) -> npt.NDArray[np.float64]:
        """Where the gripper is, (3,) metres."""
        return self.batch.view(0)["proprio/effector_pos"]

    def close(self) -> None:
        """End it."""
        if self.env is not None:
            self.env.close()
            self.env = None

    def _require(self) -> VectorEnv:
        if self.env is None:
            raise WorkerError("there is no simulator. Press 'restart the simulator'.")
        return self.env


def _make_env(settings: SessionSettings) -> VectorEnv:
    render = RenderSettings(settings.size, settings.size)
    return make_env(settings.env, 1, workers=settings.workers, render=render)
