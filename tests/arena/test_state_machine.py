"""Whatever users, workers, faults and the clock do in whatever order: the scheduler's promise holds."""

# ruff: noqa: PT017 - a rule may be refused or granted; both ways are checked.
from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from arena_world import BENCHMARK, VirtualClock, lease, submit, submit_pair, who
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select, text

from offbook.arena import submissions, trials
from offbook.arena.database import Database
from offbook.arena.tables import FINAL, IN_FLIGHT, Attempt, Result, Robot, Submission, Table, Trial
from offbook.service.refusal import RefusedError

pytestmark = pytest.mark.service

WORKERS = st.sampled_from(["arm-1", "arm-2", "arm-3"])
KINDS = st.sampled_from(["anchor", "anchor", "remote"])
RECENT = st.integers(0, 3)
OUTCOMES = st.sampled_from(["done", "policy_fault", "robot_fault", "needs_human", "needs_storage", "released"])


# Columns, not objects: the promise is looked at after every step.
TRIALS = select(Trial.id, Trial.submission_id, Trial.robot_id, Trial.state, Trial.attempt, Trial.fence, Trial.scene,
                Trial.seed, Trial.lease_until)  # fmt: skip
ALL = (
    select(Submission.id, Submission.wanted, Submission.state,
           Trial.id, Trial.submission_id, Trial.robot_id, Trial.state,
           Trial.attempt, Trial.fence, Trial.scene, Trial.seed, Result.id, Result.score, Result.attempt, Result.outcome,
           Attempt.n, Attempt.ended, Attempt.outcome)
    .outerjoin(Trial, Trial.submission_id == Submission.id)
    .outerjoin(Result, Result.trial_id == Trial.id)
    .outerjoin(Attempt, Attempt.trial_id == Trial.id)
    .order_by(Submission.id, Trial.id, Attempt.n)
)  # fmt: skip


class Seen(NamedTuple):
    """A trial as the promise looks at it."""

    id: int
    submission_id: int
    robot_id: int | None
    state: str
    attempt: int
    fence: int
    scene: Any
    seed: int


class Tried(NamedTuple):
    """An attempt, likewise."""

    n: int
    ended: float | None
    outcome: str | None


