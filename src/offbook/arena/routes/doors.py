"""Who is asking, and of which arena: what every route begins with."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import Depends
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection

from offbook.arena import accounts
from offbook.arena.accounts import Principal
from offbook.arena.service import Arena
from offbook.service.refusal import RefusedError


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


async def identify_operator(connection: HTTPConnection) -> str:
    """The operator's name: who makes studies of runs and sees those that are open."""
    who = await identify(connection)
    who.require("admin")
    return who.user
