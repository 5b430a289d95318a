"""Critics of frozen policies, from their own successes and failures (the idea of GAF, arXiv 2607.02092).

A frozen policy is rolled out; every decision gives what it saw, the chunk that it executed and what came of the episode. The
reward is 1 for the chunk in which the task is solved and 0 for all others, discounted by gamma an executed action, so that a
value is the chance of success, less for success that is far away. Two ways to learn it:

    monte_carlo   L = E (Q(s, a) - G)^2,     G = success gamma^(actions after this chunk)
    td            L = E (Q(s, a) - y)^2,     y = r + gamma^executed Q'(s', a')    (0 in place of Q' after success)

where a' is the chunk that was executed next in the same episode (no maximum is taken: it is the policy's own value), and Q' a
slowly following copy. An episode that ran out of time did not end there: its last decision bootstraps from itself, as if what
it saw lasted, whose fixed point is 0. Monte Carlo learns from outcomes alone; TD lets episodes that passed through the same
states learn from each other.

Members hold out other episodes, successes and failures apart; each is kept as it was where its error on these, measured
against the outcomes G whatever the method, was lowest. What the held-out episodes say of the critic goes with it: the error
next to that of a constant, how well it tells successes from failures, and its calibration.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from counterflow.checks import COUNT, RATE, Range, check_names
from counterflow.errors import DatasetError, InvalidInputError
from counterflow.learning.held_out import HeldOut, Progress, fit, hold_out
from counterflow.policies import Normaliser
from counterflow.random import check_seed, child_seed, generator
from counterflow.steering.aggregation import Aggregation, aggregate
from counterflow.steering.critic import ChunkCritic, CriticBinding, CriticConfig

Method = Literal["td", "monte_carlo"]
Backup = Literal["own", "min", "mean", "lower_confidence"]
BINS = 5  # of the calibration


@dataclass(frozen=True)
class ChunkCriticConfig:
    """Settings of the learning.

    Attributes:
        critic: the network and what it looks at.
        method: "td" or "monte_carlo".
        discount: gamma, for each executed action.
        backup: of "td", what the next chunk is worth: "own" takes each member's own target network, which keeps its held-out
            episodes out of its targets and the members apart; the others aggregate over all members.
        target_rate: of "td", the share by which the target network follows at each update.
        steps: updates at most.
        batch_size: decisions in a member's batch.
        learning_rate: of AdamW.
        weight_decay: AdamW's.
        input_noise: standard deviation of the noise on the normalised inputs.
        chunk_noise: standard deviation of the noise on the normalised chunks: it makes the gradient, which is what guides,
            smoother.
        held_out: share of the episodes that each member holds out, at least one of each outcome where there are two or more.
        evaluate_every: updates between two held-out errors.
        patience: evaluations without a member improving after which training stops.

    Raises:
        UnknownNameError: no such method or backup.
        InvalidInputError: a number is out of range.
    """

    critic: CriticConfig = field(default_factory=lambda: CriticConfig(members=5, width=256, depth=2))
    method: Method = "td"
    discount: float = 0.99
    backup: Backup = "own"
    target_rate: float = 0.005
    steps: int = 5_000
    batch_size: int = 256
    learning_rate: float = 3e-4
    weight_decay: float = 1e-2
    input_noise: float = 0.1
    chunk_noise: float = 0.05
    held_out: float = 0.2
    evaluate_every: int = 100
    patience: int = 20

    def __post_init__(self) -> None:
        """Check every setting."""
        check_names(self, method=Method, backup=Backup)
        COUNT.check_all(self, "steps", "batch_size", "evaluate_every", "patience")
        RATE.check_all(self, "learning_rate", "target_rate", "discount")
        for name, most in (("held_out", 0.9), ("input_noise", 10.0), ("chunk_noise", 10.0), ("weight_decay", 100.0)):
            Range(0, most).check_all(self, name)


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What is learned from: decisions, those of an episode together and in their order.

    Attributes:
        inputs: (N, F) float32.
        chunks: (N, h, A) float32, normalised, what was executed.
        executed: (N,) int64, how many actions of each chunk were executed.
        success: (N,) bool, whether the episode succeeded; it ended with the chunk that solved the task.
        episodes: (N,) int64, the number of each decision's episode.
        binding: whose chunks they are.
        tasks: (N, E) float32, the embedding of each decision's task (`task_embedding`); E is 0 where there is none.

    Raises:
        DatasetError: nothing is there, shapes don't fit, values are not finite, or there are no successes or no failures.
    """

    inputs: npt.NDArray[np.float32]
    chunks: npt.NDArray[np.float32]
    executed: npt.NDArray[np.int64]
    success: npt.NDArray[np.bool_]
    episodes: npt.NDArray[np.int64]
    binding: CriticBinding
    tasks: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        """Check shapes, values and outcomes."""
        count = len(self.inputs)
        if self.tasks is not None and (self.tasks.ndim != 2 or len(self.tasks) != count):
            raise DatasetError(f"task embeddings have shape {self.tasks.shape}; expected ({count}, E), one a decision.")
        if count == 0 or self.inputs.ndim != 2 or self.inputs.shape[1] == 0:
            raise DatasetError(
                f"the inputs to learn from have shape {self.inputs.shape}; expected (N, F), both 1 or more. Record episodes "
                "with observations, or with a policy that offers features."
            )
        expected = {"chunks": (count, self.binding.horizon, self.binding.dim)}
        for name in ("chunks", "executed", "success", "episodes"):
            if getattr(self, name).shape != expected.get(name, (count,)):
                raise DatasetError(
                    f"{name} have shape {getattr(self, name).shape}; expected {expected.get(name, (count,))} for {count} "
                    "decisions."
                )
        for name in ("inputs", "chunks"):
            finite = np.isfinite(getattr(self, name)).reshape(count, -1).all(1)
            if not finite.all():
                raise DatasetError(
                    f"{name} hold NaN or infinite values, first in decision {int(np.argmin(finite))} (episode "
                    f"{int(self.episodes[np.argmin(finite)])}). Leave that episode out, or record it again."
                )
        if self.success.all() or not self.success.any():
            total = len(np.unique(self.episodes))
            missing, advice = (
                ("failed", "Record harder tasks, or the policy without steering")
                if self.success.all()
                else ("succeeded", "Record more of them, or steered ones beside them")
            )
            raise DatasetError(
                f"none of the {total} episodes {missing}, and a critic learns from what tells successes from failures. "
                f"{advice} ('counterflow record TASK --steer base --episodes 50')."
            )

    @property
    def last(self) -> npt.NDArray[np.bool_]:
        """(N,) whether a decision is the last one of its episode."""
        return np.append(self.episodes[1:] != self.episodes[:-1], True)

    def outcomes(self, discount: float) -> npt.NDArray[np.float32]:
        """Return G (N,): discount to the power of the actions executed after this chunk, 0 where the episode failed."""
        before = np.cumsum(self.executed)
        ends = before[self.last]
        total = np.repeat(ends, np.diff(np.flatnonzero(self.last), prepend=-1))
        return (self.success * discount ** (total - before)).astype(np.float32)


