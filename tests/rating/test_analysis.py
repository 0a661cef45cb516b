import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tournaments import chances, tournament, votes_of

from offbook.cli.report import as_json, table
from offbook.errors import ConfigError, DataError
from offbook.rating.analysis import NOT_ENOUGH, analyse
from offbook.rating.records import Vote, read_votes, write_votes
from offbook.rating.report import draw_ratings, tables

N = 600


@pytest.fixture(scope="module")
def votes():
    _, data = tournament(1, systems=4, n=N)
    rng = np.random.default_rng(0)
    return votes_of(data, rng.integers(25, size=N), rng.integers(40, size=N))


@pytest.fixture(scope="module")
def analysis(votes):
    return analyse(votes, anchor="s001")


def theta(group):
    return {of.system: of.theta.value for of in group.ranking.ratings}


def test_figures_are_a_function_of_the_votes(votes, analysis, tmp_path):
    write_votes(tmp_path / "votes.jsonl", votes[::-1])
    again = analyse(read_votes(tmp_path / "votes.jsonl"), anchor="s001")
    assert again == analysis
    assert json.loads(json.dumps(analysis.to_json(), allow_nan=False))["groups"][0]["kind"] == "human"
    assert as_json(analysis.to_json()) == as_json(again.to_json())


def test_a_ranking(votes, analysis):
    (group,) = analysis.groups
    ranking = group.ranking
    assert (analysis.votes, group.votes, ranking.votes, ranking.raters, ranking.items) == (N, N, N, 25, 40)
    assert [of.rank for of in ranking.ratings] == [1, 2, 3, 4]
    assert theta(group)["s001"] == 0
    assert sum(of.wins for of in ranking.ratings) == sum(of.losses for of in ranking.ratings)
    assert sum(of.votes for of in ranking.ratings) == 2 * N
    truth, _ = tournament(1, systems=4, n=N)
    for of in ranking.ratings:
        assert of.theta.value == pytest.approx(truth[int(of.system[1:])] - truth[1], abs=0.4)
        assert of.ranks[0] <= of.rank <= of.ranks[1]
    for better, worse, step in zip(ranking.ratings, ranking.ratings[1:], ranking.steps, strict=False):
        assert step.difference.value == pytest.approx(better.theta.value - worse.theta.value)
        assert step.votes is None or step.votes >= 1
    assert ranking.left.value.value == pytest.approx(0.3, abs=0.25)
    assert ranking.nu == pytest.approx(0.4, abs=0.1)
    beside = {of.system: of for of in group.shares}
    direct = [vote for vote in votes if {vote.left, vote.right} == {"s000", "s001"}]
    assert beside["s000"].equal_or_better.value == np.mean([vote.winner != "s001" for vote in direct])
    assert set(beside) == {"s000", "s002", "s003"}


def test_ranks_do_not_hang_on_which_system_is_called_0():
    """A beats B clearly; T, with few votes against either, is far less sure than their difference."""
    plain = {"study": "s", "created": "2026-01-31T12:00:00+00:00"}
    made = []
    for pair, count, wins in (("AB", 400, 248), ("AT", 25, 13), ("BT", 25, 12)):
        for i in range(count):
            left, right = pair if i % 2 else pair[::-1]
            choice = "left" if (left == pair[0]) == (i % 25 < 25 * wins / count) else "right"
            name = f"{pair}{i}"
            made.append(Vote(id=name, pair=name, item=name, rater=name, left=left, right=right, choice=choice, **plain))
    for anchor in (None, "A", "B", "T"):
        (group,) = analyse(made, anchor=anchor).groups
        ranks = {of.system: of.ranks for of in group.ranking.ratings}
        assert ranks == {"A": (1, 2), "B": (2, 3), "T": (1, 3)}, anchor


def test_both_bad_ranks_like_a_tie_and_is_told_apart(votes, analysis):
    bad = [replace(vote, choice="both_bad") if vote.choice == "tie" else vote for vote in votes]
    ties = sum(vote.choice == "tie" for vote in votes)
    (found,), (before,) = analyse(bad, anchor="s001").groups, analysis.groups
    assert theta(found) == theta(before)
    assert (before.both_bad.value, found.both_bad.value) == (0, ties / N)
    assert sum(of.both_bad for of in found.ranking.ratings) == sum(of.ties for of in before.ranking.ratings) == 2 * ties


