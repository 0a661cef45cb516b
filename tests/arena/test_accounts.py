"""Tokens: who gets in, with what, for how long; and that nothing of a secret is kept."""

from __future__ import annotations

import re

import pytest
from arena_world import VirtualClock
from sqlalchemy import select

from offbook.arena import accounts
from offbook.arena.database import Database
from offbook.arena.tables import Token
from offbook.service.refusal import RefusedError

pytestmark = pytest.mark.service


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def database(make_database, clock: VirtualClock) -> Database:
    return make_database(clock)


def issue(database: Database, *scopes: str, user: str = "ada", **options) -> str:
    with database.write() as session:
        return accounts.issue_token(session, accounts.find_user(session, user, create=True), scopes, **options)


def enter(database: Database, header: str | None) -> accounts.Principal:
    with database.read() as session:
        return accounts.authenticate(session, header)


def test_a_token_opens_the_door_with_its_scopes(database: Database) -> None:
    token = issue(database, "submit", "submit")
    assert re.fullmatch(r"ob_[0-9a-f]{8}_[\w-]{43}", token)
    principal = enter(database, f"Bearer {token}")
    assert (principal.user, principal.scopes) == ("ada", {"submit"})
    assert principal.allows("submit")
    assert not principal.allows("worker")
    with pytest.raises(RefusedError, match="the scope 'worker'") as caught:
        principal.require("worker")
    assert caught.value.status == 403
    assert enter(database, f"bearer {issue(database, 'admin')}").allows("worker")


def test_the_database_holds_neither_the_token_nor_its_secret(database: Database) -> None:
    token = issue(database, "submit")
    with database.read() as session:
        row = session.scalars(select(Token)).one()
        kept = " ".join(str(value) for value in vars(row).values())
        listed = repr(accounts.list_tokens(session))
    secret = token.split("_", 2)[2]
    assert secret not in kept
    assert secret not in listed
    assert row.hash not in listed
    assert row.prefix in listed


@pytest.mark.parametrize(
    "change",
    [
        lambda token: None,
        lambda token: "",
        lambda token: token,
        lambda token: f"Basic {token}",
        lambda token: f"Bearer {token[:-1]}",
        lambda token: f"Bearer {token[:-1]}{'A' if token[-1] != 'A' else 'B'}",
        lambda token: f"Bearer ob_00000000_{token.split('_', 2)[2]}",
        lambda token: f"Bearer {token} {token}",
        lambda token: "Bearer " + "x" * 100_000,
        lambda token: "Bearer ob_' OR 1=1_" + "a" * 43,
    ],
)
def test_anything_else_stays_outside(database: Database, change) -> None:
    token = issue(database, "admin")
    with pytest.raises(RefusedError) as caught:
        enter(database, change(token))
    assert caught.value.status == 401
    assert token not in str(caught.value)


def test_a_token_expires_by_the_clock_of_the_database(database: Database, clock: VirtualClock) -> None:
    token = issue(database, "submit", days=1)
    for_ever = issue(database, "submit", days=None)
    clock.seconds += 86399
    enter(database, f"Bearer {token}")
    clock.seconds += 2
    with pytest.raises(RefusedError, match="expired"):
        enter(database, f"Bearer {token}")
    enter(database, f"Bearer {for_ever}")


def test_a_revoked_token_is_out_for_good(database: Database) -> None:
    token, other = issue(database, "submit"), issue(database, "submit", user="bob")
    prefix = token.split("_")[1]
    with database.write() as session:
        bob = accounts.find_user(session, "bob").id
        with pytest.raises(RefusedError, match="no such one"):
            accounts.revoke_token(session, prefix, user_id=bob)
        first = accounts.revoke_token(session, f"ob_{prefix}")
        revoked = accounts.list_tokens(session, user_id=accounts.find_user(session, "ada").id)[0]["revoked"]
        assert accounts.revoke_token(session, prefix) == first
        assert accounts.list_tokens(session)[1]["revoked"] == revoked is not None
    with pytest.raises(RefusedError, match="revoked"):
        enter(database, f"Bearer {token}")
    enter(database, f"Bearer {other}")


@pytest.mark.parametrize(
    ("user", "scopes", "days"),
    [
        ("", ["submit"], 1),
        ("x" * 65, ["submit"], 1),
        ("<b>", ["submit"], 1),
        ("ada", ["root"], 1),
        ("ada", [], 1),
        ("ada", ["submit"], 0),
        ("ada", ["submit"], -1),
        ("ada", ["submit"], float("nan")),
        ("ada", ["submit"], 1e9),
    ],
)
def test_unusable_tokens_are_not_made(database: Database, user: str, scopes: list[str], days: float) -> None:
    with pytest.raises(RefusedError) as caught:
        issue(database, *scopes, user=user, days=days)
    assert caught.value.status == 422
    with database.read() as session:
        assert accounts.list_tokens(session) == []
