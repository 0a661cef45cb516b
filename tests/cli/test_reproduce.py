"""`offbook reproduce`: what it refuses, and that no entry of the ledger mixes commits."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from offbook.runs.directory import RunDirectory
from offbook.runs.ledger import Claim, Metric
from offbook.systems import SYSTEMS
from offbook.systems.bpt import recipe
from offbook.systems.bpt.presets import BptConfig

Cli = Callable[[list[str]], Any]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[BptConfig, Path]]:
    """A recipe that notes how it was called, in an empty folder."""
    seen: list[tuple[BptConfig, Path]] = []

    def run(config: BptConfig, out: RunDirectory) -> Sequence[Claim]:
        seen.append((config, out.path))
        verdict = "reproduced" if config.seeds[0] < 10 else "contradicted"
        metric = Metric(name="value", value=1.0)
        return [Claim(system="bpt", claim="a constant", metrics=(metric,), seeds=config.seeds, verdict=verdict)]

    monkeypatch.setattr(recipe, "run", run)
    monkeypatch.chdir(tmp_path)
    return seen


def test_each_run_has_a_folder_of_its_own(cli: Cli, runs: list[tuple[BptConfig, Path]]) -> None:
    for _ in range(2):
        outcome = cli(["reproduce", "bpt", "--seeds", "3,4"])
        assert (outcome.exit_code, outcome.stdout) == (0, "bpt: a constant: reproduced\n  value 1\n")
    assert [str(path) for _, path in runs] == ["out/bpt-smoke", "out/bpt-smoke-2"]
    assert {config.seeds for config, _ in runs} == {(3, 4)}
    assert "everything measured is in out/bpt-smoke-2" in outcome.stderr


def test_a_claim_that_is_not_held_fails(cli: Cli, runs: list[tuple[BptConfig, Path]]) -> None:
    assert cli(["reproduce", "bpt", "--seeds", "10"]).exit_code == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["btp"], "did you mean 'bpt'?"),
        (["viper"], "got one without a reproduction so far"),
        (["bpt", "--preset", "tinny"], "did you mean 'tiny'?"),
        (["bpt", "--seeds", "1,x"], "--seeds: expected different whole numbers"),
        (["bpt", "--seeds", "1,1"], "--seeds: expected different whole numbers"),
        (["bpt", "--resume"], "--resume: expected --out with it"),
    ],
)
def test_wrong_use_is_explained(cli: Cli, runs: list[tuple[BptConfig, Path]], flags: list[str], words: str) -> None:
    outcome = cli(["reproduce", *flags])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1)
    assert words in outcome.stderr
    assert (runs, list(Path().iterdir())) == ([], [])


def test_a_folder_goes_on_only_when_that_is_said_and_with_its_own_configuration(
    cli: Cli, runs: list[tuple[BptConfig, Path]]
) -> None:
    assert cli(["reproduce", "bpt", "--out", "a"]).exit_code == 0
    assert "add --resume" in cli(["reproduce", "bpt", "--out", "a"]).stderr
    assert cli(["reproduce", "bpt", "--out", "a", "--resume"]).exit_code == 0
    assert "seeds" in cli(["reproduce", "bpt", "--out", "a", "--resume", "--seeds", "7"]).stderr
    assert len(runs) == 2


def test_no_entry_rests_on_figures_of_another_commit(
    cli: Cli, runs: list[tuple[BptConfig, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module: ModuleType = sys.modules["offbook.cli.reproduce"]
    monkeypatch.setattr(module, "changed_files", lambda *_: [])
    monkeypatch.setattr(module, "commit", lambda _: "one")
    assert cli(["reproduce", "bpt", "--out", "a"]).exit_code == 0
    monkeypatch.setattr(module, "commit", lambda _: "other")
    outcome = cli(["reproduce", "bpt", "--out", "a", "--resume", "--record"])
    assert (outcome.exit_code, len(runs)) == (2, 1)
    assert "--record: expected all figures from one commit" in outcome.stderr


def test_every_recipe_has_its_presets() -> None:
    for name, system in SYSTEMS.items():
        if system.recipe:
            assert system.recipe == f"offbook.systems.{name}.recipe:run"
