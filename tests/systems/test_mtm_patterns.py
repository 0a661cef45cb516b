"""What is hidden: the random patterns by their chances, the roles token by token."""

from itertools import chain, combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offbook.errors import ConfigError
from offbook.learning.masked_patterns import FRACTIONS, PATTERNS, WEIGHTS, Shape, at_step, draw

ORDER = ("state", "return", "action")
ALL = dict.fromkeys(ORDER, 1)
DRAWS = 100_000


def drawn(name, tokens=ALL, length=4, batch=1, seed=0, **settings):
    shape = Shape(tokens=tokens, length=length, batch=batch)
    return draw(name, shape, torch.Generator().manual_seed(seed), **settings)


def in_order(seen):
    """All tokens in the order in which they come about, shape (batch, tokens)."""
    return torch.cat([seen[name] for name in ORDER if name in seen], 2).flatten(1)


def text(seen, row=0):
    """A sample as one word of zeros and ones for each modality."""
    return tuple("".join(str(int(of)) for of in seen[name][row].flatten()) for name in ORDER if name in seen)


def words(name, draws=4000):
    return {text(seen, row) for seen in [drawn(name, batch=draws)] for row in range(draws)}


@pytest.mark.parametrize("tokens", [ALL, {"state": 3, "return": 1, "action": 2}, {"action": 1, "state": 1},
                                    {"state": 2}], ids=str)  # fmt: skip
