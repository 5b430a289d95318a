"""What a film shows: robots side by side, the direction drawn in the frame.

A `Panel` is one robot at one moment: its frame and what to say about it. `compose` draws panels side by side into one
image, and `side_by_side` does so for whole episodes, holding the last frame of the one that ends first. Positions are
pixels of the frame, (column, row) with row 0 at the top: a direction in the world is projected by whoever knows the
camera.

Lines and letters scale with the frame (256 to 480 pixels wide look best), and shapes are drawn several times larger and
shrunk, because Pillow's shapes have hard edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from counterflow.errors import InvalidInputError
from counterflow.experiments.style import HAIRLINE, INK, METHOD_COLOURS, MUTED, PAPER, SUCCESS, label
from counterflow.reasoners.direction import GripperCommand

Frame = npt.NDArray[np.uint8]
Pixel = tuple[float, float]
Status = Literal["running", "success", "failure", "unfinished"]

_ARROW_COLOUR = METHOD_COLOURS["frs"]
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
    """

    start: Pixel
    end: Pixel
    towards: float = 0.0


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
        status: puts a banner into the frame unless it is "running"; "unfinished" is an episode that is shown no further.
    """

    frame: Frame
    title: str
    caption: str = ""
    arrow: Arrow | None = None
    gripper: GripperCommand | None = None
    step: int = 0
    max_steps: int = 0
    status: Status = "running"


def compose(panels: Sequence[Panel], *, heading: str = "") -> Frame:
    """Draw panels side by side.

    Args:
        panels: left to right; all frames have one size.
        heading: above everything, for example the task in a sentence.

    Returns:
        (height, width, 3) uint8.

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
    total_height = strip + below + round(4 * unit)
    total_width = 2 * margin + len(panels) * width + (len(panels) - 1) * gap

    canvas = Image.new("RGB", (total_width, total_height), PAPER)
    if heading:
        font = _font(16 * unit, bold=True)
        _text(canvas, (margin, 14 * unit), _shorten(heading, font, total_width - 2 * margin), font, INK)
    for column, panel in enumerate(panels):
        left = margin + column * (width + gap)
        _draw_title(canvas, panel, left, top, unit)
        picture = draw_overlays(panel)
        canvas.paste(Image.fromarray(picture), (left, frame_top), _rounded_mask(width, height, 7 * unit))
        _draw_status_border(canvas, panel, left, frame_top, unit)
        _draw_strip(canvas, panel, left, strip, unit)
    return np.asarray(canvas)


def side_by_side(episodes: Sequence[Iterable[Panel]], *, heading: str = "", hold: int = 0) -> Iterator[Frame]:
    """Compose whole episodes, frame by frame; an episode that ends first keeps its last frame until all have ended.

    Args:
        episodes: for each column the panels of its episode, at least one panel each.
        heading: above everything.
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
        image = compose(panels, heading=heading)
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
        _draw_banner(picture, panel, unit)
    return np.asarray(picture)


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
    _text(canvas, (left + 16 * unit, top), _shorten(label(panel.title), font, room), font, INK)


def _draw_strip(canvas: Image.Image, panel: Panel, left: int, top: int, unit: float) -> None:
    """Draw what stands below the frame: the caption, and the counter with its bar."""
    width = panel.frame.shape[1]
    if panel.caption:
        font = _font(12 * unit)
        _text(canvas, (left, top), _shorten(panel.caption, font, width), font, INK)
    if not panel.max_steps:
        return
    colour = SUCCESS if panel.status == "success" else MUTED
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
        for grown, colour in ((2.2 * unit, PAPER), (0.7 * unit, _ARROW_COLOUR)):
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
        pen.circle(arrow.start, radius, _ARROW_COLOUR)
        pen.circle(arrow.start, radius - 2.6 * unit, PAPER)
        if arrow.towards >= 0:
            pen.circle(arrow.start, 3 * unit, _ARROW_COLOUR)
        else:
            reach = (radius - 2 * unit) / math.sqrt(2)
            for slope in (1, -1):
                ends = ((column - reach, row - slope * reach), (column + reach, row + slope * reach))
                pen.line(ends, 2.6 * unit, _ARROW_COLOUR)

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


def _draw_banner(picture: Image.Image, panel: Panel, unit: float) -> None:
    words, colour = {
        "success": ("success", SUCCESS),
        "failure": ("no success", MUTED),
        "unfinished": ("no success yet", MUTED),
    }[panel.status]
    font = _font(12 * unit, bold=True)
    left, top, height = 8 * unit, 8 * unit, 22 * unit
    width = 36 * unit + font.getlength(words)
    middle = top + height / 2

    def paint(pen: _Pen) -> None:
        pen.rounded((left, top, left + width, top + height), height / 2, colour)
        mark = left + 16 * unit
        if panel.status == "success":
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
