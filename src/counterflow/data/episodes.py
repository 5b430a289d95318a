"""Reading datasets in OGBench's layout: checked where they enter, in memory or mapped.

An archive `X.npz` holds `observations` (N, ...), `actions` (N, A) and `terminals` (N,), true at the last step of each
episode, and whatever else was recorded, such as `qpos`. Held-out episodes lie beside it in `X-val.npz`. Official
downloads and what `counterflow.data.collect` writes are the same to this file.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from counterflow.checks import FRACTION
from counterflow.data.npz import is_stored, map_npz, names_of, read_npz, save_npz, unpack_npz
from counterflow.errors import DatasetError, InvalidInputError, StorageError
from counterflow.files import reason_of, replacing

Array = npt.NDArray[Any]

REQUIRED = ("observations", "actions", "terminals")
CACHE_FOLDER = ".unpacked"
ROWS_AT_A_TIME = 2**16  # when an array that may be larger than memory is searched


class EpisodeDataset:
    """Episodes one after another in shared arrays.

    `split` gives datasets that share their arrays, so an episode is known by its first row and its length; rows between
    episodes may belong to another dataset.

    Args:
        arrays: name -> array with one row a step; at least observations (N, ...) and actions (N, A).
        starts: (E,) int64, the first row of each episode.
        lengths: (E,) int64, the number of steps of each episode.
    """

    def __init__(
        self, arrays: Mapping[str, Array], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> None:
        self.arrays = dict(arrays)
        self.starts = starts
        self.lengths = lengths

    @classmethod
    def load(cls, path: Path | str, *, mmap: bool = False, keys: Sequence[str] = ()) -> EpisodeDataset:
        """Load an archive and check it.

        Args:
            path: the archive, ending in ".npz".
            mmap: map the arrays instead of reading them. A compressed archive (as official downloads are) is unpacked
                once, into the folder `.unpacked` beside it.
            keys: further arrays to load, for example ("qpos", "button_states").

        Raises:
            DatasetError: the file is missing, damaged, or not in the layout that the top of this file describes.
            StorageError: the archive could not be unpacked.
        """
        path = Path(path)
        with _damage_explained(path):
            known = names_of(path)
            missing = sorted({*REQUIRED, *keys} - {*known})
            if missing:
                raise DatasetError(
                    f"{path} has no {', '.join(missing)}; it has {', '.join(known) or 'no arrays'}. Expected OGBench's "
                    "layout: observations, actions, terminals, and what was asked for besides."
                )
            wanted = dict.fromkeys([*REQUIRED, *keys])
            arrays = map_npz(_unpacked(path), wanted) if mmap else read_npz(path, wanted)
        starts, lengths = _check(path, arrays)
        del arrays["terminals"]
        return cls(arrays, starts, lengths)

    @classmethod
    def load_all(cls, path: Path | str) -> EpisodeDataset:
        """Load an archive with every array that it holds; see `load`."""
        return cls.load(path, keys=[name for name in array_names(path) if name not in REQUIRED])

    @classmethod
    def from_episodes(cls, episodes: Sequence[Mapping[str, Array]]) -> EpisodeDataset:
        """Make a dataset of rollouts, for example of a gymnasium environment.

        Args:
            episodes: for each episode its arrays, one row a step: at least observations (T, ...) and actions (T, A), and the
                same names in all.

        Raises:
            DatasetError: there is no episode, or arrays are missing, differ in length or shape, or hold NaN.
        """
        if not episodes:
            raise DatasetError("no episode was given; expected at least one.")
        names = sorted(episodes[0])
        for index, episode in enumerate(episodes):
            missing = sorted({"observations", "actions", *names} ^ {*episode})
            if missing:
                raise DatasetError(
                    f"episode {index} and the others don't agree on {', '.join(missing)}; expected observations, actions and the "
                    "same further arrays in all."
                )
            steps = {name: len(episode[name]) for name in names}
            if len({*steps.values()}) != 1 or 0 in steps.values():
                listing = ", ".join(f"{name} {count}" for name, count in steps.items())
                raise DatasetError(f"episode {index} has arrays of these lengths: {listing}. Expected one row a step.")
        try:
            arrays = {name: np.concatenate([episode[name] for episode in episodes]) for name in names}
        except ValueError as error:
            raise DatasetError(f"the episodes' arrays don't fit together: {error}.") from error
        lengths = np.array([len(episode["actions"]) for episode in episodes], np.int64)
        terminals = np.zeros(len(arrays["actions"]), bool)
        terminals[np.cumsum(lengths) - 1] = True
        _check(Path("the rollouts"), arrays | {"terminals": terminals})
        arrays.pop("terminals", None)
        return cls(arrays, np.cumsum(lengths) - lengths, lengths)

    def save(self, path: Path | str) -> None:
        """Write the episodes to `path` (.npz) in OGBench's layout, whole or not at all.

        Raises:
            StorageError: writing failed; what stood there before is untouched.
        """
        terminals = np.zeros(self.num_steps, bool)
        terminals[np.cumsum(self.lengths) - 1] = True
        arrays = {name: self.gather(name) for name in self.arrays}
        with replacing(path) as temporary:
            save_npz(temporary, arrays | {"terminals": terminals})

    @classmethod
    def load_with_validation(
        cls,
        path: Path | str,
        *,
        mmap: bool = False,
        keys: Sequence[str] = (),
        validation_fraction: float = 0.1,
        seed: int = 0,
    ) -> tuple[EpisodeDataset, EpisodeDataset]:
        """Load an archive and the episodes held out: from `X-val.npz` beside it, or else split off.

        Args:
            path, mmap, keys: as for `load`.
            validation_fraction: share of the episodes to split off if there is no `X-val.npz`.
            seed: decides which episodes are split off.

        Returns:
            Episodes to train on, and held-out ones.

        Raises:
            DatasetError, StorageError: as for `load`.
            InvalidInputError: the fraction is out of range, or a single episode is to be split.
        """
        path = Path(path)
        dataset = cls.load(path, mmap=mmap, keys=keys)
        validation_path = path.with_name(f"{path.stem}-val.npz")
        if validation_path.exists():
            return dataset, cls.load(validation_path, mmap=mmap, keys=keys)
        return dataset.split(validation_fraction, seed)

    @property
    def num_episodes(self) -> int:
        """E, the number of episodes."""
        return len(self.starts)

    @property
    def num_steps(self) -> int:
        """The number of steps of all episodes together."""
        return int(self.lengths.sum())

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """The shape of one observation."""
        return self.arrays["observations"].shape[1:]

    @property
    def action_dim(self) -> int:
        """A, the number of dimensions of an action."""
        return int(self.arrays["actions"].shape[1])

    def episode(self, index: int) -> dict[str, Array]:
        """Return the arrays of one episode, each with a leading axis of its length (views, not copies).

        Raises:
            InvalidInputError: there is no such episode.
        """
        if not 0 <= index < self.num_episodes:
            raise InvalidInputError(f"episode {index} was asked for; expected 0 to {self.num_episodes - 1}.")
        start = self.starts[index]
        return {name: array[start : start + self.lengths[index]] for name, array in self.arrays.items()}

    def gather(self, name: str) -> Array:
        """Return array `name` with the rows of this dataset's episodes alone, one after another."""
        array = self.arrays[name]
        if self.num_steps == len(array):
            return array
        return np.concatenate([self.episode(index)[name] for index in range(self.num_episodes)])

    def split(self, fraction: float, seed: int = 0) -> tuple[EpisodeDataset, EpisodeDataset]:
        """Split whole episodes at random into two datasets that share these arrays.

        Args:
            fraction: share of the episodes that the second gets, in (0, 1); both get at least one.
            seed: decides which.

        Raises:
            InvalidInputError: the fraction is out of range, or there is only one episode.
        """
        FRACTION.check("the fraction to split off", fraction)
        if self.num_episodes < 2:
            raise InvalidInputError("the dataset has a single episode; expected two or more to split. Collect more.")
        count = min(max(1, round(fraction * self.num_episodes)), self.num_episodes - 1)
        order = np.random.default_rng(seed).permutation(self.num_episodes)
        first, second = np.sort(order[count:]), np.sort(order[:count])
        return (
            EpisodeDataset(self.arrays, self.starts[first], self.lengths[first]),
            EpisodeDataset(self.arrays, self.starts[second], self.lengths[second]),
        )

    def summary(self) -> str:
        """Describe the dataset in one line."""
        shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        length = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        return (
            f"{self.num_episodes:,} episodes of {length} steps, {self.num_steps:,} transitions, observations "
            f"{self.observation_shape}, actions ({self.action_dim},)"
        )


