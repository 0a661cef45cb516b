"""Studies of runs: people compare the films of two submissions on the same scenes and seeds, blind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from offbook.arena.tables import Submission
from offbook.arena.views.boards import paired, results, videos
from offbook.rating import outputs, studies
from offbook.rating.outputs import OutputRecord
from offbook.runs.progress import track
from offbook.service.database import Database
from offbook.service.refusal import RefusedError, unknown
from offbook.service.storage import BlobStore

QUESTION = "Which robot did it better?"


def study_of_runs(
    database: Database,
    blobs: BlobStore,
    cache: Path,
    owner: str,
    first: int,
    second: int | None = None,
    *,
    question: str = QUESTION,
    name: str = "",
    raters_per_pair: int = 3,
) -> dict[str, object]:
    """Opens a study of all scenes of which both submissions have a film.

    Args:
        database: of the arena.
        blobs: of the arena.
        cache: folder for films of a store elsewhere.
        owner: who opens it.
        first: a submission.
        second: another on the same split; when None, the one that the first was sent to be compared with.
        question: that raters are asked.
        name: of the study; made of the names of both when empty.
        raters_per_pair: answers that each pair of films gets.

    Returns:
        `{study, name, pairs}`.

    Raises:
        RefusedError: as of `paired`; 422, there is no second submission, or no scene with two films; 409, there is a
            study of that name.
    """
    with database.read() as session:
        a, b = paired(session, first, _rival(session, first) if second is None else second)
        records = list(_records(session, a, b))
        split = a.split
        own = f"{a.name.strip()} ({a.id}) and {b.name.strip()} ({b.id}) on {split.benchmark.name}, {split.name}"
        made = name or own[:120].strip()
    if not records:
        raise RefusedError(422, "no_films", f"submissions {a.id} and {b.id}",
                           expected="a scene that both have finished, with films", got="none",
                           fix="wait until their trials are done")  # fmt: skip
    wanted = studies.design(
        name=made, question=question, modality="rollout", min_watch=0.9, raters_per_pair=raters_per_pair
    )
    prepared = [
        (record, outputs.prepare(record, "rollout", blobs, blobs.local(str(record.file), cache)))
        for record in track(records, "films")
    ]
    with database.write() as session:
        study = studies.create(session, owner, wanted)
        outputs.add(session, study, prepared)
        pairs = studies.open_study(session, study)
    return {"study": study.id, "name": study.name, "pairs": pairs["real"]}


def _rival(session: Session, entry: int) -> int:
    found = session.get(Submission, entry)
    if found is None:
        raise unknown("submission", entry, "choose one that was sent as one of a pair")
    same = Submission.pairing_id == found.pairing_id
    rival = session.scalar(
        select(Submission.id).where(Submission.pairing_id.is_not(None), same, Submission.id != entry)
    )
    if rival is None:
        raise RefusedError(422, "not_paired", f"submission {entry}", expected="one that was sent as one of a pair",
                           got="one that was sent alone", fix="name another on the same split beside it")  # fmt: skip
    return rival


def _records(session: Session, a: Submission, b: Submission) -> Iterator[OutputRecord]:
    """Both films of each scene that has two, by the hashes of their files."""
    names = [entry.name.strip() for entry in (a, b)]
    if names[0] == names[1]:
        names = [f"{entry.name.strip()} ({entry.id})" for entry in (a, b)]
    sides = [results(session, entry.id) for entry in (a, b)]
    for slot in sorted(sides[0].keys() & sides[1].keys()):
        films = [videos(side[slot].files)[:1] for side in sides]
        for system, film in zip(names, films, strict=True) if all(films) else ():
            yield OutputRecord(
                item=f"scene {slot}",
                system=system,
                prompt=a.split.benchmark.task,
                file=film[0]["url"].rpartition("/")[2],
            )
