"""Writing LeRobotDataset v3.0: Parquet for numbers, H.264 in MP4 for cameras, several episodes in each file."""

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from offbook.data.formats.lerobot_layout import (
    DONE,
    FINAL,
    INDEX,
    INFO,
    OURS,
    SUCCESS,
    Feature,
    column_names,
    features_of,
    sha256_of,
)
from offbook.data.index import Outcome
from offbook.data.store import Episode, EpisodeStore, Schema
from offbook.errors import DataError
from offbook.runs.progress import track

_FILES_IN_A_CHUNK = 1000
_DATA_MB, _VIDEO_MB = 100, 200
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_PICTURES_FOR_STATISTICS = 32
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"

Statistics = dict[str, np.ndarray]


def left_out(schema: Schema) -> list[str]:
    """What other readers of an export do not find; `read` does, in files beside the dataset."""
    return ["the observations after the last actions"] * bool(schema.observations)


def write(store: EpisodeStore, target: str) -> str:
    """Writes a store as a LeRobotDataset v3.0, which appears under its name only when it is whole.

    Args:
        store: the recordings; their schema must say the rate of control.
        target: the new folder.

    Returns:
        The folder.

    Raises:
        DataError: the folder exists, the format cannot hold the recordings, or the disk does not take them.
    """
    folder = Path(target).expanduser().resolve()
    _check(store, folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _Export(store, partial).run()
        partial.replace(folder)
    except OSError as error:
        got, fix = error.strerror or str(error), "see to the disk and its permissions, then export again"
        raise DataError(str(error.filename or folder), expected="to write it", got=got, fix=fix) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(folder)


def _check(store: EpisodeStore, folder: Path) -> None:
    if folder.exists():
        raise DataError(f"lerobot:{folder}", expected="a new name", got="a folder that exists", fix="choose another")
    if not store.schema.rate_hz or not len(store):
        got = "no episodes" if store.schema.rate_hz else "a store whose schema does not say it"
        fix = "record or import with the rate of control, which the times of the frames follow from"
        raise DataError(str(store.path), expected="episodes of a known rate", got=got, fix=fix)
    for spec in store.schema.fields:
        present = store.present(spec.name)
        if not present.all():
            where, got = f"{store.path}, episode {int(np.argmin(present))}", f"no {spec.name}"
            raise DataError(where, expected="all fields", got=got, fix="export a store whose episodes are complete")


class _Export:
    """One export under way: the open files and the rows for `meta/` that have come together so far."""

    def __init__(self, store: EpisodeStore, root: Path) -> None:
        self.store, self.root, self.features = store, root, features_of(store.schema)
        self.rate = Fraction(store.schema.rate_hz or 1).limit_denominator(1001)
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.statistics: dict[str, list[Statistics]] = {}
        self.final: dict[str, list[Any]] = {key: [] for key, feature in self.features.items() if feature.observed}
        self.videos = {
            key: _Video(root, key, feature, self.rate) for key, feature in self.features.items() if feature.camera
        }
        # Where success is unknown the format has no word for it.
        self.success = not np.isnan(store.episodes["success"]).any()

    def run(self) -> None:
        (self.root / "meta").mkdir(parents=True)
        data = _Data(self.root)
        with contextlib.ExitStack() as stack:
            for close in (data.close, *(video.close for video in self.videos.values())):
                stack.callback(close)
            for number in track(range(len(self.store)), "exporting", len(self.store)):
                self._episode(number, self.store.episode(number), data)
        self._meta()

    def _episode(self, number: int, episode: Episode, data: "_Data") -> None:
        length, rows = episode.length, {}
        stats: dict[str, Statistics] = {}
        said: dict[str, Any] = {"episode_index": number, "tasks": [episode.task], "length": length}
        for key, feature in self.features.items():
            values = episode.fields[feature.parts[0].name]
            if feature.camera:
                frames = _padded(values, feature)
                said |= self.videos[key].add(frames[:length])
                stats[key] = _picture_statistics(frames[:length])
                self.final[key].append(_png(frames[length]))
                continue
            packed = feature.pack(episode.fields)
            rows[key] = packed[:length]
            if feature.observed:
                self.final[key].append(packed[length].reshape(-1))
        rows |= self._numbers(number, episode)
        stats |= {key: _statistics(values.reshape(length, -1)) for key, values in rows.items()}
        said |= data.add(pa.table({key: _column(values) for key, values in rows.items()}))
        said |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for key, statistics in stats.items():
            self.statistics.setdefault(key, []).append(statistics)
            said |= {f"stats/{key}/{name}": value.tolist() for name, value in statistics.items()}
        self.rows.append(said)

    def _numbers(self, number: int, episode: Episode) -> dict[str, np.ndarray]:
        """The columns that number the rows, and the end of the episode, which the format marks in its last row."""
        start, frames = self.rows[-1]["dataset_to_index"] if self.rows else 0, np.arange(episode.length)
        last = frames == episode.length - 1
        task = self.tasks.setdefault(episode.task, len(self.tasks))
        values = {
            DONE: last,
            SUCCESS: last & bool(episode.success),
            "timestamp": frames / float(self.rate),
            "frame_index": frames,
            "episode_index": np.full_like(frames, number),
            "index": frames + start,
            "task_index": np.full_like(frames, task),
        }
        if not self.success:
            del values[SUCCESS]
        return {key: column.astype(INDEX.get(key, "bool"))[:, None] for key, column in values.items()}

    def _meta(self) -> None:
        meta = self.root / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.rows), self.root / _EPISODES_PATH)
        pq.write_table(_task_table(list(self.tasks)), meta / "tasks.parquet")
        stats = {key: _together(parts) for key, parts in self.statistics.items()}
        plain = {key: {name: value.tolist() for name, value in parts.items()} for key, parts in stats.items()}
        _write_json(meta / "stats.json", plain)
        _write_json(self.root / INFO, self._info())
        final = {
            key: pa.array(rows, pa.binary()) if self.features[key].camera else _column(np.stack(rows))
            for key, rows in self.final.items()
        }
        pq.write_table(pa.table(final or {"episode": np.arange(len(self.rows))}), self.root / FINAL)
        names = [field.name for field in fields(Outcome)]
        outcomes = [{name: getattr(self.store.episode(i), name) for name in names} for i in range(len(self.store))]
        files = sorted((self.root / "data").glob("*/*.parquet"))
        sums = sha256_of([*files, self.root / FINAL])
        _write_json(self.root / OURS, {"schema": self.store.schema.to_json(), "outcomes": outcomes, "sha256": sums})

    def _info(self) -> dict[str, Any]:
        kept = self.store.schema.extra.get("import", {})
        kept = kept if kept.get("format") == "lerobot" else {}
        features = {key: self._said(feature, kept) for key, feature in self.features.items()}
        plain = {DONE: "bool"} | ({SUCCESS: "bool"} if self.success else {}) | INDEX
        features |= {key: {"dtype": kind, "shape": [1], "names": None} for key, kind in plain.items()}
        return {
            "codebase_version": "v3.0",
            "robot_type": kept.get("robot_type"),
            "total_episodes": len(self.rows),
            "total_frames": self.store.steps,
            "total_tasks": len(self.tasks),
            "chunks_size": _FILES_IN_A_CHUNK,
            "data_files_size_in_mb": _DATA_MB,
            "video_files_size_in_mb": _VIDEO_MB,
            "fps": int(self.rate) if self.rate.denominator == 1 else float(self.rate),
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH if self.videos else None,
            "features": features,
        }

    def _said(self, feature: Feature, kept: Mapping[str, Any]) -> dict[str, Any]:
        names = column_names(feature)
        if not feature.camera:
            names = kept.get("names", {}).get(feature.key, names)
            return {"dtype": feature.kind, "shape": list(feature.shape), "names": names}
        about = {
            "video.height": feature.shape[0],
            "video.width": feature.shape[1],
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": float(self.rate),
            "video.channels": 3,
            "has_audio": False,
        }
        return {"dtype": "video", "shape": list(feature.shape), "names": names, "info": about}


