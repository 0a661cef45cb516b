"""A point in the plane looks for a goal that it cannot see: what one trial reveals is worth something in the next."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageDraw

from offbook.errors import ConfigError, nearest
from offbook.runs.seeding import generator

GOALS = ("hidden", "fixed")

STRIDE = 0.2
"""How far an action of norm 1 moves the point."""
STEPS = 16
"""Longest episode."""
WALL = 1.5
"""Largest coordinate of the point."""
REACHED = 0.1
"""Below this distance from the goal it counts as reached."""

_SIZE = 240  # pixels of the picture


def goal_of(seed: int, miss: float = 0.0) -> Float[np.ndarray, "2"]:
    """Where on the unit circle the goal of a seed lies.

    Args:
        seed: of the environment's reset, 0 or more.
        miss: radians by which to go astray from it, counter-clockwise.

    Example:
        >>> goal, opposite = goal_of(3), goal_of(3, np.pi)
        >>> bool(np.allclose(goal, -opposite)), round(float(np.hypot(*goal)), 6)
        (True, 1.0)
    """
    angle = generator(seed, "darkpoint goal").uniform(0.0, 2.0 * np.pi) + miss
    return np.array([np.cos(angle), np.sin(angle)])


class Darkpoint(gym.Env[Any, np.ndarray]):
    """A point moves from the origin, and only its reward tells how near the goal is.

    Observation: `position` (2,), within [-1.5, 1.5]. Action: (2,), clipped to norm 1; it moves the point by 0.2 times
    itself. The reward after the move is 1 less the distance to the goal, at least 0. An episode is truncated after 16
    steps; `info["success"]` says whether the point is within 0.1 of the goal.

    Args:
        goal: "hidden" lies on the unit circle where the seed of the last reset that had one put it; "fixed" is the same
            place for all seeds.

    Raises:
        ConfigError: there is no such goal.

    Example:
        >>> world = Darkpoint()
        >>> _ = world.reset(seed=3)
        >>> *_, info = [world.step(goal_of(3)) for _ in range(5)][-1]
        >>> info["success"]
        True
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium's)
    render_mode = "rgb_array"
    spec = EnvSpec("offbook:darkpoint", max_episode_steps=STEPS)
    prompt = "find the goal on the circle, by what it earns to come near it, and stay there"

    def __init__(self, *, goal: str = "hidden") -> None:
        if goal not in GOALS:
            raise ConfigError("goal", expected="hidden or fixed", got=repr(goal), fix=nearest(goal, GOALS))
        self.observation_space = spaces.Dict([("position", spaces.Box(-WALL, WALL, (2,), np.float32))])
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._goal = goal_of(0) if goal == "fixed" else None
        self._fixed = goal == "fixed"
        self._trail: list[np.ndarray] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Puts the point back to the origin; with a seed, a hidden goal to the place of that seed. No options."""
        super().reset(seed=seed)
        if self._goal is None or (seed is not None and not self._fixed):
            self._goal = goal_of(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._trail = [np.zeros(2)]
        return self._seen(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Moves the point.

        Raises:
            ConfigError: the action is not two finite numbers.
        """
        if not self._trail or len(self._trail) > STEPS:
            raise gym.error.ResetNeeded("the episode is over or not begun: call reset()")
        move = np.asarray(action, np.float64)
        if move.shape != (2,) or not np.isfinite(move).all():
            raise ConfigError("action", expected="2 finite numbers", got=str(action), fix="mend the policy")
        move = STRIDE * move / max(1.0, float(np.hypot(*move)))
        self._trail.append(np.clip(self._trail[-1] + move, -WALL, WALL))
        distance = float(np.hypot(*(self._trail[-1] - self._goal)))
        success = distance < REACHED
        return self._seen(), max(0.0, 1.0 - distance), False, len(self._trail) > STEPS, {"success": success}

    def render(self) -> UInt8[np.ndarray, "240 240 3"]:
        """A picture for people, with the goal and the point's trail."""
        picture = Image.new("RGB", (_SIZE, _SIZE), "white")
        draw = ImageDraw.Draw(picture)

        def pixel(place: Float[np.ndarray, "2"]) -> tuple[float, float]:
            return _SIZE / 2 * (1 + place[0] / WALL), _SIZE / 2 * (1 - place[1] / WALL)

        draw.circle((_SIZE / 2, _SIZE / 2), _SIZE / 2 / WALL, outline="lightgray")
        if self._goal is not None:
            draw.circle(pixel(self._goal), REACHED / WALL * _SIZE / 2, fill="orange")
        draw.line([pixel(place) for place in self._trail], fill="steelblue", width=2)
        for place in self._trail[-1:]:
            draw.circle(pixel(place), 5, fill="navy")
        return np.asarray(picture).copy()

    def _seen(self) -> dict[str, Float32[np.ndarray, "2"]]:
        return {"position": self._trail[-1].astype(np.float32)}
