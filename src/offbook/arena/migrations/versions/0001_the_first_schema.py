"""The first schema."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_in_flight = sa.text("state IN ('leased', 'running')")


def upgrade() -> None:
    """Makes the tables; those that others point to come first."""
    _people()
    _benchmarks()
    _submissions()
    _runs()


def _people() -> None:
    _table(
        "audits",
        _real("time"),
        _word("user"),
        _word("token"),
        _word("action"),
        sa.Column("subject", sa.Text(), nullable=False),
    )
    _table("users", _word("name", unique=True), _real("share"), _whole("daily_trials"), _real("created"))
    _table(
        "tokens",
        _link("user_id", "users.id", index=True),
        _word("prefix", unique=True),
        *(_word(name) for name in ("hash", "scopes", "label")),
        _real("created"),
        _real("expires", nullable=True),
        _real("revoked", nullable=True),
    )
    op.create_table(
        "blobs",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("size", sa.BigInteger(), nullable=False),
        _word("media_type"),
        sa.Column("private", sa.Boolean(), nullable=False),
        _link("user_id", "users.id", index=True),
        _real("created"),
    )


def _benchmarks() -> None:
    _table(
        "benchmarks",
        _word("name"),
        _whole("version"),
        _word("title"),
        sa.Column("task", sa.Text(), nullable=False),
        _word("metric"),
        _word("robot_class"),
        _whole("daily_trials"),
        *(_real(name) for name in ("trial_seconds", "fault_score", "created")),
        sa.UniqueConstraint("name", "version"),
    )
    _table(
        "splits",
        _link("benchmark_id", "benchmarks.id"),
        _word("name"),
        sa.Column("cases", sa.JSON(), nullable=False),
        _word("digest"),
        sa.UniqueConstraint("benchmark_id", "name"),
    )
    _table(
        "robots",
        _word("name", unique=True),
        _word("robot_class", index=True),
        sa.Column("spec", sa.JSON(), nullable=False),
        _real("created"),
        _real("seen"),
    )
    _table(
        "workers",
        _word("name", unique=True),
        _link("robot_id", "robots.id", index=True),
        _link("user_id", "users.id"),
        _word("instance"),
        _real("created"),
        _real("seen"),
    )


def _submissions() -> None:
    _table(
        "submissions",
        _link("user_id", "users.id", index=True),
        _link("split_id", "splits.id", index=True),
        *(_word(name) for name in ("robot_class", "name", "kind")),
        _word("anchor", nullable=True),
        _word("method"),
        _word("imitates"),
        sa.Column("checkpoint", sa.String(64), sa.ForeignKey("blobs.sha256")),
        _word("state"),
        _whole("wanted"),
        _word("commitment"),
        _word("nonce"),
        _real("created"),
        _real("finished", nullable=True),
        _whole("n"),
        *(_real(name, nullable=True) for name in ("score", "score_low", "score_high")),
        sa.Column("successes", sa.Integer()),
        _whole("judged"),
        _real("latency_ms", nullable=True),
        _real("late_share", nullable=True),
        sa.CheckConstraint("kind IN ('remote', 'checkpoint', 'anchor')", name="kind"),
        sa.CheckConstraint("state IN ('open', 'done', 'cancelled')", name="state"),
    )
    op.create_index("ix_submissions_queue", "submissions", ["state", "robot_class", "user_id"])


def _runs() -> None:
    states = "'queued', 'leased', 'running', 'done', 'policy_fault', 'needs_human', 'needs_storage', 'cancelled'"
    _table(
        "trials",
        _link("submission_id", "submissions.id"),
        _whole("slot"),
        _whole("position"),
        _word("pair_id", index=True),
        _word("blind_label"),
        sa.Column("scene", sa.JSON(), nullable=False),
        _whole("seed"),
        _word("state"),
        *(_whole(name) for name in ("attempt", "faults", "fence")),
        _link("robot_id", "robots.id", nullable=True),
        _real("lease_until", nullable=True),
        _real("progress", nullable=True),
        sa.CheckConstraint(f"state IN ({states})", name="state"),
        sa.UniqueConstraint("submission_id", "slot"),
    )
    guarded = {"expiry": "lease_until", "one_per_robot": "robot_id", "one_per_submission": "submission_id"}
    for name, column in guarded.items():
        only: Any = {"sqlite_where": _in_flight, "postgresql_where": _in_flight}
        op.create_index(f"ix_trials_{name}", "trials", [column], unique=name != "expiry", **only)
    op.create_index("ix_trials_queue", "trials", ["submission_id", "state", "position"])
    _table(
        "attempts",
        _link("trial_id", "trials.id"),
        _whole("n"),
        _whole("fence"),
        _link("user_id", "users.id"),
        _link("robot_id", "robots.id", index=True),
        _link("worker_id", "workers.id"),
        _word("robot_class"),
        _real("leased"),
        _real("started", nullable=True),
        _real("ended", nullable=True),
        _word("outcome", nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        _real("start_tag"),
        _real("finish_tag"),
        _word("report", nullable=True),
        sa.Column("answer", sa.JSON()),
        sa.UniqueConstraint("trial_id", "fence"),
        sa.UniqueConstraint("trial_id", "n"),
    )
    op.create_index("ix_attempts_finish_tag", "attempts", ["user_id", "robot_class", "finish_tag"])
    op.create_index("ix_attempts_recent", "attempts", ["user_id", "leased"])
    op.create_index("ix_attempts_start_tag", "attempts", ["robot_class", "start_tag"])
    _table(
        "events",
        _real("time"),
        _word("kind"),
        sa.Column("text", sa.Text(), nullable=False),
        _link("submission_id", "submissions.id", nullable=True),
        _link("trial_id", "trials.id", nullable=True, index=True),
        _link("robot_id", "robots.id", nullable=True),
    )
    op.create_index("ix_events_submission", "events", ["submission_id", "id"])
    _table(
        "results",
        _link("trial_id", "trials.id", unique=True),
        _link("submission_id", "submissions.id", index=True),
        _whole("attempt"),
        _word("outcome"),
        sa.Column("reason", sa.Text(), nullable=False),
        _real("score"),
        sa.Column("success", sa.Boolean()),
        _whole("steps"),
        _real("latency_ms", nullable=True),
        _real("late_share", nullable=True),
        sa.Column("files", sa.JSON(), nullable=False),
        _real("created"),
    )


def _table(name: str, *parts: Any) -> None:
    op.create_table(name, sa.Column("id", sa.Integer(), primary_key=True), *parts)


def _word(name: str, *, nullable: bool = False, **more: Any) -> sa.Column[str]:
    return sa.Column(name, sa.String(200), nullable=nullable, **more)


def _whole(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False)


def _real(name: str, *, nullable: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Float(53), nullable=nullable)


def _link(name: str, target: str, *, nullable: bool = False, **more: Any) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), sa.ForeignKey(target), nullable=nullable, **more)
