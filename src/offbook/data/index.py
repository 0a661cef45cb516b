"""The index of a store: one row for each episode, committed to a journal line by line and compacted to Parquet.

A line of the journal is the commit record of an episode: it is written after the episode's values are on disk, and
carries a checksum, so that after a crash the last line is there whole or is cut. Compaction writes all rows to
`episodes.parquet` and empties the journal; a crash between the two leaves rows in both, which reading allows for.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offbook.data.schema import DAMAGED
from offbook.errors import DataError
from offbook.runs.directory import atomic_path

JOURNAL = "episodes.journal"
PARQUET = "episodes.parquet"
_COLUMNS = pa.schema(
    [
        ("start", pa.int64()),
        ("length", pa.int64()),
        ("terminated", pa.bool_()),
        ("truncated", pa.bool_()),
        ("return", pa.float64()),
        ("task", pa.string()),
        ("source", pa.string()),
        ("seed", pa.uint64()),
        ("success", pa.bool_()),
        ("score", pa.float64()),
        ("missing", pa.list_(pa.string())),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is said of an episode as a whole.

    Attributes:
        terminated: the task ended it.
        truncated: something else did, such as a limit of time.
        task: what was to be done, in words; may be empty.
        source: who acted, such as a policy's name; may be empty.
        seed: what the environment was reset with; None when unknown.
        success: whether the task was done; None when unknown.
        score: the task's own measure; None when unknown.
    """

    terminated: bool
    truncated: bool
    task: str = ""
    source: str = ""
    seed: int | None = None
    success: bool | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise DataError(
                "episode seed", expected="0 to 2**64 - 1", got=str(self.seed), fix="give the seed of the reset"
            )


class Index:
    """The rows of all committed episodes.

    Attributes:
        table: the rows, as Arrow columns.
        compacted: how many of them are in the Parquet file.
        journal_bytes: how many bytes of the journal are whole lines; what follows is cut by the next writer.
    """

    def __init__(self, table: pa.Table, compacted: int, journal_bytes: int) -> None:
        self.table, self.compacted, self.journal_bytes = table, compacted, journal_bytes

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def steps(self) -> int:
        """Number of steps of all episodes."""
        if not len(self):
            return 0
        return int(self.table["start"][-1].as_py() + self.table["length"][-1].as_py())

    @staticmethod
    def read(folder: Path) -> "Index":
        """Reads the index of a store.

        Raises:
            DataError: a line inside the journal, or the Parquet file, is damaged.
        """
        # The journal first: when a writer compacts between the two reads, its rows are in both and none is lost.
        lines, size = _read_journal(folder / JOURNAL)
        table = _read_parquet(folder / PARQUET)
        compacted = table.num_rows
        new = [(number, row) for number, row in lines if number >= compacted]
        if [number for number, _ in new] != list(range(compacted, compacted + len(new))):
            expected = f"episode {compacted} and those after it in order"
            got = f"episodes {new[0][0]} to {new[-1][0]}"
            raise DataError(str(folder / JOURNAL), expected=expected, got=got, fix=DAMAGED)
        if new:
            table = pa.concat_tables([table, pa.Table.from_pylist([row for _, row in new], schema=_COLUMNS)])
        return Index(table, compacted, size)

    def write_parquet(self, folder: Path) -> None:
        """Writes all rows to the Parquet file, atomically."""
        with atomic_path(folder / PARQUET) as temporary:
            pq.write_table(self.table, temporary)

    def columns(self) -> dict[str, np.ndarray]:
        """The rows as NumPy columns, as `EpisodeStore.episodes` describes them."""
        table, columns = self.table, {}
        for name in ("start", "length", "terminated", "truncated", "return"):
            columns[name] = table[name].to_numpy()
        for name in ("task", "source"):
            columns[name] = np.asarray(table[name].to_pylist(), dtype=np.str_)
        seeds = np.empty(len(self), dtype=object)
        seeds[:] = table["seed"].to_pylist()
        columns["seed"] = seeds
        # Through float64, where an unknown value is NaN.
        columns["success"] = np.asarray(
            table["success"].cast(pa.int8()).cast(pa.float64()).to_numpy(), dtype=np.float64
        )
        columns["score"] = np.asarray(table["score"].to_numpy(), dtype=np.float64)
        for column in columns.values():
            column.setflags(write=False)
        return columns

    def row(self, number: int) -> dict[str, Any]:
        """One episode's row as plain Python values."""
        row: dict[str, Any] = self.table.slice(number, 1).to_pylist()[0]
        return row


def journal_line(number: int, row: Mapping[str, Any]) -> bytes:
    """The commit record of one episode.

    Args:
        number: the episode's place in the store.
        row: its values by column.
    """
    text = json.dumps([number, row], separators=(",", ":"))
    return f'{{"crc":"{zlib.crc32(text.encode()):08x}","episode":{text}}}\n'.encode()


def _parse_line(line: bytes) -> tuple[int, dict[str, Any]] | None:
    head, tail = b'{"crc":"', b'","episode":'
    text = line[len(head) + 8 + len(tail) : -2]
    if not line.endswith(b"}\n") or line != head + b"%08x" % zlib.crc32(text) + tail + text + b"}\n":
        return None
    number, row = json.loads(text)
    return number, row


def _read_journal(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    rows: list[tuple[int, dict[str, Any]]] = []
    size, lines = 0, content.splitlines(keepends=True)
    for i, line in enumerate(lines):
        row = _parse_line(line)
        if row is None:
            if any(_parse_line(later) for later in lines[i + 1 :]):
                expected = "a line that agrees with its checksum"
                got = "a damaged one before sound ones"
                raise DataError(f"{path}, line {i + 1}", expected=expected, got=got, fix=DAMAGED)
            break
        rows.append(row)
        size += len(line)
    return rows, size


def _read_parquet(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path, memory_map=False, use_threads=False)
    except FileNotFoundError:
        return _COLUMNS.empty_table()
    except (pa.ArrowInvalid, OSError) as error:
        got = str(error).splitlines()[0]
        raise DataError(str(path), expected="the index of a store", got=got, fix=DAMAGED) from error
    if not table.schema.equals(_COLUMNS):
        raise DataError(str(path), expected=f"columns {_COLUMNS.names}", got=str(table.schema.names), fix=DAMAGED)
    return table
