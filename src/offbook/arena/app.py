"""The arena's web application: routes, error shape, headers, limits, and the two clocks that run beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from functools import partial

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection
from starlette.types import Scope

from offbook import __version__
from offbook.arena import trials
from offbook.arena.database import Database
from offbook.arena.events import Feed
from offbook.arena.pages import BRAND, NAVIGATION, render
from offbook.arena.routes import ROUTERS
from offbook.arena.routes.doors import identify, identify_operator
from offbook.arena.service import Arena, Settings
from offbook.rating import page as rating_pages
from offbook.rating import routes as rating_routes
from offbook.rating.routes import body_limit
from offbook.rating.service import Rating
from offbook.service.pages import static_files
from offbook.service.web import RESPONSES, dress

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def create_app(settings: Settings, database: Database | None = None, url: str = "") -> FastAPI:
    """Builds the application; the database is migrated when it starts.

    Args:
        settings: the operator's decisions.
        database: another way to the database; tests give one with their own clock.
        url: where workers reach this server itself, when several share the database.
    """
    arena = Arena(settings, database, url)
    feed = Feed(arena.database, limit=settings.listeners, per_address=settings.listeners_per_address)

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
        responses=RESPONSES,
    )
    app.state.arena, app.state.feed = arena, feed
    app.state.rating = Rating(
        database=arena.database,
        blobs=arena.blobs,
        identify_owner=identify_operator,
        brand=BRAND,
        navigation=NAVIGATION,
        turnstile=arena.turnstile,
    )
    for router in (*ROUTERS, rating_routes.router, rating_pages.router):
        app.include_router(router)
    app.mount("/static", static_files("offbook.arena.pages", "offbook.rating.page"), name="static")

    def count(scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        # A label stays for good, and anything may be sent as a method.
        method = scope["method"] if scope["method"] in _METHODS else "other"
        arena.meters.requests.labels(method, route, str(status)).inc()
        arena.meters.seconds.labels(route).observe(seconds)

    dress(app, partial(render, "error"), limit=_limit, admit=_admit, count=count)
    return app


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


def _limit(scope: Scope) -> int | None:
    return None if scope["method"] == "PUT" else body_limit(scope)


async def _admit(scope: Scope) -> None:
    if str(scope["path"]).startswith(rating_routes.PREFIX):
        await rating_routes.admit(scope)
    else:
        await identify(HTTPConnection(scope))


def openapi(settings: Settings) -> str:
    """The interface as OpenAPI JSON."""
    return json.dumps(create_app(settings).openapi(), indent=1)
