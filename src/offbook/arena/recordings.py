"""What is kept of a run: a film, a Parquet file of every step, and a manifest that names both by their hashes."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offbook.data.clips import write_clip

if TYPE_CHECKING:
    from offbook.robots.base import RobotSpec
    from offbook.robots.trial import TrialRecord

WAITING_FRAMES, PATIENCE_S = 64, 10.0
EPISODE, MANIFEST = "episode.parquet", "manifest.json"
CAMERA = "scene"
"""The name of the film's camera: the robot's own picture for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """A file that goes to the arena.

    Attributes:
        name: its label, such as `episode.parquet`.
        media_type: what it is.
        content: its bytes.
    """

    name: str
    media_type: str
    content: bytes

    @property
    def reference(self) -> dict[str, Any]:
        """How a result names it: `{name, sha256, media_type, size}`."""
        return {
            "name": self.name,
            "sha256": hashlib.sha256(self.content).hexdigest(),
            "media_type": self.media_type,
            "size": len(self.content),
        }


class Film:
    """The film of one trial, encoded in a thread while it is played: only the few pictures that wait are in memory.

    Args:
        path: where it is written, ending in .mp4.
        rate: pictures a second.
        patient: whether a full queue may hold up who adds (a simulator); else the picture is left out.
    """

    def __init__(self, path: Path, rate: float, *, patient: bool) -> None:
        self.path, self.left_out = path, 0
        self._rate, self._patient = rate, patient
        self._poster: NDArray[np.uint8] | None = None
        self._error: Exception | None = None
        self._waiting: queue.Queue[NDArray[np.uint8] | None] = queue.Queue(WAITING_FRAMES)
        self._thread = threading.Thread(target=self._encode, daemon=True)
        self._thread.start()

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Takes the next picture."""
        self._poster = frame if self._poster is None else self._poster
        try:
            self._waiting.put(frame, block=self._patient, timeout=PATIENCE_S)
        except queue.Full:
            self.left_out += 1

    def close(self) -> None:
        """Ends the film; the file is whole then, unless it failed."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def files(self) -> list[Recording]:
        """Film and poster; none when there was no picture.

        Raises:
            OSError: the film could not be written.
        """
        self.close()
        if self._error is not None:
            raise OSError(f"the film could not be written: {self._error}") from self._error
        if self._poster is None:
            return []
        from PIL import Image

        poster = io.BytesIO()
        Image.fromarray(self._poster).save(poster, "JPEG", quality=85)
        return [
            Recording(name=f"video-{CAMERA}.mp4", media_type="video/mp4", content=self.path.read_bytes()),
            Recording(name=f"poster-{CAMERA}.jpg", media_type="image/jpeg", content=poster.getvalue()),
        ]

    def _frames(self) -> Iterator[NDArray[np.uint8]]:
        while (frame := self._waiting.get()) is not None:
            yield frame

    def _encode(self) -> None:
        frames = self._frames()
        try:
            first = next(frames, None)
            if first is not None:
                write_clip(self.path, itertools.chain([first], frames), self._rate)
        except Exception as error:  # told by `files`; what still comes must not wait for a reader
            self._error = error
            for _ in frames:
                pass


def recordings_of(record: TrialRecord, spec: RobotSpec, film: Film) -> list[Recording]:
    """The files of one trial, the manifest last.

    Args:
        record: the trial.
        spec: of the robot that played it.
        film: what took its pictures.
    """
    files = film.files()
    if record.steps:
        content = _episode(record)
        files.append(Recording(name=EPISODE, media_type="application/vnd.apache.parquet", content=content))
    told = _manifest(record, spec, files) | {"frames_left_out": film.left_out}
    manifest = json.dumps(told, allow_nan=False, sort_keys=True).encode()
    return [*files, Recording(name=MANIFEST, media_type="application/json", content=manifest)]


def _episode(record: TrialRecord) -> bytes:
    """One row for each control step."""

    def vectors(array: np.ndarray[Any, Any]) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])

    table = pa.table(
        {
            "time": record.time,
            "state": vectors(record.state),
            "action": vectors(record.action),
            "reward": record.reward,
            "late": record.late,
            "latency_ms": record.latency_ms,
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _manifest(record: TrialRecord, spec: RobotSpec, files: list[Recording]) -> dict[str, Any]:
    return {
        "format": 1,
        "robot": spec.name,
        "rate_hz": spec.rate_hz,
        "state": [list(part) for part in spec.observation.state],
        "action": spec.action.size,
        "seed": record.seed,
        "scene": record.scene,
        "outcome": record.outcome,
        "reason": record.reason,
        "steps": record.steps,
        "clipped": dict(record.clipped),
        "refused": record.refused,
        "traces": {
            "time": _numbers(record.time),
            "reward": _numbers(record.reward),
            "latency_ms": _numbers(record.latency_ms),
            "late": record.late.tolist(),
        },
        "events": [{"time": event.time, "kind": event.kind, "text": event.text} for event in record.events],
        "files": [file.reference for file in files],
    }


def _numbers(values: np.ndarray[Any, Any]) -> list[float | None]:
    return [round(value, 6) if math.isfinite(value) else None for value in values.tolist()]


def capabilities(spec: RobotSpec) -> Mapping[str, Any]:
    """What the arena is told of a robot; JSON knows no infinity, so that unbounded actions get the largest number."""

    def finite(values: tuple[float, ...]) -> list[float]:
        return [float(np.clip(value, -1e300, 1e300)) for value in values]

    action = spec.action
    return {
        "kind": "simulated" if spec.simulated else "real",
        "name": spec.name,
        "rate_hz": spec.rate_hz,
        "max_steps": spec.max_steps,
        "observation": {
            "state": [list(part) for part in spec.observation.state],
            "cameras": {camera: list(size) for camera, size in spec.observation.cameras.items()},
        },
        "action": {
            "size": action.size,
            "low": finite(action.low),
            "high": finite(action.high),
            "choices": action.choices,
        },
    }
