"""Whether database and blob store agree: every file that a row names is there and whole, and no file is forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from offbook.arena.database import Database
from offbook.arena.tables import Blob, Result, Submission
from offbook.rating.tables import Output
from offbook.service.refusal import RefusedError
from offbook.service.storage import BlobStore


@dataclass(kw_only=True)
class StoreReport:
    """What `verify_store` found; hashes, in order.

    Attributes:
        rows: files that the database knows, of trials, submissions and studies.
        files: files in the store.
        bytes: their size together.
        missing: known to the database, and no file there.
        damaged: the file's content or size is not what its name and the database say.
        unreadable: a file is there, and the store does not give it out: rights, or a disk that fails. Nothing is said
            of its content.
        dangling: named by a result or a submission, and unknown to the table of blobs.
        unreferenced: files that no row knows, such as an upload leaves whose server died before its row was written;
            they cost room and nothing else.
    """

    rows: int = 0
    files: int = 0
    bytes: int = 0
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    unreferenced: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether everything that the database names can be read."""
        return not (self.missing or self.damaged or self.unreadable or self.dangling)


def verify_store(
    database: Database,
    blobs: BlobStore,
    *,
    content: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> StoreReport:
    """Compares the database with the store; the server may run meanwhile, for blobs are never changed or removed.

    Args:
        database: of the arena.
        blobs: its store.
        content: whether every file is read and hashed; else only names and sizes are compared.
        progress: called with the number of files that were looked at, and of all.

    Raises:
        ConfigError: the database is away, or its schema is not this version's.
        RefusedError: 503, the store does not answer.
    """
    # Files first: a blob that comes in between has its row already, and its file is looked for by itself.
    stored = dict(blobs.stored())
    with database.snapshot() as session:
        rows = kept_files(session)
        named = _named(session)
    report = StoreReport(rows=len(rows), files=len(stored), bytes=sum(stored.values()))
    for done, (sha256, size) in enumerate(sorted(rows.items()), start=1):
        if sha256 not in stored and not blobs.holds(sha256):
            report.missing.append(sha256)
        elif stored.get(sha256, size) != size:
            report.damaged.append(sha256)
        elif content:
            _read(blobs, sha256, report)
        progress(done, len(rows))
    report.dangling = sorted(named - rows.keys())
    report.unreferenced = sorted(stored.keys() - rows.keys())
    return report


def kept_files(session: Session) -> dict[str, int]:
    """The files that the database knows, those of the arena and those of its studies: hash and size in bytes."""
    shown = select(Output.sha256, Output.size)
    rows = [*session.execute(shown), *session.execute(select(Blob.sha256, Blob.size))]
    return {sha256: size for sha256, size in rows if sha256 is not None}


def _named(session: Session) -> set[str]:
    """The hashes that results and submissions name."""
    files = session.scalars(select(Result.files).execution_options(yield_per=1000))
    found = {str(file["sha256"]) for of_result in files for file in of_result}
    return found | set(session.scalars(select(Submission.checkpoint).where(Submission.checkpoint.is_not(None))))


def _read(blobs: BlobStore, sha256: str, report: StoreReport) -> None:
    digest = hashlib.sha256()
    try:
        for piece in blobs.read(sha256):
            digest.update(piece)
    except RefusedError as error:
        if error.status == 404:
            report.missing.append(sha256)
            return
        blobs.size(sha256)  # which says so when the store as a whole is away
        report.unreadable.append(sha256)
        return
    if digest.hexdigest() != sha256:
        report.damaged.append(sha256)
