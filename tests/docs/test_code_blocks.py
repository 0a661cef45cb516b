"""Every code block of the README and the docs runs, page by page and in order; every docstring example too."""

import doctest
import importlib
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import pytest

import offbook

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(offbook.__path__, "offbook.") if ".migrations" not in info.name
)


@pytest.fixture
def forgotten(tmp_path, monkeypatch):
    """Forgets the modules that a page wrote and imported, and where: other tests write some of the same name."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.usefixtures("forgotten")
def test_page_runs(page, tmp_path, monkeypatch, cli):
    """Python blocks share one namespace; of a console block, the lines `$ offbook ...` run in the same folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for language, source in BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(source, str(page), "exec"), namespace)
            continue
        for line in source.replace("\\\n", " ").splitlines():
            if line.startswith("$ offbook "):
                code, _, stderr = cli(shlex.split(line, comments=True)[2:])
                assert code == 0, f"{line}\n{stderr}"


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(
        importlib.import_module(module), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_readme_names_only_verbs_that_exist():
    from offbook.cli.main import VERBS

    quoted = re.findall(r"`offbook ([a-z]+)(?: ([a-z-]+))?", (ROOT / "README.md").read_text())
    assert quoted
    for verb, second in quoted:
        assert verb in VERBS or f"{verb} {second}" in VERBS, f"{verb} {second}"
