"""IQL: a critic of chunks and a value of states, learned from data alone (arXiv 2110.06169).

    value    L = E expectile_kappa(agg_m Q'_m(s, a) - V(s))              (equation 5)
    critic   L = E mean_m (r + gamma^h mask V(s_h) - Q_m(s, a))^2        (equation 6)

r is the discounted reward of the h steps of a chunk. No action outside the data is ever asked about, so a policy can be
trained beside it without either seeing the other: QGF and IFQL do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from counterflow.data.transitions import Chunks
from counterflow.learning.offline import expectile_loss
from counterflow.policies.stacked import StackedMLP

Aggregation = Literal["min", "mean"]


@dataclass(frozen=True)
class IQLNetworks:
    """The networks of S seeds.

    Attributes:
        critic: S * M networks of (observation, flattened chunk).
        target_critic: with which values are learned.
        value: S networks of the observation.
    """

    critic: StackedMLP
    target_critic: StackedMLP
    value: StackedMLP


def aggregate(values: Tensor, how: Aggregation) -> Tensor:
    """Return the members' (S, M, B) common opinion (S, B)."""
    return values.amin(1) if how == "min" else values.mean(1)


def critic_loss(networks: IQLNetworks, batch: Chunks, discount: float) -> tuple[Tensor, Tensor]:
    """Return the critic's loss (S,) and what it says of the batch (S, M, B).

    Args:
        networks: of S seeds.
        batch: chunks (S, B, ...).
        discount: of a whole chunk, gamma^h.
    """
    with torch.no_grad():
        following = networks.value(batch.next_observations)[..., 0].float()
        target = batch.rewards + discount * batch.masks * following
    inputs = torch.cat([batch.observations, batch.actions.flatten(-2)], dim=-1)
    values = networks.critic.ensemble(inputs)[..., 0].float()
    return ((values - target[:, None]).square() * batch.valid[:, None]).mean((1, 2)), values


def value_loss(networks: IQLNetworks, batch: Chunks, expectile: float, how: Aggregation = "min") -> Tensor:
    """Return the value's loss (S,)."""
    with torch.no_grad():
        inputs = torch.cat([batch.observations, batch.actions.flatten(-2)], dim=-1)
        judged = aggregate(networks.target_critic.ensemble(inputs)[..., 0].float(), how)
    values = networks.value(batch.observations)[..., 0].float()
    return (expectile_loss(judged - values, expectile) * batch.valid).mean(-1)
