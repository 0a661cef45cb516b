"""A tiny robot and tiny policies, each with one way to go wrong."""

import threading
import time
from collections.abc import Callable

import numpy as np

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, PolicyMeta
from offbook.robots.base import ActResult, RobotSpec, SafetyLimits, Score

ACTION = ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0))


class Slider:
    """Two joints that go where they are told; the score is the first joint's place at the end."""

    prompt = "slide to the right"

    def __init__(self, *, limits: SafetyLimits | None = None, steps: int = 20, rate_hz: float = 100.0, simulated=True):
        self.spec = RobotSpec(
            name="slider",
            observation=ObservationSpec(state=(("goal", 1), ("joints", 2)), cameras={"front": (16, 16)}),
            action=ACTION,
            rate_hz=rate_hz,
            max_steps=steps,
            limits=limits or SafetyLimits(),
            simulated=simulated,
        )
        self.joints = np.zeros(2, np.float32)
        self.calls: list[str] = []
        self.stops: list[str] = []
        self.steps = 0
        self.held = threading.Semaphore(0)  # one for each step of holding
        self.fail: dict[str, int] = {}  # method name -> step from which it raises

    def _may_fail(self, method: str) -> None:
        self.calls.append(method)
        if self.steps >= self.fail.get(method, 10**9):
            raise OSError(f"the {method} cable is loose")

    def reset(self, scene, seed):
        self.steps = 0
        self.joints = np.array((scene or {}).get("start", [0.0, 0.0]), np.float32)
        self._may_fail("reset")
        return self.observe()

    def observe(self):
        self._may_fail("observe")
        return Observation(
            sessions=("",),
            state=np.array([[7.0, *self.joints]], np.float32),
            images={"front": np.full((1, 16, 16, 3), self.steps % 256, np.uint8)},
            time=np.array([self.steps / self.spec.rate_hz]),
        )

    def act(self, action):
        self._may_fail("act")
        self.joints = np.asarray(action, np.float32)
        self.steps += 1
        return ActResult(applied=self.joints, reward=float(self.joints[0]), done=self.steps >= self.spec.max_steps)

    def hold(self):
        self._may_fail("hold")
        self.steps += 1
        self.held.release()
        return ActResult(applied=self.joints, done=self.steps >= self.spec.max_steps)

    def frame(self):
        self._may_fail("frame")
        return np.full((16, 16, 3), self.steps % 256, np.uint8)

    def score(self):
        self._may_fail("score")
        return Score(value=float(self.joints[0]), success=bool(self.joints[0] > 0))

    def stop(self, reason):
        self.stops.append(reason)
        self._may_fail("stop")

    def close(self):
        self.calls.append("close")

    def tool_position(self, action):
        return np.array([action[0], action[1], 0.0])


class Mover:
    """Answers each question with `chunk(question number)`; wants the joints and the camera."""

    def __init__(self, chunk: Callable[[int], np.ndarray], *, longest: int = 8, delay_s: float = 0.0):
        self.meta = PolicyMeta(
            name="mover",
            observation=ObservationSpec(state=(("joints", 2),), cameras={"front": (16, 16)}),
            action=ACTION,
            chunk=longest,
        )
        self.chunk, self.delay_s = chunk, delay_s
        self.asked: list[Observation] = []
        self.resets: list[tuple[list[str], list[str]]] = []
        self.threads: set[int] = set()

    def reset(self, sessions, prompts):
        self.resets.append((list(sessions), list(prompts)))

    def infer(self, observation):
        self.threads.add(threading.get_ident())
        self.asked.append(observation)
        time.sleep(self.delay_s)
        return np.asarray(self.chunk(len(self.asked) - 1), np.float32)[None]


def ramp(n: int = 1, step: float = 0.01) -> Callable[[int], np.ndarray]:
    """Chunks of n actions that go on where the last one ended."""
    return lambda k: np.stack([np.full(2, step * (k * n + i + 1)) for i in range(n)])


def waiting_for(release: threading.Event) -> Callable[[int], np.ndarray]:
    """Answers only once released; nobody else may wait so long."""

    def chunk(k: int) -> np.ndarray:
        assert release.wait(60), "somebody has waited for the policy"
        return np.zeros((1, 2))

    return chunk
