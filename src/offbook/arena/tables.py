"""What the arena keeps. Times are seconds since 1970 by the database's clock; see `database.now`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from offbook.service.database import NAMES, TYPES

TRIAL_STATES = (
    "queued",
    "leased",
    "running",
    "done",
    "policy_fault",
    "needs_human",
    "needs_storage",
    "cancelled",
)
"""Where a trial can stand. A robot fault is not a place to stay: the trial goes back to the queue or to a person."""

IN_FLIGHT = ("leased", "running")
FINAL = ("done", "policy_fault", "cancelled")

_in_flight = text("state IN ('leased', 'running')")
_full = text("state = 'needs_storage'")


class Table(DeclarativeBase):
    """All tables of the arena's schema."""

    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = TYPES


class User(Table):
    """Somebody who submits policies or runs robots."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    daily_trials: Mapped[int]
    created: Mapped[float]


class Token(Table):
    """A key to the door. Only the hash of its secret is here; the prefix is what lists show."""

    __tablename__ = "tokens"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    prefix: Mapped[str] = mapped_column(unique=True)
    hash: Mapped[str]
    scopes: Mapped[str]
    label: Mapped[str] = mapped_column(default="")
    created: Mapped[float]
    expires: Mapped[float | None]
    revoked: Mapped[float | None]
    user: Mapped[User] = relationship()


class Robot(Table):
    """One arm, real or simulated. At most one trial is leased to it at any time, and none while it is `stopped`."""

    __tablename__ = "robots"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    robot_class: Mapped[str] = mapped_column(index=True)
    spec: Mapped[dict[str, Any]]
    created: Mapped[float]
    seen: Mapped[float]
    stopped: Mapped[float | None]


class Picture(Table):
    """What a robot saw last, while somebody `looked`; the next picture takes its place. No copy of an arena has it."""

    __tablename__ = "pictures"
    robot_id: Mapped[int] = mapped_column(ForeignKey("robots.id"), primary_key=True)
    looked: Mapped[float]
    taken: Mapped[float | None]
    jpeg: Mapped[bytes | None]


class Worker(Table):
    """The process beside a robot; `instance` tells one start of it from the next."""

    __tablename__ = "workers"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    robot_id: Mapped[int] = mapped_column(ForeignKey("robots.id"), index=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    instance: Mapped[str]
    created: Mapped[float]
    seen: Mapped[float]


class Benchmark(Table):
    """A task with a fixed protocol. Changing the protocol makes a new version; results never mix versions.

    `fault_score` is what a trial lost by the policy counts: 0, or the worst return where returns are negative.
    `least` and `most` are the ends of the score's range, where it has one. `trial_seconds` is about how long one trial
    takes, for the queue. `prestage` names the benchmark on which a policy must first have reached `prestage_score`.
    """

    __tablename__ = "benchmarks"
    __table_args__ = (UniqueConstraint("name", "version"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[int]
    title: Mapped[str]
    task: Mapped[str] = mapped_column(Text)
    metric: Mapped[str]
    robot_class: Mapped[str]
    daily_trials: Mapped[int]
    trial_seconds: Mapped[float]
    fault_score: Mapped[float]
    least: Mapped[float | None]
    most: Mapped[float | None]
    prestage: Mapped[str] = mapped_column(default="", server_default="")
    prestage_score: Mapped[float | None]
    created: Mapped[float]


class Split(Table):
    """The scenes and seeds of one tab of a benchmark, the same for every submission: `cases[slot] = {scene, seed}`."""

    __tablename__ = "splits"
    __table_args__ = (UniqueConstraint("benchmark_id", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    benchmark_id: Mapped[int] = mapped_column(ForeignKey("benchmarks.id"))
    name: Mapped[str]
    cases: Mapped[list[Any]]
    digest: Mapped[str]
    benchmark: Mapped[Benchmark] = relationship()


class Pairing(Table):
    """Two submissions that are compared: on each scene one runs right after the other, in an order drawn by lot."""

    __tablename__ = "pairings"
    id: Mapped[int] = mapped_column(primary_key=True)
    split_id: Mapped[int] = mapped_column(ForeignKey("splits.id"))
    created: Mapped[float]


class Submission(Table):
    """A policy that somebody wants tried on one split. The summary columns are renewed with each result."""

    __tablename__ = "submissions"
    __table_args__ = (
        CheckConstraint("state IN ('open', 'done', 'cancelled')", name="state"),
        CheckConstraint("kind IN ('remote', 'checkpoint', 'anchor')", name="kind"),
        Index("ix_submissions_queue", "state", "robot_class", "user_id"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    split_id: Mapped[int] = mapped_column(ForeignKey("splits.id"), index=True)
    pairing_id: Mapped[int | None] = mapped_column(ForeignKey("pairings.id"), index=True)
    robot_class: Mapped[str]
    name: Mapped[str]
    kind: Mapped[str]
    anchor: Mapped[str | None]
    method: Mapped[str] = mapped_column(default="")
    imitates: Mapped[str] = mapped_column(default="")
    checkpoint: Mapped[str | None] = mapped_column(ForeignKey("blobs.sha256"))
    state: Mapped[str]
    wanted: Mapped[int]
    commitment: Mapped[str]
    nonce: Mapped[str]
    created: Mapped[float]
    finished: Mapped[float | None]
    n: Mapped[int] = mapped_column(default=0)
    score: Mapped[float | None]
    score_low: Mapped[float | None]
    score_high: Mapped[float | None]
    successes: Mapped[int | None]
    judged: Mapped[int] = mapped_column(default=0)
    latency_ms: Mapped[float | None]
    late_share: Mapped[float | None]
    user: Mapped[User] = relationship()
    split: Mapped[Split] = relationship()


class Seat(Table):
    """A policy that is connected, and with which of the arena's servers: workers of others are sent there."""

    __tablename__ = "seats"
    submission_id: Mapped[int] = mapped_column(ForeignKey("submissions.id"), primary_key=True)
    server: Mapped[str]
    url: Mapped[str]
    seen: Mapped[float]


