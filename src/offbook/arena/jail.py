"""What runs inside the sandbox: one stranger's checkpoint, asked over two pipes; see `sandbox`.

Frames of `client.wire`, each behind its length in four bytes: `ready` or `error` first, then an answer to each `reset`
and each `obs`. Limits on memory, files and processes are taken before anything of the stranger's is read, and cannot be
given back.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
from pathlib import Path
from typing import IO, Any

from offbook.client import wire
from offbook.errors import OffbookError

FILE_BYTES = 16 * 2**20
PROCESSES = 8
"""Threads count too: the libraries start one beside the policy's own."""
OPEN_FILES = 64


def take_limits(memory: int) -> None:
    """Bounds address space, the size and number of open files, core dumps and the number of threads, for good."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: PROCESSES,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def read_frame(stream: IO[bytes]) -> bytes:
    """The next frame.

    Raises:
        EOFError: the other side has gone.
    """
    head = stream.read(4)
    size = int.from_bytes(head, "big")
    frame = stream.read(size) if len(head) == 4 and size <= wire.RAW_FRAME_LIMIT else b""
    if not frame or len(frame) < size:
        raise EOFError
    return frame


def write_frame(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Sends a message."""
    frame = wire.encode(message, wire.RAW_FRAME_LIMIT)
    stream.write(len(frame).to_bytes(4, "big") + frame)
    stream.flush()


def _serve(checkpoint: Path, max_bytes: int) -> None:
    from offbook.learning.policies import load_policy

    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints shall not break the frames
    try:
        policy = load_policy(checkpoint, max_bytes=max_bytes)
    except OffbookError as error:
        # In parts, so that the arena can say them as if it had looked itself.
        parts = json.dumps([error.expected[:90], error.got[:120], error.fix[:120]], ensure_ascii=False)
        write_frame(answers, wire.error("bad_checkpoint", parts))
        return
    write_frame(answers, wire.ready("raw", policy.meta))
    with contextlib.suppress(EOFError):
        while True:
            message = wire.decode(read_frame(asked), wire.RAW_FRAME_LIMIT, allowed=frozenset({"reset", "obs"}))
            session = message["session"]
            try:
                if message["type"] == "reset":
                    policy.reset([session], [message["prompt"]])
                    answer = wire.end(session, "reset")
                else:
                    chunk = policy.infer(wire.read_observation(message, policy.meta))
                    answer = wire.act(session, message["seq"], chunk[0])
            except Exception as error:  # a stranger's policy: its failure is an answer
                answer = wire.error("policy_error", f"{type(error).__name__}: {error}".splitlines()[0], session)
            write_frame(answers, answer)


def _probe(secret: str, port: int, memory: int) -> None:
    """Tries what must not work, and says what did; see `sandbox.prove`."""
    done = {"network": False, "secret": False, "write": False, "memory": False, "environment": False}
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        done["network"] = True
    with contextlib.suppress(OSError):
        done["secret"] = bool(Path(secret).read_bytes())
    with contextlib.suppress(OSError):
        Path(secret).with_name("written").write_bytes(b"x")
        done["write"] = True
    # Where a leak would do harm it is only asked for.
    places = ("/", "/dev", "/dev/shm", sys.prefix, Path(__file__).parent)
    done["write"] |= any(os.access(place, os.W_OK) for place in places)
    with contextlib.suppress(MemoryError):
        done["memory"] = bool(len(bytearray(memory + 2**20)))
    done["environment"] = any(name.startswith("OFFBOOK_") for name in os.environ)
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    take_limits(int(words[-1]))
    if what == "probe":
        _probe(words[0], int(words[1]), int(words[2]))
    else:
        _serve(Path(words[0]), int(words[1]))
