"""What a user meets on the command line who trains on, or asks for, what chains of trials cannot have."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import linear_world
from killing import check_training
from offbook.data.store import EpisodeStore, FieldSpec
from offbook.learning.hindsight_presets import smoke
from offbook.learning.hindsight_training import train_hindsight
from offbook.runs.directory import RunDirectory

WORDS = ["--preset", "smoke", "--fit.steps", "4", "--fit.log-every", "2"]


@pytest.mark.faults
@pytest.mark.parametrize("field", ["s", "a"])
@pytest.mark.parametrize("verb", ["agentic_transformer", "dt"])
def test_nan_is_placed_and_its_episode_to_be_left_out(cli, tmp_path, verb, field):
    def spoil(number, values):
        if number == 2:
            values[field][6] = np.nan

    store = linear_world.record(tmp_path / "store", (12,) * 8, change=spoil)
    done = cli(["train", verb, "--data", str(store.path), "--out", str(tmp_path / "run"), "--held-out", "0", *WORDS])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert f"field {field!r}, episode 2, step 6: expected finite numbers, got NaN or infinity; " in done.stderr
    assert done.stderr.endswith("; leave the episode out, or record it again.\n")
    assert not (tmp_path / "run").exists()


def train(cli, tmp_path, words=(), lengths=(12,) * 8, **settings):
    """A training of recordings of a linear world from the command line."""
    path = linear_world.record(tmp_path / "store", lengths, **settings).path
    return cli(["train", "agentic_transformer", "--data", str(path), "--out", str(tmp_path / "run"), *WORDS, *words])


def spoil_reward(number, values):
    if number == 2:
        values["reward"][6] = np.nan


def other_actions(number, values):
    """Two kinds of actions of unequal sizes, the second one in the episodes 3 and 5."""
    values["b"] = np.zeros((len(values["a"]), 4))
    values["a" if number in (3, 5) else "b"] = None


@pytest.mark.faults
@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({"change": spoil_reward}, [], "field 'reward', episode 2, step 6: expected a finite reward, got nan; leave"),
        ({"fields": linear_world.FIELDS[:2]}, [], "expected rewards, to tell good trials from bad ones, got none; "),
        ({"change": linear_world.lacking("reward", [4])}, [], "field 'reward': expected values in all episodes"),
        ({}, ["--n-trials", "9", "9"], "group '': expected 9 episodes or more, the fewest of n_trials, got 8; lower"),
        (
            {"change": other_actions, "fields": (*linear_world.FIELDS, FieldSpec("b", "float32", (4,), "action"))},
            [],
            "expected one action field, the same in all episodes, got 'a' of size 2 in 6 (episodes 0, 1, 2, 4, 6, ...) "
            "and 'b' of size 4 in 2 (episodes 3, 5); keep",
        ),
    ],
    ids=["a reward is NaN", "no rewards", "an episode without", "too few trials", "actions of two sizes"],
)
def test_what_cannot_be_learnt_from_is_refused_before_a_folder_is_made(cli, tmp_path, settings, words, message):
    done = train(cli, tmp_path, ["--held-out", "0", *words], **settings)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_what_is_passed_over_or_cut_short_is_said(cli, tmp_path):
    # Rewards of a linear world are negative, which is allowed.
    change = linear_world.lacking("a", range(3, 8))
    done = train(cli, tmp_path, ["--n-trials", "1", "4"], change=change)
    assert done.exit_code == 0, done.stderr
    for said in (
        "5 of 8 episodes have no actions, or lack a part of the state: not learnt from",
        "1 of 1 groups have fewer than 4 trials: shorter chains",
        "no validation: none of 3 episodes is held out",
    ):
        assert done.stderr.count(said) == 1
    assert "learnt from 3 episodes" in done.stdout


@pytest.mark.faults
def test_without_any_improvement_it_says_so(cli, tmp_path):
    done = train(cli, tmp_path, change=lambda number, values: values["reward"].fill(0.0))
    assert done.exit_code == 0, done.stderr
    assert "the returns are equal in every group, there is no improvement to learn from" in done.stderr


LONG = replace(
    smoke(), model=replace(smoke().model, width=16, dropout=0.1), validate_every=7,
    fit=replace(smoke().fit, steps=80, batch_size=4, checkpoint_every=3, log_every=2, device="cpu"),
)  # fmt: skip


def learn(store: EpisodeStore, path: Path) -> None:
    train_hindsight(store, LONG, RunDirectory.create(path, LONG, resume=True), resume=True)


@pytest.mark.faults
def test_killed_again_and_again_training_ends_with_the_same_bytes(tmp_path):
    store = linear_world.record(tmp_path / "store", (12,) * 8)
    check_training(learn, store, tmp_path, LONG.fit.steps, times=4)
