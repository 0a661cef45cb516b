"""Studies over HTTP: from outputs to results, who may do what, and what a rater never learns."""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from rating_world import API, OWNER, Clock, World, by_number, jsonl, open_world, texts
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from offbook.rating.analysis import analyse
from offbook.rating.records import read_votes
from offbook.rating.tables import SCHEMA

pytestmark = pytest.mark.service

SHAPE = {"ok", "error", "detail", "hint", "status"}


def test_the_migrated_schema_is_the_declared_one(make_database) -> None:
    database = make_database()
    with database.engine.connect() as connection:
        options = {"compare_type": True, "version_table": SCHEMA.version_table}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, SCHEMA.metadata) == []
    database.migrate()


def test_a_study_from_its_outputs_to_votes_that_anybody_can_recompute(both_worlds: World, tmp_path) -> None:
    world = both_worlds
    study = world.study(texts(("best", "fair", "poor"), items=6, gold=3), gold_rate=0.1, repeat_rate=0.1)
    counted = world.own("GET", f"studies/{study}")
    assert (counted["state"], counted["pairs"], counted["wanted"]) == ("open", 18, 54)
    for token in world.invite(study, 4):
        world.judge(token, by_number)
    votes = world.votes(study)
    real = Counter(vote["pair"] for vote in votes if vote["pair_kind"] == "real")
    assert set(real.values()) == {3}
    assert Counter(vote["pair_kind"] for vote in votes)["gold"] >= 4
    for vote in votes:
        if vote["pair_kind"] == "repeat":
            (first,) = [v for v in votes if v["pair"] == vote["repeat_of"] and v["rater"] == vote["rater"]]
            assert (first["left"], first["right"]) == (vote["right"], vote["left"])
    assert world.own("POST", f"studies/{study}/close") == {"state": "closed", "votes": len(votes)}
    # What a stranger downloads gives the figures that the service shows.
    (tmp_path / "votes.jsonl").write_text(world.ask("GET", f"studies/{study}/export").text)
    again = analyse(read_votes(tmp_path / "votes.jsonl")).to_json()
    shown = world.ask("GET", f"studies/{study}/stats").json()
    assert shown == json.loads(json.dumps(again))
    (group,) = shown["groups"]
    assert [rating["system"] for rating in group["ranking"]["ratings"]] == ["best", "fair", "poor"]
    assert (group["gold_failures"]["value"], group["consistency"]["value"]) == (0, 1)
    page = world.ask("GET", f"/studies/{study}", headers={"Accept": "text/html"}).text
    assert page.index("best</b>") < page.index("fair</b>") < page.index("poor</b>")


SECRETS = ("SYS-alpha", "SYS-beta", "ITEM-secret", "CLUSTER-secret", "STUDY-secret", "META-secret", "PLAN-secret")


def secret_study(world: World, **design) -> int:
    records = [
        {"item": f"ITEM-secret-{i}", "system": system, "prompt": "say", "text": f"{k} x", "cluster": "CLUSTER-secret",
         "meta": {"variants_tried": "META-secret"}}
        for i in range(3)
        for k, system in enumerate(("SYS-alpha", "SYS-beta"))
    ]  # fmt: skip
    plan = {"plan": "PLAN-secret", "rules": {"min_dwell_ms": 1}, "manual": ["same_person"]}
    return world.study(records, name="STUDY-secret", prereg=plan, anchor="SYS-alpha", **design)


