"""Appending episodes to a store so that a crash at any moment loses none that was appended."""

import fcntl
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from offbook.data.index import JOURNAL, Index, Outcome, journal_line
from offbook.data.layout import (
    as_bytes,
    check_file,
    data_files,
    disk_dtype,
    disk_shape,
    episode_sha256,
    field_file,
    films,
    final_file,
    header,
    offset,
    read_schema,
    video_folder,
)
from offbook.data.schema import DAMAGED, Schema
from offbook.data.video import Video
from offbook.errors import DataError
from offbook.runs.directory import write_atomic

_SAME = "give every field the same steps"
# `data check` holds the lock for an instant, to see whether there is a writer; a writer holds it for long.
_PATIENCE = 1.0


class Writer:
    """Appends episodes to a store. One at a time for a store; made by `EpisodeStore.create` or `append_to`.

    Closing (or the end of a `with` block) compacts the index; without it nothing that was appended is lost. A control
    loop that must not wait for the disk uses `append_soon`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.schema = read_schema(path)
        self._handles: dict[Path, int] = {}
        self._behind: ThreadPoolExecutor | None = None
        self._workers: list[int] = []
        self._unfinished: list[Future[int]] = []
        self._lock: int | None = None
        with explained(path):
            self._lock = _lock(path)
            try:
                self._open_files()
            except BaseException:
                self._release()
                raise

    def _open_files(self) -> None:
        index = Index.read(self.path)
        self._episodes, self._steps, self._compacted = len(index), index.steps, index.compacted
        self._pending: list[bytes] = []
        self._filming: dict[str, Any] = {}
        self._journal = self.path / JOURNAL
        for name, file, rows in data_files(self.path, self.schema, index):
            spec = self.schema[name]
            if not file.exists() and not rows:
                write_atomic(file, header(spec, 0))
            known = check_file(file, spec, rows)
            if known > rows:
                # Going on would cut them.
                expected = f"an index of the {known} rows in {file.parent.name}/{file.name}"
                raise DataError(str(self.path), expected=expected, got=f"one of {rows}", fix=DAMAGED)
            self._handles[file] = os.open(file, os.O_RDWR)
            os.ftruncate(self._handles[file], offset(spec, rows))
        for spec in self.schema.fields:
            if spec.video:
                from offbook.data.filming import Filming  # stores without video do not wait for PyAV

                folder = video_folder(self.path, spec.name)
                used = films(self.path, spec, index.steps)
                self._filming[spec.name] = Filming(folder, spec, self.schema.rate_hz, used)
        self._handles[self._journal] = os.open(self._journal, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._handles[self._journal], index.journal_bytes)
        self._journal_bytes = index.journal_bytes
        # Of files that a killed writer was replacing. A field's name may begin with a dot, too.
        for pattern in (".store.json.*", ".episodes.parquet.*", "f*/.*.npy.*.npy"):
            for file in {*self.path.glob(pattern)} - {*self._handles}:
                file.unlink()
        sync_path(self.path)

    def __len__(self) -> int:
        return self._episodes

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_lock", None) is not None:
            self._release()

    def append(
        self,
        fields: Mapping[str, np.ndarray | Video | None],
        *,
        terminated: bool | np.bool_,
        truncated: bool | np.bool_,
        task: str = "",
        source: str = "",
        seed: int | np.integer[Any] | None = None,
        success: bool | np.bool_ | None = None,
        score: float | np.floating[Any] | None = None,
        sync: bool = True,
    ) -> int:
        """Adds one episode. When this returns, a crash of the process or the machine can no longer lose it.

        Args:
            fields: values by name, exactly those of the schema: T + 1 rows for an observation (the last after the
                last step), T for others; None for a field that this episode does not have. A camera that is kept as
                video may be given as a `Video`.
            terminated: the task ended the episode.
            truncated: something else did, such as a limit of time.
            task: what was to be done, in words.
            source: who acted.
            seed: what the environment was reset with.
            success: whether the task was done.
            score: the task's own measure.
            sync: False puts the durability off to the next `flush`, `close` or append with True; this is for imports,
                which can be repeated.

        Returns:
            The episode's number.

        Raises:
            DataError: a field is missing, unknown, or has another length, dtype or shape than it should, or the disk
                does not take it. The store is as it was before.
        """
        if not self._handles:
            raise DataError(str(self.path), expected="an open writer", got="a closed one", fix="use append_to")
        where = f"{self.path}, episode {self._episodes}"
        given, length = _checked(self.schema, fields, where)
        # Environments give NumPy's numbers, which JSON does not take.
        outcome = Outcome(
            terminated=bool(terminated),
            truncated=bool(truncated),
            task=str(task),
            source=str(source),
            seed=None if seed is None else int(seed),
            success=None if success is None else bool(success),
            score=None if score is None else float(score),
        )
        with explained(self.path), self._counted(length):
            arrays, videos = self._filmed(given, where)
            row = {**asdict(outcome), "start": self._steps, "length": length, **self._facts(arrays)}
            row["sha256"] = episode_sha256(self.schema, arrays, row, videos)
            self._write(arrays, length)
            self._pending.append(journal_line(self._episodes, row))
            if sync:
                self._commit()
        return self._episodes - 1

    def append_soon(self, fields: Mapping[str, np.ndarray | Video | None], **outcome: Any) -> "Future[int]":
        """Appends an episode from another thread and returns at once, so that a control loop need not wait.

        Episodes are appended in the order of the calls. The values must not be changed afterwards. Until `flush` or
        `close` returns, which wait for all of them, do not call `append`.

        Args:
            fields: as for `append`.
            outcome: the other arguments of `append`.

        Returns:
            The episode's number, once it is safe. What goes wrong is raised by its `result`, by `flush` and by `close`.
        """
        if self._behind is None:
            self._behind = ThreadPoolExecutor(1, "append", _give_way, (self._workers,))
        future = self._behind.submit(self.append, fields, **outcome)
        self._unfinished = [f for f in self._unfinished if not f.done() or f.exception()] + [future]
        return future

    @contextmanager
    def _counted(self, length: int) -> Iterator[None]:
        """Counts the episode that its block makes; takes it back if the block fails or is interrupted before that."""
        filmed = {name: filming.number for name, filming in self._filming.items()}
        pending, committed = len(self._pending), self._journal_bytes
        before, after = (self._episodes, self._steps), (self._episodes + 1, self._steps + length)
        try:
            yield
            self._episodes, self._steps = after
        except BaseException:
            if self._journal_bytes > committed:
                # Interrupted in the instant after the commit: it counts, though nobody heard its number.
                self._pending.clear()
                self._episodes, self._steps = after
            else:
                del self._pending[pending:]
                self._episodes, self._steps = before
                for name, number in filmed.items():
                    self._filming[name].remove_from(number)
            raise

    def _filmed(
        self, given: Mapping[str, np.ndarray | Video | None], where: str
    ) -> tuple[dict[str, np.ndarray | None], dict[str, bytes]]:
        """The values as they will stand on disk, with the videos written, and the checksums of those."""
        arrays, videos = dict[str, np.ndarray | None](), dict[str, bytes]()
        for name, values in given.items():
            if name in self._filming and values is not None:
                arrays[name], videos[name] = self._filming[name].add(values, f"{where}, field {name!r}")
            elif not isinstance(values, Video):
                arrays[name] = values
        return arrays, videos

    def _facts(self, arrays: Mapping[str, np.ndarray | None]) -> dict[str, Any]:
        reward = arrays.get(self.schema.reward or "")
        return {
            "return": float("nan") if reward is None else float(np.sum(reward, dtype=np.float64)),
            "missing": [name for name, values in arrays.items() if values is None],
        }

    def _write(self, arrays: Mapping[str, np.ndarray | None], length: int) -> None:
        for spec in self.schema.fields:
            values = arrays[spec.name]
            if values is None:
                # Of a video, no file.
                shape = (length + (spec.role == "observation"), *disk_shape(spec))
                values = np.full(shape, -1 if spec.video else 0, disk_dtype(spec))
            # To explicit places: what a failed attempt left there is overwritten.
            handle = self._handles[field_file(self.path, spec.name)]
            _write_at(handle, offset(spec, self._steps), as_bytes(values[:length], spec))
            if spec.role == "observation":
                handle = self._handles[final_file(self.path, spec.name)]
                _write_at(handle, offset(spec, self._episodes), as_bytes(values[length:], spec))

    def flush(self) -> None:
        """Makes all episodes durable that were appended with `sync=False` or `append_soon`.

        Raises:
            Exception: the first that an `append_soon` met; the other episodes are durable nevertheless.
        """
        unfinished, self._unfinished = self._unfinished, []
        wait(unfinished)
        self._commit()
        for future in unfinished:
            future.result()

    def _commit(self) -> None:
        if not self._pending:
            return
        for file, handle in self._handles.items():
            if file != self._journal:
                os.fsync(handle)
        # Only now, with the values on disk, are the episodes committed.
        journal, lines = self._handles[self._journal], b"".join(self._pending)
        try:
            _write_at(journal, self._journal_bytes, memoryview(lines))
            os.fsync(journal)
            self._journal_bytes += len(lines)
        except BaseException:
            # Nothing of a failed attempt may be taken for a commit.
            os.ftruncate(journal, self._journal_bytes)
            raise
        self._pending.clear()

    def close(self) -> None:
        """Compacts the index, so that opening is fast, and lets others write. Closing twice does no harm."""
        if not self._handles:
            return
        try:
            with explained(self.path):
                self.flush()
                index = Index.read(self.path)
                for name, file, rows in data_files(self.path, self.schema, index):
                    spec, handle = self.schema[name], self._handles[file]
                    os.ftruncate(handle, offset(spec, rows))
                    _write_at(handle, 0, memoryview(header(spec, rows)))
                    os.fsync(handle)
                if len(index) > self._compacted or self._journal_bytes:
                    index.write_parquet(self.path)
                    os.ftruncate(self._handles[self._journal], 0)
        finally:
            self._release()

    def _release(self) -> None:
        try:
            if self._behind is not None:
                # The thread that appends lets go of a dropped writer last, and cannot wait for itself.
                self._behind.shutdown(wait=threading.get_ident() not in self._workers)
        finally:
            handles, self._handles = [*self._handles.values()], {}
            if self._lock is not None:
                handles, self._lock = [*handles, self._lock], None
            for handle in handles:
                with suppress(OSError):
                    os.close(handle)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses into a message for the user."""
    try:
        yield
    except OSError as error:
        fix = "see to the disk and its permissions, then append again: what was appended before is safe"
        got = error.strerror or str(error)
        raise DataError(str(error.filename or path), expected="to write the store", got=got, fix=fix) from error


