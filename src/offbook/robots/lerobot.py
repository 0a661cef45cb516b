"""Any robot of the library LeRobot (SO-100, SO-101, Koch, LeKiwi, ...), through its class `Robot`.

What a robot shows and takes follows from its `observation_features` and `action_features`: the numbers become one part
of the state, `state`, as in LeRobot's datasets, and the colour pictures become cameras. Units are the robot's own
(degrees, or -100 to 100), so the ranges that the guard enforces have to be told.

Source: the documentation and source of LeRobot 0.4 ("Bring your own hardware", `lerobot.robots.Robot`).
"""

import contextlib
import math
import pkgutil
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbook.client.protocol import ActionSpec, ObservationSpec
from offbook.errors import ConfigError, NeedsHumanError, RobotError, nearest, needs_extra
from offbook.robots.attendant import make_attendant
from offbook.robots.base import Action, RobotSpec, SafetyLimits
from offbook.robots.real import WATCHDOG_S, RealRobot, told

_CHECK = "check its power and cables, then start its worker again"
_LONGEST_WAY_S = 30.0


def lerobot(
    robot: Any,
    *,
    range: Mapping[str, Sequence[float]],
    velocity: float | Mapping[str, float],
    rate_hz: float = 30.0,
    max_steps: int = 600,
    start: Mapping[str, float] | None = None,
    prompt: str = "",
    attendant: str = "terminal",
    watchdog_s: float = WATCHDOG_S,
) -> RealRobot:
    """A cell with one of LeRobot's robots; the arguments are what a file of settings may hold.

    Args:
        robot: its configuration as LeRobot's own commands take it, such as `{"type": "so101_follower", "port":
            "/dev/ttyACM0", "id": "left", "cameras": {...}}`; in Python also an object of LeRobot's class `Robot`.
        range: least and largest command of each action, such as `{"gripper.pos": [0, 100]}`, in the robot's units.
        velocity: most units in a second that a command may change by, for all actions or for each.
        rate_hz: control steps in a second.
        max_steps: longest episode in control steps.
        start: posture at which an episode begins, by action; where the arm is when not given.
        prompt: the task in words.
        attendant: `terminal`, or `MODULE:NAME` of an `offbook.robots.attendant.Attendant`.
        watchdog_s: longest time between two commands of an episode, seconds.

    Raises:
        MissingExtraError: LeRobot is not installed.
        RobotError: the robot does not answer.
        ConfigError: a setting cannot be used.
    """
    device = _device(robot) if isinstance(robot, Mapping) else robot
    name, actions = f"lerobot {getattr(device, 'name', '')}".strip(), list(device.action_features)
    ends = [_pair(name, range, action) for action in actions]
    speeds = [float(velocity[a] if isinstance(velocity, Mapping) else velocity) for a in actions]
    if start is not None and set(start) != set(actions):
        fix = "name each action once"
        raise ConfigError(f"{name}, start", expected=f"{', '.join(actions)}", got=f"{', '.join(start)}", fix=fix)
    begin = None if start is None else np.array([start[action] for action in actions], np.float32)
    step = np.array(speeds, np.float32) / rate_hz
    arm = LeRobotArm(device, name, start=begin, step=step, period_s=1 / rate_hz)
    spec = RobotSpec(
        name="lerobot",
        observation=arm.observation,
        action=ActionSpec(size=len(actions), low=tuple(a for a, _ in ends), high=tuple(b for _, b in ends)),
        rate_hz=rate_hz,
        max_steps=max_steps,
        limits=SafetyLimits(posture=arm.posture, velocity=tuple(step.tolist())),
    )
    made = RealRobot(arm, spec, make_attendant(attendant), prompt=prompt, watchdog_s=watchdog_s)
    arm.connect()
    return made


def _pair(name: str, ranges: Mapping[str, Sequence[float]], action: str) -> tuple[float, float]:
    pair = ranges.get(action, ())
    if len(pair) != 2 or not pair[0] < pair[1]:
        where, fix = f"{name}, range of {action!r}", f'write "range": {{"{action}": [-100, 100], ...}}'
        raise ConfigError(where, expected="the least and the largest command", got=str(pair or "nothing"), fix=fix)
    return float(pair[0]), float(pair[1])


def _device(settings: Mapping[str, Any]) -> Any:
    """LeRobot's robot from its own configuration."""
    with needs_extra("lerobot"):
        import draccus
        from lerobot.robots import RobotConfig, make_robot_from_config
    kind = settings.get("type")
    # A type is known once its module was imported; some want hardware libraries of their own, or are broken.
    for package in ("lerobot.cameras", "lerobot.robots"):
        for module in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
            with contextlib.suppress(Exception):
                import_module(module.name)
    with contextlib.suppress(ImportError):
        from lerobot.utils.import_utils import register_third_party_plugins

        register_third_party_plugins()
    known = RobotConfig.get_known_choices()
    if kind not in known:
        fix = nearest(str(kind), known)
        raise ConfigError("lerobot, type of the robot", expected="a known type", got=repr(kind), fix=fix)
    try:
        return make_robot_from_config(draccus.decode(RobotConfig, dict(settings)))
    except Exception as error:  # whatever a robot's own settings refuse
        got = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        expected, fix = f"settings of a {kind}", "see its page in LeRobot's documentation"
        raise ConfigError("lerobot, robot", expected=expected, got=got, fix=fix) from error