def array_names(path: Path | str) -> list[str]:
    """Return the names of an archive's arrays.

    Raises:
        DatasetError: the file is missing or damaged.
    """
    path = Path(path)
    with _damage_explained(path):
        return names_of(path)


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    """Turn what the libraries say of a damaged file into an error that says what to do."""
    try:
        yield
    except (DatasetError, StorageError):
        raise
    except FileNotFoundError as error:
        raise DatasetError(
            f"there is no dataset at {path}. Collect one with 'counterflow collect', or check the path."
        ) from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "not a file"
        raise DatasetError(
            f"{path} ({size}) is truncated, damaged, or not an npz archive: {error}. Collect or download it again."
        ) from error


def _unpacked(path: Path) -> Path:
    """Return an uncompressed archive of the same content: the file itself, or a copy that is made once.

    Raises:
        StorageError: the copy can't be written.
    """
    if is_stored(path):
        return path
    state = path.stat()
    folder = path.parent / CACHE_FOLDER
    # A name that changes with the content: a file that was downloaded again is unpacked again.
    target = folder / f"{path.stem}-{state.st_size}-{state.st_mtime_ns}.npz"
    if target.exists():
        return target
    try:
        folder.mkdir(exist_ok=True)
        for outdated in folder.glob(f"{path.stem}-[0-9]*-[0-9]*.npz"):
            outdated.unlink()
        unpack_npz(path, target)
    except zipfile.BadZipFile:
        raise
    except OSError as error:
        raise StorageError(
            f"{path} is compressed and could not be unpacked into {folder}, so it can't be mapped into memory: "
            f"{reason_of(error)}. Mend that, or load it with mmap=False. The dataset itself is unharmed."
        ) from error
    return target


