"""robomimic and robosuite: one HDF5 file with a group for each demonstration.

`data/demo_i` holds `actions`, `obs/...` and mostly `next_obs/...`, `rewards`, `dones`, `states`; the attribute
`env_args` of `data` says in JSON where the demonstrations were made; `mask/...` names groups of them. The parts of an
observation keep their names, those in a group with the group's name before a dot. `states` are the simulator's own.
"""

import json
import re
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from offbook.data.formats import Recordings
from offbook.data.formats.limits import AGAIN, explained
from offbook.data.formats.transitions import Steps, hdf5, need, numbers, recordings, rows_of, seen
from offbook.data.index import Outcome
from offbook.errors import DataError

_KEYS = ("next_obs", "rewards", "states", "dones")
_LIBRARIES = {1: "robosuite", 2: "gym"}
_MARKED = (
    "dones are set at the end of every demonstration, so they mark where a recording stops: an episode counts as "
    "terminated only where its last reward is 1, which is success"
)
_FIX = "write observations and rewards into the file with robomimic's own dataset_states_to_obs"


def read(source: str) -> Recordings:
    """Opens a robomimic file.

    Args:
        source: path of the HDF5 file.

    Raises:
        DataError: it is not there, is damaged, lacks a key, or the arrays of a demonstration disagree.
        MissingExtraError: h5py is not installed.
    """
    path = Path(source).expanduser()
    with hdf5(path) as file:
        need(file, ["data"], str(path), "give a file in the layout of robomimic")
        data = file["data"]
        names = sorted(data, key=_number)
        if not names:
            raise DataError(f"{path}, data", expected="one demonstration or more", got="none", fix="give another file")
        about = _about(data, str(path))
        for name in names:
            need(data[name], ["obs", "actions"], f"{path}, data/{name}", _FIX)
        about["marked"] = all(_done(data[name], f"{path}, data/{name}") for name in names)
        keys = [key for key in _KEYS if key in data[names[0]]]
        places = {name: i for i, name in enumerate(names)}
        masks = {key: mask.asstr()[:] for key, mask in file.get("mask", {}).items()}
        splits = {key: [places[name] for name in words if name in places] for key, words in masks.items()}
        stated = [_MARKED] * about["marked"]
        stated += [f"groups of demonstrations: {', '.join(splits)}"] * bool(splits)

        def episodes() -> Generator[tuple[str, Steps], None, None]:
            with hdf5(path, known=True) as file:
                for name in names:
                    where = f"{path}, data/{name}"
                    yield where, _steps(file["data"][name], about, keys, where)

        made = recordings(
            "robomimic",
            path,
            episodes,
            stated,
            total=len(names),
            environment=about["environment"],
            rate_hz=about["rate_hz"],
            env_args=about["env_args"],
            demonstrations=names,
        )
    # Where the store looks for groups of episodes.
    return replace(made, schema=replace(made.schema, extra={**made.schema.extra, "splits": splits}))


def _steps(demo: Any, about: Mapping[str, Any], keys: list[str], where: str) -> Steps:
    need(demo, keys, where, "give every demonstration the same keys")
    observations = {name: rows_of(part, f"{where}, obs, {name}") for name, part in seen(demo["obs"]).items()}
    action = rows_of(demo["actions"], f"{where}, actions")
    if not len(action):
        raise DataError(where, expected="one step or more", got="none", fix="leave empty demonstrations out")
    said = demo.attrs.get("num_samples")
    if said is not None and int(said) != len(action):
        expected, got = f"{said} rows, as num_samples says", str(len(action))
        raise DataError(f"{where}, actions", expected=expected, got=got, fix=AGAIN)
    others = {name: rows_of(demo[name], f"{where}, {name}") for name in keys if name in ("states", "dones")}
    # A simulator's state is empty or a dummy where there is none.
    others = {name: array for name, array in others.items() if 0 not in array.shape}
    reward = rows_of(demo["rewards"], f"{where}, rewards") if "rewards" in keys else None
    last = None
    if "next_obs" in keys:
        nexts = seen(demo["next_obs"])
        need(nexts, list(observations), f"{where}, next_obs", "give both groups the same keys")
        last = {name: numbers(nexts[name][-1:], f"{where}, next_obs, {name}") for name in observations}
    success = None
    if reward is not None and not about["shaped"] and np.isin(reward, (0, 1)).all():
        success = bool((reward > 0).any())
    # Without what the last step led to, the step that ended it is not kept.
    terminated = last is not None and _done(demo, where)
    if about["marked"]:
        terminated = terminated and bool(success) and bool(reward is not None and reward.reshape(-1)[-1] == 1)
    return Steps(
        observations=observations,
        action=action,
        reward=reward,
        others=others,
        after=last,
        outcome=Outcome(terminated=terminated, truncated=not terminated, task=about["task"], success=success),
    )


def _done(demo: Any, where: str) -> bool:
    """Whether the last step is marked as done."""
    dones = rows_of(demo["dones"], f"{where}, dones") if "dones" in demo else np.zeros(0)
    return bool(dones.reshape(-1)[-1:].any())


def _about(data: Any, where: str) -> dict[str, Any]:
    """What `env_args` says; older files and those of other labs may lack it."""
    with explained(f"{where}, data, env_args", "JSON", "write it again or remove it"):
        arguments = json.loads(data.attrs.get("env_args", "{}"))
        settings = dict(arguments.get("env_kwargs") or {})
        library, name = _LIBRARIES.get(arguments.get("type", arguments.get("env_type"))), arguments.get("env_name")
        rate = settings.get("control_freq")
        return {
            "environment": f"{library}:{name}" if library and name else "",
            "rate_hz": float(rate) if rate else None,
            "task": str(name or "") if library == "robosuite" else "",
            "shaped": bool(settings.get("reward_shaping", False)),
            "env_args": arguments,
        }


def _number(name: str) -> tuple[int, str]:
    found = re.search(r"(\d+)$", name)
    return (int(found[1]) if found else -1), name
