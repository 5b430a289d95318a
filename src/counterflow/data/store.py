"""Where a dataset comes into being: finished episodes one by one, then whole archives, each put in place atomically."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import counterflow
from counterflow.data.npz import Column, save_npz, write_npz
from counterflow.data.recipe import Episode, Recipe
from counterflow.errors import DatasetError, InvalidInputError, MismatchError, StorageError
from counterflow.files import reason_of, replacing, take_lock

_WAYS_OUT_OF_A_MISMATCH = (
    "Use the same settings and versions to go on with it, choose another path, or pass overwrite=True to start over."
)


class EpisodeStore:
    """The files of one dataset, finished or not.

    While episodes are made they lie one a file in `<out>.partial/`, beside a manifest that says what they belong to.
    `assemble` joins them and puts the training archive in place last, so its presence means that all is complete.

    Args:
        out: path of the training archive, ending in ".npz".
        recipe: what the dataset is to contain.

    Raises:
        InvalidInputError: `out` does not end in ".npz".
    """

    def __init__(self, out: Path, recipe: Recipe) -> None:
        if out.suffix != ".npz":
            raise InvalidInputError(f"the dataset's path is {str(out)!r}; expected it to end in '.npz'.")
        self.path = out
        self.validation_path = out.with_name(f"{out.stem}-val.npz")
        self.provenance_path = out.with_suffix(".json")
        self.partial = out.with_name(f"{out.stem}.partial")
        self.recipe = recipe

    def is_complete(self) -> bool:
        """Say whether this very dataset lies at the path.

        Raises:
            MismatchError: another dataset lies there.
        """
        if not self.path.exists():
            return False
        try:
            found = json.loads(self.provenance_path.read_text())["recipe"]
        except (OSError, ValueError, KeyError, TypeError):
            raise MismatchError(
                f"{self.path} exists, and no {self.provenance_path.name} beside it says how it was made. Choose "
                "another path, or pass overwrite=True to replace it."
            ) from None
        difference = _difference(found, asdict(self.recipe))
        if difference:
            raise MismatchError(f"{self.path} holds another dataset: {difference}. {_WAYS_OUT_OF_A_MISMATCH}")
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from collecting to the same place; the system frees the lock if this one is killed.

        Raises:
            StorageError: another process holds the lock, or the folder can't be made.
        """
        with self._storing():
            self.partial.mkdir(parents=True, exist_ok=True)
            try:
                lock = take_lock(self.partial / "lock")
            except BlockingIOError:
                lock = None
        if lock is None:
            raise StorageError(
                f"another process is collecting to {self.path}. Wait until it has finished, or stop it first."
            )
        with lock:
            yield

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Turn a failure to write into an error that says what is safe and how to go on."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"writing the dataset {self.path} failed: {reason_of(error)}. The episodes finished so far are safe in "
                f"{self.partial}. Mend the cause and run the same command again to go on from there."
            ) from error

    def prepare(self, overwrite: bool) -> None:
        """Begin in the partial folder, or go on with what lies there.

        Raises:
            MismatchError: the folder holds episodes of another dataset, and `overwrite` is False.
        """
        for leftover in self.partial.glob(".*.partial-*"):
            leftover.unlink(missing_ok=True)
        manifest = self.partial / "manifest.json"
        wanted = {"recipe": asdict(self.recipe), "versions": _versions()}
        if manifest.exists():
            found = json.loads(manifest.read_text())
            difference = _difference(found["recipe"] | found["versions"], wanted["recipe"] | wanted["versions"])
            if not difference:
                return
            if not overwrite:
                raise MismatchError(
                    f"{self.partial} holds another, unfinished dataset: {difference}. {_WAYS_OUT_OF_A_MISMATCH}"
                )
        for episode in self.partial.glob("episode-*.npz"):
            episode.unlink()
        with self._storing(), replacing(manifest) as temporary:
            temporary.write_text(_to_json(wanted))

    def write_episode(self, index: int, episode: Episode) -> None:
        """Put a finished episode in place, whole or not at all."""
        with self._storing(), replacing(self._episode_path(index)) as temporary:
            save_npz(temporary, episode)

    def has_episode(self, index: int) -> bool:
        """Say whether the episode lies there whole; what is left of a damaged one is removed."""
        if not self._episode_path(index).exists():
            return False
        try:
            self._read_episode(index)
        except DatasetError:
            self._episode_path(index).unlink()
            return False
        return True

    def assemble(self) -> None:
        """Join the episodes into the two archives, an episode at a time, and put them in place."""
        recipe = self.recipe
        provenance = {
            "recipe": asdict(recipe),
            "versions": _versions(),
            "transitions": self.transitions,
            "source": "scripted oracles of the ogbench package, recipe of OGBench (arXiv 2410.20092)",
        }
        if recipe.validation_episodes:
            self._assemble(self.validation_path, range(recipe.episodes, recipe.total_episodes))
        else:
            self.validation_path.unlink(missing_ok=True)
        with self._storing(), replacing(self.provenance_path, scratch=self.partial) as temporary:
            temporary.write_text(_to_json(provenance))
        self._assemble(self.path, range(recipe.episodes))

    def discard_partial(self) -> None:
        """Remove the partial folder, if there is one."""
        shutil.rmtree(self.partial, ignore_errors=True)

    @property
    def transitions(self) -> int:
        """Transitions of both archives together: every episode has the same length."""
        return self.recipe.total_episodes * self.recipe.max_episode_steps

    def _assemble(self, path: Path, indices: range) -> None:
        columns = {
            name: Column(
                shape=(len(indices) * self.recipe.max_episode_steps, *array.shape[1:]),
                dtype=array.dtype,
                blocks=self._blocks(name, indices),
            )
            for name, array in self._read_episode(indices[0]).items()
        }
        with self._storing(), replacing(path, scratch=self.partial) as temporary:
            write_npz(temporary, columns)

    def _blocks(self, name: str, indices: range) -> Iterator[npt.NDArray[Any]]:
        for index in indices:
            with np.load(self._episode_path(index)) as archive:
                yield archive[name]

    def _read_episode(self, index: int) -> Episode:
        """Read an episode and check it completely.

        Raises:
            DatasetError: the file is damaged.
        """
        path = self._episode_path(index)
        try:
            with np.load(path) as archive:  # reading a member checks its CRC
                episode = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DatasetError(f"the episode {path} is damaged: {error}. Collect again; it is made anew.") from error
        steps = self.recipe.max_episode_steps
        if not episode or any(len(array) != steps for array in episode.values()):
            raise DatasetError(f"the episode {path} does not have {steps} steps. Collect again; it is made anew.")
        return episode

    def _episode_path(self, index: int) -> Path:
        return self.partial / f"episode-{index:06d}.npz"


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Describe every value that differs; empty if none does."""
    return ", ".join(
        f"{name} is {found.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    )


def _versions() -> dict[str, str]:
    """Return the versions of everything that the data depends on."""
    return {"counterflow": counterflow.__version__} | {name: version(name) for name in ("ogbench", "mujoco", "numpy")}


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
