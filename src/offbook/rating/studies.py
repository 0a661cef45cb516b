"""Studies: how one is designed, opened, handed to raters and closed."""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from offbook.errors import ConfigError, nearest
from offbook.rating.quality import Rules
from offbook.rating.tables import Assignment, Exclusion, Item, Output, Pair, Rater, Study, System, Vote
from offbook.service.database import now
from offbook.service.fields import SmallRecord, Text
from offbook.service.refusal import RefusedError, unknown

MOST_PAIRS = 100_000
MOST_RATERS = 10_000

REASONS = {
    "text": ("correct", "clear", "complete", "style", "safe"),
    "image": ("fits the prompt", "details", "style", "safe"),
    "video": ("fits the prompt", "motion", "details", "style"),
    "rollout": ("finished the task", "careful", "fast", "smooth"),
}
"""What a rater may tick as reasons, where the design names none."""

Modality = Literal["text", "image", "video", "rollout"]
Name = Annotated[Text, Field(min_length=1, max_length=120, pattern=r"^\S(.*\S)?$")]
Share = Annotated[float, Field(ge=0, le=0.3, allow_inf_nan=False)]


class Preregistration(BaseModel):
    """What is written down before the first vote; it cannot be changed afterwards.

    Attributes:
        plan: what will be asked of the votes, in words.
        rules: when votes do not count, as `quality.Rules` has them.
        manual: names of rules that the owner may apply by hand, such as `"same_person"`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    plan: Text = Field(default="", max_length=10_000)
    rules: SmallRecord = Field(default_factory=dict)
    manual: list[Name] = Field(default_factory=list, max_length=20)

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        try:
            self.as_rules()
        except (ConfigError, TypeError) as error:
            known = ", ".join(each.name for each in fields(Rules))
            raise ValueError(f"rules as offbook knows them ({known}): {error}") from error
        return self

    def as_rules(self) -> Rules:
        """The rules that need no hand."""
        return Rules(**self.rules)


class Design(BaseModel):
    """How a study asks its question.

    Attributes:
        name: of the study, for its owner; raters never see it.
        question: what raters are asked about each pair.
        modality: `text`, `image`, `video`, or `rollout` for videos of a robot's runs on the same scene and seed.
        allow_tie: whether both may be called equal.
        allow_bad: whether both may be called no good: a tie in the ranking, told apart in the report.
        allow_skip: whether a pair may be passed over.
        reasons: what a rater may tick as reasons; words that fit the modality when None.
        min_dwell_s: seconds before the page takes an answer.
        min_watch: share of each video that the page wants played before it takes an answer.
        raters_per_pair: answers that each real pair gets from each kind of raters.
        gold_rate: share of pairs with a known answer among those that a rater is shown.
        repeat_rate: share of earlier pairs that come again with their sides swapped.
        per_rater_cap: most pairs that one rater is shown.
        policy: `balanced`, or `greedy` to look where a vote tells most (`assign.Plan`).
        anchor: system on which the scale of the ranking is fixed, such as a teacher; empty for none.
        anchor_only: show pairs with the anchor alone.
        patience_s: seconds after which an unanswered pair goes to somebody else.
        seed: from which all lots follow; drawn in secret when None.
        prereg: plan and rules, written down beforehand; `min_dwell_s` is a rule unless another floor is given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Name
    question: Annotated[Text, Field(min_length=1, max_length=500)]
    modality: Modality
    allow_tie: bool = True
    allow_bad: bool = True
    allow_skip: bool = True
    reasons: Annotated[list[Name], Field(max_length=12)] | None = None
    min_dwell_s: Annotated[float, Field(ge=0, le=600, allow_inf_nan=False)] = 1.0
    min_watch: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    raters_per_pair: Annotated[int, Field(ge=1, le=1000)] = 3
    gold_rate: Share = 0.07
    repeat_rate: Share = 0.07
    per_rater_cap: Annotated[int, Field(ge=1, le=100_000)] = 100
    policy: Literal["balanced", "greedy"] = "balanced"
    anchor: Annotated[Text, Field(max_length=120)] = ""
    anchor_only: bool = False
    patience_s: Annotated[float, Field(ge=1, le=604_800, allow_inf_nan=False)] = 900.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    prereg: Preregistration = Preregistration()

    @model_validator(mode="after")
    def _check_sense(self) -> Self:
        if self.anchor_only and not self.anchor:
            raise ValueError("anchor_only wants an anchor")
        if self.min_watch and self.modality not in ("video", "rollout"):
            raise ValueError(f"min_watch is for videos, not for {self.modality}")
        return self


