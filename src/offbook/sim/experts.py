"""Scripted experts, graded from flawless to hopeless, and the random policy: all of them a `Policy`.

An expert sees what any policy sees, through the same observation, so it can stand on the far side of a network.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float, Float32

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, Policy, PolicyMeta
from offbook.errors import ConfigError, nearest, needs_extra
from offbook.runs.seeding import generator
from offbook.sim.darkpoint import STRIDE, goal_of
from offbook.sim.keyed_door import CORNERS, DOORS, MOVES, SIDE, Cell, places_of
from offbook.sim.planners import DoorKeyExpert, Drift, MazeExpert
from offbook.sim.spaces import action_spec
from offbook.sim.tabletop.experts import PouringExpert, ScoopingExpert
from offbook.sim.tabletop.render import prepare_mujoco

EXPERTS = (
    "offbook:pour",
    "offbook:scoop",
    "offbook:darkpoint",
    "offbook:keyed-door",
    "metaworld:<task>",
    "robotics:PointMaze_<maze>",
    "minigrid:MiniGrid-DoorKey-<size>",
)
"""The environments that have a scripted expert."""


def make_expert(env_id: str, grade: float = 1.0, seed: int = 0, settings: Mapping[str, Any] | None = None) -> Policy:
    """The scripted expert of an environment.

    Args:
        env_id: such as `"offbook:pour"` or `"metaworld:drawer-open-v3"`.
        grade: 1 is the expert as written; below that come aiming errors, noise and deliberate faults (giving up half
            way, pouring too early), growing more frequent and larger down to 0.
        seed: faults depend on this seed and the session's name alone, not on who else is served.
        settings: what the environment was made with; only the expert of `offbook:darkpoint` must know it.

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
    if env_id == "offbook:scoop":
        return ScoopingExpert(grade, seed)
    if env_id == "offbook:darkpoint":
        return DarkpointExpert(grade, seed, fixed=(settings or {}).get("goal") == "fixed")
    if env_id == "offbook:keyed-door":
        return KeyedDoorExpert(grade, seed)
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


def _world_seed(session: str) -> int:
    """What a session's world was reset with: `play` names sessions so. It is all that an expert knows of the hidden."""
    if not session.isdecimal():
        fix = "play in a simulator, or use another policy"
        raise ConfigError("expert of a hidden task", expected="sessions named by seeds", got=repr(session), fix=fix)
    return int(session)


class DarkpointExpert:
    """Heads straight for where it believes the goal to be, and stays there.

    It has what no policy has, the goal itself, from the seed in the session's name. Every action has normal noise of
    0.1, so that recordings also show ways back.

    Args:
        grade: the angle that it believes in is off by normal noise of (1 - grade) * pi, once for each session.
        seed: for the noise.
        fixed: whether the world was made with a fixed goal.
    """

    def __init__(self, grade: float = 1.0, seed: int = 0, *, fixed: bool = False) -> None:
        self.meta = PolicyMeta(
            name="scripted-expert" if grade == 1 else f"scripted-grade-{grade:g}",
            observation=ObservationSpec(state=(("position", 2),)),
            action=ActionSpec(size=2, low=(-1.0,) * 2, high=(1.0,) * 2),
        )
        self._spread, self._seed, self._fixed = (1.0 - grade) * np.pi, seed, fixed
        self._streams: dict[str, np.random.Generator] = {}
        self._believed: dict[str, np.ndarray] = {}

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Draws where each session's goal is believed to be."""
        for session in sessions:
            rng = self._streams[session] = generator(self._seed, "darkpoint faults", session)
            seed = 0 if self._fixed else _world_seed(session)
            self._believed[session] = goal_of(seed, self._spread * rng.standard_normal())

    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 2"]:
        """The next move for each session."""
        answers = np.empty((len(observation.sessions), 1, 2), np.float32)
        for i, session in enumerate(observation.sessions):
            way = (self._believed[session] - observation.state[i]) / STRIDE
            straight = way / max(1.0, float(np.hypot(*way)))
            answers[i, 0] = np.clip(straight + 0.1 * self._streams[session].standard_normal(2), -1.0, 1.0)
        return answers


@dataclass
class _Search:
    """Where one session still looks; the last of each is the right place."""

    rng: np.random.Generator
    corners: list[Cell]
    doors: list[Cell]


class KeyedDoorExpert:
    """Walks to the key and then to the door, which it knows from the seed in the session's name.

    Args:
        grade: before the right corner, and before the right door, it tries a wrong one with probability 1 - grade, and
            another one with the same, and so on; and each move is a random one with probability (1 - grade) / 2.
        seed: for the mistakes.
    """

    def __init__(self, grade: float = 1.0, seed: int = 0) -> None:
        self.meta = PolicyMeta(
            name="scripted-expert" if grade == 1 else f"scripted-grade-{grade:g}",
            observation=ObservationSpec(state=(("view", 3),)),
            action=ActionSpec(size=1, low=(0.0,), high=(3.0,), choices=len(MOVES)),
        )
        self._badness, self._seed = 1.0 - grade, seed
        self._searches: dict[str, _Search] = {}

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Draws where each session looks first."""
        for session in sessions:
            rng = generator(self._seed, "keyed door faults", session)
            key, door = places_of(_world_seed(session))
            self._searches[session] = _Search(rng, self._tried(rng, CORNERS, key), self._tried(rng, DOORS, door))

    def _tried(self, rng: np.random.Generator, places: Sequence[Cell], right: Cell) -> list[Cell]:
        wrong = [place for place in places if place != right]
        mistakes = int((rng.random(len(wrong)) < self._badness).cumprod().sum())
        return [*(wrong[i] for i in rng.permutation(len(wrong))[:mistakes]), right]

    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 1"]:
        """The next move for each session."""
        actions = [
            self._act(state, self._searches[session])
            for state, session in zip(observation.state, observation.sessions, strict=True)
        ]
        return np.array(actions, np.float32).reshape(-1, 1, 1)

    def _act(self, view: Float32[np.ndarray, "3"], search: _Search) -> int:
        here = tuple(np.rint((view[:2] + 1) / 2 * (SIDE - 1)).astype(int).tolist())
        left = search.doors if view[2] else search.corners
        if here == left[0] and len(left) > 1:
            left.pop(0)
        if search.rng.random() < self._badness / 2:
            return int(search.rng.integers(len(MOVES)))
        way = np.subtract(left[0], here)
        return next((action for action, move in enumerate(MOVES) if way @ move > 0), 0)
