"""The control loop of one trial: a robot, a policy, a scene and a seed in; everything worth knowing of it out."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbook.client.channel import InferenceThread
from offbook.client.protocol import Observation, Policy, check_chunk, check_fit
from offbook.errors import ConfigError, NeedsHumanError, OffbookError, RobotError
from offbook.robots.base import ActResult, Robot, SafeRobot, Score

DONE, POLICY_FAULT, ROBOT_FAULT, NEEDS_HUMAN = "done", "policy_fault", "robot_fault", "needs_human"
_RESET_S = 30.0  # a policy may load and warm up before its first step
_PATIENCE_S = 0.5  # longest time without a heartbeat while the policy thinks
_MOST_EVENTS = 100


@dataclass(frozen=True, kw_only=True)
class TrialEvent:
    """Something that happened during a trial.

    Attributes:
        tick: control step.
        time: seconds of robot time since the reset.
        kind: `reset`, `late`, `limit`, `refused`, `fault` or `end`.
        text: one line.
    """

    tick: int
    time: float
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial, T control steps long.

    Attributes:
        outcome: `done`, `policy_fault` (the policy failed: it stands as it is), `robot_fault` (robot, worker or arena
            failed: the trial may be attempted again with the same scene and seed), or `needs_human` (the same, but
            somebody has to see to the robot before).
        reason: one line; empty when done.
        score: how well it went; the worst unless done.
        time: (T,) seconds since the reset at which each step began.
        state: (T, S) what was seen before each step.
        action: (T, A) what was executed.
        reward: (T,).
        late: (T,) whether the robot had to hold because no action was there in time; real time only.
        latency_ms: (T,) time the policy took for the answer that arrived in a step; NaN where none arrived.
        frames: pictures (H, W, 3), one for every `frame_every` steps and the last; none when `on_frame` took them.
        frame_rate: pictures in a second at the robot's own speed.
        events: the first hundred.
        clipped: number of steps in which a limit changed the action, by limit.
        refused: number of refused steps.
    """

    scene: Mapping[str, Any] | None
    seed: int
    outcome: str
    reason: str
    score: Score
    time: NDArray[np.float64]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    reward: NDArray[np.float64]
    late: NDArray[np.bool_]
    latency_ms: NDArray[np.float64]
    frames: list[NDArray[np.uint8]]
    frame_rate: float
    events: list[TrialEvent]
    clipped: Mapping[str, int]
    refused: int

    @property
    def steps(self) -> int:
        """Number T of control steps."""
        return len(self.time)

    @property
    def late_share(self) -> float:
        """Share of late steps; above 0.1 a result is shown as degraded by latency."""
        return float(self.late.mean()) if len(self.late) else 0.0


