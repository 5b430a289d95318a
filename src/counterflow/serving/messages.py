"""What goes over the wire: msgpack with numpy arrays, as openpi writes it, unpacked with bounds.

An array is a map with the (bytes) keys `__ndarray__`, `data`, `dtype` and `shape`; a numpy scalar one with `__npgeneric__`,
`data` and `dtype` (openpi's `msgpack_numpy`). Whoever sends a message decides nothing about this process: neither which types are
made, nor how many, nor how large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from counterflow.errors import CounterflowError, InvalidInputError

DTYPES = frozenset({"|b1", "|u1", "|i1", "<u2", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8"})
"""Types of array that are taken: numbers in little-endian order. Objects, texts, structures and dates are not."""

MOST_CONTAINERS = 4096  # maps and lists in a message: an empty one is a byte on the wire and many in memory


@dataclass(frozen=True)
class MessageLimits:
    """How large a message may be.

    Attributes:
        size: bytes of a whole message.
        entries: of a map or a list.
        text: bytes of a string.
        dimensions: of an array.

    Raises:
        InvalidInputError: a limit is not positive.
    """

    size: int = 16 * 2**20
    entries: int = 256
    text: int = 2**16
    dimensions: int = 6

    def __post_init__(self) -> None:
        """Check the limits."""
        for name in ("size", "entries", "text", "dimensions"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"message limit {name} is {getattr(self, name)!r}; expected 1 or more.")


def pack(content: Any) -> bytes:
    """Write maps, lists, texts, numbers and numpy arrays.

    Raises:
        InvalidInputError: something in it has no place in a message.
    """
    try:
        packed: bytes = msgpack.packb(content, default=_plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(
            f"a message can't be written: {error}. Expected maps, lists, texts, numbers, numpy arrays."
        ) from error
    return packed


def unpack(message: bytes, limits: MessageLimits | None = None) -> Any:
    """Read a message; arrays share its memory and can't be written to.

    Raises:
        InvalidInputError: it is not msgpack, too large, or holds types, shapes or structures that are not taken.
    """
    limits = MessageLimits() if limits is None else limits
    if len(message) > limits.size:
        raise InvalidInputError(
            f"a message has {len(message):,} bytes; at most {limits.size:,} are taken. Send smaller images."
        )
    reader = _Reader(limits)
    try:
        return msgpack.unpackb(
            message,
            object_hook=reader.take_map,
            list_hook=reader.take_list,
            ext_hook=_refuse_extension,
            max_map_len=limits.entries,
            max_array_len=limits.entries,
            max_str_len=limits.text,
            max_bin_len=limits.size,
            max_ext_len=0,
        )
    except CounterflowError:
        raise
    except Exception as error:  # the parser's own errors have no common base
        reason = str(error) or type(error).__name__
        raise InvalidInputError(
            f"a message can't be read: {reason[:200]}. Expected one map in msgpack, with arrays as openpi's client packs them."
        ) from error


class _Reader:
    """Turns the maps that stand for arrays into arrays, and counts."""

    def __init__(self, limits: MessageLimits) -> None:
        self._limits = limits
        self._containers = 0

    def take_list(self, content: list[Any]) -> list[Any]:
        self._count()
        return content

    def take_map(self, content: dict[Any, Any]) -> Any:
        self._count()
        if b"__ndarray__" in content:
            return self._array(content)
        if b"__npgeneric__" in content:
            return _scalar(content)
        if any(not isinstance(key, str) for key in content):
            raise InvalidInputError("a map in a message has keys that are not text; expected names.")
        return content

    def _count(self) -> None:
        self._containers += 1
        if self._containers > MOST_CONTAINERS:
            raise InvalidInputError(
                f"a message holds more than {MOST_CONTAINERS} maps and lists. Send numbers as numpy arrays."
            )

    def _array(self, content: dict[Any, Any]) -> npt.NDArray[Any]:
        dtype = _dtype(content.get(b"dtype"))
        data, shape = content.get(b"data"), content.get(b"shape")
        if not isinstance(data, bytes):
            raise InvalidInputError(f"an array's data are a {type(data).__name__}; expected bytes.")
        if not isinstance(shape, list) or any(isinstance(size, bool) or not isinstance(size, int) for size in shape):
            raise InvalidInputError(f"an array's shape is {str(shape)[:80]}; expected a list of whole numbers.")
        if len(shape) > self._limits.dimensions or any(not 0 < size <= self._limits.size for size in shape):
            raise InvalidInputError(
                f"an array has shape {str(shape)[:80]}; expected at most {self._limits.dimensions} dimensions, none of them "
                "empty."
            )
        if math.prod(shape) * dtype.itemsize != len(data):
            raise InvalidInputError(
                f"an array of {dtype.name} {tuple(shape)} came with {len(data):,} bytes; expected "
                f"{math.prod(shape) * dtype.itemsize:,}. It was cut off, or its description is wrong."
            )
        if dtype == np.bool_:  # any byte may come, and only two of them are booleans
            dtype, data = np.dtype(np.bool_), (np.frombuffer(data, np.uint8) != 0).tobytes()
        array: npt.NDArray[Any] = np.frombuffer(data, dtype).reshape(shape)
        return array


def _scalar(content: dict[Any, Any]) -> Any:
    value = content.get(b"data")
    if not isinstance(value, bool | int | float):
        raise InvalidInputError(f"a numpy scalar's data are a {type(value).__name__}; expected a number.")
    return _dtype(content.get(b"dtype")).type(value)


def _dtype(name: Any) -> np.dtype[Any]:
    if not isinstance(name, str) or name not in DTYPES:
        raise InvalidInputError(
            f"an array has type {str(name)[:80]!r}; expected one of {', '.join(sorted(DTYPES))} (booleans, integers, floating "
            "point). Convert it with .astype before sending."
        )
    return np.dtype(name)


def _plain(value: Any) -> Any:
    """Return what stands for a numpy array or scalar."""
    if isinstance(value, np.ndarray | np.generic):
        dtype = value.dtype.newbyteorder("<") if value.dtype.byteorder == ">" else value.dtype
        if dtype.str not in DTYPES:
            raise TypeError(f"arrays of type {value.dtype} are not sent")
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": dtype.str}
        return {
            b"__ndarray__": True,
            b"data": value.astype(dtype, copy=False).tobytes(),
            b"dtype": dtype.str,
            b"shape": value.shape,
        }
    raise TypeError(f"a {type(value).__name__} is not sent")


def _refuse_extension(code: int, data: bytes) -> Any:  # noqa: ARG001 - the parser's signature
    raise InvalidInputError(f"a message holds an extension type ({code}); expected plain msgpack.")
