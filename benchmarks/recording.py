"""Whether keeping episodes holds up the control loop that makes them.

A loop of 30 Hz makes an observation (joints, a picture of 64 x 64), an action and a reward at each tick, and after two
seconds hands the episode to the store, durably, by `Writer.append_soon`; for two more seconds it goes on. Measured is
by how much each tick ends after the moment at which it was due. The same loop that keeps nothing takes turns with it,
which shows what the machine does by itself: on a busy one, ticks are late without any recording. For comparison: how
long a plain `append` takes, with raw pictures and with video.
"""

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import NormalDist

import numpy as np

from offbook.data.schema import FieldSpec, Schema
from offbook.data.store import EpisodeStore
from offbook.data.writer import Writer
from offbook.runs.benchmark import Options, median_metric
from offbook.runs.ledger import Claim, Metric
from offbook.runs.progress import track
from offbook.runs.seeding import generator

RATE, EPISODE, SIZE = 30.0, 60, 64
TURNS = 6
LIMIT = 0.005  # seconds, of the 33 ms that a tick has


def schema(*, video: bool) -> Schema:
    return Schema(
        (
            FieldSpec("joints", "float32", (7,), "observation"),
            FieldSpec("front", "uint8", (SIZE, SIZE, 3), "observation", video=video),
            FieldSpec("action", "float32", (7,), "action"),
            FieldSpec("reward", "float32", (), "reward"),
        ),
        rate_hz=RATE,
    )


def observed(random: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "joints": random.random(7, np.float32),
        "front": random.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
        "action": random.random(7, np.float32),
        "reward": np.float32(0),
    }


def whole(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """An episode of all rows; of the last one only the observation counts."""
    names = {name: len(rows) if name in ("joints", "front") else len(rows) - 1 for name in rows[0]}
    return {name: np.stack([row[name] for row in rows[:count]]) for name, count in names.items()}


def turn(writer: Writer | None, random: np.random.Generator) -> list[float]:
    """Plays one turn of the loop, and gives how late each tick ends."""
    rows: list[dict[str, np.ndarray]] = []
    late, start = [], time.perf_counter()
    for tick in range(2 * EPISODE + 1):
        due = start + tick / RATE
        time.sleep(max(0.0, due - time.perf_counter()))
        rows.append(observed(random))
        if tick == EPISODE and writer is not None:
            writer.append_soon(whole(rows), terminated=False, truncated=True)
        late.append(time.perf_counter() - due)
    if writer is not None:
        writer.flush()
    return late


def quantile(name: str, values: list[float], share: float) -> Metric:
    """A quantile, with the interval between the order statistics that hold it in 95 % of cases."""
    ordered, n = np.sort(values), len(values)
    spread = NormalDist().inv_cdf(0.975) * np.sqrt(n * share * (1 - share))
    low, here, high = (int(np.clip(round(n * share + d), 1, n)) - 1 for d in (-spread, 0, spread))
    return Metric(
        name=name,
        value=float(ordered[here]),
        n=n,
        interval=(float(ordered[low]), float(ordered[high])),
        method="order statistics",
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


def run(options: Options) -> list[Claim]:
    """Plays the loop by turns: keeping nothing, raw pictures, and video."""
    random = generator(options.seed, "recording")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        writers: dict[str, Writer | None] = {"nothing kept": None}
        for kind in ("raw pictures", "video"):
            writer = EpisodeStore.create(folder / kind, schema(video=kind == "video"))
            writers[kind] = stack.enter_context(writer)
        late: dict[str, list[float]] = {kind: [] for kind in writers}
        for _ in track(range(TURNS), "turns"):
            for kind, of in late.items():
                of += turn(writers[kind], random)
        plain = [
            appends(folder / f"plain {video}", video=video, seed=options.seed, repeats=options.repeats)
            for video in (False, True)
        ]
    nothing, *kept = [quantile(f"99th percentile of ticks' delay, {kind}", of, 0.99) for kind, of in late.items()]
    late_by = max(metric.value - nothing.value for metric in kept)
    return [
        Claim(
            system="recording",
            claim=f"keeping episodes makes 99 of 100 ticks of {RATE:g} Hz at most {LIMIT * 1000:g} ms later",
            metrics=tuple(kept),
            baseline_metrics=(nothing, *plain),
            seeds=(options.seed,),
            # A machine that is late by itself cannot tell.
            verdict="recorded" if nothing.value > LIMIT else "met" if late_by <= LIMIT else "missed",
        )
    ]
