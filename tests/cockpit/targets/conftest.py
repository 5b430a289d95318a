"""The policy that the tests drive, here or on a server."""

from __future__ import annotations

import pytest

from counterflow.experiments.evaluate import load_prior
from counterflow.policies import BasePolicy


@pytest.fixture(scope="module")
def prior() -> BasePolicy:
    return load_prior("ogbench/cube-single-task1")
