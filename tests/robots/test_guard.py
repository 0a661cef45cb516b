"""The guard between network and motors."""

import numpy as np
import pytest
from arms import Slider
from hypothesis import given, settings
from hypothesis import strategies as st

from offbook.errors import ConfigError
from offbook.robots import make_robot
from offbook.robots.base import Robot, SafeRobot, SafetyLimits

LIMITS = SafetyLimits(posture="joints", velocity=(0.1, 0.2), acceleration=(0.05, 0.1), jerk=(0.04, 0.08))


def floats(most: float) -> st.SearchStrategy[float]:
    return st.floats(-most, most, width=32, allow_subnormal=False)


def guard(limits: SafetyLimits | None = None, start=(0.0, 0.0)) -> SafeRobot:
    robot = SafeRobot(Slider(limits=limits))
    robot.reset({"start": start}, 0)
    return robot


def act(robot: SafeRobot, *values: float):
    return robot.act(np.array(values, np.float32))


def test_a_sound_action_passes_untouched():
    action = np.array([0.3, -0.4], np.float32)
    result = guard().act(action)
    assert result.applied is action or np.array_equal(result.applied, action)
    assert (result.clipped, result.refused) == ((), "")
    assert isinstance(guard(), Robot)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("action", "words"),
    [
        (np.array([0.1, np.nan], np.float32), "entry 1 is nan"),
        (np.array([-np.inf, 0.0], np.float32), "entry 0 is -inf"),
        (np.array([0.0, 1e30], np.float32), "entry 1 is 1e+30, far out of the range -1 to 1"),
        (np.array([-300.0, 0.0], np.float32), "entry 0 is -300, far out"),
        (np.zeros(3, np.float32), "shape (3,) instead of (2,)"),
        (np.zeros((1, 2), np.float32), "shape (1, 2)"),
        (np.array(["a", "b"]), "shape (2,)"),
        ([0.0, 0.0], "shape list"),
        (None, "shape NoneType"),
    ],
)
def test_what_is_no_action_is_refused_and_the_robot_holds(action, words):
    robot = guard(start=(0.5, 0.5))
    result = robot.act(action)
    assert words in result.refused
    np.testing.assert_array_equal(result.applied, [0.5, 0.5])


def test_the_range_is_clipped_and_named():
    result = act(guard(), 30, -5)
    np.testing.assert_array_equal(result.applied, [1, -1])
    assert result.clipped == ("range",)


def test_speed_counts_from_the_measured_posture_then_from_the_last_command():
    limits = SafetyLimits(posture="joints", velocity=(0.1, 0.1))
    robot = guard(limits, start=(0.5, 0.0))
    np.testing.assert_allclose(act(robot, -1, 0.05).applied, [0.4, 0.05], atol=1e-6)
    result = act(robot, -1, 0.05)
    np.testing.assert_allclose(result.applied, [0.3, 0.05], atol=1e-6)
    assert result.clipped == ("velocity",)


def test_a_new_episode_forgets_the_last_ones_motion():
    robot = guard(LIMITS)
    for _ in range(8):
        act(robot, 1, 1)
    robot.reset({"start": (-0.5, 0.0)}, 1)
    np.testing.assert_allclose(act(robot, 1, 0).applied, [-0.46, 0.0], atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(floats(3), floats(3)), min_size=1, max_size=25),
    st.tuples(floats(0.875), floats(0.875)),
)
def test_whatever_is_asked_range_and_speed_hold(actions, start):
    robot = guard(LIMITS, start=start)
    last = np.array(start)
    for action in actions:
        applied = act(robot, *action).applied
        assert np.all(np.abs(applied) <= 1)
        assert np.all(np.abs(applied - last) <= np.array(LIMITS.velocity) + 1e-5)
        last = applied.astype(float)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(floats(0.5), min_size=4, max_size=25))
def test_acceleration_and_jerk_hold_where_they_are_the_only_limits(wishes):
    limits = SafetyLimits(posture="joints", acceleration=(0.05, 0.05))
    jerky = SafetyLimits(posture="joints", jerk=(0.04, 0.04))
    for chosen, order, most in ((limits, 2, 0.05), (jerky, 3, 0.04)):
        robot, path = guard(chosen), [0.0] * order
        for wish in wishes:
            result = act(robot, wish, 0)
            if abs(result.applied[0]) == 1:  # the end of the range stops any motion
                break
            path.append(float(result.applied[0]))
        assert np.all(np.abs(np.diff(path, order)) <= most + 1e-5)


def test_the_tool_may_not_leave_the_workspace():
    robot = guard(SafetyLimits(workspace=((-0.5, -1, -1), (0.5, 1, 1))), start=(0.2, 0.0))
    assert act(robot, 0.4, 0).refused == ""
    result = act(robot, 0.6, 0)
    assert "leave the workspace at [0.6" in result.refused
    np.testing.assert_allclose(result.applied, [0.4, 0])


def test_a_discrete_choice_must_exist():
    robot = SafeRobot(make_robot("gym:CartPole-v1"))
    robot.reset(None, 0)
    assert act(robot, 1).refused == ""
    assert "choice 2 of 0 to 1" in act(robot, 2).refused
    assert "choice -1" in act(robot, -1).refused
    robot.close()


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"velocity": (0.1, 0.1)}, "a posture to count from"),
        ({"posture": "joints", "velocity": (0.1, 0.0)}, "positive numbers"),
        ({"refusals": 0}, "counts of 1 or more"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits, words):
    with pytest.raises(ConfigError, match=words):
        SafetyLimits(**limits)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (SafetyLimits(posture="joints", velocity=(0.1,)), "expected 2 numbers"),
        (SafetyLimits(posture="elbows", velocity=(0.1, 0.1)), "state part of size 2"),
        (SafetyLimits(posture="goal", velocity=(0.1, 0.1)), "state part of size 2"),
    ],
)
def test_limits_must_fit_the_robot(limits, words):
    with pytest.raises(ConfigError, match=words):
        SafeRobot(Slider(limits=limits))


def test_a_workspace_needs_a_robot_that_knows_where_its_tool_is():
    robot = Slider(limits=SafetyLimits(workspace=((0, 0, 0), (1, 1, 1))))
    robot.tool_position = None
    with pytest.raises(ConfigError, match="tool_position"):
        SafeRobot(robot)
