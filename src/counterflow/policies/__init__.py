"""Base policies: what can be steered."""

from counterflow.layout import ActionLayout
from counterflow.policies.base import (
    ActionSpec,
    BasePolicy,
    Context,
    FieldPolicy,
    Prior,
    as_device,
    bind,
    repeat_context,
)
from counterflow.policies.checkpoint import save, shipped_priors
from counterflow.policies.flow_policy import FlowPolicy, NetworkConfig
from counterflow.policies.generalist import (
    GeneralistConfig,
    GeneralistPolicy,
    TaskDescription,
    save_generalist,
)
from counterflow.policies.loading import load
from counterflow.policies.networks import MLPNetwork, TransformerNetwork
from counterflow.policies.normalisation import NormalisationKind, Normaliser

__all__ = [
    "ActionLayout",
    "ActionSpec",
    "BasePolicy",
    "Context",
    "FieldPolicy",
    "FlowPolicy",
    "GeneralistConfig",
    "GeneralistPolicy",
    "MLPNetwork",
    "NetworkConfig",
    "NormalisationKind",
    "Normaliser",
    "Prior",
    "TaskDescription",
    "TransformerNetwork",
    "as_device",
    "bind",
    "load",
    "repeat_context",
    "save",
    "save_generalist",
    "shipped_priors",
]