def test_nothing_that_a_rater_is_told_holds_an_identity_or_a_total(both_worlds: World) -> None:
    world = both_worlds
    study = secret_study(world)
    first, second = world.invite(study, 2, kind="human", cohort="COHORT-secret")
    world.ask("POST", "consent", second)
    world.ask("POST", "consent", first)
    world.judge(second, by_number)
    told = [world.ask("GET", "invitation", first), world.ask("GET", "next", first)]
    given = told[-1].json()
    assert set(given) == {"assignment", "nonce", "prompt", "left", "right", "expires_in_s", "progress"}
    assert (given["assignment"], given["progress"]) == (0, {"done": 0, "most": 100})
    assert {frozenset(given[side]) for side in ("left", "right")} == {frozenset({"kind", "text"})}
    body = {"nonce": given["nonce"], "choice": "left"}
    told += [world.ask("POST", "assignments/0/vote", first, json=body | more) for more in ({}, {}, {"choice": "tie"})]
    told += [world.ask("POST", "assignments/1/vote", first, json=body)]
    told += [world.ask("POST", "assignments/0/vote", second, json=body)]
    told += [world.ask("GET", path, first) for path in (f"studies/{study}/stats", f"studies/{study}", "studies")]
    told += [world.ask("GET", path) for path in ("/rate", "/studies", f"/studies/{study}", f"studies/{study}/export")]
    told += [world.ask("GET", f"/studies/{study}", first)]
    for answer in told:
        words = answer.text + str(answer.headers)
        for secret in (*SECRETS, "COHORT-secret"):
            assert secret not in words, (answer.request.url, secret)
        assert "set-cookie" not in answer.headers
    page = world.ask("GET", f"/studies/{study}").text
    assert "appear here when the study is closed" in page
    assert "votes" not in page.split("<main")[1].split("</main")[0]


def test_the_owner_sees_what_is_hidden_and_after_closing_everybody_does(world: World) -> None:
    study = secret_study(world)
    (token,) = world.invite(study)
    world.judge(token, by_number)
    for path in (f"/studies/{study}", "/studies"):
        assert "STUDY-secret" in world.ask("GET", path, OWNER).text
        assert "STUDY-secret" not in world.ask("GET", path).text
    assert world.ask("GET", f"studies/{study}/stats").json()["error"] == "not_closed"
    assert world.ask("GET", f"studies/{study}/stats", OWNER).json()["votes"] == 3
    world.own("POST", f"studies/{study}/close")
    page = world.ask("GET", f"/studies/{study}").text
    for secret in ("SYS-alpha", "STUDY-secret", "PLAN-secret", "META-secret variants tried"):
        assert secret in page
    assert world.ask("GET", f"studies/{study}/stats").json()["votes"] == 3


def test_a_draft_is_nobodys_business(world: World) -> None:
    study = world.draft(texts())
    (token,) = world.invite(study)
    for path in ("/studies", f"/studies/{study}"):
        assert "Which is better" not in world.ask("GET", path).text
    assert world.ask("GET", "next", token).json()["error"] == "study_not_open"
    assert "Open the study" in world.ask("GET", f"/studies/{study}", OWNER).text


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def slow_world(make_database, tmp_path, clock):
    with open_world(make_database(clock), tmp_path) as world:
        yield world


def test_a_vote_is_taken_once_in_time_and_from_whom_it_was_asked(slow_world: World, clock: Clock) -> None:
    world = slow_world
    study = world.study(texts(items=3), patience_s=60, allow_bad=False, reasons=["clear"], repeat_rate=0)
    mine, other = world.invite(study, 2)
    given = world.ask("GET", "next", mine).json()
    assert world.ask("GET", "next", mine).json() == given
    body = {"nonce": given["nonce"], "choice": "left", "reasons": ["clear"], "note": "n", "dwell_ms": 10}

    def vote(token: str = mine, number: int = 0, **more):
        answer = world.ask("POST", f"assignments/{number}/vote", token, json=body | more)
        return answer.status_code, answer.json().get("error")

    assert vote(other) == (403, "not_yours")
    assert vote(number=7) == (403, "not_yours")
    assert vote(nonce="none") == (404, "not_found")
    assert vote(choice="both_bad") == (422, "not_offered")
    assert vote(reasons=["obscure"]) == (422, "not_offered")
    assert vote(choice="up") == (422, "invalid_request")
    assert vote(watched=1.5) == (422, "invalid_request")
    clock.seconds += 59
    assert vote() == (200, None)
    first = world.ask("POST", "assignments/0/vote", mine, json=body)
    assert first.json() == {"recorded": True, "assignment": 0, "choice": "left"}
    assert vote(choice="right") == (409, "voted")
    assert vote(note="another") == (409, "voted")
    late = world.ask("GET", "next", mine).json()
    clock.seconds += 60
    assert vote(number=1, nonce=late["nonce"]) == (410, "expired")
    # Its pair goes to whoever comes next, and this rater is shown a pair again too.
    again = world.ask("GET", "next", mine).json()
    assert (again["assignment"], again["nonce"] == late["nonce"]) == (2, False)
    assert vote(number=1, nonce=late["nonce"]) == (410, "expired")
    world.own("POST", f"studies/{study}/close")
    assert vote(number=2, nonce=again["nonce"]) == (410, "study_closed")
    assert vote() == (200, None)
    assert world.ask("GET", "next", mine).json()["error"] == "study_closed"
    (kept,) = world.votes(study)
    assert (kept["choice"], kept["reasons"], kept["note"], kept["dwell_ms"]) == ("left", ["clear"], "n", 10)


