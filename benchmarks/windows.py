"""How fast windows of T steps are drawn at random, beside the ways in which others do it, and beside the machine.

600 episodes of 1000 steps: an observation of 11 numbers, an action of 3, a reward and the mean return to go, float32.
By turns, batch by batch, in a process:

- item by item: a `torch.utils.data.Dataset` that slices a window out of arrays in memory, one for each quantity with a
  row for each episode, and a `DataLoader` that shuffles and collates, as the first release of masked trajectory
  modelling (Wu et al., 2023) does, without worker processes;
- TorchRL's `SliceSampler` with its cache of trajectories, where TorchRL is installed (`offbook[bench]`);
- a list of transitions: one Python object for each step, gathered one by one into a batch;
- Minari: `sample_episodes` from its HDF5 file, and a slice of each.

The bound is what one NumPy gather reads at random out of the same memory: aligned blocks of a window's size, at places
drawn beforehand, anew for each batch. Single cache lines of 64 bytes are timed beside it. As every batch follows one of
another side, caches hold what they hold in training: what others left there. What a process grows by while it draws
from all windows is measured in a process of its own.
"""

import gc
import itertools
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from offbook.data.formats import export_dataset
from offbook.data.pack import RETURN_TO_GO, Pack
from offbook.data.returns import ReturnSpec, returns_to_go
from offbook.data.schema import FieldSpec, Schema
from offbook.data.store import EpisodeStore
from offbook.data.windows import WindowSampler
from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim, Metric
from offbook.runs.progress import track
from offbook.runs.seeding import generator

EPISODES, STEPS = 600, 1000
FIELDS = {"observation": 11, "action": 3, "reward": 1}
LENGTHS = (4, 20, 64)
BATCH = 4096
# Batches of each side in a round. Minari takes half a second for so many, and gives no more than it has episodes.
BATCHES = {"ours": 16, "blocks": 16, "lines": 16}
MINARI_BATCH = 24
LIMITS = {"item by item": 100, "TorchRL": 5, "list of transitions": 50, "Minari": 1000}
SHARE, GROWTH = 0.5, 1.3
MEAN = ReturnSpec(kind="mean")

Draw = Callable[[], object]

_GROWTH = """
import sys
from offbook.data.store import EpisodeStore
from offbook.data.windows import WindowSampler
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
store = EpisodeStore.open(sys.argv[1])
store.episodes
before = resident()
sampler = WindowSampler(store, ("observation", "action", "reward"), length=4)
for step in range(4 * len(sampler) // 4096):
    sampler.sample(4096, step)
print(resident() - before)
"""


def fill(path: Path, seed: int) -> EpisodeStore:
    roles = {"observation": "observation", "action": "action", "reward": "reward"}
    specs = [FieldSpec(name, "float32", () if size == 1 else (size,), roles[name]) for name, size in FIELDS.items()]
    random = generator(seed, "windows benchmark")
    with EpisodeStore.create(path, Schema(tuple(specs), environment="synthetic")) as writer:
        for _ in track(range(EPISODES), "episodes"):
            fields = {
                spec.name: random.random((STEPS + (spec.role == "observation"), *spec.shape), np.float32)
                for spec in specs
            }
            writer.append(fields, terminated=False, truncated=True, sync=False)
    return EpisodeStore.open(path)


def columns_of(store: EpisodeStore) -> dict[str, np.ndarray]:
    """All that a window has, in memory, with a row for each step."""
    returns = returns_to_go(store.field("reward"), store.episodes["start"], store.episodes["length"], MEAN)
    return {**{name: np.array(store.field(name)) for name in FIELDS}, RETURN_TO_GO: returns.astype(np.float32)}


