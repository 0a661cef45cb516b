"""Who is asking, and of which arena: what every route begins with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends
from pydantic import AfterValidator
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection

from offbook.arena import accounts
from offbook.arena.accounts import Principal
from offbook.arena.refusal import RefusedError
from offbook.arena.service import Arena


def _storable(value: str) -> str:
    """Databases refuse NUL and half of a surrogate pair, in ways of their own."""
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("text with a NUL or half a character")
    return value


def _small(value: dict[str, Any]) -> dict[str, Any]:
    """JSON that both databases take, and not much of it."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise ValueError("numbers that JSON does not know, or text that is none") from error
    if len(text) > 16_384 or "\\u0000" in text:
        raise ValueError("more than 16 KiB, or a NUL")
    return value


Text = Annotated[str, AfterValidator(_storable)]
SmallRecord = Annotated[dict[str, Any], AfterValidator(_small)]


def arena_of(connection: HTTPConnection) -> Arena:
    """The arena that serves this request."""
    arena: Arena = connection.app.state.arena
    return arena


async def identify(connection: HTTPConnection) -> Principal:
    """Who stands behind the request's token.

    Raises:
        RefusedError: 401 without a valid token, 429 after too many failures from one address.
    """
    arena = arena_of(connection)
    address = connection.client.host if connection.client else "unknown"

    def look() -> Principal:
        with arena.database.read() as session:
            return accounts.authenticate(session, connection.headers.get("authorization"))

    try:
        return await run_in_threadpool(look)
    except RefusedError:
        # Only failures are counted and slowed down: a stranger shall not lock out those behind the same address.
        arena.turnstile.check(address)
        arena.turnstile.fail(address)
        raise


def needs(scope: str) -> Callable[[Principal], Principal]:
    """A dependency: a valid token with this scope."""

    def check(who: Principal = Depends(identify)) -> Principal:  # noqa: B008 - how FastAPI is told
        who.require(scope)
        return who

    return check
