"""Writing films, whole or not at all: mp4 (H.264) to watch, GIF for a README."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, cast

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageColor

from counterflow.checks import Range
from counterflow.errors import InvalidInputError, MissingDependencyError
from counterflow.experiments.panels import Frame
from counterflow.experiments.style import INK, METHOD_COLOURS, PAPER, SUCCESS
from counterflow.files import partial_path, reason_of, replacing, storage_error

LOOP_FRAMES_PER_SECOND = 10.0
LOOP_WIDTH = 640
LOOP_BYTES = 3_000_000


@contextmanager
def video_writer(path: Path | str, fps: float = 20.0, *, loop_speed: float = 1.0) -> Iterator[Callable[[Frame], None]]:
    """Open a film, which appears under its name only once the block has ended well.

    The name's ending chooses the format: ".mp4" is H.264 that plays in browsers (yuv420p, odd sizes padded by a pixel);
    ".gif" is a loop for a README: at most `LOOP_FRAMES_PER_SECOND` (evenly chosen, and the last one) and `LOOP_WIDTH`
    pixels wide, smaller and coarser until the file fits `LOOP_BYTES` (the smallest attempt is kept if none does).

    An exception or a kill leaves nothing under the target's name, and what stood there before is untouched.

    Args:
        path: where the film goes; folders are made.
        fps: frames a second of what is written to it.
        loop_speed: a GIF plays this many times as fast.

    Yields:
        A function that appends a frame, (height, width, 3) uint8, the same size every time. It raises
        `InvalidInputError` for another one, `StorageError` where it can't be written.

    Raises:
        InvalidInputError: the ending or a number is not one of those, or no frame was written.
        MissingDependencyError: there is no ffmpeg for mp4.
        StorageError: the film can't be written: at once where its place can't be, otherwise as the block ends.
    """
    path = Path(path)
    for name, value in (("fps", fps), ("loop_speed", loop_speed)):
        Range(0, 240, above=True).check(name, value)
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".gif"):
        raise InvalidInputError(f"the film's path is {path}; expected a name that ends in .mp4 or .gif.")
    film = _Mp4(path, fps, _find_ffmpeg()) if suffix == ".mp4" else _Loop(path, fps * loop_speed)
    shape: tuple[int, ...] | None = None

    def write(frame: Frame) -> None:
        nonlocal shape
        shape = frame.shape if shape is None else shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != shape:
            raise InvalidInputError(
                f"a frame is {frame.dtype} {frame.shape}; expected uint8 (height, width, 3), all of one size."
            )
        film.write(frame)

    try:
        _claim(path)
        yield write
        if shape is None:
            raise InvalidInputError(f"no frame was written to {path}; a film needs at least one.")
        film.finish()
    finally:
        film.clean_up()


def _claim(path: Path) -> None:
    """Show at once, not after minutes of simulation, that the film can't be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path(path).touch()
    except OSError as error:
        raise storage_error(path, reason_of(error)) from error
    if path.is_dir():
        raise storage_error(path, "it is a folder")


