"""The arena's database: its own tables, and beside them those of the studies in which people compare runs."""

from __future__ import annotations

from pathlib import Path

from offbook.arena.tables import Table
from offbook.rating.tables import SCHEMA
from offbook.service import database


class Database(database.Database):
    """A database with the schema of the arena and that of studies.

    Example:
        >>> import tempfile
        >>> database = Database(f"sqlite:///{tempfile.mkdtemp()}/arena.db")
        >>> database.migrate()
        >>> database.close()
    """

    schemas = (database.Schema(metadata=Table.metadata, migrations=Path(__file__).parent / "migrations"), SCHEMA)
