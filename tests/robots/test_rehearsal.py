"""The dry run finds what an arena would stumble over."""

import re
import threading
import time

import numpy as np
import pytest
from arms import Mover, Slider, ramp, waiting_for

from offbook.robots.rehearsal import rehearse


def verdicts(policy, robot=None, **options) -> dict[str, str]:
    result = rehearse(robot or Slider(), policy, **options)
    assert result.ok == (not result.failures)
    return {check.name: check.verdict for check in result.checks}


class Follower(Mover):
    """Answers from the state alone."""

    def __init__(self, **options):
        super().__init__(ramp(), **options)

    def infer(self, observation):
        time.sleep(self.delay_s)
        return (0.9 * observation.state[:, None] + 0.01).astype(np.float32)


class Forgetful(Follower):
    """Remembers across resets how often it was asked."""

    asked_ever = 0

    def infer(self, observation):
        self.asked_ever = min(self.asked_ever + 1, 20)
        return super().infer(observation) + 0.01 * self.asked_ever


class Muddled(Follower):
    """Mixes the sessions of a batch."""

    def infer(self, observation):
        return super().infer(observation) + len(observation.sessions) * 0.1


class Dice(Follower):
    rng = np.random.default_rng(0)

    def infer(self, observation):
        return super().infer(observation) + self.rng.normal(size=(len(observation.sessions), 1, 2)) * 0.1


def test_a_sound_policy_passes_every_check():
    result = rehearse(Slider(), Follower())
    assert result.ok
    assert [check.name for check in result.checks] == ["episode", "range", "repeats", "reset", "sessions", "speed"]
    assert {check.verdict for check in result.checks} == {"fine"}
    assert len(result.latency_ms) == 20
    assert result.percentiles()["p50"] <= result.percentiles()["max"]


def test_memory_over_a_reset_fails():
    result = rehearse(Slider(), Forgetful())
    assert result.failures == ["reset: answers depend on the episode before: reset() must forget it"]


def test_mixed_sessions_fail():
    result = rehearse(Slider(), Muddled())
    assert result.failures == ["sessions: answers to one session depend on another: keep memory by session name"]


def test_a_random_policy_is_noted_not_failed():
    assert verdicts(Dice())["repeats"] == "note"


def test_actions_out_of_range_are_noted():
    assert verdicts(Mover(lambda k: np.full((1, 2), 3.0)))["range"] == "note"


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (lambda k: np.full((1, 2), np.nan), "3 refused actions"),
        (lambda k: np.zeros((1, 3)), "got shape (1, 1, 3)"),
        (lambda k: 1 / 0, "ZeroDivisionError"),
    ],
)
@pytest.mark.faults
def test_answers_that_no_robot_takes_fail(chunk, words):
    (failure,) = rehearse(Slider(), Mover(chunk)).failures
    assert failure.startswith("episode: ")
    assert words in failure


@pytest.mark.faults
def test_a_policy_that_never_answers_fails_in_the_time_given():
    release = threading.Event()
    result = rehearse(Slider(), Mover(waiting_for(release)), seconds=1)
    release.set()
    assert "no answer from the policy within 0.5 s" in result.failures[0]


def test_the_time_given_ends_a_long_episode_without_blame():
    result = rehearse(Slider(steps=10**6), Follower(delay_s=0.01), seconds=1.5)
    assert result.record.steps < 1000
    assert result.ok
    assert "until the time was up" in result.checks[0].words


def test_slowness_is_told_in_late_steps():
    # 30 ms an answer at 100 Hz: three of four steps would be late, some more on a busy machine.
    result = rehearse(Slider(), Follower(delay_s=0.03))
    speed = result.checks[-1]
    assert (speed.name, speed.verdict) == ("speed", "note")
    late = int(re.search(r"(\d+)% of the steps", speed.words)[1])
    assert 75 <= late <= 95
    text = result.histogram()
    assert "slower than one step" in text
    assert "a control step takes 10.0 ms" in text
    assert "█" in text


def test_a_policy_for_another_robot_fails():
    policy = Follower()
    policy.meta = type(policy.meta)(
        name="other",
        observation=policy.meta.observation,
        action=type(policy.meta.action)(size=3, low=(0.0,) * 3, high=(1.0,) * 3),
    )
    assert "actions of size 3" in rehearse(Slider(), policy).failures[0]