def item_by_item(store: EpisodeStore, length: int, seed: int) -> Draw:
    import torch
    from torch.utils.data import DataLoader, Dataset

    places = dict(enumerate((e, t) for e in range(len(store)) for t in range(STEPS - length + 1)))
    episodes = {name: column.reshape(len(store), STEPS, -1) for name, column in columns_of(store).items()}

    class Windows(Dataset[dict[str, np.ndarray]]):
        def __len__(self) -> int:
            return len(places)

        def __getitem__(self, number: int) -> dict[str, np.ndarray]:
            episode, start = places[number]
            whole = {name: values[episode] for name, values in episodes.items()}
            return {name: values[start : start + length] for name, values in whole.items()}

    shuffled = torch.Generator().manual_seed(seed)
    loader = DataLoader(Windows(), batch_size=BATCH, shuffle=True, drop_last=len(places) > BATCH, generator=shuffled)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: next(batches)


def list_of_transitions(store: EpisodeStore, length: int, seed: int) -> Draw:
    random, columns = generator(seed, "list of transitions"), columns_of(store)
    episodes = [
        [tuple(values[e * STEPS + t] for values in columns.values()) for t in range(STEPS)] for e in range(len(store))
    ]

    def draw() -> list[np.ndarray]:
        windows = []
        for _ in range(BATCH):
            episode = episodes[random.integers(len(episodes))]
            start = random.integers(len(episode) - length + 1)
            windows.append([np.stack(values) for values in zip(*episode[start : start + length], strict=True)])
        return [np.stack(values) for values in zip(*windows, strict=True)]

    return draw


def minari(store: EpisodeStore, folder: Path, length: int, seed: int) -> Draw:
    from minari import MinariDataset

    if not folder.exists():
        export_dataset(store, f"minari:{folder}")
    data, random = MinariDataset(folder / "data"), generator(seed, "minari")

    def draw() -> list[np.ndarray]:
        chosen = []
        for episode in data.sample_episodes(MINARI_BATCH):
            start = random.integers(len(episode) - length + 1)
            parts = (episode.observations, episode.actions, episode.rewards)
            chosen.append([part[start : start + length] for part in parts])
        return [np.stack(values) for values in zip(*chosen, strict=True)]

    return draw


def torchrl(store: EpisodeStore, length: int) -> Draw:
    import torch
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

    # It would write to where the figures go.
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    columns: dict[str, Any] = {name: torch.from_numpy(column) for name, column in columns_of(store).items()}
    columns["episode"] = torch.arange(store.steps) // STEPS
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(store.steps),
        sampler=SliceSampler(slice_len=length, traj_key="episode", cache_values=True),
        batch_size=BATCH * length,
    )
    buffer.extend(TensorDict(columns, [store.steps]))
    return lambda: buffer.sample()


