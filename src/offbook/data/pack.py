"""The small float fields of a store side by side, so that a window is one stretch of memory."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from offbook.data.layout import disk_dtype, field_file, offset
from offbook.data.normalise import Normalizer, stretches
from offbook.data.returns import ReturnSpec, returns_to_go
from offbook.data.store import EpisodeStore
from offbook.errors import DataError
from offbook.runs.directory import atomic_path

RETURN_TO_GO = "return_to_go"
"""Name under which windows carry the return to go."""

# Smaller packs are made anew in the blink of an eye; larger ones are kept, and shared by processes.
_KEPT_BYTES = 64 << 20
_KEPT = 4
_ROWS = 1 << 16
# Floats: rows of 16 bytes, or of whole cache lines, are read faster than odd ones.
_ALIGNED = 4


class Pack:
    """The chosen episodes' rows end to end, without those of the others.

    Large packs are files in the store's folder `cache`, named by all that they depend on, and mapped; the last four
    are kept. Anyone may delete them. Where the folder cannot be written, packs are made in memory.

    Args:
        store: the recordings.
        fields: float fields, in order.
        episodes: numbers of the chosen episodes, ascending.
        returns: which return to go stands in the last column; None for none.
        normalizer: normalises those of the fields that it was fitted to.

    Attributes:
        columns: where each field stands in a row, `RETURN_TO_GO` among them where it was asked for.
        rows: float32, shape (rows, width); zero where an episode lacks a field. The width may be larger than needed.

    Raises:
        DataError: returns to go are asked for and there is no reward.
    """

    def __init__(
        self,
        store: EpisodeStore,
        fields: Sequence[str],
        episodes: Int64[np.ndarray, " chosen"],
        *,
        returns: ReturnSpec | None = None,
        normalizer: Normalizer | None = None,
    ) -> None:
        if returns is not None and store.schema.reward is None:
            fix = "leave returns out"
            raise DataError(str(store.path), expected="rewards, for returns to go", got="none", fix=fix)
        self._store, self._episodes, self._returns, self._normalizer = store, episodes, returns, normalizer
        sizes = {name: store.schema[name].size for name in fields} | ({} if returns is None else {RETURN_TO_GO: 1})
        ends = np.cumsum([0, *sizes.values()]).tolist()
        self.columns = {name: slice(end, end + size) for end, (name, size) in zip(ends, sizes.items(), strict=False)}
        self._lengths = store.episodes["length"][episodes]
        shape = (int(self._lengths.sum()), -(-ends[-1] // _ALIGNED) * _ALIGNED)
        self.rows = self._made(shape) if shape[0] * shape[1] * 4 < _KEPT_BYTES else self._kept(shape)

    def _kept(self, shape: tuple[int, int]) -> Float32[np.ndarray, "rows width"]:
        """The pack from its file, which is written first where it is not there."""
        facts = json.dumps(
            [
                self._store.digest,
                {name: [columns.start, columns.stop] for name, columns in self.columns.items()},
                repr(self._returns),
                None if self._normalizer is None else self._normalizer.to_json(),
            ]
        )
        name = hashlib.sha256(facts.encode() + np.ascontiguousarray(self._episodes).tobytes()).hexdigest()
        file = self._store.path / "cache" / f"pack-{name[:32]}.f32.npy"
        try:
            if not file.exists():
                with atomic_path(file) as temporary:
                    self._write(temporary, shape)
                _forget(file.parent)
            os.utime(file)
            rows: np.ndarray = np.load(file, mmap_mode="r").view(np.ndarray)
            return rows if rows.shape == shape else self._made(shape)
        except (OSError, ValueError):
            return self._made(shape)

    def _write(self, file: Path, shape: tuple[int, int]) -> None:
        with file.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
            stream.flush()
            # Now, because a full disk met while writing to a map kills the process.
            os.posix_fallocate(stream.fileno(), stream.tell(), shape[0] * shape[1] * 4)
        rows = np.load(file, mmap_mode="r+")
        self._fill(rows.view(np.ndarray))
        rows.flush()

    def _made(self, shape: tuple[int, int]) -> Float32[np.ndarray, "rows width"]:
        rows = np.empty(shape, np.float32)
        self._fill(rows)
        return rows

    def _fill(self, rows: Float32[np.ndarray, "rows width"]) -> None:
        used = 0
        for name, columns in self.columns.items():
            used = columns.stop
            for to, first, last, part in self._parts(name):
                if self._normalizer is not None and name in self._normalizer:
                    part = self._normalizer.encode(name, part)
                rows[to : to + last - first, columns] = part.reshape(last - first, -1)
            present = self._store.present(self._store.schema.reward or "" if name == RETURN_TO_GO else name)
            if not present[self._episodes].all():
                rows[np.repeat(~present[self._episodes], self._lengths), columns] = 0
        rows[:, used:] = 0

    def _parts(self, name: str) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """Row of the pack, first and last row of the store, and the values there, piece by piece."""
        spec, to = self._store.schema[self._store.schema.reward or "" if name == RETURN_TO_GO else name], 0
        file, whole = field_file(self._store.path, spec.name), None
        if name == RETURN_TO_GO and self._returns is not None:
            starts = self._store.episodes["start"][self._episodes]
            whole = returns_to_go(np.asarray(self._store.field(spec.name)), starts, self._lengths, self._returns)
        for first, last in stretches(self._store, self._episodes, _ROWS):
            if whole is None:
                # Read rather than mapped: pages of a map would stay resident beside the pack.
                part = np.fromfile(file, disk_dtype(spec), (last - first) * spec.size, offset=offset(spec, first))
                yield to, first, last, part.reshape(last - first, *spec.shape)
            else:
                yield to, first, last, whole[first:last]
            to += last - first


def _forget(folder: Path) -> None:
    """Deletes all but the packs used last; who has one mapped keeps it."""
    packs = sorted(folder.glob("pack-*.npy"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in packs[_KEPT:]:
        file.unlink(missing_ok=True)
