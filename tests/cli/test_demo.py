import json
import time
from contextlib import ExitStack

import pytest

from offbook.cli.demo import Children
from offbook.errors import OffbookError


def check_for(seconds, children):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        children.check()


def test_a_process_that_fails_is_named_with_its_last_words(tmp_path, capfd):
    with ExitStack() as stack:
        children = Children(tmp_path / "logs", stack)
        children.start("arena", f"arena serve {tmp_path / 'nowhere'}")
        with pytest.raises(OffbookError, match=r"demo, process 'arena': .*exit code 2: .*offbook arena init"):
            check_for(60, children)
    assert "$ offbook arena serve" in capfd.readouterr().err
    assert "offbook arena init" in (tmp_path / "logs" / "arena.log").read_text()


@pytest.mark.slow
@pytest.mark.service
def test_the_demo_ends_on_a_leaderboard_of_four(cli, tmp_path):
    code, stdout, stderr = cli(["demo", "--out", str(tmp_path / "demo"), "--episodes", "12", "--trials", "2", "--json"])
    assert code == 0, stderr
    board = json.loads(stdout)
    assert {row["name"] for row in board["rows"]} == {"expert", "random", "BC on state", "BC on images"}
    assert all(row["n"] == 2 and row["score"]["low"] <= row["score"]["value"] for row in board["rows"])