def _check(path: Path, arrays: dict[str, Array]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Check everything that later code relies on and return where episodes start and how long they are.

    Raises:
        DatasetError: something is wrong; the message says what and where.
    """
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len({*lengths.values()}) != 1 or 0 in lengths.values():
        listing = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DatasetError(f"{path} holds arrays of these lengths: {listing}. Expected the same length, one or more.")
    actions, terminals = arrays["actions"], arrays["terminals"]
    if actions.ndim != 2:
        raise DatasetError(f"{path} holds actions of shape {actions.shape}; expected (steps, dimensions).")
    for name in ("observations", "actions"):
        _check_finite(path, name, arrays[name])
    if terminals.ndim != 1 or not np.isin(terminals, (0, 1)).all():
        raise DatasetError(
            f"{path} holds terminals that are not one 0 or 1 a step; expected 1 at each episode's last step."
        )
    if not terminals[-1]:
        raise DatasetError(
            f"the last step of {path} is not terminal, so its last episode is cut off. Collect or download it again."
        )
    ends = np.flatnonzero(terminals).astype(np.int64) + 1
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    return starts, ends - starts


def _check_finite(path: Path, name: str, array: Array) -> None:
    if array.dtype.kind not in "fiub":
        raise DatasetError(f"{path} holds {name} of type {array.dtype}; expected numbers.")
    if array.dtype.kind != "f":
        return
    for first in range(0, len(array), ROWS_AT_A_TIME):
        finite = np.isfinite(array[first : first + ROWS_AT_A_TIME]).reshape(-1, math.prod(array.shape[1:])).all(axis=1)
        if not finite.all():
            row = first + int(np.argmin(finite))
            raise DatasetError(
                f"{path} holds {name} that are NaN or infinite, first at step {row}. Collect or download it again."
            )
