"""Pictures and films that tell nothing of where they come from.

A name, a date, a camera or an encoder inside a file would tell a rater what is on which side.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from offbook.data.clips import pictures, write_clip
from offbook.errors import DataError

PIXELS = 40_000_000
"""Largest picture; a film may have a quarter of that in each frame."""

SECONDS, FRAMES = 600.0, 20_000
"""Longest film."""

_FILMS = {
    # Other formats may name further files or addresses, which FFmpeg would then open on this machine.
    "format_whitelist": "mov,matroska",
    "protocol_whitelist": "file",
}
_SMALL = (48, 64)


def clean_image(source: Path, target: Path) -> dict[str, float]:
    """Writes a picture as PNG with nothing but its pixels, turned as its camera said.

    Args:
        source: PNG, JPEG or WebP.
        target: the file to write.

    Returns:
        Its features; none so far.

    Raises:
        DataError: it is damaged, too large or no such picture.
    """
    try:
        with Image.open(source, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > PIXELS:
                raise _refusal(source, f"at most {PIXELS} pixels", f"{image.width} x {image.height}")
            clear = "A" in image.getbands() or "transparency" in image.info
            pixels = ImageOps.exif_transpose(image)
            if pixels.mode.startswith("I"):  # 16 bits of grey, which conversion would cut off at 255
                pixels = Image.fromarray((np.asarray(pixels) >> 8).astype(np.uint8))
            pixels = pixels.convert("RGBA" if clear else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _refusal(source, "a PNG, JPEG or WebP picture", str(error) or type(error).__name__) from error
    # A new picture has none of the old one's texts, profiles and dates.
    bare = Image.new(pixels.mode, pixels.size)
    bare.paste(pixels)
    bare.save(target, "PNG")
    return {}


def clean_film(source: Path, target: Path) -> dict[str, float]:
    """Writes the pictures of a film as MP4 that browsers play: no sound, no metadata, no note of its encoder.

    An MP4 of H.264 with the usual colours is copied as it is but for such notes; all else is encoded anew.

    Args:
        source: MP4, MOV, MKV or WebM.
        target: the file to write, ending in .mp4.

    Returns:
        Its features: `seconds`, and `motion`, the mean squared change of brightness (0 to 1) a second.

    Raises:
        DataError: it is damaged, too large, too long or no such film.
    """
    try:
        if _check_film(source):
            _copy(source, target)
        else:
            with TemporaryDirectory(dir=target.parent) as folder:
                encoded = Path(folder) / "film.mp4"
                with av.open(str(source), options=_FILMS) as container:
                    stream = container.streams.video[0]
                    frames = pictures(_limited(source, container.decode(stream)), stream.height, stream.width)
                    write_clip(encoded, frames, float(stream.average_rate or 30))
                _copy(encoded, target)
        return _film_features(target)
    except av.FFmpegError as error:
        got = error.strerror or type(error).__name__
        raise _refusal(source, "an MP4, MOV, MKV or WebM film that is whole", got) from error


def _check_film(source: Path) -> bool:
    """Whether a film can be copied as it is; refuses what is too much."""
    with av.open(str(source), options=_FILMS) as container:
        if not container.streams.video:
            raise _refusal(source, "a film", "a file without pictures")
        stream = container.streams.video[0]
        if not 0 < stream.width * stream.height <= PIXELS // 4:
            raise _refusal(source, f"frames of at most {PIXELS // 4} pixels", f"{stream.width} x {stream.height}")
        if container.duration is not None and container.duration / av.time_base > SECONDS:
            raise _refusal(source, f"at most {SECONDS:g} s", f"{container.duration / av.time_base:.0f} s")
        codec = stream.codec_context
        return container.format.name.startswith("mov") and (codec.name, codec.pix_fmt) == ("h264", "yuv420p")


def _copy(source: Path, target: Path) -> None:
    """The same packets in a new file, without what encoders write about themselves (SEI, type 6)."""
    with (
        av.open(str(source), options=_FILMS) as old,
        av.open(str(target), "w", "mp4", {"movflags": "+faststart", "fflags": "+bitexact"}) as new,
    ):
        stream = old.streams.video[0]
        copied = new.add_stream_from_template(stream, opaque=True)
        copied.metadata.clear()
        bare = av.BitStreamFilterContext("filter_units=remove_types=6", stream, copied)
        for packet in old.demux(stream):
            for kept in bare.filter(packet if packet.size else None):
                kept.stream = copied
                new.mux(kept)


def _limited(source: Path, frames: Iterator[Any]) -> Iterator[Any]:
    for count, frame in enumerate(frames):
        if count >= FRAMES:
            raise _refusal(source, f"at most {FRAMES} frames", "more")
        yield frame


def _film_features(path: Path) -> dict[str, float]:
    height, width = _SMALL
    last, total, count = None, 0.0, 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        rate = float(stream.average_rate or 30)
        for frame in _limited(path, container.decode(stream)):
            small = frame.reformat(width, height, "gray").to_ndarray().astype(np.float32) / 255
            total += 0.0 if last is None else float(np.mean((small - last) ** 2))
            last, count = small, count + 1
    if last is None:
        raise _refusal(path, "a film", "no frame that can be decoded")
    return {"seconds": round(count / rate, 3), "motion": round(total / max(1, count - 1) * rate, 6)}


def _refusal(source: Path, expected: str, got: str) -> DataError:
    return DataError(source.name, expected=expected, got=got, fix="convert it, or give another file")
