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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from offbook.arena import trials
from offbook.arena.database import Database
from offbook.arena.service import Settings
from offbook.arena.tables import FINAL, IN_FLIGHT, Trial
from offbook.arena.verify import kept_files
from offbook.errors import ConfigError, DataError
from offbook.runs.directory import write_atomic
from offbook.service.database import now
from offbook.service.refusal import RefusedError
from offbook.service.storage import BlobStore

FORMAT = 1
MANIFEST = "manifest.json"
FENCE_STEP = 1_000_000
"""By how much a restored arena raises its fences, so that no lease given after the copy is taken for a live one."""

_ROWS = 1000
Progress = Callable[[int, int], None]


def back_up(settings: Settings, folder: Path, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Copies an arena's rows and blobs into a folder; the arena may run meanwhile.

    Args:
        settings: of the arena.
        folder: empty or missing, or one that holds an earlier copy, whose blobs are kept and need no second copying.
        progress: called with the number of blobs that are copied, and of all.

    Returns:
        The manifest: `{format, revisions, made, tables: {name: {rows, sha256}}, folder, blobs, bytes}`.

    Raises:
        ConfigError: the folder holds something else.
        DataError: a blob is missing or damaged; the copy is not finished.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists() and not _unfinished(folder):
        raise ConfigError(str(folder), expected="an empty folder or an earlier copy", got="something else",
                          fix="choose another folder")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = folder / f"tables-{secrets.token_hex(4)}"
    part.mkdir(mode=0o700)
    database = Database(settings.database_url)
    try:
        manifest, sizes = _copy_rows(database, part)
    finally:
        database.close()
    source, target = BlobStore(settings.blobs_url), BlobStore(str(folder.resolve()))
    for done, (sha256, size) in enumerate(sorted(sizes.items()), start=1):
        if not target.holds(sha256) or target.size(sha256) != size:
            _copy_blob(source, target, sha256)
        progress(done, len(sizes))
    target.clear_unfinished(0.0)
    manifest |= {"format": FORMAT, "folder": part.name, "blobs": len(sizes), "bytes": sum(sizes.values())}
    write_atomic(folder / "arena.json", json.dumps(settings.portable(), indent=2) + "\n", mode=0o600)
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n", mode=0o600)
    for other in folder.glob("tables-*"):
        if other != part:
            shutil.rmtree(other)
    return manifest


def restore(
    folder: Path, settings: Settings, progress: Progress = lambda done, total: None
) -> tuple[Settings, dict[str, Any]]:
    """Makes an arena from a copy, on an empty database and in a store of its own.

    Leases that were live when the copy was taken end as robot faults. Fences are raised, so that a worker that was
    given a trial after the copy was taken, and still plays it, is refused.

    Args:
        folder: of the copy.
        settings: where the arena shall stand: folder, database and blobs; all else comes with the copy.
        progress: called with the number of blobs that are restored, and of all.

    Returns:
        The new arena's settings, which are saved in its folder, and the copy's manifest.

    Raises:
        ConfigError: no copy, or one of a newer offbook; the place is taken.
        DataError: the copy is damaged.
    """
    manifest = _manifest(folder)
    part = folder / manifest["folder"]
    for name, about in manifest["tables"].items():
        _check_table(part / f"{name}.jsonl", about)
    kept = json.loads((folder / "arena.json").read_text())
    places = {"database": settings.database, "blobs": settings.blobs}
    settings = Settings.from_record(kept | places, settings.folder, str(folder / "arena.json"))
    if settings.folder.exists() and any(settings.folder.iterdir()):
        raise ConfigError(str(settings.folder), expected="a new or empty folder", got="something else",
                          fix="choose another")  # fmt: skip
    settings.folder.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    try:
        _insert_rows(database, part, manifest)
        database.migrate()
        _end_leases(database)
        with database.read() as session:
            hashes = sorted(kept_files(session))
    finally:
        database.close()
    source, target = BlobStore(str(folder.resolve())), BlobStore(settings.blobs_url)
    for done, sha256 in enumerate(hashes, start=1):
        _copy_blob(source, target, sha256)
        progress(done, len(hashes))
    settings.save()
    return settings, manifest


# --- rows -----------------------------------------------------------------------------------------------------------


def _copy_rows(database: Database, part: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Writes all rows of one moment; returns what the manifest says of them, and the files that they name."""
    tables: dict[str, dict[str, Any]] = {}
    revisions: dict[str, str] = {}
    with database.snapshot() as session:
        made = float(session.execute(sa.select(now(session))).scalar_one())
        for schema in database.schemas:
            version = sa.text(f"SELECT version_num FROM {schema.version_table}")
            revisions[schema.version_table] = str(session.execute(version).scalar_one())
        for table in (table for schema in database.schemas for table in schema.metadata.sorted_tables):
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


def _insert_rows(database: Database, part: Path, manifest: Mapping[str, Any]) -> None:
    """Puts the rows into tables of the schema in which they were copied; what is newer, the migrations add after."""
    if sa.inspect(database.engine).get_table_names():
        raise ConfigError(f"database {database.engine.url.render_as_string()}", expected="an empty database",
                          got="one with tables", fix="make a new one")  # fmt: skip
    database.migrate(manifest["revisions"])
    with database.write() as session:
        connection = session.connection()
        schema = sa.MetaData()
        schema.reflect(connection)
        for table in schema.sorted_tables:
            if table.name not in manifest["tables"]:
                continue
            for column in table.columns:
                if isinstance(column.type, sa.JSON):
                    column.type.none_as_null = True
            batch: list[dict[str, Any]] = []
            for row in _rows(part / f"{table.name}.jsonl"):
                batch.append(row)
                if len(batch) == _ROWS:
                    connection.execute(table.insert(), batch)
                    batch = []
            if batch:
                connection.execute(table.insert(), batch)
            if connection.dialect.name == "postgresql" and "id" in table.columns:
                # The database's own counter has not seen these numbers.
                most = sa.select(sa.func.coalesce(sa.func.max(table.c.id), 0) + 1).scalar_subquery()
                serial = sa.func.pg_get_serial_sequence(table.name, "id")
                connection.execute(sa.select(sa.func.setval(serial, most, sa.false())))


def _end_leases(database: Database) -> None:
    with database.write() as session:
        session.execute(sa.update(Trial).where(Trial.state.in_(IN_FLIGHT)).values(lease_until=0.0))
        trials.reap(session, trials.Rules(fault_cap=2**31 - 1), reason="the arena was restored from a copy")
        session.execute(sa.update(Trial).where(Trial.state.not_in(FINAL)).values(fence=Trial.fence + FENCE_STEP))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


# --- files ----------------------------------------------------------------------------------------------------------


def _copy_blob(source: BlobStore, target: BlobStore, sha256: str) -> None:
    try:
        with target.upload(limit=1 << 62, expected=sha256) as upload:
            for piece in source.read(sha256):
                upload.write(piece)
            upload.commit()
    except RefusedError as error:
        raise DataError(f"blob {sha256}", expected="the whole file", got=error.got,
                        fix="look with: offbook arena verify-store") from error  # fmt: skip


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        got = "an unfinished copy" if _unfinished(folder) else f"no readable {MANIFEST}"
        raise ConfigError(str(folder), expected="a finished copy of an arena", got=got,
                          fix="make one with: offbook arena backup") from error  # fmt: skip
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConfigError(str(folder / MANIFEST), expected=f"format {FORMAT}", got="another one",
                          fix="install the offbook that wrote it, or a newer one")  # fmt: skip
    return record


def _unfinished(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("tables-*"))


def _check_table(path: Path, about: Mapping[str, Any]) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        found = "none"
    if found != about["sha256"]:
        raise DataError(str(path), expected=f"SHA-256 {about['sha256']}", got=found,
                        fix="take another copy; this one is damaged")  # fmt: skip
