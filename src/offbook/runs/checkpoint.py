"""Checkpoints: one safetensors file with a versioned JSON record in its header. Never pickle.

The file is an ordinary safetensors file, readable by any tool of that format. Its metadata has the one key `offbook`,
whose value is the JSON object `{"format": 1, "kind": KIND, "record": {...}}`. Readers keep one older format beside the
newest; format 1 is the first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offbook.errors import CheckpointError
from offbook.runs.directory import atomic_path

if TYPE_CHECKING:
    import numpy as np
    import torch

FORMAT = 1
MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 16

_KEY = "offbook"
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
MAGIC = {
    b"PK\x03\x04": "a zip file, as torch.save writes (pickle inside)",
    b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04": "a pickle", b"\x80\x05": "a pickle",
    b"\x89HDF": "an HDF5 file", b"\x1f\x8b": "a gzip file",
}  # fmt: skip
"""By their first bytes, the kinds of file that are taken for checkpoints and are none."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What the header says of one tensor: its safetensors type name, such as `"F32"`, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Header:
    """A checkpoint without its numbers.

    Attributes:
        kind: what wrote it, such as `"bc"`; decides who may read it.
        record: JSON types that the kind defines.
        tensors: type and shape by name.
        size: length of the whole file in bytes.
    """

    kind: str
    record: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    size: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Header):
    """A checkpoint with its numbers: `values` holds a CPU tensor for each name."""

    values: Mapping[str, torch.Tensor] = field(repr=False)


def save_checkpoint(
    path: Path | str, kind: str, tensors: Mapping[str, torch.Tensor | np.ndarray], record: Mapping[str, Any]
) -> None:
    """Writes a checkpoint atomically: a crash leaves the previous file or the whole new one.

    Args:
        path: the file, `*.safetensors` by custom.
        kind: what can read it back, such as `"bc"`.
        tensors: torch tensors on any device, or arrays; those that share memory are stored separately.
        record: JSON types; everything else that a reader needs to rebuild the model.

    Raises:
        CheckpointError: the record is too large for a header, or no JSON.

    Example:
        >>> import numpy as np
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/a.safetensors", "demo", {"w": np.zeros(3, np.float32)}, {"width": 3})
        ...     read_header(f"{folder}/a.safetensors").tensors["w"]
        TensorInfo(dtype='F32', shape=(3,))
    """
    import numpy as np

    path = Path(path)
    try:
        text = json.dumps({"format": FORMAT, "kind": kind, "record": dict(record)}, sort_keys=True)
    except (TypeError, ValueError) as error:
        fix = "put JSON types only into the record"
        raise CheckpointError(str(path), expected="a record of JSON types", got=str(error), fix=fix) from error
    # Names, types and offsets of the tensors take their share of the header as well.
    if len(text) + sum(len(name) + 120 for name in tensors) > MAX_HEADER_BYTES:
        fix = "move arrays out of the record into tensors"
        raise CheckpointError(str(path), expected="a header below 8 MiB", got=f"{len(text)} bytes", fix=fix)
    with atomic_path(path) as temporary:
        if all(isinstance(value, np.ndarray) for value in tensors.values()):
            from safetensors.numpy import save_file as save_arrays

            arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
            save_arrays(arrays, str(temporary), metadata={_KEY: text})
        else:
            from safetensors.torch import save_file as save_tensors

            save_tensors(_separate(tensors), str(temporary), metadata={_KEY: text})


