"""Named groups of episodes, kept with the recordings: which to learn from, and which are held out."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, DataError
from offbook.runs.directory import write_atomic
from offbook.runs.seeding import generator

FILE = "splits.json"
HELD_OUT = ("held_out", "valid", "validation")
"""Names under which a split holds episodes out; others than the first are what imported recordings say."""

Splits = Mapping[str, Int64[np.ndarray, " episodes"]]


def read_splits(store: EpisodeStore) -> Splits:
    """The groups that are kept with a store: those of `write_splits`, else those that its recordings came with.

    Returns:
        Numbers of episodes in ascending order, by the group's name; empty where there are none.

    Raises:
        DataError: they are damaged, or name an episode that the store does not have.
    """
    file = store.path / FILE
    where, found = f"{store.path / 'store.json'}, extra.splits", store.schema.extra.get("splits", {})
    fix = f"make it anew: offbook data split {store.path}"
    if file.exists():
        where = str(file)
        try:
            found = json.loads(file.read_bytes())["splits"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(where, expected="groups of episodes", got=f"damage: {error}", fix=fix) from error
    if not isinstance(found, Mapping):
        raise DataError(where, expected="groups of episodes by name", got=repr(found)[:80], fix=fix)
    return {str(name): _numbers(store, name, numbers, where) for name, numbers in found.items()}


def left_out(store: EpisodeStore) -> int:
    """How many episodes trainings pass over because they are in no group, such as those recorded after the split.

    Without a group "train", all that are not held out are learnt from, and none is passed over.
    """
    splits = read_splits(store)
    return len(store) - len(np.unique(np.concatenate([*splits.values()]))) if "train" in splits else 0


def write_splits(store: EpisodeStore, splits: Mapping[str, Sequence[int] | np.ndarray]) -> None:
    """Keeps groups of episodes with a store, instead of those that it has.

    Args:
        store: the recordings.
        splits: numbers of episodes by the group's name; groups may share episodes.

    Raises:
        DataError: a group names an episode that the store does not have.
    """
    kept = {name: _numbers(store, name, numbers, str(store.path)).tolist() for name, numbers in splits.items()}
    write_atomic(store.path / FILE, json.dumps({"schema": 1, "splits": kept}) + "\n")


def draw_split(store: EpisodeStore, share: float, seed: int = 0) -> Splits:
    """Draws whole episodes at random to be held out.

    Args:
        store: the recordings.
        share: to hold out, between 0 and 1; at least one episode, and never all.
        seed: the same seed gives the same split.

    Returns:
        The groups "train" and "held_out".

    Raises:
        ConfigError: the share is not between 0 and 1.
        DataError: there are fewer than two episodes.
    """
    if not 0 < share < 1:
        raise ConfigError("share held out", expected="between 0 and 1", got=str(share), fix="choose one such as 0.1")
    if len(store) < 2:
        expected, fix = "two episodes or more to split", "record more"
        raise DataError(str(store.path), expected=expected, got=str(len(store)), fix=fix)
    count = min(max(round(share * len(store)), 1), len(store) - 1)
    order = generator(seed, "split").permutation(len(store)).astype(np.int64)
    return {"train": np.sort(order[count:]), HELD_OUT[0]: np.sort(order[:count])}


def ensure_split(store: EpisodeStore, share: float) -> None:
    """Holds episodes out, unless the recordings say already which, so that all who learn from them pass over the same.

    Args:
        store: the recordings.
        share: to hold out, see `draw_split`; drawn with seed 0.

    Raises:
        ConfigError: the share is not between 0 and 1.
        DataError: there are fewer than two episodes, or the groups that are kept are damaged.
    """
    if not read_splits(store):
        write_splits(store, draw_split(store, share))


def _numbers(store: EpisodeStore, name: str, numbers: Any, where: str) -> Int64[np.ndarray, " episodes"]:
    try:
        given = np.asarray(numbers)
    except ValueError:
        given = np.asarray(None)
    if given.ndim != 1 or (len(given) and given.dtype.kind not in "iu"):
        expected, fix = "a list of whole numbers of episodes", "split the store anew"
        raise DataError(f"{where}, group {name!r}", expected=expected, got=repr(numbers)[:80], fix=fix)
    array = np.unique(given.astype(np.int64))
    if len(array) and not 0 <= array[0] <= array[-1] < len(store):
        expected, got = f"episodes 0 to {len(store) - 1}", f"{array[0]} to {array[-1]}"
        raise DataError(f"{where}, group {name!r}", expected=expected, got=got, fix="split the store anew")
    return array
