"""An episode of a steering dataset: what it holds, what must be true of it, and its file.

The arrays of an episode, with C decisions (chunks), T executed actions, horizon H, action dimension A, and L = A + padding,
the size of a row of what the flow moves (L = A in most policies):

==================  =========  ==================================================================================
observations        (C, O)     float32: what the policy saw when it decided
references          (C, H, L)  float32: the coarse reference chunk, normalised; anything finite where nobody spoke
active              (C,)       bool: somebody spoke
steered             (C, H, L)  bool: entries of the reference that count
noise               (C, H, L)  float32: the noise that the policy turned into the chunk
start_time          (C,)       float32: where on the flow the noise lies; 0 is its beginning
chunks              (C, H, L)  float32: the chunk, normalised
executed            (C,)       int64: how many of its actions were executed, 1 to H; T is their sum
intervened          (C,)       bool: an expert was in control, not the policy
features            (C, F)     float32, optional: the policy's own features of the observation
step_observations   (T, O)     float32, optional: what was seen before each executed action
step_actions        (T, A)     float32, optional: the executed actions, in the environment's units
rewards             (T,)       float32, optional: what each executed action earned
base_noise          (C, H, L)  float32, optional: where the policy's own flow started, also where an expert acted
base_chunks         (C, H, L)  float32, optional: what the policy's own flow gave, not yet limited, normalised
==================  =========  ==================================================================================

Any other array of numbers with C or T rows may lie beside them.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from counterflow.binding import Binding
from counterflow.checks import COUNT_OR_ZERO
from counterflow.data.npz import names_of, read_npz, save_npz
from counterflow.errors import DatasetError, InvalidInputError
from counterflow.random import check_seed

Array = npt.NDArray[Any]

# name -> (type, axes): C decisions, T executed actions, H horizon, A action dimension, L the flow's, O observation, F features
REQUIRED = {
    "observations": (np.float32, "CO"),
    "references": (np.float32, "CHL"),
    "active": (np.bool_, "C"),
    "steered": (np.bool_, "CHL"),
    "noise": (np.float32, "CHL"),
    "start_time": (np.float32, "C"),
    "chunks": (np.float32, "CHL"),
    "executed": (np.int64, "C"),
    "intervened": (np.bool_, "C"),
}
OPTIONAL = {
    "features": (np.float32, "CF"),
    "step_observations": (np.float32, "TO"),
    "step_actions": (np.float32, "TA"),
    "rewards": (np.float32, "T"),
    "base_noise": (np.float32, "CHL"),
    "base_chunks": (np.float32, "CHL"),
}

ABOUT = "episode"  # the member of a file that holds its json, and the name of the ids of `concatenated`


@dataclass(frozen=True, eq=False)
class SteeringEpisode:
    """One recorded episode.

    Args:
        env: full name of the task, for example "ogbench/cube-single-task1".
        seed: what the episode descends from.
        index: its number in the recording's order of seeds.
        success: whether the task was solved.
        source: id of the recording, as `SteeringDataset.add_source` returned it.
        arrays: see the top of this file.
    """

    env: str
    seed: int
    index: int
    success: bool
    source: str
    arrays: dict[str, Array]

    @property
    def key(self) -> tuple[str, str, int]:
        """What an episode is known by: (source, env, index)."""
        return self.source, self.env, self.index

    @property
    def decisions(self) -> int:
        """C, the number of chunks."""
        return len(self.arrays["observations"])

    @property
    def steps(self) -> int:
        """T, the number of executed actions."""
        return int(self.arrays["executed"].sum())

    def __str__(self) -> str:
        return f"episode {self.index} of {self.env} (source {self.source})"


def check_episode(episode: SteeringEpisode, binding: Binding) -> None:
    """Check everything about an episode that later code relies on.

    Raises:
        InvalidInputError: something is wrong; the message says what and where.
    """
    check_seed(episode.seed)
    if not isinstance(episode.env, str) or not episode.env:
        raise InvalidInputError(f"the environment is {episode.env!r}; expected the name of a task.")
    if not isinstance(episode.source, str):
        raise InvalidInputError(f"the source is {episode.source!r}; expected an id that add_source() returned.")
    COUNT_OR_ZERO.check("the index", episode.index)
    if not isinstance(episode.success, bool | np.bool_):
        raise InvalidInputError(f"the success of {episode} is {episode.success!r}; expected True or False.")
    arrays = episode.arrays
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise InvalidInputError(f"{episode} has no {', '.join(missing)}; expected {', '.join(REQUIRED)}.")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InvalidInputError(f"{name} of {episode} is a {type(array).__name__}; expected a numpy array.")
        if not name.isidentifier() or name == ABOUT:
            raise InvalidInputError(f"{episode} has an array called {name!r}; expected a name like 'qpos'.")
    sizes = {"C": len(arrays["observations"]) if arrays["observations"].ndim else 0}
    if sizes["C"] == 0:
        raise InvalidInputError(f"{episode} has no decisions; expected one or more. Don't record empty episodes.")
    sizes |= {"H": binding.horizon, "A": binding.dim, "L": binding.state_dim}
    _check_array(episode, "observations", *REQUIRED["observations"], sizes)
    sizes["O"] = arrays["observations"].shape[1]
    for name, (dtype, axes) in REQUIRED.items():
        _check_array(episode, name, dtype, axes, sizes)
    _check_range(episode, "executed", 1, binding.horizon)
    _check_range(episode, "start_time", 0, 1)
    sizes["T"] = episode.steps
    for name, array in arrays.items():
        if name in OPTIONAL:
            _check_array(episode, name, *OPTIONAL[name], sizes)
        elif name not in REQUIRED and (array.ndim == 0 or len(array) not in (sizes["C"], sizes["T"])):
            raise InvalidInputError(
                f"{name} of {episode} has the shape {array.shape}; expected {sizes['C']} rows, one a decision, or "
                f"{sizes['T']}, one an executed action."
            )
        elif array.dtype.kind not in "fiub":
            raise InvalidInputError(f"{name} of {episode} is of type {array.dtype}; expected numbers.")


def _check_array(
    episode: SteeringEpisode, name: str, dtype: npt.DTypeLike, axes: str, sizes: Mapping[str, int]
) -> None:
    array = episode.arrays[name]
    fits = array.ndim == len(axes) and all(
        sizes.get(axis, length) == length and length > 0 for axis, length in zip(axes, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        shape = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
        raise InvalidInputError(
            f"{name} of {episode} is {describe(array.dtype, array.shape)}; expected {np.dtype(dtype)} ({shape}), where the "
            f"axes are ({', '.join(axes)})."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
        raise InvalidInputError(
            f"{name} of {episode} is NaN or infinite, first in row {row}; expected finite numbers. Look at what made them."
        )


def _check_range(episode: SteeringEpisode, name: str, low: float, high: float) -> None:
    array = episode.arrays[name]
    if array.min() < low or array.max() > high:
        raise InvalidInputError(
            f"{name} of {episode} goes from {array.min()} to {array.max()}; expected {low} to {high}."
        )


def read_episode(file: Path) -> SteeringEpisode:
    """Read an episode's file, all of it.

    Raises:
        DatasetError: it is damaged, or something else.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # before numpy trusts what a member says of itself
        if damaged is not None:
            raise DatasetError(f"the checksum of {damaged} is wrong")
        arrays = read_npz(file, names_of(file))
        if ABOUT not in arrays:
            raise DatasetError(f"it has no member {ABOUT!r} that says which episode it is")
        about = json.loads(arrays.pop(ABOUT).tobytes())
        return SteeringEpisode(**about, arrays=arrays)
    except DatasetError:
        raise
    except (OSError, ValueError, EOFError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        size = f"{file.stat().st_size:,} bytes" if file.is_file() else "not a file"
        raise DatasetError(f"{error} ({size})") from error


def write_episode(file: Path, episode: SteeringEpisode) -> None:
    """Write an episode to a file; the same bytes for the same episode.

    Raises:
        OSError: writing failed.
    """
    about = {name: getattr(episode, name) for name in ("env", "seed", "index", "success", "source")}
    content = {ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8)}
    save_npz(file, content | dict(sorted(episode.arrays.items())))


def file_name(episode: SteeringEpisode) -> str:
    """Return a name that no other episode has: "+" stands for "/", and a "+" itself is escaped."""
    return f"{episode.source}-{quote(episode.env, safe='/').replace('/', '+')}-{episode.index:06d}.npz"


def column_of(array: Array) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return what arrays must share to be joined: the type and the shape of a row."""
    return array.dtype, array.shape[1:]


def describe(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    """Write a type and a shape for an error message."""
    return f"{dtype} ({', '.join(map(str, shape))})"
