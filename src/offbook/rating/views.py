"""What the pages of studies show, as plain dicts. Before a study is closed strangers learn nothing but its question."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from offbook.rating.routes import PREFIX
from offbook.rating.service import Rating
from offbook.rating.studies import counts, find
from offbook.rating.tables import Study, System
from offbook.service.database import now

RULES = {
    "gold": "failed too many pairs with a known answer",
    "dwell": "answered faster than anybody can look",
    "haste": "too many answers faster than anybody can look",
    "streak": "named one side over and over",
    "fit": "answers that nobody else gives",
    "watched": "watched too little of the videos",
}
"""What a rule says of a vote that it leaves out."""

_PUBLIC = ("id", "question", "modality", "state", "opened", "closed")

PEOPLE = {"human": "People", "llm": "Language models", "script": "Scripts"}


def studies(session: Session, owner: str | None) -> dict[str, Any]:
    """All studies, newest first; names and numbers of those that are not closed are for owners."""
    found = session.scalars(select(Study).order_by(Study.id.desc()).limit(500)).all()
    counted = counts(session, [study for study in found if owner is not None or study.state == "closed"])
    rows = []
    for study in found:
        if study.state == "draft" and owner is None:
            continue
        row: dict[str, Any] = {name: getattr(study, name) for name in _PUBLIC}
        row |= {"name": study.name if study.id in counted else None, "counts": counted.get(study.id)}
        rows.append(row)
    return {"studies": rows, "owner": owner is not None, "generated": session.scalar(select(now(session)))}


def study(rating: Rating, session: Session, study_id: int, owner: str | None) -> dict[str, Any]:
    """One study: its results when it is closed; before, for owners alone, what is to do and what was said so far.

    Raises:
        RefusedError: 404, no such study.
    """
    found = find(session, study_id)
    seen = owner is not None or found.state == "closed"
    view: dict[str, Any] = {
        "study": {name: getattr(found, name) for name in _PUBLIC},
        "owner": owner is not None,
        "seen": seen,
        "api": f"{PREFIX}/studies/{found.id}",
        "generated": session.scalar(select(now(session))),
    }
    if not seen:
        if found.state == "draft":
            view["study"]["question"] = "A study in preparation"
        return view
    view["study"] |= {"name": found.name, "anchor": found.anchor, "raters_per_pair": found.raters_per_pair}
    systems = {row.name: row.meta for row in session.scalars(select(System).where(System.study_id == found.id))}
    analysis = None if found.state == "draft" else rating.analysis(session, found).to_json()
    return view | {
        "counts": counts(session, [found])[found.id],
        "systems": systems,
        "prereg": found.prereg,
        "kinds": [] if analysis is None else kinds(analysis["groups"]),
        "between": [] if analysis is None else analysis["between"],
        "votes": 0 if analysis is None else analysis["votes"],
        "command": _command(found, [] if analysis is None else analysis["groups"]),
    }


def _command(study: Study, groups: Sequence[Mapping[str, Any]]) -> str:
    """What makes the figures of the page from the votes; an anchor that no vote is about does nothing."""
    words = ["offbook", "rating", "stats", "votes.jsonl"]
    if any(group["ranking"] and group["ranking"]["anchor"] for group in groups):
        words += ["--anchor", study.anchor]
    floor = study.prereg["rules"].get("min_dwell_ms")
    return shlex.join(words if floor is None else [*words, "--min-dwell-ms", str(floor)])


def kinds(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By kind of rater: the figures of the votes that count and, where rules left votes out, those of all votes."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        kind = found.setdefault(group["kind"], {"kind": group["kind"], "title": PEOPLE[group["kind"]], "all": None})
        kind["all" if group["with_excluded"] else "counted"] = group
    for kind in found.values():
        kind["rows"] = rows(kind["counted"]["ranking"], kind["all"] and kind["all"]["ranking"])
        kind["rules"] = [
            {"rule": rule, "words": RULES.get(rule, rule.replace("_", " ")), "votes": votes}
            for rule, votes in kind["counted"]["excluded"].items()
        ]
    return list(found.values())


def rows(ranking: Mapping[str, Any] | None, beside: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The systems of a ranking as the table shows them, each with its value among all votes."""
    if ranking is None:
        return []
    others = {rating["system"]: rating["theta"] for rating in (beside or {"ratings": []})["ratings"]}
    return [
        {**rating, "rank": rating["ranks"], "with_all": others.get(rating["system"])} for rating in ranking["ratings"]
    ]
