"""What a rater does: is shown a pair, and says which side is better. A vote that was acknowledged is never lost."""

from __future__ import annotations

import secrets
from collections import OrderedDict, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, func, select, update
from sqlalchemy.orm import Session, aliased

from offbook.rating.assign import Candidate, Plan, Shown, Tally, choose
from offbook.rating.studies import find, hash_token
from offbook.rating.tables import Assignment, Output, Pair, Rater, Study, Vote
from offbook.service.database import now
from offbook.service.refusal import RefusedError, unknown

MEDIA = "/api/rating/v1/media/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a rater says of a pair.

    Attributes:
        nonce: that came with the pair.
        choice: `left`, `right`, `tie`, `both_bad` or `skip`.
        reasons: some of those that the study offers.
        note: a few words.
        dwell_ms: milliseconds from showing to answering, as the page measured them.
        watched: smallest share of the two videos that was played, in [0, 1].
        client_ms: the page's clock, milliseconds since 1970.
    """

    nonce: str
    choice: str
    reasons: tuple[str, ...] = ()
    note: str = ""
    dwell_ms: int | None = None
    watched: float | None = None
    client_ms: int | None = None


def authenticate(session: Session, header: str | None) -> Rater:
    """Who stands behind an `Authorization: Bearer rt_...` header.

    Raises:
        RefusedError: 401, nobody was invited with it.
    """
    kind, _, text = (header or "").strip().partition(" ")
    rater = None
    if kind.lower() == "bearer" and text.strip().startswith("rt_") and text.isascii():
        rater = session.scalar(select(Rater).where(Rater.token_hash == hash_token(text.strip())))
    if rater is None:
        raise RefusedError(401, "unauthorised", "Authorization header", expected="Bearer rt_... from an invitation",
                           got="something else" if header else "none",
                           fix="open the link of your invitation again")  # fmt: skip
    return rater


def consent(session: Session, rater: Rater) -> None:
    """Notes that a rater has read what will be kept, and agrees; once is enough."""
    if rater.consent_at is None:
        rater.consent_at = session.scalar(select(now(session)))
        session.add(rater)


def introduce(study: Study, rater: Rater) -> dict[str, Any]:
    """What a rater is told of a study before the first pair: the question and the rules, no name and no total."""
    options = ["left", "right"]
    options += [name for name, wanted in (("tie", study.allow_tie), ("both_bad", study.allow_bad)) if wanted]
    return {
        "question": study.question,
        "modality": study.modality,
        "options": options + ["skip"] * study.allow_skip,
        "reasons": list(study.reasons),
        "min_dwell_s": study.min_dwell_s,
        "min_watch": study.min_watch,
        "consented": rater.consent_at is not None or rater.kind != "human",
        "state": study.state,
        "most": study.per_rater_cap,
    }


def next_pair(session: Session, rater: Rater) -> dict[str, Any]:
    """The pair that a rater has before them, or a new one.

    Returns:
        `{assignment, nonce, prompt, left, right, expires_in_s, progress}`, or `{done, later, progress}` when nothing is
        left; `later` when others hold pairs that may yet come to this rater.

    Raises:
        RefusedError: 403, a person who did not agree; 409 or 410, the study is not open.
    """
    # The lock makes counts exact where raters come at once; without it some pairs would get more answers than wanted.
    study = find(session, rater.study_id, lock=True)
    _require_open(study)
    if rater.kind == "human" and rater.consent_at is None:
        raise RefusedError(403, "no_consent", "rater", expected="agreement to what is kept", got="none yet",
                           fix="POST /api/rating/v1/consent first")  # fmt: skip
    present = session.execute(select(now(session))).scalar_one()
    session.execute(
        update(Assignment)
        .where(Assignment.study_id == study.id, Assignment.state == "open", Assignment.expires <= present)
        .values(state="expired"),
        execution_options={"synchronize_session": False},
    )
    own = session.execute(
        select(Assignment.pair_id, Assignment.left_is_a, Assignment.state, Assignment.id, Assignment.n)
        .where(Assignment.rater_id == rater.id)
        .order_by(Assignment.n)
    ).all()
    waiting = next((row.id for row in own if row.state == "open"), None)
    answered = sum(row.state in ("voted", "skipped") for row in own)
    progress = {"done": answered, "most": study.per_rater_cap}
    if waiting is None:
        shown = [Shown(row.pair_id, row.left_is_a, row.state) for row in own if row.state != "expired"]
        capped = answered >= study.per_rater_cap
        chosen = None if capped else _choose(session, study, rater, shown, expired=len(own) - len(shown))
        if chosen is None:
            later = not capped and _held(session, study, rater, {each.pair for each in shown})
            return {"done": True, "later": later, "progress": progress}
        pair, left_is_a = chosen
        assignment = Assignment(
            study_id=study.id, pair_id=pair, rater_id=rater.id, n=len(own), left_is_a=left_is_a,
            nonce=secrets.token_urlsafe(24), issued=present, expires=present + study.patience_s, state="open",
        )  # fmt: skip
        session.add(assignment)
        session.flush()
    else:
        assignment = session.get_one(Assignment, waiting)
    return _shown(session, assignment, present) | {"progress": progress}


def _require_open(study: Study) -> None:
    if study.state == "closed":
        raise RefusedError(410, "study_closed", "study", expected="an open study", got="one that is closed",
                           fix="nothing is left to do; thank you")  # fmt: skip
    if study.state != "open":
        raise RefusedError(409, "study_not_open", "study", expected="an open study", got="one that is being prepared",
                           fix="come back later")  # fmt: skip


def _held(session: Session, study: Study, rater: Rater, seen: Set[int]) -> bool:
    """Whether others of a rater's kind have real pairs before them that this one has not seen."""
    open_ = (
        select(Assignment.pair_id)
        .join(Rater, Rater.id == Assignment.rater_id)
        .join(Pair, Pair.id == Assignment.pair_id)
        .where(Assignment.study_id == study.id, Assignment.state == "open", Rater.kind == rater.kind)
        .where(Pair.kind == "real")
    )
    return not seen >= set(session.scalars(open_))


