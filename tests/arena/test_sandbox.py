"""The jail for strangers' checkpoints: it holds, it says so only when it does, and a policy plays in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
from arena_server import META, Walker, network, running

from offbook.arena import jail, sandbox
from offbook.arena.sandbox import SandboxedPolicy, prove
from offbook.arena.worker import run_worker
from offbook.client import wire
from offbook.client.protocol import Observation
from offbook.errors import CheckpointError, ConfigError, PolicyError

pytestmark = [pytest.mark.service, pytest.mark.faults]


@pytest.fixture
def bwrap() -> str:
    path = shutil.which("bwrap")
    if path is None:
        pytest.skip("bubblewrap (bwrap) is not installed")
    if subprocess.run([path, "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let bubblewrap make namespaces")
    return path


def fake(folder: Path, monkeypatch, script: str) -> None:
    """Puts another program in bubblewrap's place; it is given the same words."""
    program = folder / "bin" / "bwrap"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport os, sys\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_the_jail_holds_and_a_policy_plays_in_it_as_it_does_outside(bwrap: str, tmp_path: Path) -> None:
    from offbook.learning.policies import load_policy

    prove()
    path = network(tmp_path / "net.safetensors")
    inside, outside = SandboxedPolicy(path), load_policy(path)
    try:
        assert inside.meta == outside.meta
        for policy in (inside, outside):
            policy.reset(["a"], ["go"])
        for n in range(5):
            seen = Observation(sessions=("a",), state=np.full((1, 2), n, np.float32), images={}, time=np.array([n]))
            np.testing.assert_array_equal(inside.infer(seen), outside.infer(seen))
        wrong = Observation(sessions=("a",), state=np.zeros((1, 3), np.float32), images={}, time=np.zeros(1))
        with pytest.raises(PolicyError, match="state"):
            inside.infer(wrong)
        assert inside.alive
    finally:
        inside.close()
    assert not inside.alive


def test_a_worker_plays_a_checkpoint_in_the_jail_and_the_arena_looks_into_it_there(bwrap: str, tmp_path: Path) -> None:
    with running(tmp_path, watchdog_seconds=14.0, sandbox=True) as arena:
        with arena.client("ada") as client:
            entry = client.submit("reach", "net", checkpoint=network(tmp_path / "net.safetensors"), trials=2)["id"]
        options = {"robot": Walker(), "name": "arm-1", "max_trials": 2, "idle_exit": 60.0, "sandbox": True}
        report = run_worker(arena.url, arena.tokens["lab"], "arm", **options)
        assert report.trials == {"done": 2}
        assert arena.status(entry)["state"] == "done"


def test_what_is_refused_inside_is_said_as_outside(bwrap: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x80\x04cos\nsystem\n" + b"\0" * 64)
    with pytest.raises(CheckpointError, match="a pickle"):
        SandboxedPolicy(bad)
    with pytest.raises(CheckpointError, match="at most 10 bytes"):
        SandboxedPolicy(network(tmp_path / "net.safetensors"), max_bytes=10)
    with pytest.raises(CheckpointError, match="a process that ended"):
        SandboxedPolicy(tmp_path / "net.safetensors", memory=64 * 2**20)


LEAKY = "os.execv(sys.executable, [sys.executable, *sys.argv[sys.argv.index('-m'):]])"


@pytest.mark.parametrize(
    ("script", "named"),
    [
        (LEAKY, "lets out: network, secret, write, environment"),
        ("sys.exit('no permission to create a namespace')", "no permission"),
        ("print('{}')", "no answer"),
        ("print('nonsense')", "JSONDecodeError"),
    ],
    ids=["a sandbox that holds nothing", "one that cannot start", "one that says nothing", "one that talks"],
)
def test_a_sandbox_that_does_not_hold_is_refused(tmp_path: Path, monkeypatch, script: str, named: str) -> None:
    fake(tmp_path, monkeypatch, script)
    # What the leaky one runs writes outside, which is what it is there to show.
    monkeypatch.setenv("PYTHONPATH", str(Path(jail.__file__).parents[2]))
    with pytest.raises(ConfigError, match=named):
        prove()
    with pytest.raises(ConfigError), running(tmp_path, sandbox=True):
        pass


@pytest.mark.parametrize("place", ["/", "/dev"])
def test_a_sandbox_with_a_path_that_can_be_written_to_is_refused(
    bwrap: str, tmp_path: Path, monkeypatch, place
) -> None:
    script = f"at = sys.argv.index({place!r}, sys.argv.index('--dev') + 2) - 1\nassert sys.argv[at] == '--remount-ro'\n"
    fake(tmp_path, monkeypatch, f"{script}os.execv({bwrap!r}, [{bwrap!r}, *sys.argv[1:at], *sys.argv[at + 2:]])")
    with pytest.raises(ConfigError, match="lets out: write"):
        prove()


def test_without_bubblewrap_the_flag_is_refused_in_one_sentence(tmp_path: Path, monkeypatch, cli) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("OFFBOOK_TOKEN", "ob_x")
    outcome = cli(["arena", "worker", "--robot", "gym:Pendulum-v1", "--sandbox"])
    assert outcome.exit_code == 2
    assert "install the system package bubblewrap" in outcome.stderr


def says(message: dict) -> str:
    """A program that sends one well-formed frame and stays."""
    frame = msgpack.packb(message)
    return f"os.write(1, {len(frame).to_bytes(4, 'big') + frame!r}); import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("script", "seconds", "named"),
    [
        ("sys.exit(1)", 30.0, "a process that ended"),
        ("import time; time.sleep(60)", 0.5, "no answer in time"),
        ("os.write(1, b'\\xff' * 100); import time; time.sleep(60)", 30.0, "a process that ended"),
        ("os.write(1, (5).to_bytes(4, 'big') + b'\\xc1' * 5)", 30.0, "msgpack"),
        (says(wire.error("bad_checkpoint", "boo")), 30.0, "JSONDecodeError"),
        (says(wire.error("bad_checkpoint", '["two", "parts"]')), 30.0, "not enough values"),
        (says(wire.error("bad_checkpoint", "7")), 30.0, "TypeError"),
        (says(wire.ready("raw")), 30.0, "KeyError: 'meta'"),
        (says(wire.ready("raw") | {"meta": {"name": "a"}}), 30.0, "a policy description"),
        (says(wire.ready("raw") | {"meta": META.to_json() | {"chunk": float("inf")}}), 30.0, "a policy description"),
    ],
    ids=[
        "ends",
        "is silent",
        "begins an endless frame",
        "sends nonsense",
        "errs in words",
        "errs in two parts",
        "errs in a number",
        "is ready without a description",
        "describes nothing",
        "plans without end",
    ],
)
def test_what_comes_out_of_the_jail_is_not_trusted(
    tmp_path: Path, monkeypatch, script: str, seconds: float, named: str
) -> None:
    fake(tmp_path, monkeypatch, script)
    monkeypatch.setattr(sandbox, "START_SECONDS", seconds)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **how: started.append(popen(*words, **how)) or started[-1])
    with pytest.raises(CheckpointError, match=named):
        SandboxedPolicy(network(tmp_path / "net.safetensors"))
    assert started[-1].poll() is not None, "nothing of it stays behind"
