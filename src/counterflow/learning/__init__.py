"""Learning: one file per algorithm."""

from counterflow.learning.bc import BCConfig, BCLearner

__all__ = ["BCConfig", "BCLearner"]
