"""How much memory work takes at its peak, measured in a process of its own."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from offbook.errors import OffbookError
from offbook.runs.config import from_json, to_json

R = TypeVar("R")

_CURRENT_FUTURE_ON_FAULT = 7

GIVE_BACK = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment of a process that gives freed memory back at once, so that its peak is what it held and not what it once
held."""


def run_alone(module: str, given: object, kind: type[R], environment: Mapping[str, str], *, where: str) -> R:
    """What a module, run as a program, makes of a dataclass; both as JSON, one an argument and one on stdout.

    Args:
        module: whose `__main__` does the work.
        given: a dataclass.
        kind: dataclass of the result.
        environment: beside this process's.
        where: names the work in a message.

    Raises:
        OffbookError: the process did not come to its end, for lack of memory for instance.
    """
    command = [sys.executable, "-m", module, json.dumps(to_json(given))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OffbookError(where, expected="to come to its end", got=last, fix="measure something smaller")
    return from_json(kind, json.loads(done.stdout))


class Resident:
    """By how much this process grows at its peak, from now on. Linux only."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        # Pages that lie idle until the backward pass stay in memory, where a machine would put them aside; without the
        # right to ask for that, nothing happens.
        libc.mlockall(_CURRENT_FUTURE_ON_FAULT)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")

    def grown(self) -> int:
        """Bytes."""
        return _status("VmHWM") - self._before


def peak() -> int:
    """Bytes that were resident in this process at its peak.

    On Linux since its program began: what `getrusage` tells there counts the process that it was started from too.
    """
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
