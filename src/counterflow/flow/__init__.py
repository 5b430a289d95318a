"""The mathematics of flow policies: fields, solvers, inversion, likelihood, matching loss. Knows torch alone.

Convention everywhere: t = 0 is noise, t = 1 is action, x_t = (1 - t) x_0 + t a, and a field v(x, t) regresses a - x_0.
"""

from counterflow.flow.analytic import GaussianField, GaussianMixtureField
from counterflow.flow.field import Field
from counterflow.flow.inversion import invert, refine
from counterflow.flow.likelihood import log_prob
from counterflow.flow.matching import interpolate, matching_error, matching_loss, sample_time
from counterflow.flow.solvers import SOLVERS, denoise, integrate, reverse, time_grid, trajectory

__all__ = [
    "SOLVERS",
    "Field",
    "GaussianField",
    "GaussianMixtureField",
    "denoise",
    "integrate",
    "interpolate",
    "invert",
    "log_prob",
    "matching_error",
    "matching_loss",
    "refine",
    "reverse",
    "sample_time",
    "time_grid",
    "trajectory",
]
