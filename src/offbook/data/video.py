"""Cameras kept as video: episodes lie in H.264 files, and a window decodes the few frames that it needs.

Such a field has `video=True` in its `FieldSpec` and is read like any other: `store.field("front")[rows]` gives
pictures, and so do episodes and windows. On disk its rows are pairs (number of the file, time stamp of the frame in
it), in `fields/NAME.npy` and `final/NAME.npy` like the values of other fields; the files are `video/NAME/NUMBER.mp4`.
What identifies an episode is the SHA-256 of its file and its time stamps.

`Writer.append` takes either raw frames, which it encodes into a file of their own with a key frame every eighth frame
(H.264 loses a little), or a `Video`: frames of an existing file, which is copied as it is, once for all its episodes:

    writer.append({"front": Video(path="cam0.mp4", frames=np.arange(100, 151)), "action": ...}, ...)  # 50 steps

`frame_times` tells at which second each frame of a file is shown; `EpisodeStore.video` gives an episode's file back.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from offbook.data.schema import DAMAGED
from offbook.errors import DataError

# Decoded frames kept by each field of a store: with a few thousand frames of 64 x 64 pixels, all of them.
_CACHE_BYTES = 256 << 20
_OPEN_FILES = 16
# Setting a decoder to another place costs about as much as decoding so many frames.
_SEEK_FRAMES = 4


@dataclass(frozen=True, kw_only=True)
class Video:
    """Frames of a video file, in place of raw ones.

    Attributes:
        path: the file.
        frames: which of its frames, from 0 in the order in which they are shown; one for each value of the field, so
            T + 1 for an episode of T steps. A frame may be there twice.
    """

    path: Path
    frames: Int64[np.ndarray, " rows"]


def stamps(path: str | Path) -> tuple[Int64[np.ndarray, " frames"], float]:
    """The time stamps of all frames of a file in the order in which they are shown, and the seconds of one tick."""
    from offbook.data.clips import opened

    with opened(path) as container:
        stream = container.streams.video[0]
        found = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
        return np.sort(np.array(found, np.int64)), float(stream.time_base or 1)


def frame_times(path: str | Path) -> Float64[np.ndarray, " frames"]:
    """At which second each frame of a file is shown, from its first frame on.

    Raises:
        DataError: the file is missing, damaged or no video.
    """
    found, tick = stamps(path)
    return np.asarray((found - found[:1]) * tick)


def video_file(folder: Path, number: int) -> Path:
    """A file of the folder `video/NAME`."""
    return folder / f"{number:06}.mp4"


class _File:
    """One open file and where its decoder stands."""

    def __init__(self, path: Path) -> None:
        from offbook.data.clips import opened  # stores without video do not wait for PyAV

        self.path = path
        self._exit = opened(path)
        self._container = self._exit.__enter__()
        self._stream = self._container.streams.video[0]
        # Waking threads for a few small frames takes longer than decoding them.
        self._stream.codec_context.thread_count = 1
        keys = [entry.timestamp for entry in self._stream.index_entries if entry.is_keyframe]
        self._keys = np.array(keys or [0], np.int64)
        self._skip = _SEEK_FRAMES / float((self._stream.average_rate or 1) * (self._stream.time_base or 1))
        self._frames: Iterator[Any] = iter(())
        self._stands: int | None = None

    def close(self) -> None:
        self._exit.__exit__(None, None, None)

    def decode(self, wanted: Int64[np.ndarray, " frames"]) -> Iterator[Any]:
        """The frames of ascending time stamps; neighbours are decoded in one go.

        Raises:
            DataError: the file has no frame with such a stamp.
        """
        import av

        try:
            for target in wanted.tolist():
                yield self._one(target)
        except av.FFmpegError as error:
            self._stands = None
            raise self._refusal(error.strerror or type(error).__name__) from error

    def _one(self, target: int) -> Any:
        key = max(int(np.searchsorted(self._keys, target, "right")) - 1, 0)
        if self._stands is None or target <= self._stands or self._keys[key] - self._stands > self._skip:
            frame = self._begin(key)
            # The index knows when key frames are decoded, which may be before others that are shown earlier.
            while frame is not None and (frame.pts or 0) > target and key > 0:
                key -= 1
                frame = self._begin(key)
        else:
            frame = next(self._frames, None)
        while frame is not None and (frame.pts or 0) < target:
            frame = next(self._frames, None)
        if frame is None or frame.pts != target:
            self._stands = None
            raise self._refusal(f"no frame at time stamp {target}")
        self._stands = target
        return frame

    def _begin(self, key: int) -> Any:
        self._container.seek(int(self._keys[key]), stream=self._stream)
        self._frames = self._container.decode(self._stream)
        return next(self._frames, None)

    def _refusal(self, got: str) -> DataError:
        return DataError(str(self.path), expected="the frames that the store speaks of", got=got, fix=DAMAGED)


class VideoFrames:
    """The values of a camera kept as video, decoded where they are asked for.

    Indexed like an array of shape (rows, H, W, 3), by rows alone: a number, a slice, an array of numbers of any shape.
    Frames of one file are decoded in the order of the file, each stretch in one go, and the frames used last are kept,
    up to 256 MiB. Several threads may read.

    Args:
        folder: where the files are.
        rows: file and time stamp of each frame, shape (rows, 2); a file of -1 is a frame that was not recorded: black.
        shape: height, width and 3.
    """

    def __init__(self, folder: Path, rows: Int64[np.ndarray, "rows 2"], shape: tuple[int, ...]) -> None:
        self._folder, self._rows = folder, rows
        self.shape, self.dtype, self.ndim = (len(rows), *shape), np.dtype(np.uint8), 1 + len(shape)
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock, self._process = Lock(), os.getpid()
        self._numbers, self._places = np.arange(len(rows)), max(1, _CACHE_BYTES // int(np.prod(shape)))
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getitem__(
        self, index: int | np.integer[Any] | slice | Sequence[int] | np.ndarray
    ) -> UInt8[np.ndarray, "..."]:
        if isinstance(index, tuple):
            raise IndexError("a video is indexed by rows alone: take [rows] first, and the rest of the pictures")
        asked = np.asarray(self._numbers[index])
        rows, back = np.unique(asked, return_inverse=True)
        with self._lock:
            frames = self._read(rows)
        whole: np.ndarray = frames[back.reshape(-1)].reshape(*asked.shape, *self.shape[1:])
        return whole

    def _read(self, rows: Int64[np.ndarray, " rows"]) -> UInt8[np.ndarray, "rows height width 3"]:
        """Different rows in ascending order."""
        if self._process != os.getpid():
            # A fork shares open files with its parent, and where they stand.
            self._files, self._process = OrderedDict(), os.getpid()
        frames = np.empty((len(rows), *self.shape[1:]), np.uint8)
        new = []
        for i, row in enumerate(rows.tolist()):
            if row in self._kept:
                self._kept.move_to_end(row)
                frames[i] = self._kept[row]
            else:
                new.append(i)
        if new:
            self._decode(rows[new], np.array(new), frames)
            for i in new[-self._places :]:
                self._kept[int(rows[i])] = frames[i].copy()
            while len(self._kept) > self._places:
                self._kept.popitem(last=False)
        return frames

    def _decode(self, rows: np.ndarray, to: np.ndarray, frames: np.ndarray) -> None:
        from offbook.data.clips import pictures

        file, stamp = np.asarray(self._rows[rows]).T
        order = np.lexsort((stamp, file))
        for number in np.unique(file).tolist():
            chosen = order[file[order] == number]
            if number < 0:
                frames[to[chosen]] = 0
                continue
            times, first = np.unique(stamp[chosen], return_inverse=True)
            height, width = self.shape[1:3]
            for k, picture in enumerate(pictures(self._file(number).decode(times), height, width)):
                frames[to[chosen[first == k]]] = picture

    def _file(self, number: int) -> _File:
        if number not in self._files:
            while len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[number] = _File(video_file(self._folder, number))
        self._files.move_to_end(number)
        return self._files[number]
