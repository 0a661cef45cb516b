"""The pages in headless Chromium: both widths and themes, without scripts, by keyboard, film beside trace, live."""

import re
from collections.abc import Iterator

import pytest
from page_server import FRAMES, Stage, served
from page_views import VIEWS, hostile, queue
from playwright.sync_api import Browser, Page, expect

from browsing import chromium, overflow, until

pytestmark = pytest.mark.page


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with served(tmp_path_factory.mktemp("stage")) as stage:
        yield stage


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser: Browser, stage: Stage) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light", locale="en-GB")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    complaints: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.complaints = complaints  # type: ignore[attr-defined]
    page.set_default_timeout(8000)
    yield page
    context.close()


@pytest.mark.parametrize("width", [390, 1440])
def test_every_page_fits_in_both_themes_and_raises_no_complaint(opened: Page, stage: Stage, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 844})
    for key in VIEWS:
        opened.goto(stage.url + key)
        assert opened.locator("h1").is_visible()
        for scheme, ground in (("light", "rgb(251, 251, 249)"), ("dark", "rgb(21, 24, 27)")):
            opened.emulate_media(color_scheme=scheme)
            assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == ground
            assert overflow(opened) <= 0, key
    assert opened.complaints == []  # type: ignore[attr-defined]


def test_hostile_views_fit_and_run_nothing(opened: Page, stage: Stage) -> None:
    opened.set_viewport_size({"width": 390, "height": 844})
    opened.on("dialog", lambda dialog: pytest.fail("a script of a name ran"))
    for key, (_, view) in VIEWS.items():
        if key == "leaderboard-big":
            continue
        plain = stage.views[key]
        stage.views[key] = lambda view=view: hostile(view())
        try:
            opened.goto(stage.url + key)
        finally:
            stage.views[key] = plain
        assert overflow(opened) <= 0, key
        assert opened.locator("img[onerror]").count() == 0
    assert opened.complaints == []  # type: ignore[attr-defined]


def test_pages_read_without_scripts(browser: Browser, stage: Stage) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto(stage.url + "leaderboard?q=grace")
    expect(page.locator("tr[data-row]")).to_have_count(2)
    expect(page.locator(".scripted").first).to_be_hidden()
    expect(page.get_by_role("button", name="Search")).to_be_visible()
    page.goto(stage.url + "run")
    assert page.locator("video").first.get_attribute("controls") is not None
    expect(page.locator(".controls")).to_be_hidden()
    expect(page.locator(".trace").first).to_be_visible()
    context.close()


def test_the_keyboard_walks_the_board(opened: Page, stage: Stage) -> None:
    opened.goto(stage.url + "leaderboard")
    opened.keyboard.press("j")
    opened.keyboard.press("j")
    expect(opened.get_by_role("link", name="bc-chunk50", exact=True)).to_be_focused()
    opened.keyboard.press("k")
    expect(opened.get_by_role("link", name="scripted expert", exact=True)).to_be_focused()
    opened.keyboard.press("/")
    expect(opened.locator("[data-search]")).to_be_focused()
    opened.keyboard.type("jk grace")
    expect(opened.locator(".empty")).to_contain_text("Nothing matches")
    opened.locator("[data-search]").fill("grace")
    expect(opened.locator("tr[data-row]")).to_have_count(2)
    assert opened.url.endswith("?q=grace")
    opened.keyboard.press("Escape")
    opened.keyboard.press("j")
    with opened.expect_navigation():
        opened.keyboard.press("Enter")
    assert opened.url.endswith("/submissions/9")


def test_two_rows_are_compared_by_address(opened: Page, stage: Stage) -> None:
    opened.goto(stage.url + "leaderboard")
    opened.get_by_label("compare bc-chunk50 as A").check()
    opened.get_by_label("compare dt-small as B").check()
    with opened.expect_navigation():
        opened.get_by_role("button", name="Compare A with B").click()
    assert re.search(r"/benchmarks/pour/compare\?split=seen&a=7&b=4$", opened.url)


def test_copying_gives_csv_and_json_of_what_is_shown(opened: Page, stage: Stage) -> None:
    opened.goto(stage.url + "leaderboard?q=grace")
    opened.get_by_role("button", name="Copy as JSON").click()
    expect(opened.get_by_role("button", name="Copied")).to_be_visible()
    rows = opened.evaluate("navigator.clipboard.readText().then(JSON.parse)")
    assert [(row["name"], row["score"]) for row in rows] == [("vinn-byol", 0.71), ("iql-joints", 0.58)]
    opened.get_by_role("button", name="Copy as CSV").click()
    until(opened, "navigator.clipboard.readText().then(text => text.includes(',vinn-byol,'))")
    lines = opened.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines[0].split(",") == list(rows[0])
    assert len(lines) == 3


def test_the_theme_switch_is_remembered(opened: Page, stage: Stage) -> None:
    opened.goto(stage.url + "queue")
    opened.locator("[data-theme-switch]").click()
    opened.goto(stage.url + "index")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 27)"


