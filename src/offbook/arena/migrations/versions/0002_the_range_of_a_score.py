"""Benchmarks say between which ends their score lies; a user's share in the queue, which nobody could set, goes."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Makes the change."""
    for name in ("least", "most"):
        op.add_column("benchmarks", sa.Column(name, sa.Float(53)))
    op.drop_column("users", "share")
