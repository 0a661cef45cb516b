"""Pickled lists of paths, as three families of code write them."""

import os
import pickle

import numpy as np
import pytest
from foreign import as_paths, assert_same, paths, walks

from offbook.data.formats import import_dataset
from offbook.data.formats import paths as paths_format
from offbook.errors import DataError

LARGE = np.zeros((100, 100))


def imported(tmp_path, made, name="store"):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(made))
    return import_dataset(f"paths:{tmp_path}/p.pkl", tmp_path / name)


@pytest.mark.parametrize("protocol", range(6))
def test_decision_transformer_lists(tmp_path, protocol):
    episodes = walks()
    paths(tmp_path / "p.pkl", episodes, protocol=protocol)
    store = import_dataset(f"paths:{tmp_path}/p.pkl", tmp_path / "store")
    assert_same(store, episodes)
    assert store.episodes["terminated"].tolist() == [True, False, True]
    assert store.episodes["truncated"].tolist() == [False, True, False]
    assert "recorded next observation" in store.schema.extra["import"]["stated"][0]


def test_mjrl_lists_without_next_observations(tmp_path):
    episodes = walks((5, 1, 7))
    made = as_paths(episodes, after=False)
    for number, path in enumerate(made):
        length = len(path["actions"])
        path["rewards"] = path["rewards"].tolist()
        path["agent_infos"] = {"mean": np.ones((length, 2)), "log_std": np.arange(length), "evaluation": None}
        path["env_infos"] = {"goal_achieved": np.arange(length) == 9 * (number == 0) - 6, "note": ["a"] * length}
    del made[2]["agent_infos"]
    made.append({key: value[:1] for key, value in as_paths(episodes)[0].items() if key in ("observations", "actions")})
    made[-1] |= {"rewards": [0.0], "env_infos": {"goal_achieved": [0]}}
    store = imported(tmp_path, made)
    for episode in episodes:
        episode["reward"] = episode["reward"].astype(np.float64)
    assert_same(store, episodes)
    assert store.schema.named("other") == ("agent_infos.mean", "agent_infos.log_std", "env_infos.goal_achieved")
    assert store.present("agent_infos.mean").tolist() == [True, True, False]
    assert store.episodes["success"].tolist() == [1.0, 0.0, 0.0]
    assert not store.episodes["terminated"].any()
    stated = " / ".join(store.schema.extra["import"]["stated"])
    assert "what the last step of an episode led to is not recorded" in stated
    assert "1 episodes of a single row are left out" in stated
    assert "left out, being no numbers for each step: agent_infos.evaluation, env_infos.note" in stated


def test_one_observation_more_is_recognised_when_all_have_it(tmp_path):
    episodes = walks()
    made = [{"observations": {"a": {"b": e["observation"]}}, "actions": e["action"]} for e in episodes]
    store = imported(tmp_path, made)
    assert_same(store, episodes, "observation", "action", rename={"observation": "a.b"})
    assert store.schema.reward is None
    assert "one more than its actions: the last one is what" in store.schema.extra["import"]["stated"][0]
    made[1]["observations"]["a"]["b"] = made[1]["observations"]["a"]["b"][:-1]
    with pytest.raises(DataError, match=r"path 0, a\.b: expected 5 rows.*got 6 rows, one more than there are actions"):
        imported(tmp_path, made, "other")


def change(**changes):
    def apply(made):
        made[1].update(changes)
        for key in [key for key, value in made[1].items() if value is None]:
            del made[1][key]
        return made

    return apply