class _Data:
    """The Parquet files of the rows, one row group for each episode."""

    def __init__(self, root: Path) -> None:
        self.root, self.file, self.number, self.index = root, root, -1, 0
        self.writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> dict[str, Any]:
        """Writes an episode; returns where it is."""
        if self.writer is not None and self.file.stat().st_size >= _DATA_MB * 2**20:
            self.close()
        if self.writer is None:
            self.number += 1
            chunk, number = divmod(self.number, _FILES_IN_A_CHUNK)
            self.file = self.root / _DATA_PATH.format(chunk_index=chunk, file_index=number)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.writer = pq.ParquetWriter(self.file, table.schema)
        self.writer.write_table(table)
        chunk, number = divmod(self.number, _FILES_IN_A_CHUNK)
        start, self.index = self.index, self.index + len(table)
        where = {"data/chunk_index": chunk, "data/file_index": number}
        return where | {"dataset_from_index": start, "dataset_to_index": self.index}

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class _Video:
    """The MP4 files of a camera. Every second picture is whole, for readers that jump to any frame."""

    def __init__(self, root: Path, key: str, feature: Feature, rate: Fraction) -> None:
        self.root, self.file, self.key, self.feature, self.rate = root, root, key, feature, rate
        self.number, self.count = -1, 0
        self.container: Any = None

    def add(self, frames: np.ndarray) -> dict[str, Any]:
        """Encodes an episode; returns where it is."""
        if self.container is not None and self.file.stat().st_size >= _VIDEO_MB * 2**20:
            self.close()
        chunk, number = divmod(self.number + (self.container is None), _FILES_IN_A_CHUNK)
        if self.container is None:
            self.number += 1
            self._open(self.root / _VIDEO_PATH.format(video_key=self.key, chunk_index=chunk, file_index=number))
        start = self.count
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = self.count, 1 / self.rate
            if self.count == start:
                frame.pict_type = av.video.frame.PictureType.I
            self.container.mux(self.stream.encode(frame))
            self.count += 1
        times = {"from_timestamp": start / float(self.rate), "to_timestamp": self.count / float(self.rate)}
        where = {"chunk_index": chunk, "file_index": number} | times
        return {f"videos/{self.key}/{name}": value for name, value in where.items()}

    def _open(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.count = file, 0
        self.container = av.open(str(file), "w", "mp4", {"movflags": "+faststart"})
        self.stream = self.container.add_stream("libx264", rate=self.rate)
        self.stream.height, self.stream.width = self.feature.shape[:2]
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.time_base = 1 / self.rate
        # One thread: the same frames give the same file on any machine.
        self.stream.codec_context.thread_count = 1
        self.stream.options = {"crf": "18", "preset": "fast", "g": "2"}

    def close(self) -> None:
        if self.container is not None:
            self.container.mux(self.stream.encode())
            self.container.close()
            self.container = None


def _padded(values: np.ndarray, feature: Feature) -> np.ndarray:
    height, width = (even - size for even, size in zip(feature.shape[:2], values.shape[1:3], strict=True))
    return np.pad(values, ((0, 0), (0, height), (0, width), (0, 0)), mode="edge")


def _png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def _column(values: np.ndarray) -> pa.Array:
    """Values [n, ...] as a column: plain numbers where there is one a row, lists of fixed length, lists of lists."""
    array = pa.array(values.reshape(-1))
    if values.shape[1:] in ((), (1,)):
        return array
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(array, values.shape[1])
    for size in reversed(values.shape[1:]):
        array = pa.ListArray.from_arrays(np.arange(0, len(array) + 1, size, dtype=np.int32), array)
    return array


def _statistics(values: np.ndarray, axis: int | tuple[int, ...] = 0) -> Statistics:
    numbers = values.astype(np.float64)
    quantiles = np.quantile(numbers, _QUANTILES, axis=axis)
    return {
        "min": numbers.min(axis),
        "max": numbers.max(axis),
        "mean": numbers.mean(axis),
        "std": numbers.std(axis),
        "count": np.array([len(values)]),
        **{f"q{round(100 * q):02d}": values for q, values in zip(_QUANTILES, quantiles, strict=True)},
    }


def _picture_statistics(frames: np.ndarray) -> Statistics:
    """For each colour, from 0 to 1, over frames spread evenly; of the shape (3, 1, 1) that the format wants."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, _PICTURES_FOR_STATISTICS).round().astype(int))
    step = max(1, max(frames.shape[1:3]) // 150)
    found = _statistics(frames[chosen, ::step, ::step] / 255, (0, 1, 2))
    return {name: value if name == "count" else value.reshape(3, 1, 1) for name, value in found.items()}


def _together(parts: list[Statistics]) -> Statistics:
    """Statistics of all episodes; quantiles are the episodes' means, as the format's own tools merge them."""
    weight = np.concatenate([part["count"] for part in parts]) / sum(int(part["count"][0]) for part in parts)

    def mean(name: str) -> np.ndarray:
        return np.tensordot(weight, np.stack([part[name] for part in parts]), 1)

    centre = mean("mean")
    spread = np.stack([part["std"] ** 2 + (part["mean"] - centre) ** 2 for part in parts])
    exact = {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": centre,
        "std": np.sqrt(np.tensordot(weight, spread, 1)),
        "count": np.array([sum(int(part["count"][0]) for part in parts)]),
    }
    return exact | {name: mean(name) for name in parts[0] if name not in exact}


def _task_table(tasks: list[str]) -> pa.Table:
    """Numbers by task; the tasks are the index of the data frame that pandas makes of it."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
