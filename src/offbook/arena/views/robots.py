"""When is my turn, is the robot healthy, and how does one take part."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from offbook.arena import queueing
from offbook.arena.submissions import find_benchmark
from offbook.arena.tables import IN_FLIGHT, Attempt, Benchmark, Robot, Split, Submission, Trial, User
from offbook.arena.views.boards import benchmark_view
from offbook.service.database import now
from offbook.service.refusal import unknown

ALIVE_SECONDS = 30.0
_LISTED_SECONDS = 7 * 86400.0
FAIRNESS = (
    "Robots are shared between people, not between submissions: whoever used least robot time in the last 7 days has "
    "the larger share, and somebody new starts level with those who wait. Of one submission one trial runs at a time. "
    "A policy that runs on its owner's machine is served while it is connected."
)


def queue(session: Session, present: Collection[int]) -> dict[str, Any]:
    """All robots and what they do, all who wait and for about how long."""
    listed = Robot.seen > now(session) - _LISTED_SECONDS
    robots = session.scalars(select(Robot).where(listed).order_by(Robot.name).limit(500)).all()
    flying = _flying(session)
    states = [_state(session, robot, flying.get(robot.id)) for robot in robots]
    return {
        "robots": [
            {
                "name": robot.name,
                "state": state["state"],
                "words": state["words"],
                "trial": state["trial"],
                "progress": state["progress"],
            }
            for robot, state in zip(robots, states, strict=True)
        ],
        "waiting": positions(session, present),
        "fairness_words": FAIRNESS,
        "generated": session.scalar(select(now(session))),
    }


def _flying(session: Session) -> dict[int, Any]:
    """By robot, the trial that it holds."""
    rows = session.execute(
        select(
            Trial.robot_id,
            Trial.id,
            Trial.state,
            Trial.progress,
            Trial.position,
            Submission.name,
            Submission.wanted,
        )
        .join(Submission, Submission.id == Trial.submission_id)
        .where(Trial.state.in_(IN_FLIGHT))
    )
    return {row.robot_id: row for row in rows}


def _state(session: Session, robot: Robot, trial: Any) -> dict[str, Any]:
    age = max(0.0, float(session.execute(select(now(session) - robot.seen)).scalar_one()))
    if robot.stopped is not None:
        words = "stopped by its operator" if trial is None else "is being stopped by its operator"
        return {"state": "stopped", "words": words, "trial": trial and trial.id, "progress": None, "age": age}
    if trial is not None:
        words = f"runs trial {trial.position + 1} of {trial.wanted} of {trial.name}"
        return {"state": "running", "words": words, "trial": trial.id, "progress": trial.progress, "age": age}
    if age < ALIVE_SECONDS:
        words, state = "idle, waiting for work", "idle"
    else:
        words, state = f"offline: not heard of for {_span(age)}", "offline"
    return {"state": state, "words": words, "trial": None, "progress": None, "age": age}


def _span(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def positions(session: Session, present: Collection[int]) -> list[dict[str, Any]]:
    """Who waits, in about the order in which they will be served, with about the seconds until then.

    One after another the user with the smallest start tag is served their oldest waiting submission, and moves back
    by the cost of one of its trials: the rule of `queueing` played forward with the time that trials took so far.
    """
    left = func.count(Trial.id)
    rows = session.execute(
        select(Submission.id, Submission.name, Submission.kind, Submission.robot_class, Submission.user_id,
               User.name.label("owner"), Benchmark.trial_seconds, left.label("left"))
        .join(Trial, (Trial.submission_id == Submission.id) & (Trial.state == "queued"))
        .join(User, User.id == Submission.user_id)
        .join(Split, Split.id == Submission.split_id)
        .join(Benchmark, Benchmark.id == Split.benchmark_id)
        .where(Submission.state == "open")
        .group_by(Submission.id, User.name, Benchmark.trial_seconds)
        .order_by(Submission.id)
    ).all()  # fmt: skip
    waiting: list[dict[str, Any]] = []
    used = queueing.robot_seconds(session) if rows else {}
    for robot_class in dict.fromkeys(row.robot_class for row in rows):
        condition = (Submission.robot_class == robot_class) & (Submission.state == "open")
        queued = exists().where(Trial.submission_id == Submission.id, Trial.state == "queued")
        turns = {turn.user_id: turn for turn in queueing.turns(session, robot_class, condition & queued)}
        tags = {user: turn.start_tag for user, turn in turns.items()}
        # Who had something queued in the first look may have nothing left in the second.
        own = [row for row in rows if row.robot_class == robot_class and row.user_id in tags]
        places = []
        for row in own:
            places.append((tags[row.user_id], row))
            tags[row.user_id] += row.trial_seconds * (1 + used.get(row.user_id, 0.0) / 3600)
        alive = session.scalar(
            select(func.count(Robot.id)).where(
                Robot.robot_class == robot_class, Robot.seen > now(session) - ALIVE_SECONDS
            )
        )
        ahead = 0.0
        for position, (_, row) in enumerate(sorted(places, key=lambda place: (place[0], place[1].id)), start=1):
            here = row.kind != "remote" or row.id in present
            waiting.append(
                {
                    "submission": str(row.id),
                    "name": row.name,
                    "owner": row.owner,
                    "trials_left": row.left,
                    "position": position,
                    "eta_s": ahead / alive if alive and here else None,
                }
            )
            ahead += row.trial_seconds if here else 0.0
    return waiting


def robot(session: Session, name: str, base_url: str) -> dict[str, Any]:
    """One robot.

    Args:
        session: any session.
        name: of the robot.
        base_url: the arena's address, for the command that stops the robot.

    Raises:
        RefusedError: 404, no such robot.
    """
    found = session.scalar(select(Robot).where(Robot.name == name))
    if found is None:
        raise unknown("robot", name[:80], "see the queue for the robots")
    counts = session.execute(
        select(Attempt.outcome, func.count(Attempt.id)).where(Attempt.robot_id == found.id).group_by(Attempt.outcome)
    ).all()
    ended = {row[0]: row[1] for row in counts}
    state = _state(session, found, _flying(session).get(found.id))
    rate = found.spec.get("rate_hz")
    return {
        "name": found.name,
        "base_url": base_url,
        "kind": str(found.spec.get("kind", found.robot_class)),
        "state": state["state"],
        "words": state["words"],
        "heartbeat_age_s": state["age"],
        "rate_hz": rate if isinstance(rate, int | float) else None,
        "trials_done": ended.get("done", 0) + ended.get("policy_fault", 0),
        "faults": ended.get("robot_fault", 0),
        "current": None if state["trial"] is None else {"trial": state["trial"], "progress": state["progress"]},
        "generated": session.scalar(select(now(session))),
    }


_PYTHON = """import os

