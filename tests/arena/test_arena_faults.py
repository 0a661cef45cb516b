"""Whole processes are killed while trials run; what the arena promised is compared with what happened."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [pytest.mark.service, pytest.mark.faults]


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "scheduler.py"
    spec = importlib.util.spec_from_file_location("benchmark_scheduler", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_killed_workers_and_a_killed_server_lose_nothing(harness: ModuleType, tmp_path: Path) -> None:
    plan = harness.Plan(
        trials=8, workers=2, kill_every=1.5, kills=2, pause=0, server_kills=1, lease_seconds=6.0,
        watchdog_seconds=5.0, fault_cap=50, deadline=150.0,
    )  # fmt: skip
    history = harness.soak(tmp_path, plan)
    assert history.violations == []
    assert dict(history.states) == {"done": 8}
    assert (history.results, history.killed_servers) == (8, 1)
    assert history.attempts - history.results == history.faults
    assert history.killed_workers == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_trials_under_fire(harness: ModuleType, tmp_path: Path) -> None:
    history = harness.soak(tmp_path, harness.Plan())
    assert history.violations == []
    assert dict(history.states) == {"done": 200}
    assert history.killed_workers > 5
    assert history.faults > 0
