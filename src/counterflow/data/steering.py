"""Steering datasets: recorded steered rollouts in a folder that can be added to, and killed, at any moment.

`manifest.json` says what the noises belong to (`Binding`) and how every recording was made (its sources);
`episodes/<source>-<env>-<index>.npz` is one episode each, put there whole or not at all. Recording goes

    with SteeringDataset.create_or_open("steered", binding) as dataset:
        source = dataset.add_source({"method": "frs", "seed": 0, ...})
        for index, seed in enumerate(seeds):
            if not dataset.has(source, env, index):
                dataset.append(SteeringEpisode(env, seed, index, success, source, arrays))

and after a kill the same lines make only what is missing. `SteeringDataset.load` reads, also while another process records.

What an episode holds is said in `steering_episode`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

import counterflow
from counterflow.binding import Binding
from counterflow.checks import COUNT, COUNT_OR_ZERO, FRACTION
from counterflow.data.steering_episode import (
    ABOUT,
    Array,
    SteeringEpisode,
    check_episode,
    column_of,
    describe,
    file_name,
    read_episode,
    write_episode,
)
from counterflow.errors import (
    CounterflowError,
    DatasetError,
    InvalidInputError,
    MismatchError,
    StorageError,
    UnknownNameError,
)
from counterflow.files import reason_of, replacing, take_lock, write_json
from counterflow.random import check_seed

FORMAT = "counterflow/steering-dataset"
FORMAT_VERSION = 1
SOLVERS = ("euler", "midpoint", "rk4")

_MANIFEST = "manifest.json"
_EPISODES = "episodes"
_DAMAGED = "damaged"
_LOCK = ".lock"


class SteeringDataset:
    """The episodes of a steering dataset, sorted by environment, source and index.

    Made by `create_or_open` (to record, and to read what is there), `load` (to read), or as a part of another one
    (`filter`, `split`), which shares its arrays.

    Args:
        path: the dataset's folder.
        binding: what its noises belong to.
        sources: id -> how that recording was made.
        episodes: checked ones.
    """

    def __init__(
        self,
        path: Path,
        binding: Binding,
        sources: Mapping[str, dict[str, Any]],
        episodes: Sequence[SteeringEpisode] = (),
    ) -> None:
        self.path = path
        self.binding = binding
        self.sources = dict(sources)
        self._episodes = sorted(episodes, key=_order)
        self._keys = {episode.key for episode in self._episodes}
        self._columns = {name: column_of(array) for episode in self._episodes for name, array in episode.arrays.items()}
        self._lock: IO[str] | None = None

    @classmethod
    def create_or_open(cls, path: Path | str, binding: Binding) -> SteeringDataset:
        """Open a dataset to record, making it if it isn't there; no other process may record to it until it is closed.

        Args:
            path: the dataset's folder.
            binding: what the noises belong to that will be recorded.

        Returns:
            The dataset, to be used as a context manager. What was recorded before is in it.

        Raises:
            InvalidInputError, UnknownNameError: the binding has a number below 1, or an unknown solver.
            MismatchError: the dataset there belongs to another policy, or another way of denoising.
            DatasetError: the folder holds something else, or an episode in it is damaged.
            StorageError: another process records there, or the folder can't be written.
        """
        path = Path(path)
        cls.check_recordable(path, binding)
        with _locked_or_closed(path, "recording to") as lock:
            if (path / _MANIFEST).exists():
                found, _ = _read_manifest(path)
                found.check(binding, f"the steering dataset {path}")
                dataset = cls.load(path)
            else:
                dataset = cls(path, binding, {})
                dataset._write_manifest()
            _remove_leftovers(path)
            dataset._lock = lock
        return dataset

    @classmethod
    def check_recordable(cls, path: Path | str, binding: Binding) -> None:
        """Refuse a folder that nothing of this binding can be recorded to; nothing is made or changed, and no episode read.

        Args:
            path: the folder, which need not be there.
            binding: what the noises belong to that would be recorded.

        Raises:
            InvalidInputError, UnknownNameError: the binding has a number below 1, or an unknown solver.
            MismatchError: the dataset there belongs to another policy, or another way of denoising.
            DatasetError: the folder holds something else.
        """
        path = Path(path)
        _check_binding(binding)
        _refuse_foreign(path)
        if (path / _MANIFEST).exists():
            _read_manifest(path)[0].check(binding, f"the steering dataset {path}")

    @classmethod
    def load(cls, path: Path | str) -> SteeringDataset:
        """Read a dataset into memory and check every episode.

        Raises:
            DatasetError: there is no steering dataset, it was written by a newer version, or an episode is damaged.
        """
        path = Path(path)
        files = _episode_files(path)  # before the manifest: a recording names its source there first
        dataset = cls(path, *_read_manifest(path))
        for file in files:
            dataset._take_in(file)
        return dataset

    def __enter__(self) -> SteeringDataset:
        """Return self; others may record once the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the dataset."""
        self.close()

    def close(self) -> None:
        """End recording, so that others may; reading goes on to work."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def add_source(self, provenance: Mapping[str, Any]) -> str:
        """Name a recording in the manifest; naming it again changes nothing.

        Args:
            provenance: everything that determines the recording, as values that json knows: method, settings, seed, ...

        Returns:
            The recording's id, which the provenance alone determines.

        Raises:
            InvalidInputError: the provenance isn't json, or the dataset isn't open for recording.
            StorageError: the manifest can't be written; the old one is untouched.
        """
        self._require_open()
        try:
            plain = json.loads(json.dumps(dict(provenance), allow_nan=False, sort_keys=True))
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"the provenance can't be written as json ({error}): {provenance!r}. Give names, numbers, lists and "
                "dictionaries of them."
            ) from error
        source = _source_id(plain)
        if source not in self.sources:
            self.sources[source] = plain
            try:
                self._write_manifest()
            except BaseException:
                del self.sources[source]
                raise
        return source

    def append(self, episode: SteeringEpisode) -> None:
        """Put an episode on disk, whole or not at all.

        Args:
            episode: the episode; its arrays are copied.

        Raises:
            InvalidInputError: an array has the wrong shape or type or isn't finite, the source is unknown, the episode is
                there already, or the dataset isn't open for recording.
            MismatchError: observations (or other arrays) are unlike those of the episodes before.
            StorageError: writing failed; the episodes before are safe.
        """
        self._require_open()
        if episode.source not in self.sources:
            raise InvalidInputError(
                f"{episode} names a source that {self.path} doesn't know; expected an id that add_source() returned."
            )
        if self.has(*episode.key):
            raise InvalidInputError(
                f"{episode} is in {self.path} already. Ask has() before recording, or name the recording by a source of "
                "its own."
            )
        check_episode(episode, self.binding)
        self._check_columns(episode)
        copied = dataclasses.replace(
            episode,
            seed=int(episode.seed),
            index=int(episode.index),
            success=bool(episode.success),
            arrays={name: np.array(array, order="C") for name, array in episode.arrays.items()},
        )
        with self._storing(), replacing(self.path / _EPISODES / file_name(copied)) as temporary:
            write_episode(temporary, copied)
        self._insert(copied)

    def has(self, source: str, env: str, index: int) -> bool:
        """Say whether the episode is there."""
        return (source, env, index) in self._keys

    @property
    def episodes(self) -> list[SteeringEpisode]:
        """The episodes, sorted by environment, source and index."""
        return list(self._episodes)

    def __len__(self) -> int:
        """Return the number of episodes."""
        return len(self._episodes)

    def __iter__(self) -> Iterator[SteeringEpisode]:
        """Go through the episodes in order."""
        return iter(self.episodes)

    @property
    def successes(self) -> int:
        """The number of successful episodes."""
        return sum(episode.success for episode in self._episodes)

    def filter(self, success: bool | None = None, env: str | None = None, first: int | None = None) -> SteeringDataset:
        """Return a part of the dataset, which shares its arrays.

        Args:
            success: keep successful episodes alone (True), or the others (False).
            env: keep episodes of this task alone.
            first: of what is left, keep the first so many of every task, in order.

        Raises:
            UnknownNameError: no episode is of that task; the nearest are suggested.
            InvalidInputError: `first` is less than 1.
            DatasetError: nothing is left.
        """
        if first is not None:
            COUNT.check("the number of first episodes", first)
        if not self._episodes:
            raise DatasetError(f"{self.path} holds no episodes. Record some first.")
        kept = self._episodes
        if env is not None:
            kept = [episode for episode in kept if episode.env == env]
            if not kept:
                raise UnknownNameError("task in this dataset", env, {episode.env for episode in self._episodes})
        where = f"{self.path}{'' if env is None else f', task {env}'}"
        if success is not None:
            count = len(kept)
            kept = [episode for episode in kept if episode.success == success]
            if not kept and success:
                raise DatasetError(
                    f"no successful episode: all {count} of {where} failed. Record more of them, or steer better: a better "
                    "reasoner, another way of steering, an expert who intervenes."
                )
            if not kept:
                raise DatasetError(f"no failed episode: all {count} of {where} succeeded. Ask for the successful ones.")
        if first is not None:
            tasks = groupby(kept, key=lambda episode: episode.env)  # they are sorted by it
            kept = [episode for _, episodes in tasks for episode in islice(episodes, first)]
        return self._part(kept)

    def require_successes(self) -> SteeringDataset:
        """Return the successful episodes.

        Raises:
            DatasetError: there is none.
        """
        return self.filter(success=True)

    def split(self, fraction: float, seed: int = 0) -> tuple[SteeringDataset, SteeringDataset]:
        """Split whole episodes at random into two parts that share these arrays.

        Args:
            fraction: share of the episodes that the second gets, in (0, 1); both get at least one.
            seed: decides which.

        Raises:
            InvalidInputError: the fraction is out of range, or there are fewer than two episodes.
        """
        FRACTION.check("the fraction to split off", fraction)
        if len(self) < 2:
            raise InvalidInputError(
                f"{self.path} has {len(self)} episodes; expected two or more to split. Record more."
            )
        count = min(max(1, round(fraction * len(self))), len(self) - 1)
        order = np.random.default_rng(check_seed(seed)).permutation(len(self))
        return (
            self._part([self._episodes[index] for index in order[count:]]),
            self._part([self._episodes[index] for index in order[:count]]),
        )

    def concatenated(self, names: Sequence[str]) -> dict[str, Array]:
        """Join arrays over the episodes.

        Args:
            names: arrays with one row a decision, or arrays with one row an executed action (not both kinds at once).

        Returns:
            The arrays (N, ...), and "episode" (N,) int64: the place in `episodes` of the episode that a row is from.

        Raises:
            UnknownNameError: no episode has such an array; the nearest are suggested.
            DatasetError: there is no episode, or one lacks an array.
            InvalidInputError: no array was asked for, or rows don't belong together.
        """
        if not names:
            raise InvalidInputError("no array was asked for; name at least one, for example 'noise'.")
        if not self._episodes:
            raise DatasetError(f"{self.path} holds no episodes. Record some first.")
        for name in names:
            if name not in self._columns:
                raise UnknownNameError("array", name, self._columns)
            for episode in self._episodes:
                if name not in episode.arrays:
                    raise DatasetError(
                        f"{episode} of {self.path} has no {name}, and others do. Do without, or keep the episodes that "
                        "have it in a dataset of their own."
                    )
        for episode in self._episodes:
            if len({len(episode.arrays[name]) for name in names}) > 1:
                listing = ", ".join(f"{name} {len(episode.arrays[name])}" for name in names)
                raise InvalidInputError(
                    f"{episode} has this many rows: {listing}. Expected arrays with one row a decision, or with one row an "
                    "executed action; ask for the two kinds one after the other."
                )
        lengths = [len(episode.arrays[names[0]]) for episode in self._episodes]
        joined = {name: np.concatenate([episode.arrays[name] for episode in self._episodes]) for name in names}
        return joined | {ABOUT: np.repeat(np.arange(len(self), dtype=np.int64), lengths)}

    def summary(self) -> dict[str, Any]:
        """Describe the dataset in plain values, which json knows.

        Returns:
            episodes, successes, decisions, steps: how many; `environments` and `sources`: the same for each, and each
            source's provenance; interventions: share of decisions that an expert made; noise_norm: mean Euclidean norm of
            a decision's noise (H * A numbers); noise_beyond: shares of the noise's entries whose size is more than 1, 2
            and 3. The last three are None if there are no episodes. binding: its fields.
        """
        by_env: dict[str, list[SteeringEpisode]] = {}
        by_source: dict[str, list[SteeringEpisode]] = {source: [] for source in sorted(self.sources)}
        for episode in self._episodes:
            by_env.setdefault(episode.env, []).append(episode)
            by_source[episode.source].append(episode)
        described: dict[str, Any] = {
            **_counts(self._episodes),
            "environments": {env: _counts(episodes) for env, episodes in by_env.items()},
            "sources": {
                source: {**_counts(episodes), "provenance": self.sources[source]}
                for source, episodes in by_source.items()
            },
            "interventions": None,
            "noise_norm": None,
            "noise_beyond": None,
            "binding": self.binding.to_json(),
        }
        if self._episodes:
            arrays = self.concatenated(("noise", "intervened"))
            noise = arrays["noise"][..., : self.binding.dim].reshape(len(arrays["noise"]), -1).astype(np.float64)
            described["interventions"] = float(arrays["intervened"].mean())
            described["noise_norm"] = float(np.linalg.norm(noise, axis=1).mean())
            described["noise_beyond"] = {str(size): float((np.abs(noise) > size).mean()) for size in (1, 2, 3)}
        return described

    def _part(self, episodes: Sequence[SteeringEpisode]) -> SteeringDataset:
        return SteeringDataset(self.path, self.binding, self.sources, episodes)

    def _require_open(self) -> None:
        if self._lock is None:
            raise InvalidInputError(
                f"{self.path} isn't open for recording; expected a dataset of SteeringDataset.create_or_open() inside its "
                "with block."
            )

    def _check_columns(self, episode: SteeringEpisode) -> None:
        """Check that arrays can be joined with those of the episodes before.

        Raises:
            MismatchError: one can't.
        """
        for name, array in episode.arrays.items():
            expected = self._columns.get(name, column_of(array))
            if column_of(array) != expected:
                raise MismatchError(
                    f"{name} of {episode} has rows of {describe(*column_of(array))}, and the episodes before have rows of "
                    f"{describe(*expected)}. Episodes of one dataset are alike; record these into another folder."
                )

    def _insert(self, episode: SteeringEpisode) -> None:
        self._check_columns(episode)
        self._columns |= {name: column_of(array) for name, array in episode.arrays.items()}
        self._keys.add(episode.key)
        insort(self._episodes, episode, key=_order)

    def _take_in(self, file: Path) -> None:
        """Read an episode's file, check all of it, and add the episode.

        Raises:
            DatasetError: something is wrong with it; the message says what to do.
        """
        try:
            episode = read_episode(file)
            check_episode(episode, self.binding)
            if episode.source not in self.sources:
                raise DatasetError(f"the manifest doesn't know its source {episode.source!r}")
            if file.name != file_name(episode):
                raise DatasetError(f"it holds {episode}, which belongs into {file_name(episode)}")
            self._insert(episode)
        except CounterflowError as error:
            raise DatasetError(
                f"{file} is no episode of this dataset, or damaged: {str(error).rstrip('.')}. 'counterflow dataset repair "
                f"{self.path}' sets such files aside; then record again what is missing."
            ) from error

    def _write_manifest(self) -> None:
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "counterflow_version": counterflow.__version__,
            "binding": self.binding.to_json(),
            "sources": dict(sorted(self.sources.items())),
        }
        with self._storing():
            write_json(self.path / _MANIFEST, content)

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Turn a failure to write into an error that says what is safe and how to go on."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"recording to {self.path} failed: {reason_of(error)}. The {len(self)} episodes recorded so far are safe. "
                "Mend the cause and record again to go on from there."
            ) from error


