"""The HTTP interface of studies under `/api/rating/v1`: owners prepare and close them, raters judge, both by a token.

No answer to a rater holds the name or the number of a system, an item, an output, a study or another rater. There are
no cookies, so no other site can act for somebody who is signed in here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import HTTPConnection
from starlette.types import Scope

from offbook.rating import outputs, studies, voting
from offbook.rating.exports import export_votes, votes_with_rules
from offbook.rating.service import Rating
from offbook.rating.studies import Design, Name
from offbook.rating.tables import Output, Rater, Study
from offbook.service.fields import Text, number
from offbook.service.refusal import RefusedError, unknown
from offbook.service.storage import parse_range
from offbook.service.web import BODY_LIMIT

PREFIX = "/api/rating/v1"
UPLOAD_BYTES = 512 << 20
RECORD_BYTES = 64 << 20
MOST_FILES = 1000

router = APIRouter(prefix=PREFIX, tags=["rating"])


def body_limit(scope: Scope) -> int:
    """Most bytes of a request's body: more for outputs than for anything else."""
    path = str(scope["path"])
    return UPLOAD_BYTES if path.startswith(f"{PREFIX}/studies/") and path.endswith("/outputs") else BODY_LIMIT


async def admit(scope: Scope) -> None:
    """Lets owners alone send more than a little: what a rater says is short.

    Raises:
        RefusedError: 401 or 403, somebody else does.
    """
    await identify_owner(HTTPConnection(scope))


def rating_of(connection: HTTPConnection) -> Rating:
    """The service that answers this request."""
    rating: Rating = connection.app.state.rating
    return rating


async def identify_owner(request: HTTPConnection) -> str:
    """The owner who asks.

    Raises:
        RefusedError: 401 or 403, somebody else does.
    """
    return await rating_of(request).identify_owner(request)


async def identify_owner_if_any(request: HTTPConnection) -> str | None:
    """The owner who asks, or None for a stranger, who shows no token."""
    return await identify_owner(request) if "authorization" in request.headers else None


def identify_rater(request: Request) -> Rater:
    """The rater who asks.

    Raises:
        RefusedError: 401, nobody was invited so; 429 after too many failures from one address.
    """
    rating = rating_of(request)
    try:
        with rating.database.read() as session:
            return voting.authenticate(session, request.headers.get("authorization"))
    except RefusedError:
        address = request.client.host if request.client else "unknown"
        rating.turnstile.check(address)
        rating.turnstile.fail(address)
        raise


Owner = Annotated[str, Depends(identify_owner)]
AnyOwner = Annotated[str | None, Depends(identify_owner_if_any)]
ThisRater = Annotated[Rater, Depends(identify_rater)]


class Invitation(BaseModel):
    """Whom an owner invites."""

    model_config = ConfigDict(extra="forbid")
    count: int = Field(default=1, ge=1, le=1000)
    kind: Literal["human", "llm", "script"] = "human"
    cohort: Text = Field(default="", max_length=120)


class ExclusionRequest(BaseModel):
    """What an owner leaves out, by a rule that was written down beforehand."""

    model_config = ConfigDict(extra="forbid")
    rule: Name
    rater: int | None = Field(default=None, ge=0, lt=2**31)
    vote: int | None = Field(default=None, ge=0, lt=2**31)


class VoteRequest(BaseModel):
    """What a rater says of a pair; see `voting.Answer`."""

    model_config = ConfigDict(extra="forbid")
    nonce: Text = Field(max_length=64)
    choice: Literal["left", "right", "tie", "both_bad", "skip"]
    reasons: list[Name] = Field(default_factory=list, max_length=12)
    note: Text = Field(default="", max_length=2000)
    dwell_ms: int | None = Field(default=None, ge=0, lt=2**31)
    watched: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    client_ms: int | None = Field(default=None, ge=0, lt=2**53)


@router.post("/studies", status_code=201)
def create_study(request: Request, wanted: Design, owner: Owner) -> dict[str, Any]:
    """Makes a study, as a draft."""
    with rating_of(request).database.write() as session:
        return {"id": studies.create(session, owner, wanted).id, "name": wanted.name, "state": "draft"}


@router.get("/studies")
def list_studies(request: Request, owner: Owner) -> dict[str, Any]:
    """All studies, newest first, with how far they are."""
    with rating_of(request).database.read() as session:
        found = session.scalars(select(Study).order_by(Study.id.desc()).limit(500)).all()
        counts = studies.counts(session, found)
        return {"studies": [study_view(study) | counts[study.id] for study in found]}


