"""A copy of an arena, taken while it runs, from which another one can be made: on either database, in either store.

    manifest.json            what the copy holds; written last, so that half a copy is none
    arena.json               the operator's settings, without addresses: they are the next arena's own
    tables-NAME/TABLE.jsonl  every row of one snapshot of the database, of the arena's tables and those of studies
    blobs/sha256/ab/cdef...  the files that these rows name

The rows are read in one transaction that sees one moment. A blob's file stands before its row and is never changed, so
that whatever the snapshot names can be copied after it. Copies into the same folder share their blobs.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from offbook.arena import trials
from offbook.arena.database import Database
from offbook.arena.service import Settings
from offbook.arena.tables import FINAL, IN_FLIGHT, Trial
from offbook.arena.verify import kept_files
from offbook.errors import ConfigError, DataError, ResourceError
from offbook.runs.directory import write_atomic
from offbook.service.database import Schema, now
from offbook.service.refusal import RefusedError
from offbook.service.storage import BlobStore

FORMAT = 1
MANIFEST = "manifest.json"
FENCE_STEP = 1_000_000
"""By how much a restored arena raises its fences, so that no lease given after the copy is taken for a live one."""
PASSING = "pictures"
"""The table of what robots see just now, which no copy has."""

_ROWS = 1000
_LEFT = frozenset({"blobs", "tmp", "arena.db", "arena.db-wal", "arena.db-shm"})  # by a restore that failed
_AGAIN = "see to that, then run this again: it goes on where it ended"
_ANOTHER = "take another copy; this one is damaged"
Progress = Callable[[int, int], None]


def back_up(settings: Settings, folder: Path, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Copies an arena's rows and blobs into a folder; the arena may run meanwhile.

    A copy that fails leaves an earlier one in the folder as it was, and the next attempt goes on with the blobs that
    are copied already. Blobs that the arena has lost do not keep the others from being copied.

    Args:
        settings: of the arena.
        folder: empty or missing, or one that holds an earlier copy or an unfinished one.
        progress: called with the number of blobs that are copied, and of all.

    Returns:
        The manifest: `{format, revisions, made, tables: {name: {rows, sha256}}, folder, blobs, bytes, lost}`, `lost`
        with the hashes of blobs that are missing or damaged in the arena and so in the copy.

    Raises:
        ConfigError: the folder holds something else, or the database is away or of another version.
        DataError: a blob of the arena cannot be read now.
        ResourceError: the copy cannot be written.
    """
    if folder.exists() and not (folder / MANIFEST).exists() and not _unfinished(folder):
        raise ConfigError(str(folder), expected="an empty folder or an earlier copy", got="something else",
                          fix="choose another folder")  # fmt: skip
    part = folder / f"tables-{secrets.token_hex(4)}"
    database = Database(settings.database_url)
    try:
        with _written(f"copy in {folder}"), database.snapshot() as session:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            part.mkdir(mode=0o700)
            manifest, sizes = _copy_rows(database.schemas, session, part)
        target = _Side(f"copy in {folder}", BlobStore(str(folder.resolve())))
        lost = list(_copy_blobs(_Side("arena", BlobStore(settings.blobs_url)), target, sizes, progress))
        held = sizes.keys() - set(lost)
        files = {"blobs": len(held), "bytes": sum(sizes[sha256] for sha256 in held), "lost": lost}
        manifest |= {"format": FORMAT, "folder": part.name, **files}
        with _written(f"copy in {folder}"):
            write_atomic(folder / "arena.json", json.dumps(settings.portable(), indent=2) + "\n", mode=0o600)
            write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n", mode=0o600)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(part, ignore_errors=True)
            if not (folder / MANIFEST).exists():
                (folder / "arena.json").unlink(missing_ok=True)
        raise
    finally:
        database.close()
    target.store.clear_unfinished(0.0)
    for other in folder.glob("tables-*"):
        if other != part:
            shutil.rmtree(other, ignore_errors=True)
    return manifest


