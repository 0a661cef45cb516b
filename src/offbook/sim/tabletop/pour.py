"""Pouring: the arm holds a cup of grains and shall empty it into a bowl on the table.

Source: the task follows the pouring task of "Train Offline, Test Online: A Real Robot Learning Benchmark" (2023):
seven absolute joint angles in and out, 30 Hz, a reward that is 0 until the last step and then the amount poured, and
success when that is above 0. The world, the bodies and the figures are our own.
"""

import math

import numpy as np
from jaxtyping import Float

from offbook.sim.tabletop.scene import SPLITS, Scene, scenes
from offbook.sim.tabletop.world import GRIP, WALL, Tabletop, hand, numbers, upright, vessel, world

__all__ = ["CUP_HEIGHT", "MAX_STEPS", "SPLITS", "START", "Pour", "Scene", "cup_frame", "scenes"]

MAX_STEPS = 160
GRAINS = 20
GRAIN_RADIUS = 0.0085
CUP_HEIGHT = 0.10
OBJECTS = ("bowl_x", "bowl_y", "rim_z", "bowl_radius", "cup_radius", "in_bowl", "in_cup")
"""The entries of the observation `objects`: metres, and fractions of the grains."""
START = np.array([0.0, -0.5121, 0.0, -2.8475, 0.0, 2.8590, 0.0])
"""Joint angles at which an episode begins, up to 0.02 rad in each joint: the cup upright, above the table's middle."""

_AHEAD, _UP = upright(math.radians(60))


def cup_frame(cup_radius: float) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Where the cup is in the hand: the centre of its mouth and its axis (towards the mouth), in the flange frame.

    Args:
        cup_radius: inner radius of the cup, metres.
    """
    axis_foot = np.array([0.0, 0.0, GRIP]) + _AHEAD * (cup_radius + WALL)
    return axis_foot + _UP * (CUP_HEIGHT / 2), _UP.copy()


class Pour(Tabletop[Scene]):
    """The pouring task, see `Tabletop` for observations, actions and arguments.

    An episode is terminated once all grains have come to rest outside the cup, and truncated after 160 steps otherwise.
    The score is the fraction of the grains in the bowl.

    Example:
        >>> env = Pour(image_size=0)
        >>> observation, info = env.reset(seed=1, options={"scene": {"bowl": [0.5, 0.1]}})
        >>> observation["joints"].shape, info["score"]
        ((7,), 0.0)
        >>> env.close()
    """

    task = "pour"
    prompt = "pour the grains from the cup into the bowl"
    longest, objects, start, arrangement = MAX_STEPS, OBJECTS, START, Scene
    settling = 60

    def _world(self, scene: Scene) -> str:
        bowl = vessel(scene.bowl_radius, scene.bowl_height, numbers((*scene.bowl_colour, 1)), "fixed", 16)
        return world(scene, held=_hand(scene), bowl=bowl, grains=GRAINS, grain_radius=GRAIN_RADIUS)

    def _filling(self, scene: Scene) -> Float[np.ndarray, "grains 3"]:
        """Layers of one grain in the middle of the cup and seven around it."""
        ring = scene.cup_radius - GRAIN_RADIUS - 0.001
        layer, place = np.divmod(np.arange(GRAINS), 8)
        angle = place * (2 * np.pi / 7) + layer * 0.4
        distance = np.where(place == 7, 0.0, ring)
        height = WALL + GRAIN_RADIUS + 0.001 + layer * (2 * GRAIN_RADIUS + 0.001)
        jitter = self.np_random.uniform(-0.0002, 0.0002, (GRAINS, 3))
        cup, places = self._data.body("cup"), np.stack([distance * np.cos(angle), distance * np.sin(angle), height], 1)
        return np.asarray(cup.xpos + (places + jitter) @ cup.xmat.reshape(3, 3).T)

    def _fractions(self, scene: Scene) -> tuple[float, float]:
        """Fractions of the grains in the bowl and in the cup."""
        grains, cup = self._grains(), self._data.body("cup")
        from_bowl = np.hypot(*(grains[:, :2] - scene.bowl).T)
        in_bowl = (from_bowl < scene.bowl_radius) & (grains[:, 2] < scene.bowl_height) & (grains[:, 2] > 0)
        local = (grains - cup.xpos) @ cup.xmat.reshape(3, 3)
        in_cup = (np.hypot(local[:, 0], local[:, 1]) < scene.cup_radius) & (np.abs(local[:, 2] - 0.05) < 0.05)
        return float(in_bowl.mean()), float((in_cup & ~in_bowl).mean())

    def _measured(self, scene: Scene) -> tuple[tuple[float, ...], dict[str, float]]:
        in_bowl, in_cup = self._fractions(scene)
        measured = (scene.bowl_height, scene.bowl_radius, scene.cup_radius, in_bowl, in_cup)
        return measured, {"score": in_bowl, "in_cup": in_cup}

    def _at_rest(self, scene: Scene) -> bool:
        """Whether no grain is in the cup or in the air any more."""
        grains = self._grains()
        low = grains[:, 2] < np.where(
            np.hypot(*(grains[:, :2] - scene.bowl).T) < scene.bowl_radius, scene.bowl_height, 2 * GRAIN_RADIUS
        )
        return bool(low.all()) and self._fractions(scene)[1] == 0.0


def _hand(scene: Scene) -> str:
    """The gripper and the cup in the flange frame."""
    mouth, up = cup_frame(scene.cup_radius)
    reach = scene.cup_radius + WALL + 0.006
    fingers = ""
    for side in (-1, 1):
        knuckle = (0.0, side * 0.03, 0.055)
        bend = np.array([0.0, side * reach, GRIP]) + _AHEAD * 0.004
        tip = bend + _AHEAD * (scene.cup_radius + 0.012)
        fingers += (
            f'<geom class="finger" fromto="{numbers((*knuckle, *bend))}"/>'
            f'<geom class="finger" fromto="{numbers((*bend, *tip))}"/>'
        )
    walls = vessel(scene.cup_radius, CUP_HEIGHT, numbers((*scene.cup_colour, 1)), "held")
    return hand(fingers, "cup", (mouth - up * CUP_HEIGHT, _AHEAD), 0.15, 0.0002, walls)
