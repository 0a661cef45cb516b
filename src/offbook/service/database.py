"""One way to the database, the same for SQLite and PostgreSQL: sessions, transactions, the clock and migrations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import JSON, Connection, Engine, Float, MetaData, String, create_engine, event, inspect
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.functions import FunctionElement

from offbook.errors import ConfigError

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
"""Names of constraints that both databases agree on, for the `MetaData` of a schema."""

TYPES: Mapping[Any, Any] = {float: Float(53), dict[str, Any]: JSON, list[Any]: JSON, str: String(200)}
"""Which column a type of a table's class becomes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """Tables that belong together, and the migrations that make them.

    Attributes:
        metadata: the tables as declared.
        migrations: folder of the Alembic scripts.
        version_table: where the database keeps which of them were run; several schemas share one database.
    """

    metadata: MetaData
    migrations: Path
    version_table: str = "alembic_version"


class database_now(FunctionElement[float]):  # noqa: N801 - it stands in statements beside func.max and its like
    """Seconds since 1970 by the clock of the database, evaluated when the statement runs."""

    type = Float(53)
    inherit_cache = True


@compiles(database_now, "sqlite")
def _sqlite_now(element: database_now, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_now, "postgresql")
def _postgresql_now(element: database_now, compiler: Any, **options: Any) -> str:
    # Not CURRENT_TIMESTAMP: that is the start of the transaction, which may have waited for a lock since.
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


def now(session: Session) -> ColumnElement[float]:
    """The present, as an expression; the only clock there is. Tests put their own under `session.info["now"]`."""
    clock: Callable[[], ColumnElement[float]] = session.info.get("now", database_now)
    return clock()


class Database:
    """An engine and its two kinds of transaction; who has tables derives a class that names their `schemas`.

    Args:
        url: `sqlite:///path/file.db` or `postgresql+psycopg://user@host/name`.
        clock: makes the expression of the present; only tests give another than the database's own.

    Raises:
        ConfigError: the address is not one of these two databases.

    Example:
        >>> import tempfile
        >>> from sqlalchemy import select
        >>> database = Database(f"sqlite:///{tempfile.mkdtemp()}/some.db")
        >>> with database.read() as session:
        ...     session.scalar(select(now(session))) > 1.7e9
        True
        >>> database.close()
    """

    schemas: ClassVar[tuple[Schema, ...]] = ()

    def __init__(self, url: str, clock: Callable[[], ColumnElement[float]] = database_now) -> None:
        self.engine = _engine(url)
        self._info: dict[Any, Any] = {"now": clock}
        self._writing = self.engine.execution_options(write=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that only looks; nothing it does is kept."""
        with Session(self.engine, info=self._info, autoflush=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session in one transaction, committed at the end of the block, undone by any error."""
        with Session(self._writing, info=self._info, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def snapshot(self) -> Iterator[Session]:
        """A session that only looks, at a database that is there already, and sees one moment until its end.

        Raises:
            ConfigError: the database cannot be reached, also in the middle, or its schema is not this version's.
        """
        engine = self.engine
        if engine.dialect.name == "postgresql":
            # SQLite's reading transactions are of this kind anyway.
            engine = engine.execution_options(isolation_level="REPEATABLE READ")
        elif self._no_file():  # which SQLite would make
            raise ConfigError(self._where, expected="a database", got="no such file",
                              fix="check the address, or restore the file from a copy")  # fmt: skip
        with self.told("a database that answers"), Session(engine, info=self._info, autoflush=False) as session:
            self._check_schemas(session)
            yield session

    def is_empty(self) -> bool:
        """Whether there are no tables in it; a file of SQLite that is not there is not made by looking.

        Raises:
            ConfigError: the database cannot be reached.
        """
        with self.told("a database that answers"):
            return self._no_file() or not inspect(self.engine).get_table_names()

    def migrate(self, revisions: Mapping[str, str] | None = None, connection: Connection | None = None) -> None:
        """Brings the schemas to this version's; nothing happens where they are there already.

        Args:
            revisions: by version table, earlier schemas for rows that were copied from them; a schema that is not named
                is left out.
            connection: in whose transaction; in one of its own when None.

        Raises:
            ConfigError: the database cannot be reached or opened, or a newer offbook made it.
        """
        from alembic import command
        from alembic.util import CommandError

        try:
            with (
                self.told("a reachable database that this user may change"),
                nullcontext(connection) if connection is not None else self._writing.begin() as connection,
            ):
                if connection.dialect.name == "postgresql":
                    # Several servers may start at once: one migrates, the others wait and find it done.
                    connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('offbook migrations'))")
                for schema in self.schemas:
                    revision = "head" if revisions is None else revisions.get(schema.version_table)
                    if revision is not None:
                        command.upgrade(_alembic(schema, connection), revision)
        except CommandError as error:
            raise ConfigError(self._where, expected="a schema that this offbook knows", got=str(error),
                              fix="install the offbook that made it, or a newer one") from error  # fmt: skip

    def close(self) -> None:
        """Gives all connections back."""
        self.engine.dispose()

    @property
    def _where(self) -> str:
        return f"database {self.engine.url.render_as_string()}"

    def _no_file(self) -> bool:
        return self.engine.dialect.name == "sqlite" and not Path(self.engine.url.database or "").is_file()

    @contextmanager
    def told(self, expected: str) -> Iterator[None]:
        """Makes one sentence of what the database or its driver says.

        Args:
            expected: of the database.

        Raises:
            ConfigError: it failed in the block.
        """
        try:
            yield
        except SQLAlchemyError as error:
            raise ConfigError(self._where, expected=expected, got=str(error.__cause__ or error).strip().split("\n")[0],
                              fix="check the address and that the server runs") from error  # fmt: skip

    def _check_schemas(self, session: Session) -> None:
        from alembic.migration import MigrationContext
        from alembic.script import ScriptDirectory

        for schema in self.schemas:
            scripts = ScriptDirectory.from_config(_alembic(schema))
            options = {"version_table": schema.version_table}
            found = MigrationContext.configure(session.connection(), opts=options).get_current_revision()
            newest = scripts.get_current_head()
            if found != newest:
                older = found is None or found in {script.revision for script in scripts.walk_revisions()}
                fix = "start its service once, which brings it up to date" if older else "install a newer offbook"
                raise ConfigError(self._where, expected=f"the schema of this offbook, {newest}",
                                  got=f"{found or 'none'} in {schema.version_table}", fix=fix)  # fmt: skip


def _alembic(schema: Schema, connection: Connection | None = None) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(schema.migrations))
    config.attributes |= {"connection": connection, "schema": schema}
    return config


def run_migrations() -> None:
    """What the `env.py` of each schema's migrations calls."""
    from alembic import context

    schema: Schema = context.config.attributes["schema"]
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=schema.metadata,
        version_table=schema.version_table,
        render_as_batch=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _engine(url: str) -> Engine:
    try:
        engine = create_engine(url, pool_size=20, max_overflow=20, pool_pre_ping=not url.startswith("sqlite"))
    except (SQLAlchemyError, ModuleNotFoundError, ValueError, TypeError) as error:
        raise _bad_address(url) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    elif engine.dialect.name != "postgresql":
        raise _bad_address(url)
    return engine


def _bad_address(url: str) -> ConfigError:
    return ConfigError(f"database address {url.split('@')[-1]!r}",
                       expected="sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME", got="another kind of database",
                       fix="give one of these two")  # fmt: skip


def _prepare_sqlite(connection: Any, record: Any) -> None:
    # The driver's own implicit transactions would make every first write upgrade a read lock, which can deadlock.
    connection.isolation_level = None
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 15000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
