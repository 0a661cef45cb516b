"""Raters and owners in headless Chromium: keys, films, pictures, a lost connection, both widths and themes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from rating_world import OWNER, World, by_number, open_world, texts

from browsing import chromium, overflow, until
from offbook.data.clips import write_clip
from offbook.rating.app import Database
from offbook.service.serving import Server

pytestmark = pytest.mark.page


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A service on a free loopback port, which the tests also ask directly."""
    folder = tmp_path_factory.mktemp("rating")
    database = Database(f"sqlite:///{folder}/r.db")
    database.migrate()
    with open_world(database, folder) as world:
        opened = threading.Event()
        server = Server(lambda url: world.app, lambda url: opened.set())
        thread = threading.Thread(target=server.serve_here, daemon=True)
        thread.start()
        assert opened.wait(30)
        world.address = server.url
        yield world
        server.should_exit = True
        thread.join(20)
    database.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light", locale="en-GB")
    page = context.new_page()
    page.set_default_timeout(15_000)
    page.complaints = []
    page.on("console", lambda line: page.complaints.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: dialog.accept())
    yield page
    context.close()


names = iter(f"study {i}" for i in range(100))


def invited(world: World, records, files=(), **design) -> tuple[int, str]:
    """An open study and the address of one invitation."""
    study = world.study(records, files, name=next(names), repeat_rate=0, **design)
    (token,) = world.invite(study, kind="human")
    return study, f"{world.address}/rate#{token}"


def test_a_person_judges_texts_by_keyboard(world: World, page: Page) -> None:
    study, link = invited(world, texts(items=4), min_dwell_s=0.6, question="Which answer is clearer?")
    page.goto(link)
    expect(page.get_by_role("heading", name="Which answer is clearer?")).to_be_visible()
    assert "#" not in page.url
    page.get_by_role("button", name="I agree, begin").click()
    expect(page.locator("#count")).to_have_text("Pair 1 of at most 100")
    expect(page.locator("#prompt")).to_contain_text("What is")
    page.keyboard.press("ArrowLeft")  # too early
    expect(page.locator("#status")).to_contain_text("Look for 1 more second")
    seen = []
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "b"):
        expect(page.locator("#status")).to_have_text("Which one is it?")
        number = page.locator("#count").inner_text()
        seen.append([page.locator(f"#{side}-content").inner_text() for side in ("left", "right")])
        if key == "ArrowRight":
            page.keyboard.press("2")
            page.get_by_role("button", name="style").click()
            page.get_by_text("Add a note").click()
            page.get_by_label("Note").fill("b s 1 ←")
            page.keyboard.press("ArrowDown")  # inside the note it is only a key
            page.locator("#title").focus()
        page.keyboard.press(key)
        until(page, f"document.getElementById('count').textContent !== '{number}'")
    expect(page.get_by_role("heading", name="Thank you")).to_be_visible()
    votes = world.votes(study)
    assert [vote["choice"] for vote in votes] == ["left", "right", "tie", "both_bad"]
    for vote, (left, right) in zip(votes, seen, strict=True):
        shown = tuple("alpha" if text.startswith("2") else "beta" for text in (left, right))
        assert (vote["left"], vote["right"]) == shown
        assert 600 <= vote["dwell_ms"] < 20_000
        assert vote["excluded"] == []
    assert (sorted(votes[1]["reasons"]), votes[1]["note"]) == (["clear", "style"], "b s 1 ←")
    assert page.complaints == []


def films(folder: Path) -> tuple[list[dict], list[Path]]:
    records, files = [], []
    for system, count in (("quick", 12), ("slow", 24)):
        shades = np.linspace(30, 220, count, dtype=np.uint8)
        files.append(folder / f"{system}.mp4")
        write_clip(files[-1], np.broadcast_to(shades[:, None, None, None], (count, 48, 64, 3)).copy(), 12)
        records.append({"item": "scene", "system": system, "prompt": "Pour.", "file": files[-1].name})
    return records, files


def test_films_run_together_and_must_be_watched(world: World, page: Page, tmp_path: Path) -> None:
    records, files = films(tmp_path)
    study, link = invited(world, records, files, modality="rollout", min_watch=0.9, min_dwell_s=0)
    page.emulate_media(reduced_motion="reduce")  # they wait until they are asked to play
    page.goto(link)
    page.get_by_role("button", name="I agree, begin").click()
    expect(page.locator("#status")).to_contain_text("Watch both videos: 0 % so far")
    for source in page.locator("video").evaluate_all("films => films.map(film => film.src)"):
        assert not any(word in source for word in ("quick", "slow", "scene", ".mp4"))
    page.keyboard.press("ArrowLeft")
    page.locator("#scrub").fill("900")  # jumping is not watching
    page.locator("#title").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#status")).to_contain_text("Watch both videos")
    page.locator("#scrub").fill("0")
    page.locator('[data-speed="2"]').click()
    page.locator("#title").focus()
    page.keyboard.press("Space")
    until(page, "Math.max(...[...document.querySelectorAll('video')].map(film => film.currentTime)) > 0.5")
    first, second = page.locator("video").evaluate_all("films => films.map(film => film.currentTime)")
    assert abs(first - second) < 0.3
    expect(page.locator("#play")).to_have_text("Play both", timeout=10_000)  # both ended
    expect(page.locator("#status")).to_have_text("Which one is it?")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", name="Thank you")).to_be_visible()
    (vote,) = world.votes(study)
    assert vote["watched"] >= 0.9
    assert vote["left_features"].keys() == {"seconds", "motion"}
    assert page.complaints == []


