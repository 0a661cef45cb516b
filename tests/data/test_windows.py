"""Windows: inside one episode, all reachable, padded as said, and a function of seed and step alone."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import values

from offbook.data.normalise import Normalizer
from offbook.data.returns import ReturnSpec, returns_to_go
from offbook.data.store import EpisodeStore, FieldSpec, Schema
from offbook.data.windows import WindowSampler
from offbook.errors import ConfigError, DataError

COUNTER = Schema(
    (
        FieldSpec("code", "float32", (2,), "observation"),
        FieldSpec("action", "int64", (), "action"),
        FieldSpec("reward", "float32", (), "reward"),
    )
)


def counting_store(path, lengths):
    """Each step carries its episode and its place in it, from 1 on, so that zero can only be padding."""
    with EpisodeStore.create(path, COUNTER) as writer:
        for i, length in enumerate(lengths):
            steps = np.arange(1, length + 2, dtype=np.float32)
            code = np.stack([np.full_like(steps, i + 1), steps], axis=1)
            fields = {"code": code, "action": np.arange(1, length + 1), "reward": np.full(length, i, np.float32)}
            writer.append(fields, terminated=True, truncated=False, sync=False)
    return EpisodeStore.open(path)


def expected_windows(lengths, length, stride, pad):
    """Episode and first step of every window, by the definition."""
    found = []
    for episode, steps in enumerate(lengths):
        if pad == "drop":
            found += [(episode, first) for first in range(0, steps - length + 1, stride)]
        elif pad == "right":
            found += [(episode, first) for first in range(0, steps, stride)]
        else:
            found += [(episode, last - length + 1) for last in range(0, steps, stride)]
    return found


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    length=st.integers(1, 8),
    stride=st.integers(1, 4),
    pad=st.sampled_from(("drop", "left", "right")),
    weight=st.sampled_from(("window", "episode", "return")),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_windows_are_those_of_the_definition(tmp_path_factory, lengths, length, stride, pad, weight):
    store = counting_store(tmp_path_factory.mktemp("w") / "s", lengths)
    expected = expected_windows(lengths, length, stride, pad)
    fields = ["action", "code"]
    if not expected:
        with pytest.raises(DataError, match=f"the longest of {max(lengths)} steps"):
            WindowSampler(store, fields, length=length, stride=stride, pad=pad)
        return
    sampler = WindowSampler(store, fields, length=length, stride=stride, pad=pad, weight=weight)
    assert len(sampler) == len(expected)
    assert sampler.dropped == len(lengths) - len({episode for episode, _ in expected})
    windows = sampler.at(np.arange(len(sampler)))
    assert list(zip(windows.episode.tolist(), windows.start.tolist(), strict=True)) == expected
    steps = windows.start[:, None] + np.arange(length)
    inside = (steps >= 0) & (steps < np.array(lengths)[windows.episode][:, None])
    np.testing.assert_array_equal(windows.valid, inside)
    np.testing.assert_array_equal(windows.data["code"][..., 0], np.where(inside, windows.episode[:, None] + 1, 0))
    np.testing.assert_array_equal(windows.data["code"][..., 1], np.where(inside, steps + 1, 0))
    np.testing.assert_array_equal(windows.data["action"], np.where(inside, steps + 1, 0))
    # A thousand draws: only windows of the definition, and each of these few when they have equal chances.
    drawn = sampler.sample(1000, 0)
    pairs = set(zip(drawn.episode.tolist(), drawn.start.tolist(), strict=True))
    assert pairs <= set(expected)
    if weight == "window":
        assert pairs == set(expected)


@pytest.mark.parametrize("weight", ["window", "episode"])
@pytest.mark.parametrize("pad", ["drop", "left", "right"])
def test_episodes_are_cut_where_a_step_is_not_finite(tmp_path, pad, weight):
    # Episode 0 is whole, 1 has holes at steps 0, 4 and 5, 2 nothing but holes.
    holes = {1: [0, 4, 5], 2: [0, 1, 2]}
    with EpisodeStore.create(tmp_path / "s", COUNTER) as writer:
        for i, length in enumerate([6, 10, 3]):
            steps = np.arange(1, length + 2, dtype=np.float32)
            code = np.stack([np.full_like(steps, i + 1), steps], axis=1)
            code[holes.get(i, []), 1] = [np.nan, np.inf, -np.inf][: len(holes.get(i, []))]
            fields = {"code": code, "action": np.arange(1, length + 1), "reward": np.full(length, i, np.float32)}
            writer.append(fields, terminated=True, truncated=False, sync=False)
    store = EpisodeStore.open(tmp_path / "s")
    whole = WindowSampler(store, ["code", "action"], length=3, pad=pad, weight=weight)
    sampler = WindowSampler(store, ["code", "action"], length=3, pad=pad, weight=weight, on_nan="drop")
    # Stretches of 6, 3 and 4 steps; the two of episode 1 begin at its steps 1 and 6.
    expected = [(0, 0, t) for t in range(6)] + [(1, 1, t) for t in range(3)] + [(1, 6, t) for t in range(4)]
    lengths = {(0, 0): 6, (1, 1): 3, (1, 6): 4}
    if pad == "drop":
        expected = [(e, first, t) for e, first, t in expected if t + 3 <= lengths[e, first]]
    shift = 2 if pad == "left" else 0
    windows = sampler.at(np.arange(len(sampler)))
    assert list(zip(windows.episode, windows.start, strict=True)) == [(e, f + t - shift) for e, f, t in expected]
    assert (sampler.dropped, sampler.dropped_windows) == (1, len(whole) - len(sampler))
    assert np.isfinite(windows.data["code"]).all()
    for row, (episode, first, t) in enumerate(expected):
        steps = np.arange(t - shift, t - shift + 3)
        real = (steps >= 0) & (steps < lengths[episode, first])
        np.testing.assert_array_equal(windows.valid[row], real)
        np.testing.assert_array_equal(windows.data["code"][row, :, 1], np.where(real, first + steps + 1, 0))
        np.testing.assert_array_equal(windows.data["action"][row], np.where(real, first + steps + 1, 0))
    drawn = sampler.sample(8000, 0)
    first = 1 / 2 if weight == "episode" else sum(e == 0 for e, *_ in expected) / len(expected)
    assert abs((drawn.episode == 0).mean() - first) < 0.03


def test_no_return_to_go_is_drawn_that_holds_nan(tmp_path):
    with EpisodeStore.create(tmp_path / "s", COUNTER) as writer:
        for rewards in ([1, 1, np.nan, 1, 1, 1], [1, 1, 1]):
            steps = np.arange(len(rewards) + 1, dtype=np.float32)
            fields = {"code": np.stack([steps, steps], axis=1), "action": np.arange(len(rewards))}
            fields["reward"] = np.array(rewards, np.float32)
            writer.append(fields, terminated=True, truncated=False)
    sampler = WindowSampler(EpisodeStore.open(tmp_path / "s"), ["code"], length=2, on_nan="drop", returns=ReturnSpec())
    windows = sampler.at(np.arange(len(sampler)))
    assert list(zip(windows.episode, windows.start, strict=True)) == [(0, 3), (0, 4), (1, 0), (1, 1)]
    assert windows.data["return_to_go"].tolist() == [[3, 2], [2, 1], [3, 2], [2, 1]]
    assert sampler.dropped_windows == 3


def test_weights_are_as_said(tmp_path):
    store = counting_store(tmp_path / "s", [10, 1, 4])  # returns 0, 1, 8
    counts = {}
    for weight in ("window", "episode", "return"):
        sampler = WindowSampler(store, ["code"], length=1, weight=weight, seed=1)
        counts[weight] = np.bincount(sampler.sample(20_000, 0).episode, minlength=3) / 20_000
    np.testing.assert_allclose(counts["window"], [10 / 15, 1 / 15, 4 / 15], atol=0.015)
    np.testing.assert_allclose(counts["episode"], [1 / 3] * 3, atol=0.015)
    weights = np.array([10 * 0.01, 0.01 + 1 / 8, 4 * 1.01])
    np.testing.assert_allclose(counts["return"], weights / weights.sum(), atol=0.015)


def fingerprint(path):
    sampler = WindowSampler(EpisodeStore.open(path), ["joints", "front", "action"], length=3, pad="left", seed=9)
    windows = sampler.sample(17, 4)
    parts = [*windows.data.values(), windows.valid, windows.episode, windows.start]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_equal_seed_and_step_give_equal_windows_in_another_process(make_store):
    store = make_store([5, 9, 2])
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_windows; print(test_windows.fingerprint(sys.argv[2]))"
    )
    folder = __file__.rpartition("/")[0]
    other = subprocess.run(
        [sys.executable, "-c", script, folder, store.path], capture_output=True, text=True, check=True, timeout=60
    )
    assert other.stdout.strip() == fingerprint(store.path)


def test_steps_and_seeds_give_different_windows(make_store):
    store = make_store([50, 90])
    draw = {
        (seed, step): WindowSampler(store, ["action"], length=2, seed=seed).sample(8, step).start.tolist()
        for seed in (0, 1)
        for step in (0, 1)
    }
    assert len({tuple(start) for start in draw.values()}) == 4


def test_values_keep_their_shapes_and_floats_become_float32(make_store):
    store = make_store([5, 9])
    windows = WindowSampler(store, ["front", "joints", "reward", "mode"], length=4).sample(6, 0)
    assert {name: (part.dtype.name, part.shape) for name, part in windows.data.items()} == {
        "front": ("uint8", (6, 4, 16, 16, 3)),
        "joints": ("float32", (6, 4, 3)),
        "reward": ("float32", (6, 4)),
        "mode": ("int32", (6, 4)),
    }
    for row in range(6):
        source = values(int(windows.episode[row]), [5, 9][windows.episode[row]])
        part = slice(int(windows.start[row]), int(windows.start[row]) + 4)
        np.testing.assert_array_equal(windows.data["front"][row], source["front"][part])
        np.testing.assert_array_equal(windows.data["joints"][row], source["joints"][part].astype(np.float32))
        np.testing.assert_array_equal(windows.data["mode"][row], source["mode"][part])


def test_batches_are_the_callers_own(make_store):
    sampler = WindowSampler(make_store([5, 9]), ["joints"], length=2)
    first = sampler.sample(4, 0)
    kept = first.data["joints"].copy()
    first.data["joints"][:] = 7
    np.testing.assert_array_equal(sampler.sample(4, 0).data["joints"], kept)


def test_an_absent_field_is_flagged_and_zero(make_store):
    store = make_store([4, 6, 4], without={1: "action", 2: "front"})
    windows = WindowSampler(store, ["action", "front", "joints"], length=2).sample(64, 0)
    assert set(windows.episode.tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(windows.present["action"], windows.episode != 1)
    np.testing.assert_array_equal(windows.present["front"], windows.episode != 2)
    assert windows.present["joints"].all()
    for name in ("action", "front"):
        assert not windows.data[name][~windows.present[name]].any()
        assert windows.data[name][windows.present[name]].any()


def test_only_the_chosen_episodes_are_drawn_and_normalised(make_store):
    store = make_store([6, 3, 8, 5], without={3: "joints"})
    chosen = np.array([3, 0, 2])
    normalizer = Normalizer.fit(store, ["joints"], np.array([0, 2]))
    sampler = WindowSampler(store, ["joints", "action"], length=3, episodes=chosen, normalizer=normalizer)
    windows = sampler.at(np.arange(len(sampler)))
    assert sorted(set(windows.episode.tolist())) == [0, 2, 3]
    for row, episode in enumerate(windows.episode.tolist()):
        part = slice(int(windows.start[row]), int(windows.start[row]) + 3)
        source = values(episode, [6, 3, 8, 5][episode])
        joints = np.zeros((3, 3)) if episode == 3 else normalizer.encode("joints", source["joints"][part])
        np.testing.assert_array_equal(windows.data["joints"][row], joints)
        np.testing.assert_array_equal(windows.data["action"][row], source["action"][part])


def test_returns_to_go_ride_along(make_store):
    store = make_store([6, 3, 8])
    spec = ReturnSpec(gamma=0.9)
    sampler = WindowSampler(store, ["reward"], length=3, pad="right", returns=spec, episodes=np.array([0, 2]))
    windows = sampler.at(np.arange(len(sampler)))
    columns = store.episodes
    full = returns_to_go(store.field("reward"), columns["start"], columns["length"], spec)
    rows = columns["start"][windows.episode][:, None] + windows.start[:, None] + np.arange(3)
    expected = np.where(windows.valid, full[np.minimum(rows, store.steps - 1)], 0)
    np.testing.assert_allclose(windows.data["return_to_go"], expected, rtol=1e-6)
    assert list(windows.data) == ["reward", "return_to_go"]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"length": 0}, ConfigError, "1 or more"),
        ({"stride": 0}, ConfigError, "1 or more"),
        ({"length": 10}, DataError, "the longest of 9 steps"),
        ({"fields": ["joint"]}, DataError, "joint"),
        ({"episodes": np.array([], np.int64)}, DataError, "0 episodes"),
    ],
)
def test_wrong_settings_are_explained(make_store, settings, error, words):
    arguments = {"fields": ["joints"], "length": 2, **settings}
    fields = arguments.pop("fields")
    with pytest.raises(error, match=words):
        WindowSampler(make_store([5, 9]), fields, **arguments)


@pytest.mark.parametrize(
    ("setting", "words"), [("pad", "drop or left or right"), ("weight", "window or episode or return")]
)
def test_unknown_choices_are_explained(make_store, setting, words):
    # In another process, for the type checker of the tests would object first.
    script = f"""
