"""Small files that speak of much more than they hold are refused before anything of it is read or written."""

import json
import pickle
import shutil
import zipfile
from collections import namedtuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from foreign import d4rl, exorl, robomimic, toto, walks, zarr_buffer
from foreign_lerobot import ROWS_FILE, v3
from PIL import Image

from offbook.data.formats import import_dataset, limits, pickles
from offbook.errors import DataError

ROWS, WIDE = 40_000, 2**18  # forty episodes of a gibibyte each
ENDS = np.arange(ROWS) % 1000 == 999
UNPACKED = r"expected at most 1000 times the \d+ bytes of its files, and 1073741824 more, got \d+ bytes when unpacked"


def refused(cli, tmp_path, source, words):
    """The import ends with one line and leaves nothing."""
    with pytest.raises(DataError, match=words):
        import_dataset(source, tmp_path / "store")
    outcome = cli(["data", "import", source, "--out", str(tmp_path / "store")])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert not list(tmp_path.glob("store*"))


@pytest.mark.faults
def test_values_that_were_never_written_to_d4rl(tmp_path, cli):
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        file.create_dataset("observations", (ROWS, WIDE), "f4", chunks=(1, 2**12))
        for name, array in {"actions": np.zeros((ROWS, 2)), "rewards": np.zeros(ROWS), "terminals": ENDS}.items():
            file.create_dataset(name, data=array, compression="gzip")
    assert (tmp_path / "f.hdf5").stat().st_size < 30_000
    words = rf"f\.hdf5, the largest of its arrays /observations, of {4 * ROWS * WIDE} bytes: {UNPACKED}"
    refused(cli, tmp_path, f"d4rl:{tmp_path}/f.hdf5", words)


@pytest.mark.faults
def test_values_that_were_never_written_to_robomimic(tmp_path, cli):
    robomimic(tmp_path / "f.hdf5", walks((1000,) * 3))
    with h5py.File(tmp_path / "f.hdf5", "a") as file:
        for demo in file["data"].values():
            for group in ("obs", "next_obs"):
                demo[group].create_dataset("front", (1000, WIDE), "u1", chunks=(1, 2**12))
    refused(cli, tmp_path, f"robomimic:{tmp_path}/f.hdf5", "front, of 262144000 bytes: expected at most 1000 times")


@pytest.mark.faults
def test_one_array_under_many_names_counts_as_often(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(limits, "FLOOR", 2**20)
    robomimic(tmp_path / "f.hdf5", walks((4, 4)))
    with h5py.File(tmp_path / "f.hdf5", "a") as file:
        demo = file["data/demo_0"]
        for part in [demo["obs"], demo["next_obs"]]:
            part.create_dataset("depth", data=np.zeros((4, 2**15)), compression="gzip")
        for number in range(100):
            file[f"data/demo_{2 + number}"] = demo
    refused(cli, tmp_path, f"robomimic:{tmp_path}/f.hdf5", r"depth, of 1048576 bytes: expected at most 1000 times")


@pytest.mark.faults
def test_groups_that_lead_to_themselves(tmp_path, cli):
    robomimic(tmp_path / "f.hdf5", walks())
    with h5py.File(tmp_path / "f.hdf5", "a") as file:
        file["data/demo_1/obs/again"] = file["data"]
    refused(cli, tmp_path, f"robomimic:{tmp_path}/f.hdf5", "expected names that each lead somewhere else, got a circle")


@pytest.mark.faults
def test_values_that_were_never_written_to_zarr(tmp_path, cli):
    root = zarr.group(zarr.storage.LocalStore(tmp_path / "f.zarr"), zarr_format=2)
    root.create_array("data/obs", shape=(ROWS, WIDE), dtype="f4", chunks=(1, 2**12))
    root.create_array("data/action", shape=(ROWS, 2), dtype="f4")
    root.create_array("meta/episode_ends", shape=(40,), dtype="i8")[:] = np.flatnonzero(ENDS) + 1
    refused(cli, tmp_path, f"zarr:{tmp_path}/f.zarr", rf"data/obs, of {4 * ROWS * WIDE} bytes: {UNPACKED}")
    # The same as a zip file, and a zip file whose members unpack to more than they may.
    shutil.make_archive(str(tmp_path / "f.zarr"), "zip", tmp_path / "f.zarr")
    refused(cli, tmp_path, f"zarr:{tmp_path}/f.zarr.zip", UNPACKED)


@pytest.mark.faults
def test_members_of_a_zip_file_that_unpack_to_gigabytes(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(limits, "FLOOR", 2**20)
    zarr_buffer(tmp_path / "f.zarr.zip", walks())
    with zipfile.ZipFile(tmp_path / "f.zarr.zip", "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("data/more/0.0", bytes(2**24))
    refused(cli, tmp_path, f"zarr:{tmp_path}/f.zarr.zip", r"f\.zarr\.zip: expected at most 1000 times")


@pytest.mark.faults
def test_chunks_far_larger_than_what_lies_in_them(tmp_path, cli):
    d4rl(tmp_path / "f.hdf5", walks(), observations=None, next_observations=None)
    with h5py.File(tmp_path / "f.hdf5", "a") as file:
        file.create_dataset("observations", (15, 3), "f4", chunks=(2**27, 3), maxshape=(None, 3), compression="gzip")
    words = (
        f"/observations: expected chunks of at most {2**30} bytes, got {12 * 2**27} bytes; save it in smaller chunks"
    )
    refused(cli, tmp_path, f"d4rl:{tmp_path}/f.hdf5", words)
    zarr_buffer(tmp_path / "f.zarr", walks())
    about = tmp_path / "f.zarr" / "data" / "obs" / ".zarray"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"chunks": [2**27, 3]}))
    refused(cli, tmp_path, f"zarr:{tmp_path}/f.zarr", "data/obs: expected chunks of at most")


