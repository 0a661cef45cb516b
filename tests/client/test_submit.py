"""The HTTP side of a user, against a tiny arena on loopback."""

import hashlib
import json
import resource
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from offbook.client.submit import ArenaClient
from offbook.errors import ConfigError, SubmissionError


class TinyArena:
    """Answers `(method, path)` with what `answers` says; remembers every request."""

    def __init__(self):
        self.answers = {}
        self.requests = []
        tiny = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self):
                hasher, left = hashlib.sha256(), int(self.headers.get("Content-Length", 0))
                start = b""
                while left:
                    piece = self.rfile.read(min(left, 2**16))
                    hasher.update(piece)
                    start, left = start or piece, left - len(piece)
                tiny.requests.append(
                    {
                        "method": self.command,
                        "path": self.path,
                        "headers": dict(self.headers),
                        "body": start,
                        "sha256": hasher.hexdigest(),
                    }
                )
                answers = tiny.answers.get((self.command, self.path), [(404, {"ok": False, "error": "not found"})])
                status, body = answers.pop(0) if len(answers) > 1 else answers[0]
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if status in (301, 302):
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = answer  # noqa: N815 - names of the standard library

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def tiny():
    arena = TinyArena()
    yield arena
    arena.close()


@pytest.fixture
def client(tiny):
    with ArenaClient(tiny.url, "ob_user_secret") as client:
        yield client


def test_a_remote_policy_is_submitted_with_the_token_in_the_header_only(tiny, client):
    tiny.answers["POST", "/v1/submissions"] = [(201, {"id": "s1", "state": "waiting"})]
    assert client.submit("pour", "mine", method="BC")["id"] == "s1"
    (request,) = tiny.requests
    record = {"benchmark": "pour", "name": "mine", "method": "BC", "imitates": "", "kind": "remote"}
    assert json.loads(request["body"]) == record
    assert request["headers"]["Authorization"] == "Bearer ob_user_secret"
    assert "secret" not in request["path"]


def test_a_checkpoint_is_streamed_under_its_digest_and_then_submitted(tiny, client, tmp_path):
    path = tmp_path / "policy.safetensors"
    path.write_bytes(b"weights" * 500_000)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    tiny.answers["PUT", f"/v1/blobs/{digest}"] = [(201, {"sha256": digest})]
    tiny.answers["POST", "/v1/submissions"] = [(201, {"id": "s2"})]
    client.submit("pour", "mine", checkpoint=path, split="seen")
    upload, submission = tiny.requests
    assert upload["sha256"] == digest
    assert int(upload["headers"]["Content-Length"]) == path.stat().st_size
    assert "Transfer-Encoding" not in upload["headers"]
    assert json.loads(submission["body"]) == {
        "benchmark": "pour",
        "name": "mine",
        "method": "",
        "imitates": "",
        "kind": "checkpoint",
        "blob": digest,
        "split": "seen",
    }


def test_an_upload_does_not_grow_memory_and_reports_progress(tiny, client, tmp_path):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(96 * 2**20)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    tiny.answers["PUT", f"/v1/blobs/{digest}"] = [(200, {})]
    sent = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert client.upload(path, progress=lambda now, of: sent.append((now, of))) == digest
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024
    assert sent[-1] == (96 * 2**20, 96 * 2**20)
    assert len(sent) == 96


def test_an_anchor_goes_without_a_file(tiny, client):
    tiny.answers["POST", "/v1/submissions"] = [(201, {"id": "s3"})]
    client.submit("pour", "best", anchor="expert", imitates="nobody", trials=4)
    record = json.loads(tiny.requests[0]["body"])
    assert (record["kind"], record["anchor"], record["imitates"], record["trials"]) == ("anchor", "expert", "nobody", 4)


def test_answers_are_handed_out_whatever_they_say(tiny, client):
    tiny.answers["POST", "/v1/leases"] = [(204, b""), (409, {"error": "stale"}), (502, b"<html>")]
    asked = [client.ask("POST", "/v1/leases", json={}) for _ in range(3)]
    assert asked == [(204, {}), (409, {"error": "stale"}), (502, None)]


