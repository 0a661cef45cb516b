"""Recorded steps as episodes: what the readers of several formats do in the same way.

An episode of a store has T steps and T + 1 observations. Many formats hold T rows, each with the observation before
the step, and not what the last step led to. No observation is made up for that: the last recorded one becomes the
final one, and the step that began there is left out. Whoever does so says it in the schema's `extra`.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from offbook.data.formats import Recordings, limits
from offbook.data.formats.pickles import ObjectArray
from offbook.data.index import Outcome
from offbook.data.schema import FieldSpec, Role, Schema
from offbook.errors import DataError, needs_extra

SUCCESS = ("success", "is_success", "goal_achieved", "solved")
"""Names under which formats keep, step by step, whether the task was done."""
NEXT_KEPT = "the final observation of each episode is the recorded next observation of its last step"
LAST_DROPPED = (
    "what the last step of an episode led to is not recorded: the last observation is the final one, and the action "
    "and the reward of that row are left out"
)
_LEAVES = 2_000
_LIST = 100_000_000


@dataclass(kw_only=True)
class Steps:
    """One episode as its file holds it.

    Attributes:
        observations: what was seen before each step, T rows of each.
        action: what was done, T rows.
        reward: what it earned, T rows; None when not recorded.
        others: further values of T rows.
        after: what was seen after the last step, one row of each; None when not recorded.
        outcome: how the episode ended.
    """

    observations: dict[str, np.ndarray]
    action: np.ndarray
    outcome: Outcome
    reward: np.ndarray | None = None
    others: dict[str, np.ndarray] = field(default_factory=dict)
    after: dict[str, np.ndarray] | None = None

    def fields(self, where: str) -> dict[str, np.ndarray]:
        """The values as a store keeps them, T + 1 observations and T of everything else.

        Raises:
            DataError: two of them have different numbers of rows, one has the wrong rank, or two the same name.
        """
        action = self.action[:, None] if self.action.ndim == 1 and self.action.dtype.kind in "iu" else self.action
        values = {"action": action}
        if self.reward is not None:
            values["reward"] = self.reward[:, 0] if self.reward.shape[1:] == (1,) else self.reward
        for name, rank, expected in (("action", 2, "(steps, size)"), ("reward", 1, "(steps,)")):
            if name in values and values[name].ndim != rank:
                got, fix = f"shape {values[name].shape}", "give each step its own row"
                raise DataError(f"{where}, {name}s", expected=f"shape {expected}", got=got, fix=fix)
        for name in (*self.observations, *self.others):
            if name in values:
                raise DataError(where, expected="different names", got=f"two called {name!r}", fix="rename one of them")
            values[name] = self.observations[name] if name in self.observations else self.others[name]
        for name, array in values.items():
            same_rows(name, array, len(action), where)
        if self.after is None:
            values = {name: array if name in self.observations else array[:-1] for name, array in values.items()}
        for name, array in (self.after or {}).items():
            seen = self.observations[name]
            if array.shape[1:] != seen.shape[1:] or array.dtype != seen.dtype:
                got = f"{array.dtype} {array.shape[1:]} after it"
                expected = f"{seen.dtype} {seen.shape[1:]} as before each step"
                raise DataError(f"{where}, {name}", expected=expected, got=got, fix="record both alike")
            values[name] = np.concatenate([seen, array])
        # In this machine's byte order.
        return {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in values.items()}


def same_rows(name: str, array: Any, rows: int, where: str) -> None:
    """Refuses an array that does not have one row for each action.

    Raises:
        DataError: it has more or fewer.
    """
    count = array.shape[0] if array.shape else None
    if count != rows:
        got = "a single value" if count is None else f"{count} rows"
        also = ", one more than there are actions" if count == rows + 1 else ""
        fix = "cut all to the same steps; nothing is shifted to make them fit"
        raise DataError(f"{where}, {name}", expected=f"{rows} rows, one for each action", got=got + also, fix=fix)


def entries(value: Any) -> int:
    """How many numbers an array, or a list of rows, would have at most; 1 for everything else."""
    if isinstance(value, list | tuple):
        return sum(len(row) if isinstance(row, list | tuple) else getattr(row, "size", 1) for row in value)
    return value.size if isinstance(value, np.ndarray) else 1


def numbers(value: Any, where: str) -> np.ndarray:
    """An array, or a list of numbers or of rows of numbers, as an array.

    Raises:
        DataError: it holds something else than numbers, or rows of different lengths.
    """
    fix = "save numbers, in rows of the same length"
    if isinstance(value, list):
        rows = [row for row in value if isinstance(row, list | tuple)]
        long = entries(value) > _LIST
        if long or any(isinstance(part, list | tuple | np.ndarray) for row in rows for part in row):
            raise DataError(where, expected="rows of numbers", got="a list nested too deep or too long", fix=fix)
        try:
            value = np.asarray(value)
        except (ValueError, TypeError) as error:
            raise DataError(where, expected="numbers", got="rows of different lengths", fix=fix) from error
    kind = "an array of Python objects" if isinstance(value, ObjectArray) else type(value).__name__
    if isinstance(value, np.generic | bool | int | float):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        got = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else kind
        raise DataError(where, expected="numbers", got=got, fix=fix)
    return value


def rows_of(part: Any, where: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows of an array that lies in a file, which says itself how large it is; all of them without `stop`.

    Raises:
        DataError: they would have more than `MAX_BYTES`, or are no numbers.
    """
    if not part.shape:
        raise DataError(where, expected="rows of values, one for each step", got="a single value", fix="give all rows")
    if part.dtype.kind not in "biuf":
        got, fix = f"an array of {part.dtype}", "save numbers, in rows of the same length"
        raise DataError(where, expected="numbers", got=got, fix=fix)
    stop = part.shape[0] if stop is None else stop
    if (stop - start) * math.prod(part.shape[1:]) * part.dtype.itemsize > limits.MAX_BYTES:
        fix = "copy the file again from where it came from, or keep less in one episode"
        raise DataError(where, expected=f"at most {limits.MAX_BYTES} bytes for an episode", got="more", fix=fix)
    return numbers(part[start:stop], where)


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested groups or dicts, named by their keys joined with dots.

    Raises:
        DataError: they are more than 2000, as in something that contains itself, or two have the same name.
    """
    found: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [(prefix, tree)]
    count = 0
    while pending:
        name, value = pending.pop()
        if isinstance(value, Mapping):
            count += len(value)
            if count > _LEAVES:
                fix = "save a flatter structure"
                raise DataError(prefix or "keys", expected=f"at most {_LEAVES} of them", got="more", fix=fix)
            pending += [(f"{name}{key}.", child) for key, child in reversed(list(value.items()))]
        elif name[:-1] in found:
            raise DataError(name[:-1], expected="names that differ", got="two of this", fix="rename one of them")
        else:
            found[name[:-1]] = value
    return found


def seen(value: Any) -> dict[str, Any]:
    """Observations as leaves: a bare array is the leaf `observation`, groups and dicts give their keys."""
    return flattened(value) if isinstance(value, Mapping) else {"observation": value}


def need(tree: Mapping[str, Any], names: Sequence[str], where: str, fix: str) -> None:
    """Refuses a file, group or dict in which a key is missing.

    Raises:
        DataError: it is.
    """
    for name in names:
        if name not in tree:
            got = ", ".join(sorted(map(str, tree))[:12]) or "nothing"
            raise DataError(where, expected=f"the key {name!r}", got=got, fix=fix)


def succeeded(values: Mapping[str, np.ndarray]) -> bool | None:
    """Whether any step reports success under one of the usual names, the last word of a name; None without one."""
    for name, array in values.items():
        if name.rsplit(".", 1)[-1] in SUCCESS:
            return bool((np.asarray(array, np.float64) > 0).any())
    return None


def flagged(value: Any, where: str) -> bool:
    """Whether the last flag is set; the others must not be, for an episode ends once.

    Raises:
        DataError: one is.
    """
    flags = numbers(value, where).reshape(-1) != 0
    early = np.flatnonzero(flags[:-1])
    if len(early):
        got, fix = f"one in row {early[0]} of {len(flags)}", "cut the recording into episodes there"
        raise DataError(where, expected="the flag in the last row only", got=got, fix=fix)
    return bool(flags[-1:].any())


def recordings(
    form: str,
    path: Path,
    episodes: Callable[[], Generator[tuple[str, Steps], None, None]],
    stated: Sequence[str],
    *,
    total: int,
    after: str = "",
    first: tuple[str, Steps] | None = None,
    single: int = 0,
    left: Iterable[str] = (),
    stored: int | None = None,
    environment: str = "",
    rate_hz: float | None = None,
    **extra: Any,
) -> Recordings:
    """Recordings of which one episode tells what all will hold.

    Args:
        form: the format's name.
        path: the file or folder.
        episodes: begins anew at the first one each time it is called; gives each with words for where it is.
        stated: what a user should know of how the file was read; `offbook data info` shows it.
        total: how many episodes there are.
        after: what the observation after the last step is, where it is no recorded next observation.
        first: the episode that tells; else it is the first.
        single: how many were left out, being of a single row.
        left: names of what was left out, being no numbers for each step.
        stored: bytes of the files, where they are not all those at `path`.
        environment: library and name of the environment, where the file tells.
        rate_hz: steps a second, where that is known.
        extra: further JSON-able facts of the file.

    Raises:
        DataError: there is no episode, or that one cannot be kept; nothing is written then.
    """
    if not total:
        fix = "choose other recordings"
        raise DataError(str(path), expected="an episode of two rows or more", got="none", fix=fix)
    with contextlib.closing(episodes()) as begun:
        where, told = first or next(begun)
    specs = []
    for name, array in told.fields(where).items():
        role: Role = "observation" if name in told.observations else "other"
        if name in ("action", "reward"):
            role = "action" if name == "action" else "reward"
        specs.append(FieldSpec(name, array.dtype.name, array.shape[1:], role))
    specs.sort(key=lambda spec: ("observation", "action", "reward", "other").index(spec.role))
    said = [LAST_DROPPED if told.after is None else after or NEXT_KEPT, *stated]
    said += [f"{single} episodes of a single row are left out"] * bool(single)
    said += [f"left out, being no numbers for each step: {', '.join(sorted(left))}"] * bool(left)
    made = Schema(
        tuple(specs),
        environment=environment,
        rate_hz=rate_hz,
        source=f"{form}:{path.name}",
        extra={"import": {"format": form, "stated": said, "bounds": "recorded", **extra}},
    )
    # What only some episodes have is kept as missing in the others.
    others = dict.fromkeys(made.named("other"))
    kept = (({**others, **one.fields(where)}, one.outcome) for where, one in episodes())
    stored = limits.size_of(path) if stored is None else stored
    return Recordings(schema=made, episodes=kept, total=total, stored=stored)


@contextlib.contextmanager
def hdf5(path: Path, *, known: bool = False) -> Iterator[Any]:
    """Opens an HDF5 file for reading.

    Args:
        path: the file.
        known: it was looked through before, which takes a while where there are many arrays.

    Raises:
        DataError: it is not there, or points at other files, speaks of far more than it holds, or is damaged, there or
            wherever the block reads.
        MissingExtraError: h5py is not installed.
    """
    with needs_extra("formats"):
        import h5py
    fix = "give the path of the file, or copy it again from where it came from"
    # Episodes are read one after another, and a compressed chunk often holds several: keep a few of them.
    with limits.explained(path, "a whole HDF5 file", fix), h5py.File(path, "r", rdcc_nbytes=2**26) as file:
        size = path.stat().st_size
        if not known:
            limits.check_arrays(_arrays(file, size, str(path)), size, path)
        yield file


def _arrays(file: Any, size: int, where: str) -> Iterator[tuple[str, Any]]:
    """All arrays of an HDF5 file by each of their names; none may be read from other files, which may be any here."""
    from h5py import Dataset, Group, h5l

    fix, pending, soft, count = "copy everything into the file itself", [file], list[tuple[Any, str]](), 0
    while pending or soft:
        # Where links by name lead, once it is known that none of those in the file leads out of it.
        part = pending.pop() if pending else soft[-1][0].get(soft.pop()[1])
        away = isinstance(part, Dataset) and (part.external or part.is_virtual)
        if isinstance(part, Group):
            # A name takes more bytes than this, unless groups lead to themselves.
            count += len(part)
            if count > _LEAVES + size // 16:
                raise DataError(where, expected="names that each lead somewhere else", got="a circle", fix=fix)
            kinds = {name: part.id.links.get_info(name.encode("utf-8", "surrogateescape")).type for name in part}
            away = h5l.TYPE_EXTERNAL in kinds.values()
            pending += [part[name] for name, kind in kinds.items() if kind == h5l.TYPE_HARD]
            soft += [(part, name) for name, kind in kinds.items() if kind == h5l.TYPE_SOFT]
        if away:
            got = "one that points at others"
            raise DataError(where, expected="a file that holds its own values", got=got, fix=fix)
        if isinstance(part, Dataset):
            _check_filters(part, f"{where}, {part.name}")
            yield part.name, part


def _check_filters(array: Any, where: str) -> None:
    """Refuses what was compressed twice: a million times as much, where once makes a thousand."""
    from h5py import h5z

    about = array.id.get_create_plist()
    kinds = [about.get_filter(i)[0] for i in range(about.get_nfilters())]
    harmless = (h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32, h5z.FILTER_NBIT, h5z.FILTER_SCALEOFFSET)
    if len([kind for kind in kinds if kind not in harmless]) > 1:
        fix = "save it with one compression"
        raise DataError(where, expected="values that were compressed once", got="several compressions", fix=fix)
