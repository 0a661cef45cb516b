"""Configurations: frozen dataclasses that turn into JSON and back, presets, and the glue to the command line.

A configuration is a `@dataclass(frozen=True, kw_only=True)` of plain values, tuples, paths and other such dataclasses.
A preset is a Python function that returns a complete one.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from offbook.errors import ConfigError, nearest

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as JSON types: nested records become objects, tuples lists, paths strings.

    Args:
        config: an instance of a dataclass.

    Raises:
        TypeError: a value has no JSON form; that is a mistake in the dataclass, not in its use.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Net:
        ...     hidden: tuple[int, ...] = (8, 8)
        >>> to_json(Net())
        {'hidden': [8, 8]}
    """
    if not is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_json takes an instance of a dataclass, not {type(config).__name__}")
    return {field.name: _plain(getattr(config, field.name), field.name) for field in fields(config)}


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    raise TypeError(f"{where}: {type(value).__name__} has no JSON form")


def from_json(cls: type[C], record: Any, where: str = "") -> C:
    """Builds a dataclass from JSON types, checking every name and type on the way.

    Args:
        cls: the dataclass.
        record: what `to_json` wrote, or the like from a stranger.
        where: the place named in messages, such as a file name.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named) or missing, or a value has the wrong type.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Fit:
        ...     steps: int = 100
        >>> from_json(Fit, {"steps": 20})
        Fit(steps=20)
    """
    where = where or cls.__name__
    if not isinstance(record, Mapping):
        raise ConfigError(where, expected="an object", got=_shown(record), fix="write it as {key: value, ...}")
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in fields(cast(Any, cls)) if field.init}
    for key in record:
        if key not in known:
            raise ConfigError(
                f"{where}.{key}", expected="a known key", got="an unknown one", fix=nearest(str(key), known)
            )
    for name, field in known.items():
        if name not in record and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{where}.{name}", expected="a value", got="nothing", fix=f"add the key {name!r}")
    values = {name: _typed(hints[name], value, f"{where}.{name}") for name, value in record.items()}
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(where, expected="values that agree", got=str(error), fix="correct the values") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _typed(hint: Any, value: Any, where: str) -> Any:
    """The value as the annotation wants it, or a ConfigError that names the place."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Annotated:
        return _typed(arguments[0], value, where)
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, where)
    if origin is Literal:
        if value in arguments and type(value) in {type(choice) for choice in arguments}:
            return value
        expected = f"one of {', '.join(map(repr, arguments))}"
        raise ConfigError(where, expected=expected, got=_shown(value), fix=nearest(str(value), map(str, arguments)))
    if is_dataclass(hint):
        return from_json(cast(type[Any], hint), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        return _tuple(arguments, value, where)
    if origin in (list, Sequence) and isinstance(value, list | tuple):
        return [_typed(arguments[0], entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {str(key): _typed(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is hint or (hint is type(None) and value is None):
        return value
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ConfigError(where, expected=f"a value of type {name}", got=_shown(value), fix="correct the value")


def _one_of(choices: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    errors = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _typed(choice, value, where)
        except ConfigError as error:
            errors.append(error)
    # With one real alternative (Optional) its own message says most.
    if len(errors) == 1:
        raise errors[0]
    raise ConfigError(
        where, expected=" or ".join(error.expected for error in errors), got=_shown(value), fix="correct the value"
    )


def _tuple(arguments: Sequence[Any], value: Sequence[Any], where: str) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = [arguments[0]] * len(value)
    if len(arguments) != len(value):
        raise ConfigError(
            where, expected=f"{len(arguments)} entries", got=f"{len(value)}", fix="give as many as expected"
        )
    return tuple(
        _typed(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(zip(arguments, value, strict=True))
    )


def read_config(cls: type[C], path: Path) -> C:
    """Reads a configuration from a JSON file: a run's `config.json`, or the bare object.

    Raises:
        ConfigError: there is no such file, it is not JSON, or it does not fit the dataclass.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            str(path), expected="a JSON file", got=error.strerror or "no file", fix="check the path"
        ) from error
    except ValueError as error:
        raise ConfigError(str(path), expected="JSON", got=f"text that is not ({error})", fix="correct it") from error
    if isinstance(record, dict) and {"config", "type"} <= record.keys():
        record = record["config"]
    return from_json(cls, record, str(path))


def choose_preset(presets: Mapping[str, Callable[[], C]], name: str) -> C:
    """The configuration that a preset's function returns.

    Raises:
        ConfigError: no preset has this name; the nearest is suggested.

    Example:
        >>> choose_preset({"smoke": lambda: 1, "tiny": lambda: 2}, "tiny")
        2
    """
    if name not in presets:
        raise ConfigError("--preset", expected="the name of a preset", got=repr(name), fix=nearest(name, presets))
    return presets[name]()


def with_presets(presets: Mapping[str, Callable[[], Any]]) -> Callable[[F], F]:
    """Gives a verb, whose keyword `config` is a dataclass, the flags `--preset NAME` and `--config FILE`.

    Both replace the default of `config`; single flags (`--fit.steps 200`) then override it. Annotate the parameter as
    `config: Annotated[Config, tyro.conf.arg(name="")]`, so that its flags carry no prefix.
    """

    def mark(function: F) -> F:
        function.__dict__["presets"] = dict(presets)
        return function

    return mark


def apply_presets(function: Callable[..., Any], args: Sequence[str]) -> tuple[Callable[..., Any], list[str]]:
    """Takes `--preset` and `--config` out of the arguments of a verb that knows them, and acts on them.

    Returns:
        The function with its `config` replaced, and the arguments that are left.

    Raises:
        ConfigError: both are given, one has no value, or the value is no preset or no fitting file.
    """
    presets = getattr(function, "presets", None)
    rest, chosen = list(args), dict[str, str]()
    if presets is None:
        return function, rest
    for flag in ("--preset", "--config"):
        for i, word in enumerate(rest):
            name, equals, value = word.partition("=")
            if name == flag:
                if not equals and i + 1 == len(rest):
                    raise ConfigError(flag, expected="a value after it", got="nothing", fix=f"write {flag} VALUE")
                chosen[flag] = value if equals else rest[i + 1]
                del rest[i : i + (1 if equals else 2)]
                break
    if len(chosen) == 2:
        raise ConfigError("--preset, --config", expected="one of them", got="both", fix="drop one")
    if "--preset" in chosen:
        return functools.partial(function, config=choose_preset(presets, chosen["--preset"])), rest
    if "--config" in chosen:
        kind = type(next(iter(presets.values()))())
        return functools.partial(function, config=read_config(kind, Path(chosen["--config"]))), rest
    return function, rest
