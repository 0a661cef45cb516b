"""Gymnasium spaces as named leaves, specifications and store schemas; one rule for every environment.

An observation space is flattened to *leaves* in its own order: a bare space is one leaf "observation", a Dict gives its
keys, nested ones joined by a dot. A leaf of uint8 with shape (H, W, 3), H and W at least 16, is a camera; every other
leaf is a part of the state.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import Env, Space, spaces
from jaxtyping import Float32, Shaped

from offbook.client.protocol import ActionSpec, ObservationSpec
from offbook.data.schema import FieldSpec, Schema
from offbook.errors import ConfigError, PolicyError

ACTION, REWARD = "action", "reward"
"""Names of the store fields that hold what was done and what it earned."""


@dataclass(frozen=True)
class Leaf:
    """One named array of an observation.

    Attributes:
        name: key in the observation space, nested keys joined by dots.
        shape: shape of one value.
        dtype: NumPy name of the type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def camera(self) -> bool:
        """Whether this is a picture."""
        return self.dtype == "uint8" and len(self.shape) == 3 and self.shape[2] == 3 and min(self.shape[:2]) >= 16


def observation_leaves(space: Space[Any]) -> tuple[Leaf, ...]:
    """The leaves of an observation space, in its order.

    Raises:
        ConfigError: a part of the space is not an array of numbers.

    Example:
        >>> camera, joints = spaces.Box(0, 255, (32, 32, 3), np.uint8), spaces.Box(-1, 1, (7,))
        >>> [(leaf.name, leaf.camera) for leaf in observation_leaves(spaces.Dict(front=camera, joints=joints))]
        [('front', True), ('joints', False)]
    """
    return tuple(_leaves(space, ""))


def _leaves(space: Space[Any], name: str) -> list[Leaf]:
    if isinstance(space, spaces.Dict):
        prefix = f"{name}." if name else ""
        return [leaf for key, part in space.spaces.items() for leaf in _leaves(part, f"{prefix}{key}")]
    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiBinary | spaces.MultiDiscrete):
        # An empty Box says nothing and cannot be stored; gymnasium-robotics has some.
        shape = tuple(space.shape or ())
        return [] if 0 in shape else [Leaf(name or "observation", shape, np.dtype(space.dtype).name)]
    raise ConfigError(
        f"observation {name or 'space'}",
        expected="arrays of numbers (Box, Discrete, MultiBinary, MultiDiscrete), or a Dict of them",
        got=type(space).__name__,
        fix="wrap the environment so that it shows numbers",
    )


def flatten(space: Space[Any], observation: Any) -> dict[str, Shaped[np.ndarray, "..."]]:
    """An observation as leaves; the arrays are copies, so later steps of the environment cannot change them.

    Args:
        space: the observation space.
        observation: what `reset` or `step` returned.

    Raises:
        ConfigError: the environment returned something that is not in its own space.

    Example:
        >>> flatten(spaces.Discrete(3), 2)
        {'observation': array(2)}
    """
    values = {}
    for leaf in observation_leaves(space):
        value = observation
        if isinstance(space, spaces.Dict):
            for key in leaf.name.split("."):
                value = value[key]
        array = np.array(value, leaf.dtype)
        if array.shape != leaf.shape:
            raise ConfigError(
                f"observation {leaf.name!r} of the environment",
                expected=f"shape {leaf.shape}",
                got=f"shape {array.shape}",
                fix="mend the environment's observation_space",
            )
        values[leaf.name] = array
    return values


def observation_spec(space: Space[Any]) -> ObservationSpec:
    """What an environment offers to policies."""
    leaves = observation_leaves(space)
    return ObservationSpec(
        state=tuple((leaf.name, math.prod(leaf.shape)) for leaf in leaves if not leaf.camera),
        cameras={leaf.name: (leaf.shape[0], leaf.shape[1]) for leaf in leaves if leaf.camera},
    )


def state_vector(leaves: Mapping[str, np.ndarray], wanted: ObservationSpec) -> Float32[np.ndarray, " state"]:
    """The state parts that a policy wants, flattened and joined in its order."""
    if not wanted.state:
        return np.zeros(0, np.float32)
    return np.concatenate([leaves[name].ravel() for name, _ in wanted.state]).astype(np.float32)


def action_spec(space: Space[Any]) -> ActionSpec:
    """What an environment accepts.

    Raises:
        ConfigError: the actions are neither a Box nor Discrete.

    Example:
        >>> action_spec(spaces.Discrete(4))
        ActionSpec(size=1, low=(0.0,), high=(3.0,), choices=4)
    """
    if isinstance(space, spaces.Box):
        low, high = (tuple(float(x) for x in np.ravel(bound)) for bound in (space.low, space.high))
        return ActionSpec(size=len(low), low=low, high=high)
    if isinstance(space, spaces.Discrete):
        return ActionSpec(size=1, low=(0.0,), high=(float(space.n - 1),), choices=int(space.n))
    raise _unsupported(space)


def _unsupported(space: Space[Any]) -> ConfigError:
    return ConfigError(
        "action space",
        expected="a Box (continuous) or Discrete",
        got=type(space).__name__,
        fix="wrap the environment so that it takes one of them",
    )


def to_env_action(space: Space[Any], vector: Float32[np.ndarray, " action"]) -> Any:
    """A policy's action in the form that the environment takes, clipped to what it accepts.

    Args:
        space: the action space.
        vector: a finite action of the length that `action_spec(space)` says.

    Raises:
        PolicyError: a discrete action has no such choice.

    Example:
        >>> to_env_action(spaces.Box(-1, 1, (2,)), np.array([0.5, 3.0], np.float32)).tolist()
        [0.5, 1.0]
    """
    if isinstance(space, spaces.Discrete):
        choice = int(np.rint(vector[0]))
        if not 0 <= choice < space.n:
            raise PolicyError(
                "discrete action", expected=f"0 to {space.n - 1}", got=str(choice), fix="return the index of a choice"
            )
        return choice + int(space.start)
    if isinstance(space, spaces.Box):
        return np.clip(vector.reshape(space.shape), space.low, space.high).astype(space.dtype)
    raise _unsupported(space)


def from_env_action(space: Space[Any], action: Any) -> Shaped[np.ndarray, " action"]:
    """What `to_env_action` made, as the vector that goes into a store."""
    if isinstance(space, spaces.Discrete):
        return np.array([int(action) - int(space.start)], np.int64)
    return np.asarray(action, np.float32).ravel()


def schema_for(env: Env[Any, Any], env_id: str, *, source: str = "", extra: Mapping[str, Any] | None = None) -> Schema:
    """The schema of recordings from an environment: its leaves, `action` and `reward`.

    Args:
        env: an environment from `make`.
        env_id: its name.
        source: who acts in the recordings.
        extra: further JSON-able facts.
    """
    spec = action_spec(env.action_space)
    leaves = observation_leaves(env.observation_space)
    fields = [FieldSpec(leaf.name, leaf.dtype, leaf.shape, "observation") for leaf in leaves]
    fields.append(FieldSpec(ACTION, "float32" if spec.choices is None else "int64", (spec.size,), "action"))
    fields.append(FieldSpec(REWARD, "float64", (), "reward"))
    rate = env.metadata.get("control_hz")
    return Schema(
        tuple(fields),
        environment=env_id,
        rate_hz=None if rate is None else float(rate),
        source=source,
        action=spec,
        extra=dict(extra or {}),
    )
