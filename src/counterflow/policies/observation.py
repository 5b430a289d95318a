"""What a policy may declare about its observations, so that whoever brings them from outside can check them first."""

from __future__ import annotations

from dataclasses import dataclass

from counterflow.errors import InvalidInputError

DTYPES = ("float32", "uint8", "int64", "bool", "image", "text")


@dataclass(frozen=True)
class ObservationEntry:
    """One entry of an observation, without the batch dimension.

    A policy whose observations are dictionaries declares them in an attribute `observation_entries`, a mapping of names to
    these; one that sees a single vector has `observation_dim` instead. A policy with neither takes what it is given.

    Attributes:
        dtype: "float32" (any floating point is brought to it), "uint8", "int64", "bool", "image" (float32 (C, H, W) in [0, 1];
            whoever brings it from outside may have bytes (H, W, C), as cameras give them), or "text" (a string).
        shape: of one observation; None for a size that may vary. Text has none.
        optional: whether it may be left out.

    Raises:
        InvalidInputError: no such type, or a size is not positive.
    """

    dtype: str = "float32"
    shape: tuple[int | None, ...] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        """Check type and sizes."""
        if self.dtype not in DTYPES:
            raise InvalidInputError(
                f"an observation entry has type {self.dtype!r}; expected one of {', '.join(DTYPES)}."
            )
        if any(size is not None and size < 1 for size in self.shape) or (self.dtype == "text" and self.shape):
            raise InvalidInputError(
                f"an observation entry of type {self.dtype} has shape {self.shape}; expected positive sizes (None for one "
                "that varies), and none for text."
            )

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of `shape` is one of these."""
        return len(shape) == len(self.shape) and all(
            wanted in (None, given) for wanted, given in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        if self.dtype == "text":
            return "text"
        return f"{self.dtype} ({', '.join('any' if size is None else str(size) for size in self.shape)})"
