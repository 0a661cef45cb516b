"""LeRobotDataset v3.0, v2.1 and v2.0: folders of Parquet and MP4 files, read and written without the lerobot package.

The format records an observation and the action taken on it, but not what was observed after the last action. So the
last observation becomes the final one, the last action and its reward are dropped, and episodes of one frame are left
out: nothing is invented. Only what `write` exported comes back whole, for it keeps the final observations beside the
dataset. `next.done` does not tell the end of a task from the end of time, so episodes come in as truncated.

Features keep their names, and videos stay videos: their files are copied. Text and depth pictures are left out, and
named in the schema.
"""

import contextlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from offbook.data.clips import read_clip
from offbook.data.formats import Recordings
from offbook.data.formats.lerobot_layout import (
    DONE,
    FINAL,
    INDEX,
    INFO,
    OURS,
    REWARD,
    SUCCESS,
    Feature,
    features_of,
    place,
    sha256_of,
)
from offbook.data.formats.lerobot_writing import left_out, write
from offbook.data.formats.transitions import LAST_DROPPED, recorded_range
from offbook.data.index import Outcome
from offbook.data.store import FieldSpec, Role, Schema
from offbook.data.video import Video, frame_times
from offbook.errors import DataError

__all__ = ["left_out", "read", "write"]

_AGAIN = "download or record it again"


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What the dataset says of an episode, before its rows are read; videos by feature: file and first second."""

    number: int
    length: int
    task: str
    data: Path
    videos: dict[str, tuple[Path, float]]


@dataclass(frozen=True, kw_only=True)
class _Ours:
    """What an export of ours kept beside the dataset."""

    schema: Schema
    outcomes: list[dict[str, Any]]
    final: pa.Table


def read(source: str) -> Recordings:
    """Opens a dataset.

    Args:
        source: its folder, the one with `meta/` and `data/` in it.

    Raises:
        DataError: it is not there, is of another version, or is damaged.
    """
    folder = Path(source).expanduser()
    info = _info(folder)
    entries = _entries(folder, info)
    ours = _ours(folder, entries)
    if ours is None:
        short = [entry.number for entry in entries if entry.length < 2]
        entries = [entry for entry in entries if entry.length >= 2]
        schema, features = _schema(folder, info, entries, short)
    else:
        schema, features = ours.schema, features_of(ours.schema)
    if not entries:
        raise DataError(f"lerobot:{folder}", expected="an episode of two frames or more", got="none", fix=_AGAIN)
    return Recordings(
        schema=schema, episodes=_episodes(entries, features, float(info["fps"]), ours), total=len(entries)
    )


@contextlib.contextmanager
def _explained(where: Path | str, expected: str) -> Iterator[None]:
    """Turns whatever a damaged file makes its reader say into a message for the user."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, Image.DecompressionBombError) as error:
        missing = isinstance(error, FileNotFoundError)
        got = "no such file" if missing else f"{type(error).__name__} {error}".splitlines()[0]
        raise DataError(str(where), expected=expected, got=got, fix=_AGAIN) from error


def _info(folder: Path) -> dict[str, Any]:
    file = folder / INFO
    if not file.is_file():
        got = f"no {INFO} in it" if folder.is_dir() else "no such folder"
        fix = "give the folder that holds meta/ and data/"
        raise DataError(f"lerobot:{folder}", expected="a LeRobot dataset", got=got, fix=fix)
    with _explained(file, "the description of a LeRobot dataset"):
        info: dict[str, Any] = json.loads(file.read_bytes())
        version, fps, features = info["codebase_version"], float(info["fps"]), info["features"]
        if not (fps > 0 and math.isfinite(fps)):
            raise ValueError(f"fps {info['fps']!r}")
        for key, feature in features.items():
            feature["shape"] = tuple(int(size) for size in feature["shape"])
            if not isinstance(feature["dtype"], str) or min(feature["shape"], default=1) < 1:
                raise ValueError(f"feature {key!r}")
    if not re.fullmatch(r"v?(2\.[01]|3\.0)", str(version)):
        fix = "convert it with the tools of LeRobot"
        raise DataError(str(file), expected="codebase_version v3.0, v2.1 or v2.0", got=repr(version), fix=fix)
    return info


