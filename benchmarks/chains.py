"""How fast chains of trials are drawn and relabelled, beside a loop over the trials, and beside the machine.

600 tasks of 16 trials of 64 steps: an observation of 11 numbers, an action of 3 and a reward, float32. A chain has four
trials of a task, ascending by return. By turns, batch by batch, in a process:

- trial by trial: arrays in memory, a list entry for each episode; each trial of each chain is sliced out, its target
  summed up backwards, and all is padded to a fixed length and stacked. No trial is shorter here, so that both sides
  hand over as many steps;
- blocks: what one NumPy gather reads at random out of the same memory, aligned blocks of a trial's size at places drawn
  beforehand, anew for each batch: what handing the numbers over costs, without a target or a number of a step.

As every batch follows one of another side, caches hold what they hold in training: what others left there.
"""

import gc
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from offbook.data.chains import ChainSampler
from offbook.data.pack import Pack
from offbook.data.schema import FieldSpec, Schema
from offbook.data.store import EpisodeStore
from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim
from offbook.runs.progress import track
from offbook.runs.seeding import generator

TASKS, TRIALS, STEPS = 600, 16, 64
CHAIN, BATCH = 4, 256
# Batches of each side in a round.
BATCHES = {"ours": 16, "blocks": 16, "trial by trial": 2}
RATIO, CHAINS, BYTES = 10, 10_000, 2.0  # times; a second; GB/s
FIELDS = {"observation": 11, "action": 3}

Draw = Callable[[], object]


def fill(path: Path, seed: int) -> EpisodeStore:
    roles = {"observation": "observation", "action": "action"}
    specs = [FieldSpec(name, "float32", (size,), roles[name]) for name, size in FIELDS.items()]
    specs.append(FieldSpec("reward", "float32", (), "reward"))
    random = generator(seed, "chains benchmark")
    with EpisodeStore.create(path, Schema(tuple(specs), environment="synthetic")) as writer:
        for number in track(range(TASKS * TRIALS), "episodes"):
            fields = {
                spec.name: random.random((STEPS + (spec.role == "observation"), *spec.shape), np.float32)
                for spec in specs
            }
            writer.append(fields, terminated=False, truncated=True, task=f"task {number // TRIALS}", sync=False)
    return EpisodeStore.open(path)


def trial_by_trial(store: EpisodeStore, seed: int) -> Draw:
    random = generator(seed, "trial by trial")
    columns = {name: np.array(store.field(name)) for name in (*FIELDS, "reward")}
    ends = np.cumsum(store.episodes["length"])[:-1]
    episodes = {name: np.split(column, ends) for name, column in columns.items()}
    returns = [float(rewards.sum(dtype=np.float64)) for rewards in episodes["reward"]]
    tasks: dict[str, list[int]] = {}
    for number, task in enumerate(store.episodes["task"].tolist()):
        tasks.setdefault(task, []).append(number)
    groups = list(tasks.values())

    def padded(values: np.ndarray) -> np.ndarray:
        filled = np.zeros((STEPS, *values.shape[1:]), values.dtype)
        filled[: len(values)] = values
        return filled

    def draw() -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {name: [] for name in (*episodes, "target", "done", "step", "valid")}
        for _ in range(BATCH):
            chosen = random.choice(groups[random.integers(len(groups))], CHAIN, replace=False).tolist()
            chosen.sort(key=returns.__getitem__)
            best = returns[chosen[-1]]
            for number in chosen:
                trial = {name: values[number] for name, values in episodes.items()}
                left = np.cumsum(trial["reward"][::-1], dtype=np.float64)[::-1]
                trial["target"] = (left + (best - returns[number])).astype(np.float32)
                trial["done"] = np.zeros(len(left), bool)
                trial["done"][-1] = returns[number] >= best
                trial["step"] = np.arange(len(left))
                trial["valid"] = np.ones(len(left), bool)
                for name, values in trial.items():
                    parts[name].append(padded(values))
        return {name: np.stack(of).reshape(BATCH, CHAIN * STEPS, *of[0].shape[1:]) for name, of in parts.items()}

    return draw


def sampler_of(store: EpisodeStore, seed: int) -> ChainSampler:
    return ChainSampler(store, tuple(FIELDS), n_trials=(CHAIN, CHAIN), seed=seed)


def ours(store: EpisodeStore, seed: int) -> Draw:
    sampler, step = sampler_of(store, seed), itertools.count()
    return lambda: sampler.sample(BATCH, next(step))


def blocks(store: EpisodeStore, options: Options) -> Draw:
    """Trials at random, as the pack of the fields has them."""
    rows = Pack(store, tuple(FIELDS), np.arange(len(store))).rows.reshape(len(store), -1)
    shape = (BATCHES["blocks"] * (options.repeats + 1), BATCH * CHAIN)
    places = iter(generator(options.seed, "blocks").integers(len(store), size=shape))
    return lambda: np.take(rows, next(places), axis=0, mode="clip")


def run(options: Options) -> list[Claim]:
    """Measures each way by turns."""
    with tempfile.TemporaryDirectory() as folder:
        store = fill(Path(folder) / "store", options.seed)
        sides = {
            "ours": ours(store, options.seed),
            "blocks": blocks(store, options),
            "trial by trial": trial_by_trial(store, options.seed),
        }
        data = sampler_of(store, options.seed).sample(1, 0).data
        # Thousands of arrays of the slow side would be looked through again and again, in everybody's time.
        gc.freeze()
        seconds = timed(sides, options.repeats, calls=BATCHES)
    rates = {name: [BATCHES[name] * BATCH / spent for spent in of] for name, of in seconds.items()}
    ratios = {
        name: [a / b for a, b in zip(rates["ours"], rates[name], strict=True)] for name in ("blocks", "trial by trial")
    }
    ratio = median_metric("ratio", ratios["trial by trial"], higher_is_better=True)
    size = sum(values.nbytes for values in data.values()) / 1e9
    speeds = (
        median_metric("ours", rates["ours"], unit="chains/s", higher_is_better=True),
        median_metric("ours, in bytes", [rate * size for rate in rates["ours"]], unit="GB/s", higher_is_better=True),
    )
    shape = f"chains of {CHAIN} trials of {STEPS} steps"
    return [
        Claim(
            system="chains",
            claim=f"{shape} are drawn at least {RATIO} times as fast as trial by trial",
            metrics=(ratio,),
            baseline_metrics=(
                median_metric("trial by trial", rates["trial by trial"], unit="chains/s", higher_is_better=True),
            ),
            seeds=(options.seed,),
            verdict="met" if ratio.value >= RATIO else "missed",
        ),
        Claim(
            system="chains",
            claim=f"{shape} are drawn at {CHAINS} a second or more, and at {BYTES:g} GB/s or more",
            metrics=(*speeds, median_metric("share of the bound", ratios["blocks"], higher_is_better=True)),
            baseline_metrics=(median_metric("random blocks", rates["blocks"], unit="chains/s", higher_is_better=True),),
            seeds=(options.seed,),
            verdict="met" if speeds[0].value >= CHAINS and speeds[1].value >= BYTES else "missed",
            note="Bytes are those of the fields, the rewards, the targets and the ends; numbers of steps come on top.",
        ),
    ]
