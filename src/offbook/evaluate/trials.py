"""Paired comparisons: two policies met the same episodes, so what an episode gives to both cancels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from offbook.errors import ConfigError
from offbook.evaluate.rollout import Evaluation
from offbook.evaluate.stats import Interval, mcnemar_exact, paired_bootstrap


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two policies on the same episodes.

    Attributes:
        first: name of the first policy.
        second: name of the second.
        metric: what the difference is of, `score` or `return`.
        difference: mean of first - second, with its paired interval.
        first_only: episodes in which only the first succeeded; None where success is not known.
        second_only: episodes in which only the second succeeded.
        p_value: of equal success rates, by McNemar's exact test.
    """

    first: str
    second: str
    metric: str
    difference: Interval
    first_only: int | None = None
    second_only: int | None = None
    p_value: float | None = None

    @property
    def verdict(self) -> str:
        """Who is better by the interval, or that the episodes do not tell."""
        if self.difference.low > 0:
            return f"{self.first} better"
        return f"{self.second} better" if self.difference.high < 0 else "not separated"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "first": self.first,
            "second": self.second,
            "metric": self.metric,
            "difference": self.difference.to_json(),
            "first_only": self.first_only,
            "second_only": self.second_only,
            "mcnemar_p": self.p_value,
            "verdict": self.verdict,
        }


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Compares two evaluations on the same episodes.

    Raises:
        ConfigError: they are of different environments, seeds or scenes.

    Example:
        >>> from offbook.evaluate.rollout import EpisodeResult
        >>> def evaluated(name, scores):
        ...     results = [
        ...         EpisodeResult(seed=i, return_=s, steps=1, success=s > 0.5, score=s, terminated=True)
        ...         for i, s in enumerate(scores)
        ...     ]
        ...     return Evaluation(environment="a:b", settings={}, policy=name, scenes=None, results=tuple(results))
        >>> compare(evaluated("x", [0.6, 0.8, 1.0] * 3), evaluated("y", [0.4, 0.6, 0.8] * 3)).verdict
        'x better'
    """
    _check_paired(first, second)
    metric = first.metric if first.metric == second.metric else "return"
    difference = paired_bootstrap(first.values(metric), second.values(metric))
    if "success" not in first.summary or "success" not in second.summary:
        return Comparison(first=first.policy, second=second.policy, metric=metric, difference=difference)
    won, lost = first.values("success"), second.values("success")
    first_only, second_only = int((won > lost).sum()), int((lost > won).sum())
    return Comparison(
        first=first.policy,
        second=second.policy,
        metric=metric,
        difference=difference,
        first_only=first_only,
        second_only=second_only,
        p_value=mcnemar_exact(first_only, second_only),
    )


def compare_all(evaluations: Sequence[Evaluation]) -> list[Comparison]:
    """Every pair once, in the order given. The p-values are not corrected for the number of pairs.

    Raises:
        ConfigError: see `compare`.
    """
    return [compare(first, second) for first, second in combinations(evaluations, 2)]


def _check_paired(first: Evaluation, second: Evaluation) -> None:
    for what in ("environment", "settings", "scenes"):
        a, b = getattr(first, what), getattr(second, what)
        if a != b:
            fix = "evaluate both in the same way"
            where = f"comparison of {first.policy!r} and {second.policy!r}"
            raise ConfigError(where, expected=f"the same {what}", got=f"{str(a)[:100]} and {str(b)[:100]}", fix=fix)
    if [result.seed for result in first.results] != [result.seed for result in second.results]:
        fix = "evaluate both with the same number of episodes and seed"
        expected = "the same episodes"
        got = f"{len(first.results)} and {len(second.results)} episodes of different seeds"
        raise ConfigError(f"comparison of {first.policy!r} and {second.policy!r}", expected=expected, got=got, fix=fix)
