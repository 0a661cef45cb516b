"""Stores that go out as LeRobot datasets: other readers find what they look for, and ours gets all of it back."""

import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_lerobot import TOP, psnr, scene, v3
from made import SCHEMA, values

from offbook.data.clips import probe, read_clip, write_clip
from offbook.data.formats import export_dataset, import_dataset
from offbook.data.store import EpisodeStore, FieldSpec, Schema
from offbook.data.video import Video
from offbook.errors import DataError


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


def test_the_verbs_tell_what_an_export_leaves_out(cli, store, tmp_path):
    outcome = cli(["data", "export", str(store.path), f"lerobot:{tmp_path}/out", "--json"])
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["left_out"] == ["the observations after the last actions"]
    (tmp_path / "out" / "meta" / "info.json").write_text("{")
    outcome = cli(["data", "import", f"lerobot:{tmp_path}/out", "--out", str(tmp_path / "back")])
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert "info.json: expected the description of a LeRobot dataset" in outcome.stderr
