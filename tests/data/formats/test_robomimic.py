"""robomimic files: one group a demonstration, nested observations, pictures, groups of demonstrations."""

import h5py
import numpy as np
import pytest
from foreign import assert_same, robomimic, walks

from offbook.data.formats import import_dataset
from offbook.errors import DataError

LIFT = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20, "reward_shaping": False}}


def with_arm(episodes):
    for episode in episodes:
        episode["arm"] = episode["observation"].astype(np.float64) + 10
    return episodes


def test_demonstrations_come_in_step_for_step_and_in_order(tmp_path):
    episodes = with_arm(walks(range(3, 15), picture=True))
    for number, episode in enumerate(episodes):
        episode["reward"] = np.zeros_like(episode["reward"])
        episode["reward"][-1] = number % 2
    mask = {"train": ["demo_0", "demo_10", "demo_2"], "valid": ["demo_1", "demo_99"]}
    robomimic(tmp_path / "f.hdf5", episodes, env_args=LIFT, mask=mask)
    store = import_dataset(f"robomimic:{tmp_path}/f.hdf5", tmp_path / "store")
    names = ("observation", "front", "arm", "action", "reward")
    assert_same(store, episodes, *names, rename={"arm": "arm.joints"})
    schema = store.schema
    assert (schema.environment, schema.rate_hz) == ("robosuite:Lift", 20.0)
    assert schema.observations == ("arm.joints", "front", "observation")
    assert schema.observation_spec().cameras == {"front": (20, 16)}
    assert schema.named("other") == ("states", "dones")
    assert set(store.episodes["task"]) == {"Lift"}
    assert store.episodes["success"].tolist() == [0.0, 1.0] * 6
    assert store.episodes["terminated"].tolist() == [True, False] * 6
    assert schema.extra["splits"] == {"train": [0, 10, 2], "valid": [1]}
    assert schema.extra["import"]["demonstrations"][10] == "demo_10"
    assert schema.extra["import"]["env_args"] == LIFT


