"""What people are shown: ranks from intervals, paired comparisons, the queue, and every page with true data."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace

import pytest
from arena_world import BENCHMARK, FAULT, LEFT, lease, open_arena, play, submit, who
from scipy import stats
from sqlalchemy import insert, select

from offbook.arena import submissions, trials, views
from offbook.arena.database import Database
from offbook.arena.pages import render
from offbook.arena.tables import Attempt, Result, Robot, Submission, Trial
from offbook.service.pages.words import state_in_words
from offbook.service.refusal import RefusedError
from offbook.service.storage import BlobStore

pytestmark = pytest.mark.service


@pytest.fixture
def database(make_sqlite) -> Database:
    database = make_sqlite()
    with database.write() as session:
        submissions.define_benchmark(session, BENCHMARK)
    return database


def finish(session, entry: Submission, scores: list[float]) -> None:
    """Plays all trials of a submission; `scores` by slot."""
    while given := lease(session, connected=[entry.id]):
        trial = session.get_one(Trial, given["trial"])
        score = scores[trial.slot]
        report = trials.Report(
            outcome="done", score=score, success=score >= 0.5, steps=3, latency_ms=5.0, late_share=0.1
        )
        play(session, given, report)


def test_ranks_are_ranges_until_intervals_part(database: Database) -> None:
    with database.write() as session:
        for name, scores in (
            ("best", [0.9, 0.92, 0.94, 0.91] * 2),
            ("good", [0.1, 0.9, 0.8, 0.3] * 2),
            ("fair", [0.7, 0.2, 0.3, 0.6] * 2),
            ("poor", [0.0, 0.01, 0.02, 0.0] * 2),
            ("expert", [1.0, 1.0, 1.0, 1.0] * 2),
        ):
            kind = {"kind": "anchor", "anchor": "expert"} if name == "expert" else {"kind": "remote"}
            finish(session, submit(session, name=name, split="long", **kind), scores)
        submit(session, name="waits", split="long")
        board = views.leaderboard(session, "reach", "long")
    rows = {row["name"]: row for row in board["rows"]}
    assert [row["name"] for row in board["rows"]] == ["expert", "best", "good", "fair", "poor", "waits"]
    assert {name: row["rank"] for name, row in rows.items()} == {
        "expert": None, "best": [1, 1], "good": [2, 3], "fair": [2, 3], "poor": [4, 4], "waits": None,
    }  # fmt: skip
    assert rows["best"]["score"]["value"] == pytest.approx(0.9175)
    exact = stats.binomtest(4, 8).proportion_ci(method="exact")
    assert rows["good"]["success"] == {"value": 0.5, "low": pytest.approx(exact.low), "high": pytest.approx(exact.high)}
    assert (rows["good"]["latency_ms"], rows["good"]["late_share"]) == (5.0, pytest.approx(0.1))
    assert (rows["waits"]["score"], rows["waits"]["n"], rows["waits"]["wanted"]) == (None, 0, 8)
    assert board["anchors"] == [{"name": "expert", "value": 1.0}]


def test_who_met_only_some_scenes_stands_below_and_has_no_rank(database: Database) -> None:
    with database.write() as session:
        finish(session, submit(session, name="whole", split="long"), [0.1, 0.3, 0.2, 0.4] * 2)
        finish(session, submit(session, "bob", name="short", split="long", trials=6), [1.0] * 8)
        board = views.leaderboard(session, "reach", "long")
        assert [(row["name"], row["rank"], row["n"], row["wanted"]) for row in board["rows"]] == [
            ("whole", [1, 1], 8, 8), ("short", None, 6, 8),
        ]  # fmt: skip
        finish(session, submit(session, "bob", name="short", trials=3), [1.0] * 4)
        assert views.index(session)["benchmarks"][0]["leader"] is None
        finish(session, submit(session, name="whole"), [0.1] * 4)
        assert views.index(session)["benchmarks"][0]["leader"]["name"] == "whole"
        shown = views.leaderboard(session, "reach", "long", shown=(None, None))
    page = render("leaderboard", shown)
    assert "6 of 8 trials" in page
    assert "<b>short</b>" not in page


def test_equal_scores_have_an_interval_where_their_range_is_known(database: Database) -> None:
    with database.write() as session:
        submissions.define_benchmark(session, replace(BENCHMARK, name="share", score_range=(0.0, 1.0)))
        entries = {}
        for benchmark in ("share", "reach"):
            for name, score in (("all", 1.0), ("none", 0.0)):
                entries[benchmark, name] = entry = submit(session, name=name, benchmark=benchmark, split="long")
                finish(session, entry, [score] * 8)
        scores = {key: (entry.score, entry.score_low, entry.score_high) for key, entry in entries.items()}
        exact = stats.binomtest(8, 8).proportion_ci(method="exact").low
        assert scores["share", "all"] == (1.0, pytest.approx(exact, abs=0.03), 1.0)
        assert scores["share", "none"] == (0.0, 0.0, pytest.approx(1 - exact, abs=0.03))
        assert scores["reach", "all"] == (1.0, None, None)
        pairs = {name: views.compare(session, entries[name, "all"].id, entries[name, "none"].id)["difference"]
                 for name in ("share", "reach")}  # fmt: skip
        assert pairs["share"] == {"value": 1.0, "low": pytest.approx(2 * exact - 1, abs=0.06), "high": 1.0}
        assert pairs["reach"] == {"value": 1.0, "low": None, "high": None}
        finish(session, submit(session, name="half", benchmark="share", split="long", trials=1), [0.5] * 8)
        given = submit(session, name="bad", benchmark="share") and lease(session, connected=range(99))
        trials.start(session, given["trial"], given["fence"])
        with pytest.raises(RefusedError, match=r"expected 0 to 1, got 1\.5"):
            trials.end(session, given["trial"], given["fence"], trials.Report(outcome="done", score=1.5))


def test_a_lost_trial_is_no_failure_of_a_task_that_knows_no_success(database: Database) -> None:
    plain = trials.Report(outcome="done", score=0.5)
    with database.write() as session:
        entries = [submit(session, name=name, split="long") for name in ("a", "b")]
        for entry in entries:
            for number in range(8):
                play(session, lease(session, connected=[entry.id]), plain if number else LEFT)
        row = next(row for row in views.leaderboard(session, "reach", "long")["rows"] if row["name"] == "a")
        assert (row["n"], row["success"]) == (8, None)
        assert views.compare(session, entries[0].id, entries[1].id)["mcnemar_p"] is None


def test_two_submissions_are_compared_on_the_scenes_that_both_met(database: Database) -> None:
    with database.write() as session:
        a = submit(session, name="a", split="long")
        b = submit(session, "bob", name="b", split="long", trials=7)
        finish(session, a, [1.0, 0.8, 0.6, 0.4, 1.0, 0.8, 0.6, 0.4])
        finish(session, b, [0.5, 0.3, 0.6, 0.0, 0.5, 0.3, 0.6, 0.0])
        pair = views.compare(session, a.id, b.id)
        assert pair["pairs"] == 7
        assert pair["difference"]["value"] == pytest.approx(statistics.mean([0.5, 0.5, 0.0, 0.4, 0.5, 0.5, 0.0]))
        assert pair["difference"]["low"] < pair["difference"]["value"] < pair["difference"]["high"]
        assert pair["mcnemar_p"] == 0.5
        assert [(s["slot"], s["a"], s["b"]) for s in sorted(pair["scenes"], key=lambda s: s["slot"])][:3] == [
            (0, 1.0, 0.5), (1, 0.8, 0.3), (2, 0.6, 0.6),
        ]  # fmt: skip
        assert [s["difference"] for s in pair["scenes"] if s["b"] is None] == [None]
        swapped = views.compare(session, b.id, a.id)
        assert swapped["difference"]["value"] == pytest.approx(-pair["difference"]["value"])
        other = submit(session, split="far")
        for first, second, status in ((a.id, a.id, 422), (a.id, other.id, 422), (a.id, 999, 404)):
            with pytest.raises(RefusedError) as caught:
                views.compare(session, first, second)
            assert caught.value.status == status


def test_a_submission_says_in_words_where_it_stands(database: Database) -> None:
    def words(present=()) -> str:
        with database.read() as session:
            return views.submission(session, 1, present, "http://arena")["state_words"]

    with database.write() as session:
        entry = submit(session, trials=2)
    assert words().startswith("Waits for its policy to connect")
    assert "none is here now" in words([1])
    with database.write() as session:
        assert lease(session, "arm-9", connected=[]) is None
    assert words([1]) == "Queued: position 1, starts in about 1 s"
    with database.write() as session:
        given = lease(session, connected=[entry.id])
    assert words([1]) == "Running on robot arm-1: trial 1 of 2"
    with database.write() as session:
        for _ in range(3):
            play(session, given, FAULT)
            given = lease(session, connected=[entry.id]) or given
        play(session, given, LEFT)
    with database.read() as session:
        view = views.submission(session, 1, [], "http://arena")
    assert view["state_words"].startswith("1 trial waits for the operator of the robot")
    assert "1 of 2 trials done" in view["state_words"]
    assert {t["state"]: t["fault"] for t in view["trials"]} == {
        "needs_human": "3 faults of the robot, the last: camera lost", "policy_fault": "the policy hung up",
    }  # fmt: skip
    assert any("waits for a person: camera lost" in line["text"] for line in view["log"])
    assert view["quota"]["used"] == 2
    stuck = next(trial for trial in view["trials"] if trial["state"] == "needs_human")
    assert state_in_words(stuck) == "waits for its operator: 3 faults of the robot, the last: camera lost"
    with database.write() as session:
        submissions.cancel(session, session.get_one(Submission, 1))
    assert words() == "Withdrawn after 1 of 2 trials"


def test_a_robot_that_asks_for_somebody_itself_has_not_failed(database: Database) -> None:
    asked = trials.Report(outcome="needs_human", reason="the cup is empty")
    with database.write() as session:
        submit(session, kind="anchor", anchor="random", trials=1)
        trial = play(session, lease(session), asked)["trial"]
        seen = [
            views.submission(session, 1, [], "")["trials"][0],
            views.run(session, trial, BlobStore("memory://none"), ""),
        ]
    assert [state_in_words(view) for view in seen] == ["waits for its operator: the cup is empty"] * 2


def test_the_queue_shows_robots_and_turns(database: Database) -> None:
    with database.write() as session:
        first = submit(session, "ada", name="first")
        second, third = submit(session, "ada", name="second"), submit(session, "bob", name="third")
        lease(session, "arm-1", connected=[first.id])
        lease(session, "arm-2", robot_class="arm")
        view = views.queue(session, [first.id, third.id])
    assert {r["name"]: (r["state"], r["words"]) for r in view["robots"]} == {
        "arm-1": ("running", "runs trial 1 of 4 of first"),
        "arm-2": ("idle", "idle, waiting for work"),
    }
    assert [(w["name"], w["trials_left"], w["position"]) for w in view["waiting"]] == [
        ("third", 4, 1), ("first", 3, 2), ("second", 4, 3),
    ]  # fmt: skip
    assert view["waiting"][0]["eta_s"] == 0
    assert view["waiting"][2]["eta_s"] is None
    assert second.id


def test_a_robot_shows_what_it_did(database: Database) -> None:
    with database.write() as session:
        submit(session, kind="anchor", anchor="expert")
        for report in (FAULT, trials.Report(outcome="done", score=1.0), LEFT):
            play(session, lease(session), report)
        view = views.robot(session, "arm-1", "http://here")
    assert (view["trials_done"], view["faults"], view["state"], view["current"]) == (2, 1, "idle", None)
    with database.write() as session:
        session.scalars(select(Robot)).one().seen -= 600
    with database.read() as session:
        assert views.robot(session, "arm-1", "http://here")["words"] == "offline: not heard of for 10 min"


PAGES = [
    "/", "/queue", "/submit", "/submit?benchmark=reach", "/benchmarks/reach", "/benchmarks/reach?split=far",
    "/benchmarks/reach?q=policy&page=2", "/benchmarks/reach/compare?a=1&b=2", "/submissions/1", "/submissions/2",
    "/submissions/3", "/runs/1", "/runs/5", "/runs/9", "/robots/arm-1",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["empty", "full"])
def test_every_page_draws_the_arenas_own_views(database: Database, tmp_path, kind: str) -> None:
    with open_arena(database, tmp_path) as client:
        if kind == "full":
            with database.write() as session:
                for user in ("ada", "bob"):
                    finish(session, submit(session, user, name=f"policy of {user}"), [1.0, 0.5, 0.0, 0.25])
                submit(session, "eve", name="waits")
                play(session, lease(session, "arm-1", connected=[3]), FAULT)
        for path in PAGES if kind == "full" else PAGES[:6]:
            answer = client.ask("GET", path, headers={"Accept": "text/html"})
            assert answer.status_code == 200, path
            assert answer.headers["content-type"].startswith("text/html")
            assert "<h1>" in answer.text
        for path in ("/v1/benchmarks", "/v1/leaderboard/reach", "/v1/compare?a=1&b=2", "/v1/submissions/1"):
            expected = 200 if kind == "full" or "reach" in path or "benchmarks" in path else 404
            assert client.ask("GET", path).status_code == expected


def test_names_cannot_carry_markup_into_pages(database: Database, tmp_path) -> None:
    attack = "<script>alert(1)</script>"
    with open_arena(database, tmp_path) as client:
        with database.write() as session:
            finish(session, submit(session, name=attack, method=attack), [1.0] * 4)
            finish(session, submit(session, "bob", name="b"), [0.0] * 4)
        for path in ("/benchmarks/reach", "/submissions/1", "/runs/1", "/queue", "/benchmarks/reach/compare?a=1&b=2"):
            text = client.ask("GET", path, headers={"Accept": "text/html"}).text
            assert attack not in text


@pytest.mark.slow
def test_a_large_arena_still_answers_quickly(make_sqlite, tmp_path) -> None:
    database = make_sqlite()
    fill(database, entries=10_000, each=5)
    with open_arena(database, tmp_path) as client:
        for path in ("/benchmarks/reach", "/queue"):
            client.ask("GET", path)
            seconds = []
            for _ in range(10):
                began = time.process_time()
                answer = client.ask("GET", path, headers={"Accept": "text/html"})
                seconds.append(time.process_time() - began)
            print(path, len(answer.content), [round(s, 3) for s in seconds])
            assert answer.status_code == 200
            assert statistics.median(seconds) < 0.3


def fill(database: Database, *, entries: int, each: int) -> None:
    """Many submissions with results, written directly."""
    draw = random.Random(0)
    with database.write() as session:
        submissions.define_benchmark(session, BENCHMARK)
        user = who(session).user_id
        base = {
            "user_id": user, "split_id": 1, "robot_class": "arm", "kind": "remote", "state": "done", "wanted": each,
            "commitment": "", "nonce": "", "created": 0.0, "n": each, "judged": each, "successes": 1,
            "latency_ms": 1.0, "late_share": 0.0, "method": "", "imitates": "",
        }  # fmt: skip
        rows = []
        for i in range(entries):
            score = draw.random()
            rows.append(base | {"name": f"p{i}", "score": score, "score_low": score - 0.1, "score_high": score + 0.1})
        session.execute(insert(Submission), rows)
        cells = [
            {"submission_id": 1 + i, "slot": s, "position": s, "pair_id": str(s), "blind_label": "x", "scene": {},
             "seed": s, "state": "done", "attempt": 1, "faults": 0, "fence": 1}
            for i in range(entries) for s in range(each)
        ]  # fmt: skip
        session.execute(insert(Trial), cells)
        session.execute(
            insert(Result),
            [
                {"trial_id": 1 + i, "submission_id": cell["submission_id"], "attempt": 1, "outcome": "done",
                 "reason": "", "score": 0.5, "success": True, "steps": 1, "files": [], "created": 0.0}
                for i, cell in enumerate(cells)
            ],
        )  # fmt: skip
        assert session.scalar(select(Attempt.id).limit(1)) is None
