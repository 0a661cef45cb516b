"""TOTO's own recordings: a pickled list of dicts beside a folder of pictures.

Each dict has `traj_id`, `observations` and `actions` (joint angles, T x 7), `rewards`, and in `cam0c` the names of T
pictures, which lie in `data/TRAJ_ID/`; poses of the hand and embeddings may be there. Nothing in the
pickle is run. The material is weighed when the arm has stopped, and the weight stands as reward in the last row: it
becomes the episode's score, its success when above 0, and the reward of the last step that is kept.

What is written is the same layout, with pictures without loss. Beside it lies what the layout has no place for: the
schema, how each episode ended, and a checksum of the pickle that they belong to.

Source: Zhou et al., "Train Offline, Test Online: A Real Robot Learning Benchmark" (2023), section III, and the
    description of the dataset that was released with it.
"""

import json
import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from offbook.data.formats import Recordings, appearing, limits, outcomes
from offbook.data.formats.paths import check_paths
from offbook.data.formats.pickles import load, save
from offbook.data.formats.transitions import Steps, need, numbers, recordings, same_rows
from offbook.data.index import Outcome
from offbook.data.layout import file_sha256
from offbook.data.store import EpisodeStore, Schema
from offbook.errors import DataError
from offbook.runs.progress import track

RATE_HZ = 30.0
_FILE, _OURS = "parsed.pkl", "offbook.json"
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
    path = path / _FILE if path.is_dir() else path
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
    return _as_exported(replace(made, schema=replace(made.schema, fields=fields)), path)


def _as_exported(made: Recordings, path: Path) -> Recordings:
    """The recordings with what an export of ours kept beside them, unless someone has changed the pickle since."""
    beside = path.with_name(_OURS)
    if not beside.is_file():
        return made
    with limits.explained(beside, "what an export of offbook writes"):
        record = json.loads(beside.read_bytes())
        if record["sha256"] != file_sha256(path).hex():
            return made
        own, ended = Schema.from_json(record["schema"], str(beside)), [Outcome(**one) for one in record["outcomes"]]
        camera = _camera(own) or _CAMERA
    found = {camera if spec.name == _CAMERA else spec.name: spec for spec in made.schema.fields}
    kept = [replace(found[spec.name], name=spec.name, units=spec.units) for spec in own.fields if spec.name in found]

    def episodes() -> Iterable[tuple[Mapping[str, Any], Outcome]]:
        for (values, _), outcome in zip(made.episodes, ended, strict=True):
            yield {camera if name == _CAMERA else name: value for name, value in values.items()}, outcome

    return replace(made, schema=replace(own, fields=tuple(kept)), episodes=episodes())


def _camera(schema: Schema) -> str | None:
    """The field whose pictures become `cam0c`: of several, the one of that name, else the first."""
    cameras = [spec.name for spec in schema.fields if spec.camera]
    return _CAMERA if _CAMERA in cameras else next(iter(cameras), None)


def left_out(schema: Schema) -> list[str]:
    """The fields that the format has no place for."""
    placed = {"joints", _camera(schema), "action", schema.reward, *_OTHERS.values()}
    return [spec.name for spec in schema.fields if spec.name not in placed]


def write(store: EpisodeStore, target: str) -> str:
    """Writes a store in TOTO's layout, which appears under its name only when it is whole.

    Args:
        store: recordings with the observation `joints`, the action `action` and rewards that are 0 before the last
            step; the last one is the amount.
        target: the new folder.

    Returns:
        The folder.

    Raises:
        DataError: the folder exists, the layout cannot hold the recordings, or the disk does not take them.
    """
    folder, schema = Path(target).expanduser().resolve(), store.schema
    if folder.exists():
        raise DataError(f"toto:{folder}", expected="a new name", got="a folder that exists", fix="choose another")
    sizes = {spec.name: spec.shape for spec in schema.fields if spec.name in ("joints", *schema.actions)}
    right = len(sizes) == 2 and "action" in sizes and all(len(shape) == 1 for shape in sizes.values())
    if not right or schema.reward is None or not len(store):
        got = f"{len(store)} with {', '.join(spec.name for spec in schema.fields)}"
        expected, fix = "episodes with joints, action and reward", "export recordings of an arm, such as offbook:pour"
        raise DataError(str(store.path), expected=expected, got=got, fix=fix)
    with appearing(folder) as partial:
        wanted = track(range(len(store)), "exporting", len(store))
        save([_path(store, number, partial / "data") for number in wanted], partial / _FILE)
        kept = {"schema": schema.to_json(), "outcomes": outcomes(store), "sha256": file_sha256(partial / _FILE).hex()}
        (partial / _OURS).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return str(folder)


def _path(store: EpisodeStore, number: int, data: Path) -> dict[str, Any]:
    """An episode as a dict of T + 1 rows, the last of them with the final observation and the amount."""
    episode, name = store.episode(number), f"trajectory_{number:06d}"
    (data / name).mkdir(parents=True)
    fields, rows = episode.fields, episode.length + 1
    reward = fields[store.schema.reward or ""]
    reward = np.concatenate([reward[:-1], np.zeros_like(reward[:1]), reward[-1:]])
    amount = float(reward[-1])
    if reward[:-1].any() or (episode.score is not None and episode.score != amount):
        got = f"rewards that end with {amount:g} and sum up to {reward.sum():g}, and the score {episode.score}"
        expected, fix = "rewards of 0, and at the last step the score", "choose minari or lerobot, which hold any"
        raise DataError(f"{store.path}, episode {number}", expected=expected, got=got, fix=fix)

    def filled(values: np.ndarray) -> np.ndarray:
        # What was done last is said of the row of the final observation too, for which there is nothing else to say.
        return np.concatenate([values, values[-1:]])

    path = {"traj_id": name, "observations": np.array(fields["joints"]), "actions": filled(fields["action"])}
    path |= {"rewards": reward, "terminated": (np.arange(rows) == rows - 1).astype(np.int64)}
    path |= {key: filled(fields[ours]) for key, ours in _OTHERS.items() if ours in fields}
    camera = _camera(store.schema)
    if camera is not None:
        path[_CAMERA] = [f"{row:05d}c.png" for row in range(rows)]
        for file, picture in zip(path[_CAMERA], fields[camera], strict=True):
            Image.fromarray(picture).save(data / name / file)
    return path


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
