"""What reversal does to references: how far it moves them, and how much likelier it makes them, against K.

The two analysis figures of Flow Reversal Steering (arXiv 2606.13675), measured on references that a reasoner gave at states
of a task. Both fall as K grows: with few steps the round trip is lossy, and the loss pulls towards the prior's modes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import COUNT
from counterflow.envs import VectorEnv
from counterflow.errors import MismatchError
from counterflow.experiments.evaluate import ReasonerSettings
from counterflow.experiments.sight import check_fit
from counterflow.flow import denoise, log_prob, reverse
from counterflow.policies import BasePolicy, bind
from counterflow.random import RowGenerators, check_seed, child_seed
from counterflow.reasoners import to_reference
from counterflow.steering import MethodSettings, Reference, steer

PAPER_STEPS = (2, 3, 5, 10, 20, 50, 100)
LIKELIHOOD_STEPS = 10


@dataclass(frozen=True)
class ReversalAnalysis:
    """What the round trip does, for each K, over N references.

    Attributes:
        steps: the values of K.
        displacement: for each K (N,) the L2 distance between reference and steered chunk, normalised units.
        log_prob_gain: for each K (N,) log p(steered) - log p(reference) under the prior, nats.
        noise_percentile: for each K (N,) the percentile of the reversed noise's norm under N(0, I), 0 to 1.
    """

    steps: tuple[int, ...]
    displacement: list[np.ndarray]
    log_prob_gain: list[np.ndarray]
    noise_percentile: list[np.ndarray]

    def to_json(self) -> list[dict[str, float]]:
        """Return mean and standard error for each K."""

        def summary(name: str, values: np.ndarray) -> dict[str, float]:
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
            return {name: float(values.mean()), f"{name}_standard_error": float(error)}

        rows = zip(self.steps, self.displacement, self.log_prob_gain, self.noise_percentile, strict=True)
        return [
            {
                "K": steps,
                "references": len(moved),
                **summary("displacement", moved),
                **summary("log_prob_gain", gain),
                **summary("noise_percentile", percentile),
            }
            for steps, moved, gain, percentile in rows
        ]


def gather_references(
    env: VectorEnv,
    policy: BasePolicy,
    count: int,
    seed: int,
    *,
    settings: MethodSettings | None = None,
    reasoner: ReasonerSettings | None = None,
) -> tuple[Tensor, Reference]:
    """Collect states of steered episodes and the references that the reasoner gave there.

    Args:
        env: the task.
        policy: the prior, steered by flow reversal while collecting.
        count: N, how many states.
        seed: what the episodes descend from.
        settings: of the steering.
        reasoner: who gives references.

    Returns:
        Observations (N, O) and the reference (N rows).
    """
    COUNT.check("the number of references", count)
    check_fit(policy, env.spec)
    reasoner = ReasonerSettings() if reasoner is None else reasoner
    steered = steer(policy, "frs", settings)
    seeds = [child_seed(check_seed(seed), "analysis", row) for row in range(env.num_envs)]
    reasoners = [reasoner.maker(env.spec.name)() for _ in seeds]
    for one, row_seed in zip(reasoners, seeds, strict=True):
        one.reset(row_seed)
    noise = RowGenerators(seeds)
    batch = env.reset(seeds)
    observations: list[Tensor] = []
    chunks: list[Tensor] = []
    episode = 0
    while sum(len(one) for one in observations) < count:
        directions = [one.decide(batch.view(row)) for row, one in enumerate(reasoners)]
        reference = to_reference(directions, policy.action_spec, reasoner.writing())
        observation = torch.from_numpy(batch.observation)
        observations.append(observation[reference.active])
        chunks.append(reference.chunk[reference.active])
        batch = env.execute(steered.act(observation, reference, noise).actions.cpu().numpy())
        over = np.flatnonzero(batch.done).tolist()
        if over:
            episode += 1
            for row in over:
                reasoners[row].reset(child_seed(seeds[row], episode))
            batch = env.reset({row: child_seed(seeds[row], episode) for row in over})
    return torch.cat(observations)[:count], Reference.of(torch.cat(chunks)[:count])


@torch.no_grad()
def analyse_reversal(
    policy: BasePolicy,
    observations: Tensor,
    reference: Reference,
    steps: Sequence[int] = PAPER_STEPS,
    *,
    on_step: Callable[[int], None] | None = None,
) -> ReversalAnalysis:
    """Measure the round trip of references for several K.

    Args:
        policy: the prior.
        observations: (N, O).
        reference: N rows.
        steps: the values of K.
        on_step: called after each.

    Raises:
        MismatchError: the policy's prior isn't Gaussian.
    """
    if policy.action_spec.prior != "gaussian":
        raise MismatchError(
            f"the policy's noise is {policy.action_spec.prior}; log-probabilities and percentiles are those of Gaussian noise. "
            "Use a policy with a Gaussian prior."
        )
    field = bind(policy, policy.encode(observations))
    chunk = reference.chunk.to(getattr(policy, "device", "cpu"))
    before = log_prob(field, chunk, LIKELIHOOD_STEPS)
    displacement, gain, percentile = [], [], []
    for count in steps:
        noise = reverse(field, chunk, count)
        steered = denoise(field, noise, count)
        displacement.append((steered - chunk).flatten(1).norm(dim=1).cpu().numpy())
        gain.append((log_prob(field, steered, LIKELIHOOD_STEPS) - before).cpu().numpy())
        noise = noise[..., : policy.action_spec.dim]
        half_square = noise.double().square().flatten(1).sum(1) / 2
        shape = torch.full_like(half_square, noise[0].numel() / 2)
        percentile.append(torch.special.gammainc(shape, half_square).cpu().numpy())
        if on_step is not None:
            on_step(count)
    return ReversalAnalysis(tuple(steps), displacement, gain, percentile)