def test_a_vote_in_80_ms_is_kept_flagged_and_shown_both_ways(slow_world: World, clock: Clock) -> None:
    world = slow_world
    study = world.study(texts(items=4), min_dwell_s=1.0, repeat_rate=0)
    hasty, careful = world.invite(study, 2, kind="human")
    (script,) = world.invite(study)
    # A page may say what it likes; nobody looks for longer than the pair was out.
    clock_step = {hasty: 0.08, careful: 4.0}
    for token in (hasty, careful):
        world.ask("POST", "consent", token)

        def after_a_while(given, seconds=clock_step[token]):
            clock.seconds += seconds
            return by_number(given)

        world.judge(token, after_a_while, dwell_ms=9000)
    world.judge(script, by_number)
    kept = {"r0": (80, ["dwell"]), "r1": (4000, []), "r2": (0, [])}
    for vote in world.votes(study):
        assert (vote["dwell_ms"], vote["excluded"]) == kept[vote["rater"]]
    world.own("POST", f"studies/{study}/close")
    counted, everything, scripts = world.ask("GET", f"studies/{study}/stats").json()["groups"]
    assert (scripts["kind"], scripts["votes"], scripts["excluded"]) == ("script", 4, {})
    assert (counted["votes"], everything["votes"], counted["excluded"]) == (4, 8, {"dwell": 4})
    page = world.ask("GET", f"/studies/{study}").text
    assert "answered faster than anybody can look" in page
    assert "With all votes" in page
    assert world.own("GET", f"studies/{study}")["prereg"]["rules"] == {"min_dwell_ms": 1000}


def test_one_who_always_says_left_is_flagged_by_a_rule_that_was_written_down(world: World) -> None:
    rules = {"min_streak_p": 0.001}
    study = world.study(texts(("a", "b", "c"), items=8), prereg={"rules": rules}, raters_per_pair=4)
    lazy, *honest = world.invite(study, 4)
    world.judge(lazy, lambda given: "left")
    for token in honest:
        world.judge(token, by_number)
    world.own("POST", f"studies/{study}/close")
    votes = world.votes(study)
    assert {vote["rater"] for vote in votes if vote["excluded"] == ["streak"]} == {"r0"}
    assert not any(vote["excluded"] for vote in votes if vote["rater"] != "r0")
    # The verdict is written down: exporting again gives it without the rules being asked.
    assert world.votes(study) == votes


def test_what_is_left_out_by_hand_must_have_been_written_down(world: World) -> None:
    study = secret_study(world)
    tokens = world.invite(study, 2)
    for token in tokens:
        world.judge(token, by_number)

    def exclude(**wanted):
        answer = world.ask("POST", f"studies/{study}/exclusions", OWNER, json=wanted)
        return answer.status_code, answer.json().get("error")

    assert exclude(rule="inconvenient", rater=1) == (422, "rule_not_registered")
    assert exclude(rule="same_person") == (422, "bad_exclusion")
    assert exclude(rule="same_person", rater=9) == (404, "not_found")
    assert exclude(rule="same_person", vote=99) == (404, "not_found")
    assert exclude(rule="same_person", rater=1) == (201, None)
    assert exclude(rule="same_person", rater=1) == (409, "conflict")
    assert exclude(rule="same_person", vote=1) == (201, None)
    left_out = {(vote["rater"], vote["id"]) for vote in world.votes(study) if vote["excluded"]}
    assert left_out == {("r0", "1"), ("r1", "4"), ("r1", "5"), ("r1", "6")}


def test_a_person_is_asked_before_the_first_pair_and_a_script_is_not(world: World) -> None:
    study = world.study(texts())
    (person,), (script,) = world.invite(study, kind="human"), world.invite(study, kind="script")
    assert world.ask("GET", "next", person).json()["error"] == "no_consent"
    assert world.ask("GET", "invitation", person).json()["consented"] is False
    assert world.ask("POST", "consent", person).json() == {"consented": True}
    assert "nonce" in world.ask("GET", "next", person).json()
    assert world.ask("GET", "invitation", script).json()["consented"] is True
    assert "nonce" in world.ask("GET", "next", script).json()


