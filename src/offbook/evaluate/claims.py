"""From measured values to what a ledger keeps: figures with their intervals, and the verdict that an interval gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

from numpy.typing import ArrayLike

from offbook.evaluate.stats import Interval, student_mean
from offbook.runs.ledger import Metric, Verdict


def as_metric(name: str, found: Interval, *, higher: bool | None = True, unit: str = "") -> Metric:
    """An estimate as a figure of a claim.

    Args:
        name: what was measured.
        found: the estimate; its ends are left out where it is of a single observation.
        higher: whether more is better; None where it is neither.
        unit: of the values.

    Example:
        >>> from offbook.evaluate.stats import wilson
        >>> as_metric("success", wilson(8, 10)).value
        0.8
    """
    several = found.n > 1
    return Metric(
        name=name, value=found.value, n=found.n, interval=(found.low, found.high) if several else None,
        method=found.method if several else "", unit=unit, higher_is_better=higher,
    )  # fmt: skip


def over_seeds(name: str, values: ArrayLike, *, higher: bool | None = True, unit: str = "") -> Metric:
    """The mean over the seeds of trainings with Student's interval, which with three of them is wide."""
    return as_metric(name, student_mean(values), higher=higher, unit=unit)


def separation(metric: Metric) -> Verdict:
    """Whether a difference that was claimed to be above 0 is, by its interval; without one nothing is separated.

    Example:
        >>> separation(over_seeds("gain", [1.0, 1.1, 0.9])), separation(over_seeds("gain", [1.0, -1.0, 0.5]))
        ('reproduced', 'not separated')
    """
    low, high = metric.interval or (-math.inf, math.inf)
    return "reproduced" if low > 0 else "contradicted" if high < 0 else "not separated"


def against_all(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim against several: it holds where it does against all, and is contradicted where it is by one.

    Example:
        >>> against_all(["reproduced", "not separated"]), against_all(["reproduced", "contradicted"])
        ('not separated', 'contradicted')
    """
    if "contradicted" in verdicts:
        return "contradicted"
    return "reproduced" if set(verdicts) == {"reproduced"} else "not separated"