def _recent(things: list[Any], back: int) -> Any:
    """One of the last few, mostly the last: what is live, and now and then what no longer is."""
    return things[-1 - min(back // 2, len(things) - 1)]


def machine(database: Database, clock: VirtualClock) -> type[RuleBasedStateMachine]:
    """The machine on one database, emptied before each example."""
    emptied = itertools.count(1)
    # The promise is looked at after every step: once compiled, and in no more than one way to the database and back.
    everything = str(ALL.compile(dialect=database.engine.dialect))
    reading = database.engine.execution_options(isolation_level="AUTOCOMMIT")

    class Arena(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.entries: list[int] = []
            self.leases: list[tuple[int, int]] = []
            self.connected: set[int] = set()
            self.instances: dict[str, int] = {}
            self.stopped: set[str] = set()
            self.results: dict[int, tuple[Any, ...]] = {}
            self.ended: dict[int, str] = {}
            self.cases: dict[int, tuple[str, int]] = {}
            self.fences: dict[int, int] = {}
            self.answers: dict[tuple[int, int], tuple[trials.Report, dict[str, Any]]] = {}
            with database.write() as session:
                tables = [table.name for table in reversed(Table.metadata.sorted_tables)]
                if database.engine.dialect.name == "postgresql" and next(emptied) % 10 == 0:
                    # It takes its time, but deleted rows stay in the files and would slow down every look at them.
                    session.execute(text(f"TRUNCATE {', '.join(tables)}"))
                deletions = [f"DELETE FROM {name}" for name in tables]
                for statement in deletions if database.engine.dialect.name == "sqlite" else ["; ".join(deletions)]:
                    session.execute(text(statement))
                submissions.define_benchmark(session, BENCHMARK)
                who(session, "lab")
            # Hypothesis leaves some rules out of each history; without these many would have nothing to work on.
            for user in ("ada", "bob"):
                self.submit(user, "anchor", 3, True)
                self.submit(user, "remote", 2, True)
                self.submit_pair(user, ("anchor", "remote"), 2, True)

        @rule(user=st.sampled_from(["ada", "bob"]), kind=KINDS, n=st.integers(1, 3), there=st.booleans())
        def submit(self, user: str, kind: str, n: int, there: bool) -> None:
            with database.write() as session:
                anchor = "expert" if kind == "anchor" else None
                self.entries.append(submit(session, user, kind=kind, anchor=anchor, trials=n).id)
            if there:
                self.connected.add(self.entries[-1])

        @rule(user=st.sampled_from(["ada", "bob"]), kinds=st.tuples(KINDS, KINDS), n=st.integers(1, 2),
              there=st.booleans())  # fmt: skip
        def submit_pair(self, user: str, kinds: tuple[str, str], n: int, there: bool) -> None:
            with database.write() as session:
                both = submit_pair(session, *kinds, trials=n, user=user)
            self.entries += both
            if there:
                self.connected.update(both)

        @precondition(lambda self: self.entries)
        @rule(back=RECENT, there=st.booleans())
        def dial(self, back: int, there: bool) -> None:
            (self.connected.add if there else self.connected.discard)(_recent(self.entries, back))

        @rule(worker=WORKERS)
        def lease(self, worker: str) -> None:
            self._lease(worker)

        def _lease(self, worker: str) -> bool:
            instance = str(self.instances.get(worker, 0))
            try:
                with database.write() as session:
                    given = lease(session, worker, instance=instance, connected=self.connected)
                    if given is None:
                        return False
                    trial = session.get_one(Trial, given["trial"])
                    submission = session.get_one(Submission, trial.submission_id)
                    assert submission.kind != "remote" or submission.id in self.connected
                    assert given["fence"] == self.fences.get(trial.id, 0) + 1
                    assert worker not in self.stopped
                    self._check_pair(session, trial, submission)
                    self.fences[trial.id] = given["fence"]
                    self.leases.append((given["trial"], given["fence"]))
                    return True
            except RefusedError as error:
                assert error.error == "robot_busy" or (error.error == "robot_stopped" and worker in self.stopped)
                return False

        def _check_pair(self, session: Any, trial: Trial, submission: Submission) -> None:
            """Of two that are compared one trial runs at a time, and of a pair the halves one right after the other."""
            if submission.pairing_id is None:
                return
            of_both = select(Submission.id).where(Submission.pairing_id == submission.pairing_id)
            rows = session.execute(
                select(Trial.id, Trial.slot, Trial.state, Trial.scene, Trial.seed, Trial.position)
                .where(Trial.submission_id.in_(of_both))
            ).all()  # fmt: skip
            pairs: dict[int, list[Any]] = {}
            for row in rows:
                pairs.setdefault(row.slot, []).append(row)
            assert all(a.scene == b.scene and a.seed == b.seed for a, b in pairs.values())
            assert all(abs(a.position - b.position) == 1 for a, b in pairs.values())
            assert [row.id for row in rows if row.state in IN_FLIGHT] == [trial.id]
            (mate,) = (row for row in pairs[trial.slot] if row.id != trial.id)
            assert mate.state not in ("needs_human", "needs_storage")
            if mate.state == "queued":
                assert trial.position < mate.position
                begun = [p for p in pairs.values() if {row.state for row in p} & {"done", "policy_fault"}]
                assert not any(row.state == "queued" for p in begun for row in p), "another pair is half done"

        @rule(worker=WORKERS, outcome=OUTCOMES, started=st.booleans())
        def play(self, worker: str, outcome: str, started: bool) -> None:
            if self._lease(worker):
                if started:
                    self.start(0)
                self.end(0, outcome, 0.5)

        @rule(worker=WORKERS)
        def restart(self, worker: str) -> None:
            self.instances[worker] = self.instances.get(worker, 0) + 1

        @precondition(lambda self: self.leases)
        @rule(back=RECENT)
        def start(self, back: int) -> None:
            given = _recent(self.leases, back)
            self._try(given, lambda session: trials.start(session, *given), ("leased", "running"))

        @precondition(lambda self: self.leases)
        @rule(back=RECENT, progress=st.floats(0, 1))
        def heartbeat(self, back: int, progress: float) -> None:
            given = _recent(self.leases, back)
            with database.read() as session:
                robot = select(Robot.name).join(Trial, Trial.robot_id == Robot.id).where(Trial.id == given[0])
                if session.scalar(robot) in self.stopped:
                    with pytest.raises(RefusedError, match="its operator stopped"):
                        trials.heartbeat(session, *given, progress=progress)
                    return
            self._try(given, lambda session: trials.heartbeat(session, *given, progress=progress), IN_FLIGHT)

        @precondition(lambda self: self.leases)
        @rule(back=RECENT, outcome=OUTCOMES, score=st.floats(0, 1))
        def end(self, back: int, outcome: str, score: float) -> None:
            given = _recent(self.leases, back)
            report = trials.Report(outcome=outcome, score=score, reason=outcome)
            states = {"done": ("running",), "released": ("leased",)}.get(outcome, IN_FLIGHT)
            answer = self._try(given, lambda session: trials.end(session, *given, report), states, report)
            if answer is not None:
                self.answers[given] = (report, answer)

        @precondition(lambda self: self.answers)
        @rule(back=RECENT)
        def repeat_the_report(self, back: int) -> None:
            given = _recent(list(self.answers), back)
            report, answer = self.answers[given]
            with database.write() as session:
                assert trials.end(session, *given, report) == answer

        @rule(seconds=st.sampled_from([1.0, 5.0, 9.0, 16.0, 3600.0]))
        def wait(self, seconds: float) -> None:
            clock.seconds += seconds

        @rule()
        def reap(self) -> None:
            with database.write() as session:
                trials.reap(session)

        @rule()
        def find_room(self) -> None:
            with database.write() as session:
                trials.resume_stored(session, trials.Rules())

        @rule(worker=WORKERS)
        def stop_or_let_go_on(self, worker: str) -> None:
            with database.write() as session:
                robot = session.scalar(select(Robot).where(Robot.name == worker))
                if robot is not None:
                    robot.stopped = None if worker in self.stopped else clock.seconds
                    self.stopped ^= {worker}

        @precondition(lambda self: len(self.entries) > 2)
        @rule(back=RECENT)
        def cancel(self, back: int) -> None:
            with database.write() as session:
                entry = session.get_one(Submission, _recent(self.entries, back))
                submissions.cancel(session, entry)
                assert entry.state in ("done", "cancelled")

        @precondition(lambda self: self.leases)
        @rule(back=RECENT)
        def requeue(self, back: int) -> None:
            trial, _ = _recent(self.leases, back)
            try:
                with database.write() as session:
                    before = session.get_one(Trial, trial).state
                    trials.requeue(session, trial)
                    assert before in ("needs_human", "needs_storage")
            except RefusedError as error:
                assert error.status == 409

        def _try(self, given: tuple[int, int], act: Any, states: tuple[str, ...], report: Any = None) -> Any:
            """An act is granted exactly when its lease is live and the state allows it, or when it is a repetition."""
            with database.read() as session:
                trial = session.execute(TRIALS.where(Trial.id == given[0])).one()
                live = trial.fence == given[1] and trial.state in states and (trial.lease_until or 0) > clock.seconds
                fence = trial.fence
            known = self.answers.get(given)
            repeated = known is not None and report is not None and known[0].digest() == report.digest()
            try:
                with database.write() as session:
                    answer = act(session)
            except RefusedError as error:
                assert not live
                assert not repeated
                assert (error.status, error.body()["fence"]) == (409, fence)
                return None
            assert live or repeated
            return answer

        @invariant()
        def the_promise_holds(self) -> None:
            with reading.connect() as connection:
                rows = connection.exec_driver_sql(everything).all()
            submitted = {row[0]: tuple(row[1:3]) for row in rows}
            by_id = {row[3]: Seen(*row[3:11]) for row in rows if row[3] is not None}
            results = {row[3]: tuple(row[12:15]) for row in rows if row[11] is not None}
            by_trial: dict[int, list[Tried]] = {}
            for row in rows:
                if row[15] is not None:
                    by_trial.setdefault(row[3], []).append(Tried(*row[15:18]))
            all_trials, states = list(by_id.values()), {entry: state for entry, (_, state) in submitted.items()}
            assert sum(wanted for wanted, _ in submitted.values()) == len(all_trials), "an accepted trial is lost"
            assert results.items() >= self.results.items(), "a committed result changed or vanished"
            self.results = results
            flying = [trial for trial in all_trials if trial.state in IN_FLIGHT]
            for what in ("submission_id", "robot_id"):
                assert len({getattr(trial, what) for trial in flying}) == len(flying), f"two trials of one {what}"
            for trial in all_trials:
                log = by_trial.get(trial.id, [])
                assert [a.n for a in log] == list(range(1, trial.attempt + 1)), "an attempt is not in the log"
                assert trial.fence == trial.attempt >= self.fences.get(trial.id, 0)
                assert self.cases.setdefault(trial.id, (str(trial.scene), trial.seed)) == (str(trial.scene), trial.seed)
                assert (trial.id in results) == (trial.state in ("done", "policy_fault"))
                assert (trial.state in IN_FLIGHT) == bool(log and log[-1].ended is None)
                # Only an attempt that is not the client's doing may be followed by another.
                assert {a.outcome for a in log[:-1]} <= {"robot_fault", "released", "needs_human", "needs_storage"}
                if trial.id in self.ended:
                    assert trial.state == self.ended[trial.id], "a final state was left"
                if trial.state in FINAL:
                    self.ended[trial.id] = trial.state
            of_entry: dict[int, set[str]] = {entry: set() for entry in states}
            for trial in all_trials:
                of_entry[trial.submission_id].add(trial.state)
            for entry, state in states.items():
                left = of_entry[entry] - set(FINAL)
                assert state in (("open", "cancelled") if left else ("done", "cancelled"))
                # Of what was withdrawn only an arm that moves goes on, and nothing comes after it.
                assert state != "cancelled" or left <= {"running"}

    return Arena


@pytest.fixture
def world(make_database) -> tuple[Database, VirtualClock]:
    clock = VirtualClock()
    return make_database(clock), clock


@contextmanager
def rarely_collecting() -> Iterator[None]:
    """Statements are made and dropped by the thousand; looking through all that is imported each time costs a fifth."""
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def run(world: tuple[Database, VirtualClock], examples: int, steps: int, part: int = 0) -> None:
    database, clock = world
    if database.engine.dialect.name == "sqlite":
        # Durability is another test's subject; here it would only cost time.
        with database.engine.connect() as connection:
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("PRAGMA synchronous = OFF")
    with rarely_collecting():
        run_state_machine_as_test(
            seed(part)(machine(database, clock)),
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_any_history_keeps_the_promise(world) -> None:
    run(world, examples=12, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(1, 9))
def test_two_thousand_histories_keep_the_promise(world, part: int) -> None:
    run(world, examples=250, steps=50, part=part)  # in parts, which share the machine's cores
