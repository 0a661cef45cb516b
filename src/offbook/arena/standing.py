"""The figures of one submission, renewed with each of its results, so that a page of thousands needs no arithmetic."""

from __future__ import annotations

import math
from functools import lru_cache

from sqlalchemy import select
from sqlalchemy.orm import Session

from offbook.arena.tables import Result, Submission
from offbook.evaluate.stats import Interval, bootstrap_mean, clopper_pearson


def refresh_summary(session: Session, submission: Submission) -> None:
    """Computes mean score with its bootstrap interval, successes, median latency and late share from the results."""
    rows = session.execute(
        select(Result.score, Result.success, Result.latency_ms, Result.late_share)
        .where(Result.submission_id == submission.id)
        .order_by(Result.trial_id)
    ).all()
    if not rows:
        return
    score = bootstrap_mean([row.score for row in rows], resamples=2000)
    judged = [row.success for row in rows if row.success is not None]
    latencies = sorted(row.latency_ms for row in rows if row.latency_ms is not None)
    late = [row.late_share for row in rows if row.late_share is not None]
    submission.n = len(rows)
    submission.score = score.value
    submission.score_low, submission.score_high = _finite(score.low), _finite(score.high)
    submission.judged = len(judged)
    submission.successes = sum(judged) if judged else None
    submission.latency_ms = latencies[len(latencies) // 2] if latencies else None
    submission.late_share = sum(late) / len(late) if late else None


def _finite(end: float) -> float | None:
    return end if math.isfinite(end) else None


@lru_cache(maxsize=10_000)
def success_interval(successes: int, n: int) -> Interval:
    """Clopper and Pearson's interval, remembered: a leaderboard asks for the same few again and again."""
    return clopper_pearson(successes, n)
