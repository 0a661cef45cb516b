"""Recordings in the formats that others use: into a store with `import_dataset`, out of it with `export_dataset`.

Each format is a module with `read(source) -> Recordings`, and those that are written too have
`write(store, target) -> str` and `left_out(schema) -> list[str]`.
"""

import contextlib
import fcntl
import functools
import importlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from offbook.client.protocol import ActionSpec, ObservationSpec
from offbook.data.formats.limits import KEPT_FREE, check_growth, explained
from offbook.data.index import Outcome
from offbook.data.store import EpisodeStore, Schema
from offbook.data.video import Video
from offbook.errors import ConfigError, DataError, nearest
from offbook.runs.directory import write_atomic
from offbook.runs.progress import track

FORMATS = {
    name: f"offbook.data.formats.{name}"
    for name in ("d4rl", "exorl", "lerobot", "minari", "paths", "robomimic", "toto", "zarr")
}
"""Name of a format -> the module that reads it, and perhaps writes it."""

_LAYOUT = "recordings in the format's layout"
_OTHER = "copy it again from where it came from, or choose another format"
_STORE = {"store.json", "episodes.parquet", "episodes.journal", "fields", "final", "video"}


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """What a format's reader gives.

    Attributes:
        schema: what the episodes hold.
        episodes: each episode's values, as `Writer.append` takes them, with its outcome; read as they are asked for.
        total: how many episodes there will be.
        stored: bytes of the files that they are read from, which bound what may be written.
    """

    schema: Schema
    episodes: Iterable[tuple[Mapping[str, np.ndarray | Video | None], Outcome]]
    total: int
    stored: int


@runtime_checkable
class Rewards(Protocol):
    """Works out the rewards of a task from the states that actions led to."""

    @property
    def task(self) -> str:
        """The task, such as `"dmc:walker-run"`."""

    def __call__(self, states: np.ndarray, actions: np.ndarray, where: str) -> np.ndarray:
        """The rewards, float64 (T,), of T actions and the T states after them; `where` names them in messages."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An environment as a user names it.

    Attributes:
        environment: library and name, such as `"dmc:walker-walk"`.
        observation: what it shows.
        action: what it accepts.
        rewards: take the place of those recorded; None keeps these.
    """

    environment: str
    observation: ObservationSpec
    action: ActionSpec
    rewards: Rewards | None = None


def import_dataset(source: str, out: str | Path, *, setting: Setting | None = None) -> EpisodeStore:
    """Copies foreign recordings into a new store, which appears under its name only when it is whole.

    Args:
        source: the format and what it calls the recordings, such as `"minari:D4RL/door/human-v2"`.
        out: the store's folder, new or empty.
        setting: the environment that they are from, where they do not tell.

    Raises:
        ConfigError: there is no such format, or rewards are to be worked out and it does not keep the physics.
        DataError: the recordings are not there, or are damaged, or the folder is not empty.
    """
    read, name = _format_of(source, "read")
    if setting is not None and setting.rewards is not None:
        if not source.startswith("exorl:"):
            fix = "name the environment with --env instead"
            raise ConfigError("--task", expected="exorl:FOLDER, which keeps the physics", got=repr(source), fix=fix)
        read = functools.partial(read, rewards=setting.rewards)
    out = new_folder(out)
    with explained(source, _LAYOUT, _OTHER):
        recordings: Recordings = read(name)
    if setting is not None:
        from offbook.data.formats.setting import placed

        recordings = placed(recordings, setting, source)
    return write_whole(recordings, source, out)


def new_folder(out: str | Path) -> Path:
    """The folder of a store to be, which a store that is whole can take the place of.

    Raises:
        DataError: it holds something, is a link, or is the folder one is in.
    """
    out = Path(out)
    if out.is_symlink() or not out.name or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        got = "a link" if out.is_symlink() else "one in use" if out.name else "the current one"
        raise DataError(str(out), expected="a new or empty folder", got=got, fix="choose another folder")
    return out


