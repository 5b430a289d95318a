"""Data: collecting demonstrations, reading episodes, sampling action chunks, recording steered rollouts.

The samplers are loaded on first use: they need torch, which the processes that collect data can do without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from counterflow.binding import Binding
from counterflow.data.collect import Collected, collect
from counterflow.data.episodes import EpisodeDataset
from counterflow.data.recipe import Recipe
from counterflow.data.steering import SteeringDataset
from counterflow.data.steering import merge as merge_steering
from counterflow.data.steering_episode import SteeringEpisode

if TYPE_CHECKING:
    from counterflow.data.sampling import ChunkBatch, ChunkSampler

__all__ = [
    "Binding",
    "ChunkBatch",
    "ChunkSampler",
    "Collected",
    "EpisodeDataset",
    "Recipe",
    "SteeringDataset",
    "SteeringEpisode",
    "collect",
    "merge_steering",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use."""
    if name not in ("ChunkBatch", "ChunkSampler"):
        raise AttributeError(f"module 'counterflow.data' has no attribute {name!r}")
    return getattr(importlib.import_module("counterflow.data.sampling"), name)
