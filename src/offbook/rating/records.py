"""Votes, and the file `votes.jsonl` that all statistics of a study are a function of.

A file has one JSON object a line: the fields of `Vote`, and `schema`, the version of this form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from offbook.errors import DataError, nearest
from offbook.runs.directory import atomic_path

PairKind = Literal["real", "gold", "repeat"]
RaterKind = Literal["human", "llm", "script"]
Choice = Literal["left", "right", "tie", "both_bad", "skip"]

SCHEMA = 1
_MOST = 1e300
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """One answer of one rater to "which of these two is better?", with all that statistics want to know of it.

    Attributes:
        study: name of the study.
        id: of the vote; no other vote of the file has it.
        pair: id of the pair of outputs that was shown.
        pair_kind: `real` pairs rank systems; `gold` pairs have a known answer; a `repeat` shows an earlier pair again
            with its sides swapped.
        expected: of a gold pair, the system (one of the two) that a rater who looks will choose; else None.
        repeat_of: of a repeat, the id of the pair that it shows again; else None.
        item: what both outputs answer: a prompt, or a scene with its seed.
        cluster: of items that resemble each other, such as those of one task; None for an item that stands alone.
        rater: pseudonym of who judged.
        rater_kind: kinds are never pooled.
        cohort: a group of raters, such as those invited together; empty without one.
        left: name of the system whose output stood on the left.
        right: name of the other.
        choice: the answer; `both_bad` is a tie between two that are no good, `skip` is no answer.
        reasons: what the rater gave as reasons.
        note: free text of the rater.
        dwell_ms: milliseconds from showing to answering; None when not measured.
        watched: smallest share of the two videos that was played, in [0, 1]; None without video.
        created: when it was given, ISO 8601 in UTC.
        excluded: names of the rules that leave it out; empty when it counts.
        left_features: numbers that describe the left output, such as its length, by name.
        right_features: the same for the right one, with the same names.

    Raises:
        DataError: a value is not as described.
    """

    study: str
    id: str
    pair: str
    pair_kind: PairKind = "real"
    expected: str | None = None
    repeat_of: str | None = None
    item: str
    cluster: str | None = None
    rater: str
    rater_kind: RaterKind = "human"
    cohort: str = ""
    left: str
    right: str
    choice: Choice
    reasons: tuple[str, ...] = ()
    note: str = ""
    dwell_ms: int | None = None
    watched: float | None = None
    created: str
    excluded: tuple[str, ...] = ()
    left_features: Mapping[str, float] = field(default_factory=dict)
    right_features: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (right, expected) in _CHECKS.items():
            value = getattr(self, name)
            if not right(value):
                self._refuse(name, expected, _shown(value), "correct the value")
        self._check_agreement()

    def _check_agreement(self) -> None:
        if self.left == self.right:
            fix = "give a damaged or repeated output a system of its own"
            self._refuse("right", "another system than on the left", repr(self.right), fix)
        if self.pair_kind == "gold" and self.expected not in (self.left, self.right):
            expected = f"{self.left!r} or {self.right!r}, as the pair is gold"
            self._refuse("expected", expected, repr(self.expected), "name the system that is known to be better")
        if self.pair_kind != "gold" and self.expected is not None:
            fix = "leave it null, or make the pair gold"
            self._refuse("expected", f"null, as the pair is {self.pair_kind}", repr(self.expected), fix)
        if (self.pair_kind == "repeat") != (self.repeat_of is not None):
            expected = "the id of the pair that is repeated" if self.pair_kind == "repeat" else "null"
            fix = "only pairs of the kind repeat name another pair"
            self._refuse("repeat_of", f"{expected}, as the pair is {self.pair_kind}", repr(self.repeat_of), fix)
        if self.left_features.keys() != self.right_features.keys():
            odd = sorted(self.left_features.keys() ^ self.right_features.keys())
            got = f"{', '.join(map(repr, odd))} on one side only"
            self._refuse("right_features", "the same names as left_features", got, "measure both outputs alike")

    def _refuse(self, name: str, expected: str, got: str, fix: str) -> None:
        raise DataError(f"vote {_shown(self.id)}, {name}", expected=expected, got=got, fix=fix)

    @property
    def winner(self) -> str | None:
        """The system that was chosen; None when none was."""
        return {"left": self.left, "right": self.right}.get(self.choice)

    @property
    def group(self) -> str:
        """The cluster of the item, or the item itself where it stands alone."""
        return self.cluster or self.item

    @property
    def time(self) -> datetime:
        """When it was given."""
        return datetime.fromisoformat(self.created)

    def to_json(self) -> dict[str, Any]:
        """The object that a line of the file holds."""
        values = {name: getattr(self, name) for name in _NAMES}
        lists = {name: list(values[name]) for name in ("reasons", "excluded")}
        objects = {name: dict(values[name]) for name in ("left_features", "right_features")}
        return {"schema": SCHEMA, **values, **lists, **objects}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair is in no file of UTF-8, and NUL in no database.
    return isinstance(value, str) and _NO_TEXT.search(value) is None


def _is_name(value: Any) -> bool:
    return _is_text(value) and value.strip() != ""


def _is_utc(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).utcoffset() == timedelta(0)
    except (TypeError, ValueError):
        return False


def _is_number(value: Any) -> bool:
    # Comparing copes with integers that no float holds, and leaves NaN out.
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST <= value <= _MOST


def _are_features(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_name(name) and _is_number(of) for name, of in value.items())


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_name, value))


def _among(choices: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"


_WHOLE = "without NUL or half a character"
_NAME = (_is_name, f"a text that is not empty, {_WHOLE}")
_NAME_OR_NULL = (lambda value: value is None or _is_name(value), f"a text that is not empty, {_WHOLE}, or null")
_TEXT = (_is_text, f"a text {_WHOLE}")
_TEXTS = (_are_names, f"a list of texts {_WHOLE}")
_FEATURES = (_are_features, "an object of finite numbers")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("study", "id", "pair", "item", "rater", "left", "right"), _NAME),
    **dict.fromkeys(("expected", "repeat_of", "cluster"), _NAME_OR_NULL),
    **dict.fromkeys(("cohort", "note"), _TEXT),
    "reasons": _TEXTS,
    "excluded": (lambda value: _are_names(value) and len({*value}) == len(value), f"{_TEXTS[1]}, each of them once"),
    **dict.fromkeys(("left_features", "right_features"), _FEATURES),
    "pair_kind": _among(get_args(PairKind)),
    "rater_kind": _among(get_args(RaterKind)),
    "choice": _among(get_args(Choice)),
    "dwell_ms": (
        lambda value: value is None or (type(value) is int and 0 <= value < 2**53),
        "milliseconds >= 0, or null",
    ),
    "watched": (lambda value: value is None or (_is_number(value) and 0 <= value <= 1), "a share in [0, 1], or null"),
    "created": (_is_utc, 'a time in UTC such as "2026-01-31T12:00:00+00:00"'),
}
_NAMES = tuple(each.name for each in fields(Vote))
_REQUIRED = ("study", "id", "pair", "item", "rater", "left", "right", "choice", "created")


def now() -> str:
    """The present as `Vote.created` wants it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_votes(path: Path | str) -> list[Vote]:
    """Reads `votes.jsonl`.

    Args:
        path: the file, UTF-8; empty lines are passed over.

    Returns:
        The votes in the order of the file; none for an empty file.

    Raises:
        DataError: there is no such file, a line is no vote, or two lines contradict each other; the message names file
            and line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        got = error.strerror or "no file"
        raise DataError(str(path), expected="a file of votes", got=got, fix="check the path") from error
    votes: list[Vote] = []
    places: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            votes.append(_read(line, place))
            places.append(place)
    check_votes(votes, places)
    return votes


def _read(line: bytes, place: str) -> Vote:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        fix = "export the votes again, or remove the line"
        raise DataError(place, expected="one JSON object", got=repr(line[:60]), fix=fix) from error
    schema = record.pop("schema", None) if isinstance(record, dict) else None
    if schema != SCHEMA:
        fix = "export the votes again with this version"
        raise DataError(place, expected=f"a vote of schema {SCHEMA}", got=f"schema {_shown(schema)}", fix=fix)
    for name in record:
        if name not in _NAMES:
            fix = nearest(name, _NAMES)
            raise DataError(f"{place}, {name}", expected="a field of a vote", got="an unknown name", fix=fix)
    for name in _REQUIRED:
        if name not in record:
            raise DataError(f"{place}, {name}", expected="a value", got="nothing", fix=f"add the field {name!r}")
    for name in ("reasons", "excluded"):
        if isinstance(record.get(name), list):
            record[name] = tuple(record[name])
    try:
        return Vote(**record)
    except DataError as error:
        where = f"{place}, {error.where.rpartition(', ')[2]}"
        raise DataError(where, expected=error.expected, got=error.got, fix=error.fix) from None


def check_votes(votes: Sequence[Vote], places: Sequence[str] | None = None) -> None:
    """Refuses votes that contradict one another.

    One study; each id once; a rater of one kind and cohort; an item in one cluster; a pair of one kind about one item
    and two systems, and judged by a rater once.

    Args:
        votes: in any order.
        places: what a message calls each of them; by their ids when not given.

    Raises:
        DataError: two votes do not agree, or count twice what was said once.
    """
    if places is None:
        places = [f"vote {vote.id!r}" for vote in votes]
    first: dict[tuple[str, str], tuple[Any, str]] = {}

    def agree(kind: str, of: str, value: Any, place: str) -> None:
        known, where = first.setdefault((kind, of), (value, place))
        if known != value:
            name = f"{kind} {of!r}" if of else kind
            expected = f"{_shown(known)} as in {where}"
            fix = "make them agree, or give one another name"
            raise DataError(f"{place}, {name}", expected=expected, got=_shown(value), fix=fix)

    seen: dict[str, str] = {}
    judged: dict[tuple[str, str], str] = {}
    for vote, place in zip(votes, places, strict=True):
        if vote.id in seen:
            fix = "remove one of them"
            raise DataError(place, expected="an id of its own", got=f"{vote.id!r} as in {seen[vote.id]}", fix=fix)
        seen[vote.id] = place
        agree("study", "", vote.study, place)
        agree("rater", vote.rater, (vote.rater_kind, vote.cohort), place)
        agree("item", vote.item, vote.cluster, place)
        about = (vote.pair_kind, vote.item, *sorted((vote.left, vote.right)), vote.expected, vote.repeat_of)
        agree("pair", vote.pair, about, place)
        before = judged.setdefault((vote.rater, vote.pair), place)
        if before != place:
            expected = f"one vote of rater {vote.rater!r} on pair {vote.pair!r}"
            raise DataError(place, expected=expected, got=f"a second after {before}", fix="remove one of them")


def write_votes(path: Path | str, votes: Iterable[Vote]) -> None:
    """Writes `votes.jsonl` so that a crash leaves the old file or the new one.

    Args:
        path: the file; its folder is made where it is missing.
        votes: in the order that the file will have.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> vote = Vote(study="s", id="1", pair="p", item="i", rater="r", left="a", right="b", choice="tie",
        ...             created="2026-01-31T12:00:00+00:00")
        >>> with TemporaryDirectory() as folder:
        ...     write_votes(Path(folder) / "votes.jsonl", [vote])
        ...     read_votes(Path(folder) / "votes.jsonl") == [vote]
        True
    """
    with atomic_path(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for vote in votes:
            file.write(json.dumps(vote.to_json(), allow_nan=False) + "\n")
