"""The pages as the arena itself serves them, from views of its database."""

import re

import pytest
from arena_world import DONE, FAULT, LEFT, lease, play, submit

from offbook.arena import trials
from reading import Reader

pytestmark = pytest.mark.service


@pytest.fixture
def visited(client):
    """An arena where two policies are done, an anchor runs, one waits, and each kind of fault has happened."""
    database = client.app.state.arena.database
    with database.write() as session:
        submit(session, "ada")
        submit(session, "bob")
        submit(session, "root", kind="anchor", anchor="expert")
        submit(session, "bob", name="waits <b>", split="far")
    for report in [FAULT, LEFT, *[DONE] * 9, trials.Report(outcome="done", score=0.0, success=False, steps=3)]:
        with database.write() as session:
            given = lease(session, connected=(1, 2))
            assert given is not None
            play(session, given, report)
    return client


def test_every_page_of_a_used_arena_reads_well(visited):
    paths = ["/", "/benchmarks/reach", "/benchmarks/reach?split=far&q=bob", "/queue", "/submit", "/robots/arm-1"]
    paths += [f"/submissions/{i}" for i in (1, 2, 3, 4)] + [f"/runs/{i}" for i in range(1, 9)]
    paths += ["/benchmarks/reach/compare?split=seen&a=1&b=2", "/benchmarks/reach/compare?a=1&b=2&slot=1"]
    linked = set()
    for path in paths:
        answer = visited.ask("GET", path, headers={"Accept": "text/html"})
        assert answer.status_code == 200, (path, answer.text[:300])
        reader = Reader(answer.text)
        assert len(reader.all("h1")) == 1
        linked |= {attrs["href"].split("#")[0] for attrs in reader.all("a") if attrs["href"].startswith("/")}
    assert "waits <b>" not in visited.ask("GET", "/submissions/4").text
    for path in sorted(linked - {""}):
        answer = visited.ask("GET", path, headers={"Accept": "text/html"})
        assert answer.status_code == 200, path


def test_the_form_of_the_board_leads_to_the_comparison(visited):
    board = visited.ask("GET", "/benchmarks/reach").text
    action = re.search(r'<form id="pair" action="([^"]+)"', board)
    assert action
    answer = visited.ask("GET", f"{action.group(1)}?split=seen&a=1&b=2")
    assert answer.status_code == 200
    assert "paired trial" in answer.text


def test_an_unknown_page_is_an_error_page(visited):
    answer = visited.ask("GET", "/runs/999", headers={"Accept": "text/html"})
    assert answer.status_code == 404
    assert "There is nothing here" in answer.text
