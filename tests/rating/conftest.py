"""Databases of studies, SQLite in a folder and PostgreSQL where it is installed, and a service on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from rating_world import Clock, World, open_world
from sqlalchemy import NullPool, create_engine, text

from offbook.rating.app import Database

MakeDatabase = Callable[..., Database]


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[MakeDatabase]:
    """Makes SQLite databases, for tests whose subject is not the database."""
    made: list[Database] = []

    def make(*clock: Clock) -> Database:
        made.append(Database(f"sqlite:///{tmp_path}/{len(made)}.db", *clock))
        made[-1].migrate()
        return made[-1]

    yield make
    for database in made:
        database.close()


@pytest.fixture
def postgresql(postgres_address: str) -> Iterator[MakeDatabase]:
    server = create_engine(postgres_address.format(name="postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool)
    made: dict[str, Database] = {}

    def make(*clock: Clock) -> Database:
        name = f"rating_{uuid4().hex}"
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        made[name] = Database(postgres_address.format(name=name), *clock)
        made[name].migrate()
        return made[name]

    yield make
    for name, database in made.items():
        database.close()
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(params=["sqlite", "postgresql"])
def make_database(request: pytest.FixtureRequest) -> MakeDatabase:
    """Makes databases of either kind."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def world(sqlite: MakeDatabase, tmp_path: Path) -> Iterator[World]:
    """A service on SQLite."""
    with open_world(sqlite(), tmp_path) as world:
        yield world


@pytest.fixture
def both_worlds(make_database: MakeDatabase, tmp_path: Path) -> Iterator[World]:
    """A service on either database."""
    with open_world(make_database(), tmp_path) as world:
        yield world
