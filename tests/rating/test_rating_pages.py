"""The pages of studies in every state: structure, labels, and words for what the votes do not say."""

from __future__ import annotations

import re

import pytest
from rating_world import OWNER, World, by_number, texts

from reading import Reader, check

pytestmark = pytest.mark.service


def page(world: World, path: str, token: str | None = None) -> str:
    answer = world.ask("GET", path, token, headers={"Accept": "text/html"})
    check(Reader(answer.text))
    return answer.text


def judged(world: World, records, *, raters: int = 3, close: bool = True, **design) -> int:
    study = world.study(records, **design)
    for token in world.invite(study, raters):
        world.judge(token, by_number)
    if close:
        world.own("POST", f"studies/{study}/close")
    return study


def test_every_page_is_sound_in_every_state(world: World) -> None:
    assert "No study yet" in page(world, "/studies")
    draft = world.draft(texts(), name="draft")
    empty = world.study(texts(), name="empty")
    going = judged(world, texts(("a", "b", "c")), name="going", close=False)
    done = judged(world, texts(("a", "b", "c"), items=6, gold=3), name="done", anchor="b", gold_rate=0.1)
    for token in (None, OWNER):
        page(world, "/studies", token)
        for study in (draft, empty, going, done):
            page(world, f"/studies/{study}", token)
    page(world, "/rate")
    page(world, "/studies/99")
    assert "No vote yet" in page(world, f"/studies/{empty}", OWNER)
    assert "6 outputs" not in page(world, f"/studies/{draft}")
    assert "8 outputs of 2 systems" in page(world, f"/studies/{draft}", OWNER)


def test_the_verdict_says_who_leads_or_that_nobody_does(world: World) -> None:
    clear = page(world, f"/studies/{judged(world, texts(('best', 'poor'), items=12), name='clear')}")
    assert re.search(r"<b>best</b>\s+leads\.", clear)
    few = page(world, f"/studies/{judged(world, texts(('x', 'y'), items=1), name='few', raters=1, repeat_rate=0)}")
    assert "leads" not in few.split("<main")[1]


def test_one_rater_is_not_an_agreement(world: World) -> None:
    study = judged(world, texts(items=6), raters=1, raters_per_pair=1, repeat_rate=0)
    text = page(world, f"/studies/{study}")
    assert "One rater: intervals are over items and speak for that rater; agreement is not defined." in text
    agreement = text.split("Do raters agree?")[1].split("</div>")[0]
    assert "not enough data" in agreement
    assert "%" not in agreement
    (group,) = world.ask("GET", f"studies/{study}/stats").json()["groups"]
    assert (group["agreement"]["raw"], group["agreement"]["alpha"]) == (None, None)


def test_no_votes_are_no_numbers(world: World) -> None:
    study = world.study(texts())
    world.own("POST", f"studies/{study}/close")
    text = page(world, f"/studies/{study}")
    assert "No vote yet" in text
    assert world.ask("GET", f"studies/{study}/stats").json() == {"study": "", "votes": 0, "groups": [], "between": []}
    skipped = world.study(texts(items=2), name="skipped")
    (token,) = world.invite(skipped)
    world.judge(token, lambda given: "skip")
    world.own("POST", f"studies/{skipped}/close")
    assert "Not enough data: no vote on a real pair counts." in page(world, f"/studies/{skipped}")


def test_components_that_nothing_links_have_no_order_between_them(world: World) -> None:
    apart = texts(("a", "b"), items=4) + [row | {"item": f"x-{row['item']}"} for row in texts(("c", "d"), items=4)]
    text = page(world, f"/studies/{judged(world, apart)}")
    assert "No comparison links the components 1: a, b; 2: c, d; there is no order between them." in text
    assert "component 2" in text
    assert "leads" not in text.split("<main")[1]


def test_a_system_without_a_loss_has_an_interval_that_ends(world: World) -> None:
    study = judged(world, texts(("best", "poor"), items=3))
    (group,) = world.ask("GET", f"studies/{study}/stats").json()["groups"]
    best = group["ranking"]["ratings"][0]
    assert (best["losses"], best["system"]) == (0, "best")
    assert 0 < best["theta"]["value"] < 10
    assert best["theta"]["high"] < 30
    page(world, f"/studies/{study}")
