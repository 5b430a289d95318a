"""Films of robots being steered: panels side by side, the direction drawn in the frame, written whole or not at all.

A `Panel` is one robot at one moment: its frame and what to say about it. `compose` draws panels side by side into one
image, `side_by_side` does so for whole episodes, holding the last frame of the one that ends first, and `VideoWriter`
writes the images as mp4 (H.264) or GIF. Positions are pixels of the frame, (column, row) with row 0 at the top: a
direction in the world is projected by whoever knows the camera.

Lines and letters scale with the frame (256 to 480 pixels wide look best), and shapes are drawn several times larger and
shrunk, because Pillow's shapes have hard edges.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Protocol, cast

import imageio_ffmpeg
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from counterflow.errors import InvalidInputError, MissingDependencyError
from counterflow.experiments.figures import (
    HAIRLINE,
    INK,
    METHOD_COLOURS,
    METHOD_LABELS,
    MUTED,
    PAPER,
)
from counterflow.files import partial_path, reason_of, replacing, storage_error

Frame = npt.NDArray[np.uint8]
Pixel = tuple[float, float]
GripperCommand = Literal["policy", "hold", "open", "close"]
Status = Literal["running", "success", "failure"]

SUCCESS = "#1E9E5A"
"""The green of a task that is done."""

_OVERSAMPLING = 4
_DESIGN_WIDTH = 320  # lengths below are in pixels of a frame this wide


@dataclass(frozen=True)
class Arrow:
    """A direction in the frame.

    Attributes:
        start: where it begins, pixels (column, row): usually the gripper.
        end: where it points, pixels (column, row).
        towards: how much of the direction in the world comes out of the image, -1 (straight away from the camera) to
            1 (straight at it): the cosine with the camera's backward axis. The nearer end is drawn thicker; an arrow
            that is too short to read becomes the physicist's sign for out of the page (a dot) or into it (a cross).
        colour: of the arrow, "#RRGGBB".

    Raises:
        InvalidInputError: `towards` is not in [-1, 1].
    """

    start: Pixel
    end: Pixel
    towards: float = 0.0
    colour: str = METHOD_COLOURS["frs"]

    def __post_init__(self) -> None:
        """Check the depth cue."""
        if not -1 <= self.towards <= 1:
            raise InvalidInputError(f"arrow's towards is {self.towards!r}; expected a cosine in [-1, 1].")


@dataclass(frozen=True)
class Panel:
    """One robot at one moment, and what to say about it.

    Attributes:
        frame: (height, width, 3) uint8.
        title: above the frame; a method's name is spelled out and gets its colour.
        caption: below the frame, for example what the reasoner said.
        arrow: the direction asked for, or None.
        gripper: the command to the gripper, shown in the frame, or None.
        step: environment steps so far.
        max_steps: steps after which the episode is cut; 0 hides the counter.
        status: "success" and "failure" put a banner into the frame.

    Raises:
        InvalidInputError: the frame is not (height, width, 3) uint8 or smaller than 64 pixels, or a step is negative.
    """

    frame: Frame
    title: str
    caption: str = ""
    arrow: Arrow | None = None
    gripper: GripperCommand | None = None
    step: int = 0
    max_steps: int = 0
    status: Status = "running"

    def __post_init__(self) -> None:
        """Check the frame and the counter."""
        _check_frame(self.frame)
        if min(self.frame.shape[:2]) < 64:
            raise InvalidInputError(f"frame has shape {self.frame.shape}; expected at least 64 pixels each way.")
        if self.step < 0 or self.max_steps < 0:
            raise InvalidInputError(f"step is {self.step} of {self.max_steps}; expected numbers from 0.")


def compose(panels: Sequence[Panel], *, heading: str = "", footer: str = "") -> Frame:
    """Draw panels side by side.

    Args:
        panels: left to right; all frames have one size.
        heading: above everything, for example the task in a sentence.
        footer: below everything, for example the command that made the film.

    Returns:
        (height, width, 3) uint8, both even, as video codecs want.

    Raises:
        InvalidInputError: there is no panel, or frames differ in size.
    """
    if not panels:
        raise InvalidInputError("there is no panel to draw; expected at least one.")
    shapes = {panel.frame.shape for panel in panels}
    if len(shapes) > 1:
        raise InvalidInputError(f"frames have shapes {sorted(shapes)}; panels side by side need one size.")
    height, width, _ = panels[0].frame.shape
    unit = width / _DESIGN_WIDTH

    margin, gap = round(16 * unit), round(14 * unit)
    top = round(14 * unit) + (round(29 * unit) if heading else 0)
    frame_top = top + round(26 * unit)
    strip = frame_top + height + round(8 * unit)  # of captions and counters
    below = round(20 * unit) + (round(20 * unit) if any(panel.max_steps for panel in panels) else 0)
    total_height = strip + below + (round(22 * unit) if footer else round(4 * unit))
    total_width = 2 * margin + len(panels) * width + (len(panels) - 1) * gap

    canvas = Image.new("RGB", (total_width + total_width % 2, total_height + total_height % 2), PAPER)
    if heading:
        font = _font(16 * unit, bold=True)
        _text(canvas, (margin, 14 * unit), _shorten(heading, font, total_width - 2 * margin), font, INK)
    if footer:
        font = _font(10 * unit)
        _text(canvas, (margin, strip + below + 2 * unit), _shorten(footer, font, total_width - 2 * margin), font, MUTED)
    for column, panel in enumerate(panels):
        left = margin + column * (width + gap)
        _draw_title(canvas, panel, left, top, unit)
        picture = draw_overlays(panel)
        canvas.paste(Image.fromarray(picture), (left, frame_top), _rounded_mask(width, height, 7 * unit))
        _draw_status_border(canvas, panel, left, frame_top, unit)
        _draw_strip(canvas, panel, left, strip, unit)
    return np.asarray(canvas)


def side_by_side(
    episodes: Sequence[Iterable[Panel]], *, heading: str = "", footer: str = "", hold: int = 0
) -> Iterator[Frame]:
    """Compose whole episodes, frame by frame; an episode that ends first keeps its last frame until all have ended.

    Args:
        episodes: for each column the panels of its episode, at least one panel each.
        heading: above everything.
        footer: below everything.
        hold: how many times to repeat the last image, so that a viewer sees how it ended.

    Yields:
        (height, width, 3) uint8.

    Raises:
        InvalidInputError: there is no episode, or one of them is empty.
    """
    shown: list[Panel | None] = [None] * len(episodes)
    image: Frame | None = None
    for moment in zip_longest(*episodes):
        shown = [new if new is not None else old for new, old in zip(moment, shown, strict=True)]
        panels = [panel for panel in shown if panel is not None]
        if len(panels) < len(episodes):
            raise InvalidInputError("an episode has no panel; expected at least one for every column.")
        image = compose(panels, heading=heading, footer=footer)
        yield image
    if image is None:
        raise InvalidInputError("there is no panel to film; expected at least one episode with at least one.")
    for _ in range(hold):
        yield image


def draw_overlays(panel: Panel) -> Frame:
    """Return the panel's frame with its arrow, gripper command and banner drawn into it, the same size."""
    picture = Image.fromarray(panel.frame)
    unit = panel.frame.shape[1] / _DESIGN_WIDTH
    if panel.arrow is not None:
        _draw_arrow(picture, panel.arrow, unit)
    if panel.gripper is not None:
        _draw_gripper(picture, panel.gripper, unit)
    if panel.status != "running":
        _draw_banner(picture, panel.status, unit)
    return np.asarray(picture)


