"""Which trial a worker gets: the fair queue's next, by a lease that no other worker can hold at the same time.

On PostgreSQL the submission is taken with FOR UPDATE SKIP LOCKED, on SQLite every writing transaction begins with
BEGIN IMMEDIATE; on both, unique indexes forbid a second running trial of a submission and a second one on a robot. The
other half of a pair that this robot has begun comes before all turns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from offbook.arena import pairs, queueing
from offbook.arena.tables import IN_FLIGHT, Attempt, Benchmark, Pairing, Robot, Split, Submission, Trial, Worker
from offbook.arena.trials import Report, Rules, move, note_trial, reap, robot_stopped, settle
from offbook.service.database import now
from offbook.service.refusal import RefusedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Applicant:
    """A worker that asks for a trial.

    Attributes:
        user_id: whose token it holds.
        worker: its name, which is also its robot's.
        instance: a random word that tells this start of the process from the next.
        robot_class: what kind of robot it has, such as `"pour"`.
        spec: what the robot shows and accepts, for the pages.
    """

    user_id: int
    worker: str
    instance: str
    robot_class: str
    spec: Mapping[str, Any]


def lease(
    session: Session,
    applicant: Applicant,
    *,
    connected: Collection[int] = (),
    elsewhere: Mapping[int, str] = MappingProxyType({}),
    home: str = "",
    rules: Rules | None = None,
) -> dict[str, Any] | None:
    """Gives the next trial to a worker, or None when there is nothing for its robot.

    Args:
        session: a writing session.
        applicant: who asks.
        connected: remote submissions whose policies are connected and idle; others wait.
        elsewhere: those whose policies are connected to other servers, with the addresses of these.
        home: address of this server, where workers do not ask it by it.
        rules: the protocol's times.

    Returns:
        What the worker must know: `{trial, fence, attempt, blind_label, scene, seed, lease_seconds, policy, ...}`; no
        name and no owner of the submission.

    Raises:
        RefusedError: 409, the robot still holds a trial that another process was given, or its operator stopped it.
    """
    rules = rules or Rules()
    robot, worker = _register(session, applicant)
    reap(session, rules)
    _free_robot(session, robot, worker, applicant, rules)
    worker.instance = applicant.instance
    if robot.stopped is not None:
        raise robot_stopped(robot.name)
    here = frozenset([*connected, *elsewhere])
    ready = pairs.ready(session, applicant.robot_class, here, robot.id)
    for allowed in ready:
        for turn in queueing.turns(session, applicant.robot_class, allowed):
            submission = _take(session, allowed, turn.user_id)
            if submission is None:
                continue
            if allowed is not ready[-1]:  # out of turn: it does not move the time by which the others wait
                turn = replace(turn, leased_at=queueing.virtual_time(session, applicant.robot_class))
            given = _lease_trial(session, submission, robot, worker, turn, rules)
            if given is not None:
                relay = home if submission.id in connected else elsewhere.get(submission.id)
                return given | {"policy": given["policy"] | {"relay": relay}} if relay else given
    return None


def _take(session: Session, condition: ColumnElement[bool], user_id: int) -> Submission | None:
    """The user's oldest submission that meets the condition, locked, and where it is compared the pairing with it."""
    submission = session.scalar(
        select(Submission)
        .where(condition, Submission.user_id == user_id)
        .order_by(Submission.id)
        .limit(1)
        .with_for_update(skip_locked=True, key_share=True, of=Submission)
    )
    if submission is None or submission.pairing_id is None:
        return submission
    own = select(Pairing.id).where(Pairing.id == submission.pairing_id)
    return submission if session.scalar(own.with_for_update(skip_locked=True, key_share=True)) else None


