"""The trials of a submission as recordings: fetched from an arena, to be kept as a store and to be learned from."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offbook.arena.recordings import EPISODE, MANIFEST
from offbook.client.submit import ArenaClient, ArenaRefusalError
from offbook.data.formats import Recordings
from offbook.data.index import Outcome
from offbook.data.store import FieldSpec, Schema
from offbook.errors import ConfigError, DataError

T = TypeVar("T")

LAST_DROPPED = "the last observation of a trial is its final one; the action and the reward of that step are left out"


class _LeftOutError(Exception):
    """Why a trial is not exported."""


def read_trials(
    arena: ArenaClient,
    submission: str,
    films: Path | None = None,
    leave_out: Callable[[int, str], None] = lambda slot, why: None,
) -> Recordings:
    """Everything that was recorded of a submission's trials, in the order of their scenes.

    Args:
        arena: where it ran.
        submission: its id.
        films: also keep the films in this folder, as `trial-SLOT.mp4`.
        leave_out: called, while the episodes are read, with the slot of each trial that cannot be exported and why.

    Raises:
        SubmissionError: no such submission, or the arena does not answer.
        DataError: no trial of it can be exported; also while the episodes are read.
    """
    entry = arena.status(submission)
    played = [trial for trial in entry["trials"] if trial["state"] in ("done", "policy_fault")]
    runs = [arena.request("GET", f"/v1/runs/{trial['id']}") for trial in played]
    told: dict[str, str] = {}
    schema = next(filter(None, (_tried(told, _schema, arena, run, entry) for run in runs)), None)
    if schema is None:
        raise _nothing(submission, told)

    def episodes() -> Iterator[tuple[Mapping[str, np.ndarray], Outcome]]:
        whys: dict[str, str] = {}
        for run in runs:
            values = _tried(whys, _values, arena, run, entry, schema)
            if values is None:
                leave_out(int(run["slot"]), whys[run["id"]])
                continue
            if films is not None:
                _keep_film(arena, run, films)
            yield values, _outcome(run, entry)
        if len(whys) == len(runs):
            raise _nothing(submission, whys)

    return Recordings(schema=schema, episodes=episodes(), total=len(runs), stored=1 << 40)


def _tried(
    whys: dict[str, str], read: Callable[..., T], arena: ArenaClient, run: Mapping[str, Any], *more: Any
) -> T | None:
    """What can be read of a run; else why it cannot, under its id."""
    try:
        return read(arena, run, *more)
    except ArenaRefusalError as error:
        if error.status != 404:
            raise
        whys[run["id"]] = "the arena has lost its recording"
    except _LeftOutError as error:
        whys[run["id"]] = str(error)
    except (KeyError, TypeError, ValueError, AttributeError, pa.ArrowException, ConfigError, DataError):
        whys[run["id"]] = "its recording cannot be understood"
    return None


def _nothing(submission: str, whys: Mapping[str, str]) -> DataError:
    said = ", ".join(f"{count} where {why}" for why, count in Counter(whys.values()).items())
    return DataError(f"submission {submission}", expected="trials with recordings", got=said or "none that was played",
                     fix="wait until others have been played")  # fmt: skip


def _schema(arena: ArenaClient, run: Mapping[str, Any], entry: Mapping[str, Any]) -> Schema:
    manifest = json.loads(_fetch(arena, run, MANIFEST))
    parts = [(str(name), int(size)) for name, size in manifest["state"]]
    fields = [FieldSpec(name, "float32", (size,), "observation") for name, size in parts]
    fields += [
        FieldSpec("action", "float32", (int(manifest["action"]),), "action"),
        FieldSpec("reward", "float64", (), "reward"),
        FieldSpec("late", "bool", (), "other"),
    ]
    return Schema(
        tuple(fields),
        environment=str(manifest["robot"]),
        rate_hz=float(manifest["rate_hz"]),
        source=f"trials of {entry['name']} on {entry['benchmark']['name']}, {entry['split']}",
        extra={"notes": [LAST_DROPPED]},
    )


def _values(
    arena: ArenaClient, run: Mapping[str, Any], entry: Mapping[str, Any], schema: Schema
) -> dict[str, np.ndarray]:
    if _schema(arena, run, entry).fields != schema.fields:
        raise _LeftOutError("something else was observed or done than in the first trial")
    rows = pq.read_table(pa.BufferReader(_fetch(arena, run, EPISODE)))
    if len(rows) < 2:
        raise _LeftOutError("there was one step alone, whose observation is the last")
    sizes = {spec.name: spec.size for spec in schema.fields if spec.role == "observation"}
    state = np.array(rows["state"].to_pylist(), np.float32).reshape(len(rows), sum(sizes.values()))
    parts = np.split(state, np.cumsum([*sizes.values()])[:-1], axis=1)
    action = np.array(rows["action"].to_pylist(), np.float32).reshape(len(rows), -1)
    values = dict(zip(sizes, parts, strict=True))
    return values | {
        "action": action[:-1],
        "reward": rows["reward"].to_numpy()[:-1],
        "late": rows["late"].to_numpy()[:-1],
    }


def _outcome(run: Mapping[str, Any], entry: Mapping[str, Any]) -> Outcome:
    success = {"success": True, "failure": False, "policy_fault": False}.get(run["outcome"])
    return Outcome(
        terminated=False,
        truncated=True,
        task=str(entry["benchmark"]["task"]),
        source=str(entry["name"]),
        seed=run["seed"],
        success=success,
        score=run["score"],
    )


def _fetch(arena: ArenaClient, run: Mapping[str, Any], label: str) -> bytes:
    """One file of a run, compared with its hash on the way."""
    urls = [file["url"] for file in run["downloads"] if file["label"] == label]
    if not urls:
        raise _LeftOutError("nothing was recorded")
    sha256 = urls[0].rpartition("/")[2]
    with tempfile.TemporaryDirectory(prefix="offbook-export-") as folder:
        arena.download(sha256, Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def _keep_film(arena: ArenaClient, run: Mapping[str, Any], films: Path) -> None:
    labels = [file["label"] for file in run["downloads"] if file["label"].endswith(".mp4")]
    films.mkdir(parents=True, exist_ok=True)
    for label in labels[:1]:
        (films / f"trial-{run['slot']}.mp4").write_bytes(_fetch(arena, run, label))
