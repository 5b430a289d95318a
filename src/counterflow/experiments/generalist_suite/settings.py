"""What the chain does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from counterflow.checks import COUNT, SHARE, check_name
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.experiments.evaluate import ReasonerSettings
from counterflow.experiments.generalist import TRAINING
from counterflow.learning import BCConfig
from counterflow.policies import GeneralistConfig
from counterflow.random import check_seed
from counterflow.steering.steered import check_steps

BOUND = 8.0
"""Of noise policies: of the noises of references that are moved far, up to a third lies beyond the default of 3."""
AGAIN: dict[str, Any] = {"reteach_every": 150, "inversion": "exact", "bound": BOUND}
"""DSRL + FRS has noise policies that are distilled again as successes are found; inversion and bound are the first ones'."""
LIBERO_STARTS = 50
"""Initial states of a task of LIBERO's."""
EVALUATIONS = 3
"""Of a run that learns online: one of failing episodes takes as long as 250 decisions."""


@dataclass(frozen=True)
class SuiteSettings:
    """What the chain does.

    Attributes:
        family: "metaworld" or "libero"; its split is `counterflow/envs/tasks/held_out.json`.
        tasks: leave all other tasks out (for a trial); empty: all of the split.
        policy: another policy than the one that is trained here: a checkpoint or run folder, or lerobot: and a hub id or folder.
        device: where it computes.
        num_envs: environments stepped side by side; None: chosen.
        convention: how directions are written into references, "ogbench" or "paper".
        gripper: what references say of the gripper: what the reasoner does ("said"), or as in the paper nothing ("hold").
        reasoner_error, reasoner_delay: how often the reasoner is wrong, and how many chunks late it is.
        seed: what everything descends from.
        episodes: for each method on each task.
        expert_episodes: for each task's expert.
        demonstrations: successful ones, for each training task.
        noise: of the experts' motion, in the first two stages.
        architecture, learning: of the generalist.
        low: base success up to which a held-out task counts as one that the generalist fails.
        regime: base success up to which a held-out task is steered at all (the paper's 40%).
        reversals, taus, candidates: among what K, tau and n are chosen; of equally good ones the first.
        distilled: how many tasks are distilled, at most.
        successes: how many steered successes each is distilled from.
        noise_steps: denoising steps of noise policies and of what learns online; None: K.
        works, hard: how many tasks reinforcement learning is tried on, of those where FRS works and of the others.
        decisions: of reinforcement learning, for each seed.
        learning_seeds: of reinforcement learning.
        guided: for the guidance table, how many tasks the critic has seen, and as many that it hasn't.
        rollouts: of the generalist alone, for each task that the critic has seen.
        workers: processes of the first two stages.

    Raises:
        UnknownNameError: there is no split of that family.
        InvalidInputError: a number is out of range.
    """

    family: str = "metaworld"
    tasks: tuple[str, ...] = ()
    policy: str | None = None
    device: str = "cpu"
    num_envs: int | None = None
    convention: str = "ogbench"
    gripper: Literal["said", "hold", "policy"] = "said"
    reasoner_error: float = 0.0
    reasoner_delay: int = 0
    seed: int = 0
    episodes: int = 20
    expert_episodes: int = 10
    demonstrations: int = 50
    noise: float = 0.1
    architecture: GeneralistConfig = field(default_factory=lambda: GeneralistConfig(width=96, encoder_depth=2, depth=3))
    learning: BCConfig = field(default_factory=lambda: replace(TRAINING, steps=25_000))
    low: float = 0.1
    regime: float = 0.4
    reversals: tuple[int, ...] = (5, 3, 10, 20)
    taus: tuple[float, ...] = (0.5, 0.3, 0.7, 0.9)
    candidates: tuple[int, ...] = (16, 4, 8)
    distilled: int = 15
    successes: int = 18
    noise_steps: int | None = None
    works: int = 6
    hard: int = 3
    decisions: int = 3_000
    learning_seeds: tuple[int, ...] = (0,)
    guided: int = 5
    rollouts: int = 50
    workers: int = 2

    def __post_init__(self) -> None:
        """Check family and numbers."""
        if self.family not in ("metaworld", "libero"):
            raise UnknownNameError("family with a split", self.family, ["metaworld", "libero"])
        COUNT.check_all(self, "episodes", "expert_episodes", "demonstrations", "successes",
                        "decisions", "rollouts", "workers")  # fmt: skip
        if self.noise_steps is not None:
            check_steps(self.noise_steps)
        SHARE.check_all(self, "low", "regime", "noise")
        check_seed(self.seed)
        for name in ("reversals", "taus", "candidates", "learning_seeds"):
            if not getattr(self, name):
                raise InvalidInputError(f"{name} is empty; expected one value or more.")
        if self.family == "libero" and self.expert_episodes > LIBERO_STARTS:
            raise InvalidInputError(
                f"expert_episodes is {self.expert_episodes}; expected at most {LIBERO_STARTS}, the initial states of a task of "
                "LIBERO's."
            )
        said = ReasonerSettings(self.reasoner_error, self.reasoner_delay, self.convention, gripper=self.gripper)
        said.writing()
        check_name("gripper", self.gripper, Literal["said", "hold", "policy"])
        SHARE.check("reasoner_error", self.reasoner_error)
