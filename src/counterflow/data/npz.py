"""Reading and writing npz archives larger than memory, and putting files in place whole or not at all.

An npz file is a zip archive with one `.npy` member an array. Members are stored uncompressed and aligned here, so that they can
be mapped into memory where they lie; numpy reads such an archive like any other.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from counterflow.errors import InvalidInputError

ALIGNMENT = 64  # bytes; a cache line, and what numpy itself aligns the data in a .npy file to
LOCAL_HEADER = 30  # bytes of a zip member's header before its name (APPNOTE.TXT 4.3.7)
ZIP64_FIELD = 20  # bytes of the extra field in which zipfile keeps 64-bit sizes
PADDING_FIELD = 4  # bytes of the identifier and length before our padding
PADDING_IDENTIFIER = 0xD935  # the identifier that Android's zipalign gave to padding


@dataclass(frozen=True)
class Column:
    """One array of an archive, given in blocks so that it need not fit into memory.

    Args:
        shape: of the whole array.
        dtype: of the whole array; blocks are converted to it.
        blocks: arrays that follow one another along the first axis and together have `shape`.
    """

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    blocks: Iterable[npt.NDArray[Any]]


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file so that `path` holds either what it held before or all of the new content, whatever happens.

    Args:
        path: where the file goes.
        scratch: folder, on the same file system, for the file until it is whole; default the one it goes to. A killed process
            leaves a file ending in ".tmp" there.

    Raises:
        OSError: the disk is full or the folder can't be written; nothing is left behind.
    """
    temporary = (scratch or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_npz(file: BinaryIO, columns: Mapping[str, Column]) -> None:
    """Write an uncompressed npz archive to `file`, block by block; the same arrays always give the same bytes.

    Raises:
        InvalidInputError: the blocks of a column don't make up its shape.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, column in columns.items():
            dtype = np.dtype(column.dtype)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.extra = _padding(file.tell() + LOCAL_HEADER + len(info.filename) + ZIP64_FIELD)
            with archive.open(info, "w", force_zip64=True) as member:
                header = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": column.shape,
                }
                np.lib.format.write_array_header_1_0(member, header)
                rows = 0
                for block in column.blocks:
                    if block.shape[1:] != column.shape[1:]:
                        raise InvalidInputError(f"a block of {name} is {block.shape}; expected (rows, *{column.shape[1:]}).")
                    member.write(np.ascontiguousarray(block, dtype).data)
                    rows += len(block)
            if rows != column.shape[0]:
                raise InvalidInputError(f"the blocks of {name} have {rows} rows together; expected {column.shape[0]}.")


def _padding(offset: int) -> bytes:
    """Return the extra field that moves data which would begin at `offset` to a multiple of `ALIGNMENT`."""
    length = -(offset + PADDING_FIELD) % ALIGNMENT
    return PADDING_IDENTIFIER.to_bytes(2, "little") + length.to_bytes(2, "little") + bytes(length)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: on POSIX systems a file's new name is kept in its folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