def run_trial(
    robot: Robot,
    policy: Policy,
    scene: Mapping[str, Any] | None,
    seed: int,
    *,
    sync: bool = True,
    deadline_s: float = 10.0,
    session: str = "trial",
    prompt: str = "",
    frame_every: int = 2,
    heartbeat: Callable[[float], None] = lambda progress: None,
    on_event: Callable[[TrialEvent], None] = lambda event: None,
    on_frame: Callable[[NDArray[np.uint8]], None] | None = None,
) -> TrialRecord:
    """Plays one trial and never raises for what robot or policy do: faults are outcomes with a reason.

    With `sync` (simulators only) the world waits for each answer, up to the deadline. Otherwise control steps follow
    one another at the robot's rate while the policy thinks in a thread: in each step the robot executes the newest
    chunk's action for that step, or, where it came too late for all of them, its last one; when there is none it
    holds, and the step counts as late. A chunk is executed to its end before the next is asked for.

    Args:
        robot: a driver; it is guarded by `SafeRobot` unless it is one.
        policy: who acts.
        scene: JSON-able arrangement, or None for the robot's own choice by seed.
        seed: of the trial.
        sync: whether the world waits for the policy.
        deadline_s: longest wait for one answer; a policy that takes longer is at fault.
        session: name of the episode towards the policy; it should tell nothing of scene and seed.
        prompt: the task in words, for a robot that has none of its own.
        frame_every: keep a picture every so many steps; 0 for none.
        heartbeat: called with the share of the trial that is done, at each control step and at least every half
            second; it must be quick. When it raises, the robot is stopped and the trial is a robot fault.
        on_event: called with each event as it happens.
        on_frame: takes each picture, which then is not kept in the record; it must be quick and not raise.

    Raises:
        ConfigError: `sync` on a robot that is not simulated.

    Example:
        >>> from offbook.robots import make_robot
        >>> from offbook.sim.experts import make_expert
        >>> robot = make_robot("pour")
        >>> record = run_trial(robot, make_expert("offbook:pour"), {"bowl": [0.5, 0.1]}, seed=3, frame_every=0)
        >>> record.outcome, record.score.success
        ('done', True)
        >>> robot.close()
    """
    if sync and not robot.spec.simulated:
        fix = "use sync=False: a real robot does not wait"
        raise ConfigError(
            f"trial on {robot.spec.name}", expected="a simulated robot with sync", got="a real one", fix=fix
        )
    guard = robot if isinstance(robot, SafeRobot) else SafeRobot(robot)
    trial = _Trial(guard, policy, session, deadline_s, frame_every, heartbeat, on_event, on_frame)
    outcome, reason = DONE, ""
    try:
        trial.begin(scene, seed, prompt)
        trial.play(sync)
        score = trial.score()
    except _FaultError as fault:
        outcome, reason = fault.outcome, fault.reason
        score = Score(value=0.0, success=False)
        trial.note("fault", reason)
    finally:
        # Whatever happened, a stop that fails included, the arm must have been told to rest.
        trial.thread.close()
        stopped = trial.stop(reason or "the trial is over")
    if stopped and outcome == DONE:
        outcome, reason = ROBOT_FAULT, stopped
    trial.note("end", outcome if not reason else f"{outcome}: {reason}")
    return trial.record(scene, seed, outcome, reason, score, frame_every)


