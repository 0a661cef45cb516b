"""LeRobot datasets: v3.0 and v2.1 folders come in, stores go out and back equal, and damage is named."""

import io
import json
import math
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made import SCHEMA, values
from PIL import Image, UnidentifiedImageError

from offbook.data.clips import probe, read_clip, write_clip
from offbook.data.formats import export_dataset, import_dataset, lerobot
from offbook.data.store import EpisodeStore, FieldSpec, Schema
from offbook.data.video import Video
from offbook.errors import DataError

FPS, LENGTHS, TASKS = 10, (6, 9, 1, 7), ("reach", "lift", "reach", "lift")
TOP = "observation.images.top"


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


@pytest.mark.parametrize("make", [v3, v21])
def test_a_foreign_dataset_comes_in_without_anything_invented(tmp_path, make):
    store = import_dataset(f"lerobot:{make(tmp_path / 'arm')}", tmp_path / "store")
    assert [(f.name, f.dtype, f.shape, f.role, f.units) for f in store.schema.fields] == [
        ("observation.state", "float32", (3,), "observation", "deg"),
        ("action", "float32", (2,), "action", ""),
        (TOP, "uint8", (32, 48, 3), "observation", ""),
        ("next.reward", "float32", (), "reward", ""),
    ]
    assert (store.schema.rate_hz, store.schema.licence, store.schema.source) == (10, "cc-by-4.0", "lerobot:arm")
    actions = np.concatenate([rows_of(i)["action"] for i in (0, 1, 3)])
    assert store.schema.action_spec().high == tuple(actions.max(0).tolist())
    said = store.schema.extra["import"]
    assert (said["format"], said["bounds"], said["robot_type"]) == ("lerobot", "recorded", "so100")
    stated = " / ".join(said["stated"])
    for words in (
        "the last observation is the final one",
        "'depth' (depth)",
        "'said' (string)",
        "one frame are left out: 2",
    ):
        assert words in stated
    assert said["names"]["action"] == {"motors": ["pan", "lift"]}
    assert store.episodes["length"].tolist() == [5, 8, 6]
    assert store.episodes["task"].tolist() == ["reach", "lift", "lift"]
    assert store.episodes["success"].tolist() == [0, 1, 0]
    assert store.episodes["truncated"].all()
    assert not store.episodes["terminated"].any()
    for i, number in enumerate((0, 1, 3)):
        fields, rows = store.episode(i).fields, rows_of(number)
        np.testing.assert_array_equal(fields["observation.state"], rows["observation.state"])
        np.testing.assert_array_equal(fields["action"], rows["action"][:-1])
        np.testing.assert_array_equal(fields["next.reward"], rows["next.reward"][:-1])
        assert min(map(psnr, fields[TOP], scene(number, LENGTHS[number]))) > 34
    back = tmp_path / "again"
    export_dataset(store, f"lerobot:{back}")
    info = json.loads((back / "meta/info.json").read_text())
    assert info["features"]["action"]["names"] == {"motors": ["pan", "lift"]}
    assert info["robot_type"] == "so100"


def smooth(number, length):
    """The fields of the made-up schema, with pictures that encode well, as a camera's do."""
    return {**values(number, length), "front": scene(number, length + 1, 16, 16)}


@pytest.fixture
def store(tmp_path):
    with EpisodeStore.create(tmp_path / "store", SCHEMA) as writer:
        for i in range(4):
            outcome = {"seed": i, "success": i == 1, "score": i / 3, "task": f"task {i % 2}", "source": "expert"}
            writer.append(smooth(i, 5 + i), terminated=i == 1, truncated=i != 1, **outcome)
    return EpisodeStore.open(tmp_path / "store")


def test_a_store_goes_out_and_comes_back_equal(tmp_path, store):
    folder = Path(export_dataset(store, f"lerobot:{tmp_path / 'out'}"))
    back = import_dataset(f"lerobot:{folder}", tmp_path / "back")
    assert back.schema == store.schema
    for i in range(4):
        ours, theirs = store.episode(i), back.episode(i)
        for name in ("joints", "action", "reward", "mode"):
            np.testing.assert_array_equal(ours.fields[name], theirs.fields[name])
        assert psnr(ours.fields["front"], theirs.fields["front"]) > 30
        for name in ("terminated", "truncated", "task", "source", "seed", "success", "score", "length", "return_"):
            assert getattr(ours, name) == getattr(theirs, name)


