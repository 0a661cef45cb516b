"""What a real robot needs around its arm: a stop that holds, a watchdog, and a person who sets the scene and judges."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from offbook.client.protocol import Observation, ObservationSpec
from offbook.errors import ConfigError, RobotError
from offbook.robots.attendant import Attendant
from offbook.robots.base import Action, ActResult, RobotSpec, Score

WATCHDOG_S = 2.0
"""So long without a command and a robot stops by itself; the arena's leases live several times as long."""


@runtime_checkable
class Arm(Protocol):
    """Hardware that is commanded by positions; `RealRobot` makes a robot of it.

    Calls come from one thread, but for `halt`, which a watchdog may call from another at any time. What goes wrong
    raises RobotError, and NeedsHumanError where only a person beside the robot can mend it. An arm with a method
    `tool_position(action) -> (3,)` can be kept in a workspace.
    """

    def prepare(self) -> None:
        """Clears what an earlier stop has left and moves to where an episode begins; may take seconds.

        A `halt` meanwhile ends the motion; whether it returns then or raises makes no difference.
        """

    def read(self) -> tuple[NDArray[np.float32], Mapping[str, NDArray[np.uint8]]]:
        """The state (S,) in the order of the description, and the newest picture (H, W, 3) of each camera."""

    def send(self, action: Action) -> Action:
        """Commands one control step and does not wait for it; returns what was really commanded, (A,)."""

    def halt(self) -> None:
        """Comes to rest; returns within one control period, in any state, any number of times."""

    def close(self) -> None:
        """Lets go of the hardware; may be called twice."""


@contextlib.contextmanager
def told(fault: Callable[[Exception], RobotError]) -> Iterator[None]:
    """Whatever a driver's library raises inside the block, told as a fault of the robot's."""
    try:
        yield
    except RobotError:
        raise
    except Exception as error:  # such libraries have no common error
        raise fault(error) from error


