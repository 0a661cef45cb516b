"""Files in and out, by hash: streamed, capped, verified, with ranges so that a video can be sought."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from offbook.arena.accounts import Principal
from offbook.arena.routes.doors import arena_of, identify
from offbook.arena.service import Arena
from offbook.arena.tables import Blob
from offbook.runs.checkpoint import MAGIC
from offbook.service.database import now
from offbook.service.refusal import RefusedError, unknown
from offbook.service.storage import Upload, parse_range

router = APIRouter()

MEDIA_TYPES = {"video/mp4", "image/jpeg", "image/png", "application/json", "application/vnd.apache.parquet"}
_BINARY = "application/octet-stream"


@router.put(
    "/v1/blobs/{sha256}", status_code=201, responses={507: {"description": "The store is full, or does not answer."}}
)
async def upload(request: Request, sha256: str, who: Annotated[Principal, Depends(identify)]) -> JSONResponse:
    """Takes a recording from a worker, or a safetensors checkpoint (application/octet-stream) from a submitter."""
    arena = arena_of(request)
    kind = request.headers.get("content-type", _BINARY).partition(";")[0].strip()
    worker = kind in MEDIA_TYPES
    who.require("worker" if worker else "submit")
    arena.blobs.path(sha256)
    limit = arena.settings.artifact_bytes if worker else arena.settings.checkpoint_bytes
    announced = _check_length(request, limit)
    # What is on its way counts, or many at once would each find room for one.
    arena.incoming[who.user_id] += 0 if worker else announced
    try:
        if not worker:
            await run_in_threadpool(_check_room, arena, who)
        size = await _receive(request, arena, sha256, limit, checkpoint=not worker)
        kind = kind if worker else _BINARY
        await run_in_threadpool(_record, arena, who, sha256, size, kind, not worker)
    except RefusedError as error:
        if error.status == 507:
            arena.storage.failed(error)
        raise
    finally:
        arena.incoming[who.user_id] -= 0 if worker else announced
    return JSONResponse({"sha256": sha256, "size": size}, status_code=201)


async def _receive(request: Request, arena: Arena, sha256: str, limit: int, *, checkpoint: bool) -> int:
    with await run_in_threadpool(lambda: arena.blobs.upload(limit=limit, expected=sha256)) as incoming:
        try:
            await _take(request, incoming, checkpoint=checkpoint)
        except ClientDisconnect:
            raise RefusedError(400, "incomplete", "upload", expected="the whole file", got="a connection that ended",
                               fix="send the file again") from None  # fmt: skip
        await run_in_threadpool(incoming.commit)
    return incoming.size


async def _take(request: Request, incoming: Upload, *, checkpoint: bool) -> None:
    head = b""
    checked = not checkpoint
    async for piece in request.stream():
        if not checked:
            head += piece[: 16 - len(head)]
            if len(head) >= 9:
                check_magic(head)
                checked = True
        if piece:
            await run_in_threadpool(incoming.write, piece)
    if not checked:
        check_magic(head)


def check_magic(head: bytes) -> None:
    """Refuses a checkpoint by its first bytes, naming what it is instead of safetensors.

    Raises:
        RefusedError: 415, a pickle, an archive or anything that does not begin like safetensors.
    """
    # The first eight bytes are the header's length, which may look like magic bytes: 640 is 80 02 in hexadecimal.
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return
    got = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
    raise RefusedError(415, "not_safetensors", "checkpoint", expected="a safetensors file", got=got or "something else",
                       fix="save the policy with offbook; pickles are never opened here")  # fmt: skip


def _check_length(request: Request, limit: int) -> int:
    """Bytes that are to come: as announced, or as many as are allowed."""
    announced = request.headers.get("content-length", "") if "transfer-encoding" not in request.headers else ""
    if not (announced.isascii() and announced.isdigit()):
        return limit
    if len(announced) > 18 or int(announced) > limit:
        raise RefusedError(413, "too_large", "upload", expected=f"at most {limit} bytes", got=announced[:20],
                           fix="send a smaller file")  # fmt: skip
    return int(announced)


def _check_room(arena: Arena, who: Principal) -> None:
    """Whether this user may send today what is on its way, and the store keeps enough for the recordings of trials."""
    arena.storage.check()
    with arena.database.read() as session:
        recent = select(func.sum(Blob.size)).where(
            Blob.user_id == who.user_id, Blob.private.is_(True), Blob.created > now(session) - 86400
        )
        used = session.scalar(recent) or 0
    coming = arena.incoming[who.user_id]
    if used + coming > arena.settings.daily_bytes:
        raise RefusedError(429, "upload_quota", f"uploads of {who.user} in 24 hours",
                           expected=f"at most {arena.settings.daily_bytes} bytes",
                           got=f"{used} stored and {coming} on their way", fix="wait, or send less")  # fmt: skip


def _record(arena: Arena, who: Principal, sha256: str, size: int, kind: str, private: bool) -> None:
    # Two workers may send the same file at the same moment: whose row comes first does not matter.
    with contextlib.suppress(IntegrityError), arena.database.write() as session:
        if session.get(Blob, sha256) is None:
            session.add(
                Blob(
                    sha256=sha256,
                    size=size,
                    media_type=kind,
                    private=private,
                    user_id=who.user_id,
                    created=now(session),
                )
            )


@router.get(
    "/v1/blobs/{sha256}",
    response_class=Response,
    responses={
        200: {"content": {_BINARY: {}}},
        206: {"description": "A part of the file."},
        503: {"description": "The store does not answer."},
    },
)
async def download(request: Request, sha256: str) -> Response:
    """A file, or the part of it that a Range header names; checkpoints only for their owner, workers and admins."""
    arena = arena_of(request)
    arena.blobs.path(sha256)
    blob = await run_in_threadpool(_find, arena, sha256)
    if blob.private:
        who = await identify(request)
        if not (who.user_id == blob.user_id or who.allows("worker")):
            raise unknown("blob", sha256, "ask its owner")
    span = parse_range(request.headers.get("range"), blob.size)
    start, stop = span or (0, blob.size)
    headers: dict[str, Any] = {
        "Accept-Ranges": "bytes",
        "Content-Length": str(stop - start),
        "ETag": f'"{sha256}"',
        "Cache-Control": "private, no-store" if blob.private else "public, max-age=31536000, immutable",
    }
    if blob.media_type == _BINARY:
        headers["Content-Disposition"] = f'attachment; filename="{sha256[:16]}.bin"'
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    try:
        pieces = await run_in_threadpool(arena.blobs.read, sha256, start, stop)
    except RefusedError as error:
        if error.status == 503:
            arena.storage.failed(error)
        raise
    return StreamingResponse(
        pieces, status_code=206 if span is not None else 200, headers=headers, media_type=blob.media_type
    )


def _find(arena: Arena, sha256: str) -> Blob:
    with arena.database.read() as session:
        blob = session.get(Blob, sha256)
    if blob is None:
        raise unknown("blob", sha256, "upload it first with PUT")
    return blob