def restore(
    folder: Path, settings: Settings, progress: Progress = lambda done, total: None
) -> tuple[Settings, dict[str, Any]]:
    """Makes an arena from a copy, on an empty database and in a store of its own.

    Leases that were live when the copy was taken end as robot faults. Fences are raised, so that a worker that was
    given a trial after the copy was taken, and still plays it, is refused. One that fails leaves the database empty;
    the next attempt goes on with the blobs that are restored already.

    Args:
        folder: of the copy.
        settings: where the arena shall stand: folder, database and blobs; all else comes with the copy.
        progress: called with the number of blobs that are restored, and of all.

    Returns:
        The new arena's settings, which are saved in its folder, and the copy's manifest.

    Raises:
        ConfigError: no copy, or one of a newer offbook; the place is taken, or its database is away.
        DataError: the copy is damaged, or cannot be read now.
        ResourceError: the new arena's folder or store cannot be written.
    """
    manifest = _manifest(folder)
    part = folder / manifest["folder"]
    for name, about in manifest["tables"].items():
        _check_table(part / f"{name}.jsonl", about)
    places = {"database": settings.database, "blobs": settings.blobs}
    kept = _json(folder / "arena.json") | places
    settings = Settings.from_record(kept, settings.folder, str(folder / "arena.json"))
    taken = settings.folder.exists() and {path.name for path in settings.folder.iterdir()} - _LEFT
    if taken:
        raise ConfigError(str(settings.folder), expected="a new or empty folder", got="something else",
                          fix="choose another")  # fmt: skip
    database = Database(settings.database_url)
    try:
        if not database.is_empty():
            raise ConfigError(f"database {database.engine.url.render_as_string()}", expected="an empty database",
                              got="one with tables", fix="make a new one")  # fmt: skip
        source = _Side(f"copy in {folder}", BlobStore(str(folder.resolve())))
        target = _Side("new arena", BlobStore(settings.blobs_url))
        sizes = _sizes(part, manifest)
        lost = list(_copy_blobs(source, target, sizes, progress))
        if lost:
            raise DataError(f"copy in {folder}", expected=f"{len(sizes)} whole files",
                            got=f"{len(lost)} missing or damaged, the first {lost[0]}", fix=_ANOTHER)  # fmt: skip
        with _written(f"new arena in {settings.folder}"):
            settings.folder.mkdir(parents=True, exist_ok=True)
            with database.told("a database that takes the rows"), database.write() as session:
                _insert_rows(database, session, part, manifest)
                _end_leases(session)
            settings.save()
    finally:
        database.close()
    return settings, manifest


# --- rows -----------------------------------------------------------------------------------------------------------


