"""The reproduction of TOTO: verdicts beside their limits, what is trained, and all of it at the smallest size."""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from offbook.evaluate.rollout import EpisodeResult, Evaluation, evaluate_policy
from offbook.learning.cloning import CloningConfig
from offbook.learning.hindsight_training import HindsightConfig
from offbook.runs.directory import RunDirectory
from offbook.runs.ledger import Dataset
from offbook.systems.toto import claims, experiments
from offbook.systems.toto.claims import ANCHORS, OWN
from offbook.systems.toto.presets import PRESETS, smoke, tiny
from offbook.systems.toto.recipe import kinds, run

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
    """Scores of all policies: 0.7 where they were recorded, 0.4 elsewhere, unless a word says otherwise.

    Where a word says several, they are of the seeds in turn.
    """
    found = {}
    for seed in STUDY.seeds:
        for representation, policy, _ in kinds(STUDY, seed):
            for split in STUDY.splits if representation == STUDY.main else STUDY.splits[:1]:
                names = (f"{representation} {policy} {split}", f"{policy} {split}", representation, split)
                usual = 0.7 if split == "seen" else 0.4
                mean = next((means[name] for name in names if name in means), usual)
                mean = mean[seed] if isinstance(mean, tuple) else mean
                found[("t", representation, policy, seed), split] = episodes(mean, seed)
    for name, mean in zip(ANCHORS, (means.get("expert", 0.98), 0.0), strict=True):
        found |= {(("t", name, name, 0), split): episodes(mean, 9) for split in STUDY.splits}
    return found


def test_limits_are_those_of_the_task_and_of_the_best_clone():
    assert claims.anchors(STUDY, "t", played(), DATA).verdict == "met"
    assert claims.anchors(STUDY, "t", played(expert=0.8), DATA).verdict == "missed"
    best = claims.cloning(STUDY, "t", played(seen=0.3, **{"end to end": 0.65}), DATA)
    assert best.verdict == "met"
    names = [metric.name for metric in best.metrics]
    assert best.note.startswith(f"The best is {names[0]}: the highest of 10 means over seeds, which is biased upwards")
    # Beside it stands the clone that was named beforehand; both are held against random actions, over seeds.
    assert names[0].endswith("end to end")
    assert names[1] == "BC, H=50, byol"
    assert len(names) == len(set(names)) == 10 + 2
    assert names[-2:] == [f"{name}, less random actions" for name in names[:2]]
    assert {metric.n for metric in best.metrics} == {3}
    assert best.metrics[-2].interval[0] > 0
    # Only clones count.
    assert claims.cloning(STUDY, "t", played(seen=0.3, **{"VINN seen": 0.9}), DATA).verdict == "missed"
    # The mean keeps the limit, and trainings differ too much to tell it from chance.
    apart = played(seen=0.3, **{"byol BC, H=50 seen": (0.05, 0.9, 0.95)})
    assert claims.cloning(STUDY, "t", apart, DATA).verdict == "not separated"


def test_three_of_the_four_policies_must_lose_where_all_is_new():
    def verdict(**means):
        return claims.drops(STUDY, "t", played(**means), DATA).verdict

    assert verdict() == "reproduced"
    assert verdict(**{"VINN all": 0.7}) == "reproduced"
    assert verdict(**{"VINN all": 0.7, "DT all": 0.75}) == "not separated"
    # The others are told and do not count.
    assert verdict(**{"BC, H=1 all": 0.9, "AT all": 0.9}) == "reproduced"
    assert verdict(**{"BC, H=50 all": 0.9, "IQL all": 0.9}) == "contradicted"
    found = claims.drops(STUDY, "t", played(), DATA)
    assert [metric.n for metric in found.metrics] == [3] * 7 + [40] * 4
    # Each training does another thing, however sure its own episodes are.
    told = claims.drops(STUDY, "t", played(**{"VINN all": (0.1, 0.3, 0.9), "IQL all": (0.2, 0.8, 0.2)}), DATA)
    assert told.verdict == "not separated"
    assert told.note.startswith("It is so for BC, H=50, DT:")
    assert all(metric.interval[0] > 0 for metric in told.metrics if metric.name.endswith("over episodes"))