@dataclass(frozen=True)
class Decisions:
    """Rollouts as tensors on a device: inputs (N, F) and chunks (N, D), prepared, and what a loss needs of the rest.

    Attributes:
        inputs: (N, F).
        chunks: (N, D).
        outcomes: (N,) G.
        rewards: (N,) 1 where a chunk solved the task.
        discounts: (N,) gamma^executed; 0 after success.
        following: (N,) the next decision of the same episode; the last one's is itself.
        tasks: (N, E) embeddings of the tasks.
    """

    inputs: Tensor
    chunks: Tensor
    outcomes: Tensor
    rewards: Tensor
    discounts: Tensor
    following: Tensor
    tasks: Tensor


@dataclass(frozen=True)
class Draws:
    """What is random in a loss.

    Attributes:
        rows: (M, B) which decisions each member sees.
        input_noise: (M, B, F) draws of N(0, I).
        chunk_noise: (M, B, D) draws of N(0, I).
    """

    rows: Tensor
    input_noise: Tensor
    chunk_noise: Tensor


def monte_carlo_loss(network: nn.Module, decisions: Decisions, draws: Draws, config: ChunkCriticConfig) -> Tensor:
    """Return each member's mean squared error (M,) against the outcomes."""
    return _error(network, decisions, draws, config, decisions.outcomes[draws.rows])


