import json
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import tyro

import offbook
from offbook.cli import main as cli_main
from offbook.cli.report import Report, as_json, table
from offbook.errors import CheckpointError, ConfigError
from offbook.runs.config import with_presets
from offbook.runs.progress import quiet


@dataclass(frozen=True, kw_only=True)
class Fit:
    steps: int = 100


@dataclass(frozen=True, kw_only=True)
class Config:
    fit: Fit = Fit()


def greet(name: tyro.conf.Positional[str], *, times: int = 1, loud: bool = False) -> Report:
    """Greets somebody.

    A second paragraph.

    Args:
        name: who is greeted.
        times: how often.
        loud: in capitals.

    Raises:
        ConfigError: the number is odd in a way.

    Examples:
        offbook greet Ada --times 2
    """
    if times < 0:
        raise ConfigError("--times", expected="0 or more", got=str(times), fix="greet less eagerly")
    if name == "ghost":
        raise CheckpointError("ghost", expected="a body", got="none", fix="look elsewhere")
    text = " ".join([f"hello {name}"] * times)
    data = {"name": name, "times": times, "rate": float("nan"), "array": np.arange(2), "quiet": quiet()}
    return Report(text=text.upper() if loud else text, data=data, exit_code=3 if name == "nobody" else 0)


def silent() -> None:
    """Says nothing."""


def interrupted() -> None:
    """Is interrupted."""
    raise KeyboardInterrupt


def open_nothing(path: tyro.conf.Positional[Path]) -> None:
    """Opens a file."""
    path.read_text()


def bug() -> None:
    """Has a mistake of ours in it."""
    raise ZeroDivisionError


@with_presets({"smoke": lambda: Config(fit=Fit(steps=1)), "paper": lambda: Config(fit=Fit(steps=10**6))})
def train(*, seed: int = 0, config: Annotated[Config, tyro.conf.arg(name="")] = Config()) -> Report:
    """Trains."""
    return Report(text=f"{config.fit.steps} {seed}")


@pytest.fixture(autouse=True)
def verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("fake_verbs")
    for function in (greet, silent, interrupted, open_nothing, bug, train):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "fake_verbs", module)
    table = {
        "greet": "greet",
        "quiet verb": "silent",
        "quiet stop": "interrupted",
        "open": "open_nothing",
        "bug": "bug",
        "fit": "train",
    }
    for verb, name in table.items():
        monkeypatch.setitem(cli_main.VERBS, verb, (f"fake_verbs:{name}", f"summary of {verb}"))
    monkeypatch.setitem(cli_main.VERBS, "absent", ("fake_absent_package.cli:run", "needs a package"))


Cli = Callable[[list[str]], Any]


def test_report_as_text_and_as_json(cli: Cli) -> None:
    assert cli(["greet", "Ada", "--times", "2"]) == (0, "hello Ada hello Ada\n", "")
    code, out, err = cli(["greet", "Ada", "--json"])
    assert json.loads(out) == {"ok": True, "name": "Ada", "times": 1, "rate": None, "array": [0, 1], "quiet": True}
    assert (code, err) == (0, "")
    # Wherever it stands.
    assert json.loads(cli(["--json", "greet", "Ada"]).stdout)["name"] == "Ada"
    assert cli(["quiet", "verb"]) == (0, "", "")
    assert cli(["quiet", "verb", "--json"]).stdout == '{"ok": true}\n'


def test_json_silences_progress_only_meanwhile(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ("0", None):
        monkeypatch.delenv("OFFBOOK_QUIET", raising=False)
        if before:
            monkeypatch.setenv("OFFBOOK_QUIET", before)
        assert json.loads(cli(["greet", "Ada", "--json"]).stdout)["quiet"]
        assert os.environ.get("OFFBOOK_QUIET") == before


def test_exit_code_of_the_report(cli: Cli) -> None:
    assert cli(["greet", "nobody"]).exit_code == 3
    code, out, _ = cli(["greet", "nobody", "--json"])
    assert (code, json.loads(out)["ok"]) == (3, False)


def test_errors_are_one_line_and_an_exit_code(cli: Cli) -> None:
    sentence = "offbook: --times: expected 0 or more, got -1; greet less eagerly.\n"
    assert cli(["greet", "Ada", "--times", "-1"]) == (2, "", sentence)
    code, out, err = cli(["greet", "ghost", "--json"])
    assert (code, err.count("\n")) == (1, 1)
    assert json.loads(out) == {
        "ok": False,
        "error": "CheckpointError",
        "detail": "ghost: expected a body, got none; look elsewhere.",
        "hint": "look elsewhere",
        "status": 1,
    }


def test_wrong_flags_exit_with_two_and_name_the_flag(cli: Cli) -> None:
    code, out, err = cli(["greet", "Ada", "--tims", "3"])
    assert (code, out) == (2, "")
    assert "--tims" in err
    code, out, _ = cli(["greet", "--json"])
    assert (code, json.loads(out)["error"]) == (2, "usage")
    assert cli(["greet", "Ada", "--times", "many"]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["gret"], "did you mean 'offbook greet'?"),
        (["data", "imprt"], "did you mean 'offbook data import'?"),
        (["ledger", "zzzzzz"], "see: offbook ledger --help"),
        (["zzzzzzz"], "see: offbook --help"),
        (["--verbose"], "see: offbook --help"),
    ],
)
def test_unknown_verbs(cli: Cli, words: list[str], hint: str) -> None:
    code, out, err = cli(words)
    assert (code, out) == (2, "")
    assert hint in err
    assert err.startswith("offbook: command line: expected a verb, got ")
    assert json.loads(cli([*words, "--json"]).stdout)["ok"] is False


