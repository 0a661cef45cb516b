"""What a submitter and a reader of the interface ask: benchmarks, submissions, leaderboards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from offbook.arena import accounts, submissions, views
from offbook.arena.accounts import Principal
from offbook.arena.routes.doors import arena_of, needs
from offbook.arena.sandbox import SandboxedPolicy
from offbook.arena.service import Arena, Settings
from offbook.arena.tables import Submission
from offbook.client.protocol import PolicyMeta
from offbook.errors import CheckpointError, ConfigError, MissingExtraError, needs_extra
from offbook.service.fields import Text, number
from offbook.service.refusal import RefusedError, unknown

router = APIRouter()


class SubmissionRequest(BaseModel):
    """A submission as it is sent."""

    model_config = ConfigDict(extra="forbid")
    benchmark: Text = Field(max_length=60)
    name: Text = Field(max_length=200)
    kind: Literal["remote", "checkpoint", "anchor"] = "remote"
    split: Text | None = Field(default=None, max_length=60)
    blob: Text | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    anchor: Text | None = Field(default=None, max_length=20)
    method: Text = Field(default="", max_length=200)
    imitates: Text = Field(default="", max_length=200)
    trials: int | None = Field(default=None, ge=1, le=10_000)


class PairRequest(BaseModel):
    """Two policies that are compared; benchmark, split and number of trials must be the same."""

    model_config = ConfigDict(extra="forbid")
    entries: list[SubmissionRequest] = Field(min_length=2, max_length=2)


@router.get("/v1/benchmarks")
def list_benchmarks(request: Request) -> dict[str, Any]:
    """What this arena tries policies on."""
    with arena_of(request).database.read() as session:
        return views.index(session)


@router.get("/v1/leaderboard/{benchmark}")
def leaderboard(request: Request, benchmark: str, split: str | None = None) -> dict[str, Any]:
    """All results of one split of a benchmark, or of its first split."""
    with arena_of(request).database.read() as session:
        return views.leaderboard(session, benchmark, split)


@router.get("/v1/compare")
def compare(request: Request, a: str, b: str) -> dict[str, Any]:
    """Two submissions of one split, scene by scene, with the paired difference."""
    with arena_of(request).database.read() as session:
        return views.compare(session, number("submission", a), number("submission", b))


@router.post("/v1/submissions", status_code=201)
async def submit(
    request: Request, wanted: SubmissionRequest, who: Annotated[Principal, Depends(needs("submit"))]
) -> dict[str, Any]:
    """Takes a policy for trials; a checkpoint is opened and checked before it is accepted."""
    (view,) = await _submit(request, who, submissions.Request(**wanted.model_dump()))
    return view


@router.post("/v1/pairs", status_code=201)
async def submit_pair(
    request: Request, wanted: PairRequest, who: Annotated[Principal, Depends(needs("submit"))]
) -> dict[str, Any]:
    """Takes two policies that are compared: on each scene one runs right after the other, in an order drawn by lot."""
    first, second = await _submit(request, who, *(submissions.Request(**each.model_dump()) for each in wanted.entries))
    return {"entries": [first, second]}


async def _submit(request: Request, who: Principal, *asked: submissions.Request) -> list[dict[str, Any]]:
    arena = arena_of(request)

    def check() -> list[str]:
        with arena.database.read() as session:
            return [submissions.check_request(session, who, each)[0].robot_class for each in asked]

    def accept() -> list[dict[str, Any]]:
        with arena.database.write() as session:
            one = len(asked) == 1
            taken = [submissions.accept(session, who, *asked)] if one else submissions.accept_pair(session, who, *asked)
            for submission in taken:
                accounts.record_audit(session, who, "submission.create", f"{submission.id}: {submission.name}")
        with arena.database.read() as session:
            present = arena.gateway.present()
            return [views.submission(session, each.id, present, base_url(request)) for each in taken]

    # Once before the costly check of a checkpoint, and once more, for good, in the transaction that accepts it.
    robot_classes = await run_in_threadpool(check)
    for each, robot_class in zip(asked, robot_classes, strict=True):
        if each.kind == "checkpoint" and each.blob is not None:
            # One at a time: each may take as much memory as the largest checkpoint, and who waits here holds no thread.
            async with arena.checking:
                await run_in_threadpool(_check_checkpoint, arena, each.blob, robot_class)
    return await run_in_threadpool(accept)


def _look_into(path: Path, settings: Settings) -> PolicyMeta:
    """What a checkpoint says of itself, after it was loaded as a worker would."""
    if settings.sandbox:
        policy = SandboxedPolicy(path, max_bytes=settings.checkpoint_bytes)
        policy.close()
        return policy.meta
    with needs_extra("models"):
        from offbook.learning.policies import load_policy
    return load_policy(path, max_bytes=settings.checkpoint_bytes).meta


def _check_checkpoint(arena: Arena, blob: str, robot_class: str) -> None:
    path = arena.blobs.local(blob, arena.settings.folder / "cache")
    try:
        meta = _look_into(path, arena.settings)
    except (CheckpointError, ConfigError) as error:
        # The path in our store is nobody's business.
        where, expected, got = error.where.replace(str(path), "checkpoint"), error.expected, error.got
        raise RefusedError(422, "bad_checkpoint", where, expected=expected, got=got, fix=error.fix) from error
    except MissingExtraError as error:
        fix = f"let the policy dial in (remote), or ask the operator to {error.fix}"
        raise RefusedError(422, "no_checkpoints", "checkpoint", expected="an arena that can load it",
                           got="one without PyTorch", fix=fix) from error  # fmt: skip
    with arena.database.read() as session:
        submissions.check_robot(session, meta, robot_class)


@router.get("/v1/submissions")
def list_submissions(request: Request, who: Annotated[Principal, Depends(needs("submit"))]) -> dict[str, Any]:
    """One's own submissions, newest first."""
    with arena_of(request).database.read() as session:
        rows = session.scalars(
            select(Submission).where(Submission.user_id == who.user_id).order_by(Submission.id.desc()).limit(500)
        )
        return {
            "submissions": [
                {
                    "id": str(row.id),
                    "name": row.name,
                    "state": row.state,
                    "kind": row.kind,
                    "benchmark": row.split.benchmark.name,
                    "split": row.split.name,
                    "n": row.n,
                    "wanted": row.wanted,
                    "created": row.created,
                }
                for row in rows
            ]
        }


