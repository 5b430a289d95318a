"""Steering: a frozen policy with a hand on the wheel at up to three places."""

from counterflow.steering.actor import ActorConfig, SteeringActor, steer_actor
from counterflow.steering.aggregation import Aggregation, aggregate
from counterflow.steering.anchors import AnchorsConfig, AnchorsCritic, Proposals, steer_anchors
from counterflow.steering.context import Reference, SteeringContext
from counterflow.steering.continuation import Continuation, ContinueChunk, continuation_weights
from counterflow.steering.critic import ChunkCritic, CriticBinding, CriticConfig, task_embedding
from counterflow.steering.edit import Chain, Edit, ExecuteReference, HighestValue, Limits, NearestToReference
from counterflow.steering.guidance import CriticGuidance, FollowReference, Guidance, Together
from counterflow.steering.guided import Chosen, GuidanceSettings, choose_weight, guide
from counterflow.steering.latent import LatentShape, describe_bound, mass_beyond, suggest_bound, to_shell
from counterflow.steering.learned import (
    ChunkRegressor,
    ExecuteLearned,
    Intention,
    LearnedNoise,
    RegressorConfig,
    binding_of,
    steer_learned,
)
from counterflow.steering.methods import MethodName, MethodSettings, steer
from counterflow.steering.space import Decided, Ports, SteeringSpace
from counterflow.steering.start import FlowReversal, Gaussian, PartialNoising, Rng, Start
from counterflow.steering.steered import Plan, SteeredPolicy, features_of

__all__ = [
    "ActorConfig",
    "Aggregation",
    "AnchorsConfig",
    "AnchorsCritic",
    "Chain",
    "Chosen",
    "ChunkCritic",
    "ChunkRegressor",
    "Continuation",
    "ContinueChunk",
    "CriticBinding",
    "CriticConfig",
    "CriticGuidance",
    "Decided",
    "Edit",
    "ExecuteLearned",
    "ExecuteReference",
    "FlowReversal",
    "FollowReference",
    "Gaussian",
    "Guidance",
    "GuidanceSettings",
    "HighestValue",
    "Intention",
    "LatentShape",
    "LearnedNoise",
    "Limits",
    "MethodName",
    "MethodSettings",
    "NearestToReference",
    "PartialNoising",
    "Plan",
    "Ports",
    "Proposals",
    "Reference",
    "RegressorConfig",
    "Rng",
    "Start",
    "SteeredPolicy",
    "SteeringActor",
    "SteeringContext",
    "SteeringSpace",
    "Together",
    "aggregate",
    "binding_of",
    "choose_weight",
    "continuation_weights",
    "describe_bound",
    "features_of",
    "guide",
    "mass_beyond",
    "steer",
    "steer_actor",
    "steer_anchors",
    "steer_learned",
    "suggest_bound",
    "task_embedding",
    "to_shell",
]
