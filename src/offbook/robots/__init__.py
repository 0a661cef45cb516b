"""Robots: the driver protocol, the guard, simulated cells, and the control loop of one trial."""

from importlib import import_module

from offbook.errors import ConfigError, nearest
from offbook.robots.base import Robot

ROBOTS = {"pour": "offbook.robots.simulated:pour"}
"""Robots by name, each with the function that makes it."""

ENVIRONMENTS = {"pour": "offbook:pour"}
"""The environment of a simulated robot, for what goes by environments, such as scripted experts."""


def make_robot(name: str) -> Robot:
    """A robot by its name in `ROBOTS`, or any simulator as `LIBRARY:NAME`, such as `gym:Pendulum-v1`.

    Raises:
        ConfigError: there is no such robot.
        MissingExtraError: its simulator is not installed.

    Example:
        >>> robot = make_robot("gym:CartPole-v1")
        >>> robot.spec.action.choices
        2
        >>> robot.close()
    """
    if name in ROBOTS:
        module, _, factory = ROBOTS[name].partition(":")
        robot: Robot = getattr(import_module(module), factory)()
        return robot
    if ":" in name:
        from offbook.robots.gym import GymRobot

        return GymRobot(name)
    where, expected = f"robot {name!r}", "a known robot or LIBRARY:NAME of a simulator"
    raise ConfigError(where, expected=expected, got="an unknown name", fix=nearest(name, ROBOTS))
