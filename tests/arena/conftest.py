"""Databases for the arena's tests: SQLite in a folder, and PostgreSQL where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from arena_world import Client, VirtualClock, open_arena
from sqlalchemy import NullPool, create_engine, text

from offbook.arena.database import Database

MakeDatabase = Callable[..., Database]


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database to copy: migrating anew for each test takes longer than most tests."""
    path = tmp_path_factory.mktemp("template") / "arena.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.close()
    return path


@pytest.fixture(scope="session")
def execute(postgres_address: str) -> Callable[[str], None]:
    """Runs one statement on the server; a migrated database `template_arena` stands ready to be copied."""
    server = create_engine(postgres_address.format(name="postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def run(statement: str) -> None:
        with server.connect() as connection:
            connection.execute(text(statement))

    run("CREATE DATABASE template_arena")
    database = Database(postgres_address.format(name="template_arena"))
    database.migrate()
    database.close()
    return run


@pytest.fixture(params=["sqlite", "postgresql"])
def make_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeDatabase]:
    """Makes databases of one kind with the schema in place; all are closed and dropped at the end."""
    yield from _databases(request, tmp_path, request.param)


@pytest.fixture
def make_sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeDatabase]:
    """Makes SQLite databases, for tests whose subject is not the database."""
    yield from _databases(request, tmp_path, "sqlite")


def _databases(request: pytest.FixtureRequest, folder: Path, kind: str) -> Iterator[MakeDatabase]:
    made: list[Database] = []
    names: list[str] = []

    def make(*clock: VirtualClock) -> Database:
        names.append(f"arena_{uuid4().hex}")
        if kind == "sqlite":
            shutil.copy(request.getfixturevalue("sqlite_template"), folder / f"{names[-1]}.db")
            url = f"sqlite:///{folder}/{names[-1]}.db"
        else:
            request.getfixturevalue("execute")(f"CREATE DATABASE {names[-1]} TEMPLATE template_arena")
            url = request.getfixturevalue("postgres_address").format(name=names[-1])
        made.append(Database(url, *clock))
        return made[-1]

    yield make
    for database in made:
        database.close()
    for name in names if kind == "postgresql" else []:
        request.getfixturevalue("execute")(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def client(make_sqlite: MakeDatabase, tmp_path: Path) -> Iterator[Client]:
    """A visitor of a small arena on SQLite."""
    with open_arena(make_sqlite(), tmp_path) as client:
        yield client


@pytest.fixture
def both_clients(make_database: MakeDatabase, tmp_path: Path) -> Iterator[Client]:
    """The same on both databases."""
    with open_arena(make_database(), tmp_path) as client:
        yield client
