"""Gymnasium spaces as named leaves, specifications and store schemas; one rule for every environment.

An observation space is flattened to *leaves* in its own order: a bare space is one leaf "observation", Dict and Tuple
give their keys, nested ones joined by a dot. A leaf of uint8 with shape (H, W, 3), H and W at least 16, is a camera;
every other leaf is a part of the state.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import Env, Space, spaces
from jaxtyping import Float32, Shaped

from offbook.client.protocol import ActionSpec, ObservationSpec
from offbook.data.formats.spaces import Keys, is_kept, leaves, value_at
from offbook.data.formats.spaces import action_spec as any_action_spec
from offbook.data.schema import FieldSpec, Schema
from offbook.errors import ConfigError, PolicyError

ACTION, REWARD = "action", "reward"
"""Names of the store fields that hold what was done and what it earned."""
_ARRAYS = (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)


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
        ConfigError: a part of the space is not an array of numbers, or two parts get the same name.

    Example:
        >>> camera, joints = spaces.Box(0, 255, (32, 32, 3), np.uint8), spaces.Box(-1, 1, (7,))
        >>> [(leaf.name, leaf.camera) for leaf in observation_leaves(spaces.Dict(front=camera, joints=joints))]
        [('front', True), ('joints', False)]
    """
    return tuple(leaf for leaf, _ in _leaves_and_keys(space))


def _leaves_and_keys(space: Space[Any]) -> Iterator[tuple[Leaf, Keys]]:
    for name, keys, part in leaves(space, "observation"):
        if not isinstance(part, _ARRAYS):
            kinds, got = ", ".join(kind.__name__ for kind in _ARRAYS), type(part).__name__
            fix = "wrap the environment so that it shows numbers"
            raise ConfigError(f"observation {name!r}", expected=f"numbers ({kinds})", got=got, fix=fix)
        if is_kept(part):  # gymnasium-robotics has empty ones
            yield Leaf(name, tuple(part.shape or ()), np.dtype(part.dtype).name), keys


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
    for leaf, keys in _leaves_and_keys(space):
        array = np.array(value_at(observation, keys), leaf.dtype)
        if array.shape != leaf.shape:
            where, fix = f"observation {leaf.name!r} of the environment", "mend the environment's observation_space"
            raise ConfigError(where, expected=f"shape {leaf.shape}", got=f"shape {array.shape}", fix=fix)
        values[leaf.name] = array
    return values


def observation_spec(space: Space[Any]) -> ObservationSpec:
    """What an environment offers to policies."""
    found = observation_leaves(space)
    return ObservationSpec(
        state=tuple((leaf.name, math.prod(leaf.shape)) for leaf in found if not leaf.camera),
        cameras={leaf.name: (leaf.shape[0], leaf.shape[1]) for leaf in found if leaf.camera},
    )


def state_vector(values: Mapping[str, np.ndarray], wanted: ObservationSpec) -> Float32[np.ndarray, " state"]:
    """The state parts that a policy wants, flattened and joined in its order."""
    if not wanted.state:
        return np.zeros(0, np.float32)
    return np.concatenate([values[name].ravel() for name, _ in wanted.state]).astype(np.float32)


def action_spec(space: Space[Any]) -> ActionSpec:
    """What an environment accepts.

    Raises:
        ConfigError: the actions are neither a Box nor Discrete.

    Example:
        >>> action_spec(spaces.Discrete(4))
        ActionSpec(size=1, low=(0.0,), high=(3.0,), choices=4)
    """
    spec = any_action_spec(space) if isinstance(space, spaces.Box | spaces.Discrete) else None
    if spec is None:
        raise _unsupported(space)
    return spec


def _unsupported(space: Space[Any]) -> ConfigError:
    fix = "wrap the environment so that it takes one of them"
    return ConfigError("action space", expected="a Box (continuous) or Discrete", got=type(space).__name__, fix=fix)


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
            fix = "return the index of a choice"
            raise PolicyError("discrete action", expected=f"0 to {space.n - 1}", got=str(choice), fix=fix)
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
    found = observation_leaves(env.observation_space)
    fields = [FieldSpec(leaf.name, leaf.dtype, leaf.shape, "observation") for leaf in found]
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