@pytest.mark.faults
def test_archives_of_exorl_that_unpack_to_gigabytes(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(limits, "FLOOR", 2**20)
    exorl(tmp_path / "f", walks((4,) * 3))
    files = sorted((tmp_path / "f").iterdir())
    import_dataset(f"exorl:{tmp_path}/f", tmp_path / "sound")
    for file in files:
        with zipfile.ZipFile(file, "a", zipfile.ZIP_BZIP2) as archive, archive.open("depth.npy", "w") as member:
            np.lib.format.write_array(member, np.zeros((5, 2**18)))
    words = r"the largest file episode_000000_4\.npz: expected at most 1000 times the \d+ bytes of its files"
    refused(cli, tmp_path, f"exorl:{tmp_path}/f", words)
    # What one episode may take is bounded too, whatever the others hold.
    monkeypatch.setattr(limits, "MAX_BYTES", 2**20)
    refused(cli, tmp_path, f"exorl:{tmp_path}/f", "episode_000000_4.npz: expected at most 1048576 bytes for an episode")


@pytest.mark.faults
def test_rows_of_parquet_that_unpack_to_gigabytes(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(limits, "FLOOR", 2**20)
    folder = v3(tmp_path / "arm")
    file = folder / ROWS_FILE
    names = pq.read_table(file).column_names
    pq.write_table(pa.table({name: pa.array(np.zeros(500_000)) for name in names}), file)
    assert file.stat().st_size < 30_000
    refused(cli, tmp_path, f"lerobot:{folder}", r"file-000\.parquet: expected at most 1000 times .* got 40000000 bytes")


@pytest.mark.faults
def test_what_is_written_is_counted_whatever_the_format(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(limits, "FLOOR", 2**20)
    toto(tmp_path / "toto", walks((3, 60), size=7, actions=7, picture=True))
    file = tmp_path / "toto" / "parsed.pkl"
    made = pickle.loads(file.read_bytes())
    for path in made:
        path["cam0c"] = ["00000c.png"] * len(path["cam0c"])
    shutil.rmtree(tmp_path / "toto" / "data")
    file.write_bytes(pickle.dumps(made))
    for number in range(2):
        picture = tmp_path / "toto" / "data" / f"trajectory_{number}" / "00000c.png"
        picture.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((400, 400, 3), np.uint8)).save(picture)
    refused(cli, tmp_path, f"toto:{tmp_path}/toto", "toto: expected at most 1000 times the .* bytes of its files")


@pytest.mark.faults
def test_pictures_of_one_episode_that_would_fill_the_memory(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BYTES", 5000)
    toto(tmp_path / "toto", walks((3, 60), size=7, actions=7, picture=True))
    words = "expected at most 5000 bytes for an episode, got more; scale the pictures"
    refused(cli, tmp_path, f"toto:{tmp_path}/toto", words)


@pytest.mark.faults
def test_some_of_the_disk_is_left_to_others(tmp_path, cli, monkeypatch):
    d4rl(tmp_path / "f.hdf5", walks())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, limits.KEPT_FREE + 100))
    refused(cli, tmp_path, f"d4rl:{tmp_path}/f.hdf5", "expected room for 132 bytes more, and 268435456 that stay free")


def test_zeros_that_compress_well_are_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "FLOOR", 0)
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        for name, shape in (("observations", (ROWS, 3)), ("actions", (ROWS, 2)), ("rewards", (ROWS,))):
            file.create_dataset(name, data=np.zeros(shape), compression="gzip", compression_opts=9)
        file.create_dataset("terminals", data=ENDS, compression="gzip")
    assert (tmp_path / "f.hdf5").stat().st_size < 30_000
    assert import_dataset(f"d4rl:{tmp_path}/f.hdf5", tmp_path / "store").steps == ROWS - 40


