"""Whether recorded actions stand beside the steps that they drove: a one-step alignment check on any recordings.

The next state must depend on the action that is stored with a step, beyond what the states and actions before it say
already, and beyond what the other actions nearby say. An earlier action may tell something too, where the recorded
state is not the whole state, and so may a later one, for a policy answers to what it sees. So actions are only said to
be a step away where the action of the own step tells next to nothing, and to be in place where it tells most.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from offbook.data.store import EpisodeStore
from offbook.runs.seeding import generator

_STEPS, _SIZE = 20_000, 48
# From which gain a lag is believed: less evidence is asked for what should be so.
_OWN, _OTHER = 0.05, 0.1
# A share of the variance below which there is nothing left to tell.
_NOTHING = 1e-6
_RIDGE = 1e-8

Rows = Float64[np.ndarray, "rows _"]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What the regression says.

    Attributes:
        verdict: `"aligned"`, `"early"` (the next state depends on the action stored a step before), `"late"` (on the
            one stored a step after) or `"unclear"`.
        gains: by lag (-1, 0, 1), how much of what the states so far and the other actions leave unexplained of the
            change of the state the action stored at that lag explains, on episodes or parts that were held out.
        steps: how many steps were used.
        reason: why it is unclear, else empty.
    """

    verdict: str
    gains: dict[int, float]
    steps: int
    reason: str = ""


def check_alignment(store: EpisodeStore, *, seed: int = 0) -> Alignment:
    """Regresses changes of the state on actions at lags -1, 0 and 1, by ridge regression with two-fold validation.

    Args:
        store: any recordings.
        seed: which steps are used where there are more than 20,000.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from offbook.data.store import FieldSpec, Schema
        >>> schema = Schema((FieldSpec("s", "float64", (2,), "observation"), FieldSpec("a", "float64", (2,), "action")))
        >>> chance = np.random.default_rng(0)
        >>> actions = chance.normal(size=(400, 2))
        >>> states = np.concatenate([np.zeros((1, 2)), np.cumsum(actions, axis=0)])
        >>> with TemporaryDirectory() as folder:
        ...     with EpisodeStore.create(folder, schema) as writer:
        ...         number = writer.append({"s": states, "a": actions}, terminated=True, truncated=False)
        ...     check_alignment(EpisodeStore.open(folder)).verdict
        'aligned'
    """
    states = [name for name in store.schema.observations if not store.schema[name].camera]
    if not states or not store.schema.actions:
        return Alignment(verdict="unclear", gains={}, steps=0, reason="no state, or no action, is recorded")
    blocks, fold = _rows(store, states, seed)
    steps = len(fold)
    if steps < 20 + 10 * (2 * blocks["s0"].shape[1] + 3 * blocks["a0"].shape[1]):
        return Alignment(verdict="unclear", gains={}, steps=steps, reason="too few steps")
    if len(np.unique(fold)) < 2:
        reason = "the steps that can be used lie in one part of the recordings, which leaves none to hold out"
        return Alignment(verdict="unclear", gains={}, steps=steps, reason=reason)
    lags = (-1, 0, 1)
    past = [blocks["s0"], blocks["s-1"], blocks["a-2"]]
    whole = _error([*past, *(blocks[f"a{lag}"] for lag in lags)], blocks["change"], fold)
    without = {
        lag: _error([*past, *(blocks[f"a{other}"] for other in lags if other != lag)], blocks["change"], fold)
        for lag in lags
    }
    gains, *halves = (
        {
            lag: float(1 - whole[part].sum() / left) if (left := without[lag][part].sum()) > _NOTHING else 0.0
            for lag in lags
        }
        for part in ([0, 1], [0], [1])
    )
    verdict, reason = _judge(gains)
    if not reason and any(_judge(half)[0] != verdict for half in halves):
        verdict, reason = "unclear", "two halves of the recordings do not agree"
    return Alignment(verdict=verdict, gains=gains, steps=steps, reason=reason)


def _judge(gains: dict[int, float]) -> tuple[str, str]:
    before, own, after = (gains[lag] for lag in (-1, 0, 1))
    if own >= max(_OWN, before, after):
        return "aligned", ""
    for verdict, gain, other in (("early", before, after), ("late", after, before)):
        if gain >= max(_OTHER, 4 * own, other):
            return verdict, ""
    if max(gains.values()) < _OTHER:
        return "unclear", "no action tells more of the next state than the states before it and the other actions do"
    return "unclear", "the action of its own step and one beside it both tell something of the next state"


def _rows(store: EpisodeStore, states: list[str], seed: int) -> tuple[dict[str, Rows], np.ndarray]:
    """Blocks of columns, a row for each step that has two before it and one after it, and the fold of each row."""
    names = ("change", "s0", "s-1", "a0", "a1", "a-1", "a-2")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    folds: list[np.ndarray] = []
    count = 0
    whole = np.logical_and.reduce([store.present(name) for name in (*states, *store.schema.actions)])
    for number in generator(seed, "alignment").permutation(np.flatnonzero(whole)).tolist():
        if count >= _STEPS:
            break
        start, length = (int(store.episodes[column][number]) for column in ("start", "length"))
        rows = slice(start, start + length)
        # Not by `episode`, which would decode videos.
        s = _joined([np.concatenate([store.field(n)[rows], store.final(n)[number : number + 1]]) for n in states])
        a = _joined([store.field(name)[rows] for name in store.schema.actions])
        n = min(len(a) - 3, _STEPS - count)
        if n < 1:
            continue
        for name, values in {
            "change": s[3 : 3 + n] - s[2 : 2 + n],
            "s0": s[2 : 2 + n],
            "s-1": s[1 : 1 + n],
            "a1": a[3 : 3 + n],
            "a0": a[2 : 2 + n],
            "a-1": a[1 : 1 + n],
            "a-2": a[:n],
        }.items():
            parts[name].append(values)
        folds.append(np.full(n, len(folds) % 2))
        count += n
    if not folds:
        return {name: np.zeros((0, 1)) for name in names}, np.zeros(0, np.int64)
    if len(folds) == 1:
        # One episode is held out by halves.
        folds = [np.arange(count) * 2 // count]
    blocks = {name: np.concatenate(values) for name, values in parts.items()}
    kept = np.isfinite(np.concatenate(list(blocks.values()), axis=1)).all(axis=1)
    return {name: _useful(values[kept]) for name, values in blocks.items()}, np.concatenate(folds)[kept]


def _joined(values: list[np.ndarray]) -> Rows:
    return np.concatenate([value.reshape(len(value), -1).astype(np.float64) for value in values], axis=1)


def _useful(values: Rows) -> Rows:
    """Columns that vary, scaled to one; the first ones of very many."""
    spread = values.std(axis=0) if len(values) else np.zeros(values.shape[1])
    chosen = np.flatnonzero(spread > 1e-9 * (1 + np.abs(values).max(axis=0, initial=0)))[:_SIZE]
    scaled: np.ndarray = (values[:, chosen] - values[:, chosen].mean(axis=0)) / spread[chosen]
    return scaled


def _error(known: list[Rows], target: Rows, fold: np.ndarray) -> Float64[np.ndarray, "2"]:
    """The share of the target's variance left unexplained in each half of the rows, predicted from the other."""
    x = np.concatenate([*known, np.ones((len(target), 1))], axis=1)
    left = np.zeros(2)
    for held in (0, 1):
        train = fold != held
        gram = x[train].T @ x[train] + _RIDGE * train.sum() * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x[train].T @ target[train])
        left[held] = ((target[~train] - x[~train] @ weights) ** 2).sum()
    return left / max(target.size, 1)
