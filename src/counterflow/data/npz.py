"""Reading and writing npz archives larger than memory.

An npz file is a zip archive with one `.npy` member an array. Members are stored uncompressed and aligned here, so that
they can be mapped into memory where they lie; numpy reads such an archive like any other.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from counterflow.errors import InvalidInputError
from counterflow.files import replacing

ALIGNMENT = 64  # bytes; a cache line, and what numpy itself aligns the data in a .npy file to
LOCAL_HEADER = 30  # bytes of a zip member's header before its name (APPNOTE.TXT 4.3.7)
ZIP64_FIELD = 20  # bytes of the extra field in which zipfile keeps 64-bit sizes
PADDING_FIELD = 4  # bytes of the identifier and length before our padding
PADDING_IDENTIFIER = 0xD935  # the identifier that Android's zipalign gave to padding
BLOCK_BYTES = 2**24  # how much of a compressed array is unpacked at a time


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


def write_npz(path: Path, columns: Mapping[str, Column]) -> None:
    """Write an uncompressed npz archive to `path`, block by block; the same arrays always give the same bytes.

    Raises:
        InvalidInputError: the blocks of a column don't make up its shape.
    """
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
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
                        raise InvalidInputError(
                            f"a block of {name} is {block.shape}; expected (rows, *{column.shape[1:]})."
                        )
                    member.write(np.ascontiguousarray(block, dtype).data)
                    rows += len(block)
            if rows != column.shape[0]:
                raise InvalidInputError(f"the blocks of {name} have {rows} rows together; expected {column.shape[0]}.")


def save_npz(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write whole arrays to `path` as `write_npz` does."""
    write_npz(path, {name: Column(array.shape, array.dtype, [array]) for name, array in arrays.items()})


def _padding(offset: int) -> bytes:
    """Return the extra field that moves data which would begin at `offset` to a multiple of `ALIGNMENT`."""
    length = -(offset + PADDING_FIELD) % ALIGNMENT
    return PADDING_IDENTIFIER.to_bytes(2, "little") + length.to_bytes(2, "little") + bytes(length)


def read_npz(path: Path, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Read members of an archive into memory, checking their CRC.

    Raises:
        ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error: the archive is damaged.
    """
    with np.load(path) as archive:
        return {name: archive[name] for name in names}


def names_of(path: Path) -> list[str]:
    """Return the names of an archive's arrays (same errors as `read_npz`)."""
    with zipfile.ZipFile(path) as archive:
        return [info.filename.removesuffix(".npy") for info in archive.infolist() if info.filename.endswith(".npy")]


def is_stored(path: Path) -> bool:
    """Say whether every member lies uncompressed, so that `map_npz` can map it."""
    with zipfile.ZipFile(path) as archive:
        return all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


def map_npz(path: Path, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Map members of an uncompressed archive into memory, read-only, where they lie in the file.

    Raises:
        ValueError, OSError, EOFError, zipfile.BadZipFile: the archive is damaged. The data's CRC isn't checked: that
            would read it all.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for name in names:
            info = archive.getinfo(f"{name}.npy")
            file.seek(info.header_offset + LOCAL_HEADER - 4)
            name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
            file.seek(name_length + extra_length, os.SEEK_CUR)
            shape, fortran_order, dtype = _read_header(file)
            order: Literal["C", "F"] = "F" if fortran_order else "C"
            arrays[name] = np.memmap(path, dtype, "r", offset=file.tell(), shape=shape, order=order)
    return arrays


def unpack_npz(path: Path, target: Path) -> None:
    """Write what a compressed archive holds to `target`, uncompressed, a block at a time.

    Raises:
        ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error: the archive is damaged, or the disk is full.
    """
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path))
        columns: dict[str, Column] = {}
        for name in names_of(path):
            member = stack.enter_context(archive.open(f"{name}.npy"))
            shape, fortran_order, dtype = _read_header(member)
            if fortran_order:
                raise ValueError(f"the array {name} is stored column by column, which can't be unpacked in blocks")
            columns[name] = Column(shape, dtype, _read_blocks(member, shape, dtype))
        write_npz(stack.enter_context(replacing(target)), columns)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    old = np.lib.format.read_magic(file) == (1, 0)
    header = np.lib.format.read_array_header_1_0(file) if old else np.lib.format.read_array_header_2_0(file)
    if header[2].hasobject:
        raise ValueError("an array of Python objects is not data")
    return header


def _read_blocks(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        content = file.read(count * row_bytes)
        if len(content) != count * row_bytes:
            raise EOFError("the archive ends in the middle of an array")
        yield np.frombuffer(content, dtype).reshape(count, *shape[1:])