def write_whole(recordings: Recordings, source: str, out: Path, label: str = "importing") -> EpisodeStore:
    """Writes recordings to a store that appears under its name only when it is whole.

    Args:
        recordings: what it will hold.
        source: names them in messages.
        out: what `new_folder` gave.
        label: stands beside the progress bar.

    Raises:
        DataError: they are damaged, or the disk does not take them.
    """
    partial = out.with_name(f"{out.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _clear(partial)
        try:
            _written(recordings, source, partial, label)
        except DataError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not error.where.startswith(f"{partial}, episode"):
                raise
            where = error.where.replace(str(partial), source, 1)
            raise DataError(where, expected=error.expected, got=error.got, fix=error.fix) from None
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.replace(out)
    return EpisodeStore.open(out)


def _written(recordings: Recordings, source: str, partial: Path, label: str) -> None:
    schema, ranges = recordings.schema, []
    recorded = schema.extra.get("import", {}).get("bounds") == "recorded"
    with EpisodeStore.create(partial, schema) as writer:
        for fields, outcome in track(_each(recordings, source, partial.parent), label, recordings.total):
            writer.append(fields, **asdict(outcome), sync=False)
            ranges += [_range(fields, schema)] if recorded and schema.actions else []
    if ranges:
        schema = replace(schema, action=_bounds(ranges))
        write_atomic(partial / "store.json", json.dumps(schema.to_json(), indent=1) + "\n")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps other imports out of a folder, from before anything is written until the store has its name.

    Raises:
        DataError: another one is at work.
    """
    lock = out.with_name(f".{out.name}.importing")
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Not the file that another import has just left and taken away.
            held = lock.exists() and lock.samefile(f"/dev/fd/{stream.fileno()}")
        except BlockingIOError:
            held = False
        if not held:
            fix = "wait until it is done, or choose another folder"
            raise DataError(str(out), expected="to be the only import there", got="another at work", fix=fix)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _range(fields: Mapping[str, Any], schema: Schema) -> np.ndarray:
    """The least and the largest value of each entry of an episode's actions, [2, size]; NaN are passed over."""
    parts = [fields[name].reshape(len(fields[name]), -1) for name in schema.actions]
    joined = np.concatenate(parts, axis=1)
    return np.stack([np.fmin.reduce(joined), np.fmax.reduce(joined)])


def _bounds(ranges: list[np.ndarray]) -> ActionSpec:
    """The bounds of actions that a file does not state; whole numbers in one column from 0 on are taken for choices."""
    both = np.stack(ranges)
    low, high = np.fmin.reduce(both[:, 0]).astype(np.float64), np.fmax.reduce(both[:, 1]).astype(np.float64)
    low, high = np.nan_to_num(low, nan=-np.inf), np.nan_to_num(high, nan=np.inf)
    choices = int(high[0]) + 1 if both.dtype.kind in "iu" and low.shape == (1,) and low[0] >= 0 else None
    low = low if choices is None else np.zeros(1)
    return ActionSpec(size=len(low), low=tuple(low.tolist()), high=tuple(high.tolist()), choices=choices)


def _clear(partial: Path) -> None:
    """Removes what a kill left of an import, whole or damaged, and nothing else.

    Raises:
        DataError: it is no store.
    """
    if not partial.exists() and not partial.is_symlink():
        return
    names = {path.name for path in partial.iterdir()} if partial.is_dir() and not partial.is_symlink() else {""}
    shown = {name for name in names if not name.startswith(".")}
    hidden = all(re.fullmatch(r"\.lock|\.(store|episodes)\..*", name) for name in names - shown)
    if not hidden or not shown <= _STORE or ("store.json" not in shown and shown):
        fix = "move it away, or choose another name for the store"
        raise DataError(str(partial), expected="what an import left, or nothing", got="something else", fix=fix)
    shutil.rmtree(partial, ignore_errors=True)


def _each(
    recordings: Recordings, source: str, folder: Path
) -> Iterator[tuple[Mapping[str, np.ndarray | Video | None], Outcome]]:
    """The episodes, as long as they stay within bounds; what goes wrong where they are read is explained."""
    episodes, written = iter(recordings.episodes), 0
    while True:
        with explained(source, _LAYOUT, _OTHER):
            one = next(episodes, None)
        if one is None:
            return
        size = sum(values.nbytes for values in one[0].values() if isinstance(values, np.ndarray))
        written += size
        check_growth(written, recordings.stored, source)
        free = shutil.disk_usage(folder).free
        if size > free - KEPT_FREE:
            expected = f"room for {size} bytes more, and {KEPT_FREE} that stay free"
            raise DataError(
                str(folder), expected=expected, got=f"{free} bytes free", fix="make room, or use another disk"
            )
        yield one


def export_dataset(store: EpisodeStore, target: str) -> str:
    """Writes a store in a foreign format.

    Args:
        store: the recordings.
        target: the format and the new name, such as `"minari:pour/expert-v0"`.

    Returns:
        Where it was written.

    Raises:
        ConfigError: there is no such format.
        DataError: the name is taken or not allowed, or the format cannot hold these recordings.
    """
    write, name = _format_of(target, "write")
    outside = left_out(store, target)
    for spec in store.schema.fields:
        present = store.present(spec.name)
        if spec.name not in outside and not present.all():
            where, got = f"{store.path}, episode {int(np.argmin(present))}", f"no {spec.name}"
            raise DataError(where, expected="all fields", got=got, fix="export a store whose episodes are complete")
    written: str = write(store, name)
    return written


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder for an export to be written in, which gets its name only when the block has written all of it.

    Raises:
        DataError: the disk does not take it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        yield partial
        partial.replace(folder)
    except OSError as error:
        got, fix = error.strerror or str(error), "see to the disk and its permissions, then export again"
        raise DataError(str(error.filename or folder), expected="to write it", got=got, fix=fix) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def outcomes(store: EpisodeStore) -> list[dict[str, Any]]:
    """What is said of each episode as a whole, as JSON types."""
    columns = {spec.name: store.episodes[spec.name].tolist() for spec in fields(Outcome)}
    for name in ("success", "score"):
        columns[name] = [None if math.isnan(value) else value for value in columns[name]]
    columns["success"] = [None if value is None else bool(value) for value in columns["success"]]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def left_out(store: EpisodeStore, target: str) -> list[str]:
    """What of a store the format of an export has no place for, as `export_dataset` takes both."""
    names: list[str] = _format_of(target, "left_out")[0](store.schema)
    return names


def _format_of(text: str, wanted: str) -> tuple[Callable[..., Any], str]:
    """A function of a format's module, and the name that follows the format."""
    scheme, _, name = text.partition(":")
    if scheme not in FORMATS or not name:
        raise ConfigError(
            f"recordings {text!r}",
            expected="FORMAT:NAME, such as minari:D4RL/door/human-v2",
            got=f"format {scheme!r}" if name else "no name",
            fix=nearest(scheme, FORMATS) if name else "write the format, a colon and the name",
        )
    function = getattr(importlib.import_module(FORMATS[scheme]), wanted, None)
    if function is None:
        fix = "export to minari, lerobot or toto"
        raise ConfigError(f"export to {text!r}", expected="a format that can be written", got=scheme, fix=fix)
    return function, name