@pytest.mark.faults
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        (b"X" + (10**4).to_bytes(4, "little") + b"a" * 10**4, b"c_codecs\nencode\nh\x00\x85R"),
        (b"(" + b"K\x01" * 10**4 + b"t", b"cnumpy.core.multiarray\n_reconstruct\nh\x00R"),
        (b"(" + b"(U\x01aK\x01t" * 3000 + b"l", b"ccollections\nOrderedDict\nh\x00\x85R"),
    ],
    ids=["words", "arguments", "pairs"],
)
def test_pickles_that_copy_the_same_value_again_and_again(tmp_path, argument, call):
    file = tmp_path / "p.pkl"
    file.write_bytes(b"\x80\x02" + argument + b"q\x000" + (call + b"0") * 3 + b"K\x07.")
    assert pickles.load(file) == 7
    file.write_bytes(b"\x80\x02" + argument + b"q\x000" + (call + b"0") * 2000 + b"K\x07.")
    with pytest.raises(DataError, match="got one that copies the same values again and again; nothing of it was run"):
        pickles.load(file)


@pytest.mark.faults
def test_names_in_pickles_are_words(tmp_path):
    """A list of lists of lists, each the one before it twice, would take for ever to be put into words."""
    nested = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40))
    (tmp_path / "p.pkl").write_bytes(b"\x80\x04" + nested + b"\x8c\x01a\x93.")
    with pytest.raises(DataError, match="got a name that is no word"):
        pickles.load(tmp_path / "p.pkl")


@pytest.mark.faults
def test_what_was_compressed_twice(tmp_path, cli):
    twice = "expected (values|chunks) that were compressed once, got several compressions"
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((64, 4))
        plan.set_deflate(9)
        plan.set_deflate(9)
        space = h5py.h5s.create_simple((64, 4))
        h5py.h5d.create(file.id, b"observations", h5py.h5t.IEEE_F32LE, space, plan)
        for name, array in {"actions": np.zeros((64, 2)), "rewards": np.zeros(64), "terminals": np.zeros(64)}.items():
            file.create_dataset(name, data=array, compression="gzip", shuffle=True, fletcher32=True)
    refused(cli, tmp_path, f"d4rl:{tmp_path}/f.hdf5", rf"/observations: {twice}")
    gzip, shards = {"name": "gzip", "configuration": {"level": 9}}, {"chunks": (8, 4), "shards": (64, 4)}
    for number, (form, more) in enumerate([(2, {}), (3, {"chunks": (64, 4)}), (3, shards)]):
        path = tmp_path / f"{number}.zarr"
        root = zarr.open_group(path, mode="w", zarr_format=form)
        root.create_array("data/action", data=np.zeros((64, 4)), **more)
        root.create_array("meta/episode_ends", data=np.array([64]))
        about = path / "data" / "action" / (".zarray" if form == 2 else "zarr.json")
        said = json.loads(about.read_text())
        if form == 2:
            said |= {"filters": [{"id": "zlib", "level": 9}], "compressor": {"id": "zlib", "level": 9}}
        else:
            codecs = said["codecs"][0]["configuration"]["codecs"] if more is shards else said["codecs"]
            codecs[1:] = [gzip, gzip]
        import_dataset(f"zarr:{path}", tmp_path / f"sound {number}")
        about.write_text(json.dumps(said))
        refused(cli, tmp_path, f"zarr:{path}", rf"data/action: {twice}")
