"""`offbook demo`: the whole way of the data in one page. Each stop is a command that you could have typed."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from offbook.cli.access import TOKEN
from offbook.cli.children import Children
from offbook.cli.main import VERBS, call
from offbook.cli.report import Report
from offbook.client.submit import ArenaClient
from offbook.errors import SubmissionError
from offbook.runs.progress import track


def demo(*, out: Path = Path("demo"), episodes: int = 40, trials: int = 10, stay: bool = False) -> Report:
    """Records, trains, serves, submits, runs trials and ends on a leaderboard: the whole way, on this machine alone.

    Run again on the same folder it keeps the recordings and policies that are there and holds the trials anew.

    Args:
        out: folder for everything that it makes.
        episodes: how many to record.
        trials: how many for each policy.
        stay: leave the arena open at the end, to look around in a browser, until interrupted.

    Examples:
        offbook demo
        offbook demo --stay
    """
    began, home = time.monotonic(), shlex.quote(str(out))
    # Ended from outside, the processes beside this one shall end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    _say("Record a scripted expert in the pouring world")
    _do(f"data record offbook:pour --episodes {episodes} --jobs 2 --out {home}/recordings")

    _say("Learn from the recordings: by cloning, from the state and from pictures, and by masks, for many roles")
    _do(f"train bc --data {home}/recordings --resume --out {home}/bc-state")
    images = "--parts joints --cameras front --fit.steps 600"
    _do(f"train bc --data {home}/recordings {images} --resume --out {home}/bc-images")
    masks = "--success-only --model.dim 64 --fit.steps 1200 --fit.batch-size 64"
    _do(f"train mtm --data {home}/recordings {masks} --resume --out {home}/mtm")

    _say("Open an arena, and lend it two simulated robots")
    token = _do(f"arena init {home}/arena --benchmarks pour --trials {trials} --seed 0")["token"]
    with ExitStack() as stack:
        os.environ[TOKEN] = token  # for the commands below, in this process and beside it
        stack.callback(os.environ.pop, TOKEN, None)
        children = Children(out / "logs", stack)
        children.start("arena", f"arena serve {home}/arena --port {url.rpartition(':')[2]}")
        arena = stack.enter_context(ArenaClient(url))
        asked = time.monotonic()
        while not _answers(arena):
            children.check(asked, "an arena that answers", "no answer")
        for name in ("left", "right"):
            children.start(name, f"arena worker --robot pour --url {url} --name {name}")

        _say("Submit: the two anchors, a checkpoint, a role of another, and a policy that dials in")
        entries = [_do(f"arena submit {name} --url {url}") for name in ("expert", "random")]
        entries.append(_do(f"arena submit {home}/bc-state --name 'BC on state' --imitates expert --url {url}"))
        entries.append(_do(f"arena submit {home}/mtm:bc --name 'MTM as BC' --imitates expert --url {url}"))
        entries.append(_do(f"arena submit remote --name 'BC on images' --imitates expert --url {url}"))
        children.start("policy", f"policy serve {home}/bc-images --url {url} --submission {entries[-1]['id']}")

        _say(f"Blind trials, {trials} for each, all on the same scenes")
        ended = _ended_trials(arena, [entry["id"] for entry in entries], children)
        for _ in track(ended, "trials", trials * len(entries)):
            pass
        board = call("arena status", ["--benchmark", "pour", "--url", url])
        minutes = (time.monotonic() - began) / 60
        look = f"{url}/benchmarks/pour" if stay else f"offbook arena serve {home}/arena"
        text = f"{board.text}\n\nIn {minutes:.1f} minutes. Look at the trials and their videos: {look}"
        if stay:
            print(text, flush=True)
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
    return Report(text="" if stay else text, data={**board.data, "minutes": minutes})


def _say(text: str) -> None:
    print(f"\n-- {text}", file=sys.stderr, flush=True)


def _do(line: str) -> Mapping[str, Any]:
    """Shows a command, runs it here, and hands back its data."""
    print(f"$ offbook {line}", file=sys.stderr, flush=True)
    words = shlex.split(line)
    n = 2 if " ".join(words[:2]) in VERBS else 1
    return call(" ".join(words[:n]), words[n:]).data


def _answers(arena: ArenaClient) -> bool:
    with suppress(SubmissionError):
        return bool(arena.benchmarks())
    return False


def _ended_trials(arena: ArenaClient, submissions: list[str], children: Children) -> Iterator[None]:
    """Something for each trial that has ended, until all have."""
    seen, since = 0, time.monotonic()
    while True:
        entries = [arena.status(each) for each in submissions]
        ended = sum(trial["state"] in ("done", "policy_fault") for entry in entries for trial in entry["trials"])
        if ended > seen:
            yield from [None] * (ended - seen)
            seen, since = ended, time.monotonic()
        going = [f"{entry['name']}: {entry['state_words']}" for entry in entries if entry["state"] == "open"]
        if not going:
            return
        children.check(since, "a trial that ends", "; ".join(going))
