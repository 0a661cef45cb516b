"""Tokens over HTTP, and what an operator's machines ask: is it alive, is it ready, what does it count."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from offbook.arena import accounts
from offbook.arena.accounts import Principal
from offbook.arena.routes.doors import arena_of, identify, needs
from offbook.arena.tables import Trial
from offbook.service.fields import Text
from offbook.service.refusal import error_body

router = APIRouter()


class TokenRequest(BaseModel):
    """What an operator says when a token is made."""

    model_config = ConfigDict(extra="forbid")
    user: Text = Field(max_length=64)
    scopes: list[Text] = Field(max_length=8)
    label: Text = Field(default="", max_length=200)
    days: float | None = Field(default=90.0, allow_inf_nan=False)


@router.post("/v1/tokens", status_code=201)
def create_token(
    request: Request, wanted: TokenRequest, who: Annotated[Principal, Depends(needs("admin"))]
) -> dict[str, Any]:
    """Makes a token; the answer is the only place where it can ever be read."""
    with arena_of(request).database.write() as session:
        user = accounts.find_user(session, wanted.user, create=True)
        token = accounts.issue_token(session, user, wanted.scopes, label=wanted.label, days=wanted.days)
        accounts.record_audit(session, who, "token.create", f"{wanted.user}: {','.join(wanted.scopes)}")
    return {"token": token, "prefix": token.split("_")[1], "user": wanted.user, "scopes": sorted(set(wanted.scopes))}


@router.get("/v1/tokens")
def list_tokens(request: Request, who: Annotated[Principal, Depends(identify)]) -> dict[str, Any]:
    """One's own tokens, or everybody's for an admin: prefixes, never secrets."""
    with arena_of(request).database.read() as session:
        return {"tokens": accounts.list_tokens(session, None if who.allows("admin") else who.user_id)}


@router.delete("/v1/tokens/{prefix}")
async def revoke_token(request: Request, prefix: str, who: Annotated[Principal, Depends(identify)]) -> dict[str, Any]:
    """Ends a token, one's own or, for an admin, anybody's; its open sockets are closed."""
    arena = arena_of(request)

    def revoke() -> None:
        with arena.database.write() as session:
            accounts.revoke_token(session, prefix, None if who.allows("admin") else who.user_id)
            accounts.record_audit(session, who, "token.revoke", prefix[:16])

    await run_in_threadpool(revoke)
    await arena.gateway.sweep()
    return {"revoked": prefix.removeprefix("ob_")[:8]}


@router.get("/healthz")
def healthz() -> dict[str, Any]:
    """Whether the process answers."""
    return {"ok": True}


@router.get("/readyz", responses={503: {"description": "The database does not answer."}})
def readyz(request: Request) -> Response:
    """Whether the database answers too."""
    try:
        with arena_of(request).database.read() as session:
            session.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        body = error_body(503, "not_ready", f"The database does not answer: {type(error).__name__}.", "Wait.")
        return JSONResponse(body, status_code=503)
    return JSONResponse({"ok": True})


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> PlainTextResponse:
    """Counters in the text form of Prometheus."""
    arena = arena_of(request)
    with arena.database.read() as session:
        states = session.execute(select(Trial.state, func.count(Trial.id)).group_by(Trial.state)).all()
    lines = ["# HELP offbook_trials Trials by state.", "# TYPE offbook_trials gauge"]
    lines += [f'offbook_trials{{state="{state}"}} {count}' for state, count in states]
    lines += ["# HELP offbook_policies Connected policies.", "# TYPE offbook_policies gauge"]
    lines += [f"offbook_policies {len(arena.gateway.present())}", ""]
    return PlainTextResponse(generate_latest(arena.meters.registry).decode() + "\n".join(lines))