def test_cameras_kept_as_video_are_copied_both_ways(tmp_path):
    store = import_dataset(f"lerobot:{v3(tmp_path / 'arm')}", tmp_path / "store")
    assert store.schema[TOP].video
    files = [(store.path / f"video/{TOP}/{i:06}.mp4").read_bytes() for i in (0, 1)]
    assert files == [(tmp_path / f"arm/videos/{TOP}/chunk-000/file-{i:03}.mp4").read_bytes() for i in (0, 1)]
    folder = Path(export_dataset(store, f"lerobot:{tmp_path / 'out'}"))
    assert files == [(folder / f"videos/{TOP}/chunk-000/file-{i:03}.mp4").read_bytes() for i in (0, 1)]
    assert import_dataset(f"lerobot:{folder}", tmp_path / "back").digest == store.digest


def test_a_video_with_other_times_is_encoded_anew(tmp_path):
    schema = Schema(
        (FieldSpec("front", "uint8", (16, 16, 3), "observation", video=True), SCHEMA["action"]), rate_hz=5.0
    )
    write_clip(tmp_path / "fast.mp4", scene(0, 20, 16, 16), 10)
    chosen = np.array([3, 5, 7, 9, 19])
    with EpisodeStore.create(tmp_path / "store", schema) as writer:
        for frames in (chosen, np.arange(2, 12, 2)):
            fields = {"front": Video(path=tmp_path / "fast.mp4", frames=frames), "action": values(0, 4)["action"]}
            writer.append(fields, terminated=True, truncated=False)
    folder = Path(export_dataset(EpisodeStore.open(tmp_path / "store"), f"lerobot:{tmp_path / 'out'}"))
    assert len(list(folder.glob("videos/*/*/*.mp4"))) == 2
    back = import_dataset(f"lerobot:{folder}", tmp_path / "back")
    assert psnr(back.episode(0).fields["front"], scene(0, 20, 16, 16)[chosen]) > 28
    assert psnr(back.episode(1).fields["front"], scene(0, 20, 16, 16)[2:12:2]) > 28


