"""The small tree of errors that a user can meet. Each message says where, what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from operator import attrgetter


class OffbookError(Exception):
    """A mistake or fault that a user can understand and mend; the command line prints it as one sentence.

    Args:
        where: the file, episode, step, key or flag at fault.
        expected: what would have been right.
        got: what was there instead.
        fix: what the user can do now, as an imperative.

    Example:
        >>> str(OffbookError("run.json", expected="a JSON object", got="an empty file", fix="start the run again"))
        'run.json: expected a JSON object, got an empty file; start the run again.'
    """

    exit_code = 1

    def __init__(self, where: str, *, expected: str, got: str, fix: str) -> None:
        super().__init__(f"{where}: expected {expected}, got {got}; {fix}{'' if fix.endswith('?') else '.'}")
        self.where, self.expected, self.got, self.fix = where, expected, got, fix

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes hand errors back by pickling; keyword-only arguments need this.
        return _rebuild, (type(self), self.where, self.expected, self.got, self.fix)


def _rebuild(kind: type[OffbookError], where: str, expected: str, got: str, fix: str) -> OffbookError:
    return kind(where, expected=expected, got=got, fix=fix)


class ConfigError(OffbookError):
    """A flag, preset, name or setting that cannot be used as given."""

    exit_code = 2


class DataError(OffbookError):
    """Recordings that are broken, incomplete or not what they claim to be."""


class CheckpointError(OffbookError):
    """A checkpoint or run folder that cannot be read or does not fit."""


class PolicyError(OffbookError):
    """A policy that answered with something a robot must not execute, or stopped answering."""


class SubmissionError(OffbookError):
    """A request that the arena refuses, or an arena that cannot be reached."""


class RobotError(OffbookError):
    """A robot, real or simulated, that failed: the trial is nobody's loss and may be attempted again."""


class NeedsHumanError(RobotError):
    """A robot that cannot go on before a person has done something beside it."""


class ResourceError(OffbookError):
    """The machine has too little memory or disk for what was asked."""


class MissingExtraError(OffbookError):
    """An optional part of the installation is not there."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turns a failed import inside the block into the install line that mends it.

    Args:
        extra: the optional dependency group, such as `"sim"`.

    Raises:
        MissingExtraError: a module of that group is not installed.

    Example:
        >>> with needs_extra("sim"):
        ...     import mujoco
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("offbook"):
            raise
        raise MissingExtraError(
            f"module {error.name!r}",
            expected=f"the optional dependencies [{extra}]",
            got="an installation without them",
            fix=f"run: pip install 'offbook[{extra}]'",
        ) from None


def check_settings(settings: object, checks: Mapping[str, tuple[bool, str]], prefix: str = "--") -> None:
    """Refuses settings that are out of their range, the first one first.

    Args:
        settings: which has them as attributes; a dot in a name leads to one of an attribute.
        checks: by name, whether it is right and what would be.
        prefix: of the flags that set them, with dashes for underscores.

    Raises:
        ConfigError: one is not right.

    Example:
        >>> from types import SimpleNamespace
        >>> check_settings(SimpleNamespace(batch_size=0), {"batch_size": (False, "1 or more")})
        Traceback (most recent call last):
        offbook.errors.ConfigError: --batch-size: expected 1 or more, got 0; change --batch-size.
    """
    for name, (right, expected) in checks.items():
        if not right:
            flag = f"{prefix}{name.replace('_', '-')}"
            got = str(attrgetter(name)(settings))
            raise ConfigError(flag, expected=expected, got=got, fix=f"change {flag}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known word, or lists them all when nothing is close.

    Example:
        >>> nearest("hoper", ["hopper", "walker"])
        "did you mean 'hopper'?"
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(names)}"
