"""What every application does alike: one shape of error, headers, limits, and a last catch for the unforeseen."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offbook.errors import OffbookError
from offbook.service.pages import CONTENT_SECURITY_POLICY
from offbook.service.refusal import RefusedError, error_body

logger = logging.getLogger(__name__)

BODY_LIMIT = 1 << 20
"""Bytes of a request's body, except of an upload, which has its own limit."""

STRANGERS_BODY = 64 * 1024
"""Bytes that are read of somebody without a valid token: the framework reads a body before it asks who sent it."""

_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}

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
RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "A refusal.", "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
}
"""How the interface's description tells of errors."""

DrawError = Callable[[Mapping[str, Any]], str]
Count = Callable[[Scope, int, float], None]
Limit = Callable[[Scope], int | None]
Admit = Callable[[Scope], Awaitable[object]]


def dress(
    app: FastAPI,
    draw_error: DrawError,
    *,
    limit: Limit,
    admit: Admit,
    count: Count = lambda scope, status, seconds: None,
) -> None:
    """Gives an application the error shape, the headers and the limits.

    Args:
        app: the application, its routes already in place.
        draw_error: makes the page of an error body, for somebody who reads pages.
        limit: most bytes of a request's body; None where the route itself has a limit.
        admit: refuses who may send no body of more than `STRANGERS_BODY`, before it is read; not asked where there is
            no limit, for such a route asks first.
        count: told of every answer: the request, the status and the seconds until it began.
    """

    async def answer(request: Request, error: Exception) -> Response:
        return _shape(request.scope, _body(request, error), draw_error, getattr(error, "headers", None))

    for kind in (RefusedError, OffbookError, RequestValidationError, HTTPException, IntegrityError):
        app.add_exception_handler(kind, answer)
    app.add_middleware(_Door, draw_error=draw_error, limit=limit, admit=admit, count=count)


def _body(request: Request, error: Exception) -> dict[str, Any]:
    """Every error in the one JSON shape."""
    if isinstance(error, RefusedError):
        return error.body()
    if isinstance(error, OffbookError):
        detail = f"{error.where}: expected {error.expected}, got {error.got}."
        return error_body(422, "unusable", detail, error.fix)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return error_body(422, "invalid_request", f"{where}: {first['msg']}"[:400], "See /openapi.json for the form.")
    if isinstance(error, IntegrityError):
        return error_body(409, "conflict", "Somebody else did the same at the same moment.", "Send the request again.")
    if not isinstance(error, HTTPException):
        raise error
    words = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
    hint = {404: "See /openapi.json for what there is.", 405: "Use a method that /openapi.json lists."}
    return error_body(
        error.status_code,
        words.get(error.status_code, HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")),
        f"{request.method} {request.url.path[:200]}: {error.detail}",
        hint.get(error.status_code, "Correct the request."),
    )


def _shape(scope: Scope, body: dict[str, Any], draw_error: DrawError, headers: Any = None) -> Response:
    """An error body as JSON, or as a page for somebody who reads pages."""
    status = int(body["status"])
    extra = dict(headers or {})
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if "retry_after" in body:
        extra["Retry-After"] = str(max(1, round(body["retry_after"])))
    accept = next((value for name, value in scope.get("headers", []) if name == b"accept"), b"")
    if b"text/html" in accept and not str(scope.get("path", "")).startswith(("/v1/", "/api/")):
        return HTMLResponse(draw_error(body), status_code=status, headers=extra)
    return JSONResponse(body, status_code=status, headers=extra)


def _large(scope: Scope) -> bool:
    """Whether a request's body may be longer than what is read of a stranger."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    short = length.isdigit() and len(length) < 10 and int(length) <= STRANGERS_BODY
    return b"transfer-encoding" in headers or not short


class _Door:
    """The outermost layer: request ids, headers, body limits, counts, and the last catch for what nobody foresaw."""

    def __init__(self, app: ASGIApp, draw_error: DrawError, limit: Limit, admit: Admit, count: Count) -> None:
        self._app, self._draw_error, self._limit, self._admit, self._count = app, draw_error, limit, admit, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, name = time.perf_counter(), secrets.token_hex(8)
        status, received = 500, 0
        limit = self._limit(scope)

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if limit is not None and received > limit:
                raise HTTPException(413, f"a body of more than {limit} bytes")
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
            await _shape(scope, body, self._draw_error)(scope, receive, dressed)
            return
        try:
            if limit is not None and _large(scope):
                await self._admit(scope)
            await self._app(scope, counted, dressed)
        except RefusedError as error:
            await _shape(scope, error.body(), self._draw_error)(scope, receive, dressed)
        except Exception:
            # The traceback stays here, under the id that the caller was told.
            logger.exception("request %s: %s %s failed", name, scope["method"], scope["path"])
            if status != 500:
                raise
            detail = f"The service failed at request {name}."
            body = error_body(500, "internal", detail, "Tell the operator this number.")
            await _shape(scope, body, self._draw_error)(scope, receive, dressed)


@dataclass
class Turnstile:
    """Refuses an address for a while after many failed attempts to enter.

    Attributes:
        limit: failures within a minute after which it is refused.
    """

    limit: int = 30
    _failures: dict[str, deque[float]] = field(default_factory=dict)

    def check(self, address: str) -> None:
        """Raises 429 for an address that failed too often in the last minute."""
        failures = self._failures.get(address)
        while failures and failures[0] < time.monotonic() - 60:
            failures.popleft()
        if failures is not None and len(failures) >= self.limit:
            raise RefusedError(429, "too_many_failures", "Authorization header",
                               expected=f"fewer than {self.limit} failed attempts in a minute", got=str(len(failures)),
                               fix="wait a minute, then use a valid token")  # fmt: skip

    def fail(self, address: str) -> None:
        """Notes a failure; the oldest addresses are forgotten so that memory stays flat."""
        while len(self._failures) > 10_000:
            self._failures.pop(next(iter(self._failures)))
        self._failures.setdefault(address, deque(maxlen=self.limit)).append(time.monotonic())
