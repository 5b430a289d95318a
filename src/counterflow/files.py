"""Putting files in place whole or not at all: a kill or a full disk never costs what stood there before."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from counterflow.errors import StorageError

if TYPE_CHECKING:  # worker processes import this file without torch
    from torch import Tensor


@contextmanager
def replacing(path: Path | str, scratch: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path for the block to write; rename it to `path` when the block succeeds.

    The content reaches the disk before the name does, so after a power cut, too, `path` holds all of one version.

    Args:
        path: where the file goes; its folder is made.
        scratch: folder, on the same file system, for the file until it is whole; None: the one it goes to.

    Yields:
        The temporary path: hidden, with the same suffix. Gone afterwards, whatever happens (unless the process is killed).

    Raises:
        StorageError: writing or renaming failed; what stood at `path` before is untouched.
    """
    path = Path(path)
    temporary = partial_path(path if scratch is None else scratch / path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(_usual_mode())  # some libraries make files that only their owner may read
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error(path, reason_of(error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def take_lock(path: Path) -> IO[str]:
    """Lock a file, which is made if it is missing; closing what is returned lets others in, and so does a kill.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file can't be made.
    """
    import fcntl  # POSIX only, where the simulators are at home

    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        lock.close()
        raise
    return lock


def partial_path(path: Path) -> Path:
    """Return the name under which this process writes `path` until it is whole: hidden, in the same folder."""
    return path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")


def reason_of(error: OSError) -> str:
    """Say in words why the system refused."""
    if isinstance(error, StorageError) and isinstance(error.__cause__, OSError):
        return reason_of(error.__cause__)
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def storage_error(path: Path, reason: str) -> StorageError:
    """Return the error that says why `path` could not be written and what to do."""
    return StorageError(
        f"can't write {path}: {reason}. Free some room or choose another place; a file that stood there before is "
        "untouched."
    )


def write_json(path: Path | str, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write json to `path` whole or not at all.

    Raises:
        StorageError: the file can't be written; what stood there before is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to `path` in the safetensors format.

    Raises:
        OSError: the system refused, with its error number. The format's own error, raised otherwise, hides that the disk
            is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(str(error)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _usual_mode() -> int:
    """Return the mode that a new file has by default."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name != "posix" and path.is_dir():
        return  # only POSIX systems let a folder be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_between(document: Path | str, name: str, command: str, text: str) -> bool:
    """Put what a command wrote between its marks in a document, whole or not at all.

    Args:
        document: with the lines `<!-- NAME: written by COMMAND -->` and, further down, `<!-- /NAME -->`.
        name: of the marks.
        command: that wrote it, for example "benchmarks/speed/run.py".
        text: what to put there, for example a table; its last line needs no end.

    Returns:
        Whether the marks are there; without them the document stays as it was.

    Raises:
        StorageError: it can't be written.
    """
    document = Path(document)
    begin, end = f"<!-- {name}: written by {command} -->", f"<!-- /{name} -->"
    before, found, rest = document.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        return False
    with replacing(document) as temporary:
        temporary.write_text("\n".join([f"{before}{begin}", *([text.rstrip("\n")] if text else []), f"{end}{after}"]))
    return True
