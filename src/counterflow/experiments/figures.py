"""Figures in one style: a colour for each method everywhere, intervals on every number, whole files or none.

Methods keep their colour in every figure and film. The five zero-shot ones stay apart under the three kinds of colour
blindness (the tests simulate them); the base policy is grey, and flow reversal, the house's own, is the only warm one
among them. Figures are drawn on `matplotlib.figure.Figure` without pyplot, so nothing global changes, and carry no time
stamp: the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from counterflow.errors import InvalidInputError
from counterflow.experiments.statistics import MeanRate, Rate, SuccessRate
from counterflow.files import replacing

INK = "#1F2933"
MUTED = "#66727F"
HAIRLINE = "#E4E8EC"
PAPER = "#FFFFFF"

METHOD_COLOURS: Mapping[str, str] = {
    "base": "#AEB4BA",
    "direct": "#7CC0EA",
    "partial": "#178F74",
    "rank": "#4C4BA0",
    "frs": "#E4580B",
    "dsbc": "#F2A93B",
    "dagger": "#C98B00",
    "dsrl": "#B5305F",
    "rfs": "#8E4EC6",
    "qgf": "#0B6FA4",
    "rql": "#0E4D64",
    "residual": "#7C8B2F",
    "bc": "#8A6B4F",
}
"""What a method looks like, in figures and films."""

METHOD_LABELS: Mapping[str, str] = {
    "base": "base policy",
    "direct": "direct",
    "partial": "partial noising",
    "rank": "sample-and-rank",
    "frs": "flow reversal (FRS)",
    "dsbc": "DSBC",
    "dagger": "DAgger in noise space",
    "dsrl": "DSRL",
    "rfs": "RFS",
    "qgf": "QGF",
    "rql": "RQL",
    "residual": "residual RL",
    "bc": "BC",
}
"""What a method is called where there is room for its name."""

OTHER_COLOURS = ("#0B6FA4", "#D1495B", "#3A9D5D", "#8E4EC6", "#E0A100", "#5C6770")
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
    "svg.hashsalt": "counterflow",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class RoundTrip:
    """One reference on its way back to noise and forth again, in one dimension.

    Attributes:
        reverse_times: (R,) times visited going back, from 1 to 0.
        reverse_positions: (R,) where the path was.
        forward_times: (F,) times visited going forth, from 0 to 1.
        forward_positions: (F,) where the path was.

    Raises:
        InvalidInputError: times and positions differ in length, are shorter than 2, or not finite.
    """

    reverse_times: npt.NDArray[np.float64]
    reverse_positions: npt.NDArray[np.float64]
    forward_times: npt.NDArray[np.float64]
    forward_positions: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        """Check the arrays."""
        for field in fields(self):
            array = _finite(field.name, getattr(self, field.name))
            if array.ndim != 1 or len(array) < 2:
                raise InvalidInputError(f"{field.name} has shape {array.shape}; expected (steps + 1,), at least (2,).")
            object.__setattr__(self, field.name, array)
        for way in ("reverse", "forward"):
            times, positions = getattr(self, f"{way}_times"), getattr(self, f"{way}_positions")
            if len(times) != len(positions):
                raise InvalidInputError(
                    f"{way} has {len(times)} times and {len(positions)} positions; expected as many."
                )


@dataclass(frozen=True)
class Marginals:
    """How the flow's probability lies over positions at each time, in one dimension.

    Attributes:
        times: (T,) increasing, from 0 (noise) to 1 (action).
        positions: (X,) increasing.
        density: (T, X) probability density of x_t.

    Raises:
        InvalidInputError: the shapes don't fit, or a value is negative or not finite.
    """

    times: npt.NDArray[np.float64]
    positions: npt.NDArray[np.float64]
    density: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        """Check the arrays."""
        for field in fields(self):
            object.__setattr__(self, field.name, _finite(field.name, getattr(self, field.name)))
        expected = (self.times.size, self.positions.size)
        if self.density.shape != expected or min(expected) < 2:
            raise InvalidInputError(
                f"density has shape {self.density.shape}; expected (times, positions) = {expected}, at least (2, 2)."
            )
        if (self.density < 0).any() or (self.density.max(axis=1) <= 0).any():
            raise InvalidInputError(
                "density is negative somewhere, or zero everywhere at some time; expected a density."
            )


def success_bars(
    results: Mapping[str, Mapping[str, Rate]],
    path: Path | str,
    *,
    title: str = "",
    subtitle: str = "",
    mean: bool = False,
    footnote: str | None = None,
    svg: bool = False,
) -> Path:
    """Draw success rates as grouped bars with their 95% intervals; the best of each group is in bold.

    Args:
        results: for each group (a task, a family) the rate of each method. Groups and methods appear in the order in
            which they are first named; a method that a group lacks leaves a gap.
        path: where the PNG goes.
        title: what the figure shows, in a few words.
        subtitle: a second line, quieter.
        mean: append the mean over the groups, for the methods that every group has. The groups must be single tasks.
        footnote: a line at the foot; by default it says how many episodes stand behind a bar.
        svg: write the same figure as SVG beside it too.

    Returns:
        The PNG's path.

    Raises:
        InvalidInputError: there is nothing to draw, or a mean is asked of something else than single tasks.
        StorageError: the file can't be written.
    """
    groups = {group: dict(rates) for group, rates in results.items() if rates}
    if not groups:
        raise InvalidInputError("there is no success rate to draw; expected at least one group with one method.")
    methods = list(dict.fromkeys(method for rates in groups.values() for method in rates))
    if footnote is None:
        footnote = _episodes_note(rate for rates in groups.values() for rate in rates.values())
    if mean:
        groups["mean"] = _mean_group(groups, methods)
    colours = _colours(methods)

    step = len(methods) + 1.1  # in bar widths: a group's bars and the gap to the next group
    bars = step * len(groups)
    width = min(max(0.30 * bars, 4.2), 13.0)
    labels = [_wrap(group, max(6, int(step / bars * width / 0.077))) for group in groups]
    rows = max(label.count("\n") + 1 for label in labels)
    with _style():
        handles = {_label(method): Patch(color=colours[method]) for method in methods}
        handles = handles if len(methods) > 1 else {}
        figure, frame = _sheet(width, 2.9, title, subtitle, handles, footnote, below=0.15 + 0.15 * rows)
        axes = figure.add_subplot(figure.add_gridspec(1, 1, **frame)[0])
        for column, (group, rates) in enumerate(groups.items()):
            best = max(rate.rate for rate in rates.values())
            for row, method in enumerate(methods):
                if method in rates:
                    position = column * step + row
                    _bar(axes, position, rates[method], colours[method], best=rates[method].rate == best)
            if mean and group == "mean":
                axes.vlines(column * step - 1.05, 0, 100, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2.5)))
        axes.set_xticks([column * step + (len(methods) - 1) / 2 for column in range(len(groups))], labels)
        if mean:
            axes.get_xticklabels()[-1].set_fontweight("bold")
        axes.set_xlim(-1.05, bars - 1.05)
        _percent_axis(axes)
        return _save(figure, path, svg)


def success_curve(
    lines: Mapping[str, Mapping[float, Rate]],
    path: Path | str,
    *,
    xlabel: str,
    title: str = "",
    subtitle: str = "",
    levels: Mapping[str, Rate] | None = None,
    scale: Literal["linear", "log"] = "linear",
    footnote: str | None = None,
    svg: bool = False,
) -> Path:
    """Draw success against a setting (K, tau, n, magnitude, error probability, ...) with bands of 95% intervals.

    Args:
        lines: for each line its rates by setting. Lines that carry a method's name take its colour.
        path: where the PNG goes.
        xlabel: what the setting is, with its unit.
        title: what the figure shows, in a few words.
        subtitle: a second line, quieter.
        levels: rates that do not depend on the setting, drawn dashed across.
        scale: of the setting's axis.
        footnote: a line at the foot; by default it says how many episodes stand behind a point.
        svg: write the same figure as SVG beside it too.

    Returns:
        The PNG's path.

    Raises:
        InvalidInputError: there is nothing to draw, a setting is not finite, or not positive on a logarithmic axis.
        StorageError: the file can't be written.
    """
    levels = {} if levels is None else levels
    if not lines or not all(lines.values()):
        raise InvalidInputError("a line has no success rate to draw; expected at least one line, each with a point.")
    settings = sorted({float(setting) for line in lines.values() for setting in line})
    if not all(math.isfinite(setting) for setting in settings):
        raise InvalidInputError(f"settings of the curve are {settings}; expected finite numbers.")
    if scale == "log" and settings[0] <= 0:
        raise InvalidInputError(f"the least setting is {settings[0]}; a logarithmic axis needs positive ones.")
    colours = _colours([*lines, *levels])
    if footnote is None:
        footnote = _episodes_note([rate for line in lines.values() for rate in line.values()] + list(levels.values()))

    with _style():
        handles: dict[str, Artist] = {
            _label(name): Line2D([], [], color=colours[name], **_LINE, label=_label(name)) for name in lines
        }
        handles |= {_label(name): Line2D([], [], color=colours[name], **_LEVEL) for name in levels}
        figure, frame = _sheet(5.2, 2.9, title, subtitle, handles if len(handles) > 1 else {}, footnote)
        axes = figure.add_subplot(figure.add_gridspec(1, 1, **frame)[0])
        for name, rate in levels.items():
            axes.axhspan(
                100 * rate.interval.low, 100 * rate.interval.high, color=colours[name], alpha=0.10, linewidth=0
            )
            axes.axhline(100 * rate.rate, color=colours[name], **_LEVEL)
        for name, line in lines.items():
            points = sorted((float(setting), rate) for setting, rate in line.items())
            where = [setting for setting, _ in points]
            low, high = ([100 * rate.interval[side] for _, rate in points] for side in (0, 1))
            axes.fill_between(where, low, high, color=colours[name], alpha=0.14, linewidth=0)
            axes.plot(where, [100 * rate.rate for _, rate in points], color=colours[name], clip_on=False, **_LINE)
        axes.set_xscale(scale)
        _ticks_at(axes, settings)
        axes.set_xlabel(xlabel)
        _percent_axis(axes)
        return _save(figure, path, svg)


def reversal_analysis(
    steps: Sequence[int],
    displacement: npt.ArrayLike,
    log_prob_gain: npt.ArrayLike,
    path: Path | str,
    *,
    title: str = "",
    subtitle: str = "",
    unit: str = "",
    svg: bool = False,
) -> Path:
    """Draw what flow reversal does to references as K grows: how far it moves them, how likely it makes them.

    The analysis of FRS (arXiv 2606.13675): with few steps the round trip is lossy and pulls the reference towards the
    prior's modes; both curves fall as K grows.

    Args:
        steps: (S,) the values of K, increasing.
        displacement: (S, N) distance between N references and what the round trip makes of them.
        log_prob_gain: (S, N) log-probability of the result under the prior minus that of the reference, in nats.
        path: where the PNG goes.
        title: what the figure shows, in a few words.
        subtitle: a second line, quieter.
        unit: of the displacement, for the axis.
        svg: write the same figure as SVG beside it too.

    Returns:
        The PNG's path.

    Raises:
        InvalidInputError: the shapes don't fit, K is not increasing from at least 1, or a value is not finite.
        StorageError: the file can't be written.
    """
    counts = list(steps)
    if not counts or counts[0] < 1 or any(after <= before for before, after in itertools.pairwise(counts)):
        raise InvalidInputError(f"steps are {counts}; expected increasing whole numbers from at least 1.")
    colour = METHOD_COLOURS["frs"]
    panels = {
        "Displacement after FRS": ("distance to the reference" + (f" ({unit})" if unit else ""), displacement),
        "Log-probability gained": ("log p(result) / p(reference), nats", log_prob_gain),
    }
    with _style():
        footnote = "Line: mean. Bands: the middle 50% and 90% of the references."
        figure, frame = _sheet(7.6, 2.7, title, subtitle, {}, footnote, left=0.6, panel_titles=True)
        grid = figure.add_gridspec(1, 2, wspace=0.26, **frame)
        for column, (name, (ylabel, given)) in enumerate(panels.items()):
            values = _finite(name, given)
            if values.ndim != 2 or len(values) != len(counts) or values.shape[1] == 0:
                raise InvalidInputError(
                    f"{name.lower()}: values have shape {values.shape}; expected ({len(counts)}, references)."
                )
            axes = figure.add_subplot(grid[column])
            for outer, alpha in ((5, 0.12), (25, 0.18)):
                low, high = np.percentile(values, [outer, 100 - outer], axis=1)
                axes.fill_between(counts, low, high, color=colour, alpha=alpha, linewidth=0)
            axes.plot(counts, values.mean(axis=1), color=colour, **_LINE)
            if column == 0:
                axes.set_ylim(bottom=0)
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.set_xscale("log")
            _ticks_at(axes, counts)
            axes.set_title(name, pad=10)
            axes.set_xlabel("K, steps each way")
            axes.set_ylabel(ylabel)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.grid(axis="y")
            axes.spines["bottom"].set_visible(False)
        return _save(figure, path, svg)


def paths_1d(
    panels: Mapping[str, Sequence[RoundTrip]],
    marginals: Marginals,
    path: Path | str,
    *,
    title: str = "",
    subtitle: str = "",
    svg: bool = False,
) -> Path:
    """Draw references reversed to noise and denoised again over the flow's probability, in one dimension.

    Args:
        panels: for each panel's heading (for example "K = 3") the round trips it shows.
        marginals: the flow's probability, drawn as a shade behind the paths and as curves at both ends.
        path: where the PNG goes.
        title: what the figure shows, in a few words.
        subtitle: a second line, quieter.
        svg: write the same figure as SVG beside it too.

    Returns:
        The PNG's path.

    Raises:
        InvalidInputError: there is no panel.
        StorageError: the file can't be written.
    """
    if not panels:
        raise InvalidInputError("there is no panel to draw; expected at least one heading with its round trips.")
    back, forth = INK, METHOD_COLOURS["frs"]
    handles: dict[str, Artist] = {
        "reference": Line2D([], [], linestyle="", **_REFERENCE),
        "reversed, t = 1 to 0": Line2D([], [], color=back, **_BACK),
        "denoised, t = 0 to 1": Line2D([], [], color=forth, **_FORTH),
        "steered action": Line2D([], [], linestyle="", color=forth, **_RESULT),
    }
    with _style():
        width = 1.1 + 2.7 * len(panels)
        figure, frame = _sheet(width, 2.9, title, subtitle, handles, "", left=0.35, below=0.3, panel_titles=True)
        ratios = [0.2, *[1.0] * len(panels), 0.2]
        grid = figure.add_gridspec(1, len(panels) + 2, width_ratios=ratios, wspace=0.11, **frame)
        noise, *middle, action = (figure.add_subplot(grid[column]) for column in range(len(panels) + 2))
        _density_margin(noise, marginals.positions, marginals.density[0], "noise", mirrored=True)
        _density_margin(action, marginals.positions, marginals.density[-1], "action", mirrored=False)
        # Relative to each time's peak, and its root: else the heavy mode near t = 1 would outshine all the rest.
        shade = np.sqrt(marginals.density / marginals.density.max(axis=1, keepdims=True))
        for axes, (heading, trips) in zip(middle, panels.items(), strict=True):
            axes.pcolormesh(
                marginals.times,
                marginals.positions,
                shade.T,
                cmap=LinearSegmentedColormap.from_list("shade", [PAPER, "#CBD6E2"]),
                shading="gouraud",
                rasterized=True,
            )
            for trip in trips:
                _path(axes, trip.reverse_times, trip.reverse_positions, back, _BACK)
                _path(axes, trip.forward_times, trip.forward_positions, forth, _FORTH)
                axes.plot(trip.reverse_times[:1], trip.reverse_positions[:1], clip_on=False, zorder=5, **_REFERENCE)
                axes.plot(
                    trip.forward_times[-1:],
                    trip.forward_positions[-1:],
                    color=forth,
                    clip_on=False,
                    zorder=6,
                    **_RESULT,
                )
            axes.set_title(heading, pad=10)
            axes.set_xlim(0, 1)
            axes.set_xticks([0, 1], ["t = 0", "t = 1"])
            first, last = axes.get_xticklabels()
            first.set_horizontalalignment("left")
            last.set_horizontalalignment("right")
        for axes in (noise, *middle, action):
            axes.set_ylim(marginals.positions[0], marginals.positions[-1])
            axes.set_yticks([])
            axes.spines["bottom"].set_visible(False)
        noise.set_yticks(_whole_ticks(marginals.positions))
        return _save(figure, path, svg)


_LINE: Mapping[str, Any] = {
    "linewidth": 2.0,
    "marker": "o",
    "markersize": 5.5,
    "markeredgecolor": PAPER,
    "markeredgewidth": 1.0,
    "solid_capstyle": "round",
}
_LEVEL: Mapping[str, Any] = {"linewidth": 1.5, "linestyle": (0, (4, 2.5))}
_BACK: Mapping[str, Any] = {"linewidth": 1.3, "linestyle": (0, (3, 1.6)), "marker": "o", "markersize": 2.4}
_FORTH: Mapping[str, Any] = {"linewidth": 1.8, "linestyle": "-", "marker": "o", "markersize": 2.6}
_REFERENCE: Mapping[str, Any] = {
    "marker": "o",
    "markersize": 8.0,
    "markerfacecolor": PAPER,
    "markeredgecolor": INK,
    "markeredgewidth": 1.4,
}
_RESULT: Mapping[str, Any] = {"marker": "o", "markersize": 6.0, "markeredgecolor": PAPER, "markeredgewidth": 1.0}


@contextmanager
def _style() -> Iterator[None]:
    """Draw in the house's style whatever the user's matplotlibrc says, and leave matplotlib's settings as they were."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def _sheet(
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


