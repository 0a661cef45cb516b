import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offbook.runs.ledger import read
from offbook.systems import SYSTEMS

Cli = Callable[[list[str]], Any]

BENCHMARK = """
from offbook.runs.ledger import Claim, Metric
def run(options):
    metric = Metric(name="value", value=float(options.repeats))
    verdict = "met" if options.seed < 10 else "missed"
    return [Claim(system="{name}", claim="a constant", metrics=(metric,), seeds=(options.seed,), verdict=verdict)]
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "benchmarks").mkdir()
    for name in ("first", "second"):
        (tmp_path / f"benchmarks/{name}.py").write_text(BENCHMARK.format(name=name))
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    monkeypatch.chdir(tmp_path)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "start"]):
        subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)
    return tmp_path


def test_bench_prints_figures_and_fails_on_a_missed_limit(cli: Cli, checkout: Path) -> None:
    code, out, err = cli(["bench", "first", "--repeats", "3"])
    assert (code, out) == (0, "first: a constant: met\n  value 3\n")
    assert "benchmark first" in err
    code, out, _ = cli(["bench", "all", "--seed", "10", "--json"])
    assert code == 1
    assert [claim["system"] for claim in json.loads(out)["claims"]] == ["first", "second"]
    assert not (checkout / "results").exists()


def test_bench_refuses_unknown_names_and_folders(cli: Cli, checkout: Path) -> None:
    assert "did you mean 'first'?" in cli(["bench", "frist"]).stderr
    assert cli(["bench", "frist"]).exit_code == 2
    assert "a folder of benchmarks" in cli(["bench", "first", "--folder", "none"]).stderr
    assert cli(["bench", "first", "--repeats", "0"]).exit_code == 2
    (checkout / "benchmarks/third.py").write_text("x = 1\n")
    assert "a function run" in cli(["bench", "third"]).stderr


def test_record_list_verify_render(cli: Cli, checkout: Path) -> None:
    assert cli(["ledger", "list"]).stdout == "No result in results/ledger.jsonl yet.\n"
    assert cli(["bench", "all", "--record", "--repeats", "2"]).exit_code == 0
    entries = read(checkout / "results/ledger.jsonl").entries
    assert [entry.command for entry in entries] == [
        "offbook bench first --seed 0 --repeats 2",
        "offbook bench second --seed 0 --repeats 2",
    ]
    assert entries[0].id in cli(["ledger", "list"]).stdout
    code, out, _ = cli(["ledger", "verify", entries[0].id])
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["verdict", "met", "met", "yes"],
        ["value", "2", "value", "2", "yes"],
    ]
    (checkout / "docs").mkdir()
    (checkout / "docs/a.md").write_text("<!-- ledger:second -->\n<!-- /ledger -->\n")
    code, out, _ = cli(["ledger", "render", "--check"])
    assert (code, out) == (1, "stale: results/README.md\nstale: docs/a.md\n")
    assert cli(["ledger", "render"]).stdout == "written: results/README.md\nwritten: docs/a.md\n"
    assert cli(["ledger", "render", "--check"]) == (0, "All pages are up to date.\n", "")
    assert entries[1].id in (checkout / "docs/a.md").read_text()


def test_pages_that_quote_the_markers_are_left_alone(cli: Cli, checkout: Path) -> None:
    (checkout / "docs").mkdir()
    page = checkout / "docs/commands.md"
    told = cli(["ledger", "render", "--help"]).stdout
    assert "<!-- ledger:NAME -->" in told
    page.write_text(f"```text\n{told}```\nA block runs from `<!-- ledger:NAME -->` to `<!-- /ledger -->`.\n")
    before = page.read_text()
    assert cli(["ledger", "render"]).stdout == "written: results/README.md\n"
    assert page.read_text() == before
    page.write_text(f"{before}<!-- ledger:all -->\n")
    outcome = cli(["ledger", "render"])
    assert (outcome.exit_code, "commands.md: expected closed ledger blocks" in outcome.stderr) == (1, True)


def test_verify_that_disagrees_fails(cli: Cli, checkout: Path) -> None:
    cli(["bench", "first", "--record"])
    ledger = checkout / "results/ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"value": 11.0', '"value": 20.0'))
    id = read(ledger).entries[0].id
    code, out, _ = cli(["ledger", "verify", id, "--json"])
    assert (code, json.loads(out)["agrees"]) == (1, False)
    assert cli(["ledger", "verify", id, "--tolerance", "0.5"]).exit_code == 0
    assert cli(["ledger", "verify", "frst"]).exit_code == 2


def test_record_refuses_a_dirty_tree_before_measuring(cli: Cli, checkout: Path) -> None:
    (checkout / "benchmarks/first.py").write_text("raise SystemExit('measured')\n")
    code, out, err = cli(["bench", "first", "--record"])
    assert (code, out) == (1, "")
    assert "a clean working tree, got 1 changed files, first benchmarks/first.py" in err
    assert not (checkout / "results").exists()


def test_torn_line_is_named_on_stderr(cli: Cli, checkout: Path) -> None:
    cli(["bench", "first", "--record"])
    ledger = checkout / "results/ledger.jsonl"
    ledger.write_text(ledger.read_text() + '{"schema": 1, "i')
    code, out, err = cli(["ledger", "list", "--json"])
    assert (code, len(json.loads(out)["entries"])) == (0, 1)
    assert "line 2: cut short by a crash" in err


def test_systems_and_info(cli: Cli, checkout: Path) -> None:
    out = cli(["systems"]).stdout
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(SYSTEMS)
    assert len(SYSTEMS) == 10
    assert [s["name"] for s in json.loads(cli(["systems", "--json"]).stdout)["systems"]] == list(SYSTEMS)
    for name, system in SYSTEMS.items():
        out = cli(["info", name]).stdout
        assert system.paper in out
        assert f"arXiv:{system.arxiv}" in out
        assert system.status in out
    code, _, err = cli(["info", "vipr"])
    assert code == 2
    assert "did you mean 'viper'?" in err


def test_info_shows_the_last_result(cli: Cli, checkout: Path) -> None:
    (checkout / "benchmarks/first.py").write_text(BENCHMARK.format(name="viper"))
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "commit", "-qam", "x"],
        check=True,
    )
    assert "none in results/ledger.jsonl" in cli(["info", "viper"]).stdout
    cli(["bench", "first", "--record"])
    assert "a constant: met; value 11" in cli(["info", "viper"]).stdout


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("import_time", ["offbook --help", "import offbook", "import offbook.client"]),
        ("store_open", ["opening a store"]),
    ],
)
def test_our_benchmarks_run_and_state_their_limits(cli: Cli, name: str, starts: list[str]) -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    _, out, _ = cli(["bench", name, "--repeats", "1", "--folder", str(folder), "--json"])
    claims = json.loads(out)["claims"]
    assert all(claim["claim"].startswith(start) for claim, start in zip(claims, starts, strict=True))
    assert all(claim["verdict"] in ("met", "missed") and claim["baseline_metrics"] for claim in claims)
