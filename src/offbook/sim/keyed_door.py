"""A room whose key and door look like any other cell: the first trial has to search, later ones can go straight."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw

from offbook.errors import ConfigError
from offbook.runs.seeding import generator

Cell = tuple[int, int]

SIDE = 7
"""Cells along a wall."""
STEPS = 30
"""Longest episode."""
CORNERS: tuple[Cell, ...] = ((0, 0), (0, SIDE - 1), (SIDE - 1, 0), (SIDE - 1, SIDE - 1))
"""Where the key may be: row and column, from the upper left."""
DOORS: tuple[Cell, ...] = ((0, SIDE // 2), (SIDE - 1, SIDE // 2), (SIDE // 2, 0), (SIDE // 2, SIDE - 1))
"""Where the door may be."""
MOVES: tuple[Cell, ...] = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""What the actions do: up, down, left, right."""

_PIXELS = 32  # of a cell in the picture


def places_of(seed: int) -> tuple[Cell, Cell]:
    """The cells of the key and of the door that a seed decides.

    Args:
        seed: of the environment's reset, 0 or more.

    Example:
        >>> key, door = places_of(3)
        >>> key in CORNERS, door in DOORS
        (True, True)
    """
    rng = generator(seed, "keyed door")
    return CORNERS[int(rng.integers(len(CORNERS)))], DOORS[int(rng.integers(len(DOORS)))]


class KeyedDoor(gym.Env[Any, Any]):
    """A room of 7 x 7 cells with a key in one corner and a door in the middle of one wall, neither of them visible.

    Observation: `view` (3,), the agent's row and column scaled to [-1, 1], and whether it has the key, 0 or 1. Actions:
    see `MOVES`; a wall stops the agent. It begins in the middle. The key's cell earns 1 when first entered; the door's
    cell, entered with the key, earns 1 and terminates the episode as a success. After 30 steps it is truncated. Key and
    door are where the seed of the last reset that had one put them.

    Example:
        >>> world = KeyedDoor()
        >>> world.reset(seed=3)[0]["view"].tolist()
        [0.0, 0.0, 0.0]
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 (gymnasium's)
    render_mode = "rgb_array"
    spec = EnvSpec("offbook:keyed-door", max_episode_steps=STEPS)
    prompt = "find the key in one of the corners, then the door in the middle of one of the walls"

    def __init__(self) -> None:
        low, high = np.array([-1, -1, 0], np.float32), np.ones(3, np.float32)
        self.observation_space = spaces.Dict([("view", spaces.Box(low, high))])
        self.action_space = spaces.Discrete(len(MOVES))
        self._places: tuple[Cell, Cell] | None = None
        self._cell, self._has_key = (SIDE // 2, SIDE // 2), False
        self._steps = STEPS

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Puts the agent back to the middle; with a seed, key and door to the places of that seed. No options."""
        super().reset(seed=seed)
        if seed is not None or self._places is None:
            self._places = places_of(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._cell, self._has_key, self._steps = (SIDE // 2, SIDE // 2), False, 0
        return self._seen(), {"success": False}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Moves the agent.

        Raises:
            ConfigError: there is no such action.
        """
        if self._places is None or self._steps >= STEPS:
            raise gym.error.ResetNeeded("the episode is over or not begun: call reset()")
        if not self.action_space.contains(action):
            raise ConfigError("action", expected="0, 1, 2 or 3", got=repr(action), fix="mend the policy")
        row, column = (min(max(at + by, 0), SIDE - 1) for at, by in zip(self._cell, MOVES[int(action)], strict=True))
        self._cell = row, column
        key, door = self._places
        success = self._has_key and self._cell == door
        found = not self._has_key and self._cell == key
        self._has_key = self._has_key or found
        self._steps = STEPS if success else self._steps + 1
        truncated = not success and self._steps >= STEPS
        return self._seen(), float(success or found), success, truncated, {"success": success}

    def render(self) -> UInt8[np.ndarray, "224 224 3"]:
        """A picture for people, with key and door."""
        picture = Image.new("RGB", (SIDE * _PIXELS, SIDE * _PIXELS), "white")
        draw = ImageDraw.Draw(picture)

        def box(cell: Cell, margin: int) -> tuple[int, int, int, int]:
            top, left = cell[0] * _PIXELS, cell[1] * _PIXELS
            return left + margin, top + margin, left + _PIXELS - margin, top + _PIXELS - margin

        for number in range(SIDE * SIDE):
            draw.rectangle(box(divmod(number, SIDE), 0), outline="lightgray")
        if self._places is not None:
            key, door = self._places
            draw.rectangle(box(door, 2), fill="saddlebrown")
            if not self._has_key:
                draw.rectangle(box(key, 10), fill="gold")
        draw.ellipse(box(self._cell, 6), fill="gold" if self._has_key else "navy", outline="navy", width=3)
        return np.asarray(picture).copy()

    def _seen(self) -> dict[str, Float32[np.ndarray, "3"]]:
        row, column = (2 * at / (SIDE - 1) - 1 for at in self._cell)
        return {"view": np.array([row, column, self._has_key], np.float32)}
