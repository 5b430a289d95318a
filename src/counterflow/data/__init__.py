"""Data: collecting and reading episodes, sampling chunks, transitions and goals, recording steered rollouts.

The samplers are loaded on first use: they need torch, which the processes that collect data can do without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from counterflow.binding import Binding
from counterflow.data.collect import Collected, collect
from counterflow.data.episodes import EpisodeDataset
from counterflow.data.recipe import Recipe
from counterflow.data.slices import SliceStream
from counterflow.data.steering import SteeringDataset
from counterflow.data.steering import merge as merge_steering
from counterflow.data.steering_episode import SteeringEpisode

if TYPE_CHECKING:
    from counterflow.data.goals import ACTOR_GOALS, VALUE_GOALS, GoalSampler, GoalShares
    from counterflow.data.replay import Mix, Recorded, Replay, ReplayBatch
    from counterflow.data.sampling import ChunkBatch, ChunkSampler
    from counterflow.data.transitions import Chunks, TransitionDataset, Windows, WindowSampler

__all__ = [
    "ACTOR_GOALS",
    "VALUE_GOALS",
    "Binding",
    "ChunkBatch",
    "ChunkSampler",
    "Chunks",
    "Collected",
    "EpisodeDataset",
    "GoalSampler",
    "GoalShares",
    "Mix",
    "Recipe",
    "Recorded",
    "Replay",
    "ReplayBatch",
    "SliceStream",
    "SteeringDataset",
    "SteeringEpisode",
    "TransitionDataset",
    "WindowSampler",
    "Windows",
    "collect",
    "merge_steering",
]


_WITH_TORCH = {
    "goals": ("ACTOR_GOALS", "VALUE_GOALS", "GoalSampler", "GoalShares"),
    "replay": ("Mix", "Recorded", "Replay", "ReplayBatch"),
    "sampling": ("ChunkBatch", "ChunkSampler"),
    "transitions": ("Chunks", "TransitionDataset", "WindowSampler", "Windows"),
}


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use."""
    for module, names in _WITH_TORCH.items():
        if name in names:
            return getattr(importlib.import_module(f"counterflow.data.{module}"), name)
    raise AttributeError(f"module 'counterflow.data' has no attribute {name!r}")