def merge(paths: Sequence[Path | str], out: Path | str) -> SteeringDataset:
    """Write the episodes of several datasets to a new one, each once; safe to run again after an interruption.

    Args:
        paths: folders of datasets with the same binding.
        out: the new folder; what an earlier call left there is completed.

    Returns:
        The new dataset.

    Raises:
        InvalidInputError: no dataset was named, or `out` is one of them.
        MismatchError: bindings differ, an episode is there twice with different content, or `out` holds other episodes.
        DatasetError: a dataset is missing or damaged, or `out` is a folder of something else.
        StorageError: writing failed, or another process records to `out`; episodes written before are safe.
    """
    if not paths:
        raise InvalidInputError("no dataset to merge was named; expected the folders of one or more.")
    return _write([SteeringDataset.load(path) for path in paths], Path(out))


def copy_filtered(
    path: Path | str,
    out: Path | str,
    success: bool | None = None,
    env: str | None = None,
    first: int | None = None,
) -> SteeringDataset:
    """Write a part of a dataset to a new folder; safe to run again after an interruption.

    Args:
        path: the dataset's folder.
        out: the new folder; what an earlier call left there is completed.
        success, env, first: as for `SteeringDataset.filter`.

    Returns:
        The new dataset.

    Raises:
        UnknownNameError, InvalidInputError, DatasetError: as for `SteeringDataset.filter`; `out` is the dataset itself.
        MismatchError: `out` holds other episodes, or belongs to another policy.
        StorageError: writing failed, or another process records to `out`; episodes written before are safe.
    """
    return _write([SteeringDataset.load(path).filter(success, env, first)], Path(out))


