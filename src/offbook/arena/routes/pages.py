"""The pages that people read, and the stream that tells them of news."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, StreamingResponse
from sqlalchemy.orm import Session

from offbook.arena import views
from offbook.arena.events import Feed
from offbook.arena.pages import render
from offbook.arena.routes.doors import arena_of
from offbook.arena.routes.submissions import base_url
from offbook.service.fields import number

router = APIRouter(include_in_schema=False)


def _page(request: Request, name: str, make: Callable[[Session], dict[str, Any]]) -> HTMLResponse:
    with arena_of(request).database.read() as session:
        view = make(session)
    return HTMLResponse(render(name, view, query=request.query_params))


@router.get("/")
def index(request: Request) -> HTMLResponse:
    """All benchmarks."""
    return _page(request, "index", views.index)


@router.get("/benchmarks/{benchmark}")
def leaderboard(request: Request, benchmark: str, split: str | None = None) -> HTMLResponse:
    """Who is better, and how sure."""
    query = request.query_params
    return _page(
        request,
        "leaderboard",
        lambda session: views.leaderboard(session, benchmark, split, shown=(query.get("q"), query.get("page"))),
    )


@router.get("/benchmarks/{benchmark}/compare")
def compare(request: Request, benchmark: str, a: str = "", b: str = "") -> HTMLResponse:
    """Two submissions on the same scenes and seeds."""
    return _page(
        request, "compare", lambda session: views.compare(session, number("submission", a), number("submission", b))
    )


@router.get("/submissions/{entry}")
def submission(request: Request, entry: str) -> HTMLResponse:
    """What happened to mine."""
    present = arena_of(request).gateway.present()
    return _page(
        request,
        "submission",
        lambda session: views.submission(session, number("submission", entry), present, base_url(request)),
    )


@router.get("/runs/{trial}")
def run(request: Request, trial: str) -> HTMLResponse:
    """Why did this trial end as it did."""
    blobs = arena_of(request).blobs
    return _page(request, "run", lambda session: views.run(session, number("trial", trial), blobs, base_url(request)))


@router.get("/queue")
def queue(request: Request) -> HTMLResponse:
    """When is my turn."""
    present = arena_of(request).gateway.present()
    return _page(request, "queue", lambda session: views.queue(session, present))


@router.get("/robots/{robot}")
def robot(request: Request, robot: str) -> HTMLResponse:
    """Is the robot healthy."""
    return _page(request, "robot", lambda session: views.robot(session, robot, base_url(request)))


@router.get("/submit")
def submit(request: Request, benchmark: str | None = None) -> HTMLResponse:
    """How do I take part."""
    return _page(request, "submit", lambda session: views.submit(session, benchmark, base_url(request)))


@router.get("/v1/events", include_in_schema=True, response_class=StreamingResponse)
async def events(request: Request) -> StreamingResponse:
    """News as server-sent events, one for each line of the arena's log."""
    feed: Feed = request.app.state.feed
    address = request.client.host if request.client else ""
    return StreamingResponse(feed.listen(address), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
