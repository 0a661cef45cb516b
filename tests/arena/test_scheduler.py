"""Leases, fences, faults, turns: the promises of the scheduler, one by one, on both databases."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import pytest
from arena_world import BENCHMARK, DONE, FAULT, LEFT, VirtualClock, lease, play, submit, who
from sqlalchemy import func, select

from offbook.arena import submissions, trials
from offbook.arena.database import Database
from offbook.arena.tables import Attempt, Benchmark, Event, Result, Robot, Submission, Trial, User
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


def test_a_trial_goes_from_the_queue_to_a_result(database: Database) -> None:
    with database.write() as session:
        submission = submit(session, kind="anchor", anchor="expert")
        given = lease(session)
        assert given["fence"] == 1
        assert given["attempt"] == 1
        assert given["scene"] == {"mark": given["seed"] - 100}
        assert given["policy"] == {"kind": "anchor", "anchor": "expert"}
        answer = play(session, given)
        assert answer == {"trial": given["trial"], "fence": 1, "state": "done", "attempt": 1}
        assert session.scalars(select(Result)).one().score == 0.5
        for _ in range(3):
            play(session, lease(session))
        assert lease(session) is None
        assert submission.state == "done"
        assert (submission.n, submission.score, submission.successes) == (4, 0.5, 4)


def test_a_lease_tells_nothing_of_who_submitted(database: Database) -> None:
    with database.write() as session:
        submission = submit(session, "ada", kind="anchor", anchor="random", name="secret name", method="secret method")
        text = repr(lease(session))
        assert "ada" not in text
        assert "secret" not in text
        assert "'submission" not in text
        labels = session.scalars(select(Trial.blind_label).where(Trial.submission_id == submission.id)).all()
        assert len(set(labels)) == len(labels) == 4


def test_the_order_was_promised_before_the_run(database: Database) -> None:
    with database.write() as session:
        submission = submit(session, kind="anchor", anchor="expert")
        order = session.scalars(
            select(Trial.slot).where(Trial.submission_id == submission.id).order_by(Trial.position)
        ).all()
        assert sorted(order) == [0, 1, 2, 3]
        assert submissions.commitment(order, submission.nonce) == submission.commitment
        played = []
        while given := lease(session):
            played.append(session.get_one(Trial, given["trial"]).slot)
            play(session, given)
        assert played == order


def test_all_submissions_of_a_split_meet_the_same_scenes_and_seeds(database: Database) -> None:
    with database.write() as session:
        first, second = (submit(session, user) for user in ("ada", "bob"))
        cases = [
            session.execute(
                select(Trial.pair_id, Trial.seed, Trial.slot)
                .where(Trial.submission_id == submission.id)
                .order_by(Trial.slot)
            ).all()
            for submission in (first, second)
        ]
        assert cases[0] == cases[1]
        other = submit(session, split="far")
        seeds = session.scalars(select(Trial.seed).where(Trial.submission_id == other.id)).all()
        assert sorted(seeds) == [200, 201, 202, 203]


def test_a_robot_fault_runs_the_same_case_again_and_the_third_needs_a_person(database: Database) -> None:
    with database.write() as session:
        submit(session, kind="anchor", anchor="expert", trials=1)
        seen = []
        for state in ("queued", "queued", "needs_human"):
            given = lease(session)
            seen.append((given["trial"], given["scene"], given["seed"]))
            assert play(session, given, FAULT)["state"] == state
        assert len({str(case) for case in seen}) == 1
        assert lease(session) is None
        attempts = session.scalars(select(Attempt).order_by(Attempt.n)).all()
        assert [(a.n, a.outcome, a.reason) for a in attempts] == [(n, "robot_fault", "camera lost") for n in (1, 2, 3)]
        assert session.scalars(select(Submission)).one().state == "open"
        trials.requeue(session, seen[0][0])
        assert play(session, lease(session))["attempt"] == 4
        with pytest.raises(RefusedError, match="is done"):
            trials.requeue(session, seen[0][0])


def test_a_fault_of_the_policy_scores_the_worst_and_is_never_run_again(database: Database) -> None:
    with database.write() as session:
        submission = submit(session, kind="anchor", anchor="expert", trials=1)
        given = lease(session)
        assert play(session, given, LEFT)["state"] == "policy_fault"
        result = session.scalars(select(Result)).one()
        assert (result.score, result.success, result.outcome) == (0.0, False, "policy_fault")
        assert submission.state == "done"
        assert lease(session) is None


@pytest.mark.parametrize("state", ["leased", "running"])
def test_a_lease_that_runs_out_is_a_robot_fault(database: Database, clock: VirtualClock, state: str) -> None:
    with database.write() as session:
        submit(session, kind="anchor", anchor="expert", trials=1)
        given = lease(session)
        if state == "running":
            trials.start(session, given["trial"], given["fence"])
    clock.seconds += 14
    with database.write() as session:
        trials.heartbeat(session, given["trial"], given["fence"])
    clock.seconds += 14.9
    with database.write() as session:
        assert trials.reap(session) == 0
    clock.seconds += 0.2
    with database.write() as session:
        with pytest.raises(RefusedError, match="stop the robot"):
            trials.heartbeat(session, given["trial"], given["fence"])
        assert trials.reap(session) == 1
        again = lease(session, "arm-2")
        assert (again["trial"], again["fence"], again["seed"]) == (given["trial"], 2, given["seed"])
        first = session.scalars(select(Attempt).where(Attempt.n == 1)).one()
        assert first.outcome == "robot_fault"
        assert "worker lost" in first.reason


def test_whatever_a_stale_worker_sends_is_refused_with_the_current_fence(
    database: Database, clock: VirtualClock
) -> None:
    with database.write() as session:
        submit(session, kind="anchor", anchor="expert", trials=1)
        old = lease(session)
        trials.start(session, old["trial"], old["fence"])
    clock.seconds += 60
    with database.write() as session:
        new = lease(session, "arm-2")
        for act in (
            lambda: trials.start(session, old["trial"], old["fence"]),
            lambda: trials.heartbeat(session, old["trial"], old["fence"]),
            lambda: trials.end(session, old["trial"], old["fence"], DONE),
            lambda: trials.end(session, old["trial"], old["fence"], FAULT),
            lambda: trials.end(session, old["trial"], 99, DONE),
        ):
            with pytest.raises(RefusedError) as caught:
                act()
            assert caught.value.status == 409
            assert caught.value.body()["fence"] == new["fence"] == 2
        assert session.scalars(select(Result)).all() == []
        play(session, new)


def test_the_same_report_again_gets_the_same_answer_and_another_is_refused(database: Database) -> None:
    with database.write() as session:
        submit(session, kind="anchor", anchor="expert", trials=2)
        given = lease(session)
        assert trials.start(session, given["trial"], 1) == trials.start(session, given["trial"], 1)
        answers = [trials.end(session, given["trial"], 1, DONE) for _ in range(3)]
        assert answers[0] == answers[1] == answers[2]
        with pytest.raises(RefusedError):
            trials.end(session, given["trial"], 1, trials.Report(outcome="done", score=1.0))
        given = lease(session)
        answers = [trials.end(session, given["trial"], 1, FAULT) for _ in range(2)]
        assert answers[0] == answers[1]
        assert session.scalar(select(func.count(Result.id))) == 1
        assert session.scalar(select(Trial.faults).where(Trial.id == given["trial"])) == 1


def test_a_trial_that_was_not_started_cannot_be_done(database: Database) -> None:
    with database.write() as session:
        submit(session, kind="anchor", anchor="expert", trials=1)
        given = lease(session)
        with pytest.raises(RefusedError, match="is leased"):
            trials.end(session, given["trial"], 1, DONE)


def test_released_before_the_start_costs_no_fault_and_after_it_is_refused(database: Database) -> None:
    released = trials.Report(outcome="released", reason="the worker stops")
    with database.write() as session:
        submit(session, kind="anchor", anchor="expert", trials=1)
        for _ in range(5):
            given = lease(session)
            assert trials.end(session, given["trial"], given["fence"], released)["state"] == "queued"
        given = lease(session)
        trials.start(session, given["trial"], given["fence"])
        with pytest.raises(RefusedError):
            trials.end(session, given["trial"], given["fence"], released)


def test_one_robot_holds_one_trial(database: Database, clock: VirtualClock) -> None:
    with database.write() as session:
        for user in ("ada", "bob"):
            submit(session, user, kind="anchor", anchor="expert")
        given = lease(session, "arm-1", instance="first")
    with pytest.raises(RefusedError, match="15 more seconds"), database.write() as session:
        lease(session, "arm-1", instance="second")
    clock.seconds += 16
    with database.write() as session:
        again = lease(session, "arm-1", instance="second")
        assert again is not None
        # The same process asks again: whatever it held, its arm stands still.
        assert lease(session, "arm-1", instance="second") is not None
        outcomes = Counter(session.scalars(select(Attempt.outcome)))
        assert outcomes == {"robot_fault": 2, None: 1}
    assert given is not None


def test_one_trial_of_a_submission_runs_at_a_time(database: Database) -> None:
    with database.write() as session:
        submit(session, kind="anchor", anchor="expert")
        assert lease(session, "arm-1") is not None
        assert lease(session, "arm-2") is None


def test_a_remote_policy_is_served_only_while_it_is_connected(database: Database) -> None:
    with database.write() as session:
        remote = submit(session)
        assert lease(session) is None
        assert lease(session, connected=[remote.id + 1]) is None
        assert lease(session, connected=[remote.id]) is not None


def test_another_kind_of_robot_gets_nothing_and_keeps_its_name(database: Database) -> None:
    with database.write() as session:
        submit(session, kind="anchor", anchor="expert")
        assert lease(session, "boat-1", robot_class="boat") is None
        with pytest.raises(RefusedError, match="another name"):
            lease(session, "boat-1")


def test_users_take_turns_and_recent_use_weighs(database: Database, clock: VirtualClock) -> None:
    with database.write() as session:
        for user in ("ada", "ada", "ada", "bob"):
            submit(session, user, kind="anchor", anchor="expert")
    served: list[str] = []
    for _ in range(8):
        with database.write() as session:
            given = lease(session)
            owner = select(User.name).join(Submission).join(Trial).where(Trial.id == given["trial"])
            served.append(session.scalars(owner).one())
            trials.start(session, given["trial"], given["fence"])
            clock.seconds += 10
            trials.end(session, given["trial"], given["fence"], DONE)
    assert Counter(served) == {"ada": 4, "bob": 4}
    assert served[:4] in (["ada", "bob"] * 2, ["ada", "bob", "bob", "ada"])
    # Somebody new neither waits behind them nor gets all the time they had not asked for before.
    with database.write() as session:
        submit(session, "eve", kind="anchor", anchor="expert")
        submit(session, "bob", kind="anchor", anchor="expert")
    later = []
    for _ in range(6):
        with database.write() as session:
            given = lease(session)
            owner = select(User.name).join(Submission).join(Trial).where(Trial.id == given["trial"])
            later.append(session.scalars(owner).one())
            play(session, given)
    assert Counter(later)["eve"] in (2, 3)
    assert set(later) == {"ada", "bob", "eve"}


def owner_of(session, given: dict) -> str:
    return session.scalars(select(User.name).join(Submission).join(Trial).where(Trial.id == given["trial"])).one()


@pytest.mark.parametrize(("days", "share"), [(0, (1, 2)), (8, (4, 6))])
def test_who_used_much_robot_time_in_the_last_week_has_a_smaller_share(
    database: Database, clock: VirtualClock, days: int, share: tuple[int, int]
) -> None:
    with database.write() as session:
        submit(session, "ada", kind="anchor", anchor="expert", trials=1)
        given = lease(session)
        trials.start(session, given["trial"], given["fence"])
        # Six hours of robot time: her weight is a seventh of somebody's who has used none.
        for _ in range(6 * 360):
            clock.seconds += 10
            trials.heartbeat(session, given["trial"], given["fence"])
        trials.end(session, given["trial"], given["fence"], DONE)
    clock.seconds += days * 86400
    with database.write() as session:
        for user in ("ada", "bob"):
            for _ in range(3):
                submit(session, user, kind="anchor", anchor="expert", split="long")
        # What she ran is in the tags of her last attempt; she starts level with him.
        first = [owner_of(session, lease(session, f"arm-{i}")) for i in range(2)]
        assert len(set(first)) == 2 or first == ["bob", "bob"]
        served = Counter(first)
        for arm in ("arm-0", "arm-1") * 4:
            held = session.scalars(select(Trial).join(Robot, Robot.id == Trial.robot_id).where(Robot.name == arm)
                                   .where(Trial.state == "leased")).one_or_none()  # fmt: skip
            if held is not None:
                play(session, {"trial": held.id, "fence": held.fence})
            served[owner_of(session, lease(session, arm))] += 1
        assert share[0] <= served["ada"] <= share[1], served


def test_quotas_count_trials_of_a_day_and_withdrawn_ones_do_not_count(database: Database, clock: VirtualClock) -> None:
    with database.write() as session:
        ada = who(session, "ada", "submit")
        session.scalars(select(User).where(User.name == "ada")).one().daily_trials = 6
        request = submissions.Request(benchmark="reach", name="a", kind="remote")
        first = submissions.accept(session, ada, request)
        with pytest.raises(RefusedError, match="4 used and 4 more"):
            submissions.accept(session, ada, request)
        assert submissions.cancel(session, first) == 4
        submissions.accept(session, ada, request)
    clock.seconds += 86401
    with database.write() as session:
        submissions.accept(session, ada, request)
        session.scalars(select(User).where(User.name == "ada")).one().daily_trials = 100
        session.scalars(select(Benchmark)).one().daily_trials = 6
        with pytest.raises(RefusedError, match="on reach: expected at most 6, got 4 used and 4 more"):
            submissions.accept(session, ada, request)


def test_cancelling_stops_what_waits_and_lets_the_moving_arm_finish(database: Database) -> None:
    with database.write() as session:
        submission = submit(session, kind="anchor", anchor="expert")
        moving = lease(session)
        trials.start(session, moving["trial"], moving["fence"])
        assert submissions.cancel(session, submission) == 3
        assert trials.end(session, moving["trial"], moving["fence"], DONE)["state"] == "done"
        assert submission.state == "cancelled"
        assert submissions.cancel(session, submission) == 0
        other = submit(session, kind="anchor", anchor="expert")
        waiting = lease(session)
        assert submissions.cancel(session, other) == 4
        with pytest.raises(RefusedError, match="is cancelled"):
            trials.start(session, waiting["trial"], waiting["fence"])
        assert session.scalars(select(Attempt).where(Attempt.ended.is_(None))).all() == []


def test_a_fault_after_the_withdrawal_is_not_run_again(database: Database) -> None:
    with database.write() as session:
        submission = submit(session, kind="anchor", anchor="expert")
        moving = lease(session)
        trials.start(session, moving["trial"], moving["fence"])
        submissions.cancel(session, submission)
        assert trials.end(session, moving["trial"], moving["fence"], FAULT)["state"] == "cancelled"


def test_withdrawing_while_the_last_trial_moves_is_not_forgotten(database: Database) -> None:
    with database.write() as session:
        submission = submit(session, kind="anchor", anchor="expert", trials=1)
        moving = lease(session)
        trials.start(session, moving["trial"], moving["fence"])
        assert submissions.cancel(session, submission) == 0
        assert submission.state == "cancelled"
        assert trials.end(session, moving["trial"], moving["fence"], FAULT)["state"] == "cancelled"
        assert lease(session) is None


def test_a_full_disk_pauses_the_trial(database: Database) -> None:
    with database.write() as session:
        submit(session, kind="anchor", anchor="expert", trials=1)
        answer = play(session, lease(session), trials.Report(outcome="needs_storage", reason="no space left"))
        assert answer["state"] == "needs_storage"
        trials.requeue(session, answer["trial"])
        assert play(session, lease(session))["state"] == "done"


@pytest.mark.parametrize(
    "request_",
    [
        {"kind": "remote", "name": ""},
        {"kind": "remote", "name": "x" * 81},
        {"kind": "remote", "name": "a\nb"},
        {"kind": "zip"},
        {"kind": "checkpoint"},
        {"kind": "checkpoint", "blob": "0" * 64},
        {"kind": "anchor", "anchor": "mine"},
        {"kind": "remote", "benchmark": "none"},
        {"kind": "remote", "split": "none"},
        {"kind": "remote", "trials": 0},
    ],
)
def test_unusable_submissions_leave_nothing_behind(database: Database, request_: dict) -> None:
    with pytest.raises(RefusedError) as caught, database.write() as session:
        submit(session, **request_)
    assert caught.value.status in (404, 422)
    with database.read() as session:
        assert session.scalars(select(Submission)).all() == []
        assert session.scalars(select(Event)).all() == []


def test_a_policy_that_sits_here_is_reached_at_this_servers_own_address(database: Database) -> None:
    with database.write() as session:
        entry = submit(session)
        given = lease(session, "arm-1", connected=[entry.id], home="http://10.0.0.5:8000")
        assert given["policy"]["relay"] == "http://10.0.0.5:8000"
        trials.end(session, given["trial"], given["fence"], trials.Report(outcome="released"))
        assert "relay" not in lease(session, "arm-1", connected=[entry.id])["policy"]


def test_a_changed_protocol_is_a_new_version(database: Database) -> None:
    with database.write() as session:
        same = submissions.define_benchmark(session, BENCHMARK)
        words = {"title": "Reach out", "trial_seconds": 77.0, "daily_trials": 3}
        assert submissions.define_benchmark(session, replace(BENCHMARK, **words)).id == same.id
        session.flush()
        session.expire_all()
        found = submissions.find_benchmark(session, "reach")
        assert {name: getattr(found, name) for name in words} == words
        changed = submissions.BenchmarkSpec(
            name="reach", title="Reach", task="reach", metric="1", robot_class="arm",
            splits={"seen": [{"scene": {}, "seed": 1}]},
        )  # fmt: skip
        assert submissions.define_benchmark(session, changed).version == same.version + 1
        assert submissions.find_benchmark(session, "reach").version == 2


def test_many_workers_at_once_never_share_a_trial(make_database) -> None:
    database = make_database()
    with database.write() as session:
        who(session, "lab")
        submissions.define_benchmark(session, BENCHMARK)
        for user in ("ada", "bob", "eve"):
            for _ in range(3):
                submit(session, user, kind="anchor", anchor="expert")
    seen: list[int] = []
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            while True:
                with database.write() as session:
                    given = lease(session, name)
                if given is None:
                    with database.read() as session:
                        if session.scalar(select(func.count(Trial.id)).where(Trial.state == "queued")) == 0:
                            return
                    continue
                with database.write() as session:
                    trials.start(session, given["trial"], given["fence"])
                with database.write() as session:
                    trials.end(session, given["trial"], given["fence"], DONE)
                seen.append(given["trial"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"arm-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert sorted(seen) == sorted(set(seen))
    assert len(seen) == 36
    with database.read() as session:
        assert session.scalar(select(func.count(Result.id))) == 36
        assert set(session.scalars(select(Attempt.outcome))) == {"done"}
