"""The schema, the clock and the transactions are the same on both databases."""

from __future__ import annotations

import threading
import time

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from offbook.arena.database import Database
from offbook.arena.tables import User
from offbook.errors import ConfigError
from offbook.service.database import now

pytestmark = pytest.mark.service


def test_the_migrated_schema_is_the_declared_one(make_database) -> None:
    database = make_database()
    versions = {schema.version_table for schema in database.schemas}
    options = {"compare_type": True, "include_name": lambda name, kind, above: name not in versions}
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, [schema.metadata for schema in database.schemas]) == []
    database.migrate()


def test_the_clock_is_the_time_of_day(make_database) -> None:
    with make_database().read() as session:
        first = session.scalar(select(now(session)))
        second = session.scalar(select(now(session)))
    assert abs(first - time.time()) < 5
    assert second >= first


def test_an_error_undoes_the_whole_transaction(make_database) -> None:
    database = make_database()

    def add_twice() -> None:
        with database.write() as session:
            for _ in range(2):
                session.add(User(name="ada", daily_trials=1, created=now(session)))

    with pytest.raises(IntegrityError):
        add_twice()
    with database.read() as session:
        assert session.scalars(select(User)).all() == []


def test_writers_wait_for_one_another_and_lose_nothing(make_database) -> None:
    database = make_database()
    with database.write() as session:
        session.add(User(name="ada", daily_trials=0, created=now(session)))

    def count() -> None:
        for _ in range(20):
            with database.write() as session:
                session.scalars(select(User).with_for_update()).one().daily_trials += 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.scalar(select(User.daily_trials)) == 80


@pytest.mark.parametrize("url", ["mysql://h/db", "nonsense", "sqlite", ""])
def test_another_database_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///FILE"):
        Database(url)


def test_a_database_that_cannot_be_opened_is_one_sentence(tmp_path) -> None:
    with pytest.raises(ConfigError, match="unable to open"):
        Database(f"sqlite:///{tmp_path}/none/arena.db").migrate()
