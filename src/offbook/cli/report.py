"""What a verb hands back: text for people and data for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from offbook.runs.config import to_json


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a verb.

    Attributes:
        text: printed on stdout.
        data: printed instead, as one JSON object, under `--json`.
        exit_code: 0 fine, 1 failed, 2 wrong use.
    """

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int = 0


def as_json(content: Any) -> str:
    """JSON text of mappings, sequences, dataclasses, paths and NumPy numbers; NaN and infinities become null.

    Example:
        >>> as_json({"rate": float("nan"), "path": Path("a")})
        '{"rate": null, "path": "a"}'
    """
    return json.dumps(_plain(content), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(to_json(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Path):
        return str(value)
    # NumPy scalars and arrays, and torch tensors, without importing either.
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(entry) for entry in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns for a terminal; numbers stand to the right.

    Example:
        >>> print(table(["task", "n"], [["pour", 5], ["reach", 12]]))
        task    n
        pour    5
        reach  12
    """
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    lines = (
        "  ".join(cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in columns)
        for columns in (zip(row, widths, right, strict=True) for row in cells)
    )
    return "\n".join(line.rstrip() for line in lines)


def interval_text(interval: Mapping[str, Any] | None) -> str:
    """A value with its ends, as `Interval.to_json` and the arena give them.

    Example:
        >>> interval_text({"value": 0.8125, "low": 0.5, "high": 0.95}), interval_text(None)
        ('0.812 [0.5, 0.95]', '-')
    """
    if interval is None:
        return "-"
    ends = "unknown" if interval["low"] is None else f"{interval['low']:.3g}, {interval['high']:.3g}"
    return f"{interval['value']:.3g} [{ends}]"