def repair(path: Path | str) -> list[Path]:
    """Set damaged episodes aside, so that the rest can be loaded and the missing ones can be recorded again.

    Nothing is deleted but leftovers of interrupted writing: the files go to `<path>/damaged/`.

    Returns:
        Where the damaged files lie now.

    Raises:
        DatasetError: there is no steering dataset, or its manifest is damaged.
        StorageError: another process records there, or a file can't be moved.
    """
    path = Path(path)
    dataset = SteeringDataset(path, *_read_manifest(path))
    aside: list[Path] = []
    with _locked_or_closed(path, "repairing") as lock, lock:
        for file in _episode_files(path):
            try:
                dataset._take_in(file)
            except DatasetError:
                aside.append(path / _DAMAGED / file.name)
                aside[-1].parent.mkdir(exist_ok=True)
                file.replace(aside[-1])
        _remove_leftovers(path)
    return aside


def _write(datasets: Sequence[SteeringDataset], out: Path) -> SteeringDataset:
    """Write all episodes of `datasets` to `out`, which holds some of them or none."""
    whole = SteeringDataset(out, datasets[0].binding, {})
    wanted: dict[tuple[str, str, int], SteeringEpisode] = {}
    for dataset in datasets:
        if dataset.path.resolve() == out.resolve():
            raise InvalidInputError(f"{out} is to be read and written at once; expected a new folder to write to.")
        dataset.binding.check(whole.binding, f"the steering dataset {dataset.path}")
        for episode in dataset:
            if episode.key in wanted:
                _check_same(wanted[episode.key], episode, dataset.path)
                continue
            whole.sources[episode.source] = dataset.sources[episode.source]
            whole._insert(episode)  # before anything is written, so that what can't be joined is found here
            wanted[episode.key] = episode
    with SteeringDataset.create_or_open(out, whole.binding) as target:
        for episode in target:
            if episode.key not in wanted:
                raise MismatchError(
                    f"{out} holds {episode}, which isn't among those to be written. Choose a new folder."
                )
            _check_same(wanted[episode.key], episode, out)
        for provenance in whole.sources.values():
            target.add_source(provenance)
        for episode in whole:
            if not target.has(*episode.key):
                target.append(episode)
    return target


