"""A robot's page in a browser while the robot moves: what it sees, and the operator's stop."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import pytest
from arena_server import Walker, running, until
from PIL import Image
from playwright.sync_api import Browser, expect

from browsing import chromium
from offbook.arena.live import FRAME_BYTES
from offbook.arena.worker import run_worker

pytestmark = [pytest.mark.service, pytest.mark.page]


@pytest.fixture(scope="module")
def arena(tmp_path_factory) -> Iterator[object]:
    with running(tmp_path_factory.mktemp("arena"), watchdog_seconds=14.0) as arena:
        yield arena


@pytest.fixture
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_an_operator_watches_and_stops_a_robot_and_lets_it_go_on(arena, browser: Browser) -> None:
    arena.submit("root", kind="anchor", anchor="random", name="random", trials=2)
    robot, stop = Walker(steps=2000, seconds=0.02), threading.Event()
    options = {"robot": robot, "name": "arm-1", "stop": stop}
    worker = threading.Thread(target=run_worker, args=(arena.url, arena.tokens["lab"], "arm"), kwargs=options)
    worker.start()
    try:
        until(lambda: robot.steps > 3, 60)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{arena.url}/robots/arm-1")
        expect(page.locator("[data-frame]")).to_be_visible(timeout=60_000)
        assert page.evaluate("document.querySelector('[data-frame] img').naturalWidth") == 48
        token = page.get_by_label("Token with the scope admin")
        assert token.get_attribute("name") is None  # so that no form of a browser ever carries it
        token.fill(arena.tokens["ada"])
        stop_button = page.locator("button[value=stop]")
        stop_button.click()
        expect(stop_button).to_have_text("Really? Stop")
        assert not robot.stops
        stop_button.click()
        expect(page.locator("output")).to_contain_text("Refused")
        token.fill(arena.tokens["root"])
        stop_button.click()
        stop_button.click()
        expect(page.locator("output")).to_have_text("Stopped.")
        until(lambda: robot.stops, 30)
        moved = robot.steps
        expect(page.locator("#state")).to_contain_text("stopped by its operator")
        expect(page.locator("[data-no-frame]")).to_be_visible(timeout=60_000)
        assert robot.steps <= moved + 1  # the one that was under way
        go_on = page.locator("button[value=resume]")
        go_on.click()
        go_on.click()
        expect(page.locator("output")).to_have_text("It may go on.")
        until(lambda: robot.steps not in (moved, moved + 1), 60)
        assert arena.tokens["root"] not in page.content()
    finally:
        stop.set()
        worker.join(30)
    log = " ".join(line["text"] for line in arena.status("1")["log"])
    assert "robot fault, will be run again: " in log
    assert "a stop by its operator" in log


def test_pictures_are_taken_only_while_somebody_looks_and_only_from_who_plays(arena) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    arena.submit("root", kind="anchor", anchor="random", name="random", trials=1)
    body = {"robot": "arm", "worker": "arm-2", "instance": "a", "capabilities": {}}
    with arena.client("lab") as lab, arena.client("ada") as ada:
        given = until(lambda: lab.request("POST", "/v1/leases", json=body))
        beat = f"/v1/trials/{given['trial']}/heartbeat"
        assert lab.request("POST", beat, json={"fence": given["fence"]})["watched"] is False
        assert lab.ask("GET", "/v1/robots/arm-2/frame")[0] == 204
        assert lab.request("POST", beat, json={"fence": given["fence"]})["watched"] is True
        path = f"/v1/trials/{given['trial']}/frame?fence={given['fence']}"
        assert ada.ask("POST", path, content=picture.getvalue())[0] == 403
        for content, where, status in (
            (b"GIF89a", path, 422),
            (b"\xff\xd8\xff" + b"\0" * FRAME_BYTES, path, 422),
            (picture.getvalue(), f"/v1/trials/{given['trial']}/frame?fence=99", 404),
            (picture.getvalue(), path, 204),
        ):
            assert lab.ask("POST", where, content=content)[0] == status
        assert ada._http.get("/v1/robots/arm-2/frame").content == picture.getvalue()
        assert ada._http.get("/v1/robots/arm-2/frame").headers["content-type"] == "image/jpeg"
