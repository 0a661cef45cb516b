"""Scooping: the arm holds a spoon, takes grains out of a bowl with it and holds them clear of the bowl.

Source: the task follows the scooping task of "Train Offline, Test Online: A Real Robot Learning Benchmark" (2023):
seven absolute joint angles in and out, 30 Hz, a reward that is 0 until the last step and then the amount scooped, and
success when that is above 0. The world, the bodies and the figures are our own.
"""

import math

import numpy as np
from jaxtyping import Bool, Float

from offbook.sim.tabletop.scene import ScoopScene
from offbook.sim.tabletop.world import GRIP, WALL, Tabletop, hand, numbers, upright, vessel, world

MAX_STEPS = 180
SPOON_DEPTH = 0.022
SPOON_FOOT = 0.4
"""Radius of the spoon's flat bottom as a share of that of its rim."""
BOWL_FOOT = 0.55
"""Likewise of the bowl."""
CLEAR = 0.03
"""Metres between the bowl's rim and the lowest point of the spoon from which on grains count as lifted."""
OBJECTS = ("bowl_x", "bowl_y", "rim_z", "bowl_radius", "spoon_radius", "in_bowl", "in_spoon")
"""The entries of the observation `objects`: metres, the fraction of the grains in the bowl, and the number of grains in
the spoon divided by a `spoonful`, at most 2."""
START = np.array([0.0, -0.0984, 0.0, -2.0735, 0.0, 1.5497, 0.0])
"""Joint angles at which an episode begins, up to 0.02 rad in each joint: the spoon's tip down, before the bowl."""

_PACKING = 0.6  # share of the room that spheres fill when they are poured and not shaken
_SHEET = 0.003  # thickness of the spoon, metres
_HANDLE = (0.075, 0.115)  # from the spoon's bottom to where the fingers hold it: backwards and up, metres

_AHEAD, _UP = upright(math.radians(80))