def test_a_download_appears_when_it_is_whole_and_right(tiny, client, tmp_path):
    content = b"weights" * 300_000
    sha256 = hashlib.sha256(content).hexdigest()
    tiny.answers["GET", f"/v1/blobs/{sha256}"] = [(200, content[:-1]), (404, {"error": "gone"}), (200, content)]
    for words in ("expected file", "status 404"):
        with pytest.raises(SubmissionError, match=words):
            client.download(sha256, tmp_path / "policy.safetensors")
        assert list(tmp_path.iterdir()) == []
    client.download(sha256, tmp_path / "policy.safetensors")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("policy.safetensors", content)]


@pytest.mark.faults
def test_a_refusal_is_one_sentence_with_the_servers_hint(tiny, client):
    refusal = {
        "ok": False,
        "error": "quota reached",
        "detail": "40 of 40 trials are used today",
        "hint": "come back after midnight UTC",
        "status": 429,
    }
    tiny.answers["POST", "/v1/submissions"] = [(429, refusal)]
    with pytest.raises(SubmissionError) as caught:
        client.submit("pour", "mine")
    assert str(caught.value) == (
        f"arena at {tiny.url}, POST /v1/submissions: expected to be accepted, got quota reached: "
        "40 of 40 trials are used today (status 429); come back after midnight UTC."
    )


@pytest.mark.faults
@pytest.mark.parametrize(
    ("status", "body"), [(502, b"<html>Bad gateway</html>"), (200, b"<html>"), (200, [1]), (500, {"no": 1})]
)
def test_a_server_that_is_no_arena_is_named(tiny, client, status, body):
    tiny.answers["GET", "/v1/submissions/s1"] = [(status, body)]
    with pytest.raises(SubmissionError, match=rf"HTTP status {status} without the arena's own JSON; check the address"):
        client.status("s1")


@pytest.mark.faults
def test_redirects_are_not_followed_with_the_token(tiny, client):
    tiny.answers["GET", "/v1/submissions/s1"] = [(302, b"")]
    with pytest.raises(SubmissionError, match="status 302"):
        client.status("s1")


def test_ids_cannot_leave_their_path(tiny, client):
    with pytest.raises(SubmissionError):
        client.status("../tokens?x=1")
    assert tiny.requests[0]["path"] == "/v1/submissions/..%2Ftokens%3Fx%3D1"


def test_no_arena_says_how_to_start_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        ArenaClient(f"http://127.0.0.1:{port}") as client,
        pytest.raises(SubmissionError, match="offbook arena serve"),
    ):
        client.leaderboard("pour")


def test_waiting_ends_with_the_submission(tiny, client):
    states = ["waiting", "running", "done"]
    tiny.answers["GET", "/v1/submissions/s1"] = [(200, {"id": "s1", "state": state}) for state in states]
    seen = []
    record = client.wait("s1", every_s=0.01, progress=lambda record: seen.append(record["state"]))
    assert record["state"] == "done"
    assert seen == states


def test_waiting_has_an_end(tiny, client):
    tiny.answers["GET", "/v1/submissions/s1"] = [(200, {"state": "waiting"})]
    with pytest.raises(SubmissionError, match=r"within 0\.05 s, got state 'waiting'"):
        client.wait("s1", timeout_s=0.05, every_s=0.02)


def test_leaderboards_and_benchmarks(tiny, client):
    tiny.answers["GET", "/v1/benchmarks"] = [(200, {"benchmarks": [{"name": "pour"}]})]
    tiny.answers["GET", "/v1/leaderboard/pour?split=seen"] = [(200, {"rows": []})]
    assert client.benchmarks() == [{"name": "pour"}]
    assert client.leaderboard("pour", "seen") == {"rows": []}


def test_a_file_that_is_not_there_is_named(client, tmp_path):
    with pytest.raises(SubmissionError, match="No such file"):
        client.upload(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://user:hunter2@host"])
def test_bad_addresses_are_refused_without_showing_passwords(url):
    with pytest.raises(ConfigError, match="arena address") as caught:
        ArenaClient(url)
    assert "hunter2" not in str(caught.value)


def test_importing_the_client_is_light():
    import subprocess
    import sys

    code = (
        "import sys, offbook.client; "
        "print([m for m in ('numpy', 'websockets', 'httpx', 'msgpack', 'torch') if m in sys.modules]); "
        "offbook.client.ArenaClient, offbook.client.RemotePolicy, offbook.client.serve_policy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    import offbook.client

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = offbook.client.nothing
