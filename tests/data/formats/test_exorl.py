"""Folders of ExoRL episodes: row t + 1 holds the action taken at observation t."""

import numpy as np
import pytest
from foreign import assert_same, exorl, walks

from offbook.data.formats import import_dataset, limits
from offbook.data.store import EpisodeStore
from offbook.errors import DataError


def test_alignment_order_and_physics(tmp_path):
    episodes = walks(range(2, 14))
    exorl(tmp_path / "walker" / "buffer", episodes)
    store = import_dataset(f"exorl:{tmp_path}/walker", tmp_path / "store")
    assert_same(store, episodes)
    assert store.schema.actions == ("action",)
    assert store.schema.named("other") == ("discount", "physics")
    physics = store.episode(3).fields["physics"]
    # The state in which each step begins.
    np.testing.assert_array_equal(physics, np.arange(10.0).reshape(5, 2) + 300)
    assert store.episodes["terminated"].tolist() == [True, False] * 6
    # The fillers of row 0 are nowhere.
    assert store.schema.action_spec().high[0] < 1
    assert "row t + 1 belong to observation t" in store.schema.extra["import"]["stated"][0]


def test_one_array_is_cut_into_the_parts_of_the_environment(tmp_path, cli):
    episodes = walks(size=24, actions=6)
    exorl(tmp_path / "walker", episodes)
    words = ["data", "import", f"exorl:{tmp_path}/walker", "--out", str(tmp_path / "store"), "--env", "dmc:walker-walk"]
    outcome = cli(words)
    assert outcome.exit_code == 0, outcome.stderr
    taken = (
        "as imported  the observation is taken for what dmc:walker-walk shows, in its order: orientations 14, height"
    )
    assert taken in outcome.stdout
    fields = EpisodeStore.open(tmp_path / "store").episode(2).fields
    joined = np.concatenate([fields[name] for name in ("orientations", "height", "velocity")], axis=1)
    np.testing.assert_array_equal(joined, episodes[2]["observation"])
    exorl(tmp_path / "other", walks(size=23, actions=6))
    words[2], words[4] = f"exorl:{tmp_path}/other", str(tmp_path / "second")
    assert "dmc:walker-walk does not show what was recorded (observation 23): it shows orient" in cli(words).stdout


def save(file, **changes):
    rows = 4
    arrays = {
        "observation": np.zeros((rows, 3), np.float32),
        "action": np.zeros((rows, 2), np.float32),
        "reward": np.zeros((rows, 1), np.float32),
        "discount": np.ones((rows, 1), np.float32),
        **changes,
    }
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.faults
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"discount": None}, "episode_000001_3.npz: expected the key 'discount', got action, observation, reward"),
        ({"action": None}, "episode_000001_3.npz: expected the key 'action'"),
        ({"observation": np.zeros((5, 3), np.float32)}, "observation: expected 4 rows.*got 5 rows, one more than"),
        ({"reward": np.zeros(3, np.float32)}, "reward: expected 4 rows, one for each action, got 3 rows"),
        ({"action": np.zeros(4, np.float32)}, r"actions: expected shape \(steps, size\), got shape \(3,\)"),
        ({"action": np.zeros((4, 3), np.float32)}, r"field 'action': expected shape \(3, 2\) for 3 steps"),
        (
            {"observation": np.array([None] * 4)},
            "expected a whole .npz of numbers, got ValueError Object arrays cannot",
        ),
        ({"physics": np.array(["a"] * 4)}, "physics: expected numbers, got an array of <U1"),
    ],
)
def test_crooked_episodes_are_refused_with_a_sentence(tmp_path, cli, changes, words):
    save(tmp_path / "episode_000000_3.npz")
    save(tmp_path / "episode_000001_3.npz", **changes)
    with pytest.raises(DataError, match=words):
        import_dataset(f"exorl:{tmp_path}", tmp_path / "store")
    outcome = cli(["data", "import", f"exorl:{tmp_path}", "--out", str(tmp_path / "store")])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert not list(tmp_path.glob("store*"))


@pytest.mark.faults
def test_damaged_large_and_absent_files(tmp_path, cli, monkeypatch):
    words = ["data", "import", f"exorl:{tmp_path}", "--out", str(tmp_path / "store")]
    assert "expected files such as episode_000000_1000.npz, got none" in cli(words).stderr
    file = tmp_path / "episode_000000_3.npz"
    save(file)
    content = file.read_bytes()
    changed = bytearray(content)
    changed[200:220] = b"\xff" * 20
    for damaged in (content[:100], content[:-30], b"", b"\x80\x04N.", bytes(changed)):
        file.write_bytes(damaged)
        outcome = cli(words)
        assert (outcome.exit_code, "expected a whole .npz of numbers" in outcome.stderr) == (1, True), outcome.stderr
    file.write_bytes(content)
    monkeypatch.setattr(limits, "MAX_BYTES", 100)
    assert "expected at most 100 bytes for an episode, got 624" in cli(words).stderr
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