def td_loss(
    network: nn.Module, target: nn.Module, decisions: Decisions, draws: Draws, config: ChunkCriticConfig
) -> Tensor:
    """Return each member's mean squared error (M,) against r + gamma^executed Q'(s', a')."""
    with torch.no_grad():
        following = decisions.following[draws.rows]
        seen = (decisions.inputs[following], decisions.chunks[following], decisions.tasks[following])
        if config.backup == "own":
            ahead = _values(target, *seen)
        else:
            how: Aggregation = config.backup
            everyone = _values(target, *(part.flatten(0, 1).expand(len(following), -1, -1) for part in seen))
            ahead = aggregate(everyone, how).view_as(following)
        targets = decisions.rewards[draws.rows] + decisions.discounts[draws.rows] * ahead
    return _error(network, decisions, draws, config, targets)


def _error(
    network: nn.Module, decisions: Decisions, draws: Draws, config: ChunkCriticConfig, targets: Tensor
) -> Tensor:
    inputs = decisions.inputs[draws.rows] + config.input_noise * draws.input_noise
    chunks = decisions.chunks[draws.rows] + config.chunk_noise * draws.chunk_noise
    return (_values(network, inputs, chunks, decisions.tasks[draws.rows]) - targets).square().mean(1)


def _values(network: nn.Module, inputs: Tensor, chunks: Tensor, tasks: Tensor) -> Tensor:
    """Return (M, B) for inputs (M, B, F), chunks (M, B, D) and task embeddings (M, B, E)."""
    values: Tensor = network(torch.cat([inputs, chunks, tasks], -1))
    return values.squeeze(-1)


