"""What an operator tells a robot, to stop and to go on, and what the robot sees."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from sqlalchemy import select
from sqlalchemy.orm import Session

from offbook.arena import accounts, pictures
from offbook.arena.accounts import Principal
from offbook.arena.routes.doors import arena_of, needs
from offbook.arena.tables import Robot
from offbook.arena.trials import note
from offbook.service.database import now
from offbook.service.refusal import unknown

router = APIRouter()


@router.post("/v1/robots/{robot}/stop")
def stop(request: Request, robot: str, who: Annotated[Principal, Depends(needs("admin"))]) -> dict[str, Any]:
    """Stops a robot: its next heartbeat is refused, its trial ends as a robot's fault, and it is given no other."""
    return _set(request, robot, who, stopped=True)


@router.post("/v1/robots/{robot}/resume")
def resume(request: Request, robot: str, who: Annotated[Principal, Depends(needs("admin"))]) -> dict[str, Any]:
    """Lets a robot that was stopped go on."""
    return _set(request, robot, who, stopped=False)


@router.get(
    "/v1/robots/{robot}/frame",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}, 204: {"description": "No picture now."}},
)
def frame(request: Request, robot: str) -> Response:
    """What a robot sees now; nothing while it plays nothing, and for the first moments that somebody looks."""
    content = pictures.look(arena_of(request).database, robot)
    return Response(status_code=204) if content is None else Response(content, media_type="image/jpeg")


def _set(request: Request, name: str, who: Principal, *, stopped: bool) -> dict[str, Any]:
    with arena_of(request).database.write() as session:
        robot = _find(session, name)
        if (robot.stopped is not None) != stopped:
            robot.stopped = session.scalar(select(now(session))) if stopped else None
            note(session, "robot", f"robot {name} was {'stopped' if stopped else 'let go on'} by its operator",
                 robot_id=robot.id)  # fmt: skip
        accounts.record_audit(session, who, f"robot.{'stop' if stopped else 'resume'}", name)
        return {"robot": name, "stopped": stopped}


def _find(session: Session, name: str) -> Robot:
    robot = session.scalar(select(Robot).where(Robot.name == name).with_for_update(key_share=True))
    if robot is None:
        raise unknown("robot", name[:80], "see the queue for the robots")
    return robot
