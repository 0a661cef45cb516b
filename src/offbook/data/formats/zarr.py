"""Replay buffers in Zarr, as Diffusion Policy and its family keep them: a folder, or the same as a zip file.

`meta/episode_ends` says after which row each episode ends; every array below `data` has one row for each step. `action`
is the action, `reward` the reward, the rest are observations under their own names. Pictures that are kept as
floating-point numbers become bytes again, as they are whole numbers from 0 to 255.
"""

import contextlib
import zipfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offbook.data.formats import Recordings
from offbook.data.formats.limits import AGAIN, check_arrays, check_growth, explained, size_of
from offbook.data.formats.transitions import Steps, need, recordings, rows_of
from offbook.data.index import Outcome
from offbook.errors import DataError, needs_extra

_OTHERS = ("timestamp", "stage", "n_contacts")
_COMPRESSIONS = {"blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"}
_WHOLE = "a whole Zarr store that can be decoded"


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
        floats = [name for name, array in data.items() if array.dtype.kind == "f" and _is_picture(array)]
        stated = [f"pictures kept as floating-point numbers are made bytes again: {', '.join(floats)}"] * bool(floats)

        def episodes() -> Generator[tuple[str, Steps], None, None]:
            with _opened(path) as (data, _):
                for number, (start, stop) in enumerate(kept):
                    where = f"{path}, episode {number}"
                    yield where, _steps(data, start, stop, where)

        return recordings(
            "zarr",
            path,
            episodes,
            stated,
            total=len(kept),
            single=len(spans) - len(kept),
        )


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
    with explained(f"{where}, {name}", _WHOLE):
        return rows_of(data[name], f"{where}, {name}", start, stop)


def _is_picture(array: Any) -> bool:
    return len(array.shape) == 4 and array.shape[3] == 3 and min(array.shape[1:3]) >= 16


def _picture(array: np.ndarray, where: str) -> np.ndarray:
    """Pictures of floating-point numbers as bytes; everything else as it is."""
    if array.dtype.kind != "f" or not _is_picture(array):
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
    stored = size_of(path)
    if zipped:
        with explained(path, _WHOLE), zipfile.ZipFile(path) as archive:
            check_growth(sum(part.file_size for part in archive.infolist()), stored, path)
    else:
        _check_links(path)
    kind, layout = (zarr.storage.ZipStore if zipped else zarr.storage.LocalStore), "give a store of Diffusion Policy"
    store: Any = kind(path, read_only=True)
    try:
        with explained(path, _WHOLE):
            root: Any = zarr.open_group(store, mode="r")
            groups = {name: dict(group.arrays()) for name, group in root.groups()}
        need(groups, ("data", "meta"), str(path), layout)
        data, meta = groups["data"], groups["meta"]
        need(meta, ("episode_ends",), f"{path}, meta", layout)
        need(data, ("action",), f"{path}, data", layout)
        arrays = {"meta/episode_ends": meta["episode_ends"]} | {f"data/{name}": data[name] for name in data}
        for name, array in arrays.items():
            _check_plain(array, f"{path}, {name}")
        check_arrays(arrays.items(), stored, path)
        yield data, _ends(meta["episode_ends"], data, str(path))
    finally:
        # Its own close stumbles over a zip file that could not be opened.
        with contextlib.suppress(AttributeError):
            store.close()


def _check_links(folder: Path) -> None:
    """Refuses links that lead out of the folder, to what may be any file on this machine."""
    with explained(folder, _WHOLE):
        for part in folder.rglob("*"):
            if part.is_symlink() and not part.resolve().is_relative_to(folder.resolve()):
                fix = "put the file itself there"
                raise DataError(str(part), expected="a file of the store", got="a link out of it", fix=fix)


def _check_plain(array: Any, where: str) -> None:
    """Refuses an array whose chunks could be pickles, before anything of it is decoded."""
    with explained(where, _WHOLE):
        about = array.metadata.to_dict()
        listed = [*(about.get("codecs") or ()), *(about.get("filters") or ()), about.get("compressor")]
        codecs = repr(listed)
        # Where chunks lie together in shards, those of the shards' own list.
        inner = [part["configuration"].get("codecs") or () for part in listed if part and part.get("configuration")]
        names = [[str(part.get("name", part.get("id"))) for part in of if part] for of in (listed, *inner)]
    if array.dtype.kind not in "biuf":
        fix = "save numbers, in rows of the same length"
        raise DataError(where, expected="numbers", got=f"an array of {array.dtype}", fix=fix)
    if max(sum(name.removeprefix("numcodecs.") in _COMPRESSIONS for name in of) for of in names) > 1:
        # Once makes a thousand times as much, twice a million, whatever the chunk's shape is.
        got, fix = "several compressions", "save it with one"
        raise DataError(where, expected="chunks that were compressed once", got=got, fix=fix)
    if "pickle" in codecs.lower():
        raise DataError(where, expected="chunks of plain numbers", got="pickles", fix="save it without that codec")


def _ends(part: Any, data: Mapping[str, Any], where: str) -> np.ndarray:
    """The ends of the episodes, which must ascend and lie within every array."""
    if len(part.shape) != 1 or part.dtype.kind not in "iu" or not 0 < part.shape[0] <= 100_000_000:
        got, fix = f"{part.dtype} of shape {part.shape}", "record an episode first"
        raise DataError(f"{where}, meta/episode_ends", expected="one whole number for each episode", got=got, fix=fix)
    with explained(f"{where}, meta/episode_ends", _WHOLE):
        ends = np.asarray(part[:], np.int64)
    if ends[0] < 1 or (np.diff(ends) < 1).any():
        got = "ends that do not"
        raise DataError(f"{where}, meta/episode_ends", expected="ends that ascend from 1 on", got=got, fix=AGAIN)
    for name, array in data.items():
        rows = array.shape[0] if array.shape else 0
        if rows < ends[-1]:
            got = f"{rows}"
            raise DataError(f"{where}, data/{name}", expected=f"{ends[-1]} rows or more", got=got, fix=AGAIN)
    return ends
