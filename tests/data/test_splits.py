"""Groups of episodes that are kept with the recordings."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from made import SCHEMA, values

from offbook.cli.main import main
from offbook.data.splits import FILE, draw_split, ensure_split, left_out, read_splits, write_splits
from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, DataError


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_a_drawn_split_is_a_partition_by_episode_that_the_seed_decides(make_store, share):
    store = make_store([2] * 10)
    drawn = draw_split(store, share, 3)
    train, held_out = drawn["train"].tolist(), drawn["held_out"].tolist()
    assert sorted([*train, *held_out]) == list(range(10))
    assert len(held_out) == min(max(round(10 * share), 1), 9)
    assert all(a < b for part in (train, held_out) for a, b in pairwise(part))
    again = draw_split(store, share, 3)
    assert all((again[name] == drawn[name]).all() for name in drawn)
    with pytest.raises(ConfigError, match="share held out"):
        draw_split(store, 1.0, 3)


def test_episodes_are_held_out_once(make_store):
    store = make_store([2] * 10)
    ensure_split(store, 0.2)
    drawn = draw_split(store, 0.2)
    assert {name: of.tolist() for name, of in read_splits(store).items()} == {
        name: of.tolist() for name, of in drawn.items()
    }
    write_splits(store, {"held_out": [5]})
    ensure_split(store, 0.2)
    assert read_splits(store)["held_out"].tolist() == [5]


def test_one_episode_cannot_be_split(make_store):
    with pytest.raises(DataError, match="two episodes or more"):
        draw_split(make_store([3]), 0.5)


def test_what_is_written_is_read_and_does_not_touch_the_recordings(make_store):
    store = make_store([2] * 4)
    digest = store.digest
    assert read_splits(store) == {}
    write_splits(store, {"train": [3, 0, 1], "held_out": np.array([2])})
    again = EpisodeStore.open(store.path)
    assert {name: numbers.tolist() for name, numbers in read_splits(again).items()} == {
        "train": [0, 1, 3],
        "held_out": [2],
    }
    assert again.digest == digest
    again.verify()


def test_bad_groups_that_recordings_came_with_are_not_blamed_on_a_file_that_is_not_there(tmp_path):
    with EpisodeStore.create(tmp_path / "s", replace(SCHEMA, extra={"splits": {"valid": [7]}})) as writer:
        writer.append(values(0, 2), terminated=True, truncated=False)
    with pytest.raises(DataError) as caught:
        read_splits(EpisodeStore.open(tmp_path / "s"))
    assert str(tmp_path / "s" / "store.json") in caught.value.where
    assert FILE not in str(caught.value)


def test_episodes_recorded_after_the_split_are_counted_and_said(make_store, cli):
    store = make_store([2] * 4)
    write_splits(store, draw_split(store, 0.25))
    assert left_out(store) == 0
    with EpisodeStore.append_to(store.path) as writer:
        for number in (4, 5):
            writer.append(values(number, 2), terminated=True, truncated=False)
    store = EpisodeStore.open(store.path)
    assert left_out(store) == 2
    assert (
        "train 3, held_out 1; 2 in none: run offbook data split again" in cli(["data", "info", str(store.path)]).stdout
    )
    assert json.loads(cli(["data", "info", str(store.path), "--json"]).stdout)["left_out"] == 2
    cli(["data", "split", str(store.path)])
    assert left_out(store) == 0
    # Without a group to train on, everything that is not held out is learnt from.
    write_splits(store, {"held_out": [0]})
    assert left_out(store) == 0


def test_groups_that_recordings_came_with_are_kept_until_others_are_written(tmp_path):
    schema = replace(SCHEMA, extra={"splits": {"valid": [1]}})
    with EpisodeStore.create(tmp_path / "s", schema) as writer:
        for number in range(2):
            writer.append(values(number, 2), terminated=True, truncated=False)
    store = EpisodeStore.open(tmp_path / "s")
    assert read_splits(store)["valid"].tolist() == [1]
    write_splits(store, {"held_out": [0]})
    assert list(read_splits(store)) == ["held_out"]


def test_episodes_that_are_not_there_are_refused_and_the_old_groups_stay(make_store):
    store = make_store([2] * 3)
    write_splits(store, {"held_out": [2]})
    with pytest.raises(DataError, match="episodes 0 to 2, got 1 to 3"):
        write_splits(store, {"held_out": [1, 3]})
    with pytest.raises(DataError, match=r"whole numbers of episodes, got array"):
        write_splits(store, {"held_out": np.array([0.7])})
    assert read_splits(store)["held_out"].tolist() == [2]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "[1,2]", '["a"]', '{"splits": [1]}'),
        *(f'{{"splits": {{"a": {numbers}}}}}' for numbers in ("[9]", "[0.7]", "[[0], [1, 2]]", '["x"]', "1", "null")),
    ],
)
def test_a_damaged_file_is_named(make_store, content):
    store = make_store([2] * 3)
    (store.path / FILE).write_text(content)
    with pytest.raises(DataError, match=FILE):
        read_splits(store)


def test_the_verb_splits_and_info_tells(make_store, capsys):
    store = make_store([2] * 10)
    assert main(["data", "split", str(store.path), "--held-out", "0.3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {name: len(numbers) for name, numbers in said["splits"].items()} == {"train": 7, "held_out": 3}
    assert main(["data", "info", str(store.path)]) == 0
    assert "splits       train 7, held_out 3" in capsys.readouterr().out
    assert main(["data", "split", str(store.path), "--held-out", "2"]) == 2
    assert "between 0 and 1" in capsys.readouterr().err
