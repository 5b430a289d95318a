"""Steering: a frozen policy with a hand on the wheel at up to three places."""

from counterflow.steering.context import Reference, SteeringContext
from counterflow.steering.continuation import Continuation, ContinueChunk, continuation_weights
from counterflow.steering.edit import Chain, Edit, ExecuteReference, Limits, NearestToReference
from counterflow.steering.guidance import FollowReference, Guidance, Together
from counterflow.steering.learned import (
    ChunkRegressor,
    ExecuteLearned,
    LearnedNoise,
    RegressorConfig,
    binding_of,
    steer_learned,
)
from counterflow.steering.methods import MethodName, MethodSettings, steer
from counterflow.steering.start import FlowReversal, Gaussian, PartialNoising, Rng, Start
from counterflow.steering.steered import Plan, SteeredPolicy, features_of

__all__ = [
    "Chain",
    "ChunkRegressor",
    "Continuation",
    "ContinueChunk",
    "Edit",
    "ExecuteLearned",
    "ExecuteReference",
    "FlowReversal",
    "FollowReference",
    "Gaussian",
    "Guidance",
    "LearnedNoise",
    "Limits",
    "MethodName",
    "MethodSettings",
    "NearestToReference",
    "PartialNoising",
    "Plan",
    "Reference",
    "RegressorConfig",
    "Rng",
    "Start",
    "SteeredPolicy",
    "SteeringContext",
    "Together",
    "binding_of",
    "continuation_weights",
    "features_of",
    "steer",
    "steer_learned",
]
