"""Training masked trajectory models on recordings that lack, spoil or hide something."""

import numpy as np
import pytest
import torch

import linear_world
from mtm_runs import BRIEF, offbook, refused
from offbook.data.splits import write_splits
from offbook.data.store import FieldSpec
from offbook.errors import DataError
from offbook.learning.trajectories import Trajectories
from offbook.systems.mtm import Dynamics, load_model
from offbook.systems.mtm.card import role_card


def spoil(field, where, value=np.nan):
    def change(number, values):
        if number in where:
            values[field][where[number]] = value

    return change


@pytest.mark.faults
@pytest.mark.parametrize("field", ["s", "a", "reward"])
def test_nan_is_refused_or_dropped_and_counted(cli, tmp_path, field):
    store = linear_world.record(tmp_path / "store", (12,) * 8, change=spoil(field, {3: 6, 4: 6}))
    write_splits(store, {"held_out": [0, 1]})
    words = ["train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF]
    told = refused(cli, 1, *words)
    place = "episode 3, step 6" if field != "reward" else "14 steps without"
    assert f"field {field!r}" in told
    assert place in told
    assert "expected finite" in told
    assert told.rstrip().endswith("; leave such steps out: --on-nan drop.")
    assert not (tmp_path / "run").exists()
    _, said = offbook(cli, *words, "--on-nan", "drop")
    # With a return to go, the steps before the reward are lost too.
    lost = {"s": 2 * 4, "a": 2 * 4, "reward": 2 * 7}[field]
    assert f"{lost} of 54 windows are left out for NaN or infinity" in said


@pytest.mark.faults
def test_where_every_return_is_nan_none_can_be_learnt(cli, tmp_path):
    store = linear_world.record(tmp_path / "store", (12,) * 4, change=spoil("reward", dict.fromkeys(range(4), 11)))
    words = ["train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF, "--on-nan", "drop"]
    assert "field 'reward': expected a finite return to go, got none; learn without returns" in refused(cli, 1, *words)
    assert offbook(cli, *words, "returns:none")[0]["role"] == "bc"


@pytest.mark.faults
def test_held_out_episodes_without_a_window_cost_the_card_alone(cli, tmp_path):
    store = linear_world.record(tmp_path / "store", (12, 12, 3, 6), change=spoil("s", {3: slice(3, 4)}))
    write_splits(store, {"held_out": [2, 3]})
    words = ["train", "mtm", "--data", store.path, "--on-nan", "drop", *BRIEF, "--specialists"]
    found, said = offbook(cli, *words, "--out", tmp_path / "run")
    assert found["card"] == []
    assert "held_out_loss" not in found["metrics"]
    assert "no role card: no episode is held out that has a window of 4 steps" in said
    data = Trajectories(store, on_nan="drop")
    with pytest.raises(DataError, match="a held-out episode with a window of 4 steps, got none among 2; hold more"):
        role_card(load_model(tmp_path / "run"), data)
    assert not (tmp_path / "run" / "specialists").exists()


@pytest.mark.faults
def test_specialists_without_an_episode_to_learn_from_are_left_out(cli, tmp_path):
    def change(number, values):
        values["a" if number % 2 else "reward"] = None

    store = linear_world.record(tmp_path / "store", (8,) * 8, change=change)
    write_splits(store, {"held_out": [0, 1]})
    words = ["train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF, "--specialists"]
    found, said = offbook(cli, *words)
    assert "MLP, rcbc is left out: " in said
    assert {name for row in found["card"] for name in row["errors"] if name.startswith("MLP")} == {
        "MLP, bc", "MLP, bc on 4 states", "MLP, id", "MLP, fd",
    }  # fmt: skip


@pytest.mark.faults
def test_episodes_shorter_than_a_window_are_counted_and_not_all_may_be(cli, tmp_path):
    store = linear_world.record(tmp_path / "store", (3, 9, 2, 5, 9))
    write_splits(store, {"held_out": [4]})
    words = ["train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF]
    told = refused(cli, 1, *words, "--model.length", "10")
    assert "windows of 10 steps: expected an episode of 10 steps or more" in told
    assert "got 4 episodes, the longest of 9 steps" in told
    assert not (tmp_path / "run").exists()
    _, said = offbook(cli, *words)
    assert said.count("2 of 4 episodes have no window of 4 steps") == 1


def test_a_constant_entry_is_said_once(cli, tmp_path):
    def change(number, values):
        values["s"][:, 1] = 0.1

    store = linear_world.record(tmp_path / "store", change=change)
    words = ["train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF, "--specialists"]
    _, said = offbook(cli, *words)
    assert said.count("1 of 3 entries of the state never vary and tell nothing") == 1
    told = Dynamics(load_model(tmp_path / "run")).forward(torch.randn(5, 2, 3), torch.randn(5, 2, 2))
    assert (told[:, 1] == torch.tensor(0.1)).all()


def test_a_world_of_other_sizes_is_refused_with_both(cli, tmp_path):
    fields = (FieldSpec("observation", "float32", (3,), "observation"), *linear_world.FIELDS[1:])

    def change(number, values):
        values["observation"] = values.pop("s")

    store = linear_world.record(tmp_path / "store", fields=fields, change=change)
    offbook(cli, "train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF)
    told = refused(cli, 2, "evaluate", tmp_path / "run", "--task", "gym:MountainCarContinuous-v0", "--episodes", "1")
    assert "expected a state part 'observation' of size 3, got {'observation': 2}" in told
    told = refused(cli, 2, "evaluate", tmp_path / "run", "--task", "gym:Pendulum-v1", "--episodes", "1")
    assert "expected actions of size 2, choices None, got size 1, choices None" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "joints"], "--parts joints: expected a part of the recordings in"),
        (["--patterns", "autoo"], "--patterns: expected one or more of auto, random"),
        (["--fractions", "1.5"], "--fractions: expected one or more shares from 0 to 1"),
        (["--model.length", "1"], "--model.length: expected 2 to 4096 steps, got 1"),
        (["--bins", "1"], "--bins: expected 2 to 65536"),
        (["--target", "inf"], "--target: expected a share"),
        (["--held-out", "1"], "--held-out: expected a share in [0, 1)"),
        (["--validate-every", "0"], "--validate-every: expected 1 or more"),
    ],
)
def test_wrong_use(cli, tmp_path, words, message):
    store = linear_world.record(tmp_path / "store", (5,) * 3)
    told = refused(cli, 2, "train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF, *words)
    assert message in told
    assert not (tmp_path / "run").exists()


def test_recordings_without_states_or_with_two_actions_are_refused(cli, tmp_path):
    front = FieldSpec("front", "uint8", (16, 16, 3), "observation")

    def pictures(number, values):
        values["front"] = np.zeros((len(values["a"]) + 1, 16, 16, 3))

    def twice(number, values):
        values["b"] = values["a"]

    store = linear_world.record(tmp_path / "a", (5,), fields=(front, *linear_world.FIELDS[1:]), change=pictures)
    told = refused(cli, 2, "train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF)
    assert "expected something to look at, got nothing" in told
    other = FieldSpec("b", "float32", (2,), "action")
    store = linear_world.record(tmp_path / "b", (5,), fields=(*linear_world.FIELDS, other), change=twice)
    told = refused(cli, 1, "train", "mtm", "--data", store.path, "--out", tmp_path / "run", *BRIEF)
    assert "expected one action field, got 2" in told
