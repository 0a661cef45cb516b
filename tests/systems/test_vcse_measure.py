"""`offbook explore` and the benchmark of bonuses, small: what is right passes, what is wrong is told."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from offbook.errors import OffbookError
from offbook.models.knn import count_values_within, joint_nearest
from offbook.runs.benchmark import Options
from offbook.systems.vcse import measure


def test_check_compares_with_the_closed_form(cli):
    code, out, _ = cli(["explore", "check", "--json"])
    found = json.loads(out)["estimates"]
    assert code == 0
    assert [round(one["true"], 3) for one in found[:2]] == [1.419, 1.196]
    assert len(found) == 6
    assert all(0 < one["off"] < 0.06 for one in found)
    # In five dimensions few samples are too far apart.
    code, out, _ = cli(["explore", "check", "--dim", "5", "--rho", "0.9", "--n", "200"])
    assert code == 1
    assert "1 of 1 are off by more than 0.06" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "--dim", "1;2"], "--dim: expected numbers with commas between them, got '1;2'"),
        (["check", "--rho", "1"], "--rho: expected above -1 and below 1"),
        (["check", "--n", "4"], "k: expected 1 to 3 of 4 points, got k = 5"),
        (["bench", "--points", "12"], "--points: expected more than k = 12"),
        (["check", "--n", "-1"], "--n: expected 2 or more, got -1"),
        (["bench", "--k", "1"], "--k: expected 2 or more, got 1"),
        (["bench", "--large", "-5"], "--large: expected 0 or more, got -5"),
    ],
)
def test_wrong_flags_are_told_in_a_sentence(cli, words, said):
    code, _, err = cli(["explore", *words])
    assert code == 2
    assert said in err


def test_bench_measures_what_agrees(cli, monkeypatch):
    monkeypatch.setattr(measure, "_TOO_MUCH", 4 * 100**2 * 8)
    code, out, _ = cli(["explore", "bench", "--points", "64,128", "--size", "8", "--large", "0", "--json"])
    first, second = json.loads(out)["batches"]
    assert code == 0
    assert set(first["ratios"]) == {"cdist", "published"}
    assert set(second["ratios"]) == {"cdist"}
    assert all(spent > 0 for spent in first["milliseconds"].values())
    monkeypatch.setattr(measure, "all_pairs", lambda states, values, k: torch.zeros(len(states)))
    with pytest.raises(OffbookError, match="bonuses by 'cdist' and by ours: expected the same numbers, got 64 of 64"):
        measure.seconds(64, 8, 3, repeats=1, seed=0)


def test_bench_lets_rounding_decide_over_one_value(monkeypatch):
    ours, spoilt = measure.value_conditional_state_entropy, 1

    def other(states, values, k):
        paid = ours(states, values, k, compat="official")
        within = count_values_within(values, joint_nearest(states, values, k - 1).distance[:, -1])[:spoilt]
        paid[:spoilt] += torch.digamma(within + 3.0) - torch.digamma(within + 2.0)
        return paid

    monkeypatch.setattr(measure, "all_pairs", other)
    monkeypatch.setattr(measure, "_TOO_MUCH", 0)
    assert len(measure.seconds(64, 1, 3, repeats=1, seed=0)["cdist"]) == 1
    spoilt = 2
    with pytest.raises(OffbookError, match="got 2 of 64 that differ"):
        measure.seconds(64, 1, 3, repeats=1, seed=0)


def test_the_benchmark_has_its_claims(monkeypatch):
    path = Path(__file__).parents[2] / "benchmarks" / "exploration.py"
    spec = importlib.util.spec_from_file_location("benchmark_exploration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"SIDES": (("published", 64, 1.0), ("cdist", 65, 1e9)), "LARGE": 3_000, "ROLLOUTS": 1, "AGENTS": 2}
    for name, value in (sizes | {"SAMPLES": 256}).items():
        monkeypatch.setattr(module, name, value)
    accuracy, published, cdist, memory, training = module.run(Options(repeats=2))
    assert accuracy.seeds == (0, 1)
    assert (accuracy.verdict == "met") == (accuracy.metrics[0].value <= measure.TOLERANCE)
    assert accuracy.metrics[0].value >= accuracy.metrics[1].value > 0
    assert cdist.verdict == "missed"
    assert memory.verdict == "met"
    assert 1e7 < memory.metrics[0].value < 1.5e9
    assert training.metrics[0].value > -0.5
    for claim in (accuracy, published, cdist, memory, training):
        assert claim.system == "exploration"
        assert all(math.isfinite(metric.value) for metric in (*claim.metrics, *claim.baseline_metrics))
