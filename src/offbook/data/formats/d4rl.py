"""D4RL: one HDF5 file of flat arrays, all episodes one after another, one row for each step.

`observations`, `actions`, `rewards` and `terminals` have N rows; `timeouts`, `next_observations` and `infos/...` may be
there. An episode ends with a row that is marked by `terminals` or `timeouts`. Many files differ: those without
`timeouts` are cut where they can be, and in some of the mazes `terminals` marks every row near the goal, which ends
nothing. What was done with a file is said in its schema.
"""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offbook.data.formats import Recordings
from offbook.data.formats.transitions import (
    Steps,
    flattened,
    hdf5,
    need,
    recordings,
    rows_of,
    same_rows,
    seen,
    succeeded,
)
from offbook.data.index import Outcome
from offbook.errors import DataError

_CORE = ("observations", "actions", "rewards", "terminals")
_BLOCK = 65_536
_BREAKS = "no timeouts: episodes end at terminals, and where a next observation is not that of the next row"
_GOAL = (
    "terminals come in runs, so they mark a goal and no end: episodes end at timeouts, and count as successful when a "
    "row of theirs is marked"
)


@dataclass
class _Cut:
    """Where the episodes are: `[start, stop)` of each; `goal` are the terminals that end nothing."""

    starts: np.ndarray
    stops: np.ndarray
    terminated: np.ndarray
    stated: list[str]
    goal: Any = None


def read(source: str) -> Recordings:
    """Opens a D4RL file.

    Args:
        source: path of the HDF5 file.

    Raises:
        DataError: it is not there, is damaged, lacks a key, or its arrays disagree.
        MissingExtraError: h5py is not installed.
    """
    path, single = Path(source).expanduser(), 0
    with hdf5(path) as file:
        cut, others, after = _cut(file, str(path)), _others(file), "next_observations" in file
        if not after:
            long = cut.stops - cut.starts > 1
            single = int(np.sum(~long))
            cut.starts, cut.stops, cut.terminated = cut.starts[long], cut.stops[long], np.zeros(long.sum(), bool)
        said = {key: _plain(value) for key, value in file.get("metadata", {}).items()}
        metadata = {key: value for key, value in said.items() if value is not None}
        algorithm = str(metadata.get("algorithm", ""))

        def episodes() -> Generator[tuple[str, Steps], None, None]:
            with hdf5(path, known=True) as file:
                for number in range(len(cut.starts)):
                    where = f"{path}, episode {number}"
                    yield where, _steps(file, cut, number, others, algorithm, where)

        return recordings(
            "d4rl",
            path,
            episodes,
            cut.stated,
            total=len(cut.starts),
            single=single,
            left=set(flattened(file.get("infos", {}), "infos.")) - set(others),
            metadata=metadata,
        )


def _steps(file: Any, cut: _Cut, number: int, others: list[str], algorithm: str, where: str) -> Steps:
    start, stop = int(cut.starts[number]), int(cut.stops[number])

    def rows(part: Any, name: str) -> np.ndarray:
        return rows_of(part, f"{where}, {name}", start, stop)

    infos = {name: rows(file[name.replace(".", "/")], name) for name in others}
    success = succeeded(infos) if cut.goal is None else bool(cut.goal[start:stop].any())
    terminated = bool(cut.terminated[number])
    after = None
    if "next_observations" in file:
        after = {name: part[stop - 1 : stop] for name, part in seen(file["next_observations"]).items()}
    return Steps(
        observations={name: rows(part, name) for name, part in seen(file["observations"]).items()},
        action=rows(file["actions"], "actions"),
        reward=rows(file["rewards"], "rewards"),
        others=infos,
        after=after,
        outcome=Outcome(terminated=terminated, truncated=not terminated, source=algorithm, success=success),
    )


def _others(file: Any) -> list[str]:
    """The infos that have a number or an array of numbers for each step."""
    rows = file["actions"].shape[:1]
    infos = flattened(file.get("infos", {}), "infos.").items()
    return [name for name, x in infos if x.dtype.kind in "biuf" and x.shape[:1] == rows and 0 not in x.shape]


def _cut(file: Any, where: str) -> _Cut:
    need(file, _CORE, where, "give a file in the layout of D4RL")
    rows = file["actions"].shape[0] if file["actions"].shape else 0
    parts = {name: file[name] for name in ("actions", "rewards", "terminals", "timeouts") if name in file}
    for key in ("observations", "next_observations"):
        if key in file:
            parts |= {key if name == "observation" else f"{key}.{name}": v for name, v in seen(file[key]).items()}
    for name, part in parts.items():
        same_rows(name, part, rows, where)
        if name.startswith(("observations", "next_observations")) and len(part.shape) < 2:
            got, fix = f"shape {part.shape}", "give each step its own row"
            raise DataError(f"{where}, {name}", expected="shape (steps, size)", got=got, fix=fix)
    flags: dict[str, Any] = {
        name: rows_of(parts[name], f"{where}, {name}").reshape(rows, -1).any(1)
        for name in ("terminals", "timeouts")
        if name in parts
    }
    terminals, timeouts = flags["terminals"], flags.get("timeouts")
    goal, stated = None, []
    follows = np.sum(terminals[1:] & terminals[:-1])
    if timeouts is not None and timeouts.any() and 2 * follows >= max(terminals.sum(), 1):
        goal, terminals = terminals, np.zeros(rows, bool)
        stated.append(_GOAL)
    elif timeouts is not None:
        stated.append("episodes end at terminals and timeouts")
    elif "next_observations" in file:
        timeouts = _breaks(file)
        stated.append(_BREAKS)
    else:
        stated.append("no timeouts: episodes end at terminals alone, so one that was stopped goes over into the next")
    ends = terminals | (False if timeouts is None else timeouts)
    if not ends.any() and "timeouts" not in file and "next_observations" not in file:
        fix = "add an array 'timeouts' that is 1 in the last row of every episode"
        raise DataError(where, expected="something that tells where episodes end", got="terminals all 0", fix=fix)
    stops = np.flatnonzero(ends) + 1
    if rows and (not len(stops) or stops[-1] < rows):
        rest = rows - (stops[-1] if len(stops) else 0)
        stated.append(f"the last {rest} rows, after which no end is marked, are an episode that was stopped")
        stops = np.append(stops, rows)
    starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)
    return _Cut(starts, stops, terminals[stops - 1], stated, goal)


def _breaks(file: Any) -> np.ndarray:
    """Rows whose next observation is not the observation of the row after."""
    rows = file["actions"].shape[0]
    breaks = np.zeros(rows, bool)
    parts, nexts = seen(file["observations"]), seen(file["next_observations"])
    for name in parts.keys() & nexts.keys():
        for start in range(0, rows - 1, _BLOCK):
            stop = min(start + _BLOCK, rows - 1)
            here = rows_of(nexts[name], f"{file.filename}, next {name}", start, stop)
            there = rows_of(parts[name], f"{file.filename}, {name}", start + 1, stop + 1)
            same = np.isclose(here, there, rtol=1e-5, atol=1e-6, equal_nan=True)
            breaks[start:stop] |= ~same.reshape(stop - start, -1).all(1)
    return breaks


def _plain(value: Any) -> Any:
    """A single number or word; None for everything else."""
    if getattr(value, "shape", None) != () or value.dtype.kind not in "biufOS":
        return None
    content = value[()]
    return content.decode(errors="replace") if isinstance(content, bytes) else getattr(content, "item", str)()
