"""LeRobot's robots as ours, against a stand-in for the library with recorded answers."""

import sys
import time

import fake_lerobot
import numpy as np
import pytest
from arms import Mover

from offbook.client.protocol import ObservationSpec, PolicyMeta
from offbook.errors import ConfigError, MissingExtraError, NeedsHumanError, RobotError
from offbook.robots import make_robot
from offbook.robots.base import Score
from offbook.robots.trial import run_trial

RANGE = {"shoulder_pan.pos": [-90, 90], "elbow_flex.pos": [-90, 90], "gripper.pos": [0, 100]}


class Aide:
    def arrange(self, prompt, scene): ...

    def judge(self, prompt):
        return Score(value=0.25, success=False)


@pytest.fixture
def cell(monkeypatch):
    """Makes the robot from settings; with it, the library's own robot."""
    fake_lerobot.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "cell_with_small_arm", sys.modules[__name__])
    made = []

    def make(robot=None, **settings):
        config = {"type": "small_arm", "port": "/dev/ttyACM0", **(robot or {})}
        usual = {"range": RANGE, "velocity": 30, "attendant": "cell_with_small_arm:Aide"}
        made.append(make_robot("lerobot", {"robot": config, **usual, **settings}))
        return made[-1], made[-1]._arm._device

    yield make
    for robot in made:
        robot.close()
        assert not robot._arm._device.is_connected


def test_a_trial_speaks_the_librarys_dictionaries_within_the_limits(cell):
    robot, device = cell(max_steps=4, rate_hz=50)
    assert robot.spec.observation == ObservationSpec(state=(("state", 3),), cameras={"front": (48, 64)})
    policy = Mover(lambda k: np.array([[80.0, -80.0, 500.0]]))
    policy.meta = PolicyMeta(
        name="far", observation=ObservationSpec(state=(("state", 3),)), action=robot.spec.action, chunk=1
    )
    record = run_trial(robot, policy, None, 0, sync=False, frame_every=1)
    assert record.outcome == "done", record.reason
    assert record.score.value == 0.25
    np.testing.assert_allclose(record.state[0], fake_lerobot.RECORDED[1], atol=1e-5)
    way = np.diff([fake_lerobot.RECORDED[0], *device.sent[:4]], axis=0)
    assert np.abs(way).max() <= 30 / 50 + 1e-4
    assert record.frames[0].shape == (48, 64, 3)
    # To come to rest it is sent the place where it was seen last, before the last command.
    assert device.sent[4:] == [device.sent[2]]


def test_what_the_robots_own_settings_lessen_is_what_counts(cell):
    robot, device = cell()
    robot.reset(None, 0)
    device.most = 1.0
    np.testing.assert_allclose(robot.act(np.array([1.5, -40.0, 20.0], np.float32)).applied, [1.0, -40.0, 1.0])


def test_speeds_are_shown_beside_the_posture_that_limits_count_from(cell):
    robot, _ = cell(robot={"speeds": True})
    assert robot.spec.observation.state == (("state", 6), ("posture", 3))
    state = robot.reset(None, 0).state[0]
    np.testing.assert_allclose(state, [*fake_lerobot.RECORDED[0], 0.5, 0.5, 0.5, *fake_lerobot.RECORDED[0]], atol=1e-5)


def test_a_stop_on_the_way_to_the_start_ends_it_there(cell):
    robot, device = cell(start=dict(zip(fake_lerobot.MOTORS, [80.0, 80.0, 80.0], strict=True)), rate_hz=100)
    send = device.send_action

    def stopped_after_five(action):
        done = send(action)
        if len(device.sent) == 5:
            robot.stop("a stop by its operator")
        return done

    device.send_action = stopped_after_five
    with pytest.raises(RobotError, match="a stop by its operator"):
        robot.reset(None, 0)
    assert len(device.sent) <= 7
    way = np.diff([fake_lerobot.RECORDED[0], *device.sent], axis=0)
    assert np.abs(way).max() <= 30 / 100 + 1e-4, "it rests where it is, and does not go back"


def test_an_episode_begins_at_the_start_reached_in_small_steps(cell):
    start = {"shoulder_pan.pos": 2.2, "elbow_flex.pos": -40.5, "gripper.pos": 20.1}
    robot, device = cell(start=start, rate_hz=100)
    robot.reset(None, 0)
    np.testing.assert_allclose([sent[0] for sent in device.sent], [1.5, 1.8, 2.1, 2.2], atol=1e-4)
    device.most = 1.0  # something holds it
    with pytest.raises(NeedsHumanError, match="to reach the start"):
        _hurried(robot, device)


def _hurried(robot, device):
    robot._arm._period_s = 0.0005  # thirty seconds of patience, taken quickly
    robot._arm._start = np.array([90.0, 90.0, 100.0], np.float32)
    import offbook.robots.lerobot as module

    kept, module._LONGEST_WAY_S = module._LONGEST_WAY_S, 0.05
    try:
        robot.reset(None, 0)
    finally:
        module._LONGEST_WAY_S = kept


@pytest.mark.faults
def test_a_bus_that_fails_is_a_robot_fault_with_its_own_words(cell):
    robot, device = cell(max_steps=50, rate_hz=50)
    robot.reset(None, 0)
    robot.hold()
    device.fail["send_action"] = ConnectionError("Failed to write 'Goal_Position': no status packet!")
    with pytest.raises(RobotError, match=r"lerobot small_arm: .*ConnectionError: Failed to write .*; check its power"):
        robot.hold()
    device.fail["get_observation"] = fake_lerobot.DeviceNotConnectedError("cable")
    with pytest.raises(RobotError, match="DeviceNotConnectedError: cable"):
        robot.observe()


def test_a_stop_is_quick_and_repeated_without_effect(cell):
    robot, device = cell()
    robot.reset(None, 0)
    robot.act(np.array([1.5, -40.0, 20.0], np.float32))
    began = time.monotonic()
    robot.stop("enough")
    robot.stop("enough")
    assert time.monotonic() - began < 1 / robot.spec.rate_hz
    assert len(device.sent) == 2


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"robot": {"type": "smal_arm"}}, ConfigError, "did you mean 'small_arm'"),
        ({"robot": {"ports": 1}}, ConfigError, "settings of a small_arm, got TypeError: .*ports"),
        ({"range": {}}, ConfigError, r"range of 'shoulder_pan.pos': .* got nothing"),
        ({"start": {"elbow": 1}}, ConfigError, "expected shoulder_pan.pos, elbow_flex.pos, gripper.pos, got elbow"),
        ({"robot": {"calibrated": False}}, NeedsHumanError, "calibrate it with LeRobot's own command"),
    ],
)
def test_settings_that_cannot_be_used_are_named(cell, settings, kind, words):
    with pytest.raises(kind, match=words):
        cell(**settings)


def test_without_the_library_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "draccus", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'offbook\[lerobot\]'"):
        make_robot("lerobot", {"robot": {"type": "x"}, "range": {}, "velocity": 1})
