"""Two servers on one PostgreSQL, and an arena whose workers live on other machines."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from uuid import uuid4

import httpx
import numpy as np
import pytest
from arena_server import META, Walker, until
from arena_world import BENCHMARK, Client, VirtualClock, lease, open_arena, submit
from server_processes import found_arena
from sqlalchemy import func, select

from offbook.arena import accounts, submissions
from offbook.arena.app import create_app
from offbook.arena.database import Database
from offbook.arena.pictures import FRESH_SECONDS, LOOKED_SECONDS
from offbook.arena.seats import VALID_SECONDS, SeatBook
from offbook.arena.service import Settings
from offbook.arena.serving import served_apart
from offbook.arena.tables import Attempt, Picture, Result, Submission, Trial
from offbook.arena.verify import verify_store
from offbook.arena.worker import run_worker
from offbook.client.protocol import FunctionPolicy
from offbook.client.serve import serve_policy
from offbook.client.submit import ArenaClient
from offbook.errors import SubmissionError
from offbook.service.storage import BlobStore

pytestmark = [pytest.mark.service, pytest.mark.faults]


@pytest.fixture
def postgres(execute, postgres_address: str) -> str:
    name = f"shared_{uuid4().hex}"
    execute(f"CREATE DATABASE {name}")
    yield postgres_address.format(name=name)
    execute(f"DROP DATABASE {name} WITH (FORCE)")


def history_of(database: Database) -> list[Attempt]:
    with database.read() as session:
        return list(session.scalars(select(Attempt).order_by(Attempt.leased)))


def check_history(database: Database, wanted: int) -> None:
    """No trial twice, no two attempts at once at one trial or on one robot."""
    with database.read() as session:
        assert session.scalar(select(func.count(Result.id))) == wanted
        assert session.scalar(select(func.count(Result.trial_id.distinct()))) == wanted
        assert set(session.scalars(select(Trial.state))) == {"done"}
    attempts = history_of(database)
    assert [(a.outcome, a.reason) for a in attempts if a.outcome != "done"] == []
    for key in (attrgetter("trial_id"), attrgetter("robot_id")):
        for _, of in itertools.groupby(sorted(attempts, key=key), key):
            assert all(former.ended <= latter.leased for former, latter in itertools.pairwise(of))


def test_two_servers_on_one_database_never_give_a_trial_twice_and_relay_for_one_another(
    tmp_path: Path, postgres: str
) -> None:
    settings, database, tokens = found_arena(tmp_path / "a", database=postgres, watchdog_seconds=14.0)
    (tmp_path / "b").mkdir()
    shared = settings.folder.resolve()
    replace(settings, folder=tmp_path / "b", blobs=str(shared)).save()
    stop, reports, policies = threading.Event(), [], []
    with (
        served_apart(tmp_path / "a", "--advertise", "here") as (first, _),
        served_apart(tmp_path / "b", "--advertise", "here") as (second, _),
    ):
        with ArenaClient(first, tokens["root"]) as client:
            for i in range(4):
                body = {"benchmark": "reach", "name": f"random {i}", "kind": "anchor", "anchor": "random"}
                client.request("POST", "/v1/submissions", json=body)
        entries = []
        for url, user in ((first, "ada"), (second, "bob")):
            with ArenaClient(url, tokens[user]) as client:
                entries.append(client.submit("reach", f"{user}'s", trials=4)["id"])
            policy = FunctionPolicy(META, lambda state, images: np.ones(1, np.float32))
            options = {"stop": stop, "on_event": lambda line: None}
            policies.append(
                threading.Thread(target=serve_policy, args=(policy, url, tokens[user], entries[-1]), kwargs=options)
            )
            policies[-1].start()
        # Each server hears who sits at the other one.
        for url in (first, second):
            with ArenaClient(url) as client:
                until(lambda client=client: all(client.status(entry)["connected"] for entry in entries), 60)

        def work(url: str, name: str) -> None:
            reports.append(run_worker(url, tokens["lab"], "arm", robot=Walker(3), name=name, idle_exit=20.0, stop=stop))

        # All workers but one ask the first server, so that what sits at the second is reached from there.
        urls = [first, first, first, second]
        workers = [threading.Thread(target=work, args=(url, f"arm-{i}")) for i, url in enumerate(urls)]
        for thread in workers:
            thread.start()
        try:
            done = select(func.count(Submission.id)).where(Submission.state == "done")

            def finished() -> bool:
                with database.read() as session:
                    return session.scalar(done) == 6

            until(finished, 120)
        finally:
            stop.set()
            for thread in (*workers, *policies):
                thread.join(60)
        pages = [httpx.get(f"{url}/benchmarks/reach", trust_env=False) for url in (first, second)]
        assert [page.status_code for page in pages] == [200, 200]
    assert sum(report.trials.get("done", 0) for report in reports) == 24
    check_history(database, 24)
    assert verify_store(database, BlobStore(str(shared))).sound
    database.close()


def test_a_policy_that_dials_in_at_another_server_leaves_the_first(make_database) -> None:
    database = make_database()
    with database.write() as session:
        submissions.define_benchmark(session, BENCHMARK)
        entries = [submit(session).id for _ in range(3)]
    first, second = SeatBook(database, "http://one"), SeatBook(database, "")
    for entry in entries:
        first.take(entry)
    assert first.renew(entries) == (set(), {})
    assert second.renew([]) == (set(), dict.fromkeys(entries, "http://one"))
    second.take(entries[0])
    second.take(entries[0])
    with database.read() as session:
        assert (first.moved(session, entries), second.moved(session, entries[:1])) == ({entries[0]}, set())
    assert first.renew(entries) == ({entries[0]}, {entries[0]: ""})
    # It went: what the first one still says of it changes nothing.
    first.leave(entries[0])
    first.leave(entries[1])
    assert first.renew([entries[2]]) == (set(), {entries[0]: ""})
    assert second.renew([entries[0]]) == (set(), {entries[2]: "http://one"})


def test_the_seats_of_a_server_that_died_are_soon_forgotten(make_database) -> None:
    clock = VirtualClock()
    database = make_database(clock)
    with database.write() as session:
        submissions.define_benchmark(session, BENCHMARK)
        entry = submit(session).id
    SeatBook(database, "http://dead").take(entry)
    other = SeatBook(database)
    assert other.renew([])[1] == {entry: "http://dead"}
    clock.seconds += VALID_SECONDS + 1
    assert other.renew([])[1] == {}


def test_what_a_robot_sees_is_shown_by_every_server_while_somebody_looks(make_database, tmp_path: Path) -> None:
    clock = VirtualClock()
    database = make_database(clock)
    with open_arena(database, tmp_path) as here:
        there = Client(create_app(Settings(folder=tmp_path), database))
        with database.write() as session:
            submit(session, kind="anchor", anchor="expert")
            given = lease(session)
        trial = f"/v1/trials/{given['trial']}"

        def watched() -> bool:
            answer = here.ask("POST", f"{trial}/heartbeat", "lab", json={"fence": given["fence"]})
            return answer.json()["watched"]

        def send(picture: bytes) -> None:
            sent = here.ask("POST", f"{trial}/frame?fence={given['fence']}", "lab", content=b"\xff\xd8\xff" + picture)
            assert sent.status_code == 204, sent.text

        def seen() -> bytes:
            return there.get("/v1/robots/arm-1/frame").content[3:]

        send(b"nobody looks")
        assert (watched(), seen()) == (False, b"")
        assert watched()
        send(b"first")
        send(b"too soon")
        assert seen() == b"first"
        clock.seconds += 1
        send(b"second")
        assert seen() == b"second"
        with database.read() as session:
            assert session.scalars(select(Picture.jpeg)).all() == [b"\xff\xd8\xffsecond"]
        # Who goes on looking is noted again; what is old is shown to nobody.
        clock.seconds += FRESH_SECONDS + 1
        assert (seen(), watched()) == (b"", True)
        clock.seconds += LOOKED_SECONDS - 1
        assert watched()
        clock.seconds += 2
        assert not watched()
        send(b"nobody looks any more")
        assert seen() == b""
        assert there.get("/v1/robots/nobody/frame").status_code == 404


def test_several_servers_may_migrate_at_once(postgres: str) -> None:
    failures: list[BaseException] = []

    def migrate() -> None:
        database = Database(postgres)
        try:
            database.migrate()
        except BaseException as error:
            failures.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def test_no_token_reaches_a_log_a_page_or_an_answer(tmp_path: Path) -> None:
    _, database, tokens = found_arena(tmp_path / "arena", watchdog_seconds=14.0)
    # One that is nobody's, one that ran out, and one that will be revoked while its policy is here.
    with database.write() as session:
        owner = accounts.find_user(session, "ada", create=False)
        tokens["old"] = accounts.issue_token(session, owner, ["submit"], days=1e-9)
    tokens["nobody"] = f"ob_{'0' * 8}_{'s' * 43}"
    stop, said = threading.Event(), []
    with served_apart(tmp_path / "arena") as (url, _):
        with ArenaClient(url, tokens["ada"]) as client:
            entry = client.submit("reach", "ada's", trials=2)["id"]
        policy = FunctionPolicy(META, lambda state, images: np.ones(1, np.float32))
        options = {"stop": stop, "on_event": said.append}

        def serve() -> None:
            with pytest.raises(SubmissionError, match=r"no longer valid|HTTP status 401"):
                serve_policy(policy, url, tokens["ada"], entry, **options)

        dialled = threading.Thread(target=serve)
        dialled.start()
        run_worker(
            url, tokens["lab"], "arm", robot=Walker(3), name="arm", max_trials=1, idle_exit=20.0, on_event=said.append
        )
        with pytest.raises(SubmissionError, match="HTTP status 401"):
            serve_policy(policy, url, tokens["old"], entry, on_event=said.append)
        told = []
        with httpx.Client(base_url=url, trust_env=False) as visitor:
            addresses = ["/", "/queue", "/submit", "/robots/arm", "/benchmarks/reach", f"/submissions/{entry}"]
            addresses += ["/runs/1", "/metrics", "/v1/benchmarks", "/v1/submissions", f"/v1/submissions/{entry}"]
            for address in (*addresses, "/v1/tokens", "/v1/nothing", "/openapi.json"):
                for name, token in tokens.items():
                    # The right way, and the wrong one: in the address.
                    told.append(visitor.get(address, headers={"Authorization": f"Bearer {token}"}))
                    told.append(visitor.get(address, params={"token": token, "name": name}))
            prefix = tokens["ada"].split("_")[1]
            answer = visitor.delete(f"/v1/tokens/{prefix}", headers={"Authorization": f"Bearer {tokens['root']}"})
            assert answer.status_code == 200
        dialled.join(30)
        stop.set()
        assert not dialled.is_alive()
    assert {answer.status_code for answer in told} >= {200, 401, 404}
    read = [f"{answer.headers}{answer.text}" for answer in told]
    read += [*said, (tmp_path / "arena" / "server.log").read_text()]
    for name, token in tokens.items():
        secret = token.split("_", 2)[2]
        assert [text for text in read if secret in text] == [], name
