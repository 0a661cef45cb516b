"""Minari, the standard of the Gymnasium family: reading and writing through its own package.

A name is either the id of a local dataset (`D4RL/door/human-v2`, looked up where `MINARI_DATASETS_PATH` says) or a path
that begins with `/`, `.` or `~`. Nothing is downloaded: `minari download ID` does that.

Observation spaces are flattened to leaves: a bare space is the field `observation`, entries of Dict and Tuple spaces
have their keys joined by dots. Actions likewise, below `action`. Types are kept. A text that stays the same through an
episode becomes its task; of the step-by-step infos only success is read.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from offbook.data.formats import Recordings, appearing
from offbook.data.formats.limits import explained, size_of
from offbook.data.formats.spaces import (
    action_space_for,
    action_spec,
    from_field,
    is_kept,
    leaves,
    nested,
    space_for,
    to_field,
    value_at,
)
from offbook.data.formats.transitions import flagged, hdf5, succeeded
from offbook.data.index import Outcome
from offbook.data.store import Episode, EpisodeStore, FieldSpec, Role, Schema
from offbook.errors import DataError, needs_extra

# What describes the file rather than the recordings; the rest is kept and comes back on export.
_OF_THE_FILE = ("total_episodes", "total_steps", "dataset_size", "dataset_id", "minari_version", "combined_datasets")
_OURS = "offbook"


def read(source: str) -> Recordings:
    """Opens a Minari dataset.

    Args:
        source: id of a local dataset, or a path.

    Raises:
        DataError: it is not there, is damaged, or holds something that a store cannot keep.
        MissingExtraError: Minari is not installed.
    """
    with needs_extra("sim"):
        import minari
    folder = _find(source)
    with _explained(f"minari:{source}"):
        dataset = minari.MinariDataset(folder)
    for file in folder.glob("*.hdf5"):
        with hdf5(file):
            pass
    with _explained(f"minari:{source}"):
        first = next(iter(dataset.iterate_episodes([0]))) if len(dataset) else None
    if first is None:
        raise DataError(f"minari:{source}", expected="one episode or more", got="none", fix="choose another dataset")
    metadata = json.loads((folder / "metadata.json").read_bytes())
    schema = _schema(dataset, first, metadata)
    episodes = _episodes(source, dataset, schema)
    return Recordings(schema=schema, episodes=episodes, total=len(dataset), stored=size_of(folder))


def write(store: EpisodeStore, target: str) -> str:
    """Writes a store as a Minari dataset, which appears under its name only when it is whole.

    Pictures are written without loss. Fields of the role "other" have no place in the format and are left out.

    Args:
        store: the recordings.
        target: a new id, or a path.

    Returns:
        The folder of the dataset.

    Raises:
        DataError: the name is taken or not allowed, or some episode lacks a field.
    """
    with needs_extra("sim"):
        from minari.dataset.minari_storage import MinariStorage
    folder, dataset_id = _target(target)
    kept = dict(store.schema.extra.get("minari", {}))
    observation, action = _spaces(store.schema, kept)
    with appearing(folder) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data, form = partial / "data", kept.get("data_format", "hdf5")
        data.mkdir(parents=True)
        storage = MinariStorage.new(data, observation, action, data_format=form, jpeg_encoding=False)
        storage.update_metadata(_metadata(store.schema, kept, dataset_id))
        storage.update_episodes(_buffer(store, number, observation, action) for number in range(len(store)))
        storage.update_episode_metadata(_said_of(store.episode(number)) for number in range(len(store)))
    return str(folder)


def left_out(schema: Schema) -> list[str]:
    """The fields that the format has no place for."""
    return list(schema.named("other"))


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~"))


def _find(source: str) -> Path:
    """The folder with a dataset's `metadata.json`."""
    from minari.storage.datasets_root_dir import get_dataset_path

    folder = Path(source).expanduser() if _is_path(source) else get_dataset_path(source)
    for candidate in (folder / "data", folder):
        if (candidate / "metadata.json").is_file():
            return candidate
    fix = "give the folder that holds metadata.json"
    if not _is_path(source):
        local = _local_ids()
        close = get_close_matches(source, local, n=1)
        hint = f"did you mean {close[0]!r}? Otherwise " if close else f"{len(local)} other ids are here; "
        fix = f"{hint}run: minari download {source}"
    raise DataError(f"minari:{source}", expected="a dataset on this machine", got=f"nothing in {folder}", fix=fix)


