"""D4RL files: where episodes are cut, what their final observation is, and what is said of it."""

import h5py
import numpy as np
import pytest
from foreign import assert_same, d4rl, walks

from offbook.data.formats import import_dataset
from offbook.errors import DataError


def stated(store):
    return " / ".join(store.schema.extra["import"]["stated"])


def test_next_observations_and_timeouts(tmp_path):
    episodes = walks()
    qpos = np.random.default_rng(1).normal(size=(15, 4))
    words = np.array([b"x"] * 15)
    d4rl(tmp_path / "f.hdf5", episodes, **{"infos/qpos": qpos, "infos/words": words, "metadata/algorithm": "SAC"})
    store = import_dataset(f"d4rl:{tmp_path}/f.hdf5", tmp_path / "store")
    assert_same(store, episodes)
    assert [(f.name, f.shape, f.role) for f in store.schema.fields] == [
        ("observation", (3,), "observation"),
        ("action", (2,), "action"),
        ("reward", (), "reward"),
        ("infos.qpos", (4,), "other"),
    ]
    np.testing.assert_array_equal(store.field("infos.qpos"), qpos)
    assert store.episodes["terminated"].tolist() == [True, False, True]
    assert store.episodes["truncated"].tolist() == [False, True, False]
    assert set(store.episodes["source"]) == {"SAC"}
    assert np.isnan(store.episodes["success"]).all()
    actions = np.concatenate([episode["action"] for episode in episodes])
    assert store.schema.action_spec().low == tuple(actions.min(0).astype(float))
    assert stated(store) == (
        "the final observation of each episode is the recorded next observation of its last step / "
        "episodes end at terminals and timeouts / left out, being no numbers for each step: infos.words"
    )


def test_without_next_observations_the_last_one_is_final_and_no_end_is_claimed(tmp_path):
    episodes = walks((5, 3, 7))
    d4rl(tmp_path / "f.hdf5", episodes, after=False)
    store = import_dataset(f"d4rl:{tmp_path}/f.hdf5", tmp_path / "store")
    assert_same(store, episodes)
    # The step that ended the first is among those left out.
    assert store.episodes["terminated"].tolist() == [False] * 3
    assert store.episodes["truncated"].tolist() == [True] * 3
    assert "the action and the reward of that row are left out" in stated(store)


def test_no_timeouts_but_next_observations(tmp_path):
    episodes = walks((5, 3, 7, 2))
    d4rl(tmp_path / "f.hdf5", episodes, with_timeouts=False)
    store = import_dataset(f"d4rl:{tmp_path}/f.hdf5", tmp_path / "store")
    assert_same(store, episodes)
    assert store.episodes["terminated"].tolist() == [True, False, True, False]
    assert "no timeouts: episodes end at terminals, and where a next observation is not that of" in stated(store)


def test_no_timeouts_and_no_next_observations(tmp_path, cli):
    episodes = walks((5, 3, 7))
    d4rl(tmp_path / "f.hdf5", episodes, with_timeouts=False, after=False)
    store = import_dataset(f"d4rl:{tmp_path}/f.hdf5", tmp_path / "store")
    # The second was stopped, which nothing marks: it goes over into the third. Each had a row for its end.
    assert store.episodes["length"].tolist() == [5, 4 + 8 - 1]
    assert "no timeouts: episodes end at terminals alone, so one that was stopped goes over into" in stated(store)
    terminals = np.zeros(18)
    d4rl(tmp_path / "g.hdf5", episodes, with_timeouts=False, after=False, terminals=terminals)
    with pytest.raises(DataError, match="got terminals all 0; add an array 'timeouts'"):
        import_dataset(f"d4rl:{tmp_path}/g.hdf5", tmp_path / "other")
    outcome = cli(["data", "import", f"d4rl:{tmp_path}/g.hdf5", "--out", str(tmp_path / "other")])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)


def test_rows_after_the_last_end_and_episodes_of_one_row(tmp_path):
    episodes = walks((5, 1, 4))
    flags = np.array([0, 0, 0, 0, 1, 1, 0, 0, 0, 0], bool)
    d4rl(tmp_path / "f.hdf5", episodes, terminals=flags, timeouts=np.zeros(10, bool))
    store = import_dataset(f"d4rl:{tmp_path}/f.hdf5", tmp_path / "store")
    assert_same(store, episodes)
    assert "the last 4 rows, after which no end is marked, are an episode that was stopped" in stated(store)
    d4rl(tmp_path / "g.hdf5", episodes, terminals=flags, timeouts=np.zeros(10, bool), next_observations=None)
    store = import_dataset(f"d4rl:{tmp_path}/g.hdf5", tmp_path / "other")
    assert store.episodes["length"].tolist() == [4, 3]
    assert "1 episodes of a single row are left out" in stated(store)


def test_terminals_that_mark_a_goal_and_no_end(tmp_path):
    """As in the AntMaze files: every row near the goal is marked, and the ant walks on."""
    episodes = walks((9, 6))
    goal = np.zeros(15, bool)
    goal[3:7] = True
    timeouts = np.isin(np.arange(15), (8, 14))
    d4rl(tmp_path / "f.hdf5", episodes, terminals=goal, timeouts=timeouts)
    store = import_dataset(f"d4rl:{tmp_path}/f.hdf5", tmp_path / "store")
    assert_same(store, episodes)
    assert store.episodes["success"].tolist() == [1.0, 0.0]
    assert not store.episodes["terminated"].any()
    assert "terminals come in runs, so they mark a goal and no end" in stated(store)


