"""Packs: kept in the store's folder when they are large, right however they came about, and never in the way."""

import os

import numpy as np
import pytest

from offbook.data import pack
from offbook.data.normalise import Normalizer
from offbook.data.pack import RETURN_TO_GO, Pack
from offbook.data.returns import ReturnSpec, returns_to_go
from offbook.data.store import EpisodeStore
from offbook.data.windows import WindowSampler

LENGTHS = [6, 3, 8, 5]


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(pack, "_KEPT_BYTES", 0)


def files(store):
    return sorted(path.name for path in (store.path / "cache").glob("*"))


def test_a_pack_is_what_the_fields_say(make_store):
    store = make_store(LENGTHS, without={2: "joints"})
    normalizer = Normalizer.fit(store, ["joints"])
    spec = ReturnSpec(gamma=0.5)
    chosen = np.array([0, 2, 3])
    made = Pack(store, ["action", "joints"], chosen, returns=spec, normalizer=normalizer)
    assert made.rows.shape == (6 + 8 + 5, 8)
    assert list(made.columns) == ["action", "joints", RETURN_TO_GO]
    columns, to = store.episodes, 0
    full = returns_to_go(store.field("reward"), columns["start"], columns["length"], spec)
    for episode in chosen.tolist():
        first, length = columns["start"][episode], LENGTHS[episode]
        part = {name: made.rows[to : to + length, where] for name, where in made.columns.items()}
        np.testing.assert_array_equal(part["action"], store.field("action")[first : first + length])
        joints = normalizer.encode("joints", store.field("joints")[first : first + length])
        np.testing.assert_array_equal(part["joints"], 0 * joints if episode == 2 else joints)
        np.testing.assert_allclose(part[RETURN_TO_GO][:, 0], full[first : first + length], rtol=1e-6)
        to += length
    assert not files(store)


def test_large_packs_are_kept_and_read_again(make_store, kept, monkeypatch):
    store = make_store(LENGTHS)
    first = Pack(store, ["joints"], np.arange(4)).rows
    names = files(store)
    assert len(names) == 1
    monkeypatch.setattr(Pack, "_fill", None)
    np.testing.assert_array_equal(Pack(store, ["joints"], np.arange(4)).rows, first)
    assert files(store) == names


def test_all_that_a_pack_depends_on_is_in_its_name(make_store, kept):
    store = make_store(LENGTHS)
    for chosen, settings in (
        (np.arange(4), {}),
        (np.arange(3), {}),
        (np.arange(4), {"returns": ReturnSpec()}),
        (np.arange(4), {"normalizer": Normalizer.fit(store, ["joints"])}),
    ):
        before = set(files(store))
        kept_rows = Pack(store, ["joints"], chosen, **settings).rows
        assert len(set(files(store)) - before) == 1
        assert kept_rows.flags.writeable is False
    with EpisodeStore.append_to(store.path) as writer:
        from made import values

        writer.append(values(9, 4), terminated=True, truncated=False)
    names = files(store)
    os.utime(store.path / "cache" / names[0], (1, 1))
    assert len(Pack(EpisodeStore.open(store.path), ["joints"], np.arange(5)).rows) == 26
    assert len(files(store)) == 4, "the oldest is forgotten"
    assert names[0] not in files(store)


@pytest.mark.faults
def test_where_nothing_can_be_kept_packs_are_made_in_memory(make_store, kept):
    store = make_store(LENGTHS)
    (store.path / "cache").write_text("in the way")
    rows = Pack(store, ["joints"], np.arange(4)).rows
    assert rows.flags.writeable
    np.testing.assert_array_equal(rows[:, :3], store.field("joints").astype(np.float32))


@pytest.mark.faults
def test_a_damaged_pack_is_not_used(make_store, kept):
    store = make_store(LENGTHS)
    rows = np.array(Pack(store, ["joints"], np.arange(4)).rows)
    file = store.path / "cache" / files(store)[0]
    file.write_bytes(file.read_bytes()[:-50])
    np.testing.assert_array_equal(Pack(store, ["joints"], np.arange(4)).rows, rows)


def test_windows_are_the_same_from_kept_packs(make_store, monkeypatch):
    store = make_store(LENGTHS)
    settings = {"length": 3, "pad": "left", "weight": "episode", "returns": ReturnSpec()}
    plain = WindowSampler(store, ["joints", "front", "reward"], **settings).sample(32, 5)
    monkeypatch.setattr(pack, "_KEPT_BYTES", 0)
    kept = WindowSampler(store, ["joints", "front", "reward"], **settings).sample(32, 5)
    for name, values in plain.data.items():
        np.testing.assert_array_equal(kept.data[name], values)
