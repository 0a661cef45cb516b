"""The first schema."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Makes the tables; those that others point to come first."""
    _studies()
    _outputs()
    _pairs()
    _judgements()
    _keep_votes()


def _studies() -> None:
    _table(
        "studies",
        _word("name", unique=True),
        _word("owner"),
        _text("question"),
        _word("modality"),
        *(_flag(name) for name in ("allow_tie", "allow_bad", "allow_skip")),
        _json("reasons"),
        *(_real(name) for name in ("min_dwell_s", "min_watch")),
        _whole("raters_per_pair"),
        *(_real(name) for name in ("gold_rate", "repeat_rate")),
        _whole("per_rater_cap"),
        _word("policy"),
        _word("anchor"),
        _flag("anchor_only"),
        _real("patience_s"),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        _json("prereg"),
        _word("state"),
        _real("created"),
        _real("opened", nullable=True),
        _real("closed", nullable=True),
        _among("state", "draft", "open", "closed"),
        _among("modality", "text", "image", "video", "rollout"),
        _among("policy", "balanced", "greedy"),
    )


def _outputs() -> None:
    _table(
        "systems",
        _link("study_id", "studies.id"),
        _word("name"),
        _json("meta"),
        sa.UniqueConstraint("study_id", "name"),
    )
    _table(
        "items",
        _link("study_id", "studies.id"),
        _word("name"),
        _text("prompt"),
        _word("cluster", nullable=True),
        sa.UniqueConstraint("study_id", "name"),
    )
    _table(
        "outputs",
        _link("item_id", "items.id"),
        _link("system_id", "systems.id", index=True),
        _word("gold", nullable=True),
        sa.Column("text", sa.Text()),
        _word("opaque", nullable=True, unique=True),
        sa.Column("sha256", sa.String(64)),
        _word("media_type"),
        _whole("size"),
        _hash("source"),
        _json("features"),
        sa.UniqueConstraint("item_id", "system_id"),
        _among("gold", "better", "worse"),
    )


def _pairs() -> None:
    _table(
        "pairs",
        _link("study_id", "studies.id", index=True),
        _link("item_id", "items.id"),
        _link("a_id", "outputs.id"),
        _link("b_id", "outputs.id", index=True),
        _word("kind"),
        _word("expected", nullable=True),
        _link("repeat_of", "pairs.id", nullable=True, unique=True),
        sa.UniqueConstraint("a_id", "b_id", "kind"),
        _among("kind", "real", "gold", "repeat"),
        _among("expected", "a", "b"),
    )
    _table(
        "raters",
        _link("study_id", "studies.id"),
        _whole("n"),
        _hash("token_hash", unique=True),
        _word("kind"),
        _word("cohort"),
        _real("created"),
        _real("consent_at", nullable=True),
        sa.UniqueConstraint("study_id", "n"),
        _among("kind", "human", "llm", "script"),
    )


def _judgements() -> None:
    _table(
        "assignments",
        _link("study_id", "studies.id"),
        _link("pair_id", "pairs.id", index=True),
        _link("rater_id", "raters.id"),
        _whole("n"),
        _flag("left_is_a"),
        _word("nonce", unique=True),
        _real("issued"),
        _real("expires"),
        _word("state"),
        sa.UniqueConstraint("rater_id", "n"),
        _among("state", "open", "voted", "skipped", "expired"),
    )
    still_open = sa.text("state = 'open'")
    op.create_index(
        "ix_assignments_one_open", "assignments", ["rater_id"],
        unique=True, sqlite_where=still_open, postgresql_where=still_open,
    )  # fmt: skip
    op.create_index("ix_assignments_count", "assignments", ["study_id", "state", "pair_id"])
    _table(
        "votes",
        _link("assignment_id", "assignments.id", unique=True),
        _word("choice"),
        _json("reasons"),
        _text("note"),
        sa.Column("dwell_ms", sa.BigInteger()),
        _real("watched", nullable=True),
        sa.Column("client_ms", sa.BigInteger()),
        _real("created"),
        _among("choice", "left", "right", "tie", "both_bad", "skip"),
    )
    _table(
        "exclusions",
        _link("vote_id", "votes.id", nullable=True),
        _link("rater_id", "raters.id", nullable=True),
        _word("rule"),
        _word("by"),
        _real("at"),
        sa.UniqueConstraint("vote_id", "rule"),
        sa.UniqueConstraint("rater_id", "rule"),
        sa.CheckConstraint("(vote_id IS NULL) <> (rater_id IS NULL)", name="one_of_both"),
    )


def _keep_votes() -> None:
    """Votes are added and never changed: not by a mistake of ours, and not by hand without dropping a trigger."""
    if op.get_bind().dialect.name == "sqlite":
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER keep_votes_{event.lower()} BEFORE {event} ON votes "
                "BEGIN SELECT RAISE(ABORT, 'votes are never changed'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION keep_votes() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'votes are never changed' USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    op.execute(
        "CREATE TRIGGER keep_votes BEFORE UPDATE OR DELETE OR TRUNCATE ON votes "
        "FOR EACH STATEMENT EXECUTE FUNCTION keep_votes()"
    )


def _table(name: str, *parts: Any) -> None:
    op.create_table(name, sa.Column("id", sa.Integer(), primary_key=True), *parts)


def _among(name: str, *values: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"{name} IN ({', '.join(map(repr, values))})", name=name)


def _word(name: str, *, nullable: bool = False, **more: Any) -> sa.Column[str]:
    return sa.Column(name, sa.String(200), nullable=nullable, **more)


def _hash(name: str, **more: Any) -> sa.Column[str]:
    return sa.Column(name, sa.String(64), nullable=False, **more)


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=False)


def _json(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON(), nullable=False)


def _whole(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False)


def _flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean(), nullable=False)


def _real(name: str, *, nullable: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Float(53), nullable=nullable)


def _link(name: str, target: str, *, nullable: bool = False, **more: Any) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), sa.ForeignKey(target), nullable=nullable, **more)
