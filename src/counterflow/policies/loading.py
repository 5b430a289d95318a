"""One door to every policy on disk or on a hub: Counterflow's own checkpoints, shipped priors, and LeRobot's policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from counterflow.errors import InvalidInputError
from counterflow.policies import checkpoint

LEROBOT = "lerobot:"


def load(path_or_name: Path | str, device: torch.device | str = "cpu") -> Any:
    """Load a policy, frozen (no gradients, evaluation mode).

    Args:
        path_or_name: a weights' file, its json, a run folder of `counterflow train`, the name of a shipped prior (see
            `shipped_priors()`); or "lerobot:" and a hub id or a folder of one of LeRobot's flow policies, for example
            "lerobot:lerobot/smolvla_base".
        device: where it is to compute.

    Returns:
        A `FlowPolicy`, or a `LeRobotPolicy`.

    Raises:
        UnknownNameError: neither a file nor a shipped prior; the nearest names are suggested.
        CheckpointError: the file is truncated, damaged, foreign, or written by a newer version.
        MismatchError: a policy of LeRobot that can't be steered; the message says why.
        MissingDependencyError: LeRobot 0.6 is not installed.
        InvalidInputError: the device can't be used here.
    """
    name = str(path_or_name)
    if not name.startswith(LEROBOT):
        return checkpoint.load(path_or_name, device)
    place = name.removeprefix(LEROBOT)
    if not place:
        raise InvalidInputError(
            "'lerobot:' names no policy; expected a hub id or a folder, as in 'lerobot:owner/name'."
        )
    from counterflow.policies.lerobot import load_lerobot

    return load_lerobot(place, device)
