"""Files by the hash of their content, in a folder or any store that fsspec reaches; names of users never become paths.

`blobs/sha256/ab/cdef...`: written under a temporary name, synced, then renamed: a reader meets a whole file or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import fsspec
from fsspec.implementations.local import LocalFileSystem

from offbook.errors import ConfigError
from offbook.service.refusal import RefusedError, unknown

PIECE = 256 * 1024
"""Bytes that are held in memory at a time."""

CACHED = 16
"""Copies of a remote store's files that are kept on this machine."""

ABANDONED_SECONDS = 6 * 3600.0
"""Age from which an unfinished upload is taken for one that nobody will finish."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """The store of one arena.

    Args:
        url: a folder, or an address such as `s3://bucket/prefix` for which fsspec has a driver.

    Raises:
        ConfigError: fsspec has no driver for the address, or it cannot be opened.

    Example:
        >>> import tempfile
        >>> store = BlobStore(tempfile.mkdtemp())
        >>> with store.upload(limit=1000) as upload:
        ...     upload.write(b"hello")
        ...     sha256 = upload.commit()
        >>> b"".join(store.read(sha256))
        b'hello'
    """

    def __init__(self, url: str) -> None:
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"blob store {url!r}", expected="a folder or an address that fsspec can open",
                              got=str(error),
                              fix="give a folder, or install the driver that is named") from error  # fmt: skip
        self._root = root.rstrip("/")
        self._local = isinstance(self._files, LocalFileSystem)

    def path(self, sha256: str) -> str:
        """Where a file of this hash stands.

        Raises:
            RefusedError: 422, this is not the hexadecimal form of a SHA-256.
        """
        if not _SHA256.fullmatch(sha256):
            raise RefusedError(422, "bad_hash", "blob", expected="a SHA-256 as 64 lower-case hexadecimal digits",
                               got=repr(sha256[:80]), fix="give the hash of the content")  # fmt: skip
        return f"{self._root}/blobs/sha256/{sha256[:2]}/{sha256[2:]}"

    def upload(self, *, limit: int, expected: str | None = None) -> Upload:
        """Begins a file; leave the block without `commit` and nothing of it stays.

        Args:
            limit: largest size in bytes.
            expected: the hash that the content must have, when the sender named one.
        """
        final = self.path(expected) if expected else None
        return Upload(self, limit, expected, final)

    def put(self, content: bytes | Path) -> str:
        """Stores bytes or a local file that we made ourselves; returns the hash."""
        with self.upload(limit=1 << 62) as upload:
            for piece in [content] if isinstance(content, bytes) else _pieces(content):
                upload.write(piece)
            return upload.commit()

    def size(self, sha256: str) -> int:
        """Bytes of a stored file.

        Raises:
            RefusedError: 404, there is none of this hash.
        """
        with _reading(sha256):
            return int(self._files.size(self.path(sha256)))

    def holds(self, sha256: str) -> bool:
        """Whether a file of this hash is stored."""
        with _reading(sha256):
            return bool(self._files.exists(self.path(sha256)))

    def read(self, sha256: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to before `stop`, in pieces; the file is opened at once, not with the first piece.

        Raises:
            RefusedError: 404, there is none of this hash; 503, the store does not answer.
        """
        stop = self.size(sha256) if stop is None else stop
        with _reading(sha256):
            file = self._files.open(self.path(sha256), "rb")
        return _span(file, start, stop, sha256)

    def stored(self) -> Iterator[tuple[str, int]]:
        """Hash and size of every file in the store, in the order of the hashes.

        Raises:
            RefusedError: 503, the store does not answer.
        """
        folder = f"{self._root}/blobs/sha256"
        with _reading(folder):
            found = self._files.find(folder, detail=True) if self._files.exists(folder) else {}
        for name, about in sorted(found.items()):
            yield "".join(name.rsplit("/", 2)[1:]), int(about["size"])

    def check_room(self, reserve: int) -> None:
        """Writes and removes a small file, and where the store is a folder looks at the room that is left.

        Raises:
            RefusedError: 507, it cannot be written to, or less than `reserve` bytes are free.
        """
        with _writing():
            name, file = self.begin()
            try:
                file.write(b"room")
                file.close()  # when a remote store is sent it
            finally:
                self.discard(name, file)
            free = shutil.disk_usage(self._root).free if self._local else reserve
        if free < reserve:
            raise _storage_failed(OSError(0, f"{free} bytes left, of which {reserve} are kept back"))

    def local(self, sha256: str, cache: Path) -> Path:
        """A path on this machine with the content: the file itself, or a copy when the store is remote.

        Args:
            sha256: its hash.
            cache: folder of the copies, of which only those used last stay; the path is to be used at once.
        """
        if self._local:
            self.size(sha256)
            return Path(self.path(sha256))
        cache.mkdir(parents=True, exist_ok=True)
        copy = cache / sha256
        if not copy.exists():
            part = cache / f"{sha256}.{secrets.token_hex(4)}"
            try:
                with part.open("wb") as file:
                    for piece in self.read(sha256):
                        file.write(piece)
                part.replace(copy)
            finally:
                part.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # somebody else tidies up too
            copy.touch()
            held = sorted((each for each in cache.iterdir() if _SHA256.fullmatch(each.name)), key=_used)
            for old in held[:-CACHED]:
                old.unlink()
        return copy

    def begin(self) -> tuple[str, Any]:
        """Opens a new temporary file; for `Upload`."""
        name = f"{self._root}/tmp/{secrets.token_hex(16)}"
        with _writing():
            self._files.makedirs(f"{self._root}/tmp", exist_ok=True)
            return name, self._files.open(name, "wb")

    def finish(self, name: str, file: Any, sha256: str) -> None:
        """Makes a temporary file durable and gives it its place; for `Upload`."""
        final = self.path(sha256)
        folder = final.rsplit("/", 1)[0]
        if self._local:
            file.flush()
            os.fsync(file.fileno())
        file.close()
        self._files.makedirs(folder, exist_ok=True)
        if not self._local:
            if self._files.exists(final):
                self._files.rm_file(name)
            else:
                self._files.mv(name, final)
            return
        # Also where there is one of this hash already: it may be damaged, and this one is not.
        Path(name).replace(final)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def discard(self, name: str, file: Any) -> None:
        """Removes a temporary file; for `Upload`."""
        # A full disk refuses the last buffered bytes too, and a store that is away its removal: it is cleared later.
        with contextlib.suppress(Exception):
            file.close()
        with contextlib.suppress(Exception):
            if self._files.exists(name):
                self._files.rm_file(name)

    def clear_unfinished(self, older_than: float = ABANDONED_SECONDS) -> None:
        """Removes what uploads of earlier processes left half-written, called once at start.

        Args:
            older_than: seconds since a file was last written; another server's upload may be on its way.
        """
        folder, old = f"{self._root}/tmp", time.time() - older_than
        with contextlib.suppress(Exception):  # a store that is away is no reason not to start
            for name in self._files.ls(folder, detail=False) if self._files.exists(folder) else []:
                if self._files.modified(name).timestamp() <= old:
                    self._files.rm_file(name)


