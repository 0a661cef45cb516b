import json

import pytest

from offbook.errors import DataError
from offbook.rating.records import Vote, check_votes, read_votes, write_votes

CREATED = "2026-01-31T12:00:00+00:00"


def vote(id="1", **changes):
    values = {"study": "s", "pair": "p", "item": "i", "rater": "r", "left": "a", "right": "b", "choice": "left"}
    return Vote(id=id, created=CREATED, **(values | changes))


def test_what_is_written_is_read(tmp_path):
    votes = [
        vote(reasons=("clear",), note="ünï\U0001f600\n", left_features={"length": 3}, right_features={"length": 2.5}),
        vote("2", pair="g", pair_kind="gold", expected="b", left_features={"length": 1}, right_features={"length": 1}),
        vote(
            "3",
            pair="q",
            pair_kind="repeat",
            repeat_of="p",
            left="b",
            right="a",
            choice="both_bad",
            dwell_ms=0,
            watched=0.5,
            excluded=("dwell",),
            left_features={"length": 2.5},
            right_features={"length": 3},
        ),
    ]
    path = tmp_path / "new" / "votes.jsonl"
    write_votes(path, votes)
    assert read_votes(path) == votes
    assert [each.winner for each in votes] == ["a", "a", None]
    path.write_text("\n" + path.read_text() + "\n \n")
    assert read_votes(path) == votes
    path.write_text("")
    assert read_votes(path) == []


@pytest.mark.parametrize(
    ("change", "where", "expected"),
    [
        ({"choice": "A"}, "choice", "one of left, right, tie, both_bad, skip"),
        ({"choice": None}, "choice", "one of left"),
        ({"pair_kind": ["real"]}, "pair_kind", "one of real, gold, repeat"),
        ({"left": ""}, "left", "a text that is not empty"),
        ({"right": "a"}, "right", "another system than on the left"),
        ({"rater": 7}, "rater", "a text that is not empty"),
        ({"note": None}, "note", "a text"),
        ({"note": "\ud800"}, "note", "a text without NUL or half a character"),
        ({"item": "a\0"}, "item", "a text that is not empty, without NUL"),
        ({"left": "\udfff"}, "left", "a text that is not empty, without NUL"),
        ({"reasons": ["\0"]}, "reasons", "a list of texts"),
        ({"excluded": ["dwell", "dwell"]}, "excluded", "each of them once"),
        ({"left_features": {"\ud800": 1}}, "left_features", "an object of finite numbers"),
        ({"reasons": "clear"}, "reasons", "a list of texts"),
        ({"excluded": [""]}, "excluded", "a list of texts"),
        ({"dwell_ms": -1}, "dwell_ms", "milliseconds >= 0"),
        ({"dwell_ms": 10**400}, "dwell_ms", "milliseconds >= 0"),
        ({"left_features": {"length": 10**400}}, "left_features", "an object of finite numbers"),
        ({"dwell_ms": True}, "dwell_ms", "milliseconds >= 0"),
        ({"watched": 1.2}, "watched", "a share in"),
        ({"created": "yesterday"}, "created", "a time in UTC"),
        ({"created": "2026-01-31T12:00:00"}, "created", "a time in UTC"),
        ({"created": "2026-01-31T12:00:00+02:00"}, "created", "a time in UTC"),
        ({"left_features": {"length": float("nan")}}, "left_features", "an object of finite numbers"),
        ({"left_features": {"length": 1}}, "right_features", "the same names as left_features"),
        ({"pair_kind": "gold"}, "expected", "'a' or 'b', as the pair is gold"),
        ({"pair_kind": "gold", "expected": "c"}, "expected", "'a' or 'b', as the pair is gold"),
        ({"expected": "a"}, "expected", "null, as the pair is real"),
        ({"pair_kind": "repeat"}, "repeat_of", "the id of the pair"),
        ({"repeat_of": "p"}, "repeat_of", "null, as the pair is real"),
        ({"schema": 2}, "line 2", "a vote of schema 1"),
        ({"chioce": "left"}, "chioce", "a field of a vote"),
        ({"item": ...}, "item", "a value"),
    ],
)
def test_a_line_that_is_no_vote_is_named(tmp_path, change, where, expected):
    record = {name: value for name, value in (vote("2").to_json() | change).items() if value is not ...}
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(vote().to_json()) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError) as caught:
        read_votes(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2")
    assert caught.value.where.endswith(where)
    assert expected in caught.value.expected


def test_text_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "votes.jsonl"
    for text in (b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null"):
        path.write_bytes(json.dumps(vote().to_json()).encode() + b"\n" + text)
        with pytest.raises(DataError, match="line 2: expected"):
            read_votes(path)
    with pytest.raises(DataError, match="expected a file of votes, got No such file"):
        read_votes(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="expected a file of votes, got Is a directory"):
        read_votes(tmp_path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"id": "1"}, "expected an id of its own, got '1' as in vote '1'"),
        ({"study": "t"}, "study: expected 's' as in vote '1', got 't'"),
        ({"rater_kind": "llm"}, "rater 'r'"),
        ({"cohort": "later"}, "rater 'r'"),
        ({"cluster": "c"}, "item 'i'"),
        ({"item": "j"}, "pair 'p'"),
        ({"left": "c"}, "pair 'p'"),
        ({}, "vote '2': expected one vote of rater 'r' on pair 'p', got a second after vote '1'"),
    ],
)
def test_votes_that_contradict_each_other_are_refused(change, what):
    check_votes([vote(), vote("2", left="b", right="a", rater="other")])
    with pytest.raises(DataError) as caught:
        check_votes([vote(), vote(**({"id": "2"} | change))])
    assert what in str(caught.value)
