"""Small pieces for `benchmarks/`: repeated timing, and medians and ratios with intervals.

On a shared machine only ratios of two things timed by turns in one process travel; give both sides to `timed`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from offbook.errors import DataError
from offbook.runs.ledger import Metric


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `offbook bench` hands to a benchmark's `run`.

    Attributes:
        seed: seed of everything random in it.
        repeats: how often each side is timed.
    """

    seed: int = 0
    repeats: int = 11


def timed(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
    calls: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times several functions by turns, so that a busy spell of the machine meets all of them.

    Args:
        sides: the functions by name.
        repeats: rounds that count.
        warm_up: rounds before them that do not.
        calls: how often a function is called in a round, by turns with the others; once where it is not named.
        clock: what tells the time in seconds; `time.process_time` leaves out what other processes take.

    Returns:
        Seconds of every round by name, of all its calls together.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    times = {name: (calls or {}).get(name, 1) for name in sides}
    for turn in range(-warm_up, repeats):
        spent = dict.fromkeys(sides, 0.0)
        for call in range(max(times.values())):
            for name, function in sides.items():
                if call < times[name]:
                    start = clock()
                    function()
                    spent[name] += clock() - start
        if turn >= 0:
            for name, of in seconds.items():
                of.append(spent[name])
    return seconds


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the interval between the order statistics that holds the true median in 95 % of cases or more.

    The number of samples below the true median is binomial with n and 1/2; the ranks are the widest pair whose two
    tails each hold at most 2.5 %. Below six samples no pair does, and the interval is the whole range.

    Raises:
        DataError: there is no sample.

    Example:
        >>> median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
        (3.5, 1.0, 6.0)
    """
    if not samples:
        raise DataError("median", expected="samples", got="none", fix="measure at least once")
    ordered, n = sorted(samples), len(samples)
    rank, tail = 0, 1.0
    while rank + 1 <= n // 2 and tail + math.comb(n, rank + 1) <= 0.025 * 2**n:
        rank += 1
        tail += math.comb(n, rank)
    return statistics.median(ordered), ordered[rank], ordered[n - 1 - rank]


def median_metric(name: str, samples: Sequence[float], *, unit: str = "", higher_is_better: bool = False) -> Metric:
    """The median of repeated measurements as a metric of the ledger."""
    value, low, high = median_interval(samples)
    return Metric(
        name=name,
        value=value,
        n=len(samples),
        interval=(low, high) if len(samples) > 1 else None,
        method="median, order statistics" if len(samples) >= 6 else "median, range",
        unit=unit,
        higher_is_better=higher_is_better,
    )


def quantile_metric(name: str, samples: Sequence[float], share: float, *, unit: str = "") -> Metric:
    """A quantile, the less the better, with the interval between the order statistics that hold it in 95 % of cases.

    Args:
        name: of the metric.
        samples: independent measurements.
        share: of them that are at most the quantile, in (0, 1).
        unit: of the values.

    Example:
        >>> quantile_metric("slowest twentieth", [float(ms) for ms in range(1, 101)], 0.95).interval
        (91.0, 99.0)
    """
    ordered, n = sorted(samples), len(samples)
    spread = statistics.NormalDist().inv_cdf(0.975) * math.sqrt(n * share * (1 - share))
    low, here, high = (ordered[min(max(round(n * share + d), 1), n) - 1] for d in (-spread, 0.0, spread))
    return Metric(
        name=name, value=here, n=n, interval=(low, high), method="order statistics", unit=unit, higher_is_better=False,
    )  # fmt: skip
