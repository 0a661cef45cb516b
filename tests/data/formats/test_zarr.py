"""Replay buffers in Zarr: folders and zip files, both versions, several codecs."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from foreign import assert_same, walks, zarr_buffer

from offbook.data.formats import import_dataset, limits
from offbook.errors import DataError

RENAME = {"observation": "obs", "front": "img"}


@pytest.mark.parametrize(
    ("name", "compressor", "version"),
    [
        ("f.zarr", "blosc", 2),
        ("f.zarr", "zlib", 2),
        ("f.zarr.zip", "blosc", 2),
        ("f.zarr", None, 2),
        ("f.zarr", None, 3),
    ],
)
def test_episodes_come_in_step_for_step(tmp_path, name, compressor, version):
    episodes = walks(picture=True)
    zarr_buffer(tmp_path / name, episodes, compressor=compressor, version=version)
    store = import_dataset(f"zarr:{tmp_path}/{name}", tmp_path / "store")
    assert_same(store, episodes, "observation", "front", "action", rename=RENAME)
    assert store.schema.observation_spec().cameras == {"img": (20, 16)}
    assert store.schema.reward is None
    stated = " / ".join(store.schema.extra["import"]["stated"])
    assert "what the last step of an episode led to is not recorded" in stated
    assert "pictures kept as floating-point numbers are made bytes again: img" in stated


def test_roles_rows_beyond_the_last_end_and_episodes_of_one_row(tmp_path):
    episodes = walks((5, 3, 7))
    rows = 18 + 4
    extra = {
        "data/obs": np.concatenate([*(e["observation"] for e in episodes), np.zeros((4, 3), "f4")]),
        "data/action": np.zeros((rows, 2), np.float32),
        "data/reward": np.ones(rows),
        "data/timestamp": np.arange(rows) / 10,
        "meta/episode_ends": np.array([6, 7, 10, 18]),
    }
    zarr_buffer(tmp_path / "f.zarr", episodes, **extra)
    store = import_dataset(f"zarr:{tmp_path}/f.zarr", tmp_path / "store")
    assert store.episodes["length"].tolist() == [5, 2, 7]
    assert (store.schema.observations, store.schema.named("other")) == (("obs",), ("timestamp",))
    assert store.episodes["return"].tolist() == [5.0, 2.0, 7.0]
    assert "1 episodes of a single row are left out" in store.schema.extra["import"]["stated"]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data/action": None}, "data: expected the key 'action', got obs"),
        ({"meta/episode_ends": None}, "expected the key 'meta', got data"),
        ({"data/action": np.zeros((17, 2), "f4")}, "data/action: expected 18 rows or more, got 17"),
        ({"data/action": np.zeros(18, "f4")}, r"actions: expected shape \(steps, size\), got shape \(6,\)"),
        ({"meta/episode_ends": np.array([5, 5, 18])}, "expected ends that ascend from 1 on"),
        ({"meta/episode_ends": np.array([0.5])}, "expected one whole number for each episode, got float64"),
        ({"meta/episode_ends": np.zeros(0, int)}, r"got int64 of shape \(0,\); record an episode first"),
        ({"data/words": np.array(["ab"] * 18)}, "words: expected numbers, got an array of <U2"),
        ({"data/img": np.full((18, 16, 16, 3), 0.5, "f4")}, "img: expected pictures of whole numbers from 0 to 255"),
    ],
)
def test_crooked_buffers_are_refused_with_a_sentence(tmp_path, cli, changes, words):
    zarr_buffer(tmp_path / "f.zarr", walks(), **changes)
    with pytest.raises(DataError, match=words):
        import_dataset(f"zarr:{tmp_path}/f.zarr", tmp_path / "store")
    outcome = cli(["data", "import", f"zarr:{tmp_path}/f.zarr", "--out", str(tmp_path / "store")])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["f.zarr"]


@pytest.mark.faults
def test_damaged_unknown_large_and_absent_stores(tmp_path, cli, monkeypatch):
    words = ["data", "import", f"zarr:{tmp_path}/f.zarr", "--out", str(tmp_path / "store")]
    assert "expected a Zarr store, got no such file or folder" in cli(words).stderr
    zarr_buffer(tmp_path / "f.zarr", walks((30, 30)))
    array = tmp_path / "f.zarr" / "data" / "obs"
    metadata = json.loads((array / ".zarray").read_text())
    changes = {"compressor": {"id": "imagecodecs_jpeg2k"}, "dtype": "|O", "shape": "many"}
    for key, value in changes.items():
        (array / ".zarray").write_text(json.dumps({**metadata, key: value}))
        outcome = cli(words)
        assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1), (key, outcome.stderr)
        assert "expected a whole Zarr store that can be decoded" in outcome.stderr, key
    (array / ".zarray").write_text(json.dumps(metadata))
    chunk = next(path for path in array.iterdir() if not path.name.startswith("."))
    content = chunk.read_bytes()
    chunk.write_bytes(content[:10])
    assert "expected a whole Zarr store that can be decoded" in cli(words).stderr
    chunk.write_bytes(content)
    monkeypatch.setattr(limits, "MAX_BYTES", 100)
    assert "expected at most 100 bytes for an episode, got more" in cli(words).stderr
    zarr_buffer(tmp_path / "g.zarr.zip", walks())
    content = (tmp_path / "g.zarr.zip").read_bytes()
    (tmp_path / "g.zarr.zip").write_bytes(content[: len(content) // 2])
    outcome = cli(["data", "import", f"zarr:{tmp_path}/g.zarr.zip", "--out", str(tmp_path / "store")])
    assert (outcome.exit_code, "expected a whole Zarr store" in outcome.stderr) == (1, True), outcome.stderr
    assert not list(tmp_path.glob("store*"))


@pytest.mark.faults
@pytest.mark.parametrize("key", ["compressor", "filters"])
@pytest.mark.parametrize("name", ["data/obs", "data/timestamp", "meta/episode_ends"])
def test_pickles_in_chunks_are_never_opened(tmp_path, key, name):
    zarr_buffer(tmp_path / "f.zarr", walks(), **{"data/timestamp": np.arange(18.0)})
    file = tmp_path / "f.zarr" / name / ".zarray"
    codec = {"id": "pickle", "protocol": 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: [codec] if key == "filters" else codec}))
    for chunk in file.parent.glob("[0-9]*"):
        chunk.write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    plain = json.loads(file.read_text())
    for change in ({}, {"dtype": "|O", "filters": [codec], "compressor": None, "fill_value": 0}):
        file.write_text(json.dumps(plain | change))
        with pytest.raises(DataError, match=r"expected (a whole Zarr store|chunks of plain numbers|numbers)"):
            import_dataset(f"zarr:{tmp_path}/f.zarr", tmp_path / "store")
    assert not (tmp_path / "canary").exists()


@pytest.mark.faults
def test_links_that_lead_out_of_the_folder(tmp_path):
    zarr_buffer(tmp_path / "f.zarr", walks())
    (tmp_path / "g.zarr").symlink_to("f.zarr")
    array = tmp_path / "f.zarr" / "data" / "obs"
    shutil.move(array / "0.0", array / "kept")
    (array / "0.0").symlink_to("kept")
    import_dataset(f"zarr:{tmp_path}/g.zarr", tmp_path / "store")
    for name, target in (("0.0", tmp_path / "secret"), ("kept", tmp_path)):
        (tmp_path / "secret").write_bytes(bytes(48))
        (array / name).unlink()
        (array / name).symlink_to(target)
        with pytest.raises(DataError, match=f"{name}: expected a file of the store, got a link out of it"):
            import_dataset(f"zarr:{tmp_path}/f.zarr", tmp_path / "other")
        (array / name).unlink()
        (array / name).write_bytes(b"")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