def test_kinds_are_never_pooled(world: World) -> None:
    study = world.study(texts(), repeat_rate=0, raters_per_pair=1)
    for kind, prefer in (("script", by_number), ("llm", lambda given: "tie")):
        first, second = world.invite(study, 2, kind=kind)
        # Each kind has pairs of its own to judge, as many as are wanted and no more.
        assert (world.judge(first, prefer), world.judge(second, prefer)) == (4, 0)
    groups = {group["kind"]: group for group in world.own("GET", f"studies/{study}/stats")["groups"]}
    assert {kind: group["votes"] for kind, group in groups.items()} == {"script": 4, "llm": 4}


def test_caps_and_greed(world: World) -> None:
    study = world.study(texts(items=5), policy="greedy", per_rater_cap=4, repeat_rate=0)
    for token in world.invite(study, 6):
        assert world.judge(token, by_number) == 4
        assert world.ask("GET", "next", token).json() == {
            "done": True,
            "later": False,
            "progress": {"done": 4, "most": 4},
        }
    assert len(world.votes(study)) == 24


OWNERS = [
    ("POST", "studies"), ("GET", "studies"), ("GET", "studies/1"), ("POST", "studies/1/outputs"),
    ("POST", "studies/1/open"), ("POST", "studies/1/close"), ("POST", "studies/1/raters"),
    ("POST", "studies/1/exclusions"),
]  # fmt: skip
RATERS = [("GET", "invitation"), ("POST", "consent"), ("GET", "next"), ("POST", "assignments/0/vote")]


def test_each_door_opens_to_its_own_token_alone(world: World) -> None:
    study = world.study(texts())
    (rater,) = world.invite(study)
    world.app.state.rating.turnstile.limit = 10**6
    for method, path in OWNERS + RATERS:
        wrong = {"none": None, "garbage": "x", "unknown": "rt_" + "a" * 43}
        wrong["the other"] = rater if (method, path) in OWNERS else OWNER
        for name, token in wrong.items():
            body = {} if method == "POST" and path != "studies/1/outputs" else None
            answer = world.ask(method, path, token, json=body)
            assert answer.status_code == 401, (name, method, path, answer.text)
            assert set(answer.json()) >= SHAPE
            assert answer.headers["www-authenticate"] == "Bearer"
    # Every documented route is one of these, or open to all.
    described = world.ask("GET", "/openapi.json").json()["paths"]
    open_to_all = {"/studies/{study}/stats", "/studies/{study}/export", "/media/{opaque}"}
    known = {path.replace("studies/1", "studies/{study}").replace("0", "{assignment}") for _, path in OWNERS + RATERS}
    assert {path.removeprefix(API) for path in described} == open_to_all | {f"/{path}" for path in known}


def test_guessing_is_slowed_down(world: World) -> None:
    world.app.state.rating.turnstile.limit = 5
    for token in ("x", "rt_" + "a" * 43):
        codes = [world.ask("GET", path, token).status_code for path in ["next", "studies"] * 4]
    assert codes == [429] * 8


