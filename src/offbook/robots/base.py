"""What a robot driver provides, and the guard between the network and the motors.

A driver knows nothing of policies, arenas or networks; `SafeRobot` knows nothing of the driver but its description.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec
from offbook.errors import ConfigError

Action = NDArray[np.float32]

FAR = 100.0
"""An entry that is out of its range by more than so many times the range's width is no action."""


@dataclass(frozen=True, kw_only=True)
class SafetyLimits:
    """What the robot's side enforces whatever a policy asks for; the range of `ActionSpec` holds always.

    Attributes:
        posture: the part of the state that measures what an action commands, entry by entry, such as `joints`; the
            limits per step count from there at the start of an episode, later from the last command.
        velocity: largest change of each action entry in one control step; None for no limit.
        acceleration: largest change of that change from one step to the next.
        jerk: largest change of the acceleration from one step to the next.
        workspace: corners (low, high) of the box, in metres, which the tool may not be sent out of; needs a robot
            with a method `tool_position(action) -> (3,)`. A step out of it is refused, not clipped.
        refusals: so many refused steps end a trial as the policy's fault.
        late_steps: so many late control steps in a row end a trial as the policy's fault; real time only.
    """

    posture: str = ""
    velocity: tuple[float, ...] | None = None
    acceleration: tuple[float, ...] | None = None
    jerk: tuple[float, ...] | None = None
    workspace: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    refusals: int = 3
    late_steps: int = 60

    def __post_init__(self) -> None:
        per_step = {"velocity": self.velocity, "acceleration": self.acceleration, "jerk": self.jerk}
        given = [name for name, value in per_step.items() if value is not None]
        if given and not self.posture:
            fix = "set posture to the part of the state that measures the position"
            raise ConfigError(f"safety limit {given[0]}", expected="a posture to count from", got="none", fix=fix)
        for name in given:
            if not all(value > 0 for value in per_step[name] or ()):
                raise ConfigError(
                    f"safety limit {name}", expected="positive numbers", got=str(per_step[name]), fix="correct it"
                )
        if self.refusals < 1 or self.late_steps < 1:
            got = f"refusals {self.refusals}, late_steps {self.late_steps}"
            raise ConfigError("safety limits", expected="counts of 1 or more", got=got, fix="correct them")


@dataclass(frozen=True, kw_only=True)
class RobotSpec:
    """What a robot is, as policies and the arena are told.

    Attributes:
        name: as `make_robot` takes it.
        observation: the state parts and cameras that it shows.
        action: the actions that it accepts.
        rate_hz: control steps in a second.
        max_steps: longest episode in control steps.
        limits: what the guard enforces.
        simulated: whether the world waits for a slow policy; a real one does not.
    """

    name: str
    observation: ObservationSpec
    action: ActionSpec
    rate_hz: float
    max_steps: int
    limits: SafetyLimits = field(default_factory=SafetyLimits)
    simulated: bool = False


