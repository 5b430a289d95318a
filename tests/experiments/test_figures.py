"""Figures say what the numbers say."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from PIL import Image

from counterflow.errors import InvalidInputError, StorageError
from counterflow.experiments.figures import (
    Marginals,
    RoundTrip,
    paths_1d,
    reversal_analysis,
    success_bars,
    success_curve,
)
from counterflow.experiments.statistics import SuccessRate
from counterflow.experiments.style import METHOD_COLOURS, OTHER_COLOURS

# What three kinds of colour blindness make of linear RGB (Machado, Oliveira and Fernandes, 2009, severity 1).
EYES = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)

RATES = {"base": SuccessRate(1, 20), "frs": SuccessRate(18, 20)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved while the test runs."""
    figures: list[Figure] = []
    save = Figure.savefig

    def watched(figure: Figure, *arguments: Any, **settings: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


def axes(figure: Figure) -> Axes:
    return figure.axes[0]


def test_bars_have_the_height_of_the_rate_and_their_interval(tmp_path: Path, drawn: list[Figure]) -> None:
    path = success_bars({"cube": RATES, "scene": {"frs": SuccessRate(5, 20)}}, tmp_path / "x.png")
    assert Image.open(path).format == "PNG"
    heights = sorted(patch.get_height() for patch in axes(drawn[0]).patches if hasattr(patch, "get_height"))
    assert heights == pytest.approx([5, 25, 90])
    words = " ".join(text.get_text() for text in drawn[0].findobj() if hasattr(text, "get_text"))
    assert "90" in words
    assert "20 episodes" in words


def test_a_curve_goes_through_its_points(tmp_path: Path, drawn: list[Figure]) -> None:
    line = {3.0: SuccessRate(2, 10), 5.0: SuccessRate(9, 10), 10.0: SuccessRate(5, 10)}
    success_curve({"frs": line}, tmp_path / "x.png", xlabel="K", scale="log", levels={"base": SuccessRate(1, 10)})
    assert any(
        np.allclose(one.get_xydata(), [[3, 20], [5, 90], [10, 50]])  # type: ignore[arg-type]
        for one in axes(drawn[0]).lines
        if len(one.get_xdata()) == 3  # type: ignore[arg-type]
    )


def test_settings_that_lie_too_near_get_round_numbers(tmp_path: Path, drawn: list[Figure]) -> None:
    half = SuccessRate(1, 2)
    success_curve(
        {"frs": {1499.0: half, 7491.0: half}, "base": {1500.0: half, 7474.0: half}}, tmp_path / "x.png", xlabel=""
    )
    success_curve({"frs": {1499.0: half, 7491.0: half}}, tmp_path / "y.png", xlabel="")
    round_ones, own = ([text.get_text() for text in axes(figure).get_xticklabels()] for figure in drawn)
    assert "4,500" in round_ones
    assert "1,499" not in round_ones
    assert own == ["1499", "7491"]


def test_the_analysis_shows_the_means(tmp_path: Path, drawn: list[Figure]) -> None:
    values = np.array([[3.0, 5.0], [1.0, 2.0]])
    reversal_analysis([3, 10], values, values * 10, tmp_path / "x.png")
    left, right = drawn[0].axes
    assert left.lines[0].get_ydata().tolist() == [4.0, 1.5]  # type: ignore[union-attr]
    assert right.lines[0].get_ydata().tolist() == [40.0, 15.0]  # type: ignore[union-attr]


def test_paths(tmp_path: Path) -> None:
    times = np.linspace(0, 1, 5)
    trip = RoundTrip(times[::-1], times, times, -times)
    marginals = Marginals(times, np.linspace(-1, 1, 9), np.ones((5, 9)))
    assert paths_1d({"K = 4": [trip]}, marginals, tmp_path / "x.png").stat().st_size > 5000


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (success_bars({"cube": RATES}, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == two


def lab(colour: str, eyes: Any) -> Any:
    """CIE L*a*b* of an sRGB colour as those eyes see it (its linear part near black left out)."""
    encoded = np.array(to_rgb(colour))
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(XYZ @ np.clip(eyes @ linear, 0, 1) / XYZ.sum(1))
    return np.array([116 * y, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("colours", [tuple(METHOD_COLOURS.values()), OTHER_COLOURS], ids=["methods", "others"])
def test_colours_can_be_told_apart(colours: tuple[str, ...], eyes: str) -> None:
    """A distance of 2 is just noticed side by side; bars and lines lie apart and need far more."""
    for one, other in itertools.combinations(colours, 2):
        assert np.linalg.norm(lab(one, EYES[eyes]) - lab(other, EYES[eyes])) > 20, (one, other)


def test_colours_that_come_again_are_marked(tmp_path: Path, drawn: list[Figure]) -> None:
    names = [f"method {index}" for index in range(len(OTHER_COLOURS) + 2)] + ["FRS"]
    success_bars({"cube": dict.fromkeys(names, SuccessRate(5, 20))}, tmp_path / "x.png")
    success_curve({name: {1.0: SuccessRate(5, 20)} for name in names}, tmp_path / "y.png", xlabel="K")
    bars = [(patch.get_facecolor(), patch.get_hatch()) for patch in axes(drawn[0]).patches]
    lines = [(line.get_color(), line.get_marker()) for line in axes(drawn[1]).lines]
    assert len(set(bars)) == len(set(lines)) == len(names)
    assert bars[-1] == (to_rgba(METHOD_COLOURS["frs"]), None)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no success rate"):
        success_bars({}, tmp_path / "x.png")
    with pytest.raises(InvalidInputError, match="logarithmic"):
        success_curve({"frs": {0.0: SuccessRate(1, 2)}}, tmp_path / "x.png", xlabel="K", scale="log")
    with pytest.raises(InvalidInputError, match="increasing"):
        reversal_analysis([5, 3], np.ones((2, 2)), np.ones((2, 2)), tmp_path / "x.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write"):
        success_bars({"cube": RATES}, tmp_path / "file" / "x.png")
