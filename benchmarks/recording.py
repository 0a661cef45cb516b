"""Whether keeping episodes holds up the control loop that makes them.

Each tick of a loop reads a byte from a pipe, as from a driver, and makes an observation (joints, a picture of 64 x 64),
an action and a reward. In each turn of 20 ticks it hands the last 60 steps to the store, durably, by
`Writer.append_soon`. It goes at 100 Hz and does so every 0.2 s, both harder than a robot's 30 Hz and its two seconds or
more. Loops that keep nothing, raw pictures and video take turns, and what one turn leaves unwritten is waited for
before the next. Measured are

- how long the loop is held by the call itself, by the clock and in its own processor time;
- how long its work takes in each tick: more, where the thread that writes has the interpreter or the processor;
- by how much each tick ends after the moment at which it was due: on a busy machine, late without any recording.

Of the last two counts what comes on top of the loop that keeps nothing. Its interval is a bootstrap over the turns;
where it holds the limit, this machine cannot tell. For comparison: how long a plain `append` takes.
"""

import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from offbook.data.schema import FieldSpec, Schema
from offbook.data.store import EpisodeStore
from offbook.data.writer import Writer
from offbook.runs.benchmark import Options, median_metric, quantile_metric
from offbook.runs.ledger import Claim, Metric, Verdict
from offbook.runs.progress import track
from offbook.runs.seeding import generator

RATE, EPISODE, SIZE = 100.0, 60, 64
TURNS, TICKS, HANDED = 200, 20, 2
LIMIT = 0.005  # seconds, of the 33 ms that a tick of 30 Hz has
RESAMPLES = 2000

Row = dict[str, np.ndarray]


@dataclass
class Measured:
    """Seconds of one kind of loop; `work` and `late` have a row for each turn."""

    calls: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    work: list[list[float]] = field(default_factory=list)
    late: list[list[float]] = field(default_factory=list)


def schema(*, video: bool) -> Schema:
    return Schema(
        (
            FieldSpec("joints", "float32", (7,), "observation"),
            FieldSpec("front", "uint8", (SIZE, SIZE, 3), "observation", video=video),
            FieldSpec("action", "float32", (7,), "action"),
            FieldSpec("reward", "float32", (), "reward"),
        ),
        rate_hz=30.0,
    )


def observed(random: np.random.Generator) -> Row:
    return {
        "joints": random.random(7, np.float32),
        "front": random.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
        "action": random.random(7, np.float32),
        "reward": np.zeros((), np.float32),
    }


def whole(rows: list[Row]) -> Row:
    """An episode of all rows; of the last one only the observation counts."""
    names = {name: len(rows) if name in ("joints", "front") else len(rows) - 1 for name in rows[0]}
    return {name: np.stack([row[name] for row in rows[:count]]) for name, count in names.items()}


def turn(writer: Writer | None, rows: list[Row], random: np.random.Generator, into: Measured) -> None:
    """Plays one turn of the loop; `rows` are the last ones, at least those of an episode."""
    reading, writing = os.pipe()
    into.work.append([])
    into.late.append([])
    start = time.perf_counter()
    for tick in range(TICKS):
        os.write(writing, b".")
        due = start + (tick + 1) / RATE
        time.sleep(max(0.0, due - time.perf_counter()))
        awake = time.perf_counter()
        os.read(reading, 1)
        rows.append(observed(random))
        if tick == HANDED and writer is not None:
            episode = whole(rows[-EPISODE - 1 :])
            called, processor = time.perf_counter(), time.thread_time()
            writer.append_soon(episode, terminated=False, truncated=True)
            into.processor.append(time.thread_time() - processor)
            into.calls.append(time.perf_counter() - called)
        done = time.perf_counter()
        into.work[-1].append(done - awake)
        into.late[-1].append(done - due)
    os.close(reading)
    os.close(writing)
    del rows[: -EPISODE - 1]
    if writer is not None:
        writer.flush()