def _check_same(first: SteeringEpisode, second: SteeringEpisode, place: Path) -> None:
    """Check that two episodes with the same key are the same.

    Raises:
        MismatchError: they aren't.
    """
    same = (first.seed, first.success, first.arrays.keys()) == (second.seed, second.success, second.arrays.keys())
    if not same or any(not np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays):
        raise MismatchError(
            f"{second} in {place} differs from the one of the same source and number that was read before. Leave one of "
            f"them out: move {place / _EPISODES / file_name(second)} away, or its counterpart."
        )


def _read_manifest(path: Path) -> tuple[Binding, dict[str, dict[str, Any]]]:
    """Return what the noises belong to, and the sources.

    Raises:
        DatasetError: there is no manifest, or not one that this version reads.
    """
    manifest = path / _MANIFEST
    try:
        content = json.loads(manifest.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetError(
            f"there is no steering dataset at {path}: expected a folder with a {_MANIFEST}. Record one, or check the path."
        ) from error
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{manifest} can't be read: {error}. Fetch it again from where the dataset came, or record anew."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DatasetError(f"{path} is no steering dataset: {manifest} doesn't say {FORMAT!r}. Check the path.")
    version = content.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise DatasetError(
            f"{path} was written by counterflow {content.get('counterflow_version')} in format {version!r}; this is "
            f"{counterflow.__version__} and reads up to format {FORMAT_VERSION}. Update counterflow."
        )
    sources = content.get("sources")
    try:
        binding = Binding.from_json(content["binding"])
        _check_binding(binding)
        if not isinstance(sources, dict) or any(_source_id(sources[source]) != source for source in sources):
            raise DatasetError("the sources don't bear the ids that their provenance gives")
    except (CounterflowError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{manifest} was changed or damaged: {str(error).rstrip('.')}. Fetch it again from where the dataset came, or "
            "record anew."
        ) from error
    return binding, sources


def _check_binding(binding: Binding) -> None:
    """Check what shapes and messages rely on.

    Raises:
        InvalidInputError: a size isn't an integer of at least 1.
        UnknownNameError: there is no such solver.
    """
    for name in ("horizon", "dim", "steps"):
        value = getattr(binding, name)
        COUNT.check(f"the binding's {name}", value, written=True)
    COUNT_OR_ZERO.check("the binding's padding", binding.padding, written=True)
    if binding.solver not in SOLVERS:
        raise UnknownNameError("solver", str(binding.solver), SOLVERS)


def _refuse_foreign(path: Path) -> None:
    """Leave folders alone that hold something else.

    Raises:
        DatasetError: this one does, or is a file.
    """
    if (path / _MANIFEST).exists():
        _read_manifest(path)
    elif path.is_dir():
        foreign = [found.name for found in path.iterdir() if found.name != _LOCK and ".partial-" not in found.name]
        if foreign:
            raise DatasetError(
                f"{path} holds {sorted(foreign)[0]} and no {_MANIFEST}, so it is no steering dataset. Choose a new folder."
            )
    elif path.exists():
        raise DatasetError(f"{path} is a file; expected the folder of a steering dataset, or a new one.")


@contextmanager
def _locked_or_closed(path: Path, doing: str) -> Iterator[IO[str]]:
    """Lock a dataset's folder; the system frees the lock if this process is killed, this function if the block fails.

    Yields:
        The open lock, which the block takes charge of: closing it lets others in.

    Raises:
        StorageError: another process holds the lock, or the folder can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path / _LOCK)
    except BlockingIOError:
        raise StorageError(
            f"another process is recording to {path}. Wait until it has finished, or stop it first, or choose another "
            "folder and merge them later."
        ) from None
    except OSError as error:
        raise StorageError(f"{doing} {path} is not possible: {reason_of(error)}. Choose another folder.") from error
    try:
        yield lock
    except BaseException:
        lock.close()
        raise


def _episode_files(path: Path) -> list[Path]:
    """Return the files of a dataset's episodes; what a kill left half written is hidden and not among them."""
    return sorted(file for file in (path / _EPISODES).glob("*.npz") if not file.name.startswith("."))


def _remove_leftovers(path: Path) -> None:
    """Remove what a kill left half written; only for who holds the lock."""
    for leftover in (*path.glob(".*.partial-*"), *(path / _EPISODES).glob(".*.partial-*")):
        leftover.unlink(missing_ok=True)


def _source_id(provenance: Any) -> str:
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:12]


def _order(episode: SteeringEpisode) -> tuple[str, str, int]:
    return episode.env, episode.source, episode.index


def _counts(episodes: Sequence[SteeringEpisode]) -> dict[str, int]:
    return {
        "episodes": len(episodes),
        "successes": sum(episode.success for episode in episodes),
        "decisions": sum(episode.decisions for episode in episodes),
        "steps": sum(episode.steps for episode in episodes),
    }
