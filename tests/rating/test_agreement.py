import itertools

import numpy as np
import pytest
from scipy.special import stdtrit

from offbook.rating.agreement import (
    _alpha,
    _by_pair,
    _judged,
    agreement,
    agreement_between,
    answer,
    krippendorff_alpha,
    repeated,
)
from offbook.rating.records import Vote

# Hayes and Krippendorff's data: four coders, twelve units, 0 for none.
UNITS = "1101 2232 3333 3333 2222 1234 4444 1121 2222 0555 0011 0030"


def vote(id, rater, choice, pair="p", left="a", right="b", **changes):
    return Vote(
        **{"study": "s", "id": id, "pair": pair, "item": pair, "rater": rater, "left": left, "right": right}
        | {"choice": choice, "created": "2026-01-31T12:00:00+00:00"}
        | changes
    )


def test_alpha_of_the_published_example():
    assert krippendorff_alpha([[v for v in unit if v != "0"] for unit in UNITS.split()]) == pytest.approx(
        0.743, abs=5e-4
    )


def test_alpha_is_the_definition():
    rng = np.random.default_rng(0)
    units = [list(rng.choice(list("abc"), size=rng.integers(0, 5), p=[0.6, 0.3, 0.1])) for _ in range(40)]
    shared = [unit for unit in units if len(unit) > 1]
    values = [value for unit in shared for value in unit]
    within = sum(a != b for unit in shared for a, b in itertools.permutations(unit, 2) for _ in [0])
    assert within > 0
    observed = sum(sum(a != b for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in shared) / len(
        values
    )
    expected = np.mean([a != b for a, b in itertools.permutations(values, 2)])
    assert krippendorff_alpha(units) == pytest.approx(1 - observed / expected)


@pytest.mark.parametrize("units", [[], [["a"], ["b"]], [["a", "a"], ["a", "a", "a"]]])
def test_alpha_that_is_not_defined_is_no_number(units):
    assert krippendorff_alpha(units) is None


def test_answers_are_seen_from_the_pair_not_from_the_side():
    assert [answer(vote("1", "r", choice)) for choice in ("left", "right", "tie", "both_bad", "skip")] == [
        "first",
        "second",
        "neither",
        "neither",
        None,
    ]
    assert answer(vote("1", "r", "left", left="b", right="a")) == "second"


def test_one_rater_agrees_with_nobody():
    found = agreement([vote(str(i), "r", "left", pair=f"p{i}", reasons=("clear",)) for i in range(30)])
    assert (found.pairs, found.raters, found.raw, found.alpha, found.reasons) == (0, 0, None, None, {})


def test_agreement_of_raters():
    rng = np.random.default_rng(0)
    votes = []
    for pair, rater in itertools.product(range(200), range(3)):
        # The third rater answers by lot; who sees b on the left means the same by the other side.
        better = ("left", "right")[pair % 2] if rater < 2 else rng.choice(["left", "right"])
        swapped = rng.random() < 0.5
        choice = {"left": "right", "right": "left"}[better] if swapped else better
        left, right = ("b", "a") if swapped else ("a", "b")
        reasons = ("clear",) if pair % 4 < 2 else ()
        about = {"pair": f"p{pair}", "item": f"i{pair // 2}", "left": left, "right": right, "reasons": reasons}
        votes.append(vote(f"{pair}-{rater}", f"r{rater}", choice, **about))
        votes.append(vote(f"{pair}-{rater} skipped", f"r{rater}", "skip", **about | {"pair": f"q{pair}"}))
    found = agreement(votes)
    assert (found.pairs, found.raters) == (200, 3)
    assert found.raw.value == pytest.approx((1 + 0.5 + 0.5) / 3, abs=0.06)
    assert found.alpha.value == pytest.approx(1 / 3, abs=0.12)
    for figure in (found.raw, found.alpha):
        assert figure.low < figure.value < figure.high
        assert figure.method == "wider of bootstrap over 100 items and jackknife over 3 raters 0.95"
    # All give this reason or none does, so that there is no spread to measure.
    assert found.reasons["clear"].value == 1
    assert not np.isfinite(found.reasons["clear"].low)
    people, judge = [v for v in votes if v.rater != "r2"], [v for v in votes if v.rater == "r2"]
    assert agreement(people).alpha.method == "bootstrap over 100 items, for these raters 0.95"
    assert agreement_between(people, judge).value == pytest.approx(0.5, abs=0.1)
    assert agreement_between(people, people).value == 1
    assert agreement_between(people, []) is None


def test_leaving_out_a_rater_is_counting_without_them():
    rng = np.random.default_rng(1)
    votes = [
        vote(f"{pair}-{rater}", f"r{rater}", rng.choice(["left", "right", "tie"], p=[0.6, 0.3, 0.1]), pair=f"p{pair}")
        for pair, rater in itertools.product(range(60), range(4))
        if rng.random() < 0.8
    ]
    lacking = [agreement([v for v in votes if v.rater != f"r{rater}"]).alpha.value for rater in range(4)]
    half = stdtrit(3, 0.975) * np.sqrt(3 * np.var(lacking))
    found = agreement(votes).alpha
    assert found.value - found.low >= half * (1 - 1e-9)
    _, without = _judged([unit for unit in _by_pair(votes) if len(unit) > 1], answer)
    np.testing.assert_allclose([_alpha(each) for each in without], lacking)


def test_agreement_of_few_raters_holds_that_of_all():
    """Raters differ in how often they are right; two of them agree on average as often as the truth says."""
    rng, share = np.random.default_rng(0), 6 / 9
    truth, held = share**2 + (1 - share) ** 2, []
    for _ in range(100):
        right = rng.random((40, 4)) < rng.beta(6, 3, size=4)
        votes = [
            vote(f"{pair}-{rater}", f"r{rater}", "left" if right[pair, rater] else "right", pair=f"p{pair}")
            for pair, rater in np.ndindex(40, 4)
        ]
        found = agreement(votes).raw
        held.append(found.low <= truth <= found.high)
    assert np.mean(held) >= 0.88


def test_repeats_are_compared_with_the_same_rater_s_first_answer():
    again = {"pair": "q", "item": "p", "pair_kind": "repeat", "repeat_of": "p", "left": "b", "right": "a"}
    first = [vote("1", "r", "left"), vote("2", "s", "tie"), vote("3", "t", "skip")]
    later = [vote("4", "r", "right", **again), vote("5", "s", "left", **again), vote("6", "t", "left", **again)]
    later.append(vote("7", "u", "left", **again))
    assert [(v.id, same) for v, same in repeated(first + later)] == [("4", True), ("5", False)]
    assert repeated([*first[:1], vote("8", "r", "skip", **again)]) == []