def test_policies_are_held_against_cloning_one_action_on_the_same_episodes():
    found = claims.policies(STUDY, "t", played(**{"VINN seen": 0.8, "IQL seen": (0.5, 0.7, 0.9)}), DATA)
    gains = {metric.name: metric for metric in found.metrics}
    assert gains["VINN less BC, H=1"].interval[0] > 0.05
    # The same scores in every episode leave no doubt, however wide they scatter.
    assert gains["MTM less BC, H=1"].interval == (0.0, 0.0)
    assert gains["IQL less BC, H=1"].interval[0] < -0.4
    assert {metric.n for metric in gains.values()} == {3}
    assert len(gains) == 6
    assert found.verdict == "recorded"
    assert {metric.value for metric in found.baseline_metrics if metric.name.startswith("success")} == {1.0}


def test_both_ways_to_learn_to_see_must_beat_an_untrained_network():
    def verdict(**means):
        return claims.seeing(STUDY, "t", played(**means), DATA).verdict

    assert verdict(random=0.5) == "reproduced"
    assert verdict(random=0.5, moco=0.5) == "not separated"
    assert verdict(random=0.8) == "contradicted"
    # One that loses contradicts it; one that loses at some seeds does not.
    assert verdict(random=0.5, moco=0.4) == "contradicted"
    assert verdict(random=0.5, moco=(0.2, 0.4, 0.6)) == "not separated"
    assert claims.seeing(replace(STUDY, judged=False), "t", played(), DATA).verdict == "recorded"


def test_gains_at_one_seed_and_losses_at_the_others_separate_nothing_however_many_episodes_agree():
    means = {"random": (0.30, 0.50, 0.70), "byol": (0.75, 0.35, 0.55), "moco": (0.40, 0.80, 0.45)}
    found = claims.seeing(STUDY, "t", played(**means), DATA)
    assert found.verdict == "not separated"
    gains = {metric.name: metric.interval for metric in found.metrics}
    assert all(gains[f"{name} less random"][0] < 0 < gains[f"{name} less random"][1] for name in ("byol", "moco"))
    assert all(gains[f"{name} less random, over episodes"][0] > 0 for name in ("byol", "moco"))


def test_a_single_training_separates_nothing():
    study, found = replace(STUDY, seeds=(0,)), played(random=0.1)
    assert {claim(study, "t", found, DATA).verdict for claim in (claims.seeing, claims.drops, claims.cloning)} == {
        "not separated"
    }
    # A mean below the limit misses it all the same.
    assert claims.cloning(study, "t", played(seen=0.3), DATA).verdict == "missed"


def test_tables_are_by_representation_and_by_split_and_leave_out_what_was_not_played():
    found = played()
    # Trainings that end far from one another: no interval reaches beyond what a score can be.
    found |= {(("t", "random", "MTM", seed), "seen"): episodes(mean) for seed, mean in enumerate((0.0, 0.5, 1.0))}
    text = claims.table(STUDY, found)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    seen, splits = rows[: 2 + 7], rows[2 + 7 :]
    assert seen[0] == ["policy", "pca", "random", "byol", "moco", "end to end"]
    assert len(splits) == 2 + 7 + 2
    by_name = {row[0]: row[1:] for row in seen[2:]}
    assert by_name["VINN"][0].startswith("0.7")
    assert by_name["VINN"][4] == ""
    assert by_name["BC, H=1"][4].startswith("0.7")
    assert by_name["MTM"][1].endswith("[0.00, 1.00]")
    # One training tells of no interval.
    assert "[" not in claims.table(replace(STUDY, seeds=(0,)), found).partition("by what is new")[0]
    by_name = {row[0]: row[1:] for row in splits[2:]}
    assert all(row[0].startswith("0.7") for row in (by_name["VINN"], by_name["AT"]))
    assert all(row[1].startswith(("0.3", "0.4")) for row in (by_name["VINN"], by_name["AT"]))
    assert by_name["random actions"][0].startswith("0.0")