def test_dones_at_the_end_of_every_demonstration_end_no_task(tmp_path):
    episodes = walks((5, 3, 7, 4))
    for number, episode in enumerate(episodes):
        episode["terminated"] = True
        episode["reward"][:] = 0
        episode["reward"][-1 - number // 2] = number != 0
    robomimic(tmp_path / "f.hdf5", episodes, env_args=LIFT)
    store = import_dataset(f"robomimic:{tmp_path}/f.hdf5", tmp_path / "store")
    assert store.episodes["success"].tolist() == [0.0, 1.0, 1.0, 1.0]
    assert store.episodes["terminated"].tolist() == [False, True, False, False]
    assert store.episodes["truncated"].tolist() == [True, False, True, True]
    assert "they mark where a recording stops" in " / ".join(store.schema.extra["import"]["stated"])


def test_without_next_observations(tmp_path):
    episodes = walks()
    robomimic(tmp_path / "f.hdf5", episodes, after=False)
    store = import_dataset(f"robomimic:{tmp_path}/f.hdf5", tmp_path / "store")
    assert_same(store, episodes)
    assert not store.episodes["terminated"].any()
    assert np.isnan(store.episodes["success"]).all()
    assert (store.schema.environment, store.schema.rate_hz) == ("", None)
    assert "left out" in store.schema.extra["import"]["stated"][0]


def test_shaped_rewards_tell_nothing_of_success(tmp_path):
    episodes = walks()
    for episode in episodes:
        episode["reward"][:] = 0
    shaped = {"env_name": "Lift", "type": 1, "env_kwargs": {"reward_shaping": True}}
    robomimic(tmp_path / "f.hdf5", episodes, env_args=shaped)
    store = import_dataset(f"robomimic:{tmp_path}/f.hdf5", tmp_path / "store")
    assert np.isnan(store.episodes["success"]).all()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.pop("data"), "expected the key 'data', got nothing"),
        (lambda f: f["data/demo_1"].pop("obs"), "data/demo_1: expected the key 'obs', got .*dataset_states_to_obs"),
        (lambda f: f["data/demo_1"].pop("actions"), "data/demo_1: expected the key 'actions'"),
        (lambda f: f["data/demo_1"].pop("next_obs"), "data/demo_1: expected the key 'next_obs'.*the same keys"),
        (lambda f: f["data/demo_1/next_obs"].pop("observation"), "demo_1, next_obs: expected the key 'observation'"),
        (lambda f: f["data/demo_1"].pop("rewards"), "data/demo_1: expected the key 'rewards', got actions"),
        (lambda f: f["data/demo_1"].attrs.modify("num_samples", 4), "expected 4 rows, as num_samples says, got 3"),
        (
            lambda f: replace(f, "data/demo_1/obs/observation", np.zeros((4, 3), "f4")),
            "got 4 rows, one more than",
        ),
        (lambda f: replace(f, "data/demo_1/rewards", np.zeros(2)), "reward: expected 3 rows.*got 2 rows"),
        (lambda f: replace(f, "data/demo_1/actions", np.zeros(3)), r"actions: expected shape \(steps, size\)"),
        (lambda f: replace(f, "data/demo_1/obs/observation", np.array(["a"] * 3, object)), "expected numbers, got"),
        (lambda f: f["data"].attrs.modify("env_args", "{"), "env_args: expected JSON, got JSONDecodeError"),
        (lambda f: f["data"].clear(), "expected one demonstration or more, got none"),
    ],
)
def test_crooked_files_are_refused_with_a_sentence(tmp_path, cli, change, words):
    robomimic(tmp_path / "f.hdf5", walks(), env_args=LIFT)
    with h5py.File(tmp_path / "f.hdf5", "a") as file:
        change(file)
    with pytest.raises(DataError, match=words):
        import_dataset(f"robomimic:{tmp_path}/f.hdf5", tmp_path / "store")
    outcome = cli(["data", "import", f"robomimic:{tmp_path}/f.hdf5", "--out", str(tmp_path / "store")])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["f.hdf5"]


def replace(file, name, values):
    del file[name]
    file[name] = values


@pytest.mark.faults
def test_files_that_are_cut(tmp_path, cli):
    robomimic(tmp_path / "f.hdf5", walks())
    content = (tmp_path / "f.hdf5").read_bytes()
    (tmp_path / "f.hdf5").write_bytes(content[: len(content) // 2])
    outcome = cli(["data", "import", f"robomimic:{tmp_path}/f.hdf5", "--out", str(tmp_path / "store")])
    assert outcome.exit_code == 1
    assert "expected a whole HDF5 file" in outcome.stderr
    assert not list(tmp_path.glob("store*"))


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["external link", "external values", "virtual"])
def test_values_in_other_files_are_not_followed(tmp_path, kind):
    robomimic(tmp_path / "other.hdf5", walks())
    robomimic(tmp_path / "f.hdf5", walks())
    with h5py.File(tmp_path / "f.hdf5", "a") as file:
        demo = file["data/demo_1"]
        del demo["actions"]
        if kind == "external link":
            demo["actions"] = h5py.ExternalLink("other.hdf5", "/data/demo_1/actions")
        elif kind == "external values":
            demo.create_dataset("actions", (3, 2), "f4", external=[(str(tmp_path / "other.hdf5"), 0, 24)])
        else:
            layout = h5py.VirtualLayout((3, 2), "f4")
            layout[:] = h5py.VirtualSource(tmp_path / "other.hdf5", "data/demo_1/actions", (3, 2))
            demo.create_virtual_dataset("actions", layout)
    with pytest.raises(DataError, match="expected a file that holds its own values, got one that points at others"):
        import_dataset(f"robomimic:{tmp_path}/f.hdf5", tmp_path / "store")