def design(**wanted: Any) -> Design:
    """A design from plain values.

    Raises:
        RefusedError: 422, one of them cannot be used.
    """
    try:
        return Design(**wanted)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "design"
        raise RefusedError(422, "bad_design", f"study, {where}", expected=first["msg"][:300],
                           got=repr(first["input"])[:80], fix="correct the value") from error  # fmt: skip


def create(session: Session, owner: str, wanted: Design) -> Study:
    """Makes a study, as a draft that takes outputs.

    Raises:
        RefusedError: 409, there is one of that name.
    """
    if session.scalar(select(Study.id).where(Study.name == wanted.name)) is not None:
        raise RefusedError(409, "name_taken", f"study {wanted.name!r}", expected="a new name", got="one that is in use",
                           fix="choose another name")  # fmt: skip
    made = settings(wanted)
    if wanted.seed is None:
        made["seed"] = secrets.randbits(62)
    study = Study(**made, owner=owner, state="draft", created=session.scalar(select(now(session))))
    session.add(study)
    session.flush()
    return study


def settings(wanted: Design) -> dict[str, Any]:
    """What is kept of a design: reasons are those of the modality, and the floor of time is a rule, unless it says."""
    made = wanted.model_dump()
    if wanted.min_dwell_s:
        made["prereg"]["rules"].setdefault("min_dwell_ms", max(1, round(1000 * wanted.min_dwell_s)))
    if wanted.reasons is None:
        made["reasons"] = list(REASONS[wanted.modality])
    return made


def find(session: Session, study_id: int, *, lock: bool = False) -> Study:
    """The study of that id.

    Args:
        session: any session.
        study_id: its number.
        lock: wait for others who change it, and keep them out until the transaction ends.

    Raises:
        RefusedError: 404, there is none.
    """
    study = session.get(Study, study_id, with_for_update=lock)
    if study is None:
        raise unknown("study", study_id, "list the studies")
    return study


def require(study: Study, state: str, fix: str) -> None:
    """Refuses what a study in another state does not allow."""
    if study.state != state:
        raise RefusedError(409, f"study_not_{state}", f"study {study.id}", expected=f"one that is {state}",
                           got=f"one that is {study.state}", fix=fix)  # fmt: skip


def open_study(session: Session, study: Study) -> dict[str, int]:
    """Makes the pairs and lets raters in; from here on nothing of the study changes but votes.

    Returns:
        How many pairs of each kind there are.

    Raises:
        RefusedError: 409, it is no draft; 422, its outputs do not make pairs that can be compared.
    """
    require(study, "draft", "open each study once")
    outputs = session.execute(
        select(Output.id, Output.gold, Output.features, Item.id.label("item"), Item.name, System.name.label("system"))
        .join(Item, Item.id == Output.item_id)
        .join(System, System.id == Output.system_id)
        .where(Item.study_id == study.id)
        .order_by(Output.id)
    ).all()
    _check_features(outputs)
    items: dict[int, list[Any]] = defaultdict(list)
    for output in outputs:
        items[output.item].append(output)
    every = (pair for group in items.values() for pair in _pairs_of(study, group))
    # Of an item with thousands of outputs all pairs would fill the memory before they are refused.
    rows = list(itertools.islice(every, MOST_PAIRS + len(items) + 1))
    kinds = {name: sum(row["kind"] == name for row in rows) for name in ("real", "gold")}
    if not 0 < kinds["real"] <= MOST_PAIRS:
        raise RefusedError(422, "no_pairs", f"study {study.id}", expected=f"1 to {MOST_PAIRS} pairs of two systems",
                           got="more" if kinds["real"] else "none",
                           fix="give outputs of few systems, and of two at least, for the same item")  # fmt: skip
    names = {output.id: output.system for output in outputs}
    check_anchor(study.anchor, {names[row[side]] for row in rows if row["kind"] == "real" for side in ("a_id", "b_id")})
    session.execute(insert(Pair), [{"study_id": study.id, "repeat_of": None} | row for row in rows])
    if study.repeat_rate > 0:
        real = session.scalars(select(Pair).where(Pair.study_id == study.id, Pair.kind == "real"))
        twins = [
            {"study_id": study.id, "item_id": pair.item_id, "a_id": pair.a_id, "b_id": pair.b_id, "kind": "repeat",
             "expected": None, "repeat_of": pair.id}
            for pair in real
        ]  # fmt: skip
        session.execute(insert(Pair), twins)
    study.state, study.opened = "open", session.scalar(select(now(session)))
    return kinds