def test_no_other_site_can_vote_for_somebody(world: World) -> None:
    """What a browser sends along by itself, from a form on another site, opens nothing: there are no cookies."""
    study = world.study(texts())
    (token,) = world.invite(study)
    given = world.ask("GET", "next", token).json()
    form = f"nonce={given['nonce']}&choice=left"
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"):
        headers = {"Content-Type": kind, "Origin": "https://evil.example"}
        answer = world.ask("POST", "assignments/0/vote", headers=headers, content=form)
        assert answer.status_code == 401
    headers = {"Content-Type": "text/plain"}
    assert world.ask("POST", "assignments/0/vote", token, headers=headers, content=form).status_code == 422
    preflight = world.ask("OPTIONS", "next", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in preflight.headers


def test_headers_limits_and_pages_of_refusals(world: World) -> None:
    for path in ("/rate", "/studies", f"{API}/next", "/static/rate.js", "/nowhere"):
        headers = world.ask("GET", path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    answer = world.ask("POST", "studies", OWNER, content=b"{" + b" " * (1 << 20) + b"}")
    assert (answer.status_code, answer.json()["error"]) == (413, "too_large")
    page = world.ask("GET", "/studies/99", headers={"Accept": "text/html"})
    assert (page.status_code, "There is nothing here" in page.text) == (404, True)
    assert world.ask("GET", "/").headers["location"] == "/studies"


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"name": ""}, "name"), ({"name": " a"}, "name"), ({"question": "a\0b"}, "question"),
        ({"modality": "smell"}, "modality"), ({"raters_per_pair": 0}, "raters_per_pair"),
        ({"gold_rate": 0.5}, "gold_rate"), ({"min_watch": 0.5}, "min_watch is for videos"),
        ({"anchor_only": True}, "wants an anchor"), ({"prereg": {"rules": {"max_gold": 1}}}, "max_gold_failures"),
        ({"prereg": {"rules": {"max_hasty": 0.1}}}, "min_dwell_ms beside it"), ({"colour": 1}, "colour"),
        ({"prereg": {"rules": {"min_fit_z": "low"}}}, "rules"),
    ],
)  # fmt: skip
def test_a_design_that_cannot_be_is_refused_by_name(world: World, wanted, named: str) -> None:
    body = {"name": "s", "question": "Which?", "modality": "text"} | wanted
    answer = world.ask("POST", "studies", OWNER, json=body)
    assert answer.status_code == 422
    assert named in answer.json()["detail"]


def test_two_studies_have_two_names(world: World) -> None:
    world.draft(texts())
    answer = world.ask("POST", "studies", OWNER, json={"name": "s", "question": "Which?", "modality": "text"})
    assert (answer.status_code, answer.json()["error"]) == (409, "name_taken")


def test_outputs_are_handed_in_again_without_doubling_and_not_changed(world: World) -> None:
    study = world.draft(texts(items=2))
    assert world.hand_in(study, texts(items=3)) == {"added": 2, "known": 4}
    changed = texts(items=1)[:1]
    changed[0]["text"] = "another"

    def refused(records):
        answer = world.ask("POST", f"studies/{study}/outputs", OWNER, files={"records": jsonl(records)})
        assert answer.status_code >= 400
        return answer.json()["error"], answer.json()["detail"]

    assert refused(changed) == (
        "differs", "output of 'alpha' for 'question-0': expected the content that is there, got another content.",
    )  # fmt: skip
    named = "output of 'alpha' for 'question-0': expected the {0} that is there, got another {0}."
    assert refused([texts()[0] | {"features": {"words": 3}}]) == ("differs", named.format("features"))
    assert refused([texts()[0] | {"gold": "better"}]) == ("differs", named.format("gold"))
    assert refused([texts()[0] | {"prompt": "Something else?"}])[0] == "differs"
    assert refused([{"item": "x", "system": "a", "file": "a.png"}])[0] == "wrong_kind"
    assert refused([{"item": "x", "system": "a"}]) == (
        "bad_record", "records, line 1: expected Value error, either text or file, got {'item': 'x', 'system': 'a'}.",
    )  # fmt: skip
    assert refused([{"item": "x", "system": "a", "text": "t", "size": 3}])[1].startswith("records, line 1, size:")
    answer = world.ask("POST", f"studies/{study}/outputs", OWNER, files={"records": b"\x80\x04]"})
    assert answer.json()["error"] == "bad_record"
    assert world.ask("POST", f"studies/{study}/outputs", OWNER, files={"records": b""}).json()["error"] == "bad_records"
    assert world.ask("POST", f"studies/{study}/outputs", OWNER).json()["error"] == "bad_records"
    world.own("POST", f"studies/{study}/open")
    assert refused(texts())[0] == "study_not_draft"


@pytest.mark.parametrize(
    ("records", "design", "error"),
    [
        (texts(("a",)), {}, "no_pairs"),
        (texts(items=0, gold=2), {}, "no_pairs"),
        ([*texts(items=1), {"item": "question-0", "system": "c", "text": "1", "gold": "better"}], {}, "bad_gold"),
        (texts(items=1), {"anchor": "teacher", "anchor_only": True}, "no_anchor"),
        (texts(items=1), {"anchor": "alhpa"}, "no_anchor"),
        (texts(items=1, gold=1), {"anchor": "good"}, "no_anchor"),
        ([*texts(items=1), {"item": "question-0", "system": "c", "text": "1", "features": {"x": 1}}], {},
         "features_differ"),
    ],
)  # fmt: skip
def test_a_study_that_compares_nothing_is_not_opened(world: World, records, design, error: str) -> None:
    study = world.draft(records, **design)
    answer = world.ask("POST", f"studies/{study}/open", OWNER)
    assert (answer.status_code, answer.json()["error"]) == (422, error)
    assert world.own("GET", f"studies/{study}")["state"] == "draft"


