"""Pictures of MuJoCo worlds without a screen: the one place that touches OpenGL.

Shadows and multisampling cost many times more than the pixels when a CPU draws them, so what a policy sees is drawn
"fast" (neither of the two) and only videos for people are drawn "fine" (shadows). The two look different: recordings
and evaluation must use the same quality, and do, since the quality is fixed here.
"""

import atexit
import ctypes.util
import os
import sys
import weakref
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from offbook.errors import ConfigError, needs_extra

Quality = Literal["fast", "fine"]

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa", "glfw": "glfw"}
_INSTALL = (
    "install OpenGL for machines without a screen (on Debian and Ubuntu: apt-get install libegl1 libegl-mesa0 "
    "libgl1-mesa-dri) and set MUJOCO_GL=egl"
)


def prepare_mujoco() -> Any:
    """Imports MuJoCo, having chosen the way it draws before the first import; every user of MuJoCo comes through here.

    Without MUJOCO_GL in the environment, Linux draws through EGL, else OSMesa; where neither library is installed
    drawing is switched off and only `Renderer` complains. What the user has set is left alone.

    Returns:
        The module `mujoco`.

    Raises:
        MissingExtraError: MuJoCo is not installed.
        ConfigError: MUJOCO_GL names a way to draw that this machine does not have.

    Example:
        >>> prepare_mujoco().__name__
        'mujoco'
    """
    if sys.platform == "linux" and "mujoco" not in sys.modules and not os.environ.get("MUJOCO_GL"):
        found = [name for name in ("egl", "osmesa") if ctypes.util.find_library(_LIBRARIES[name])]
        os.environ["MUJOCO_GL"] = found[0] if found else "disable"
    backend = os.environ.get("MUJOCO_GL", "")
    if backend == "osmesa":
        os.environ.setdefault("PYOPENGL_PLATFORM", "osmesa")
    try:
        with needs_extra("sim"):
            import mujoco
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise _no_graphics(f"{type(error).__name__}: {error}") from error
    return mujoco


def _no_graphics(got: str) -> ConfigError:
    backend = os.environ.get("MUJOCO_GL", "")
    first_line = got.strip().splitlines()[0][:120] if got.strip() else "nothing"
    return ConfigError(f"MUJOCO_GL={backend}", expected="a way to draw without a screen", got=first_line, fix=_INSTALL)


_open: "weakref.WeakSet[Renderer]" = weakref.WeakSet()


def _close_all() -> None:
    for renderer in list(_open):
        renderer.close()


def close_at_exit() -> None:
    """Has renderers that are still open closed at exit before any library loaded so far takes OpenGL down.

    Exit handlers run last one first, and MuJoCo's and dm_control's end OpenGL itself; what is freed after that prints
    tracebacks. Called whenever a renderer or an environment is made.
    """
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def _let_go() -> None:
    """Takes the context from this thread: it may be current in one thread at a time, and another may draw next."""
    egl = sys.modules.get("mujoco.egl")
    if egl is not None and egl.EGL_DISPLAY is not None:
        api = egl.EGL
        api.eglMakeCurrent(egl.EGL_DISPLAY, api.EGL_NO_SURFACE, api.EGL_NO_SURFACE, api.EGL_NO_CONTEXT)


class Renderer:
    """Draws one MuJoCo model at one size; from any thread, though not from two at the same time.

    Args:
        model: a `mujoco.MjModel`. Its quality settings are overwritten: a renderer reads them when it is made.
        height: rows of the picture.
        width: columns.
        quality: `"fast"` without shadows and multisampling, `"fine"` with shadows.

    Raises:
        ConfigError: this machine cannot draw; the message names MUJOCO_GL and the package to install.

    Example:
        >>> mujoco = prepare_mujoco()
        >>> model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><geom size="1"/></worldbody></mujoco>')
        >>> data = mujoco.MjData(model)
        >>> mujoco.mj_forward(model, data)
        >>> renderer = Renderer(model, 64, 64)
        >>> renderer.frame(data).shape
        (64, 64, 3)
        >>> renderer.close()
    """

    def __init__(self, model: Any, height: int, width: int, quality: Quality = "fast") -> None:
        mujoco = prepare_mujoco()
        if os.environ.get("MUJOCO_GL", "").lower() in ("disable", "disabled", "off", "false", "0"):
            raise _no_graphics("drawing switched off")
        fine = quality == "fine"
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 512 if fine else 0
        model.vis.quality.numslices = 24 if fine else 10
        model.vis.quality.numstacks = 16 if fine else 8
        # The whole buffer is cleared at each frame, whatever part of it is drawn on: no larger than the picture.
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        try:
            self._renderer = mujoco.Renderer(model, height, width)
        except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as error:
            raise _no_graphics(str(error)) from error
        _let_go()
        flags = self._renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = fine
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        _open.add(self)
        close_at_exit()

    def frame(self, data: Any, camera: str | int = -1) -> UInt8[np.ndarray, "height width 3"]:
        """A picture of the present state.

        Args:
            data: the `mujoco.MjData` of the model.
            camera: name or number of a camera; -1 is the free camera.
        """
        self._renderer.update_scene(data, camera)
        frame: np.ndarray = self._renderer.render()
        _let_go()
        return frame

    def close(self) -> None:
        """Frees the OpenGL context; may be called twice."""
        self._renderer.close()
        _open.discard(self)
