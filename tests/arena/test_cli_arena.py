"""`offbook arena ...` from the outside: what is printed, what is left behind, what is refused and with which code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest
from arena_server import Walker, running
from arena_world import lease, play
from sqlalchemy import select

from mtm_runs import BRIEF, offbook
from offbook.arena import views
from offbook.arena.database import Database
from offbook.arena.pages import render
from offbook.arena.service import Settings
from offbook.arena.serving import arena_server
from offbook.arena.tables import Robot, Split, Submission
from offbook.arena.trials import Report
from offbook.arena.worker import run_worker
from offbook.cli.policy import find_policy
from offbook.service.serving import Server
from offbook.sim.recording import record

pytestmark = pytest.mark.service


@pytest.fixture
def folder(tmp_path, cli):
    outcome = cli(["arena", "init", str(tmp_path / "arena"), "--benchmarks", "pendulum", "--trials", "2", "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    return tmp_path / "arena"


def test_init_makes_an_arena_and_prints_the_token_once(tmp_path, cli) -> None:
    folder = tmp_path / "arena"
    outcome = cli(["arena", "init", str(folder), "--benchmarks", "pendulum", "pour", "--trials", "3"])
    assert outcome.exit_code == 0
    token = next(word for word in outcome.stdout.split() if word.startswith("ob_"))
    assert "pendulum (version 1), pour (version 1)" in outcome.stdout
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert token.split("_", 2)[2].encode() not in kept
    again = cli(["arena", "init", str(folder), "--benchmarks", "pendulum", "--trials", "3", "--json"])
    assert json.loads(again.stdout)["benchmarks"][0]["version"] == 1
    assert json.loads(again.stdout)["token"] != token
    changed = cli(["arena", "init", str(folder), "--benchmarks", "pendulum", "--trials", "4", "--json"])
    assert json.loads(changed.stdout)["benchmarks"][0]["version"] == 2
    # The seed was drawn, and is kept where only the operator looks.
    seed, mode = json.loads((folder / "arena.json").read_text())["seed"], (folder / "arena.json").stat().st_mode
    assert seed > 2**32
    assert mode & 0o077 == 0
    given = cli(["arena", "init", str(tmp_path / "b"), "--benchmarks", "pendulum", "--seed", "0"])
    assert given.exit_code == 0
    assert json.loads((tmp_path / "b" / "arena.json").read_text())["seed"] == 0


def test_init_puts_a_simulated_stage_before_real_robots(tmp_path, cli) -> None:
    words = ["arena", "init", str(tmp_path / "arena"), "--benchmarks", "pour", "--trials", "2", "--seed", "5"]
    made = cli([*words, "--real", "franka", "--pass-score", "0.6", "--json"])
    assert made.exit_code == 0, made.stderr
    told = json.loads(made.stdout)["benchmarks"]
    assert [(each["name"], each["robot"]) for each in told] == [("pour", "pour"), ("pour-real", "franka")]
    database = Database(Settings.load(tmp_path / "arena").database_url)
    with database.read() as session:
        page = render("submit", views.submit(session, "pour-real", "http://here"))
        scenes = {split.benchmark.name: split.cases for split in session.scalars(select(Split)) if split.name == "seen"}
    database.close()
    assert "mean score of 0.60 on" in page
    assert scenes["pour"] != scenes["pour-real"]
    for wrong, named in ((["--real", "franka"], "both or neither"),
                         (["--real", "franka", "--pass-score", "2"], "0 to 1, the range of pour")):  # fmt: skip
        assert named in cli([*words, *wrong]).stderr


OWN = {
    "name": "bench-turn", "title": "Turning", "task": "Turn to the right.", "metric": "how far, 0 to 1",
    "robot": "bench", "splits": {"marked": [{"mark": "left"}, {"mark": "right"}], "free": 3}, "score_range": [0, 1],
}  # fmt: skip


def test_an_operator_describes_a_benchmark_for_a_robot_of_their_own(tmp_path, cli) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(OWN | {"prestage": "pendulum", "prestage_score": -200}))
    words = ["arena", "init", str(tmp_path / "arena"), "--json", "--benchmarks", "pendulum", str(file)]
    made = [json.loads(cli(words).stdout)["benchmarks"][1] for _ in range(2)]
    assert made == [{"name": "bench-turn", "version": 1, "robot": "bench"}] * 2
    database = Database(Settings.load(tmp_path / "arena").database_url)
    with database.read() as session:
        splits = {split.name: split for split in session.scalars(select(Split)) if split.benchmark.name == "bench-turn"}
        scenes = {name: [case["scene"] for case in split.cases] for name, split in splits.items()}
        assert scenes == {"marked": [{"mark": "left"}, {"mark": "right"}], "free": [{}, {}, {}]}
        assert len({case["seed"] for case in splits["free"].cases}) == 3
        benchmark = splits["free"].benchmark
        assert (benchmark.least, benchmark.most, benchmark.prestage, benchmark.fault_score) == (0, 1, "pendulum", 0)
    database.close()
    file.write_text(json.dumps(OWN | {"splits": {"marked": [{"mark": "middle"}]}}))
    assert json.loads(cli(words).stdout)["benchmarks"][1]["version"] == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "Bench Turn"}, "bench.json: name: expected String should match pattern"),
        ({"splits": {}}, "bench.json: splits"),
        ({"splits": {"free": 0}}, "at least 1 item"),
        ({"splits": {"marked": [{"mark": "\0"}]}}, "a NUL"),
        ({"score_range": [1, 0]}, "the least to the largest score"),
        ({"fault_score": -1}, "with fault_score in it"),
        ({"prestage": "pendulum"}, "both or neither"),
        ({"prestage": "nothing", "prestage_score": 1}, "benchmark 'nothing': expected a known benchmark"),
        ({"robots": "bench"}, "bench.json: robots"),
    ],
)
def test_a_description_that_cannot_be_used_is_refused_by_its_field(tmp_path, cli, change, named: str) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(OWN | change))
    words = ["arena", "init", str(tmp_path / "arena"), "--benchmarks", str(tmp_path / "bench.json")]
    outcome = cli(words)
    assert outcome.exit_code in (1, 2)
    assert named in outcome.stderr, outcome.stderr
    (tmp_path / "bench.json").write_text(json.dumps(OWN))
    assert cli(words).exit_code == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["arena", "init", "{tmp}/a", "--benchmarks", "none.json"], "none.json: expected a readable file"),
        (["arena", "init", "{tmp}/a", "--benchmarks", "poor"], "did you mean 'pour'?"),
        (["arena", "init", "{tmp}/a", "--trials", "0"], "1 to 10000"),
        (["arena", "init", "{tmp}"], "a new or empty folder"),
        (["arena", "init", "{tmp}/a", "--database", "mysql://x"], "sqlite:///FILE"),
        (["arena", "serve", "{tmp}"], "offbook arena init"),
        (["arena", "token", "list", "--folder", "{tmp}"], "offbook arena init"),
        (["arena", "worker", "--token-file", "{tmp}/none"], "No such file"),
        (["arena", "submit", "remote"], "OFFBOOK_TOKEN"),
        (["arena", "submit", "random", "--against-name", "old"], "--against beside it"),
    ],
)
def test_wrong_use_is_one_sentence_and_leaves_nothing(tmp_path, cli, monkeypatch, words, named) -> None:
    monkeypatch.delenv("OFFBOOK_TOKEN", raising=False)
    (tmp_path / "mine").write_text("precious")
    outcome = cli([word.format(tmp=tmp_path) for word in words])
    assert outcome.exit_code == 2
    assert named in outcome.stderr
    assert outcome.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("content", "named"),
    [("{", "readable JSON"), ('{"leese_seconds": 3}', "did you mean 'lease_seconds'?"), ('{"fault_cap": "3"}', "a int"),
     ('{"lease_seconds": 1.0}', "0 < watchdog_seconds < lease_seconds"), ("[]", "a known setting")],
)  # fmt: skip
def test_broken_settings_are_named(folder, cli, content: str, named: str) -> None:
    (folder / "arena.json").write_text(content)
    outcome = cli(["arena", "serve", str(folder)])
    assert outcome.exit_code == 2
    assert named in outcome.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--advertise", "here", "--host", "0.0.0.0"], "--advertise here: expected --host with an address"),
        (["--advertise", "here", "--host", "::"], "--host ::, which is any address"),
        *[
            (["--advertise", wrong], "--advertise: expected http(s)://HOST[:PORT] of at most 200 characters")
            for wrong in ("10.0.0.5:80", "ftp://arena", "http://", "http://arena/lab", "http://arena:99999", "http://[::",
                          "http://0.0.0.0:80", "http://[::]", "http://ada:secret@arena", f"http://{'a' * 194}", "Here")
        ],
    ],
)  # fmt: skip
def test_an_address_at_which_no_worker_reaches_the_server_is_not_advertised(
    folder, cli, monkeypatch, words, named
) -> None:
    monkeypatch.setattr(Server, "serve_here", lambda self: pytest.fail("it serves"))
    outcome = cli(["arena", "serve", str(folder), "--port", "0", *words])
    assert (outcome.exit_code, named in outcome.stderr) == (2, True), outcome.stderr
    assert "secret" not in outcome.stderr


def test_what_is_advertised_is_what_the_other_servers_are_told(folder, monkeypatch) -> None:
    settings = Settings.load(folder)
    addresses = ("http://arena.example:8000", "https://[fd00::5]", f"http://{'a' * 193}", "")
    for word, told in (*zip(addresses, addresses, strict=True), ("here", "http://127.0.0.1:")):
        server = arena_server(settings, print, advertise=word)
        assert server.config.app.state.arena.gateway._book._url.startswith(told)
        server._socket.close()


def test_tokens_are_made_listed_and_withdrawn(folder, cli) -> None:
    made = cli(["arena", "token", "create", "--user", "ada", "--label", "laptop", "--folder", str(folder), "--json"])
    token = json.loads(made.stdout)["token"]
    listed = cli(["arena", "token", "list", "--folder", str(folder)])
    assert token.split("_")[1] in listed.stdout
    assert token.split("_", 2)[2] not in listed.stdout
    assert cli(["arena", "token", "revoke", token.split("_")[1], "--folder", str(folder)]).exit_code == 0
    assert "withdrawn" in cli(["arena", "token", "list", "--folder", str(folder)]).stdout
    assert cli(["arena", "token", "revoke", "00000000", "--folder", str(folder)]).exit_code == 1
    wrong = cli(["arena", "token", "create", "--user", "ada", "--scopes", "root", "--folder", str(folder)])
    assert wrong.exit_code == 1
    assert "submit" in wrong.stderr


def test_a_port_that_is_taken_is_said(folder, cli) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = cli(["arena", "serve", str(folder), "--port", str(taken.getsockname()[1])])
    assert outcome.exit_code == 2
    assert "in use" in outcome.stderr


def test_submit_wait_status_and_compare(tmp_path, cli, monkeypatch) -> None:
    with running(tmp_path, watchdog_seconds=10.0) as arena:
        monkeypatch.setenv("OFFBOOK_TOKEN", arena.tokens["root"])
        url = ["--url", arena.url]
        first = cli(["arena", "submit", "random", "--benchmark", "reach", "--trials", "2", *url])
        assert first.exit_code == 0
        assert "Queued: waits for a robot of the class arm" in first.stdout
        stop = threading.Event()
        options = {"robot": Walker(), "name": "arm-1", "stop": stop}
        thread = threading.Thread(target=lambda: run_worker(arena.url, arena.tokens["lab"], "arm", **options))
        thread.start()
        try:
            words = [
                "arena",
                "submit",
                "random",
                "--benchmark",
                "reach",
                "--name",
                "again",
                "--wait",
                "--timeout",
                "120",
            ]
            second = cli([*words, *url, "--json"])
        finally:
            stop.set()
            thread.join(20)
        assert json.loads(second.stdout)["state"] == "done"
        assert "Done: 4 trials" in second.stderr
        told = cli(["arena", "status", "1", *url]).stdout
        assert "score" in told
        assert "the order that was drawn is the one that was promised: " in told
        compared = cli(["arena", "submit", "random", "--against", "expert", "--benchmark", "reach", *url, "--json"])
        names = [(entry["name"], entry["rival"]["name"]) for entry in json.loads(compared.stdout)["entries"]]
        assert names == [("random", "expert"), ("expert", "random")]
        nameless = cli(["arena", "submit", "random", "--against", "remote", "--benchmark", "reach", *url])
        assert (nameless.exit_code, "--against-name" in nameless.stderr) == (2, True)
        assert "over 2 pairs" in cli(["arena", "status", "1", "--compare", "2", *url]).stdout
        board = cli(["arena", "status", "--benchmark", "reach", *url])
        assert "random" in board.stdout
        assert "anchor" in board.stdout
        assert "reach" in cli(["arena", "status", *url]).stdout
        missing = cli(["arena", "status", "99", *url])
        assert (missing.exit_code, missing.stdout) == (1, "")
        assert "not_found" in missing.stderr
        pickled = tmp_path / "policy.pt"
        pickled.write_bytes(b"PK\x03\x04" + b"\0" * 100)
        refused = cli(["arena", "submit", str(pickled), "--benchmark", "reach", *url])
        assert refused.exit_code == 1
        assert "never read" in refused.stderr


def test_a_role_and_a_return_are_sent_in_a_copy_of_the_checkpoint(tmp_path, cli, monkeypatch) -> None:
    record("gym:Pendulum-v1", 2, tmp_path / "store", policy="random")
    run = tmp_path / "mtm"
    offbook(cli, "train", "mtm", "--data", tmp_path / "store", "--out", run, *BRIEF)
    file = next(run.rglob("*.safetensors"))
    before, kept = file.read_bytes(), []
    (tmp_path / "arena").mkdir()
    with running(tmp_path / "arena") as arena:
        monkeypatch.setenv("OFFBOOK_TOKEN", arena.tokens["ada"])
        for words in ("", ":bc", ":rcbc:0.9", "::0.25"):
            offbook(cli, "arena", "submit", f"{run}{words}", "--benchmark", "reach", "--url", arena.url)
        wrong = cli(["arena", "submit", f"{run}:planner", "--benchmark", "reach", "--url", arena.url])
        assert (wrong.exit_code, "did you mean 'plan'?" in wrong.stderr) == (2, True)
        with arena.database.read() as session:
            sent = session.scalars(select(Submission).order_by(Submission.id)).all()
        assert {entry.name for entry in sent} == {"mtm"}
        for entry in sent:
            with arena.client("ada") as client:
                client.download(entry.checkpoint, tmp_path / "sent.safetensors")
            found = find_policy(str(tmp_path / "sent.safetensors"), None)
            kept.append((found.role, found.provenance["target"]))
    assert kept[1][0] == "bc"
    assert kept[2:] == [("rcbc", 0.9), ("rcbc", 0.25)]
    assert len({entry.checkpoint for entry in sent}) == 4
    assert file.read_bytes() == before


def test_an_operator_puts_trials_that_wait_back_into_the_queue(tmp_path, cli, monkeypatch) -> None:
    with running(tmp_path) as arena:
        entry = arena.submit("root", kind="anchor", anchor="random")
        with arena.database.write() as session:
            trial = play(session, lease(session), Report(outcome="needs_human", reason="the cup is empty"))["trial"]
        words = ["arena", "requeue", str(trial), "--url", arena.url]
        told = cli(["arena", "status", entry, "--url", arena.url]).stdout
        assert "1 trial waits for the operator" in told
        assert "the cup is empty" in told
        with httpx.Client(trust_env=False) as visitor:
            page = visitor.get(f"{arena.url}/runs/{trial}", headers={"Accept": "text/html"}).text
        assert f"offbook {' '.join(words)}" in page
        monkeypatch.setenv("OFFBOOK_TOKEN", arena.tokens["ada"])
        assert "missing_scope" in cli(words).stderr
        monkeypatch.setenv("OFFBOOK_TOKEN", arena.tokens["root"])
        assert cli(words).stdout == f"Back in the queue: {trial}\n"
        assert arena.status(entry)["trials"][0]["state"] == "queued"
        assert "stale_fence" in cli(words).stderr


def test_an_operator_stops_robots_and_lets_them_go_on(tmp_path, cli, monkeypatch) -> None:
    with running(tmp_path) as arena:
        arena.submit("root", kind="anchor", anchor="random", trials=2)
        with arena.database.write() as session:
            given = lease(session, "arm.1")
            play(session, given)
            assert lease(session, "arm-2") is not None
        words = ["arena", "robot", "stop", "arm.1", "arm-2", "--url", arena.url]
        page = httpx.get(f"{arena.url}/robots/arm.1", headers={"Accept": "text/html"}, trust_env=False).text
        assert f"offbook arena robot stop arm.1 --url {arena.url}" in page
        monkeypatch.setenv("OFFBOOK_TOKEN", arena.tokens["lab"])
        assert "missing_scope" in cli(words).stderr
        monkeypatch.setenv("OFFBOOK_TOKEN", arena.tokens["root"])
        assert cli(words).stdout == "Stopped: arm.1, arm-2\n"
        stopped = select(Robot.name).where(Robot.stopped.is_not(None)).order_by(Robot.name)
        with arena.database.read() as session:
            assert session.scalars(stopped).all() == ["arm-2", "arm.1"]
        assert cli([*words[:2], "resume", "arm.1", *words[5:]]).stdout == "Let go on: arm.1\n"
        with arena.database.read() as session:
            assert session.scalars(stopped).all() == ["arm-2"]
        unknown = cli([*words[:3], "nothing/../arm.1", *words[5:]])
        assert (unknown.exit_code, "not_found" in unknown.stderr) == (1, True)
        assert cli([*words[:3], *words[5:]]).exit_code == 2


@pytest.mark.faults
def test_serve_ends_cleanly_on_a_signal_while_a_page_listens(folder) -> None:
    program = "from offbook.cli.main import main; raise SystemExit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "arena", "serve", str(folder), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stderr.readline()
        url = next(word for word in line.split() if word.startswith("http"))
        with httpx.stream("GET", f"{url}/v1/events", timeout=20, trust_env=False) as events:
            pieces = events.iter_text()
            assert next(pieces).startswith("retry")
            process.send_signal(signal.SIGTERM)
            assert list(pieces) == []
        out, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert "is closed" in out
    assert "Traceback" not in errors
