"""Benchmarks, and what people submit to them: trials in a drawn order that is promised before the first one runs."""

from __future__ import annotations

import hashlib
import json
import random
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from offbook.arena.accounts import Principal
from offbook.arena.tables import Attempt, Benchmark, Blob, Pairing, Robot, Split, Submission, Trial, User
from offbook.arena.trials import close_if_finished, note
from offbook.client.protocol import PolicyMeta, check_fit
from offbook.errors import ConfigError
from offbook.service.database import now
from offbook.service.refusal import RefusedError, unknown

ANCHORS = ("expert", "random")
"""Policies that every worker can make itself; they mark the two ends of a benchmark's scale."""

NAME = "[a-z0-9][a-z0-9-]{0,39}"
"""What names of benchmarks look like; they stand in addresses."""

DAY = 86400.0

WITHDRAWN = 10
"""How many times the trials of a day a user may ask for in one, those counted that are withdrawn."""
_LOT = random.SystemRandom()


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkSpec:
    """A benchmark as an operator describes it.

    Attributes:
        name: short, for addresses and commands.
        title: one line for people.
        task: what the robot is told to do.
        metric: what the score means, in words.
        robot_class: the kind of robot, as `robots.make_robot` takes it.
        splits: by name, the cases `{scene, seed}` that every submission meets.
        daily_trials: trials that one user may ask of this benchmark in a day.
        trial_seconds: about how long one trial takes.
        fault_score: what a trial lost by the policy counts: the worst possible score.
        score_range: least and largest score that are possible, where there are such: intervals rest on it.
        prestage: name of a simulated benchmark that a policy must have passed before it is tried here.
        prestage_score: mean score on the whole of its split from which on it is passed.
    """

    name: str
    title: str
    task: str
    metric: str
    robot_class: str
    splits: Mapping[str, Sequence[Mapping[str, Any]]]
    daily_trials: int = 400
    trial_seconds: float = 10.0
    fault_score: float = 0.0
    score_range: tuple[float, float] | None = None
    prestage: str = ""
    prestage_score: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What somebody submits.

    Attributes:
        benchmark: name of the benchmark; its newest version is meant.
        name: label on the leaderboard.
        kind: `"remote"`, `"checkpoint"` or `"anchor"`.
        split: name of the split; the benchmark's first when None.
        blob: hash of the uploaded checkpoint.
        anchor: `"expert"` or `"random"`.
        method: how the policy was made, in a few words.
        imitates: whose behaviour it learned, in a few words.
        trials: only the first so many slots; all when None.
    """

    benchmark: str
    name: str
    kind: str
    split: str | None = None
    blob: str | None = None
    anchor: str | None = None
    method: str = ""
    imitates: str = ""
    trials: int | None = None


def define_benchmark(session: Session, spec: BenchmarkSpec) -> Benchmark:
    """Adds a benchmark, or a new version when its protocol differs from the newest one's.

    Else the newest version takes the title, the length of a trial and the trials of a day.

    Raises:
        RefusedError: 422, it has no proper name or no split; 404, the arena has no benchmark of its prestage's name.
    """
    if not re.fullmatch(NAME, spec.name) or not spec.splits:
        raise RefusedError(422, "bad_benchmark", f"benchmark {spec.name!r}",
                           expected="a name of lower-case letters, digits and dashes, and at least one split",
                           got=f"{len(spec.splits)} splits", fix="correct the description")  # fmt: skip
    if spec.prestage:
        find_benchmark(session, spec.prestage)
    latest = session.scalar(
        select(Benchmark).where(Benchmark.name == spec.name).order_by(Benchmark.version.desc()).limit(1)
    )
    digests = {name: _digest(cases) for name, cases in spec.splits.items()}
    least, most = spec.score_range or (None, None)
    if latest is not None:
        rows = session.execute(select(Split.name, Split.digest).where(Split.benchmark_id == latest.id))
        known = {row.name: row.digest for row in rows}
        same = ("robot_class", "task", "metric", "fault_score", "prestage", "prestage_score")
        protocol = {name: getattr(spec, name) for name in same}
        protocol |= {"least": least, "most": most}
        if known == digests and all(getattr(latest, name) == value for name, value in protocol.items()):
            latest.title, latest.trial_seconds, latest.daily_trials = spec.title, spec.trial_seconds, spec.daily_trials
            return latest
    benchmark = Benchmark(
        name=spec.name,
        version=latest.version + 1 if latest else 1,
        title=spec.title,
        task=spec.task,
        metric=spec.metric,
        robot_class=spec.robot_class,
        daily_trials=spec.daily_trials,
        trial_seconds=spec.trial_seconds,
        fault_score=spec.fault_score,
        least=least,
        most=most,
        prestage=spec.prestage,
        prestage_score=spec.prestage_score,
        created=now(session),
    )
    session.add(benchmark)
    session.flush()
    for name, cases in spec.splits.items():
        session.add(Split(benchmark_id=benchmark.id, name=name, cases=[dict(c) for c in cases], digest=digests[name]))
        session.flush()
    return benchmark


def find_benchmark(session: Session, name: str) -> Benchmark:
    """The newest version of a benchmark.

    Raises:
        RefusedError: 404, there is none of this name.
    """
    found = session.scalar(select(Benchmark).where(Benchmark.name == name).order_by(Benchmark.version.desc()).limit(1))
    if found is None:
        names = ", ".join(session.scalars(select(Benchmark.name).distinct().order_by(Benchmark.name)))
        raise unknown("benchmark", name[:80], f"choose one of: {names or 'none yet'}")
    return found


def find_split(session: Session, benchmark: Benchmark, name: str | None) -> Split:
    """A split by name, or the benchmark's first.

    Raises:
        RefusedError: 404, there is none of this name.
    """
    splits = session.scalars(select(Split).where(Split.benchmark_id == benchmark.id).order_by(Split.id)).all()
    found = next((split for split in splits if name in (None, "", split.name)), None)
    if found is None:
        names = ", ".join(split.name for split in splits)
        raise unknown(f"split of {benchmark.name}", str(name)[:80], f"choose one of: {names}")
    return found


def accept(session: Session, who: Principal, request: Request) -> Submission:
    """Takes a submission and draws the order of its trials.

    The order is a random permutation of the slots; its commitment, a SHA-256 over the order and a secret nonce, is
    shown at once, and the nonce when all trials have ended, so that anybody can check that nobody chose the order.

    Raises:
        RefusedError: 404 unknown benchmark or split, 422 an unusable request, 403 scope, 409 not passed, 429 quota.
    """
    benchmark, split = check_request(session, who, request)
    slots = list(range(len(split.cases[: request.trials])))
    _LOT.shuffle(slots)
    labels: set[str] = set()
    while len(labels) < len(slots):
        labels.add(f"policy {secrets.token_hex(3)}")
    nonce = secrets.token_hex(16)
    submission = _add(session, who, request, benchmark, split, commitment=commitment(slots, nonce), nonce=nonce)
    for position, (slot, label) in enumerate(zip(slots, sorted(labels), strict=True)):
        pair = f"{benchmark.name}.{benchmark.version}/{split.name}/{slot}"
        _add_trial(session, submission, split, slot=slot, position=position, label=label, pair=pair)
    session.flush()
    return submission


def accept_pair(session: Session, who: Principal, first: Request, second: Request) -> tuple[Submission, Submission]:
    """Takes two submissions that are compared: the same scenes and seeds, one right after the other on each of them.

    Which of the two comes first on a scene, and which is called `policy A` there, is drawn by lot, as is the order of
    the scenes. The commitment of both covers all of it: the list has an entry `[slot, side, letter]` for each trial,
    with side 0 for the first submission and 1 for the second.

    Raises:
        RefusedError: see `accept`; 422, the two ask for different scenes.
    """
    benchmark, split = check_request(session, who, first)
    _, other = check_request(session, who, second)
    slots = list(range(len(split.cases[: first.trials])))
    if other.id != split.id or first.trials != second.trials:
        raise RefusedError(422, "not_paired", "two submissions", expected="the same benchmark, split and trials",
                           got="different ones", fix="ask for the same scenes")  # fmt: skip
    _check_quota(session, who, benchmark, 2 * len(slots))
    _LOT.shuffle(slots)
    order: list[tuple[int, int, str]] = []
    for slot in slots:
        letters = _LOT.sample("AB", 2)
        order += [(slot, side, letters[side]) for side in _LOT.sample((0, 1), 2)]
    nonce = secrets.token_hex(16)
    pairing = Pairing(split_id=split.id, created=now(session))
    session.add(pairing)
    session.flush()
    promise: dict[str, Any] = {"commitment": commitment(order, nonce), "nonce": nonce, "pairing_id": pairing.id}
    sides = [_add(session, who, request, benchmark, split, **promise) for request in (first, second)]
    for position, (slot, side, letter) in enumerate(order):
        pair = f"pairing-{pairing.id}/{slot}"
        _add_trial(session, sides[side], split, slot=slot, position=position, label=f"policy {letter}", pair=pair)
    session.flush()
    return sides[0], sides[1]


def _add(
    session: Session, who: Principal, request: Request, benchmark: Benchmark, split: Split, **promise: Any
) -> Submission:
    wanted = len(split.cases[: request.trials])
    submission = Submission(
        user_id=who.user_id,
        split_id=split.id,
        robot_class=benchmark.robot_class,
        name=request.name,
        kind=request.kind,
        anchor=request.anchor,
        method=request.method,
        imitates=request.imitates,
        checkpoint=request.blob,
        state="open",
        wanted=wanted,
        created=now(session),
        **promise,
    )
    session.add(submission)
    session.flush()
    note(session, "accepted", f"{wanted} trials queued; order promised as {submission.commitment[:12]}",
         submission_id=submission.id)  # fmt: skip
    return submission


def _add_trial(
    session: Session, submission: Submission, split: Split, *, slot: int, position: int, label: str, pair: str
) -> None:
    session.add(
        Trial(
            submission_id=submission.id,
            slot=slot,
            position=position,
            pair_id=pair,
            blind_label=label,
            scene=dict(split.cases[slot]["scene"]),
            seed=int(split.cases[slot]["seed"]),
            state="queued",
        )
    )


def commitment(order: Sequence[Any], nonce: str) -> str:
    """The promise of an order of slots: SHA-256 of the JSON list `[order, nonce]` without blanks.

    Example:
        >>> commitment([1, 0], "00")[:8]
        'db916ddb'
    """
    return hashlib.sha256(json.dumps([list(order), nonce], separators=(",", ":")).encode()).hexdigest()


def cancel(session: Session, submission: Submission) -> int:
    """Withdraws a submission, and with it the one that it is compared to: what waits is cancelled, what moves finished.

    Returns:
        How many trials were cancelled.
    """
    query = select(Submission).where(Submission.id == submission.id)
    if submission.pairing_id is not None:
        query = select(Submission).where(Submission.pairing_id == submission.pairing_id)
    both = session.scalars(query.order_by(Submission.id).with_for_update(key_share=True)).all()
    return sum(_cancel(session, each) for each in both)


def _cancel(session: Session, submission: Submission) -> int:
    waiting = ("queued", "leased", "needs_human", "needs_storage")
    cancelled = session.execute(
        update(Trial)
        .where(Trial.submission_id == submission.id, Trial.state.in_(waiting))
        .values(state="cancelled", lease_until=None)
        .returning(Trial.id),
        execution_options={"synchronize_session": False},
    ).all()
    session.execute(
        update(Attempt)
        .where(Attempt.trial_id.in_([row.id for row in cancelled]), Attempt.ended.is_(None))
        .values(ended=now(session), outcome="cancelled", reason="the submission was withdrawn"),
        execution_options={"synchronize_session": False},
    )
    session.refresh(submission)
    moving = session.scalar(
        select(Trial.id).where(Trial.submission_id == submission.id, Trial.state == "running").limit(1)
    )
    if submission.state == "open" and (cancelled or moving is not None):
        submission.state = "cancelled"
        submission.finished = now(session)
        note(session, "cancelled", f"withdrawn with {len(cancelled)} trials not run", submission_id=submission.id)
    close_if_finished(session, submission)
    session.flush()
    return len(cancelled)


class Used(NamedTuple):
    """Trials that a user asked for in the last 24 hours.

    Attributes:
        counted: all but those that were withdrawn.
        there: those of them that are of one benchmark.
        rows: the withdrawn ones too.
    """

    counted: int
    there: int
    rows: int


def used_today(session: Session, user_id: int, benchmark_id: int | None = None) -> Used:
    """What a user asked for in the last 24 hours, in all and of one benchmark."""
    kept = Trial.state != "cancelled"
    row = session.execute(
        select(
            func.count(Trial.id).filter(kept),
            func.count(Trial.id).filter(kept, Split.benchmark_id == benchmark_id),
            func.count(Trial.id),
        )
        .join(Submission, Submission.id == Trial.submission_id)
        .join(Split, Split.id == Submission.split_id)
        .where(Submission.user_id == user_id, Submission.created > now(session) - DAY)
    ).one()
    return Used(*row)


def check_request(session: Session, who: Principal, request: Request) -> tuple[Benchmark, Split]:
    """Refuses what can be seen to be unusable without looking into a checkpoint; returns what is asked for.

    Raises:
        RefusedError: 404 unknown benchmark or split, 403 scope, 422 name, kind or blob, 409 not passed, 429 quota.
    """

    def refuse(expected: str, got: str, fix: str) -> RefusedError:
        return RefusedError(422, "bad_submission", f"submission {request.name[:60]!r}", expected=expected, got=got,
                            fix=fix)  # fmt: skip

    who.require("submit")
    benchmark = find_benchmark(session, request.benchmark)
    split = find_split(session, benchmark, request.split)
    if not request.name.strip() or len(request.name) > 80 or not request.name.isprintable():
        raise refuse("a printable name of 1 to 80 characters", f"{len(request.name)} characters", "choose another name")
    if request.trials is not None and request.trials < 1:
        raise refuse("at least 1 trial", str(request.trials), "ask for more")
    if (request.anchor and request.kind != "anchor") or (request.blob and request.kind != "checkpoint"):
        raise refuse("an anchor or a blob only with the kind that it makes", request.kind[:40], "leave it out")
    if request.kind == "anchor":
        who.require("admin")
        if request.anchor not in ANCHORS:
            raise refuse(f"an anchor of {', '.join(ANCHORS)}", repr(request.anchor), "name one")
    elif request.kind == "checkpoint":
        blob = session.get(Blob, request.blob) if request.blob else None
        # Two people may upload the same file; the store keeps it once, under the first.
        if blob is None or not blob.private:
            raise refuse("the hash of an uploaded checkpoint", repr(request.blob), "upload it first")
    elif request.kind != "remote":
        raise refuse("kind remote, checkpoint or anchor", repr(request.kind[:40]), "choose one")
    _check_prestage(session, who, benchmark, request)
    _check_quota(session, who, benchmark, len(split.cases[: request.trials]))
    return benchmark, split


def robot_spec(session: Session, robot_class: str) -> dict[str, Any]:
    """What the newest robot of a class says of itself; empty when none has been seen."""
    newest = select(Robot.spec).where(Robot.robot_class == robot_class).order_by(Robot.seen.desc()).limit(1)
    return session.scalar(newest) or {}


def check_robot(session: Session, meta: PolicyMeta, robot_class: str) -> None:
    """Tells a policy at once when it cannot drive the robots of its benchmark, as far as one has been seen.

    Raises:
        RefusedError: 422, it wants or gives something else.
    """
    spec = robot_spec(session, robot_class)
    if "observation" not in spec:
        return
    robot = PolicyMeta.from_json({"name": robot_class, "chunk": 1, **spec})
    try:
        check_fit(meta, robot.observation, robot.action, robot_class)
    except ConfigError as error:
        where, expected, got, fix = error.where, error.expected, error.got, error.fix
        raise RefusedError(422, "does_not_fit", where, expected=expected, got=got, fix=fix) from error


def _check_prestage(session: Session, who: Principal, benchmark: Benchmark, request: Request) -> None:
    """A policy proves itself in simulation before it takes a real robot's time; the operator's anchors need not.

    It is the same policy when it is the same checkpoint, or a remote one of the same owner under the same name.
    """
    if not benchmark.prestage or request.kind == "anchor":
        return
    same = Submission.checkpoint == request.blob if request.kind == "checkpoint" else Submission.name == request.name
    best = session.scalar(
        select(func.max(Submission.score))
        .join(Split, Split.id == Submission.split_id)
        .join(Benchmark, Benchmark.id == Split.benchmark_id)
        .where(Benchmark.name == benchmark.prestage, Submission.state == "done", Submission.kind == request.kind)
        .where(Submission.user_id == who.user_id, same, Submission.n == func.json_array_length(Split.cases))
    )
    wanted = benchmark.prestage_score or 0.0
    if best is None or best < wanted:
        got = "no finished submission of it there" if best is None else f"{best:.3g}"
        raise RefusedError(409, "prestage", f"{request.name[:60]!r} on {benchmark.name}",
                           expected=f"a mean score of {wanted:g} or more on a whole split of {benchmark.prestage}",
                           got=got, fix=f"submit it to {benchmark.prestage} first, under the same name")  # fmt: skip


def _check_quota(session: Session, who: Principal, benchmark: Benchmark, wanted: int) -> None:
    # The lock keeps two requests of one user from both fitting under the same rest.
    user = session.scalars(select(User).where(User.id == who.user_id).with_for_update(key_share=True)).one()
    asked = used_today(session, user.id, benchmark.id)
    for limit, used, what in (
        (user.daily_trials, asked.counted, "all benchmarks"),
        (benchmark.daily_trials, asked.there, benchmark.name),
        # Who withdraws may ask again, but every row stays: not without end.
        (WITHDRAWN * user.daily_trials, asked.rows, "any, withdrawn or not"),
    ):
        if used + wanted > limit:
            raise RefusedError(429, "quota", f"trials of {user.name} in 24 hours on {what}",
                               expected=f"at most {limit}", got=f"{used} used and {wanted} more asked for",
                               fix="wait, or ask for fewer trials")  # fmt: skip


def _digest(cases: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([dict(case) for case in cases], sort_keys=True).encode()).hexdigest()
