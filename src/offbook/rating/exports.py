"""Votes out of a study, and somebody else's votes into one: `votes.jsonl` is all that statistics need."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from offbook.rating import records
from offbook.rating.quality import apply_rules
from offbook.rating.studies import Design, Preregistration, check_anchor, create, design, hash_token
from offbook.rating.tables import Assignment, Exclusion, Item, Output, Pair, Rater, Study, System, Vote
from offbook.service.database import now
from offbook.service.refusal import RefusedError


def export_votes(session: Session, study: Study) -> list[records.Vote]:
    """All votes of a study in the order in which they were given, with what was left out by whom."""
    a, b = aliased(Output), aliased(Output)
    system_a, system_b = aliased(System), aliased(System)
    rows = session.execute(
        select(
            Vote, Assignment, Pair, Rater, system_a.name.label("name_a"), system_b.name.label("name_b"),
            # Not its prompt, which may be long, with each vote.
            Item.name.label("item"), Item.cluster, a.features.label("features_a"), b.features.label("features_b"),
        )
        .join(Assignment, Assignment.id == Vote.assignment_id)
        .join(Pair, Pair.id == Assignment.pair_id)
        .join(Item, Item.id == Pair.item_id)
        .join(Rater, Rater.id == Assignment.rater_id)
        .join(a, a.id == Pair.a_id)
        .join(b, b.id == Pair.b_id)
        .join(system_a, system_a.id == a.system_id)
        .join(system_b, system_b.id == b.system_id)
        .where(Assignment.study_id == study.id)
        .order_by(Vote.id)
    )  # fmt: skip
    by_vote, by_rater = _exclusions(session, study)
    return [
        _vote(study, row, sorted(by_vote.get(row.Vote.id, set()) | by_rater.get(row.Rater.id, set()))) for row in rows
    ]


def _exclusions(session: Session, study: Study) -> tuple[dict[int, set[str]], dict[int, set[str]]]:
    """The rules that leave out votes, and raters, by their ids."""
    votes = (
        select(Vote.id, Exclusion.rule)
        .join(Exclusion, Exclusion.vote_id == Vote.id)
        .join(Assignment, Assignment.id == Vote.assignment_id)
        .where(Assignment.study_id == study.id)
    )
    raters = (
        select(Rater.id, Exclusion.rule)
        .join(Exclusion, Exclusion.rater_id == Rater.id)
        .where(Rater.study_id == study.id)
    )
    by_vote: dict[int, set[str]] = {}
    by_rater: dict[int, set[str]] = {}
    for found, query in ((by_vote, votes), (by_rater, raters)):
        for key, rule in session.execute(query):
            found.setdefault(key, set()).add(rule)
    return by_vote, by_rater


def _vote(study: Study, row: Any, excluded: Sequence[str]) -> records.Vote:
    vote, assignment, pair = row.Vote, row.Assignment, row.Pair
    names, features = (row.name_a, row.name_b), (row.features_a, row.features_b)
    left, right = (0, 1) if assignment.left_is_a else (1, 0)
    return records.Vote(
        study=study.name,
        id=str(vote.id),
        pair=str(pair.id),
        pair_kind=pair.kind,
        expected=None if pair.expected is None else names["ab".index(pair.expected)],
        repeat_of=None if pair.repeat_of is None else str(pair.repeat_of),
        item=row.item,
        cluster=row.cluster,
        rater=f"r{row.Rater.n}",
        rater_kind=row.Rater.kind,
        cohort=row.Rater.cohort,
        left=names[left],
        right=names[right],
        choice=vote.choice,
        reasons=tuple(vote.reasons),
        note=vote.note,
        dwell_ms=vote.dwell_ms,
        watched=vote.watched,
        created=datetime.fromtimestamp(vote.created, UTC).isoformat(timespec="milliseconds"),
        excluded=tuple(excluded),
        left_features=features[left],
        right_features=features[right],
    )


def votes_with_rules(study: Study, votes: Sequence[records.Vote]) -> list[records.Vote]:
    """The votes with those marked that the study's rules leave out: as it will be when it is closed.

    How long somebody looks is asked of people alone: a script is no worse for being fast. Who does not say how much of
    the videos was played has watched none; who skips need not watch.
    """
    rules = Preregistration.model_validate(study.prereg).as_rules()
    by_id: dict[str, records.Vote] = {}
    for people, chosen in ((True, rules), (False, replace(rules, min_dwell_ms=None, max_hasty=None))):
        of = [vote for vote in votes if (vote.rater_kind == "human") is people]
        by_id |= {vote.id: vote for vote in apply_rules(of, chosen)}
    found = [by_id[vote.id] for vote in votes]
    return [
        replace(vote, excluded=tuple(sorted({*vote.excluded, "watched"})))
        if vote.rater_kind == "human" and vote.choice != "skip" and (vote.watched or 0) < study.min_watch
        else vote
        for vote in found
    ]


def design_of_votes(votes: Sequence[records.Vote], **wanted: Any) -> Design:
    """The design of a study of somebody else's votes, which are checked: a service can keep all that they say.

    Args:
        votes: as `records.read_votes` gives them.
        wanted: the `question` that the raters were asked, and perhaps the `anchor` of the ranking.

    Raises:
        RefusedError: 422, there are no votes, or some that tables of outputs and pairs cannot hold; or no vote is about
            the anchor.
    """
    if not votes:
        raise RefusedError(422, "no_votes", "votes", expected="a file with votes", got="none", fix="check the file")
    for vote in votes:
        names = (vote.item, vote.cluster or "", vote.left, vote.right, vote.cohort, *vote.excluded)
        if any(len(name) > 200 for name in names):
            raise RefusedError(422, "bad_vote", f"vote {vote.id!r}", expected="names of at most 200 characters",
                               got="a longer one", fix="shorten it")  # fmt: skip
    _check_outputs(votes)
    reasons = sorted({reason for vote in votes for reason in vote.reasons})[:12]
    made = design(name=votes[0].study, modality="text", reasons=reasons, min_dwell_s=0.0, **wanted)
    check_anchor(made.anchor, {name for v in votes if v.pair_kind == "real" for name in (v.left, v.right)})
    return made


def _common_features(votes: Sequence[records.Vote]) -> set[str]:
    """The features that all outputs have; one that some lack is of no use for comparing."""
    return set.intersection(*(set(vote.left_features) for vote in votes))


def _check_outputs(votes: Sequence[records.Vote]) -> None:
    """Refuses votes that would say something else with one output for each system and item, and one pair for each two.

    A file may have a pair for each rater; what one rater said of two pairs cannot be told of one.
    """
    common = _common_features(votes)
    kinds = {vote.pair: vote.pair_kind for vote in votes}
    outputs: dict[tuple[str, str], tuple[dict[str, float], str]] = {}
    judged: dict[tuple[str, ...], str] = {}
    answers: dict[tuple[str, ...], tuple[str | None, str]] = {}
    for vote in votes:
        if vote.repeat_of is not None and kinds.get(vote.repeat_of, "real") != "real":
            raise RefusedError(422, "bad_repeat", f"vote {vote.id!r}", expected="a repeat of a real pair",
                               got=f"one of pair {vote.repeat_of!r}, which is {kinds[vote.repeat_of]}",
                               fix="leave it out")  # fmt: skip
        for system, features in ((vote.left, vote.left_features), (vote.right, vote.right_features)):
            measured = {name: features[name] for name in common}
            known, first = outputs.setdefault((vote.item, system), (measured, vote.id))
            if known != measured:
                raise RefusedError(422, "two_outputs", f"vote {vote.id!r}, output of {system!r} for {vote.item!r}",
                                   expected=f"the features that it has in vote {first!r}", got="others",
                                   fix="give each output an item of its own")  # fmt: skip
        pair = (vote.pair_kind, vote.item, *sorted((vote.left, vote.right)))
        better, first = answers.setdefault(pair, (vote.expected, vote.id))
        if better != vote.expected:
            raise RefusedError(422, "two_answers", f"vote {vote.id!r}, gold pair of {vote.left!r} and {vote.right!r}",
                               expected=f"{better!r}, which is the better one in vote {first!r}",
                               got=repr(vote.expected), fix="give each pair an item of its own")  # fmt: skip
        first = judged.setdefault((vote.rater, *pair), vote.id)
        if first != vote.id:
            raise RefusedError(422, "two_pairs", f"vote {vote.id!r}",
                               expected=f"one pair of {vote.left!r} and {vote.right!r} for {vote.item!r} by a rater",
                               got=f"a second after vote {first!r}",
                               fix="give each pair an item of its own")  # fmt: skip


def import_votes(session: Session, owner: str, votes: Sequence[records.Vote], wanted: Design) -> Study:
    """Makes a closed study of somebody else's votes, so that it is shown like one's own; outputs are not in the file.

    Args:
        session: a writing session.
        owner: who brings them.
        votes: as `records.read_votes` gives them.
        wanted: as `design_of_votes` gives it.

    Raises:
        RefusedError: 409, there is a study of that name.
    """
    study = create(session, owner, wanted)
    study.state, study.opened = "closed", min(vote.time for vote in votes).timestamp()
    study.closed = max(vote.time for vote in votes).timestamp()
    _Import(session, study).take(votes)
    return study


class _Import:
    """Rows for votes from elsewhere, made as they are met."""

    def __init__(self, session: Session, study: Study) -> None:
        self._session, self._study = session, study
        self._systems: dict[str, System] = {}
        self._items: dict[str, Item] = {}
        self._outputs: dict[tuple[str, str], Output] = {}
        self._pairs: dict[str, Pair] = {}
        self._made: dict[tuple[int, int, str], Pair] = {}
        self._raters: dict[str, Rater] = {}
        self._shown: dict[str, int] = {}
        self._features: set[str] = set()

    def take(self, votes: Sequence[records.Vote]) -> None:
        """Adds all of them."""
        self._features = _common_features(votes)
        # What is repeated comes before its repeats.
        for vote in sorted(votes, key=lambda vote: vote.pair_kind == "repeat"):
            self._pairs[vote.pair] = self._pair(vote, vote.pair_kind)
        for vote in votes:
            self._add(vote)

    def _add(self, vote: records.Vote) -> None:
        session, pair, rater = self._session, self._pairs[vote.pair], self._rater(vote)
        n = self._shown[vote.rater] = self._shown.get(vote.rater, -1) + 1
        given = vote.time.timestamp()
        issued = given - (vote.dwell_ms or 0) / 1000
        assignment = Assignment(
            study_id=self._study.id, pair_id=pair.id, rater_id=rater.id, n=n,
            left_is_a=pair.a_id == self._output(vote, vote.left, vote.left_features).id,
            nonce=secrets.token_urlsafe(24), issued=issued, expires=given,
            state="skipped" if vote.choice == "skip" else "voted",
        )  # fmt: skip
        session.add(assignment)
        session.flush()
        row = Vote(
            assignment_id=assignment.id, choice=vote.choice, reasons=list(vote.reasons), note=vote.note,
            dwell_ms=vote.dwell_ms, watched=vote.watched, client_ms=None, created=given,
        )  # fmt: skip
        session.add(row)
        session.flush()
        session.add_all(Exclusion(vote_id=row.id, rule=rule, by="import", at=given) for rule in vote.excluded)

    def _pair(self, vote: records.Vote, kind: str) -> Pair:
        """The pair of these outputs; one even where the file has a pair for each rater."""
        sides = sorted([(vote.left, vote.left_features), (vote.right, vote.right_features)], key=lambda side: side[0])
        a, b = (self._output(vote, *side) for side in sides)
        if (a.id, b.id, kind) not in self._made:
            pair = Pair(
                study_id=self._study.id, item_id=a.item_id, a_id=a.id, b_id=b.id, kind=kind,
                expected=None if kind != "gold" else "a" if vote.expected == sides[0][0] else "b",
                repeat_of=self._pair(vote, "real").id if kind == "repeat" else None,
            )  # fmt: skip
            self._made[a.id, b.id, kind] = self._keep(pair)
        return self._made[a.id, b.id, kind]

    def _output(self, vote: records.Vote, name: str, features: Any) -> Output:
        if (vote.item, name) not in self._outputs:
            item, system = self._items.get(vote.item), self._systems.get(name)
            if item is None:
                item = Item(study_id=self._study.id, name=vote.item, prompt="", cluster=vote.cluster)
                self._items[vote.item] = self._keep(item)
            if system is None:
                system = self._systems[name] = self._keep(System(study_id=self._study.id, name=name, meta={}))
            output = Output(
                item_id=item.id, system_id=system.id, gold=None, text="", opaque=None, sha256=None,
                media_type="text/plain", size=0, source="",
                features={key: features[key] for key in self._features},
            )  # fmt: skip
            self._outputs[vote.item, name] = self._keep(output)
        return self._outputs[vote.item, name]

    def _rater(self, vote: records.Vote) -> Rater:
        if vote.rater not in self._raters:
            rater = Rater(
                study_id=self._study.id, n=len(self._raters), token_hash=hash_token(secrets.token_urlsafe(32)),
                kind=vote.rater_kind, cohort=vote.cohort, created=self._session.scalar(select(now(self._session))),
            )  # fmt: skip
            self._raters[vote.rater] = self._keep(rater)
        return self._raters[vote.rater]

    def _keep(self, row: Any) -> Any:
        self._session.add(row)
        self._session.flush()
        return row
