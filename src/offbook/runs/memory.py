"""How much memory a process takes at its peak."""

from __future__ import annotations

import ctypes
from pathlib import Path

_CURRENT_FUTURE_ON_FAULT = 7

GIVE_BACK = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment of a process that gives freed memory back at once, so that its peak is what it held and not what it once
held."""


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


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
