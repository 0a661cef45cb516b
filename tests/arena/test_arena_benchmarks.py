"""The benchmarks of the arena, small: they measure what they say and judge it by their limits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from offbook.runs.benchmark import Options

pytestmark = pytest.mark.service

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_relay_is_measured_beside_the_straight_way(monkeypatch) -> None:
    relay = load("arena_relay")
    found = relay.measure(relay.Plan(streams=2, seconds=2.0, turns=2))
    assert len(found["relay"]) == len(found["direct"]) == 2 * 60
    # A busy machine may miss many; that nothing comes back would be another matter.
    assert all(value > 0 for value in (*found["relay"], *found["direct"]))
    assert sorted(found["relay"])[20] < 1000
    assert found["cpu"] > 0
    for late, straight, verdict in ((0, 16.0, "met"), (2, 16.0, "missed"), (0, 9.0, "missed")):
        values = [20.0] * (300 - late) + [40.0] * late
        made = {"relay": values, "direct": [straight] * 300, "cpu": 0.2 if late else 1.2}
        monkeypatch.setattr(relay, "measure", lambda plan, made=made: made)
        claim, many = relay.run(Options())
        assert (claim.verdict, many.verdict) == (verdict, "met" if late else "missed")
        assert claim.metrics[2].value == 20.0 - straight


def test_the_pages_of_a_filled_arena_are_measured(monkeypatch) -> None:
    pages = load("arena_pages")
    found = pages.measure(pages.Plan(users=20, submissions=200, trials=2, requests=2, rounds=2), seed=0)
    leases = found.pop("leases")
    assert (len(leases["ms"]), leases["rate"] > 0) == (2 * pages.WORKERS, True)
    assert set(found) == {"leaderboard", "queue", "submission", "first"}
    assert all(len(page["ms"]) == 2 and min(page["ms"]) > 0 and page["bytes"] > 500 for page in found.values())
    for ms, verdict in ((100.0, "met"), (200.0, "missed")):
        made = {name: {"ms": [ms] * 10, "bytes": 1000} for name in pages.PAGES}
        made["leases"] = {"ms": [ms], "rate": 15_000 / ms}
        monkeypatch.setattr(pages, "measure", lambda plan, seed, made=made: made)
        claim, leases = pages.run(Options())
        assert (claim.verdict, leases.verdict) == (verdict, verdict)
        assert claim.metrics[0].interval == (ms, ms)
