"""What varies from one episode on the table to the next, and which variations a learner has seen."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

from offbook.errors import ConfigError, nearest
from offbook.runs.config import from_json, to_json
from offbook.runs.seeding import generator

A = TypeVar("A", bound="Arrangement")
Colour = tuple[float, float, float]

_RANGES = {
    "bowl": (-0.8, 0.8),
    "bowl_radius": (0.05, 0.11),
    "bowl_height": (0.03, 0.09),
    "cup_radius": (0.030, 0.042),
    "spoon_radius": (0.030, 0.042),
    "grains": (12, 60),
    "grain_radius": (0.008, 0.012),
    "friction": (0.05, 1.0),
    "bowl_colour": (0.0, 1.0),
    "cup_colour": (0.0, 1.0),
    "spoon_colour": (0.0, 1.0),
    "grain_colour": (0.0, 1.0),
    "light_from": (-3.0, 3.0),
    "light_colour": (0.0, 1.0),
    "camera_shift": (-0.2, 0.2),
}


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """What the tasks on the table have in common.

    Attributes:
        bowl: x and y of the bowl's centre, metres from the arm's base; x forward, y to the arm's left.
        bowl_radius: inner radius at the rim, metres.
        bowl_height: height of the rim above the table, metres.
        bowl_colour: red, green and blue in [0, 1].
        grain_colour: likewise, of the material.
        light_from: direction towards the lamp, any length.
        light_colour: brightness and tint of the lamp.
        camera_shift: displacement of the front camera from its usual place, metres.

    Raises:
        ConfigError: a value is outside its range.
    """

    bowl: tuple[float, float] = (0.56, 0.0)
    bowl_radius: float = 0.08
    bowl_height: float = 0.05
    bowl_colour: Colour = (0.20, 0.42, 0.70)
    grain_colour: Colour = (0.93, 0.55, 0.12)
    light_from: tuple[float, float, float] = (0.5, -0.6, 1.4)
    light_colour: Colour = (0.62, 0.60, 0.57)
    camera_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            low, high = _RANGES[name]
            values = np.atleast_1d(getattr(self, name))
            if not np.all((values >= low) & (values <= high)):
                where, expected = f"scene.{name}", f"values from {low} to {high}"
                raise ConfigError(where, expected=expected, got=str(getattr(self, name)), fix="correct the scene")

    @classmethod
    def from_json(cls: type[A], record: Mapping[str, Any]) -> A:
        """Reads an arrangement from JSON types; what is not given keeps its default.

        Raises:
            ConfigError: a name is unknown, or a value of the wrong type or outside its range.

        Example:
            >>> Scene.from_json({"bowl": [0.5, 0.1]}).bowl
            (0.5, 0.1)
        """
        return from_json(cls, record, "scene")


@dataclass(frozen=True, kw_only=True)
class Scene(Arrangement):
    """One arrangement of the table for pouring.

    Attributes:
        cup_radius: inner radius of the cup, metres.
        cup_colour: red, green and blue in [0, 1].
    """

    cup_radius: float = 0.034
    cup_colour: Colour = (0.90, 0.88, 0.84)


@dataclass(frozen=True, kw_only=True)
class ScoopScene(Arrangement):
    """One arrangement of the table for scooping.

    Attributes:
        spoon_radius: inner radius of the spoon at its rim, metres.
        spoon_colour: red, green and blue in [0, 1].
        grains: how many there are in the bowl.
        grain_radius: metres.
        friction: Coulomb's coefficient between grains, and between them and the walls.
    """

    bowl_radius: float = 0.085
    bowl_height: float = 0.06
    spoon_radius: float = 0.036
    spoon_colour: Colour = (0.80, 0.80, 0.83)
    grains: int = 60
    grain_radius: float = 0.0098
    friction: float = 0.25


SEEN_POSITIONS = tuple((x, y) for x in (0.50, 0.62) for y in (-0.16, 0.0, 0.16))
"""The six places of the bowl in the recordings; each episode shifts it by up to 1 cm."""
NEW_POSITIONS = ((0.56, -0.08), (0.56, 0.08), (0.44, -0.08), (0.68, 0.08), (0.50, 0.25), (0.62, -0.25))
"""Six others: two between the seen ones, four outside."""

_Choices = tuple[tuple[Any, ...], tuple[Any, ...]]
_BOWLS: _Choices = (
    ((0.20, 0.42, 0.70), (0.78, 0.25, 0.22), (0.92, 0.90, 0.86)),
    ((0.25, 0.58, 0.35), (0.55, 0.35, 0.65), (0.95, 0.80, 0.25)),
)
_GRAINS: _Choices = ((0.93, 0.55, 0.12), (0.55, 0.80, 0.30)), ((0.85, 0.20, 0.45), (0.35, 0.75, 0.90))
# What is drawn of the objects, in this order: the seen values and the new ones.
_OBJECTS: dict[str, dict[str, _Choices]] = {
    "pour": {
        "bowl_radius": ((0.075, 0.085), (0.065, 0.095)),
        "bowl_height": ((0.05,), (0.04, 0.065)),
        "cup_radius": ((0.034,), (0.031, 0.037)),
        "bowl_colour": _BOWLS,
        "cup_colour": (((0.90, 0.88, 0.84), (0.30, 0.34, 0.40)), ((0.55, 0.78, 0.80), (0.85, 0.55, 0.60))),
        "grain_colour": _GRAINS,
    },
    "scoop": {
        "bowl_radius": ((0.083, 0.087), (0.080, 0.090)),
        "bowl_height": ((0.06,), (0.056, 0.064)),
        "spoon_radius": ((0.036,), (0.034, 0.038)),
        "grain_radius": ((0.0096, 0.0098), (0.0094, 0.0100)),
        "friction": ((0.2, 0.3), (0.15, 0.4)),
        "bowl_colour": _BOWLS,
        "spoon_colour": (((0.80, 0.80, 0.83), (0.35, 0.37, 0.42)), ((0.86, 0.70, 0.45), (0.60, 0.78, 0.70))),
        "grain_colour": _GRAINS,
    },
}
_SCENES: dict[str, type[Arrangement]] = {"pour": Scene, "scoop": ScoopScene}

SPLITS = ("seen", "position", "object", "lighting", "all")


def scenes(split: str, n: int, seed: int, task: str = "pour") -> list[dict[str, Any]]:
    """Arrangements of the table, for `env.reset(options={"scene": ...})`.

    Args:
        split: `"seen"` as in the recordings; `"position"`, `"object"` or `"lighting"` with that one thing new;
            `"all"` with everything new, the camera's place included.
        n: how many.
        seed: the i-th scene depends on the seed, the split, the task and i alone.
        task: `"pour"` or `"scoop"`.

    Returns:
        JSON-able records for `from_json` of `Scene` or `ScoopScene`.

    Raises:
        ConfigError: the split or the task is unknown.

    Source: the generalisation axes (objects, positions, lighting) of "Train Offline, Test Online: A Real Robot
    Learning Benchmark" (2023), abstract; the values are our own.

    Example:
        >>> first, second = scenes("seen", 2, seed=0)
        >>> scenes("seen", 1, seed=0) == [first]
        True
    """
    if split not in SPLITS:
        raise ConfigError("split", expected="a known split", got=repr(split), fix=nearest(split, SPLITS))
    if task not in _SCENES:
        raise ConfigError("task", expected="a task of the table", got=repr(task), fix=nearest(task, _SCENES))
    return [to_json(_draw(split, task, generator(seed, "scene", split, i))) for i in range(n)]


def _draw(split: str, task: str, rng: np.random.Generator) -> Arrangement:
    new_position, new_object, new_light = (split in (axis, "all") for axis in ("position", "object", "lighting"))
    places = NEW_POSITIONS if new_position else SEEN_POSITIONS
    place = places[int(rng.integers(len(places)))]

    def spread(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 4)

    light: dict[str, Any] = {}
    if new_light:
        # Low evening sun or a dim room, warm or cold, from the other side.
        brightness, warmth = spread(0.25, 0.85), spread(-0.3, 0.3)
        tint = (brightness * (1 + warmth), brightness, brightness * (1 - warmth))
        light = {
            "light_from": (spread(-0.9, 0.9), spread(0.3, 1.0), spread(0.4, 0.9)),
            "light_colour": tuple(round(min(part, 1.0), 4) for part in tint),
        }
    if split == "all":
        light["camera_shift"] = (spread(-0.03, 0.03), spread(-0.03, 0.03), spread(-0.03, 0.03))
    bowl = (round(place[0] + spread(-0.01, 0.01), 4), round(place[1] + spread(-0.01, 0.01), 4))
    choices = {name: both[new_object] for name, both in _OBJECTS[task].items()}
    objects = {name: values[int(rng.integers(len(values)))] for name, values in choices.items()}
    return _SCENES[task](bowl=bowl, **objects, **light)
