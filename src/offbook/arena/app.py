"""The arena's web application: routes, error shape, headers, limits, and the two clocks that run beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from sqlalchemy.exc import IntegrityError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offbook import __version__
from offbook.arena import trials
from offbook.arena.database import Database
from offbook.arena.events import Feed
from offbook.arena.pages import CONTENT_SECURITY_POLICY, STATIC_DIR, render
from offbook.arena.refusal import RefusedError, error_body
from offbook.arena.routes import ROUTERS
from offbook.arena.service import Arena, Settings
from offbook.errors import OffbookError

logger = logging.getLogger(__name__)

BODY_LIMIT = 1 << 20
"""Bytes of a request's body, except of an upload, which has its own limit."""

TICK_SECONDS = 0.5

_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


def create_app(settings: Settings, database: Database | None = None, url: str = "") -> FastAPI:
    """Builds the application; the database is migrated when it starts.

    Args:
        settings: the operator's decisions.
        database: another way to the database; tests give one with their own clock.
        url: where workers reach this server itself, when several share the database.
    """
    arena = Arena(settings, database, url)
    feed = Feed(arena.database, limit=settings.listeners)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(arena.database.migrate)
        await run_in_threadpool(arena.blobs.clear_unfinished)
        stopping = asyncio.Event()
        ticking = asyncio.create_task(_tick(arena, feed, stopping))
        try:
            yield
        finally:
            # Its step is waited for: a thread of it may hold a connection to the database.
            stopping.set()
            await ticking
            feed.close()
            await run_in_threadpool(arena.database.close)

    app = FastAPI(
        title="offbook arena",
        version=__version__,
        description="Policies are tried on robots in blind, paired, seeded trials. Errors are `{ok: false, error, "
        "detail, hint, status}`; tokens go into the Authorization header.",
        lifespan=lifespan,
        # The interactive pages of the framework load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"description": "A refusal.", "content": {"application/json": {"schema": _ERROR_SCHEMA}}}},
    )
    app.state.arena, app.state.feed = arena, feed
    for router in ROUTERS:
        app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC_DIR), name="static")
    for kind in (RefusedError, OffbookError, RequestValidationError, HTTPException, IntegrityError):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(_Door, arena=arena)
    return app


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["ok", "error", "detail", "hint", "status"],
    "properties": {
        "ok": {"const": False},
        "error": {"type": "string"},
        "detail": {"type": "string"},
        "hint": {"type": "string"},
        "status": {"type": "integer"},
    },
}


async def _tick(arena: Arena, feed: Feed, stopping: asyncio.Event) -> None:
    """Twice a second: leases that ran out, trials that waited for room, policies that must go, news for the pages."""

    def reap() -> None:
        with arena.database.write() as session:
            trials.reap(session, arena.settings.rules)
        with arena.database.read() as session:
            waiting = trials.waits_for_storage(session, arena.settings.rules)
        if waiting and arena.storage.sound():
            with arena.database.write() as session:
                trials.resume_stored(session, arena.settings.rules)

    while not stopping.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), TICK_SECONDS)
        for act in (partial(run_in_threadpool, reap), arena.gateway.sweep, feed.poll):
            try:
                await act()
            except Exception:
                # A database that is away comes back, and whatever else fails must not stop the clock for good.
                logger.exception("a step of the arena's clock failed; it goes on")


async def _answer_error(request: Request, error: Exception) -> Response:
    """Every error as the one JSON shape, or as a page for somebody who reads pages."""
    if isinstance(error, RefusedError):
        body = error.body()
    elif isinstance(error, OffbookError):
        body = error_body(422, "unusable", f"{error.where}: expected {error.expected}, got {error.got}.", error.fix)
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        body = error_body(422, "invalid_request", f"{where}: {first['msg']}"[:400], "See /openapi.json for the form.")
    elif isinstance(error, IntegrityError):
        body = error_body(409, "conflict", "Somebody else did the same at the same moment.", "Send the request again.")
    elif isinstance(error, HTTPException):
        words = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
        hint = {404: "See /openapi.json for what there is.", 405: "Use a method that /openapi.json lists."}
        detail = f"{request.method} {request.url.path[:200]}: {error.detail}"
        body = error_body(
            error.status_code,
            words.get(error.status_code, HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")),
            detail,
            hint.get(error.status_code, "Correct the request."),
        )
    else:
        raise error
    return _shape(request.scope, body, getattr(error, "headers", None))


def _shape(scope: Scope, body: dict[str, Any], headers: Any = None) -> Response:
    status = int(body["status"])
    extra = dict(headers or {})
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if "retry_after" in body:
        extra["Retry-After"] = str(max(1, round(body["retry_after"])))
    accept = next((value for name, value in scope.get("headers", []) if name == b"accept"), b"")
    if b"text/html" in accept and not str(scope.get("path", "")).startswith("/v1/"):
        return HTMLResponse(render("error", body), status_code=status, headers=extra)
    return JSONResponse(body, status_code=status, headers=extra)


class _Door:
    """The outermost layer: request ids, headers, body limits, counts, and the last catch for what nobody foresaw."""

    def __init__(self, app: ASGIApp, arena: Arena) -> None:
        self._app, self._meters = app, arena.meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, name = time.perf_counter(), secrets.token_hex(8)
        status, received = 500, 0
        limited = scope["method"] != "PUT"

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if limited and received > BODY_LIMIT:
                raise HTTPException(413, f"a body of more than {BODY_LIMIT} bytes")
            return message

        async def dressed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {key.lower() for key, _ in message["headers"]}
                extra = _HEADERS | {"x-request-id": name}
                if not scope["path"].startswith("/static/"):
                    extra["cache-control"] = "no-store"
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in extra.items() if k.encode() not in present),
                ]
                self._count(scope, status, time.perf_counter() - began)
            await send(message)

        if "\0" in scope["path"] or b"%00" in scope["query_string"] or "\ufffd" in scope["path"]:
            hint = "Send UTF-8 text without NUL."
            body = error_body(400, "bad_address", "The address holds a NUL or bytes that are no text.", hint)
            await _shape(scope, body)(scope, receive, dressed)
            return
        try:
            await self._app(scope, counted, dressed)
        except Exception:
            # The traceback stays here, under the id that the caller was told.
            logger.exception("request %s: %s %s failed", name, scope["method"], scope["path"])
            if status != 500:
                raise
            body = error_body(500, "internal", f"The arena failed at request {name}.", "Tell the operator this number.")
            await _shape(scope, body)(scope, receive, dressed)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._meters.requests.labels(scope["method"], route, str(status)).inc()
        self._meters.seconds.labels(route).observe(seconds)


def openapi(settings: Settings) -> str:
    """The interface as OpenAPI JSON."""
    return json.dumps(create_app(settings).openapi(), indent=1)
