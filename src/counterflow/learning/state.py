"""A learner's state as tensors by name, to go on from with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from counterflow.errors import CheckpointError


class Resumable:
    """How a learner of several seeds side by side is kept, and taken up again with the same numbers.

    Attributes:
        step: updates done.
    """

    step: int
    _modules: nn.Module  # all that is learned, and what follows it
    _optimiser: torch.optim.Optimizer
    _rngs: Sequence[torch.Generator]  # one a seed

    def state(self) -> dict[str, Tensor]:
        """Return everything that continuing with the same numbers needs, by name, on the CPU."""
        found = {f"network.{name}": value for name, value in self._modules.state_dict().items()}
        for index, entry in self._optimiser.state_dict()["state"].items():
            found |= {f"optimiser.{index}.{name}": value for name, value in entry.items()}
        found |= {f"rng.{index}": state for index, state in enumerate(self._rng_states())}
        found["step"] = torch.tensor(self.step)
        return {name: value.detach().cpu().clone() for name, value in found.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned.

        Raises:
            CheckpointError: the state is not one of a learner with these settings.
        """
        try:
            own = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
            self._modules.load_state_dict(own)
            entries: dict[int, dict[str, Tensor]] = {}
            for name, value in state.items():
                if name.startswith("optimiser."):
                    _, index, key = name.split(".", 2)
                    entries.setdefault(int(index), {})[key] = value
            groups = self._optimiser.state_dict()["param_groups"]
            self._optimiser.load_state_dict({"state": entries, "param_groups": groups})
            for number, rng in enumerate(self._rngs):
                rng.set_state(state[f"rng.{number}"])
            self.step = int(state["step"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the training state does not fit these networks and optimiser: {error}. Resume with the settings and seeds "
                "that the run began with, or begin a new run."
            ) from error

    def finite(self) -> bool:
        """Whether every weight is finite (waits for the device)."""
        return all(bool(torch.isfinite(one).all()) for one in self._modules.parameters())

    def _rng_states(self) -> Sequence[Tensor]:
        return [rng.get_state() for rng in self._rngs]
