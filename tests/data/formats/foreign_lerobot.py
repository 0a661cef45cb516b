"""LeRobot datasets as other people's recorders write them: folders of version 3.0 and 2.1."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from foreign import padded

from offbook.data.clips import write_clip

FPS, LENGTHS, TASKS = 10, (6, 9, 1, 7), ("reach", "lift", "reach", "lift")
TOP = "observation.images.top"
VIDEO_FILE, ROWS_FILE = f"videos/{TOP}/chunk-000/file-000.mp4", "data/chunk-000/file-000.parquet"


def scene(number, length, height=32, width=48):
    """Smooth moving pictures, which encode well, each unlike its neighbours."""
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [np.stack([x * 4 + 9 * t, y * 5, 0 * x + 40 * number + 20 * t], -1) % 256 for t in range(length)]
    ).astype(np.uint8)


def psnr(a, b):
    return 10 * math.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def rows_of(number):
    """What a recorder would note in an episode: T rows, nothing after the last action."""
    chance, length = np.random.default_rng(number), LENGTHS[number]
    frames = np.arange(length)
    return {
        "observation.state": chance.normal(size=(length, 3)).astype(np.float32),
        "action": chance.normal(size=(length, 2)).astype(np.float32),
        "next.reward": (frames == length - 1).astype(np.float32),
        "next.done": frames == length - 1,
        "next.success": (frames == length - 1) & (number == 1),
        "timestamp": (frames / FPS).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(length, number),
        "index": frames + sum(LENGTHS[:number]),
        "task_index": np.full(length, ("reach", "lift").index(TASKS[number])),
    }


def table_of(rows):
    return pa.table({key: pa.array(column.tolist()) for key, column in rows.items()})


def info_of(version, **more):
    number = {"dtype": "int64", "shape": [1], "names": None}
    return {
        "codebase_version": version,
        "robot_type": "so100",
        "fps": FPS,
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "chunks_size": 1000,
        "features": {
            "observation.state": {"dtype": "float32", "shape": [3], "names": ["pan", "lift", "grip"], "units": "deg"},
            "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["pan", "lift"]}},
            TOP: {"dtype": "video", "shape": [3, 32, 48], "names": ["channels", "height", "width"], "info": {}},
            "depth": {"dtype": "video", "shape": [32, 48, 3], "names": None, "info": {"is_depth_map": True}},
            "next.reward": {"dtype": "float32", "shape": [1], "names": None},
            "next.done": {"dtype": "bool", "shape": [1], "names": None},
            "next.success": {"dtype": "bool", "shape": [1], "names": None},
            "said": {"dtype": "string", "shape": [1], "names": None},
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), number),
        },
        **more,
    }


def put(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, file)
    else:
        file.write_text(content)


def v3(folder):
    """Two episodes in a file of rows; three in the first video, the fourth in another. Rows not in order."""
    path = "{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}"
    info = info_of("v3.0", data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet")
    put(folder / "meta/info.json", json.dumps({**info, "video_path": f"videos/{path}.mp4"}))
    tables = [table_of(rows_of(i)) for i in range(4)]
    put(folder / "data/chunk-000/file-000.parquet", pa.concat_tables(tables[:2]))
    put(folder / "data/chunk-000/file-001.parquet", pa.concat_tables(tables[2:]).take(list(range(7, -1, -1))))
    write_clip(
        folder / f"videos/{TOP}/chunk-000/file-000.mp4", np.concatenate([scene(i, LENGTHS[i]) for i in range(3)]), FPS
    )
    write_clip(folder / f"videos/{TOP}/chunk-000/file-001.mp4", scene(3, LENGTHS[3]), FPS)
    listed = []
    for i, length in enumerate(LENGTHS):
        row = {
            "episode_index": i,
            "tasks": [TASKS[i]],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": i // 2,
        }
        for key in (TOP, "depth"):
            start = sum(LENGTHS[:i]) / FPS if i < 3 else 0.0
            named = {
                "chunk_index": 0,
                "file_index": i // 3,
                "from_timestamp": start,
                "to_timestamp": start + length / FPS,
            }
            row |= {f"videos/{key}/{name}": value for name, value in named.items()}
        listed.append(row)
    put(folder / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(listed))
    put(folder / "README.md", "---\nlicense: cc-by-4.0\n---\n")
    return folder


def v21(folder):
    """A file of rows and a video for each episode."""
    name = "chunk-{episode_chunk:03d}/%sepisode_{episode_index:06d}"
    paths = {"data_path": f"data/{name % ''}.parquet", "video_path": f"videos/{name % '{video_key}/'}.mp4"}
    put(folder / "meta/info.json", json.dumps(info_of("v2.1", **paths)))
    listed = [{"episode_index": i, "tasks": [TASKS[i]], "length": length} for i, length in enumerate(LENGTHS)]
    put(folder / "meta/episodes.jsonl", "".join(json.dumps(row) + "\n" for row in listed))
    for i, length in enumerate(LENGTHS):
        put(folder / f"data/chunk-000/episode_{i:06d}.parquet", table_of(rows_of(i)))
        write_clip(folder / f"videos/chunk-000/{TOP}/episode_{i:06d}.mp4", scene(i, length), FPS)
    put(folder / "README.md", "---\nlicense: cc-by-4.0\n---\n")
    return folder


def recorded(folder, episodes, version, fps=20):
    """Episodes as `foreign.walks` makes them, with a picture at each step: v3.0 in one file, v2.1 in one for each."""
    number, lengths = {"dtype": "int64", "shape": [1], "names": None}, [len(e["observation"]) for e in episodes]
    features = {
        "observation.state": {"dtype": "float32", "shape": [episodes[0]["observation"].shape[1]], "names": None},
        "action": {"dtype": "float32", "shape": [episodes[0]["action"].shape[1]], "names": None},
        TOP: {"dtype": "video", "shape": [32, 48, 3], "names": ["height", "width", "channels"], "info": {}},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), number),
    }
    names = {"v3.0": ("chunk-{chunk_index:03d}", "file-{file_index:03d}")}
    chunk, file = names.get(version, ("chunk-{episode_chunk:03d}", "episode_{episode_index:06d}"))
    paths = {"data_path": f"data/{chunk}/{file}.parquet", "video_path": f"videos/{{video_key}}/{chunk}/{file}.mp4"}
    about = {"codebase_version": version, "robot_type": None, "fps": fps, "chunks_size": 1000, "features": features}
    put(folder / "meta/info.json", json.dumps({**about, **paths, "total_episodes": len(episodes)}))
    tables, clips, listed = [], [], []
    for i, (episode, length) in enumerate(zip(episodes, lengths, strict=True)):
        frames = np.arange(length)
        columns = {
            "observation.state": episode["observation"],
            "action": padded(episode["action"]),
            "next.reward": padded(episode["reward"]),
            "timestamp": (frames / fps).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(length, i),
            "index": frames + sum(lengths[:i]),
            "task_index": np.zeros(length, int),
        }
        tables.append(table_of(columns))
        clips.append(scene(i, length))
        listed.append({"episode_index": i, "tasks": ["swing up"], "length": length})
    if version == "v3.0":
        places = {"data/chunk_index": 0, "data/file_index": 0} | dict.fromkeys(
            (f"videos/{TOP}/chunk_index", f"videos/{TOP}/file_index"), 0
        )
        starts = np.cumsum([0, *lengths]) / fps
        rows = [row | places | {f"videos/{TOP}/from_timestamp": starts[i]} for i, row in enumerate(listed)]
        put(folder / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(rows))
        put(folder / ROWS_FILE, pa.concat_tables(tables))
        write_clip(folder / VIDEO_FILE, np.concatenate(clips), fps)
        return
    put(folder / "meta/episodes.jsonl", "".join(json.dumps(row) + "\n" for row in listed))
    for i, table in enumerate(tables):
        put(folder / f"data/chunk-000/episode_{i:06d}.parquet", table)
        write_clip(folder / f"videos/{TOP}/chunk-000/episode_{i:06d}.mp4", clips[i], fps)
