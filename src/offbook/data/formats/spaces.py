"""Gymnasium spaces as named leaves, and spaces for the fields of a store.

A bare space is one leaf, named after what it is of (`observation`, `action`). An entry of Dict and Tuple spaces is a
leaf under its keys joined by dots; those of a nested action begin with `action.`.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from offbook.client.protocol import ActionSpec
from offbook.data.schema import FieldSpec
from offbook.errors import ConfigError

Keys = tuple[str | int, ...]


def leaves(space: Any, root: str) -> list[tuple[str, Keys, Any]]:
    """The leaves of a space in its own order: name, keys that lead there, space.

    Args:
        space: any Gymnasium space.
        root: `"observation"` or `"action"`.

    Raises:
        ConfigError: two leaves get the same name, as in `{"a.b": ..., "a": {"b": ...}}`.

    Example:
        >>> from gymnasium import spaces
        >>> space = spaces.Dict({"arm": spaces.Dict({"joints": spaces.Box(-1, 1, (7,))}), "door": spaces.Discrete(2)})
        >>> [name for name, _, _ in leaves(space, "observation")]
        ['arm.joints', 'door']
    """
    prefix = "action." if root == "action" else ""
    found: dict[str, tuple[str, Keys, Any]] = {}
    for keys, leaf in _walk(space, ()):
        name = prefix + ".".join(map(str, keys)) if keys else root
        if name in found:
            got = f"{found[name][1]} and {keys}, both called {name!r}"
            raise ConfigError(f"{root} space", expected="parts with different names", got=got, fix="rename one of them")
        found[name] = name, keys, leaf
    return list(found.values())


def _inner(space: Any) -> Any:
    """The parts of a Dict or Tuple space, None for others; a OneOf has parts, but its values have only one."""
    return None if type(space).__name__ == "OneOf" else getattr(space, "spaces", None)


def _walk(space: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    inner = _inner(space)
    if inner is None:
        yield keys, space
        return
    for key, child in inner.items() if isinstance(inner, Mapping) else enumerate(inner):
        yield from _walk(child, (*keys, key))


def value_at(values: Any, keys: Keys) -> Any:
    """The part of a nested value to which keys lead."""
    return functools.reduce(operator.getitem, keys, values)


def nested(space: Any, root: str, value: Callable[[str, Any], Any]) -> Any:
    """Puts leaves back into the shape of their space; `value` gives a leaf's value from its name and space."""
    names = {keys: name for name, keys, _ in leaves(space, root)}

    def build(part: Any, keys: Keys) -> Any:
        inner = _inner(part)
        if inner is None:
            return value(names[keys], part)
        if isinstance(inner, Mapping):
            return {key: build(child, (*keys, key)) for key, child in inner.items()}
        return tuple(build(child, (*keys, i)) for i, child in enumerate(inner))

    return build(space, ())


def is_kept(space: Any) -> bool:
    """Whether a leaf can be a field: words cannot, and an empty array says nothing."""
    return type(space).__name__ != "Text" and 0 not in (space.shape or ())


def to_field(space: Any, root: str, values: Any) -> np.ndarray:
    """Recorded values of a leaf as those of a field: a discrete action becomes a vector of its index, from 0 on."""
    array = np.asarray(values)
    if root == "action" and type(space).__name__ == "Discrete":
        return np.asarray(array.reshape(len(array), 1) - array.dtype.type(space.start))
    return array


def from_field(space: Any, root: str, values: np.ndarray) -> np.ndarray:
    """The inverse of `to_field`."""
    if root == "action" and type(space).__name__ == "Discrete":
        return np.asarray(values[:, 0] + values.dtype.type(space.start))
    return values


def action_spec(space: Any) -> ActionSpec | None:
    """Bounds of a flat action space; None for a nested one."""
    kind = type(space).__name__
    if kind == "Discrete":
        return ActionSpec(size=1, low=(0.0,), high=(float(space.n) - 1,), choices=int(space.n))
    if kind == "Box":
        low, high = space.low, space.high
    elif kind == "MultiDiscrete":
        low, high = space.start, space.start + space.nvec - 1
    elif kind == "MultiBinary":
        low, high = np.zeros(space.shape), np.ones(space.shape)
    else:
        return None
    lows, highs = (tuple(np.asarray(bound, np.float64).reshape(-1).tolist()) for bound in (low, high))
    return ActionSpec(size=len(lows), low=lows, high=highs)


def space_for(spec: FieldSpec) -> Any:
    """A space that holds every value of a field."""
    from gymnasium import spaces

    kind = np.dtype(spec.dtype)
    low: Any = -math.inf if kind.kind == "f" else 0 if kind.kind == "b" else np.iinfo(kind).min
    high: Any = math.inf if kind.kind == "f" else 1 if kind.kind == "b" else np.iinfo(kind).max
    return spaces.Box(low, high, spec.shape, kind.type)


def action_space_for(spec: FieldSpec, bounds: ActionSpec | None) -> Any:
    """The action space of a store: the one with its bounds, or one without bounds where they are unknown."""
    from gymnasium import spaces

    if bounds is None:
        return space_for(spec)
    if bounds.choices is not None:
        return spaces.Discrete(bounds.choices)
    low, high = (np.asarray(bound, spec.dtype).reshape(spec.shape) for bound in (bounds.low, bounds.high))
    kind: Any = np.dtype(spec.dtype).type
    return spaces.Box(low, high, spec.shape, kind)
