"""The reproduction of TOTO: verdicts beside their limits, what is trained, and all of it at the smallest size."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from offbook.evaluate.rollout import EpisodeResult, Evaluation
from offbook.learning.cloning import CloningConfig
from offbook.learning.hindsight_training import HindsightConfig
from offbook.runs.ledger import Dataset
from offbook.systems.toto import claims
from offbook.systems.toto.claims import ANCHORS, OWN
from offbook.systems.toto.presets import PRESETS, smoke, tiny
from offbook.systems.toto.recipe import kinds

STUDY = replace(tiny(), tasks=("t",), splits=("seen", "all"))
DATA = Dataset(name="t", sha256="0" * 64, episodes=3)


@cache
def episodes(mean, seed=0):
    """40 episodes whose scores scatter around a mean, for each training in its own way."""
    scores = np.clip(mean + 0.1 * np.random.default_rng(seed).normal(size=40), 0, 1)
    results = tuple(
        EpisodeResult(seed=i, return_=float(s), steps=9, success=bool(s > 0), score=float(s), terminated=True)
        for i, s in enumerate(scores)
    )
    return Evaluation(environment="t:t", settings={}, policy="p", scenes=None, results=results)


def played(**means):
    """Scores of all policies: 0.7 where they were recorded, 0.4 elsewhere, unless a word says otherwise."""
    found = {}
    for seed in STUDY.seeds:
        for representation, policy, _ in kinds(STUDY, seed):
            for split in STUDY.splits if representation == STUDY.main else STUDY.splits[:1]:
                names = (f"{representation} {policy} {split}", f"{policy} {split}", representation, split)
                usual = 0.7 if split == "seen" else 0.4
                mean = next((means[name] for name in names if name in means), usual)
                found[("t", representation, policy, seed), split] = episodes(mean, seed)
    for name, mean in zip(ANCHORS, (means.get("expert", 0.98), 0.0), strict=True):
        found |= {(("t", name, name, 0), split): episodes(mean, 9) for split in STUDY.splits}
    return found


def test_limits_are_those_of_the_task_and_of_the_best_clone():
    assert claims.anchors(STUDY, "t", played(), DATA).verdict == "met"
    assert claims.anchors(STUDY, "t", played(expert=0.8), DATA).verdict == "missed"
    best = claims.cloning(STUDY, "t", played(seen=0.3, **{"end to end": 0.65}), DATA)
    assert best.verdict == "met"
    assert "The best is BC, H=" in best.note
    assert len(best.metrics) == 10
    # Only clones count.
    assert claims.cloning(STUDY, "t", played(seen=0.3, **{"VINN seen": 0.9}), DATA).verdict == "missed"


def test_three_of_the_four_policies_must_lose_where_all_is_new():
    def verdict(**means):
        return claims.drops(STUDY, "t", played(**means), DATA).verdict

    assert verdict() == "reproduced"
    assert verdict(**{"VINN all": 0.7}) == "reproduced"
    assert verdict(**{"VINN all": 0.7, "DT all": 0.75}) == "contradicted"
    # The others are told and do not count.
    assert verdict(**{"BC, H=1 all": 0.9, "AT all": 0.9}) == "reproduced"
    assert verdict(**{"BC, H=50 all": 0.9, "IQL all": 0.9}) == "contradicted"
    found = claims.drops(STUDY, "t", played(), DATA)
    assert len(found.metrics) == 6
    assert {metric.n for metric in found.metrics} == {40}


def test_both_ways_to_learn_to_see_must_beat_an_untrained_network():
    def verdict(**means):
        return claims.seeing(STUDY, "t", played(**means), DATA).verdict

    assert verdict(random=0.5) == "reproduced"
    assert verdict(random=0.5, moco=0.5) == "not separated"
    assert verdict(random=0.8) == "contradicted"
    assert claims.seeing(replace(STUDY, judged=False), "t", played(), DATA).verdict == "recorded"


def test_a_table_has_a_row_for_each_policy_and_leaves_out_what_was_not_played():
    text = claims.table(STUDY, played())
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4 * 5 + 1 + 2 + 2  # head, policies on features, AT, end to end, anchors
    by_name = {(row[0].strip(), row[1].strip()): [cell.strip() for cell in row[2:]] for row in rows}
    assert by_name["VINN", "pca"][0].startswith("0.7")
    assert by_name["VINN", "pca"][1:] == [""]
    assert all(cell.startswith("0.4") or cell.startswith("0.3") for cell in by_name["VINN", "byol"][1:])
    assert by_name["random actions", "-"][0].startswith("0.0")


def test_every_policy_is_trained_on_every_representation_from_equally_many_steps():
    arms = list(kinds(STUDY, 2))
    grid = {(representation, name) for representation, name, _ in arms}
    assert len(grid) == len(arms) == 4 * 5 + 1 + 2
    assert {config.fit.seed for _, name, config in arms if name != "VINN"} == {2}
    chains = [config for *_, config in arms if isinstance(config, HindsightConfig)]
    assert {config.n_trials[1] * config.fit.batch_size for config in chains} == {32}
    cloned = [(name, config) for representation, name, config in arms if isinstance(config, CloningConfig)]
    assert {(name, config.chunk, config.execute) for name, config in cloned} == {
        ("BC, H=1", 1, 1),
        ("BC, H=50", 50, 50),
    }
    assert all(config.cameras == ("front",) for representation, _, config in arms if representation == OWN)
    assert list(PRESETS) == ["smoke", "tiny", "paper"]
    assert not smoke().judged


@pytest.mark.timeout(600)
def test_smoke_runs_from_the_command_line_and_goes_on_from_its_folder(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFBOOK_CACHE", str(tmp_path / "cache"))
    outcome = cli(["reproduce", "toto", "--preset", "smoke", "--out", "run", "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)["claims"]
    assert len(found) == 8
    assert {claim["verdict"] for claim in found} == {"recorded"}
    assert Path("run/toto.png").stat().st_size > 20_000
    assert Path("run/table.md").read_text().count("| random actions |") == 2
    weights = {path: path.stat().st_mtime_ns for path in Path("run").rglob("last.safetensors")}
    again = cli(["reproduce", "toto", "--preset", "smoke", "--out", "run", "--resume", "--json"])
    assert json.loads(again.stdout)["claims"] == found
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
