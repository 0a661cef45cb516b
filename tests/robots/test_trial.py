"""The control loop of one trial, in both modes, and every way in which it can end."""

import threading
import time

import numpy as np
import pytest
from arms import Mover, Slider, ramp, waiting_for

from offbook.errors import ConfigError, RobotError
from offbook.robots.base import SafetyLimits, Score
from offbook.robots.trial import run_trial


def test_a_trial_is_played_to_its_end_and_kept_whole():
    robot, policy, events, beats = Slider(), Mover(ramp()), [], []
    record = run_trial(
        robot, policy, {"start": [0.0, 0.1]}, 5, on_event=events.append, heartbeat=beats.append, frame_every=5
    )
    assert (record.outcome, record.reason, record.steps) == ("done", "", 20)
    assert record.score == Score(value=pytest.approx(0.2), success=True)
    np.testing.assert_allclose(record.action[:, 0], 0.01 * np.arange(1, 21), rtol=1e-5)
    np.testing.assert_allclose(record.state[0], [7, 0, 0.1])
    np.testing.assert_allclose(record.state[1:, 1:], record.action[:-1])
    np.testing.assert_allclose(record.reward, record.action[:, 0])
    np.testing.assert_allclose(record.time, np.arange(20) / 100)
    assert not record.late.any()
    assert np.isfinite(record.latency_ms).all()
    assert [frame[0, 0, 0] for frame in record.frames] == [0, 5, 10, 15, 20]
    assert record.frame_rate == 20
    assert [event.kind for event in events] == ["reset", "end"]
    assert robot.stops == ["the trial is over"]
    assert beats == sorted(beats)
    assert beats[-1] <= 1


def test_the_policy_sees_what_it_wants_and_nothing_of_the_scene():
    policy = Mover(ramp())
    run_trial(Slider(), policy, {"start": [0.3, 0.1]}, 77, session="A")
    assert policy.resets == [(["A"], ["slide to the right"])]
    first = policy.asked[0]
    assert first.sessions == ("A",)
    np.testing.assert_allclose(first.state, [[0.3, 0.1]])
    assert first.images["front"].shape == (1, 16, 16, 3)
    assert len(policy.threads) == 1


def test_every_action_of_a_chunk_is_executed_before_the_next_question():
    policy = Mover(ramp(8))
    record = run_trial(Slider(), policy, None, 0)
    assert len(policy.asked) == 3
    np.testing.assert_allclose(record.action[:, 0], 0.01 * np.arange(1, 21), rtol=1e-5)
    assert np.flatnonzero(np.isfinite(record.latency_ms)).tolist() == [0, 8, 16]
    assert [round(float(asked.time[0]) * 100) for asked in policy.asked] == [0, 8, 16]


def test_sync_waits_for_a_slow_policy():
    record = run_trial(Slider(steps=3), Mover(ramp(), delay_s=0.05), None, 0)
    assert record.outcome == "done"
    assert record.late_share == 0
    assert (record.latency_ms >= 50).all()


def test_sync_is_for_simulators_only():
    with pytest.raises(ConfigError, match="sync=False"):
        run_trial(Slider(simulated=False), Mover(ramp()), None, 0)


def test_real_time_keeps_the_rate_and_a_quick_policy_is_not_late():
    began = time.monotonic()
    record = run_trial(Slider(simulated=False, rate_hz=5, steps=5), Mover(ramp()), None, 0, sync=False)
    assert time.monotonic() - began >= 4 / 5
    assert record.outcome == "done"
    assert record.late.sum() <= 1  # a busy machine may lose a step
    moved = record.action[~record.late, 0]
    np.testing.assert_allclose(moved, 0.01 * np.arange(1, len(moved) + 1), rtol=1e-5)


def after_holds(robot, count, chunk):
    """Answers with a chunk each time that the robot has held so many more steps."""

    def answer(k):
        for _ in range(count):
            assert robot.held.acquire(timeout=20)
        return chunk(k)

    return answer


