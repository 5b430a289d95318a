"""Learning: one file per algorithm."""

from counterflow.learning.bc import BCConfig, BCLearner
from counterflow.learning.chunk_critic import ChunkCriticConfig, ChunkCriticLearner, Rollouts
from counterflow.learning.dsbc import DSBCConfig, DSBCLearner, NoiseExamples, distil
from counterflow.learning.fql import FQLConfig, FQLLearner
from counterflow.learning.ifql import IFQLConfig, IFQLLearner
from counterflow.learning.offline import OfflineConfig, OfflineLearner, Sizes
from counterflow.learning.qgf import QGFConfig, QGFLearner
from counterflow.learning.rql import RQLConfig, RQLLearner

__all__ = [
    "BCConfig",
    "BCLearner",
    "ChunkCriticConfig",
    "ChunkCriticLearner",
    "DSBCConfig",
    "DSBCLearner",
    "FQLConfig",
    "FQLLearner",
    "IFQLConfig",
    "IFQLLearner",
    "NoiseExamples",
    "OfflineConfig",
    "OfflineLearner",
    "QGFConfig",
    "QGFLearner",
    "RQLConfig",
    "RQLLearner",
    "Rollouts",
    "Sizes",
    "distil",
]
