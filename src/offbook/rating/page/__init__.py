"""The pages of studies: where a rater judges, which studies there are, and what people said in one of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment
from starlette.concurrency import run_in_threadpool

from offbook.rating import views
from offbook.rating.routes import AnyOwner, rating_of
from offbook.rating.service import Rating
from offbook.service.fields import number
from offbook.service.pages import Navigation, environment

router = APIRouter(include_in_schema=False)


def render(rating: Rating, name: str, view: Mapping[str, Any]) -> str:
    """Draws one page in the frame of the service that shows it.

    Args:
        rating: the service.
        name: of the template, such as `"study"`.
        view: the page's view-model; a key that the page needs and the view lacks raises `jinja2.UndefinedError`.
    """
    template = _environment(rating.brand, tuple(rating.navigation)).get_template(f"{name}.html")
    return template.render(view=view, page=name, query={})


@cache
def _environment(brand: str, navigation: Navigation) -> Environment:
    return environment(Path(__file__).parent, brand, navigation)


@router.get("/rate")
def rate(request: Request) -> HTMLResponse:
    """Which is better? The token stands behind the # of the address, which no browser sends."""
    return HTMLResponse(render(rating_of(request), "rate", {}))


@router.get("/studies")
def studies(request: Request, owner: AnyOwner) -> HTMLResponse:
    """Which studies there are."""
    rating = rating_of(request)
    with rating.database.read() as session:
        view = views.studies(session, owner)
    return HTMLResponse(render(rating, "studies", view))


@router.get("/studies/{study}")
async def study(request: Request, study: str, owner: AnyOwner) -> HTMLResponse:
    """What did people say?"""
    rating = rating_of(request)

    def draw() -> str:
        with rating.database.read() as session:
            view = views.study(rating, session, number("study", study), owner)
        return render(rating, "study", view)

    async with rating.figuring:
        return HTMLResponse(await run_in_threadpool(draw))
