"""A learner's state as tensors by name, to go on from with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from counterflow.errors import CheckpointError


def pack_state(
    modules: nn.Module, optimiser: torch.optim.Optimizer, rngs: Sequence[Tensor], step: int
) -> dict[str, Tensor]:
    """Return networks, optimiser, generators' states and the number of updates, on the CPU."""
    found = {f"network.{name}": value for name, value in modules.state_dict().items()}
    for index, entry in optimiser.state_dict()["state"].items():
        found |= {f"optimiser.{index}.{name}": value for name, value in entry.items()}
    found |= {f"rng.{index}": state for index, state in enumerate(rngs)}
    found["step"] = torch.tensor(step)
    return {name: value.detach().cpu().clone() for name, value in found.items()}


def unpack_state(
    state: dict[str, Tensor],
    modules: nn.Module,
    optimiser: torch.optim.Optimizer,
    rngs: Sequence[torch.Generator],
) -> int:
    """Put back what `pack_state` returned; return the number of updates.

    Raises:
        CheckpointError: the state is not one of a learner with these settings.
    """
    try:
        own = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
        modules.load_state_dict(own)
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = value
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": entries, "param_groups": groups})
        for number, rng in enumerate(rngs):
            rng.set_state(state[f"rng.{number}"])
        return int(state["step"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the training state does not fit these networks and optimiser: {error}. Resume with the settings and seeds "
            "that the run began with, or begin a new run."
        ) from error