def test_every_policy_is_trained_on_every_representation_from_equally_many_steps():
    arms = list(kinds(STUDY, 2))
    grid = {(representation, name) for representation, name, _ in arms}
    assert len(grid) == len(arms) == 4 * 7 + 2
    assert {config.fit.seed for _, name, config in arms if name != "VINN"} == {2}
    chains = [config for *_, config in arms if isinstance(config, HindsightConfig)]
    assert {config.n_trials[1] * config.fit.batch_size for config in chains} == {16}
    cloned = [(name, config) for representation, name, config in arms if isinstance(config, CloningConfig)]
    assert {(name, config.chunk, config.execute) for name, config in cloned} == {
        ("BC, H=1", 1, 1),
        ("BC, H=50", 50, 50),
    }
    assert all(config.cameras == ("front",) for representation, _, config in arms if representation == OWN)
    assert list(PRESETS) == ["smoke", "tiny", "paper"]
    assert not smoke().judged


@pytest.mark.timeout(1200)
def test_smoke_runs_from_the_command_line_and_goes_on_from_its_folder(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFBOOK_CACHE", str(tmp_path / "cache"))
    outcome = cli(["reproduce", "toto", "--preset", "smoke", "--out", "run", "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)["claims"]
    assert len(found) == 10
    assert {claim["verdict"] for claim in found} == {"recorded"}
    assert Path("run/toto.png").stat().st_size > 20_000
    weights = {path: path.stat().st_mtime_ns for path in Path("run").rglob("last.safetensors")}
    words = ["reproduce", "toto", "--preset", "smoke", "--out", "run", "--resume"]
    assert json.loads(cli([*words, "--json"]).stdout)["claims"] == found
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    # People see the tables above the verdicts.
    shown = cli(words).stdout
    assert shown.startswith(Path("run/table.md").read_text())
    assert shown.count("| random actions |") == 2
    # Another study does not go on in this folder; what is damaged is named.
    other = cli([*words, "--seeds", "1"])
    assert other.exit_code == 2
    assert "seeds" in other.stderr
    broken = Path("run/toto-pour/byol/VINN-0/checkpoints/last.safetensors")
    broken.write_bytes(broken.read_bytes()[:1000])
    damaged = cli(words)
    assert damaged.exit_code != 0
    assert str(broken) in damaged.stderr
    assert "Traceback" not in damaged.stderr


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_study_that_is_interrupted_twice_ends_like_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(experiments, "evaluate_policy", partial(evaluate_policy, max_steps=10))
    study = replace(smoke(), tasks=("toto-pour",), representations=("random", "byol", "moco"), jobs=1)
    whole = run(study, RunDirectory.create(tmp_path / "whole", study))

    def interrupted(owner, name, call):
        """Stops at that call of a function."""
        right, calls = getattr(owner, name), []

        def stopping(*args, **settings):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return right(*args, **settings)

        folder = RunDirectory.create(tmp_path / "parts", study, resume=True)
        monkeypatch.setattr(owner, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            run(study, folder)
        monkeypatch.setattr(owner, name, right)

    interrupted(RunDirectory, "log", 20)  # in the midst of a training
    interrupted(experiments, "evaluate_policy", 5)
    assert run(study, RunDirectory.create(tmp_path / "parts", study, resume=True)) == whole
    for file in ("table.md", "toto-pour/byol/MTM-0/checkpoints/last.safetensors",
                 "toto-pour/end-to-end/BCH20-0/checkpoints/last.safetensors"):  # fmt: skip
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
