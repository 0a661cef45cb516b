"""One rating service in one process: its database, its files, its owners, and the figures it has worked out."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.requests import HTTPConnection

from offbook.rating.analysis import Analysis, analyse
from offbook.rating.exports import export_votes, votes_with_rules
from offbook.rating.features import telling_features
from offbook.rating.tables import Assignment, Exclusion, Rater, Study, Vote
from offbook.service.database import Database
from offbook.service.pages import Navigation
from offbook.service.storage import BlobStore
from offbook.service.web import Turnstile

_REMEMBERED = 32

IdentifyOwner = Callable[[HTTPConnection], Awaitable[str]]
"""Who makes studies and sees open ones: their name, or a refusal by `RefusedError` with status 401 or 403."""


@dataclass(kw_only=True)
class Rating:
    """All parts of a rating service.

    Attributes:
        database: with the tables of `tables.SCHEMA`.
        blobs: where pictures and films are.
        identify_owner: tells owners from others.
        brand: word behind the project's name on the pages.
        navigation: doors at the top of the pages.
        turnstile: slows down who guesses tokens.
        cleaning: one file at a time is stripped; encoding takes all of a core.
        figuring: whoever wants figures waits for it, and holds neither a thread nor a connection meanwhile, so that
            raters go on; within it one thread at a time calls `analysis`.
    """

    database: Database
    blobs: BlobStore
    identify_owner: IdentifyOwner
    brand: str = "rating"
    navigation: Navigation = (("/studies", "Studies", "studies"),)
    turnstile: Turnstile = field(default_factory=Turnstile)
    cleaning: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    figuring: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    _known: OrderedDict[tuple[int, ...], Analysis] = field(default_factory=OrderedDict)

    def analysis(self, session: Session, study: Study) -> Analysis:
        """The figures of a study as it stands; worked out once for the same votes."""
        key = (study.id, *_extent(session, study))
        if key not in self._known:
            self._known[key] = analysis_of(session, study)
        self._known.move_to_end(key)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return self._known[key]


def analysis_of(session: Session, study: Study) -> Analysis:
    """The figures of a study, with the votes left out that its rules leave out."""
    votes = export_votes(session, study)
    if study.state == "open":
        votes = votes_with_rules(study, votes)
    seen = {name for vote in votes for name in (vote.left, vote.right)}
    return analyse(
        votes,
        anchor=study.anchor if study.anchor in seen else None,
        features=telling_features(votes),
        min_dwell_ms=study.prereg["rules"].get("min_dwell_ms"),
    )


def _extent(session: Session, study: Study) -> tuple[int, ...]:
    """What changes whenever the figures may."""
    votes = select(func.count(Vote.id)).join(Assignment).where(Assignment.study_id == study.id)
    of_votes = select(func.count(Exclusion.id)).join(Vote, Vote.id == Exclusion.vote_id).join(Assignment)
    of_raters = select(func.count(Exclusion.id)).join(Rater, Rater.id == Exclusion.rater_id)
    own = (votes, of_votes.where(Assignment.study_id == study.id), of_raters.where(Rater.study_id == study.id))
    return *(session.scalar(query) or 0 for query in own), int(study.state == "closed")