class RealRobot:
    """A robot made of an arm and an attendant.

    An episode begins with the arm's own preparation and the attendant's word that the scene stands; it lasts until
    `max_steps`. Whoever stops the robot (the control loop, the end of the episode, or the watchdog, when no command
    came for `watchdog_s`) stops it for good: further commands are refused until the next `reset`, also one that was
    on its way in another thread.

    Args:
        arm: the hardware.
        spec: what it is; its limits must name the posture, for holding still means to send that again.
        attendant: who arranges the scene and says how well an episode went.
        prompt: the task in words; a scene with an entry `prompt` has its own.
        watchdog_s: longest time between two commands of an episode, seconds.

    Raises:
        ConfigError: the description names no posture.
    """

    tool_position: Callable[[Action], NDArray[np.float64]]

    def __init__(
        self, arm: Arm, spec: RobotSpec, attendant: Attendant, *, prompt: str = "", watchdog_s: float = WATCHDOG_S
    ) -> None:
        posture = spec.limits.posture
        if dict(spec.observation.state).get(posture) != spec.action.size:
            where, expected = f"posture of {spec.name}", f"a state part of size {spec.action.size} in its limits"
            raise ConfigError(where, expected=expected, got=repr(posture), fix="name the part that measures the action")
        self.spec, self.prompt = spec, prompt
        self._arm, self._attendant, self._usual_prompt, self._watchdog_s = arm, attendant, prompt, watchdog_s
        self._posture = spec.observation.columns(ObservationSpec(state=((posture, spec.action.size),)))
        self._images: Mapping[str, NDArray[np.uint8]] = {}
        self._last = np.zeros(spec.action.size, np.float32)
        self._steps, self._began = 0, time.monotonic()
        self._stopped, self._resting = "a robot that was not reset", True
        self._preparing = False
        self._sending = threading.Lock()
        self._commanded: float | None = None  # when; None while nothing is to be watched
        self._closed = threading.Event()
        if hasattr(arm, "tool_position"):
            self.tool_position = arm.tool_position
        threading.Thread(target=self._watch, name="offbook-watchdog", daemon=True).start()

    def reset(self, scene: Mapping[str, Any] | None, seed: int) -> Observation:
        """Prepares the arm, waits for the attendant, and begins an episode; a real scene does not follow from a seed.

        A stop from another thread holds here as it does later: the arm is halted, and no episode begins.

        Raises:
            NeedsHumanError: nobody has arranged the scene, or the arm waits for somebody.
            RobotError: the arm failed, or it was stopped meanwhile.
        """
        self.stop("a new episode")
        with self._preparation():
            self._arm.prepare()
            self._refuse_when_stopped()
            self.prompt = str((scene or {}).get("prompt", self._usual_prompt))
            self._attendant.arrange(self.prompt, scene)
            self._steps, self._began = 0, time.monotonic()
            observation = self.observe()
        self._last = observation.state[0, self._posture]
        return observation

    def observe(self) -> Observation:
        """What the arm and its cameras see now."""
        state, self._images = self._arm.read()
        return Observation(
            sessions=("",),
            state=np.asarray(state, np.float32)[None],
            images={camera: self._images[camera][None] for camera in self.spec.observation.cameras},
            time=np.array([time.monotonic() - self._began]),
        )

    def act(self, action: Action) -> ActResult:
        """Commands one control step; the last one of an episode also stops the robot.

        Raises:
            RobotError: the robot was stopped, or the arm failed.
        """
        with self._sending:
            self._refuse_when_stopped()
            self._commanded, self._resting = time.monotonic(), False
            self._last = np.asarray(self._arm.send(action), np.float32)
            self._resting = False
        if self._stopped:  # from another thread, while the command was on its way: it must not be the last word
            self.stop(self._stopped)
            self._refuse_when_stopped()
        self._commanded = time.monotonic()
        self._steps += 1
        done = self._steps >= self.spec.max_steps
        if done:
            self.stop("the episode is over")
        return ActResult(applied=self._last, done=done)

    def hold(self) -> ActResult:
        """Commands the last position again, or at first the measured one."""
        return self.act(self._last)

    def frame(self) -> NDArray[np.uint8] | None:
        """The newest picture of the first camera."""
        return next(iter(self._images.values()), None)

    def score(self) -> Score:
        """The attendant's judgement."""
        return self._attendant.judge(self.prompt)

    def stop(self, reason: str) -> None:
        """Brings the arm to rest and refuses further commands; nothing happens where it rests already."""
        self._stopped, self._commanded = self._stopped or reason or "it was stopped", None
        # A command that hangs in the driver must not keep the arm from being stopped.
        freed = self._sending.acquire(timeout=0.3 / self.spec.rate_hz)
        try:
            if not self._resting:
                self._arm.halt()
                self._resting = not self._preparing
        finally:
            if freed:
                self._sending.release()

    def close(self) -> None:
        """Stops the arm and lets go of it."""
        if not self._closed.is_set():
            self._closed.set()
            try:
                self.stop("the robot is let go")
            finally:
                self._arm.close()

    @contextlib.contextmanager
    def _preparation(self) -> Iterator[None]:
        """The arm moves by itself, in several motions perhaps: each stop halts it, and one is the last word."""
        self._stopped, self._resting, self._preparing = "", False, True
        try:
            yield
        finally:
            self._preparing = False
            if self._stopped:  # whatever a halted motion says of itself
                self.stop(self._stopped)
                self._refuse_when_stopped()

    def _refuse_when_stopped(self) -> None:
        if self._stopped:
            raise RobotError(self.spec.name, expected="an episode that runs", got=self._stopped, fix="reset the robot")

    def _watch(self) -> None:
        while not self._closed.wait(self._watchdog_s / 20):
            commanded = self._commanded
            if commanded is not None and time.monotonic() - commanded > self._watchdog_s:
                with contextlib.suppress(Exception):  # the control loop meets the same fault, if it still lives
                    self.stop(f"a stop by the watchdog: no command for {self._watchdog_s:g} s")
