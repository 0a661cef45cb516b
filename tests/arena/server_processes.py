"""Arenas in processes of their own, as an operator runs them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from arena_world import BENCHMARK

from offbook.arena import accounts, submissions
from offbook.arena.database import Database
from offbook.arena.service import Settings

PROGRAM = "from offbook.cli.main import main; raise SystemExit(main())"


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


@contextmanager
def serving(folder: Path, *words: str, prefix: Sequence[str] = ()) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`offbook arena serve` on a free port; yields its address and its process."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", PROGRAM, "arena", "serve", str(folder), "--port", "0", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stderr.readline()
        address = next((word for word in line.split() if word.startswith("http")), None)
        assert address, line + process.stderr.read()
        yield address, process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stderr.close()


def answers(url: str, seconds: float = 30.0) -> None:
    """Waits until an address answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.1)
