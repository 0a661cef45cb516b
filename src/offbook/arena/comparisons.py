"""Studies of runs: people compare the films of two submissions on the same scenes and seeds, blind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.orm import Session

from offbook.arena.tables import Submission
from offbook.arena.views.boards import paired, results, videos
from offbook.rating import outputs, studies
from offbook.rating.outputs import OutputRecord
from offbook.runs.progress import track
from offbook.service.database import Database
from offbook.service.refusal import RefusedError
from offbook.service.storage import BlobStore

QUESTION = "Which robot did it better?"


def study_of_runs(
    database: Database,
    blobs: BlobStore,
    cache: Path,
    owner: str,
    first: int,
    second: int,
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
        second: another on the same split.
        question: that raters are asked.
        name: of the study; made of the names of both when empty.
        raters_per_pair: answers that each pair of films gets.

    Returns:
        `{study, name, pairs}`.

    Raises:
        RefusedError: as of `paired`; 422, there is no scene with two films; 409, there is a study of that name.
    """
    with database.read() as session:
        a, b = paired(session, first, second)
        records = list(_records(session, a, b))
        split = a.split
        made = name or f"{a.name} ({a.id}) and {b.name} ({b.id}) on {split.benchmark.name}, {split.name}"
    if not records:
        raise RefusedError(422, "no_films", f"submissions {first} and {second}",
                           expected="a scene that both have finished, with films", got="none",
                           fix="wait until their trials are done")  # fmt: skip
    wanted = studies.design(
        name=made[:120], question=question, modality="rollout", min_watch=0.9, raters_per_pair=raters_per_pair
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


def _records(session: Session, a: Submission, b: Submission) -> Iterator[OutputRecord]:
    """Both films of each scene that has two, by the hashes of their files."""
    names = [entry.name if a.name != b.name else f"{entry.name} ({entry.id})" for entry in (a, b)]
    sides = [results(session, entry.id) for entry in (a, b)]
    for slot in sorted(sides[0].keys() & sides[1].keys()):
        films = [videos(side[slot].files)[:1] for side in sides]
        for system, film in zip(names, films, strict=True) if all(films) else ():
            yield OutputRecord(
                item=f"scene {slot}",
                system=system.strip(),
                prompt=a.split.benchmark.task,
                file=film[0]["url"].rpartition("/")[2],
            )