def _choose(
    session: Session, study: Study, rater: Rater, shown: list[Shown], *, expired: int
) -> tuple[int, bool] | None:
    pairs = _pairs(session, study)
    # Kinds are never pooled: each pair gets its answers from people, whatever machines said of it.
    counted = (
        select(Assignment.pair_id, func.count(Assignment.id))
        .join(Rater, Rater.id == Assignment.rater_id)
        .where(Assignment.study_id == study.id, Assignment.state.in_(("open", "voted")), Rater.kind == rater.kind)
    )
    answers = {row[0]: row[1] for row in session.execute(counted.group_by(Assignment.pair_id))}
    plan = Plan(
        seed=study.seed,
        raters_per_pair=study.raters_per_pair,
        gold_rate=study.gold_rate,
        repeat_rate=study.repeat_rate,
        policy=study.policy,
    )
    tallies = _tallies(session, study, rater.kind, pairs) if study.policy == "greedy" else None
    return choose(plan, rater.n, shown, pairs, answers, tallies, expired=expired)


_remembered: OrderedDict[tuple[Any, ...], tuple[Candidate, ...]] = OrderedDict()


def _pairs(session: Session, study: Study) -> tuple[Candidate, ...]:
    """The pairs of a study, which never change once it is open, and which every rater asks for each time."""
    key = (session.get_bind().engine.url, study.id, study.opened)
    pairs = _remembered.get(key)
    if pairs is None:
        a, b, twin = aliased(Output), aliased(Output), aliased(Pair)
        found = session.execute(
            select(Pair.id, Pair.kind, a.system_id, b.system_id, twin.id)
            .join(a, a.id == Pair.a_id)
            .join(b, b.id == Pair.b_id)
            .outerjoin(twin, twin.repeat_of == Pair.id)
            .where(Pair.study_id == study.id)
            .order_by(Pair.id)
        )
        pairs = tuple(Candidate(pair, kind, (one, two), repeat) for pair, kind, one, two, repeat in found)
        _remembered[key] = pairs
        while len(_remembered) > 8:
            _remembered.popitem(last=False)
    return pairs


def _tallies(session: Session, study: Study, kind: str, pairs: Sequence[Candidate]) -> dict[tuple[int, int], Tally]:
    """What raters of a kind answered about each two systems."""
    favours_a = case((Vote.choice == "left", Assignment.left_is_a), else_=~Assignment.left_is_a)
    points = case((Vote.choice.in_(("tie", "both_bad")), 0.5), (favours_a, 1.0), else_=0.0)
    rows = session.execute(
        select(Assignment.pair_id, func.count(Vote.id), func.sum(points), func.sum(points * points))
        .join(Vote, Vote.assignment_id == Assignment.id)
        .join(Pair, Pair.id == Assignment.pair_id)
        .join(Rater, Rater.id == Assignment.rater_id)
        .where(Assignment.study_id == study.id, Vote.choice != "skip", Pair.kind == "real", Rater.kind == kind)
        .group_by(Assignment.pair_id)
    )
    systems = {pair.id: pair.systems for pair in pairs}
    sums: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for pair, n, first, squares in rows:
        i, j = systems[pair]
        if i > j:
            # The points of the other one: 1 - x, and the sum of its squares.
            i, j, first, squares = j, i, n - first, n - 2 * first + squares
        sums[i, j] = [old + new for old, new in zip(sums[i, j], (n, first, squares), strict=True)]
    return {key: Tally(int(n), first, squares) for key, (n, first, squares) in sums.items()}


