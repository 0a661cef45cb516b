"""Normalisation of fields to mean 0 and standard deviation 1, from the steps that are really there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float32, Float64, Int64, Num

from offbook.data.store import EpisodeStore
from offbook.errors import CheckpointError, DataError

_CHUNK = 1 << 16
_FLOOR = 1e-3
MEND = "leave the episode out, or record it again"
"""What helps against a value that is not finite, where nothing can leave out the step alone."""


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """Mean and standard deviation of each entry of each field.

    An entry that hardly varies is divided by a floor instead, 1e-3 times the root mean square of its field, so that
    noise is not blown up. One that never varied tells nothing, whatever it is later: any value is encoded to 0, and
    anything is decoded to exactly the constant.

    Attributes:
        mean: by field, float64, shape of one step's value.
        std: by field, float64, of the same shape; 0 for a constant.

    Example:
        >>> normalizer = Normalizer(mean={"x": np.array([1.0, 4.0])}, std={"x": np.array([2.0, 0.0])})
        >>> normalizer.encode("x", np.array([[5.0, 9.0]])).tolist(), normalizer.decode("x", np.array([2, 3])).tolist()
        ([[2.0, 0.0]], [5.0, 4.0])
    """

    mean: Mapping[str, Float64[np.ndarray, "..."]]
    std: Mapping[str, Float64[np.ndarray, "..."]]

    @staticmethod
    def fit(
        store: EpisodeStore,
        fields: Sequence[str],
        episodes: Int64[np.ndarray, " chosen"] | None = None,
        *,
        skip_nan: bool = False,
        fix: str = MEND,
    ) -> "Normalizer":
        """Computes the statistics over all real steps, in float64.

        Args:
            store: the recordings.
            fields: which fields; the last observation of an episode, after its last step, is not counted.
            episodes: numbers of the episodes to use, such as those to train on; None for all.
            skip_nan: leave out steps at which the field holds NaN or infinity, instead of refusing them.
            fix: what the user can do about one that is refused.

        Raises:
            DataError: a value is NaN or infinite and not to be left out, no episode has the field, or it is not one of
                numbers.
        """
        both = {name: _statistics(store, name, episodes, skip_nan, fix) for name in fields}
        return Normalizer(
            mean={name: mean for name, (mean, _) in both.items()}, std={name: std for name, (_, std) in both.items()}
        )

    def __contains__(self, name: object) -> bool:
        return name in self.mean

    @property
    def constants(self) -> dict[str, int]:
        """By field, how many of its entries never varied; fields without such an entry are left out."""
        counts = {name: int((std == 0).sum()) for name, std in self.std.items()}
        return {name: count for name, count in counts.items() if count}

    def encode(self, name: str, values: Num[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
        """Normalises values of a field; any axes may stand before the field's own."""
        std = self._of(name, self.std)
        # Dividing by infinity feeds zero for a constant.
        return np.asarray((values - self.mean[name]) / np.where(std > 0, std, np.inf), np.float32)

    def decode(self, name: str, values: Num[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
        """The inverse of `encode`, in the field's own unit and in float64."""
        return np.asarray(values * self._of(name, self.std) + self._of(name, self.mean), np.float64)

    def _of(self, name: str, statistic: Mapping[str, np.ndarray]) -> np.ndarray:
        if name not in statistic:
            fix = "fit the normaliser with this field"
            expected = f"one of {', '.join(statistic) or 'no field'}"
            raise DataError(f"normalisation of {name!r}", expected=expected, got="a field that was not fitted", fix=fix)
        return statistic[name]

    def to_json(self) -> dict[str, Any]:
        """The statistics as plain JSON types; they come back bit for bit."""
        return {name: {"mean": self.mean[name].tolist(), "std": self.std[name].tolist()} for name in self.mean}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "Normalizer":
        """Reads what `to_json` wrote.

        Raises:
            CheckpointError: the record is something else, or a deviation is negative or not finite.
        """
        try:
            mean = {name: np.asarray(of["mean"], np.float64) for name, of in record.items()}
            std = {name: np.asarray(of["std"], np.float64) for name, of in record.items()}
            for name in mean:
                sound = mean[name].shape == std[name].shape and np.isfinite(mean[name]).all()
                if not sound or not (np.isfinite(std[name]) & (std[name] >= 0)).all():
                    raise ValueError(f"unusable numbers for {name!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            fix = "use a checkpoint that is whole"
            expected = "a mean and a standard deviation for each field"
            got = f"{type(error).__name__} {error}"
            raise CheckpointError("normalisation", expected=expected, got=got, fix=fix) from error
        return Normalizer(mean=mean, std=std)


def _statistics(
    store: EpisodeStore, name: str, episodes: Int64[np.ndarray, " chosen"] | None, skip_nan: bool, fix: str
) -> tuple[np.ndarray, np.ndarray]:
    spec = store.schema[name]
    shape = spec.shape
    count, total = 0, np.zeros(shape)
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    for values in _chunks(store, name, episodes, skip_nan, fix):
        count += len(values)
        total += values.sum(axis=0)
        low, high = np.minimum(low, values.min(axis=0)), np.maximum(high, values.max(axis=0))
    if not count:
        fix = "choose a field that the chosen episodes hold"
        raise DataError(f"{store.path}, field {name!r}", expected="steps to take statistics of", got="none", fix=fix)
    # Rounding must not move the mean of a constant.
    mean = np.where(low == high, low, total / count)
    squares = np.zeros(shape)
    for values in _chunks(store, name, episodes, skip_nan, fix):
        squares += ((values - mean) ** 2).sum(axis=0)
    std = np.sqrt(squares / count)
    scale = float(np.sqrt(np.mean(std**2 + mean**2)))
    return mean, np.where(low == high, 0.0, np.maximum(std, _FLOOR * scale))


def _chunks(
    store: EpisodeStore, name: str, episodes: Int64[np.ndarray, " chosen"] | None, skip_nan: bool, fix: str
) -> Iterator[np.ndarray]:
    """The field's real and finite steps in float64, a bounded number at a time."""
    values, present = store.field(name), store.present(name)
    chosen = np.arange(len(store)) if episodes is None else np.unique(episodes)
    for first, last in stretches(store, chosen[present[chosen]], max(1, _CHUNK // store.schema[name].size)):
        part = np.asarray(values[first:last], np.float64)
        finite = np.isfinite(part.reshape(len(part), -1)).all(1)
        if not finite.all():
            if not skip_nan:
                row, starts = first + int(np.flatnonzero(~finite)[0]), store.episodes["start"]
                episode = int(np.searchsorted(starts, row, "right")) - 1
                refuse_number(store, name, episode, row - int(starts[episode]), fix)
            part = part[finite]
        if len(part):
            yield part


def stretches(store: EpisodeStore, episodes: Int64[np.ndarray, " chosen"], most: int) -> Iterator[tuple[int, int]]:
    """First and last row of the steps of ascending episodes, at most so many at once; neighbours are read as one."""
    if not len(episodes):
        return
    starts = store.episodes["start"][episodes]
    stops = starts + store.episodes["length"][episodes]
    first = np.flatnonzero(np.append(True, starts[1:] != stops[:-1]))
    last = np.append(first[1:], len(episodes)) - 1
    for begin, end in zip(starts[first].tolist(), stops[last].tolist(), strict=True):
        for row in range(begin, end, most):
            yield row, min(row + most, end)


def refuse_number(store: EpisodeStore, name: str, episode: int, step: int, fix: str = MEND) -> NoReturn:
    """Refuses a value that is not finite; `fix` is what the user can do.

    Raises:
        DataError: always; it names the field, the episode and the step.
    """
    where = f"{store.path}, field {name!r}, episode {episode}, step {step}"
    raise DataError(where, expected="finite numbers", got="NaN or infinity", fix=fix)
