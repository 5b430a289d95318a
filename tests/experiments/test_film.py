"""Filming the real simulator, and what is drawn into the frames."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

from counterflow.envs import CameraView, RenderSettings
from counterflow.errors import InvalidInputError, MissingDependencyError, StorageError
from counterflow.experiments.film import ARROW, HOLD, describe, film
from counterflow.experiments.rollout import Episode
from counterflow.experiments.video import Arrow, Panel, VideoWriter, compose, draw_overlays
from counterflow.reasoners import Direction

TASK = "ogbench/cube-single-task4"
# A camera on the negative y axis that looks along y: x is to the right, z up.
FRONT = CameraView(np.array([0.0, -1.0, 0.0]), np.array([[1.0, 0, 0], [0, 0, -1.0], [0, 1.0, 0]]), 45.0, 128, 128)


def grey(size: int = 128) -> Any:
    return np.full((size, size, 3), 90, np.uint8)


def test_an_episode_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides begin alike; the steered one gets an arrow; mp4 and GIF hold the same story."""
    shot: list[Episode] = []
    import counterflow.experiments.film as module

    run = module.run_episodes

    def watched(*arguments: Any, **settings: Any) -> list[Episode]:
        episodes = run(*arguments, **{**settings, "max_chunks": 4})
        shot.extend(episodes)
        return episodes

    monkeypatch.setattr(module, "run_episodes", watched)
    path = film(TASK, tmp_path / "x.mp4", gif=tmp_path / "x.gif", render=RenderSettings(128, 128), tries=1)
    frames = iio.imread(path)
    steered, alone = shot
    assert steered.seed == alone.seed
    assert len(steered.frames) == 21
    assert len(frames) == 21 + HOLD
    assert frames.shape[2] > 2 * 128
    assert np.array_equal(steered.frames[0], alone.frames[0])
    assert not np.array_equal(steered.frames[-1], alone.frames[-1])
    assert np.abs(steered.frames[-1].astype(int) - steered.frames[0].astype(int)).max() > 50
    loop = iio.imread(tmp_path / "x.gif")
    assert 3 <= len(loop) < len(frames) / 3
    assert (tmp_path / "x.gif").stat().st_size < 3_000_000


class TestArrow:
    def test_it_is_drawn_where_it_points(self) -> None:
        frame = grey()
        drawn = draw_overlays(Panel(frame, "frs", arrow=Arrow((30.0, 64.0), (90.0, 64.0))))
        changed = np.argwhere((drawn != frame).any(axis=2))
        assert 20 < changed[:, 1].min() < 40
        assert 80 < changed[:, 1].max() < 105
        assert np.abs(changed[:, 0] - 64).max() < 20

    def test_a_direction_is_projected_from_the_gripper(self) -> None:
        from counterflow.experiments.film import _arrow

        episode = Episode(0, moments=[np.zeros(3)])
        arrow = _arrow(Direction((0, 0, 1)), episode, 0, FRONT)
        assert arrow is not None
        assert arrow.start == pytest.approx((64, 64))
        assert arrow.end[0] == pytest.approx(64)
        assert arrow.end[1] == pytest.approx(64 - 64 / math.tan(math.radians(22.5)) * ARROW)
        away = _arrow(Direction((0, 1, 0)), episode, 0, FRONT)
        assert away is not None
        assert away.towards == pytest.approx(-1)
        assert _arrow(Direction(gripper="close"), episode, 0, FRONT) is None

    @pytest.mark.parametrize(
        ("direction", "words"),
        [
            (Direction((1, 0, 0)), "right"),
            (Direction((-1, 0, 0), 0.5, "open"), "left, less, gripper open"),
            (Direction((0, 0, -1), gripper="close"), "down, gripper close"),
            (Direction((0, 1, 0), gripper="hold"), "farther, hold"),
            (Direction((1, 0, 1)), "right and up"),
            (Direction(gripper="open"), "stay, gripper open"),
            (Direction(defer=True), "(defers)"),
        ],
    )
    def test_words_are_those_of_who_looks_through_the_camera(self, direction: Direction, words: str) -> None:
        assert describe(direction, FRONT) == words


class TestPanels:
    def test_status_and_gripper_are_drawn(self) -> None:
        plain = draw_overlays(Panel(grey(), "frs"))
        for panel in (Panel(grey(), "frs", status="success"), Panel(grey(), "frs", gripper="close")):
            assert (draw_overlays(panel) != plain).any()

    def test_frames_of_different_sizes_are_refused(self) -> None:
        with pytest.raises(InvalidInputError, match="one size"):
            compose([Panel(grey(128), "a"), Panel(grey(96), "b")])


class TestWriter:
    def test_a_failure_leaves_the_old_film(self, tmp_path: Path) -> None:
        path = tmp_path / "x.mp4"
        path.write_bytes(b"old")

        def interrupted() -> None:
            with VideoWriter(path) as writer:
                writer.write(grey())
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="can't write"), VideoWriter(tmp_path / "file" / "x.mp4") as writer:
            writer.write(grey())

    def test_no_ffmpeg(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
        with pytest.raises(MissingDependencyError, match="ffmpeg"), VideoWriter(tmp_path / "x.mp4") as writer:
            writer.write(grey())

    def test_unknown_endings(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match=r"\.mp4"):
            VideoWriter(tmp_path / "x.avi")
