"""Figures and words: no more digits than an interval supports, states as sentences, exact times."""

import math
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offbook.service.pages import words


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (0.61834, 0.473, 0.752, "0.62"),
        (0.61834, 0.61, 0.627, "0.618"),
        (0.5, 0.1, 0.9, "0.5"),
        (-183.4, -221.9, -149.2, "\N{MINUS SIGN}183"),
        (-1221.0, -1302.0, -1143.0, "\N{MINUS SIGN}1221"),
        (0.0, 0.0, 0.0, "0.00"),
    ],
)
def test_a_figure_has_the_digits_its_interval_supports(value, low, high, shown):
    assert words.figure({"value": value, "low": low, "high": high}) == shown


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.floats(1e-5, 1e4))
def test_the_last_digit_shown_is_between_a_thirtieth_and_the_whole_of_the_half_width(half):
    digits = words.decimals(half)
    if digits:  # A whole number may be finer than its interval, never coarser than it must.
        assert half / 36 < 10.0**-digits <= half * 1.1


def test_an_interval_without_ends_is_said_in_words():
    assert words.bounds({"value": 0.5, "low": None, "high": None}) == "no interval: too few or equal scores"
    assert words.bounds(None) == "no result yet"
    assert words.figure({"value": 0.5, "low": None, "high": None}) == "0.50"


@pytest.mark.parametrize(
    ("trial", "mark", "said"),
    [
        ({"state": "done", "outcome": "success", "score": 1.0}, "success", "success, score 1.00"),
        ({"state": "done", "outcome": "done", "success": True, "score": 0.9}, "success", "success, score 0.90"),
        ({"state": "done", "outcome": "failure", "score": 0.4}, "partial", "failure, score 0.40"),
        ({"state": "done", "outcome": "done", "success": False, "score": 0.0}, "failure", "failure, score 0.00"),
        ({"state": "done", "outcome": "done", "score": -200.0}, "done", "done, score -200.00"),
        (
            {"state": "policy_fault", "fault": "NaN at step 3", "score": 0.0},
            "policy_fault",
            "policy fault: NaN at step 3",
        ),
        ({"state": "queued", "outcome": "robot_fault"}, "robot_fault", "robot fault, will be run again"),
        ({"state": "queued", "outcome": None}, "queued", "queued"),
        ({"state": "leased", "outcome": None}, "queued", "a robot is getting ready"),
        ({"state": "running"}, "running", "running"),
        ({"state": "cancelled"}, "cancelled", "cancelled"),
    ],
)
def test_what_became_of_a_trial(trial, mark, said):
    assert words.mark(trial) == mark
    assert words.state_in_words(trial) == said


def test_every_trial_state_of_the_arena_has_words():
    from offbook.arena.tables import TRIAL_STATES

    for state in TRIAL_STATES:
        assert words.mark({"state": state, "outcome": None}) in words.MARKS
        assert "_" not in words.state_in_words({"state": state})


def test_times_carry_the_exact_utc_whatever_they_were_given_as():
    summer = timezone(timedelta(hours=2))
    forms = [
        1_795_000_000,
        "2026-11-18T11:06:40Z",
        datetime(2026, 11, 18, 13, 6, 40, tzinfo=summer),
        "2026-11-18T11:06:40",
    ]
    for form in forms:
        assert 'title="2026-11-18 11:06:40 UTC"' in words.when(form)
    assert words.when(None) == words.DASH
    assert words.moment(0.0) == datetime(1970, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("/runs/1", "/runs/1"),
        ("#t=1", "#t=1"),
        ("https://blobs.example/a", "https://blobs.example/a"),
        ("javascript:alert(1)", "#"),
        ("//evil.example", "#"),
        ("/\\evil.example", "#"),
        ("data:text/html,x", "#"),
        ("http://plain.example", "#"),
        (None, "#"),
    ],
)
def test_only_addresses_of_this_host_or_https_are_linked(address, kept):
    assert words.local(address) == kept


def test_search_wants_every_word_in_any_case():
    assert words.matches("BC ada", "bc-chunk50", "Ada")
    assert not words.matches("bc grace", "bc-chunk50", "Ada")
    assert words.matches(None, "x")
    assert words.matches("", None)


def test_json_never_holds_nan():
    assert words.finite({"a": [1.0, math.nan, (math.inf,)], "b": "x"}) == {"a": [1.0, None, [None]], "b": "x"}


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0.4 s"), (89, "89 s"), (3600, "60 min"), (7200, "2 h"), (None, "unknown")]
)
def test_durations(seconds, said):
    assert words.duration(seconds) == said