def check_anchor(anchor: str, systems: set[str]) -> None:
    """Refuses an anchor, unless it is empty, that is none of the systems of real pairs."""
    if anchor and anchor not in systems:
        raise RefusedError(422, "no_anchor", "anchor", expected="a system of real pairs", got=repr(anchor),
                           fix=nearest(anchor, systems))  # fmt: skip


def _check_features(outputs: Any) -> None:
    names = {frozenset(output.features) for output in outputs}
    if len(names) > 1:
        first, second, *_ = sorted(map(sorted, names))
        raise RefusedError(422, "features_differ", "features of the outputs", expected="the same names for all",
                           got=f"{first} and {second}", fix="measure all outputs alike")  # fmt: skip


def _pairs_of(study: Study, group: list[Any]) -> Iterable[dict[str, Any]]:
    """The pairs of one item: all of its outputs by twos, or the two of which one is known to be better."""
    item, marked = group[0].name, [output for output in group if output.gold]
    if marked:
        if sorted(output.gold for output in group if output.gold) != ["better", "worse"] or len(group) != 2:
            raise RefusedError(422, "bad_gold", f"item {item!r}", expected="one output marked better, one marked worse",
                               got=f"{len(group)} outputs, {len(marked)} of them marked",
                               fix="give gold pairs items of their own")  # fmt: skip
        a, b = group
        expected = "a" if a.gold == "better" else "b"
        return [{"item_id": a.item, "a_id": a.id, "b_id": b.id, "kind": "gold", "expected": expected}]
    if study.anchor_only and study.anchor not in {output.system for output in group}:
        raise RefusedError(422, "no_anchor", f"item {item!r}", expected=f"an output of the anchor {study.anchor!r}",
                           got="none", fix="give it, or compare without an anchor")  # fmt: skip
    return (
        {"item_id": a.item, "a_id": a.id, "b_id": b.id, "kind": "real", "expected": None}
        for a, b in itertools.combinations(group, 2)
        if not study.anchor_only or study.anchor in (a.system, b.system)
    )


def close_study(session: Session, study: Study) -> int:
    """Takes no more votes, and writes down which ones the rules leave out.

    Returns:
        How many votes were given.
    """
    from offbook.rating.exports import export_votes, votes_with_rules

    require(study, "open", "close each study once, after it was open")
    study.state, study.closed = "closed", session.scalar(select(now(session)))
    votes = export_votes(session, study)
    rows = [
        {"vote_id": int(vote.id), "rater_id": None, "rule": rule, "by": "rules", "at": study.closed}
        for vote, before in zip(votes_with_rules(study, votes), votes, strict=True)
        for rule in vote.excluded
        if rule not in before.excluded
    ]
    if rows:
        session.execute(insert(Exclusion), rows)
    return len(votes)


