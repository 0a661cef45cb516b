"""What workers ask and report, and the two ends of a relay. All reports carry the fence of the lease."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response, WebSocket
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from offbook.arena import accounts, pictures, scheduler, trials
from offbook.arena.accounts import Principal
from offbook.arena.live import FRAME_BYTES
from offbook.arena.routes.doors import arena_of, identify, needs
from offbook.arena.tables import IN_FLIGHT, Attempt, Blob, Trial, Worker
from offbook.client.protocol import PolicyMeta
from offbook.errors import ConfigError
from offbook.service.fields import SmallRecord, Text, number
from offbook.service.refusal import RefusedError, unknown

router = APIRouter()

Finite = Annotated[float, Field(allow_inf_nan=False)]
Fence = Annotated[int, Field(ge=0, le=2**31 - 1)]
IsWorker = Annotated[Principal, Depends(needs("worker"))]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _described(record: dict[str, Any]) -> dict[str, Any]:
    """What policies will be held against must be readable."""
    if "observation" in record or "action" in record:
        try:
            PolicyMeta.from_json(record | {"name": "robot", "chunk": 1})
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return record


class LeaseRequest(_Message):
    """A worker that is free."""

    robot: Text = Field(min_length=1, max_length=80, description="the class of its robot, such as pour")
    worker: str = Field(pattern=r"^[\w][\w.@+-]{0,63}$", description="its name, which is also its robot's")
    instance: str = Field(pattern=r"^[\w-]{1,64}$", description="a random word for this start of the process")
    capabilities: Annotated[SmallRecord, AfterValidator(_described)] = Field(
        default_factory=dict, description="rate_hz, observation and action"
    )


class Started(_Message):
    """The arm is about to move."""

    fence: Fence


class Heartbeat(_Message):
    """The worker is alive."""

    fence: Fence
    progress: float | None = Field(default=None, ge=0, le=1)


class File(_Message):
    """A blob that was uploaded before."""

    name: str = Field(pattern=r"^[\w][\w .-]{0,79}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    media_type: Text = Field(max_length=80)
    size: int = Field(ge=0)


class Outcome(_Message):
    """A trial that was played to its end."""

    fence: Fence
    score: Finite
    success: bool | None = None
    steps: int = Field(ge=0, le=10_000_000)
    latency_ms: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    late_share: Annotated[float | None, Field(ge=0, le=1)] = None
    reason: Text = Field(default="", max_length=2000)
    files: list[File] = Field(default_factory=list, max_length=32)


class Fault(_Message):
    """A trial that could not be played to its end, and whose doing that was."""

    fence: Fence
    kind: Literal["policy_fault", "robot_fault", "needs_human", "needs_storage", "released"]
    reason: Text = Field(max_length=2000)
    steps: int = Field(default=0, ge=0, le=10_000_000)
    latency_ms: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    late_share: Annotated[float | None, Field(ge=0, le=1)] = None
    files: list[File] = Field(default_factory=list, max_length=32)


@router.post(
    "/v1/leases",
    responses={204: {"description": "Nothing for this robot now."}, 507: {"description": "No room for recordings."}},
)
def lease(request: Request, wanted: LeaseRequest, who: IsWorker) -> Response:
    """The next trial for a robot, chosen fairly among users; 204 when there is none."""
    arena = arena_of(request)
    applicant = scheduler.Applicant(
        user_id=who.user_id,
        worker=wanted.worker,
        instance=wanted.instance,
        robot_class=wanted.robot,
        spec=wanted.capabilities,
    )
    arena.storage.check()
    with arena.database.write() as session:
        given = scheduler.lease(
            session,
            applicant,
            connected=arena.gateway.leasable(session),
            elsewhere=arena.gateway.elsewhere(),
            home=arena.gateway.url,
            rules=arena.settings.rules,
        )
    return Response(status_code=204) if given is None else JSONResponse(given)


@router.post("/v1/trials/{trial}/start")
def start(request: Request, trial: str, message: Started, who: IsWorker) -> dict[str, Any]:
    """The arm is about to move: from here on only a recorded robot fault lets the trial be attempted again."""
    with arena_of(request).database.write() as session:
        _own(session, trial, message.fence, who)
        return trials.start(session, number("trial", trial), message.fence)


@router.post("/v1/trials/{trial}/heartbeat")
def heartbeat(request: Request, trial: str, message: Heartbeat, who: IsWorker) -> dict[str, Any]:
    """Keeps the lease; 409 means: stop the robot. `watched` asks for pictures, see `/v1/trials/{trial}/frame`."""
    arena = arena_of(request)
    with arena.database.write() as session:
        _own(session, trial, message.fence, who)
        answer = trials.heartbeat(
            session, number("trial", trial), message.fence, progress=message.progress, rules=arena.settings.rules
        )
        return answer | {"watched": pictures.watched(session, answer["robot"])}


@router.post("/v1/trials/{trial}/frame", status_code=204)
async def frame(request: Request, trial: str, fence: Fence, who: IsWorker) -> Response:
    """What the robot sees now, as JPEG, for the readers of its page; the next one takes its place."""
    arena, content = arena_of(request), await request.body()
    if not content.startswith(b"\xff\xd8\xff") or len(content) > FRAME_BYTES:
        raise RefusedError(422, "bad_frame", "body", expected=f"a JPEG of at most {FRAME_BYTES} bytes",
                           got=f"{len(content)} bytes", fix="send a smaller picture")  # fmt: skip

    def show() -> None:
        with arena.database.write() as session:
            _own(session, trial, fence, who)
            live = (Trial.id == number("trial", trial), Trial.fence == fence, Trial.state.in_(IN_FLIGHT))
            robot = session.scalar(select(Trial.robot_id).where(*live))
            if robot is None:
                raise unknown("lease", f"{trial[:20]}.{fence}", "ask for a new one")
            pictures.show(session, robot, content)

    await run_in_threadpool(show)
    return Response(status_code=204)


@router.post("/v1/trials/{trial}/result")
def result(request: Request, trial: str, message: Outcome, who: IsWorker) -> dict[str, Any]:
    """Commits the one result of a trial; the same message again gets the same answer."""
    fields = message.model_dump(exclude={"fence", "files"})
    report = trials.Report(outcome="done", files=_files(message.files), **fields)
    return _end(request, trial, message.fence, report, who)


@router.post("/v1/trials/{trial}/fault")
def fault(request: Request, trial: str, message: Fault, who: IsWorker) -> dict[str, Any]:
    """Ends an attempt without a played trial; the same message again gets the same answer."""
    fields = message.model_dump(exclude={"fence", "files", "kind"})
    report = trials.Report(outcome=message.kind, files=_files(message.files), **fields)
    return _end(request, trial, message.fence, report, who)


@router.post("/v1/trials/{trial}/requeue")
def requeue(request: Request, trial: str, who: Annotated[Principal, Depends(needs("admin"))]) -> dict[str, Any]:
    """Puts a trial that waits for a person or for storage back into the queue."""
    with arena_of(request).database.write() as session:
        accounts.record_audit(session, who, "trial.requeue", trial[:40])
        return trials.requeue(session, number("trial", trial))


def _end(request: Request, trial: str, fence: int, report: trials.Report, who: Principal) -> dict[str, Any]:
    arena = arena_of(request)
    with arena.database.write() as session:
        _own(session, trial, fence, who)
        hashes = {file["sha256"] for file in report.files}
        missing = hashes - set(session.scalars(select(Blob.sha256).where(Blob.sha256.in_(hashes))))
        if missing:
            raise RefusedError(
                422,
                "missing_blob",
                f"files of trial {trial[:20]}",
                expected="only files that were uploaded before",
                got=f"{len(missing)} unknown, the first {min(missing)}",
                fix="upload them, then send the report again",
            )
        return trials.end(session, number("trial", trial), fence, report, rules=arena.settings.rules)


def _files(files: list[File]) -> tuple[dict[str, Any], ...]:
    return tuple(file.model_dump() for file in files)


def _own(session: Session, trial: str, fence: int, who: Principal) -> None:
    """A lease is reported on by its own user's workers; an unknown fence is left to the scheduler's own answer."""
    owner = session.scalar(
        select(Worker.user_id)
        .join(Attempt, Attempt.worker_id == Worker.id)
        .where(Attempt.trial_id == number("trial", trial), Attempt.fence == fence)
    )
    if owner is not None and owner != who.user_id:
        raise unknown("trial", trial[:20], "use the number in your own lease")


@router.websocket("/v1/play")
async def play(socket: WebSocket) -> None:
    """A policy dials in, introduces itself and plays the trials of its submission."""
    who = await _admit(socket, "submit")
    if who is not None:
        await arena_of(socket).gateway.play(socket, who)


@router.websocket("/v1/relay/{name}")
async def relay(socket: WebSocket, name: str) -> None:
    """A worker plays the trial that it holds, TRIAL.FENCE, with a policy that dialled in."""
    who = await _admit(socket, "worker")
    if who is None:
        return
    try:
        await arena_of(socket).gateway.relay(socket, who, name)
    except RefusedError as error:
        await socket.send_denial_response(JSONResponse(error.body(), status_code=error.status))


async def _admit(socket: WebSocket, scope: str) -> Principal | None:
    try:
        who = await identify(socket)
        who.require(scope)
    except RefusedError as error:
        await socket.send_denial_response(JSONResponse(error.body(), status_code=error.status))
        return None
    return who
