"""What a study of pairs keeps: nine tables, from which nothing is ever deleted. Times are seconds since 1970.

A study asks one question about pairs of outputs. An output is what one system made of one item; a pair is two outputs
of one item. A rater is shown assignments, and each leads to one vote at most.
"""

from __future__ import annotations

from pathlib import Path
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

from offbook.service.database import NAMES, TYPES, Schema

MODALITIES = ("text", "image", "video", "rollout")
"""What outputs are; a rollout is the video of a robot's run on a scene and seed that both sides share."""

_open = text("state = 'open'")


class Table(DeclarativeBase):
    """All tables of this schema."""

    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = TYPES


SCHEMA = Schema(
    metadata=Table.metadata, migrations=Path(__file__).parent / "migrations", version_table="alembic_version_rating"
)


class Study(Table):
    """One question about pairs, with the rules by which it is asked; see `studies.Design`."""

    __tablename__ = "studies"
    __table_args__ = (
        CheckConstraint("state IN ('draft', 'open', 'closed')", name="state"),
        CheckConstraint(f"modality IN {MODALITIES!r}", name="modality"),
        CheckConstraint("policy IN ('balanced', 'greedy')", name="policy"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str]
    question: Mapped[str] = mapped_column(Text)
    modality: Mapped[str]
    allow_tie: Mapped[bool]
    allow_bad: Mapped[bool]
    allow_skip: Mapped[bool]
    reasons: Mapped[list[Any]]
    min_dwell_s: Mapped[float]
    min_watch: Mapped[float]
    raters_per_pair: Mapped[int]
    gold_rate: Mapped[float]
    repeat_rate: Mapped[float]
    per_rater_cap: Mapped[int]
    policy: Mapped[str]
    anchor: Mapped[str]
    anchor_only: Mapped[bool]
    patience_s: Mapped[float]
    seed: Mapped[int] = mapped_column(BigInteger)
    prereg: Mapped[dict[str, Any]]
    state: Mapped[str]
    created: Mapped[float]
    opened: Mapped[float | None]
    closed: Mapped[float | None]


class System(Table):
    """One of those that are compared. Its name never reaches a rater."""

    __tablename__ = "systems"
    __table_args__ = (UniqueConstraint("study_id", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"))
    name: Mapped[str]
    meta: Mapped[dict[str, Any]]


class Item(Table):
    """What outputs answer: a prompt, or a scene with its seed. Items of one cluster resemble each other."""

    __tablename__ = "items"
    __table_args__ = (UniqueConstraint("study_id", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"))
    name: Mapped[str]
    prompt: Mapped[str] = mapped_column(Text)
    cluster: Mapped[str | None]


class Output(Table):
    """What a system made of an item: a text, or a file without metadata under a name that says nothing.

    `source` is the hash of what was handed in, so that the same may be handed in again. `gold` marks the two outputs of
    an item of which one is known to be better.
    """

    __tablename__ = "outputs"
    __table_args__ = (
        UniqueConstraint("item_id", "system_id"),
        CheckConstraint("gold IN ('better', 'worse')", name="gold"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("items.id"))
    system_id: Mapped[int] = mapped_column(ForeignKey("systems.id"), index=True)
    gold: Mapped[str | None]
    text: Mapped[str | None] = mapped_column(Text)
    opaque: Mapped[str | None] = mapped_column(unique=True)
    sha256: Mapped[str | None] = mapped_column(String(64))
    media_type: Mapped[str]
    size: Mapped[int]
    source: Mapped[str] = mapped_column(String(64))
    features: Mapped[dict[str, Any]]
    system: Mapped[System] = relationship()


class Pair(Table):
    """Two outputs of one item. A repeat is an earlier pair that a rater meets again with its sides swapped."""

    __tablename__ = "pairs"
    __table_args__ = (
        UniqueConstraint("a_id", "b_id", "kind"),
        CheckConstraint("kind IN ('real', 'gold', 'repeat')", name="kind"),
        CheckConstraint("expected IN ('a', 'b')", name="expected"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"), index=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("items.id"))
    a_id: Mapped[int] = mapped_column(ForeignKey("outputs.id"))
    b_id: Mapped[int] = mapped_column(ForeignKey("outputs.id"), index=True)
    kind: Mapped[str]
    expected: Mapped[str | None]
    repeat_of: Mapped[int | None] = mapped_column(ForeignKey("pairs.id"), unique=True)
    item: Mapped[Item] = relationship()


class Rater(Table):
    """Somebody who judges: a person, a language model or a script. Only the hash of the invitation is here."""

    __tablename__ = "raters"
    __table_args__ = (
        UniqueConstraint("study_id", "n"),
        CheckConstraint("kind IN ('human', 'llm', 'script')", name="kind"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"))
    n: Mapped[int]
    token_hash: Mapped[str] = mapped_column(String(64), unique=True)
    kind: Mapped[str]
    cohort: Mapped[str]
    created: Mapped[float]
    consent_at: Mapped[float | None]
    study: Mapped[Study] = relationship()


class Assignment(Table):
    """A pair put before a rater, with the side by lot. The nonce admits one vote until it expires."""

    __tablename__ = "assignments"
    __table_args__ = (
        CheckConstraint("state IN ('open', 'voted', 'skipped', 'expired')", name="state"),
        UniqueConstraint("rater_id", "n"),
        # The database itself keeps the promise that nobody holds two pairs at once.
        Index("ix_assignments_one_open", "rater_id", unique=True, sqlite_where=_open, postgresql_where=_open),
        Index("ix_assignments_count", "study_id", "state", "pair_id"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"))
    pair_id: Mapped[int] = mapped_column(ForeignKey("pairs.id"), index=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("raters.id"))
    n: Mapped[int]
    left_is_a: Mapped[bool]
    nonce: Mapped[str] = mapped_column(unique=True)
    issued: Mapped[float]
    expires: Mapped[float]
    state: Mapped[str]
    pair: Mapped[Pair] = relationship()
    rater: Mapped[Rater] = relationship()


class Vote(Table):
    """What a rater said of an assignment. The database refuses to change or to delete one."""

    __tablename__ = "votes"
    __table_args__ = (CheckConstraint("choice IN ('left', 'right', 'tie', 'both_bad', 'skip')", name="choice"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    assignment_id: Mapped[int] = mapped_column(ForeignKey("assignments.id"), unique=True)
    choice: Mapped[str]
    reasons: Mapped[list[Any]]
    note: Mapped[str] = mapped_column(Text)
    dwell_ms: Mapped[int | None] = mapped_column(BigInteger)
    watched: Mapped[float | None]
    client_ms: Mapped[int | None] = mapped_column(BigInteger)
    created: Mapped[float]


class Exclusion(Table):
    """A rule that leaves out a vote, or all votes of a rater; results are shown with it and without."""

    __tablename__ = "exclusions"
    __table_args__ = (
        UniqueConstraint("vote_id", "rule"),
        UniqueConstraint("rater_id", "rule"),
        CheckConstraint("(vote_id IS NULL) <> (rater_id IS NULL)", name="one_of_both"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    vote_id: Mapped[int | None] = mapped_column(ForeignKey("votes.id"))
    rater_id: Mapped[int | None] = mapped_column(ForeignKey("raters.id"))
    rule: Mapped[str]
    by: Mapped[str]
    at: Mapped[float]
