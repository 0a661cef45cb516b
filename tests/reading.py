"""Pages as a reader of HTML meets them: every element closed, landmarks, labels, nothing inline or from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"meta", "link", "input", "br", "img", "hr", "path", "line", "circle", "rect"}


class Reader(HTMLParser):
    """A small reader that keeps what the tests ask about and insists on closed elements."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.found: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), tuple(name for name, _ in self.open)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), tuple(name for name, _ in self.open)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def all(self, *tags):
        return [attrs for tag, attrs, _ in self.found if tag in tags]


def check(page: Reader) -> None:
    """What holds for every page."""
    _check_landmarks(page)
    _check_inline(page)
    _check_labels(page)


def _check_landmarks(page: Reader) -> None:
    assert page.all("html")[0]["lang"] == "en"
    for landmark in ("header", "main", "footer", "title"):
        assert len(page.all(landmark)) == 1, landmark
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _, _ in page.found if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert any(attrs.get("class") == "skip" and attrs["href"] == "#main" for attrs in page.all("a"))


def _check_inline(page: Reader) -> None:
    for tag, attrs, _ in page.found:
        assert "style" not in attrs, (tag, attrs)
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        assert tag != "style"
        if tag == "script":
            assert attrs["src"].startswith("/static/")
        for name in ("src", "href", "poster", "action"):
            assert not (attrs.get(name) or "/").startswith(("http:", "//", "javascript:", "data:")), (tag, attrs)


def _check_labels(page: Reader) -> None:
    labelled_by = {attrs.get("id") for _, attrs, _ in page.found}
    for tag, attrs, above in page.found:
        if tag == "input" and attrs.get("type") != "hidden":
            assert attrs.get("aria-label") or "label" in above, attrs
        if tag in ("video", "progress", "meter"):
            assert attrs.get("aria-label"), (tag, attrs)
        if tag == "img":
            assert attrs.get("alt")
        if tag == "svg" and "svg" not in above:
            assert attrs.get("aria-hidden") == "true" or (attrs.get("role") == "img" and attrs.get("aria-label")), attrs
        if tag in ("nav",) or (tag == "section" and "main" in above):
            assert attrs.get("aria-label") or attrs.get("aria-labelledby") in labelled_by, (tag, attrs)
        if tag == "th":
            assert attrs.get("scope") in ("col", "row")
        if tag == "table":
            assert "div" in above
    for attrs in page.all("time"):
        assert attrs["title"].endswith(" UTC")
