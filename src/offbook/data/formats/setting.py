"""Recordings placed in an environment, where they do not tell themselves which one they are from."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from offbook.data.formats import Recordings, Setting
from offbook.data.index import Outcome
from offbook.data.schema import FieldSpec
from offbook.data.video import Video
from offbook.errors import DataError


def placed(recordings: Recordings, setting: Setting, source: str) -> Recordings:
    """Recordings with the name, the bounds and, where they fit, the parts of an environment.

    Many formats join all parts of an observation, pictures aside, to one array of a name of its own. Where the
    environment's parts have the same size together, it is cut into them, in the environment's own order.

    Args:
        recordings: what a reader gives.
        setting: the environment.
        source: the recordings' name, for messages.

    Raises:
        DataError: its actions have another size or kind; or its rewards were worked out, and it shows something else.
    """
    schema, name = recordings.schema, setting.environment
    size = sum(schema[field].size for field in schema.actions)
    whole = all(np.dtype(schema[field].dtype).kind in "iu" for field in schema.actions)
    discrete = setting.action.choices is not None
    if size != setting.action.size or (discrete and not whole):
        expected = f"actions of {setting.action.size} {'whole ' * discrete}numbers, as {name} has"
        fix = "name the environment of these recordings"
        raise DataError(source, expected=expected, got=f"{size} {'whole ' * whole}numbers", fix=fix)
    parts, episodes, stated = setting.observation.state, recordings.episodes, []
    joined = [field for field in schema.fields if field.role == "observation" and not field.camera]
    if len(joined) == 1 and joined[0].shape == (setting.observation.state_size,) and joined[0].name not in dict(parts):
        state = joined[0]
        taken = tuple(FieldSpec(part, state.dtype, (count,), "observation") for part, count in parts)
        schema = replace(schema, fields=(*taken, *(field for field in schema.fields if field is not state)))
        episodes = _cut(recordings, state.name, parts)
        stated.append(f"the {state.name} is taken for what {name} shows, in its order: {_list(parts)}")
    shown = {**dict(parts), **setting.observation.cameras}
    here = {**dict(schema.observation_spec().state), **schema.observation_spec().cameras}
    if any(shown.get(part) != count for part, count in here.items()):
        if setting.rewards is not None:  # the physics of another body may have the same size
            expected, got = f"recordings of {name}, which shows {_list(shown.items())}", _list(here.items())
            raise DataError(source, expected=expected, got=got, fix="name a task of the body that was recorded")
        text = f"does not show what was recorded ({_list(here.items())}): it shows {_list(shown.items())}"
        stated.append(f"{name} {text}")
    said = dict(schema.extra.get("import", {}))
    said |= {"stated": [*said.get("stated", ()), *stated], "bounds": name}
    schema = replace(schema, environment=name, action=setting.action, extra={**schema.extra, "import": said})
    return replace(recordings, schema=schema, episodes=episodes)


def _list(parts: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} {size}" for name, size in parts)


def _cut(
    recordings: Recordings, state: str, parts: tuple[tuple[str, int], ...]
) -> Iterator[tuple[Mapping[str, np.ndarray | Video | None], Outcome]]:
    ends = np.cumsum([size for _, size in parts])
    for fields, outcome in recordings.episodes:
        cut = dict(fields)
        pieces = np.split(np.asarray(cut.pop(state)), ends[:-1], axis=1)
        cut.update(zip((name for name, _ in parts), pieces, strict=True))
        yield cut, outcome
