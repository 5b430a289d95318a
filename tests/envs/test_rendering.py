"""The choice of a drawing library, with and without one on the machine."""

import ctypes.util
import os
import subprocess
import sys
from typing import Any

import mujoco
import numpy as np
import pytest

from counterflow.envs import CameraView, RenderSettings
from counterflow.envs.rendering import asked_for, available_backends, drawing, hurry, prepare_backend, require_backend
from counterflow.errors import RenderingError


def test_without_any_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    assert available_backends() == []
    with pytest.raises(RenderingError, match="apt-get install libegl1"):
        require_backend()
    assert prepare_backend() is None
    assert "MUJOCO_GL" not in os.environ


def test_egl_comes_before_osmesa_and_a_users_choice_before_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so")
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "")
    assert prepare_backend() == "egl"
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert prepare_backend() == "osmesa"


def test_rendering_after_a_careless_import_of_mujoco_is_refused_rather_than_fatal() -> None:
    script = (
        "import mujoco; from counterflow.envs.ogbench import OGBenchEnv; from counterflow.envs import RenderSettings\n"
        "OGBenchEnv('ogbench/cube-single-task1', RenderSettings(32, 32))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "mujoco was imported before" in done.stderr


@pytest.mark.skipif(not available_backends(), reason="no library to draw with")
def test_a_process_that_made_data_can_still_draw() -> None:
    script = (
        "from counterflow.data.recipe import EpisodeMaker, Recipe\n"
        "from counterflow.envs import RenderSettings\n"
        "from counterflow.envs.ogbench import OGBenchEnv\n"
        "EpisodeMaker(Recipe.official('ogbench/cube-single', 'play', seed=0, episodes=1, validation_episodes=0))\n"
        "env = OGBenchEnv('ogbench/cube-single-task1', RenderSettings(32, 32))\n"
        "env.reset(0)\n"
        "assert env.render().std() > 0\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_projection_of_a_point_straight_ahead_and_one_behind() -> None:
    camera = CameraView(np.array([0.0, 0.0, 2.0]), np.eye(3), fovy=90.0, width=200, height=100)
    pixels = camera.project([[0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 3]])
    np.testing.assert_allclose(pixels[:3], [[100, 50], [150, 50], [100, 25]])
    assert np.isnan(pixels[3]).all()


def test_who_was_made_without_rendering_says_so() -> None:
    settings = RenderSettings(32, 32)
    assert asked_for(settings, "the maze") is settings
    with pytest.raises(RenderingError, match="the maze was made without rendering; pass"):
        asked_for(None, "the maze")


MUJOCOS_OWN = type("FatalError", (Exception,), {"__module__": "mujoco"})
OPENGLS_OWN = type("GLError", (Exception,), {"__module__": "OpenGL.error"})


@pytest.mark.parametrize("error", [ImportError, RuntimeError, AttributeError, MUJOCOS_OWN, OPENGLS_OWN])
def test_what_fails_while_drawing_says_what_to_install(error: type[Exception]) -> None:
    with (
        pytest.raises(RenderingError, match="the maze can't draw frames here: no context. On Debian"),
        drawing("the maze"),
    ):
        raise error("no context")
    with pytest.raises(ZeroDivisionError), drawing("the maze"):
        raise ZeroDivisionError


@pytest.mark.parametrize(("quality", "left"), [("fast", (0, 0)), ("dataset", (4096, 4))])
def test_only_the_fast_quality_leaves_out_shadows_and_multisampling(quality: Any, left: tuple[int, int]) -> None:
    model = mujoco.MjModel.from_xml_string("<mujoco/>")
    model.vis.quality.shadowsize, model.vis.quality.offsamples = 4096, 4
    hurry(model, RenderSettings(32, 32, quality=quality))
    assert (model.vis.quality.shadowsize, model.vis.quality.offsamples) == left
