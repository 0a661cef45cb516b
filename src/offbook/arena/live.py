"""What a robot sees now, for whoever looks at its page: taken only while somebody does, and kept nowhere."""

from __future__ import annotations

import io
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbook.client.submit import ArenaClient
from offbook.errors import OffbookError

LOOKED_SECONDS, FRESH_SECONDS, EVERY_SECONDS = 15.0, 10.0, 1.0
FRAME_BYTES, WIDTH = 256 * 1024, 480
_ROBOTS = 1000


class Gallery:
    """The newest picture of each robot at one server; its place is taken by the next one."""

    def __init__(self) -> None:
        self._frames: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._looked: OrderedDict[str, float] = OrderedDict()

    def look(self, robot: str) -> bytes | None:
        """The newest picture as JPEG, None when there is none of the last seconds; notes that somebody looks."""
        _keep(self._looked, robot, time.monotonic())
        taken, frame = self._frames.get(robot, (-FRESH_SECONDS, b""))
        return frame if time.monotonic() - taken < FRESH_SECONDS else None

    def watched(self, robot: str) -> bool:
        """Whether somebody looked in the last seconds, so that a picture is worth its cost."""
        return time.monotonic() - self._looked.get(robot, -LOOKED_SECONDS) < LOOKED_SECONDS

    def show(self, robot: str, frame: bytes) -> None:
        """Takes the next picture of a robot."""
        _keep(self._frames, robot, (time.monotonic(), frame))


def _keep(shelf: OrderedDict[str, Any], robot: str, what: Any) -> None:
    # Anybody may ask for any name: only so many are remembered, the latest.
    shelf[robot] = what
    shelf.move_to_end(robot)
    while len(shelf) > _ROBOTS:
        shelf.popitem(last=False)


class LiveCamera:
    """A worker's side: sends the newest picture once a second while it is watched, in a thread of its own.

    Args:
        arena: where it goes.
        lease: of the trial.
    """

    def __init__(self, arena: ArenaClient, lease: Mapping[str, Any]) -> None:
        self._arena, self._path = arena, f"/v1/trials/{lease['trial']}/frame?fence={lease['fence']}"
        self._newest: NDArray[np.uint8] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def watched(self) -> None:
        """Somebody looks: pictures go out from now on, to the end of the trial."""
        if self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._send, daemon=True)
            self._thread.start()

    def show(self, frame: NDArray[np.uint8]) -> None:
        """Takes the next picture; the control loop does not wait for anything here."""
        self._newest = frame

    def end(self) -> None:
        """No more pictures."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(EVERY_SECONDS)

    def _send(self) -> None:
        while True:
            frame, self._newest = self._newest, None
            if frame is not None:
                try:
                    headers = {"Content-Type": "image/jpeg"}
                    status, _ = self._arena.ask("POST", self._path, content=_jpeg(frame), headers=headers, timeout=2.0)
                except OffbookError:
                    status = 0
                if 400 <= status < 500:
                    return  # the lease is gone, or this arena shows no pictures
            if self._ended.wait(EVERY_SECONDS):
                return


def _jpeg(frame: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    picture, buffer = Image.fromarray(frame), io.BytesIO()
    picture.thumbnail((WIDTH, WIDTH))
    picture.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()
