"""Returns to go against their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offbook.data.returns import ReturnSpec, returns_to_go
from offbook.errors import ConfigError, DataError


def by_definition(rewards, spec):
    length = len(rewards)
    result = []
    for t in range(length):
        first = t if spec.include_current else t + 1
        total = sum(spec.gamma ** (u - first) * rewards[u] for u in range(first, length))
        result.append(total / ((spec.horizon or length) - t) if spec.kind == "mean" else total)
    return result


SPECS = st.one_of(
    st.builds(ReturnSpec, gamma=st.floats(0.1, 1.0), include_current=st.booleans()),
    st.builds(
        ReturnSpec,
        kind=st.just("mean"),
        include_current=st.booleans(),
        horizon=st.one_of(st.none(), st.integers(12, 1000)),
    ),
)


@given(spec=SPECS, lengths=st.lists(st.integers(1, 12), max_size=5), gap=st.integers(0, 2), seed=st.integers(0, 999))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_equals_the_definition(spec, lengths, gap, seed):
    starts = np.array([gap + sum(lengths[:i]) + gap * i for i in range(len(lengths))], np.int64)
    rewards = np.random.default_rng(seed).normal(size=sum(lengths) + gap * (len(lengths) + 1))
    result = returns_to_go(rewards, starts, np.array(lengths, np.int64), spec)
    expected = np.zeros(len(rewards))
    for start, length in zip(starts, lengths, strict=True):
        expected[start : start + length] = by_definition(rewards[start : start + length], spec)
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9)


def test_nan_stays_in_its_episode():
    rewards = np.array([1.0, np.nan, 2.0, 3.0], np.float32)
    result = returns_to_go(rewards, np.array([0, 2]), np.array([2, 2]), ReturnSpec())
    assert np.isnan(result[:2]).all()
    assert result[2:].tolist() == [5.0, 3.0]


def test_small_episodes_keep_their_digits_behind_a_large_one():
    rewards = np.array([1e16, 1.0, 2.0])
    result = returns_to_go(rewards, np.array([0, 1]), np.array([1, 2]), ReturnSpec())
    assert result[1:].tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    "settings",
    [{"gamma": 0.0}, {"gamma": 1.5}, {"kind": "mean", "gamma": 0.9}, {"horizon": 5}, {"kind": "mean", "horizon": 0}],
)
def test_impossible_returns_are_refused(settings):
    with pytest.raises(ConfigError, match="returns"):
        ReturnSpec(**settings)


def test_an_episode_beyond_the_horizon_is_named():
    spec = ReturnSpec(kind="mean", horizon=3)
    with pytest.raises(DataError, match="episode 1: expected at most 3 steps"):
        returns_to_go(np.zeros(6), np.array([0, 2]), np.array([2, 4]), spec)
