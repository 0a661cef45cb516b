"""People compare the runs of two submissions inside an arena: the same doors as alone, opened by its operator."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from test_routes import lease, report, submit

from offbook.data.clips import write_clip

pytestmark = pytest.mark.service

API = "/api/rating/v1"


@pytest.fixture
def played(both_clients, tmp_path: Path):
    """Two submissions that played the same three scenes: the films of the first are bright, those of the other dark."""
    client = both_clients
    entries = []
    for name, shade in (("secret-bright", 200), ("secret-dark", 40)):
        entry = submit(client, "admin", kind="anchor", anchor="expert", name=name, trials=3)
        for n in range(3):
            play(client, tmp_path, shade + n)
        entries.append(entry["id"])
    return client, entries


def play(client, folder: Path, shade: int) -> None:
    """Plays the next trial, with a film of one shade."""
    given = lease(client)
    report(client, given, "start")
    write_clip(folder / "played.mp4", np.full((4, 32, 32, 3), shade, np.uint8), 10)
    content = (folder / "played.mp4").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    client.ask("PUT", f"/v1/blobs/{sha256}", "lab", content=content, headers={"Content-Type": "video/mp4"})
    files = [{"name": "video-scene.mp4", "sha256": sha256, "media_type": "video/mp4", "size": len(content)}]
    assert report(client, given, "result", score=0.5, steps=4, files=files).status_code == 200


def ask(client, method: str, path: str, token: str, **options):
    return client.request(method, path, headers={"Authorization": f"Bearer {token}"}, **options)


def test_an_operator_opens_a_study_of_runs_and_raters_rank_them_blind(played, tmp_path: Path, cli) -> None:
    client, (bright, dark) = played
    opened = client.ask("POST", "/v1/studies", "admin", json={"a": bright, "b": dark})
    assert opened.status_code == 201, opened.text
    study = opened.json()["study"]
    assert opened.json()["pairs"] == 3
    raters = client.ask("POST", f"{API}/studies/{study}/raters", "admin", json={"count": 3, "kind": "script"}).json()
    told = []
    for rater in raters["raters"]:
        while True:
            answer = ask(client, "GET", f"{API}/next", rater["token"])
            told.append(answer.text)
            given = answer.json()
            if given.get("done"):
                break
            assert given["prompt"] == "reach the mark"
            films = [client.get(given[side]["url"]) for side in ("left", "right")]
            shades = [shade(film.content, tmp_path) for film in films]
            told += [str(film.headers) for film in films]
            body = {"nonce": given["nonce"], "choice": "left" if shades[0] > shades[1] else "right", "watched": 1.0}
            answer = ask(client, "POST", f"{API}/assignments/{given['assignment']}/vote", rater["token"], json=body)
            assert answer.status_code == 200
    told += [client.get(path).text for path in ("/studies", f"/studies/{study}", "/rate")]
    for words in told:
        assert "secret" not in words
    # The door of raters leads to no leaderboard.
    assert "/benchmarks" not in told[-1]
    assert "Queue" not in told[-1]
    client.ask("POST", f"{API}/studies/{study}/close", "admin")
    stats = client.get(f"{API}/studies/{study}/stats").json()
    assert [rating["system"] for rating in stats["groups"][0]["ranking"]["ratings"]] == ["secret-bright", "secret-dark"]
    assert "secret-bright" in client.get(f"/studies/{study}").text
    votes = tmp_path / "votes.jsonl"
    votes.write_text(client.get(f"{API}/studies/{study}/export").text)
    again = cli(["rating", "stats", str(votes), "--json"])
    assert json.loads(again.stdout)["groups"][0]["ranking"]["ratings"] == stats["groups"][0]["ranking"]["ratings"]


def shade(film: bytes, folder: Path) -> int:
    from offbook.data.clips import read_clip

    (folder / "seen.mp4").write_bytes(film)
    return int(read_clip(folder / "seen.mp4")[0, 5, 5, 0])


def test_what_cannot_be_compared_is_refused(played) -> None:
    client, (bright, dark) = played
    idle = submit(client, "admin", kind="anchor", anchor="random", trials=2)["id"]
    other = submit(client, "admin", kind="anchor", anchor="random", split="far", trials=2)["id"]
    cases = [
        ("ada", bright, dark, 403, "missing_scope"),
        ("admin", bright, bright, 422, "not_paired"),
        ("admin", bright, other, 422, "not_paired"),
        ("admin", bright, "99", 404, "not_found"),
        ("admin", bright, "x", 404, "not_found"),
        ("admin", bright, idle, 422, "no_films"),
        ("admin", bright, None, 422, "not_paired"),
        ("admin", "99", None, 404, "not_found"),
    ]
    for role, a, b, status, error in cases:
        answer = client.ask("POST", "/v1/studies", role, json={"a": a, "b": b})
        assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert client.ask("POST", "/v1/studies", "admin", json={"a": bright, "b": dark}).status_code == 201
    assert client.ask("POST", "/v1/studies", "admin", json={"a": bright, "b": dark}).json()["error"] == "name_taken"


def test_a_pair_that_ran_side_by_side_is_compared_by_people_too(client, tmp_path: Path) -> None:
    body = {"benchmark": "reach", "kind": "anchor", "anchor": "random", "trials": 2}
    sent = client.ask(
        "POST", "/v1/pairs", "admin", json={"entries": [body | {"name": name} for name in (" new", "old")]}
    )
    first, second = (entry["id"] for entry in sent.json()["entries"])
    for n in range(3):
        play(client, tmp_path, 40 * n)
    # Of a pair whose second half has not been played nothing is shown.
    opened = client.ask("POST", "/v1/studies", "admin", json={"a": second})
    assert opened.status_code == 201, opened.text
    assert (opened.json()["pairs"], opened.json()["name"]) == (1, f"old ({second}) and new ({first}) on reach, seen")


def test_only_operators_own_studies_and_every_page_leads_to_them(client) -> None:
    for role, status in (("admin", 200), ("ada", 403), ("lab", 403), (None, 401)):
        assert client.ask("GET", f"{API}/studies", role).status_code == status
    for path in ("/", "/queue", "/submit", "/studies"):
        page = client.ask("GET", path, headers={"Accept": "text/html"})
        assert '<a href="/studies"' in page.text
    assert 'aria-current="page">Studies' in client.ask("GET", "/studies").text
    style = client.ask("GET", "/static/rating.css")
    assert (style.status_code, client.ask("GET", "/static/player.js").status_code) == (200, 200)
    # An upload may be large; everything else may not.
    answer = client.ask("POST", "/v1/studies", "admin", content=b" " * (2 << 20))
    assert answer.json()["error"] == "too_large"


def test_an_operator_at_the_machine_opens_one_too(tmp_path: Path, cli, played) -> None:
    client, (bright, dark) = played
    settings = client.app.state.arena.settings
    record = {"database": str(client.app.state.arena.database.engine.url.render_as_string(hide_password=False))}
    (settings.folder / "arena.json").write_text(json.dumps(record))
    words = ["--folder", str(settings.folder), "--runs", bright, dark, "--raters", "2", "--url", "https://a.example"]
    outcome = cli(["rating", "import", *words, "--question", "Which poured better?"])
    assert outcome.exit_code == 0, outcome.stderr
    assert "3 pairs" in outcome.stdout
    assert outcome.stdout.count("https://a.example/rate#rt_") == 2
    assert "Which poured better?" in client.get("/studies").text
