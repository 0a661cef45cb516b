"""Episodes on disk: step-major, memory-mapped, one file per field, safe against crashes of the writer.

- `store.json`: the schema, with the version of the layout.
- `episodes.parquet`: one row for each episode; `episodes.journal`: those appended since that was written.
- `fields/NAME.npy`: a field's values at all steps of all episodes, shape [N, ...].
- `final/NAME.npy`: an observation after the last step of each episode, shape [E, ...].
- `video/NAME/NUMBER.mp4`: the pictures of a camera that is kept as video; see `offbook.data.video`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Shaped

from offbook.data.index import Index, Outcome
from offbook.data.layout import (
    check_file,
    data_files,
    disk_dtype,
    disk_shape,
    episode_sha256,
    field_file,
    file_sha256,
    final_file,
    header,
    read_schema,
    video_folder,
)
from offbook.data.schema import DAMAGED, FieldSpec, Role, Schema
from offbook.data.video import Video, VideoFrames, stamps, video_file
from offbook.data.writer import Writer, explained, sync_path
from offbook.errors import DataError
from offbook.runs.directory import write_atomic

__all__ = ["Episode", "EpisodeStore", "FieldSpec", "Role", "Schema", "Writer"]


@dataclass(frozen=True, kw_only=True)
class Episode(Outcome):
    """One reset to its end, as `EpisodeStore.episode` gives it.

    Attributes:
        fields: values by name; T + 1 rows for an observation, T for others. Fields that this episode lacks are absent.
        length: number of steps T.
        return_: sum of the rewards; NaN without rewards.
    """

    fields: Mapping[str, np.ndarray]
    length: int
    return_: float


class EpisodeStore:
    """Recorded episodes, read through memory maps; opening reads the index alone.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> place = FieldSpec("place", "float32", (2,), "observation")
        >>> reward = FieldSpec("reward", "float32", (), "reward")
        >>> with TemporaryDirectory() as folder:
        ...     with EpisodeStore.create(Path(folder) / "walks", Schema((place, reward))) as writer:
        ...         values = {"place": np.zeros((4, 2), np.float32), "reward": np.ones(3, np.float32)}
        ...         number = writer.append(values, terminated=True, truncated=False, seed=7)
        ...     store = EpisodeStore.open(Path(folder) / "walks")
        ...     len(store), store.steps, store.episode(0).return_
        (1, 3, 3.0)
    """

    def __init__(self, path: Path, schema: Schema, index: Index) -> None:
        self.path, self.schema, self._index = path, schema, index
        self._maps: dict[Path, np.ndarray] = {}
        self._videos: dict[Path, VideoFrames] = {}

    @staticmethod
    def create(path: str | Path, schema: Schema) -> "Writer":
        """Makes an empty store and opens it for appending.

        Args:
            path: a folder that is new or empty.
            schema: what its episodes will hold.

        Raises:
            DataError: the folder holds something, or cannot be written.
        """
        path = Path(path)
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
            if any(not child.name.startswith(".") for child in path.iterdir()):
                fix = "choose another folder, or remove this one"
                raise DataError(str(path), expected="a new or empty folder", got="one that holds something", fix=fix)
            write_atomic(path / "store.json", json.dumps(schema.to_json(), indent=1) + "\n")
            sync_path(path.parent)
        return Writer(path)

    @staticmethod
    def append_to(path: str | Path) -> "Writer":
        """Opens an existing store for appending, after a crash too: what the crash left unfinished is cut.

        Raises:
            DataError: the folder is no store, another process is writing to it, or its files are damaged.
        """
        return Writer(Path(path))

    @staticmethod
    def open(path: str | Path) -> "EpisodeStore":
        """Opens a store for reading. A writer may go on appending; episodes appended later are not seen.

        Raises:
            DataError: the folder is no store, is of a newer version, or its files are damaged.
        """
        path = Path(path)
        schema = read_schema(path)
        index = Index.read(path)
        for name, file, rows in data_files(path, schema, index):
            check_file(file, schema[name], rows)
        return EpisodeStore(path, schema, index)

    def __reduce__(self) -> tuple[object, ...]:
        # A worker process opens the maps itself instead of being sent the data.
        return EpisodeStore.open, (self.path,)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def steps(self) -> int:
        """Number of steps N of all episodes together."""
        return self._index.steps

    @cached_property
    def episodes(self) -> Mapping[str, np.ndarray]:
        """What is known of each episode as a whole, in columns of length E.

        `start` and `length` (int64) say which rows of a field are an episode's; `terminated`, `truncated` (bool);
        `return` (float64, NaN without rewards); `task`, `source` (str); `seed` (int or None);
        `success` (1.0, 0.0, or NaN when unknown) and `score` (float64, NaN when unknown).
        """
        return self._index.columns()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the schema and all episodes in order; how and when they were written makes no difference."""
        whole = hashlib.sha256(self.schema.essentials())
        for value in self._index.table["sha256"].to_pylist():
            whole.update(bytes.fromhex(value))
        return whole.hexdigest()

    def present(self, name: str) -> Bool[np.ndarray, " episodes"]:
        """Which episodes hold a field; the others have zeros in its place."""
        missing = self._index.table["missing"].combine_chunks()
        episodes = np.repeat(np.arange(len(self)), missing.value_lengths().to_numpy())
        present = np.ones(len(self), bool)
        present[episodes[[other == self.schema[name].name for other in missing.flatten().to_pylist()]]] = False
        return present

    def field(self, name: str) -> Shaped[np.ndarray, "steps ..."] | VideoFrames:
        """All steps of a field, shape [N, ...], mapped read-only: pages are read from disk as they are touched.

        Of a camera kept as video, what is indexed in the same way and decodes the pictures asked for.
        """
        return self._column(field_file(self.path, name), name, self.steps)

    def final(self, name: str) -> Shaped[np.ndarray, "episodes ..."] | VideoFrames:
        """An observation after the last step of each episode, shape [E, ...], otherwise like `field`."""
        if self.schema[name].role != "observation":
            fix = f"choose one of: {', '.join(self.schema.observations) or 'none'}"
            got = f"a field of role {self.schema[name].role!r}"
            raise DataError(f"field {name!r}", expected="an observation", got=got, fix=fix)
        return self._column(final_file(self.path, name), name, len(self))

    def _column(self, file: Path, name: str, rows: int) -> np.ndarray | VideoFrames:
        if not self.schema[name].video:
            return self._map(file, name, rows)
        if file not in self._videos:
            values = self._map(file, name, rows)
            self._videos[file] = VideoFrames(video_folder(self.path, name), values, self.schema[name].shape)
        return self._videos[file]

    def _map(self, file: Path, name: str, rows: int) -> np.ndarray:
        """What is on disk."""
        spec = self.schema[name]
        if file not in self._maps:
            shape, dtype = (rows, *disk_shape(spec)), disk_dtype(spec)
            mapped = np.memmap(file, dtype, "r", len(header(spec, 0)), shape) if rows else np.zeros(shape, dtype)
            self._maps[file] = mapped.view(np.ndarray)
        return self._maps[file]

    def _rows(self, name: str, number: int) -> np.ndarray:
        """What is on disk of one episode."""
        start, length = (int(self.episodes[column][number]) for column in ("start", "length"))
        rows = self._map(field_file(self.path, name), name, self.steps)[start : start + length]
        if self.schema[name].role != "observation":
            return rows
        last = self._map(final_file(self.path, name), name, len(self))[number : number + 1]
        return np.concatenate([rows, last])

    def video(self, name: str, number: int) -> Video:
        """The file and the frames of an episode's pictures, of a camera that is kept as video.

        Raises:
            DataError: it is not, or the episode has no pictures.
        """
        if not self.schema[name].video or not self.present(name)[number]:
            fix = "read its values with episode()"
            where = f"{self.path}, episode {number}, field {name!r}"
            raise DataError(where, expected="a camera kept as video", got="none", fix=fix)
        rows = self._rows(name, number)
        file = video_file(video_folder(self.path, name), int(rows[0, 0]))
        return Video(path=file, frames=np.searchsorted(stamps(file)[0], rows[:, 1]))

    def episode(self, number: int) -> Episode:
        """One episode; its values are views of the maps where that is possible. Videos are decoded.

        Args:
            number: 0 to E - 1.

        Raises:
            DataError: there is no such episode.
        """
        if not 0 <= number < len(self):
            expected = f"0 to {len(self) - 1}" if len(self) else "no episode, the store is empty"
            raise DataError(f"episode {number}", expected=expected, got=str(number), fix="choose another")
        row = self._index.row(number)
        start, length, missing = row.pop("start"), row.pop("length"), row.pop("missing")
        del row["sha256"]
        fields = {}
        for spec in self.schema.fields:
            if spec.name in missing:
                continue
            if spec.video:
                last = self.final(spec.name)[number : number + 1]
                fields[spec.name] = np.concatenate([self.field(spec.name)[start : start + length], last])
            else:
                fields[spec.name] = self._rows(spec.name, number)
        return Episode(fields=fields, length=length, return_=row.pop("return"), **row)

    def verify(self) -> None:
        """Reads everything and compares it with the checksums that were taken when it was written.

        Raises:
            DataError: an episode differs; its number and its rows are named.
        """
        checksum = cache(file_sha256)
        for number, expected in enumerate(self._index.table["sha256"].to_pylist()):
            row = self._index.row(number)
            arrays: dict[str, np.ndarray | None] = dict.fromkeys(row["missing"])
            arrays |= {s.name: self._rows(s.name, number) for s in self.schema.fields if s.name not in arrays}
            try:
                videos = {
                    spec.name: checksum(video_file(video_folder(self.path, spec.name), int(rows[0, 0])))
                    for spec in self.schema.fields
                    if spec.video and (rows := arrays[spec.name]) is not None
                }
            except OSError as error:
                got = error.strerror or str(error)
                raise DataError(str(error.filename), expected="the video", got=got, fix=DAMAGED) from error
            if episode_sha256(self.schema, arrays, row, videos) != expected:
                where = f"{self.path}, episode {number}, steps {row['start']} to {row['start'] + row['length'] - 1}"
                raise DataError(where, expected="the values that were written", got="different ones", fix=DAMAGED)