def test_help_of_top_group_and_verb(cli: Cli) -> None:
    code, out, err = cli(["--help"])
    assert (code, err) == (0, "")
    for verb, (_, summary) in cli_main.VERBS.items():
        assert f"  {verb} " in out
        assert summary in out
    assert max(map(len, out.splitlines())) <= 120
    code, out, _ = cli(["ledger", "-h"])
    assert code == 0
    assert "ledger verify" in out
    assert "greet" not in out
    # Nothing to do is wrong use, but the help is there.
    assert cli([]).exit_code == cli(["ledger"]).exit_code == 2
    assert "ledger verify" in cli([]).stderr
    code, out, _ = cli(["greet", "--help"])
    assert code == 0
    for part in ("Greets somebody.", "A second paragraph.", "offbook greet Ada --times 2", "--json", "how often"):
        assert part in out
    assert "Raises" not in out


def test_version(cli: Cli) -> None:
    assert cli(["--version"]) == (0, f"offbook {offbook.__version__}\n", "")


def test_presets_and_configuration_files(cli: Cli, tmp_path: Path) -> None:
    assert cli(["fit"]).stdout == "100 0\n"
    assert cli(["fit", "--preset", "smoke", "--seed", "4"]).stdout == "1 4\n"
    assert cli(["fit", "--preset=smoke", "--fit.steps", "7"]).stdout == "7 0\n"
    (tmp_path / "config.json").write_text('{"fit": {"steps": 9}}')
    assert cli(["fit", "--config", str(tmp_path / "config.json")]).stdout == "9 0\n"
    assert "did you mean 'smoke'" in cli(["fit", "--preset", "smok"]).stderr
    assert "--preset smoke|paper or --config FILE" in " ".join(cli(["fit", "--help"]).stdout.split())


def test_interrupt_is_quiet(cli: Cli) -> None:
    assert cli(["quiet", "stop"]) == (130, "", "")


def test_missing_package_names_the_install_line(cli: Cli) -> None:
    code, _, err = cli(["absent"])
    assert code == 1
    assert "'fake_absent_package'" in err
    assert "pip install 'offbook[all]'" in err


def test_paths_are_the_users_but_bugs_stay_visible(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli(["open", str(tmp_path / "none")])
    assert (code, err.count("\n")) == (1, 1)
    assert f"offbook: {tmp_path / 'none'}: expected a path that can be used, got no such file" in err
    assert "is a directory" in cli(["open", str(tmp_path)]).stderr
    with pytest.raises(ZeroDivisionError):
        cli(["bug"])


def test_closed_pipe_is_no_traceback() -> None:
    command = [sys.executable, "-m", "offbook.cli.main", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 1


@pytest.mark.faults
def test_interrupt_of_a_real_process_is_quiet() -> None:
    code = (
        "import signal, os, sys, types\nfrom offbook.cli import main\n"
        "module = types.ModuleType('fake')\n"
        # A job in the background of a script is born deaf to interrupts.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait():\n    'Waits.'\n    os.kill(os.getpid(), signal.SIGINT)\n    signal.pause()\n"
        "module.wait = wait\nsys.modules['fake'] = module\nmain.VERBS['wait'] = ('fake:wait', '')\n"
        "sys.exit(main.main(['wait']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


LIGHT = {
    "import offbook": (),
    "import offbook.client": ("jaxtyping", "pyarrow", "av"),
    "import offbook.data.store, offbook.data.windows": ("av",),
    "import offbook.runs.checkpoint, offbook.runs.ledger, offbook.runs.seeding": ("pyarrow", "av"),
    "from offbook.cli.main import main; main(['--help'])": ("tyro", "numpy", "jaxtyping"),
    "from offbook.cli.main import main; main(['systems'])": ("pyarrow", "av"),
}


@pytest.mark.parametrize("code", LIGHT)
def test_light_commands_load_nothing_heavy(code: str) -> None:
    heavy = {"torch", "mujoco", "gymnasium", "fastapi", "sqlalchemy", "scipy", "matplotlib", *LIGHT[code]}
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules, file=sys.stderr)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert heavy & {name.partition(".")[0] for name in done.stderr.split()} == set()


def test_help_and_client_start_fast() -> None:
    # Ratios to a bare interpreter, by turns: the machine may be busy. The limits themselves stand in the benchmark.
    commands = {
        "bare": "pass",
        "client": "import offbook.client",
        "help": "import offbook.cli.main as m; m.main(['-h'])",
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(6):
        for name, code in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
            seconds[name].append(time.perf_counter() - start)
    bare, client, help_ = (statistics.median(seconds[name][1:]) for name in commands)
    assert client - bare < max(0.15, 8 * bare)
    assert help_ < max(0.4, 10 * bare)


def test_as_json_and_table() -> None:
    assert json.loads(as_json({"a": (1, {2}), "b": Path("x"), "c": Fit(), "d": np.float32(0.5), "e": np.inf})) == {
        "a": [1, [2]],
        "b": "x",
        "c": {"steps": 100},
        "d": 0.5,
        "e": None,
    }
    with pytest.raises(TypeError, match="object has no JSON form"):
        as_json({"a": object()})
    assert table(["name", "n"], [["a", 1], ["bb", 10]]) == "name   n\na      1\nbb    10"
    assert table(["name"], []) == "name"
