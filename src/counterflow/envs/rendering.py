"""Choosing a way to draw frames without a screen.

MuJoCo reads `MUJOCO_GL` when it is first imported, and with the wrong choice the first frame ends the whole process. So the
choice is made before that import, whether frames will be wanted or not: EGL where its library loads, else OSMesa. A value
that the user has set is left alone.
"""

from __future__ import annotations

import ctypes.util
import os
import sys

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
