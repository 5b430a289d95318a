"""Figures in one style: a colour for each method everywhere, intervals on every number, whole files or none.

They are drawn on `matplotlib.figure.Figure` without pyplot, so nothing global changes, and carry no time stamp: the same
numbers give the same bytes.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from counterflow.errors import InvalidInputError
from counterflow.experiments.statistics import Rate, SeedsRate, SuccessRate
from counterflow.experiments.style import (
    INK,
    METHOD_COLOURS,
    MUTED,
    PAPER,
    SHADE,
    colours_of,
    label,
    save,
    sharing,
    sheet,
    styled,
)

if TYPE_CHECKING:  # a probe runs policies, for which figures need no torch
    from counterflow.experiments.probe import Steerability

_LINE: Mapping[str, Any] = {
    "linewidth": 2.0,
    "marker": "o",
    "markersize": 5.5,
    "markeredgecolor": PAPER,
    "markeredgewidth": 1.0,
    "solid_capstyle": "round",
}
_AGAIN: Mapping[str, Any] = {"marker": "s", "linestyle": (0, (5, 1.2))}  # a second line of one colour
_NEAR = 0.04  # of an axis: labels that are nearer to each other than that are written over each other
_HATCHED: Mapping[str, Any] = {"hatch": "////", "edgecolor": PAPER}
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


@dataclass(frozen=True)
class RoundTrip:
    """One reference on its way back to noise and forth again, in one dimension.

    Attributes:
        reverse_times: (R,) times visited going back, from 1 to 0.
        reverse_positions: (R,) where the path was.
        forward_times: (F,) times visited going forth, from 0 to 1.
        forward_positions: (F,) where the path was.
    """

    reverse_times: npt.NDArray[np.float64]
    reverse_positions: npt.NDArray[np.float64]
    forward_times: npt.NDArray[np.float64]
    forward_positions: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Marginals:
    """How the flow's probability lies over positions at each time, in one dimension.

    Attributes:
        times: (T,) increasing, from 0 (noise) to 1 (action).
        positions: (X,) increasing.
        density: (T, X) probability density of x_t.
    """

    times: npt.NDArray[np.float64]
    positions: npt.NDArray[np.float64]
    density: npt.NDArray[np.float64]


def success_bars(
    results: Mapping[str, Mapping[str, Rate]],
    path: Path | str,
    *,
    title: str = "",
    subtitle: str = "",
) -> Path:
    """Draw success rates as grouped bars with their 95% intervals; the best of each group is in bold.

    Args:
        results: for each group (a task, a family) the rate of each method. Groups and methods appear in the order in
            which they are first named; a method that a group lacks leaves a gap.
        path: where the PNG goes.
        title: what the figure shows, in a few words.
        subtitle: a second line, quieter.

    Returns:
        The PNG's path.

    Raises:
        InvalidInputError: there is nothing to draw.
        StorageError: the file can't be written.
    """
    groups = {group: dict(rates) for group, rates in results.items() if rates}
    if not groups:
        raise InvalidInputError("there is no success rate to draw; expected at least one group with one method.")
    methods = list(dict.fromkeys(method for rates in groups.values() for method in rates))
    footnote = _episodes_note(rate for rates in groups.values() for rate in rates.values())
    colours, shared = colours_of(methods), sharing(methods)
    looks = {
        method: {"facecolor": colours[method], "linewidth": 0, **(_HATCHED if method in shared else {})}
        for method in methods
    }

    step = len(methods) + 1.1  # in bar widths: a group's bars and the gap to the next group
    bars = step * len(groups)
    width = min(max(0.30 * bars, 4.2), 13.0)
    characters = max(6, int(step / bars * width / 0.077))
    names = [textwrap.fill(group, characters, break_long_words=False) for group in groups]
    rows = max(name.count("\n") + 1 for name in names)
    with styled():
        handles = {label(method): Patch(**looks[method]) for method in methods}
        handles = handles if len(methods) > 1 else {}
        figure, frame = sheet(width, 2.9, title, subtitle, handles, footnote, below=0.15 + 0.15 * rows)
        axes = figure.add_subplot(figure.add_gridspec(1, 1, **frame)[0])
        for column, rates in enumerate(groups.values()):
            best = max(rate.rate for rate in rates.values())
            for row, method in enumerate(methods):
                if method in rates:
                    position = column * step + row
                    _bar(axes, position, rates[method], looks[method], best=rates[method].rate == best)
        axes.set_xticks([column * step + (len(methods) - 1) / 2 for column in range(len(groups))], names)
        axes.set_xlim(-1.05, bars - 1.05)
        _percent_axis(axes)
        return save(figure, path)


def success_curve(
    lines: Mapping[str, Mapping[float, Rate]],
    path: Path | str,
    *,
    xlabel: str,
    title: str = "",
    subtitle: str = "",
    levels: Mapping[str, Rate] | None = None,
    scale: Literal["linear", "log"] = "linear",
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
    names = [*lines, *levels]
    colours, shared = colours_of(names), sharing(names)
    looks = {name: {**_LINE, "color": colours[name], **(_AGAIN if name in shared else {})} for name in lines}
    footnote = _episodes_note([rate for line in lines.values() for rate in line.values()] + list(levels.values()))

    with styled():
        handles: dict[str, Artist] = {label(name): Line2D([], [], **looks[name]) for name in lines}
        handles |= {label(name): Line2D([], [], color=colours[name], **_LEVEL) for name in levels}
        figure, frame = sheet(5.2, 2.9, title, subtitle, handles if len(handles) > 1 else {}, footnote)
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
            axes.plot(where, [100 * rate.rate for _, rate in points], clip_on=False, **looks[name])
        axes.set_xscale(scale)
        _ticks_at(axes, settings)
        axes.set_xlabel(xlabel)
        _percent_axis(axes)
        return save(figure, path)


def mean_curve(
    lines: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
    path: Path | str,
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    subtitle: str = "",
) -> Path:
    """Draw means over samples with bands of 95% intervals of the mean (normal approximation).

    Args:
        lines: for each line its places (X,) and samples (X, N); NaN samples are left out. Lines that carry a method's name
            take its colour.
        path: where the PNG goes.
        xlabel: what the places are, with their unit.
        ylabel: what was measured, with its unit.
        title: what the figure shows, in a few words.
        subtitle: a second line, quieter.

    Returns:
        The PNG's path.

    Raises:
        InvalidInputError: shapes don't fit, or a place has no sample.
        StorageError: the file can't be written.
    """
    if not lines:
        raise InvalidInputError("there is nothing to draw; expected at least one line.")
    colours = colours_of(lines)
    with styled():
        handles: dict[str, Artist] = {label(name): Line2D([], [], color=colours[name], **_LINE) for name in lines}
        figure, frame = sheet(
            5.2, 2.9, title, subtitle, handles if len(handles) > 1 else {}, "Bands: 95% intervals of the mean."
        )
        axes = figure.add_subplot(figure.add_gridspec(1, 1, **frame)[0])
        for name, (places, samples) in lines.items():
            where, values = np.asarray(places, float), np.asarray(samples, float)
            counts = np.isfinite(values).sum(1) if values.ndim == 2 else np.zeros(1)
            if where.shape != values.shape[:1] or not counts.all():
                raise InvalidInputError(
                    f"{name} has places {where.shape} and samples {values.shape}; expected (X,) and (X, N), a finite sample each."
                )
            mean = np.nanmean(values, axis=1)
            spread = 1.96 * np.nanstd(values, axis=1) / np.sqrt(counts)
            axes.fill_between(where, mean - spread, mean + spread, color=colours[name], alpha=0.14, linewidth=0)
            axes.plot(where, mean, color=colours[name], **{**_LINE, "markersize": 3.5})
        axes.set_ylim(bottom=0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y")
        return save(figure, path)


def reversal_analysis(
    steps: Sequence[int],
    displacement: npt.ArrayLike,
    log_prob_gain: npt.ArrayLike,
    path: Path | str,
    *,
    title: str = "",
    subtitle: str = "",
    unit: str = "",
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
    with styled():
        footnote = "Line: mean. Bands: the middle 50% and 90% of the references."
        figure, frame = sheet(7.6, 2.7, title, subtitle, {}, footnote, left=0.6, panel_titles=True)
        grid = figure.add_gridspec(1, 2, wspace=0.26, **frame)
        for column, (name, (ylabel, given)) in enumerate(panels.items()):
            values = np.asarray(given, dtype=np.float64)
            if values.ndim != 2 or len(values) != len(counts) or values.size == 0 or not np.isfinite(values).all():
                raise InvalidInputError(
                    f"{name.lower()}: values have shape {values.shape}; expected ({len(counts)}, references), finite."
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
        return save(figure, path)


def paths_1d(
    panels: Mapping[str, Sequence[RoundTrip]],
    marginals: Marginals,
    path: Path | str,
    *,
    title: str = "",
    subtitle: str = "",
) -> Path:
    """Draw references reversed to noise and denoised again over the flow's probability, in one dimension.

    Args:
        panels: for each panel's heading (for example "K = 3") the round trips it shows.
        marginals: the flow's probability, drawn as a shade behind the paths and as curves at both ends.
        path: where the PNG goes.
        title: what the figure shows, in a few words.
        subtitle: a second line, quieter.

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
    with styled():
        width = 1.1 + 2.7 * len(panels)
        figure, frame = sheet(width, 2.9, title, subtitle, handles, "", left=0.35, below=0.3, panel_titles=True)
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
                cmap=LinearSegmentedColormap.from_list("shade", [PAPER, SHADE]),
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
        return save(figure, path)


