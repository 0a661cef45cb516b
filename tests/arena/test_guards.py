"""What the arena does not show, does not open and does not die of."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from sqlalchemy import select
from test_routes import lease, open_arena, put, report, submit

from offbook.arena import service
from offbook.arena.service import StorageWatch
from offbook.arena.tables import User
from offbook.errors import CheckpointError
from offbook.service.refusal import RefusedError

pytestmark = pytest.mark.service


def test_scenes_and_seeds_are_shown_when_they_were_played_and_not_before(client) -> None:
    entry = submit(client, "admin", kind="anchor", anchor="expert", trials=2)
    given = lease(client)
    report(client, given, "start")
    report(client, given, "result", score=1.0, steps=1)
    client.ask("POST", f"/v1/submissions/{entry['id']}/cancel", "admin")
    shown = client.ask("GET", f"/v1/submissions/{entry['id']}").json()["trials"]
    assert {t["state"]: (t["scene"], t["seed"]) for t in shown} == {
        "done": (given["scene"], given["seed"]), "cancelled": (None, None),
    }  # fmt: skip
    for trial in shown:
        page = client.ask("GET", f"/runs/{trial['id']}").text
        assert ("until the trial has been played" in page) == (trial["state"] == "cancelled")
    assert client.ask("GET", f"/submissions/{entry['id']}").status_code == 200


@pytest.mark.parametrize(
    "manifest",
    [b"[" * 200_000, b"{}" + b" " * 5 * 2**20, b"[]", b"\xff", b'{"traces": [1], "events": 3, "rate_hz": []}',
     b'{"traces": {"time": [0, "x"], "reward": [1, 2]}, "events": [4, {"time": {}, "kind": []}]}',
     b'{"traces": {"time": [0, 1e999], "reward": [[], 2], "late": 1}}',
     b'{"events": [{"time": 5e11, "kind": "a", "text": "b"}, {"time": -1e11}]}'],
    ids=["deep", "large", "list", "no text", "wrong types", "wrong parts", "endless", "no year"],
)  # fmt: skip
def test_a_hostile_manifest_costs_only_its_own_part_of_the_page(client, manifest: bytes) -> None:
    submit(client, "admin", kind="anchor", anchor="expert", trials=1)
    given = lease(client)
    report(client, given, "start")
    sha256 = put(client, "lab", manifest, "application/json").json()["sha256"]
    file = {"name": "manifest.json", "sha256": sha256, "media_type": "application/json", "size": 1}
    assert report(client, given, "result", score=0.25, steps=1, files=[file]).status_code == 200
    page = client.ask("GET", f"/runs/{given['trial']}")
    assert (page.status_code, "0.25" in page.text) == (200, True)


def test_a_checkpoint_is_opened_only_within_the_quota_and_one_at_a_time(client, monkeypatch) -> None:
    blob = put(client, "ada", (2).to_bytes(8, "little") + b"{}").json()["sha256"]
    opened, now, most = [], [], []

    def load(path, max_bytes):
        opened.append(path)
        now.append(path)
        most.append(len(now))
        time.sleep(0.05)
        now.pop()
        raise CheckpointError("x", expected="a", got="b", fix="c")

    monkeypatch.setattr("offbook.learning.policies.load_policy", load)
    body = {"benchmark": "reach", "name": "mine", "kind": "checkpoint", "blob": blob}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.ask("POST", "/v1/submissions", "ada", json=body), range(4)))
        assert {answer.json()["error"] for answer in answers} == {"bad_checkpoint"}
        assert (len(opened), max(most)) == (4, 1)
        with client.app.state.arena.database.write() as session:
            session.scalars(select(User).where(User.name == "ada")).one().daily_trials = 3
        assert client.ask("POST", "/v1/submissions", "ada", json=body).json()["error"] == "quota"
        assert len(opened) == 4


def test_the_clock_survives_whatever_fails(client, monkeypatch, caplog) -> None:
    done = threading.Event()
    monkeypatch.setattr("offbook.arena.app.TICK_SECONDS", 0.01)
    monkeypatch.setattr("offbook.arena.trials.reap", lambda session, rules: 1 / 0)

    async def poll() -> None:
        done.set()
        raise KeyError("gone")

    monkeypatch.setattr(client.app.state.feed, "poll", poll)
    assert done.wait(10)
    done.clear()
    assert done.wait(10)
    assert {type(record.exc_info[1]) for record in caplog.records if record.exc_info} == {ZeroDivisionError, KeyError}


def test_a_reader_who_leaves_before_the_stream_begins_takes_no_place(client) -> None:
    feed = client.app.state.feed
    streams = [feed.listen("here") for _ in range(600)]
    assert not feed._listeners
    asyncio.run(anext(streams[0]))
    assert len(feed._listeners) == 1


def test_one_address_takes_only_so_many_places_of_live_events(client) -> None:
    feed = client.app.state.feed

    async def listen() -> None:
        held = [feed.listen("here") for _ in range(50)]
        for stream in held:
            await anext(stream)
        with pytest.raises(RefusedError, match="at most 500 listeners, and 50 at one address"):
            feed.listen("here")
        await anext(feed.listen("elsewhere"))
        await held[0].aclose()
        await anext(feed.listen("here"))

    asyncio.run(listen())


def test_what_is_sent_as_a_method_or_a_page_grows_nothing_and_breaks_nothing(client) -> None:
    for number in range(30):
        assert client.ask(f"ODD{number}", "/nothing").status_code in (404, 405)
    told = client.ask("GET", "/metrics").text
    assert 'method="other"' in told
    assert "ODD" not in told
    entry = submit(client)["id"]
    for page in ("9" * 5_000, "-1", "x", "\u0663"):
        for path in ("/benchmarks/reach", f"/submissions/{entry}", "/"):
            assert client.ask("GET", path, params={"page": page, "q": page, "show": page}).status_code == 200


def test_checkpoints_that_are_on_their_way_count_and_leave_room_for_trials(make_sqlite, tmp_path, monkeypatch) -> None:
    content = (2).to_bytes(8, "little") + b"{}"
    with open_arena(make_sqlite(), tmp_path, daily_bytes=25) as client:
        incoming = client.app.state.arena.incoming
        with client.app.state.arena.database.read() as session:
            ada = session.scalars(select(User.id).where(User.name == "ada")).one()
        incoming[ada] = 16
        answer = put(client, "ada", content)
        assert (answer.status_code, answer.json()["error"]) == (429, "upload_quota")
        assert "at most 25 bytes, got 0 stored and 26 on their way" in answer.json()["detail"]
        assert incoming[ada] == 16
        incoming[ada] = 0
        assert [put(client, "ada", content + bytes([n])).status_code for n in range(3)] == [201, 201, 429]
        assert incoming[ada] == 0
    with open_arena(make_sqlite(), tmp_path / "full") as client:
        full = RefusedError(507, "storage_full", "store", expected="room", got="none", fix="wait")
        monkeypatch.setattr(StorageWatch, "check", lambda watch: (_ for _ in ()).throw(full))
        assert put(client, "ada", content).status_code == 507
        assert put(client, "lab", b"a film", "video/mp4").status_code == 201


def test_asking_and_withdrawing_has_an_end(client) -> None:
    with client.app.state.arena.database.write() as session:
        session.scalars(select(User).where(User.name == "ada")).one().daily_trials = 1
    for _ in range(10):
        entry = submit(client, trials=1)["id"]
        assert client.ask("POST", f"/v1/submissions/{entry}/cancel", "ada").json()["cancelled"] == 1
    body = {"benchmark": "reach", "name": "mine", "kind": "remote", "trials": 1}
    answer = client.ask("POST", "/v1/submissions", "ada", json=body)
    assert (answer.status_code, answer.json()["error"]) == (429, "quota")
    assert "withdrawn or not" in answer.json()["detail"]


def test_what_is_said_again_does_not_put_off_the_next_look_at_the_store(monkeypatch) -> None:
    full = RefusedError(507, "storage_full", "store", expected="room", got="none", fix="wait")
    at, room, store = [100.0], [False], SimpleNamespace()

    def look(reserve: int) -> None:
        if not room[0]:
            raise full

    store.check_room = look
    monkeypatch.setattr(service.time, "monotonic", lambda: at[0])
    watch = StorageWatch(store, 1)
    for _ in range(20):  # somebody tries again and again, while the operator makes room
        at[0] += 1
        try:
            watch.check()
        except RefusedError as error:
            watch.failed(error)
        else:
            break
        room[0] = at[0] > 105
    assert room[0]
    watch.check()


def test_an_upload_that_gives_two_lengths_counts_as_the_longest(make_sqlite, tmp_path) -> None:
    with open_arena(make_sqlite(), tmp_path, daily_bytes=25) as client:
        content = (2).to_bytes(8, "little") + b"{}"
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {"Content-Length": "1", "Transfer-Encoding": "chunked", "Content-Type": "application/octet-stream"}
        answer = client.ask("PUT", f"/v1/blobs/{sha256}", "ada", content=iter([content]), headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (429, "upload_quota")
