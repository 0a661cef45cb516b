"""How long it takes to open a store of a million steps and read one of them.

The store holds 1000 episodes of 1000 steps. Opening reads the index and maps the fields; the bound is the reading of
the index file itself, which is timed beside it. The file cache is warm, as in every start of training but the first.
"""

import tempfile
from pathlib import Path

import numpy as np

from offbook.data.schema import FieldSpec, Schema
from offbook.data.store import EpisodeStore
from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim
from offbook.runs.progress import track
from offbook.runs.seeding import generator

EPISODES, STEPS = 1000, 1000
LIMIT = 0.05  # seconds


def _fill(path: Path, seed: int) -> None:
    schema = Schema(
        fields=(
            FieldSpec(name="observation", dtype="float32", shape=(11,), role="observation"),
            FieldSpec(name="action", dtype="float32", shape=(3,), role="action"),
            FieldSpec(name="reward", dtype="float32", shape=(), role="reward"),
        ),
        environment="synthetic",
    )
    random = generator(seed, "store_open")
    fields = {
        "observation": random.random((STEPS + 1, 11), np.float32),
        "action": random.random((STEPS, 3), np.float32),
        "reward": random.random(STEPS, np.float32),
    }
    with EpisodeStore.create(path, schema) as writer:
        for _ in track(range(EPISODES), "episodes"):
            writer.append(fields, terminated=False, truncated=True)


def _open(path: Path) -> float:
    store = EpisodeStore.open(path)
    return float(store.field("observation")[store.steps // 2, 0])


def run(options: Options) -> list[Claim]:
    """Times the opening and holds it against the limit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        _fill(path, options.seed)
        index = max(path.glob("episodes.*"), key=lambda file: file.stat().st_size)
        seconds = timed({"open": lambda: _open(path), "bound": index.read_bytes}, options.repeats)
    metric = median_metric("open, in process", seconds["open"], unit="s")
    return [
        Claim(
            system="store_open",
            claim=f"opening a store of a million steps takes at most {LIMIT:g} s",
            metrics=(metric,),
            baseline_metrics=(median_metric("reading the index file", seconds["bound"], unit="s"),),
            seeds=(options.seed,),
            verdict="met" if metric.value <= LIMIT else "missed",
        )
    ]