def steerability(found: Steerability, path: Path | str, *, title: str = "") -> Path:
    """Draw a probe's page: fixed noises, random residuals, latent shapes, reach against the noise bound.

    Args:
        found: what the probe found.
        path: where the PNG goes.
        title: the task, for example.

    Returns:
        The PNG's path.

    Raises:
        StorageError: the file can't be written.
    """
    with styled():
        recommended = f"bound {found.bound:g}, latent {found.latent}, residual deviation {found.residual_std:g}"
        notes = _episodes_note([found.base])
        figure, frame = sheet(
            9.6, 2.3, title or found.env, f"Recommended: {recommended}", {}, notes, below=0.75, panel_titles=True
        )
        grid = figure.add_gridspec(1, 4, wspace=0.5, **frame)
        first, second, third, fourth = (figure.add_subplot(grid[0, column]) for column in range(4))
        ordered = sorted(found.fixed, key=lambda rate: rate.rate)
        for axes, heading, places, rates in (
            (first, "noise held fixed", range(len(ordered)), ordered),
            (second, "random residual", range(len(found.residual)), list(found.residual.values())),
            (third, "latent shape", range(len(found.shapes)), list(found.shapes.values())),
        ):
            axes.set_title(heading)
            for place, rate in zip(places, rates, strict=True):
                axes.vlines(place, 100 * rate.interval.low, 100 * rate.interval.high, color=SHADE, linewidth=3)
                axes.plot(place, 100 * rate.rate, color=METHOD_COLOURS["frs"], **{**_RESULT, "clip_on": False})
            axes.axhline(100 * found.base.rate, color=METHOD_COLOURS["base"], **_LEVEL)
            axes.set_xlim(-0.5, len(rates) - 0.5)
            _percent_axis(axes)
        first.set_xticks([])
        first.set_xlabel("draws; dashed: the base")
        second.set_xticks(range(len(found.residual)), [f"{std:g}" for std in found.residual])
        second.set_xlabel("deviation, action units")
        third.set_xticks(range(len(found.shapes)), [textwrap.fill(name, 10) for name in found.shapes], fontsize=7.0)
        fourth.set_title("reach")
        bounded = [bound for bound in found.reach if math.isfinite(bound)]
        fourth.plot(
            bounded,
            [100 * found.reach[bound] for bound in bounded],
            color=METHOD_COLOURS["frs"],
            **{**_LINE, "clip_on": False},
        )
        fourth.axhline(100 * found.reach[math.inf], color=METHOD_COLOURS["base"], **_LEVEL)
        fourth.set_ylabel("motion that comes out, %")
        fourth.set_xlabel("noise bound; dashed: none")
        fourth.grid(axis="y")
        return save(figure, path)


