"""Who is shown what: even, by lot, the same from the same seed, with known answers and repeats at their rates."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from offbook.rating.assign import BLOCK, LAG, Candidate, Plan, Shown, Tally, choose

REAL = [Candidate(i, "real", (1 + i % 3, 2 + i % 3), repeat=1000 + i) for i in range(60)]
TWINS = [Candidate(1000 + i, "repeat", REAL[i].systems) for i in range(60)]
GOLD = [Candidate(2000 + i, "gold", (1, 9)) for i in range(30)]
PAIRS = REAL + TWINS + GOLD


def judged(plan: Plan, raters: int, cap: int, skips: float = 0.0, order: str = "turns") -> list[list[Shown]]:
    """What raters are shown when they come in turns, or one after the other."""
    own: list[list[Shown]] = [[] for _ in range(raters)]
    answers: Counter[int] = Counter()
    chance = np.random.default_rng(1)
    turns = [(k, r) for k in range(cap) for r in range(raters)]
    for _, rater in turns if order == "turns" else sorted(turns, key=lambda turn: turn[1]):
        given = choose(plan, rater, own[rater], PAIRS, answers)
        if given is None:
            continue
        state = "skipped" if chance.random() < skips else "voted"
        own[rater].append(Shown(*given, state))
        answers[given[0]] += state == "voted"
    return own


def kind(shown: Shown) -> str:
    return {0: "real", 1: "repeat", 2: "gold"}[shown.pair // 1000]


@pytest.mark.parametrize("order", ["turns", "one by one"])
def test_every_real_pair_gets_its_raters_and_none_more(order: str) -> None:
    own = judged(Plan(seed=3), 6, 60, skips=0.1, order=order)
    answers = Counter(shown.pair for each in own for shown in each if shown.state == "voted" and kind(shown) == "real")
    assert set(answers) == {pair.id for pair in REAL}
    assert set(answers.values()) == {3}
    for each in own:
        assert len({shown.pair for shown in each}) == len(each)


def test_counts_never_part_by_more_than_one_while_raters_take_turns() -> None:
    plan, answers = Plan(seed=0, gold_rate=0, repeat_rate=0), Counter({pair.id: 0 for pair in REAL})
    own: list[list[Shown]] = [[] for _ in range(9)]
    for turn in range(3 * 60):
        given = choose(plan, turn % 9, own[turn % 9], PAIRS, answers)
        assert given is not None
        own[turn % 9].append(Shown(*given, "voted"))
        answers[given[0]] += 1
        assert max(answers.values()) - min(answers.values()) <= 1


def test_sides_are_balanced_within_each_rater_and_by_lot() -> None:
    own = judged(Plan(seed=5), 8, 40)
    sequences = []
    for each in own:
        sides = [shown.left_is_a for shown in each if kind(shown) != "repeat"]
        for n in range(1, len(sides) + 1):
            assert abs(2 * sum(sides[:n]) - n) <= BLOCK / 2
        sequences.append(tuple(sides[:20]))
    assert len(set(sequences)) == 8


def test_rates_of_gold_and_repeats_hold_for_every_rater() -> None:
    for plan in (Plan(seed=1), Plan(seed=2, gold_rate=0.05, repeat_rate=0.1)):
        for each in judged(plan, 4, 60):
            for name, rate in (("gold", plan.gold_rate), ("repeat", plan.repeat_rate)):
                assert abs(sum(kind(shown) == name for shown in each) - rate * len(each)) <= 1.5


def test_a_repeat_swaps_the_sides_of_an_answered_pair_after_a_while() -> None:
    own = judged(Plan(seed=4, repeat_rate=0.1), 6, 50, skips=0.3)
    count = 0
    for each in own:
        places = {shown.pair: (i, shown) for i, shown in enumerate(each)}
        for i, shown in enumerate(each):
            if kind(shown) == "repeat":
                before, first = places[shown.pair - 1000]
                assert (first.left_is_a, first.state) == (not shown.left_is_a, "voted")
                assert i - before > LAG
                count += 1
    assert count > 10


def test_the_same_seed_gives_the_same_lots_and_another_one_others() -> None:
    assert judged(Plan(seed=7), 3, 30) == judged(Plan(seed=7), 3, 30)
    assert judged(Plan(seed=7), 3, 30) != judged(Plan(seed=8), 3, 30)
    assert [shown.pair for shown in judged(Plan(seed=7), 2, 9)[0]] != [
        shown.pair for shown in judged(Plan(seed=7), 2, 9)[1]
    ]


def test_where_gold_falls_cannot_be_counted_off() -> None:
    gaps = set()
    for each in judged(Plan(seed=9, repeat_rate=0), 6, 60):
        places = [i for i, shown in enumerate(each) if kind(shown) == "gold"]
        gaps |= {b - a for a, b in itertools.pairwise(places)}
    assert max(gaps) - min(gaps) > 5


def test_the_gain_is_the_published_one() -> None:
    # 8 answers, 3 of them wins, and the two that are taken as given: mean 0.4 of 10.
    tally = Tally(8, 3.0, 3.0)
    assert tally.gain == pytest.approx((0.4 * 0.6) ** 0.5 * (10**-0.5 - 11**-0.5))
    assert Tally().gain > Tally(2, 1.0, 1.0).gain > Tally(100, 50.0, 50.0).gain > Tally(1000, 1000.0, 1000.0).gain > 0


def test_greedy_looks_where_least_is_known_and_forgets_nobody() -> None:
    tallies = {(1, 2): Tally(400, 200.0, 200.0), (2, 3): Tally(400, 390.0, 390.0), (3, 4): Tally(4, 2.0, 2.0)}
    plan = Plan(seed=0, policy="greedy", gold_rate=0, repeat_rate=0)
    systems = {pair.id: pair.systems for pair in REAL}
    draws = Counter(systems[choose(plan, rater, [], PAIRS, {}, tallies)[0]] for rater in range(1500))
    shares = {pair: draws[pair] / 1500 for pair in tallies}
    assert shares[3, 4] > 0.8
    floor = 0.1 / 3
    assert shares[2, 3] > floor * 0.7
    assert shares[1, 2] > shares[2, 3] - 0.02


def test_greedy_goes_on_when_every_pair_has_its_raters() -> None:
    answers = {pair.id: 3 for pair in REAL}
    assert choose(Plan(seed=0), 0, [], PAIRS, answers) is None
    assert choose(Plan(seed=0, policy="greedy"), 0, [], PAIRS, answers) is not None


def test_a_pair_that_was_not_answered_in_time_need_not_come_again() -> None:
    plan, answers = Plan(seed=1), Counter()
    assert len({choose(plan, 0, [], REAL, answers, expired=n) for n in range(10)}) > 5
    assert choose(plan, 0, [], REAL, answers, expired=3) == choose(plan, 0, [], REAL, answers, expired=3)
