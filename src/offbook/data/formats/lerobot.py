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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from offbook.data.clips import read_clip
from offbook.data.formats import Recordings
from offbook.data.formats.lerobot_layout import DONE, FINAL, INDEX, INFO, OURS, REWARD, SUCCESS, Feature, features_of
from offbook.data.formats.lerobot_writing import left_out, write
from offbook.data.formats.limits import AGAIN, check_growth, explained, size_of
from offbook.data.formats.transitions import LAST_DROPPED
from offbook.data.index import Outcome
from offbook.data.layout import file_sha256
from offbook.data.store import FieldSpec, Role, Schema
from offbook.data.video import Video, frame_times
from offbook.errors import DataError

__all__ = ["left_out", "read", "write"]

_LISTS = (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What the dataset says of an episode, before its rows are read; videos by feature: file and first second."""

    number: int
    length: int
    task: str
    data: Path
    videos: dict[str, tuple[Path, float]]


class _Ours(NamedTuple):
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
        schema, features = _schema(folder, info, short)
    else:
        schema, features = ours.schema, features_of(ours.schema)
    if not entries:
        raise DataError(f"lerobot:{folder}", expected="an episode of two frames or more", got="none", fix=AGAIN)
    episodes = _episodes(entries, features, info, ours)
    return Recordings(schema=schema, episodes=episodes, total=len(entries), stored=size_of(folder))


def _info(folder: Path) -> dict[str, Any]:
    file = folder / INFO
    if not file.is_file():
        got = f"no {INFO} in it" if folder.is_dir() else "no such folder"
        fix = "give the folder that holds meta/ and data/"
        raise DataError(f"lerobot:{folder}", expected="a LeRobot dataset", got=got, fix=fix)
    with explained(file, "the description of a LeRobot dataset"):
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
    with explained(folder / "meta", "a list of the episodes"):
        if "3" in str(info["codebase_version"]).partition(".")[0]:
            rows = _episodes_table(folder, videos)
        else:
            lines = (folder / "meta" / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
        entries = [_entry(folder, info, row, videos) for row in rows]
        total = int(info.get("total_episodes", len(entries)))
    entries.sort(key=lambda entry: entry.number)
    if len(entries) != total or [entry.number for entry in entries] != list(range(total)):
        got = f"{len(entries)} in the list of episodes"
        raise DataError(str(folder / "meta"), expected=f"episodes 0 to {total - 1}", got=got, fix=AGAIN)
    return entries


def _episodes_table(folder: Path, videos: list[str]) -> list[dict[str, Any]]:
    wanted = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
    for key in videos:
        wanted += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    files = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise FileNotFoundError
    return [row for file in files for row in _table(file, wanted).to_pylist()]


def _table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a Parquet file, which says itself how many values it has; all without `columns`."""
    with explained(file, "a Parquet file"):
        about = pq.read_metadata(file)
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
        check_growth(8 * values, file.stat().st_size, file)
        names = about.schema.to_arrow_schema().names
        for key in columns or ():
            if key not in names:
                raise DataError(str(file), expected=f"the column {key!r}", got="none", fix=AGAIN)
        return pq.read_table(file, columns=columns)


def _entry(folder: Path, info: Mapping[str, Any], row: Mapping[str, Any], videos: list[str]) -> _Entry:
    """An episode as a row of the table of version 3 or a line of the list of version 2 has it."""
    number, newer = int(row["episode_index"]), "data/file_index" in row

    def file(template: str, part: str, **more: str) -> Path:
        numbers = {"episode_index": number}
        if newer:
            numbers = {name: row[f"{part}/{name}"] for name in ("chunk_index", "file_index")}
        else:
            numbers["episode_chunk"] = number // int(info["chunks_size"])
        return folder / _place(info[template], str(folder / INFO), **numbers, **more)

    return _Entry(
        number=number,
        length=int(row["length"]),
        task="; ".join(map(str, row["tasks"] or [])),
        data=file("data_path", "data"),
        videos={
            key: (file("video_path", f"videos/{key}", video_key=key), float(row.get(f"videos/{key}/from_timestamp", 0)))
            for key in videos
        },
    )


def _place(template: Any, where: str, **numbers: Any) -> PurePosixPath:
    """A path from a dataset's own template, which must not lead out of the dataset.

    Raises:
        DataError: it would, or is no such template.
    """
    sound = isinstance(template, str) and re.fullmatch(r"([^{}\\\0]|\{\w+(:0?\d{1,2}d)?\})+", template)
    try:
        path = PurePosixPath(template.format(**numbers)) if sound else PurePosixPath("/")
    except (KeyError, ValueError):
        path = PurePosixPath("/")
    if path.is_absolute() or ".." in path.parts:
        expected = f"a path within the dataset, of {', '.join(numbers)}"
        raise DataError(where, expected=expected, got=repr(template), fix="correct the template")
    return path


def _ours(folder: Path, entries: list[_Entry]) -> _Ours | None:
    """What an export of ours kept, unless someone has changed the dataset since."""
    if not (folder / OURS).is_file():
        return None
    with explained(folder / OURS, "what an export of offbook writes"):
        record = json.loads((folder / OURS).read_bytes())
        files = sorted({entry.data for entry in entries})
        if [file_sha256(file).hex() for file in (*files, folder / FINAL)] != record["sha256"]:
            return None
        schema = Schema.from_json(record["schema"], str(folder / OURS))
        return _Ours(schema, record["outcomes"], _table(folder / FINAL))


def _schema(folder: Path, info: Mapping[str, Any], short: list[int]) -> tuple[Schema, dict[str, Feature]]:
    """The schema of a foreign dataset, and its features, each of which is one field."""
    wanted = {key: said for key, said in info["features"].items() if key not in (*INDEX, DONE, SUCCESS)}
    made = {key: _foreign(key, said) for key, said in wanted.items()}
    left = {key: why for key, why in made.items() if isinstance(why, str)}
    features = {key: feature for key, feature in made.items() if isinstance(feature, Feature)}
    specs = tuple(feature.parts[0] for feature in features.values())
    stated = [LAST_DROPPED, "that an episode ends counts as truncation; the format does not tell why it does"]
    stated += [f"the feature {key!r} ({why}) is left out" for key, why in left.items()]
    stated += [f"episodes of one frame are left out: {', '.join(map(str, short))}"] * bool(short)
    names = {key: wanted[key].get("names") for key in features}
    extra = {"robot_type": info.get("robot_type"), "names": names}
    extra |= {"format": "lerobot", "stated": stated, "bounds": "recorded"}
    return Schema(
        specs,
        rate_hz=float(info["fps"]),
        source=f"lerobot:{folder.resolve().name}",
        licence=_licence(folder),
        extra={"import": extra},
    ), features


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
    if not re.fullmatch(r"bool|u?int(8|16|32|64)?|float(16|32|64)?", kind):
        return str(kind)
    role: Role = "observation" if key.startswith("observation") else "action" if key.startswith("action") else "other"
    if key == REWARD and math.prod(shape) == 1 and kind != "bool":
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
    entries: list[_Entry], features: Mapping[str, Feature], info: Mapping[str, Any], ours: _Ours | None
) -> Iterator[tuple[dict[str, np.ndarray | Video | None], Outcome]]:
    opened: tuple[Path, pa.Table] | None = None
    times, fps = cache(frame_times), float(info["fps"])
    columns = [key for key, feature in features.items() if feature.kind != "video"]
    columns += ["episode_index", "frame_index", "timestamp", *[SUCCESS] * (SUCCESS in info["features"])]
    for entry in entries:
        where = f"{entry.data}, episode {entry.number}"
        if opened is None or opened[0] != entry.data:
            opened = entry.data, _table(entry.data, columns)
        table = _rows(opened[1], entry, fps, where)
        fields: dict[str, np.ndarray | Video | None] = {}
        for key, feature in features.items():
            if feature.kind == "video":
                file, start = entry.videos[key]
                count = entry.length + (ours is not None)
                wanted, spec = start + np.arange(count) / fps, feature.parts[0]
                video = _video(file, times(file), wanted, fps, f"{file}, episode {entry.number}")
                fields[spec.name] = video if spec.video else _pictures(video, feature)
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


