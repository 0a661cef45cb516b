"""Two policies on the same scenes, one after the other; benchmarks that want another one first; stopped robots."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from arena_world import BENCHMARK, DONE, FAULT, LEFT, VirtualClock, lease, play, submit, submit_pair, who
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from offbook.arena import submissions, trials, views
from offbook.arena.database import Database
from offbook.arena.pairs import GIVEN_BACK, KEPT_SECONDS
from offbook.arena.tables import Attempt, Blob, Robot, Submission, Trial
from offbook.client.submit import kept_promise
from offbook.service.refusal import RefusedError

pytestmark = pytest.mark.service


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def database(make_database, clock: VirtualClock) -> Database:
    database = make_database(clock)
    with database.write() as session:
        submissions.define_benchmark(session, BENCHMARK)
    return database


def trial_of(session: Session, given: dict) -> Trial:
    return session.get_one(Trial, given["trial"])


def test_the_halves_of_a_pair_run_one_after_the_other_on_one_robot_in_the_promised_order(database: Database) -> None:
    with database.write() as session:
        first, second = submit_pair(session)
        # Somebody with less robot time waits: a pair that has begun is ended all the same.
        submit(session, "bob", kind="anchor", anchor="expert")
    ran = []
    given: dict | None = {}
    while given is not None:
        with database.write() as session:
            given = lease(session, "arm-1")
            if given is None:
                break
            trial = trial_of(session, given)
            ran.append((trial.submission_id, trial.slot, str(trial.scene), trial.seed, trial.blind_label))
            # Whoever else asks gets nothing of these two.
            other = lease(session, "arm-2")
            assert other is None or trial_of(session, other).submission_id not in (first, second)
            if other is not None:
                play(session, other)
            play(session, given)
    ours = [each for each in ran if each[0] in (first, second)]
    assert len(ours) == 8
    for one, two in zip(ours[::2], ours[1::2], strict=True):
        assert ran[ran.index(one) + 1] == two
        assert one[1:4] == two[1:4]
        assert {one[0], two[0]} == {first, second}
        assert {one[4], two[4]} == {"policy A", "policy B"}
    with database.read() as session:
        seen = [views.submission(session, entry, [], "") for entry in (first, second)]
    assert seen[0]["commitment"] == seen[1]["commitment"]
    assert [kept_promise(view) for view in seen] == [True, True]
    assert [(slot, (first, second)[side], letter) for slot, side, letter in seen[0]["opened"]["order"]] == [
        (each[1], each[0], each[4][-1]) for each in ours
    ]
    forged = seen[0] | {"opened": seen[0]["opened"] | {"order": seen[0]["opened"]["order"][::-1]}}
    assert kept_promise(forged) is False


def test_the_order_is_told_when_both_have_ended_and_not_before(database: Database) -> None:
    with database.write() as session:
        entries = submit_pair(session, trials=1)
        play(session, lease(session))
        assert sorted(session.get_one(Submission, entry).state for entry in entries) == ["done", "open"]
        for entry in entries:
            assert views.submission(session, entry, [], "")["opened"] is None
        play(session, lease(session))
        for entry in entries:
            assert kept_promise(views.submission(session, entry, [], ""))


def test_sides_and_letters_are_drawn_anew_for_each_scene(database: Database, monkeypatch) -> None:
    monkeypatch.setattr(submissions, "_LOT", random.Random(0))
    firsts, letters = [], []
    with database.write() as session:
        for _ in range(20):
            entries = submit_pair(session)
            rows = session.scalars(select(Trial).where(Trial.submission_id.in_(entries)).order_by(Trial.position)).all()
            firsts += [rows[i].submission_id == entries[0] for i in range(0, 8, 2)]
            letters += [rows[i].blind_label == "policy A" for i in range(0, 8, 2)]
    # 80 fair coins: both counts lie between 25 and 55 in all but one case in 2,000; neither tells the other.
    for coins in (firsts, letters, [a == b for a, b in zip(firsts, letters, strict=True)]):
        assert 25 <= sum(coins) <= 55


@pytest.mark.parametrize("report", [DONE, LEFT])
def test_the_second_half_waits_for_its_robot_as_long_as_that_is_there(
    database: Database, clock: VirtualClock, report: trials.Report
) -> None:
    with database.write() as session:
        submit_pair(session, trials=2)
        given = lease(session, "arm-1")
        pair = trial_of(session, given).pair_id
        play(session, given, report)
        assert lease(session, "arm-2") is None
    clock.seconds += KEPT_SECONDS + 1
    with database.write() as session:
        assert trial_of(session, lease(session, "arm-2")).pair_id == pair


def test_a_robot_fault_repeats_the_half_and_a_half_that_waits_keeps_only_its_own_pair(database: Database) -> None:
    with database.write() as session:
        submit_pair(session, trials=2)
        halves = []
        for state in ("queued", "queued", "needs_human"):
            halves.append(lease(session, "arm-1"))
            assert play(session, halves[-1], FAULT)["state"] == state
        assert len({given["trial"] for given in halves}) == 1
        stuck = trial_of(session, halves[0])
        rest = [trial_of(session, given) for given in iter(lambda: played(session), None)]
        assert [each.pair_id == stuck.pair_id for each in rest] == [False, False]
        trials.requeue(session, stuck.id)
        rest = [trial_of(session, given) for given in iter(lambda: played(session), None)]
        assert [each.pair_id for each in rest] == [stuck.pair_id] * 2
        assert {session.get_one(Submission, each.submission_id).state for each in rest} == {"done"}


def played(session: Session) -> dict | None:
    """The next trial of arm-1, played."""
    given = lease(session, "arm-1")
    if given is not None:
        play(session, given)
    return given


def test_a_pair_of_remote_policies_begins_when_both_are_there(database: Database) -> None:
    with database.write() as session:
        first, second = submit_pair(session, "remote", "remote", trials=1)
        assert lease(session, connected=[first]) is None
        assert lease(session, connected=[second]) is None
        given = lease(session, connected=[first, second])
        begun = trial_of(session, given).submission_id
        play(session, given)
        # The one that has played may leave.
        assert lease(session, connected=[begun]) is None
        other = lease(session, connected=[second if begun == first else first])
        assert trial_of(session, other).submission_id != begun


def test_withdrawing_one_withdraws_both(database: Database) -> None:
    with database.write() as session:
        first, second = submit_pair(session)
        assert submissions.cancel(session, session.get_one(Submission, second)) == 8
        assert {session.get_one(Submission, entry).state for entry in (first, second)} == {"cancelled"}
        assert lease(session) is None


def test_the_quota_counts_both(database: Database) -> None:
    with database.write() as session:
        user = session.get_one(Submission, submit_pair(session)[0]).user
        requests = [submissions.Request(benchmark="reach", name=str(i), kind="remote") for i in range(2)]
        principal = who(session, "ada", "submit")
        user.daily_trials = 15
        with pytest.raises(RefusedError, match="8 used and 8 more"):
            submissions.accept_pair(session, principal, *requests)


def test_a_pair_is_sent_whole_and_each_half_names_the_other(client) -> None:
    body = {"benchmark": "reach", "kind": "anchor", "trials": 2}
    entries = [body | {"name": f"the {anchor}", "anchor": anchor} for anchor in ("expert", "random")]
    answer = client.ask("POST", "/v1/pairs", "admin", json={"entries": entries})
    assert answer.status_code == 201
    first, second = answer.json()["entries"]
    assert first["rival"] == {"submission": second["id"], "name": "the random"}
    sent = {"robot": "arm", "worker": "arm-1", "instance": "a", "capabilities": {}}
    given = client.ask("POST", "/v1/leases", "lab", json=sent)
    assert given.json()["blind_label"] in ("policy A", "policy B")
    assert not any(entry["name"] in given.text for entry in entries)
    for wrong in ([entries[0]], [*entries, entries[0]], [entries[0], entries[1] | {"trials": 1}]):
        assert client.ask("POST", "/v1/pairs", "admin", json={"entries": wrong}).status_code == 422
    assert "Compared with" in client.ask("GET", f"/submissions/{first['id']}").text


REAL = replace(BENCHMARK, name="reach-real", robot_class="real-arm", prestage="reach", prestage_score=0.6)


def test_a_real_robot_wants_the_simulated_benchmark_passed_by_the_same_policy(database: Database) -> None:
    def enter(session: Session, **more: object) -> Submission:
        request = {"benchmark": "reach-real", "name": "mine", "kind": "remote"} | more
        return submissions.accept(session, who(session, "ada", "submit"), submissions.Request(**request))

    def simulate(session: Session, score: float, **more: object) -> None:
        entry = enter(session, benchmark="reach", **more)
        while (given := lease(session, connected=[entry.id])) is not None:
            play(session, given, trials.Report(outcome="done", score=score))
        assert entry.state == "done"

    with database.write() as session:
        assert submissions.define_benchmark(session, REAL).version == 1
        assert submissions.define_benchmark(session, REAL).version == 1
        assert submissions.define_benchmark(session, replace(REAL, prestage_score=0.7)).version == 2
        submissions.define_benchmark(session, REAL)
        with pytest.raises(RefusedError, match="no finished submission") as caught:
            enter(session)
        assert (caught.value.status, caught.value.error) == (409, "prestage")
        simulate(session, 0.5)
        with pytest.raises(RefusedError, match=r"0\.6 or more on a whole split of reach, got 0\.5"):
            enter(session)
        simulate(session, 1.0, trials=1)
        with pytest.raises(RefusedError, match=r"got 0\.5"):
            enter(session)
        simulate(session, 0.9, name="another")
        with pytest.raises(RefusedError, match=r"got 0\.5"):
            enter(session)
        simulate(session, 0.9)
        assert enter(session).robot_class == "real-arm"
        user = who(session).user_id
        for name in "ab":
            session.add(Blob(sha256=name * 64, size=1, media_type="x", private=True, user_id=user, created=0.0))
        session.flush()
        simulate(session, 0.9, kind="checkpoint", blob="a" * 64, name="one")
        enter(session, kind="checkpoint", blob="a" * 64, name="another label")
        with pytest.raises(RefusedError, match="no finished"):
            enter(session, kind="checkpoint", blob="b" * 64, name="one")
        submit(session, kind="anchor", anchor="expert", benchmark="reach-real")


def test_a_robot_that_its_operator_stopped_is_given_nothing_and_keeps_no_lease(client) -> None:
    def operate(word: str, role: str = "admin", robot: str = "arm-1"):
        return client.ask("POST", f"/v1/robots/{robot}/{word}", role)

    body = {"benchmark": "reach", "name": "expert", "kind": "anchor", "anchor": "expert"}
    client.ask("POST", "/v1/submissions", "admin", json=body)
    sent = {"robot": "arm", "worker": "arm-1", "instance": "a", "capabilities": {}}
    given = client.ask("POST", "/v1/leases", "lab", json=sent).json()
    assert operate("stop", "lab").status_code == 403
    assert operate("stop", robot="none").status_code == 404
    assert operate("stop").json() == {"robot": "arm-1", "stopped": True}
    beat = client.ask("POST", f"/v1/trials/{given['trial']}/heartbeat", "lab", json={"fence": given["fence"]})
    assert (beat.status_code, beat.json()["error"]) == (409, "robot_stopped")
    fault = {"fence": given["fence"], "kind": "robot_fault", "reason": "stopped"}
    assert client.ask("POST", f"/v1/trials/{given['trial']}/fault", "lab", json=fault).json()["state"] == "queued"
    assert client.ask("POST", "/v1/leases", "lab", json=sent).json()["error"] == "robot_stopped"
    page = client.ask("GET", "/robots/arm-1").text
    assert "stopped by its operator" in page
    assert client.ask("POST", "/v1/leases", "lab", json=sent | {"worker": "arm-2"}).status_code == 200
    assert operate("resume").json()["stopped"] is False
    with client.app.state.arena.database.read() as session:
        assert session.scalar(select(Robot.stopped).where(Robot.name == "arm-1")) is None


def test_a_half_that_its_robot_cannot_begin_does_not_keep_that_robot_for_ever(database: Database) -> None:
    released = trials.Report(outcome="released", reason="the relay did not open")
    with database.write() as session:
        pair = submit_pair(session, trials=1)
        alone = submit(session, "bob", kind="anchor", anchor="expert", trials=1).id
        play(session, lease(session, "arm-1"))
        for _ in range(GIVEN_BACK):
            given = lease(session, "arm-1")
            assert trial_of(session, given).submission_id in pair
            trials.end(session, given["trial"], given["fence"], released)
        # The other submission has its turn at this robot, and another robot may play the half.
        assert trial_of(session, lease(session, "arm-1")).submission_id == alone
        assert trial_of(session, lease(session, "arm-2")).submission_id in pair


def test_a_second_half_out_of_turn_gives_its_owner_no_larger_share(database: Database, clock: VirtualClock) -> None:
    served = []
    with database.write() as session:
        submit(session, "ada", kind="anchor", anchor="expert", trials=1)
        play(session, lease(session))
        # Six hours of robot time: her weight is a seventh of his.
        session.execute(update(Attempt).values(leased=Attempt.leased - 6 * 3600))
        pairs = {entry for _ in range(3) for entry in submit_pair(session, trials=4, user="ada")}
        for _ in range(16):
            submit(session, "bob", kind="anchor", anchor="expert")
        for _ in range(48):
            given = lease(session)
            served.append(trial_of(session, given).submission_id in pairs)
            clock.seconds += 0.01
            play(session, given)
    # An eighth of 48, to a pair.
    assert 4 <= sum(served) <= 8