@router.get("/v1/submissions/{entry}")
def show_submission(request: Request, entry: str) -> dict[str, Any]:
    """A submission with its trials, its log and its figures so far."""
    arena = arena_of(request)
    with arena.database.read() as session:
        return views.submission(session, number("submission", entry), arena.gateway.present(), base_url(request))


@router.get("/v1/runs/{trial}")
def show_run(request: Request, trial: str) -> dict[str, Any]:
    """A trial with its attempts, its traces and the addresses of what was recorded of it."""
    arena = arena_of(request)
    with arena.database.read() as session:
        return views.run(session, number("trial", trial), arena.blobs, base_url(request))


@router.post("/v1/submissions/{entry}/cancel")
def cancel(request: Request, entry: str, who: Annotated[Principal, Depends(needs("submit"))]) -> dict[str, Any]:
    """Withdraws a submission: what waits is not run, what runs is finished."""
    arena = arena_of(request)
    with arena.database.write() as session:
        found = session.get(Submission, number("submission", entry))
        if found is None or (found.user_id != who.user_id and not who.allows("admin")):
            raise unknown("submission", entry[:40], "list your submissions")
        cancelled = submissions.cancel(session, found)
        accounts.record_audit(session, who, "submission.cancel", str(found.id))
        return {"id": str(found.id), "state": found.state, "cancelled": cancelled}


def base_url(request: Request) -> str:
    """How people reach this arena."""
    return arena_of(request).settings.base_url or str(request.base_url).rstrip("/")