def test_choices_success_nan_and_columns(tmp_path):
    episodes = walks((4, 4))
    actions = np.array([0, 1, 2, 6] * 2)
    rewards = np.arange(8.0)[:, None]
    rewards[3] = np.nan
    solved = np.array([0, 0, 1, 0, 0, 0, 0, 0])
    d4rl(tmp_path / "f.hdf5", episodes, actions=actions, rewards=rewards, **{"infos/goal_achieved": solved})
    store = import_dataset(f"d4rl:{tmp_path}/f.hdf5", tmp_path / "store")
    assert (store.schema.action_spec().choices, store.schema.action_spec().high) == (7, (6.0,))
    assert store.field("action").shape == (8, 1)
    assert store.episodes["success"].tolist() == [1.0, 0.0]
    assert np.isnan(store.field("reward")).tolist() == [False] * 3 + [True] + [False] * 4


@pytest.mark.faults
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": None}, "expected the key 'rewards', got actions, next_observations, observations, terminals"),
        ({"rewards": np.zeros(14)}, r"rewards: expected 15 rows, one for each action, got 14 rows; cut all"),
        (
            {"observations": np.zeros((16, 3), "f4")},
            "got 16 rows, one more than there are actions; cut all",
        ),
        ({"observations": np.zeros(15, "f4")}, r"observations: expected shape \(steps, size\), got shape \(15,\)"),
        ({"actions": np.zeros(15, "f4")}, r"actions: expected shape \(steps, size\), got shape \(5,\)"),
        ({"actions": np.zeros((15, 2, 2), "f4")}, r"actions: expected shape \(steps, size\), got shape \(5, 2, 2\)"),
        ({"rewards": np.zeros((15, 2))}, r"rewards: expected shape \(steps,\)"),
        ({"next_observations": np.zeros((15, 4), "f4")}, r"expected float32 \(3,\) as before each step, got float32"),
        (
            {"actions": np.array(["left"] * 15, object)},
            "actions: expected numbers, got an array of object",
        ),
    ],
)
def test_crooked_files_are_refused_with_a_sentence(tmp_path, cli, changes, words):
    d4rl(tmp_path / "f.hdf5", walks(), **changes)
    with pytest.raises(DataError, match=words):
        import_dataset(f"d4rl:{tmp_path}/f.hdf5", tmp_path / "store")
    outcome = cli(["data", "import", f"d4rl:{tmp_path}/f.hdf5", "--out", str(tmp_path / "store")])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["f.hdf5"]


@pytest.mark.faults
def test_files_that_are_cut_or_absent(tmp_path, cli):
    d4rl(tmp_path / "f.hdf5", walks((300, 200)))
    content = (tmp_path / "f.hdf5").read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 100):
        (tmp_path / "cut.hdf5").write_bytes(content[:size])
        outcome = cli(["data", "import", f"d4rl:{tmp_path}/cut.hdf5", "--out", str(tmp_path / "store")])
        assert outcome.exit_code == 1
        assert "expected a whole HDF5 file, got OSError" in outcome.stderr
    assert "got no such file" in cli(["data", "import", "d4rl:absent.hdf5", "--out", str(tmp_path / "store")]).stderr
    with h5py.File(tmp_path / "empty.hdf5", "w"):
        pass
    assert "got nothing" in cli(["data", "import", f"d4rl:{tmp_path}/empty.hdf5", "--out", str(tmp_path / "s")]).stderr
    assert not list(tmp_path.glob("store*"))


@pytest.mark.faults
def test_a_file_that_claims_to_be_enormous(tmp_path, cli):
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        for name, width in (("observations", (3,)), ("actions", (2,)), ("rewards", ()), ("terminals", ())):
            file.create_dataset(name, (10**11, *width), "f4", chunks=True)
    outcome = cli(["data", "import", f"d4rl:{tmp_path}/f.hdf5", "--out", str(tmp_path / "store")])
    assert (outcome.exit_code, "got 2800000000000 bytes when unpacked" in outcome.stderr) == (1, True), outcome.stderr


def test_bounds_of_an_environment(tmp_path, cli):
    d4rl(tmp_path / "f.hdf5", walks(actions=1))
    words = ["data", "import", f"d4rl:{tmp_path}/f.hdf5", "--out", str(tmp_path / "store"), "--env"]
    refused = cli([*words, "gym:Hopper-v5"])
    assert refused.exit_code == 1
    assert "expected actions of 3 numbers, as gym:Hopper-v5 has, got 1 numbers" in refused.stderr
    refused = cli([*words, "gym:CartPole-v1"])
    assert "expected actions of 1 whole numbers, as gym:CartPole-v1 has, got 1 numbers" in refused.stderr
    outcome = cli([*words, "gym:Pendulum-v1"])
    assert outcome.exit_code == 0, outcome.stderr
    assert "environment  gym:Pendulum-v1" in outcome.stdout
    assert "as imported  episodes end at terminals and timeouts" in outcome.stdout
    assert "range of those recorded" not in outcome.stdout
