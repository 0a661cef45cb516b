"""Replay buffers in Zarr, as Diffusion Policy and its family keep them: a folder, or the same as a zip file.

`meta/episode_ends` says after which row each episode ends; every array below `data` has one row for each step. `action`
is the action, `reward` the reward, the rest are observations under their own names. Pictures that are kept as
floating-point numbers become bytes again, as they are whole numbers from 0 to 255.
"""

import contextlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offbook.data.formats import Recordings
from offbook.data.formats.transitions import LAST_DROPPED, Steps, need, recorded_range, rows_of, schema
from offbook.data.index import Outcome
from offbook.errors import DataError, needs_extra

_OTHERS = ("timestamp", "stage", "n_contacts")
_FIX = "copy it again from where it came from"


def read(source: str) -> Recordings:
    """Opens a replay buffer.

    Args:
        source: the folder of a store, or its `.zarr.zip`.

    Raises:
        DataError: it is not there, is damaged, lacks a key, or its arrays are shorter than its episodes.
        MissingExtraError: zarr is not installed.
    """
    path = Path(source).expanduser()
    with _opened(path) as (data, ends):
        spans = [(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        kept = [(a, b) for a, b in spans if b - a > 1]
        if not kept:
            raise DataError(str(path), expected="an episode of two rows or more", got="none", fix="give another store")
        stated = [LAST_DROPPED] + [f"{len(spans) - len(kept)} episodes of a single row are left out"] * (kept != spans)
        first = _steps(data, *kept[0], f"{path}, episode 0")
        floats = [name for name, array in first.observations.items() if array.dtype != data[name].dtype]
        stated += [f"pictures kept as floating-point numbers are made bytes again: {', '.join(floats)}"] * bool(floats)
        made = schema(
            "zarr",
            path,
            first.fields(str(path)),
            first.observations,
            recorded_range(_values(data, "action", a, b, str(path)) for a, b in kept),
            stated,
        )
    return Recordings(schema=made, episodes=_episodes(path, kept), total=len(kept))


def _episodes(path: Path, spans: list[tuple[int, int]]) -> Iterator[tuple[Mapping[str, np.ndarray], Outcome]]:
    with _opened(path) as (data, _):
        for number, (start, stop) in enumerate(spans):
            where = f"{path}, episode {number}"
            steps = _steps(data, start, stop, where)
            yield steps.fields(where), steps.outcome


def _steps(data: Mapping[str, Any], start: int, stop: int, where: str) -> Steps:
    values = {name: _values(data, name, start, stop, where) for name in data}
    action, reward = values.pop("action"), values.pop("reward", None)
    others = {name: values.pop(name) for name in _OTHERS if name in values}
    observations = {name: _picture(array, f"{where}, {name}") for name, array in values.items()}
    return Steps(
        observations=observations,
        action=action,
        reward=reward,
        others=others,
        outcome=Outcome(terminated=False, truncated=True),
    )


def _values(data: Mapping[str, Any], name: str, start: int, stop: int, where: str) -> np.ndarray:
    with _explained(f"{where}, {name}"):
        return rows_of(data[name], start, stop, f"{where}, {name}")


def _picture(array: np.ndarray, where: str) -> np.ndarray:
    """Pictures of floating-point numbers as bytes; everything else as it is."""
    shape = array.shape[1:]
    if array.dtype.kind != "f" or len(shape) != 3 or shape[2] != 3 or min(shape[:2]) < 16:
        return array
    whole = array.clip(0, 255).astype(np.uint8)
    if not np.array_equal(whole, array):
        fix = "save pictures as uint8"
        raise DataError(where, expected="pictures of whole numbers from 0 to 255", got="others", fix=fix)
    return whole


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """The arrays below `data`, and where episodes end."""
    with needs_extra("formats"):
        import zarr
    zipped = path.suffix == ".zip"
    if not (path.is_file() if zipped else path.is_dir()):
        fix = "give the folder that holds meta and data, or the .zarr.zip"
        raise DataError(str(path), expected="a Zarr store", got="no such file or folder", fix=fix)
    if not zipped:
        _check_links(path)
    kind, layout = (zarr.storage.ZipStore if zipped else zarr.storage.LocalStore), "give a store of Diffusion Policy"
    store: Any = kind(path, read_only=True)
    try:
        with _explained(str(path)):
            root: Any = zarr.open_group(store, mode="r")
            groups = {name: dict(group.arrays()) for name, group in root.groups()}
        need(groups, ("data", "meta"), str(path), layout)
        data, meta = groups["data"], groups["meta"]
        need(meta, ("episode_ends",), f"{path}, meta", layout)
        need(data, ("action",), f"{path}, data", layout)
        _check_plain(meta["episode_ends"], f"{path}, meta/episode_ends")
        for name, array in data.items():
            _check_plain(array, f"{path}, data/{name}")
        yield data, _ends(meta["episode_ends"], data, str(path))
    finally:
        # Its own close stumbles over a zip file that could not be opened.
        with contextlib.suppress(AttributeError):
            store.close()


def _check_links(folder: Path) -> None:
    """Refuses links that lead out of the folder, to what may be any file on this machine."""
    root, pending = folder.resolve(), [folder]
    with _explained(str(folder)):
        while pending:
            with os.scandir(pending.pop()) as parts:
                for part in parts:
                    if part.is_symlink() and not Path(part.path).resolve().is_relative_to(root):
                        fix = "put the file itself there"
                        raise DataError(part.path, expected="a file of the store", got="a link out of it", fix=fix)
                    if part.is_dir(follow_symlinks=False):
                        pending.append(Path(part.path))


def _check_plain(array: Any, where: str) -> None:
    """Refuses an array whose chunks could be pickles, before anything of it is decoded."""
    with _explained(where):
        about = array.metadata.to_dict()
        names = list(_codecs([about.get(key) for key in ("codecs", "compressor", "filters")]))
    if array.dtype.kind not in "biuf":
        fix = "save numbers, in rows of the same length"
        raise DataError(where, expected="numbers", got=f"an array of {array.dtype}", fix=fix)
    if any("pickle" in name.lower() for name in names):
        raise DataError(where, expected="chunks of plain numbers", got="pickles", fix="save it without that codec")


def _codecs(part: Any) -> Iterator[str]:
    """Names of all codecs in an array's metadata, those inside others too."""
    if isinstance(part, Mapping):
        yield from (str(part[key]) for key in ("id", "name") if key in part)
        part = list(part.values())
    if isinstance(part, list | tuple):
        for child in part:
            yield from _codecs(child)


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Zarr reports damage by whatever error its decoders meet."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, zipfile.BadZipFile) as error:
        got = f"{type(error).__name__} {error}".partition("\n")[0]
        raise DataError(where, expected="a whole Zarr store that can be decoded", got=got, fix=_FIX) from error


def _ends(part: Any, data: Mapping[str, Any], where: str) -> np.ndarray:
    """The ends of the episodes, which must ascend and lie within every array."""
    if len(part.shape) != 1 or part.dtype.kind not in "iu" or not 0 < part.shape[0] <= 100_000_000:
        got, fix = f"{part.dtype} of shape {part.shape}", "record an episode first"
        raise DataError(f"{where}, meta/episode_ends", expected="one whole number for each episode", got=got, fix=fix)
    with _explained(f"{where}, meta/episode_ends"):
        ends = np.asarray(part[:], np.int64)
    if ends[0] < 1 or (np.diff(ends) < 1).any():
        got = "ends that do not"
        raise DataError(f"{where}, meta/episode_ends", expected="ends that ascend from 1 on", got=got, fix=_FIX)
    for name, array in data.items():
        rows = array.shape[0] if array.shape else 0
        if rows < ends[-1]:
            got = f"{rows}"
            raise DataError(f"{where}, data/{name}", expected=f"{ends[-1]} rows or more", got=got, fix=_FIX)
    return ends
