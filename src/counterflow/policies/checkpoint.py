"""Base policies on disk (the layout is that of `described`), and the priors that come with the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterflow.errors import CheckpointError, UnknownNameError
from counterflow.policies.base import ActionSpec, as_device
from counterflow.policies.described import Format, rebuild, save_described
from counterflow.policies.flow_policy import FlowPolicy, NetworkConfig
from counterflow.policies.normalisation import Normaliser

FORMAT = Format(
    "counterflow/flow-policy",
    1,
    "To steer a policy of another library, wrap its module: counterflow.FieldPolicy(field, action_spec).",
)
PRIORS = Path(__file__).parent / "priors"
INSIDE_A_RUN = ("policy.safetensors", "checkpoints/policy.safetensors")
OF_A_SEED = "seed-*/checkpoints/policy.safetensors"  # in a run that trains several seeds side by side


def save(policy: FlowPolicy, path: Path | str) -> Path:
    """Write a policy to `path` (ending in ".safetensors", or without an ending) and its description beside it.

    Returns:
        The path of the weights' file.

    Raises:
        StorageError: writing failed; what stood there before is untouched.
    """
    return save_described(path, FORMAT, policy.description(), policy.provenance, policy.tensors())


def load(path_or_name: Path | str, device: torch.device | str = "cpu") -> FlowPolicy:
    """Load a policy, frozen (no gradients, evaluation mode).

    Args:
        path_or_name: a weights' file, its json, a run folder of `counterflow train` (of several seeds: that of one of them), or
            the name of a shipped prior (see `shipped_priors()`).
        device: where it is to compute.

    Raises:
        UnknownNameError: neither a file nor a shipped prior; the nearest names are suggested.
        CheckpointError: the file is truncated, damaged, foreign, or written by a newer version.
        InvalidInputError: the device can't be used here.
    """
    device = as_device(device)
    path = find(path_or_name)
    policy = rebuild(path, FORMAT, _build)
    return policy.to(device).requires_grad_(False).eval()


def shipped_priors() -> list[str]:
    """Return the names of the priors that come with the library."""
    return sorted(path.stem for path in PRIORS.glob("*.safetensors"))


def find(path_or_name: Path | str) -> Path:
    """Return the weights' file that is meant: itself, in a run's folder, or a shipped prior's.

    Raises:
        UnknownNameError: there is none, nor a shipped prior of that name.
        CheckpointError: a folder without a policy, or with those of several seeds.
    """
    path = Path(path_or_name)
    if path.suffix == ".json":
        path = path.with_suffix(".safetensors")
    candidates = [path, Path(f"{path}.safetensors"), *(path / inside for inside in INSIDE_A_RUN)]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is not None:
        return found
    if path.is_dir():
        seeds = sorted(path.glob(OF_A_SEED))
        if len(seeds) == 1:
            return seeds[0]
        if seeds:
            names = ", ".join(str(one.parents[1]) for one in seeds)
            raise CheckpointError(
                f"the run {path} holds the policies of {len(seeds)} seeds; name one of them: {names}."
            )
        lerobot = f" For one of LeRobot's policies say lerobot:{path}." if (path / "config.json").is_file() else ""
        raise CheckpointError(
            f"the folder {path} holds no policy; expected {' or '.join(INSIDE_A_RUN)}. A run writes one at its first "
            f"checkpoint.{lerobot}"
        )
    if str(path_or_name) in shipped_priors():
        return PRIORS / f"{path_or_name}.safetensors"
    raise UnknownNameError("policy (no such file, nor shipped prior)", str(path_or_name), shipped_priors())


def _build(content: dict[str, Any], tensors: dict[str, Tensor]) -> FlowPolicy:
    policy = FlowPolicy(
        NetworkConfig(**content["network"]),
        Normaliser.from_tensors(tensors, "observation", content["observation"]["normalisation"]),
        ActionSpec.from_description(content["action"], tensors),
        content["family"],
    )
    weights = {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    policy.network.load_state_dict(weights)
    policy.provenance = content["provenance"]
    return policy