def exclude(session: Session, study: Study, rule: str, by: str, *, rater: int | None, vote: int | None) -> None:
    """Leaves out a vote, or all votes of a rater, by a rule that was written down for the owner's hand.

    Args:
        session: a writing session.
        study: in which.
        rule: one of the study's `manual` rules.
        by: who does it.
        rater: number of the rater; or
        vote: number of the vote.

    Raises:
        RefusedError: 422, no such rule was written down; 404, no such rater or vote; 409, it is left out already.
    """
    known = study.prereg["manual"]
    if rule not in known:
        raise RefusedError(422, "rule_not_registered", f"rule {rule!r}",
                           expected="a rule that was written down before the study opened",
                           got=f"none of {', '.join(known) or 'none at all'}",
                           fix="report it beside the results instead")  # fmt: skip
    if (rater is None) == (vote is None):
        raise RefusedError(422, "bad_exclusion", "exclusion", expected="a rater or a vote",
                           got="neither" if rater is None else "both", fix="name one")  # fmt: skip
    found = session.scalar(
        select(Rater.id).where(Rater.study_id == study.id, Rater.n == rater)
        if vote is None
        else select(Vote.id).join(Assignment).where(Assignment.study_id == study.id, Vote.id == vote)
    )
    if found is None:
        raise unknown("vote" if rater is None else "rater", vote if rater is None else rater, "look into the export")
    target = {"rater_id": found} if vote is None else {"vote_id": found}
    session.add(Exclusion(**target, rule=rule, by=by, at=session.scalar(select(now(session)))))


def invite(session: Session, study: Study, count: int, kind: str = "human", cohort: str = "") -> list[dict[str, Any]]:
    """Makes raters and their tokens, which can be seen this once.

    Args:
        session: a writing session.
        study: that they judge; not closed.
        count: how many.
        kind: `human`, `llm` or `script`; kinds are never pooled.
        cohort: a word for those that are invited together.

    Raises:
        RefusedError: 409, it is closed or has too many raters.
    """
    if study.state == "closed":
        require(study, "open", "invite raters before it is closed")
    first = session.scalar(select(func.count(Rater.id)).where(Rater.study_id == study.id)) or 0
    if first + count > MOST_RATERS:
        raise RefusedError(409, "too_many_raters", f"study {study.id}", expected=f"at most {MOST_RATERS} raters",
                           got=str(first + count), fix="invite fewer")  # fmt: skip
    tokens = [f"rt_{secrets.token_urlsafe(32)}" for _ in range(count)]
    created = session.scalar(select(now(session)))
    session.add_all(
        Rater(study_id=study.id, n=first + i, token_hash=hash_token(token), kind=kind, cohort=cohort, created=created)
        for i, token in enumerate(tokens)
    )
    session.flush()
    return [{"rater": f"r{first + i}", "token": token} for i, token in enumerate(tokens)]


def hash_token(token: str) -> str:
    """What is kept of a token of 256 random bits."""
    return hashlib.sha256(token.encode()).hexdigest()


def counts(session: Session, some: Sequence[Study]) -> dict[int, dict[str, Any]]:
    """How far studies are, for their owners.

    Returns:
        By id of the study: numbers of `systems`, `outputs` and real `pairs`; `wanted`, the answers that each kind of
        raters is to give; and by kind, the `raters` that were invited and the `answers` to real pairs.
    """
    ids = [study.id for study in some]
    real = Pair.kind == "real"
    sizes = {
        "systems": select(System.study_id, func.count(System.id)),
        "outputs": select(Item.study_id, func.count(Output.id)).join(Item, Item.id == Output.item_id),
        "pairs": select(Pair.study_id, func.count(Pair.id)).where(real),
    }
    kinds = {
        "raters": select(Rater.study_id, Rater.kind, func.count(Rater.id)),
        "answers": select(Assignment.study_id, Rater.kind, func.count(Assignment.id))
        .join(Rater, Rater.id == Assignment.rater_id)
        .join(Pair, Pair.id == Assignment.pair_id)
        .where(Assignment.state == "voted", real),
    }
    found: dict[int, dict[str, Any]] = {key: dict.fromkeys(sizes, 0) | {name: {} for name in kinds} for key in ids}
    for name, query in (sizes | kinds).items():
        study_id, *kind = list(query.selected_columns)[:-1]
        for row in session.execute(query.where(study_id.in_(ids)).group_by(study_id, *kind)):
            if kind:
                found[row[0]][name][row[1]] = row[2]
            else:
                found[row[0]][name] = row[1]
    for study in some:
        own = found[study.id]
        own["wanted"] = own["pairs"] * study.raters_per_pair
        own["answers"] = {kind: own["answers"].get(kind, 0) for kind in own["raters"]}
    return found
