"""Environments: one file a benchmark, all behind `make_env`. Nothing here imports torch."""

from counterflow.envs.registry import (
    check_env_name,
    describe,
    env_names,
    expand_tasks,
    families,
    family_of,
    groups,
    make_env,
)
from counterflow.envs.relabelling import relabel
from counterflow.envs.types import (
    Batch,
    CameraView,
    EnvSpec,
    Moment,
    Privileged,
    RenderSettings,
    TaskEnv,
)
from counterflow.envs.vector import VectorEnv

__all__ = [
    "Batch",
    "CameraView",
    "EnvSpec",
    "Moment",
    "Privileged",
    "RenderSettings",
    "TaskEnv",
    "VectorEnv",
    "check_env_name",
    "describe",
    "env_names",
    "expand_tasks",
    "families",
    "family_of",
    "groups",
    "make_env",
    "relabel",
]
