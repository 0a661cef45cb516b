"""Which fields of a store each feature of a LeRobot dataset holds, and the few names that reading and writing share."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from offbook.data.schema import FieldSpec, Schema
from offbook.errors import DataError

INFO = "meta/info.json"
OURS = "meta/offbook.json"
"""Beside the dataset: the store's schema and outcomes, and checksums of the data that they belong to."""
FINAL = "meta/offbook_final.parquet"
"""Beside the dataset: what was observed after the last action of each episode, for which the format has no place. A
video has it as a frame more, which readers pass over: they look up the frames of the rows by their times."""
STATE, REWARD, DONE, SUCCESS = "observation.state", "next.reward", "next.done", "next.success"
INDEX = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
"""Columns that number the rows, with their types; they follow from the order of the rows and are no fields."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One feature of a dataset.

    Attributes:
        key: its name.
        kind: `"video"`, `"image"`, or the NumPy name of a type.
        shape: of one frame, at least one axis; pictures are (H, W, 3).
        parts: the fields whose values it holds, joined in this order.
    """

    key: str
    kind: str
    shape: tuple[int, ...]
    parts: tuple[FieldSpec, ...]

    @property
    def camera(self) -> bool:
        """Whether its values are pictures, which are not kept as plain numbers."""
        return self.kind in ("video", "image")

    @property
    def observed(self) -> bool:
        """Whether it holds observations, of which there is one more than there are steps."""
        return self.parts[0].role == "observation"

    def pack(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The feature's values [n, *shape] from those of its fields.

        Raises:
            DataError: the common type cannot hold a value exactly.
        """
        rows = [values[part.name].reshape(len(values[part.name]), -1) for part in self.parts]
        joined = np.concatenate(rows, axis=1, dtype=np.dtype(self.kind), casting="unsafe")
        for part, back in self.unpack(joined).items():
            if not np.array_equal(back, values[part], equal_nan=back.dtype.kind == "f"):
                got = f"values of {part!r} that it cannot hold"
                raise DataError(f"feature {self.key!r}", expected=self.kind, got=got, fix="export smaller numbers")
        return joined.reshape(-1, *self.shape)

    def unpack(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """The values of its fields."""
        flat, start, parts = values.reshape(len(values), -1), 0, {}
        for part in self.parts:
            parts[part.name] = flat[:, start : start + part.size].reshape(-1, *part.shape).astype(part.dtype)
            start += part.size
        return parts


def features_of(schema: Schema) -> dict[str, Feature]:
    """The features that hold a store's fields, under the names that readers of the format look for.

    Cameras become `observation.images.NAME`, the parts of the state are joined to `observation.state`, rewards become
    `next.reward`; names that already follow the format are kept.

    Raises:
        DataError: two fields would get the same name, or one that the format does not allow.
    """
    groups: dict[str, list[FieldSpec]] = {}
    joins = STATE not in schema.observations
    for spec in schema.fields:
        name = spec.name
        if spec.role == "observation" and not name.startswith("observation."):
            name = f"observation.images.{name}" if spec.camera else STATE if joins else f"observation.{name}"
        elif spec.role == "action" and not name.startswith("action"):
            name = "action" if len(schema.actions) == 1 else f"action.{name}"
        elif spec.role == "reward":
            name = REWARD
        groups.setdefault(name, []).append(spec)
    bad = [key for key, parts in groups.items() if (len(parts) > 1 and key != STATE) or "/" in key]
    if bad := bad + [key for key in (*INDEX, DONE, SUCCESS) if key in groups]:
        got = f"{', '.join(bad)} from {', '.join(spec.name for spec in schema.fields)}"
        fix = "rename fields of the store"
        raise DataError("export to LeRobot", expected="a name of its own for each feature", got=got, fix=fix)
    return {key: _feature(key, tuple(parts)) for key, parts in groups.items()}


def _feature(key: str, parts: tuple[FieldSpec, ...]) -> Feature:
    first = parts[0]
    if first.camera:
        # The pictures' encoding needs even sizes.
        height, width = (size + size % 2 for size in first.shape[:2])
        return Feature(key=key, kind="video", shape=(height, width, 3), parts=parts)
    if key != STATE or first.name == STATE:
        return Feature(key=key, kind=first.dtype, shape=first.shape or (1,), parts=parts)
    kind = np.result_type(np.float32, *(part.dtype for part in parts)).name
    return Feature(key=key, kind=kind, shape=(sum(part.size for part in parts),), parts=parts)