def test_skips_gold_and_repeats_rank_nothing(votes, analysis):
    more = {"study": "s", "created": votes[0].created, "item": "i0", "rater": votes[0].rater}
    others = [
        replace(votes[0], id="x1", pair="x1", choice="skip"),
        replace(votes[0], id="x2", pair="x2", pair_kind="gold", expected=votes[0].left, **more),
        replace(votes[0], id="x3", pair="x3", pair_kind="repeat", repeat_of=votes[0].pair, **more),
        replace(votes[0], id="x4", pair="x4", left="new", choice="skip"),
    ]
    (found,) = analyse([*votes, *others], anchor="s001").groups
    assert theta(found) == theta(analysis.groups[0])
    assert (found.votes, found.skips, found.unranked) == (N + 4, 2, ("new",))
    assert found.gold_failures.n == found.consistency.n == 1


def test_kinds_are_never_pooled(votes):
    turned = {"left": "right", "right": "left", "tie": "tie"}
    judge = [
        replace(each, id=f"j{each.id}", rater=f"judge {each.rater}", rater_kind="llm", choice=turned[each.choice])
        for each in votes
    ]
    found = analyse(votes + judge)
    people, model = found.groups
    assert [group.kind for group in found.groups] == ["human", "llm"]
    assert theta(people) == theta(analyse(votes).groups[0])
    assert max(theta(people), key=theta(people).get) == min(theta(model), key=theta(model).get)
    assert (found.between[0].first, found.between[0].second) == ("human", "llm")
    assert found.between[0].agreement.value < 0.7


def test_exclusions_are_shown_with_and_without(votes, analysis):
    out = {"choice": "left", "excluded": ("streak",)}
    lazy = [replace(vote, id=f"l{vote.id}", rater=f"lazy {vote.rater}", **out) for vote in votes]
    counted, everything = analyse([*votes, *lazy], anchor="s001").groups
    assert (counted.with_excluded, everything.with_excluded) == (False, True)
    assert theta(counted) == theta(analysis.groups[0])
    assert counted.excluded == everything.excluded == {"streak": N}
    assert (counted.votes, everything.votes) == (N, 2 * N)
    assert everything.ranking.left.value.value > counted.ranking.left.value.value + 0.5
    assert next(of for of in counted.quality if of.rater == "lazy r000").excluded == ("streak",)
    nothing = analyse(lazy).groups
    assert [(group.with_excluded, group.ranking is None) for group in nothing] == [(False, True), (True, False)]


def test_style_that_decides_is_taken_out():
    rng = np.random.default_rng(0)
    _, data = tournament(3, systems=3, n=3000)
    made = votes_of(data, rng.integers(30, size=3000), rng.integers(50, size=3000))
    votes = []
    for vote in made:
        # Raters like length alone, and a later system is longer.
        left, right = (100 * 2.0 ** int(name[1:]) * rng.lognormal(0, 0.5) for name in (vote.left, vote.right))
        share = chances(np.array([3 * (left - right) / (left + right)]), 0.3)[0]
        choice = rng.choice(["left", "right", "tie"], p=share)
        votes.append(replace(vote, choice=choice, left_features={"length": left}, right_features={"length": right}))
    (group,) = analyse(votes, features=("length",)).groups
    plain, controlled = (
        {of.system: of.theta for of in ranking.ratings} for ranking in (group.ranking, group.controlled)
    )
    assert plain["s002"].low > 0.5
    assert plain["s000"].high < -0.5
    assert all(of.low < 0 < of.high for of in controlled.values())
    (style,) = group.controlled.style
    assert style.name == "length"
    assert style.value.value == pytest.approx(3, abs=0.5)
    assert style.p_value < 1e-6
    assert group.ranking.style == ()


def test_no_votes_are_not_enough_data():
    nothing = analyse([], anchor="a", features=("length",))
    assert (nothing.groups, nothing.between) == ((), ())
    assert [of.title for of in tables(nothing)] == ["not enough data: no votes"]


