"""Blobs: whole or not at all, by hash or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileOpener
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from offbook.arena.service import StorageWatch
from offbook.errors import ConfigError
from offbook.service.refusal import RefusedError
from offbook.service.storage import ABANDONED_SECONDS, CACHED, BlobStore, parse_range

HELLO = hashlib.sha256(b"hello").hexdigest()


def send(store: BlobStore, content: bytes, **options) -> str:
    with store.upload(**options) as upload:
        upload.write(content)
        return upload.commit()


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return BlobStore(str(tmp_path) if request.param == "folder" else f"memory://{tmp_path.name}")


def test_what_goes_in_comes_out_by_its_hash(store: BlobStore, tmp_path: Path) -> None:
    assert not store.holds(HELLO)
    assert store.put(b"hello") == store.put(b"hello") == HELLO
    assert store.holds(HELLO)
    assert store.size(HELLO) == 5
    assert b"".join(store.read(HELLO, 1, 4)) == b"ell"
    (tmp_path / "file").write_bytes(b"x" * 600_000)
    big = store.put(tmp_path / "file")
    assert [len(piece) for piece in store.read(big)] == [262144, 262144, 75712]
    assert store.local(big, tmp_path / "cache").read_bytes() == b"x" * 600_000


def test_a_file_that_is_not_what_was_announced_leaves_nothing(tmp_path: Path) -> None:
    store = BlobStore(str(tmp_path))
    with pytest.raises(RefusedError, match="damaged"):
        send(store, b"hellO", limit=100, expected=HELLO)
    with pytest.raises(RefusedError, match="at most 4 bytes") as caught, store.upload(limit=4) as upload:
        upload.write(b"hello")
    assert caught.value.status == 413
    with store.upload(limit=100) as upload:
        upload.write(b"never committed")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", HELLO.upper(), HELLO[:-1], HELLO + "0", "ab/" + HELLO[3:], "\0" * 64]
)
def test_only_hashes_are_names(store: BlobStore, name: str) -> None:
    for use in (store.path, store.size, store.holds, lambda n: list(store.read(n))):
        with pytest.raises(RefusedError) as caught:
            use(name)
        assert caught.value.status == 422


def test_a_missing_blob_is_said_to_be_missing(store: BlobStore) -> None:
    with pytest.raises(RefusedError) as caught:
        list(store.read(HELLO))
    assert caught.value.status == 404


@pytest.mark.parametrize("when", ["write", "fsync"])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch, when: str) -> None:
    store = BlobStore(str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((LocalFileOpener, "write") if when == "write" else (os, "fsync")), full, raising=False)
    with pytest.raises(RefusedError, match="No space left") as caught:
        send(store, b"hello", limit=10)
    assert caught.value.status == 507
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.faults
def test_a_killed_upload_is_never_seen_and_is_cleared_at_the_next_start(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from offbook.service.storage import BlobStore\n"
        "upload = BlobStore(sys.argv[1]).upload(limit=10**9)\n"
        "upload.write(b'x' * 10**6)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    store = BlobStore(str(tmp_path))
    assert not store.holds(hashlib.sha256(b"x" * 10**6).hexdigest())
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    # Another server may share the store: what is young may be its upload.
    store.clear_unfinished()
    (left,) = (tmp_path / "tmp").iterdir()
    old = time.time() - ABANDONED_SECONDS - 1
    os.utime(left, (old, old))
    store.clear_unfinished()
    assert list((tmp_path / "tmp").iterdir()) == []


class AwayError(Exception):
    """As drivers of remote stores raise: no OSError."""


@pytest.mark.faults
@pytest.mark.parametrize("when", ["open", "write", "close", "mv"])
def test_a_remote_store_that_is_away_is_one_refusal_and_leaves_nothing_visible(
    tmp_path: Path, monkeypatch, when: str
) -> None:
    store = BlobStore(f"memory://{tmp_path.name}")
    known = store.put(b"known")

    def away(*_: object, **__: object) -> None:
        raise AwayError("endpoint not reachable")

    # A file in memory is its own content: what fails is the handle that writes it, never one that reads.
    monkeypatch.setattr(MemoryFile if when in ("write", "close") else MemoryFileSystem, when, away)
    with pytest.raises(RefusedError, match="AwayError") as caught:
        send(store, b"hello", limit=10)
    assert (caught.value.status, caught.value.error) == (507, "storage_failed")
    if when != "mv":
        with pytest.raises(RefusedError) as caught:
            store.check_room(0)
        assert caught.value.status == 507
    if when == "open":
        with pytest.raises(RefusedError, match="AwayError") as caught:
            store.read(known)
        assert (caught.value.status, caught.value.error) == (503, "storage_away")
    monkeypatch.undo()
    assert not store.holds(HELLO)
    assert [sha256 for sha256, _ in store.stored()] == [known]
    store.check_room(0)


@pytest.mark.faults
def test_room_is_looked_for_before_a_robot_moves(tmp_path: Path, monkeypatch) -> None:
    store = BlobStore(str(tmp_path / "not" / "yet"))
    store.check_room(1)
    with pytest.raises(RefusedError, match="are kept back"):
        store.check_room(2**62)
    watch = StorageWatch(store, 2**62)
    assert not watch.sound()
    watch._reserve = 1
    # Looked at every few seconds only.
    assert not watch.sound()
    monkeypatch.setattr(StorageWatch, "SECONDS", 0.0)
    assert watch.sound()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_store_without_a_driver_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        BlobStore("nosuch://bucket")


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (None, None),
        ("bytes=0-", (0, 10)),
        ("bytes=3-5", (3, 6)),
        ("bytes=3-99", (3, 10)),
        ("bytes=-4", (6, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=-", None),
        ("bytes=0-1,3-4", None),
        ("pages=1-2", None),
    ],
)
def test_ranges(header: str | None, wanted: tuple[int, int] | None) -> None:
    assert parse_range(header, 10) == wanted


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=5-3", "bytes=-0"])
def test_ranges_outside_the_file(header: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_range(header, 10)
    assert caught.value.status == 416


def test_of_copies_of_a_remote_store_only_those_used_last_are_kept(tmp_path: Path) -> None:
    store, cache = BlobStore(f"memory://{tmp_path.name}"), tmp_path / "cache"
    names = [store.put(str(number).encode()) for number in range(CACHED + 3)]
    for number, name in enumerate(names):
        copy = store.local(name, cache)
        assert copy.read_bytes() == str(number).encode()
        os.utime(copy, (number, number))
        store.local(names[0], cache)
    assert {path.name for path in cache.iterdir()} == {names[0], *names[4:]}


def test_of_a_copy_that_broke_off_nothing_is_left(tmp_path: Path, monkeypatch) -> None:
    def broken(_: str) -> Iterator[bytes]:
        yield b"half"
        raise OSError("the line broke")

    store, cache = BlobStore(f"memory://{tmp_path.name}"), tmp_path / "cache"
    name = store.put(b"half of it")
    monkeypatch.setattr(store, "read", broken)
    with pytest.raises(OSError, match="broke"):
        store.local(name, cache)
    assert list(cache.iterdir()) == []