@dataclass(frozen=True, kw_only=True)
class ActResult:
    """What became of one control step.

    Attributes:
        applied: the action that the robot executed, (A,) float32.
        reward: of this step, where the robot knows one.
        done: whether the episode is over.
        clipped: the limits that the action asked for would have broken, such as `("velocity",)`.
        refused: why the action was not executed at all and the robot held still; empty if it was.
    """

    applied: Action
    reward: float = 0.0
    done: bool = False
    clipped: tuple[str, ...] = ()
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well an episode went.

    Attributes:
        value: the benchmark's metric, such as the fraction poured.
        success: whether the task was done; None where the robot cannot tell.
    """

    value: float
    success: bool | None = None


@runtime_checkable
class Robot(Protocol):
    """A driver: a real arm, or a simulator that stands in for one.

    All calls come from one thread, but for `stop`, which a watchdog may call from another at any time.
    """

    @property
    def spec(self) -> RobotSpec:
        """What it is."""

    @property
    def prompt(self) -> str:
        """The task in words; valid after `reset`."""

    def reset(self, scene: Mapping[str, Any] | None, seed: int) -> Observation:
        """Arranges the scene and begins an episode; the first observation shows the new scene. Raises RobotError."""

    def observe(self) -> Observation:
        """What is seen now (B = 1): every state part of the description, joined in its order, and every camera."""

    def act(self, action: Action) -> ActResult:
        """Executes one control step, (A,) float32 within the range of the description."""

    def hold(self) -> ActResult:
        """Spends one control step keeping still."""

    def frame(self) -> NDArray[np.uint8] | None:
        """A picture (H, W, 3) for people, or None."""

    def score(self) -> Score:
        """How well the episode went; called once it is over."""

    def stop(self, reason: str) -> None:
        """Brings the robot to rest: safe in any state, any number of times, within one control period."""

    def close(self) -> None:
        """Lets go of the hardware or the simulator; may be called twice."""


class SafeRobot:
    """The guard: an ordinary robot whose `act` refuses what is not an action and clips what breaks a limit.

    Refused (the robot holds still for the step): a wrong shape, NaN or infinity, an entry far out of its range (`FAR`),
    an unknown discrete choice, a way out of the workspace. Clipped, in this order, so that the first-named limits hold
    in any case: range, velocity, acceleration, jerk.

    Args:
        robot: the driver.

    Raises:
        ConfigError: the limits do not fit the robot.
    """

    def __init__(self, robot: Robot) -> None:
        self._robot, self.spec = robot, robot.spec
        spec, limits = robot.spec, robot.spec.limits
        size = spec.action.size
        for name in ("velocity", "acceleration", "jerk"):
            values = getattr(limits, name)
            if values is not None and len(values) != size:
                where = f"safety limit {name} of {spec.name}"
                raise ConfigError(
                    where, expected=f"{size} numbers", got=str(len(values)), fix="give one for each entry"
                )
        parts = dict(spec.observation.state)
        if limits.posture and parts.get(limits.posture) != size:
            where, got = f"posture of {spec.name}", f"{limits.posture!r} in {parts}"
            raise ConfigError(where, expected=f"a state part of size {size}", got=got, fix="name another part")
        self._tool = getattr(robot, "tool_position", None)
        if limits.workspace is not None and self._tool is None:
            where, fix = f"workspace of {spec.name}", "add the method or drop the limit"
            raise ConfigError(where, expected="a robot with tool_position(action)", got="none", fix=fix)
        self._columns = (
            spec.observation.columns(ObservationSpec(state=((limits.posture, size),))) if limits.posture else []
        )
        # The last command and the last two differences between commands.
        self._command, self._speed, self._push = (np.zeros(size) for _ in range(3))

    @property
    def prompt(self) -> str:
        """The task in words."""
        return self._robot.prompt

    def reset(self, scene: Mapping[str, Any] | None, seed: int) -> Observation:
        """Begins an episode; the limits per step count from the measured posture."""
        observation = self._robot.reset(scene, seed)
        self._command = observation.state[0, self._columns].astype(np.float64)
        self._speed, self._push = np.zeros(self.spec.action.size), np.zeros(self.spec.action.size)
        return observation

    def observe(self) -> Observation:
        """What is seen now."""
        return self._robot.observe()

    def act(self, action: Action) -> ActResult:
        """Executes what is left of an action within the limits, or holds."""
        refused = self._refusal(action)
        if not refused:
            allowed, clipped = self._clip(action)
            refused = self._outside(allowed)
        if refused:
            held = self.hold()
            return ActResult(applied=held.applied, reward=held.reward, done=held.done, refused=refused)
        result = self._robot.act(allowed)
        self._remember(result.applied)
        return ActResult(applied=result.applied, reward=result.reward, done=result.done, clipped=clipped)

    def hold(self) -> ActResult:
        """Keeps still for one control step."""
        result = self._robot.hold()
        self._remember(result.applied)
        return result

    def frame(self) -> NDArray[np.uint8] | None:
        """A picture for people."""
        return self._robot.frame()

    def score(self) -> Score:
        """How well the episode went."""
        return self._robot.score()

    def stop(self, reason: str) -> None:
        """Brings the robot to rest."""
        self._robot.stop(reason)

    def close(self) -> None:
        """Lets go of the robot."""
        self._robot.close()

    def _refusal(self, action: Action) -> str:
        spec = self.spec.action
        if not isinstance(action, np.ndarray) or action.shape != (spec.size,) or action.dtype.kind not in "fiu":
            return f"shape {getattr(action, 'shape', type(action).__name__)} instead of ({spec.size},)"
        bad = np.flatnonzero(~np.isfinite(action))
        if len(bad):
            return f"entry {bad[0]} is {action[bad[0]]}"
        # A policy that goes a little far is held to the range; numbers without any measure are no wish to go somewhere.
        low, high = np.array(spec.low), np.array(spec.high)
        far = FAR * np.where(high > low, high - low, np.inf)
        bad = np.flatnonzero((action < low - far) | (action > high + far))
        if len(bad):
            entry = bad[0]
            return f"entry {entry} is {action[entry]:g}, far out of the range {low[entry]:g} to {high[entry]:g}"
        if spec.choices is not None and not 0 <= round(float(action[0])) < spec.choices:
            return f"choice {action[0]:g} of 0 to {spec.choices - 1}"
        return ""

    def _clip(self, action: Action) -> tuple[Action, tuple[str, ...]]:
        limits, asked = self.spec.limits, action.astype(np.float64)
        allowed, clipped = asked, []
        low, high = np.array(self.spec.action.low), np.array(self.spec.action.high)
        bands: list[tuple[str, NDArray[np.float64], NDArray[np.float64]]] = []
        if limits.jerk is not None:
            centre = self._command + self._speed + self._push
            bands.append(("jerk", centre - limits.jerk, centre + limits.jerk))
        if limits.acceleration is not None:
            centre = self._command + self._speed
            bands.append(("acceleration", centre - limits.acceleration, centre + limits.acceleration))
        if limits.velocity is not None:
            bands.append(("velocity", self._command - limits.velocity, self._command + limits.velocity))
        # The last clip wins where two bands do not meet: the range before the velocity, and so on.
        for name, least, most in [*bands, ("range", low, high)]:
            # float32 cannot hit a bound exactly; a rounding is not worth a mention.
            if np.any(np.abs(np.clip(asked, least, most) - asked) > 1e-6 * np.maximum(1.0, np.abs(asked))):
                clipped.append(name)
            allowed = np.clip(allowed, least, most)
        return (allowed.astype(np.float32) if clipped else action), tuple(reversed(clipped))

    def _outside(self, action: Action) -> str:
        box = self.spec.limits.workspace
        if box is None or self._tool is None:
            return ""
        place = np.asarray(self._tool(action))
        if np.all(place >= box[0]) and np.all(place <= box[1]):
            return ""
        return f"the tool would leave the workspace at {np.round(place, 3).tolist()}"

    def _remember(self, applied: Action) -> None:
        if self._columns:
            speed = applied - self._command
            self._command, self._speed, self._push = applied.astype(np.float64), speed, speed - self._speed
