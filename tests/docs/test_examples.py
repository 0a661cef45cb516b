"""Every example runs from the command line, as a user would run it."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# What each is given, so that it takes seconds, and a word that it prints at its end.
RUNS = {
    "record_and_read.py": (["store"], "held out"),
    "blockwise_in_torch.py": (["3"], "goes on with"),
    "masked_roles.py": ([], "an agent sees"),
    "trying_again.py": ([], "success in last trial"),
    "explore_in_sb3.py": ([], "after 2560 steps the bonus weighs 0.018"),
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_runs(name: str, tmp_path: Path) -> None:
    arguments, last = RUNS[name]
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert last in done.stdout.splitlines()[-1]
