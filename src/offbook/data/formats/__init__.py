"""Recordings in the formats that others use: into a store with `import_dataset`, out of it with `export_dataset`.

Each format is a module with `read(source) -> Recordings`, and those that are written too have
`write(store, target) -> str` and `left_out(schema) -> list[str]`.
"""

import contextlib
import importlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offbook.client.protocol import ActionSpec, ObservationSpec
from offbook.data.index import Outcome
from offbook.data.store import EpisodeStore, Schema
from offbook.data.video import Video
from offbook.errors import ConfigError, DataError, nearest
from offbook.runs.progress import track

FORMATS = {
    name: f"offbook.data.formats.{name}"
    for name in ("d4rl", "exorl", "lerobot", "minari", "paths", "robomimic", "toto", "zarr")
}
"""Name of a format -> the module that reads it, and perhaps writes it."""

_STORE = {"store.json", "episodes.parquet", "episodes.journal", "fields", "final", "video"}


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """What a format's reader gives.

    Attributes:
        schema: what the episodes hold.
        episodes: each episode's values, as `Writer.append` takes them, with its outcome; read as they are asked for.
        total: how many episodes there will be.
    """

    schema: Schema
    episodes: Iterable[tuple[Mapping[str, np.ndarray | Video | None], Outcome]]
    total: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An environment as a user names it.

    Attributes:
        environment: library and name, such as `"dmc:walker-walk"`.
        observation: what it shows.
        action: what it accepts.
    """

    environment: str
    observation: ObservationSpec
    action: ActionSpec


def import_dataset(source: str, out: str | Path, *, setting: Setting | None = None) -> EpisodeStore:
    """Copies foreign recordings into a new store, which appears under its name only when it is whole.

    Args:
        source: the format and what it calls the recordings, such as `"minari:D4RL/door/human-v2"`.
        out: the store's folder, new or empty.
        setting: the environment that they are from, where they do not tell.

    Raises:
        ConfigError: there is no such format.
        DataError: the recordings are not there, or are damaged, or the folder is not empty.
    """
    read, name = _format_of(source, "read")
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(str(out), expected="a new or empty folder", got="one in use", fix="choose another folder")
    with _explained(source):
        recordings: Recordings = read(name)
    if setting is not None:
        from offbook.data.formats.setting import placed

        recordings = placed(recordings, setting, source)
    partial = out.with_name(f"{out.name}.partial")
    _clear(partial)
    try:
        with EpisodeStore.create(partial, recordings.schema) as writer:
            for fields, outcome in track(_each(recordings, source), "importing", recordings.total):
                writer.append(fields, **asdict(outcome), sync=False)
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


def _clear(partial: Path) -> None:
    """Removes what a kill left of an import, whole or damaged, and nothing else.

    Raises:
        DataError: another process is importing there this very moment, or it is no store.
    """
    if not partial.exists() and not partial.is_symlink():
        return
    names = {path.name for path in partial.iterdir()} if partial.is_dir() and not partial.is_symlink() else {""}
    shown = {name for name in names if not name.startswith(".")}
    hidden = all(re.fullmatch(r"\.lock|\.(store|episodes)\..*", name) for name in names - shown)
    if not hidden or not shown <= _STORE or ("store.json" not in shown and shown):
        fix = "move it away, or choose another name for the store"
        raise DataError(str(partial), expected="what an import left, or nothing", got="something else", fix=fix)
    try:
        if shown:
            EpisodeStore.append_to(partial).close()
    except DataError as error:
        if error.expected == "to be the only writer":
            raise
    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Readers name what is wrong where they look for it; a file can be wrong in ways that none of them looks for."""
    from PIL import Image

    try:
        yield
    except (
        *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, SyntaxError),
        *(RecursionError, Image.DecompressionBombError),
    ) as error:
        got = f"{type(error).__name__} {error}".partition("\n")[0].strip()
        fix = "copy it again from where it came from, or choose another format"
        raise DataError(source, expected="recordings in the format's layout", got=got, fix=fix) from error


def _each(recordings: Recordings, source: str) -> Iterator[tuple[Mapping[str, np.ndarray | Video | None], Outcome]]:
    """The episodes; what goes wrong where they are read, and not where they are written, is explained."""
    episodes = iter(recordings.episodes)
    while True:
        with _explained(source):
            one = next(episodes, None)
        if one is None:
            return
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
    written: str = write(store, name)
    return written


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
        fix = "export to minari or lerobot"
        raise ConfigError(f"export to {text!r}", expected="a format that can be written", got=scheme, fix=fix)
    return function, name
