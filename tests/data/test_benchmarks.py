"""The benchmarks of the data layer, small: each side draws what it should, and each claim has figures."""

import importlib.util
import math
from pathlib import Path

import numpy as np

from offbook.data.formats import import_dataset
from offbook.runs.benchmark import Options

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name, monkeypatch, **sizes):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for size, value in sizes.items():
        monkeypatch.setattr(module, size, value)
    return module


def check(claims, system):
    for claim in claims:
        assert claim.system == system
        assert claim.verdict in ("met", "missed", "recorded")
        for metric in (*claim.metrics, *claim.baseline_metrics):
            assert math.isfinite(metric.value)
            assert metric.value > 0


def test_windows(monkeypatch, tmp_path):
    windows = load("windows", monkeypatch, EPISODES=3, STEPS=40, LENGTHS=(4,), BATCH=32, MINARI_BATCH=2)
    # TorchRL takes seconds to import.
    monkeypatch.setattr(windows, "find_spec", lambda name: None)
    claims = windows.run(Options(repeats=2))
    check(claims, "windows")
    assert {metric.name for metric in claims[0].metrics} == {"ours, T = 4", "share of the bound, T = 4"}
    store = windows.fill(tmp_path / "s", 0)
    known = np.lib.stride_tricks.sliding_window_view(store.field("action"), 4, axis=0).transpose(0, 2, 1)
    items = windows.item_by_item(store, 4, 0)()["action"].numpy()
    listed = windows.list_of_transitions(store, 4, 0)()[1]
    read = windows.minari(store, tmp_path / "minari", 4, 0)()[1]
    for found in (items, listed, read):
        assert found.shape[1:] == (4, 3)
        assert all((known == window).all(axis=(1, 2)).any() for window in found)


def test_chains(monkeypatch, tmp_path):
    chains = load("chains", monkeypatch, TASKS=2, TRIALS=4, STEPS=8, BATCH=64)
    claims = chains.run(Options(repeats=2))
    check(claims, "chains")
    assert [metric.unit for metric in claims[1].metrics] == ["chains/s", "GB/s", ""]
    # All four trials of one of two tasks: two chains, the same on both sides.
    store = chains.fill(tmp_path / "s", 0)
    mine, theirs = chains.ours(store, 0)(), chains.trial_by_trial(store, 0)()
    for name, values in mine.data.items():
        for row in values:
            assert min(np.abs(other.astype(float) - row).max() for other in theirs[name]) < 1e-5, name
    np.testing.assert_array_equal(mine.valid, theirs["valid"])
    np.testing.assert_array_equal(mine.step, theirs["step"])


def test_video(monkeypatch, tmp_path):
    video = load("video", monkeypatch, EPISODES=2, STEPS=20, SIZE=(32, 48), LENGTH=4, BATCH=2)
    check(video.run(Options(repeats=2)), "video")
    for store in video.stores(tmp_path, 0).values():
        np.testing.assert_array_equal(video.ours(store, 1)().reshape(-1, 32, 48, 3), video.frame_by_frame(store, 1)())


def test_import(monkeypatch, tmp_path):
    bench = load("import", monkeypatch, EPISODES=3, FILMED=2, STEPS=40, SIZE=32, BATCH=3)
    claims = bench.run(Options(repeats=2))
    check(claims, "import")
    assert [claim.data[0].name for claim in claims] == [*bench.WAYS]
    assert {claim.data[0].episodes for claim in claims} == {2, 3}
    # A plain load gives what the import keeps.
    for name, (write, plain, _) in bench.WAYS.items():
        write(bench.recorded(2, 0, camera=name == "lerobot"), tmp_path / name)
        store = import_dataset(f"{name}:{tmp_path}/{name}", tmp_path / f"store {name}")
        seen, done, earned = (np.concatenate(a) if isinstance(a, list) else a for a in plain(tmp_path / name))
        known = {row.tobytes() for row in done}
        assert all(row.tobytes() in known for row in np.asarray(store.field("action")))
        assert 80 <= len(done) == len(earned) <= len(seen) <= 82


def test_recording(monkeypatch):
    recording = load("recording", monkeypatch, EPISODE=5, TURNS=3, TICKS=4, HANDED=1, RATE=200.0, RESAMPLES=20)
    claims = recording.run(Options(repeats=2))
    check(claims[:1], "recording")
    assert [metric.n for metric in claims[0].metrics] == [3] * 4
    assert [metric.n for claim in claims[1:] for metric in (*claim.metrics, *claim.baseline_metrics)] == [3, 3, 12] * 2


def test_recording_judges_by_what_keeping_adds(monkeypatch):
    recording = load("recording", monkeypatch, RESAMPLES=200)
    nothing = np.random.default_rng(0).random((200, 20)) * 0.08
    small, large = (recording.excess("a", nothing + added, nothing, 0) for added in (0.002, 0.02))
    np.testing.assert_allclose([small.value, *small.interval], 0.002)
    other = recording.excess("a", np.random.default_rng(1).exponential(0.02, (200, 20)), nothing, 0)
    unsure = recording.excess("a", np.random.default_rng(1).exponential(0.0185, (200, 20)), nothing, 0)
    assert unsure.interval[0] < recording.LIMIT < unsure.interval[1]
    assert [recording.judged(found) for found in ([small], [small, large], [small, other], [small, unsure])] == [
        "met",
        "missed",
        "missed",
        "recorded",
    ]
