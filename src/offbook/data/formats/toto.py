"""TOTO's own recordings: a pickled list of dicts beside a folder of pictures.

Each dict has `traj_id`, `observations` and `actions` (joint angles, T x 7), `rewards`, and in `cam0c` the names of T
pictures, which lie in `data/TRAJ_ID/`; poses of the hand and embeddings may be there. Nothing in the
pickle is run. The material is weighed when the arm has stopped, and the weight stands as reward in the last row: it
becomes the episode's score, its success when above 0, and the reward of the last step that is kept.

Source: Zhou et al., "Train Offline, Test Online: A Real Robot Learning Benchmark" (2023), section III, and the
    description of the dataset that was released with it.
"""

import re
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from offbook.data.formats import Recordings, limits
from offbook.data.formats.paths import check_paths
from offbook.data.formats.pickles import load
from offbook.data.formats.transitions import Steps, need, numbers, recordings, same_rows
from offbook.data.index import Outcome
from offbook.errors import DataError

RATE_HZ = 30.0
_CAMERA, _FIX = "cam0c", "give the file that the pictures belong to"
_OTHERS = {
    "eef_pose_observations": "eef_pose",
    "eef_pose_actions": "eef_pose_action",
    "embeddings": "embeddings",
}
_MAX_PIXELS = 4096 * 4096


def read(source: str) -> Recordings:
    """Opens recordings of TOTO.

    Args:
        source: path of the pickle, or of the folder that holds `parsed.pkl`. An ending chooses the pictures: `@120x160`
            makes them 120 pixels high and 160 wide, `@0` leaves them out; without one they stay as large as they are,
            which is about 1 MB for each step.

    Raises:
        DataError: a file is not there, is damaged, names anything but plain data, or its arrays disagree.
    """
    name, _, ending = source.rpartition("@") if re.search(r"@(0|\d{2,4}x\d{2,4})$", source) else (source, "", "")
    path = Path(name).expanduser()
    path = path / "parsed.pkl" if path.is_dir() else path
    paths = check_paths(load(path), path)
    height, _, width = ending.partition("x")
    size = (int(height), int(width)) if width else None
    cameras = ending != "0" and _CAMERA in paths[0]
    steps = [_steps(one, f"{path}, path {i}") for i, one in enumerate(paths)]
    kept = [i for i, one in enumerate(steps) if len(one.action) > 1]
    stated = ["the weight in the last row is the score, and the reward of the last step kept"]
    stated += ["the pictures are left out"] * (not cameras) + [f"the pictures are scaled to {ending}"] * bool(size)
    stated += ["depth is left out"] * ("cam0d" in paths[0])

    def episodes() -> Generator[tuple[str, Steps], None, None]:
        for i in kept:
            yield f"{path}, path {i}", _seen(steps[i], paths[i], path, size, cameras)

    made = recordings(
        "toto",
        path,
        episodes,
        stated,
        total=len(kept),
        single=len(paths) - len(kept),
        stored=limits.size_of(path) + (limits.size_of(path.parent / "data") if cameras else 0),
        rate_hz=RATE_HZ,
        trajectories=[str(paths[i].get("traj_id", "")) for i in kept],
    )
    units = {"joints": "rad", "action": "rad"}
    fields = tuple(replace(spec, units=units.get(spec.name, "")) for spec in made.schema.fields)
    return replace(made, schema=replace(made.schema, fields=fields))


def _steps(one: Mapping[str, Any], where: str) -> Steps:
    """A path without its pictures."""
    need(one, ("rewards",), where, "give a file in TOTO's layout")
    joints, action, reward = (numbers(one[key], f"{where}, {key}") for key in ("observations", "actions", "rewards"))
    if joints.ndim != 2 or action.ndim != 2:
        got = f"shapes {joints.shape} and {action.shape}"
        raise DataError(where, expected="observations and actions of shape (steps, 7)", got=got, fix=_FIX)
    reward = reward.reshape(-1).copy()
    same_rows("rewards", reward, len(action), where)
    weight = float(reward[-1]) if len(reward) else 0.0
    if len(reward) > 1:
        reward[-2] += reward[-1]
    return Steps(
        observations={"joints": joints},
        action=action,
        reward=reward,
        others={to: numbers(one[key], f"{where}, {key}") for key, to in _OTHERS.items() if key in one},
        outcome=Outcome(terminated=False, truncated=True, success=weight > 0, score=weight),
    )


def _seen(steps: Steps, one: Mapping[str, Any], path: Path, size: tuple[int, int] | None, cameras: bool) -> Steps:
    """The same path with its pictures, read from their files."""
    if not cameras:
        return steps
    where = f"{path}, trajectory {one.get('traj_id')!r}"
    need(one, ("traj_id", _CAMERA), where, "give every path its pictures, or leave them out with @0")
    names = [str(name) for name in one[_CAMERA]] if isinstance(one[_CAMERA], list | tuple | np.ndarray) else []
    same_rows(_CAMERA, np.empty(len(names)), len(steps.action), where)
    frames = []
    for name in names:
        frames.append(_picture(path.parent, PurePosixPath("data", str(one["traj_id"]), name), size))
        if frames[-1].shape != frames[0].shape:
            fix = "scale them with an ending such as @120x160"
            raise DataError(where, expected="pictures of one size", got="several sizes", fix=fix)
        if frames[0].nbytes * len(names) > limits.MAX_BYTES:
            fix = "scale the pictures with an ending such as @120x160"
            raise DataError(where, expected=f"at most {limits.MAX_BYTES} bytes for an episode", got="more", fix=fix)
    return replace(steps, observations={**steps.observations, _CAMERA: np.stack(frames)})


def _picture(folder: Path, name: PurePosixPath, size: tuple[int, int] | None) -> np.ndarray:
    """One picture, which must lie in the folder of the recordings: its name comes from a stranger."""
    file = folder / name
    if name.is_absolute() or ".." in name.parts or not file.resolve().is_relative_to(folder.resolve()):
        raise DataError(str(name), expected="a picture beside the pickle", got="a path that leads elsewhere", fix=_FIX)
    with limits.explained(file, "a picture", f"{_FIX}, or leave the pictures out with the ending @0"):
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(str(file), expected=f"{_MAX_PIXELS} pixels", got=f"{image.size}", fix=_FIX)
            whole = image.convert("RGB")
        return np.asarray(whole if size is None else whole.resize((size[1], size[0]), Image.Resampling.BOX))