class LeRobotArm:
    """One of LeRobot's robots as an arm.

    Args:
        device: the robot, not yet connected.
        name: for messages.
        start: posture at which an episode begins, (A,), or None.
        step: most that a command may change by in one control step, (A,).
        period_s: of a control step.

    Raises:
        ConfigError: the robot does not measure what it commands.
    """

    def __init__(
        self, device: Any, name: str, *, start: NDArray[np.float32] | None, step: NDArray[np.float32], period_s: float
    ) -> None:
        self._device, self._name, self._start, self._step, self._period_s = device, name, start, step, period_s
        shown: Mapping[str, Any] = device.observation_features
        self._last: NDArray[np.float32] | None = None
        self._halted = threading.Event()
        self._actions = list(device.action_features)
        self._numbers = [key for key, kind in shown.items() if not isinstance(kind, tuple)]
        cameras = {key: shape for key, shape in shown.items() if isinstance(shape, tuple) and shape[-1] == 3}
        missing = [action for action in self._actions if action not in self._numbers]
        if missing:
            got, fix = f"no {missing[0]!r} among {', '.join(self._numbers)}", "use a position-controlled robot"
            raise ConfigError(name, expected="a robot that shows each position it takes", got=got, fix=fix)
        self.posture = "state" if self._numbers == self._actions else "posture"
        parts = (("state", len(self._numbers)), (self.posture, len(self._actions)))
        self.observation = ObservationSpec(
            state=parts[:1] if self.posture == "state" else parts,
            cameras={key: (int(shape[0]), int(shape[1])) for key, shape in cameras.items()},
        )

    def connect(self) -> None:
        """Connects, and leaves calibrating to LeRobot's own command: it asks questions."""
        with self._told("a robot that answers"):
            if not self._device.is_connected:
                self._device.connect(calibrate=False)
        if not self._device.is_calibrated:
            fix = "calibrate it with LeRobot's own command first"
            raise NeedsHumanError(self._name, expected="a calibrated robot", got="one that is not", fix=fix)

    def prepare(self) -> None:
        """Moves to the start in steps no larger than an episode's, until it is halted."""
        if self._start is None:
            return
        self._halted.clear()
        place, _ = self._seen()
        for _ in range(math.ceil(_LONGEST_WAY_S / self._period_s)):
            way = np.clip(self._start - place, -self._step, self._step)
            if self._halted.is_set() or not np.any(way):
                return
            self._last = place  # a halt shall not lead back to where the way began
            place = self.send(place + way)
            time.sleep(self._period_s)
        fix = "clear its way, or choose another start"
        raise NeedsHumanError(self._name, expected="to reach the start", got=f"{place.round(2).tolist()}", fix=fix)

    def read(self) -> tuple[NDArray[np.float32], Mapping[str, NDArray[np.uint8]]]:
        """All numbers that it shows, (S,), and the cameras' pictures."""
        posture, seen = self._seen()
        numbers = np.array([seen[key] for key in self._numbers], np.float32)
        state = numbers if self.posture == "state" else np.concatenate([numbers, posture])
        return state, {camera: self._picture(camera, seen[camera]) for camera in self.observation.cameras}

    def send(self, action: Action) -> Action:
        """Commands positions (A,); the robot's own settings may lessen them."""
        with self._told("to go on moving"):
            asked = {key: float(value) for key, value in zip(self._actions, action, strict=True)}
            sent = self._device.send_action(asked)
            return np.array([sent.get(key, asked[key]) for key in self._actions], np.float32)

    def halt(self) -> None:
        """Commands the posture in which it was seen last, a control step ago: to look again would wait for cameras."""
        self._halted.set()
        if self._device.is_connected and self._last is not None:
            self.send(self._last)

    def close(self) -> None:
        """Disconnects; most of LeRobot's robots then let their motors go, so support an arm that would fall."""
        with contextlib.suppress(RobotError), self._told("to be let go"):
            if self._device.is_connected:
                self._device.disconnect()

    def _seen(self) -> tuple[NDArray[np.float32], Mapping[str, Any]]:
        """The posture (A,) and the whole observation."""
        with self._told("its positions"):
            seen: Mapping[str, Any] = self._device.get_observation()
            self._last = posture = np.array([seen[key] for key in self._actions], np.float32)
        return posture, seen

    def _picture(self, camera: str, frame: Any) -> NDArray[np.uint8]:
        wanted, picture = (*self.observation.cameras[camera], 3), np.asarray(frame)
        if picture.shape != wanted or picture.dtype != np.uint8:
            where, got = f"{self._name}, camera {camera!r}", f"{picture.dtype} {picture.shape}"
            raise RobotError(where, expected=f"a picture uint8 {wanted}", got=got, fix=_CHECK)
        return picture

    def _told(self, expected: str) -> contextlib.AbstractContextManager[None]:
        def fault(error: Exception) -> RobotError:
            got = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return RobotError(self._name, expected=expected, got=got, fix=_CHECK)

        return told(fault)
