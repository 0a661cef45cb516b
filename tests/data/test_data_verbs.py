"""`offbook data ...` as a user meets it: text, JSON, plot, exit codes."""

import json
import runpy
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def test_info_tells_what_is_there(cli, make_store):
    store = make_store([5, 9], without={1: "action"})
    outcome = cli(["data", "info", str(store.path), "--verify"])
    assert outcome.exit_code == 0
    for word in (
        "2 episodes, 14 steps",
        "gym:Made-v0 at 10 Hz",
        store.digest,
        "16 x 16 x 3",
        "agree with their checksums",
    ):
        assert word in outcome.stdout
    data = json.loads(cli(["data", "info", str(store.path), "--json"]).stdout)
    assert (data["ok"], data["episodes"], data["steps"], data["digest"]) == (True, 2, 14, store.digest)
    assert data["length"] == {"least": 5.0, "q10": 5.4, "median": 7.0, "q90": 8.6, "most": 9.0, "mean": 7.0}
    assert {field["name"]: field["episodes"] for field in data["fields"]}["action"] == 1
    assert data["success"] == {"known": 0, "successes": 0}
    assert data["bytes"] > 14 * 16 * 16 * 3


def test_info_draws(cli, make_store, tmp_path):
    store = make_store([5, 9, 7])
    assert cli(["data", "info", str(store.path), "--plot", str(tmp_path / "p.png")]).exit_code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    outcome = cli(["data", "info", str(store.path), "--plot", str(tmp_path / "p.xyz")])
    assert (outcome.exit_code, "returns.png" in outcome.stderr) == (2, True)


def test_info_of_an_empty_store(cli, make_store):
    outcome = cli(["data", "info", str(make_store([]).path)])
    assert outcome.exit_code == 0
    assert "0 episodes, 0 steps" in outcome.stdout


def test_export_and_import(cli, make_store, tmp_path):
    store = make_store([5, 9])
    outcome = cli(["data", "export", str(store.path), "minari:a-v0"])
    assert outcome.exit_code == 0
    assert "Wrote 2 episodes, 14 steps" in outcome.stdout
    assert "no place for mode" in outcome.stdout
    outcome = cli(["data", "import", "minari:a-v0", "--out", str(tmp_path / "back"), "--json"])
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["steps"] == 14


def test_record_goes_on_where_it_stopped(cli, tmp_path):
    def record(out, episodes, *more):
        words = ["data", "record", "gym:Pendulum-v1", "--policy", "random", "--out", str(tmp_path / out), *more]
        outcome = cli([*words, "--episodes", str(episodes), "--json"])
        return outcome.exit_code, json.loads(outcome.stdout)

    code, first = record("a", 1)
    assert (code, first["episodes"], first["steps"], first["environment"]) == (0, 1, 200, "gym:Pendulum-v1")
    code, more = record("a", 3)
    assert (code, more["episodes"]) == (0, 3)
    assert record("b", 3)[1]["digest"] == more["digest"]
    code, refusal = record("a", 3, "--seed", "1")
    assert (code, refusal["ok"]) == (2, False)
    assert "seed" in refusal["detail"]


def test_the_example_runs(tmp_path, capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "record_and_read.py"))["main"](tmp_path / "s")
    assert "5 episodes, 1000 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["data", "info", "nowhere"], 1, "expected an episode store, got no such folder"),
        (["data", "import", "minari:b-v0", "--out", "x"], 1, "minari download b-v0"),
        (["data", "import", "lero:b", "--out", "x"], 2, "format 'lero'; did you mean 'lerobot'?"),
        (["data", "export", "nowhere", "minari:b-v0"], 1, "nowhere"),
        (["data", "import", "minari:b-v0"], 2, "--out"),
    ],
)
def test_mistakes_are_one_line_and_the_right_exit_code(cli, words, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli(words)
    assert outcome.exit_code == code
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "x").exists()
