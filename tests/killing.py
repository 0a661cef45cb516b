"""Children that record until they are killed, at random moments; all from one process with everything imported."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LEARNING = """
import sys
from importlib import import_module
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from offbook.data.store import EpisodeStore
from offbook.runs.directory import RunDirectory
import accelerate

folder, tests, log = Path(sys.argv[1]), import_module(sys.argv[2]), RunDirectory.log

def told(self, step, **metrics):
    log(self, step, **metrics)
    announce(step)

RunDirectory.log = told

def begin():
    tests.learn(EpisodeStore.open(folder / "store"), folder / "cut" / "run")
"""
"""A script for `killed`: `learn(store, path)` of a module of tests, on the store in a folder, announcing its steps."""

SERVER = """
import os, sys

def announce(number):
    # In one piece, so that no kill cuts it.
    os.write(1, b"%d\\n" % number)

for line in sys.stdin:
    if not (child := os.fork()):
        print("child", os.getpid(), flush=True)
        try:
            begin()
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def killed(script: str, *arguments: str, times: int = 20, seed: int = 0) -> Iterator[list[int]]:
    """Starts children one after another and kills each.

    Args:
        script: defines `begin()`, which goes on for ever and calls `announce(number)` for each finished episode.
        arguments: for the script, in `sys.argv`.
        times: how many children.
        seed: of the moments: after up to four episodes and up to 30 ms.

    Yields:
        After each kill, what the child had announced.
    """
    chance = random.Random(seed)
    command = [sys.executable, "-c", script + SERVER, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        for _ in range(times):
            server.stdin.write("\n")
            server.stdin.flush()
            child = int(server.stdout.readline().removeprefix("child "))
            printed = [int(server.stdout.readline()) for _ in range(chance.randrange(5))]
            time.sleep(chance.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            yield printed + [int(line) for line in iter(server.stdout.readline, "dead\n")]


def check_training(learn: Callable[[Any, Path], object], store: Any, folder: Path, steps: int, times: int) -> None:
    """Trains once as a whole, and once killed and gone on with: both end with the same bytes.

    Args:
        learn: a function of a module of tests, also the child's.
        store: of the recordings, in `folder / "store"`.
        folder: where the runs go.
        steps: of the training; it must not be through before the last kill.
        times: how many kills.
    """
    learn(store, folder / "whole" / "run")
    tests = Path(sys.modules[learn.__module__].__file__)
    children = killed(LEARNING, str(folder), tests.stem, str(tests.parent), str(Path(__file__).parent), times=times)
    assert 0 < max(max(told, default=0) for told in children) < steps
    learn(store, folder / "cut" / "run")
    for file in ("metrics.jsonl", "checkpoints/last.safetensors", "checkpoints/training.safetensors"):
        whole, cut = ((folder / name / "run" / file).read_bytes() for name in ("whole", "cut"))
        assert whole == cut, file
