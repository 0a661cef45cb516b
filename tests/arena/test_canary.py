"""Files that would run code, grow without end or land elsewhere, if anybody opened them: none of it happens."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_routes import lease, put, report, submit

pytestmark = [pytest.mark.service, pytest.mark.faults]


class Canary:
    """Its pickle writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path, str]]:
        return Path.write_text, (self.path, "it sang")


def archive(kind: str, path: Path) -> bytes:
    """An archive with a member that climbs out of its folder, one that is a link, and one that unpacks to 64 MiB."""
    buffer, climbing = io.BytesIO(), "../" * 20 + str(path).lstrip("/")
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(climbing, "it sang")
            file.writestr("bomb", b"\0" * 64 * 2**20)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as file:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(link)
            member = tarfile.TarInfo(climbing)
            member.size = 7
            file.addfile(member, io.BytesIO(b"it sang"))
    return buffer.getvalue()


def header(text: bytes, rest: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + rest


def saved(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def numpy_object(thing: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([thing], dtype=object), allow_pickle=True)
    return buffer.getvalue()


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "a pickle": lambda path: pickle.dumps(Canary(path)),
    "a pickle of protocol 2": lambda path: pickle.dumps(Canary(path), protocol=2),
    "what torch.save writes": lambda path: saved(Canary(path)),
    "an array of objects": lambda path: numpy_object(Canary(path)),
    "a zip that climbs and explodes": lambda path: archive("zip", path),
    "a tar with a link": lambda path: archive("tar", path),
    "a pickle behind a sound beginning": lambda path: header(b"{}", pickle.dumps(Canary(path))),
    "a header of 90 MB": lambda path: (90_000_000).to_bytes(8, "little") + b"{" + b" " * 1000,
    "a tensor of 2^47 numbers": lambda path: header(
        b'{"w":{"dtype":"F32","shape":[8388608,16777216],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "the same name twice": lambda path: header(
        b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_is_refused_with_a_reason_and_runs_nothing(client, tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    content = HOSTILE[kind](canary)
    answer = put(client, "ada", content)
    if answer.status_code == 201:
        body = {"benchmark": "reach", "name": "mine", "kind": "checkpoint", "blob": answer.json()["sha256"]}
        answer = client.ask("POST", "/v1/submissions", "ada", json=body)
    assert 400 <= answer.status_code < 500
    assert len(answer.json()["detail"]) > 20
    assert not canary.exists()
    store = tmp_path / "blobs" / "sha256"
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and store not in path.parents]
    assert all(path.suffix in (".db", ".db-wal", ".db-shm") for path in outside), outside
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["../../canary", "/etc/passwd", "a/b", "..", ".hidden", "a\0b", "x" * 200])
def test_a_name_of_a_recording_never_becomes_a_path(client, name: str) -> None:
    submit(client, "admin", kind="anchor", anchor="expert", trials=1)
    given = lease(client)
    report(client, given, "start")
    film = put(client, "lab", b"\0\0\0\x18ftypmp42", "video/mp4").json()["sha256"]
    file = {"name": name, "sha256": film, "media_type": "video/mp4", "size": 12}
    answer = report(client, given, "result", score=1.0, steps=1, files=[file])
    assert (answer.status_code, answer.json()["error"]) == (422, "invalid_request")


def test_a_recording_that_is_a_pickle_is_kept_and_handed_out_and_never_opened(client, tmp_path: Path) -> None:
    submit(client, "admin", kind="anchor", anchor="expert", trials=1)
    given = lease(client)
    report(client, given, "start")
    content = pickle.dumps(Canary(tmp_path / "canary"))
    files = []
    for name, kind in (("manifest.json", "application/json"), ("episode.parquet", "application/vnd.apache.parquet")):
        sha256 = put(client, "lab", content, kind).json()["sha256"]
        files.append({"name": name, "sha256": sha256, "media_type": kind, "size": len(content)})
    assert report(client, given, "result", score=1.0, steps=1, files=files).status_code == 200
    assert client.ask("GET", f"/runs/{given['trial']}").status_code == 200
    assert client.ask("GET", f"/v1/blobs/{files[0]['sha256']}").content == content
    assert not (tmp_path / "canary").exists()
