import json
import time
from contextlib import ExitStack

import pytest

from offbook.cli import children as beside
from offbook.cli.children import Children
from offbook.cli.demo import _ended_trials
from offbook.errors import OffbookError


def wait_for_failure(children):
    since = time.monotonic()
    while True:
        children.check(since, "a failure", "none")


def test_a_process_that_fails_is_named_with_its_last_words(tmp_path, capfd):
    with ExitStack() as stack:
        children = Children(tmp_path / "logs", stack)
        children.start("arena", f"arena serve {tmp_path / 'nowhere'}")
        with pytest.raises(OffbookError, match=r"process 'arena': .*exit code 2: .*offbook arena init"):
            wait_for_failure(children)
    assert "$ offbook arena serve" in capfd.readouterr().err
    assert "offbook arena init" in (tmp_path / "logs" / "arena.log").read_text()


class Stuck:
    """An arena in which one trial ends and another waits for a person for ever."""

    def status(self, submission):
        trials = [{"state": "done"}, {"state": "needs_human"}]
        words = "1 trials failed on the robot three times over and wait for its operator"
        return {"name": submission, "state": "open", "state_words": words, "trials": trials}


@pytest.mark.faults
def test_a_trial_that_waits_for_a_person_ends_the_demo_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "PATIENCE_S", 0.2)
    with ExitStack() as stack:
        ended = _ended_trials(Stuck(), ["BC"], Children(tmp_path / "logs", stack))
        assert next(ended) is None
        words = r"a trial that ends within 0.2 s, got BC: 1 trials failed .* wait for its operator; read the logs in"
        with pytest.raises(OffbookError, match=words):
            next(ended)


@pytest.mark.slow
@pytest.mark.service
def test_the_demo_ends_on_a_leaderboard_of_five(cli, tmp_path):
    code, stdout, stderr = cli(["demo", "--out", str(tmp_path / "demo"), "--episodes", "12", "--trials", "2", "--json"])
    assert code == 0, stderr
    board = json.loads(stdout)
    assert {row["name"] for row in board["rows"]} == {"expert", "random", "BC on state", "BC on images", "MTM as BC"}
    assert all(row["n"] == 2 and row["score"]["low"] <= row["score"]["value"] for row in board["rows"])
