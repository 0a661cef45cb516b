import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from offbook.errors import ConfigError, DataError, OffbookError
from offbook.runs import benchmark
from offbook.runs.ledger import (
    Claim,
    Dataset,
    Entry,
    Metric,
    Paper,
    Verdict,
    append,
    compare,
    entry,
    latest,
    read,
    verdict_holds,
    verify,
)
from offbook.runs.provenance import changed_files, commit, peak_rss_mb, this_machine, versions
from offbook.runs.render import render

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SUCCESS = Metric(name="success", value=0.8, n=50, interval=(0.66, 0.9), method="Wilson", higher_is_better=True)
CLAIM = Claim(
    system="mtm",
    claim="masked models match cloning",
    metrics=(SUCCESS,),
    baseline_metrics=(Metric(name="success, cloning", value=0.5),),
    seeds=(0, 1),
    config={"steps": 3},
    data=(Dataset(name="pour", sha256="ab", episodes=60),),
    paper=Paper(value="0.9", table="Table 2"),
    verdict="not separated",
)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "start")
    return tmp_path


def made(checkout: Path, source: Claim = CLAIM, **change: Any) -> Entry:
    plain = entry(source, command="offbook systems", started=NOW, seconds=90.0, folder=checkout)
    return replace(plain, **change)


def test_round_trip_and_provenance(checkout: Path) -> None:
    ledger = checkout / "results/ledger.jsonl"
    first = made(checkout)
    append(ledger, first)
    assert read(ledger).entries == (first,)
    assert first.commit == commit(checkout)
    assert first.id.startswith("mtm-")
    assert first.versions["offbook"]
    assert first.machine == this_machine()
    assert first.peak_rss_mb > 10
    record = json.loads(ledger.read_text())
    # The fields that the schema promises.
    promised = "schema id system preset claim command config_sha config seeds commit dirty versions machine started"
    promised += " seconds peak_rss_mb data metrics baseline_metrics paper verdict note"
    assert set(record) == set(promised.split())
    assert record["metrics"][0]["interval"] == [0.66, 0.9]


def test_recording_twice_in_one_checkout_is_not_dirty_but_changed_code_is(checkout: Path) -> None:
    ledger = checkout / "results/ledger.jsonl"
    append(ledger, made(checkout))
    second = made(checkout, replace(CLAIM, preset="tiny"))
    assert not second.dirty
    append(ledger, second)
    (checkout / "code.py").write_text("x = 2\n")
    assert changed_files(checkout, "results") == ["code.py"]
    before = ledger.read_bytes()
    with pytest.raises(DataError, match="a clean working tree"):
        append(ledger, made(checkout))
    git(checkout, "checkout", "code.py")
    (checkout / "new.py").write_text("")
    assert made(checkout).dirty
    assert ledger.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seeds": ()}, DataError, "expected the seeds, got none"),
        ({"metrics": ()}, DataError, "expected a metric"),
        ({"commit": ""}, DataError, "a git commit"),
        ({"metrics": (replace(SUCCESS, interval=None),)}, DataError, "n = 50 without one"),
        ({"baseline_metrics": (Metric(name="b", value=1.0, n=2),)}, DataError, "metric 'b': expected an interval"),
        ({"metrics": (replace(SUCCESS, value=0.95),)}, DataError, "a value inside"),
        ({"metrics": (Metric(name="a", value=float("nan")),)}, DataError, "a finite value, got nan"),
        ({"command": "rm -rf /"}, ConfigError, r"expected offbook \.\.\."),
        ({"command": "offbook ledger verify x"}, ConfigError, "a measuring command"),
    ],
)
def test_append_refuses_what_nobody_could_check(
    checkout: Path, change: dict[str, Any], error: type[OffbookError], message: str
) -> None:
    ledger = checkout / "results/ledger.jsonl"
    with pytest.raises(error, match=message):
        append(ledger, made(checkout, **change))
    assert not ledger.exists()


