"""The schema, the clock and the transactions are the same on both databases."""

from __future__ import annotations

import threading
import time

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, func, select, text
from sqlalchemy.exc import IntegrityError

from offbook.arena.database import Database
from offbook.arena.tables import Benchmark, Submission, Table, User
from offbook.errors import ConfigError
from offbook.service.database import now

pytestmark = pytest.mark.service


VERSIONS = {schema.version_table for schema in Database.schemas}


def differences(database: Database) -> list:
    """Between the schema in a database and the declared one."""
    options = {"compare_type": True, "include_name": lambda name, kind, above: name not in VERSIONS}
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        return compare_metadata(context, [schema.metadata for schema in database.schemas])


def test_the_migrated_schema_is_the_declared_one(make_database) -> None:
    database = make_database()
    assert differences(database) == []
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


def test_an_arena_of_an_earlier_version_keeps_its_rows(tmp_path, empty_database) -> None:
    for revision in ("0001", "0002"):
        database = Database(empty_database())
        database.migrate({"alembic_version": revision})
        schema = MetaData()
        schema.reflect(database.engine)
        with database.write() as session:
            for table in schema.sorted_tables:
                if table.name != "alembic_version":
                    session.execute(table.insert(), {c.name: _value(c) for c in table.columns})
        database.migrate()
        with database.read() as session:
            for table in Table.metadata.sorted_tables:
                wanted = 1 if table.name in schema.tables else 0
                assert session.scalar(select(func.count()).select_from(table)) == wanted, table.name
            assert session.scalars(select(Submission)).one().pairing_id is None
            assert session.scalars(select(Benchmark)).one().prestage == ""
        assert differences(database) == []
        database.close()


def _value(column) -> object:
    """Something that a column takes, and that its constraints and links allow in a first row."""
    if column.name in ("state", "kind"):
        return {"submissions": {"state": "open", "kind": "remote"}}.get(column.table.name, {}).get(
            column.name, "queued"
        )
    kinds = {float: 1.5, str: "x", int: 1, bool: True, object: {}, dict: {}}
    return None if column.nullable else kinds[column.type.python_type]


def test_a_database_of_a_newer_version_is_said_to_be_one(tmp_path) -> None:
    database = Database(f"sqlite:///{tmp_path}/arena.db")
    database.migrate()
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="or a newer one"):
        database.migrate()
    database.close()


@pytest.mark.parametrize("url", ["mysql://h/db", "nonsense", "sqlite", ""])
def test_another_database_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///FILE"):
        Database(url)


def test_a_database_that_cannot_be_opened_is_one_sentence(tmp_path) -> None:
    with pytest.raises(ConfigError, match="unable to open"):
        Database(f"sqlite:///{tmp_path}/none/arena.db").migrate()