@router.get("/studies/{study}")
def show_study(request: Request, study: str, owner: Owner) -> dict[str, Any]:
    """A study with its rules and how far it is."""
    with rating_of(request).database.read() as session:
        found = studies.find(session, number("study", study))
        return study_view(found) | {"prereg": found.prereg} | studies.counts(session, [found])[found.id]


def study_view(study: Study) -> dict[str, Any]:
    """A study as its owner sees it."""
    names = (
        *("id", "name", "owner", "question", "modality", "state", "created", "opened", "closed", "anchor", "policy"),
        *("raters_per_pair", "gold_rate", "repeat_rate", "per_rater_cap", "min_dwell_s", "min_watch", "patience_s"),
    )
    return {name: getattr(study, name) for name in names}


_MULTIPART = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["records"],
                    "properties": {
                        "records": {"type": "string", "format": "binary", "description": "JSON lines, one an output"},
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    },
                }
            }
        },
    }
}


@router.post("/studies/{study}/outputs", status_code=201, openapi_extra=_MULTIPART)
async def add_outputs(request: Request, study: str, owner: Owner) -> dict[str, int]:
    """Takes outputs: JSON lines as `records`, and the files that they name as `files`. Sent again, nothing doubles."""
    rating, wanted = rating_of(request), number("study", study)

    def look() -> str:
        with rating.database.read() as session:
            found = studies.find(session, wanted)
            studies.require(found, "draft", "add outputs before a study is opened")
            return found.modality

    modality = await run_in_threadpool(look)
    async with request.form(max_files=MOST_FILES, max_part_size=RECORD_BYTES) as form:
        head = form.get("records")
        if isinstance(head, UploadFile) and (head.size or 0) > RECORD_BYTES:
            raise RefusedError(413, "too_large", "records", expected=f"at most {RECORD_BYTES} bytes",
                               got=str(head.size), fix="send them in several parts")  # fmt: skip
        lines = await head.read() if isinstance(head, UploadFile) else (head or "").encode(errors="replace")
        files = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
        async with rating.cleaning:
            return await run_in_threadpool(_take, rating, wanted, modality, lines, files)


def _take(rating: Rating, study: int, modality: str, lines: bytes, files: list[UploadFile]) -> dict[str, int]:
    records = outputs.read_records(lines)
    named = {part.filename or "": part for part in files}
    if len(named) < len(files):
        raise RefusedError(422, "same_name", "files", expected="a name for each file",
                           got=f"{len(files)} files of {len(named)} names", fix="rename them")  # fmt: skip
    prepared = []
    with TemporaryDirectory() as folder:
        for record in records:
            path = None
            if record.file in named:
                # The sender's name is a label and never a path.
                path = Path(folder) / "file"
                with path.open("wb") as copy:
                    named[record.file].file.seek(0)
                    shutil.copyfileobj(named[record.file].file, copy)
            prepared.append((record, outputs.prepare(record, modality, rating.blobs, path)))
    with rating.database.write() as session:
        return outputs.add(session, studies.find(session, study, lock=True), prepared)


@router.post("/studies/{study}/open")
def open_study(request: Request, study: str, owner: Owner) -> dict[str, Any]:
    """Makes the pairs and lets raters in."""
    with rating_of(request).database.write() as session:
        found = studies.find(session, number("study", study), lock=True)
        return {"state": "open", "pairs": studies.open_study(session, found)}


@router.post("/studies/{study}/close")
def close_study(request: Request, study: str, owner: Owner) -> dict[str, Any]:
    """Takes no more votes; from now on everybody may see the results."""
    with rating_of(request).database.write() as session:
        found = studies.find(session, number("study", study), lock=True)
        return {"state": "closed", "votes": studies.close_study(session, found)}


@router.post("/studies/{study}/raters", status_code=201)
def invite(request: Request, study: str, wanted: Invitation, owner: Owner) -> dict[str, Any]:
    """Invites raters; the answer is the only place where their tokens can ever be read."""
    with rating_of(request).database.write() as session:
        found = studies.find(session, number("study", study), lock=True)
        made = studies.invite(session, found, wanted.count, wanted.kind, wanted.cohort)
    return {"raters": [row | {"path": f"/rate#{row['token']}"} for row in made]}