def test_in_real_time_the_robot_holds_and_counts_until_the_answer_comes():
    robot = Slider(simulated=False, rate_hz=25, steps=12)
    policy = Mover(after_holds(robot, 2, lambda k: np.full((1, 2), 0.1 * (k + 1))))
    record = run_trial(robot, policy, None, 0, sync=False)
    late = record.late
    assert late[:2].all()
    assert 0.5 <= record.late_share < 1
    np.testing.assert_array_equal(record.action[: np.argmin(late)], 0)
    assert len(policy.asked) >= 2
    # One event for each streak of late steps.
    assert [event.kind for event in record.events].count("late") == np.sum(late & ~np.r_[False, late[:-1]]) >= 2


def test_a_late_chunk_skips_the_steps_that_are_past():
    robot = Slider(simulated=False, rate_hz=25, steps=8)
    policy = Mover(after_holds(robot, 2, lambda k: 0.01 * np.arange(1, 17).reshape(8, 2)))
    record = run_trial(robot, policy, None, 0, sync=False)
    held = int(np.argmin(record.late))
    assert held >= 2
    np.testing.assert_allclose(record.action[held:, 0], 0.01 * (2 * np.arange(held, 8) + 1), rtol=1e-5)


@pytest.mark.faults
def test_too_many_late_steps_in_a_row_are_the_policys_fault():
    release = threading.Event()
    policy = Mover(waiting_for(release))
    robot = Slider(limits=SafetyLimits(late_steps=5), simulated=False, steps=50)
    record = run_trial(robot, policy, None, 0, sync=False)
    release.set()
    assert record.outcome == "policy_fault"
    assert "5 steps in a row" in record.reason
    assert record.late.all()
    assert record.steps == 5
    assert robot.stops == [record.reason]


@pytest.mark.faults
@pytest.mark.parametrize("sync", [True, False])
def test_a_policy_that_never_answers_is_at_fault_after_the_deadline(sync):
    release = threading.Event()
    policy = Mover(waiting_for(release))
    record = run_trial(Slider(steps=1000), policy, None, 0, sync=sync, deadline_s=0.2)
    release.set()
    assert record.outcome == "policy_fault"
    assert "within 0.2 s" in record.reason


@pytest.mark.faults
def test_three_refused_actions_end_the_trial_and_two_do_not():
    def nan_until(count):
        return Mover(lambda k: np.full((1, 2), np.nan if k < count else 0.1))

    record = run_trial(Slider(), nan_until(2), None, 0)
    assert (record.outcome, record.refused) == ("done", 2)
    robot = Slider()
    record = run_trial(robot, nan_until(3), None, 0)
    assert (record.outcome, record.refused, record.steps) == ("policy_fault", 3, 3)
    assert "3 refused actions, the last at step 2: entry 0 is nan" in record.reason
    assert "act" not in robot.calls
    assert record.score == Score(value=0.0, success=False)
    assert [event.kind for event in record.events] == ["reset", "refused", "refused", "refused", "fault", "end"]


def test_limits_that_were_hit_are_counted_and_told_once_a_streak():
    robot = Slider(limits=SafetyLimits(posture="joints", velocity=(0.05, 0.05)))
    record = run_trial(robot, Mover(lambda k: np.full((1, 2), 9.0)), None, 0)
    assert record.clipped == {"range": 20, "velocity": 20}
    assert [event.text for event in record.events if event.kind == "limit"] == [
        "the range and velocity limit changed the action"
    ]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (lambda k: np.zeros((1, 3)), "got shape (1, 1, 3)"),
        (lambda k: np.zeros((9, 2)), "got shape (1, 9, 2)"),
        (lambda k: np.zeros((0, 2)), "got shape (1, 0, 2)"),
        (lambda k: {}["nothing"], "KeyError: 'nothing'"),
    ],
)
@pytest.mark.parametrize("sync", [True, False])
def test_a_broken_answer_is_a_policy_fault_with_its_reason(chunk, words, sync):
    robot = Slider()
    record = run_trial(robot, Mover(chunk), None, 0, sync=sync)
    assert record.outcome == "policy_fault"
    assert words in record.reason
    assert robot.stops


