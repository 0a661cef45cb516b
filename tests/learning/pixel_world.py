"""A world of small pictures in which the next right action can be seen, and only seen."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

SIDE, STEPS = 16, 12


class Sides(gym.Env):
    """One half of the picture is bright; an action near -1 is right where that is the left one, near 1 the other.

    The picture's corner counts the steps, so that no two moments look alike.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium's)

    def __init__(self, render_mode=None, pays=1.0, ends=False):
        self.render_mode, self.pays, self.ends = render_mode, pays, ends
        self.observation_space = spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
        self.action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_number = 0
        return self._seen(), {}

    def step(self, action):
        wanted = 2.0 if self.right else -2.0
        reward = self.pays * (1 - abs(float(action[0]) - wanted) / 2)
        self.step_number += 1
        over = self.step_number == STEPS
        return self._seen(), reward, over and self.ends, over and not self.ends, {}

    def _seen(self):
        self.right = bool(self.np_random.integers(2))
        picture = np.zeros((SIDE, SIDE, 3), np.uint8)
        picture[:, SIDE // 2 :] = 255 if self.right else 0
        picture[:, : SIDE // 2] = 0 if self.right else 255
        picture[0, 0] = self.step_number
        return picture


def register():
    for name, settings in (("Sides-v0", {}), ("Unpaid-v0", {"pays": np.nan})):
        if name not in gym.registry:
            gym.register(name, lambda render_mode=None, of=settings: Sides(render_mode, **of))