@pytest.mark.faults
def test_torn_last_line_is_named_and_then_replaced(checkout: Path) -> None:
    ledger = checkout / "results/ledger.jsonl"
    first = made(checkout)
    append(ledger, first)
    whole = ledger.read_bytes()
    for keep in (1, len(whole) // 2, len(whole) - 2):
        ledger.write_bytes(whole + whole[:keep])
        assert read(ledger).torn_line == 2
        assert read(ledger).entries == (first,)
    second = made(checkout, replace(CLAIM, preset="tiny"))
    append(ledger, second)
    assert read(ledger).entries == (first, second)
    assert read(ledger).torn_line is None
    # A whole line that an editor left without its newline is kept.
    ledger.write_bytes(whole.rstrip(b"\n"))
    append(ledger, second)
    assert read(ledger).entries == (first, second)


def test_damaged_lines_are_named(checkout: Path) -> None:
    ledger = checkout / "results/ledger.jsonl"
    append(ledger, made(checkout))
    whole = ledger.read_text()
    for text, message in [
        ("noise\n" + whole, "line 1: expected one JSON object"),
        (whole.replace('"schema": 1', '"schema": 2'), "line 1: expected schema 1, got schema 2"),
        ("[]\n" + whole, "line 1: expected schema 1, got schema None"),
    ]:
        ledger.write_text(text)
        with pytest.raises(DataError, match=message):
            read(ledger)
    ledger.write_text(whole.replace('"verdict"', '"verdikt"'))
    with pytest.raises(ConfigError, match=r"verdikt: .*did you mean 'verdict'"):
        read(ledger)


def test_latest_keeps_the_newest_of_each_claim(checkout: Path) -> None:
    old, other, new = made(checkout), made(checkout, system="viper"), made(checkout, verdict="reproduced")
    assert latest([old, other, new]) == [new, other]


def test_find_suggests(checkout: Path) -> None:
    ledger = checkout / "results/ledger.jsonl"
    with pytest.raises(ConfigError, match="record a result first"):
        read(ledger).find("mtm-1")
    append(ledger, made(checkout))
    with pytest.raises(ConfigError, match="did you mean"):
        read(ledger).find(made(checkout).id[:-1] + "?")


BENCHMARK = """
from offbook.runs.ledger import Claim, Metric
def figure(name, value, **more):
    return Metric(name=name, value=value, n=9, interval=(value - 1, value + 1), method="range", **more)
def run(options):
    metrics = (figure("value", {value}), Metric(name="exact", value={exact}))
    return [Claim(system="const", claim="a constant", metrics=metrics, seeds=(options.seed,), verdict="{verdict}")]
"""


@pytest.mark.parametrize(
    ("value", "exact", "outcomes"),
    [(5, 1.0, ["agrees"] * 2), (6.5, 1.04, ["agrees"] * 2), (8, 1.2, ["disagrees"] * 2)],
)
def test_verify_runs_the_command_again(checkout: Path, value: float, exact: float, outcomes: Sequence[str]) -> None:
    (checkout / "benchmarks").mkdir()
    (checkout / "benchmarks/const.py").write_text(BENCHMARK.format(value=value, exact=exact, verdict="met"))
    recorded = made(
        checkout,
        system="const",
        claim="a constant",
        command="offbook bench const --seed 3",
        metrics=(
            Metric(name="value", value=5.0, n=9, interval=(4.0, 6.0)),
            Metric(name="exact", value=1.0),
        ),
        baseline_metrics=(),
        verdict="met",
    )
    found = verify(recorded, folder=checkout)
    assert [c.outcome for c in found.comparisons] == outcomes
    assert (found.verdict, found.holds, found.agrees) == ("met", True, "disagrees" not in outcomes)
    gone = verify(replace(recorded, metrics=(Metric(name="gone", value=1.0),)), folder=checkout)
    assert [(c.again, c.outcome) for c in gone.comparisons] == [(None, "disagrees")]
    other = verify(replace(recorded, claim="another"), folder=checkout)
    assert (other.verdict, other.holds) == (None, False)


@pytest.mark.parametrize(
    ("recorded", "again", "holds"),
    [
        ("met", "met", True),
        ("missed", "met", True),
        ("recorded", "met", True),
        ("not separated", "reproduced", True),
        ("missed", "missed", True),
        ("met", "missed", False),
        ("met", "recorded", False),
        ("recorded", "missed", False),
        ("reproduced", "not separated", False),
        ("not separated", "contradicted", False),
    ],
)
def test_a_verdict_holds_when_it_or_a_better_one_comes_again(recorded: Verdict, again: Verdict, holds: bool) -> None:
    assert verdict_holds(recorded, again) is holds
    assert not verdict_holds(recorded, None)


@pytest.mark.parametrize(
    ("change", "value", "outcome", "of_a_baseline"),
    [
        ({"higher_is_better": True}, 5.5, "agrees", "agrees"),
        ({"higher_is_better": True}, 9.0, "better", "disagrees"),
        ({"higher_is_better": True}, 1.0, "disagrees", "disagrees"),
        ({"higher_is_better": False}, 1.0, "better", "disagrees"),
        ({"higher_is_better": False}, 9.0, "disagrees", "disagrees"),
        ({"higher_is_better": True, "interval": None, "n": 1}, 9.0, "better", "disagrees"),
        ({"higher_is_better": False, "interval": None, "n": 1}, 5.3, "disagrees", "disagrees"),
        ({"higher_is_better": False, "interval": None, "n": 1}, 5.2, "agrees", "agrees"),
        ({"higher_is_better": True}, float("nan"), "disagrees", "disagrees"),
        ({"higher_is_better": False}, float("nan"), "disagrees", "disagrees"),
        # Times are the machine's; megabytes are not.
        ({"unit": "s"}, 500.0, "not compared", "not compared"),
        ({"unit": "windows/s"}, 500.0, "not compared", "not compared"),
        ({"unit": "MiB"}, 500.0, "disagrees", "disagrees"),
    ],
)
def test_what_is_better_agrees_and_times_are_not_compared(
    change: dict[str, Any], value: float, outcome: str, of_a_baseline: str
) -> None:
    metric = replace(Metric(name="a", value=5.0, n=9, interval=(4.0, 6.0)), **change)
    again = replace(metric, value=value, interval=metric.interval and (value - 0.5, value + 0.5))
    assert compare(metric, again).outcome == outcome
    assert compare(metric, again, baseline=True).outcome == of_a_baseline
    assert compare(metric, replace(again, unit="apples")).outcome == "disagrees"


def test_verify_of_a_command_that_fails_or_is_foreign(checkout: Path) -> None:
    with pytest.raises(OffbookError, match=r"claims as JSON, got exit code 2: .*a folder of benchmarks"):
        verify(made(checkout, command="offbook bench const"), folder=checkout)
    with pytest.raises(OffbookError, match="claims as JSON"):
        verify(made(checkout, command="offbook systems"), folder=checkout)
    with pytest.raises(ConfigError, match=r"expected offbook \.\.\."):
        verify(made(checkout, command="touch /tmp/x"), folder=checkout)


def test_render_writes_the_table_and_the_blocks(checkout: Path) -> None:
    ledger = checkout / "results/ledger.jsonl"
    append(ledger, made(checkout, claim="a | b"))
    append(ledger, made(checkout, system="speed", claim="is fast"))
    page = checkout / "docs/page.md"
    page.parent.mkdir()
    page.write_text("# T\n<!-- ledger:mtm -->\nold\n<!-- /ledger -->\nmiddle\n<!-- ledger:vcse -->\n<!-- /ledger -->\n")
    readme = checkout / "results/README.md"
    titles = {"mtm": "Masked", "vcse": "Exploration"}
    assert render(read(ledger), readme, [page], titles, check=True) == [readme, page]
    assert not readme.exists()
    assert "old" in page.read_text()
    assert render(read(ledger), readme, [page], titles) == [readme, page]
    assert render(read(ledger), readme, [page], titles, check=True) == []
    text = page.read_text()
    assert "old" not in text
    assert "success 0.8 [0.66, 0.9], n = 50" in text
    assert "a \\| b" in text
    assert "is fast" not in text
    assert "No result is recorded yet." in text.partition("ledger:vcse")[2]
    assert text.startswith("# T\n")
    assert "\nmiddle\n" in text
    assert "### Exploration\n\nNo result is recorded yet." in readme.read_text()
    assert "is fast" in readme.read_text().partition("## Benchmarks")[2]


def test_unclosed_block_is_refused_and_left(checkout: Path) -> None:
    page = checkout / "page.md"
    page.write_text("<!-- ledger:mtm -->\ntext that must stay\n<!-- ledger:vcse -->\n<!-- /ledger -->\n")
    with pytest.raises(DataError, match=r"page\.md: expected closed ledger blocks"):
        render(read(checkout / "none.jsonl"), checkout / "README.md", [page], {})
    assert "must stay" in page.read_text()
    assert not (checkout / "README.md").exists()


def test_outside_a_repository_there_is_no_commit(tmp_path: Path) -> None:
    assert commit(tmp_path) == ""
    assert changed_files(tmp_path) == []
    assert versions()["python"]
    assert peak_rss_mb() > 10


def test_median_interval_has_its_coverage() -> None:
    # Exact binomial coverage of the chosen order statistics: at least 95 %, and the next narrower pair would have less.
    from math import comb

    for n in range(6, 60):
        _, low, high = benchmark.median_interval([float(i) for i in range(n)])
        rank = int(low)
        assert high == n - 1 - rank
        coverage = 1 - 2 * sum(comb(n, i) for i in range(rank + 1)) / 2**n
        narrower = 1 - 2 * sum(comb(n, i) for i in range(rank + 2)) / 2**n
        assert coverage >= 0.95 > narrower
    assert benchmark.median_interval([2.0, 1.0, 3.0]) == (2.0, 1.0, 3.0)
    with pytest.raises(DataError, match="expected samples"):
        benchmark.median_interval([])


def test_timed_goes_by_turns_and_warms_up() -> None:
    calls: list[str] = []
    seconds = benchmark.timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert [len(rounds) for rounds in seconds.values()] == [2, 2]
    ticks = iter(range(100))
    assert benchmark.timed({"a": lambda: next(ticks)}, 2, clock=lambda: float(next(ticks))) == {"a": [2.0, 2.0]}
    metric = benchmark.median_metric("a", [1.0, 3.0], unit="s")
    assert (metric.value, metric.interval, metric.n) == (2.0, (1.0, 3.0), 2)