def test_what_is_written_is_what_readers_of_the_format_look_for(tmp_path, store):
    folder = Path(export_dataset(store, f"lerobot:{tmp_path / 'out'}"))
    info = json.loads((folder / "meta/info.json").read_text())
    features = info["features"]
    assert (info["codebase_version"], info["fps"], info["splits"]) == ("v3.0", 10, {"train": "0:4"})
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, 26, 2)
    assert features["observation.state"] == {
        "dtype": "float64",
        "shape": [3],
        "names": ["joints.0", "joints.1", "joints.2"],
    }
    assert features["observation.images.front"]["shape"] == [16, 16, 3]
    assert features["mode"]["shape"] == [1]
    assert {"action", "next.reward", "next.done", "next.success", "timestamp", "task_index"} < features.keys()
    data = pq.read_table(folder / "data/chunk-000/file-000.parquet")
    assert set(data.column_names) == {key for key, said in features.items() if said["dtype"] != "video"}
    assert data.schema.field("action").type == pa.list_(pa.float32(), 2)
    assert data.schema.field("timestamp").type == pa.float32()
    assert data["index"].to_pylist() == list(range(26))
    assert data["next.done"].to_pylist() == [t == 4 + i for i in range(4) for t in range(5 + i)]
    np.testing.assert_array_equal(data["next.reward"].to_numpy(), store.field("reward"))

    stats = json.loads((folder / "meta/stats.json").read_text())
    action = np.asarray(store.field("action"), np.float64)
    exact = {"min": action.min(0), "max": action.max(0), "mean": action.mean(0), "std": action.std(0), "count": [26]}
    for name, wanted in exact.items():
        np.testing.assert_allclose(stats["action"][name], wanted, rtol=1e-12)
    assert set(stats["action"]) == {*exact, "q01", "q10", "q50", "q90", "q99"}
    assert np.shape(stats["observation.images.front"]["mean"]) == (3, 1, 1)
    assert (
        0 <= np.min(stats["observation.images.front"]["min"]) <= np.max(stats["observation.images.front"]["max"]) <= 1
    )

    tasks = pq.read_table(folder / "meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0, 1], "task": ["task 0", "task 1"]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    listed = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["length"] for row in listed] == [5, 6, 7, 8]
    assert [row["dataset_to_index"] for row in listed] == [5, 11, 18, 26]
    assert listed[1]["videos/observation.images.front/from_timestamp"] == pytest.approx(0.6)
    assert listed[1]["stats/action/count"] == [6]
    assert listed[2]["tasks"] == ["task 0"]
    # One video of all episodes, in order; each begins where the table says, and ends with what was seen at last.
    video = folder / "videos/observation.images.front/chunk-000/file-000.mp4"
    assert (probe(video).frames, probe(video).fps) == (30, 10)
    assert psnr(read_clip(video, 13, 21), store.episode(2).fields["front"]) > 30
    with av.open(str(video)) as container:
        assert container.streams.video[0].codec_context.name == "h264"


def test_a_changed_dataset_is_read_as_a_foreign_one(tmp_path, store):
    folder = Path(export_dataset(store, f"lerobot:{tmp_path / 'out'}"))
    file = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.column_names.index("mode"), "mode", pa.array([7] * 26, pa.int32())), file)
    back = import_dataset(f"lerobot:{folder}", tmp_path / "back")
    assert back.episodes["length"].tolist() == [4, 5, 6, 7]
    assert back.schema["observation.state"].shape == (3,)
    assert set(back.field("mode").ravel()) == {7}


def test_parts_of_the_state_are_joined_and_odd_pictures_keep_their_size(tmp_path):
    schema = Schema(
        (
            FieldSpec("arm.joints", "float32", (2, 2), "observation", "rad"),
            FieldSpec("grid", "uint8", (3, 3, 3), "observation"),
            FieldSpec("count", "int64", (), "observation"),
            FieldSpec("odd", "uint8", (17, 21, 3), "observation"),
            FieldSpec("turn", "int64", (1,), "action"),
        ),
        rate_hz=12.5,
    )
    chance = np.random.default_rng(0)
    fields = {
        "arm.joints": chance.normal(size=(6, 2, 2)).astype(np.float32),
        "grid": chance.integers(0, 255, (6, 3, 3, 3), dtype=np.uint8),
        "count": np.arange(6) * 10**6,
        "odd": scene(1, 6, 17, 21),
        "turn": chance.integers(0, 5, (5, 1)),
    }
    with EpisodeStore.create(tmp_path / "store", schema) as writer:
        writer.append(fields, terminated=True, truncated=False)
    store = EpisodeStore.open(tmp_path / "store")
    folder = Path(export_dataset(store, f"lerobot:{tmp_path / 'out'}"))
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    assert (features["observation.state"]["dtype"], features["observation.state"]["shape"]) == ("float64", [32])
    assert features["observation.images.odd"]["shape"] == [18, 22, 3]
    assert "next.success" not in features
    back = import_dataset(f"lerobot:{folder}", tmp_path / "back").episode(0).fields
    for name in ("arm.joints", "grid", "count", "turn"):
        np.testing.assert_array_equal(back[name], fields[name])
        assert back[name].dtype == fields[name].dtype
    assert psnr(back["odd"], fields["odd"]) > 30


def test_a_store_without_pictures_comes_back_with_the_same_digest(tmp_path):
    schema = Schema(tuple(spec for spec in SCHEMA.fields if not spec.camera), rate_hz=20.0)
    with EpisodeStore.create(tmp_path / "store", schema) as writer:
        for i in range(3):
            fields = {name: part for name, part in values(i, 5 + i).items() if name != "front"}
            writer.append(fields, terminated=False, truncated=True, seed=i)
    store = EpisodeStore.open(tmp_path / "store")
    export_dataset(store, f"lerobot:{tmp_path / 'out'}")
    assert import_dataset(f"lerobot:{tmp_path / 'out'}", tmp_path / "back").digest == store.digest


