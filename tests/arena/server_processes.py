"""Arenas for servers in processes of their own; see `offbook.arena.serving.served_apart`."""

from __future__ import annotations

from pathlib import Path

from arena_world import BENCHMARK

from offbook.arena import accounts, submissions
from offbook.arena.database import Database
from offbook.arena.service import Settings


def found_arena(folder: Path, **settings: object) -> tuple[Settings, Database, dict[str, str]]:
    """An arena's folder, its database with the small benchmark, and a token for each role."""
    chosen = Settings(folder=folder, **settings)
    chosen.save()
    database = Database(chosen.database_url)
    database.migrate()
    tokens = {}
    with database.write() as session:
        submissions.define_benchmark(session, BENCHMARK)
        for user, scope in (("root", "admin"), ("ada", "submit"), ("bob", "submit"), ("lab", "worker")):
            owner = accounts.find_user(session, user, create=True)
            owner.daily_trials = 10**6
            tokens[user] = accounts.issue_token(session, owner, [scope])
    return chosen, database, tokens
