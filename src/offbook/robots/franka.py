"""A Franka arm (Panda or Research 3) that follows joint positions, through the library franky.

The library plans a smooth way to each commanded posture in a thread of its own, within a share of the arm's limits of
speed, acceleration and jerk; a new command takes over from the one before.

Source: the documentation of franky 2.0 ("Robot", "Trajectory control", "Real-time motions"); for the joints, Franka
    Robotics, "Robot and interface specifications".
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbook.client.protocol import ActionSpec, ObservationSpec
from offbook.errors import ConfigError, NeedsHumanError, RobotError, nearest, needs_extra
from offbook.robots.attendant import make_attendant
from offbook.robots.base import Action, RobotSpec, SafetyLimits
from offbook.robots.cameras import CameraSettings, camera_settings, open_cameras
from offbook.robots.real import WATCHDOG_S, RealRobot, told

# Ends of the joints' ranges (rad) and their largest speeds (rad/s).
_JOINTS = {
    "panda": (
        (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
        (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
        (2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61),
    ),
    "fr3": (
        (-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159),
        (2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159),
        (2.62, 2.62, 2.62, 2.62, 5.26, 4.18, 5.26),
    ),
}
_MARGIN = 0.05  # rad kept from the ends, where the arm's own protection would stop it
_READY = (0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785)
_CLEAR = "clear the way of the arm, then start its worker again"


def franka(
    host: str,
    *,
    model: str = "fr3",
    cameras: Mapping[str, Mapping[str, object]] | None = None,
    rate_hz: float = 30.0,
    max_steps: int = 600,
    speed: float = 0.2,
    start: Sequence[float] = _READY,
    workspace: Sequence[Sequence[float]] | None = None,
    prompt: str = "",
    attendant: str = "terminal",
    realtime: bool = True,
    watchdog_s: float = WATCHDOG_S,
) -> RealRobot:
    """A cell with one Franka arm; the arguments are what a file of settings may hold.

    Args:
        host: address of the arm's control interface, such as `172.16.0.2`.
        model: `fr3` or `panda`: whose limits of the joints hold.
        cameras: by name, see `offbook.robots.cameras.CameraSettings`.
        rate_hz: control steps in a second.
        max_steps: longest episode in control steps.
        speed: share of the arm's largest speeds, accelerations and jerks that it may use, above 0, up to 1; the guard
            also clips what would go farther in one step.
        start: joint angles (7) at which an episode begins, radians.
        workspace: corners (low, high) of the box, in metres from the arm's base, which the tool may not be sent out of.
        prompt: the task in words.
        attendant: `terminal`, or `MODULE:NAME` of an `offbook.robots.attendant.Attendant`.
        realtime: whether to insist on a real-time kernel, without which the arm may stop by itself.
        watchdog_s: longest time between two commands of an episode, seconds.

    Raises:
        MissingExtraError: franky is not installed.
        RobotError: the arm or a camera does not answer.
        ConfigError: a setting cannot be used.
    """
    if model not in _JOINTS:
        fix = nearest(model, _JOINTS)
        raise ConfigError("franka, model", expected="a known model", got=repr(model), fix=fix)
    if not 0 < speed <= 1:
        raise ConfigError("franka, speed", expected="above 0, up to 1", got=str(speed), fix="start with 0.1")
    low, high, fastest = (np.array(values) for values in _JOINTS[model])
    low, high = low + _MARGIN, high - _MARGIN
    if len(start) != 7 or np.any(np.array(start) < low) or np.any(np.array(start) > high):
        expected = f"7 angles from {low.round(2).tolist()} to {high.round(2).tolist()}"
        raise ConfigError("franka, start", expected=expected, got=str(list(start)), fix="choose another posture")
    if workspace is not None and np.shape(workspace) != (2, 3):
        got, fix = str(workspace), "write [[x, y, z], [x, y, z]]"
        raise ConfigError("franka, workspace", expected="two corners of a box, in metres", got=got, fix=fix)
    shown = camera_settings(cameras or {})
    spec = RobotSpec(
        name="franka",
        observation=ObservationSpec(state=(("joints", 7),), cameras={name: each.size for name, each in shown.items()}),
        action=ActionSpec(size=7, low=tuple(low.tolist()), high=tuple(high.tolist())),
        rate_hz=rate_hz,
        max_steps=max_steps,
        limits=SafetyLimits(
            posture="joints",
            velocity=tuple((speed * fastest / rate_hz).tolist()),
            workspace=None if workspace is None else (_corner(workspace[0]), _corner(workspace[1])),
        ),
    )
    person = make_attendant(attendant)
    arm = FrankaArm(host, speed=speed, start=start, cameras=shown, realtime=realtime)
    return RealRobot(arm, spec, person, prompt=prompt, watchdog_s=watchdog_s)


def _corner(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = values
    return float(x), float(y), float(z)


class FrankaArm:
    """The arm itself and its cameras, see `franka` for the arguments."""

    def __init__(
        self,
        host: str,
        *,
        speed: float,
        start: Sequence[float],
        cameras: Mapping[str, CameraSettings],
        realtime: bool,
    ) -> None:
        with needs_extra("franka"):
            import franky
        self._franky: Any = franky
        self._host, self._speed, self._realtime = host, float(speed), realtime
        self._where, self._start = f"franka at {host}", list(map(float, start))
        self._lost = False
        self._connect()
        self._cameras = open_cameras(cameras)

    def prepare(self) -> None:
        """Recovers from an earlier stop or reflex and moves to the start."""
        if self._lost:
            self._connect()
        with self._told("an arm that can be recovered"):
            self._settle()
            if self._robot.has_errors and not self._robot.recover_from_errors():
                errors = str(self._robot.state.current_errors)
                raise NeedsHumanError(self._where, expected="an arm without errors", got=errors, fix=_CLEAR)
        with self._told("to move to the start"):
            try:
                self._robot.move(self._franky.JointMotion(self._start))
            except self._franky.ControlException as error:
                got = str(error)
                raise NeedsHumanError(self._where, expected="a free way to the start", got=got, fix=_CLEAR) from error

    def read(self) -> tuple[NDArray[np.float32], Mapping[str, NDArray[np.uint8]]]:
        """Joint angles (7,) in radians, and the cameras' newest pictures."""
        with self._told("its joint angles"):
            joints = np.asarray(self._robot.current_joint_state.position, np.float32)
        return joints, {name: camera.latest() for name, camera in self._cameras.items()}

    def send(self, action: Action) -> Action:
        """Sets off for a posture (7,); an error of the motion before, such as a reflex, is raised here."""
        motion = self._franky.JointMotion([float(angle) for angle in action], return_when_finished=False)
        with self._told("to go on moving"):
            self._robot.move(motion, asynchronous=True)
        return action

    def halt(self) -> None:
        """Brakes smoothly; where that is not possible, at once."""
        if self._robot is None or not self._robot.is_in_control:
            return
        try:
            self._robot.move(self._franky.JointStopMotion(), asynchronous=True)
        except Exception:  # a motion that failed has ended by itself; whatever else there is, it must stop
            with self._told("to stop"):
                self._robot.stop()

    def tool_position(self, action: Action) -> NDArray[np.float64]:
        """Where the tool is at a posture, (3,) metres from the base."""
        angles = [float(angle) for angle in action]
        pose = self._robot.model.pose(self._franky.Frame.EndEffector, angles, *self._tool)
        return np.asarray(pose.translation, np.float64).reshape(3)

    def close(self) -> None:
        """Lets go of the cameras; the connection to the arm ends with the process."""
        for camera in self._cameras.values():
            camera.close()

    def _connect(self) -> None:
        config = self._franky.RealtimeConfig.Enforce if self._realtime else self._franky.RealtimeConfig.Ignore
        with self._told("an arm that is switched on, unlocked and has its control interface on"):
            self._robot: Any = None  # a connection that was lost must be gone before the next one
            self._robot = self._franky.Robot(self._host, relative_dynamics_factor=self._speed, realtime_config=config)
            state = self._robot.state
            self._tool = (state.F_T_EE, state.EE_T_K)
        self._lost = False

    def _settle(self) -> None:
        """Waits until the last motion has ended; how it ended was told when it happened."""
        with contextlib.suppress(self._franky.ControlException):
            if not self._robot.join_motion(timeout=2.0):
                self._robot.stop()

    def _told(self, expected: str) -> contextlib.AbstractContextManager[None]:
        return told(lambda error: self._fault(expected, error))

    def _fault(self, expected: str, error: Exception) -> RobotError:
        kind, words = type(error).__name__, " ".join(str(error).split())
        line = kind in ("NetworkException", "RealtimeException", "IncompatibleVersionException", "ProtocolException")
        self._lost = self._lost or line
        fix = "check cable, address, firmware and real-time kernel" if line else _CLEAR
        return RobotError(self._where, expected=expected, got=f"{kind}: {words}"[:300], fix=fix)