class VideoWriter:
    """Writes frames as a film; the file appears under its name only once it is whole.

    The name's ending chooses the format: ".mp4" is H.264 that plays in browsers (yuv420p, odd sizes padded by a pixel);
    ".gif" is a loop for a README: fewer frames a second, and smaller and coarser until the file fits `size_limit`.

    Use it as a context manager: frames stream to a temporary file beside the target, renamed when the block ends well.
    An exception or a kill leaves nothing under the target's name, and what stood there before is untouched.

    Args:
        path: where the film goes; folders are made.
        fps: frames a second of what is written to it.
        loop_speed: a GIF plays this many times as fast.
        loop_fps: of a GIF at most this many frames a second are kept (evenly chosen, and the last one).
        loop_width: a GIF is shrunk to at most this width in pixels.
        size_limit: bytes that a GIF should not exceed; the smallest attempt is kept if none fits.

    Raises:
        InvalidInputError: the ending or a number is not one of those.
        MissingDependencyError: there is no ffmpeg for mp4.
        StorageError: the film can't be written (raised by `write` or at the end of the block).
    """

    def __init__(
        self,
        path: Path | str,
        fps: float = 20.0,
        *,
        loop_speed: float = 1.0,
        loop_fps: float = 10.0,
        loop_width: int = 640,
        size_limit: int = 3_000_000,
    ) -> None:
        self._path = Path(path)
        for name, value in (("fps", fps), ("loop_speed", loop_speed), ("loop_fps", loop_fps)):
            if not (math.isfinite(value) and 0 < value <= 240):
                raise InvalidInputError(f"{name} is {value!r}; expected a number in (0, 240].")
        if loop_width < 16 or size_limit < 1:
            raise InvalidInputError(f"loop_width is {loop_width}, size_limit {size_limit}; expected at least 16 and 1.")
        self._suffix = self._path.suffix.lower()
        if self._suffix not in (".mp4", ".gif"):
            raise InvalidInputError(f"the film's path is {path}; expected a name that ends in .mp4 or .gif.")
        self._fps, self._loop_rate = fps, fps * loop_speed
        self._stride = max(1, math.ceil(self._loop_rate / loop_fps))
        self._loop_width, self._size_limit = loop_width, size_limit
        self._ffmpeg = _find_ffmpeg() if self._suffix == ".mp4" else ""
        self._encoder: _Encoder | None = None
        self._shape: tuple[int, ...] = ()
        self._open = False

    def __enter__(self) -> VideoWriter:
        """Open the film."""
        self._open = True
        return self

    def write(self, frame: Frame) -> None:
        """Append a frame, (height, width, 3) uint8, the same size every time.

        Raises:
            InvalidInputError: the frame has another type or size, or the film is not open.
            StorageError: the film can't be written.
        """
        if not self._open:
            raise InvalidInputError("the film is not open; write inside 'with VideoWriter(path) as film:'.")
        _check_frame(frame)
        if self._encoder is None:
            self._encoder, self._shape = self._begin(frame), frame.shape
        if frame.shape != self._shape:
            raise InvalidInputError(f"frame has shape {frame.shape}; the film began with {self._shape}.")
        self._encoder.write(frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish the film, or leave no trace of it if the block failed."""
        self._open = False
        if self._encoder is None:
            if error is None:
                raise InvalidInputError(f"no frame was written to {self._path}; a film needs at least one.")
            return
        try:
            if error is None:
                self._encoder.finish()
        finally:
            self._encoder.clean_up()

    def _begin(self, frame: Frame) -> _Encoder:
        if self._suffix == ".mp4":
            return _Mp4(self._path, self._fps, self._ffmpeg, frame)
        return _Loop(self._path, self._loop_rate, self._stride, self._loop_width, self._size_limit)


class _Encoder(Protocol):
    """One file format."""

    def write(self, frame: Frame) -> None: ...

    def finish(self) -> None: ...

    def clean_up(self) -> None: ...


class _Mp4:
    """H.264 by way of ffmpeg, which imageio brings along.

    ffmpeg is spoken to directly: imageio's writer does not look at its exit status, and a short film is written to disk
    only as ffmpeg ends, so a full disk would go unnoticed.
    """

    def __init__(self, path: Path, fps: float, program: str, frame: Frame) -> None:
        self._path, self._partial = path, partial_path(path)
        height, width = frame.shape[0] + frame.shape[0] % 2, frame.shape[1] + frame.shape[1] % 2
        # Tagged as BT.709, and converted to it exactly: untagged films change their colours from player to player.
        colours = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p"
        arguments = (
            f"-y -loglevel error -f rawvideo -pix_fmt rgb24 -s {width}x{height} -framerate {fps} -i - -an "
            f"-c:v libx264 -preset medium -crf 18 -vf {colours} "
            "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv "
            "-movflags +faststart -fflags +bitexact -map_metadata -1"
        ).split()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(path, reason_of(error)) from error
        try:
            self._process = subprocess.Popen(
                [program, *arguments, str(self._partial)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # an interrupt from the keyboard is ours to handle; ffmpeg would end the film
            )
        except OSError as error:
            raise _no_ffmpeg(f"{program} can't be started: {error.strerror or error}") from error
        self._input = cast(IO[bytes], self._process.stdin)

    def write(self, frame: Frame) -> None:
        even = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        try:
            self._input.write(np.ascontiguousarray(even).data)
        except OSError:  # ffmpeg has gone, and has said why
            raise storage_error(self._path, self._end()) from None

    def finish(self) -> None:
        account = self._end()
        if self._process.returncode != 0:
            raise storage_error(self._path, account)
        try:
            self._partial.replace(self._path)
        except OSError as error:
            raise storage_error(self._path, reason_of(error)) from error

    def clean_up(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        with suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def _end(self) -> str:
        """Close ffmpeg's input, wait until it ends, and return its account."""
        _, said = self._process.communicate()
        lines = said.decode(errors="replace").strip().splitlines()
        return f"ffmpeg ended with status {self._process.returncode}" + (f", saying {lines[-1]!r}" if lines else "")


class _Loop:
    """GIF by way of Pillow: every `stride`-th frame, kept in memory at the size of the loop."""

    # Share of the width and number of colours; the first that fits the limit is kept.
    _ATTEMPTS = ((1.0, 128), (1.0, 64), (0.85, 64), (0.7, 48), (0.55, 32), (0.4, 32))

    def __init__(self, path: Path, fps: float, stride: int, width: int, size_limit: int) -> None:
        self._path, self._stride, self._width, self._size_limit = path, stride, width, size_limit
        self._milliseconds = 1000 * stride / fps
        self._kept: list[Image.Image] = []
        self._left_out: Image.Image | None = None
        self._count = 0

    def write(self, frame: Frame) -> None:
        picture = Image.fromarray(frame)
        if picture.width > self._width:
            picture = _resized(picture, self._width / picture.width)
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
            if len(encoded) <= self._size_limit:
                break
        with replacing(self._path) as partial:
            partial.write_bytes(encoded)

    def clean_up(self) -> None:
        self._kept.clear()

    def _encode(self, pictures: list[Image.Image], colours: int) -> bytes:
        # One palette without dithering for all: what stands still keeps its exact colour and costs no bytes.
        chosen = [pictures[index] for index in np.linspace(0, len(pictures) - 1, min(16, len(pictures))).astype(int)]
        sample = np.concatenate([np.asarray(picture) for picture in chosen])
        palette = Image.fromarray(sample).quantize(colours, method=Image.Quantize.MEDIANCUT)
        indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
        # GIF counts hundredths of a second, and browsers slow down whatever is faster than two.
        duration = max(20, 10 * round(self._milliseconds / 10))
        file = BytesIO()
        options = {"duration": duration, "optimize": False, "disposal": 1, "loop": 0}
        indexed[0].save(file, "GIF", save_all=True, append_images=indexed[1:], **options)
        return file.getvalue()


def _find_ffmpeg() -> str:
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise _no_ffmpeg(str(error)) from error


def _no_ffmpeg(reason: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"an mp4 needs ffmpeg: {reason}. Install it ('pip install imageio[ffmpeg]' brings one, or 'apt-get install "
        "ffmpeg'), or choose a name that ends in .gif or .webp."
    )


def _check_frame(frame: Frame) -> None:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        given = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise InvalidInputError(f"a frame is {given}; expected a uint8 array of shape (height, width, 3).")
    if 0 in frame.shape:
        raise InvalidInputError(f"frame has shape {frame.shape}; expected at least one pixel.")


def _resized(picture: Image.Image, share: float) -> Image.Image:
    size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _draw_title(canvas: Image.Image, panel: Panel, left: int, top: int, unit: float) -> None:
    colour = METHOD_COLOURS.get(panel.title, MUTED)
    side = 10 * unit
    _with_shapes(
        canvas,
        (left, top, left + 12 * unit, top + 20 * unit),
        lambda pen: pen.rounded((left, top + 4.5 * unit, left + side, top + 4.5 * unit + side), 2.5 * unit, colour),
    )
    font = _font(13.5 * unit, bold=True)
    room = panel.frame.shape[1] - 16 * unit
    _text(canvas, (left + 16 * unit, top), _shorten(METHOD_LABELS.get(panel.title, panel.title), font, room), font, INK)


def _draw_strip(canvas: Image.Image, panel: Panel, left: int, top: int, unit: float) -> None:
    """Draw what stands below the frame: the caption, and the counter with its bar."""
    width = panel.frame.shape[1]
    if panel.caption:
        font = _font(12 * unit)
        _text(canvas, (left, top), _shorten(panel.caption, font, width), font, INK)
    if not panel.max_steps:
        return
    colour = {"running": MUTED, "success": SUCCESS, "failure": MUTED}[panel.status]
    font = _font(10 * unit)
    counter, widest = (f"{step} / {panel.max_steps}" for step in (panel.step, panel.max_steps))
    row = top + 20 * unit
    _text(canvas, (left + width - font.getlength(counter), row), counter, font, MUTED)
    middle, thick = row + 6.5 * unit, 3 * unit
    length = width - font.getlength(widest) - 8 * unit
    done = min(1.0, panel.step / panel.max_steps)

    def bar(pen: _Pen) -> None:
        pen.rounded((left, middle - thick / 2, left + length, middle + thick / 2), thick / 2, HAIRLINE)
        if done:
            end = left + max(thick, done * length)
            pen.rounded((left, middle - thick / 2, end, middle + thick / 2), thick / 2, colour)

    _with_shapes(canvas, (left, middle - thick, left + width, middle + thick), bar)


def _draw_status_border(canvas: Image.Image, panel: Panel, left: int, top: int, unit: float) -> None:
    if panel.status != "success":
        return
    height, width, _ = panel.frame.shape
    edge = 1.5 * unit
    box = (left - edge, top - edge, left + width + edge, top + height + edge)
    _with_shapes(canvas, box, lambda pen: pen.rounded(box, 7 * unit + edge, outline=SUCCESS, width=2 * edge))


def _draw_arrow(picture: Image.Image, arrow: Arrow, unit: float) -> None:
    start, end = np.asarray(arrow.start, dtype=float), np.asarray(arrow.end, dtype=float)
    if not (np.isfinite(start).all() and np.isfinite(end).all()):
        return  # behind the camera there is nothing to draw
    length = float(np.linalg.norm(end - start))
    if length < 14 * unit:
        _draw_depth_sign(picture, arrow, unit)
        return
    along = (end - start) / length
    across = np.array([-along[1], along[0]])
    length = min(length, 2.0 * max(picture.size))  # near the camera's plane projections run off to infinity
    tip = start + along * length
    near, far = 1 + 0.4 * arrow.towards, 1 - 0.4 * arrow.towards
    head = min(16 * unit * (1 + 0.25 * arrow.towards), 0.55 * length)
    neck = tip - along * 0.88 * head  # the barbs sweep back a little behind the neck
    barb = tip - along * head
    half = [
        start + across * 2.4 * unit * far,
        neck + across * 2.4 * unit * near,
        barb + across * 0.56 * head,
    ]
    mirrored = [point - 2 * across * float((point - start) @ across) for point in reversed(half)]
    outline = [_pixel(point) for point in [*half, tip, *mirrored]]
    tail = 4.2 * unit * far

    def paint(pen: _Pen) -> None:
        for grown, colour in ((2.2 * unit, PAPER), (0.7 * unit, arrow.colour)):
            pen.polygon(outline, grown, colour)
            pen.circle(_pixel(start), tail + grown, colour)
        pen.circle(_pixel(start), tail - 1.6 * unit, PAPER)

    columns, rows = zip(*outline, strict=True)
    room = tail + 3 * unit
    _with_shapes(picture, (min(columns) - room, min(rows) - room, max(columns) + room, max(rows) + room), paint)


def _draw_depth_sign(picture: Image.Image, arrow: Arrow, unit: float) -> None:
    """Draw "out of the page" (a dot in a circle) or "into it" (a cross), for an arrow along the camera's axis."""
    column, row = arrow.start
    radius = 9 * unit

    def paint(pen: _Pen) -> None:
        pen.circle(arrow.start, radius + 2 * unit, PAPER)
        pen.circle(arrow.start, radius, arrow.colour)
        pen.circle(arrow.start, radius - 2.6 * unit, PAPER)
        if arrow.towards >= 0:
            pen.circle(arrow.start, 3 * unit, arrow.colour)
        else:
            reach = (radius - 2 * unit) / math.sqrt(2)
            for slope in (1, -1):
                ends = ((column - reach, row - slope * reach), (column + reach, row + slope * reach))
                pen.line(ends, 2.6 * unit, arrow.colour)

    room = radius + 3 * unit
    _with_shapes(picture, (column - room, row - room, column + room, row + room), paint)


def _draw_gripper(picture: Image.Image, command: GripperCommand, unit: float) -> None:
    """Draw a chip with a two-finger gripper, apart or together, and the command in words."""
    font = _font(11.5 * unit, bold=True)
    left, height = 8 * unit, 25 * unit
    top = picture.height - 8 * unit - height
    width = 40 * unit + font.getlength(command)
    colour = PAPER if command in ("open", "close") else METHOD_COLOURS["base"]
    middle, palm, thick = left + 17 * unit, top + 10.5 * unit, 2.6 * unit
    apart = {"open": 6.5, "close": 2.4, "hold": 4.4, "policy": 4.4}[command] * unit

    def paint(pen: _Pen) -> None:
        pen.rounded((left, top, left + width, top + height), height / 2, INK + "D9")
        pen.line(((middle, top + 6 * unit), (middle, palm)), 1.4 * thick, colour)
        pen.line(((middle - 7.5 * unit, palm), (middle + 7.5 * unit, palm)), thick, colour)
        for side in (-1, 1):
            pen.line(((middle + side * apart, palm), (middle + side * apart, top + 19.5 * unit)), thick, colour)

    _with_shapes(picture, (left, top, left + width, top + height), paint)
    _text(picture, (left + 30 * unit, top + height / 2), command, font, colour, anchor="lm")


def _draw_banner(picture: Image.Image, status: Status, unit: float) -> None:
    words, colour = ("success", SUCCESS) if status == "success" else ("no success", MUTED)
    font = _font(12 * unit, bold=True)
    left, top, height = 8 * unit, 8 * unit, 22 * unit
    width = 36 * unit + font.getlength(words)
    middle = top + height / 2

    def paint(pen: _Pen) -> None:
        pen.rounded((left, top, left + width, top + height), height / 2, colour)
        mark = left + 16 * unit
        if status == "success":
            corners = (
                (mark - 5 * unit, middle),
                (mark - 1.5 * unit, middle + 3.8 * unit),
                (mark + 5 * unit, middle - 4 * unit),
            )
            pen.line(corners, 2.6 * unit, PAPER)
        else:
            for slope in (1, -1):
                reach = 3.6 * unit
                pen.line(
                    ((mark - reach, middle - slope * reach), (mark + reach, middle + slope * reach)), 2.4 * unit, PAPER
                )

    _with_shapes(picture, (left, top, left + width, top + height), paint)
    _text(picture, (left + 26 * unit, middle), words, font, PAPER, anchor="lm")


class _Pen:
    """Draws on a layer that is `_OVERSAMPLING` times as fine as the image, in the image's coordinates."""

    def __init__(self, layer: Image.Image, origin: tuple[int, int]) -> None:
        self._draw = ImageDraw.Draw(layer)
        self._origin = origin

    def polygon(self, points: Sequence[Pixel], grown: float, colour: str) -> None:
        """Fill a polygon, grown by `grown` on all sides with round corners."""
        self._draw.polygon([self._to_layer(point) for point in points], fill=colour)
        self.line([*points, points[0]], 2 * grown, colour)

    def line(self, points: Sequence[Pixel], width: float, colour: str) -> None:
        """Draw a line through points, with round ends and corners."""
        self._draw.line([self._to_layer(point) for point in points], fill=colour, width=round(width * _OVERSAMPLING))
        for point in points:
            self.circle(point, width / 2, colour)

    def circle(self, centre: Pixel, radius: float, colour: str) -> None:
        """Fill a circle."""
        column, row = self._to_layer(centre)
        reach = radius * _OVERSAMPLING
        self._draw.ellipse((column - reach, row - reach, column + reach, row + reach), fill=colour)

    def rounded(
        self, box: _Box, radius: float, colour: str | None = None, *, outline: str | None = None, width: float = 0.0
    ) -> None:
        """Fill a rectangle with round corners, or draw its outline `width` wide inside the edge."""
        corners = (*self._to_layer(box[:2]), *self._to_layer(box[2:]))
        self._draw.rounded_rectangle(
            corners, radius * _OVERSAMPLING, fill=colour, outline=outline, width=round(width * _OVERSAMPLING)
        )

    def _to_layer(self, point: Pixel) -> Pixel:
        return ((point[0] - self._origin[0]) * _OVERSAMPLING, (point[1] - self._origin[1]) * _OVERSAMPLING)


_Box = tuple[float, float, float, float]


def _with_shapes(image: Image.Image, box: _Box, paint: Callable[[_Pen], None]) -> None:
    """Let `paint` draw shapes into the part of `image` within `box` (left, top, right, bottom), with soft edges."""
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    right, bottom = min(image.width, math.ceil(box[2])), min(image.height, math.ceil(box[3]))
    if left >= right or top >= bottom:
        return
    size = (right - left, bottom - top)
    layer = Image.new("RGBA", (size[0] * _OVERSAMPLING, size[1] * _OVERSAMPLING))
    paint(_Pen(layer, (left, top)))
    layer = layer.reduce(_OVERSAMPLING)
    image.paste(layer.convert("RGB"), (left, top), layer.getchannel("A"))


def _pixel(point: npt.NDArray[np.float64]) -> Pixel:
    return (float(point[0]), float(point[1]))


def _text(
    image: Image.Image, where: Pixel, words: str, font: ImageFont.FreeTypeFont, colour: str, anchor: str = "la"
) -> None:
    ImageDraw.Draw(image).text(where, words, fill=colour, font=font, anchor=anchor)


def _shorten(words: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Cut `words` so that they fit into `room` pixels; three dots say that something is missing."""
    if font.getlength(words) <= room:
        return words
    while words and font.getlength(words + "…") > room:
        words = words[:-1]
    return words.rstrip() + "…"


@lru_cache
def _font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which matplotlib brings along, so that films and figures share their letters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path(), "fonts", "ttf", name)), max(8.0, size))


@lru_cache(maxsize=8)
def _rounded_mask(width: int, height: int, radius: float) -> Image.Image:
    mask = Image.new("RGB", (width, height), "#000000")
    box = (0.0, 0.0, float(width), float(height))
    _with_shapes(mask, box, lambda pen: pen.rounded(box, radius, "#FFFFFF"))
    return mask.convert("L")