class ChunkCriticLearner:
    """Fits a critic to rollouts.

    Args:
        rollouts: what to learn from.
        config: the settings.
        seed: from which weights, held-out episodes and draws descend.
        device: where to train.

    Raises:
        InvalidInputError: the rollouts' task embeddings have another size than the critic's.
    """

    def __init__(
        self, rollouts: Rollouts, config: ChunkCriticConfig, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        check_seed(seed)
        self.config, self.rollouts, self.step = config, rollouts, 0
        tasks = np.zeros((len(rollouts.inputs), 0), np.float32) if rollouts.tasks is None else rollouts.tasks
        if tasks.shape[1] != config.critic.task_dim:
            raise InvalidInputError(
                f"the rollouts carry task embeddings of {tasks.shape[1]} numbers; the critic was to be made for "
                f"{config.critic.task_dim}. Give both the same size."
            )
        inputs = torch.from_numpy(rollouts.inputs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(child_seed(seed, "weights"))
            self.critic = ChunkCritic(config.critic, rollouts.binding, Normaliser.fit(inputs, "mean_std"))
        self.critic.to(device).train()
        self.target = copy.deepcopy(self.critic.network).requires_grad_(False)
        self._rng = generator(child_seed(seed, "critic"), device)
        solved = rollouts.success & rollouts.last
        count = np.arange(len(solved))

        def on_device(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        self.decisions = Decisions(
            inputs=self.critic.prepare(inputs.to(device)),
            chunks=on_device(rollouts.chunks.reshape(len(solved), -1)),
            outcomes=on_device(rollouts.outcomes(config.discount)),
            rewards=on_device(solved.astype(np.float32)),
            discounts=on_device((config.discount**rollouts.executed * ~solved).astype(np.float32)),
            following=on_device(np.where(rollouts.last, count, count + 1)),
            tasks=on_device(tasks),
        )
        members = config.critic.members
        held_out = np.zeros((members, len(solved)), dtype=bool)
        for outcome in (True, False):
            of = rollouts.success == outcome
            held_out[:, of] = hold_out(
                rollouts.episodes[of], members, config.held_out, child_seed(seed, "held out", str(outcome))
            )
        self.held_out = HeldOut(self.critic.network, held_out, device)
        self._optimiser = torch.optim.AdamW(
            self.critic.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

    def draw(self) -> Draws:
        """Draw a batch for every member."""
        rows = self.held_out.draw(self.config.batch_size, self._rng)
        sizes = (self.decisions.inputs.shape[1], self.decisions.chunks.shape[1])
        noises = [torch.randn((*rows.shape, size), generator=self._rng, device=rows.device) for size in sizes]
        return Draws(rows, *noises)

    def update(self) -> Tensor:
        """Take one step; return the mean loss () without waiting for the device."""
        network, draws = self.critic.network, self.draw()
        if self.config.method == "td":
            losses = td_loss(network, self.target, self.decisions, draws, self.config)
        else:
            losses = monte_carlo_loss(network, self.decisions, draws, self.config)
        self._optimiser.zero_grad()
        losses.sum().backward()  # members share nothing, so each gets the gradient of its own loss
        self._optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), network.parameters(), strict=True):
                slow.lerp_(fast, self.config.target_rate)
        self.step += 1
        return losses.detach().mean()

    @torch.no_grad()
    def predicted(self) -> Tensor:
        """Return what every member says of every decision, (M, N)."""
        known, members = self.decisions, self.config.critic.members
        seen = (part.expand(members, -1, -1) for part in (known.inputs, known.chunks, known.tasks))
        return _values(self.critic.network, *seen)

    def evaluate(self) -> bool:
        """Compute held-out errors, keep the weights of members that improved; return whether any did."""
        return self.held_out.judge((self.predicted() - self.decisions.outcomes).square())

    def fit(self, on_progress: Callable[[Progress], None] | None = None) -> ChunkCritic:
        """Train (see `held_out.fit`); return the critic, frozen.

        Raises:
            DatasetError: the loss is not finite: the rollouts hold values that no network can learn.
        """
        fit(self.update, self.evaluate, self.held_out, self.config, on_progress)
        return self.critic.requires_grad_(False).eval()

    def report(self) -> dict[str, Any]:
        """Return what the held-out episodes say of the critic, as plain values.

        Returns:
            updates, decisions; of the decisions that some member held out, each judged by the mean of those members:
            `held_out_error` (mean squared, against the outcomes), `constant_error` (of the best constant), `auc` (how often a
            decision of a success is judged higher than one of a failure), and `calibration`: (mean value, mean outcome,
            decisions) of as many groups, in the order of their values. None where nothing was held out.
        """
        asked = self.held_out.mask.any(0)
        told: dict[str, Any] = {"updates": self.step, "decisions": len(self.rollouts.inputs)}
        if not bool(asked.any()):
            return told | {"held_out_error": None, "constant_error": None, "auc": None, "calibration": None}
        weights = self.held_out.mask.float()
        values = ((self.predicted() * weights).sum(0) / weights.sum(0).clamp_min(1))[asked].double().cpu().numpy()
        outcomes = self.decisions.outcomes[asked].double().cpu().numpy()
        auc = area_under_curve(values, self.rollouts.success[asked.cpu().numpy()])
        groups = np.array_split(np.argsort(values, kind="stable"), min(BINS, len(values)))
        return told | {
            "held_out_error": round(float(np.square(values - outcomes).mean()), 6),
            "constant_error": round(float(outcomes.var()), 6),
            "auc": None if math.isnan(auc) else round(auc, 4),
            "calibration": [
                [round(float(values[group].mean()), 4), round(float(outcomes[group].mean()), 4), len(group)]
                for group in groups
            ],
        }


def area_under_curve(scores: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_]) -> float:
    """Return the probability that a positive's score is above a negative's, ties counting half; NaN without either.

    Args:
        scores: (N,).
        positive: (N,) bool.
    """
    wins = int(positive.sum())
    losses = len(positive) - wins
    if not wins or not losses:
        return float("nan")
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # the mean rank of those that are equal
    return float((ranks[positive].sum() - wins * (wins + 1) / 2) / (wins * losses))