import numpy as np
from offbook.client import FunctionPolicy, PolicyMeta
from offbook.client.serve import serve_policy
from offbook.robots import make_robot

spec = make_robot("{robot}").spec  # what it shows, and what it can be told
meta = PolicyMeta(name="mine", observation=spec.observation, action=spec.action)
policy = FunctionPolicy(meta, lambda state, images: np.zeros(spec.action.size))
serve_policy(policy, "{base_url}", os.environ["OFFBOOK_TOKEN"], submission="ID")"""


def submit(session: Session, name: str | None, base_url: str) -> dict[str, Any]:
    """How to take part in a benchmark, as commands to copy.

    Raises:
        RefusedError: 404, no such benchmark.
    """
    name = name or session.scalar(select(Benchmark.name).order_by(Benchmark.id).limit(1))
    board = {"name": "", "title": "", "splits": [], "robot": ""}
    if name:
        board = benchmark_view(session, find_benchmark(session, name))
    split = next(iter(board["splits"]), "seen")
    where = f"--benchmark {board['name'] or 'BENCHMARK'} --split {split} --url {base_url}"
    return {
        "base_url": base_url,
        "benchmark": board,
        "snippets": [
            {
                "title": "Check your policy on your own machine first",
                "code": f"offbook policy check RUN --robot {board['robot'] or 'ROBOT'}",
            },
            {
                "title": "Let it dial in from your machine",
                "words": "It answers from where it is; nothing of yours is uploaded.",
                "code": f"export OFFBOOK_TOKEN=ob_...\noffbook arena submit remote --name NAME {where}\n"
                f"offbook policy serve RUN --url {base_url} --submission ID",
            },
            {
                "title": "Or upload a checkpoint",
                "words": "A safetensors file that offbook trained; it is checked before it is taken, never unpickled.",
                "code": f"export OFFBOOK_TOKEN=ob_...\noffbook arena submit RUN {where} --wait",
            },
            {
                "title": "Or answer in Python",
                "words": "Any function from an observation to an action is a policy; this one does nothing. ID is what "
                "the arena called the submission.",
                "code": _PYTHON.format(robot=board["robot"] or "ROBOT", base_url=base_url),
            },
        ],
    }
