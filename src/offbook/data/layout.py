"""Where a store keeps what, byte by byte: paths, file heads, checks of files, and the checksum of an episode."""

import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from offbook.data.index import Index
from offbook.data.schema import DAMAGED, FieldSpec, Schema
from offbook.data.video import video_file
from offbook.errors import DataError


def disk_dtype(spec: FieldSpec) -> np.dtype[Any]:
    """A field's type with the byte order of the files, little-endian; a video's rows are integers."""
    return np.dtype("<i8") if spec.video else np.dtype(spec.dtype).newbyteorder("<")


def disk_shape(spec: FieldSpec) -> tuple[int, ...]:
    """The shape of one row in the file; a video's is the number of a file and a time stamp in it."""
    return (2,) if spec.video else spec.shape


def header(spec: FieldSpec, rows: int) -> bytes:
    """The head of an .npy file, of the same length for any number of rows (NumPy's format, version 1.0)."""
    shape = (rows, *disk_shape(spec))
    text = f"{{'descr': {disk_dtype(spec).str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    longest = len(text) - len(str(rows)) + 20
    size = -(-(10 + longest + 1) // 64) * 64
    body = text.ljust(size - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body.encode("latin1")


def offset(spec: FieldSpec, row: int) -> int:
    """Where in its file a row of a field begins, in bytes."""
    return len(header(spec, 0)) + row * math.prod(disk_shape(spec)) * disk_dtype(spec).itemsize


def field_file(path: Path, name: str) -> Path:
    """The file of a field's steps."""
    return path / "fields" / f"{quote(name, safe=' ')}.npy"


def final_file(path: Path, name: str) -> Path:
    """The file of an observation's last values."""
    return path / "final" / f"{quote(name, safe=' ')}.npy"


def video_folder(path: Path, name: str) -> Path:
    """Where the files of a field kept as video are."""
    return path / "video" / quote(name, safe=" ")


def films(path: Path, spec: FieldSpec, steps: int) -> set[int]:
    """The numbers of the video files of a field in which the first steps lie."""
    if not steps:
        return set()
    rows = np.fromfile(field_file(path, spec.name), disk_dtype(spec), 2 * steps, offset=offset(spec, 0))
    return set(np.unique(rows[::2]).tolist()) - {-1}


def orphans(folder: Path, used: set[int]) -> list[Path]:
    """The files in a folder of videos that are not among those of the given numbers, as a crash leaves them."""
    kept = {video_file(folder, number) for number in used}
    return [file for file in folder.glob("[.0-9][0-9]*.mp4") if file not in kept]


def data_files(path: Path, schema: Schema, index: Index) -> Iterator[tuple[str, Path, int]]:
    """The data files of a store: field, file, and how many rows are committed."""
    for spec in schema.fields:
        yield spec.name, field_file(path, spec.name), index.steps
        if spec.role == "observation":
            yield spec.name, final_file(path, spec.name), len(index)


def check_file(file: Path, spec: FieldSpec, rows: int) -> int:
    """Refuses a data file that has fewer rows than the index, or other values than the schema says.

    Returns:
        How many rows its head speaks of: those that were there when a writer last closed the store.
    """
    needed = offset(spec, rows)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(len(header(spec, 0)))
    except FileNotFoundError:
        if not rows:
            return 0
        raise DataError(str(file), expected=f"{needed} bytes", got="no file", fix=DAMAGED) from None
    if size < needed:
        raise DataError(str(file), expected=f"{needed} bytes for {rows} rows", got=f"{size} bytes", fix=DAMAGED)
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(head[8:]))
    except ValueError as error:
        raise DataError(str(file), expected="an .npy file", got="a damaged head", fix=DAMAGED) from error
    if dtype != disk_dtype(spec) or shape[1:] != disk_shape(spec):
        expected = f"{disk_dtype(spec).name} {disk_shape(spec)}"
        raise DataError(str(file), expected=expected, got=f"{dtype.name} {shape[1:]}", fix=DAMAGED)
    return int(shape[0])


def read_schema(path: Path) -> Schema:
    """The schema of a store's folder.

    Raises:
        DataError: the folder is no store, or is of a newer version.
    """
    file = path / "store.json"
    fix = "give the folder of a store, as `offbook data record` or `offbook data import` makes it"
    try:
        record = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        got = "no store.json in it" if path.is_dir() else "no such folder"
        raise DataError(str(path), expected="an episode store", got=got, fix=fix) from None
    except (ValueError, OSError) as error:
        raise DataError(str(file), expected="the schema of a store", got=str(error), fix=DAMAGED) from error
    if not isinstance(record, dict):
        raise DataError(str(file), expected="a JSON object", got=type(record).__name__, fix=DAMAGED)
    return Schema.from_json(record, str(file))


def as_bytes(values: np.ndarray, spec: FieldSpec) -> memoryview:
    """Values of a field as they stand in its file."""
    return np.ascontiguousarray(values, dtype=disk_dtype(spec)).reshape(-1).view(np.uint8).data


def file_sha256(path: Path) -> bytes:
    """The checksum of a whole file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def episode_sha256(
    schema: Schema, arrays: Mapping[str, np.ndarray | None], row: Mapping[str, Any], videos: Mapping[str, bytes]
) -> str:
    """What identifies an episode: its values and outcome, not its place in the store.

    Args:
        schema: of the store.
        arrays: values by field; of one kept as video, its rows on disk.
        row: its row of the index.
        videos: the checksum of its file, for each such field that it has.
    """
    facts = {key: value for key, value in row.items() if key not in ("start", "return", "sha256")}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for spec in schema.fields:
        values = arrays[spec.name]
        if values is not None and spec.video:
            digest.update(videos[spec.name])
            values = values[:, 1]
        if values is not None:
            digest.update(as_bytes(values, spec))
    return digest.hexdigest()
