"""Learning: one file per algorithm."""

from counterflow.learning.bc import BCConfig, BCLearner
from counterflow.learning.dsbc import DSBCConfig, DSBCLearner, NoiseExamples, distil

__all__ = ["BCConfig", "BCLearner", "DSBCConfig", "DSBCLearner", "NoiseExamples", "distil"]
