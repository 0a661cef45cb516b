"""How pictures come into the video files of a store: encoded, or copied as they are."""

import filecmp
import shutil
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from offbook.data.clips import probe, write_clip
from offbook.data.layout import file_sha256, orphans
from offbook.data.schema import FieldSpec
from offbook.data.video import Video, stamps, video_file
from offbook.errors import DataError
from offbook.runs.directory import atomic_path

# Of two neighbouring key frames; the file grows, and a window decodes at most seven frames that it does not need.
_KEY_EVERY = 8
_RATE = 30.0


class Filming:
    """Adds episodes to the video files of one field.

    Args:
        folder: where the files are.
        spec: the field.
        rate: frames a second; None when unknown.
        used: numbers of the files in which episodes lie; others, which a crash left, are removed.

    Attributes:
        number: of the next file.
    """

    def __init__(self, folder: Path, spec: FieldSpec, rate: float | None, used: set[int]) -> None:
        self._folder, self._spec, self._rate, self.number = folder, spec, rate or _RATE, max(used, default=-1) + 1
        for file in orphans(folder, used):
            file.unlink()
        self._copied: dict[tuple[Path, int, int], tuple[int, Int64[np.ndarray, " frames"], bytes]] = {}

    def add(self, values: np.ndarray | Video, where: str) -> tuple[Int64[np.ndarray, "rows 2"], bytes]:
        """Puts an episode's frames on the disk, durably.

        Returns:
            The rows of the field, and the checksum of the file.

        Raises:
            DataError: a given file is no video of the right size, or has no such frames.
        """
        if isinstance(values, Video):
            number, shown, checksum = self._copy(values, where)
            if len(values.frames) and not 0 <= values.frames.min() <= values.frames.max() < len(shown):
                got = f"frames {values.frames.min()} to {values.frames.max()}"
                fix = "count from 0, in the order in which they are shown"
                raise DataError(where, expected=f"frames of the {len(shown)} in {values.path}", got=got, fix=fix)
            shown = shown[values.frames]
        else:
            number, file = self.number, video_file(self._folder, self.number)
            write_clip(file, values, self._rate, key_every=_KEY_EVERY)
            self.number += 1
            (shown, _), checksum = stamps(file), file_sha256(file)
        return np.stack([np.full(len(shown), number, np.int64), shown], axis=1), checksum

    def remove_from(self, number: int) -> None:
        """Removes the files from a number on, of which the episodes came to nothing; the next file has that number."""
        for made in range(number, self.number + 1):
            with suppress(OSError):
                video_file(self._folder, made).unlink(missing_ok=True)
        self.number = number
        self._copied = {known: copy for known, copy in self._copied.items() if copy[0] < number}

    @cached_property
    def _sizes(self) -> dict[Path, int]:
        """Those of the files that were there before this writer copied any."""
        return {file: file.stat().st_size for file in self._folder.glob("[0-9]*.mp4")}

    def _copy(self, video: Video, where: str) -> tuple[int, Int64[np.ndarray, " frames"], bytes]:
        """Number, time stamps and checksum of the store's copy of a file."""
        info = probe(video.path)
        if (info.height, info.width) != self._spec.shape[:2]:
            got = f"{info.height} x {info.width} in {video.path}"
            fix = "give the size in the schema, or scale the video"
            raise DataError(where, expected="pictures of {} x {}".format(*self._spec.shape[:2]), got=got, fix=fix)
        about = video.path.stat()
        known = (video.path.resolve(), about.st_size, about.st_mtime_ns)
        if known not in self._copied:
            alike = (file for file, size in self._sizes.items() if size == about.st_size)
            file = next((file for file in alike if filecmp.cmp(file, video.path, shallow=False)), None)
            if file is None:
                file = video_file(self._folder, self.number)
                with atomic_path(file) as temporary:
                    shutil.copyfile(video.path, temporary)
                self.number += 1
            self._copied[known] = int(file.stem), stamps(file)[0], file_sha256(file)
        return self._copied[known]
