"""URLB and ExoRL: a folder with one `.npz` file for each episode.

Each file has T + 1 rows. Row 0 is the reset: its observation is the first, and its action, reward and discount are
fillers. Row t + 1 holds the action that was taken at observation t, the reward and discount that it brought, and the
observation that it led to. `physics`, the simulator's state, and whatever else a file holds go with the observation of
their own row.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from offbook.data.formats import Recordings, transitions
from offbook.data.formats.transitions import Steps, need, numbers, recorded_range, same_rows, schema
from offbook.data.index import Outcome
from offbook.errors import DataError

_CORE = ("observation", "action", "reward", "discount")
_FIX = "copy the file again from where it came from"
_STATED = (
    "the action, reward and discount of row t + 1 belong to observation t; those of row 0 are fillers and left out",
    "other values, such as physics, are those of the observation before each step; those of the last row are left out",
    "an episode is terminated when its last discount is 0",
)


def read(source: str) -> Recordings:
    """Opens a folder of episodes.

    Args:
        source: the folder that holds the files, or the one above its `buffer`.

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
    actions = (_arrays(file, ("action",))["action"][1:] for file in files)
    first = _steps(files[0], _CORE)
    keys = (*_CORE, *first.others)
    made = schema(
        "exorl", Path(source), first.fields(str(files[0])), first.observations, recorded_range(actions), _STATED
    )
    return Recordings(schema=made, episodes=_episodes(files, keys), total=len(files))


def _episodes(files: list[Path], keys: tuple[str, ...]) -> Iterator[tuple[Mapping[str, np.ndarray], Outcome]]:
    for file in files:
        steps = _steps(file, keys)
        yield steps.fields(str(file)), steps.outcome


def _steps(file: Path, keys: tuple[str, ...]) -> Steps:
    arrays = _arrays(file)
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
        reward=arrays["reward"][1:],
        others={"discount": discount, **others},
        outcome=Outcome(terminated=terminated, truncated=not terminated),
    )


def _arrays(file: Path, wanted: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """The arrays of one file; never a pickled object, and none larger than `transitions.MAX_BYTES`."""
    try:
        with zipfile.ZipFile(file) as archive:
            large = [part.filename for part in archive.infolist() if part.file_size > transitions.MAX_BYTES]
        if large:
            expected = f"arrays of at most {transitions.MAX_BYTES} bytes"
            raise DataError(str(file), expected=expected, got=f"a larger one, {large[0]}", fix=_FIX)
        with np.load(file, allow_pickle=False) as content:
            if wanted is not None:
                need(content, wanted, str(file), "give files in the layout of URLB")
            return {name: numbers(content[name], f"{file}, {name}") for name in wanted or content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        reason = "an array of Python objects" if "allow_pickle" in str(error) else str(error).partition("\n")[0]
        raise DataError(str(file), expected="a whole .npz of numbers", got=reason or "a cut one", fix=_FIX) from error


def _order(file: Path) -> tuple[int, str]:
    number = file.stem.split("_")[1:2]
    return (int(number[0]) if number and number[0].isdigit() else -1), file.name
