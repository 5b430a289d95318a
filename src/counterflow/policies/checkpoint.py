"""Policies on disk: `NAME.safetensors` with the numbers and `NAME.json` with everything that a person wants to read.

The weights' file carries a copy of the json in its own header, so it is complete by itself, and writing it is one atomic
rename: a kill at any moment leaves a whole policy, the old or the new one. The json of the old one goes before the new
weights come, so that the two on disk never contradict each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import counterflow
from counterflow.errors import CheckpointError, CounterflowError, UnknownNameError
from counterflow.files import replacing, save_tensors
from counterflow.layout import ActionLayout
from counterflow.policies.base import ActionSpec, as_device
from counterflow.policies.flow_policy import FlowPolicy, NetworkConfig, fingerprint
from counterflow.policies.normalisation import Normaliser

FORMAT = "counterflow/flow-policy"
FORMAT_VERSION = 1
PRIORS = Path(__file__).parent / "priors"
INSIDE_A_RUN = ("policy.safetensors", "checkpoints/policy.safetensors")


def save(policy: FlowPolicy, path: Path | str) -> Path:
    """Write a policy to `path` (ending in ".safetensors", or without an ending) and its description beside it.

    Returns:
        The path of the weights' file.

    Raises:
        StorageError: writing failed; what stood there before is untouched.
    """
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
    tensors, description = policy.tensors(), policy.description()
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "counterflow_version": counterflow.__version__,
        "fingerprint": fingerprint(description, tensors),
        **description,
        "provenance": policy.provenance,
    }
    beside = path.with_suffix(".json")
    with replacing(beside) as description_file:
        description_file.write_text(json.dumps(content, indent=1) + "\n")
        with replacing(path) as weights_file:
            save_tensors(tensors, weights_file, {"counterflow": json.dumps(content)})
            beside.unlink(missing_ok=True)
    return path


def load(path_or_name: Path | str, device: torch.device | str = "cpu") -> FlowPolicy:
    """Load a policy, frozen (no gradients, evaluation mode).

    Args:
        path_or_name: a weights' file, its json, a run folder of `counterflow train`, or the name of a shipped prior (see
            `shipped_priors()`).
        device: where it is to compute.

    Raises:
        UnknownNameError: neither a file nor a shipped prior; the nearest names are suggested.
        CheckpointError: the file is truncated, damaged, foreign, or written by a newer version.
        InvalidInputError: the device can't be used here.
    """
    device = as_device(device)
    path = _find(path_or_name)
    content, tensors = _read(path)
    beside = path.with_suffix(".json")
    if beside.exists():
        _check_twin(beside, content)
    try:
        policy = _build(content, tensors)
    except (KeyError, TypeError, RuntimeError, CounterflowError) as error:
        raise CheckpointError(
            f"{path} does not hold the policy that it describes: {error}. It was changed or damaged; fetch or train it again."
        ) from error
    if fingerprint(policy.description(), policy.tensors()) != content["fingerprint"]:
        raise CheckpointError(
            f"{path} was changed after it was saved (its fingerprint differs); fetch or train it again."
        )
    return policy.to(device).requires_grad_(False).eval()


def shipped_priors() -> list[str]:
    """Return the names of the priors that come with the library."""
    return sorted(path.stem for path in PRIORS.glob("*.safetensors"))


def _find(path_or_name: Path | str) -> Path:
    """Return the weights' file that is meant."""
    path = Path(path_or_name)
    if path.suffix == ".json":
        path = path.with_suffix(".safetensors")
    candidates = [path, Path(f"{path}.safetensors"), *(path / inside for inside in INSIDE_A_RUN)]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is not None:
        return found
    if path.is_dir():
        raise CheckpointError(
            f"the folder {path} holds no policy; expected {' or '.join(INSIDE_A_RUN)}. A run writes one at its first "
            "checkpoint."
        )
    if str(path_or_name) in shipped_priors():
        return PRIORS / f"{path_or_name}.safetensors"
    raise UnknownNameError("policy (no such file, nor shipped prior)", str(path_or_name), shipped_priors())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the weights' file and check that it is one of ours, and not newer than this code."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated, damaged, or not a safetensors file: {error}. Fetch or "
            "train it again."
        ) from error
    if "counterflow" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one of Counterflow's policies. To steer a policy of another library, wrap "
            "its module: counterflow.FieldPolicy(field, action_spec)."
        )
    content = _parse(metadata["counterflow"], path)
    return content, tensors


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
        name, version = content["format"], content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} has a description that can't be read: {error}. Fetch or train it again."
        ) from error
    if name != FORMAT:
        raise CheckpointError(f"{path} holds a {name!r}; expected a {FORMAT!r}.")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written in format {version} by Counterflow {content.get('counterflow_version', '?')}; this is "
            f"Counterflow {counterflow.__version__}, which knows formats up to {FORMAT_VERSION}. Upgrade counterflow."
        )
    if "fingerprint" not in content:
        raise CheckpointError(f"{path} has a description without a fingerprint. Fetch or train it again.")
    return dict(content)


def _check_twin(beside: Path, content: dict[str, Any]) -> None:
    """Check that the json beside the weights is theirs."""
    try:
        text = beside.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{beside} can't be read: {error}. Delete it: the weights carry a copy.") from error
    # Notes on its making may be added by hand; what the policy is may not, because it would be ignored.
    described = {**_parse(text, beside), "provenance": None}
    if described != {**content, "provenance": None}:
        raise CheckpointError(
            f"{beside} describes another policy than the weights beside it. Delete it to use the description that the "
            "weights carry, or put the right pair together."
        )


def _build(content: dict[str, Any], tensors: dict[str, Tensor]) -> FlowPolicy:
    action, observation = content["action"], content["observation"]
    layout = action["layout"]
    if layout is not None:
        layout = ActionLayout(
            tuple(layout["translation"]), tuple(layout["rotation"]), layout["gripper"], layout["gripper_close_sign"]
        )
    normaliser = None
    if action["normalisation"] is not None:
        normaliser = Normaliser(tensors["action.offset"], tensors["action.scale"], action["normalisation"])
    spec = ActionSpec(
        horizon=action["horizon"],
        dim=action["dim"],
        low=None if action["low"] is None else tuple(action["low"]),
        high=None if action["high"] is None else tuple(action["high"]),
        normaliser=normaliser,
        layout=layout,
    )
    policy = FlowPolicy(
        NetworkConfig(**content["network"]),
        Normaliser(tensors["observation.offset"], tensors["observation.scale"], observation["normalisation"]),
        spec,
        content["family"],
    )
    weights = {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    policy.network.load_state_dict(weights)
    policy.provenance = content["provenance"]
    return policy
