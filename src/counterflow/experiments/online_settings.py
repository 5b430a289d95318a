"""Settings of online runs: of a run beside those of the algorithm, and presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from counterflow.checks import SHARE, check_name, check_numbers
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.experiments.steering_env import RewardKind, value_range
from counterflow.learning.dsrl import DSRLConfig, Variant
from counterflow.learning.residual import ResidualConfig
from counterflow.learning.rfs import RFSConfig
from counterflow.policies import BasePolicy
from counterflow.steering import LatentShape, Ports, SteeringSpace, suggest_bound
from counterflow.steering.latent import LatentKind, Rest

Algorithm = Literal["dsrl", "residual", "rfs"]
Config = DSRLConfig | ResidualConfig | RFSConfig
CONFIGS: dict[str, type[DSRLConfig] | type[ResidualConfig] | type[RFSConfig]] = {
    "dsrl": DSRLConfig,
    "residual": ResidualConfig,
    "rfs": RFSConfig,
}
DEFAULT_BOUND = 1.5


@dataclass(frozen=True)
class OnlineRun:
    """Settings of a run beside those of the algorithm.

    Attributes:
        decisions: chunks of each seed in all.
        num_envs: environments of each seed.
        reward: "cost", "success" or "dense", see `SteeredRows`.
        clip_values: keep what critics learn within what this reward allows, where the entropy is no part of it.
        steps: K, denoising steps.
        bound: the noise bound; 0: chosen from the noises of prefilled successes, 1.5 without any, and for RFS none: its latents
            are Gaussian, as the prior's are, and drift as far as it pays. Given a bound they are clipped to it.
        latent: the latent's shape: "full", "low_rank" or "repeated".
        rank: of "low_rank".
        rest: of "low_rank", "prior" or "zero".
        residual_bound: largest residual, units of the environment's actions: one number, or one a dimension.
        ports: of RFS, "both", or as an ablation "latent" or "residual".
        capacity: decisions that a seed's replay holds.
        first: use the first so many recorded episodes; 0: all.
        successes_only: prefill with successful episodes alone.
        keep_steering: of DSRL: at each decision choose between the actor's latent and the reasoner's reversed reference by value.
        reasoner: of the anchors, whether a reasoner's word counts.
        reasoner_error: of the reasoner that either of these two asks, the probability that its direction is wrong.
        reteach_every: of DSRL that imitates a noise policy: decisions of a seed after which this is distilled again, for each
            seed from the quicker half of its successes so far (`online_teaching.Teachers`); 0: it stays as it was given.
        inversion: how the noise of every step that was executed in those successes is found: "regularised" (the easiest to
            learn), or "exact", where the flow is a large network and gradients through it cost too much.
        particles: of the anchors, noises for each.
        spread: of the anchors, their standard deviation.
        start_episodes: with how many episodes the steered start is compared with the base policy; 0: not at all.
        evaluate_every: decisions of a seed between evaluations; 0: none but at the end.
        episodes: of an evaluation, each seed; 0: no evaluation at all.
        final_episodes: of the evaluation at the end, each seed; 0: as many as of the others.
        checkpoint_every: decisions of a seed between checkpoints.
        report_every: decisions of a seed between reports.

    Raises:
        InvalidInputError: a number is out of range.
        UnknownNameError: no such name.
    """

    decisions: int = 5_000
    num_envs: int = 4
    reward: RewardKind = "cost"
    clip_values: bool = False
    steps: int = 5
    bound: float = 0.0
    latent: LatentKind = "full"
    rank: int = 2
    rest: Rest = "prior"
    residual_bound: tuple[float, ...] = (0.2,)
    ports: Ports = "both"
    capacity: int = 100_000
    first: int = 0
    successes_only: bool = False
    keep_steering: bool = False
    reasoner: bool = False
    reasoner_error: float = 0.0
    reteach_every: int = 0
    inversion: Literal["regularised", "exact"] = "regularised"
    particles: int = 8
    spread: float = 0.5
    start_episodes: int = 20
    evaluate_every: int = 1_000
    episodes: int = 50
    final_episodes: int = 0
    checkpoint_every: int = 500
    report_every: int = 100

    def __post_init__(self) -> None:
        """Check every setting."""
        check_numbers(
            self, or_zero=("first", "reteach_every", "start_episodes", "evaluate_every", "episodes", "final_episodes")
        )
        SHARE.check_all(self, "reasoner_error")
        check_name("reward", self.reward, RewardKind)
        check_name("steering ports", self.ports, Ports)
        check_name("inversion", self.inversion, Literal["regularised", "exact"])
        if not self.residual_bound or not all(0 < one < float("inf") for one in self.residual_bound):
            raise InvalidInputError(
                f"residual_bound is {self.residual_bound}; expected one positive number, or one for each action dimension."
            )
        LatentShape(self.latent, self.rank, self.rest)

    def bounded(self, config: Config, horizon: int) -> Config:
        """Return an algorithm's settings with the range of values that this run's reward allows, if it is to be kept.

        Args:
            config: of the algorithm; bounds that it has already stay.
            horizon: executed steps of a chunk.
        """
        if not self.clip_values or isinstance(config, RFSConfig) or config.entropy_backup:
            return config
        if (config.lowest_value, config.highest_value) != (None, None):
            return config
        low, high = value_range(self.reward, config.discount, horizon)
        return replace(config, lowest_value=low, highest_value=high)

    def space(self, algorithm: str, policy: BasePolicy, noises: Tensor | None = None) -> SteeringSpace:
        """Return the actions of an algorithm.

        Args:
            algorithm: "dsrl", "residual" or "rfs".
            policy: the frozen policy.
            noises: (N, H, A) of successes, of which a bound that was left open is chosen.

        Raises:
            InvalidInputError: a noise bound was given to RFS's residual alone, or bounds don't fit the policy.
        """
        if algorithm == "rfs" and self.ports == "residual" and self.bound:
            raise InvalidInputError(
                f"bound is {self.bound}, and RFS with ports 'residual' leaves the noise as it is; expected 0. Leave the bound "
                "out, or decide on the latent too (ports 'both')."
            )
        shape = LatentShape(self.latent, self.rank, self.rest)
        ports: Ports = {"dsrl": "latent", "residual": "residual", "rfs": self.ports}[algorithm]  # type: ignore[assignment]
        bound: float | None = self.bound or DEFAULT_BOUND
        if not self.bound and noises is not None and len(noises):
            bound = suggest_bound(noises, shape)
        if algorithm == "rfs":
            bound = self.bound or None
        residual = self.residual_bound[0] if len(self.residual_bound) == 1 else self.residual_bound
        return SteeringSpace(policy, ports, self.steps, "euler", bound, shape, residual, algorithm == "residual")


PresetName = Literal["small", "paper"]

# Two cores, state observations: networks of 256, four critics, a sparse reward. Values are below 1, and the entropy of 25 numbers
# is not: with it in the critics' target and a temperature of 0.1 values are all entropy for the first 15,000 updates
# (benchmarks/online_rl/README.md, "What settings cost").
SMALL_SAC: dict[str, Any] = {
    "width": 256,
    "depth": 2,
    "members": 4,
    "batch_size": 128,
    "update_ratio": 5,
    "success_share": 0.25,
    "prefilled_share": 0.25,
    "entropy_backup": False,
    "initial_temperature": 0.01,
    "warmup": 200,
}
# Where there is a noise policy, it is imitated wherever the replay has been, by actors that follow the critics once these know
# something: an actor that begins as one and only remembers some hundred recorded noises has lost it within twenty updates.
# Its noises lie within 3 (`RegressorConfig.bound`).
TAUGHT: dict[str, Any] = {"bc_from": "teacher", "bc_batch": 128, "actor_delay": 1_000, "warmup": 40}
TAUGHT_RUN: dict[str, Any] = {"bound": 4.0}
SMALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dsrl": ({**SMALL_SAC, "bc_weight": 0.5, "distill_steps": 4}, {"bound": 2.0}),
    "residual": (SMALL_SAC, {"residual_bound": (0.3,)}),
    "rfs": (
        {"rollout": 64, "learning_rate": 1e-3, "value_learning_rate": 3e-3, "desired_divergence": 0.5},
        {"residual_bound": (0.3,), "num_envs": 8, "decisions": 20_000},
    ),
}
# DSRL's released settings: SAC variant on pi0, noise aliasing in simulation; RFS as far as it is known (its own table could not
# be found; an independent re-implementation's networks). A residual of 0.3 is 1.5 cm in OGBench.
PAPER_DSRL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sac": (
        {
            "discount": 0.999,
            "members": 10,
            "aggregation": "mean",
            "entropy_backup": False,
            "actor_learning_rate": 1e-4,
            "width": 128,
            "depth": 3,
            "bc_weight": 1.0,
        },
        {"bound": 1.0, "latent": "repeated", "reward": "cost"},
    ),
    "aliasing": (
        {"width": 2048, "depth": 3, "target_entropy": 0.0, "warmup": 6_000},  # 1,500 of each environment
        {"bound": 1.5, "num_envs": 4, "reward": "cost"},
    ),
    "anchors": ({"members": 10, "aggregation": "mean"}, {"particles": 8, "spread": 0.5, "reward": "cost"}),
}
PAPER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "residual": ({"discount": 0.999, "update_ratio": 20}, {"residual_bound": (0.3,), "reward": "cost"}),
    "rfs": ({}, {"residual_bound": (0.3,), "num_envs": 64, "decisions": 500_000}),
}
PAPER_DECISIONS = 50_000


def online_preset(
    algorithm: str, name: PresetName, variant: Variant = "sac", *, taught: bool = False
) -> tuple[Config, OnlineRun]:
    """Return an algorithm's settings, and its run's.

    Args:
        algorithm: "dsrl", "residual" or "rfs".
        name: "small" (two cores) or "paper" (the released settings).
        variant: of DSRL.
        taught: whether there is a noise policy for DSRL's actor to imitate; makes a difference to "small" alone, the released
            code has none.

    Raises:
        UnknownNameError: no such algorithm, preset or variant.
    """
    if algorithm not in CONFIGS:
        raise UnknownNameError("online algorithm", algorithm, CONFIGS)
    check_name("preset", name, PresetName)
    if algorithm == "dsrl" and variant not in PAPER_DSRL:
        raise UnknownNameError("variant", str(variant), PAPER_DSRL)
    chosen = SMALL[algorithm] if name == "small" else PAPER_DSRL[variant] if algorithm == "dsrl" else PAPER[algorithm]
    own, run = chosen
    common: dict[str, Any] = (
        {"reward": "success", "clip_values": True}
        if name == "small"
        else {"decisions": PAPER_DECISIONS, "evaluate_every": 5_000}
    )
    if algorithm == "dsrl":
        own = {**own, "variant": variant}
        if taught and name == "small":
            own, run = {**own, **TAUGHT}, {**run, **TAUGHT_RUN}
    return CONFIGS[algorithm](**own), OnlineRun(**{**common, **run})
