"""The store is checked against the database, copied while the arena runs, and made anew from the copy."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena_world import BENCHMARK, DONE, lease, play, submit
from sqlalchemy import func, inspect, select, text

from offbook.arena import accounts, backup, submissions, trials, verify
from offbook.arena.backup import FENCE_STEP, back_up, restore
from offbook.arena.database import Database
from offbook.arena.service import Settings
from offbook.arena.tables import Attempt, Blob, Result, Submission, Token, Trial, User
from offbook.arena.verify import verify_store
from offbook.errors import ConfigError, DataError, ResourceError
from offbook.rating import outputs, studies, voting
from offbook.rating.outputs import Content, OutputRecord
from offbook.rating.tables import SCHEMA, Rater
from offbook.service import storage
from offbook.service.refusal import RefusedError
from offbook.service.storage import BlobStore

pytestmark = [pytest.mark.service, pytest.mark.faults]

FILM = b"film" * 1000


def keep(database: Database, store: BlobStore, content: bytes, *, private: bool = False) -> str:
    """A blob with its row."""
    sha256 = store.put(content)
    with database.write() as session:
        user = accounts.find_user(session, "ada", create=True)
        row = {"sha256": sha256, "size": len(content), "media_type": "video/mp4", "private": private}
        session.add(Blob(**row, user_id=user.id, created=1.5))
    return sha256


def rated(database: Database, store: BlobStore) -> None:
    """A study of two films and a vote on them."""
    films = {name: store.put(f"clean film of {name}".encode()) for name in ("one", "two")}
    shown = [
        (
            OutputRecord(item="scene 0", system=name, file="film.mp4"),
            Content(sha256=sha256, media_type="video/mp4", size=17, source="0" * 64, features={"seconds": 1.5}),
        )
        for name, sha256 in films.items()
    ]
    with database.write() as session:
        study = studies.create(session, "root", studies.design(name="runs", question="Which?", modality="rollout"))
        outputs.add(session, study, shown)
        studies.open_study(session, study)
        studies.invite(session, study, 1, "script")
        rater = session.scalars(select(Rater)).one()
        given = voting.next_pair(session, rater)
        answer = voting.Answer(nonce=given["nonce"], choice="left", watched=1.0)
        voting.vote(session, rater, given["assignment"], answer)


def populated(settings: Settings) -> tuple[Database, BlobStore]:
    """An arena with a result that has a film, a checkpoint, a trial that runs, trials that wait, and a study."""
    database, store = Database(settings.database_url), BlobStore(settings.blobs_url)
    database.migrate()
    film = keep(database, store, FILM)
    checkpoint = keep(database, store, (2).to_bytes(8, "little") + b"{}", private=True)
    report = trials.Report(
        outcome="done", score=0.1 + 0.2, success=True, steps=3, files=({"name": "a.mp4", "sha256": film},)
    )
    with database.write() as session:
        submissions.define_benchmark(session, BENCHMARK)
        submit(session, kind="anchor", anchor="expert", trials=3)
        submit(session, "bob", kind="checkpoint", blob=checkpoint, trials=2)
        accounts.issue_token(session, accounts.find_user(session, "ada"), ["submit"])
        play(session, lease(session), report)
        play(session, lease(session), DONE)
        given = lease(session)
        trials.start(session, given["trial"], given["fence"])
    rated(database, store)
    return database, store


def rows_of(database: Database) -> dict[str, list[tuple]]:
    with database.read() as session:
        return {
            table.name: [tuple(row) for row in session.execute(select(table).order_by(*table.primary_key.columns))]
            for schema in Database.schemas
            for table in schema.metadata.sorted_tables
        }


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[tuple[Settings, Database, BlobStore]]:
    settings = Settings(folder=tmp_path / "arena", seed=77)
    settings.save()
    database, store = populated(settings)
    yield settings, database, store
    database.close()


def test_a_sound_store_is_said_to_be_sound_and_every_trouble_is_told_apart(arena, cli) -> None:
    settings, database, store = arena
    folder = str(settings.folder)
    found = verify_store(database, store)
    assert (found.sound, found.rows, found.files) == (True, 4, 4)
    assert cli(["arena", "verify-store", folder]).exit_code == 0

    forgotten = store.put(b"an upload whose server died")
    damaged = keep(database, store, b"x" * 500)
    short = keep(database, store, b"y" * 500)
    gone = keep(database, store, b"z" * 500)
    Path(store.path(damaged)).write_bytes(b"X" * 500)
    Path(store.path(short)).write_bytes(b"y" * 499)
    Path(store.path(gone)).unlink()
    with database.write() as session:
        result = session.scalars(select(Result).limit(1)).one()
        result.files = [*result.files, {"name": "b.mp4", "sha256": "f" * 64}]
    found = verify_store(database, store)
    assert (found.missing, found.dangling, found.unreferenced) == ([gone], ["f" * 64], [forgotten])
    assert found.damaged == sorted([damaged, short])
    assert verify_store(database, store, content=False).damaged == [short]
    told = cli(["arena", "verify-store", folder, "--json"])
    assert (told.exit_code, json.loads(told.stdout)["missing"]) == (1, [gone])
    # Sending the same file again heals it.
    assert store.put(b"x" * 500) == damaged
    assert verify_store(database, store).damaged == [short]


def test_what_comes_while_the_store_is_verified_is_no_trouble(make_database, tmp_path: Path, monkeypatch) -> None:
    database, store = make_database(), BlobStore(str(tmp_path / "store"))
    with database.write() as session:
        submissions.define_benchmark(session, BENCHMARK)
    kept_files = verify.kept_files

    def meanwhile(session):
        rows = kept_files(session)
        checkpoint = keep(database, store, b"a checkpoint", private=True)
        with database.write() as other:
            submit(other, kind="checkpoint", blob=checkpoint, trials=1)
        return rows

    monkeypatch.setattr(verify, "kept_files", meanwhile)
    assert verify_store(database, store).dangling == []


def failing(monkeypatch, sha256: str, error: OSError, *methods: str) -> None:
    """From now on what happens to this blob ends in this error: `read` after its first bytes, `size` at once."""
    real, span = BlobStore.size, storage._span

    def size(self, name: str) -> int:
        with storage._reading(name):
            if name == sha256 and "size" in methods:
                raise error
            return real(self, name)

    class Broken:
        def __init__(self, file) -> None:
            self.file = file

        def read(self, count: int) -> bytes:
            raise error

        seek = close = __enter__ = lambda self, *args: self
        __exit__ = lambda self, *args: self.file.close()  # noqa: E731

    def broken_span(file, start: int, stop: int, name: str):
        return span(Broken(file) if name == sha256 and "read" in methods else file, start, stop, name)

    monkeypatch.setattr(BlobStore, "size", size)
    monkeypatch.setattr(storage, "_span", broken_span)


def test_a_file_that_cannot_be_read_is_not_said_to_be_damaged(arena, monkeypatch, cli) -> None:
    settings, database, store = arena
    unreadable = store.put(FILM)
    with monkeypatch.context() as patch:
        failing(patch, unreadable, OSError(errno.EIO, "Input/output error"), "read")
        found = verify_store(database, store)
        assert (found.unreadable, found.damaged, found.missing, found.sound) == ([unreadable], [], [], False)
        told = cli(["arena", "verify-store", str(settings.folder)])
        assert (told.exit_code, "unreadable: 1" in told.stdout, "damaged: none" in told.stdout) == (1, True, True)
    # A store that is away as a whole has no files to tell of.
    with monkeypatch.context() as patch:
        failing(patch, unreadable, OSError(errno.EHOSTUNREACH, "No route to host"), "read", "size")
        with pytest.raises(RefusedError, match="expected an answer, got No route to host"):
            verify_store(database, store)


@pytest.mark.parametrize("verb", ["verify-store", "backup"])
def test_a_database_that_is_missing_away_or_of_another_version_is_told(tmp_path: Path, cli, empty, verb) -> None:
    folder, copy = tmp_path / "arena", tmp_path / "copy"
    words = ["arena", verb, *([str(copy)] if verb == "backup" else []), str(folder)]

    def names() -> set[str]:
        return {path.name for path in folder.iterdir()} - {"arena.db-wal", "arena.db-shm"}

    def refused(named: str, fix: str, database: str = "") -> None:
        Settings(folder=folder, database=database).save()
        before = names()
        told = cli(words)
        assert (told.exit_code, told.stdout, told.stderr.count("\n")) == (2, "", 1), told.stderr
        assert named in told.stderr
        assert fix in told.stderr
        assert names() == before
        assert not copy.exists()

    refused("arena.db: expected a database, got no such file", "restore the file from a copy")
    refused(
        "expected a database that answers, got", "that the server runs", "postgresql+psycopg://ada@127.0.0.1:9/arena"
    )
    (folder / "arena.db").write_text("a thesis, by mistake " * 100)
    refused("got file is not a database", "check the address")
    (folder / "arena.db").write_bytes(b"")
    refused("expected the schema of this offbook, ", "start its service once")
    database = Database(Settings(folder=folder).database_url)
    database.migrate({"alembic_version": "0001"})
    refused("got 0001 in alembic_version", "start its service once, which brings it up to date")
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    refused("got 9999 in alembic_version", "install a newer offbook")
    database.close()
    refused("got none in alembic_version", "start its service once", empty("postgresql"))


def test_a_store_in_memory_is_verified_too(arena, tmp_path: Path) -> None:
    _, database, store = arena
    remote = BlobStore(f"memory://{tmp_path.name}")
    for sha256, _ in store.stored():
        remote.put(b"".join(store.read(sha256)))
    assert verify_store(database, remote).sound
    assert [size for _, size in remote.stored()] == [size for _, size in store.stored()]


@pytest.mark.parametrize(("source", "target"), [("sqlite", "postgresql"), ("postgresql", "sqlite")])
def test_a_copy_taken_while_the_arena_runs_makes_the_same_arena_on_the_other_database(
    tmp_path: Path, empty, source: str, target: str
) -> None:
    settings = Settings(folder=tmp_path / "arena", database=empty(source), seed=77, fault_cap=5)
    settings.save()
    database, store = populated(settings)
    before = rows_of(database)
    stop, written = threading.Event(), []

    def go_on() -> None:
        while not stop.is_set():
            film = keep(database, store, f"film {len(written)}".encode())
            with database.write() as session:
                submit(session, "eve", kind="anchor", anchor="expert", trials=1)
                report = trials.Report(outcome="done", score=1.0, files=({"name": "a.mp4", "sha256": film},))
                play(session, lease(session, "arm-9"), report)
            written.append(film)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        while len(written) < 3:
            stop.wait(0.01)
        manifest = back_up(settings, tmp_path / "copy")
    finally:
        stop.set()
        thread.join()
    made, _ = restore(tmp_path / "copy", Settings(folder=tmp_path / "new", database=empty(target)))
    assert (made.seed, made.fault_cap, Settings.load(tmp_path / "new").seed) == (77, 5, 77)
    again, blobs = Database(made.database_url), BlobStore(made.blobs_url)
    verified = verify_store(again, blobs)
    # Of what came meanwhile, each result is there with its film or not at all.
    assert verified.sound
    assert verified.unreferenced == []
    after = rows_of(again)
    assert len(after["results"]) == manifest["tables"]["results"]["rows"] >= len(before["results"])
    assert len(after["votes"]) == 1
    for name in ("users", "tokens", "benchmarks", "splits", "results", "blobs", *SCHEMA.metadata.tables):
        former = {row[0]: row for row in before[name]}
        assert {row[0]: row for row in after[name] if row[0] in former} == former, name
    with again.write() as session:
        # One moment: a result and the figures that it renewed were written together.
        counted = select(func.count(Result.id)).where(Result.submission_id == Submission.id).scalar_subquery()
        assert session.scalars(select(Submission.id).where(Submission.n != counted)).all() == []
        # The databases' own counters go on behind the rows.
        submit(session, "new", kind="anchor", anchor="expert")
        assert session.scalar(select(func.count(User.id))) == len(after["users"]) + 1
    for each in (database, again):
        each.close()


def test_a_lease_from_before_or_after_the_copy_is_refused_by_the_restored_arena(arena, tmp_path: Path) -> None:
    settings, database, _ = arena
    with database.read() as session:
        running = session.scalars(select(Trial).where(Trial.state == "running")).one()
        before = (running.id, running.fence)
    back_up(settings, tmp_path / "copy")
    with database.write() as session:
        trials.end(session, *before, trials.Report(outcome="robot_fault", reason="cable"))
        later = lease(session)
        trials.start(session, later["trial"], later["fence"])
    made, _ = restore(tmp_path / "copy", Settings(folder=tmp_path / "new"))
    again = Database(made.database_url)
    with again.write() as session:
        attempt = session.scalars(select(Attempt).where(Attempt.trial_id == before[0])).one()
        assert (attempt.outcome, attempt.reason) == ("robot_fault", "the arena was restored from a copy")
        for lost in (before, (later["trial"], later["fence"])):
            with pytest.raises(RefusedError, match="stop the robot"):
                trials.end(session, *lost, DONE)
        leases = {given["trial"]: given for given in (lease(session, "arm-1"), lease(session, "arm-2"))}
        given = leases[before[0]]
        assert given["fence"] == before[1] + FENCE_STEP + 1
        with pytest.raises(RefusedError):
            trials.end(session, later["trial"], later["fence"], DONE)
        assert play(session, given)["state"] == "done"
        assert session.scalar(select(func.count(Token.id))) == 1
    again.close()


def test_a_second_copy_into_the_same_folder_brings_only_what_is_new(arena, tmp_path: Path, monkeypatch) -> None:
    settings, database, store = arena
    back_up(settings, tmp_path / "copy")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy" / "blobs").rglob("*") if path.is_file()}
    keep(database, store, b"new")
    manifest = back_up(settings, tmp_path / "copy")
    assert manifest["blobs"] == len(kept) + 1
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((tmp_path / "copy").glob("tables-*"))) == 1
    assert (tmp_path / "copy").stat().st_mode & 0o077 == 0
    assert "arena.db" not in (tmp_path / "copy" / "arena.json").read_text()


def test_what_cannot_be_copied_or_restored_is_said_in_one_sentence(arena, tmp_path: Path, cli) -> None:
    settings, _, _ = arena
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("precious")
    with pytest.raises(ConfigError, match="an earlier copy"):
        back_up(settings, tmp_path / "mine")
    back_up(settings, tmp_path / "copy")
    with pytest.raises(ConfigError, match="new or empty"):
        restore(tmp_path / "copy", Settings(folder=settings.folder))
    with pytest.raises(ConfigError, match="finished copy"):
        restore(tmp_path / "mine", Settings(folder=tmp_path / "new"))
    with pytest.raises(ConfigError, match="an empty database"):
        restore(tmp_path / "copy", Settings(folder=tmp_path / "new", database=settings.database_url))
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    table = next((tmp_path / "copy").glob("tables-*/trials.jsonl"))
    table.write_bytes(table.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"trials\.jsonl"):
        restore(tmp_path / "copy", Settings(folder=tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    for content, named in ((b"{", "expected a JSON object"), (b'{"format": 1}', "expected the entry 'folder'")):
        (tmp_path / "copy" / "manifest.json").write_bytes(content)
        outcome = cli(["arena", "restore", str(tmp_path / "copy"), str(tmp_path / "new")])
        assert (outcome.exit_code, named in outcome.stderr) == (1, True), outcome.stderr
    (tmp_path / "copy" / "manifest.json").unlink()
    outcome = cli(["arena", "restore", str(tmp_path / "copy"), str(tmp_path / "new")])
    assert (outcome.exit_code, "unfinished copy" in outcome.stderr) == (2, True), outcome.stderr


def test_what_the_arena_has_lost_is_told_and_everything_else_is_copied(arena, tmp_path: Path, cli) -> None:
    settings, _, store = arena
    hashes = [sha256 for sha256, _ in store.stored()]
    damaged, gone = hashes[:2]
    Path(store.path(damaged)).write_bytes(b"X" * store.size(damaged))
    Path(store.path(gone)).unlink()
    made = cli(["arena", "backup", str(tmp_path / "copy"), str(settings.folder)])
    assert made.exit_code == 1
    assert "Missing or damaged in the arena itself, and so in the copy: 2" in made.stdout
    assert json.loads((tmp_path / "copy" / "manifest.json").read_text())["lost"] == [damaged, gone]
    again = cli(["arena", "restore", str(tmp_path / "copy"), str(tmp_path / "new"), "--json"])
    assert (again.exit_code, json.loads(again.stdout)["missing"]) == (1, [damaged, gone])
    assert [sha256 for sha256, _ in BlobStore(str(tmp_path / "new")).stored()] == hashes[2:]


def test_each_side_that_fails_is_named_and_what_was_done_is_gone_on_with(arena, tmp_path: Path, monkeypatch) -> None:
    settings, database, store = arena
    copy, new = tmp_path / "copy", Settings(folder=tmp_path / "new")
    hashes = [sha256 for sha256, _ in store.stored()]
    broken = OSError(errno.EIO, "Input/output error")

    def full(self, *args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # The arena's disk, and then that of the copy; both leave a copy that is none, and go on.
    for patched, kind, named in (
        (lambda patch: failing(patch, hashes[-1], broken, "read"), DataError, rf"^arena, file {hashes[-1]}: .*Input"),
        (lambda patch: patch.setattr(BlobStore, "finish", full), ResourceError, rf"^copy in {copy}: .*No space left"),
        (lambda patch: patch.setattr(Path, "open", full), ResourceError, rf"^copy in {copy}: .*No space left"),
    ):
        with monkeypatch.context() as patch:
            patched(patch)
            with pytest.raises(kind, match=named):
                back_up(settings, copy)
        assert {path.name for path in copy.iterdir()} == {"blobs", "tmp"}
        with pytest.raises(ConfigError, match="unfinished copy"):
            restore(copy, new)
    manifest = back_up(settings, copy)
    assert (manifest["blobs"], manifest["lost"]) == (len(hashes), [])
    # One that fails leaves the earlier copy whole.
    with monkeypatch.context() as patch:
        failing(patch, keep(database, store, b"new"), broken, "read")
        with pytest.raises(DataError, match=r"^arena, file"):
            back_up(settings, copy)
    assert json.loads((copy / "manifest.json").read_text()) == manifest

    with monkeypatch.context() as patch:
        failing(patch, hashes[-1], broken, "read")
        with pytest.raises(DataError, match=rf"^copy in {copy}, file {hashes[-1]}: .*Input"):
            restore(copy, new)
    assert {path.name for path in new.folder.iterdir()} == {"blobs", "tmp"}
    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "finish", full)
        patch.setattr(BlobStore, "holds", lambda self, sha256: False)
        with pytest.raises(ResourceError, match=r"^new arena: .*No space left"):
            restore(copy, new)
    with monkeypatch.context() as patch:
        patch.setattr(Settings, "save", full)
        with pytest.raises(ResourceError, match=r"^new arena in .*No space left"):
            restore(copy, Settings(folder=tmp_path / "full"))
    with monkeypatch.context() as patch:
        patch.setattr(backup, "_end_leases", lambda session: session.execute(text("SELECT absent")))
        with pytest.raises(ConfigError, match="expected a database that takes the rows, got no such column: absent"):
            restore(copy, new)
    made, _ = restore(copy, new)
    again = Database(made.database_url)
    assert verify_store(again, BlobStore(made.blobs_url)).sound
    again.close()
    # A copy that was damaged since is the copy's fault.
    Path(BlobStore(str(copy)).path(hashes[0])).unlink()
    with pytest.raises(DataError, match=rf"^copy in {copy}: expected 4 whole files, got 1 missing or damaged"):
        restore(copy, Settings(folder=tmp_path / "third"))


def test_a_copy_of_an_earlier_version_becomes_an_arena_of_this_one(arena, tmp_path: Path, empty_database) -> None:
    settings, database, _ = arena
    manifest = back_up(settings, tmp_path / "copy")
    assert "pictures" not in manifest["tables"]
    manifest["revisions"]["alembic_version"] = "0003"  # which had all the tables that are copied, and no other
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    made, _ = restore(tmp_path / "copy", Settings(folder=tmp_path / "new", database=empty_database()))
    again = Database(made.database_url)
    assert verify_store(again, BlobStore(made.blobs_url)).sound
    assert rows_of(again)["results"] == rows_of(database)["results"]
    again.close()


def test_backup_and_restore_from_the_command_line(arena, tmp_path: Path, cli) -> None:
    settings, database, _ = arena
    made = cli(["arena", "backup", str(tmp_path / "copy"), str(settings.folder)])
    assert made.exit_code == 0, made.stderr
    again = cli(["arena", "restore", str(tmp_path / "copy"), str(tmp_path / "new"), "--json"])
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["sound"] is True
    restored = Database(Settings.load(tmp_path / "new").database_url)
    with restored.read() as session, database.read() as former:
        count = select(func.count(Submission.id))
        assert session.scalar(count) == former.scalar(count) == 2
        assert inspect(restored.engine).get_table_names() == inspect(database.engine).get_table_names()
    restored.close()
