"""The Franka driver against a stand-in for its library that answers as a recorded arm did."""

import sys
import time

import fake_franky
import numpy as np
import pytest
from arms import Mover

from offbook.client.protocol import ObservationSpec, PolicyMeta
from offbook.errors import ConfigError, MissingExtraError, NeedsHumanError, RobotError
from offbook.robots import make_robot
from offbook.robots.base import Score
from offbook.robots.trial import run_trial

AIDE = """
from offbook.robots.base import Score

class Aide:
    def arrange(self, prompt, scene): ...
    def judge(self, prompt): return Score(value=1.0, success=True)
"""


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """Makes the robot with the given settings; the library's robot is the newest in `fake_franky.Robot.made`."""
    monkeypatch.setitem(sys.modules, "franky", fake_franky)
    monkeypatch.setattr(fake_franky.Robot, "refuses_to_connect", None)
    (tmp_path / "franka_aide.py").write_text(AIDE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    made = []

    def make(**settings):
        made.append(make_robot("franka", {"host": "172.16.0.2", "attendant": "franka_aide:Aide", **settings}))
        return made[-1], fake_franky.Robot.made[-1]

    yield make
    for robot in made:
        robot.close()


def onwards(robot, step):
    """A policy that goes on from the measured joints."""
    policy = Mover(lambda k: policy.asked[-1].state[:1] + np.float32(step))
    policy.meta = PolicyMeta(
        name="onwards", observation=ObservationSpec(state=(("joints", 7),)), action=robot.spec.action
    )
    return policy


def test_a_trial_streams_postures_within_the_limits_and_brakes_smoothly(cell):
    robot, arm = cell(max_steps=5, rate_hz=50, speed=0.2)
    assert (arm.host, arm.factor, arm.realtime) == ("172.16.0.2", 0.2, "enforce")
    record = run_trial(robot, onwards(robot, 0.5), None, 0, sync=False, frame_every=0)
    assert record.outcome == "done", record.reason
    assert record.score == Score(value=1.0, success=True)
    np.testing.assert_allclose(record.state[0], fake_franky.RECORDED[1], atol=1e-6)
    (first, waited), *rest = arm.moves
    assert (first.target, waited) == ([0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785], False)
    *stream, (last, _) = rest
    assert isinstance(last, fake_franky.JointStopMotion)
    assert all(asynchronous and not motion.return_when_finished for motion, asynchronous in stream)
    assert len(stream) == 5
    # A fifth of 2.62 rad/s at 50 Hz.
    way = np.diff([fake_franky.RECORDED[0], *[motion.target for motion, _ in stream]], axis=0)
    assert np.abs(way[:, 0]).max() == pytest.approx(0.2 * 2.62 / 50, abs=1e-3)
    assert arm.stops == 0


def test_the_ends_of_the_joints_are_kept(cell):
    robot, _ = cell(model="panda", speed=1.0)
    assert robot.spec.action.high[1] == pytest.approx(1.7628 - 0.05)
    robot.reset(None, 0)
    assert robot.tool_position(np.full(7, 0.2)).tolist() == pytest.approx([0.5, 0.0, 0.5])


@pytest.mark.faults
def test_a_reflex_is_a_robot_fault_and_is_recovered_at_the_next_reset(cell):
    robot, arm = cell(max_steps=50, rate_hz=50)
    policy = onwards(robot, 0.001)
    policy.chunk = lambda k: _touch(arm, k, policy)
    record = run_trial(robot, policy, None, 0, sync=False, frame_every=0)
    assert record.outcome == "robot_fault"
    assert 'ControlException: libfranka: Move command aborted: motion aborted by reflex! ["cartesian_r' in record.reason
    arm.has_errors = True
    robot.reset(None, 1)
    assert arm.recoveries == 1


def _touch(arm, k, policy):
    if k == 3:
        arm.stored = fake_franky.ControlException(fake_franky.REFLEX)
    return policy.asked[-1].state[:1]


@pytest.mark.faults
def test_an_arm_that_cannot_be_recovered_or_is_blocked_waits_for_a_person(cell):
    robot, arm = cell()
    arm.has_errors, arm.recovers = True, False
    with pytest.raises(NeedsHumanError, match=r"got .*cartesian_reflex.*; clear the way"):
        robot.reset(None, 0)
    arm.recovers = True
    arm.fail["move"] = fake_franky.ControlException(fake_franky.REFLEX)
    with pytest.raises(NeedsHumanError, match="a free way to the start"):
        robot.reset(None, 0)


@pytest.mark.faults
def test_a_lost_line_is_dialled_again_at_the_next_reset(cell):
    robot, arm = cell()
    robot.reset(None, 0)
    robot.hold()
    arm.fail["read"] = fake_franky.NetworkException(fake_franky.SILENCE)
    with pytest.raises(RobotError, match=r"UDP receive: Timeout; check cable"):
        robot.observe()
    robot.stop("the line is lost")
    robot.reset(None, 1)
    assert fake_franky.Robot.made[-1] is not arm


@pytest.mark.faults
def test_a_stop_brakes_hard_where_it_cannot_brake_smoothly(cell):
    robot, arm = cell()
    robot.reset(None, 0)
    robot.hold()
    arm.fail["move"] = fake_franky.CommandException("libfranka: command rejected")
    began = time.monotonic()
    robot.stop("enough")
    robot.stop("enough")
    assert time.monotonic() - began < 1 / robot.spec.rate_hz
    assert arm.stops == 1


@pytest.mark.faults
def test_an_arm_that_is_not_there_is_one_sentence(cell, monkeypatch):
    monkeypatch.setattr(
        fake_franky.Robot, "refuses_to_connect", fake_franky.NetworkException("libfranka: Connection timeout")
    )
    with pytest.raises(RobotError, match=r"franka at 172.16.0.2: expected an arm that is switched on"):
        cell()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "fr4"}, "did you mean 'fr3'"),
        ({"speed": 2}, "above 0, up to 1"),
        ({"start": [0] * 7}, "7 angles"),
        ({"workspace": [[0, 0, 0]]}, "two corners"),
        ({"cameras": {"front": {"source": "x"}}}, "camera 'front'"),
        ({"speeed": 1}, "settings among host, model"),
    ],
)
def test_settings_that_cannot_be_used_are_named(cell, settings, words):
    with pytest.raises(ConfigError, match=words):
        cell(**settings)


def test_without_the_library_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "franky", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'offbook\[franka\]'"):
        make_robot("franka", {"host": "172.16.0.2"})
