"""Robots: the driver protocol, the guard, simulated cells, and the control loop of one trial."""

import re
from importlib import import_module

from offbook.errors import ConfigError, nearest
from offbook.robots.base import Robot

ROBOTS = {"pour": "offbook.robots.simulated:pouring", "scoop": "offbook.robots.simulated:scooping"}
"""Robots by name, each with the function that makes it."""

ENVIRONMENTS = {"pour": "offbook:pour", "scoop": "offbook:scoop"}
"""The environment of each robot that is a simulated one."""


def trials_of(name: str) -> tuple[str, int | None]:
    """A robot's name without its number of trials, and that number; None where the name tells none.

    Raises:
        ConfigError: what stands behind the @ is no such number.

    Example:
        >>> trials_of("gym:Hopper-v5@4"), trials_of("pour")
        (('gym:Hopper-v5', 4), ('pour', None))
    """
    plain, at, number = name.partition("@")
    if not at:
        return name, None
    # One way to write each number: the arena compares names.
    if not re.fullmatch("[1-9][0-9]{0,3}", number):
        expected, fix = "a number of trials from 1 to 9999 behind the @", f"write {plain}@4"
        raise ConfigError(f"robot {name!r}", expected=expected, got=repr(number), fix=fix)
    return plain, int(number)


def environment_of(name: str) -> str:
    """The environment of one trial of a simulated robot, for what goes by environments, such as scripted experts."""
    plain, _ = trials_of(name)
    return ENVIRONMENTS.get(plain, plain)


def make_robot(name: str) -> Robot:
    """A robot by its name in `ROBOTS`, or any simulator as `LIBRARY:NAME`, such as `gym:Pendulum-v1`.

    Behind the name of a simulator may stand a number of trials, such as `gym:Hopper-v5@4`: one episode is then so many
    trials in a row, and its score the return of the last, see `offbook.robots.gym.GymRobot`.

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
    plain, trials = trials_of(name)
    if ":" in plain:
        from offbook.robots.gym import GymRobot

        return GymRobot(plain, trials=trials)
    if plain in ROBOTS:
        fix = f"write {ENVIRONMENTS[plain]}@{trials}, or drop @{trials}"
        raise ConfigError(f"robot {name!r}", expected="LIBRARY:NAME before the @", got=repr(plain), fix=fix)
    where, expected = f"robot {name!r}", "a known robot or LIBRARY:NAME of a simulator"
    raise ConfigError(where, expected=expected, got="an unknown name", fix=nearest(name, ROBOTS))