def _register(session: Session, applicant: Applicant) -> tuple[Robot, Worker]:
    present = now(session)
    robot = session.scalar(select(Robot).where(Robot.name == applicant.worker).with_for_update(key_share=True))
    if robot is None:
        robot = Robot(
            name=applicant.worker,
            robot_class=applicant.robot_class,
            spec=dict(applicant.spec),
            created=present,
            seen=present,
        )
        session.add(robot)
        session.flush()
    if robot.robot_class != applicant.robot_class:
        raise RefusedError(409, "robot_class", f"robot {robot.name!r}",
                           expected=f"the class {robot.robot_class!r} with which it first came",
                           got=repr(applicant.robot_class), fix="give the worker another name")  # fmt: skip
    robot.seen = present
    robot.spec = dict(applicant.spec)
    worker = session.scalar(select(Worker).where(Worker.name == applicant.worker))
    if worker is None:
        worker = Worker(
            name=applicant.worker,
            robot_id=robot.id,
            user_id=applicant.user_id,
            instance=applicant.instance,
            created=present,
            seen=present,
        )
        session.add(worker)
    elif worker.user_id != applicant.user_id:
        raise RefusedError(409, "robot_taken", f"robot {robot.name!r}", expected="the user who first connected it",
                           got="another user's token", fix="give the worker another name")  # fmt: skip
    worker.seen = present
    session.flush()
    return robot, worker


def _free_robot(session: Session, robot: Robot, worker: Worker, applicant: Applicant, rules: Rules) -> None:
    """Settles what the robot still holds: a process that asks again gave it up; another process may still move it."""
    held = session.scalar(select(Trial).where(Trial.robot_id == robot.id, Trial.state.in_(IN_FLIGHT)))
    if held is None:
        return
    if worker.instance == applicant.instance:
        report = Report(outcome="robot_fault", reason="the worker asked for another trial without ending this one")
        settle(session, held.id, held.fence, report, rules)
        return
    left = session.scalar(select(Trial.lease_until - now(session)).where(Trial.id == held.id))
    raise RefusedError(
        409,
        "robot_busy",
        f"robot {robot.name!r}",
        expected="a free robot",
        got=f"a lease of another process for {max(0.0, left or 0.0):.0f} more seconds",
        fix="wait, or give the worker another name",
        retry_after=max(0.0, float(left or 0.0)),
    )


def _lease_trial(
    session: Session, submission: Submission, robot: Robot, worker: Worker, turn: queueing.Turn, rules: Rules
) -> dict[str, Any] | None:
    benchmark = session.scalars(
        select(Benchmark).join(Split, Split.benchmark_id == Benchmark.id).where(Split.id == submission.split_id)
    ).one()
    trial = pairs.next_trial(session, submission, robot.id)
    if trial is None:
        return None
    present, old, fence, n = now(session), trial.fence, trial.fence + 1, trial.attempt + 1
    values: dict[str, Any] = {
        "state": "leased",
        "fence": fence,
        "attempt": n,
        "robot_id": robot.id,
        "lease_until": present + rules.lease_seconds,
        "progress": None,
    }
    try:
        with session.begin_nested():
            if not move(session, trial.id, old, ("queued",), values, alive=False):
                return None
            used = queueing.robot_seconds(session, submission.user_id).get(submission.user_id, 0.0)
            session.add(
                Attempt(
                    trial_id=trial.id,
                    n=n,
                    fence=fence,
                    user_id=submission.user_id,
                    robot_id=robot.id,
                    worker_id=worker.id,
                    robot_class=robot.robot_class,
                    leased=present,
                    start_tag=turn.start_tag if turn.leased_at is None else turn.leased_at,
                    finish_tag=queueing.finish_tag(turn, benchmark.trial_seconds, used),
                )
            )
            session.flush()
    except IntegrityError:
        # On PostgreSQL another worker may have taken a trial of this submission since our look: the index forbids two.
        return None
    note_trial(session, "leased", f"trial {trial.slot} was given to robot {robot.name}", trial, robot.id)
    policy = {"kind": submission.kind, "sha256": submission.checkpoint, "anchor": submission.anchor}
    return {
        "trial": trial.id,
        "fence": fence,
        "attempt": n,
        "blind_label": trial.blind_label,
        "benchmark": benchmark.name,
        "scene": trial.scene,
        "seed": trial.seed,
        "prompt": benchmark.task,
        "lease_seconds": rules.lease_seconds,
        "watchdog_seconds": rules.watchdog_seconds,
        # Only what the worker needs to play it: nothing of a policy that answers through the relay.
        "policy": {key: value for key, value in policy.items() if value is not None},
    }
