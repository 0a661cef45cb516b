"""URLB and ExoRL: a folder with one `.npz` file for each episode.

Each file has T + 1 rows. Row 0 is the reset: its observation is the first, and its action, reward and discount are
fillers. Row t + 1 holds the action that was taken at observation t, the reward and discount that it brought, and the
observation that it led to. `physics`, the simulator's state, and whatever else a file holds go with the observation of
their own row. What a task would have rewarded follows from `physics`.

Source: `dmc.py` and `replay_buffer.py` of https://github.com/denisyarats/exorl (the layout).
"""

import zipfile
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np

from offbook.data.formats import Recordings, Rewards, limits
from offbook.data.formats.transitions import Steps, need, numbers, recordings, same_rows
from offbook.data.index import Outcome
from offbook.errors import DataError

_CORE = ("observation", "action", "reward", "discount")
_WHOLE = "a whole .npz of numbers"
_ROWS = "the action, reward and discount of row t + 1 belong to observation t; those of row 0 are fillers and left out"
_STATED = (
    "other values, such as physics, are those of the observation before each step; those of the last row are left out",
    "an episode is terminated when its last discount is 0",
)


def read(source: str, rewards: Rewards | None = None) -> Recordings:
    """Opens a folder of episodes. Its name, or that of the one above `buffer`, is taken for who acted.

    Args:
        source: the folder that holds the files, or the one above its `buffer`.
        rewards: take the place of those recorded, and name the task of each episode; None keeps these, and names none.

    Raises:
        DataError: there are no files, one is damaged or lacks a key, or its arrays disagree.
    """
    folder = Path(source).expanduser()
    if not any(folder.glob("*.npz")) and (folder / "buffer").is_dir():
        folder = folder / "buffer"
    files = sorted(folder.glob("*.npz"), key=_order)
    if not files:
        fix = "give the folder in which the episodes lie"
        raise DataError(str(folder), expected="files such as episode_000000_1000.npz", got="none", fix=fix)
    stored = _check_sizes(files)
    keys = (*_CORE, *_steps(files[0], _CORE).others)
    whole = folder.resolve()
    collector = (whole.parent if whole.name == "buffer" else whole).name

    def episodes() -> Generator[tuple[str, Steps], None, None]:
        for file in files:
            steps = _steps(file, keys, rewards)
            task = "" if rewards is None else rewards.task
            yield str(file), replace(steps, outcome=replace(steps.outcome, task=task, source=collector))

    stated = _STATED if rewards is None else (*_STATED, f"rewards are those of {rewards.task}, by the physics")
    return recordings("exorl", Path(source), episodes, stated, after=_ROWS, total=len(files), stored=stored)


def _steps(file: Path, keys: tuple[str, ...], rewards: Rewards | None = None) -> Steps:
    arrays = _arrays(file)
    if rewards is not None:
        need(arrays, ("physics",), str(file), "leave --task out, or give recordings that keep the physics")
    need(arrays, keys, str(file), "give files in the layout of URLB, all with the same keys")
    rows = (arrays["action"].shape or (0,))[0]
    if rows < 2:
        raise DataError(str(file), expected="two rows or more", got=str(rows), fix="leave empty episodes out")
    for name, array in arrays.items():
        same_rows(name, array, rows, str(file))
    observation, discount = arrays["observation"], arrays["discount"][1:].reshape(rows - 1, -1)[:, 0]
    others = {name: array[:-1] for name, array in arrays.items() if name not in _CORE and 0 not in array.shape}
    terminated = bool(discount[-1] == 0)
    return Steps(
        observations={"observation": observation[:-1]},
        after={"observation": observation[-1:]},
        action=arrays["action"][1:],
        reward=arrays["reward"][1:] if rewards is None else _worked_out(arrays, rewards, str(file)),
        others={"discount": discount, **others},
        outcome=Outcome(terminated=terminated, truncated=not terminated),
    )


def _worked_out(arrays: dict[str, np.ndarray], rewards: Rewards, where: str) -> np.ndarray:
    return rewards(arrays["physics"][1:], arrays["action"][1:], where)


def _check_sizes(files: list[Path]) -> int:
    """Bytes of all files, after those that their arrays would take were found to be within bounds."""
    sizes = []
    for file in files:
        with limits.explained(file, _WHOLE), zipfile.ZipFile(file) as archive:
            sizes.append(sum(part.file_size for part in archive.infolist()))
        if sizes[-1] > limits.MAX_BYTES:
            expected = f"at most {limits.MAX_BYTES} bytes for an episode"
            raise DataError(str(file), expected=expected, got=f"{sizes[-1]}", fix="keep less in one episode")
    stored = sum(file.stat().st_size for file in files)
    limits.check_growth(sum(sizes), stored, f"{files[0].parent}, the largest file {files[int(np.argmax(sizes))].name}")
    return stored


def _arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of one file; never a pickled object."""
    with limits.explained(file, _WHOLE), np.load(file, allow_pickle=False) as content:
        return {name: numbers(content[name], f"{file}, {name}") for name in content.files}


def _order(file: Path) -> tuple[int, str]:
    number = file.stem.split("_")[1:2]
    return (int(number[0]) if number and number[0].isdigit() else -1), file.name