def test_skips_alone_are_not_enough_data(votes):
    (group,) = analyse([replace(vote, choice="skip") for vote in votes[:9]], anchor="s001").groups
    assert group.ranking is None
    assert group.both_bad is None
    assert group.shares == ()
    assert group.note == NOT_ENOUGH
    assert NOT_ENOUGH in tables(analyse([replace(votes[0], choice="skip")]))[0].title


def test_one_rater_speaks_for_one(votes):
    (group,) = analyse([replace(vote, rater="r", pair=vote.id) for vote in votes]).groups
    assert (group.agreement.raw, group.agreement.alpha) == (None, None)
    assert group.ranking.method == "bootstrap over 40 items 0.95"
    assert "one rater" in group.note
    assert all(step.raters is None for step in group.ranking.steps)
    assert all(math.isfinite(of.theta.low) for of in group.ranking.ratings)
    (single,) = analyse([replace(votes[0], choice="left")]).groups
    assert single.ranking.ratings[0].theta.low == -math.inf
    assert single.ranking.ratings[0].ranks == (1, 2)


def test_parts_that_nothing_links_are_named_and_not_ordered(votes):
    other = [
        replace(vote, id=f"o{vote.id}", pair=f"o{vote.id}", left=f"t{int(vote.left[1:]) % 2}", right="t2")
        for vote in votes
    ]
    (group,) = analyse([*votes, *other], anchor="s001").groups
    ratings = group.ranking.ratings
    assert [(of.component, of.rank) for of in ratings] == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3)]
    assert theta(group)["s001"] == 0
    assert sum(of.theta.value for of in ratings if of.component == 2) == pytest.approx(0, abs=1e-6)
    names = [", ".join(of.system for of in ratings if of.component == number) for number in (1, 2)]
    assert f"components 1: {names[0]}; 2: {names[1]}; there is no order" in group.note
    assert all(of.ranks[1] <= (4 if of.component == 1 else 3) for of in ratings)
    linked = {frozenset((step.better[0], step.worse[0])) for step in group.ranking.steps}
    assert linked == {frozenset("s"), frozenset("t")}


def test_names_that_nobody_knows_are_refused(votes):
    with pytest.raises(ConfigError, match="anchor: expected a system of the study, got 's01'; did you mean 's001'"):
        analyse(votes, anchor="s01")
    with pytest.raises(ConfigError, match="got vote '000000' without 'length'; measure all outputs"):
        analyse(votes, features=("length",))
    some = [replace(vote, left_features={"words": 1}, right_features={"words": 2}) for vote in votes[:9]]
    with pytest.raises(ConfigError, match="without 'word'; did you mean 'words'"):
        analyse(some, features=("word",))
    with pytest.raises(ConfigError, match="got vote '000009' without 'words'; measure all outputs"):
        analyse([*some, *votes[9:]], features=("words",))
    with pytest.raises(DataError, match="study"):
        analyse([votes[0], replace(votes[1], study="t")])


def test_tables_and_picture(votes, tmp_path):
    lazy = [replace(votes[0], id="lazy", rater="lazy", excluded=("streak",))]
    judge = [replace(vote, id=f"j{vote.id}", rater=f"judge {vote.rater}", rater_kind="llm") for vote in votes]
    analysis = analyse(votes + lazy + judge, anchor="s001")
    made = tables(analysis)
    text = "\n".join(table(of.head, of.rows) for of in made if of.head)
    assert "s000 > " in text or "> s000" in text
    titles = [of.title for of in made]
    assert titles[0].startswith(f"human raters: {N} votes; 0 skipped; excluded by rule: streak 1")
    assert any(title.startswith("human raters: 601 votes, excluded ones included") for title in titles)
    assert titles.count("raters") == 2
    assert titles[-1] == "agreement between kinds of raters"
    for of in made:
        assert all(len(row) == len(of.head) for row in of.rows)
    draw_ratings(tmp_path / "ratings.png", analysis)
    formula = {name: rf"{name} $\foo$" for vote in votes for name in (vote.left, vote.right)}
    named = [replace(vote, left=formula[vote.left], right=formula[vote.right]) for vote in votes]
    draw_ratings(tmp_path / "formula.png", analyse(named))
    with Image.open(tmp_path / "ratings.png") as picture:
        assert picture.width > picture.height
    with pytest.raises(DataError, match="expected a ranking to draw"):
        draw_ratings(tmp_path / "none.png", analyse([]))
