"""Strangers' checkpoints in a jail: no network, no files but their own, few processes of bounded size; by bubblewrap.

A checkpoint is only numbers, and it is checked before it is loaded; the jail is for what is wrong in the checks, or in
the libraries behind them. It is off unless the operator turns it on, and it must prove itself first: `prove` lets a
process inside try to reach a socket, a file and more memory outside, and whoever asks for a sandbox that holds nothing
is told so instead of being given one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import offbook
from offbook.arena.jail import read_frame, write_frame
from offbook.client import wire
from offbook.client.protocol import Observation, PolicyMeta, check_chunk
from offbook.errors import CheckpointError, ConfigError, PolicyError, RobotError

MEMORY = 8 * 2**30
"""Bytes of address space of the process inside: the libraries alone map some of them."""

SCRATCH_BYTES = 64 * 2**20
"""What `/tmp` inside holds, all files together; nothing else inside can be written to."""

START_SECONDS, ANSWER_SECONDS, PROBE_SECONDS = 120.0, 10.0, 60.0
_CHECKPOINT = "/checkpoint.safetensors"


def _command(*words: str, bind: tuple[Path, str] | None = None) -> list[str]:
    """Bubblewrap with the interpreter, its packages and the libraries of the system, all of them read-only."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise ConfigError("sandbox", expected="bubblewrap (bwrap)", got="none on this machine",
                          fix="install the system package bubblewrap, or do without --sandbox")  # fmt: skip
    command = [bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    command += ["--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--clearenv", "--hostname", "sandbox"]
    # A remount reaches one mount and none below it, and /dev is a tmpfs of its own with /dev/shm in it.
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--chdir", "/tmp"]
    command += ["--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp"]
    for name in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache"):
        path = Path(name)
        if path.is_symlink():
            command += ["--symlink", str(path.readlink()), name]
        elif path.exists():
            command += ["--ro-bind", name, name]
    # Not all of sys.path: a script's own folder is on it, and may be any.
    kept = (sysconfig.get_path(name) for name in ("purelib", "platlib"))
    packages = list(dict.fromkeys([Path(offbook.__file__).parents[1], *map(Path, kept)]))
    for path in dict.fromkeys([Path(sys.base_prefix), Path(sys.prefix), *packages]):
        command += ["--ro-bind", str(path), str(path)]
    if bind is not None:
        command += ["--ro-bind", str(bind[0].resolve()), bind[1]]
    command += ["--remount-ro", "/"]
    told = {"PYTHONPATH": os.pathsep.join(map(str, packages)), "HOME": "/tmp", "OMP_NUM_THREADS": "1"}
    for name, value in told.items():
        command += ["--setenv", name, value]
    return [*command, sys.executable, "-m", "offbook.arena.jail", *words]


def prove(memory: int = MEMORY) -> None:
    """Starts a sandbox and lets it try to get out.

    Raises:
        ConfigError: there is no bubblewrap, it cannot start here, or something got out.
    """
    with (
        tempfile.TemporaryDirectory(prefix="offbook-sandbox-") as folder,
        socket.create_server(("127.0.0.1", 0)) as door,
    ):
        secret = Path(folder) / "secret"
        secret.write_text(secrets.token_hex(8))
        command = _command("probe", str(secret), str(door.getsockname()[1]), str(memory))
        told = os.environ | {"OFFBOOK_TOKEN": os.environ.get("OFFBOOK_TOKEN", "probe")}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=told, check=False)
            got = json.loads(done.stdout or "{}")
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise _does_not_work(f"{type(error).__name__}: {error}") from error
        written = (Path(folder) / "written").exists()
    if done.returncode != 0 or set(got) != {"network", "secret", "write", "memory", "environment"}:
        raise _does_not_work(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no answer")
    escaped = [name for name, reached in got.items() if reached] + ["a file outside"] * written
    if escaped:
        raise _does_not_work(f"one that lets out: {', '.join(escaped)}")


def _does_not_work(got: str) -> ConfigError:
    return ConfigError("sandbox", expected="one that holds", got=got[:300],
                       fix="let this user make namespaces, or do without the sandbox")  # fmt: skip


class SandboxedPolicy:
    """A checkpoint that is loaded and asked in a sandbox; an ordinary `Policy` of one session.

    Args:
        path: the checkpoint.
        max_bytes: larger ones are refused.
        memory: bytes of address space that it may use.

    Raises:
        CheckpointError: what `load_policy` says of it inside, or it died in loading.
        ConfigError: there is no bubblewrap.
    """

    def __init__(self, path: Path, *, max_bytes: int = 2**31, memory: int = MEMORY) -> None:
        command = _command("serve", _CHECKPOINT, str(max_bytes), str(memory), bind=(path, _CHECKPOINT))
        self._where = f"{path.name} in the sandbox"
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._seq = 0
        try:
            answer = self._read(time.monotonic() + START_SECONDS, frozenset({"ready", "error"}))
        except PolicyError as error:
            self.close()
            raise CheckpointError(self._where, expected="a policy that can be loaded", got=error.got,
                                  fix="save a smaller policy") from error  # fmt: skip
        try:
            if answer["type"] == "error":
                expected, got, fix = (str(part) for part in json.loads(answer["message"]))
                raise CheckpointError(str(path), expected=expected, got=got, fix=fix)
            self.meta: PolicyMeta = PolicyMeta.from_json(answer["meta"])
        except CheckpointError:
            self.close()
            raise
        except (ValueError, TypeError, KeyError, ConfigError) as error:
            self.close()
            raise CheckpointError(self._where, expected="a policy's description, or why there is none",
                                  got=f"{type(error).__name__}: {error}"[:200],
                                  fix="save the policy again") from error  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether its process still runs; one that did not answer in time is ended."""
        return self._process.poll() is None

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Begins an episode; exactly one session."""
        self._ask(wire.reset(sessions[0], prompts[0]), "end")

    def infer(self, observation: Observation) -> NDArray[np.float32]:
        """The chunk of actions for one observation (B = 1), shape (1, N, A)."""
        self._seq += 1
        message = wire.obs(
            observation.sessions[0], self._seq, observation, deadline_ms=1000 * ANSWER_SECONDS, images="raw"
        )
        chunk: NDArray[np.float32] = self._ask(message, "act")["chunk"]
        return check_chunk(chunk[None], 1, self.meta, finite=False)

    def close(self) -> None:
        """Ends the process; safe to call twice."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _ask(self, message: dict[str, Any], wanted: str) -> dict[str, Any]:
        try:
            write_frame(self._process.stdin, message)  # type: ignore[arg-type]  # it has a pipe
        except OSError as error:
            raise RobotError(self._where, expected="a process that reads", got="one that ended",
                             fix="see whether the machine is short of memory") from error  # fmt: skip
        answer = self._read(time.monotonic() + ANSWER_SECONDS, frozenset({wanted, "error"}))
        if answer["type"] == "error":
            raise PolicyError(
                self._where, expected="an answer", got=answer["message"], fix="see the policy's own tests"
            )
        return answer

    def _read(self, until: float, allowed: frozenset[str]) -> dict[str, Any]:
        """The next answer, whose bytes come from the stranger's side: they are checked like any other frame."""
        stdout = self._process.stdout
        stream = _Bounded(stdout.fileno() if stdout is not None else -1, until)
        try:
            return wire.decode(read_frame(stream), wire.RAW_FRAME_LIMIT, allowed=allowed)  # type: ignore[arg-type]
        except (EOFError, TimeoutError, wire.WireError) as error:
            self._process.kill()
            got = {EOFError: "a process that ended", TimeoutError: "no answer in time"}.get(type(error), str(error))
            raise PolicyError(
                self._where, expected="an answer", got=got, fix="save a smaller or faster policy"
            ) from error


class _Bounded:
    """Reads whole pieces from a pipe until a moment on the monotonic clock."""

    def __init__(self, pipe: int, until: float) -> None:
        self._pipe, self._until = pipe, until

    def read(self, size: int) -> bytes:
        content = b""
        while len(content) < size:
            if not select.select([self._pipe], [], [], max(0.0, self._until - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(self._pipe, size - len(content))
            if not piece:
                break
            content += piece
        return content
