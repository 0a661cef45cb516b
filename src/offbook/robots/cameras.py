"""Cameras of real robots, through PyAV: USB cameras, network cameras, and recordings that stand in for them."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from offbook.errors import ConfigError, RobotError

STALE_S = 1.0
"""A picture older than this is no picture of now: the camera counts as lost."""


@dataclass(frozen=True, kw_only=True)
class CameraSettings:
    """One camera of a cell.

    Attributes:
        source: device, address or file, such as `/dev/video0` or `rtsp://10.0.0.7/stream`.
        size: height and width of the pictures that policies see, pixels; the camera's own are scaled to it.
        format: of the source as FFmpeg names it, `v4l2` for `/dev/video0`; found out by itself when empty.
        options: further ones for FFmpeg, such as `{"video_size": "1280x720", "framerate": "30"}`.
    """

    source: str
    size: tuple[int, int]
    format: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


class Camera:
    """The newest picture of a camera, which a thread of its own keeps reading.

    Args:
        name: of the camera, for messages.
        settings: where it is.

    Raises:
        RobotError: it cannot be opened.
    """

    def __init__(self, name: str, settings: CameraSettings) -> None:
        self._name, self._settings = f"camera {name!r} at {settings.source}", settings
        self._newest: tuple[float, NDArray[np.uint8]] | None = None
        self._lost, self._closing = "", threading.Event()
        self._came = threading.Condition()
        try:
            self._container = av.open(
                settings.source, format=settings.format or None, options=dict(settings.options), timeout=5.0
            )
            self._stream = self._container.streams.video[0]
        except (OSError, ValueError, IndexError, av.FFmpegError) as error:
            raise self._fault(f"{type(error).__name__}: {error}", "check the source and its format") from error
        self._thread = threading.Thread(target=self._read, name="offbook-camera", daemon=True)
        self._thread.start()

    def latest(self) -> NDArray[np.uint8]:
        """The newest picture, (H, W, 3) RGB; waits for the first one.

        Raises:
            RobotError: there is none that is fresh.
        """
        with self._came:
            self._came.wait_for(lambda: self._newest is not None or self._lost, timeout=5 * STALE_S)
            newest, lost = self._newest, self._lost
        age = time.monotonic() - newest[0] if newest else np.inf
        if newest is None or age > STALE_S:
            got = lost or (f"one {age:.1f} s old" if newest else "none")
            raise self._fault(got, "check the camera and its cable")
        return newest[1]

    def close(self) -> None:
        """Ends the reading; may be called twice."""
        self._closing.set()
        self._thread.join(2 * STALE_S)

    def _read(self) -> None:
        height, width = self._settings.size
        try:
            for frame in self._container.decode(self._stream):
                picture = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
                with self._came:
                    self._newest = (time.monotonic(), picture.astype(np.uint8, copy=False))
                    self._came.notify_all()
                if self._closing.is_set():
                    break
            self._lost = "the end of its pictures"
        except (OSError, ValueError, av.FFmpegError) as error:
            self._lost = f"{type(error).__name__}: {error}"
        finally:
            self._container.close()
            with self._came:
                self._came.notify_all()

    def _fault(self, got: str, fix: str) -> RobotError:
        return RobotError(self._name, expected="a picture of now", got=got, fix=fix)


def open_cameras(wanted: Mapping[str, CameraSettings]) -> dict[str, Camera]:
    """Opens all cameras or none.

    Raises:
        RobotError: one cannot be opened.
    """
    opened: dict[str, Camera] = {}
    try:
        for name, settings in wanted.items():
            opened[name] = Camera(name, settings)
    except RobotError:
        for camera in opened.values():
            camera.close()
        raise
    return opened


def camera_settings(record: Mapping[str, Mapping[str, Any]]) -> dict[str, CameraSettings]:
    """Cameras as a file of settings describes them.

    Raises:
        ConfigError: an entry is missing, unknown or of the wrong type.

    Example:
        >>> camera_settings({"front": {"source": "/dev/video0", "format": "v4l2", "size": [224, 224]}})["front"].size
        (224, 224)
    """
    made = {}
    for name, entries in record.items():
        try:
            height, width = map(int, entries["size"])
            made[name] = CameraSettings(**{**entries, "size": (height, width)})
        except (KeyError, TypeError, ValueError) as error:
            expected = "source, size [height, width], and perhaps format and options"
            got = f"{type(error).__name__} {error}"
            raise ConfigError(f"camera {name!r}", expected=expected, got=got, fix="correct its settings") from error
    return made
