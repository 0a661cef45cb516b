"""The episode store: what goes in comes out, one digest however it was written, and clear refusals."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from math import isnan, nan
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import SCHEMA, values

from offbook.client.protocol import ActionSpec
from offbook.data.store import EpisodeStore, FieldSpec, Schema
from offbook.errors import DataError
from offbook.runs.benchmark import timed

DTYPES = ("bool", "int8", "uint8", "int64", "uint32", "float16", "float32", "float64")


FIELD = st.tuples(
    st.sampled_from(["joints", "a/b", "weird name é", "..", "x.y"]),
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 3), max_size=3).map(tuple),
    st.sampled_from(("observation", "action", "other")),
)


def draw_values(schema, length, random):
    fields = {}
    for spec in schema.fields:
        shape = (length + (spec.role == "observation"), *spec.shape)
        raw = random.bytes(int(np.prod(shape)) * np.dtype(spec.dtype).itemsize)
        array = np.frombuffer(raw, spec.dtype).reshape(shape)
        fields[spec.name] = array % 2 == 0 if spec.dtype == "bool" else array
    return fields


@given(
    fields=st.lists(FIELD, min_size=1, unique_by=lambda field: field[0]),
    lengths=st.lists(st.integers(1, 9), max_size=6),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_goes_in_comes_out_bit_for_bit(fields, lengths, seed):
    schema = Schema(tuple(FieldSpec(*field) for field in fields))
    random = np.random.default_rng(seed)
    episodes = [draw_values(schema, length, random) for length in lengths]
    with TemporaryDirectory() as folder:
        with EpisodeStore.create(f"{folder}/s", schema) as writer:
            for fields in episodes:
                writer.append(fields, terminated=False, truncated=True, sync=False)
        store = EpisodeStore.open(f"{folder}/s")
        store.verify()
        assert store.schema == schema
        assert (len(store), store.steps) == (len(lengths), sum(lengths))
        assert store.episodes["length"].tolist() == lengths
        for i, fields in enumerate(episodes):
            back = store.episode(i).fields
            for spec in schema.fields:
                # Bytes, because random floats are NaN now and then.
                assert back[spec.name].dtype == np.dtype(spec.dtype)
                assert back[spec.name].shape == fields[spec.name].shape
                assert back[spec.name].tobytes() == fields[spec.name].tobytes()
        for spec in schema.fields:
            assert store.field(spec.name).shape == (store.steps, *spec.shape)


def test_outcomes_come_back(tmp_path):
    said = [
        {
            "terminated": True,
            "truncated": False,
            "task": "pour",
            "source": "expert",
            "seed": 2**64 - 1,
            "success": True,
        },
        {"terminated": False, "truncated": True, "success": False, "score": 0.1},
        {"terminated": np.bool_(True), "truncated": np.bool_(True), "seed": np.int64(5), "score": nan},
    ]
    with EpisodeStore.create(tmp_path / "s", SCHEMA) as writer:
        for i, outcome in enumerate(said):
            assert writer.append(values(i, 4 + i), **outcome) == i
    store = EpisodeStore.open(tmp_path / "s")
    columns = store.episodes
    assert columns["terminated"].tolist() == [True, False, True]
    assert columns["truncated"].tolist() == [False, True, True]
    assert columns["task"].tolist() == ["pour", "", ""]
    assert columns["seed"].tolist() == [2**64 - 1, None, 5]
    assert columns["success"][:2].tolist() == [1.0, 0.0]
    assert isnan(columns["success"][2])
    assert columns["score"][1] == 0.1
    assert columns["start"].tolist() == [0, 4, 9]
    np.testing.assert_allclose(columns["return"], [values(i, 4 + i)["reward"].sum() for i in range(3)], rtol=1e-14)
    first, second = store.episode(0), store.episode(1)
    assert (first.success, first.seed, first.source) == (True, 2**64 - 1, "expert")
    assert (second.success, second.seed, second.score, second.length) == (False, None, 0.1, 5)


def test_files_are_ordinary_npy_files_after_closing(make_store):
    store = make_store([5, 3])
    loaded = np.load(store.path / "fields" / "joints.npy")
    np.testing.assert_array_equal(loaded, np.concatenate([values(0, 5)["joints"][:-1], values(1, 3)["joints"][:-1]]))
    assert np.load(store.path / "final" / "front.npy").shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(store.final("joints")[1], values(1, 3)["joints"][-1])


def test_digest_does_not_depend_on_how_it_was_written(make_store, tmp_path):
    reference = make_store([5, 3, 7])
    with EpisodeStore.create(tmp_path / "pieces", SCHEMA) as writer:
        writer.append(values(0, 5), terminated=False, truncated=True, seed=0)
    writer = EpisodeStore.append_to(tmp_path / "pieces")
    writer.append(values(1, 3), terminated=True, truncated=False, seed=1)
    writer.append(values(2, 7), terminated=False, truncated=True, seed=2)
    # Not closed: the journal holds what the other store has in its Parquet file.
    assert EpisodeStore.open(tmp_path / "pieces").digest == reference.digest
    writer.close()
    assert EpisodeStore.open(tmp_path / "pieces").digest == reference.digest
    assert make_store([5, 3, 8], "other").digest != reference.digest


def test_digest_covers_outcome_and_schema_but_not_provenance(tmp_path):
    def digest(name, schema=SCHEMA, **outcome):
        with EpisodeStore.create(tmp_path / name, schema) as writer:
            writer.append(values(0, 3), **{"terminated": True, "truncated": False, **outcome})
        return EpisodeStore.open(tmp_path / name).digest

    plain = digest("a")
    licensed = Schema(
        SCHEMA.fields, environment="gym:Made-v0", rate_hz=10.0, source="us", licence="CC0", extra={"k": 1}
    )
    assert digest("b", licensed) == plain
    assert digest("c", seed=1) != plain
    assert digest("d", replace(SCHEMA, environment="gym:Other-v0")) != plain


def test_non_finite_values_are_kept(tmp_path):
    fields = values(0, 3)
    fields["joints"][1, 1], fields["reward"][2] = np.nan, np.inf
    with EpisodeStore.create(tmp_path / "s", SCHEMA) as writer:
        writer.append(fields, terminated=True, truncated=False)
    store = EpisodeStore.open(tmp_path / "s")
    store.verify()
    assert np.isnan(store.field("joints")[1, 1])
    assert store.episodes["return"][0] == np.inf


def test_an_episode_may_lack_a_field(make_store):
    store = make_store([4, 6, 2], without={1: "action", 2: "reward"})
    assert store.present("action").tolist() == [True, False, True]
    assert store.present("joints").all()
    assert "action" not in store.episode(1).fields
    assert "action" in store.episode(0).fields
    assert not store.field("action")[4:10].any()
    assert isnan(store.episodes["return"][2])
    store.verify()


def with_change(**changes):
    return {**values(0, 4), **changes}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({k: v for k, v in values(0, 4).items() if k != "mode"}, ["expected the fields", "got no mode"]),
        (with_change(extra=np.zeros(4)), ["unknown extra"]),
        (with_change(action=np.zeros((4, 2))), ["field 'action'", "expected float32", "got float64", ".astype"]),
        (with_change(action=np.zeros((4, 3), np.float32)), ["field 'action'", "(4, 2)", "(4, 3)"]),
        (with_change(reward=np.zeros(5)), ["field 'reward'", "(4,)", "(5,)"]),
        (with_change(joints=np.zeros((4, 3))), ["field 'joints'", "(5, 3)", "one after the last", "(4, 3)"]),
        ({**values(0, 4), "action": np.zeros((0, 2), np.float32)}, ["one step or more", "0 steps"]),
        (with_change(action=np.float32(1)), ["field 'action'", "rows of values"]),
        (dict.fromkeys(values(0, 4)), ["no field at all"]),
    ],
)
def test_wrong_episodes_are_refused_and_leave_the_store_as_it_was(make_store, fields, words):
    store = make_store([5])
    with EpisodeStore.append_to(store.path) as writer:
        with pytest.raises(DataError) as caught:
            writer.append(fields, terminated=True, truncated=False)
        for word in [str(store.path), "episode 1", *words]:
            assert word in str(caught.value)
        assert writer.append(values(1, 3), terminated=True, truncated=False, seed=1) == 1
    assert EpisodeStore.open(store.path).digest == make_store([5, 3], "reference").digest


def test_seed_out_of_range_is_refused(make_store):
    with EpisodeStore.append_to(make_store([5]).path) as writer, pytest.raises(DataError, match=r"0 to 2\*\*64 - 1"):
        writer.append(values(1, 3), terminated=True, truncated=False, seed=-1)


def test_a_closed_writer_says_so(make_store):
    writer = EpisodeStore.append_to(make_store([5]).path)
    writer.close()
    writer.close()
    with pytest.raises(DataError, match="a closed one"):
        writer.append(values(1, 3), terminated=True, truncated=False)


def test_create_refuses_a_folder_in_use(make_store, tmp_path):
    store = make_store([5])
    with pytest.raises(DataError, match="a new or empty folder"):
        EpisodeStore.create(store.path, SCHEMA)
    assert len(EpisodeStore.open(store.path)) == 1
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file"):
        EpisodeStore.create(tmp_path / "file", SCHEMA)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"format": 2}', "newer offbook"),
        ("{", "schema of a store"),
        ("[]", "a JSON object"),
        ('{"format": 1}', "KeyError"),
        (json.dumps({**SCHEMA.to_json(), "fields": [{"name": "x"}]}), "KeyError"),
    ],
)
def test_a_strange_store_json_is_refused(make_store, content, word):
    store = make_store([5])
    (store.path / "store.json").write_text(content)
    for opening in (EpisodeStore.open, EpisodeStore.append_to):
        with pytest.raises(DataError, match=word) as caught:
            opening(store.path)
        assert "store.json" in str(caught.value)


def test_what_is_no_store_is_refused(tmp_path):
    for opening in (EpisodeStore.open, EpisodeStore.append_to):
        with pytest.raises(DataError, match="no such folder"):
            opening(tmp_path / "nowhere")
        with pytest.raises(DataError, match=r"no store\.json"):
            opening(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_store_can_be_read(tmp_path):
    EpisodeStore.create(tmp_path / "s", SCHEMA).close()
    store = EpisodeStore.open(tmp_path / "s")
    assert (len(store), store.steps, store.field("front").shape) == (0, 0, (0, 16, 16, 3))
    assert store.episodes["task"].shape == (0,)
    with pytest.raises(DataError, match="the store is empty"):
        store.episode(0)


def test_a_reader_sees_what_was_there_when_it_opened(make_store):
    path = make_store([5]).path
    with EpisodeStore.append_to(path) as writer:
        writer.append(values(1, 3), terminated=True, truncated=False, seed=1)
        during = EpisodeStore.open(path)
        writer.append(values(2, 9), terminated=False, truncated=True, seed=2, sync=False)
        assert len(EpisodeStore.open(path)) == 2
        writer.flush()
        assert len(EpisodeStore.open(path)) == 3
    assert len(during) == 2
    np.testing.assert_array_equal(during.episode(1).fields["joints"], values(1, 3)["joints"])


def test_verify_names_the_episode_that_changed(make_store):
    store = make_store([5, 3])
    file = store.path / "fields" / "reward.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="episode 1, steps 5 to 7"):
        EpisodeStore.open(store.path).verify()


def test_unknown_fields_and_roles_are_named(make_store):
    store = make_store([5])
    with pytest.raises(DataError, match="expected one of joints, front, action, reward, mode"):
        store.field("joint")
    with pytest.raises(DataError, match="choose one of: joints, front"):
        store.final("action")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("", "float32", (1,), "action"), "a name"),
        (("x", "float", (1,), "action"), "a dtype"),
        (("x", "object", (1,), "action"), "a dtype"),
        (("x", "complex64", (1,), "action"), "a dtype"),
        (("x", "float32", (0,), "action"), "positive sizes"),
        (("x", "float32", (1,), "reward"), "a number as reward"),
    ],
)
def test_impossible_fields_are_refused(arguments, word):
    with pytest.raises(DataError, match=word):
        FieldSpec(*arguments)


def test_schema_survives_json_with_unbounded_actions():
    inf = float("inf")
    action = ActionSpec(size=2, low=(-inf, -1.0), high=(inf, 1.0))
    schema = Schema(SCHEMA.fields, action=action, extra={"k": [1]})
    text = json.dumps(schema.to_json(), allow_nan=False)
    assert Schema.from_json(json.loads(text), "here") == schema
    assert schema.action_spec() is action
    assert schema.observation_spec().cameras == {"front": (16, 16)}
    assert schema.observation_spec().state == (("joints", 3),)
    with pytest.raises(DataError, match="bounds of the actions"):
        SCHEMA.action_spec()
    with pytest.raises(DataError, match="different names"):
        Schema((SCHEMA.fields[0], SCHEMA.fields[0]))


def _digest(store, queue):
    queue.put((store.digest, store.field("joints").sum()))


def test_a_store_can_be_sent_to_another_process(make_store):
    store = make_store([5, 3])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_digest, args=(store, queue))
    process.start()
    assert queue.get(timeout=60) == (store.digest, store.field("joints").sum())
    process.join(60)


def test_a_million_steps_open_as_fast_as_their_index_is_read(tmp_path):
    schema = Schema((FieldSpec("x", "uint8", (4,), "observation"), FieldSpec("action", "uint8", (), "action")))
    fields = {"x": np.zeros((1001, 4), np.uint8), "action": np.zeros(1000, np.uint8)}
    with EpisodeStore.create(tmp_path / "s", schema) as writer:
        for _ in range(1000):
            writer.append(fields, terminated=False, truncated=True, sync=False)

    def ours():
        assert EpisodeStore.open(tmp_path / "s").field("x").shape == (1_000_000, 4)

    def theirs():
        assert len(pq.read_table(tmp_path / "s" / "episodes.parquet", use_threads=False)) == 1000
        for file in ("fields/x.npy", "final/x.npy", "fields/action.npy"):
            np.load(tmp_path / "s" / file, mmap_mode="r")

    seconds = timed({"ours": ours, "theirs": theirs}, 10)
    assert min(seconds["ours"]) < 5 * min(seconds["theirs"])
    shutil.rmtree(tmp_path / "s")