def test_who_has_nothing_left_is_told_whether_something_may_come_back(slow_world: World, clock: Clock) -> None:
    world = slow_world
    study = world.study(texts(items=1), patience_s=60, raters_per_pair=1, repeat_rate=0)
    first, second = world.invite(study, 2)
    assert "nonce" in world.ask("GET", "next", first).json()
    assert world.ask("GET", "next", second).json() == {
        "done": True,
        "later": True,
        "progress": {"done": 0, "most": 100},
    }
    clock.seconds += 61
    assert world.judge(second, by_number) == 1
    for token in (first, second):
        given = world.ask("GET", "next", token).json()
        assert (given["done"], given["later"]) == (True, False)


def test_only_pairs_with_the_anchor(world: World) -> None:
    study = world.draft(texts(("teacher", "one", "two"), items=2), anchor="teacher", anchor_only=True)
    assert world.own("POST", f"studies/{study}/open")["pairs"] == {"real": 4, "gold": 0}
    assert world.ask("POST", f"studies/{study}/open", OWNER).status_code == 409


def test_raters_who_come_at_once_judge_each_pair_as_often_as_wanted(both_worlds: World) -> None:
    world = both_worlds
    study = world.study(texts(items=12), raters_per_pair=2, repeat_rate=0)
    tokens = world.invite(study, 6)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda token: world.judge(token, by_number), tokens))
    votes = world.votes(study)
    assert Counter(vote["pair"] for vote in votes).most_common()[-1][1] == 2
    assert len(votes) == 24
    assert len({(vote["pair"], vote["rater"]) for vote in votes}) == 24


def test_one_vote_though_it_is_sent_many_times_at_once(both_worlds: World) -> None:
    world = both_worlds
    study = world.study(texts(items=1), raters_per_pair=1)
    (token,) = world.invite(study)
    given = world.ask("GET", "next", token).json()
    bodies = [{"nonce": given["nonce"], "choice": choice} for choice in ("left", "right") * 6]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda body: world.ask("POST", "assignments/0/vote", token, json=body), bodies))
    (kept,) = world.votes(study)
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == (200 if body["choice"] == kept["choice"] else 409), answer.text


@pytest.mark.parametrize("statement", ["UPDATE votes SET choice = 'tie'", "DELETE FROM votes"])
def test_the_database_refuses_to_change_a_vote(both_worlds: World, statement: str) -> None:
    world = both_worlds
    study = world.study(texts(items=2))
    world.judge(world.invite(study)[0], by_number)
    before = world.votes(study)

    def change() -> None:
        with world.app.state.rating.database.write() as session:
            session.execute(text(statement))

    with pytest.raises(DBAPIError, match="never changed"):
        change()
    assert world.votes(study) == before


def test_model_text_reaches_the_page_as_data(world: World) -> None:
    """Script, unbalanced Markdown, marks that turn the direction of writing, a megabyte: all of it is only text."""
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)> **open [x](javascript:alert(1)) \u202edcba\u2066"
    records = [
        {"item": "i", "system": system, "prompt": hostile, "text": hostile + content}
        for system, content in (("<b>a</b>", "x" * 900_000), ("b", ""))
    ]
    study = world.study(records, question=hostile, name="<i>s</i>")
    (token,) = world.invite(study)
    given = world.ask("GET", "next", token)
    assert given.headers["content-type"] == "application/json"
    assert {given.json()[side]["text"][:80] for side in ("left", "right")} == {hostile[:80]}
    world.judge(token, lambda _: "left")
    world.own("POST", f"studies/{study}/close")
    for path in ("/studies", f"/studies/{study}"):
        page = world.ask("GET", path).text
        assert "<script>alert" not in page
        assert not re.search(r"<(img|i)[ >]|<b><b>a", page.split("<main")[1])
