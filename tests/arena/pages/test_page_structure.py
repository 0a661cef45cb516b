"""Every page from plain, empty, faulty and hostile views: structure, links, escaping, contrast, size."""

import gzip
import html
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from jinja2 import UndefinedError
from page_views import HOSTILE, VIEWS, big_leaderboard, hostile, leaderboard, run, submission

from offbook.arena import pages
from offbook.service import pages as shared
from reading import Reader, check

ROUTES = [
    r"/",
    r"/benchmarks/[^/]+(/compare)?",
    r"/(submissions|runs|robots)/[^/]+",
    r"/queue",
    r"/submit",
    r"/studies",
    r"/static/[\w.]+",
    r"/v1/(benchmarks|leaderboard/[^/]+|submissions/[^/]+|blobs/\w+)",
    r"",
]


@pytest.fixture(params=list(VIEWS))
def page(request):
    name, view = VIEWS[request.param]
    return Reader(pages.render(name, view()))


def test_structure_labels_and_nothing_inline(page):
    check(page)


def test_links_lead_to_known_routes_and_fragments_exist(page):
    ids = [attrs["id"] for _, attrs, _ in page.found if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for attrs in page.all("a", "link", "script", "form"):
        address = attrs.get("href") or attrs.get("src") or attrs.get("action")
        if address is None:
            continue
        parts = urlsplit(address)
        assert any(re.fullmatch(route, parts.path) for route in ROUTES), address
        if not parts.path and parts.fragment and not parts.fragment.startswith("t="):
            assert parts.fragment in ids, address


@pytest.mark.parametrize("key", list(VIEWS))
def test_hostile_names_stay_text(key):
    name, view = VIEWS[key]
    text = pages.render(name, hostile(view()), query={"q": "", "show": HOSTILE, "split": HOSTILE, "page": HOSTILE})
    reader = Reader(text)
    assert "<script>alert" not in text
    assert not any("onerror" in attrs for _, attrs, _ in reader.found)
    assert not any(attrs.get("src") == "x" for attrs in reader.all("img"))
    searched = pages.render(name, view(), query={"q": HOSTILE})
    assert "<script>alert" not in searched
    Reader(searched)


def test_a_hostile_name_is_shown_as_it_was_written():
    view = leaderboard()
    view["rows"][1]["name"] = HOSTILE
    text = pages.render("leaderboard", view)
    assert html.escape("<script>alert(", quote=False) in text
    record = next(attrs["data-record"] for attrs in Reader(text).all("tr") if "alert" in attrs.get("data-record", ""))
    assert HOSTILE in json.loads(record)


def test_addresses_in_views_cannot_run_scripts():
    view = run([{"camera": "front", "url": "javascript:alert(1)", "poster": "//evil.example/x.jpg"}])
    view["downloads"][0]["url"] = "javascript:alert(1)"
    assert "javascript:" not in pages.render("run", view)
    assert "evil.example" not in pages.render("run", view)


def test_names_are_quoted_in_paths():
    view = leaderboard()
    view["benchmark"] = view["benchmark"] | {"name": "gym:Hopper/v5?x"}
    assert "/benchmarks/gym%3AHopper%2Fv5%3Fx?split=position" in pages.render("leaderboard", view)


def test_a_view_without_a_needed_key_is_a_mistake_not_a_blank():
    with pytest.raises(UndefinedError, match="benchmark"):
        pages.render("leaderboard", {"rows": []})


def test_the_verdict_says_who_leads_or_that_nobody_does():
    view = leaderboard()
    assert "Not yet separable: <b>bc-chunk50</b> and <b>vinn-byol</b>" in pages.render("leaderboard", view)
    view["rows"][2]["rank"] = [2, 3]
    assert "<b>bc-chunk50</b> leads" in pages.render("leaderboard", view)


def test_filters_in_the_query_string_work_on_the_server():
    text = pages.render("leaderboard", leaderboard(), query={"q": "grace", "split": "seen"})
    assert "vinn-byol</a>" in text
    assert "dt-small</a>" not in text
    assert '<input type="hidden" name="split" value="seen">' in text
    nothing = pages.render("leaderboard", leaderboard(), query={"q": "nobody"})
    assert "Nothing matches" in nothing
    faults = pages.render("submission", submission(), query={"show": "faults"})
    assert faults.count("<tr data-row") == faults.count('class="badge b-policy_fault"') // 2 + 1


def test_long_boards_come_in_sheets():
    text = pages.render("leaderboard", big_leaderboard(120), query={"page": "2", "split": "seen"})
    assert text.count("<tr data-row") == 50
    assert "Sheet 2 of 3" in text
    assert "/benchmarks/pour?page=3&amp;split=seen" in text
    for odd in ("0", "99", "-1", "x", "²"):
        assert "Sheet" in pages.render("leaderboard", big_leaderboard(60), query={"page": odd})


def test_faults_come_first_and_open_the_run():
    text = pages.render("submission", submission())
    assert text.index("action 17 at step 83 was NaN") < text.index('id="trials"')
    assert 'href="/runs/705"' in text


def test_only_a_run_that_was_recorded_was_never_late():
    calm = "nothing was late, refused or at a limit"
    played = run() | {"events": []}
    assert calm in pages.render("run", played)
    for state, words in [("queued", "None yet."), ("running", "None yet."), ("needs_human", "None were recorded.")]:
        text = pages.render("run", played | {"state": state, "outcome": None, "traces": {}, "videos": []})
        assert words in text
        assert calm not in text


def test_the_compare_page_says_which_is_better_or_neither():
    name, view = VIEWS["compare"]
    assert "<b>A is better than B</b> by 0.16" in pages.render(name, view())
    even = view() | {"difference": {"value": 0.01, "low": -0.1, "high": 0.12}}
    assert "Not yet separable" in pages.render(name, even)
    worse = view() | {"difference": {"value": -0.2, "low": -0.3, "high": -0.1}}
    assert "B is better than A" in pages.render(name, worse)


def test_a_board_of_fifty_entries_is_light():
    text = pages.render("leaderboard", big_leaderboard(50)).encode()
    assert text.count(b"<tr data-row") == 50
    assert len(text) <= 100_000
    assert len(gzip.compress(text)) <= 20_000


def _linear(channel: int) -> float:
    share = channel / 255
    return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4


def _luminance(colour: str) -> float:
    red, green, blue = (_linear(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_of_both_themes(theme):
    css = (Path(shared.__file__).parent / "static" / "style.css").read_text()
    tokens = {name: pair[theme] for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)}
    for ground in ("paper", "surface", "band"):
        for text in ("ink", "muted", "accent", "warn"):
            assert _contrast(tokens[text], tokens[ground]) >= 4.5, (text, ground)
        for shape in ("edge", "fault", "other", "accent"):
            assert _contrast(tokens[shape], tokens[ground]) >= 3.0, (shape, ground)
    assert _contrast(tokens["on-accent"], tokens["accent"]) >= 4.5
    used = set(re.findall(r"var\(--([\w-]+)\)", css))
    assert used <= set(tokens) | {"text-s", "text-m", "text-l", "text-xl"}
    assert len(css.splitlines()) <= 400
