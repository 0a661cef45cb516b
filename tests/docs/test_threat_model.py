"""Every test that the threat model calls upon exists, and the long ones are marked so."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "explanation" / "threat-model.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", TEXT)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_test_that_is_called_upon_exists_and_runs_where_it_is_said_to(file: str, name: str) -> None:
    source = (ROOT / file).read_text()
    found = re.search(rf"((?:^@.*\n|^ .*\n|^\).*\n)*)^def {name}\(", source, re.MULTILINE)
    assert found, f"{file} has no {name}"
    marked = "mark.slow" in found[1] or re.search(r"^pytestmark = .*mark\.slow", source, re.MULTILINE) is not None
    assert marked == (f"long: `{file}::{name}`" in TEXT)


def test_no_test_is_named_without_its_file() -> None:
    assert len(NAMED) > 40
    assert set(re.findall(r"test_\w+(?=`)", TEXT)) == {name for _, name in NAMED}
