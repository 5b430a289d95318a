"""Weights on disk with their description: `NAME.safetensors` with the numbers, `NAME.json` with what a person wants to read.

The weights' file carries a copy of the json in its own header, so it is complete by itself, and writing it is one atomic
rename: a kill at any moment leaves a whole version, the old or the new one. The json of the old one goes before the new
weights come, so that the two on disk never contradict each other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import counterflow
from counterflow.errors import CheckpointError, CounterflowError
from counterflow.files import replacing, save_tensors
from counterflow.policies.base import as_device


@dataclass(frozen=True)
class Format:
    """What kind of thing a file holds.

    Attributes:
        name: for example "counterflow/flow-policy".
        version: the newest that this code can read, and what it writes.
        otherwise: what to tell who gives a safetensors file that isn't Counterflow's.
    """

    name: str
    version: int
    otherwise: str


def weights_path(path: Path | str) -> Path:
    """Return `path` with the ending ".safetensors"."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def save_described(
    path: Path | str, form: Format, description: dict[str, Any], provenance: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    """Write tensors to `path` (ending in ".safetensors", or without an ending) and their description beside them.

    Returns:
        The path of the weights' file.

    Raises:
        StorageError: writing failed; what stood there before is untouched.
    """
    path = weights_path(path)
    content = {
        "format": form.name,
        "format_version": form.version,
        "counterflow_version": counterflow.__version__,
        "fingerprint": fingerprint(description, tensors),
        **description,
        "provenance": provenance,
    }
    beside = path.with_suffix(".json")
    with replacing(beside) as description_file:
        description_file.write_text(json.dumps(content, indent=1) + "\n")
        with replacing(path) as weights_file:
            save_tensors(tensors, weights_file, {"counterflow": json.dumps(content)})
            beside.unlink(missing_ok=True)
    return path


def read_described(path: Path, form: Format) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a weights' file and its description; check that it is of this kind, and not newer than this code.

    Raises:
        CheckpointError: the file is truncated, damaged, foreign, newer, or contradicts the json beside it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError, ValueError) as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no such file"
        raise CheckpointError(
            f"{path} ({size}) is truncated, damaged, or not a safetensors file: {error}. Fetch or train it again."
        ) from error
    if "counterflow" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not one of Counterflow's. {form.otherwise}")
    content = _parse(metadata["counterflow"], path, form)
    beside = path.with_suffix(".json")
    if beside.exists():
        _check_twin(beside, content, form)
    return content, tensors


class Described(Protocol):
    """What can tell of itself completely."""

    def description(self) -> dict[str, Any]:
        """Return everything but the numbers, as plain values."""

    def tensors(self) -> dict[str, Tensor]:
        """Return every number, by name, on the CPU."""


Made = TypeVar("Made", bound=Described)


def rebuild(
    path: Path, form: Format, build: Callable[[dict[str, Any], dict[str, Tensor]], Made], called: str = "the policy"
) -> Made:
    """Read a file and build what it describes; check that it is what was saved.

    Raises:
        CheckpointError: the file is truncated, damaged, foreign, newer, changed, or doesn't hold what it describes.
    """
    content, tensors = read_described(path, form)
    try:
        made = build(content, tensors)
    except (KeyError, TypeError, RuntimeError, StopIteration, CounterflowError) as error:
        raise CheckpointError(
            f"{path} does not hold {called} that it describes: {error}. It was changed or damaged; fetch or train it again."
        ) from error
    if fingerprint(made.description(), made.tensors()) != content["fingerprint"]:
        raise CheckpointError(
            f"{path} was changed after it was saved (its fingerprint differs); fetch or train it again."
        )
    return made


def format_of(path: Path) -> str:
    """Return what kind of thing a weights' file says that it holds; "" where it says nothing or can't be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return str(json.loads((file.metadata() or {})["counterflow"])["format"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return ""


def fingerprint(description: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that depend on every number and every setting."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class DescribedModule(nn.Module):
    """A network that is kept on disk with its description; a kind of it says its `FORMAT`, its `CALLED`, and how it is described.

    Attributes:
        provenance: what else was recorded about its making (data, seed, losses); travels with the file, is no part of the
            fingerprint.
    """

    FORMAT: ClassVar[Format]
    CALLED: ClassVar[str]
    """What an error calls it, for example "the critic"."""

    def __init__(self) -> None:
        super().__init__()
        self.provenance: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    def description(self) -> dict[str, Any]:
        """Return everything but the numbers, as plain values."""
        raise NotImplementedError

    @classmethod
    def from_description(cls, content: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Make what a description tells of, its weights still to be loaded; `tensors` says what else must be known."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return every number, by name, on the CPU."""
        return {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}

    @property
    def fingerprint(self) -> str:
        """A short name for exactly this one."""
        return fingerprint(self.description(), self.tensors())

    def save(self, path: Path | str) -> Path:
        """Write it to `path` (ending in ".safetensors", or without an ending), whole or not at all.

        Raises:
            StorageError: writing failed; what stood there before is untouched.
        """
        return save_described(path, self.FORMAT, self.description(), self.provenance, self.tensors())

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> Self:
        """Load what `save` wrote, without gradients; the json beside the weights names them, too.

        Raises:
            CheckpointError: the file is missing, truncated, damaged, foreign, or written by a newer version.
            InvalidInputError: the device can't be used here.
        """
        device, path = as_device(device), Path(path)
        path = path.with_suffix(".safetensors") if path.suffix == ".json" else weights_path(path)
        return rebuild(path, cls.FORMAT, cls._built, cls.CALLED).to(device).requires_grad_(False).eval()

    @classmethod
    def _built(cls, content: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        made = cls.from_description(content, tensors)
        made.load_state_dict(tensors)
        made.provenance = content["provenance"]
        return made


def _parse(text: str, path: Path, form: Format) -> dict[str, Any]:
    try:
        content = json.loads(text)
        name, version = content["format"], content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} has a description that can't be read: {error}. Fetch or train it again."
        ) from error
    if name != form.name:
        raise CheckpointError(f"{path} holds a {name!r}; expected a {form.name!r}.")
    if not isinstance(version, int) or version > form.version:
        raise CheckpointError(
            f"{path} was written in format {version} by Counterflow {content.get('counterflow_version', '?')}; this is "
            f"Counterflow {counterflow.__version__}, which knows formats up to {form.version}. Upgrade counterflow."
        )
    if "fingerprint" not in content:
        raise CheckpointError(f"{path} has a description without a fingerprint. Fetch or train it again.")
    return dict(content)


def _check_twin(beside: Path, content: dict[str, Any], form: Format) -> None:
    """Check that the json beside the weights is theirs."""
    try:
        text = beside.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{beside} can't be read: {error}. Delete it: the weights carry a copy.") from error
    # Notes on its making may be added by hand; what the policy is may not, because it would be ignored.
    described = {**_parse(text, beside, form), "provenance": None}
    if described != {**content, "provenance": None}:
        raise CheckpointError(
            f"{beside} describes another policy than the weights beside it. Delete it to use the description that the "
            "weights carry, or put the right pair together."
        )
