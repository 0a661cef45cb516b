"""A small world for evaluations: walk right along a line; seeds decide where the walk starts."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from offbook.client.protocol import ActionSpec, FunctionPolicy, ObservationSpec, PolicyMeta

NAME = "gym:OffbookLine-v0"
ACTION = ActionSpec(size=1, low=(-1.0,), high=(1.0,))


class Line(gym.Env[Any, Any]):
    metadata = {"render_modes": ["rgb_array"], "control_hz": 5.0}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, blind: bool = False) -> None:
        self.render_mode, self._blind = render_mode, blind
        self.observation_space = spaces.Dict(
            {
                "place": spaces.Box(-10.0, 10.0, (1,), np.float32),
                "front": spaces.Box(0, 255, (16, 16, 3), np.uint8),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        scene = (options or {}).get("scene", {})
        self._place = scene["start"] if "start" in scene else float(self.np_random.uniform(-3, 0))
        self._steps = 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._place += float(action[0])
        self._steps += 1
        there = self._place >= 1.0
        score = float(np.clip(self._place, 0, 1))
        return self._seen(), float(there), there, self._steps >= 6, {"success": there, "score": score}

    def _seen(self) -> dict[str, np.ndarray]:
        return {"place": np.array([self._place], np.float32), "front": np.zeros((16, 16, 3), np.uint8)}

    def render(self) -> Any:
        return None if self._blind else np.full((20, 30, 3), 10 * self._steps, np.uint8)


gym.register("OffbookLine-v0", entry_point=Line)


def walker(stride, *, name="walker", part=("place", 1)):
    meta = PolicyMeta(name=name, observation=ObservationSpec(state=(part,)), action=ACTION)
    return FunctionPolicy(meta, lambda state, images: np.full(1, stride, np.float32))
