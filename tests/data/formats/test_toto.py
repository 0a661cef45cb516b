"""TOTO's recordings: a pickle, and pictures beside it that lie where they must."""

import pickle
import pickletools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from foreign import assert_same, toto, walks
from PIL import Image

from offbook.data.formats import export_dataset, import_dataset, left_out
from offbook.data.store import EpisodeStore, FieldSpec, Schema
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


ARM = Schema(
    (
        FieldSpec("joints", "float32", (7,), "observation", "rad"),
        FieldSpec("objects", "float32", (3,), "observation"),
        FieldSpec("front", "uint8", (18, 16, 3), "observation"),
        FieldSpec("action", "float32", (7,), "action", "rad"),
        FieldSpec("reward", "float64", (), "reward"),
    ),
    environment="offbook:pour",
    rate_hz=30.0,
    source="scripted expert",
)


def arm(folder, scores=(0.75, 0.0, 1.0), schema=ARM, **changes):
    """A store as the worlds on the table record it: the amount is the last reward."""
    random = np.random.default_rng(3)
    with EpisodeStore.create(folder, schema) as writer:
        for number, score in enumerate(scores):
            length = 4 + number
            reward = np.zeros(length)
            reward[-1] = score
            fields = {
                "joints": random.normal(size=(length + 1, 7)).astype(np.float32),
                "objects": random.normal(size=(length + 1, 3)).astype(np.float32),
                "front": random.integers(0, 256, (length + 1, 18, 16, 3), dtype=np.uint8),
                "action": random.normal(size=(length, 7)).astype(np.float32),
                "reward": reward,
            }
            fields = {spec.name: changes.get(spec.name, fields[spec.name]) for spec in schema.fields}
            outcome = {"seed": number, "success": score > 0, "score": score, "task": "pour", "source": "expert:1"}
            writer.append(fields, terminated=number == 0, truncated=number != 0, **outcome)
    return EpisodeStore.open(folder)


def test_a_store_goes_out_and_comes_back_equal(tmp_path):
    store = arm(tmp_path / "store")
    target = f"toto:{tmp_path / 'out'}"
    assert left_out(store, target) == ["objects"]
    assert export_dataset(store, target) == str(tmp_path / "out")
    back = import_dataset(target, tmp_path / "back")
    assert back.schema == replace(ARM, fields=tuple(spec for spec in ARM.fields if spec.name != "objects"))
    for number in range(len(store)):
        ours, theirs = store.episode(number), back.episode(number)
        for name in ("joints", "front", "action", "reward"):
            assert theirs.fields[name].dtype == ours.fields[name].dtype
            np.testing.assert_array_equal(theirs.fields[name], ours.fields[name])
        assert replace(theirs, fields={}) == replace(ours, fields={})
    # Once objects are gone, nothing is lost any more.
    export_dataset(back, f"toto:{tmp_path / 'again'}")
    assert import_dataset(f"toto:{tmp_path / 'again'}", tmp_path / "third").digest == back.digest
    small = import_dataset(f"{target}@24x20", tmp_path / "small")
    assert small.schema.observation_spec().cameras == {"front": (24, 20)}
    assert import_dataset(f"{target}@0", tmp_path / "bare").schema.observations == ("joints",)


def test_what_is_written_is_what_totos_own_loader_reads(tmp_path):
    store = arm(tmp_path / "store")
    folder = Path(export_dataset(store, f"toto:{tmp_path / 'out'}"))
    content = (folder / "parsed.pkl").read_bytes()
    # Nothing that only some versions of NumPy have: these recordings are read with old ones too.
    words = [argument for opcode, argument, _ in pickletools.genops(content) if opcode.name == "SHORT_BINUNICODE"]
    assert {word for word in words if "numpy" in word} == {"numpy"}
    paths = pickle.loads(content)
    keys = ["traj_id", "observations", "actions", "rewards", "terminated", "cam0c"]
    assert [list(path) for path in paths] == [keys] * 3
    for number, path in enumerate(paths):
        rows = store.episode(number).length + 1
        assert path["observations"].shape == path["actions"].shape == (rows, 7)
        assert path["rewards"].tolist() == [0.0] * (rows - 1) + [store.episode(number).score]
        assert path["terminated"].tolist() == [0] * (rows - 1) + [1]
        for row, name in enumerate(path["cam0c"]):
            with Image.open(folder / "data" / path["traj_id"] / name) as picture:
                np.testing.assert_array_equal(np.asarray(picture), store.episode(number).fields["front"][row])
        # As its loader takes every second row of everything but the name.
        assert {len(path[key][::2]) for key in keys[1:]} == {(rows + 1) // 2}
    assert [path["traj_id"] for path in paths if path["rewards"][-1] > 0] == ["trajectory_000000", "trajectory_000002"]


def test_poses_go_out_again_and_a_changed_pickle_is_read_as_a_foreign_one(tmp_path):
    toto(tmp_path / "toto", walks(size=7, actions=7))
    file = tmp_path / "toto" / "parsed.pkl"
    made = pickle.loads(file.read_bytes())
    for path in made:
        path["eef_pose_observations"] = np.random.default_rng(0).normal(size=(len(path["actions"]), 7))
    file.write_bytes(pickle.dumps(made))
    store = import_dataset(f"toto:{file}@0", tmp_path / "store")
    folder = Path(export_dataset(store, f"toto:{tmp_path / 'out'}"))
    assert import_dataset(f"toto:{folder}", tmp_path / "back").digest == store.digest
    paths = pickle.loads((folder / "parsed.pkl").read_bytes())
    paths[0]["rewards"][-1] = 9.0
    (folder / "parsed.pkl").write_bytes(pickle.dumps(paths))
    changed = import_dataset(f"toto:{folder}", tmp_path / "changed")
    assert changed.episodes["score"][0] == 9.0
    assert changed.schema.extra["import"]["format"] == "toto"


def lacking(name):
    return replace(ARM, fields=tuple(spec for spec in ARM.fields if spec.name != name))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schema": lacking("joints")}, "expected episodes with joints, action and reward, got 3 with objects, front"),
        ({"schema": lacking("reward")}, "expected episodes with joints, action and reward"),
        ({"scores": ()}, "expected episodes with joints, action and reward, got 0 with"),
        ({"scores": (1.0,), "reward": np.full(4, 0.25)}, "episode 0: expected rewards of 0, and at the last step the"),
        ({"scores": (1.0,), "reward": np.array([0, 0, 0, 0.5])}, "end with 0.5 and sum up to 0.5, and the score 1.0"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(tmp_path, cli, settings, words):
    store = arm(tmp_path / "store", **settings)
    outcome = cli(["data", "export", str(store.path), f"toto:{tmp_path}/out"])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert words in outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_an_export_never_takes_the_place_of_a_folder(tmp_path):
    store = arm(tmp_path / "store")
    with pytest.raises(DataError, match="expected a new name, got a folder that exists"):
        export_dataset(store, f"toto:{tmp_path}/store")