class _FaultError(Exception):
    """Ends a trial."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


@dataclass
class _Trial:
    robot: SafeRobot
    policy: Policy
    session: str
    deadline_s: float
    frame_every: int
    heartbeat: Callable[[float], None]
    on_event: Callable[[TrialEvent], None]
    on_frame: Callable[[NDArray[np.uint8]], None] | None
    thread: InferenceThread = field(default_factory=InferenceThread)
    chunk: NDArray[np.float32] | None = None  # the newest answer, (N, A)
    chunk_tick: int = 0  # the control step in which its observation was made
    pending: "Future[tuple[NDArray[np.float32], float]] | None" = None
    asked_tick: int = 0
    asked_at: float = 0.0
    latency_ms: float = np.nan
    late_streak: int = 0
    streak: tuple[str, ...] = ()
    refused: int = 0
    clipped: dict[str, int] = field(default_factory=dict)
    events: list[TrialEvent] = field(default_factory=list)
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    rows: list[tuple[float, Any, Any, float, bool, float]] = field(default_factory=list)

    # --- the robot's side: whatever goes wrong here is nobody's policy's fault ---

    def _robot(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except NeedsHumanError as error:
            raise _FaultError(NEEDS_HUMAN, str(error)) from error
        except Exception as error:  # drivers fail in ways of their own; none may take the worker down
            raise _FaultError(ROBOT_FAULT, _line(error)) from error

    def _beat(self) -> None:
        try:
            self.heartbeat(len(self.rows) / self.robot.spec.max_steps)
        except Exception as error:  # the lease is gone, or the arena: another worker may take over, so rest
            raise _FaultError(ROBOT_FAULT, f"the heartbeat failed: {_line(error)}") from error

    def begin(self, scene: Mapping[str, Any] | None, seed: int, usual: str) -> None:
        """Resets robot and policy."""
        spec = self.robot.spec
        try:
            check_fit(self.policy.meta, spec.observation, spec.action, spec.name)
        except ConfigError as error:
            raise _FaultError(POLICY_FAULT, str(error)) from error
        self._beat()
        self._robot(self.robot.reset, scene, seed)
        self._film(0)
        prompt = self._robot(lambda: self.robot.prompt) or usual
        self._await(self.thread.submit(self.policy.reset, [self.session], [prompt]), max(self.deadline_s, _RESET_S))
        self.note("reset", f"the episode begins: {prompt}" if prompt else "the episode begins")

    def stop(self, reason: str) -> str:
        """Stops the robot; returns what went wrong in doing so."""
        try:
            self.robot.stop(reason)
        except Exception as error:  # said in the record; there is nothing else left to be done
            return f"the robot could not be stopped: {_line(error)}"
        return ""

    def score(self) -> Score:
        """The robot's own word on how it went."""
        score = self._robot(self.robot.score)
        if not isinstance(score, Score) or not np.isfinite(score.value):
            raise _FaultError(ROBOT_FAULT, f"the robot's score is {score}")
        return score

    # --- the policy's side ---

    def _await(self, future: "Future[Any]", seconds: float) -> Any:
        end = time.monotonic() + seconds
        while not future.done():
            left = end - time.monotonic()
            if left <= 0:
                raise _FaultError(POLICY_FAULT, f"no answer from the policy within {seconds:g} s")
            wait_for([future], timeout=min(left, _PATIENCE_S))
            self._beat()
        return self._result(future)

    def _result(self, future: "Future[Any]") -> Any:
        try:
            return future.result()
        except RobotError as error:  # the relay or the arena, not the policy behind it
            raise _FaultError(ROBOT_FAULT, str(error)) from error
        except Exception as error:  # a policy is anybody's code
            raise _FaultError(POLICY_FAULT, _line(error)) from error

    def _ask(self, observation: Observation, tick: int) -> None:
        wanted, shown = self.policy.meta.observation, self.robot.spec.observation
        question = Observation(
            sessions=(self.session,),
            state=observation.state[:, shown.columns(wanted)],
            images={camera: observation.images[camera] for camera in wanted.cameras},
            time=observation.time,
        )
        self.asked_tick, self.asked_at = tick, time.monotonic()
        self.pending = self.thread.submit(self._infer, question, self.asked_at)

    def _infer(self, question: Observation, asked_at: float) -> tuple[NDArray[np.float32], float]:
        # NaN passes here: the guard refuses such steps one by one.
        chunk = check_chunk(self.policy.infer(question), 1, self.policy.meta, finite=False)[0]
        return chunk, 1000 * (time.monotonic() - asked_at)

    def _answered(self) -> None:
        if self.pending is not None and self.pending.done():
            self.chunk, self.latency_ms = self._result(self.pending)
            self.chunk_tick, self.pending = self.asked_tick, None

    # --- the loop ---

    def play(self, sync: bool) -> None:
        """Control steps until the robot says that the episode is over."""
        spec = self.robot.spec
        period = 1.0 / spec.rate_hz
        start = time.monotonic()
        for tick in range(spec.max_steps):
            self._beat()
            observation = self._robot(self.robot.observe)
            self.latency_ms = np.nan
            if sync:
                action = self._choose_waiting(observation, tick)
            else:
                action = self._choose_in_time(observation, tick, start + 0.9 * period)
            late = action is None
            result: ActResult = self._robot(self.robot.hold) if late else self._robot(self.robot.act, action)
            # The driver may reuse its buffers: what is kept is copied.
            state = np.array(observation.state[0])
            row = (float(observation.time[0]), state, np.array(result.applied), result.reward, late, self.latency_ms)
            self.rows.append(row)
            self._judge(result, late=late)
            if (tick + 1) % max(self.frame_every, 1) == 0 or result.done:
                self._film(tick + 1)
            if result.done:
                return
            if not sync:
                # A step that took too long is not caught up with by a burst of short ones.
                start = max(start + period, time.monotonic())
                time.sleep(max(0.0, start - time.monotonic()))

    def _choose_waiting(self, observation: Observation, tick: int) -> NDArray[np.float32] | None:
        if self.chunk is None or tick - self.chunk_tick >= len(self.chunk):
            self._ask(observation, tick)
            if self.pending is not None:
                self._await(self.pending, self.deadline_s)
            self._answered()
        return None if self.chunk is None else self.chunk[tick - self.chunk_tick]

    def _choose_in_time(self, observation: Observation, tick: int, due: float) -> NDArray[np.float32] | None:
        if self.chunk is None and self.pending is None:
            self._ask(observation, tick)
        if self.pending is not None:
            wait_for([self.pending], timeout=max(0.0, due - time.monotonic()))
            self._answered()
        if self.chunk is None:
            if time.monotonic() - self.asked_at > self.deadline_s:
                raise _FaultError(POLICY_FAULT, f"no answer from the policy within {self.deadline_s:g} s")
            return None
        # An answer that came late skips the steps that are past, but gives at least its last action.
        step = min(tick - self.chunk_tick, len(self.chunk) - 1)
        action: NDArray[np.float32] = self.chunk[step]
        if step == len(self.chunk) - 1:
            self.chunk = None
        return action

    def _judge(self, result: ActResult, *, late: bool) -> None:
        """Counts what a policy may do only so often."""
        limits, tick = self.robot.spec.limits, len(self.rows) - 1
        self.late_streak = self.late_streak + 1 if late else 0
        if self.late_streak == 1:
            self.note("late", "no action in time: the robot holds")
        if self.late_streak >= limits.late_steps:
            raise _FaultError(POLICY_FAULT, f"no action in time for {self.late_streak} steps in a row")
        for name in result.clipped:
            self.clipped[name] = self.clipped.get(name, 0) + 1
        if result.clipped and result.clipped != self.streak:
            self.note("limit", f"the {' and '.join(result.clipped)} limit changed the action")
        self.streak = result.clipped
        if result.refused:
            self.refused += 1
            self.note("refused", result.refused)
            if self.refused >= limits.refusals:
                raise _FaultError(
                    POLICY_FAULT, f"{self.refused} refused actions, the last at step {tick}: {result.refused}"
                )

    def _film(self, tick: int) -> None:
        if self.frame_every:
            frame = self._robot(self.robot.frame)
            if frame is not None:
                (self.on_frame or self.frames.append)(np.array(frame))

    def note(self, kind: str, text: str) -> None:
        """Keeps an event and tells it; the end is always kept."""
        seconds = len(self.rows) / self.robot.spec.rate_hz
        event = TrialEvent(tick=len(self.rows), time=seconds, kind=kind, text=text)
        if len(self.events) < _MOST_EVENTS or kind in ("fault", "end"):
            self.events.append(event)
            self.on_event(event)

    def record(
        self, scene: Mapping[str, Any] | None, seed: int, outcome: str, reason: str, score: Score, frame_every: int
    ) -> TrialRecord:
        """Everything, as arrays."""
        spec, rows = self.robot.spec, self.rows
        return TrialRecord(
            scene=scene,
            seed=seed,
            outcome=outcome,
            reason=reason,
            score=score,
            time=np.array([row[0] for row in rows], np.float64),
            state=np.array([row[1] for row in rows], np.float32).reshape(len(rows), spec.observation.state_size),
            action=np.array([row[2] for row in rows], np.float32).reshape(len(rows), spec.action.size),
            reward=np.array([row[3] for row in rows], np.float64),
            late=np.array([row[4] for row in rows], np.bool_),
            latency_ms=np.array([row[5] for row in rows], np.float64),
            frames=self.frames,
            frame_rate=spec.rate_hz / max(frame_every, 1),
            events=self.events,
            clipped=self.clipped,
            refused=self.refused,
        )


def _line(error: BaseException) -> str:
    if isinstance(error, OffbookError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]
