"""Recorded steps as episodes: what the readers of several formats do in the same way.

An episode of a store has T steps and T + 1 observations. Many formats hold T rows, each with the observation before
the step, and not what the last step led to. No observation is made up for that: the last recorded one becomes the
final one, and the step that began there is left out. Whoever does so says it in the schema's `extra`.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from offbook.client.protocol import ActionSpec
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
MAX_BYTES = 8 * 2**30
"""Most bytes that one array of one episode may have; more is a damaged file, or one made to fill the memory."""
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
            return {name: native(a if name in self.observations else a[:-1]) for name, a in values.items()}
        for name, array in self.after.items():
            seen = self.observations[name]
            if array.shape[1:] != seen.shape[1:] or array.dtype != seen.dtype:
                got = f"{array.dtype} {array.shape[1:]} after it"
                expected = f"{seen.dtype} {seen.shape[1:]} as before each step"
                raise DataError(f"{where}, {name}", expected=expected, got=got, fix="record both alike")
            values[name] = np.concatenate([seen, array])
        return {name: native(array) for name, array in values.items()}


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


def native(array: np.ndarray) -> np.ndarray:
    """The same values in this machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


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


def rows_of(part: Any, start: int, stop: int, where: str) -> np.ndarray:
    """Rows of an array that lies in a file, which says itself how large it is.

    Raises:
        DataError: they would have more than `MAX_BYTES`, or are no numbers.
    """
    if not part.shape:
        raise DataError(where, expected="rows of values, one for each step", got="a single value", fix="give all rows")
    if part.dtype.kind not in "biuf":
        got, fix = f"an array of {part.dtype}", "save numbers, in rows of the same length"
        raise DataError(where, expected="numbers", got=got, fix=fix)
    if (stop - start) * math.prod(part.shape[1:]) * part.dtype.itemsize > MAX_BYTES:
        fix = "copy the file again from where it came from, or keep less in one episode"
        raise DataError(where, expected=f"at most {MAX_BYTES} bytes for an episode", got="more", fix=fix)
    return numbers(part[start:stop], where)


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested groups or dicts, named by their keys joined with dots.

    Raises:
        DataError: they are more than 2000, as in something that contains itself, or two have the same name.
    """
    found: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [(prefix, tree)]
    for _ in range(_LEAVES):
        if not pending:
            return found
        name, value = pending.pop()
        if isinstance(value, Mapping):
            pending += [(f"{name}{key}.", child) for key, child in reversed(list(value.items()))]
        elif name[:-1] in found:
            raise DataError(name[:-1], expected="names that differ", got="two of this", fix="rename one of them")
        else:
            found[name[:-1]] = value
    fix = "save a flatter structure"
    raise DataError(prefix or "keys", expected=f"at most {_LEAVES} of them", got="more", fix=fix)


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


def recorded_range(actions: Iterable[np.ndarray]) -> ActionSpec:
    """The bounds of actions that a file does not state: the least and the largest value of each entry.

    Whole numbers in one column from 0 on are taken for choices.
    """
    low = high = np.zeros(0)
    choices = True
    for part in actions:
        flat = part.reshape(len(part), -1)
        if not len(flat):
            continue
        least, most = (np.asarray(bound(flat, axis=0), np.float64) for bound in (np.fmin.reduce, np.fmax.reduce))
        choices = choices and part.dtype.kind in "iu" and flat.shape[1] == 1
        low, high = (least, most) if low.shape != least.shape else (np.fmin(low, least), np.fmax(high, most))
    known = [float(x) for x in np.nan_to_num(low, nan=-np.inf)], [float(x) for x in np.nan_to_num(high, nan=np.inf)]
    count = int(high[0]) + 1 if choices and len(low) and low[0] >= 0 else None
    if count is not None:
        known = [0.0], [float(count - 1)]
    return ActionSpec(size=len(low), low=tuple(known[0]), high=tuple(known[1]), choices=count)


def schema(
    form: str,
    source: Path,
    first: Mapping[str, np.ndarray],
    observations: Iterable[str],
    action: ActionSpec,
    stated: Sequence[str],
    *,
    environment: str = "",
    rate_hz: float | None = None,
    **extra: Any,
) -> Schema:
    """What the episodes will hold, told by the first of them.

    Args:
        form: the format's name.
        source: the file or folder.
        first: fields of one episode.
        observations: which of them are observations.
        action: bounds of the actions, as recorded.
        stated: what a user should know of how the file was read; `offbook data info` shows it.
        environment: library and name of the environment, where the file tells.
        rate_hz: steps a second, where that is known.
        extra: further JSON-able facts of the file.
    """
    observed = set(observations)
    fields = []
    for name, array in first.items():
        role: Role = "observation" if name in observed else "other"
        if name in ("action", "reward"):
            role = "action" if name == "action" else "reward"
        fields.append(FieldSpec(name, array.dtype.name, array.shape[1:], role))
    order = ("observation", "action", "reward", "other")
    fields.sort(key=lambda spec: order.index(spec.role))
    return Schema(
        tuple(fields),
        environment=environment,
        rate_hz=rate_hz,
        source=f"{form}:{source.name}",
        action=action,
        extra={"import": {"format": form, "stated": list(stated), "bounds": "recorded", **extra}},
    )


@contextlib.contextmanager
def hdf5(path: Path) -> Iterator[Any]:
    """Opens an HDF5 file for reading.

    Raises:
        DataError: it is not there, or points at other files, or is damaged, there or wherever the block reads.
        MissingExtraError: h5py is not installed.
    """
    with needs_extra("formats"):
        import h5py
    fix = "give the path of the file, or copy it again from where it came from"
    if not path.is_file():
        raise DataError(str(path), expected="an HDF5 file", got="no such file", fix=fix)
    try:
        # Episodes are read one after another, and a compressed chunk often holds several: keep a few of them.
        with h5py.File(path, "r", rdcc_nbytes=2**26) as file:
            _check_own(file, str(path))
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        got = f"one that is damaged or cut short ({str(error).partition(chr(10))[0]})"
        raise DataError(str(path), expected="a whole HDF5 file", got=got, fix=fix) from error


def _check_own(file: Any, where: str) -> None:
    """Refuses an HDF5 file that would have others read, which may be any on this machine."""
    import h5py

    def elsewhere(_: str, part: Any) -> bool | None:
        if isinstance(part, h5py.ExternalLink):
            return True
        return (isinstance(part, h5py.Dataset) and bool(part.external or part.is_virtual)) or None

    if file.visititems_links(elsewhere) or file.visititems(elsewhere):
        fix = "copy everything into the file itself"
        raise DataError(where, expected="a file that holds its own values", got="one that points at others", fix=fix)
