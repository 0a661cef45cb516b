"""The benchmark of ratings, small: both sides fit the same, and each claim has figures."""

import importlib.util
import math
from pathlib import Path

import numpy as np

from offbook.runs.benchmark import Options


def load(monkeypatch, **sizes):
    path = Path(__file__).parents[2] / "benchmarks" / "rating.py"
    spec = importlib.util.spec_from_file_location("benchmark_rating", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for size, value in sizes.items():
        monkeypatch.setattr(module, size, value)
    return module


def test_both_sides_fit_the_same_and_every_claim_has_figures(monkeypatch):
    sizes = {"SYSTEMS": 8, "VOTES": 600, "RATERS": 6, "REFITS": {"ours": 8, "one at a time": 4}}
    rating = load(monkeypatch, TOURNAMENTS=12, POOL=20_000, **sizes)
    data = rating.tournament(np.random.default_rng(0), 8, 600)
    sides = rating.refits(data, 0)
    np.testing.assert_allclose(sides["ours"]()[:, :4], sides["one at a time"](), atol=0.01)
    claims = rating.run(Options(repeats=2))
    assert [claim.system for claim in claims] == ["rating"] * 4
    for claim in claims:
        assert claim.verdict in ("met", "missed")
        assert all(math.isfinite(metric.value) for metric in (*claim.metrics, *claim.baseline_metrics))
    assert claims[2].verdict == "met"
    assert 0.5 < claims[3].metrics[0].value <= 1
