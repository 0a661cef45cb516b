"""TOTO's recordings: a pickle, and pictures beside it that lie where they must."""

import pickle

import numpy as np
import pytest
from foreign import assert_same, toto, walks

from offbook.data.formats import import_dataset
from offbook.errors import DataError

RENAME = {"observation": "joints", "front": "cam0c"}


def test_joints_pictures_and_the_weight(tmp_path):
    episodes = walks(size=7, actions=7, picture=True)
    for number, episode in enumerate(episodes):
        episode["reward"] = np.zeros(len(episode["reward"]))
        episode["reward"][-1] = number * 1.5
    toto(tmp_path / "toto", episodes)
    store = import_dataset(f"toto:{tmp_path}/toto", tmp_path / "store")
    # The weight, which stands in the row of the final observation, is the reward of the last step.
    assert_same(store, episodes, "observation", "front", "action", "reward", rename=RENAME)
    assert store.episodes["score"].tolist() == [0.0, 1.5, 3.0]
    assert store.episodes["success"].tolist() == [0.0, 1.0, 1.0]
    assert store.schema.rate_hz == 30.0
    assert store.schema.observation_spec().cameras == {"cam0c": (20, 16)}
    assert (store.schema["joints"].units, store.schema["action"].units) == ("rad", "rad")
    said = store.schema.extra["import"]
    assert said["trajectories"] == ["trajectory_0", "trajectory_1", "trajectory_2"]
    assert "depth is left out" in said["stated"]
    small = import_dataset(f"toto:{tmp_path}/toto/parsed.pkl@16x18", tmp_path / "small")
    assert small.schema.observation_spec().cameras == {"cam0c": (16, 18)}
    assert "the pictures are scaled to 16x18" in small.schema.extra["import"]["stated"]
    bare = import_dataset(f"toto:{tmp_path}/toto@0", tmp_path / "bare")
    assert bare.schema.observations == ("joints",)


def test_poses_and_embeddings(tmp_path):
    toto(tmp_path / "toto", walks(size=7, actions=7))
    file = tmp_path / "toto" / "parsed.pkl"
    made = pickle.loads(file.read_bytes())
    for path in made:
        path["eef_pose_observations"] = path["eef_pose_actions"] = np.ones((len(path["actions"]), 7))
        path["embeddings"] = np.ones((len(path["actions"]), 16), np.float32)
    file.write_bytes(pickle.dumps(made))
    store = import_dataset(f"toto:{file}@0", tmp_path / "store")
    assert store.schema.named("other") == ("eef_pose", "eef_pose_action", "embeddings")


def edit(**changes):
    def apply(made, folder):
        made[1].update(changes)
        return [{key: value for key, value in path.items() if value is not None} for path in made]

    return apply


def cut_picture(made, folder):
    file = folder / "data" / "trajectory_1" / "00002c.png"
    file.write_bytes(file.read_bytes()[:40])
    return made


def link(made, folder):
    (folder.parent / "elsewhere.png").write_bytes((folder / "data" / "trajectory_1" / "00002c.png").read_bytes())
    (folder / "data" / "trajectory_1" / "00002c.png").unlink()
    (folder / "data" / "trajectory_1" / "00002c.png").symlink_to(folder.parent / "elsewhere.png")
    return made


@pytest.mark.faults
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda made, folder: [], "expected a list of paths, got an empty list"),
        (edit(rewards=None), "path 1: expected the key 'rewards'"),
        (edit(actions=None), "path 1: expected the key 'actions'"),
        (edit(rewards=np.zeros(2)), "path 1, rewards: expected 4 rows.*got 2 rows"),
        (
            edit(observations=np.zeros((5, 7), "f4")),
            "joints: expected 4 rows, one for each action, got 5 rows, one",
        ),
        (edit(observations=np.zeros(4, "f4")), r"path 1: expected observations and actions of shape \(steps, 7\)"),
        (edit(observations=np.array([None])), "observations: expected numbers, got an array of Python objects"),
        (edit(cam0c=["a.png"]), "cam0c: expected 4 rows, one for each action, got 1 rows"),
        (edit(cam0c=None), "expected the key 'cam0c'.*leave them out with @0"),
        (
            edit(cam0c=["00000c.png"] * 3 + ["none.png"]),
            "none.png: expected a picture, got no such file; give the",
        ),
        (edit(traj_id="../../secret"), r"expected a picture beside the pickle, got a path that leads elsewhere"),
        (edit(traj_id="/etc"), "got a path that leads elsewhere"),
        (link, "got a path that leads elsewhere"),
        (cut_picture, "00002c.png: expected a picture, got "),
        (edit(traj_id=open), "expected a pickle of plain data, got one that names io.open"),
    ],
)
def test_crooked_recordings_are_refused_with_a_sentence(tmp_path, cli, make, words):
    folder = tmp_path / "toto"
    toto(folder, walks(size=7, actions=7, picture=True))
    made = make(pickle.loads((folder / "parsed.pkl").read_bytes()), folder)
    (folder / "parsed.pkl").write_bytes(pickle.dumps(made))
    with pytest.raises(DataError, match=words):
        import_dataset(f"toto:{folder}", tmp_path / "store")
    outcome = cli(["data", "import", f"toto:{folder}", "--out", str(tmp_path / "store")])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert not list(tmp_path.glob("store*"))


@pytest.mark.faults
def test_files_that_are_cut_or_absent(tmp_path, cli):
    toto(tmp_path / "toto", walks(size=7, actions=7, picture=True))
    file = tmp_path / "toto" / "parsed.pkl"
    file.write_bytes(file.read_bytes()[:300])
    words = ["data", "import", f"toto:{tmp_path}/toto", "--out", str(tmp_path / "store")]
    assert "expected a whole pickle" in cli(words).stderr
    file.unlink()
    assert "parsed.pkl: expected a pickle, got No such file" in cli(words).stderr
    assert not list(tmp_path.glob("store*"))
