"""Filming the real simulator, and what is drawn into the frames."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

from counterflow.envs import CameraView, RenderSettings
from counterflow.envs import describe as describe_env
from counterflow.errors import InvalidInputError, MissingDependencyError, StorageError
from counterflow.experiments.film import ARROW, HOLD, describe, film
from counterflow.experiments.panels import Arrow, Panel, compose, draw_overlays, side_by_side
from counterflow.experiments.rollout import Episode
from counterflow.experiments.video import video_writer
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


def test_bad_settings_show_before_anything_is_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import counterflow.experiments.film as module

    def simulated(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("an environment was made")

    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(module, "make_env", simulated)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write"):
        film(TASK, tmp_path / "file" / "x.mp4")
    with pytest.raises(StorageError, match="can't write"):
        film(TASK, tmp_path / "x.mp4", gif=tmp_path / "file" / "x.gif")
    with pytest.raises(InvalidInputError, match="at least 64"):
        film(TASK, tmp_path / "x.mp4", render=RenderSettings(32, 32))
    with pytest.raises(InvalidInputError, match="tries is 0; expected an integer of at least 1"):
        film(TASK, tmp_path / "x.mp4", tries=0)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", missing)
    with pytest.raises(MissingDependencyError, match="ffmpeg"):
        film(TASK, tmp_path / "x.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class TestChoice:
    """Which of several episodes is filmed."""

    @pytest.mark.parametrize(
        ("steered", "alone", "chosen"),
        [
            ([False, True, True], [True, False], 2),  # the first that shows the difference
            ([False, True, True], [True, True], 1),  # none does: the first that the steered policy solves
            ([False, False, False], [], 0),  # none is solved: the first
        ],
    )
    def test_the_difference_is_looked_for(
        self, monkeypatch: pytest.MonkeyPatch, steered: list[bool], alone: list[bool], chosen: int
    ) -> None:
        import counterflow.experiments.film as module

        outcomes = iter([steered, alone])
        asked: list[list[int]] = []

        def played(_policy: Any, _env: Any, seeds: list[int], *_: Any, **__: Any) -> list[Episode]:
            asked.append(seeds)
            return [Episode(seed, success=won) for seed, won in zip(seeds, next(outcomes), strict=True)]

        monkeypatch.setattr(module, "make_env", lambda *arguments, **settings: nullcontext())
        monkeypatch.setattr(module, "run_episodes", played)
        prior = module.load_prior(TASK)
        seed = module._choose(TASK, prior, "frs", 0, 3, None, module.ReasonerSettings())
        assert seed == asked[0][chosen]


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

    def test_an_end_says_no_more_than_was_seen(self) -> None:
        """An episode that is shown no further has not failed."""
        from counterflow.experiments.film import _panels

        spec = describe_env(TASK)
        for steps, success, status in ((5, False, "unfinished"), (5, True, "success"), (200, False, "failure")):
            episode = Episode(0, success, steps, frames=[grey()] * (steps + 1), chunk_steps=[5] * (steps // 5))
            episode.directions = [Direction((1, 0, 0))] * len(episode.chunk_steps)
            episode.moments = [np.zeros(3)] * len(episode.chunk_steps)
            *before, last = _panels(episode, spec, FRONT, "frs")
            assert last.status == status
            assert {panel.status for panel in before} == {"running"}

    def test_the_shorter_episode_waits_for_the_longer(self) -> None:
        short = [Panel(grey(64), "base", step=1)]
        long = [Panel(np.full((64, 64, 3), level, np.uint8), "frs", step=1) for level in (10, 120, 230)]
        images = list(side_by_side([short, long], hold=2))
        assert len(images) == 5
        middle = images[0].shape[1] // 2
        assert all(np.array_equal(image[:, :middle], images[0][:, :middle]) for image in images)
        assert not np.array_equal(images[0], images[2])
        assert np.array_equal(images[2], images[4])


class TestWriter:
    def test_a_loop_keeps_our_colours_and_its_end(self, tmp_path: Path) -> None:
        """A palette made from the picture alone gives a small orange arrow to the red that covers more of it."""
        random = np.random.default_rng(0)
        noise = random.integers(0, 256, (200, 200, 3)).astype(np.uint8)
        orange = np.array([0xE4, 0x58, 0x0B], np.uint8)
        with video_writer(tmp_path / "x.gif") as write:
            for place in range(8):
                frame = noise.copy()
                frame[20:28, 20 * place : 20 * place + 8] = orange
                write(frame)
        loop = iio.imread(tmp_path / "x.gif")
        assert len(loop) == 5  # of eight, every second and the last
        assert np.array_equal(loop[-1][24, 144], orange)

    def test_a_frame_of_another_size_is_refused(self, tmp_path: Path) -> None:
        with video_writer(tmp_path / "x.gif") as write:
            write(grey(64))
            with pytest.raises(InvalidInputError, match="one size"):
                write(grey(80))
        (tmp_path / "x.gif").unlink()
        with pytest.raises(InvalidInputError, match="no frame"), video_writer(tmp_path / "x.gif"):
            pass
        assert not list(tmp_path.iterdir())

    def test_an_encoder_that_fails_is_noticed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a full disk: ffmpeg says so only as it ends."""
        program = tmp_path / "ffmpeg"
        program.write_text("#!/bin/sh\ncat > /dev/null\necho 'No space left on device' >&2\nexit 1\n")
        program.chmod(0o755)
        monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(program))
        path = tmp_path / "films" / "x.mp4"
        with pytest.raises(StorageError, match="No space left"), video_writer(path) as write:
            write(grey())
        assert not list(path.parent.iterdir())

    def test_a_failure_leaves_the_old_film(self, tmp_path: Path) -> None:
        path = tmp_path / "x.mp4"
        path.write_bytes(b"old")

        def interrupted() -> None:
            with video_writer(path) as write:
                write(grey())
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="can't write"), video_writer(tmp_path / "file" / "x.mp4") as write:
            write(grey())

    def test_no_ffmpeg(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
        with pytest.raises(MissingDependencyError, match="ffmpeg"), video_writer(tmp_path / "x.mp4") as write:
            write(grey())

    def test_unknown_endings(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match=r"\.mp4"):
            video_writer(tmp_path / "x.avi").__enter__()
