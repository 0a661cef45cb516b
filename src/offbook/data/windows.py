"""Windows of T consecutive steps out of a store, drawn at random and near the speed of memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped
from numpy.random import Generator, Philox

from offbook.data.normalise import Normalizer, stretches
from offbook.data.pack import RETURN_TO_GO, Pack
from offbook.data.returns import ReturnSpec, returns_to_go
from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, DataError
from offbook.runs.seeding import generator

Pad = Literal["drop", "left", "right"]
Weight = Literal["window", "episode", "return"]
OnNan = Literal["keep", "drop"]
# Fields with more numbers a step than this, and pictures, are read from the store's files window by window.
_PACKED = 512
_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Windows:
    """B windows of T steps each.

    Attributes:
        data: values by field, shape (B, T, ...); floats are float32, other types are as recorded. Zero where padded and
            in episodes without the field.
        valid: which steps are real, shape (B, T); the others are padding.
        present: by field, which windows' episodes have it, shape (B,).
        episode: number of each window's episode in the store, shape (B,).
        start: step of its episode at which the window's first position stands, shape (B,); where the left is padded,
            that of the first real step less the padding, which may be negative.
    """

    data: Mapping[str, Shaped[np.ndarray, "batch time ..."]]
    valid: Bool[np.ndarray, "batch time"]
    present: Mapping[str, Bool[np.ndarray, " batch"]]
    episode: Int64[np.ndarray, " batch"]
    start: Int64[np.ndarray, " batch"]


class WindowSampler:
    """Draws windows from a store; each batch is a function of the seed and the step alone, so resuming needs no state.

    Small float fields are packed side by side once, normalised if asked, and a window is T rows of that (`Pack`).

    Args:
        store: the recordings.
        fields: which fields; an observation's value after the last step is in no window.
        length: steps T of a window.
        stride: steps between the first positions of neighbouring windows of an episode.
        pad: what to do at the ends of an episode. `"drop"`: windows lie inside, and episodes shorter than T are dropped
            (`dropped` counts them). `"left"`: a window ends at each step, and what is before the episode is padding;
            `"right"`: a window begins at each step, and what is after the episode is padding.
        weight: what is drawn with equal chances: a `"window"`; or an `"episode"` and then one of its windows; or,
            with `"return"`, a window with a chance that grows linearly with the return of its episode, those of the
            best episode having about a hundred times the chance of those of the worst.
        episodes: numbers of the episodes to draw from; None for all.
        returns: adds the return to go as `"return_to_go"`, shape (B, T).
        normalizer: normalises those of the fields that it was fitted to.
        on_nan: `"drop"` cuts episodes where one of the fields or the return to go is NaN or infinite, so that no window
            holds such a step (`dropped_windows` counts what that costs); `"keep"` does not look.
        seed: of the random draws.

    Attributes:
        dropped: episodes without a window.
        dropped_windows: windows that there would be without NaN and infinities.

    Raises:
        ConfigError: a setting is out of its range.
        DataError: a field is missing, or no episode is long enough.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from offbook.data.store import FieldSpec, Schema
        >>> schema = Schema((FieldSpec("action", "float32", (2,), "action"),))
        >>> with TemporaryDirectory() as folder:
        ...     with EpisodeStore.create(Path(folder) / "s", schema) as writer:
        ...         n = writer.append({"action": np.ones((9, 2), np.float32)}, terminated=True, truncated=False)
        ...     sampler = WindowSampler(EpisodeStore.open(Path(folder) / "s"), ["action"], length=4)
        ...     len(sampler), sampler.sample(batch=3, step=0).data["action"].shape
        (6, (3, 4, 2))
    """

    def __init__(
        self,
        store: EpisodeStore,
        fields: Sequence[str],
        *,
        length: int,
        stride: int = 1,
        pad: Pad = "drop",
        weight: Weight = "window",
        episodes: Int64[np.ndarray, " chosen"] | None = None,
        returns: ReturnSpec | None = None,
        normalizer: Normalizer | None = None,
        on_nan: OnNan = "keep",
        seed: int = 0,
    ) -> None:
        for name, value, allowed in (("pad", pad, Pad), ("weight", weight, Weight), ("on_nan", on_nan, OnNan)):
            if value not in (choices := get_args(allowed)):
                raise ConfigError(name, expected=" or ".join(choices), got=repr(value), fix="choose one of them")
        for name, number in (("window length", length), ("window stride", stride)):
            if number < 1:
                raise ConfigError(name, expected="1 or more", got=str(number), fix="choose a positive number")
        self.store, self.length, self.stride, self.pad, self.seed = store, length, stride, pad, seed
        self.fields = tuple(fields)
        self._key = generator(seed, "windows").integers(2**63, size=2).astype(np.uint64)
        self._choose_spans(np.arange(len(store)) if episodes is None else np.unique(episodes), on_nan, returns)
        self._weigh(weight)
        self._gather_fields(returns, normalizer)

    def _choose_spans(self, chosen: Int64[np.ndarray, " chosen"], on_nan: OnNan, returns: ReturnSpec | None) -> None:
        """Keeps the stretches of episodes that give windows: whole episodes, unless they are cut."""
        whole = self.store.episodes["length"][chosen]
        which, offsets, lengths = np.arange(len(chosen)), np.zeros(len(chosen), np.int64), whole
        if on_nan == "drop":
            which, offsets, lengths = _finite_spans(self.store, self.fields, chosen, returns)
        counts = self._windows(lengths)
        keep = counts > 0
        self.dropped_windows = int(self._windows(whole).sum() - counts.sum())
        if not keep.any():
            fix = "ask for shorter windows, or pad them"
            expected = f"an episode of {self.length} steps or more"
            got = f"{len(chosen)} episodes, the longest of {max(lengths, default=0)} steps"
            raise DataError(f"{self.store.path}, windows of {self.length} steps", expected=expected, got=got, fix=fix)
        self._lengths, self._counts, self._offsets = lengths[keep], counts[keep], offsets[keep]
        self._packed, self._of = np.unique(which[keep], return_inverse=True)
        self.dropped = len(chosen) - len(self._packed)
        self._packed = chosen[self._packed]
        self._episodes = self._packed[self._of]
        self._starts = self.store.episodes["start"][self._episodes] + self._offsets

    def _windows(self, lengths: Int64[np.ndarray, " spans"]) -> Int64[np.ndarray, " spans"]:
        """How many windows so long stretches give."""
        span = lengths - self.length + 1 if self.pad == "drop" else lengths
        return np.asarray(np.maximum(-(-span // self.stride), 0))

    def __len__(self) -> int:
        return int(self._counts.sum())

    def _weigh(self, weight: Weight) -> None:
        chances = self._counts.astype(np.float64)
        if weight == "episode":
            chances /= np.bincount(self._of, chances)[self._of]
        elif weight == "return":
            returns = self.store.episodes["return"][self._episodes]
            if not np.isfinite(returns).all():
                bad = int(self._episodes[~np.isfinite(returns)][0])
                fix = "weigh by window or episode, or leave that episode out"
                expected = "a finite return, to weigh windows by"
                got = str(self.store.episodes["return"][bad])
                raise DataError(f"{self.store.path}, episode {bad}", expected=expected, got=got, fix=fix)
            spread = returns.max() - returns.min()
            chances *= 0.01 + (returns - returns.min()) / spread if spread > 0 else 1.0
        self._above = np.cumsum(chances)
        # From a place on the line of chances to a window of the episode there.
        self._below, self._density = self._above - chances, self._counts / chances
        # Where to begin looking for a place's episode; a power of two, so that no rounding skips one. Fine enough that
        # few draws have to look further, small enough for a processor's cache.
        buckets = 1 << min(int(16 * len(chances)).bit_length(), 18)
        edges = np.arange(buckets) / buckets * self._above[-1]
        self._guide = np.minimum(np.searchsorted(self._above, edges, "right"), len(chances) - 1)

    def _drawn(
        self, uniform: Float64[np.ndarray, " batch"]
    ) -> tuple[Int64[np.ndarray, " batch"], Int64[np.ndarray, " batch"]]:
        """The episodes, and windows in them, that random numbers from [0, 1) fall on."""
        place = uniform * self._above[-1]
        which: np.ndarray = self._guide[(uniform * len(self._guide)).astype(np.int64)]
        late = np.flatnonzero(self._above[which] <= place)
        which[late] = np.searchsorted(self._above, place[late], "right")
        # Rounding may hit the very end.
        np.minimum(which, len(self._episodes) - 1, out=which)
        window = ((place - self._below[which]) * self._density[which]).astype(np.int64)
        return which, np.minimum(window, self._counts[which] - 1, out=window)

    def _gather_fields(self, returns: ReturnSpec | None, normalizer: Normalizer | None) -> None:
        """Packs the small float fields; the rest stays in the store's files."""
        store, self._normalizer = self.store, normalizer
        if returns is not None and RETURN_TO_GO in self.fields:
            expected = f"no field {RETURN_TO_GO!r} in the store"
            raise ConfigError("returns", expected=expected, got="one", fix="leave returns out")
        present = {name: store.present(name)[self._episodes] for name in self.fields}
        specs = [store.schema[name] for name in self.fields]
        small = [spec.name for spec in specs if np.dtype(spec.dtype).kind == "f" and spec.size <= _PACKED]
        self._pack = Pack(store, small, self._packed, returns=returns, normalizer=normalizer)
        self._direct = {name: store.field(name) for name in self.fields if name not in small}
        rows = store.episodes["length"][self._packed]
        self._packed_starts = (np.cumsum(rows) - rows)[self._of] + self._offsets
        if returns is not None:
            present[RETURN_TO_GO] = store.present(store.schema.reward or "")[self._episodes]
        self._present = {name: None if flags.all() else flags for name, flags in present.items()}

    def sample(self, batch: int, step: int) -> Windows:
        """Draws a batch.

        Args:
            batch: number B of windows.
            step: number of the batch; the same seed, batch and step give the same windows, in any process.

        Returns:
            The windows; the arrays are the caller's own.
        """
        # Numbers by key and counter: the key is made once, where a generator of the step's own name would cost more
        # than the numbers.
        which, window = self._drawn(Generator(Philox(key=self._key, counter=step << 64)).random(batch))
        start = window * self.stride
        if self.pad == "left":
            start -= self.length - 1
        return self._gather(which, start)

    def at(self, numbers: Int64[np.ndarray, " batch"]) -> Windows:
        """The windows of given numbers, 0 to `len(self) - 1`, in the order of their episodes: to go through them all.

        Raises:
            ConfigError: there is no such window.
        """
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(self)):
            bad = int(numbers[(numbers < 0) | (numbers >= len(self))][0])
            raise ConfigError("window number", expected=f"0 to {len(self) - 1}", got=str(bad), fix="choose another")
        ends = np.cumsum(self._counts)
        which = np.searchsorted(ends, numbers, "right")
        start = (numbers - (ends - self._counts)[which]) * self.stride
        return self._gather(which, start - (self.length - 1 if self.pad == "left" else 0))

    def _gather(self, which: Int64[np.ndarray, " batch"], start: Int64[np.ndarray, " batch"]) -> Windows:
        batch, time = len(which), self.length
        # Rows of each window, beginning at the first of its episode; None where they are simply T in a row.
        steps, padding = None, None
        if self.pad != "drop":
            steps, last = start[:, None] + np.arange(time), self._lengths[which][:, None] - 1
            valid = (steps >= 0) & (steps <= last)
            if not valid.all():
                steps, padding = np.clip(steps, 0, last), ~valid
        elif self._direct:
            steps = start[:, None] + np.arange(time)
        data = self._from_pack(self._packed_starts[which], start, steps if padding is not None else None)
        for name, source in self._direct.items():
            values = source[self._starts[which][:, None] + steps]
            if self._normalizer is not None and name in self._normalizer:
                values = self._normalizer.encode(name, values)
            elif values.dtype.kind == "f":
                values = values.astype(np.float32, copy=False)
            flags = self._present[name]
            if flags is not None:
                values[~flags[which]] = 0
            data[name] = values
        if padding is not None:
            for values in data.values():
                values[padding] = 0
        present = {name: np.ones(batch, bool) if f is None else f[which] for name, f in self._present.items()}
        return Windows(
            data={name: data[name] for name in self._present},
            valid=np.ones((batch, time), bool) if padding is None else ~padding,
            present=present,
            episode=self._episodes[which],
            start=start + self._offsets[which],
        )

    def _from_pack(
        self,
        first: Int64[np.ndarray, " batch"],
        start: Int64[np.ndarray, " batch"],
        steps: Int64[np.ndarray, "batch time"] | None,
    ) -> dict[str, np.ndarray]:
        """The packed fields of windows; `steps` only where some of them are not T in a row."""
        packed, time = self._pack.rows, self.length
        width = packed.shape[1]
        if not width:
            return {}
        if steps is None:
            # Each window as one item of overlapping ones: one copy for each, not one for each of its rows.
            item = np.dtype((np.void, time * width * 4))
            windows = np.ndarray((len(packed) - time + 1,), item, packed, strides=(width * 4,))
            values = windows[first + start].view(np.float32).reshape(len(first), time, width)
        else:
            values = np.empty((*steps.shape, width), np.float32)
            # All rows are in range; "clip" spares the copy that np.take makes to be able to raise half-way.
            np.take(packed, first[:, None] + steps, axis=0, out=values, mode="clip")
        shapes = {name: () if name == RETURN_TO_GO else self.store.schema[name].shape for name in self._pack.columns}
        return {
            name: values[..., columns].reshape(len(first), time, *shapes[name])
            for name, columns in self._pack.columns.items()
        }


