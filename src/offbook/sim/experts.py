"""Scripted experts, graded from flawless to hopeless, and the random policy: all of them a `Policy`.

An expert sees what any policy sees, through the same observation, so it can stand on the far side of a network.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float, Float32

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, Policy, PolicyMeta
from offbook.errors import ConfigError, nearest, needs_extra
from offbook.runs.seeding import generator
from offbook.sim.planners import DoorKeyExpert, Drift, MazeExpert
from offbook.sim.spaces import action_spec
from offbook.sim.tabletop import arm
from offbook.sim.tabletop.pour import CUP_HEIGHT, OBJECTS, START, cup_frame
from offbook.sim.tabletop.render import prepare_mujoco

EXPERTS = ("offbook:pour", "metaworld:<task>", "robotics:PointMaze_<maze>", "minigrid:MiniGrid-DoorKey-<size>")
"""The environments that have a scripted expert."""


def make_expert(env_id: str, grade: float = 1.0, seed: int = 0) -> Policy:
    """The scripted expert of an environment.

    Args:
        env_id: such as `"offbook:pour"` or `"metaworld:drawer-open-v3"`.
        grade: 1 is the expert as written; below that come aiming errors, noise and deliberate faults (giving up half
            way, pouring too early), growing more frequent and larger down to 0.
        seed: faults depend on this seed and the session's name alone, not on who else is served.

    Raises:
        ConfigError: the environment has no expert, or the grade is not in [0, 1].

    Example:
        >>> make_expert("offbook:pour").meta.observation.state
        (('joints', 7), ('objects', 7))
    """
    if not 0.0 <= grade <= 1.0:
        raise ConfigError("grade", expected="0 (hopeless) to 1 (expert)", got=str(grade), fix="choose another grade")
    if env_id == "offbook:pour":
        return PouringExpert(grade, seed)
    if env_id.startswith("metaworld:"):
        return MetaWorldExpert(env_id.removeprefix("metaworld:"), grade, seed)
    if env_id.startswith("robotics:PointMaze"):
        return MazeExpert(env_id, grade, seed)
    if env_id.startswith("minigrid:MiniGrid-DoorKey"):
        return DoorKeyExpert(grade, seed)
    raise ConfigError(
        f"expert for {env_id!r}",
        expected=f"one of {', '.join(EXPERTS)}",
        got="an environment without a scripted expert",
        fix="use the random policy or a trained one",
    )


class RandomPolicy:
    """Draws every action uniformly from the whole range of actions; from a normal distribution where that is infinite.

    Args:
        action: what the robot accepts.
        seed: the numbers depend on this seed and the session's name alone.
        memory: from 0 to below 1, how much of the last action stays in the next; bounded continuous actions only.

    Example:
        >>> policy = RandomPolicy(ActionSpec(size=1, low=(-2.0,), high=(2.0,)))
        >>> policy.reset(["a"], [""])
        >>> empty = Observation(sessions=("a",), state=np.zeros((1, 0), np.float32), images={}, time=np.zeros(1))
        >>> policy.infer(empty).shape
        (1, 1, 1)
    """

    def __init__(self, action: ActionSpec, seed: int = 0, memory: float = 0.0) -> None:
        if memory and not (action.choices is None and np.isfinite([*action.low, *action.high]).all()):
            fix = "draw the actions independently"
            raise ConfigError("drifting actions", expected="bounded continuous ones", got=str(action), fix=fix)
        self.meta = PolicyMeta(name="drift" if memory else "random", observation=ObservationSpec(), action=action)
        self._seed, self._memory = seed, memory
        self._streams: dict[str, np.random.Generator] = {}
        self._drifts: dict[str, Drift] = {}

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Begins each session's own stream of random numbers anew."""
        for session in sessions:
            rng = self._streams[session] = generator(self._seed, "random policy", session)
            if self._memory:
                self._drifts[session] = Drift(self.meta.action.size, rng, self._memory)

    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 action"]:
        """One random action for each session."""
        return np.stack([self._draw(session) for session in observation.sessions])[:, None]

    def _draw(self, session: str) -> Float32[np.ndarray, "action"]:
        spec, rng = self.meta.action, self._streams[session]
        if spec.choices is not None:
            return np.array([rng.integers(spec.choices)], np.float32)
        low, high = np.array(spec.low), np.array(spec.high)
        if self._memory:
            share = (1.0 + self._drifts[session].next()) / 2
            return np.asarray(low + (high - low) * share, np.float32)
        bounded = np.isfinite(low) & np.isfinite(high)
        uniform = rng.uniform(np.where(bounded, low, 0.0), np.where(bounded, high, 1.0))
        return np.where(bounded, uniform, rng.standard_normal(spec.size)).astype(np.float32)


