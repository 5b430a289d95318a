"""One door to every policy on disk or on a hub: Counterflow's own checkpoints, shipped priors, and LeRobot's policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from counterflow.errors import InvalidInputError
from counterflow.policies import checkpoint
from counterflow.policies.base import as_device
from counterflow.policies.described import format_of
from counterflow.policies.generalist import FORMAT as GENERALIST
from counterflow.policies.generalist import load_generalist

LEROBOT = "lerobot:"


def load(path_or_name: Path | str, device: torch.device | str = "cpu") -> Any:
    """Load a policy, frozen (no gradients, evaluation mode).

    Args:
        path_or_name: a weights' file, its json, a run folder of `counterflow train`, the name of a shipped prior (see
            `shipped_priors()`); or "lerobot:" and a hub id or a folder of one of LeRobot's flow policies, for example
            "lerobot:lerobot/smolvla_base".
        device: where it is to compute.

    Returns:
        A `FlowPolicy`, a `GeneralistPolicy`, or a `LeRobotPolicy`.

    Raises:
        UnknownNameError: neither a file nor a shipped prior; the nearest names are suggested.
        CheckpointError: the file is truncated, damaged, foreign, or written by a newer version.
        MismatchError: a policy of LeRobot that can't be steered; the message says why.
        MissingDependencyError: LeRobot 0.6 is not installed.
        InvalidInputError: the device can't be used here.
    """
    name = str(path_or_name)
    if not name.startswith(LEROBOT):
        path = checkpoint.find(path_or_name)
        if format_of(path) == GENERALIST.name:
            return load_generalist(path, as_device(device))
        return checkpoint.load(path, device)
    place = name.removeprefix(LEROBOT)
    if not place:
        raise InvalidInputError(
            "'lerobot:' names no policy; expected a hub id or a folder, as in 'lerobot:owner/name'."
        )
    from counterflow.policies.lerobot import load_lerobot

    return load_lerobot(place, device)
