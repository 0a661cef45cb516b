"""Processes of the command line beside this one."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from offbook.errors import OffbookError

PATIENCE_S = 300.0


class Children:
    """Commands in processes of their own; each writes its own log and is stopped with the stack.

    Args:
        logs: folder for the logs.
        stack: at whose end they are stopped.
    """

    def __init__(self, logs: Path, stack: ExitStack) -> None:
        self._logs, self._stack = logs, stack
        self._running: dict[Path, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, line: str) -> None:
        """Shows a command and runs it."""
        print(f"$ offbook {line} &", file=sys.stderr, flush=True)
        log = self._logs / f"{name}.log"
        with log.open("wb") as file:
            words = [sys.executable, "-m", "offbook.cli.main", *shlex.split(line)]
            child = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        self._running[log] = child
        self._stack.callback(_stop, child)

    def check(self, since: float, awaited: str, got: str) -> None:
        """Waits half a second for something that has not come yet.

        Args:
            since: `time.monotonic()` when something like it came last.
            awaited: what it is.
            got: what is there instead.

        Raises:
            OffbookError: a process has failed, with the last line that it wrote; or five minutes have gone by.
        """
        fix = "mend the cause, and run this again: it goes on where it was"
        for log, child in self._running.items():
            if child.poll():
                said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
                where, got = f"process {log.stem!r}", f"exit code {child.returncode}: {said[-1]}"
                raise OffbookError(where, expected="that it runs until the end", got=got, fix=f"read {log}, {fix}")
        if time.monotonic() - since > PATIENCE_S:
            expected, fix = f"{awaited} within {PATIENCE_S:g} s", f"read the logs in {self._logs}, {fix}"
            raise OffbookError("waiting", expected=expected, got=got, fix=fix)
        time.sleep(0.5)


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(15)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