def _bar(axes: Axes, position: float, rate: Rate, look: Mapping[str, Any], *, best: bool) -> None:
    low, high = rate.interval
    axes.bar(position, 100 * rate.rate, width=0.86, **look)
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
    """Label every setting; where they lie too near each other, round numbers."""
    nearest = min((after - before for before, after in itertools.pairwise(settings)), default=math.inf)
    if axes.get_xscale() == "linear" and nearest < _NEAR * (settings[-1] - settings[0]):
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        return
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
    axes.fill_betweenx(positions, 0, density, color=SHADE, linewidth=0)
    axes.plot(density, positions, color=MUTED, linewidth=1.0)
    axes.set_xlim((1.08 * density.max(), 0) if mirrored else (0, 1.08 * density.max()))
    axes.set_xticks([density.max() / 2], [name])


def _whole_ticks(positions: npt.NDArray[np.float64]) -> list[int]:
    return list(range(math.ceil(positions[0]), math.floor(positions[-1]) + 1))


def _episodes_note(rates: Iterable[Rate]) -> str:
    rates = list(rates)
    seeds = [rate.seeds for rate in rates if isinstance(rate, SeedsRate)]
    single = [rate for rate in rates if isinstance(rate, SuccessRate)] + [one for several in seeds for one in several]
    counts = sorted({rate.episodes for rate in single})
    if not counts:
        return "Intervals: 95%."
    episodes = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if any(len(several) > 1 for several in seeds):
        return f"{episodes} episodes each seed; intervals: 95%, across seeds (of one policy Wilson)."
    return f"{episodes} episodes each; intervals: 95%, Wilson."