class Trial(Table):
    """One slot of a submission: a scene and a seed that wait for, run on, or ran on a robot."""

    __tablename__ = "trials"
    __table_args__ = (
        CheckConstraint(f"state IN {TRIAL_STATES!r}", name="state"),
        UniqueConstraint("submission_id", "slot"),
        # The database itself keeps the two promises: one running trial a submission, one live arm a robot.
        Index("ix_trials_one_per_submission", "submission_id", unique=True, sqlite_where=_in_flight,
              postgresql_where=_in_flight),
        Index("ix_trials_one_per_robot", "robot_id", unique=True, sqlite_where=_in_flight, postgresql_where=_in_flight),
        Index("ix_trials_expiry", "lease_until", sqlite_where=_in_flight, postgresql_where=_in_flight),
        Index("ix_trials_queue", "submission_id", "state", "position"),
        Index("ix_trials_storage", "state", sqlite_where=_full, postgresql_where=_full),
    )  # fmt: skip
    id: Mapped[int] = mapped_column(primary_key=True)
    submission_id: Mapped[int] = mapped_column(ForeignKey("submissions.id"))
    slot: Mapped[int]
    position: Mapped[int]
    pair_id: Mapped[str] = mapped_column(index=True)
    blind_label: Mapped[str]
    scene: Mapped[dict[str, Any]]
    seed: Mapped[int]
    state: Mapped[str]
    attempt: Mapped[int] = mapped_column(default=0)
    faults: Mapped[int] = mapped_column(default=0)
    fence: Mapped[int] = mapped_column(default=0)
    robot_id: Mapped[int | None] = mapped_column(ForeignKey("robots.id"))
    lease_until: Mapped[float | None]
    progress: Mapped[float | None]
    submission: Mapped[Submission] = relationship()


class Attempt(Table):
    """One lease of a trial and what came of it: the log of every physical run, never changed once it has ended."""

    __tablename__ = "attempts"
    __table_args__ = (
        UniqueConstraint("trial_id", "n"),
        UniqueConstraint("trial_id", "fence"),
        Index("ix_attempts_start_tag", "robot_class", "start_tag"),
        Index("ix_attempts_finish_tag", "user_id", "robot_class", "finish_tag"),
        Index("ix_attempts_recent", "user_id", "leased"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id"))
    n: Mapped[int]
    fence: Mapped[int]
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    robot_id: Mapped[int] = mapped_column(ForeignKey("robots.id"), index=True)
    worker_id: Mapped[int] = mapped_column(ForeignKey("workers.id"))
    robot_class: Mapped[str]
    leased: Mapped[float]
    started: Mapped[float | None]
    ended: Mapped[float | None]
    outcome: Mapped[str | None]
    reason: Mapped[str] = mapped_column(Text, default="")
    start_tag: Mapped[float]
    finish_tag: Mapped[float]
    report: Mapped[str | None]
    answer: Mapped[dict[str, Any] | None]
    robot: Mapped[Robot] = relationship()
    worker: Mapped[Worker] = relationship()


class Result(Table):
    """The one committed result of a trial; a policy's fault is a result too, with score 0."""

    __tablename__ = "results"
    id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id"), unique=True)
    submission_id: Mapped[int] = mapped_column(ForeignKey("submissions.id"), index=True)
    attempt: Mapped[int]
    outcome: Mapped[str]
    reason: Mapped[str] = mapped_column(Text, default="")
    score: Mapped[float]
    success: Mapped[bool | None]
    steps: Mapped[int]
    latency_ms: Mapped[float | None]
    late_share: Mapped[float | None]
    files: Mapped[list[Any]]
    created: Mapped[float]


class Event(Table):
    """What happened, in words, in the order of happening: the log of a submission and the source of live pages."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_submission", "submission_id", "id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[float]
    kind: Mapped[str]
    text: Mapped[str] = mapped_column(Text)
    submission_id: Mapped[int | None] = mapped_column(ForeignKey("submissions.id"))
    trial_id: Mapped[int | None] = mapped_column(ForeignKey("trials.id"), index=True)
    robot_id: Mapped[int | None] = mapped_column(ForeignKey("robots.id"))


class Audit(Table):
    """Who did what with which token, for the operator."""

    __tablename__ = "audits"
    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[float]
    user: Mapped[str]
    token: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str] = mapped_column(Text)


class Blob(Table):
    """A stored file by the hash of its content. `private` ones are read by their owner, workers and admins only."""

    __tablename__ = "blobs"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str]
    private: Mapped[bool]
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    created: Mapped[float]