@pytest.mark.parametrize("skip", [True, False])
def test_a_side_that_does_not_load_takes_no_answer(world: World, page: Page, tmp_path: Path, skip: bool) -> None:
    records, files = films(tmp_path)
    study, link = invited(world, records, files, modality="video", min_dwell_s=0, allow_skip=skip)
    failing: list[str] = []

    def fail_first(route) -> None:
        failing[:] = failing or [route.request.url]
        route.abort() if route.request.url in failing else route.continue_()

    page.route("**/media/*", fail_first)
    page.goto(link)
    page.get_by_role("button", name="I agree, begin").click()
    words = "One side is missing: load it again, or skip this pair." if skip else "One side is missing: load it again."
    expect(page.locator("#status")).to_have_text(words)
    until(page, "document.querySelector('video')?.readyState >= 2")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("b")
    expect(page.locator("#status")).to_have_text(words)
    assert world.votes(study) == []
    if not skip:
        page.unroute("**/media/*")
        page.get_by_role("button", name="Load again").click()
        expect(page.locator("#status")).to_have_text("Which one is it?")
    page.keyboard.press("s" if skip else "ArrowRight")
    expect(page.get_by_role("heading", name="Thank you")).to_be_visible()
    (vote,) = world.votes(study)
    assert vote["choice"] == ("skip" if skip else "right")
    assert vote["watched"] == 0 or not skip


def test_pictures_stand_at_one_scale(world: World, page: Page, tmp_path: Path) -> None:
    records, files = [], []
    for system, size in (("small", (100, 60)), ("large", (300, 240))):
        files.append(tmp_path / f"{system}.png")
        Image.new("RGB", size, (20, 90, 160)).save(files[-1])
        records.append({"item": "i", "system": system, "file": files[-1].name})
    _, link = invited(world, records, files, modality="image")
    page.goto(link)
    page.get_by_role("button", name="I agree, begin").click()
    for width in (1440, 390):
        page.set_viewport_size({"width": width, "height": 844})
        # The page scales them once it has seen its new width.
        scaled = "[...document.querySelectorAll('.content img')].filter(image => image.style.width)"
        until(page, f"{scaled}.length === 2 && document.documentElement.scrollWidth <= innerWidth")
        ratio = f"{scaled}.map(image => image.clientWidth / image.naturalWidth).reduce((a, b) => a / b)"
        until(page, f"Math.abs({ratio} - 1) < 0.02")
        assert page.locator(".content img").first.get_attribute("alt") in ("Left picture", "Right picture")


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> **open _x [y](javascript:alert(1)) \u202eevil\u2066 "


def test_hostile_text_runs_nothing_and_stays_in_its_pane(world: World, page: Page) -> None:
    page.on("dialog", lambda dialog: pytest.fail("a script of an output ran"))
    records = [
        {"item": "i", "system": system, "prompt": HOSTILE, "text": HOSTILE + "word " * count}
        for system, count in (("a", 180_000), ("b", 1))
    ]
    _, link = invited(world, records, question=HOSTILE)
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(link)
    page.get_by_role("button", name="I agree, begin").click()
    expect(page.locator(".text").first).to_contain_text("<script>alert(1)</script>")
    assert page.locator("main img, main script").count() == 0
    assert overflow(page) <= 0
    assert page.locator(".text").first.evaluate("part => getComputedStyle(part).unicodeBidi") == "isolate"
    more = page.get_by_role("button", name="Show all 900,")
    assert page.locator("#panes").inner_text().count("word") < 2000
    more.click()
    until(page, "document.getElementById('panes').innerText.length > 900000")
    assert page.complaints == []


def test_a_vote_is_sent_until_it_is_kept(world: World, page: Page) -> None:
    study, link = invited(world, texts(items=2))
    page.goto(link)
    page.get_by_role("button", name="I agree, begin").click()
    tries = []

    def stumble(route) -> None:
        """First no answer; then the vote arrives and its receipt does not; then all is well."""
        tries.append(route.request.post_data)
        if len(tries) == 1:
            route.abort()
        elif len(tries) == 2:
            assert route.fetch().status == 200
            route.abort()
        else:
            route.continue_()

    page.route("**/vote", stumble)
    expect(page.locator("#status")).to_have_text("Which one is it?")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#status")).to_contain_text("Not saved yet")
    page.keyboard.press("ArrowRight")  # the answer is given
    expect(page.locator("#count")).to_have_text("Pair 2 of at most 100")
    assert len(tries) == 3
    assert [vote["choice"] for vote in world.votes(study)] == ["left"]


