"""What the arena does not show, does not open and does not die of."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select
from test_routes import lease, put, report, submit

from offbook.arena.tables import User
from offbook.errors import CheckpointError

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
     b'{"traces": {"time": [0, 1e999], "reward": [[], 2], "late": 1}}'],
    ids=["deep", "large", "list", "no text", "wrong types", "wrong parts", "endless"],
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
    streams = [feed.listen() for _ in range(600)]
    assert not feed._listeners
    asyncio.run(anext(streams[0]))
    assert len(feed._listeners) == 1