def _lock(path: Path) -> int:
    """Takes the store's lock, which the operating system gives back when the process ends, however it ends."""
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + _PATIENCE
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
    os.close(handle)
    fix = "wait for that one, or write to another store"
    got = f"process {owner or 'unknown'} writing to it"
    raise DataError(str(path), expected="to be the only writer", got=got, fix=fix)


def _write_at(handle: int, position: int, content: memoryview) -> None:
    while content:
        count = os.pwrite(handle, content, position)
        content, position = content[count:], position + count


def sync_path(path: Path) -> None:
    """Makes the entries of a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checked(
    schema: Schema, fields: Mapping[str, np.ndarray | Video | None], where: str
) -> tuple[dict[str, np.ndarray | Video | None], int]:
    """The values in the schema's order, and the number of steps, after every length, dtype and shape was compared."""
    names = [spec.name for spec in schema.fields]
    if set(fields) != set(names):
        absent, unknown = sorted(set(names) - set(fields)), sorted(set(fields) - set(names))
        raise DataError(
            where,
            expected=f"the fields {', '.join(names)}",
            got=" and ".join(
                [f"no {', '.join(absent)}"] * bool(absent) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
            ),
            fix="give all fields of the schema, and None for one that this episode does not have",
        )
    arrays = {spec.name: fields[spec.name] for spec in schema.fields}
    length = _length(schema, arrays, where)
    for spec in schema.fields:
        values = arrays[spec.name]
        if values is None:
            continue
        place = f"{where}, field {spec.name!r}"
        rows = length + (spec.role == "observation")
        if isinstance(values, Video):
            if not spec.video or values.frames.shape != (rows,):
                expected = f"{rows} frames for {length} steps" if spec.video else "an array, as it is not kept as video"
                raise DataError(place, expected=expected, got=f"{len(values.frames)} frames of a file", fix=_SAME)
            continue
        values = np.asarray(values)
        if values.dtype != np.dtype(spec.dtype):
            fix = f"convert it with .astype({spec.dtype!r}) if that loses nothing"
            raise DataError(place, expected=spec.dtype, got=values.dtype.name, fix=fix)
        if values.shape != (rows, *spec.shape):
            reason = ", one for each step and one after the last" if spec.role == "observation" else ""
            expected = f"shape {(rows, *spec.shape)} for {length} steps{reason}"
            raise DataError(place, expected=expected, got=f"shape {values.shape}", fix=_SAME)
        arrays[spec.name] = values
    return arrays, length


def _length(schema: Schema, arrays: Mapping[str, np.ndarray | Video | None], where: str) -> int:
    """The number of steps: what an action, a reward or the like says, else one less than the observations."""
    given = {
        name: np.shape(values.frames if isinstance(values, Video) else values)
        for name, values in arrays.items()
        if values is not None
    }
    if not given or not all(given.values()):
        bad = next((name for name, shape in given.items() if not shape), "")
        fix = "give the values of a whole episode"
        expected = "rows of values, one for each step"
        got = "a single value" if bad else "no field at all"
        raise DataError(f"{where}, field {bad!r}" if bad else where, expected=expected, got=got, fix=fix)
    steps = [shape[0] for name, shape in given.items() if schema[name].role != "observation"]
    length = int(steps[0] if steps else next(iter(given.values()))[0] - 1)
    if length < 1:
        raise DataError(
            where, expected="one step or more", got=f"{max(length, 0)} steps", fix="leave empty episodes out"
        )
    return length


def _give_way(workers: list[int]) -> None:
    """Lets the loop that records go first where the processor is short; Linux has priorities for single threads.

    Args:
        workers: the thread that calls this is added to them.
    """
    workers.append(threading.get_ident())
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
