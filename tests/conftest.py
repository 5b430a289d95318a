"""What all tests share."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# Tests run in several processes at once, and the simulators bring workers of their own: one thread each is plenty.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# The first call of a compiled or lazily imported function is slow; no test asserts on time.
settings.register_profile("counterflow", deadline=None)
settings.load_profile("counterflow")
