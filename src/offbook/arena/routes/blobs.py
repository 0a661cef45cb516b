"""Files in and out, by hash: streamed, capped, verified, with ranges so that a video can be sought."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from sqlalchemy import func, select
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


@router.put("/v1/blobs/{sha256}", status_code=201)
async def upload(request: Request, sha256: str, who: Annotated[Principal, Depends(identify)]) -> JSONResponse:
    """Takes a recording from a worker, or a safetensors checkpoint (application/octet-stream) from a submitter."""
    arena = arena_of(request)
    kind = request.headers.get("content-type", _BINARY).partition(";")[0].strip()
    worker = kind in MEDIA_TYPES
    who.require("worker" if worker else "submit")
    arena.blobs.path(sha256)
    limit = arena.settings.artifact_bytes if worker else arena.settings.checkpoint_bytes
    _check_length(request, limit)
    if not worker:
        await run_in_threadpool(_check_daily, arena, who)
    with await run_in_threadpool(lambda: arena.blobs.upload(limit=limit, expected=sha256)) as incoming:
        try:
            await _take(request, incoming, checkpoint=not worker)
        except ClientDisconnect:
            raise RefusedError(400, "incomplete", "upload", expected="the whole file", got="a connection that ended",
                               fix="send the file again") from None  # fmt: skip
        await run_in_threadpool(incoming.commit)
    kind = kind if worker else _BINARY
    await run_in_threadpool(_record, arena, who, sha256, incoming.size, kind, not worker)
    return JSONResponse({"sha256": sha256, "size": incoming.size}, status_code=201)


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


def _check_length(request: Request, limit: int) -> None:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise RefusedError(413, "too_large", "upload", expected=f"at most {limit} bytes", got=announced[:20],
                           fix="send a smaller file")  # fmt: skip


def _check_daily(arena: Arena, who: Principal) -> None:
    with arena.database.read() as session:
        recent = select(func.sum(Blob.size)).where(
            Blob.user_id == who.user_id, Blob.private.is_(True), Blob.created > now(session) - 86400
        )
        used = session.scalar(recent) or 0
    if used >= arena.settings.daily_bytes:
        raise RefusedError(429, "upload_quota", f"uploads of {who.user} in 24 hours",
                           expected=f"less than {arena.settings.daily_bytes} bytes", got=str(used),
                           fix="wait a day")  # fmt: skip


def _record(arena: Arena, who: Principal, sha256: str, size: int, kind: str, private: bool) -> None:
    with arena.database.write() as session:
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
    responses={200: {"content": {_BINARY: {}}}, 206: {"description": "A part of the file."}},
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
    pieces = arena.blobs.read(sha256, start, stop)
    return StreamingResponse(
        pieces, status_code=206 if span is not None else 200, headers=headers, media_type=blob.media_type
    )


def _find(arena: Arena, sha256: str) -> Blob:
    with arena.database.read() as session:
        blob = session.get(Blob, sha256)
    if blob is None:
        raise unknown("blob", sha256, "upload it first with PUT")
    return blob
