"""Minari: what its own collector records comes in, goes out again, and is equal step for step."""

import json
import shutil
import warnings
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces
from made import values
from minari.data_collector.episode_buffer import EpisodeBuffer

from offbook.data.formats import export_dataset, import_dataset
from offbook.data.store import EpisodeStore, FieldSpec, Schema
from offbook.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def collections(tmp_path, monkeypatch):
    """A place for datasets."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


class Closet(gym.Env):
    """A small world whose observations nest, hold words and a picture, and whose actions are discrete from 3 on."""

    observation_space = spaces.Dict(
        {
            "arm": spaces.Dict({"joints": spaces.Box(-9, 9, (2,), np.float32), "grip": spaces.Discrete(3)}),
            "front": spaces.Box(0, 255, (40, 32, 3), np.uint8),
            "mission": spaces.Text(20),
            "nothing": spaces.Box(-1, 1, (0,), np.float64),
            "pair": spaces.Tuple((spaces.Box(-9, 9, (1,), np.float64), spaces.MultiBinary(4))),
        }
    )
    action_space = spaces.Discrete(4, start=3)

    def __init__(self):
        self._step, self._length = 0, 0

    def _observe(self):
        joints = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return {
            "arm": {"joints": joints, "grip": np.int64(self.np_random.integers(3))},
            "front": self.np_random.integers(0, 256, (40, 32, 3), dtype=np.uint8),
            "mission": self._mission,
            "nothing": np.zeros(0),
            "pair": (self.np_random.uniform(-1, 1, 1), self.np_random.integers(0, 2, 4, dtype=np.int8)),
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._step, self._length = 0, int(self.np_random.integers(3, 9))
        self._mission = f"open{self._length}"
        return self._observe(), {"success": False}

    def step(self, action):
        assert self.action_space.contains(action)
        self._step += 1
        done = self._step == self._length
        success = self._length % 2 == 0 and self._step == 2
        return self._observe(), float(self._step), done, False, {"success": success}


def collect(env, name, episodes, steps=400, **settings):
    collector = minari.DataCollector(env, **settings)
    collector.action_space.seed(1)
    for seed in range(episodes):
        collector.reset(seed=seed)
        for _ in range(steps):
            *_, terminated, truncated, _ = collector.step(collector.action_space.sample())
            if terminated or truncated:
                break
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = collector.create_dataset(name, algorithm_name="random", author="someone", description="for a test")
    collector.close()
    return dataset


def flat(value):
    """The arrays of a nested value with their paths, so that structures can be compared."""
    if isinstance(value, dict):
        return {(key, *path): leaf for key, part in value.items() for path, leaf in flat(part).items()}
    if isinstance(value, tuple):
        return {(i, *path): leaf for i, part in enumerate(value) for path, leaf in flat(part).items()}
    return {(): np.asarray(value)}


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            left, right = flat(getattr(a, name)), flat(getattr(b, name))
            assert left.keys() == right.keys()
            for path, array in left.items():
                assert array.dtype == right[path].dtype, (name, path)
                np.testing.assert_array_equal(array, right[path], err_msg=f"{name} {path}")


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_hopper_comes_in_and_goes_out_equal(tmp_path, data_format):
    source = collect(gym.make("Hopper-v5", max_episode_steps=20), "tests/hopper-v0", 6, data_format=data_format)
    store = import_dataset("minari:tests/hopper-v0", tmp_path / "store")
    assert store.schema.environment == "gym:Hopper-v5"
    assert [(f.name, f.dtype, f.shape) for f in store.schema.fields] == [
        ("observation", "float64", (11,)),
        ("action", "float32", (3,)),
        ("reward", "float64", ()),
    ]
    assert store.schema.action_spec().low == (-1.0, -1.0, -1.0)
    assert store.episodes["seed"].tolist() == list(range(6))
    assert set(store.episodes["source"]) == {"random"}
    assert store.episodes["truncated"].any()
    assert store.episodes["terminated"].any()
    np.testing.assert_array_equal(store.episode(2).fields["observation"], source[2].observations)

    export_dataset(store, "minari:tests/again-v3")
    loaded = minari.load_dataset("tests/again-v3")
    assert_equal(loaded, source)
    assert loaded.env_spec == source.env_spec
    assert loaded.env_spec.max_episode_steps == 20
    assert (loaded.observation_space, loaded.action_space) == (source.observation_space, source.action_space)
    kept = ("algorithm_name", "author", "description", "data_format")
    assert all(loaded.storage.metadata[key] == source.storage.metadata[key] for key in kept)
    seeds = [metadata["seed"] for metadata in loaded.storage.get_episode_metadata(range(6))]
    assert seeds == list(range(6))
    assert import_dataset("minari:tests/again-v3", tmp_path / "back").digest == store.digest


def test_nested_observations_words_and_discrete_actions(tmp_path):
    source = collect(Closet(), "closet-v0", 8, record_infos=True, jpeg_encoding=False)
    store = import_dataset("minari:closet-v0", tmp_path / "store")
    assert [(f.name, f.dtype, f.shape, f.role) for f in store.schema.fields] == [
        ("arm.grip", "int64", (), "observation"),
        ("arm.joints", "float32", (2,), "observation"),
        ("front", "uint8", (40, 32, 3), "observation"),
        ("pair.0", "float64", (1,), "observation"),
        ("pair.1", "int8", (4,), "observation"),
        ("action", "int64", (1,), "action"),
        ("reward", "float64", (), "reward"),
    ]
    assert store.schema.environment == ""
    assert store.schema.observation_spec().cameras == {"front": (40, 32)}
    assert (store.schema.action_spec().choices, store.schema.action_spec().high) == (4, (3.0,))
    lengths = store.episodes["length"]
    assert store.episodes["task"].tolist() == [f"open{length}" for length in lengths]
    # Success at any step counts.
    assert store.episodes["success"].tolist() == [float(length % 2 == 0) for length in lengths]
    assert 0 < store.episodes["success"].sum() < 8
    np.testing.assert_array_equal(store.field("action")[: lengths[0], 0], source[0].actions - 3)
    export_dataset(store, f"minari:{tmp_path}/folder/closet")
    loaded = minari.MinariDataset(tmp_path / "folder" / "closet" / "data")
    assert loaded.id == "closet-v0"
    assert_equal(loaded, source)
    back = import_dataset(f"minari:{tmp_path}/folder/closet", tmp_path / "back")
    assert back.digest == store.digest
    assert back.episodes["success"].tolist() == store.episodes["success"].tolist()


def test_point_maze_with_dict_observations(tmp_path):
    gymnasium_robotics = pytest.importorskip("gymnasium_robotics")
    gym.register_envs(gymnasium_robotics)
    env = gym.make("PointMaze_UMaze-v3", max_episode_steps=15)
    source = collect(env, "maze/random-v0", 3)
    store = import_dataset("minari:maze/random-v0", tmp_path / "store")
    assert store.schema.observations == ("achieved_goal", "desired_goal", "observation")
    export_dataset(store, "minari:maze/again-v0")
    loaded = minari.load_dataset("maze/again-v0")
    assert_equal(loaded, source)
    assert loaded.env_spec == source.env_spec


def test_recordings_that_never_were_minaris(tmp_path):
    schema = Schema(
        (
            FieldSpec("joints", "float64", (3,), "observation", "rad"),
            FieldSpec("front", "uint8", (16, 16, 3), "observation"),
            FieldSpec("action", "float32", (2,), "action"),
            FieldSpec("reward", "float64", (), "reward"),
            FieldSpec("mode", "int32", (), "other"),
        ),
        environment="gym:Hopper-v5",
        rate_hz=20.0,
        source="us",
    )
    with EpisodeStore.create(tmp_path / "store", schema) as writer:
        for i in range(3):
            outcome = {"task": "pour", "source": "expert", "success": i == 1, "score": 0.5 * i}
            writer.append(values(i, 5 + i), terminated=i == 1, truncated=i != 1, seed=i, **outcome)
    export_dataset(EpisodeStore.open(tmp_path / "store"), "minari:ours-v0")
    loaded = minari.load_dataset("ours-v0")
    assert loaded.env_spec.id == "Hopper-v5"
    np.testing.assert_array_equal(loaded[1].observations["front"], values(1, 6)["front"])
    np.testing.assert_array_equal(loaded[1].rewards, values(1, 6)["reward"])
    assert loaded[1].terminations.tolist() == [False] * 5 + [True]
    back = import_dataset("minari:ours-v0", tmp_path / "back")
    # The field "mode" had no place; order, units, rate, outcome and source are there again.
    assert back.schema.fields == schema.fields[:-1]
    assert (back.schema.rate_hz, back.schema.source) == (20.0, "us")
    assert back.episodes["score"].tolist() == [0.0, 0.5, 1.0]
    assert back.episodes["success"].tolist() == [0.0, 1.0, 0.0]
    assert back.episodes["task"].tolist() == ["pour"] * 3


def buffer(length=4, **changes):
    flags = np.zeros(length, bool)
    plain = {
        "observations": np.zeros((length + 1, 2), np.float32),
        "actions": np.zeros((length, 1), np.float32),
        "rewards": np.zeros(length),
        "terminations": flags,
        "truncations": flags,
    }
    return EpisodeBuffer(**{**plain, **changes})


def made(name, buffers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(
            name,
            buffers,
            observation_space=spaces.Box(-1, 1, (2,), np.float32),
            action_space=spaces.Box(-1, 1, (1,), np.float32),
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"observations": np.zeros((4, 2), np.float32)}, "field 'observation': expected shape \\(5, 2\\) for 4 steps"),
        ({"rewards": np.zeros(3)}, "episode 1, field 'reward'"),
        ({"observations": np.zeros((5, 2))}, "expected float32, got float64"),
        ({"terminations": np.array([False, True, False, False])}, "episode 1, terminations.*one in row 1 of 4"),
    ],
)
def test_crooked_episodes_are_named_and_leave_nothing_behind(tmp_path, changes, words):
    made("crooked-v0", [buffer(), buffer(**changes)])
    with pytest.raises(DataError, match=words):
        import_dataset("minari:crooked-v0", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "store.partial").exists()


def test_names_that_are_not_there(tmp_path):
    made("tests/hopper-v0", [buffer()])
    with pytest.raises(
        DataError, match=r"did you mean 'tests/hopper-v0'\? Otherwise run: minari download tests/hoper-v0"
    ):
        import_dataset("minari:tests/hoper-v0", tmp_path / "store")
    with pytest.raises(DataError, match=r"the folder that holds metadata\.json"):
        import_dataset(f"minari:{tmp_path}", tmp_path / "store")
    with pytest.raises(ConfigError, match=r"did you mean 'minari'\?"):
        import_dataset("minary:tests/hopper-v0", tmp_path / "store")
    with pytest.raises(ConfigError, match="got no name"):
        import_dataset("minari", tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x").touch()
    with pytest.raises(DataError, match="a new or empty folder"):
        import_dataset("minari:tests/hopper-v0", tmp_path / "store")


def test_damaged_datasets_are_refused(tmp_path):
    made("a-v0", [buffer()])
    folder = tmp_path / "minari" / "a-v0" / "data"
    content = (folder / "main_data.hdf5").read_bytes()
    (folder / "main_data.hdf5").write_bytes(content[:200])
    with pytest.raises(DataError, match="expected a whole HDF5 file, got OSError"):
        import_dataset("minari:a-v0", tmp_path / "store")
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**metadata, "minari_version": "99.0.0"}))
    with pytest.raises(DataError, match="does not support"):
        import_dataset("minari:a-v0", tmp_path / "store")
    shutil.rmtree(folder)
    made("empty-v0", [])
    with pytest.raises(DataError, match="one episode or more"):
        import_dataset("minari:empty-v0", tmp_path / "store")


def test_what_a_kill_left_of_an_import_is_replaced(tmp_path):
    made("a-v0", [buffer(), buffer()])
    whole = import_dataset("minari:a-v0", tmp_path / "store")
    shutil.copytree(whole.path, tmp_path / "other.partial")
    assert import_dataset("minari:a-v0", tmp_path / "other").digest == whole.digest
    assert not (tmp_path / "other.partial").exists()
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.faults
def test_two_imports_into_one_folder_do_not_meet(tmp_path, monkeypatch):
    made("a-v0", [buffer(), buffer()])
    digest, refused = import_dataset("minari:a-v0", tmp_path / "store").digest, []

    def beside(*of):
        # As late as can be: the writer has let go of its lock, and the store does not have its name yet.
        with pytest.raises(DataError, match=r"third: expected to be the only import there") as error:
            import_dataset("minari:a-v0", tmp_path / "third")
        refused.append(error)
        return replace(*of)

    replace = Path.replace
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda path, to: beside(path, to) if to.name == "third" else replace(path, to))
        assert import_dataset("minari:a-v0", tmp_path / "third").digest == digest
    assert len(refused) == 1
    # What a kill leaves of the lock is no obstacle.
    (tmp_path / ".fourth.importing").touch()
    assert import_dataset("minari:a-v0", tmp_path / "fourth").digest == digest
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_exports_that_cannot_be(tmp_path, make_store):
    store = make_store([3, 4], without={1: "action"})
    with pytest.raises(DataError, match=r"episode 1: expected all fields.*no action"):
        export_dataset(store, "minari:a-v0")
    assert not list(tmp_path.glob("minari/*"))
    whole = make_store([3], "whole")
    export_dataset(whole, "minari:a-v0")
    with pytest.raises(DataError, match="expected a new name"):
        export_dataset(whole, "minari:a-v0")
    for bad in ("no version", "a/../b-v0", "a-v0/"):
        with pytest.raises(DataError, match="an id such as"):
            export_dataset(whole, f"minari:{bad}")
    assert len(minari.load_dataset("a-v0")) == 1
