"""`offbook policy serve` and `policy check` from the user's side."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from loopback import TOKEN, arena, ask, greet, receive, send

from offbook.client import wire

MODULE = """
import numpy as np
from offbook.client import ActionSpec, FunctionPolicy, ObservationSpec, PolicyMeta

META = PolicyMeta(
    name="still",
    observation=ObservationSpec(state=(("joints", 3),), cameras={"front": (16, 16)}),
    action=ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0)),
)
policy = FunctionPolicy(META, lambda state, images: np.zeros(2))

def make():
    return policy

def broken():
    raise RuntimeError("weights are missing")

number = 7

PENDULUM = PolicyMeta(
    name="nan",
    observation=ObservationSpec(state=(("observation", 3),)),
    action=ActionSpec(size=1, low=(-2.0,), high=(2.0,)),
)
nan = FunctionPolicy(PENDULUM, lambda state, images: np.full(1, np.nan))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module in the current folder, under a fresh name."""
    name = f"policies_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("attribute", ["policy", "make"])
def test_a_users_policy_plays_and_the_outcome_is_reported(cli, module, monkeypatch, attribute):
    monkeypatch.setenv("OFFBOOK_TOKEN", TOKEN)
    answers = []

    def script(connection):
        assert greet(connection)["submission"] == "s1"
        send(connection, wire.reset("t1", ""))
        ask(connection, "t1", 1)
        answers.append(receive(connection))
        send(connection, wire.end("t1", "done"))

    with arena(script) as url:
        code, stdout, stderr = cli(["policy", "serve", f"{module}:{attribute}", "--url", url, "--submission", "s1"])
    assert code == 0, stderr
    assert stdout == "still: 1 trial played for submission s1.\n"
    assert "waiting for trials" in stderr
    assert answers[0]["chunk"].shape == (1, 2)
    assert TOKEN not in stdout + stderr


def test_an_interrupt_ends_the_service_cleanly(module, tmp_path):
    connected, closes = threading.Event(), []

    def script(connection):
        greet(connection)
        connected.set()
        with pytest.raises(Exception, match="1001"):
            connection.recv(20)
        closes.append(connection.protocol.close_reason)

    with arena(script) as url:
        command = [sys.executable, "-c", "import sys; from offbook.cli.main import main; sys.exit(main())"]
        command += ["policy", "serve", f"{module}:policy", "--url", url, "--submission", "s1"]
        environment = {**os.environ, "OFFBOOK_TOKEN": TOKEN}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert connected.wait(30)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert stderr.splitlines()[-1] == "offbook: stopped"
    assert stdout == "still: 0 trials played for submission s1.\n"
    assert closes == ["the policy stops"]


def test_a_wrong_token_ends_with_one_line(cli, module, monkeypatch, tmp_path):
    monkeypatch.delenv("OFFBOOK_TOKEN", raising=False)
    (tmp_path / "token").write_text("ob_wrong_hunter2\n")
    with arena(lambda connection: None) as url:
        serve = ["policy", "serve", f"{module}:policy", "--url", url, "--submission", "s1"]
        code, _, stderr = cli([*serve, "--token-file", str(tmp_path / "token")])
        assert code == 1
        assert "HTTP status 401; check the token" in stderr
        assert "hunter2" not in stderr
        code, _, stderr = cli(serve)
    assert code == 2
    assert "OFFBOOK_TOKEN" in stderr


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{}:nothing", "AttributeError"),
        ("{}:broken", "RuntimeError: weights are missing"),
        ("{}:number", "not callable"),
        ("no_such_module:policy", "No module named"),
        ("json:loads", "TypeError"),
        ("expert:much", "a grade from 0 to 1"),
    ],
)
def test_what_is_no_policy_is_named(cli, module, target, words):
    code, _, stderr = cli(["policy", "check", target.format(module), "--robot", "pour"])
    assert code == 2
    assert words in stderr
    assert "Traceback" not in stderr


def test_a_check_reports_for_people_and_for_machines(cli):
    code, stdout, stderr = cli(["policy", "check", "random", "--task", "gym:CartPole-v1"])
    assert code == 0, stderr
    assert "random on gym:CartPole-v1: fine" in stdout
    assert "latency of" in stdout
    code, stdout, _ = cli(["policy", "check", "random", "--task", "gym:CartPole-v1", "--json"])
    data = json.loads(stdout)
    assert (code, data["ok"], data["fit"], data["failures"]) == (0, True, True, [])
    assert data["period_ms"] == pytest.approx(20)
    assert set(data["latency_ms"]) == {"p50", "p95", "p99", "max"}


def test_a_check_that_fails_gives_reasons_and_exit_code_1(cli, module):
    code, stdout, _ = cli(["policy", "check", f"{module}:nan", "--task", "gym:Pendulum-v1"])
    assert code == 1
    assert "NOT FIT for an arena: episode: 3 refused actions, the last at step 2: entry 0 is nan" in stdout
    code, stdout, _ = cli(["policy", "check", f"{module}:policy", "--robot", "gym:Pendulum-v1"])
    assert code == 1
    assert "a state part 'joints' of size 3" in stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--robot"),
        (["--robot", "pour", "--task", "offbook:pour"], "drop one"),
        (["--robot", "pour", "--seconds", "0"], "a positive number"),
        (["--robot", "puor"], "did you mean 'pour'"),
    ],
)
def test_wrong_use_is_explained(cli, flags, words):
    code, _, stderr = cli(["policy", "check", "random", *flags])
    assert code == 2
    assert words in stderr
