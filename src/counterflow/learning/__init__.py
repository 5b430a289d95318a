"""Learning: one file per algorithm."""

from counterflow.learning.bc import BCConfig, BCLearner
from counterflow.learning.chunk_critic import ChunkCriticConfig, ChunkCriticLearner, Rollouts
from counterflow.learning.dsbc import DSBCConfig, DSBCLearner, NoiseExamples, distil

__all__ = [
    "BCConfig",
    "BCLearner",
    "ChunkCriticConfig",
    "ChunkCriticLearner",
    "DSBCConfig",
    "DSBCLearner",
    "NoiseExamples",
    "Rollouts",
    "distil",
]
