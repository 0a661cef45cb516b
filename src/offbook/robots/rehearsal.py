"""The dry run of a policy: one guarded episode, then the same questions again under other circumstances."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from offbook.client.protocol import Observation, Policy
from offbook.robots.base import Robot
from offbook.robots.trial import DONE, POLICY_FAULT, TrialRecord, run_trial

FINE, NOTE, FAIL = "fine", "note", "FAIL"
_KEPT = 16  # questions that are asked again
_TOLERANCE = 1e-3  # of an action entry's range: batches of another size round differently
_LATE_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at; `verdict` is `fine`, `note` (worth knowing) or `FAIL`."""

    name: str
    verdict: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a dry run found.

    Attributes:
        checks: in the order in which they were made.
        latency_ms: time for each answer.
        period_ms: time of one control step.
        record: the episode.
    """

    checks: list[Check]
    latency_ms: list[float]
    period_ms: float
    record: TrialRecord

    @property
    def failures(self) -> list[str]:
        """Why the policy would fail in an arena; empty if it would not."""
        return [f"{check.name}: {check.words}" for check in self.checks if check.verdict == FAIL]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def percentiles(self) -> dict[str, float]:
        """Latency in milliseconds: p50, p95, p99 and the longest."""
        if not self.latency_ms:
            return {}
        p50, p95, p99 = np.percentile(self.latency_ms, (50, 95, 99))
        return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": max(self.latency_ms)}

    def histogram(self, width: int = 40) -> str:
        """The latencies as text bars on doubling bins, with a mark where the control step ends."""
        exponents = [math.floor(math.log2(max(value, 1e-3))) for value in self.latency_ms]
        counts = {e: exponents.count(e) for e in range(min(exponents), max(exponents) + 1)}
        most = max(counts.values())
        lines = [f"latency of {len(self.latency_ms)} answers; a control step takes {self.period_ms:.1f} ms"]
        for exponent, count in counts.items():
            bar = "█" * math.ceil(width * count / most)
            slow = "  slower than one step" if 2.0**exponent >= self.period_ms else ""
            lines.append(f"{_ms(2.0**exponent):>10} - {_ms(2.0 ** (exponent + 1)):<10} {bar:<{width}} {count:>5}{slow}")
        lines.append("  ".join(f"{name} {_ms(value)}" for name, value in self.percentiles().items()))
        return "\n".join(lines)


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


@dataclass
class _Watched:
    """The policy, with an eye on what passes."""

    policy: Policy
    questions: list[Observation] = field(default_factory=list)
    answers: list[NDArray[np.float32]] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    actions: int = 0
    outside: int = 0

    def __post_init__(self) -> None:
        self.meta = self.policy.meta

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        self.policy.reset(sessions, prompts)

    def infer(self, observation: Observation) -> NDArray[np.float32]:
        began = time.perf_counter()
        chunk = self.policy.infer(observation)
        self.latency_ms.append(1000 * (time.perf_counter() - began))
        if len(self.questions) < _KEPT:
            self.questions.append(observation)
            self.answers.append(np.array(chunk))
        array = np.asarray(chunk)
        if array.ndim == 3 and array.shape[2] == self.meta.action.size and array.dtype.kind in "fiu":
            low, high = np.array(self.meta.action.low), np.array(self.meta.action.high)
            slack = 1e-6 * np.maximum(1.0, np.abs(array))
            outside = np.any((array < low - slack) | (array > high + slack), axis=2)
            self.actions, self.outside = self.actions + outside.size, self.outside + int(outside.sum())
        return chunk


class _TimeUpError(Exception):
    """The time that the user allowed is over: not a fault."""


def rehearse(robot: Robot, policy: Policy, *, seed: int = 0, seconds: float = 20.0) -> Rehearsal:
    """Plays at most one episode and asks some of its questions again; takes about `seconds` at the most.

    Args:
        robot: a simulated robot: it waits for the policy, a real one does not.
        policy: the policy to be tried.
        seed: of the episode.
        seconds: longest duration; an answer may take half of it.

    Example:
        >>> from offbook.robots import make_robot
        >>> from offbook.sim.experts import RandomPolicy
        >>> robot = make_robot("gym:CartPole-v1")
        >>> rehearse(robot, RandomPolicy(robot.spec.action)).ok
        True
        >>> robot.close()
    """
    began = time.monotonic()
    watched = _Watched(policy)
    times_up: list[bool] = []

    def heartbeat(progress: float) -> None:
        if time.monotonic() - began > 0.6 * seconds:
            times_up.append(True)
            raise _TimeUpError

    record = run_trial(
        robot, watched, None, seed, deadline_s=0.5 * seconds, session="rehearsal", frame_every=0, heartbeat=heartbeat
    )
    checks = [_episode(record, bool(times_up), watched)]
    if watched.actions:
        share, words = watched.outside / watched.actions, "all actions are in the robot's range"
        if watched.outside:
            words = f"{share:.0%} of {watched.actions} actions are out of the robot's range and would be clipped"
        checks.append(Check(name="range", verdict=NOTE if watched.outside else FINE, words=words))
    if record.refused and record.outcome != POLICY_FAULT:
        checks.append(
            Check(
                name="refused",
                verdict=NOTE,
                words=f"{record.refused} actions were refused (NaN, shape, or far out of all range)",
            )
        )
    if record.outcome != POLICY_FAULT and watched.questions:
        checks += _again(watched, began + seconds)
        checks.append(_speed(watched, robot))
    period = 1000 / robot.spec.rate_hz
    return Rehearsal(checks=checks, latency_ms=watched.latency_ms, period_ms=period, record=record)


def _episode(record: TrialRecord, time_is_up: bool, watched: _Watched) -> Check:
    answers = len(watched.latency_ms)
    if time_is_up and answers:
        words = f"{record.steps} steps, {answers} answers until the time was up; shapes and numbers are right"
        return Check(name="episode", verdict=FINE, words=words)
    if time_is_up:
        return Check(name="episode", verdict=FAIL, words="no answer until the time was up")
    if record.outcome != DONE:
        return Check(name="episode", verdict=FAIL, words=record.reason)
    words = f"{record.steps} steps, {answers} answers, shapes and numbers are right, score {record.score.value:.3g}"
    return Check(name="episode", verdict=FINE, words=words)


def _again(watched: _Watched, end: float) -> list[Check]:
    """The same questions after a reset, after another episode, and beside one."""
    policy, questions = watched.policy, watched.questions
    if time.monotonic() + 6e-3 * sum(watched.latency_ms[: len(questions)]) > end:
        questions = questions[: max(1, len(questions) // 4)]
    if time.monotonic() + 6e-3 * sum(watched.latency_ms[: len(questions)]) > end:
        words = "too slow to be asked again in the time given; allow more with --seconds"
        return [Check(name="repeats", verdict=NOTE, words=words)]

    def ask(beside: bool = False) -> list[NDArray[np.float32]]:
        sessions = ["rehearsal", "beside"] if beside else ["rehearsal"]
        policy.reset(sessions, [""] * len(sessions))
        answers = []
        for i, question in enumerate(questions):
            asked = _pair(question, questions[-1 - i]) if beside else question
            answers.append(np.array(policy.infer(asked)[:1]))
        return answers

    try:
        first, second = ask(), ask()
        policy.reset(["rehearsal"], [""])
        for question in reversed(questions):
            policy.infer(question)
        third, paired = ask(), ask(beside=True)
    except Exception as error:  # the policy is anybody's code
        words = f"asked again, it raised {type(error).__name__}: {error}".splitlines()[0]
        return [Check(name="repeats", verdict=FAIL, words=words)]
    return _compare(watched, first, second, third, paired)


def _compare(
    watched: _Watched,
    first: list[NDArray[np.float32]],
    second: list[NDArray[np.float32]],
    third: list[NDArray[np.float32]],
    paired: list[NDArray[np.float32]],
) -> list[Check]:
    low, high = np.array(watched.meta.action.low), np.array(watched.meta.action.high)
    reach = np.where(np.isfinite(high - low), high - low, 1.0)

    def differ(some: list[NDArray[np.float32]], others: list[NDArray[np.float32]]) -> bool:
        pairs = zip(some, others, strict=True)
        return any(a.shape != b.shape or bool(np.any(np.abs(a - b) > _TOLERANCE * reach)) for a, b in pairs)

    if differ(first, second):
        words = "equal episodes get different answers: a random policy, or one that keeps memory over a reset"
        return [Check(name="repeats", verdict=NOTE, words=words)]
    checks = [Check(name="repeats", verdict=FINE, words="equal episodes get equal answers")]
    if differ(watched.answers[: len(first)], first) or differ(first, third):
        words = "answers depend on the episode before: reset() must forget it"
        checks.append(Check(name="reset", verdict=FAIL, words=words))
    else:
        checks.append(Check(name="reset", verdict=FINE, words="nothing is left of an episode after reset()"))
    if differ(first, paired):
        words = "answers to one session depend on another: keep memory by session name"
        checks.append(Check(name="sessions", verdict=FAIL, words=words))
    else:
        checks.append(Check(name="sessions", verdict=FINE, words="two sessions in one call do not mix"))
    return checks


def _speed(watched: _Watched, robot: Robot) -> Check:
    period = 1000 / robot.spec.rate_hz
    # Of each answer's steps those are late in which the robot had to wait for it.
    late = sum(math.floor(value / period) for value in watched.latency_ms)
    steps = max(1, late + watched.actions)
    share = late / steps
    words = f"in real time {share:.0%} of the steps would be late"
    if share <= _LATE_SHARE:
        return Check(name="speed", verdict=FINE, words=words)
    return Check(name="speed", verdict=NOTE, words=f"{words}; a simulated robot waits, a real one does not")


def _pair(one: Observation, other: Observation) -> Observation:
    return Observation(
        sessions=("rehearsal", "beside"),
        state=np.concatenate([one.state, other.state]),
        images={camera: np.concatenate([one.images[camera], other.images[camera]]) for camera in one.images},
        time=np.concatenate([one.time, other.time]),
    )
