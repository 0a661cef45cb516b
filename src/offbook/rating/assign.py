"""Which pair a rater is shown next, and which side is which: a pure function of the seed and of what was shown before.

Real pairs go round evenly, or where a vote tells most; known answers and repeats with swapped sides are strewn in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from offbook.runs.seeding import generator

BLOCK = 4
"""In each so many lots of a rater, half put the first output of the pair on the left."""

LAG = 3
"""A repeat comes after so many other pairs at least."""

UNIFORM = 0.1
"""Share of the draws by gain that every pair of systems has a part in, however well it is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a study gives out its pairs.

    Attributes:
        seed: from which all lots follow.
        raters_per_pair: answers that each real pair shall get from raters of one kind; a skip is none.
        gold_rate: share of pairs with a known answer among those that a rater is shown, 0 to below 1.
        repeat_rate: share of repeats among them.
        policy: `balanced` gives the real pair with the fewest answers; `greedy` draws two systems by how much one more
            answer would narrow what is known of them, without an end.
    """

    seed: int
    raters_per_pair: int = 3
    gold_rate: float = 0.07
    repeat_rate: float = 0.07
    policy: str = "balanced"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair of the study: its id, its kind, its two systems in either order, and the id of its repeat, if any."""

    id: int
    kind: str
    systems: tuple[int, int]
    repeat: int | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """What a rater was shown before and what became of it: `open`, `voted` or `skipped`; what expired is forgotten."""

    pair: int
    left_is_a: bool
    state: str


@dataclass(frozen=True, slots=True)
class Tally:
    """Answers about two systems: how many, the sum of the points of the first (1, 1/2 or 0), and of their squares."""

    n: int = 0
    points: float = 0.0
    squares: float = 0.0

    @property
    def gain(self) -> float:
        r"""How much one more answer narrows the mean: :math:`s_{ij} (1/\sqrt{n_{ij}} - 1/\sqrt{n_{ij} + 1})`.

        Two answers, one for each side, are taken as given, so that nothing is infinite at the beginning.

        Source: Chiang et al., Chatbot Arena, arXiv:2403.04132, the rule for sampling pairs.
        """
        n = self.n + 2
        mean = (self.points + 1) / n
        spread = max(0.0, (self.squares + 1) / n - mean**2) ** 0.5
        return float(spread * (n**-0.5 - (n + 1) ** -0.5))


def choose(
    plan: Plan,
    rater: int,
    own: Sequence[Shown],
    pairs: Sequence[Candidate],
    answers: Mapping[int, int],
    tallies: Mapping[tuple[int, int], Tally] | None = None,
    *,
    expired: int = 0,
) -> tuple[int, bool] | None:
    """The pair that a rater is shown next, and whether its first output stands on the left.

    Args:
        plan: of the study.
        rater: number of the rater in the study.
        own: what this rater was shown, in order, without what expired.
        pairs: all pairs of the study.
        answers: by id of a real pair, the answers that it has or is about to get from raters of this one's kind.
        tallies: by two systems in ascending order, what raters of this kind answered; for `greedy`.
        expired: how many pairs this rater let expire: the next lot is another one, or a pair that cannot be shown
            would come again and again.

    Returns:
        Id of the pair and the lot of the sides; None when nothing is left for this rater.

    Example:
        >>> pairs = [Candidate(1, "real", (1, 2)), Candidate(2, "real", (1, 2))]
        >>> choose(Plan(seed=0), 0, [Shown(1, True, "voted")], pairs, {1: 3})[0]
        2
    """
    k, seen = len(own), {shown.pair for shown in own}
    kinds = {pair.id: pair.kind for pair in pairs if pair.id in seen}
    real = [pair for pair in pairs if pair.kind == "real" and pair.id not in seen]
    if plan.policy == "balanced":
        real = [pair for pair in real if answers.get(pair.id, 0) < plan.raters_per_pair]
    if not real:
        return None
    chance = generator(plan.seed, "pair", rater, k + expired)
    gold = [pair.id for pair in pairs if pair.kind == "gold" and pair.id not in seen]
    if gold and _due(plan, "gold", plan.gold_rate, rater, k) > sum(kinds[shown.pair] == "gold" for shown in own):
        return gold[chance.integers(len(gold))], _lot(plan, rater, own, kinds)
    repeats = _repeats(own, pairs, seen)
    due = _due(plan, "repeat", plan.repeat_rate, rater, k)
    if repeats and due > sum(kinds[shown.pair] == "repeat" for shown in own):
        return repeats[chance.integers(len(repeats))]
    if plan.policy == "greedy":
        real = _by_gain(real, tallies or {}, chance)
    fewest = min(answers.get(pair.id, 0) for pair in real)
    best = [pair.id for pair in real if answers.get(pair.id, 0) == fewest]
    return best[chance.integers(len(best))], _lot(plan, rater, own, kinds)


def _due(plan: Plan, name: str, rate: float, rater: int, k: int) -> int:
    """How many of a kind have their place among the first k + 1 pairs: one in each stretch of 1 / rate, by lot."""
    if rate <= 0:
        return 0
    count = int((k + 1) * rate) + 1
    places = (np.arange(count) + generator(plan.seed, name, rater).random(count)) / rate
    return int((np.floor(places) <= k).sum())


def _lot(plan: Plan, rater: int, own: Sequence[Shown], kinds: Mapping[int, str]) -> bool:
    """The side by lot, half and half in each block; the sides of repeats are no lots."""
    block, place = divmod(sum(kinds[shown.pair] != "repeat" for shown in own), BLOCK)
    return bool(generator(plan.seed, "side", rater, block).permutation(BLOCK)[place] % 2)


def _repeats(own: Sequence[Shown], pairs: Sequence[Candidate], seen: set[int]) -> list[tuple[int, bool]]:
    """Repeats of what this rater answered a while ago, each with its sides swapped."""
    twins = {pair.id: pair.repeat for pair in pairs if pair.repeat is not None and pair.repeat not in seen}
    earlier = own[: max(0, len(own) - LAG)]
    return [
        (twin, not shown.left_is_a)
        for shown in earlier
        if shown.state == "voted" and (twin := twins.get(shown.pair)) is not None
    ]


def _by_gain(
    real: Sequence[Candidate], tallies: Mapping[tuple[int, int], Tally], chance: np.random.Generator
) -> list[Candidate]:
    """The real pairs of two systems that are drawn by gain."""
    groups: dict[tuple[int, int], list[Candidate]] = {}
    for pair in real:
        groups.setdefault((min(pair.systems), max(pair.systems)), []).append(pair)
    gains = np.array([tallies.get(systems, Tally()).gain for systems in groups])
    shares = (1 - UNIFORM) * gains / gains.sum() + UNIFORM / len(gains)
    return list(groups.values())[chance.choice(len(gains), p=shares)]
