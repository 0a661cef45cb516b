"""The door through which an operator lets people compare the runs of two submissions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from offbook.arena import accounts, comparisons
from offbook.arena.accounts import Principal
from offbook.arena.routes.doors import arena_of, needs
from offbook.service.fields import Text, number

router = APIRouter()


class StudyRequest(BaseModel):
    """What an operator wants compared."""

    model_config = ConfigDict(extra="forbid")
    a: Text = Field(max_length=20)
    b: Text = Field(max_length=20)
    question: Text = Field(default=comparisons.QUESTION, min_length=1, max_length=500)
    name: Text = Field(default="", max_length=120)
    raters_per_pair: int = Field(default=3, ge=1, le=1000)


@router.post("/v1/studies", status_code=201)
async def compare_runs(
    request: Request, wanted: StudyRequest, who: Annotated[Principal, Depends(needs("admin"))]
) -> dict[str, Any]:
    """Opens a blind study of two submissions' films, scene by scene; raters are invited under /api/rating/v1."""
    arena = arena_of(request)
    pair = number("submission", wanted.a), number("submission", wanted.b)

    def make() -> dict[str, Any]:
        made = comparisons.study_of_runs(
            arena.database,
            arena.blobs,
            arena.settings.folder / "cache",
            who.user,
            *pair,
            question=wanted.question,
            name=wanted.name,
            raters_per_pair=wanted.raters_per_pair,
        )
        with arena.database.write() as session:
            accounts.record_audit(session, who, "study.open", f"{made['study']}: {pair[0]} and {pair[1]}")
        return made

    async with request.app.state.rating.cleaning:
        return await run_in_threadpool(make)