def test_exports_that_cannot_be(tmp_path, store, make_store):
    def refused(store, words, target="out"):
        with pytest.raises(DataError, match=words):
            export_dataset(store, f"lerobot:{tmp_path / target}")
        assert not list(tmp_path.glob(".*partial"))

    refused(store, "a folder that exists", store.path.name)
    refused(make_store([3, 4], "holes", without={1: "mode"}), "episode 1: expected all fields, got no mode")
    refused(make_store([], "empty"), "got no episodes")
    for name, schema, words in (
        ("unclocked", Schema(SCHEMA.fields), "a known rate, got a store whose schema does not say it"),
        ("taken", Schema((FieldSpec("index", "int64", (), "other"),), rate_hz=1.0), "a name of its own"),
        ("slash", Schema((FieldSpec("a/b", "int64", (), "other"),), rate_hz=1.0), "a name of its own"),
        (
            "huge",
            Schema(
                (FieldSpec("n", "int64", (), "observation"), FieldSpec("x", "float32", (), "observation")), rate_hz=1.0
            ),
            "cannot hold",
        ),
    ):
        with EpisodeStore.create(tmp_path / name, schema) as writer:
            made = {
                spec.name: np.full((3 + (spec.role == "observation"), *spec.shape), 2**62 + 1).astype(spec.dtype)
                for spec in schema.fields
            }
            writer.append(made, terminated=True, truncated=False)
        refused(EpisodeStore.open(tmp_path / name), words)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_half_export(tmp_path, store, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(DataError, match="No space left on device; see to the disk"):
        export_dataset(store, f"lerobot:{tmp_path / 'out'}")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def edit_info(**changes):
    def damage(folder):
        file = folder / "meta/info.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def edit_rows(change, file="data/chunk-000/file-000.parquet"):
    return lambda folder: pq.write_table(change(pq.read_table(folder / file)), folder / file)


def cut(name, share):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def with_column(name, change):
    return lambda table: table.set_column(
        table.column_names.index(name), name, pa.array([change(i, x) for i, x in enumerate(table[name].to_pylist())])
    )


VIDEO, ROWS = f"videos/{TOP}/chunk-000/file-000.mp4", "data/chunk-000/file-000.parquet"
DAMAGE = {
    "a video cut short": (cut(VIDEO, 0.7), r"file-000\.mp4, episode \d: expected a (picture|video)"),
    "a video cut at its head": (cut(VIDEO, 0.01), r"file-000\.mp4: expected a video, got Invalid data"),
    "no video": (lambda folder: (folder / VIDEO).unlink(), r"file-000\.mp4: expected a video, got no such file"),
    "fewer frames than rows": (
        lambda folder: write_clip(folder / VIDEO, scene(0, 12), FPS),
        r"episode 1: expected a picture for each of 9 rows, got 6, none for frame 6 at second 1\.2",
    ),
    "frames of another size": (
        lambda folder: write_clip(folder / VIDEO, scene(0, 16, 64), FPS),
        "expected pictures of 32 x 48, got 64 x 48",
    ),
    "no rows": (
        lambda folder: (folder / ROWS).unlink(),
        r"file-000\.parquet: expected a Parquet file, got no such file",
    ),
    "rows cut short": (cut(ROWS, 0.5), r"file-000\.parquet: expected a Parquet file, got ArrowInvalid"),
    "a column missing": (edit_rows(lambda t: t.drop_columns("action")), "expected the column 'action', got none"),
    "a column of another size": (
        edit_rows(with_column("action", lambda i, x: [*x, 1.0])),
        r"file-000\.parquet, episode 0, feature 'action': expected values of shape \(2,\)",
    ),
    "ragged rows": (edit_rows(with_column("action", lambda i, x: [*x, 1.0][: 2 + i % 2])), "rows of different lengths"),
    "missing values": (edit_rows(with_column("next.reward", lambda i, x: x if i else None)), "a missing value"),
    "a row missing": (edit_rows(lambda t: t.slice(1)), "episode 0: expected 6 frames, numbered from 0, got 5 rows"),
    "a row twice": (
        edit_rows(with_column("frame_index", lambda i, x: x or 1)),
        "episode 0: expected 6 frames, numbered",
    ),
    "times of another rate": (
        edit_rows(with_column("timestamp", lambda i, x: 2 * x)),
        "episode 0: expected 10 frames a second, got frame 1 at second 0.2",
    ),
    "no list of episodes": (
        lambda folder: shutil.rmtree(folder / "meta/episodes"),
        "a list of the episodes, got no such",
    ),
    "a list without places": (
        edit_rows(lambda t: t.drop_columns("data/file_index"), "meta/episodes/chunk-000/file-000.parquet"),
        "expected the column 'data/file_index', got none",
    ),
    "fewer episodes than it says": (edit_info(total_episodes=5), "expected episodes 0 to 4, got 4 in the list"),
    "far fewer episodes": (edit_info(total_episodes=10**12), "expected episodes 0 to 999999999999, got 4 in the list"),
    "no number of episodes": (edit_info(total_episodes=[4]), "a list of the episodes, got TypeError"),
    "another version": (edit_info(codebase_version="v1.6"), r"v3\.0, v2\.1 or v2\.0, got 'v1\.6'; convert it"),
    "a version to come": (edit_info(codebase_version="v4.0"), "got 'v4.0'"),
    "info.json cut short": (cut("meta/info.json", 0.5), "description of a LeRobot dataset, got JSONDecodeError"),
    "no rate": (edit_info(fps=0), "got ValueError fps 0"),
    "features that are none": (edit_info(features=["a"]), "description of a LeRobot dataset"),
    "no features": (edit_info(features={}), "one or more fields"),
    "a way out": (edit_info(data_path="../../{chunk_index}/etc/passwd"), "a path within the dataset"),
    "a hostile template": (edit_info(video_path="{video_key.__class__}"), "a path within the dataset"),
    "no info.json": (lambda folder: (folder / "meta/info.json").unlink(), r"no meta/info\.json in it; give the folder"),
    "no folder": (shutil.rmtree, "got no such folder"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return v3(tmp_path_factory.mktemp("lerobot") / "arm")


@pytest.mark.faults
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_leaves_nothing_behind(tmp_path, sound, name):
    damage, words = DAMAGE[name]
    folder = tmp_path / "arm"
    shutil.copytree(sound, folder)
    damage(folder)
    with pytest.raises(DataError, match=words):
        import_dataset(f"lerobot:{folder}", tmp_path / "store")
    assert not list(tmp_path.glob("store*"))


def test_the_verbs_tell_what_an_export_leaves_out(cli, store, tmp_path):
    outcome = cli(["data", "export", str(store.path), f"lerobot:{tmp_path}/out", "--json"])
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["left_out"] == ["the observations after the last actions"]
    (tmp_path / "out" / "meta" / "info.json").write_text("{")
    outcome = cli(["data", "import", f"lerobot:{tmp_path}/out", "--out", str(tmp_path / "back")])
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert "info.json: expected the description of a LeRobot dataset" in outcome.stderr


@pytest.mark.faults
def test_pictures_are_read_as_png_or_jpeg_alone():
    feature = lerobot.Feature(key="front", kind="image", shape=(17, 21, 3), parts=())
    picture = scene(1, 1, 17, 21)[0]
    for kind in ("PNG", "JPEG", "GIF", "EPS", "TIFF"):
        content = io.BytesIO()
        Image.fromarray(picture).save(content, kind)
        if kind in ("PNG", "JPEG"):
            assert lerobot._picture(content.getvalue(), feature).shape == (17, 21, 3)
        else:
            with pytest.raises(UnidentifiedImageError):
                lerobot._picture(content.getvalue(), feature)