import sys
from offbook.data.store import EpisodeStore
from offbook.data.windows import WindowSampler
WindowSampler(EpisodeStore.open(sys.argv[1]), ["joints"], length=2, {setting}="both")
"""
    run = subprocess.run(
        [sys.executable, "-c", script, make_store([5]).path], capture_output=True, text=True, check=False, timeout=60
    )
    assert f"ConfigError: {setting}: expected {words}, got 'both'" in run.stderr


def test_returns_without_rewards_are_refused(tmp_path):
    schema = Schema(COUNTER.fields[:2])
    with EpisodeStore.create(tmp_path / "s", schema) as writer:
        fields = {"code": np.zeros((4, 2), np.float32), "action": np.arange(3)}
        writer.append(fields, terminated=True, truncated=False)
    store = EpisodeStore.open(tmp_path / "s")
    with pytest.raises(DataError, match="expected rewards"):
        WindowSampler(store, ["code"], length=2, returns=ReturnSpec())
    with pytest.raises(DataError, match="a finite return"):
        WindowSampler(store, ["code"], length=2, weight="return")


def test_a_window_beyond_the_last_is_refused(make_store):
    sampler = WindowSampler(make_store([5]), ["joints"], length=2)
    with pytest.raises(ConfigError, match=r"expected 0 to 3, got 4"):
        sampler.at(np.array([0, 4]))