def _copy_rows(schemas: Sequence[Schema], session: Session, part: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Writes all rows of one moment; returns what the manifest says of them, and the files that they name."""
    tables: dict[str, dict[str, Any]] = {}
    revisions: dict[str, str] = {}
    made = float(session.execute(sa.select(now(session))).scalar_one())
    for schema in schemas:
        version = sa.text(f"SELECT version_num FROM {schema.version_table}")
        revisions[schema.version_table] = str(session.execute(version).scalar_one())
    for table in (table for schema in schemas for table in schema.metadata.sorted_tables if table.name != PASSING):
        digest, count = hashlib.sha256(), 0
        order = sa.select(table).order_by(*table.primary_key.columns)
        with (part / f"{table.name}.jsonl").open("wb") as file:
            for row in session.execute(order.execution_options(yield_per=_ROWS)).mappings():
                line = json.dumps(dict(row), allow_nan=False).encode() + b"\n"
                digest.update(line)
                file.write(line)
                count += 1
        tables[table.name] = {"rows": count, "sha256": digest.hexdigest()}
    return {"revisions": revisions, "made": made, "tables": tables}, kept_files(session)


def _insert_rows(database: Database, session: Session, part: Path, manifest: Mapping[str, Any]) -> None:
    """Puts the rows into tables of the schema in which they were copied; what is newer, the migrations add after."""
    connection = session.connection()
    database.migrate(manifest["revisions"], connection)
    schema = sa.MetaData()
    schema.reflect(connection)
    for table in schema.sorted_tables:
        if table.name not in manifest["tables"]:
            continue
        for column in table.columns:
            if isinstance(column.type, sa.JSON):
                column.type.none_as_null = True
        rows = _rows(part / f"{table.name}.jsonl")
        while batch := list(islice(rows, _ROWS)):
            connection.execute(table.insert(), batch)
        if connection.dialect.name == "postgresql" and "id" in table.columns:
            # The database's own counter has not seen these numbers.
            most = sa.select(sa.func.coalesce(sa.func.max(table.c.id), 0) + 1).scalar_subquery()
            serial = sa.func.pg_get_serial_sequence(table.name, "id")
            connection.execute(sa.select(sa.func.setval(serial, most, sa.false())))
    database.migrate(connection=connection)


def _end_leases(session: Session) -> None:
    session.execute(sa.update(Trial).where(Trial.state.in_(IN_FLIGHT)).values(lease_until=0.0))
    trials.reap(session, trials.Rules(fault_cap=2**31 - 1), reason="the arena was restored from a copy")
    session.execute(sa.update(Trial).where(Trial.state.not_in(FINAL)).values(fence=Trial.fence + FENCE_STEP))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)
    except OSError as error:
        raise _unreadable(path, error) from error


# --- files ----------------------------------------------------------------------------------------------------------


def _sizes(part: Path, manifest: Mapping[str, Any]) -> dict[str, int]:
    """The files that a copy holds: hash and size in bytes."""
    tables = [name for name in ("blobs", "outputs") if name in manifest["tables"]]
    rows = [row for name in tables for row in _rows(part / f"{name}.jsonl")]
    # The arena had lost these before; other rows are of texts, without a file.
    without = {None, *manifest.get("lost", [])}
    return {row["sha256"]: row["size"] for row in rows if row["sha256"] not in without}


class _Side(NamedTuple):
    """One of two stores between which blobs are copied, and whose it is."""

    name: str
    store: BlobStore


def _copy_blobs(source: _Side, target: _Side, sizes: Mapping[str, int], progress: Progress) -> Iterator[str]:
    """Copies what the target does not hold yet; yields the hashes of blobs that are missing or damaged in the source.

    Raises:
        DataError: the source does not give one out now.
        ResourceError: the target does not take one.
    """
    for done, (sha256, size) in enumerate(sorted(sizes.items()), start=1):
        try:
            if not target.store.holds(sha256) or target.store.size(sha256) != size:
                with target.store.upload(limit=1 << 62, expected=sha256) as upload:
                    for piece in _read(source, sha256):
                        upload.write(piece)
                    upload.commit()
        except RefusedError as error:
            if error.status not in (404, 422):
                raise ResourceError(target.name, expected="room for the files and the right to write", got=error.got,
                                    fix=_AGAIN) from error  # fmt: skip
            yield sha256
        progress(done, len(sizes))


def _read(source: _Side, sha256: str) -> Iterator[bytes]:
    try:
        yield from source.store.read(sha256)
    except RefusedError as error:
        if error.status == 404:
            raise
        raise DataError(f"{source.name}, file {sha256}", expected="to be read", got=error.got,
                        fix=_AGAIN) from error  # fmt: skip


@contextmanager
def _written(side: str) -> Iterator[None]:
    """A disk that is full, or a folder that must not be written to, is named with whose it is."""
    try:
        yield
    except OSError as error:
        where = f"{side}: {error.filename}" if error.filename else side
        raise ResourceError(where, expected="room and the right to write", got=error.strerror or str(error),
                            fix=_AGAIN) from error  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of a copy."""
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DataError(str(path), expected="a JSON object", got="something else",
                        fix=_ANOTHER)  # fmt: skip
    return record


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        begun = folder.is_dir() and any(folder.iterdir()) and _unfinished(folder)
        got = "an unfinished copy" if begun else f"no {MANIFEST}"
        raise ConfigError(str(folder), expected="a finished copy of an arena", got=got,
                          fix="make one with: offbook arena backup")  # fmt: skip
    record = _json(path)
    if record.get("format") != FORMAT:
        raise ConfigError(str(path), expected=f"format {FORMAT}", got="another one",
                          fix="install the offbook that wrote it, or a newer one")  # fmt: skip
    missing = {"revisions", "made", "tables", "folder"} - record.keys()
    if missing:
        raise DataError(str(path), expected=f"the entry {min(missing)!r}", got="none", fix=_ANOTHER)
    return record


def _unfinished(folder: Path) -> bool:
    """Whether a folder is empty, or holds what an attempt to copy into it left."""
    names = {path.name for path in folder.iterdir()}
    return names <= {"blobs", "tmp"} or any(name.startswith("tables-") for name in names)


def _check_table(path: Path, about: Mapping[str, Any]) -> None:
    found = "none"
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unreadable(path, error) from error
    if found != about["sha256"]:
        raise DataError(str(path), expected=f"SHA-256 {about['sha256']}", got=found,
                        fix=_ANOTHER)  # fmt: skip


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(str(path), expected="to be read", got=error.strerror or str(error),
                     fix="see to the disk of the copy and its rights")  # fmt: skip