def _finite_spans(
    store: EpisodeStore, fields: Sequence[str], episodes: Int64[np.ndarray, " chosen"], returns: ReturnSpec | None
) -> tuple[Int64[np.ndarray, " spans"], Int64[np.ndarray, " spans"], Int64[np.ndarray, " spans"]]:
    """The stretches of steps in which all of these are finite: whose of the episodes', where they begin, how long."""
    lengths = store.episodes["length"][episodes]
    stops = np.cumsum(lengths)
    finite = np.ones(int(lengths.sum()), bool)
    columns = [store.field(name) for name in fields if np.dtype(store.schema[name].dtype).kind == "f"]
    if returns is not None and store.schema.reward is not None:
        # A reward that is NaN is in the returns to go of all steps before it.
        rewards = np.asarray(store.field(store.schema.reward))
        columns.append(returns_to_go(rewards, store.episodes["start"][episodes], lengths, returns))
    for column in columns:
        to = 0
        for first, last in stretches(store, episodes, _ROWS):
            finite[to : to + last - first] &= np.isfinite(column[first:last].reshape(last - first, -1)).all(1)
            to += last - first
    edge = np.zeros(len(finite) + 1, bool)
    edge[stops], edge[0] = True, True
    begins = np.flatnonzero(finite & (edge[:-1] | ~np.append(False, finite[:-1])))
    ends = np.flatnonzero(finite & (edge[1:] | ~np.append(finite[1:], False))) + 1
    which = np.searchsorted(stops, begins, "right")
    return which, begins - (stops - lengths)[which], ends - begins
