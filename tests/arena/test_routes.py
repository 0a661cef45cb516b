"""The arena over HTTP: who may do what, what is answered, and that every error has the one shape."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from arena_world import open_arena
from sqlalchemy import select

from offbook.arena.routes import blobs
from offbook.arena.tables import Audit, Submission, Trial
from offbook.service.refusal import RefusedError

pytestmark = pytest.mark.service

MP4 = b"\0\0\0\x18ftypmp42" + b"film" * 1000
SHAPE = {"ok", "error", "detail", "hint", "status"}


def lease(client, worker: str = "arm-1", **more) -> dict | None:
    body = {"robot": "arm", "worker": worker, "instance": "first", "capabilities": {"rate_hz": 20}} | more
    answer = client.ask("POST", "/v1/leases", "lab", json=body)
    assert answer.status_code in (200, 204), answer.text
    return answer.json() if answer.status_code == 200 else None


def report(client, given: dict, what: str, **more):
    return client.ask("POST", f"/v1/trials/{given['trial']}/{what}", "lab", json={"fence": given["fence"]} | more)


def submit(client, role: str = "ada", **more) -> dict:
    body = {"benchmark": "reach", "name": "mine", "kind": "remote"} | more
    answer = client.ask("POST", "/v1/submissions", role, json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def put(client, role: str, content: bytes, kind: str = "application/octet-stream", sha256: str | None = None):
    name = sha256 or hashlib.sha256(content).hexdigest()
    return client.ask("PUT", f"/v1/blobs/{name}", role, content=content, headers={"Content-Type": kind})


def test_a_trial_from_submission_to_leaderboard(both_clients) -> None:
    client = both_clients
    entry = submit(client, "admin", kind="anchor", anchor="expert", name="expert", trials=2)
    assert entry["state"] == "open"
    assert len(entry["commitment"]) == 64
    assert entry["opened"] is None
    film = put(client, "lab", MP4, "video/mp4").json()["sha256"]
    for n in range(2):
        given = lease(client)
        assert report(client, given, "start").json()["state"] == "running"
        assert report(client, given, "heartbeat", progress=0.5).json()["lease_seconds"] == 15
        files = [{"name": "video-front.mp4", "sha256": film, "media_type": "video/mp4", "size": len(MP4)}]
        body = {
            "score": 0.25 + n / 2,
            "success": n == 1,
            "steps": 7,
            "latency_ms": 2.0,
            "late_share": 0.0,
            "files": files,
        }
        answers = [report(client, given, "result", **body) for _ in range(2)]
        assert [a.status_code for a in answers] == [200, 200]
        assert answers[0].json() == answers[1].json()
    assert lease(client) is None
    view = client.ask("GET", f"/v1/submissions/{entry['id']}").json()
    assert (view["state"], view["state_words"], view["n"]) == ("done", "Done: 2 trials", 2)
    assert (
        hashlib.sha256(
            json.dumps([view["opened"]["order"], view["opened"]["nonce"]], separators=(",", ":")).encode()
        ).hexdigest()
        == view["commitment"]
    )
    board = client.ask("GET", "/v1/leaderboard/reach").json()
    (row,) = board["rows"]
    assert (row["name"], row["anchor"], row["rank"], row["n"]) == ("expert", "expert", None, 2)
    assert row["score"]["value"] == pytest.approx(0.5)
    assert row["success"]["value"] == 0.5
    assert board["anchors"] == [{"name": "expert", "value": pytest.approx(0.5)}]
    part = client.ask("GET", f"/v1/blobs/{film}", headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"ftyp", f"bytes 4-7/{len(MP4)}")
    assert part.headers["content-type"] == "video/mp4"
    assert client.ask("GET", f"/v1/blobs/{film}").content == MP4
    assert client.ask("GET", f"/v1/blobs/{film}", headers={"Range": "bytes=99999-"}).status_code == 416


def test_a_stale_report_names_the_current_fence(client) -> None:
    submit(client, "admin", kind="anchor", anchor="expert", trials=1)
    old = lease(client)
    assert report(client, old, "fault", kind="robot_fault", reason="cable").json()["state"] == "queued"
    new = lease(client)
    answer = report(client, old, "result", score=1.0, steps=1)
    assert (answer.status_code, answer.json()["error"], answer.json()["fence"]) == (409, "stale_fence", new["fence"])


def test_a_result_with_files_that_were_never_uploaded_is_refused_and_can_be_sent_again(client) -> None:
    submit(client, "admin", kind="anchor", anchor="expert", trials=1)
    given = lease(client)
    report(client, given, "start")
    file = {"name": "a.mp4", "sha256": hashlib.sha256(MP4).hexdigest(), "media_type": "video/mp4", "size": 1}
    assert report(client, given, "result", score=1.0, steps=1, files=[file]).json()["error"] == "missing_blob"
    put(client, "lab", MP4, "video/mp4")
    assert report(client, given, "result", score=1.0, steps=1, files=[file]).status_code == 200


ROUTES = [
    ("POST", "/v1/tokens", "admin"),
    ("POST", "/v1/submissions", "submit"),
    ("GET", "/v1/submissions", "submit"),
    ("POST", "/v1/submissions/1/cancel", "submit"),
    ("POST", "/v1/leases", "worker"),
    ("POST", "/v1/trials/1/start", "worker"),
    ("POST", "/v1/trials/1/heartbeat", "worker"),
    ("POST", "/v1/trials/1/result", "worker"),
    ("POST", "/v1/trials/1/fault", "worker"),
    ("POST", "/v1/trials/1/requeue", "admin"),
    ("POST", "/v1/trials/1/frame", "worker"),
    ("POST", "/v1/studies", "admin"),
    *(("POST", f"/api/rating/v1/studies{rest}", "admin") for rest in ("", "/1/outputs", "/1/open", "/1/close")),
    *(("POST", f"/api/rating/v1/studies/1/{rest}", "admin") for rest in ("raters", "exclusions")),
    ("PUT", f"/v1/blobs/{'0' * 64}", "worker"),
    ("POST", "/v1/pairs", "submit"),
    ("POST", "/v1/robots/1/stop", "admin"),
    ("POST", "/v1/robots/1/resume", "admin"),
]


@pytest.mark.parametrize("field", ["url", "host", "address"])
def test_a_policy_that_dials_in_cannot_name_an_address(client, field: str) -> None:
    body = {"benchmark": "reach", "name": "mine", "kind": "remote"}
    answer = client.ask("POST", "/v1/submissions", "ada", json=body | {field: "http://127.0.0.1:9"})
    assert (answer.status_code, field in answer.json()["detail"]) == (422, True)
    assert client.ask("POST", "/v1/submissions", "ada", json=body).status_code == 201


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
def test_every_protected_route_wants_a_token_with_its_scope(client, method: str, path: str, scope: str) -> None:
    answer = client.ask(method, path, json={})
    assert (answer.status_code, set(answer.json())) == (401, SHAPE)
    assert answer.headers["www-authenticate"] == "Bearer"
    answer = client.ask(method, path, "lab" if scope == "submit" else "ada", json={})
    assert answer.status_code == 403
    assert scope in answer.json()["detail"]


def test_the_table_above_misses_no_route(client) -> None:
    described = client.ask("GET", "/openapi.json").json()["paths"]
    writing = {
        (method.upper(), re.sub(r"\{(\w+)\}", lambda m: "0" * 64 if m[1] == "sha256" else "1", path))
        for path, methods in described.items()
        for method in methods
        if method != "get"
    }
    by_raters = {("POST", f"/api/rating/v1/{rest}") for rest in ("consent", "assignments/1/vote")}
    assert writing - {(method, path) for method, path, _ in ROUTES} == {("DELETE", "/v1/tokens/1"), *by_raters}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/nothing", 404),
        ("GET", "/static/nothing.css", 404),
        ("GET", "/static/../app.py", 404),
        ("DELETE", "/v1/benchmarks", 405),
        ("GET", "/v1/leaderboard/nothing", 404),
        ("GET", "/v1/leaderboard/reach?split=nothing", 404),
        ("GET", "/v1/submissions/1", 404),
        ("GET", "/v1/submissions/99999999999999999999", 404),
        ("GET", "/v1/submissions/-1", 404),
        ("GET", "/v1/submissions/%00", 400),
        ("GET", "/robots/%00", 400),
        ("GET", "/v1/leaderboard/reach?split=%00", 400),
        ("GET", "/v1/compare?a=1", 422),
        ("GET", "/v1/compare?a=x&b=1", 404),
        ("GET", "/v1/blobs/abc", 422),
        ("GET", f"/v1/blobs/{'0' * 64}", 404),
        ("GET", "/runs/1", 404),
        ("GET", "/robots/none", 404),
        ("GET", "/benchmarks/reach/compare?a=1&b=2", 404),
        ("GET", "/benchmarks/none", 404),
    ],
)
def test_every_error_has_the_one_shape(client, method: str, path: str, status: int) -> None:
    answer = client.ask(method, path)
    assert (answer.status_code, set(answer.json())) == (status, SHAPE)
    assert answer.json()["ok"] is False
    assert answer.json()["status"] == status
    assert answer.json()["detail"]
    assert answer.json()["hint"]


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"[]", b'{"benchmark": 7}', b'{"benchmark": "reach", "name": "a", "surprise": 1}', b"\xff\xfe",
     b'{"benchmark": "reach", "name": "a", "trials": 0}', b'{"benchmark": "reach", "name": "a", "method": "\\u0000"}',
     b'{"benchmark": "reach", "name": "a", "method": "\\ud800"}', b'{"a":' * 10_000],
)  # fmt: skip
def test_bodies_that_make_no_sense(client, content: bytes) -> None:
    answer = client.ask("POST", "/v1/submissions", "ada", content=content, headers={"Content-Type": "application/json"})
    assert set(answer.json()) == SHAPE
    assert answer.status_code in (400, 422)


def test_a_huge_body_is_cut_off(client) -> None:
    answer = client.ask("POST", "/v1/submissions", "ada", content=b" " * 2_000_000)
    assert (answer.status_code, answer.json()["error"]) == (413, "too_large")


@pytest.mark.parametrize(
    ("path", "who", "status"),
    [
        ("/v1/leases", None, 401),
        ("/v1/leases", "ada", 422),
        ("/api/rating/v1/studies", None, 401),
        ("/api/rating/v1/studies", "ada", 403),
        ("/api/rating/v1/studies", "admin", 422),
    ],
)
@pytest.mark.parametrize("chunked", [True, False])
def test_a_large_body_wants_a_token_first(client, path: str, who: str | None, status: int, chunked: bool) -> None:
    content = (b" " * 25_000 for _ in range(4)) if chunked else b" " * 100_000
    answer = client.ask("POST", path, who, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, set(answer.json())) == (status, SHAPE)


def test_an_unforeseen_failure_tells_a_number_and_nothing_else(client, monkeypatch, caplog) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("the secret inside")

    monkeypatch.setattr("offbook.arena.views.index", fail)
    answer = client.ask("GET", "/v1/benchmarks")
    assert (answer.status_code, set(answer.json())) == (500, SHAPE)
    assert "secret" not in answer.text
    assert "ZeroDivision" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["detail"]
    assert answer.headers["x-request-id"] in caplog.text
    assert "the secret inside" in caplog.text


def test_a_reader_of_pages_gets_a_page_for_an_error(client) -> None:
    answer = client.ask("GET", "/runs/12", headers={"Accept": "text/html"})
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")
    assert "<h1>" in answer.text


def test_every_answer_carries_the_protective_headers(client) -> None:
    for path in ("/", "/queue", "/v1/benchmarks", "/nothing", "/static/style.css", "/healthz"):
        headers = client.ask("GET", path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"


def test_tokens_are_made_listed_and_revoked_over_http(client) -> None:
    made = client.ask("POST", "/v1/tokens", "admin", json={"user": "eve", "scopes": ["submit"], "days": 1})
    assert made.status_code == 201
    token = made.json()["token"]
    client.tokens["eve"] = token
    assert [row["prefix"] for row in client.ask("GET", "/v1/tokens", "eve").json()["tokens"]] == [made.json()["prefix"]]
    assert len(client.ask("GET", "/v1/tokens", "admin").json()["tokens"]) == 5
    assert token.split("_", 2)[2] not in client.ask("GET", "/v1/tokens", "admin").text
    assert client.ask("DELETE", f"/v1/tokens/{made.json()['prefix']}", "bob").status_code == 404
    assert client.ask("DELETE", f"/v1/tokens/{made.json()['prefix']}", "eve").status_code == 200
    assert client.ask("GET", "/v1/tokens", "eve").status_code == 401
    with client.app.state.arena.database.read() as session:
        actions = [(row.user, row.action) for row in session.scalars(select(Audit).order_by(Audit.id))]
    assert actions == [("root", "token.create"), ("eve", "token.revoke")]
    assert token.split("_", 2)[2] not in str(actions)


def test_guessing_tokens_is_slowed_down(client) -> None:
    codes = [client.ask("GET", "/v1/tokens", headers={"Authorization": "Bearer x"}).status_code for _ in range(32)]
    assert codes[:30] == [401] * 30
    assert codes[30:] == [429] * 2
    # Who has a token is not locked out by a stranger behind the same address.
    assert client.ask("GET", "/v1/tokens", "admin").status_code == 200


def test_a_checkpoint_whose_header_length_looks_like_a_pickle_is_none() -> None:
    for length in (640, 896, 1152, 1408):
        assert blobs.check_magic(length.to_bytes(8, "little") + b'{"a":1}') is None
    with pytest.raises(RefusedError, match="a pickle"):
        blobs.check_magic(b"\x80\x04\x95" + b"\x00" * 60)


def test_others_submissions_cannot_be_withdrawn_and_ones_own_can(client) -> None:
    entry = submit(client, "ada")
    assert client.ask("POST", f"/v1/submissions/{entry['id']}/cancel", "bob").status_code == 404
    answer = client.ask("POST", f"/v1/submissions/{entry['id']}/cancel", "ada")
    assert answer.json() == {"id": entry["id"], "state": "cancelled", "cancelled": 4}
    assert client.ask("GET", "/v1/submissions", "ada").json()["submissions"][0]["state"] == "cancelled"
    assert client.ask("GET", "/v1/submissions", "bob").json() == {"submissions": []}


def test_nobody_poses_as_an_anchor(client) -> None:
    body = {"benchmark": "reach", "name": "expert", "kind": "remote", "anchor": "expert"}
    answer = client.ask("POST", "/v1/submissions", "ada", json=body)
    assert (answer.status_code, answer.json()["error"]) == (422, "bad_submission")


def test_an_anchor_is_the_operators_to_set(client) -> None:
    body = {"benchmark": "reach", "name": "expert", "kind": "anchor", "anchor": "expert"}
    assert client.ask("POST", "/v1/submissions", "ada", json=body).status_code == 403


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\x80\x04\x95cos\nsystem\n", "a pickle"),
        (b"PK\x03\x04" + b"\0" * 60, "a zip file"),
        (b"\x1f\x8b" + b"\0" * 60, "a gzip file"),
        (b"\xff" * 64, "something else"),
        (b"\0" * 64, "something else"),
        (b"{}", "something else"),
        (b"", "something else"),
    ],
)
def test_a_checkpoint_is_refused_by_its_first_bytes(client, tmp_path, content: bytes, named: str) -> None:
    answer = put(client, "ada", content)
    assert (answer.status_code, answer.json()["error"]) == (415, "not_safetensors")
    assert named in answer.json()["detail"]
    assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []


def test_a_checkpoint_is_opened_before_it_is_accepted(client, tmp_path) -> None:
    header = b'{"weights":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    content = len(header).to_bytes(8, "little") + header + b"\0" * 4
    blob = put(client, "ada", content).json()["sha256"]
    body = {"benchmark": "reach", "name": "mine", "kind": "checkpoint", "blob": blob}
    answer = client.ask("POST", "/v1/submissions", "ada", json=body)
    assert (answer.status_code, answer.json()["error"]) == (422, "bad_checkpoint")
    assert str(tmp_path) not in answer.text
    with client.app.state.arena.database.read() as session:
        assert session.scalars(select(Submission)).all() == []
        assert session.scalars(select(Trial)).all() == []
    assert client.ask("GET", f"/v1/blobs/{blob}").status_code == 401
    assert client.ask("GET", f"/v1/blobs/{blob}", "bob").status_code == 404
    assert client.ask("GET", f"/v1/blobs/{blob}", "ada").content == content
    assert client.ask("GET", f"/v1/blobs/{blob}", "lab").content == content


def test_uploads_have_a_cap_a_hash_and_a_type(make_sqlite, tmp_path) -> None:
    with open_arena(make_sqlite(), tmp_path, checkpoint_bytes=1000, artifact_bytes=5000) as client:
        big = (2).to_bytes(8, "little") + b"{}" + b"x" * 2000
        assert put(client, "ada", big).json()["error"] == "too_large"

        def slowly():
            yield from (big[i : i + 100] for i in range(0, len(big), 100))

        name = hashlib.sha256(big).hexdigest()
        answer = client.ask(
            "PUT", f"/v1/blobs/{name}", "ada", content=slowly(), headers={"Content-Type": "application/octet-stream"}
        )
        assert answer.json()["error"] == "too_large"
        assert put(client, "lab", MP4, "video/mp4", sha256="0" * 64).json()["error"] == "hash_mismatch"
        assert put(client, "ada", MP4, "video/mp4").status_code == 403
        assert put(client, "lab", b"x" * 6000, "video/mp4").status_code == 413
        assert put(client, "lab", MP4, "video/mp4", sha256="../../../etc/passwd").status_code in (404, 405)
        assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []


def test_the_same_file_from_many_workers_at_once_is_taken_from_each(both_clients) -> None:
    with ThreadPoolExecutor(6) as pool:
        for content in (MP4, MP4 + b"1", MP4 + b"2"):
            answers = pool.map(lambda _, c=content: put(both_clients, "lab", c, "video/mp4").status_code, range(6))
            assert set(answers) == {201}


def test_health_readiness_and_counters(client) -> None:
    assert client.ask("GET", "/healthz").json() == {"ok": True}
    assert client.ask("GET", "/readyz").json() == {"ok": True}
    submit(client)
    text = client.ask("GET", "/metrics").text
    assert 'offbook_trials{state="queued"} 4' in text
    assert 'offbook_requests_total{method="POST",route="/v1/submissions",status="201"} 1.0' in text
    for line in ("policies 0", "robots 0", "robots_stopped 0", "storage_ready 1"):
        assert f"offbook_{line}\n" in text


def test_readiness_without_a_database(client, monkeypatch) -> None:
    from sqlalchemy.exc import OperationalError

    def away() -> None:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    monkeypatch.setattr(client.app.state.arena.database, "read", away)
    assert client.ask("GET", "/readyz").status_code == 503
    assert set(client.ask("GET", "/readyz").json()) == SHAPE
    monkeypatch.undo()


def test_the_interface_describes_itself(client) -> None:
    described = client.ask("GET", "/openapi.json").json()
    assert "/v1/leases" in described["paths"]
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description"), f"{method} {path} has no description"
    assert client.ask("GET", "/docs").status_code == 404


def test_a_worker_cannot_report_on_another_users_lease(client) -> None:
    submit(client, "admin", kind="anchor", anchor="expert", trials=1)
    given = lease(client)
    made = client.ask("POST", "/v1/tokens", "admin", json={"user": "rival", "scopes": ["worker"]}).json()
    client.tokens["rival"] = made["token"]
    report(client, given, "start")
    more = {"result": {"score": 1.0, "steps": 1}, "fault": {"kind": "robot_fault", "reason": "mine"}}
    for what in ("start", "heartbeat", "result", "fault"):
        answer = client.ask(
            "POST", f"/v1/trials/{given['trial']}/{what}", "rival", json={"fence": given["fence"]} | more.get(what, {})
        )
        assert answer.status_code == 404, what
    frame = f"/v1/trials/{given['trial']}/frame"
    picture = {"content": b"\xff\xd8\xff", "headers": {"Content-Type": "image/jpeg"}}
    assert client.ask("POST", frame, "rival", params={"fence": given["fence"], "step": 0}, **picture).status_code == 404
    assert report(client, given, "heartbeat").status_code == 200
    body = {"robot": "arm", "worker": "arm-1", "instance": "x", "capabilities": {}}
    assert client.ask("POST", "/v1/leases", "rival", json=body).json()["error"] == "robot_taken"


@pytest.mark.parametrize("score", ["NaN", "Infinity", '"high"', "null"])
def test_a_score_is_a_finite_number(client, score: str) -> None:
    submit(client, "admin", kind="anchor", anchor="expert", trials=1)
    given = lease(client)
    report(client, given, "start")
    answer = client.ask(
        "POST",
        f"/v1/trials/{given['trial']}/result",
        "lab",
        content=f'{{"fence": 1, "score": {score}, "steps": 1}}',
        headers={"Content-Type": "application/json"},
    )
    assert (answer.status_code, set(answer.json())) == (422, SHAPE)
