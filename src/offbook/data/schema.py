"""What an episode holds: the fields of a store, and the specifications for policies that follow from them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from offbook.client.protocol import ActionSpec, ObservationSpec
from offbook.errors import DataError

FORMAT = 1
"""Version of the store's layout on disk; a newer one is refused."""

Role = Literal["observation", "action", "reward", "other"]
DAMAGED = "copy the store again from where it came from"
_FIX = "correct the schema of the store"


@dataclass(frozen=True)
class FieldSpec:
    """One named quantity that is recorded at every step.

    Attributes:
        name: what it is called; an observation has the name of its leaf in the observation space.
        dtype: NumPy name of the type, such as `"float32"`; booleans, integers and floats are possible.
        shape: shape of one step's value; `()` for a number.
        role: observations have one value more than there are steps, the last of them after the last step.
        units: such as `"rad"`, for people.
        video: whether a camera's pictures are kept as video; see `offbook.data.video`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    units: str = ""
    video: bool = False

    def __post_init__(self) -> None:
        where = f"field {self.name!r}"
        if not self.name or "\0" in self.name:
            raise DataError(where, expected="a name", got=repr(self.name), fix=_FIX)
        if self.role not in get_args(Role):
            raise DataError(where, expected=f"a role of {get_args(Role)}", got=repr(self.role), fix=_FIX)
        try:
            kind = np.dtype(self.dtype)
        except TypeError:
            kind = np.dtype(object)
        if kind.kind not in "biuf" or kind.itemsize > 8 or kind.name != self.dtype:
            raise DataError(
                where, expected="a dtype such as 'float32', 'int64', 'uint8', 'bool'", got=repr(self.dtype), fix=_FIX
            )
        if any(size < 1 for size in self.shape):
            raise DataError(where, expected="a shape of positive sizes", got=str(self.shape), fix=_FIX)
        if self.role == "reward" and (self.shape or kind.kind not in "iuf"):
            raise DataError(where, expected="a number as reward", got=f"{self.dtype} {self.shape}", fix=_FIX)

        if self.video and not self.camera:
            expected = "a camera, to be kept as video"
            raise DataError(where, expected=expected, got=f"{self.role} {self.dtype} {self.shape}", fix=_FIX)

    @property
    def camera(self) -> bool:
        """Whether this is a picture: an observation of uint8 with shape (H, W, 3), H and W at least 16."""
        return (
            self.role == "observation"
            and self.dtype == "uint8"
            and len(self.shape) == 3
            and self.shape[2] == 3
            and min(self.shape[:2]) >= 16
        )

    @property
    def size(self) -> int:
        """How many numbers one step's value has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Schema:
    """What the episodes of a store hold and where they come from.

    Attributes:
        fields: the recorded quantities; their order is the order on disk and in the digest.
        environment: the environment's name with its library, such as `"gym:Hopper-v5"`; empty when unknown.
        rate_hz: control steps a second; None when unknown.
        source: who or what made the recordings.
        licence: under which terms they may be used.
        action: bounds of the actions, or their number; None when unknown.
        extra: further JSON-able facts, such as what an export to the original format needs.

    Example:
        >>> schema = Schema((FieldSpec("joints", "float32", (7,), "observation"),))
        >>> schema.observation_spec()
        ObservationSpec(state=(('joints', 7),), cameras={})
    """

    fields: tuple[FieldSpec, ...]
    environment: str = ""
    rate_hz: float | None = None
    source: str = ""
    licence: str = ""
    action: ActionSpec | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.fields]
        if not names or len(set(names)) < len(names):
            raise DataError("schema", expected="one or more fields of different names", got=str(names), fix=_FIX)
        rewards = [spec.name for spec in self.fields if spec.role == "reward"]
        if len(rewards) > 1:
            raise DataError("schema", expected="at most one reward", got=str(rewards), fix=_FIX)

    def __getitem__(self, name: str) -> FieldSpec:
        for spec in self.fields:
            if spec.name == name:
                return spec
        fix = "choose another field, or recordings that hold it"
        expected = f"one of {', '.join(spec.name for spec in self.fields)}"
        raise DataError(f"field {name!r}", expected=expected, got="a field that the store does not have", fix=fix)

    def __contains__(self, name: object) -> bool:
        return any(spec.name == name for spec in self.fields)

    def named(self, role: Role) -> tuple[str, ...]:
        """The names of all fields of one role, in order."""
        return tuple(spec.name for spec in self.fields if spec.role == role)

    @property
    def observations(self) -> tuple[str, ...]:
        """Names of the observation fields."""
        return self.named("observation")

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the action fields."""
        return self.named("action")

    @property
    def reward(self) -> str | None:
        """Name of the reward field, or None without one."""
        return next(iter(self.named("reward")), None)

    def observation_spec(self) -> ObservationSpec:
        """The cameras and state parts that a policy can be given from these observations."""
        seen = [spec for spec in self.fields if spec.role == "observation"]
        return ObservationSpec(
            state=tuple((spec.name, spec.size) for spec in seen if not spec.camera),
            cameras={spec.name: (spec.shape[0], spec.shape[1]) for spec in seen if spec.camera},
        )

    def action_spec(self) -> ActionSpec:
        """The actions that a policy trained on these recordings gives.

        Raises:
            DataError: the recordings do not say how large actions may be.
        """
        if self.action is None:
            fix = "record or import them again with the environment's action space"
            expected = "the bounds of the actions"
            raise DataError("schema of the store", expected=expected, got="recordings without them", fix=fix)
        return self.action

    def essentials(self) -> bytes:
        """What the digest of a store covers of its schema; where the data came from is not part of it."""
        keep = ("fields", "environment", "rate_hz", "action")
        record = self.to_json()
        return json.dumps({key: record[key] for key in keep}, sort_keys=True).encode()

    def to_json(self) -> dict[str, Any]:
        """The schema as plain JSON types, with the version of the layout. Unbounded actions have None as bound."""
        action = self.action
        return {
            "format": FORMAT,
            "fields": [
                {"name": f.name, "dtype": f.dtype, "shape": list(f.shape), "role": f.role, "units": f.units}
                | ({"video": True} if f.video else {})
                for f in self.fields
            ],
            "environment": self.environment,
            "rate_hz": self.rate_hz,
            "source": self.source,
            "licence": self.licence,
            "action": action
            and {
                "size": action.size,
                "low": [x if math.isfinite(x) else None for x in action.low],
                "high": [x if math.isfinite(x) else None for x in action.high],
                "choices": action.choices,
            },
            "extra": dict(self.extra),
        }

    @staticmethod
    def from_json(record: Mapping[str, Any], where: str) -> "Schema":
        """Reads what `to_json` wrote; `where` names its file in messages.

        Raises:
            DataError: the record is of a newer version, or not a schema.
        """
        version = record.get("format")
        if isinstance(version, int) and version > FORMAT:
            fix = "open it with a newer offbook"
            raise DataError(where, expected=f"a store of format {FORMAT} or older", got=f"format {version}", fix=fix)
        try:
            if version != FORMAT:
                raise ValueError(f"format {version!r}")
            action = record["action"]
            return Schema(
                fields=tuple(FieldSpec(**{**f, "shape": tuple(int(n) for n in f["shape"])}) for f in record["fields"]),
                environment=str(record["environment"]),
                rate_hz=None if record["rate_hz"] is None else float(record["rate_hz"]),
                source=str(record["source"]),
                licence=str(record["licence"]),
                action=None
                if action is None
                else ActionSpec(
                    size=int(action["size"]),
                    low=tuple(-math.inf if x is None else float(x) for x in action["low"]),
                    high=tuple(math.inf if x is None else float(x) for x in action["high"]),
                    choices=None if action["choices"] is None else int(action["choices"]),
                ),
                extra=dict(record["extra"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            got = f"{type(error).__name__} {error}"
            raise DataError(where, expected="the schema of an episode store", got=got, fix=DAMAGED) from error
