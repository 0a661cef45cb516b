import contextlib
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offbook.errors import CheckpointError
from offbook.runs import checkpoint
from offbook.runs.checkpoint import TensorInfo, load_checkpoint, read_header, save_checkpoint


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def metadata(**change: Any) -> dict[str, str]:
    return {"offbook": json.dumps({"format": 1, "kind": "demo", "record": {}, **change})}


def test_round_trip_of_torch_and_numpy(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tied = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    tensors = {
        "a": tied,
        "tied": tied,
        "turned": tied.T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "array": np.arange(4, dtype=np.float64)[::2],
        "empty": torch.zeros(0, 5),
    }
    save_checkpoint(path, "demo", tensors, {"width": 3, "names": ["x"]})
    loaded = load_checkpoint(path, "demo")
    assert (loaded.kind, loaded.record) == ("demo", {"width": 3, "names": ["x"]})
    for name, value in tensors.items():
        assert torch.equal(loaded.values[name], torch.as_tensor(np.array(value)) if name == "array" else value)
    header = read_header(path)
    assert header.tensors["turned"] == TensorInfo(dtype="F32", shape=(3, 2))
    assert header.tensors["scalar"].shape == ()
    assert header.size == path.stat().st_size


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, order in [("a", ("x", "y")), ("b", ("y", "x"))]:
        save_checkpoint(tmp_path / name, "demo", {key: np.full(3, len(key)) for key in order}, dict.fromkeys(order, 1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_header_is_read_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\nfrom offbook.runs.checkpoint import read_header, save_checkpoint\n"
        "save_checkpoint(sys.argv[1], 'demo', {'w': np.zeros(3)}, {})\n"
        "print(read_header(sys.argv[1]).tensors['w'].shape, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "(3,) False"


def test_other_kind_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", "fit", {"w": np.zeros(3)}, {})
    with pytest.raises(CheckpointError, match="expected kind 'bc', got kind 'fit'"):
        load_checkpoint(tmp_path / "a", "bc")


def test_foreign_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps({"weights": list(range(100))}, protocol=protocol))
        with pytest.raises(CheckpointError, match=r"got a pickle; pickle can run code"):
            read_header(path)
    torch.save({"w": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"a zip file, as torch\.save writes"):
        load_checkpoint(path)
    save_file = __import__("safetensors.numpy", fromlist=["save_file"]).save_file
    save_file({"w": np.zeros(2)}, str(path))
    with pytest.raises(CheckpointError, match="a safetensors file without our record"):
        read_header(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "none")
    with pytest.raises(CheckpointError, match="directory"):
        read_header(tmp_path)


def test_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    # 640 bytes is 80 02 in hexadecimal, the first bytes of a pickle of protocol 2.
    header = json.dumps({"__metadata__": metadata()}).encode().ljust(640)
    write(tmp_path / "a", header)
    assert (tmp_path / "a").read_bytes()[:2] == b"\x80\x02"
    assert read_header(tmp_path / "a").kind == "demo"


@pytest.mark.faults
def test_every_truncation_is_refused_with_a_sentence(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", "demo", {"w": np.zeros(8, np.float32)}, {"x": 1})
    whole = (tmp_path / "a").read_bytes()
    for keep in range(len(whole)):
        (tmp_path / "b").write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=f"a truncated file of {keep}; get the file again"):
            read_header(tmp_path / "b")
    (tmp_path / "b").write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=r"expected [0-9]+ bytes, got [0-9]+ bytes"):
        read_header(tmp_path / "b")


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 100_000, "a JSON header"),
        (b"\xff\xfe", "a JSON header"),
        ([1], "a JSON object as header"),
        ({"w": W}, "without our record"),
        ({"__metadata__": {"offbook": "{"}}, "a JSON record"),
        ({"__metadata__": {"offbook": "[" * 50_000}}, "a JSON record"),
        ({"__metadata__": metadata(format=2)}, "expected format 1 or older, got format 2; install a newer offbook"),
        ({"__metadata__": metadata(format="1")}, "a format number"),
        ({"__metadata__": metadata(format=True)}, "a format number"),
        ({"__metadata__": metadata(kind=3)}, "the name of a kind"),
        ({"__metadata__": metadata(record=[])}, "an object as record"),
        ({"__metadata__": metadata(), "w": 3}, "an entry"),
        ({"__metadata__": metadata(), "w": {**W, "dtype": "OBJECT"}}, "a known type"),
        ({"__metadata__": metadata(), "w": {**W, "dtype": []}}, "a known type"),
        ({"__metadata__": metadata(), "w": {**W, "shape": [-2]}}, "a shape"),
        ({"__metadata__": metadata(), "w": {**W, "shape": [1] * 99}}, "a shape"),
        ({"__metadata__": metadata(), "w": {**W, "shape": [10**12]}}, "expected tensor 'w' with 4000000000000 bytes"),
        ({"__metadata__": metadata(), "w": {**W, "data_offsets": [0]}}, "two offsets"),
        ({"__metadata__": metadata(), "w": {**W, "data_offsets": [4, 12]}}, "tensor data from byte 0"),
        ({"__metadata__": metadata(), "w": W, "v": W}, "tensor data from byte 8"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, message: str) -> None:
    write(tmp_path / "a", header, bytes(8))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a")


def test_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a", b"{}", length=2**62)
    with pytest.raises(CheckpointError, match="a header of 2 bytes to 8 MiB, got 4611686018427387904"):
        read_header(tmp_path / "a")


@pytest.mark.faults
@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.integers(0, 300), st.binary(min_size=1, max_size=4))
def test_flipped_bytes_never_escape_as_another_error(position: int, noise: bytes) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        save_checkpoint(path, "demo", {"w": np.zeros(8, np.float32), "v": np.ones(2)}, {"x": 1})
        whole = bytearray(path.read_bytes())
        whole[position : position + len(noise)] = noise
        path.write_bytes(whole)
        # A change may be harmless; what is noticed must be a CheckpointError and nothing else.
        with contextlib.suppress(CheckpointError):
            load_checkpoint(path)


def test_oversized_or_unwritable_record_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, "demo", {"w": np.zeros(1)}, {"old": True})
    with pytest.raises(CheckpointError, match="a header below 8 MiB"):
        save_checkpoint(path, "demo", {}, {"text": "x" * checkpoint.MAX_HEADER_BYTES})
    with pytest.raises(CheckpointError, match="a record of JSON types"):
        save_checkpoint(path, "demo", {}, {"text": object()})
    assert read_header(path).record == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
