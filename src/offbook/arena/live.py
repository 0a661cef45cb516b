"""What a robot sees now, on its way to the arena: taken only while somebody looks at its page, see `pictures`."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbook.client.submit import ArenaClient
from offbook.errors import OffbookError

EVERY_SECONDS = 1.0
FRAME_BYTES, WIDTH = 256 * 1024, 480


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
