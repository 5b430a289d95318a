"""Time the official JAX agent of RQL; run by `speed.py` in the official code's own environment.

    JAX_PYTHON official_rql.py CLONE UPDATES

prints a line of json: milliseconds of every block of updates, after the compilation.
"""

import json
import sys
import time

sys.path.insert(0, sys.argv[1])

import jax
import numpy as np
from agents.rql import RQLAgent, get_config

HORIZON, ACTION, OBSERVATION, BATCH, BLOCKS = 5, 5, 28, 256, 5


def main() -> None:
    """Time the updates."""
    rng = np.random.default_rng(0)
    config = get_config()
    config.update({"h": HORIZON, "alpha": 10.0, "expectile": 0.9, "rho": 0.5, "batch_size": BATCH})
    agent = RQLAgent.create(0, np.zeros((1, OBSERVATION), np.float32), np.zeros((1, ACTION), np.float32), config)
    shape = (HORIZON + 1, BATCH)
    batch = {
        "observations": rng.normal(size=(*shape, OBSERVATION)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (*shape, ACTION)).astype(np.float32),
        "rewards": -np.ones(shape, np.float32),
        "terminals": np.zeros(shape, np.float32),
        "masks": np.ones(shape, np.float32),
    }
    batch = {name: jax.device_put(value) for name, value in batch.items()}
    updates = int(sys.argv[2])
    for _ in range(3):
        agent, info = agent.update(batch)
    jax.block_until_ready(info)
    milliseconds = []
    for _ in range(BLOCKS):
        began = time.perf_counter()
        for _ in range(updates):
            agent, info = agent.update(batch)
        jax.block_until_ready((agent.network.params, info))
        milliseconds.append(1000 * (time.perf_counter() - began) / updates)
    print(json.dumps({"milliseconds": milliseconds, "jax": jax.__version__, "device": str(jax.devices()[0])}))


if __name__ == "__main__":
    main()