class _Mp4:
    """H.264 by way of ffmpeg, which imageio brings along.

    ffmpeg is spoken to directly: imageio's writer does not look at its exit status, and a short film is written to disk
    only as ffmpeg ends, so a full disk would go unnoticed.
    """

    def __init__(self, path: Path, fps: float, program: str) -> None:
        self._path, self._fps, self._program = path, fps, program
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, frame: Frame) -> None:
        even = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        if self._process is None:
            self._process = self._start(*even.shape[:2])
        try:
            cast(IO[bytes], self._process.stdin).write(np.ascontiguousarray(even).data)
        except OSError:  # ffmpeg has gone, and has said why
            raise storage_error(self._path, _account(self._process)) from None

    def finish(self) -> None:
        process = cast("subprocess.Popen[bytes]", self._process)
        account = _account(process)
        if process.returncode != 0:
            raise storage_error(self._path, account)
        with replacing(self._path):
            pass  # ffmpeg has written the temporary file that is now put in place

    def clean_up(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        with suppress(OSError):
            partial_path(self._path).unlink(missing_ok=True)

    def _start(self, height: int, width: int) -> subprocess.Popen[bytes]:
        # Tagged as BT.709, and converted to it exactly: untagged films change their colours from player to player.
        colours = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p"
        arguments = (
            f"-y -loglevel error -f rawvideo -pix_fmt rgb24 -s {width}x{height} -framerate {self._fps} -i - -an "
            f"-c:v libx264 -preset medium -crf 18 -vf {colours} "
            "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv "
            "-movflags +faststart -fflags +bitexact -map_metadata -1"
        ).split()
        try:
            return subprocess.Popen(
                [self._program, *arguments, str(partial_path(self._path))],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # an interrupt from the keyboard is ours to handle; ffmpeg would end the film
            )
        except OSError as error:
            raise _no_ffmpeg(f"{self._program} can't be started: {error.strerror or error}") from error


class _Loop:
    """GIF by way of Pillow: every so many frames, kept in memory at the size of the loop."""

    # Share of the width and number of colours; the first that fits the limit is kept.
    _ATTEMPTS = ((1.0, 128), (1.0, 64), (0.85, 64), (0.7, 48), (0.55, 32), (0.4, 32))
    # Of what is drawn into the frame: few pixels, which a palette made from the picture alone would render as its own.
    _OURS = (*METHOD_COLOURS.values(), SUCCESS, INK, PAPER)

    def __init__(self, path: Path, fps: float) -> None:
        self._path = path
        self._stride = max(1, math.ceil(fps / LOOP_FRAMES_PER_SECOND))
        # GIF counts hundredths of a second, and browsers slow down whatever is faster than two.
        self._milliseconds = max(20, 10 * round(100 * self._stride / fps))
        self._kept: list[Image.Image] = []
        self._left_out: Image.Image | None = None
        self._count = 0

    def write(self, frame: Frame) -> None:
        picture = Image.fromarray(frame)
        if picture.width > LOOP_WIDTH:
            picture = _resized(picture, LOOP_WIDTH / picture.width)
        self._left_out = None if self._count % self._stride == 0 else picture
        if self._left_out is None:
            self._kept.append(picture)
        self._count += 1

    def finish(self) -> None:
        # The last frame shows how it ended, so it is kept whatever the stride.
        frames = [*self._kept, self._left_out] if self._left_out is not None else self._kept
        encoded = b""
        for share, colours in self._ATTEMPTS:
            encoded = self._encode([_resized(picture, share) for picture in frames] if share < 1 else frames, colours)
            if len(encoded) <= LOOP_BYTES:
                break
        with replacing(self._path) as partial:
            partial.write_bytes(encoded)

    def clean_up(self) -> None:
        with suppress(OSError):
            partial_path(self._path).unlink(missing_ok=True)

    def _encode(self, pictures: list[Image.Image], colours: int) -> bytes:
        # One palette without dithering for all: what stands still keeps its exact colour and costs no bytes.
        chosen = [pictures[index] for index in np.linspace(0, len(pictures) - 1, min(16, len(pictures))).astype(int)]
        sample = Image.fromarray(np.concatenate([np.asarray(picture) for picture in chosen]))
        room = colours - len(self._OURS)
        found = (sample.quantize(room, method=Image.Quantize.MEDIANCUT).getpalette() or [])[: 3 * room]
        palette = Image.new("P", (1, 1))
        palette.putpalette([*found, *(level for colour in self._OURS for level in ImageColor.getrgb(colour))])
        indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
        file = BytesIO()
        options = {"duration": self._milliseconds, "optimize": False, "disposal": 1, "loop": 0}
        indexed[0].save(file, "GIF", save_all=True, append_images=indexed[1:], **options)
        return file.getvalue()


def _account(process: subprocess.Popen[bytes]) -> str:
    """Close ffmpeg's input, wait until it ends, and return what it says."""
    _, said = process.communicate()
    lines = said.decode(errors="replace").strip().splitlines()
    return f"ffmpeg ended with status {process.returncode}" + (f", saying {lines[-1]!r}" if lines else "")


def _find_ffmpeg() -> str:
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise _no_ffmpeg(str(error)) from error


def _no_ffmpeg(reason: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"an mp4 needs ffmpeg: {reason}. Install it ('pip install imageio[ffmpeg]' brings one, or 'apt-get install "
        "ffmpeg'), or choose a name that ends in .gif."
    )


def _resized(picture: Image.Image, share: float) -> Image.Image:
    size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
    return picture.resize(size, Image.Resampling.LANCZOS)
