"""Recordings in the formats that others use: into a store with `import_dataset`, out of it with `export_dataset`.

Each format is a module with `read(source) -> Recordings` and `write(store, target) -> str`.
"""

import importlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offbook.data.index import Outcome
from offbook.data.store import EpisodeStore, Schema
from offbook.errors import ConfigError, DataError, nearest
from offbook.runs.progress import track

FORMATS = {"minari": "offbook.data.formats.minari"}
"""Name of a format -> the module that reads and writes it."""


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """What a format's reader gives.

    Attributes:
        schema: what the episodes hold.
        episodes: each episode's values, as `Writer.append` takes them, with its outcome; read as they are asked for.
        total: how many episodes there will be.
    """

    schema: Schema
    episodes: Iterable[tuple[Mapping[str, np.ndarray | None], Outcome]]
    total: int


def import_dataset(source: str, out: str | Path) -> EpisodeStore:
    """Copies foreign recordings into a new store, which appears under its name only when it is whole.

    Args:
        source: the format and what it calls the recordings, such as `"minari:D4RL/door/human-v2"`.
        out: the store's folder, new or empty.

    Raises:
        ConfigError: there is no such format.
        DataError: the recordings are not there, or are damaged, or the folder is not empty.
    """
    module, name = _format_of(source)
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(str(out), expected="a new or empty folder", got="one in use", fix="choose another folder")
    recordings: Recordings = module("read")(name)
    partial = out.with_name(f"{out.name}.partial")
    if (partial / "store.json").exists():
        # Raises when another process is importing there this very moment; else it is what a kill left.
        EpisodeStore.append_to(partial).close()
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with EpisodeStore.create(partial, recordings.schema) as writer:
            for fields, outcome in track(recordings.episodes, "importing", recordings.total):
                writer.append(fields, **asdict(outcome), sync=False)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.replace(out)
    return EpisodeStore.open(out)


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
    module, name = _format_of(target)
    written: str = module("write")(store, name)
    return written


def _format_of(text: str) -> tuple[Callable[[str], Any], str]:
    scheme, _, name = text.partition(":")
    if scheme not in FORMATS or not name:
        raise ConfigError(
            f"recordings {text!r}",
            expected="FORMAT:NAME, such as minari:D4RL/door/human-v2",
            got=f"format {scheme!r}" if name else "no name",
            fix=nearest(scheme, FORMATS) if name else "write the format, a colon and the name",
        )
    module = importlib.import_module(FORMATS[scheme])
    return lambda function: getattr(module, function), name
