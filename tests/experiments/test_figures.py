"""Figures say what the numbers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
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