class Command:
    def __reduce__(self):
        return os.system, ("touch canary",)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda made: [], "expected a list of paths, got an empty list; save a list of dicts"),
        (lambda made: {"observations": 1}, "expected a list of paths, got a dict"),
        (lambda made: [3], "path 0: expected a dict, got a int"),
        (change(actions=None), "path 1: expected the key 'actions', got next_observations, observations, rewards"),
        (change(observations=None), "path 1: expected the key 'observations'"),
        (change(rewards=np.zeros(2)), "path 1, reward: expected 3 rows, one for each action, got 2 rows"),
        (change(rewards=None), "path 1: expected the key 'rewards', got actions"),
        (change(observations=np.zeros((4, 3), "f4")), "path 1, observation: expected 3 rows.*got 4 rows, one more"),
        (change(observations=np.zeros(3, "f4")), r"path 1, observation: expected shape \(steps, size\), got shape"),
        (change(observations=np.zeros((3, 4), "f4")), r"path 1, observation: expected float32 \(4,\) as before each"),
        (change(actions=np.zeros(3, "f4")), r"path 1, actions: expected shape \(steps, size\), got shape \(3,\)"),
        (change(actions=[[1.0], [1.0, 2.0], [1.0]]), "path 1, actions: expected numbers, got rows of different"),
        (change(actions=[[[1.0]]] * 3), "path 1, actions: expected rows of numbers, got a list nested too deep"),
        (change(actions=np.array([None] * 3)), "path 1, actions: expected numbers, got an array of Python objects"),
        (change(actions="left"), "path 1, actions: expected numbers, got str"),
        (change(terminals=np.array([1, 0, 0])), "terminals: expected the flag in the last row only, got one in row 0"),
        (
            change(actions=Command()),
            f"expected a pickle of plain data, got .* names {os.system.__module__}.system",
        ),
        (
            lambda made: [{"observations": LARGE, "actions": LARGE}] * 100,
            "expected every array once, got the same ones again and again",
        ),
    ],
)
def test_crooked_lists_are_refused_with_a_sentence(tmp_path, cli, make, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(make(as_paths(walks()))))
    with pytest.raises(DataError, match=words):
        import_dataset(f"paths:{tmp_path}/p.pkl", tmp_path / "store")
    outcome = cli(["data", "import", "paths:p.pkl", "--out", str(tmp_path / "store")])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    # Nothing half-written, and no canary.
    assert [path.name for path in tmp_path.iterdir()] == ["p.pkl"]


@pytest.mark.faults
def test_bombs_are_refused_in_bounded_time(tmp_path):
    """Small files whose contents, followed through, would never end."""
    tree = {}
    for _ in range(30):
        tree = {"a": tree, "b": tree}
    with pytest.raises(DataError, match="expected at most 2000 of them, got more"):
        imported(tmp_path, [{"observations": tree, "actions": 1}])
    row = [0.0] * 10_000
    with pytest.raises(DataError, match="expected every array once"):
        imported(tmp_path, [{"observations": [row] * 10_000, "actions": 1}])
    names = [{"observations": np.zeros((2, 1)), "actions": np.zeros((2, 1)), "env_infos": {"a.b": 1, "a": {"b": 2}}}]
    with pytest.raises(DataError, match=r"a\.b: expected names that differ, got two of this"):
        imported(tmp_path, names)


@pytest.mark.faults
def test_files_that_are_cut_or_absent(tmp_path, cli):
    paths(tmp_path / "p.pkl", walks())
    content = (tmp_path / "p.pkl").read_bytes()
    (tmp_path / "p.pkl").write_bytes(content[: len(content) // 2])
    words = ["data", "import", f"paths:{tmp_path}/p.pkl", "--out", str(tmp_path / "store")]
    assert "expected a whole pickle, got one that is damaged or cut short" in cli(words).stderr
    (tmp_path / "p.pkl").unlink()
    assert "expected a pickle, got No such file or directory" in cli(words).stderr
    # A list that contains itself.
    (tmp_path / "p.pkl").write_bytes(
        b"\x80\x04]q\x00}q\x01(X\x0c\x00\x00\x00observationsh\x01X\x07\x00\x00\x00actionsK\x01ua."
    )
    outcome = cli(words)
    assert (outcome.exit_code, "keys: expected at most 2000 of them, got more" in outcome.stderr) == (1, True), (
        outcome.stderr
    )


@pytest.mark.faults
def test_lists_are_counted_without_making_arrays_of_them():
    nested = [0.0] * 10
    for _ in range(9):
        nested = [nested] * 10
    assert paths_format._rows(nested) == 10
    assert [paths_format._rows(value) for value in ([], np.zeros(()), np.zeros((4, 2)), {}, 3)] == [0, -1, 4, -1, -1]
