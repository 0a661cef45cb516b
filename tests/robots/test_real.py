"""What a real robot has around its arm: the stop that holds, the watchdog, the attendant, the cameras."""

import contextlib
import io
import os
import pty
import sys
import threading
import time

import numpy as np
import pytest
from arms import ACTION, Mover, ramp

from offbook.client.protocol import ObservationSpec
from offbook.data.clips import write_clip
from offbook.errors import ConfigError, NeedsHumanError, RobotError
from offbook.robots.attendant import Terminal, make_attendant
from offbook.robots.base import Robot, RobotSpec, SafetyLimits, Score
from offbook.robots.cameras import Camera, CameraSettings, camera_settings, open_cameras
from offbook.robots.real import RealRobot
from offbook.robots.trial import run_trial


class Arm:
    def __init__(self):
        self.calls, self.place, self.hang, self.hanging = [], np.zeros(2, np.float32), None, threading.Event()
        self.broken_stop = False

    def prepare(self):
        self.calls.append("prepare")

    def read(self):
        return self.place.copy(), {"front": np.full((16, 16, 3), len(self.calls), np.uint8)}

    def send(self, action):
        if self.hang is not None:
            self.hanging.set()
            self.hang.wait(20)
        self.calls.append("send")
        self.place = np.array(action)
        return self.place

    def halt(self):
        self.calls.append("halt")
        if self.broken_stop:
            raise OSError("no line to the brakes")

    def close(self):
        self.calls.append("close")

    def tool_position(self, action):
        return np.array([action[0], 0.0, 0.0])


class Aide:
    def __init__(self):
        self.arranged = []

    def arrange(self, prompt, scene):
        self.arranged.append((prompt, scene))
        if scene and scene.get("broken"):
            raise NeedsHumanError("attendant", expected="a scene", got="a broken cup", fix="bring another")

    def judge(self, prompt):
        return Score(value=0.5, success=False)


def robot(arm, aide=None, *, steps=6, watchdog_s=2.0, rate_hz=50.0, limits=None):
    spec = RobotSpec(
        name="cell",
        observation=ObservationSpec(state=(("joints", 2),), cameras={"front": (16, 16)}),
        action=ACTION,
        rate_hz=rate_hz,
        max_steps=steps,
        limits=limits or SafetyLimits(posture="joints", velocity=(0.05, 0.05)),
    )
    return RealRobot(arm, spec, aide or Aide(), prompt="push", watchdog_s=watchdog_s)


def test_a_trial_on_a_real_robot_is_arranged_guarded_stopped_and_judged():
    arm, aide = Arm(), Aide()
    cell = robot(arm, aide)
    assert isinstance(cell, Robot)
    policy = Mover(lambda k: np.full((1, 2), 9.0))
    record = run_trial(cell, policy, {"cup": [1, 2], "prompt": "fill the cup"}, 0, sync=False, frame_every=2)
    cell.close()
    cell.close()
    assert (record.outcome, record.steps, record.score.value) == ("done", 6, 0.5)
    assert aide.arranged == [("fill the cup", {"cup": [1, 2], "prompt": "fill the cup"})]
    assert policy.resets[0][1] == ["fill the cup"]
    moved = np.diff(record.action, axis=0, prepend=0)
    assert np.abs(moved).max() <= 0.05 + 1e-6
    assert record.clipped["velocity"] >= 1
    # Stopped once, at the episode's end; the trial's own stop and both closings find it at rest.
    assert arm.calls == ["prepare", *["send"] * 6, "halt", "close"]
    assert record.frames[-1].shape == (16, 16, 3)


def test_a_stop_is_quick_holds_and_is_made_once():
    arm = Arm()
    cell = robot(arm, steps=100)
    cell.reset(None, 0)
    cell.hold()
    began = time.monotonic()
    cell.stop("enough")
    cell.stop("enough")
    assert time.monotonic() - began < 1 / cell.spec.rate_hz
    assert arm.calls.count("halt") == 1
    with pytest.raises(RobotError, match="got enough; reset the robot"):
        cell.act(np.zeros(2, np.float32))
    cell.reset(None, 1)
    assert cell.hold().applied.tolist() == [0, 0]
    cell.close()


@pytest.mark.faults
@pytest.mark.parametrize("complains", [False, True])
def test_a_stop_on_the_way_to_the_start_halts_the_arm_and_no_episode_begins(complains):
    arm, aide, moving, halted = Arm(), Aide(), threading.Event(), threading.Event()

    def prepare():
        moving.set()
        assert halted.wait(10), "nobody has halted the arm"
        if complains:
            raise NeedsHumanError("arm", expected="a free way to the start", got="an abort", fix="clear its way")

    arm.prepare, cell, records = prepare, robot(arm, aide), []
    thread = threading.Thread(target=lambda: records.append(run_trial(cell, Mover(ramp()), None, 0, sync=False)))
    thread.start()
    assert moving.wait(10)
    cell.stop("a stop by its operator")
    cell.stop("a stop by its operator")
    assert arm.calls == ["halt", "halt"], "the arm may have begun another motion since the first"
    halted.set()
    thread.join(10)
    assert (records[0].outcome, records[0].steps) == ("robot_fault", 0)
    assert "got a stop by its operator" in records[0].reason
    assert (aide.arranged, arm.calls[-1]) == ([], "halt")
    arm.prepare = lambda: None
    cell.reset(None, 1)
    assert cell.hold().applied.tolist() == [0, 0]
    cell.close()


def test_a_stop_that_failed_is_tried_again():
    arm = Arm()
    cell = robot(arm)
    cell.reset(None, 0)
    cell.hold()
    arm.broken_stop = True
    with pytest.raises(OSError, match="brakes"):
        cell.stop("enough")
    arm.broken_stop = False
    cell.stop("enough")
    assert arm.calls.count("halt") == 2
    cell.close()