def excess(name: str, kept: list[list[float]], nothing: list[list[float]], seed: int) -> Metric:
    """The 99th percentile of one loop above that of another that took turns with it."""
    random, sides = generator(seed, "excess"), (np.array(kept), np.array(nothing))

    def above(turns: np.ndarray) -> float:
        high, low = (np.quantile(side[turns], 0.99) for side in sides)
        return float(high - low)

    value = above(np.arange(len(kept)))
    drawn = [above(random.integers(len(kept), size=len(kept))) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Metric(
        name=name,
        value=value,
        n=len(kept),
        interval=(min(float(low), value), max(float(high), value)),
        method="paired bootstrap over turns 0.95",
        unit="s",
        higher_is_better=False,
    )


def appends(folder: Path, *, video: bool, seed: int, repeats: int) -> Metric:
    random = generator(seed, "appends")
    fields = whole([observed(random) for _ in range(EPISODE + 1)])
    spent = []
    with EpisodeStore.create(folder, schema(video=video)) as writer:
        for _ in range(repeats):
            start = time.perf_counter()
            writer.append(fields, terminated=False, truncated=True)
            spent.append(time.perf_counter() - start)
    return median_metric(f"append, {'video' if video else 'raw pictures'}", spent, unit="s")


def judged(excesses: list[Metric]) -> Verdict:
    intervals = [metric.interval or (metric.value, metric.value) for metric in excesses]
    if any(low > LIMIT for low, _ in intervals):
        return "missed"
    return "met" if all(high <= LIMIT for _, high in intervals) else "recorded"


def run(options: Options) -> list[Claim]:
    """Plays the loops by turns: keeping nothing, raw pictures, and video."""
    random = generator(options.seed, "recording")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        writers: dict[str, Writer | None] = {"nothing kept": None}
        for kind in ("raw pictures", "video"):
            writer = EpisodeStore.create(folder / kind, schema(video=kind == "video"))
            writers[kind] = stack.enter_context(writer)
        measured = {kind: Measured() for kind in writers}
        rows = [observed(random) for _ in range(EPISODE + 1)]
        for _ in track(range(TURNS), "turns"):
            for kind, of in measured.items():
                turn(writers[kind], rows, random, of)
        plain = [
            appends(folder / f"plain {video}", video=video, seed=options.seed, repeats=options.repeats)
            for video in (False, True)
        ]
    nothing = measured.pop("nothing kept")
    calls = [
        quantile_metric(f"99th percentile of calls, {kind}", of.calls, 0.99, unit="s") for kind, of in measured.items()
    ]
    cost = [
        quantile_metric(f"the same, processor time, {kind}", of.processor, 0.99, unit="s")
        for kind, of in measured.items()
    ]
    work = [excess(f"excess, {kind}", of.work, nothing.work, options.seed) for kind, of in measured.items()]
    late = [excess(f"excess, {kind}", of.late, nothing.late, options.seed) for kind, of in measured.items()]
    usual = [
        quantile_metric(f"99th percentile, {kind}", np.ravel(of).tolist(), 0.99, unit="s")
        for kind, of in (("work, nothing kept", nothing.work), ("delay, nothing kept", nothing.late))
    ]
    limit = f"{LIMIT * 1000:g} ms"
    found: list[tuple[str, list[Metric], list[Metric], Verdict]] = [
        (f"append_soon holds the loop that calls it for at most {limit} in 99 of 100 calls", calls + cost, plain,
         "met" if all(metric.value <= LIMIT for metric in calls) else "missed"),
        (f"keeping episodes adds at most {limit} to the 99th percentile of tick work", work, usual[:1], judged(work)),
        (f"keeping episodes adds at most {limit} to the 99th percentile of tick delay", late, usual[1:], judged(late)),
    ]  # fmt: skip
    return [
        Claim(
            system="recording",
            claim=claim,
            metrics=tuple(metrics),
            baseline_metrics=tuple(baseline),
            seeds=(options.seed,),
            verdict=verdict,
        )
        for claim, metrics, baseline, verdict in found
    ]
