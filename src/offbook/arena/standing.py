"""The figures of one submission, renewed with each of its results, so that a page of thousands needs no arithmetic."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from offbook.arena.tables import Benchmark, Result, Submission
from offbook.evaluate.stats import Interval, bootstrap_mean, bounded_mean, clopper_pearson, paired_bootstrap


def refresh_summary(session: Session, submission: Submission, benchmark: Benchmark) -> None:
    """Computes mean score with its interval, successes, median latency and late share from the results."""
    rows = session.execute(
        select(Result.score, Result.success, Result.outcome, Result.latency_ms, Result.late_share)
        .where(Result.submission_id == submission.id)
        .order_by(Result.trial_id)
    ).all()
    if not rows:
        return
    score = mean_score([row.score for row in rows], benchmark)
    judged = [success for success in successes(rows) if success is not None]
    latencies = sorted(row.latency_ms for row in rows if row.latency_ms is not None)
    late = [row.late_share for row in rows if row.late_share is not None]
    submission.n = len(rows)
    submission.score, submission.score_low, submission.score_high = score["value"], score["low"], score["high"]
    submission.judged = len(judged)
    submission.successes = sum(judged) if judged else None
    submission.latency_ms = latencies[len(latencies) // 2] if latencies else None
    submission.late_share = sum(late) / len(late) if late else None


def successes(rows: Collection[Any]) -> list[bool | None]:
    """Which results of a submission were successes; where trials that were played say nothing, neither do lost ones."""
    unjudged = any(row.outcome == "done" and row.success is None for row in rows)
    return [None if unjudged and row.outcome != "done" else row.success for row in rows]


def mean_score(scores: Sequence[float], benchmark: Benchmark) -> dict[str, Any]:
    """The mean with its 95 % interval, `{value, low, high}`; ends that nothing is known of are None."""
    if benchmark.least is not None and benchmark.most is not None:
        return _ends(bounded_mean(scores, benchmark.least, benchmark.most, resamples=4000))
    return _ends(bootstrap_mean(scores, resamples=4000))


def mean_difference(first: Sequence[float], second: Sequence[float], benchmark: Benchmark) -> dict[str, Any]:
    """The same for the paired difference first - second."""
    if benchmark.least is not None and benchmark.most is not None:
        width, differences = benchmark.most - benchmark.least, [a - b for a, b in zip(first, second, strict=True)]
        return _ends(bounded_mean(differences, -width, width, resamples=4000))
    return _ends(paired_bootstrap(first, second, resamples=4000))


def _ends(found: Interval) -> dict[str, Any]:
    # Resampling equal numbers finds no spread, which is not to say that there is none.
    known = math.isfinite(found.low) and found.low < found.high
    return {"value": found.value, "low": found.low if known else None, "high": found.high if known else None}


@lru_cache(maxsize=10_000)
def success_interval(successes: int, n: int) -> Interval:
    """Clopper and Pearson's interval, remembered: a leaderboard asks for the same few again and again."""
    return clopper_pearson(successes, n)
