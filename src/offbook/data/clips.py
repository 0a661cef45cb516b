"""Clips: short videos as H.264 in MP4, which browsers play, through PyAV."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from offbook.errors import ConfigError, DataError
from offbook.runs.directory import atomic_path

_SIZE = "offbook size "


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """What is known of a clip without decoding it.

    Attributes:
        frames: number of frames T.
        height: in pixels, as it was written.
        width: in pixels, as it was written.
        fps: frames a second.
    """

    frames: int
    height: int
    width: int
    fps: float

    @property
    def seconds(self) -> float:
        """How long it plays."""
        return self.frames / self.fps


def write_clip(
    path: str | Path,
    frames: UInt8[np.ndarray, "time height width 3"] | Iterator[UInt8[np.ndarray, "height width 3"]],
    fps: float | int,
    *,
    crf: int = 18,
    key_every: int | None = None,
) -> None:
    """Writes frames as a clip that browsers play at once (yuv420p, index first); an old file is replaced atomically.

    The format halves the resolution of colour, so it needs even sizes: an odd edge is repeated once, and `read_clip`
    cuts it off again.

    Args:
        path: the file, ending in .mp4.
        frames: RGB, T of at least 1; of an iterator one is held at a time.
        fps: frames a second, above 0.
        crf: quality, from 0 (best) to 51; 18 is hard to tell from the original.
        key_every: frames from one key frame to the next; few make a larger file from which single frames are read
            faster. None leaves it to the encoder.

    Raises:
        ConfigError: a setting is out of its range.
        DataError: there are no frames.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_clip(Path(folder) / "grey.mp4", np.full((5, 33, 20, 3), 128, np.uint8), fps=10)
        ...     probe(Path(folder) / "grey.mp4")
        ClipInfo(frames=5, height=33, width=20, fps=10.0)
    """
    path = Path(path)
    if not fps > 0 or not 0 <= crf <= 51 or path.suffix != ".mp4":
        fix = "correct the one that is out of range"
        expected = "a name ending in .mp4, a positive rate and a quality of 0 to 51"
        raise ConfigError(f"clip {path}", expected=expected, got=f"rate {fps}, quality {crf}", fix=fix)
    pictures = iter(frames)
    first = next(pictures, None)
    if first is None or not first.size:
        raise DataError(f"clip {path}", expected="frames", got="none", fix="give one or more")
    height, width, _ = first.shape
    with atomic_path(path) as temporary, av.open(temporary, "w", "mp4", {"movflags": "+faststart"}) as container:
        container.metadata["comment"] = f"{_SIZE}{width}x{height}"
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        # The same frames give the same file on any machine: with one thread, and without a pass of x264's that reads
        # memory which nobody has written.
        stream.codec_context.thread_count = 1
        keys = {"g": str(key_every), "bf": "0"} if key_every else {}
        stream.options = {"crf": str(crf), "preset": "fast", "x264-params": "mbtree=0", **keys}
        edges, odd = ((0, height % 2), (0, width % 2), (0, 0)), height % 2 or width % 2
        for picture in itertools.chain([first], pictures):
            # Padding holds the interpreter, for which a control loop in another thread would wait; encoding does not.
            even = np.pad(picture, edges, mode="edge") if odd else np.ascontiguousarray(picture)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())


def read_clip(path: str | Path, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "time height width 3"]:
    """Decodes frames of a clip.

    Args:
        path: any video that FFmpeg decodes.
        start: first frame.
        stop: the frame after the last; None for the end.

    Returns:
        RGB frames; fewer than asked for where the clip is shorter.

    Raises:
        ConfigError: the range is not one.
        DataError: the file is missing, damaged or no video.
    """
    if start < 0 or (stop is not None and stop < start):
        raise ConfigError(f"clip {path}", expected="0 <= start <= stop", got=f"{start} to {stop}", fix="correct them")
    with opened(path) as container:
        stream = container.streams.video[0]
        info = _info(container, stream)
        ticks = 1 / (Fraction(stream.average_rate or 1) * Fraction(stream.time_base or 1))
        origin = stream.start_time or 0
        if start:
            container.seek(origin + int(start * ticks), stream=stream)
        numbered = ((round(((frame.pts or 0) - origin) / ticks), frame) for frame in container.decode(stream))
        wanted = itertools.takewhile(lambda x: stop is None or x[0] < stop, numbered)
        frames = list(pictures((frame for i, frame in wanted if i >= start), info.height, info.width))
    end = info.frames if stop is None else min(stop, info.frames)
    if len(frames) < end - start:
        raise _refusal(path, f"{len(frames)} frames where {end - start} should be")
    return np.stack(frames) if frames else np.zeros((0, info.height, info.width, 3), np.uint8)


def pictures(frames: Iterable[av.VideoFrame], height: int, width: int) -> Iterator[UInt8[np.ndarray, "..."]]:
    """Decoded frames in RGB, cut to a size. One converter for all: making one takes longer than using it."""
    converter = VideoReformatter()
    for frame in frames:
        yield converter.reformat(frame, format="rgb24", threads=1).to_ndarray()[:height, :width]


def probe(path: str | Path) -> ClipInfo:
    """Reads a clip's size and rate without decoding it.

    Raises:
        DataError: the file is missing, damaged or no video.
    """
    with opened(path) as container:
        return _info(container, container.streams.video[0])


def _info(container: av.container.InputContainer, stream: av.VideoStream) -> ClipInfo:
    width, height = stream.width, stream.height
    comment = container.metadata.get("comment", "")
    if comment.startswith(_SIZE):
        inner = tuple(int(n) for n in comment.removeprefix(_SIZE).split("x"))
        # Someone may have scaled the file and kept the comment.
        if inner[0] + inner[0] % 2 == width and inner[1] + inner[1] % 2 == height:
            width, height = inner[0], inner[1]
    return ClipInfo(frames=stream.frames, height=height, width=width, fps=float(stream.average_rate or 0))


def _refusal(path: str | Path, got: str) -> DataError:
    return DataError(str(path), expected="a video", got=got, fix="give an .mp4 file that is whole, or write it again")


@contextmanager
def opened(path: str | Path) -> Iterator[av.container.InputContainer]:
    """Opens a file that has pictures.

    Raises:
        DataError: the file is missing, damaged or no video; also where reading inside the block shows that.
    """
    if not Path(path).is_file():
        raise _refusal(path, "no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video or not container.streams.video[0].average_rate:
                raise _refusal(path, "a file without pictures")
            yield container
    except av.FFmpegError as error:
        raise _refusal(path, error.strerror or type(error).__name__) from error