def _separate(tensors: Mapping[str, torch.Tensor | np.ndarray]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors, no two of which share memory (tied weights do; the format forbids it)."""
    import numpy as np
    import torch

    seen, separate = set[int](), dict[str, torch.Tensor]()
    for name, value in tensors.items():
        tensor = torch.from_numpy(np.asarray(value, order="C")) if isinstance(value, np.ndarray) else value
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def load_checkpoint(path: Path | str, kind: str | None = None) -> Checkpoint:
    """Reads a checkpoint whose header `read_header` has approved; the tensors come to the CPU.

    Args:
        path: the file.
        kind: the kind that the caller can use, or None for any.

    Raises:
        CheckpointError: see `read_header`; or the kind is another.
    """
    header = read_header(path)
    if kind is not None and header.kind != kind:
        fix = f"give a checkpoint of kind {kind!r}, or use the command for {header.kind!r}"
        raise CheckpointError(str(path), expected=f"kind {kind!r}", got=f"kind {header.kind!r}", fix=fix)
    from safetensors.torch import load_file

    return Checkpoint(**vars(header), values=load_file(str(path)))


def read_header(path: Path | str) -> Header:
    """Reads and checks everything but the numbers: no torch, and no allocation larger than 8 MiB of header.

    Safe for a stranger's file. The shapes are checked against the file's true length before anyone allocates them.

    Raises:
        CheckpointError: no file; a pickle or other foreign format; truncated; a format from the future; inconsistent.
    """
    path = Path(path)
    header, data, size = _read_header(path)
    kind, record = _record(path, header.pop("__metadata__", None))
    return Header(kind=kind, record=record, tensors=_tensors(path, header, data, size), size=size)


def read_tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """Type and shape by name of what is in any safetensors file, checked as by `read_header`.

    Raises:
        CheckpointError: see `read_header`.
    """
    header, data, size = _read_header(path)
    header.pop("__metadata__", None)
    return _tensors(path, header, data, size)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begins, and the length of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            _refuse_foreign(path, start)
            length = int.from_bytes(start, "little")
            _expect(path, 2 <= length <= MAX_HEADER_BYTES, "a header of 2 bytes to 8 MiB", f"{length} bytes")
            if size < 8 + length:
                raise _truncated(path, 8 + length, size)
            raw = file.read(length)
    except OSError as error:
        fix = "check the path"
        raise CheckpointError(str(path), expected="a file", got=error.strerror or "none", fix=fix) from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        got = f"one that cannot be read ({type(error).__name__})"
        raise _damaged(path, "a JSON header", got) from error
    _expect(path, isinstance(header, dict), "a JSON object as header", type(header).__name__)
    return header, 8 + length, size


def _damaged(path: Path, expected: str, got: str) -> CheckpointError:
    return CheckpointError(str(path), expected=expected, got=got, fix="get the file again from its source")


def _truncated(path: Path, expected: int, got: int) -> CheckpointError:
    return _damaged(path, f"{expected} bytes", f"a truncated file of {got}")


def _expect(path: Path, holds: bool, expected: str, got: str) -> None:
    if not holds:
        raise _damaged(path, expected, got)


def _refuse_foreign(path: Path, start: bytes) -> None:
    # The first eight bytes are the header's length; a plausible length may look like magic bytes (640 is 80 02 hex).
    if len(start) < 8 or int.from_bytes(start, "little") > MAX_HEADER_BYTES:
        for magic, name in MAGIC.items():
            if start.startswith(magic):
                fix = "pickle can run code and is never read; save it with offbook.runs.checkpoint.save_checkpoint"
                fix = fix if "pickle" in name else "give a checkpoint that offbook wrote"
                raise CheckpointError(str(path), expected="a safetensors checkpoint", got=name, fix=fix)
    if len(start) < 8:
        raise _truncated(path, 8, len(start))


def _record(path: Path, metadata: Any) -> tuple[str, dict[str, Any]]:
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        fix = "give a checkpoint that offbook wrote"
        raise CheckpointError(str(path), expected="a checkpoint", got="a safetensors file without our record", fix=fix)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "a JSON record", f"one that cannot be read ({type(error).__name__})") from error
    _expect(path, isinstance(content, dict), "a JSON object as record", type(content).__name__)
    version = content.get("format")
    _expect(path, type(version) is int and version >= 1, "a format number", repr(version))
    if version > FORMAT:
        fix = "install a newer offbook, which reads it"
        raise CheckpointError(str(path), expected=f"format {FORMAT} or older", got=f"format {version}", fix=fix)
    kind, record = content.get("kind"), content.get("record")
    _expect(path, isinstance(kind, str) and bool(kind), "the name of a kind", repr(kind))
    _expect(path, isinstance(record, dict), "an object as record", type(record).__name__)
    return kind, record


def _tensors(path: Path, header: Mapping[str, Any], data: int, size: int) -> dict[str, TensorInfo]:
    """Type and shape by name; the pieces must lie side by side without gap or overlap, to the end of the file."""
    _expect(path, len(header) <= MAX_TENSORS, f"at most {MAX_TENSORS} tensors", f"{len(header)}")
    tensors, pieces = dict[str, TensorInfo](), []
    for name, entry in header.items():
        where = f"tensor {name[:80]!r} with"
        _expect(path, isinstance(entry, dict), f"{where} an entry", type(entry).__name__)
        dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        _expect(path, isinstance(dtype, str) and dtype in _ITEM_BYTES, f"{where} a known type", repr(dtype)[:60])
        _expect(path, _naturals(shape) and len(shape) <= MAX_DIMENSIONS, f"{where} a shape", repr(shape)[:60])
        _expect(path, _naturals(span) and len(span) == 2, f"{where} two offsets", repr(span)[:60])
        needed = math.prod(shape) * _ITEM_BYTES[dtype]
        _expect(path, span[1] - span[0] == needed, f"{where} {needed} bytes", f"{span[1] - span[0]}")
        tensors[name] = TensorInfo(dtype=dtype, shape=tuple(shape))
        pieces.append((span[0], span[1]))
    end = 0
    for first, last in sorted(pieces):
        _expect(path, first == end, f"tensor data from byte {end}", f"from byte {first}")
        end = last
    if size < data + end:
        raise _truncated(path, data + end, size)
    _expect(path, size == data + end, f"{data + end} bytes", f"{size} bytes")
    return tensors


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)
