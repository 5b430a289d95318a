"""Counterflow: steer frozen flow-matching robot policies without touching their weights.

The names below are loaded on first use, so that a simulator's worker process, or `counterflow --help`, does not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ActionSpec": "counterflow.policies",
    "FlowPolicy": "counterflow.policies",
    "load": "counterflow.policies",
    "denoise": "counterflow.flow",
    "invert": "counterflow.flow",
    "log_prob": "counterflow.flow",
    "refine": "counterflow.flow",
    "reverse": "counterflow.flow",
    "SteeredPolicy": "counterflow.steering",
    "Direction": "counterflow.reasoners",
    "make_env": "counterflow.envs",
    "CounterflowError": "counterflow.errors",
}

__all__ = [*sorted(_HOMES), "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from counterflow.envs import make_env
    from counterflow.errors import CounterflowError
    from counterflow.flow import denoise, invert, log_prob, refine, reverse
    from counterflow.policies import ActionSpec, FlowPolicy, load
    from counterflow.reasoners import Direction
    from counterflow.steering import SteeredPolicy


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'counterflow' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