def test_auto_always_hides_a_token_with_nothing_visible_behind_it(tokens):
    for seed, length in ((0, 4), (1, 2), (2, 7)):
        seen = drawn("auto", tokens, length, DRAWS // 3 + 1, seed)
        # Only when the very last token is hidden is there a hidden one that no visible one follows.
        assert not in_order(seen)[:, -1].any()


@pytest.mark.parametrize("tokens", [ALL, {"state": 3, "return": 1, "action": 2}, {"state": 1, "action": 2},
                                    {"state": 1, "return": 1}, {"state": 2}], ids=str)  # fmt: skip
def test_the_first_hidden_token_is_of_each_modality_as_often_as_its_weight_says(tokens):
    # With all visible before the cut, what is visible ends where the cut is.
    seen = drawn("auto", tokens, batch=DRAWS, fractions=(1.0,))
    whole, a_step = in_order(seen), sum(tokens.values())
    count = whole.sum(1)
    assert torch.equal(whole, torch.arange(whole.shape[1]) < count[:, None])
    names, begins, total = list(tokens), 0, sum(WEIGHTS[name] for name in tokens)
    for name in [name for name in ORDER if name in names]:
        cut_here = count % a_step == begins
        assert abs(float(cut_here.float().mean()) - WEIGHTS[name] / total) < 0.01
        for step in range(4):  # whichever modality it is, each step is as likely
            assert abs(float((count[cut_here] // a_step == step).float().mean()) - 1 / 4) < 0.02
        begins += tokens[name]


@pytest.mark.parametrize(("length", "fraction", "share"), [(4, 0.5, 2 / 4), (4, 0.7, 2 / 4), (4, 0.95, 3 / 4),
                                                           (4, 1.0, 1), (4, 0.2, 0), (5, 0.6, 3 / 5)])  # fmt: skip
def test_before_the_cut_as_many_tokens_are_visible_as_the_fraction_says(length, fraction, share):
    seen = drawn("auto", length=length, batch=DRAWS, fractions=(fraction,))
    for place, name in enumerate(ORDER):
        later = sum(WEIGHTS[other] for other in ORDER[place + 1 :])  # the token of the very step of the cut stays
        for step in range(length):
            uncut = (length - 1 - step + later) / length
            assert abs(float(seen[name][:, step].float().mean()) - uncut * share) < 0.01


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("length", [4, 10])
def test_random_patterns_show_exactly_the_share_that_they_drew(length, fraction):
    tokens = {"state": 3, "return": 1, "action": 2}
    seen = drawn("full_random", tokens, length, 500, fractions=(fraction,))
    for name, of in seen.items():
        wanted = length * tokens[name] * round(fraction * 100) // 100  # in whole numbers
        assert of.flatten(1).sum(1).eq(wanted).all()
    steps = drawn("random", tokens, length, 500, fractions=(fraction,))
    for of in steps.values():
        assert torch.equal(of.any(2), of.all(2))
        assert of.any(2).sum(1).eq(length * round(fraction * 100) // 100).all()
    assert fraction == 1 or not all(torch.equal(of.any(2), of.all(2)) for of in seen.values())


def test_rounding_takes_no_token_from_a_share():
    assert int(50 * 0.58) == 28
    for of in drawn("full_random", length=50, batch=20, fractions=(0.58,)).values():
        assert of.sum(1).eq(29).all()


def test_each_modality_draws_its_own_fraction_and_any_token_is_as_likely():
    seen = drawn("full_random", length=5, batch=20_000, fractions=(0.0, 1.0))
    for row in product((0, 1), repeat=3):
        alike = [seen[name].flatten(1).sum(1) == 5 * of for name, of in zip(ORDER, row, strict=True)]
        assert abs(float(torch.stack(alike).all(0).float().mean()) - 1 / 8) < 0.02
    for of in drawn("full_random", length=5, batch=20_000, fractions=(0.4,)).values():
        assert (of[..., 0].float().mean(0) - 0.4).abs().max() < 0.02


def test_samples_are_independent_and_a_batch_may_share_one_mask():
    tokens = {"state": 2, "return": 1, "action": 1}
    whole = in_order(drawn("auto", tokens, batch=DRAWS)).float()[:, :-1]
    together = torch.corrcoef(torch.cat([whole[0::2], whole[1::2]], 1).T)
    size = whole.shape[1]
    assert together[:size, size:].abs().max() < 0.02
    assert together[:size, :size].fill_diagonal_(0).max() > 0.1  # tokens of one sample share its cut
    shared = [in_order(drawn("auto", tokens, batch=6, seed=seed, scope="batch")) for seed in range(50)]
    assert all(mask.eq(mask[:1]).all() for mask in shared)
    assert len({str(mask[0].tolist()) for mask in shared}) > 10


STATES = ("1000", "1100", "1110", "1111")
PAST = ("0000", "1000", "1100", "1110")


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("bc", {(s, "0000", a) for s, a in zip(STATES, PAST, strict=True)}),
        ("rcbc", {(s, "1111", a) for s, a in zip(STATES, PAST, strict=True)}),
        ("plan", {(s, "0000", s) for s in STATES}),
        ("fd", {("1000", "0000", "1000"), ("1100", "0000", "0100"), ("1110", "0000", "0010")}),
        ("id", {("1111", "0000", "0000")}),
        ("goal", {(s, "0000", "0000") for s in ("1001", "1101", "1011")}),
        (
            "goal_n",
            {("1001", "0000", "0000"), ("1101", "0000", "1000"), ("1111", "0000", "1100"), ("1111", "0000", "1110")},
        ),
        ("waypoints", {(s, "0000", "0000") for s in ("1001", "1101", "1011", "1111")}),
        (
            "bc_random",
            {
                ("".join(s) + "1" + "0" * (3 - t), "0000", "".join(a) + "0" * (4 - t))
                for t in range(4)
                for s, a in product(product("01", repeat=t), repeat=2)
            },
        ),
    ],
)
def test_a_role_shows_these_tokens_and_no_others(name, masks):
    assert words(name) == masks


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("bc", [(s, "0000", a) for s, a in zip(STATES, PAST, strict=True)]),
        ("rcbc", [(s, "1111", a) for s, a in zip(STATES, PAST, strict=True)]),
        ("plan", [(s, "0000", s) for s in STATES]),
        ("fd", [("1000", "0000", "1000"), ("1100", "0000", "0100"), ("1110", "0000", "0010")]),
    ],
)
def test_a_role_at_a_step_of_each_sample(name, masks):
    step = torch.arange(len(masks))[:, None]
    seen = at_step(name, Shape(tokens=ALL, length=4, batch=len(masks)), step)
    assert [text(seen, row) for row in range(len(masks))] == masks


def test_every_step_is_as_likely_and_half_of_the_past_is_dropped():
    for name, steps in (("bc", 4), ("rcbc", 4), ("plan", 4), ("fd", 3), ("bc_random", 4)):
        seen = drawn(name, batch=20_000)
        now = 3 - seen["state"][..., 0].flip(1).int().argmax(1)  # the last state that is seen
        counts = torch.bincount(now, minlength=4) / 20_000
        assert (counts[:steps] - 1 / steps).abs().max() < 0.02
    late = now == 3
    assert (seen["state"][late, :3].float().mean((0, 2)) - 0.5).abs().max() < 0.03
    assert (seen["action"][late, :3].float().mean((0, 2)) - 0.5).abs().max() < 0.03


SOME = [dict.fromkeys(names, 1) for names in chain.from_iterable(combinations(ORDER, n) for n in (1, 2, 3))
        if "state" in names]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(PATTERNS),
    present=st.sampled_from(SOME),
    sizes=st.tuples(*[st.integers(1, 4)] * 3),
    length=st.integers(2, 9),
    batch=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    scope=st.sampled_from(["sample", "batch"]),
)
def test_any_pattern_of_any_shape(name, present, sizes, length, batch, seed, fractions, scope):
    tokens = {of: size for of, size in zip(ORDER, sizes, strict=True) if of in present}
    arguments = {"length": length, "batch": batch, "seed": seed, "fractions": fractions, "scope": scope}
    seen = drawn(name, tokens, **arguments)
    assert {of: (value.dtype, *value.shape) for of, value in seen.items()} == {
        of: (torch.bool, batch, length, size) for of, size in tokens.items()
    }
    again = drawn(name, tokens, **arguments)
    assert all(torch.equal(seen[of], again[of]) for of in seen)
    if name not in ("full_random", "auto", "bc_random"):  # the others show whole steps
        assert all(torch.equal(of.all(2), of.any(2)) for of in seen.values())
    if name in ("random", "full_random", "auto"):
        for of, value in seen.items():
            assert value.flatten(1).sum(1).max() <= length * tokens[of] * max(fractions) + 1e-6
    if name == "auto" or (name in ("bc", "bc_random", "id", "goal", "goal_n", "waypoints") and "action" in tokens):
        assert not in_order(seen)[:, -1].any()


def test_no_such_pattern_and_too_short():
    with pytest.raises(ConfigError, match="'autoo'; did you mean 'auto'"):
        drawn("autoo")
    with pytest.raises(ConfigError, match="2 steps or more for masks, got 1; take longer windows"):
        drawn("auto", length=1)
