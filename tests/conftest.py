"""What all tests share."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import settings

from counterflow.envs.rendering import prepare_backend

# Tests run in several processes at once, and the simulators bring workers of their own: one thread each is plenty.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Some tests look for a benchmark's package while they are collected, and that imports mujoco, which asks only once how to draw.
prepare_backend()

# The first call of a compiled or lazily imported function is slow; no test asserts on time.
settings.register_profile("counterflow", deadline=None)
settings.load_profile("counterflow")


@pytest.fixture
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """A block in which the system itself refuses to let any file grow beyond so many bytes: as good as a full disk.

    The libraries that write files turn such a refusal into errors of their own, which a patched function would not show.
    """

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
