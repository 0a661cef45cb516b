"""`offbook arena verify-store|backup|restore|requeue|robot`: what an operator does so that nothing is lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import tyro

from offbook.cli.access import URL, read_token
from offbook.cli.report import Report
from offbook.client.submit import ArenaClient
from offbook.errors import ConfigError, needs_extra

_SHOWN = 20
_TROUBLES = ("missing", "damaged", "unreadable", "dangling", "unreferenced")


def verify_store(folder: tyro.conf.Positional[Path] = Path("arena"), *, quick: bool = False) -> Report:
    """Checks that every file that an arena's database names is in its store and whole; the arena may run meanwhile.

    Files that no row knows are counted too: an upload leaves one whose server died before its row was written. They
    cost room and nothing else. Anything missing, damaged, unreadable or dangling makes this command fail.

    Args:
        folder: of the arena.
        quick: compare names and sizes only, without reading the files.

    Examples:
        offbook arena verify-store
        offbook arena verify-store /srv/arena --quick
    """
    with needs_extra("arena"):
        from offbook.arena.database import Database
        from offbook.arena.service import Settings
        from offbook.arena.verify import verify_store as verify
        from offbook.service.storage import BlobStore
    settings = Settings.load(folder)
    database = Database(settings.database_url)
    try:
        found = verify(database, BlobStore(settings.blobs_url), content=not quick, progress=_show("looked at"))
    finally:
        database.close()
    troubles = {name: getattr(found, name) for name in _TROUBLES}
    lines = [f"{found.rows} blobs in the database, {found.files} files of {found.bytes} bytes in the store"]
    for name, hashes in troubles.items():
        lines.append(f"{name}: {len(hashes) or 'none'}")
        lines += [f"  {sha256}" for sha256 in hashes[:_SHOWN]]
    lines.append("The store is sound." if found.sound else "The store is not sound.")
    data = {"rows": found.rows, "files": found.files, "bytes": found.bytes, "sound": found.sound, **troubles}
    return Report(text="\n".join(lines), data=data, exit_code=0 if found.sound else 1)


def backup(to: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path] = Path("arena")) -> Report:
    """Copies an arena, its database and its files, into a folder; the arena may run meanwhile.

    The copy is of one moment and does not depend on the kind of database or store. Into a folder that holds an earlier
    or an unfinished copy only new files are copied. Files that the arena itself has lost are told, and make this
    command fail; the copy is finished without them. It holds token hashes and the seed of all scenes: keep it where
    only you can read.

    Args:
        to: folder of the copy.
        folder: of the arena.

    Examples:
        offbook arena backup /backup/arena
        offbook arena backup /backup/arena /srv/arena
    """
    with needs_extra("arena"):
        from offbook.arena.backup import back_up
        from offbook.arena.service import Settings
    manifest = back_up(Settings.load(folder), to, _show("copied"))
    rows = sum(table["rows"] for table in manifest["tables"].values())
    lost = manifest["lost"]
    lines = [f"{to} holds {rows} rows and {manifest['blobs']} files of {manifest['bytes']} bytes."]
    lines += [f"Missing or damaged in the arena itself, and so in the copy: {len(lost)}"] if lost else []
    lines += [f"  {sha256}" for sha256 in lost[:_SHOWN]]
    return Report(text="\n".join(lines), data={"backup": str(to), **manifest}, exit_code=1 if lost else 0)


def restore(
    copy: tyro.conf.Positional[Path],
    folder: tyro.conf.Positional[Path] = Path("arena"),
    *,
    database: str = "",
    blobs: str = "",
) -> Report:
    """Makes an arena from a copy that `arena backup` made, and verifies its store.

    Users, tokens, submissions and results are those of the copy. Trials that ran when it was taken are run again;
    workers that still play one from after that moment are refused.

    Args:
        copy: folder of the copy.
        folder: where the arena shall stand; new or empty, or with what an interrupted restore left.
        database: address of an empty PostgreSQL database; SQLite in the folder when empty.
        blobs: folder or fsspec address for recordings and checkpoints; in the folder when empty.

    Examples:
        offbook arena restore /backup/arena /srv/arena
        offbook arena restore /backup/arena lab --database postgresql+psycopg://arena@localhost/arena
    """
    with needs_extra("arena"):
        from offbook.arena import backup as copies
        from offbook.arena.service import Settings
    settings = Settings(folder=folder, database=database, blobs=blobs)
    _, manifest = copies.restore(copy, settings, _show("restored"))
    verified = verify_store(folder)
    text = f"An arena stands in {folder}, as it was at {manifest['made']:.0f} s since 1970.\n{verified.text}"
    return Report(text=text, data={"folder": str(folder), **verified.data}, exit_code=verified.exit_code)


def requeue(trials: tyro.conf.Positional[tuple[int, ...]], *, url: str = URL, token_file: Path | None = None) -> Report:
    """Puts trials that wait for their operator back into the queue. The token (scope admin) comes from OFFBOOK_TOKEN.

    They are run again with the same scene and seed; all attempts stay visible. Look at the robot first.

    Args:
        trials: their numbers, as in the addresses of their pages.
        url: address of the arena.
        token_file: file that holds the token, instead of OFFBOOK_TOKEN.

    Examples:
        offbook arena requeue 31 32
    """
    with ArenaClient(url, read_token(token_file)) as arena:
        for trial in trials:
            arena.request("POST", f"/v1/trials/{trial}/requeue")
    listed = ", ".join(map(str, trials))
    return Report(text=f"Back in the queue: {listed}", data={"requeued": list(trials)})


def robot(
    action: tyro.conf.Positional[Literal["stop", "resume"]],
    names: tyro.conf.Positional[tuple[str, ...]],
    *,
    url: str = URL,
    token_file: Path | None = None,
) -> Report:
    """Stops robots, or lets them go on. The token (scope admin) comes from OFFBOOK_TOKEN.

    The next heartbeat of the worker is refused, at most half a second later; the trial ends as a fault of the robot,
    which is run again, and the robot is given no other until it may go on. This does not replace the stop at the robot.

    Args:
        action: stop or resume.
        names: of the robots, as in the queue.
        url: address of the arena.
        token_file: file that holds the token, instead of OFFBOOK_TOKEN.

    Examples:
        offbook arena robot stop franka-1
        offbook arena robot resume franka-1 franka-2 --url https://arena.example
    """
    if not names:
        raise ConfigError("robot", expected="the names of robots", got="none", fix="see the queue for the robots")
    with ArenaClient(url, read_token(token_file)) as arena:
        for name in names:
            arena.request("POST", f"/v1/robots/{quote(name, safe='')}/{action}")
    word = "Stopped" if action == "stop" else "Let go on"
    return Report(text=f"{word}: {', '.join(names)}", data={"action": action, "robots": list(names)})


def _show(word: str) -> Callable[[int, int], None]:
    """Progress on stderr, twenty lines at most."""
    said = 0

    def progress(done: int, total: int) -> None:
        nonlocal said
        if 20 * done // max(total, 1) > said:
            said = 20 * done // total
            print(f"{word} {done} of {total} files", file=sys.stderr, flush=True)

    return progress
