"""The newest picture of each robot, where all servers find it."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Makes the change."""
    op.create_table(
        "pictures",
        sa.Column("robot_id", sa.Integer(), sa.ForeignKey("robots.id"), primary_key=True),
        sa.Column("looked", sa.Float(53), nullable=False),
        sa.Column("taken", sa.Float(53)),
        sa.Column("jpeg", sa.LargeBinary()),
    )
