"""Choosing a way to draw frames without a screen.

MuJoCo reads `MUJOCO_GL` when it is first imported, and with the wrong choice the first frame ends the whole process. So the
choice is made before that import, whether frames will be wanted or not: EGL where its library loads, else OSMesa. A value
that the user has set is left alone.
"""

from __future__ import annotations

import ctypes.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from counterflow.envs.types import RenderSettings
from counterflow.errors import RenderingError

HOW_TO_INSTALL = (
    "On Debian or Ubuntu: 'apt-get install libegl1 libgl1-mesa-dri' (EGL) or 'apt-get install libosmesa6' (OSMesa). "
    "Everything but videos and images works without."
)

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}


def available_backends() -> list[str]:
    """Return which of "egl" and "osmesa" have their library on this machine, best first."""
    return [backend for backend, library in _LIBRARIES.items() if ctypes.util.find_library(library)]


def prepare_backend() -> str | None:
    """Set `MUJOCO_GL` (and `PYOPENGL_PLATFORM`) to what this machine has; return the choice, None where there is none.

    Call it before the first import of mujoco. A value that is set already is kept.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower() or next(iter(available_backends()), None)
    if chosen is not None:
        os.environ["MUJOCO_GL"] = chosen
        if chosen in _LIBRARIES:
            os.environ["PYOPENGL_PLATFORM"] = os.environ.get("PYOPENGL_PLATFORM") or chosen
    return chosen


def require_backend() -> str:
    """Return the backend that frames will be drawn with.

    Raises:
        RenderingError: there is no library to draw with, or mujoco was imported before one was chosen.
    """
    chosen = prepare_backend()
    if chosen is None:
        raise RenderingError(
            f"no library for drawing without a screen was found (looked for EGL and OSMesa). {HOW_TO_INSTALL}"
        )
    context = sys.modules.get("mujoco.gl_context")
    loaded = getattr(getattr(context, "GLContext", None), "__module__", "")
    if loaded.endswith("glfw") and not os.environ.get("DISPLAY"):
        raise RenderingError(
            "mujoco was imported before a way to draw was chosen, and would now look for a screen that is not there. "
            f"Set MUJOCO_GL={chosen} in the environment, or import counterflow.envs and make the environment first."
        )
    return chosen


def asked_for(settings: RenderSettings | None, name: str) -> RenderSettings:
    """Return how an environment called `name` is to draw, or raise `RenderingError`: it was made without."""
    if settings is None:
        raise RenderingError(f"{name} was made without rendering; pass `render=RenderSettings(...)` to make_env.")
    return settings


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Say what to install where an environment called `name` fails to draw.

    Raises:
        RenderingError: what is done inside fails as drawing does.
    """
    try:
        yield
    except Exception as error:
        # MuJoCo's and PyOpenGL's own are plain exceptions, of classes that can't be imported where drawing does not work.
        kinds = (ImportError, RuntimeError, AttributeError)
        if isinstance(error, kinds) or type(error).__module__.split(".")[0] in ("mujoco", "OpenGL"):
            raise RenderingError(f"{name} can't draw frames here: {error}. {HOW_TO_INSTALL}") from error
        raise


def hurry(model: Any, settings: RenderSettings) -> None:
    """Leave out what costs ten times the rest in software, shadows and multisampling, unless quality was asked for.

    MuJoCo reads both when the context is made, so it has to be before the first frame.
    """
    if settings.quality == "fast":
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
