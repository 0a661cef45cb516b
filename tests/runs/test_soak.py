"""The long tests as a benchmark: what failed, was left out or took too long is told, and does not pass."""

import importlib.util
from pathlib import Path

import pytest

from offbook.errors import OffbookError
from offbook.runs.benchmark import Options

TESTS = {
    "sound": "def test_a(): pass\ndef test_b(): pass\n",
    "broken": "def test_a(): pass\ndef test_b(): assert 1 == 2\n",
    "skipped": "import pytest\ndef test_a(): pytest.skip('not here')\n",
}


def soak(monkeypatch, folder: Path, kind: str):
    path = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("benchmark_soak", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = folder / f"test_{kind}.py"
    if kind in TESTS:
        file.write_text(TESTS[kind])
    # In a folder of its own: with other settings, and in one process.
    monkeypatch.setattr(module, "WORDS", ["-c", "/dev/null", "--rootdir", str(folder), str(file)])
    return module


@pytest.mark.parametrize(
    ("kind", "counts", "verdict"),
    [("sound", (2, 0, 0), "met"), ("broken", (1, 1, 0), "missed"), ("skipped", (0, 0, 1), "missed")],
)
def test_the_long_tests_are_counted(monkeypatch, tmp_path, kind: str, counts: tuple[int, ...], verdict: str):
    (claim,) = soak(monkeypatch, tmp_path, kind).run(Options())
    assert tuple(metric.value for metric in claim.metrics[:3]) == counts
    assert 0 < claim.metrics[3].value < 1
    assert claim.verdict == verdict
    assert f"test_{kind}" in claim.note


def test_passing_too_late_is_not_passing(monkeypatch, tmp_path):
    module = soak(monkeypatch, tmp_path, "sound")
    monkeypatch.setattr(module, "MINUTES", 0.0)
    (claim,) = module.run(Options())
    assert claim.verdict == "missed"


def test_tests_that_do_not_begin_are_an_error(monkeypatch, tmp_path):
    module = soak(monkeypatch, tmp_path, "sound")
    monkeypatch.setattr(module, "WORDS", ["--no-such-option"])
    with pytest.raises(OffbookError, match="expected a report of the tests"):
        module.run(Options())
