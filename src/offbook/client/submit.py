"""Talking to an arena over HTTP: submitting policies, uploading checkpoints, watching what becomes of them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from offbook.client.addresses import split_address
from offbook.errors import ConfigError, SubmissionError

_CHUNK = 2**20
FINISHED = frozenset({"done", "cancelled"})


class ArenaRefusalError(SubmissionError):
    """What an arena refused; `status` is that of its HTTP answer, 0 where it is not known."""

    def __init__(self, where: str, *, expected: str, got: str, fix: str, status: int = 0) -> None:
        super().__init__(where, expected=expected, got=got, fix=fix)
        self.status = status


class ArenaClient:
    """A user's side of an arena's HTTP interface; every refusal is one sentence.

    Args:
        url: address of the arena, such as `http://127.0.0.1:8000`.
        token: bearer token; it travels in the Authorization header only, and redirects are not followed.
        timeout_s: longest wait for the arena to begin or go on with an answer.

    Example:
        >>> with ArenaClient("http://127.0.0.1:9", "ob_a_b") as arena:
        ...     arena.leaderboard("pour")
        Traceback (most recent call last):
        offbook.errors.SubmissionError: arena at http://127.0.0.1:9: expected an answer, got ConnectError ...
    """

    def __init__(self, url: str, token: str = "", *, timeout_s: float = 30.0) -> None:
        parts = split_address(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            fix = "pass the address that the arena printed when it started"
            raise ConfigError("arena address", expected="http(s)://HOST[:PORT]", got=repr(url.split("@")[-1]), fix=fix)
        loopback = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self.url, self.token = url.rstrip("/"), token
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 5.0)),
            trust_env=not loopback,  # a proxy of the environment cannot reach this machine's own arena
        )

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def benchmarks(self) -> list[dict[str, Any]]:
        """The benchmarks that this arena runs."""
        return list(self.request("GET", "/v1/benchmarks")["benchmarks"])

    def submit(
        self,
        benchmark: str,
        name: str,
        *,
        checkpoint: Path | str | None = None,
        anchor: str | None = None,
        split: str | None = None,
        trials: int | None = None,
        method: str = "",
        imitates: str = "",
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Submits a policy: a checkpoint that the arena runs, an anchor, or else a remote policy that will dial in.

        Args:
            benchmark: name of the benchmark.
            name: label on the leaderboard.
            checkpoint: safetensors file written by training; it is uploaded first, streamed.
            anchor: `expert` or `random`, the benchmark's own; wants the scope admin.
            split: scenes to be played; the benchmark's own default when None.
            trials: only the first so many scenes.
            method: how the policy was made, in a few words.
            imitates: whose behaviour it learned, in a few words.
            progress: called with bytes uploaded and bytes in all.

        Returns:
            The submission as the arena shows it, with its `id`.

        Raises:
            SubmissionError: the arena refuses or cannot be reached.
        """
        record: dict[str, Any] = {"benchmark": benchmark, "name": name, "method": method, "imitates": imitates}
        record |= {key: value for key, value in (("split", split), ("trials", trials)) if value is not None}
        record |= self.policy(checkpoint=checkpoint, anchor=anchor, progress=progress)
        return self.request("POST", "/v1/submissions", json=record)

    def submit_pair(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Submits two policies that are compared: on each scene one runs right after the other, in an order by lot.

        Args:
            first: `benchmark`, `name` and what `policy` returns; `split`, `trials` and so on as in `submit`.
            second: the same of the other; benchmark, split and number of trials must agree.

        Returns:
            Both submissions as the arena shows them.

        Raises:
            SubmissionError: the arena refuses or cannot be reached.
        """
        return list(self.request("POST", "/v1/pairs", json={"entries": [dict(first), dict(second)]})["entries"])

    def policy(
        self,
        *,
        checkpoint: Path | str | None = None,
        anchor: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """The part of a submission that says which policy it is; a checkpoint is uploaded."""
        if anchor is not None:
            return {"kind": "anchor", "anchor": anchor}
        if checkpoint is not None:
            return {"kind": "checkpoint", "blob": self.upload(checkpoint, progress)}
        return {"kind": "remote"}

    def upload(self, path: Path | str, progress: Callable[[int, int], None] | None = None) -> str:
        """Streams a file to the arena's store and returns its sha256; memory use does not grow with its size.

        Args:
            path: the file.
            progress: called with bytes sent and bytes in all.

        Raises:
            SubmissionError: the file cannot be read, or the arena refuses it.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = path.stat().st_size
        except OSError as error:
            fix = "pass the .safetensors file of a checkpoint"
            raise SubmissionError(str(path), expected="a readable file", got=str(error.strerror), fix=fix) from error

        def pieces() -> Iterator[bytes]:
            sent = 0
            with path.open("rb") as file:
                while piece := file.read(_CHUNK):
                    yield piece
                    sent += len(piece)
                    if progress is not None:
                        progress(sent, size)

        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        self.request("PUT", f"/v1/blobs/{digest}", content=pieces(), headers=headers)
        return digest

    def status(self, submission: str) -> dict[str, Any]:
        """A submission with its state and trials."""
        return self.request("GET", f"/v1/submissions/{quote(submission, safe='')}")

    def cancel(self, submission: str) -> dict[str, Any]:
        """Withdraws a submission; trials that run are finished, waiting ones are not begun."""
        return self.request("POST", f"/v1/submissions/{quote(submission, safe='')}/cancel")

    def leaderboard(self, benchmark: str, split: str | None = None) -> dict[str, Any]:
        """A benchmark's leaderboard, all splits or one."""
        params = {} if split is None else {"split": split}
        return self.request("GET", f"/v1/leaderboard/{quote(benchmark, safe='')}", params=params)

    def wait(
        self,
        submission: str,
        *,
        timeout_s: float = 600.0,
        every_s: float = 1.0,
        progress: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Waits until a submission is finished, whatever the outcome.

        Args:
            submission: its id.
            timeout_s: give up after this long.
            every_s: seconds between questions.
            progress: called with each answer.

        Raises:
            SubmissionError: it is not finished in time, or the arena cannot be reached.
        """
        end = time.monotonic() + timeout_s
        while True:
            record = self.status(submission)
            if progress is not None:
                progress(record)
            if record["state"] in FINISHED:
                return record
            if time.monotonic() + every_s > end:
                where, expected = f"submission {submission}", f"a result within {timeout_s:g} s"
                fix = "wait longer; a remote policy must be connected and a worker must run"
                raise SubmissionError(where, expected=expected, got=f"state {record['state']!r}", fix=fix)
            time.sleep(every_s)

    def request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """One request and its JSON answer.

        Raises:
            SubmissionError: no answer, a refusal, or something else than JSON.
        """
        status, record = self.ask(method, path, **options)
        if 200 <= status < 300 and record is not None:
            return record
        raise self.refusal(method, path, status, record)

    def ask(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any] | None]:
        """Status and JSON object of one answer, for who tells refusals apart by their status; None for other content.

        Args:
            method: of HTTP.
            path: such as `/v1/leases`.
            options: as `httpx.Client.request` takes them: `json`, `params`, `content`, `headers`, `timeout`.

        Raises:
            SubmissionError: no answer.
        """
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise self._silent(error) from error
        return response.status_code, _record(response)

    def download(self, sha256: str, path: Path) -> None:
        """Streams a file of the arena's store to a path, where it appears when it is whole.

        Raises:
            SubmissionError: no answer, a refusal, or other content than was asked for.
        """
        part, digest, url = path.with_name(f"{path.name}.part"), hashlib.sha256(), f"/v1/blobs/{sha256}"
        try:
            with self._http.stream("GET", url) as answer, part.open("wb") as file:
                if not answer.is_success:
                    answer.read()
                    raise self.refusal("GET", url, answer.status_code, _record(answer))
                for piece in answer.iter_bytes():
                    file.write(piece)
                    digest.update(piece)
            if digest.hexdigest() != sha256:
                got = f"one of sha256 {digest.hexdigest()}"
                raise SubmissionError(
                    f"arena at {self.url}", expected=f"file {sha256}", got=got, fix="ask for it again"
                )
            part.replace(path)
        except httpx.HTTPError as error:
            raise self._silent(error) from error
        finally:
            part.unlink(missing_ok=True)

    def _silent(self, error: httpx.HTTPError) -> SubmissionError:
        fix = "start one with: offbook arena serve" if isinstance(error, httpx.ConnectError) else "try again"
        got = f"{type(error).__name__} ({error})"
        return SubmissionError(f"arena at {self.url}", expected="an answer", got=got, fix=fix)

    def refusal(self, method: str, path: str, status: int, record: Mapping[str, Any] | None) -> ArenaRefusalError:
        """The arena's `{ok, error, detail, hint, status}` as one sentence."""
        where = f"arena at {self.url}, {method} {path}"
        if record is None or "error" not in record:
            got = f"HTTP status {status} without the arena's own JSON"
            expected, fix = "an arena's answer", "check the address"
            return ArenaRefusalError(where, expected=expected, got=got, fix=fix, status=status)
        got = ": ".join(str(part).rstrip(".") for part in (record["error"], record.get("detail")) if part)
        fix = str(record.get("hint") or "correct the request").rstrip(".")
        got = f"{got} (status {status})"
        return ArenaRefusalError(where, expected="to be accepted", got=got, fix=fix, status=status)


def kept_promise(entry: Mapping[str, Any]) -> bool | None:
    """Whether the order that was drawn for a submission's trials is the one whose hash was shown before the first ran.

    When each trial really ran is told by its attempts, which are not looked at here.

    Args:
        entry: a submission as the arena shows it.

    Returns:
        None as long as the order is not told, which is until all trials have ended.

    Example:
        >>> order = {"order": [1, 0], "nonce": "00"}
        >>> promise = hashlib.sha256(b'[[1,0],"00"]').hexdigest()
        >>> [kept_promise({"commitment": promise, "opened": opened}) for opened in (order, None)]
        [True, None]
    """
    opened = entry.get("opened")
    if not opened:
        return None
    content = json.dumps([opened["order"], opened["nonce"]], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest() == str(entry["commitment"])


def _record(response: httpx.Response) -> dict[str, Any] | None:
    """The JSON object of an answer; None for other content."""
    try:
        record = response.json() if response.content else {}
    except ValueError:
        record = None
    return record if isinstance(record, dict) else None
