"""Sphinx; the page of the commands is written from the commands' own help, so that it cannot go stale."""

import contextlib
import io
import os
from pathlib import Path

from offbook import __version__
from offbook.cli.main import VERBS, main

project = "offbook"
author = "The offbook authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "offbook"
html_static_path: list[str] = []
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
nitpicky = False


def write_commands() -> None:
    """docs/reference/commands.md: one heading for each verb, with its --help."""
    os.environ["COLUMNS"] = "100"
    pages = [
        "# Commands\n\nEvery verb answers `--help`, prints one JSON object with `--json`, and exits with 0 (fine), "
        "1 (failed) or 2 (wrong use).\nProgress goes to stderr, results to stdout.\n"
    ]
    for verb, (_, summary) in VERBS.items():
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([*verb.split(), "--help"])
        pages.append(
            f"## offbook {verb}\n\n{summary[0].upper()}{summary[1:]}.\n\n```text\n{text.getvalue().rstrip()}\n```\n"
        )
    (Path(__file__).parent / "reference" / "commands.md").write_text("\n".join(pages))


write_commands()