def random_policy(env: gym.Env[Any, Any], seed: int = 0, memory: float = 0.0) -> RandomPolicy:
    """The random policy for the actions of an environment; the floor of every comparison."""
    return RandomPolicy(action_spec(env.action_space), seed, memory)


@dataclass
class _Faults:
    """What goes wrong in one session of a graded expert."""

    rng: np.random.Generator
    aim: Float[np.ndarray, "2"]  # metres beside the bowl's centre
    full_tilt: float  # radians
    start_distance: float  # metres from the goal at which the pouring begins
    give_up: int  # step at which the arm stops for good
    noise: float  # radians
    step: int = 0


class PouringExpert:
    """Carries the cup over the bowl and tips it, deciding from the joints and the bowl's place at each step.

    The law has no memory and no clock: at each step the cup's mouth is drawn towards its place beside the bowl, the
    more the cup is there, the more it is tipped, and inverse kinematics gives the joint angles. A policy that imitates
    it therefore finds every action explained by what it sees. (A graded expert's faults are drawn per session.)

    Args:
        grade: 1 without faults, down to 0.
        seed: for the faults.
    """

    def __init__(self, grade: float = 1.0, seed: int = 0) -> None:
        name = "scripted-expert" if grade == 1 else f"scripted-grade-{grade:g}"
        self.meta = PolicyMeta(
            name=name,
            observation=ObservationSpec(state=(("joints", 7), ("objects", len(OBJECTS)))),
            action=ActionSpec(size=7, low=tuple(arm.LOW.tolist()), high=tuple(arm.HIGH.tolist())),
        )
        self._grade, self._seed = grade, seed
        self._faults: dict[str, _Faults] = {}

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Draws what will go wrong in each session."""
        for session in sessions:
            self._faults[session] = self._draw(generator(self._seed, "pouring faults", session))

    def _draw(self, rng: np.random.Generator) -> _Faults:
        badness = 1.0 - self._grade
        aim, kind, how_much = rng.standard_normal(2), rng.random(), rng.random()
        faults = _Faults(
            rng=rng,
            aim=aim * 0.10 * badness,
            full_tilt=2.2,
            start_distance=0.04,
            give_up=10**9,
            noise=0.05 * badness,
        )
        if kind < badness * 0.3:
            faults.full_tilt = 0.5 + 0.7 * how_much
        elif kind < badness * 0.5:
            faults.start_distance = 0.08 + 0.2 * how_much
        elif kind < badness * 0.7:
            faults.give_up = 10 + int(50 * how_much)
        return faults

    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 7"]:
        """The next joint angles for each session."""
        answers = np.empty((len(observation.sessions), 1, 7), np.float32)
        for i, session in enumerate(observation.sessions):
            state = observation.state[i].astype(np.float64)
            answers[i, 0] = self._act(state[:7], state[7:], self._faults[session])
        return answers

    def _act(
        self, joints: Float[np.ndarray, "7"], objects: Float[np.ndarray, "k"], faults: _Faults
    ) -> Float[np.ndarray, "7"]:
        faults.step += 1
        if faults.step > faults.give_up:
            return joints
        bowl, rim, cup_radius = objects[:2] + faults.aim, float(objects[2]), float(objects[4])
        point, axis = cup_frame(cup_radius)
        flange = arm.forward(joints)[7]
        mouth, now = flange[:3, 3] + flange[:3, :3] @ point, flange[:3, :3] @ axis
        # The cup is tipped sideways, seen from the arm, to its left.
        side = np.array([-bowl[1], bowl[0], 0.0]) / max(float(np.hypot(*bowl)), 1e-6)
        tilt = float(np.arctan2(now @ side, now[2]))
        here = float(np.hypot(*(mouth - _mouth_goal(bowl, rim, cup_radius, side, tilt))[:2]))
        # Tipping starts within `start_distance` of the goal, and backs off should the cup be pushed away from it.
        eagerness = np.clip(1.5 - here / faults.start_distance, -1.0, 1.0)
        next_tilt = float(np.clip(tilt + 0.09 * eagerness, 0.0, faults.full_tilt))
        goal = _mouth_goal(bowl, rim, cup_radius, side, next_tilt)
        way = goal - mouth
        stride = min(1.0, 0.035 / max(float(np.linalg.norm(way)), 1e-9))
        answer = arm.reach(
            joints,
            point=point,
            axis=axis,
            target_point=mouth + stride * way,
            target_axis=np.array([0.0, 0.0, np.cos(next_tilt)]) + np.sin(next_tilt) * side,
            rest=START,
            iterations=2,
        )
        return answer + faults.noise * faults.rng.standard_normal(7)


def _mouth_goal(
    bowl: Float[np.ndarray, "2"], rim: float, cup_radius: float, side: Float[np.ndarray, "3"], tilt: float
) -> Float[np.ndarray, "3"]:
    """Where the centre of the cup's mouth belongs at a tilt, so that its lip stays above the bowl.

    Upright, the whole cup hangs higher than the rim, to pass over it; tipped, the lip comes down to 5 cm above the rim.
    """
    clearance = 0.05 + (CUP_HEIGHT - 0.02) * float(np.clip(1.0 - tilt / 1.2, 0.0, 1.0))
    lip = np.array([*(bowl - 0.025 * side[:2]), rim + clearance])
    from_lip = np.cos(tilt) * side - np.sin(tilt) * np.array([0.0, 0.0, 1.0])
    return np.asarray(lip - cup_radius * from_lip)


class MetaWorldExpert:
    """One of the scripted policies that come with Meta-World, wrapped as a `Policy`.

    Args:
        task: such as `"drawer-open-v3"`.
        grade: 1 as written; below that grows the noise on the action, and the share of sessions that stop half way.
        seed: for the noise and the faults.

    Raises:
        ConfigError: there is no such task.
        MissingExtraError: Meta-World is not installed.
    """

    def __init__(self, task: str, grade: float = 1.0, seed: int = 0) -> None:
        prepare_mujoco()
        with needs_extra("sim"):
            from metaworld.policies import ENV_POLICY_MAP
        if task not in ENV_POLICY_MAP:
            raise ConfigError(
                f"expert for metaworld:{task}",
                expected="a Meta-World task",
                got=repr(task),
                fix=nearest(task, ENV_POLICY_MAP),
            )
        # The scripts keep no memory between steps, so one serves all sessions.
        script: Any = ENV_POLICY_MAP[task]
        self._script = script()
        self.meta = PolicyMeta(
            name="scripted-expert" if grade == 1 else f"scripted-grade-{grade:g}",
            observation=ObservationSpec(state=(("observation", 39),)),
            action=ActionSpec(size=4, low=(-1.0,) * 4, high=(1.0,) * 4),
        )
        self._badness, self._seed = 1.0 - grade, seed
        self._streams: dict[str, np.random.Generator] = {}
        self._steps_left: dict[str, int] = {}

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Draws what will go wrong in each session."""
        for session in sessions:
            rng = self._streams[session] = generator(self._seed, "meta-world faults", session)
            stops = rng.random() < 0.7 * self._badness
            self._steps_left[session] = int(rng.integers(10, 60)) if stops else 10**9

    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 4"]:
        """The next displacement of the hand and effort of the gripper for each session."""
        answers = np.zeros((len(observation.sessions), 1, 4), np.float32)
        for i, session in enumerate(observation.sessions):
            self._steps_left[session] -= 1
            if self._steps_left[session] >= 0:
                noise = self._badness * self._streams[session].standard_normal(4)
                answers[i, 0] = np.clip(self._ask(observation.state[i]) + noise, -1.0, 1.0)
        return answers

    def _ask(self, state: Float32[np.ndarray, "39"]) -> Float[np.ndarray, "4"]:
        with warnings.catch_warnings():
            # The scripts say so of their own constants; the action is clipped.
            warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high", category=UserWarning)
            return np.asarray(self._script.get_action(state.astype(np.float64)), np.float64)
