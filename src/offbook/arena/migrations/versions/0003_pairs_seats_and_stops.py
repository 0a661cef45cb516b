"""Submissions played in pairs, benchmarks that want another one first, seats of all servers, stopped robots."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Makes the change."""
    op.create_table(
        "pairings",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("split_id", sa.Integer(), sa.ForeignKey("splits.id"), nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
    )
    # In plain words: SQLite adds a link only with its column, and a table that trials point to cannot be made anew.
    op.execute("ALTER TABLE submissions ADD COLUMN pairing_id INTEGER CONSTRAINT fk_submissions_pairing_id"
               " REFERENCES pairings (id)")  # fmt: skip
    op.create_index("ix_submissions_pairing_id", "submissions", ["pairing_id"])
    op.add_column("benchmarks", sa.Column("prestage", sa.String(200), nullable=False, server_default=""))
    op.add_column("benchmarks", sa.Column("prestage_score", sa.Float(53)))
    op.add_column("robots", sa.Column("stopped", sa.Float(53)))
    op.create_table(
        "seats",
        sa.Column("submission_id", sa.Integer(), sa.ForeignKey("submissions.id"), primary_key=True),
        sa.Column("server", sa.String(200), nullable=False),
        sa.Column("url", sa.String(200), nullable=False),
        sa.Column("seen", sa.Float(53), nullable=False),
    )
    waits = sa.text("state = 'needs_storage'")
    op.create_index("ix_trials_storage", "trials", ["state"], sqlite_where=waits, postgresql_where=waits)
