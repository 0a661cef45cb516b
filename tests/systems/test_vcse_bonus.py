"""Exploration bonuses: beside the published formula, at the edges, and in the paper's illustration."""

import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch

from offbook.errors import ConfigError, DataError
from offbook.models.knn import joint_nearest
from offbook.systems.vcse import RND, VCSE, StateEntropy, Sum, value_conditional_state_entropy
from offbook.systems.vcse.bonus import scale_values
from offbook.systems.vcse.encoders import Identity, Joined, RandomConv, RandomProjection
from offbook.systems.vcse.scaling import Exponential, Linear, Moments, Normaliser


def batch(seed, count=128, size=5):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=rng), torch.randn(count, generator=rng)


def published(states, values, k):
    """The formula of the published SAC code, term by term on all pairs at once."""
    apart = (states[:, None] - states[None]).norm(dim=-1)
    apart_v = (values[:, None] - values[None]).abs()
    reach = torch.maximum(apart, apart_v).topk(k, dim=1, largest=False).values[:, -1]
    count = (apart_v < reach[:, None]).sum(1)
    return torch.digamma(count.float() + 1) / states.shape[1] + torch.log(2 * reach + 1e-5)


def test_compat_is_the_published_formula():
    for seed in range(20):
        states, values = batch(seed, count=64 + seed)
        bonus = value_conditional_state_entropy(states, values, 4, compat="official")
        torch.testing.assert_close(bonus, published(states, values, 4), atol=1e-5, rtol=0)
        assert (bonus - value_conditional_state_entropy(states, values, 4)).abs().max() > 0.01


def test_what_leaves_the_bonus_alone():
    states, values = batch(0)
    before = value_conditional_state_entropy(states, values, 5)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()).Q.float()
    for other, wanted in (
        (value_conditional_state_entropy(states, values + 3, 5), before),
        (value_conditional_state_entropy(states[order], values[order, None], 5), before[order]),
        (value_conditional_state_entropy(states @ turn, values, 5), before),
        (value_conditional_state_entropy(4 * states, 4 * values, 5, floor=4e-5), before + np.log(4)),
    ):
        torch.testing.assert_close(other, wanted, atol=1e-5, rtol=1e-5)


def test_it_pays_at_the_valuable_states_where_state_entropy_does_not():
    """Nine tenths of the states are wide apart and worthless, the others close together and of some value."""
    for seed in range(10):
        rng = torch.Generator().manual_seed(seed)
        high = torch.arange(500) >= 450
        states = torch.randn(500, 5, generator=rng) * torch.where(high, 0.1, 1.0)[:, None] + 4 * high[:, None]
        noise = torch.rand(500, generator=rng)
        values = torch.where(high, 0.5 + 0.5 * noise, 0.02 * noise)
        shares = {}
        for bonus in (VCSE(12), StateEntropy(12, scaling="none")):
            # A bonus that all states have alike draws nobody anywhere.
            paid = bonus(states, values)
            paid = paid - paid.min()
            shares[type(bonus)] = float(paid[high].sum() / paid.sum())
        assert shares[VCSE] > shares[StateEntropy]


