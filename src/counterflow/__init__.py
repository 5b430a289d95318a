"""Counterflow: steer frozen flow-matching robot policies without touching their weights.

The names below are loaded on first use, so that a simulator's worker process, or `counterflow --help`, does not pay for
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "ActionLayout",
    "ActionSpec",
    "CounterflowError",
    "Direction",
    "FieldPolicy",
    "FlowPolicy",
    "FlowReversal",
    "Reference",
    "SteeredPolicy",
    "denoise",
    "invert",
    "load",
    "log_prob",
    "make_env",
    "refine",
    "reverse",
    "shipped_priors",
    "steer",
    "to_reference",
]

if TYPE_CHECKING:
    from counterflow.envs import make_env
    from counterflow.errors import CounterflowError
    from counterflow.flow import denoise, invert, log_prob, refine, reverse
    from counterflow.policies import ActionLayout, ActionSpec, FieldPolicy, FlowPolicy, load, shipped_priors
    from counterflow.reasoners import Direction, to_reference
    from counterflow.steering import FlowReversal, Reference, SteeredPolicy, steer

_ROOMS = {
    "envs": ("make_env",),
    "errors": ("CounterflowError",),
    "flow": ("denoise", "invert", "log_prob", "refine", "reverse"),
    "policies": ("ActionLayout", "ActionSpec", "FieldPolicy", "FlowPolicy", "load", "shipped_priors"),
    "reasoners": ("Direction", "to_reference"),
    "steering": ("FlowReversal", "Reference", "SteeredPolicy", "steer"),
}
_HOMES = {name: f"counterflow.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'counterflow' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