@router.post("/studies/{study}/exclusions", status_code=201)
def exclude(request: Request, study: str, wanted: ExclusionRequest, owner: Owner) -> dict[str, Any]:
    """Leaves out a vote or a rater; what is left out stays in the export, with the rule and who applied it."""
    with rating_of(request).database.write() as session:
        found = studies.find(session, number("study", study), lock=True)
        studies.exclude(session, found, wanted.rule, owner, rater=wanted.rater, vote=wanted.vote)
    return {"excluded": wanted.rule}


@router.get("/studies/{study}/stats")
async def show_stats(request: Request, study: str, owner: AnyOwner) -> dict[str, Any]:
    """The figures of a study; while it is open, for owners only."""
    rating = rating_of(request)

    def figures() -> dict[str, Any]:
        with rating.database.read() as session:
            return rating.analysis(session, visible(studies.find(session, number("study", study)), owner)).to_json()

    async with rating.figuring:
        return await run_in_threadpool(figures)


class _Lines(PlainTextResponse):
    media_type = "application/x-ndjson"


@router.get("/studies/{study}/export", response_class=_Lines)
def export(request: Request, study: str, owner: AnyOwner) -> _Lines:
    """All votes as `votes.jsonl`; while the study is open, for owners only. Strangers get no free texts."""
    with rating_of(request).database.read() as session:
        found = visible(studies.find(session, number("study", study)), owner)
        votes = export_votes(session, found)
        if found.state == "open":
            votes = votes_with_rules(found, votes)
    shown = votes if owner is not None else [replace(vote, note="") for vote in votes]
    text = "".join(json.dumps(vote.to_json(), allow_nan=False) + "\n" for vote in shown)
    headers = {"Content-Disposition": 'attachment; filename="votes.jsonl"'}
    return _Lines(text, headers=headers)


def visible(study: Study, owner: str | None) -> Study:
    """The study, if whoever asks may see its results.

    Raises:
        RefusedError: 403, it is not closed, and a stranger asks.
    """
    if study.state != "closed" and owner is None:
        raise RefusedError(403, "not_closed", f"study {study.id}", expected="a closed study, or its owner's token",
                           got=f"one that is {study.state}", fix="wait until it is closed")  # fmt: skip
    return study


@router.get("/invitation")
def show_invitation(request: Request, rater: ThisRater) -> dict[str, Any]:
    """What a rater is asked, and by which rules."""
    with rating_of(request).database.read() as session:
        return voting.introduce(studies.find(session, rater.study_id), rater)


@router.post("/consent")
def consent(request: Request, rater: ThisRater) -> dict[str, Any]:
    """Agreement to what is kept: answers, reasons, notes and times, under a number instead of a name."""
    with rating_of(request).database.write() as session:
        voting.consent(session, rater)
    return {"consented": True}


@router.get("/next")
def next_pair(request: Request, rater: ThisRater) -> dict[str, Any]:
    """The pair that the rater has before them, or a new one; `done` when nothing is left."""
    with rating_of(request).database.write() as session:
        return voting.next_pair(session, rater)


@router.post("/assignments/{assignment}/vote")
def vote(request: Request, assignment: str, given: VoteRequest, rater: ThisRater) -> dict[str, Any]:
    """Keeps a vote: 200 also for the same one again, 409 for another one, 410 when it comes too late."""
    answer = voting.Answer(**given.model_dump() | {"reasons": tuple(given.reasons)})
    with rating_of(request).database.write() as session:
        return voting.vote(session, rater, number("assignment", assignment), answer)


@router.get("/media/{opaque}", response_class=Response, responses={206: {"description": "A part of the file."}})
def media(request: Request, opaque: str) -> Response:
    """A picture or a film, or the part of it that a Range header names. Whoever was shown its address may read it."""
    rating = rating_of(request)
    with rating.database.read() as session:
        found = session.scalar(select(Output).where(Output.opaque == opaque))
    if found is None or found.sha256 is None:
        raise unknown("file", opaque[:8], "ask for the next pair")
    span = parse_range(request.headers.get("range"), found.size)
    start, stop = span or (0, found.size)
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Length": str(stop - start),
        "Cache-Control": "private, max-age=86400, immutable",
    }
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.size}"
    return StreamingResponse(
        rating.blobs.read(found.sha256, start, stop),
        status_code=200 if span is None else 206,
        headers=headers,
        media_type=found.media_type,
    )