def test_a_pair_that_went_to_somebody_else_is_replaced(world: World, page: Page) -> None:
    study, link = invited(world, texts(items=2), patience_s=1)
    page.goto(link)
    page.get_by_role("button", name="I agree, begin").click()
    page.wait_for_timeout(1200)
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#status")).to_contain_text("your answer to it was not saved")
    page.keyboard.press("ArrowLeft")
    until(page, "document.getElementById('count').textContent === 'Pair 2 of at most 100'")
    assert len(world.votes(study)) == 1


def test_who_comes_without_an_invitation_or_too_late_is_told(world: World, page: Page) -> None:
    page.goto(f"{world.address}/rate")
    expect(page.get_by_role("heading", name="This page needs an invitation")).to_be_visible()
    study, link = invited(world, texts())
    page.goto(link)
    expect(page.get_by_role("button", name="I agree, begin")).to_be_visible()
    page.evaluate("location.hash = 'main'")  # as the door past the navigation does
    page.reload()
    expect(page.get_by_role("button", name="I agree, begin")).to_be_visible()
    world.own("POST", f"studies/{study}/close")
    page.goto(link)
    expect(page.get_by_role("heading", name="This study is closed")).to_be_visible()


def test_an_owner_invites_closes_and_publishes(world: World, page: Page) -> None:
    study = world.draft(texts(("best", "poor")), name=next(names), repeat_rate=0)
    page.goto(f"{world.address}/studies")
    expect(page.get_by_text(f"study {study}")).to_have_count(0)
    page.get_by_text("For owners").click()
    page.get_by_label("Token").fill("ro_wrong")
    page.get_by_role("button", name="Show what owners see").click()
    expect(page.get_by_role("alert")).to_contain_text("This token opens nothing here")
    page.get_by_label("Token").fill(OWNER)
    page.get_by_role("button", name="Show what owners see").click()
    page.locator(f'a[href="/studies/{study}"]').click()
    page.get_by_role("button", name="Open the study").click()
    expect(page.get_by_text("Nobody was invited yet")).to_be_visible()
    page.get_by_label("Invite").fill("2")
    page.get_by_label("kind").select_option("script")
    page.get_by_role("button", name="Make invitations").click()
    links = page.locator("[data-invitations] code")
    expect(links).to_contain_text(f"{world.address}/rate#rt_")
    for link in links.inner_text().split():
        world.judge(link.split("#")[1], by_number)
    page.reload()
    expect(page.get_by_text("8 of 12 answers to 4 pairs")).to_be_visible()
    page.get_by_role("button", name="Show what everybody sees").click()
    expect(page.get_by_text("Open: people are judging")).to_be_visible()
    expect(page.get_by_text("best")).to_have_count(0)
    page.get_by_text("For owners").click()
    page.get_by_label("Token").fill(OWNER)
    page.get_by_role("button", name="Show what owners see").click()
    page.get_by_role("button", name="Close and publish").click()
    expect(page.get_by_role("heading", name="Closed")).to_be_visible()
    page.get_by_role("button", name="Show what everybody sees").click()
    expect(page.locator(".ranking tbody tr").first).to_contain_text("best")


@pytest.fixture(scope="module")
def closed(world: World) -> int:
    study = world.study(texts(("teacher", "one", "two"), items=6, gold=4), name=next(names), anchor="teacher",
                        gold_rate=0.1, repeat_rate=0.1)  # fmt: skip
    for kind in ("human", "human", "human", "llm"):
        (token,) = world.invite(study, kind=kind)
        world.ask("POST", "consent", token)
        world.judge(token, by_number)
    world.own("POST", f"studies/{study}/close")
    return study


@pytest.mark.parametrize("width", [390, 1440])
def test_every_page_fits_in_both_themes_and_raises_no_complaint(
    world: World, page: Page, closed: int, width: int, tmp_path: Path
) -> None:
    records, files = films(tmp_path)
    links = [invited(world, texts())[1], invited(world, records, files, modality="video")[1]]
    page.set_viewport_size({"width": width, "height": 844})
    for address in (*links, f"{world.address}/studies", f"{world.address}/studies/{closed}"):
        page.goto("about:blank")
        page.goto(address)
        if "/rate" in address:
            page.get_by_role("button", name="I agree, begin").click()
            expect(page.locator("#status")).to_have_text("Which one is it?")
            answers = page.locator(".answers").bounding_box()
            assert answers["y"] + answers["height"] <= 845
            for name in ("Upper", "Lower") if width == 390 else ("Left", "Right"):
                expect(page.get_by_role("button", name=f"{name} is better")).to_be_visible()
        for scheme, ground in (("light", "rgb(251, 251, 249)"), ("dark", "rgb(21, 24, 27)")):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
            assert overflow(page) <= 0, address
    assert page.complaints == []


def test_a_closed_study_reads_without_scripts(world: World, browser: Browser, closed: int) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{world.address}/studies/{closed}")
    for title in ("People", "Language models", "People and machines"):
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    expect(page.locator(".ranking").first.locator("tbody tr")).to_have_count(3)
    expect(page.locator(".scripted").first).to_be_hidden()
    page.goto(f"{world.address}/rate")
    expect(page.get_by_text("Judging pairs needs scripts")).to_be_visible()
    context.close()
