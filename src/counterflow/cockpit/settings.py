"""What a session drives, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from counterflow.checks import Range
from counterflow.cockpit.targets import METHODS
from counterflow.errors import UnknownNameError
from counterflow.experiments.evaluate import ReasonerSettings
from counterflow.learning.dsbc import DSBCConfig
from counterflow.policies import BasePolicy
from counterflow.random import check_seed
from counterflow.steering import MethodSettings


@dataclass(frozen=True)
class SessionSettings:
    """What a session drives, and how.

    Attributes:
        env: the task; others of its family can be chosen later.
        out: the run's folder.
        policy: the frozen policy: its name or path, a server's address (serve://host:port), or the object itself; None: the
            shipped prior of the task's family.
        noise_policy: what 'counterflow distill' wrote, to drive with it at once.
        critic: what 'counterflow critic' wrote, for "guided".
        seed: what every episode descends from.
        method: how references are followed at first; None: FRS, or what a server does.
        steering: of the methods; K of the noises that are recorded is `steering.reversal_steps`, or a server's own.
        convention: how a direction is written into a chunk.
        magnitude: overrides the convention's.
        stale_after: seconds after which the driver's report no longer counts.
        rate: actions a second.
        size: height and width of the picture, pixels.
        workers: simulator processes; 1, or 0 for none.
        device: where the policy computes.
        distillation: settings of the training.

    Raises:
        InvalidInputError: a number is out of range.
        UnknownNameError: there is no such method.
    """

    env: str
    out: Path
    policy: str | BasePolicy | None = None
    noise_policy: Path | None = None
    critic: Path | None = None
    seed: int = 0
    method: str | None = None
    steering: MethodSettings = field(default_factory=MethodSettings)
    convention: str = "ogbench"
    magnitude: float | None = None
    stale_after: float = 0.6
    rate: float = 20.0
    size: int = 256
    workers: int = 1
    device: str = "cpu"
    distillation: DSBCConfig = field(default_factory=DSBCConfig)

    def __post_init__(self) -> None:
        """Check names and numbers."""
        if self.method is not None and self.method not in METHODS:
            raise UnknownNameError("method", self.method, METHODS)
        Range(1, 200, unit="actions a second").check("rate", self.rate)
        Range(64, 1024, unit="pixels").check("size", self.size)
        check_seed(self.seed)
        ReasonerSettings(convention=self.convention, magnitude=self.magnitude).writing()
