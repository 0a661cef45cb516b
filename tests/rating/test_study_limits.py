"""Designs at the edge of what a study can be."""

from __future__ import annotations

import pytest
from rating_world import OWNER, World, texts

from offbook.rating import studies

pytestmark = pytest.mark.service


def test_too_many_pairs_are_refused_before_they_are_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "MOST_PAIRS", 50)
    made, pairs_of = [], studies._pairs_of

    def counted(*given):
        for pair in pairs_of(*given):
            made.append(pair)
            yield pair

    monkeypatch.setattr(studies, "_pairs_of", counted)
    study = world.draft(texts([f"system {i}" for i in range(100)], items=1))
    answer = world.ask("POST", f"studies/{study}/open", OWNER)
    assert (answer.status_code, "expected 1 to 50 pairs of two systems, got more" in answer.text) == (422, True)
    assert len(made) == 52


def test_a_shortest_look_is_no_less_than_a_millisecond(world: World) -> None:
    study = world.study(texts(items=1), min_dwell_s=0.0001)
    world.own("POST", f"studies/{study}/close")
    assert world.own("GET", f"studies/{study}/stats")["votes"] == 0
