"""Robots: the driver protocol, the guard, simulated cells, and the control loop of one trial."""

import inspect
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from offbook.errors import ConfigError, MissingExtraError, OffbookError, nearest
from offbook.robots.base import Robot

ROBOTS = {
    "pour": "offbook.robots.simulated:pouring",
    "scoop": "offbook.robots.simulated:scooping",
    "franka": "offbook.robots.franka:franka",
    "lerobot": "offbook.robots.lerobot:lerobot",
}
"""Robots by name, each with the function that makes it; nothing of them is imported before it is asked for."""

PLUGINS = "offbook.robots"
"""The entry points under which other packages offer functions that make robots."""

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


def make_robot(name: str, settings: Mapping[str, Any] | None = None) -> Robot:
    """A robot by its name in `ROBOTS` or in the entry points of other packages, or any simulator as `LIBRARY:NAME`.

    Behind the name of a simulator, such as `gym:Pendulum-v1`, may stand a number of trials, such as `gym:Hopper-v5@4`:
    one episode is then so many trials in a row, and its score the return of the last, see
    `offbook.robots.gym.GymRobot`. Another package offers a robot as an entry point of the group `offbook.robots`: a
    name that leads to a function whose arguments are the settings.

    Args:
        name: of the robot.
        settings: what the function that makes it is given: address, cameras, limits.

    Raises:
        ConfigError: there is no such robot, its package is broken, or it takes other settings.
        MissingExtraError: its simulator or its hardware library is not installed.
        RobotError: it does not answer.

    Example:
        >>> robot = make_robot("gym:CartPole-v1")
        >>> robot.spec.action.choices
        2
        >>> robot.close()
    """
    if name in ROBOTS:
        module, _, factory = ROBOTS[name].partition(":")
        return _made(name, getattr(import_module(module), factory), settings or {})
    plain, trials = trials_of(name)
    if ":" in plain:
        from offbook.robots.gym import GymRobot

        return _made(name, GymRobot, {**(settings or {}), "env_id": plain, "trials": trials})
    offered = entry_points(group=PLUGINS)
    if plain in ROBOTS or (plain != name and plain in offered.names):
        simulated = f"write {ENVIRONMENTS[plain]}@{trials}, or " if plain in ENVIRONMENTS else ""
        fix = f"{simulated}drop @{trials}"
        raise ConfigError(f"robot {name!r}", expected="LIBRARY:NAME before the @", got=repr(plain), fix=fix)
    found = list(offered.select(name=name))
    if not found:
        where, expected = (
            f"robot {name!r}",
            "a known robot, one of an installed package, or LIBRARY:NAME of a simulator",
        )
        raise ConfigError(where, expected=expected, got="an unknown name", fix=nearest(name, [*ROBOTS, *offered.names]))
    if len({point.value for point in found}) > 1:
        got = " and ".join(sorted(map(_origin, found)))
        raise ConfigError(f"robot {name!r}", expected="one package that offers it", got=got, fix="uninstall one")
    return _made(f"{name} of {_origin(found[0])}", _loaded(name, found[0]), settings or {})


def _loaded(name: str, point: EntryPoint) -> Callable[..., object]:
    """What an entry point leads to."""
    where, package = f"robot {name!r} of {_origin(point)}", point.dist.name if point.dist else "its package"
    try:
        factory = point.load()
    except ModuleNotFoundError as error:
        extra = f"run: pip install '{package}[{','.join(point.extras)}]'"
        fix = extra if point.extras else f"install what {package} needs for it"
        expected, got = f"the module {error.name!r}", "an installation without it"
        raise MissingExtraError(where, expected=expected, got=got, fix=fix) from None
    except Exception as error:  # the package is somebody's code
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        fix = f"mend or update {package}"
        raise ConfigError(where, expected=f"{point.value} to be importable", got=got, fix=fix) from error
    if not callable(factory):
        got, fix = f"a {type(factory).__name__}", f"mend or update {package}"
        raise ConfigError(where, expected="a function that makes a robot", got=got, fix=fix)
    made: Callable[..., object] = factory
    return made


def _made(name: str, factory: Callable[..., object], settings: Mapping[str, Any]) -> Robot:
    """The robot that a function makes of settings."""
    where, takes = f"robot {name!r}", inspect.signature(factory)
    try:
        takes.bind(**settings)
    except TypeError as error:
        expected = f"settings among {', '.join(takes.parameters) or 'none'}"
        fix = "give them in a file: --settings cell.json"
        raise ConfigError(where, expected=expected, got=str(error), fix=fix) from None
    try:
        robot = factory(**settings)
    except OffbookError:
        raise
    except Exception as error:  # a driver is somebody's code, and its settings are somebody's words
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(where, expected="a robot from these settings", got=got, fix="correct them") from error
    if not isinstance(robot, Robot):
        got, fix = f"a {type(robot).__name__}", "give it what offbook.robots.base.Robot names"
        raise ConfigError(where, expected="a robot", got=got, fix=fix)
    return robot


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