def _rows(table: pa.Table, entry: _Entry, fps: float, where: str) -> pa.Table:
    """The rows of one episode in order, after their numbers and times were checked."""
    with explained(where, "rows that are numbered"):
        rows = np.flatnonzero(_numbers(table["episode_index"]) == entry.number)
        table = table.take(rows)
        order = np.argsort(_numbers(table["frame_index"]), kind="stable")
        table = table.take(order)
        frames, times = _numbers(table["frame_index"]), _numbers(table["timestamp"]).astype(np.float64)
    if len(rows) != entry.length or not np.array_equal(frames, np.arange(entry.length)):
        expected, got = f"{entry.length} frames, numbered from 0", f"{len(rows)} rows"
        raise DataError(where, expected=expected, got=got, fix=AGAIN)
    off = np.abs((times - times[0]) * fps - frames)
    if not np.all(off < 0.5):
        i = int(np.argmin(off < 0.5))
        got = f"frame {i} at second {times[i]:g}"
        raise DataError(where, expected=f"{fps:g} frames a second", got=got, fix="correct fps, or record it again")
    return table


def _decoded(table: pa.Table, feature: Feature, where: str) -> np.ndarray:
    """The values of a column of numbers or of encoded pictures."""
    column = table[feature.key]
    with explained(f"{where}, feature {feature.key!r}", f"values of shape {feature.shape}"):
        if feature.camera:
            contents = column.to_pylist()
            pictures = [_picture(value["bytes"] if isinstance(value, dict) else value, feature) for value in contents]
            return np.stack(pictures)
        values = column.combine_chunks()
        while isinstance(values, _LISTS):
            sizes = np.asarray(values.value_lengths())
            if values.null_count or np.any(sizes != sizes[0]):
                raise ValueError("rows of different lengths")
            values = values.flatten()
        if values.null_count:
            raise ValueError("a missing value")
        return _numbers(values).astype(feature.kind, copy=False).reshape(len(table), *feature.shape)


def _numbers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The numbers of a column, of which each row has one, be it in a list of its own."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    while isinstance(values, _LISTS):
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
        raise DataError(where, expected=f"a picture for each of {len(wanted)} rows", got=got, fix=AGAIN)
    return Video(path=file, frames=near.astype(np.int64))


def _pictures(video: Video, feature: Feature) -> np.ndarray:
    """The frames themselves, without the edge that made an odd size even."""
    first, shape = int(video.frames.min()), feature.parts[0].shape
    frames: np.ndarray = read_clip(video.path, first, int(video.frames.max()) + 1)[video.frames - first]
    if frames.shape[1:] != feature.shape:
        expected, got = (f"{height} x {width}" for height, width, _ in (feature.shape, frames.shape[1:]))
        raise DataError(str(video.path), expected=f"pictures of {expected}", got=got, fix=AGAIN)
    return frames[:, : shape[0], : shape[1]]