@pytest.mark.faults
def test_a_relay_that_fails_is_not_the_policys_fault():
    def gone(k):
        raise RobotError("relay", expected="an open one", got="a closed one", fix="try again")

    assert run_trial(Slider(), Mover(gone), None, 0).outcome == "robot_fault"


@pytest.mark.faults
def test_a_policy_that_does_not_fit_or_cannot_reset_is_at_fault_before_anything_moves():
    from dataclasses import replace

    policy = Mover(ramp())
    policy.meta = replace(policy.meta, observation=replace(policy.meta.observation, state=(("elbows", 2),)))
    robot = Slider()
    record = run_trial(robot, policy, None, 0)
    assert (record.outcome, record.steps) == ("policy_fault", 0)
    assert "elbows" in record.reason
    assert "reset" not in robot.calls

    class Unready(Mover):
        def reset(self, sessions, prompts):
            raise ValueError("no weights")

    record = run_trial(Slider(), Unready(ramp()), None, 0)
    assert (record.outcome, record.reason) == ("policy_fault", "ValueError: no weights")


@pytest.mark.faults
@pytest.mark.parametrize("method", ["reset", "observe", "act", "frame", "score"])
@pytest.mark.parametrize("sync", [True, False])
def test_a_failing_robot_is_a_robot_fault_and_is_stopped(method, sync):
    robot = Slider()
    robot.fail = {method: 0 if method == "reset" else 4}
    record = run_trial(robot, Mover(ramp()), None, 0, sync=sync)
    assert record.outcome == "robot_fault"
    assert f"the {method} cable is loose" in record.reason
    assert len(robot.stops) == 1


@pytest.mark.faults
def test_a_robot_that_cannot_be_stopped_is_said_so():
    robot = Slider()
    robot.fail = {"stop": 0}
    record = run_trial(robot, Mover(ramp()), None, 0)
    assert record.outcome == "robot_fault"
    assert "could not be stopped" in record.reason


@pytest.mark.faults
def test_a_lost_lease_stops_the_robot_even_while_the_policy_thinks():
    release, beats = threading.Event(), []

    def beat(progress):
        beats.append(progress)
        if len(beats) > 2:
            raise ConnectionError("stale fence 4")

    robot = Slider()
    policy = Mover(waiting_for(release))
    record = run_trial(robot, policy, None, 0, heartbeat=beat)
    release.set()
    assert record.outcome == "robot_fault"
    assert "heartbeat failed: ConnectionError: stale fence 4" in record.reason
    assert robot.stops == [record.reason]


def test_an_interrupt_stops_the_robot_and_goes_on_up():
    def beat(progress):
        if progress > 0.5:
            raise KeyboardInterrupt

    robot = Slider()
    with pytest.raises(KeyboardInterrupt):
        run_trial(robot, Mover(ramp()), None, 0, heartbeat=beat)
    assert len(robot.stops) == 1


@pytest.mark.faults
def test_a_score_that_is_no_number_is_a_robot_fault():
    robot = Slider()
    robot.score = lambda: Score(value=float("nan"))
    assert run_trial(robot, Mover(ramp()), None, 0).outcome == "robot_fault"


def test_events_do_not_grow_without_end():
    robot = Slider(limits=SafetyLimits(posture="joints", velocity=(0.1, 0.1)), steps=600)
    policy = Mover(lambda k: np.full((1, 2), 0.9 * (-1) ** (k // 2) if k % 2 else 0.0))
    record = run_trial(robot, policy, None, 0, frame_every=0)
    assert record.outcome == "done"
    assert len(record.events) == 101
    assert record.events[-1].kind == "end"
    assert record.frames == []
