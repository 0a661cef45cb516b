"""Lists of paths: a pickle of a list of dicts, as mjrl, hand_dapg and Decision Transformer keep recordings.

Each dict has `observations` and `actions`, and may have `rewards`, `next_observations`, `terminals` (also `terminated`
or `dones`, for each step or once), `timeouts`, `agent_infos` and `env_infos`. Nothing in the pickle is run. A list
whose paths all have one observation more than actions is recognised: the last one is what the last step led to.
"""

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offbook.data.formats import Recordings
from offbook.data.formats.pickles import load
from offbook.data.formats.transitions import (
    Steps,
    entries,
    flagged,
    flattened,
    need,
    numbers,
    recordings,
    seen,
    succeeded,
)
from offbook.data.index import Outcome
from offbook.errors import DataError

_ENDS = ("terminals", "terminated", "dones")
_INFOS = ("agent_infos", "env_infos", "infos")
_MORE = "the observations of a path are one more than its actions: the last one is what the last step led to"


def read(source: str) -> Recordings:
    """Opens a pickled list of paths.

    Args:
        source: path of the pickle.

    Raises:
        DataError: it is not there, is damaged, names anything but plain data, or its paths lack a key or disagree.
    """
    path = Path(source).expanduser()
    paths = check_paths(load(path), path)
    more = all(_rows(one["observations"]) == _rows(one["actions"]) + 1 for one in paths)
    after = any("next_observations" in one for one in paths)
    keys = ["rewards"] * any("rewards" in one for one in paths) + ["next_observations"] * (after and not more)
    for number, one in enumerate(paths):
        need(one, keys, f"{path}, path {number}", "give every path the same keys")
    steps = [_steps(one, more, f"{path}, path {number}") for number, one in enumerate(paths)]
    kept = [number for number, one in enumerate(steps) if one.after is not None or len(one.action) > 1]
    names = {name for one in steps for name in one.others}
    widest = max(kept, key=lambda number: len(steps[number].others), default=0)

    def episodes() -> Generator[tuple[str, Steps], None, None]:
        for number in kept:
            yield f"{path}, path {number}", steps[number]

    return recordings(
        "paths",
        path,
        episodes,
        [],
        total=len(kept),
        after=_MORE if more else "",
        first=(f"{path}, path {widest}", steps[widest]),
        single=len(paths) - len(kept),
        left={name for one in paths for name in _infos(one)} - names,
    )


def check_paths(paths: Any, file: Path) -> list[dict[str, Any]]:
    """The list of dicts that a file should hold, each with observations and actions.

    Raises:
        DataError: it is none, is empty, or would be far larger as episodes than the file is.
    """
    fix = "save a list of dicts, one for each episode"
    if not isinstance(paths, list | tuple) or not paths:
        got = "an empty list" if isinstance(paths, list | tuple) else f"a {type(paths).__name__}"
        raise DataError(str(file), expected="a list of paths", got=got, fix=fix)
    # A list may hold the same array many times, and would fill the disk from a small file.
    total, limit = 0, 2**20 + 16 * file.stat().st_size
    for number, one in enumerate(paths):
        if not isinstance(one, dict):
            raise DataError(f"{file}, path {number}", expected="a dict", got=f"a {type(one).__name__}", fix=fix)
        need(one, ("observations", "actions"), f"{file}, path {number}", fix)
        total += 8 * sum(map(entries, flattened(one).values()))
        if total > limit:
            fix = "save every path with arrays of its own"
            raise DataError(str(file), expected="every array once", got="the same ones again and again", fix=fix)
    return list(paths)


def _rows(value: Any) -> int:
    first = next(iter(seen(value).values()), None)
    return len(first) if isinstance(first, list) or (isinstance(first, np.ndarray) and first.ndim) else -1


def _steps(one: Mapping[str, Any], more: bool, where: str) -> Steps:
    observations = {name: numbers(value, f"{where}, {name}") for name, value in seen(one["observations"]).items()}
    for name, array in observations.items():
        if array.ndim < 2 or not len(array):
            got, fix = f"shape {array.shape}", "give each step its own row"
            raise DataError(f"{where}, {name}", expected="shape (steps, size)", got=got, fix=fix)
    action = numbers(one["actions"], f"{where}, actions")
    after = None
    if more:
        after = {name: array[-1:] for name, array in observations.items()}
        observations = {name: array[:-1] for name, array in observations.items()}
    elif "next_observations" in one:
        nexts = seen(one["next_observations"])
        need(nexts, list(observations), f"{where}, next_observations", "give both the same keys")
        after = {name: numbers(nexts[name], f"{where}, next {name}")[-1:] for name in observations}
    rows = len(action) if action.ndim else 0
    others = {name: part for name, part in _infos(one).items() if part is not None and part.shape[:1] == (rows,)}
    flag = next((key for key in _ENDS if key in one), None)
    terminated = flag is not None and flagged(one[flag], f"{where}, {flag}")
    # Without what the last step led to, the step that ended it is not kept.
    terminated = terminated and after is not None
    # Some paths state success for the whole of themselves.
    once = {"success": one["success"]} if isinstance(one.get("success"), bool | int | np.generic) else {}
    success = succeeded({**others, **once})
    stopped = "timeouts" in one and flagged(one["timeouts"], f"{where}, timeouts")
    return Steps(
        observations=observations,
        action=action,
        reward=numbers(one["rewards"], f"{where}, rewards") if "rewards" in one else None,
        others=others,
        after=after,
        outcome=Outcome(terminated=terminated, truncated=stopped or not terminated, success=success),
    )


def _infos(one: Mapping[str, Any]) -> dict[str, np.ndarray | None]:
    """The infos by name; None for those that are no numbers."""
    found: dict[str, np.ndarray | None] = {}
    for group in _INFOS:
        value = one.get(group)
        for name, part in flattened(value, f"{group}.").items() if isinstance(value, Mapping) else ():
            try:
                array = numbers(part, name)
                found[name] = None if 0 in array.shape else array
            except DataError:
                found[name] = None
    return found