def gather(rows: np.ndarray, floats: int, seed: int, batches: int) -> Draw:
    """Blocks of so many floats at random."""
    blocks = rows.reshape(-1)[: rows.size // floats * floats].reshape(-1, floats)
    places = iter(generator(seed, "gather").integers(len(blocks), size=(batches, BATCH)))
    return lambda: np.take(blocks, next(places), axis=0, mode="clip")


def ours(store: EpisodeStore, length: int, seed: int) -> Draw:
    sampler = WindowSampler(store, tuple(FIELDS), length=length, returns=MEAN, seed=seed)
    step = itertools.count()
    return lambda: sampler.sample(BATCH, next(step))


def rates(store: EpisodeStore, folder: Path, length: int, options: Options) -> dict[str, list[float]]:
    """Windows a second in each round, by side."""
    rows = Pack(store, tuple(FIELDS), np.arange(len(store)), returns=MEAN).rows
    rounds = BATCHES["blocks"] * (options.repeats + 1)
    sides: dict[str, Draw] = {
        "ours": ours(store, length, options.seed),
        "blocks": gather(rows, length * rows.shape[1], options.seed, rounds),
        "lines": gather(rows, 16, options.seed, rounds),
        "item by item": item_by_item(store, length, options.seed),
        "list of transitions": list_of_transitions(store, length, options.seed),
        "Minari": minari(store, folder / "minari", length, options.seed),
    }
    if find_spec("torchrl"):
        sides["TorchRL"] = torchrl(store, length)
    # Millions of objects of the slow sides would be looked through again and again, in everybody's time.
    gc.freeze()
    seconds = timed(sides, options.repeats, calls=BATCHES)
    drawn = {name: (MINARI_BATCH if name == "Minari" else BATCH) * BATCHES.get(name, 1) for name in sides}
    return {name: [count / spent for spent in seconds[name]] for name, count in drawn.items()}


def ratio(name: str, mine: Sequence[float], other: Sequence[float]) -> Metric:
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    return median_metric(name, ratios, higher_is_better=True)


def compared(rival: str, measured: dict[int, dict[str, list[float]]], options: Options) -> Claim:
    found = [ratio(f"ratio, T = {t}", of["ours"], of[rival]) for t, of in measured.items()]
    theirs = [
        median_metric(f"{rival}, T = {t}", of[rival], unit="windows/s", higher_is_better=True)
        for t, of in measured.items()
    ]
    possible = [ratio(f"ratio of the bound, T = {t}", of["blocks"], of[rival]) for t, of in measured.items()]
    return Claim(
        system="windows",
        claim=f"windows are drawn at least {LIMITS[rival]} times as fast as by {rival}",
        metrics=tuple(found),
        baseline_metrics=(*theirs, *possible),
        seeds=(options.seed,),
        verdict="met" if all(metric.value >= LIMITS[rival] for metric in found) else "missed",
        note="The ratio of the bound is what one thread that did nothing but read the bytes would reach.",
    )


def against_the_machine(measured: dict[int, dict[str, list[float]]], width: int, options: Options) -> Claim:
    speeds = [
        median_metric(f"ours, T = {t}", of["ours"], unit="windows/s", higher_is_better=True)
        for t, of in measured.items()
    ]
    shares = [ratio(f"share of the bound, T = {t}", of["ours"], of["blocks"]) for t, of in measured.items()]
    bounds = [
        median_metric(f"random blocks, T = {t}", [r * t * width * 4e-9 for r in of["blocks"]], unit="GB/s",
                      higher_is_better=True)
        for t, of in measured.items()
    ]  # fmt: skip
    lines = median_metric("random lines", measured[LENGTHS[0]]["lines"], unit="lines/s", higher_is_better=True)
    return Claim(
        system="windows",
        claim=f"windows are drawn at {SHARE:g} or more of the speed at which the machine reads such blocks at random",
        metrics=(*speeds, *shares),
        baseline_metrics=(*bounds, lines),
        seeds=(options.seed,),
        verdict="met" if all(share.value >= SHARE for share in shares) else "missed",
        note="32 MB or more of cache hold most of these recordings; larger ones are slower on both sides.",
    )


def growth(path: Path, options: Options) -> Claim:
    touched = EPISODES * STEPS * sum(FIELDS.values()) * 4
    command = [sys.executable, "-c", _GROWTH, str(path)]
    grown = [
        int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / touched for _ in range(3)
    ]
    metric = median_metric("resident growth, share of the bytes drawn from", grown)
    return Claim(
        system="windows",
        claim=f"a process that draws from all windows grows by at most {GROWTH:g} times their bytes",
        metrics=(metric,),
        seeds=(options.seed,),
        verdict="met" if metric.value <= GROWTH else "missed",
    )


def index(store: EpisodeStore, options: Options) -> Claim:
    """From an open store to a sampler that has packed everything."""
    seconds = timed({"build": lambda: WindowSampler(store, tuple(FIELDS), length=4)}, options.repeats)["build"]
    metric = median_metric("index and pack, a million steps", [s * 1e6 / store.steps for s in seconds], unit="s")
    return Claim(
        system="windows",
        claim="making a sampler takes at most 0.1 s for a million steps",
        metrics=(metric,),
        seeds=(options.seed,),
        verdict="met" if metric.value <= 0.1 else "missed",
    )


def run(options: Options) -> list[Claim]:
    """Measures each way by turns."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Minari and TorchRL, about their own parts
        store = fill(Path(folder) / "store", options.seed)
        measured = {length: rates(store, Path(folder), length, options) for length in LENGTHS}
        width = Pack(store, tuple(FIELDS), np.arange(1), returns=MEAN).rows.shape[1]
        return [
            against_the_machine(measured, width, options),
            *(compared(rival, measured, options) for rival in LIMITS if rival in measured[LENGTHS[0]]),
            growth(store.path, options),
            index(store, options),
        ]