def _entries(folder: Path, info: Mapping[str, Any]) -> list[_Entry]:
    videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    with _explained(folder / "meta", "a list of the episodes"):
        if "3" in str(info["codebase_version"]).partition(".")[0]:
            rows = _episodes_table(folder, videos)
            entries = [_entry_of_v3(folder, info, row, videos) for row in rows]
        else:
            lines = (folder / "meta" / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
            entries = [_entry_of_v2(folder, info, json.loads(line), videos) for line in lines if line.strip()]
        total = int(info.get("total_episodes", len(entries)))
    entries.sort(key=lambda entry: entry.number)
    if len(entries) != total or [entry.number for entry in entries] != list(range(total)):
        got = f"{len(entries)} in the list of episodes"
        raise DataError(str(folder / "meta"), expected=f"episodes 0 to {total - 1}", got=got, fix=_AGAIN)
    return entries


def _episodes_table(folder: Path, videos: list[str]) -> list[dict[str, Any]]:
    wanted = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
    for key in videos:
        wanted += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    files = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise FileNotFoundError
    return [row for file in files for row in pq.read_table(file, columns=wanted).to_pylist()]


def _entry_of_v3(folder: Path, info: Mapping[str, Any], row: Mapping[str, Any], videos: list[str]) -> _Entry:
    where = str(folder / INFO)
    data = place(info["data_path"], where, chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    files = {}
    for key in videos:
        numbers = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
        file = folder / place(info["video_path"], where, video_key=key, **numbers)
        files[key] = file, float(row[f"videos/{key}/from_timestamp"])
    return _entry(row, folder / data, files)


def _entry_of_v2(folder: Path, info: Mapping[str, Any], row: Mapping[str, Any], videos: list[str]) -> _Entry:
    where, number = str(folder / INFO), int(row["episode_index"])
    numbers = {"episode_chunk": number // int(info["chunks_size"]), "episode_index": number}
    data = folder / place(info["data_path"], where, **numbers)
    files = {key: (folder / place(info["video_path"], where, video_key=key, **numbers), 0.0) for key in videos}
    return _entry(row, data, files)


def _entry(row: Mapping[str, Any], data: Path, videos: dict[str, tuple[Path, float]]) -> _Entry:
    task = "; ".join(map(str, row["tasks"] or []))
    return _Entry(number=int(row["episode_index"]), length=int(row["length"]), task=task, data=data, videos=videos)


def _ours(folder: Path, entries: list[_Entry]) -> _Ours | None:
    """What an export of ours kept, unless someone has changed the dataset since."""
    if not (folder / OURS).is_file():
        return None
    with _explained(folder / OURS, "what an export of offbook writes"):
        record = json.loads((folder / OURS).read_bytes())
        files = sorted({entry.data for entry in entries})
        if sha256_of([*files, folder / FINAL]) != record["sha256"]:
            return None
        schema = Schema.from_json(record["schema"], str(folder / OURS))
        return _Ours(schema=schema, outcomes=record["outcomes"], final=pq.read_table(folder / FINAL))


def _schema(
    folder: Path, info: Mapping[str, Any], entries: list[_Entry], short: list[int]
) -> tuple[Schema, dict[str, Feature]]:
    """The schema of a foreign dataset, and its features, each of which is one field."""
    features, left = {}, {}
    for key, said in info["features"].items():
        if key in INDEX or key in (DONE, SUCCESS):
            continue
        made = _foreign(key, said)
        if isinstance(made, str):
            left[key] = made
        else:
            features[key] = made
    specs = tuple(feature.parts[0] for feature in features.values())
    stated = [LAST_DROPPED, "that an episode ends counts as truncation; the format does not tell why it does"]
    stated += [f"the feature {key!r} ({why}) is left out" for key, why in left.items()]
    stated += [f"episodes of one frame are left out: {', '.join(map(str, short))}"] * bool(short)
    actions = [feature for feature in features.values() if feature.parts[0].role == "action"]
    extra = {
        "format": "lerobot",
        "stated": stated,
        "bounds": "recorded",
        "robot_type": info.get("robot_type"),
        "names": {key: said.get("names") for key, said in info["features"].items() if key in features},
    }
    return Schema(
        specs,
        rate_hz=float(info["fps"]),
        source=f"lerobot:{folder.resolve().name}",
        licence=_licence(folder),
        action=recorded_range(_actions(sorted({entry.data for entry in entries}), actions)) if actions else None,
        extra={"import": extra},
    ), features


def _actions(files: list[Path], features: list[Feature]) -> Iterator[np.ndarray]:
    """All actions, file by file."""
    keys = [feature.key for feature in features]
    for file in files:
        with _explained(file, "a Parquet file"):
            _need(pq.read_schema(file).names, keys, file)
            table = pq.read_table(file, columns=keys)
        found = [_decoded(table, feature, str(file)) for feature in features]
        yield np.concatenate([values.reshape(len(table), -1) for values in found], axis=1)


def _need(names: list[str], columns: Iterable[str], file: Path) -> None:
    """Refuses a file of rows that lacks a column."""
    for key in columns:
        if key not in names:
            raise DataError(str(file), expected=f"the column {key!r}", got="none", fix=_AGAIN)


def _foreign(key: str, said: Mapping[str, Any]) -> Feature | str:
    """A feature as one field, or why it is none."""
    kind, shape = said["dtype"], said["shape"]
    if kind in ("video", "image"):
        about = {**(said.get("info") or {}), **(said.get("video_info") or {})}
        if about.get("is_depth_map") or about.get("video.is_depth_map"):
            return "depth"
        if len(shape) == 3 and shape[2] != 3 and shape[0] == 3:
            shape = (*shape[1:], 3)
        if len(shape) != 3 or shape[2] != 3:
            return f"{kind} of shape {shape}"
        # A video stays one, and is copied as it is.
        spec = FieldSpec(key, "uint8", shape, "observation", video=kind == "video" and min(shape[:2]) >= 16)
        return Feature(key=key, kind=kind, shape=shape, parts=(spec,))
    try:
        numeric = np.dtype(kind).kind in "biuf"
    except TypeError:
        numeric = False
    if not numeric:
        return str(kind)
    role: Role = "other"
    if key.startswith("observation"):
        role = "observation"
    elif key.startswith("action"):
        role = "action"
    elif key == REWARD and math.prod(shape) == 1 and kind != "bool":
        role = "reward"
    spec = FieldSpec(key, np.dtype(kind).name, () if role == "reward" else shape, role, str(said.get("units", "")))
    return Feature(key=key, kind=spec.dtype, shape=shape or (1,), parts=(spec,))


def _licence(folder: Path) -> str:
    """The licence that a dataset's card states in its head."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        head = (folder / "README.md").read_text(encoding="utf-8")[:4000]
        if found := re.search(r"^license: *(\S.*)$", head, re.MULTILINE):
            return found[1].strip()
    return ""


def _episodes(
    entries: list[_Entry], features: Mapping[str, Feature], fps: float, ours: _Ours | None
) -> Iterator[tuple[dict[str, np.ndarray | Video | None], Outcome]]:
    opened: tuple[Path, pa.Table] | None = None
    times = cache(frame_times)
    for entry in entries:
        where = f"{entry.data}, episode {entry.number}"
        if opened is None or opened[0] != entry.data:
            with _explained(entry.data, "a Parquet file"):
                opened = entry.data, pq.read_table(entry.data)
        table = _rows(opened[1], entry, features, fps, where)
        fields: dict[str, np.ndarray | Video | None] = {}
        for key, feature in features.items():
            if feature.kind == "video":
                file, start = entry.videos[key]
                count = entry.length + (ours is not None)
                video = _video(
                    file, times(file), start + np.arange(count) / fps, fps, f"{file}, episode {entry.number}"
                )
                spec = feature.parts[0]
                fields[spec.name] = video if spec.video else _cut(_pictures(video, feature.shape), spec)
                continue
            values = _decoded(table, feature, where)
            if feature.observed and ours is not None:
                final = _decoded(ours.final.slice(entry.number, 1), feature, f"{FINAL}, episode {entry.number}")
                values = np.concatenate([values, final])
            elif not feature.observed and ours is None:
                values = values[:-1]
            fields |= feature.unpack(values)
        if ours is not None:
            yield fields, Outcome(**{**ours.outcomes[entry.number], "task": entry.task})
        else:
            success = bool(np.any(_numbers(table[SUCCESS]))) if SUCCESS in table.column_names else None
            yield fields, Outcome(terminated=False, truncated=True, task=entry.task, success=success)


def _cut(pictures: np.ndarray, spec: FieldSpec) -> np.ndarray:
    """Without the edge that made an odd size even."""
    return pictures[:, : spec.shape[0], : spec.shape[1]]


def _rows(table: pa.Table, entry: _Entry, features: Mapping[str, Feature], fps: float, where: str) -> pa.Table:
    """The rows of one episode in order, after their numbers and times were checked."""
    stored = [key for key, feature in features.items() if feature.kind != "video"]
    _need(table.column_names, (*stored, "episode_index", "frame_index", "timestamp"), entry.data)
    with _explained(where, "rows that are numbered"):
        rows = np.flatnonzero(_numbers(table["episode_index"]) == entry.number)
        table = table.take(rows)
        order = np.argsort(_numbers(table["frame_index"]), kind="stable")
        table = table.take(order)
        frames, times = _numbers(table["frame_index"]), _numbers(table["timestamp"]).astype(np.float64)
    if len(rows) != entry.length or not np.array_equal(frames, np.arange(entry.length)):
        expected, got = f"{entry.length} frames, numbered from 0", f"{len(rows)} rows"
        raise DataError(where, expected=expected, got=got, fix=_AGAIN)
    off = np.abs((times - times[0]) * fps - frames)
    if not np.all(off < 0.5):
        i = int(np.argmin(off < 0.5))
        got = f"frame {i} at second {times[i]:g}"
        raise DataError(where, expected=f"{fps:g} frames a second", got=got, fix="correct fps, or record it again")
    return table


def _decoded(table: pa.Table, feature: Feature, where: str) -> np.ndarray:
    """The values of a column of numbers or of encoded pictures."""
    column = table[feature.key]
    with _explained(f"{where}, feature {feature.key!r}", f"values of shape {feature.shape}"):
        if feature.camera:
            contents = column.to_pylist()
            pictures = [_picture(value["bytes"] if isinstance(value, dict) else value, feature) for value in contents]
            return np.stack(pictures)
        values = column.combine_chunks()
        while _is_list(values.type):
            sizes = np.asarray(values.value_lengths())
            if values.null_count or np.any(sizes != sizes[0]):
                raise ValueError("rows of different lengths")
            values = values.flatten()
        if values.null_count:
            raise ValueError("a missing value")
        return _numbers(values).astype(feature.kind, copy=False).reshape(len(table), *feature.shape)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _numbers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The numbers of a column, of which each row has one, be it in a list of its own."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    while _is_list(values.type):
        values = values.flatten()
    return np.asarray(values.to_numpy(zero_copy_only=False))


def _picture(content: bytes, feature: Feature) -> np.ndarray:
    image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
    height, width = feature.shape[:2]
    if image.size != (width, height):
        raise ValueError(f"a picture of {image.size[1]} x {image.size[0]}")
    return np.asarray(image.convert("RGB"))


def _video(file: Path, shown: np.ndarray, wanted: np.ndarray, fps: float, where: str) -> Video:
    """The frames of an episode: each the one that is nearest to its time, and less than half a step off."""
    after = np.clip(np.searchsorted(shown, wanted), 1, max(len(shown) - 1, 1))
    near = np.where(wanted - shown[after - 1] < shown[after % len(shown)] - wanted, after - 1, after % len(shown))
    off = np.abs(shown[near] - wanted) * fps >= 0.5
    if off.any():
        i = int(np.argmax(off))
        got = f"{int((~off).sum())}, none for frame {i} at second {wanted[i]:g}"
        raise DataError(where, expected=f"a picture for each of {len(wanted)} rows", got=got, fix=_AGAIN)
    return Video(path=file, frames=near.astype(np.int64))


def _pictures(video: Video, shape: tuple[int, ...]) -> np.ndarray:
    """The frames themselves."""
    first = int(video.frames.min())
    frames: np.ndarray = read_clip(video.path, first, int(video.frames.max()) + 1)[video.frames - first]
    if frames.shape[1:] != shape:
        got = f"{frames.shape[1]} x {frames.shape[2]}"
        raise DataError(str(video.path), expected=f"pictures of {shape[0]} x {shape[1]}", got=got, fix=_AGAIN)
    return frames