@pytest.mark.faults
def test_the_watchdog_stops_a_robot_without_commands():
    arm = Arm()
    cell = robot(arm, watchdog_s=0.2)
    cell.reset(None, 0)
    time.sleep(0.4)
    assert "halt" not in arm.calls  # nothing has moved yet: a policy may take its time to begin
    cell.hold()
    time.sleep(0.4)
    assert arm.calls[-1] == "halt"
    with pytest.raises(RobotError, match=r"watchdog: no command for 0\.2 s"):
        cell.hold()
    cell.close()


@pytest.mark.faults
def test_a_command_that_hangs_is_not_the_last_word():
    arm = Arm()
    cell = robot(arm, watchdog_s=0.2)
    cell.reset(None, 0)
    arm.hang, caught = threading.Event(), []

    def command():
        try:
            cell.hold()
        except RobotError as error:
            caught.append(str(error))

    thread = threading.Thread(target=command)
    thread.start()
    assert arm.hanging.wait(10)
    deadline = time.monotonic() + 10
    while "halt" not in arm.calls and time.monotonic() < deadline:
        time.sleep(0.02)
    assert arm.calls[-1] == "halt", "the watchdog stops an arm whose driver hangs"
    arm.hang.set()
    thread.join(10)
    assert arm.calls[-2:] == ["send", "halt"]
    assert "watchdog" in caught[0]
    cell.close()


def test_a_scene_that_nobody_can_arrange_waits_for_a_person():
    arm = Arm()
    cell = robot(arm)
    record = run_trial(cell, Mover(ramp()), {"broken": True}, 0, sync=False)
    cell.close()
    assert (record.outcome, record.steps) == ("needs_human", 0)
    assert "a broken cup; bring another" in record.reason
    assert "send" not in arm.calls


def test_an_arm_that_knows_its_tool_can_be_kept_in_a_workspace():
    limits = SafetyLimits(posture="joints", workspace=((-0.1, -1, -1), (0.1, 1, 1)))
    cell = robot(Arm(), limits=limits)
    record = run_trial(cell, Mover(lambda k: np.full((1, 2), 0.5)), None, 0, sync=False)
    cell.close()
    assert record.outcome == "policy_fault"
    assert "leave the workspace" in record.reason


def test_a_robot_that_cannot_measure_its_posture_is_refused():
    with pytest.raises(ConfigError, match="a state part of size 2"):
        robot(Arm(), limits=SafetyLimits())


@contextlib.contextmanager
def terminal(answers, patience_s=5.0):
    """A person who types, and what was asked."""
    master, slave = pty.openpty()
    os.write(master, answers)
    with os.fdopen(slave, "r") as source, io.StringIO() as asked:
        yield Terminal(patience_s, source=source, sink=asked), asked
    os.close(master)


def test_a_person_at_the_terminal_arranges_and_judges():
    with terminal(b"\nvery well\n2\n0.75\n") as (person, asked):
        person.arrange("pour", {"cup": [0.4, 0.1], "prompt": "pour"})
        assert person.judge("pour") == Score(value=0.75, success=False)
        first, *others = asked.getvalue().splitlines()
    assert first.startswith("Arrange the scene (cup: [0.4, 0.1]) for: pour.")
    assert [line.startswith("How well did it go: pour?") for line in others] == [True] * 3


@pytest.mark.parametrize(
    ("answers", "patience", "words"), [(b"q\n", 5.0, "cannot be arranged"), (b"", 0.1, "within 0.1 s")]
)
def test_a_person_may_give_up_or_be_away(answers, patience, words):
    with terminal(answers, patience) as (person, _), pytest.raises(NeedsHumanError, match=words):
        person.arrange("pour", None)


def test_without_a_terminal_there_is_nobody(tmp_path):
    (tmp_path / "input").write_text("\n")
    with (tmp_path / "input").open() as source, pytest.raises(NeedsHumanError, match="no terminal"):
        Terminal(source=source).arrange("pour", None)


def test_an_attendant_of_ones_own_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "scale_on_table.py").write_text(
        "class Scale:\n    def arrange(self, prompt, scene): ...\n    def judge(self, prompt): return 7\n"
        "class No: ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert make_attendant("scale_on_table:Scale").judge("") == 7
    with pytest.raises(ConfigError, match=r"got a No; give it arrange"):
        make_attendant("scale_on_table:No")
    with pytest.raises(ConfigError, match="No module named 'nobody'"):
        make_attendant("nobody:Here")


def test_a_camera_shows_its_newest_picture_and_is_missed_when_it_ends(tmp_path):
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[-1] = 200
    write_clip(tmp_path / "film.mp4", frames, 30)
    camera = Camera("front", CameraSettings(source=str(tmp_path / "film.mp4"), size=(24, 32)))
    deadline = time.monotonic() + 10
    while camera.latest().mean() < 150 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert camera.latest().shape == (24, 32, 3)
    assert 190 < camera.latest().mean() < 210
    time.sleep(1.1)
    with pytest.raises(RobotError, match=r"camera 'front' at .*film.mp4: .* the end of its pictures"):
        camera.latest()
    camera.close()
    camera.close()


def test_cameras_that_are_not_there_or_not_described_are_named(tmp_path):
    with pytest.raises(RobotError, match="camera 'wrist' at /dev/nothing"):
        open_cameras({"wrist": CameraSettings(source="/dev/nothing", size=(8, 8))})
    for entries in ({"source": "x"}, {"source": "x", "size": [8]}, {"source": "x", "size": [8, 8], "colour": 1}):
        with pytest.raises(ConfigError, match="camera 'front'"):
            camera_settings({"front": entries})