def spoon_frame(spoon_radius: float) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Where the spoon is in the hand: the centre of its bottom and its axis (towards the open side), flange frame.

    Args:
        spoon_radius: inner radius of the spoon at its rim, metres; larger spoons reach further ahead.
    """
    back, up = _HANDLE
    return np.array([0.0, 0.0, GRIP]) + _AHEAD * (back + spoon_radius - 0.036) - _UP * up, _UP.copy()


def spoonful(spoon_radius: float, grain_radius: float) -> int:
    """How many grains a level spoon holds: what fits below its rim where grains fill 0.6 of the room, rounded down.

    Args:
        spoon_radius: inner radius of the spoon at its rim, metres.
        grain_radius: metres.

    Example:
        >>> spoonful(0.036, 0.0098)
        7
    """
    foot = SPOON_FOOT * spoon_radius
    room = math.pi * SPOON_DEPTH / 3 * (spoon_radius**2 + spoon_radius * foot + foot**2)
    return int(_PACKING * room / (4 / 3 * math.pi * grain_radius**3))


class Scoop(Tabletop[ScoopScene]):
    """The scooping task, see `Tabletop` for observations, actions and arguments.

    A grain is lifted when its centre is inside the spoon's rim, no higher than two layers above it, and the lowest
    point of the spoon at least 3 cm above the rim of the bowl. The score is the number of grains lifted, divided by a
    `spoonful`, at most 1: a heaped spoon counts as a full one. An episode is terminated once the number of grains
    lifted has been the same, and not 0, for half a second, and truncated after 180 steps otherwise.

    Example:
        >>> env = Scoop(image_size=0)
        >>> observation, info = env.reset(seed=1, options={"scene": {"bowl": [0.5, 0.1]}})
        >>> observation["joints"].shape, info["score"]
        ((7,), 0.0)
        >>> env.close()
    """

    task = "scoop"
    prompt = "scoop grains out of the bowl with the spoon and hold them up"
    longest, objects, start, arrangement = MAX_STEPS, OBJECTS, START, ScoopScene
    settling = 140

    def _world(self, scene: ScoopScene) -> str:
        colour, foot = numbers((*scene.bowl_colour, 1)), BOWL_FOOT * scene.bowl_radius
        return world(
            scene,
            held=_hand(scene),
            bowl=vessel(scene.bowl_radius, scene.bowl_height, colour, "fixed", 16, foot=foot),
            grains=scene.grains,
            grain_radius=scene.grain_radius,
            friction=scene.friction,
            sleep=0.005,
        )

    def _filling(self, scene: ScoopScene) -> Float[np.ndarray, "grains 3"]:
        """Layers of a triangular grid, each turned and shifted at random, as wide as the bowl is at their height."""
        self._lifted = 0
        gap = 2 * scene.grain_radius + 0.001
        row, column = np.meshgrid(np.arange(-9, 10), np.arange(-9, 10))
        grid = gap * np.stack([row + column / 2, column * math.sqrt(0.75)], -1).reshape(-1, 2)
        filled, height = np.empty((0, 3)), WALL + scene.grain_radius + 0.001
        while len(filled) < scene.grains:
            angle, shift = self.np_random.uniform(0, math.tau), self.np_random.uniform(-gap / 2, gap / 2, 2)
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            share = BOWL_FOOT + (1 - BOWL_FOOT) * min(height / scene.bowl_height, 1.0)
            places = self.np_random.permutation(grid) @ turn + shift
            places = places[np.hypot(*places.T) < share * scene.bowl_radius - scene.grain_radius - 0.002]
            layer = np.column_stack([places + scene.bowl, np.full(len(places), height)])
            filled, height = np.concatenate([filled, layer]), height + gap
        return filled[: scene.grains]

    def _in_spoon(self, scene: ScoopScene) -> tuple[Bool[np.ndarray, " grains"], float]:
        """Which grains are in the spoon, and the height of its lowest point."""
        spoon = self._data.body("spoon")
        axes = spoon.xmat.reshape(3, 3)
        local = (self._grains() - spoon.xpos) @ axes
        height = SPOON_DEPTH + 4 * scene.grain_radius
        inside = (np.hypot(local[:, 0], local[:, 1]) < scene.spoon_radius) & (local[:, 2] > 0) & (local[:, 2] < height)
        # The lower edge of the bottom or, of a spoon that is almost upright, that of the rim.
        lean = float(np.hypot(axes[2, 0], axes[2, 1])) * scene.spoon_radius
        lowest = float(spoon.xpos[2]) + min(-SPOON_FOOT * lean, SPOON_DEPTH * float(axes[2, 2]) - lean)
        return inside, lowest

    def _measured(self, scene: ScoopScene) -> tuple[tuple[float, ...], dict[str, float]]:
        grains, (in_spoon, lowest) = self._grains(), self._in_spoon(scene)
        from_bowl = np.hypot(*(grains[:, :2] - scene.bowl).T)
        in_bowl = (from_bowl < scene.bowl_radius) & (grains[:, 2] < scene.bowl_height) & (grains[:, 2] > 0) & ~in_spoon
        held = int(in_spoon.sum())
        lifted = held if lowest >= scene.bowl_height + CLEAR else 0
        full = spoonful(scene.spoon_radius, scene.grain_radius)
        sizes = (scene.bowl_height, scene.bowl_radius, scene.spoon_radius)
        info = {"score": min(1.0, lifted / full), "lifted": lifted, "in_spoon": held}
        return (*sizes, float(in_bowl.mean()), min(2.0, held / full)), info

    def _at_rest(self, scene: ScoopScene) -> bool:
        """Whether as many grains are lifted as one step ago, and not none."""
        before, self._lifted = self._lifted, int(self._measured(scene)[1]["lifted"])
        return self._lifted == before > 0


def _hand(scene: ScoopScene) -> str:
    """The gripper and the spoon in the flange frame."""
    foot, _ = spoon_frame(scene.spoon_radius)
    colour = numbers((*scene.spoon_colour, 1))
    bowl = vessel(
        scene.spoon_radius, SPOON_DEPTH, colour, "held", 10, foot=SPOON_FOOT * scene.spoon_radius, wall=_SHEET
    )
    rim = np.array([-scene.spoon_radius - _SHEET, 0.0, SPOON_DEPTH - 0.003])
    grip = np.array([-(_HANDLE[0] + scene.spoon_radius - 0.036), 0.0, _HANDLE[1]])
    ends = numbers((*rim, *(grip + 0.25 * (grip - rim))))
    handle = f'<geom class="held" type="capsule" fromto="{ends}" size="0.005" rgba="{colour}"/>'
    fingers = "".join(
        f'<geom class="finger" fromto="{numbers((0, side * 0.03, 0.055, 0, side * 0.012, GRIP))}"/>' for side in (-1, 1)
    )
    return hand(fingers, "spoon", (foot, _AHEAD), 0.1, 0.0001, bowl + handle)
