"""Bounds on what reading a file of a stranger may cost, which follow from its size, and words for how it fails.

A file of a few bytes can speak of terabytes: values that were never written, streams that were compressed a million
times over, one array under a thousand names. Recordings of real use stay far below the bounds.
"""

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from offbook.errors import DataError

MAX_BYTES = 8 * 2**30
"""Most bytes that one array of one episode may have; more is a damaged file, or one made to fill the memory."""
MAX_CHUNK = 2**30
"""Most bytes of a chunk, the piece in which files are compressed, all of which is unpacked to read a single row."""
RATIO, FLOOR = 1000, 2**30
"""Recordings may grow to so many times the bytes of their files, and to `FLOOR` bytes more: pictures of simulators,
compressed well, come to some hundred times, and arrays of zeros to more."""
KEPT_FREE = 2**28
"""Bytes of the disk that an import leaves to others."""
AGAIN = "copy it again from where it came from"
_FAULTS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, SyntaxError),
    *(RuntimeError, AssertionError, EOFError, zlib.error, zipfile.BadZipFile),
)


@contextlib.contextmanager
def explained(where: str | Path, expected: str, fix: str = AGAIN) -> Iterator[None]:
    """Turns whatever a damaged file makes its reader raise into a sentence.

    Raises:
        DataError: the block raised something else.
    """
    from PIL import Image

    try:
        yield
    except (*_FAULTS, Image.DecompressionBombError) as error:
        text = f"{type(error).__name__} {error}".partition("\n")[0].strip()[:300]
        got = "no such file" if isinstance(error, FileNotFoundError) else text
        raise DataError(str(where), expected=expected, got=got, fix=fix) from error


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    with explained(path, "files that can be read"):
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file())


def check_growth(size: int, stored: int, where: str | Path) -> None:
    """Refuses what would be far larger in memory, or in a store, than in its files.

    Raises:
        DataError: `size` is beyond `FLOOR` bytes and `RATIO` times those that are `stored`.
    """
    if size > FLOOR + RATIO * stored:
        expected = f"at most {RATIO} times the {stored} bytes of its files, and {FLOOR} more"
        fix = f"{AGAIN}, or leave out what was declared and never written"
        raise DataError(str(where), expected=expected, got=f"{size} bytes when unpacked", fix=fix)


def check_arrays(arrays: Iterable[tuple[str, Any]], stored: int, where: str | Path) -> None:
    """Refuses arrays of HDF5 or Zarr that are far larger than their files, or whose chunks are too large.

    Args:
        arrays: with their names; one that is there under several names counts as often.
        stored: bytes of the files.
        where: the file.

    Raises:
        DataError: they are.
    """
    total, largest, most = 0, "", -1
    for name, array in arrays:
        size = math.prod(array.shape or ()) * array.dtype.itemsize
        chunk = math.prod(array.chunks or ()) * array.dtype.itemsize
        if chunk > MAX_CHUNK:
            got, fix = f"{chunk} bytes", "save it in smaller chunks"
            raise DataError(f"{where}, {name}", expected=f"chunks of at most {MAX_CHUNK} bytes", got=got, fix=fix)
        total += size
        if size > most:
            largest, most = name, size
    check_growth(total, stored, f"{where}, the largest of its arrays {largest}, of {most} bytes")
