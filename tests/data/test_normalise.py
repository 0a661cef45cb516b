"""Normalisation: statistics of real steps alone, exact constants, exact storage."""

import json

import numpy as np
import pytest
from made import SCHEMA, values

from offbook.data.normalise import Normalizer
from offbook.data.store import EpisodeStore, FieldSpec, Schema
from offbook.errors import CheckpointError, DataError


def test_equals_numpy_on_the_real_steps(make_store):
    store = make_store([7, 1, 30, 4], without={3: "action"})
    chosen = np.array([0, 2, 3])
    normalizer = Normalizer.fit(store, ["joints", "action", "reward", "mode"], chosen)
    lengths = {0: 7, 2: 30, 3: 4}
    for name in ("joints", "action", "reward", "mode"):
        parts = [values(i, n)[name][:n] for i, n in lengths.items() if not (i == 3 and name == "action")]
        real = np.concatenate(parts).astype(np.float64)
        np.testing.assert_allclose(normalizer.mean[name], real.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(normalizer.std[name], real.std(axis=0), rtol=1e-12)


def test_large_offsets_do_not_cost_digits(tmp_path):
    schema = Schema((FieldSpec("x", "float64", (), "other"),))
    x = 1e8 + np.random.default_rng(0).normal(size=100_000)
    with EpisodeStore.create(tmp_path / "s", schema) as writer:
        writer.append({"x": x}, terminated=True, truncated=False)
    normalizer = Normalizer.fit(EpisodeStore.open(tmp_path / "s"), ["x"])
    # The floor of 1e-3 times the root mean square stands above the spread here.
    np.testing.assert_allclose(normalizer.std["x"], 1e5, rtol=1e-6)
    np.testing.assert_allclose(normalizer.mean["x"], x.mean(), rtol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_constant_comes_back_exactly_and_tells_nothing(tmp_path, dtype):
    schema = Schema((FieldSpec("x", dtype, (2,), "action"),))
    x = np.random.default_rng(0).normal(size=(37, 2)).astype(dtype)
    x[:, 1] = 0.1
    with EpisodeStore.create(tmp_path / "s", schema) as writer:
        writer.append({"x": x}, terminated=True, truncated=False)
    normalizer = Normalizer.fit(EpisodeStore.open(tmp_path / "s"), ["x"])
    assert normalizer.std["x"][1] == 0
    encoded = normalizer.encode("x", x)
    assert encoded.dtype == np.float32
    assert (normalizer.encode("x", 1e9 * x)[:, 1] == 0).all()
    # Whatever a network says in its place.
    assert (normalizer.decode("x", encoded + 7)[:, 1].astype(dtype) == x[:, 1]).all()


def test_all_zero_fields_are_harmless(tmp_path):
    schema = Schema((FieldSpec("x", "float32", (2,), "action"),))
    with EpisodeStore.create(tmp_path / "s", schema) as writer:
        writer.append({"x": np.zeros((3, 2), np.float32)}, terminated=True, truncated=False)
    normalizer = Normalizer.fit(EpisodeStore.open(tmp_path / "s"), ["x"])
    assert np.isfinite(normalizer.encode("x", np.ones((1, 2), np.float32))).all()


def test_decode_is_the_inverse_of_encode(make_store):
    normalizer = Normalizer.fit(make_store([50]), ["joints"])
    joints = values(0, 50)["joints"]
    np.testing.assert_allclose(normalizer.decode("joints", normalizer.encode("joints", joints)), joints, atol=1e-5)
    encoded = normalizer.encode("joints", joints[:-1])
    np.testing.assert_allclose(encoded.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(encoded.std(axis=0), 1, atol=1e-6)


def test_comes_back_from_json_bit_for_bit(make_store):
    normalizer = Normalizer.fit(make_store([9]), ["joints", "reward"])
    again = Normalizer.from_json(json.loads(json.dumps(normalizer.to_json())))
    for name in ("joints", "reward"):
        assert again.mean[name].tobytes() == normalizer.mean[name].tobytes()
        assert again.std[name].tobytes() == normalizer.std[name].tobytes()
        assert again.mean[name].shape == normalizer.mean[name].shape


@pytest.mark.parametrize(
    "record",
    [
        {"x": {"mean": [0.0], "std": [-1.0]}},
        {"x": {"mean": [0.0, 1.0], "std": [1.0]}},
        {"x": {"mean": [float("nan")], "std": [1.0]}},
        {"x": {"mean": [0.0]}},
        {"x": 3},
    ],
)
def test_strange_statistics_are_refused(record):
    with pytest.raises(CheckpointError, match="normalisation"):
        Normalizer.from_json(record)


def test_nan_is_named_by_episode_and_step(tmp_path):
    with EpisodeStore.create(tmp_path / "s", SCHEMA) as writer:
        for i in range(3):
            fields = values(i, 5)
            if i == 1:
                fields["joints"][3, 0] = np.inf
            writer.append(fields, terminated=True, truncated=False)
    store = EpisodeStore.open(tmp_path / "s")
    with pytest.raises(DataError, match="field 'joints', episode 1, step 3: expected finite"):
        Normalizer.fit(store, ["joints"])
    Normalizer.fit(store, ["joints"], np.array([0, 2]))


def test_nothing_to_fit_is_refused(make_store):
    store = make_store([4, 4], without={0: "action", 1: "action"})
    with pytest.raises(DataError, match="expected steps"):
        Normalizer.fit(store, ["action"])
    with pytest.raises(DataError, match="was not fitted"):
        Normalizer.fit(store, ["joints"]).encode("action", np.zeros((1, 2), np.float32))
