"""Where a result came from: commit, package versions, machine."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_PACKAGES = ("numpy", "torch", "gymnasium", "mujoco", "pyarrow", "av", "transformers", "diffusers", "stable-baselines3")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The computer that a result was read on.

    Attributes:
        cpu: the processor's own name.
        cores: how many of its cores this process may use.
        device: `"cpu"`, or the name of the CUDA device.
        threads: how many threads numerical code used.
    """

    cpu: str
    cores: int
    device: str
    threads: int


def this_machine() -> Machine:
    """Describes this computer; asks torch only in a process that has loaded it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    device, threads = "cpu", int(os.environ.get("OMP_NUM_THREADS") or cores)
    if "torch" in sys.modules:
        import torch

        threads = torch.get_num_threads()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Machine(cpu=_cpu_name(), cores=cores, device=device, threads=threads)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions of Python, of offbook and of the packages that results depend on, where installed."""
    found = {"python": platform.python_version()}
    for name in ("offbook", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_rss_mb() -> float:
    """The largest resident memory that this process, or a finished child of it, has had, in units of 2**20 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(peaks) * unit / 2**20


def commit(folder: Path) -> str:
    """The full hash of the commit that a folder is checked out at; empty outside a repository."""
    return _git(folder, "rev-parse", "HEAD").strip()


def changed_files(folder: Path, beside: str = "") -> list[str]:
    """Tracked files that differ from the commit, and untracked ones that git does not ignore.

    Args:
        folder: any folder of the checkout.
        beside: a path relative to the checkout whose content does not count, such as `"results"`.
    """
    exclude = [f":(top,exclude){beside}"] if beside else []
    status = _git(folder, "status", "--porcelain", "--untracked-files=all", "--", ":/", *exclude)
    return [line[3:] for line in status.splitlines()]


def checkout_root(folder: Path) -> Path | None:
    """The top folder of the git checkout that a folder lies in, or None."""
    top = _git(folder, "rev-parse", "--show-toplevel").strip()
    return Path(top) if top else None


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""
