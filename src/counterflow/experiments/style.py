"""How figures and films look: the colours and names of methods, the letters, the paper.

Methods keep their colour in every figure and film: the base policy is grey, and flow reversal, the house's own, is the
only warm one, with the noise policy that is distilled from it its dark brother. Colours stay apart under the three kinds
of colour blindness (the tests simulate them).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from counterflow.errors import InvalidInputError
from counterflow.files import replacing

INK = "#1F2933"
MUTED = "#66727F"
HAIRLINE = "#E4E8EC"
SHADE = "#CBD6E2"
PAPER = "#FFFFFF"
SUCCESS = "#1E9E5A"
"""The green of a task that is done."""

METHOD_COLOURS: Mapping[str, str] = {
    "base": "#AEB4BA",
    "direct": "#7CC0EA",
    "partial": "#178F74",
    "rank": "#4C4BA0",
    "frs": "#E4580B",
    "dsbc": "#6C0000",
    "bc": "#000024",
}
"""What a method looks like."""

METHOD_LABELS: Mapping[str, str] = {
    "base": "base policy",
    "direct": "direct",
    "partial": "partial noising",
    "rank": "sample-and-rank",
    "frs": "flow reversal (FRS)",
    "dsbc": "noise policy (DSBC)",
    "bc": "behaviour cloning (BC)",
}
"""What a method is called where there is room for its name."""

OTHER_COLOURS = ("#0B6FA4", "#E0A100", "#7A1F3D", "#A3B18A", "#56B4E9")
"""For lines that are not methods, in order."""

_DOTS_PER_INCH = 200

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "xtick.major.pad": 6.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "legend.borderpad": 0.0,
    "legend.borderaxespad": 0.0,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.6,
    "text.parse_math": False,
}


def label(name: str) -> str:
    """Return a method's name spelled out; other names as they are."""
    return METHOD_LABELS.get(name, name)


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name: the method's own, however it is capitalised, or the next of the others."""
    names = list(names)
    spare = {name: OTHER_COLOURS[index % len(OTHER_COLOURS)] for index, name in enumerate(_others(names))}
    return {name: spare[name] if name in spare else METHOD_COLOURS[name.lower()] for name in names}


def sharing(names: Iterable[str]) -> set[str]:
    """Return the names whose colour has already gone to another: they need a second mark (hatching, another marker)."""
    return set(_others(names)[len(OTHER_COLOURS) :])


def _others(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name.lower() not in METHOD_COLOURS))


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the house's style whatever the user's matplotlibrc says, and leave matplotlib's settings as they were."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def sheet(
    width: float,
    height: float,
    title: str,
    subtitle: str,
    handles: Mapping[str, Artist],
    footnote: str,
    *,
    left: float = 0.55,
    below: float = 0.5,
    panel_titles: bool = False,
) -> tuple[Figure, dict[str, float]]:
    """Open a figure with room for `width` x `height` inches of axes, and write what goes around them.

    `left` and `below` are the inches that the axes' own labels need there.

    Returns:
        The figure, and the edges of the axes as fractions of it (left, right, bottom, top).
    """
    right, below = 0.12, below + (0.27 if footnote else 0)
    total_width = left + width + right
    legend_rows = math.ceil(sum(0.55 + 0.075 * len(label) for label in handles) / (total_width - 0.1))
    heights = [0.27 * bool(title), 0.23 * bool(subtitle), 0.22 * legend_rows]
    total_height = sum(heights) + 0.07 + 0.26 * panel_titles + height + below
    figure = Figure(figsize=(total_width, total_height), dpi=_DOTS_PER_INCH)
    from_top = 0.0
    for text, space, look in (
        (title, heights[0], (12.0, "bold", INK)),
        (subtitle, heights[1], (9.5, "normal", MUTED)),
    ):
        if text:
            size, weight, colour = look
            y = 1 - from_top / total_height
            figure.text(0, y, text, va="top", fontsize=size, fontweight=weight, color=colour)
        from_top += space
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="upper left",
            bbox_to_anchor=(0, 1 - (from_top + 0.05) / total_height),
            ncols=math.ceil(len(handles) / legend_rows),
            handlelength=1.0 if all(isinstance(handle, Patch) for handle in handles.values()) else 2.2,
            handleheight=0.9,
        )
    if footnote:
        figure.text(0, 0, footnote, va="bottom", fontsize=7.5, color=MUTED)
    edges = {
        "left": left / total_width,
        "right": 1 - right / total_width,
        "bottom": below / total_height,
        "top": (below + height) / total_height,
    }
    return figure, edges


def save(figure: Figure, path: Path | str) -> Path:
    """Write the figure as PNG, the same bytes for the same numbers, and return its path."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InvalidInputError(f"the figure's path is {path}; expected a name that ends in .png.")
    drawn = io.BytesIO()
    # Without the empty entry the file would name the library's version.
    figure.savefig(drawn, format="png", bbox_inches="tight", pad_inches=0.18, metadata={"Software": None})
    with replacing(path) as partial:
        partial.write_bytes(drawn.getvalue())
    return path