def test_times_are_the_readers_with_utc_as_title(browser: Browser, stage: Stage) -> None:
    context = browser.new_context(timezone_id="Asia/Tokyo", locale="en-GB")
    page = context.new_page()
    page.goto(stage.url + "submission")
    time = page.locator("dl time")
    assert time.get_attribute("title") == "2026-11-18 11:06:40 UTC"
    expect(time).to_contain_text("20:06")
    context.close()


def grey(page: Page, film: int) -> float:
    return float(
        page.evaluate(
            """async (i) => {
                const film = document.querySelectorAll("video")[i];
                const canvas = new OffscreenCanvas(64, 64).getContext("2d");
                canvas.drawImage(film, 0, 0, 64, 64);
                return canvas.getImageData(32, 32, 1, 1).data[0];
            }""",
            film,
        )
    )


def settled(page: Page) -> None:
    until(page, "[...document.querySelectorAll('video')].every(film => film.readyState > 1 && !film.seeking)")


def cursor_step(page: Page) -> float:
    share = page.locator(".trace .cursor").first.get_attribute("x1") or ""
    return float(share.rstrip("%")) / 100 * (FRAMES - 1)


def test_film_and_trace_share_one_cursor(opened: Page, stage: Stage) -> None:
    opened.goto(stage.url + "run")
    expect(opened.locator(".readout")).to_contain_text("step 83 of 99")  # it opens where the fault was
    settled(opened)
    assert cursor_step(opened) == pytest.approx(83, abs=0.1)
    assert grey(opened, 0) == pytest.approx(20 + 2 * 83, abs=1.5)
    opened.keyboard.press("ArrowLeft")
    expect(opened.locator(".readout")).to_contain_text("step 82 of 99")
    settled(opened)
    assert grey(opened, 0) == pytest.approx(20 + 2 * 82, abs=1.5)
    assert opened.url.endswith("#t=2.733")
    opened.locator(".log a").nth(1).click()
    expect(opened.locator(".readout")).to_contain_text("step 61 of 99")
    expect(opened.locator(".readout")).to_contain_text("late")
    box = opened.locator(".trace").first.bounding_box()
    assert box
    opened.mouse.click(box["x"] + box["width"] / 2, box["y"] + 10)
    settled(opened)
    assert cursor_step(opened) == pytest.approx(49, abs=1)
    assert [grey(opened, i) for i in (0, 1)] == pytest.approx([20 + 2 * 49] * 2, abs=3)
    opened.keyboard.press("4")
    opened.keyboard.press("Space")
    expect(opened.locator(".readout")).to_contain_text("step 99 of 99")
    assert opened.locator("video").first.evaluate("film => film.playbackRate") == 4
    expect(opened.locator('[data-do="play"]')).to_have_text("Play")
    assert cursor_step(opened) == pytest.approx(99, abs=0.1)
    opened.goto(stage.url + "run#t=1.0")
    opened.reload()
    expect(opened.locator(".readout")).to_contain_text("step 30 of 99")


def test_two_films_run_locked_together_though_one_is_shorter(opened: Page, stage: Stage) -> None:
    opened.goto(stage.url + "compare")
    settled(opened)
    opened.locator('[data-do="on"]').click()
    settled(opened)
    assert [grey(opened, i) for i in (0, 1)] == pytest.approx([22, 22], abs=1.5)
    opened.locator("h1").click()
    opened.keyboard.press("Space")
    until(opened, "document.querySelector('video').currentTime > 0.5")
    first, second = opened.evaluate("[...document.querySelectorAll('video')].map(film => film.currentTime)")
    assert abs(first - second) < 0.15
    opened.keyboard.press("Space")
    settled(opened)
    opened.locator(".scrub input").fill("80")
    settled(opened)
    assert grey(opened, 0) == pytest.approx(180, abs=1.5)
    assert grey(opened, 1) == pytest.approx(20 + 2 * 49, abs=3)


def test_a_live_page_follows_and_says_when_it_cannot(opened: Page, stage: Stage) -> None:
    stage.views["queue"] = queue
    opened.goto(stage.url + "queue")
    expect(opened.locator("#live-status")).to_have_text("Live")
    opened.get_by_role("link", name="dt", exact=True).focus()
    later = queue()
    later["robots"][1]["words"] = "runs trial 1 of 40 of vinn"
    later["waiting"] = later["waiting"][1:]
    stage.views["queue"] = lambda: later
    stage.tell()
    expect(opened.get_by_text("runs trial 1 of 40 of vinn")).to_be_visible()
    expect(opened.locator("#waiting-rows tr[data-row]")).to_have_count(3)
    expect(opened.get_by_role("link", name="dt", exact=True)).to_be_focused()
    stage.live = False
    expect(opened.locator("#live-status")).to_contain_text("connection was lost")
    stage.live = True
    stage.views["queue"] = queue