class Upload:
    """A file on its way in: hashed and counted as it comes. Made by `BlobStore.upload`."""

    def __init__(self, store: BlobStore, limit: int, expected: str | None, final: str | None) -> None:
        self._store, self._limit, self._expected, self._final = store, limit, expected, final
        self._name, self._file = store.begin()
        self._hash, self.size, self._open = hashlib.sha256(), 0, True

    def write(self, piece: bytes) -> None:
        """Takes the next bytes.

        Raises:
            RefusedError: 413, the file is larger than allowed; 507, the store is full.
        """
        self.size += len(piece)
        if self.size > self._limit:
            raise RefusedError(413, "too_large", "upload", expected=f"at most {self._limit} bytes",
                               got=f"more than {self._limit}", fix="send a smaller file")  # fmt: skip
        self._hash.update(piece)
        with _writing():
            self._file.write(piece)

    def commit(self) -> str:
        """Puts the file in its place and returns its hash.

        Raises:
            RefusedError: 422, the content is not what the sender announced; 507, the store is full.
        """
        sha256 = self._hash.hexdigest()
        if self._expected is not None and sha256 != self._expected:
            raise RefusedError(422, "hash_mismatch", "upload", expected=f"content with the SHA-256 {self._expected}",
                               got=f"{self.size} bytes with {sha256}",
                               fix="send the file again, it was damaged on the way")  # fmt: skip
        with _writing():
            self._store.finish(self._name, self._file, sha256)
        self._open = False
        return sha256

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._open = False
            self._store.discard(self._name, self._file)


def _pieces(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def _span(file: Any, start: int, stop: int, sha256: str) -> Iterator[bytes]:
    with file, _reading(sha256):
        file.seek(start)
        while start < stop:
            piece = file.read(min(PIECE, stop - start))
            if not piece:
                return
            start += len(piece)
            yield piece


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Every way in which a store can fail to take a file is one refusal; drivers of remote ones raise their own."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        raise _storage_failed(error) from error


@contextlib.contextmanager
def _reading(sha256: str) -> Iterator[None]:
    try:
        yield
    except RefusedError:
        raise
    except FileNotFoundError:
        raise unknown("blob", sha256, "upload it first with PUT /v1/blobs/SHA256") from None
    except Exception as error:
        raise RefusedError(503, "storage_away", "blob store", expected="an answer", got=_words(error),
                           fix="try again later; the operator must look at the store",
                           retry_after=30.0) from error  # fmt: skip


def _storage_failed(error: Exception) -> RefusedError:
    return RefusedError(507, "storage_failed", "blob store", expected="room for the file", got=_words(error),
                        fix="the operator must make room; the trial waits meanwhile")  # fmt: skip


def _used(path: Path) -> float:
    return path.stat().st_mtime


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The first and the last-but-one byte that a `Range` header asks for, or None for the whole file.

    Raises:
        RefusedError: 416, the range lies outside the file.

    Example:
        >>> parse_range("bytes=2-", 10), parse_range("bytes=-3", 10), parse_range("bytes=0-4", 10)
        ((2, 10), (7, 10), (0, 5))
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (header or "").strip())
    if match is None or not (match[1] or match[2]):
        return None
    if match[1]:
        start, stop = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
    else:
        start, stop = max(0, size - int(match[2])), size
    if start >= stop:
        raise RefusedError(416, "bad_range", "Range header", expected=f"a range within {size} bytes", got=repr(header),
                           fix="ask for an existing range")  # fmt: skip
    return start, stop
