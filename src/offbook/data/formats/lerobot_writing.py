"""Writing LeRobotDataset v3.0: Parquet for numbers, H.264 in MP4 for cameras, several episodes in each file."""

import contextlib
import json
import shutil
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offbook.data.formats import appearing, outcomes
from offbook.data.formats.lerobot_layout import DONE, FINAL, INDEX, INFO, OURS, SUCCESS, Feature, features_of
from offbook.data.layout import file_sha256
from offbook.data.store import EpisodeStore, Schema
from offbook.data.video import Video, frame_times
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
    """What other readers of an export do not find; `read` does, beside the dataset and at the end of videos."""
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
    with appearing(folder) as partial:
        _Export(store, partial).run()
    return str(folder)


def _check(store: EpisodeStore, folder: Path) -> None:
    if folder.exists():
        raise DataError(f"lerobot:{folder}", expected="a new name", got="a folder that exists", fix="choose another")
    if not store.schema.rate_hz or not len(store):
        got = "no episodes" if store.schema.rate_hz else "a store whose schema does not say it"
        fix = "record or import with the rate of control, which the times of the frames follow from"
        raise DataError(str(store.path), expected="episodes of a known rate", got=got, fix=fix)


class _Export:
    """One export under way: the open files and the rows for `meta/` that have come together so far."""

    def __init__(self, store: EpisodeStore, root: Path) -> None:
        self.store, self.root, self.features = store, root, features_of(store.schema)
        self.rate = Fraction(store.schema.rate_hz or 1).limit_denominator(1001)
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.statistics: dict[str, list[Statistics]] = {}
        self.outcomes = outcomes(store)
        self.final: dict[str, list[np.ndarray]] = {
            key: [] for key, feature in self.features.items() if feature.observed and not feature.camera
        }
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
                self._episode(number, data)
        self._meta()

    def _episode(self, number: int, data: "_Data") -> None:
        columns, outcome = self.store.episodes, self.outcomes[number]
        start, length = int(columns["start"][number]), int(columns["length"][number])
        rows: dict[str, np.ndarray] = {}
        stats: dict[str, Statistics] = {}
        said: dict[str, Any] = {"episode_index": number, "tasks": [outcome["task"]], "length": length}
        for key, feature in self.features.items():
            if feature.camera:
                name = feature.parts[0].name
                said |= self.videos[key].add(self.store, number)
                chosen = start + np.unique(np.linspace(0, length - 1, _PICTURES_FOR_STATISTICS).round().astype(int))
                stats[key] = _picture_statistics(self.store.field(name)[chosen])
                continue
            packed = feature.pack({part.name: _rows(self.store, part.name, number) for part in feature.parts})
            rows[key] = packed[:length]
            if feature.observed:
                self.final[key].append(packed[length])
        rows |= self._numbers(number, length)
        stats |= {key: _statistics(values.reshape(length, -1)) for key, values in rows.items()}
        said |= data.add(pa.table({key: _column(values) for key, values in rows.items()}))
        said |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for key, statistics in stats.items():
            self.statistics.setdefault(key, []).append(statistics)
            said |= {f"stats/{key}/{name}": value.tolist() for name, value in statistics.items()}
        self.rows.append(said)

    def _numbers(self, number: int, length: int) -> dict[str, np.ndarray]:
        """The columns that number the rows, and the end of the episode, which the format marks in its last row."""
        start, frames = self.rows[-1]["dataset_to_index"] if self.rows else 0, np.arange(length)
        last, outcome = frames == length - 1, self.outcomes[number]
        task = self.tasks.setdefault(outcome["task"], len(self.tasks))
        values = {
            DONE: last,
            SUCCESS: last & bool(outcome["success"]),
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
        final = {key: _column(np.stack(rows)) for key, rows in self.final.items()}
        pq.write_table(pa.table(final or {"episode": np.arange(len(self.rows))}), self.root / FINAL)
        files = sorted((self.root / "data").glob("*/*.parquet"))
        sums = [file_sha256(file).hex() for file in (*files, self.root / FINAL)]
        ours = {"schema": self.store.schema.to_json(), "outcomes": self.outcomes, "sha256": sums}
        _write_json(self.root / OURS, ours)

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
        names = _names(feature)
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
    """The MP4 files of a camera, in which an episode of T steps has T + 1 frames.

    What is encoded has every second frame as a key frame, for readers that jump to any; files of a store that keeps the
    camera as video are copied.
    """

    def __init__(self, root: Path, key: str, feature: Feature, rate: Fraction) -> None:
        self.root, self.file, self.key, self.feature, self.rate = root, root, key, feature, rate
        self.number, self.count, self.encoded = -1, 0, 0
        self.copied: dict[Path, int] = {}
        self.container: Any = None

    def add(self, store: EpisodeStore, number: int) -> dict[str, Any]:
        """Writes an episode; returns where it is."""
        spec, length = self.feature.parts[0], int(store.episodes["length"][number])
        if spec.video and (found := self._copy(store.video(spec.name, number))) is not None:
            file, start = found
        else:
            file, start = self._encode(_padded(_rows(store, spec.name, number), self.feature))
        chunk, index = divmod(file, _FILES_IN_A_CHUNK)
        times = {"from_timestamp": start, "to_timestamp": start + length / float(self.rate)}
        where = {"chunk_index": chunk, "file_index": index} | times
        return {f"videos/{self.key}/{name}": value for name, value in where.items()}

    def _next(self) -> tuple[int, Path]:
        self.number += 1
        chunk, index = divmod(self.number, _FILES_IN_A_CHUNK)
        file = self.root / _VIDEO_PATH.format(video_key=self.key, chunk_index=chunk, file_index=index)
        file.parent.mkdir(parents=True, exist_ok=True)
        return self.number, file

    def _copy(self, video: Video) -> tuple[int, float] | None:
        """Number of the file and first second, unless its frames do not follow one another at the right times."""
        times = frame_times(video.path)[video.frames]
        if np.any(np.abs((times - times[0]) * float(self.rate) - np.arange(len(times))) > 1e-3):
            return None
        if video.path not in self.copied:
            self.copied[video.path], file = self._next()
            shutil.copyfile(video.path, file)
        return self.copied[video.path], float(times[0])

    def _encode(self, frames: np.ndarray) -> tuple[int, float]:
        if self.container is not None and self.file.stat().st_size >= _VIDEO_MB * 2**20:
            self.close()
        if self.container is None:
            self._open()
        start = self.count
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = self.count, 1 / self.rate
            if self.count == start:
                frame.pict_type = av.video.frame.PictureType.I
            self.container.mux(self.stream.encode(frame))
            self.count += 1
        return self.encoded, start / float(self.rate)

    def _open(self) -> None:
        self.encoded, self.file = self._next()
        self.count = 0
        self.container = av.open(str(self.file), "w", "mp4", {"movflags": "+faststart"})
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


def _names(feature: Feature) -> list[str] | None:
    """What each number of a feature is, where that has a name."""
    if feature.camera:
        return ["height", "width", "channels"]
    if len(feature.shape) > 1:
        return None
    parts = ((part, range(part.size) if part.shape else [None]) for part in feature.parts)
    return [part.name if i is None else f"{part.name}.{i}" for part, numbers in parts for i in numbers]


def _rows(store: EpisodeStore, name: str, number: int) -> np.ndarray:
    """A field's values in an episode, T + 1 of an observation."""
    start, length = (int(store.episodes[column][number]) for column in ("start", "length"))
    values: np.ndarray = store.field(name)[start : start + length]
    if store.schema[name].role == "observation":
        values = np.concatenate([values, store.final(name)[number : number + 1]])
    return values


def _padded(values: np.ndarray, feature: Feature) -> np.ndarray:
    height, width = (even - size for even, size in zip(feature.shape[:2], values.shape[1:3], strict=True))
    return np.pad(values, ((0, 0), (0, height), (0, width), (0, 0)), mode="edge")


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
    """For each colour, from 0 to 1; of the shape (3, 1, 1) that the format wants."""
    step = max(1, max(frames.shape[1:3]) // 150)
    found = _statistics(frames[:, ::step, ::step] / 255, (0, 1, 2))
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