def test_values_that_say_nothing_leave_state_entropy():
    states, _ = batch(1)
    bonus = VCSE(5)
    with pytest.warns(RuntimeWarning, match="not informative yet"):
        paid = bonus(states, torch.full((128,), 2.5))
    distance = joint_nearest(states, None, 5).distance[:, -1]
    wanted = (2 * distance + 1e-5).log() + torch.digamma(torch.tensor(128.0)) / 5
    torch.testing.assert_close(paid, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bonus(states, torch.zeros(128))
        torch.testing.assert_close(VCSE(5, conditional=False)(states, torch.arange(128.0)), wanted)


def test_states_that_are_all_the_same_have_a_finite_bonus():
    bonus = VCSE(3)
    paid = bonus(torch.ones(20, 4), torch.arange(20.0) // 10)
    wanted = torch.digamma(torch.tensor(1.0)) / 4 + np.log(1e-5)
    torch.testing.assert_close(paid, wanted.expand(20), atol=1e-5, rtol=0)
    assert bonus.zero_share == 1


def test_state_entropy_averages_when_asked():
    states = torch.tensor([[0.0], [1.0], [3.0]])
    torch.testing.assert_close(StateEntropy(2, scaling="none")(states), torch.tensor([3.0, 2.0, 3.0]).log1p())
    mean = StateEntropy(2, average=True, scaling="none")(states)
    torch.testing.assert_close(mean, torch.tensor([2.0, 1.5, 2.5]).log1p())


@pytest.mark.parametrize("kind", [StateEntropy, VCSE])
def test_what_is_not_finite_never_reaches_the_reward(kind):
    states, values = batch(2)
    states[7, 2] = torch.nan
    with pytest.raises(DataError, match=f"bonus {kind.__name__}: expected finite numbers, got features that are not"):
        kind()(states, values)
    bonus = kind(on_nan="zero")
    assert (bonus(states, values) == 0).all()
    assert bonus.skipped == 1


def test_states_that_hardly_differ_have_a_finite_bonus():
    paid = VCSE(2)(1e-18 * torch.arange(8.0)[:, None], torch.tensor([1.0, 2.0]).repeat(4))
    wanted = torch.digamma(torch.tensor(4.0)) + np.log(1e-5)  # three others of the same value
    torch.testing.assert_close(paid, wanted.expand(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [VCSE, StateEntropy, lambda **more: RND(5, **more)], ids=["VCSE", "entropy", "RND"])
def test_states_too_far_apart_for_their_numbers_do_no_harm(make):
    with pytest.raises(DataError, match="expected finite numbers, got features or values that are too large"):
        make()(1e20 * batch(2)[0], batch(2)[1])
    bonus, other = make(on_nan="zero"), make(on_nan="zero")
    assert (bonus(1e20 * batch(2)[0], batch(2)[1]) == 0).all()
    assert bonus.skipped == 1
    for _ in range(2):
        assert torch.equal(bonus(*batch(3)), other(*batch(3)))


def test_a_sum_pays_its_parts_and_keeps_their_state():
    def made():
        return Sum([(0.5, StateEntropy(3)), (2.0, VCSE(3)), (1.0, RND(5))])

    both = made()
    paid = both(*batch(2))
    parts = 0.5 * StateEntropy(3)(*batch(2)) + 2 * VCSE(3)(*batch(2)) + RND(5)(*batch(2))
    torch.testing.assert_close(paid, parts)
    assert both.needs_values
    assert not Sum([(1.0, StateEntropy(3))]).needs_values
    again = made()
    again.load_state_dict(both.state_dict())
    assert torch.equal(again(*batch(3)), both(*batch(3)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VCSE(0), "k: expected 1 or more"),
        (lambda: VCSE(200)(*batch(0)), "k: expected 1 to 127 of 128 points, got k = 200"),
        (lambda: VCSE(3)(torch.zeros(1, 2), torch.zeros(1)), "k: expected 2 points or more, got k = 3 of 1"),
        (lambda: VCSE(3)(torch.zeros(0, 2), torch.zeros(0)), "bonus: expected a state or more, got an empty batch"),
        (lambda: Sum([]), "Sum: expected bonuses with finite weights"),
        (lambda: Sum([(np.nan, VCSE(3))]), r"Sum: expected bonuses with finite weights, got \[nan\]"),
        (lambda: VCSE(1, compat="official")(*batch(0)), "2 or more"),
        (lambda: VCSE(3)(batch(0)[0]), "VCSE: expected a value for each state, got none"),
        (lambda: VCSE(3)(batch(0)[0], torch.zeros(128, 128)), r"\(128, 128\)"),
        (lambda: VCSE(value_scale="log"), "zscore, rank or none"),
        (lambda: VCSE(compat="other"), "exact or official"),
        (lambda: StateEntropy(scaling="size"), "none, batch, std, mean"),
        (lambda: StateEntropy(on_nan="ignore"), "raise or zero"),
        (lambda: RND(3)(*batch(0)), "RND: expected 3 features, got 5"),
        (lambda: Linear(start=1, end=0, steps=0), "steps: expected 1 or more"),
        (lambda: RandomConv((3, 4)), "pictures"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_ranks_share_places():
    ranks = scale_values(torch.tensor([5.0, 1.0, 5.0, 9.0]), "rank")
    assert ranks[0] == ranks[2]
    assert ranks[1] < ranks[0] < ranks[3]
    assert ranks.mean().abs() < 1e-6
    assert scale_values(torch.tensor([5.0, 1.0]), "none").tolist() == [5.0, 1.0]


def test_moments_are_those_of_all_numbers():
    rng, seen, numbers = np.random.default_rng(0), Moments(), []
    for count in (1, 7, 30):
        numbers.append(rng.normal(1e4, 3, size=count).astype(np.float32))
        seen.update(torch.from_numpy(numbers[-1]))
    whole = np.concatenate(numbers).astype(np.float64)
    assert float(seen.mean) == pytest.approx(whole.mean(), abs=1e-9)
    assert float(seen.std()) == pytest.approx(whole.std(), abs=1e-9)


def test_normalisers():
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([-4.0, 8.0])
    scaled = Normaliser("batch")(second)
    torch.testing.assert_close(scaled, torch.tensor([-1.0, 1.0]))
    running = Normaliser("mean")
    torch.testing.assert_close(running(first), first / 2)
    torch.testing.assert_close(running(second), second / 4)
    spread = Normaliser("std")
    assert (spread(torch.ones(3)) == 1).all()
    again = Normaliser("std")
    again.load_state_dict(spread.state_dict())
    torch.testing.assert_close(again(second), spread(second))


def test_random_distillation_pays_less_for_what_it_has_seen():
    known, new = batch(0)[0], batch(1)[0] + 3
    bonus = RND(5, learning_rate=1e-2, scaling="none")
    before = bonus(known).mean()
    for _ in range(60):
        bonus(known)
    now = bonus(known).mean()
    assert now < 0.1 * before
    state = deepcopy(bonus.state_dict())
    paid = [bonus(new) for _ in range(3)]
    assert paid[0].mean() > 2 * now
    again = RND(5, learning_rate=1e-2, scaling="none", seed=9)
    again.load_state_dict(state)
    for wanted in paid:
        torch.testing.assert_close(again(new), wanted)


def test_schedules():
    beta = Linear(start=0.2, end=0.1, steps=10)
    assert [beta(0), beta(5), beta(50)] == pytest.approx([0.2, 0.15, 0.1])
    assert Exponential(start=8.0, half_life=3)(6) == 2


def test_encoders():
    rng = torch.Generator().manual_seed(0)
    pictures = torch.randint(8, (6, 7, 7, 3), generator=rng)
    first, last = RandomConv((3, 7, 7)), RandomConv((7, 7, 3))
    torch.testing.assert_close(first(pictures.permute(0, 3, 1, 2)), last(pictures))
    assert last(pictures).shape == (6, 64)
    assert RandomConv((84, 60, 4), size=10)(torch.zeros(2, 84, 60, 4)).shape == (2, 10)
    vectors = torch.randn(200, 50, generator=rng)
    kept = torch.pdist(RandomProjection(50, 400)(vectors)) / torch.pdist(vectors)
    assert 0.95 < kept.mean() < 1.05
    joined = Joined({"a.b": Identity(2.0), "c": RandomProjection(50, 3)})
    assert joined({"a.b": torch.ones(200, 2, 2), "c": vectors, "other": vectors}).shape == (200, 7)
