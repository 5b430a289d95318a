"""Choosing a way to draw frames without a screen.

MuJoCo reads `MUJOCO_GL` when it is first imported, so the choice is made before that: EGL where its library loads, else
OSMesa, else a clear error that says what to install. A value that the user has set is left alone.
"""

from __future__ import annotations

import ctypes.util
import os

from counterflow.errors import RenderingError

HOW_TO_INSTALL = (
    "On Debian or Ubuntu: 'apt-get install libegl1 libgl1-mesa-dri' (EGL) or 'apt-get install libosmesa6' (OSMesa). "
    "Everything but videos and images works without."
)

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}


def available_backends() -> list[str]:
    """Return which of "egl" and "osmesa" have their library on this machine, best first."""
    return [backend for backend, library in _LIBRARIES.items() if ctypes.util.find_library(library)]


def choose_backend() -> str:
    """Set `MUJOCO_GL` (and `PYOPENGL_PLATFORM`) unless it is set already, and return the choice.

    Raises:
        RenderingError: no library for drawing without a screen was found.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if not chosen:
        backends = available_backends()
        if not backends:
            raise RenderingError(
                f"no library for drawing without a screen was found (looked for EGL and OSMesa). {HOW_TO_INSTALL}"
            )
        chosen = backends[0]
        os.environ["MUJOCO_GL"] = chosen
    if chosen in _LIBRARIES:
        os.environ.setdefault("PYOPENGL_PLATFORM", chosen)
    return chosen