def _local_ids() -> list[str]:
    import minari

    # Minari stumbles over folders whose names are no ids; the hint is not worth failing for.
    with warnings.catch_warnings(), contextlib.suppress(ValueError, TypeError):
        warnings.simplefilter("ignore")
        return list(minari.list_local_datasets())
    return []


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Minari reports damage by whatever error its reader meets, and warns of much that is none."""
    with warnings.catch_warnings(), explained(where, "a dataset that this version of Minari reads"):
        warnings.simplefilter("ignore")
        yield


def _schema(dataset: Any, first: Any, metadata: dict[str, Any]) -> Schema:
    fields = []
    roles: tuple[tuple[Role, Any, Any], ...] = (
        ("observation", dataset.observation_space, first.observations),
        ("action", dataset.action_space, first.actions),
    )
    for role, space, values in roles:
        for name, path, leaf in leaves(space, role):
            if is_kept(leaf):
                array = to_field(leaf, role, value_at(values, path))
                fields.append(FieldSpec(name, array.dtype.name, array.shape[1:], role))
    reward = np.asarray(first.rewards)
    fields.append(FieldSpec("reward", reward.dtype.name, reward.shape[1:], "reward"))
    texts = [path for _, path, leaf in leaves(dataset.observation_space, "observation") if _is_text(leaf)]
    if len(texts) > 1:
        expected, fix = "at most one text in an observation", "leave one out"
        raise DataError(f"minari:{dataset.id}", expected=expected, got=str(texts), fix=fix)
    kept = {key: value for key, value in metadata.items() if key not in (*_OF_THE_FILE, _OURS)}
    environment = json.loads(metadata.get("env_spec", "{}")).get("id")
    schema = Schema(
        tuple(fields),
        environment=f"gym:{environment}" if environment else "",
        source=f"minari:{dataset.id}",
        action=action_spec(dataset.action_space),
        extra={"minari": kept},
    )
    ours = metadata.get(_OURS)
    if ours is None:
        return schema
    # One of our own exports: what Minari has no place for, unless someone has changed the fields since.
    own = Schema.from_json({**ours, "extra": {}}, f"minari:{dataset.id}")
    kept_fields = tuple(spec for spec in own.fields if spec.role != "other")
    same = {replace(spec, units="") for spec in kept_fields} == set(schema.fields)
    return replace(own, fields=kept_fields, extra=schema.extra) if same else schema


def _episodes(source: str, dataset: Any, schema: Schema) -> Iterator[tuple[dict[str, np.ndarray | None], Outcome]]:
    spaces = {"observation": dataset.observation_space, "action": dataset.action_space}
    wanted = {root: leaves(space, root) for root, space in spaces.items()}
    algorithm = str(schema.extra["minari"].get("algorithm_name", ""))
    metadatas = iter(dataset.storage.get_episode_metadata(dataset.episode_indices))
    episodes = dataset.iterate_episodes()
    for number in range(len(dataset)):
        where = f"minari:{source}, episode {number}"
        with _explained(where):
            episode, said = next(episodes), next(metadatas)
        fields: dict[str, np.ndarray | None] = {"reward": np.asarray(episode.rewards)}
        task = str(said.get("task", ""))
        for root, values in (("observation", episode.observations), ("action", episode.actions)):
            for name, path, leaf in wanted[root]:
                if is_kept(leaf):
                    fields[name] = to_field(leaf, root, value_at(values, path))
                elif _is_text(leaf):
                    task = _constant(value_at(values, path), f"{where}, {name}")
        seed, score, success = (said.get(key) for key in ("seed", "score", "success"))
        yield (
            fields,
            Outcome(
                terminated=flagged(np.asarray(episode.terminations), f"{where}, terminations"),
                truncated=flagged(np.asarray(episode.truncations), f"{where}, truncations"),
                task=task,
                source=str(said.get("source", algorithm)),
                seed=None if seed is None else int(seed),
                success=succeeded(episode.infos or {}) if success is None else bool(success),
                score=None if score is None else float(score),
            ),
        )


def _is_text(space: Any) -> bool:
    return type(space).__name__ == "Text"


def _constant(texts: Iterable[Any], where: str) -> str:
    different = sorted({str(text) for text in texts})
    if len(different) != 1:
        expected, fix = "the same text through the episode", "leave this text out of the observations"
        raise DataError(where, expected=expected, got=f"{len(different)} texts", fix=fix)
    return different[0]


def _target(target: str) -> tuple[Path, str]:
    """The folder to be made, whose parent exists then, and the dataset's id."""
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.namespace import create_namespace, list_local_namespaces
    from minari.storage.datasets_root_dir import get_dataset_path

    if _is_path(target):
        folder = Path(target).expanduser().resolve()
        name = re.sub(r"[^-\w]", "-", folder.name)
        dataset_id = name if re.search(r"-v\d+$", name) else f"{name}-v0"
    else:
        folder, dataset_id = get_dataset_path(target), target
    try:
        namespace = parse_dataset_id(dataset_id)[0]
    except (ValueError, TypeError) as error:
        expected = "an id such as pour/expert-v0 (letters, digits, - and _, with a version at the end)"
        fix = "choose another id, or a path that begins with / or ./"
        raise DataError(f"minari:{target}", expected=expected, got=repr(target), fix=fix) from error
    if folder.exists():
        raise DataError(f"minari:{target}", expected="a new name", got=f"{folder}, which exists", fix="choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if namespace and namespace not in list_local_namespaces() and not _is_path(target):
        create_namespace(namespace)
    return folder, dataset_id


def _metadata(schema: Schema, kept: Mapping[str, Any], dataset_id: str) -> dict[str, Any]:
    import minari

    fixed = ("observation_space", "action_space", "data_format", "jpeg_encoding")
    metadata = {key: value for key, value in kept.items() if key not in fixed}
    for key in ("author", "author_email"):
        if key in metadata:
            metadata[key] = set(metadata[key])
    if "env_spec" not in metadata and (spec := _env_spec(schema.environment)):
        metadata["env_spec"] = spec
    ours = {key: value for key, value in schema.to_json().items() if key != "extra"}
    return {**metadata, "dataset_id": dataset_id, "minari_version": minari.__version__, _OURS: ours}


def _env_spec(environment: str) -> str | None:
    """The registered specification of a Gymnasium environment, as JSON, where there is one."""
    import gymnasium

    library, _, name = environment.partition(":")
    with contextlib.suppress(gymnasium.error.Error, TypeError):
        return str(gymnasium.spec(name).to_json()) if library == "gym" else None
    return None


def _spaces(schema: Schema, kept: Mapping[str, Any]) -> tuple[Any, Any]:
    """The spaces that the recordings came with, else ones that fit the fields."""
    from gymnasium import spaces
    from minari.serialization import deserialize_space

    if "observation_space" in kept and "action_space" in kept:
        return deserialize_space(kept["observation_space"]), deserialize_space(kept["action_space"])

    bad = [name for name in (*schema.observations, *schema.actions) if "/" in name]
    if bad or schema.actions != ("action",) or schema.reward is None or not schema.observations:
        expected = "observations, one field 'action', rewards, and no '/' in a name"
        got, fix = ", ".join(spec.name for spec in schema.fields), "export a store with those fields"
        raise DataError("export to Minari", expected=expected, got=got, fix=fix)
    seen = {name: space_for(schema[name]) for name in schema.observations}
    bare = schema.observations == ("observation",)
    return seen["observation"] if bare else spaces.Dict(seen), action_space_for(schema["action"], schema.action)


def _buffer(store: EpisodeStore, number: int, observation_space: Any, action_space: Any) -> Any:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    episode = store.episode(number)

    def values(root: str, rows: int) -> Callable[[str, Any], Any]:
        def value(name: str, leaf: Any) -> Any:
            if is_kept(leaf):
                return from_field(leaf, root, episode.fields[name])
            return [episode.task] * rows if _is_text(leaf) else np.zeros((rows, *leaf.shape), leaf.dtype)

        return value

    ends = np.zeros((2, episode.length), bool)
    ends[:, -1] = episode.terminated, episode.truncated
    return EpisodeBuffer(
        seed=episode.seed,
        observations=nested(observation_space, "observation", values("observation", episode.length + 1)),
        actions=nested(action_space, "action", values("action", episode.length)),
        rewards=episode.fields[store.schema.reward or ""],
        terminations=ends[0],
        truncations=ends[1],
    )


def _said_of(episode: Episode) -> dict[str, Any]:
    """What Minari has no place for, as metadata of the episode."""
    said = {"task": episode.task, "source": episode.source, "success": episode.success, "score": episode.score}
    return {key: value for key, value in said.items() if value not in (None, "")}