def _save(figure: Figure, path: Path | str, svg: bool) -> Path:
    """Write the figure as PNG, and as SVG beside it if asked. Returns the PNG's path."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InvalidInputError(f"the figure's path is {path}; expected a name that ends in .png.")
    targets = [path, path.with_suffix(".svg")] if svg else [path]
    for target in targets:
        # Without these the file would name the library's version, and the SVG the moment of writing.
        metadata = {"Date": None} if target.suffix == ".svg" else {"Software": None}
        drawn = io.BytesIO()
        figure.savefig(drawn, format=target.suffix[1:].lower(), bbox_inches="tight", pad_inches=0.18, metadata=metadata)
        with replacing(target) as partial:
            partial.write_bytes(drawn.getvalue())
    return path


def _bar(axes: Axes, position: float, rate: Rate, colour: str, *, best: bool) -> None:
    low, high = rate.interval
    axes.bar(position, 100 * rate.rate, width=0.86, color=colour, linewidth=0)
    axes.vlines(position, 100 * low, 100 * high, color=INK, linewidth=1.1, alpha=0.8)
    weight, shade = ("bold", INK) if best else ("normal", MUTED)
    axes.annotate(
        f"{100 * rate.rate:.0f}",
        (position, 100 * high),
        xytext=(0, 2.5),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=7.5,
        fontweight=weight,
        color=shade,
    )


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(0, 107)
    axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100%"])
    axes.set_ylabel("success rate")
    axes.grid(axis="y")


def _ticks_at(axes: Axes, settings: Sequence[float]) -> None:
    axes.set_xticks(settings, [f"{setting:g}" for setting in settings])
    axes.set_xticks([], minor=True)


def _path(
    axes: Axes, times: npt.NDArray[np.float64], positions: npt.NDArray[np.float64], colour: str, look: Mapping[str, Any]
) -> None:
    """Draw a path with an arrow head on its middle step."""
    look = look if len(times) <= 25 else {**look, "marker": ""}  # more dots than that would be a thick line
    axes.plot(times, positions, color=colour, clip_on=False, zorder=4, **look)
    step = (len(times) - 1) // 2
    tail, head = (np.array([times[index], positions[index]]) for index in (step, step + 1))
    axes.annotate(
        "",
        xy=tuple(tail + 0.62 * (head - tail)),
        xytext=tuple(tail + 0.38 * (head - tail)),
        arrowprops={
            "arrowstyle": "-|>",
            "color": colour,
            "linewidth": 0,
            "mutation_scale": 11,
            "shrinkA": 0,
            "shrinkB": 0,
        },
        zorder=4,
    )


def _density_margin(
    axes: Axes, positions: npt.NDArray[np.float64], density: npt.NDArray[np.float64], name: str, *, mirrored: bool
) -> None:
    axes.fill_betweenx(positions, 0, density, color="#CBD6E2", linewidth=0)
    axes.plot(density, positions, color=MUTED, linewidth=1.0)
    axes.set_xlim((1.08 * density.max(), 0) if mirrored else (0, 1.08 * density.max()))
    axes.set_xticks([density.max() / 2], [name])


def _whole_ticks(positions: npt.NDArray[np.float64]) -> list[int]:
    return list(range(math.ceil(positions[0]), math.floor(positions[-1]) + 1))


def _finite(name: str, given: npt.ArrayLike) -> npt.NDArray[np.float64]:
    array = np.asarray(given, dtype=np.float64)
    if not np.isfinite(array).all():
        raise InvalidInputError(f"{name}: a value is not finite; expected numbers only.")
    return array


def _mean_group(groups: Mapping[str, Mapping[str, Rate]], methods: Iterable[str]) -> dict[str, Rate]:
    means: dict[str, Rate] = {}
    for method in methods:
        tasks = [rates[method] for rates in groups.values() if method in rates]
        singles = tuple(task for task in tasks if isinstance(task, SuccessRate))
        if len(singles) != len(tasks):
            raise InvalidInputError("the mean over groups needs single tasks (SuccessRate), not means of tasks.")
        if len(singles) == len(groups):
            means[method] = MeanRate(singles)
    if not means:
        raise InvalidInputError("no method was run on every group, so there is no mean to compare; pass mean=False.")
    return means


def _episodes_note(rates: Iterable[Rate]) -> str:
    counts = sorted({rate.episodes for rate in rates if isinstance(rate, SuccessRate)})
    if not counts:
        return "Intervals: 95%."
    episodes = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{episodes} episodes each; intervals: 95%, Wilson."


def _label(name: str) -> str:
    return METHOD_LABELS.get(name, name)


def _colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name: the method's own, or the next of the others."""
    names = list(names)
    others = [name for name in names if name not in METHOD_COLOURS]
    spare = {name: OTHER_COLOURS[index % len(OTHER_COLOURS)] for index, name in enumerate(others)}
    return {name: METHOD_COLOURS.get(name) or spare[name] for name in names}


def _wrap(text: str, characters: int) -> str:
    """Break `text` after blanks, hyphens and slashes into as few lines of `characters` as will do, evenly filled."""
    lines = _fill(text, characters)
    for narrower in range(characters - 1, 0, -1):
        even = _fill(text, narrower)
        if len(even) > len(lines):
            break
        lines = even
    return "\n".join(lines)


def _fill(text: str, characters: int) -> list[str]:
    lines = [""]
    for piece in re.findall(r"[^-/\s]+[-/\s]*|[-/]+", text):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > characters:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]