def _shown(session: Session, assignment: Assignment, present: float) -> dict[str, Any]:
    """A pair as the rater's page takes it: contents and nothing else of the outputs."""
    pair = session.get_one(Pair, assignment.pair_id)
    a, b = session.get_one(Output, pair.a_id), session.get_one(Output, pair.b_id)
    left, right = (a, b) if assignment.left_is_a else (b, a)
    return {
        "assignment": assignment.n,
        "nonce": assignment.nonce,
        "prompt": pair.item.prompt,
        "left": _content(left),
        "right": _content(right),
        "expires_in_s": round(max(0.0, assignment.expires - present), 1),
    }


def _content(output: Output) -> dict[str, str]:
    if output.text is not None:
        return {"kind": "text", "text": output.text}
    return {"kind": output.media_type.partition("/")[0], "url": f"{MEDIA}{output.opaque}"}


def vote(session: Session, rater: Rater, number: int, answer: Answer) -> dict[str, Any]:
    """Keeps a vote. The same vote sent again gets the same answer.

    Args:
        session: a writing session.
        rater: who votes.
        number: of the assignment, as `next_pair` gave it.
        answer: what is said.

    Raises:
        RefusedError: 404, no such nonce; 403, somebody else's; 409, another vote was given; 410, it came too late;
            422, the study does not offer such an answer.
    """
    assignment = session.scalar(select(Assignment).where(Assignment.nonce == answer.nonce))
    if assignment is None:
        raise unknown("nonce", answer.nonce[:8], "ask for the next pair")
    if assignment.rater_id != rater.id or assignment.n != number:
        raise RefusedError(403, "not_yours", f"assignment {number}", expected="one that was given to you",
                           got="the nonce of another", fix="ask for the next pair")  # fmt: skip
    # Many may vote at once, but nobody while the study is being closed.
    study = session.get_one(Study, assignment.study_id, with_for_update={"read": True})
    _check_offered(study, answer)
    if assignment.state in ("voted", "skipped"):
        return _repeated(session, assignment, answer)
    _require_open(study)
    present = session.execute(select(now(session))).scalar_one()
    taken = session.execute(
        update(Assignment)
        .where(Assignment.id == assignment.id, Assignment.state == "open", Assignment.expires > present)
        .values(state="skipped" if answer.choice == "skip" else "voted")
        .returning(Assignment.id),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    if taken is None:
        session.refresh(assignment)
        if assignment.state in ("voted", "skipped"):
            return _repeated(session, assignment, answer)
        raise RefusedError(410, "expired", f"assignment {number}", expected=f"a vote within {study.patience_s:g} s",
                           got="one that came later", fix="ask for the next pair")  # fmt: skip
    # Nobody looks for longer than the pair was out.
    longest = max(0, round(1000 * (present - assignment.issued)))
    session.add(
        Vote(
            assignment_id=assignment.id,
            choice=answer.choice,
            reasons=list(answer.reasons),
            note=answer.note,
            dwell_ms=longest if answer.dwell_ms is None else min(answer.dwell_ms, longest),
            watched=answer.watched,
            client_ms=answer.client_ms,
            created=present,
        )
    )
    session.flush()
    return _receipt(number, answer)


def _receipt(number: int, answer: Answer) -> dict[str, Any]:
    return {"recorded": True, "assignment": number, "choice": answer.choice}


def _repeated(session: Session, assignment: Assignment, answer: Answer) -> dict[str, Any]:
    before = session.scalars(select(Vote).where(Vote.assignment_id == assignment.id)).one()
    if (before.choice, before.reasons, before.note) != (answer.choice, list(answer.reasons), answer.note):
        raise RefusedError(409, "voted", f"assignment {assignment.n}", expected="one vote",
                           got=f"{answer.choice!r} after {before.choice!r}",
                           fix="votes are never changed; ask for the next pair")  # fmt: skip
    return _receipt(assignment.n, answer)


def _check_offered(study: Study, answer: Answer) -> None:
    refused = {"tie": not study.allow_tie, "both_bad": not study.allow_bad, "skip": not study.allow_skip}
    strange = [reason for reason in answer.reasons if reason not in study.reasons]
    if refused.get(answer.choice) or strange:
        raise RefusedError(422, "not_offered", "vote", expected="an answer and reasons that the study offers",
                           got=repr(strange[0] if strange else answer.choice)[:80], fix="choose another")  # fmt: skip
