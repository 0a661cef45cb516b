"""LeRobot datasets that come in: v3.0 and v2.1 folders, and damage that is named."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_lerobot import FPS, LENGTHS, ROWS_FILE, TOP, VIDEO_FILE, psnr, rows_of, scene, v3, v21
from PIL import Image, UnidentifiedImageError

from offbook.data.clips import write_clip
from offbook.data.formats import export_dataset, import_dataset, lerobot
from offbook.errors import DataError


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


DAMAGE = {
    "a video cut short": (cut(VIDEO_FILE, 0.7), r"file-000\.mp4, episode \d: expected a (picture|video)"),
    "a video cut at its head": (cut(VIDEO_FILE, 0.01), r"file-000\.mp4: expected a video, got Invalid data"),
    "no video": (lambda folder: (folder / VIDEO_FILE).unlink(), r"file-000\.mp4: expected a video, got no such file"),
    "fewer frames than rows": (
        lambda folder: write_clip(folder / VIDEO_FILE, scene(0, 12), FPS),
        r"episode 1: expected a picture for each of 9 rows, got 6, none for frame 6 at second 1\.2",
    ),
    "frames of another size": (
        lambda folder: write_clip(folder / VIDEO_FILE, scene(0, 16, 64), FPS),
        "expected pictures of 32 x 48, got 64 x 48",
    ),
    "no rows": (
        lambda folder: (folder / ROWS_FILE).unlink(),
        r"file-000\.parquet: expected a Parquet file, got no such file",
    ),
    "rows cut short": (cut(ROWS_FILE, 0.5), r"file-000\.parquet: expected a Parquet file, got ArrowInvalid"),
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
