import itertools
from dataclasses import replace

import numpy as np
import pytest
from tournaments import tournament, votes_of

from offbook.errors import ConfigError
from offbook.rating.exports import votes_with_rules
from offbook.rating.quality import Rules, apply_rules, fit_z, rater_quality, streak_p
from offbook.rating.records import Vote
from offbook.rating.tables import Study


def vote(number, choice="left", **changes):
    return Vote(
        **{"study": "s", "id": f"{number:04}", "pair": f"p{number}", "item": f"p{number}", "rater": "r"}
        | {"left": "a", "right": "b", "choice": choice, "created": f"2026-01-31T12:{number // 60:02}:{number % 60:02}Z"}
        | changes
    )


@pytest.mark.parametrize("n", [2, 3, 7])
def test_streaks_have_the_chance_that_coins_give(n):
    sequences = list(itertools.product(("left", "right"), repeat=n))
    changes = [sum(a != b for a, b in itertools.pairwise(sides)) for sides in sequences]
    for sides, own in zip(sequences, changes, strict=True):
        assert streak_p(sides) == pytest.approx(np.mean([other <= own for other in changes]))


def test_too_few_sides_say_nothing_and_thousands_do():
    assert streak_p([]) is streak_p(["left"]) is None
    assert streak_p(["left"] * 5000) == 0
    assert streak_p(["left", "right"] * 2500) == 1


def test_signs_of_one_rater():
    votes = [vote(i, ("left", "right", "tie", "skip")[i % 4], dwell_ms=100 * i) for i in range(20)]
    votes += [vote(20 + i, choice, pair_kind="gold", expected="a") for i, choice in enumerate(("left", "right", "tie"))]
    again = {"item": "p0", "pair_kind": "repeat", "repeat_of": "p0", "left": "b", "right": "a"}
    votes += [vote(30, "right", **again), vote(31, "left", pair="p31b", **again)]
    found = rater_quality(votes[::-1], min_dwell_ms=350)[0]
    assert (found.votes, found.skips, found.gold, found.gold_failures) == (25, 5, 3, 2)
    assert (found.repeats, found.consistent, found.hasty, found.fit_z) == (2, 1, 3, None)
    assert found.dwell_ms == 900
    assert found.left_share == 0.5
    assert found.streak_p == streak_p(["left", "right"] * 6 + ["right", "left"])
    assert rater_quality(votes)[0].hasty is None


def test_a_rater_who_answers_the_other_way_round_stands_out():
    _, data = tournament(4, systems=5, n=3000)
    n = np.arange(3000)
    votes = votes_of(data, n % 30, n % 100)
    turned = {"left": "right", "right": "left", "tie": "tie"}
    votes = [replace(each, choice=turned[each.choice]) if each.rater == "r007" else each for each in votes]
    found = fit_z(votes)
    assert found["r007"] < -5
    others = [z for rater, z in found.items() if rater != "r007"]
    assert max(map(abs, others)) < 4
    assert np.mean(others) == pytest.approx(0, abs=0.8)
    assert fit_z([each for each in votes if each.rater == "r007"]) == {}


def test_rules_name_what_they_leave_out():
    steady = [vote(i, ("left", "right")[i * i % 3 % 2], rater="good", dwell_ms=5000) for i in range(30)]
    lazy = [vote(100 + i, rater="lazy", dwell_ms=5000, excluded=("asked to",) if i == 0 else ()) for i in range(30)]
    quick = [
        vote(200 + i, ("left", "right")[i * i % 3 % 2], rater="quick", dwell_ms=200 + 1000 * (i < 10))
        for i in range(30)
    ]
    blind = [vote(300 + i, "right", rater="blind", pair_kind="gold", expected="a") for i in range(4)]
    votes = steady + lazy + quick + blind
    rules = Rules(max_gold_failures=0.5, min_dwell_ms=800, min_streak_p=1e-4)
    judged = apply_rules(votes, rules)
    assert [replace(each, excluded=()) for each in judged] == [replace(each, excluded=()) for each in votes]
    broken = {
        name: [each.excluded for each in judged if each.rater == name] for name in ("good", "lazy", "quick", "blind")
    }
    assert set(broken["good"]) == {()}
    assert broken["lazy"] == [("asked to", "streak"), *[("streak",)] * 29]
    assert broken["quick"] == [()] * 10 + [("dwell",)] * 20
    assert set(broken["blind"]) == {("gold",)}
    whole = apply_rules(votes, Rules(min_dwell_ms=800, max_hasty=0.5))
    assert {each.excluded for each in whole if each.rater == "quick"} == {("haste",), ("dwell", "haste")}
    assert apply_rules(votes, Rules()) == votes
    skipped = [vote(900, "skip", dwell_ms=100)]
    assert apply_rules(skipped, Rules(min_dwell_ms=800)) == skipped


def test_people_who_do_not_say_what_they_watched_have_watched_nothing():
    study = Study(min_watch=0.9, prereg={"rules": {}})
    shares = (None, 0.0, 0.8, 0.9)
    votes = [vote(i, watched=share, excluded=("watched",) if i == 2 else ()) for i, share in enumerate(shares)]
    assert [each.excluded for each in votes_with_rules(study, votes)] == [("watched",)] * 3 + [()]
    scripts = [replace(each, rater_kind="script", excluded=()) for each in votes]
    assert votes_with_rules(study, scripts) == scripts
    skipped = [vote(9, "skip", watched=0.0)]
    assert votes_with_rules(study, skipped) == skipped
    study.min_watch = 0.0
    assert votes_with_rules(study, votes) == votes


def test_kinds_of_raters_are_judged_apart():
    _, data = tournament(4, systems=3, n=300)
    people = votes_of(data, np.arange(300) % 5, np.arange(300) % 50)
    # The only script has nobody to differ from.
    scripts = [replace(each, id=f"x{each.id}", rater="script", rater_kind="script", choice="left") for each in people]
    judged = apply_rules(people + scripts, Rules(min_fit_z=-4.0))
    assert judged == people + scripts


@pytest.mark.parametrize(
    ("rules", "flag"),
    [
        ({"max_gold_failures": 2.0}, "rules.max-gold-failures"),
        ({"min_dwell_ms": 0}, "rules.min-dwell-ms"),
        ({"max_hasty": 0.5}, "rules.max-hasty"),
        ({"min_streak_p": -0.1}, "rules.min-streak-p"),
        ({"min_fit_z": 1.0}, "rules.min-fit-z"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, flag):
    with pytest.raises(ConfigError, match=flag):
        Rules(**rules)
