"""The trials of a submission as recordings: fetched from an arena, to be kept as a store and to be learned from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offbook.arena.recordings import EPISODE, MANIFEST
from offbook.client.submit import ArenaClient
from offbook.data.formats import Recordings
from offbook.data.index import Outcome
from offbook.data.store import FieldSpec, Schema
from offbook.errors import DataError

LAST_DROPPED = "the last observation of a trial is its final one; the action and the reward of that step are left out"


def read_trials(arena: ArenaClient, submission: str, films: Path | None = None) -> Recordings:
    """Everything that was recorded of a submission's trials, in the order of their scenes.

    Args:
        arena: where it ran.
        submission: its id.
        films: also keep the films in this folder, as `trial-SLOT.mp4`.

    Raises:
        SubmissionError: no such submission, or the arena does not answer.
        DataError: no trial of it was recorded, or the trials do not agree in what was recorded.
    """
    entry = arena.status(submission)
    played = [trial for trial in entry["trials"] if trial["state"] in ("done", "policy_fault")]
    runs = [arena.request("GET", f"/v1/runs/{trial['id']}") for trial in played]
    kept = [run for run in runs if {EPISODE, MANIFEST} <= {file["label"] for file in run["downloads"]}]
    if not kept:
        raise DataError(f"submission {submission}", expected="trials with recordings", got=f"{len(runs)} trials, none",
                        fix="wait until one has been played")  # fmt: skip
    schema = _schema(entry, json.loads(_fetch(arena, kept[0], MANIFEST)))
    size = sum(spec.size for spec in schema.fields if spec.role == "observation")

    def episodes() -> Iterator[tuple[Mapping[str, np.ndarray], Outcome]]:
        for run in kept:
            rows = pq.read_table(pa.BufferReader(_fetch(arena, run, EPISODE)))
            state = np.array(rows["state"].to_pylist(), np.float32).reshape(len(rows), -1)
            if state.shape[1] != size or len(rows) < 2:
                raise DataError(f"trial {run['id']}", expected=f"2 or more steps of {size} numbers",
                                got=f"{len(rows)} of {state.shape[1]}", fix="export another submission")  # fmt: skip
            if films is not None:
                _keep_film(arena, run, films)
            yield _values(schema, state, rows), _outcome(run, entry)

    return Recordings(schema=schema, episodes=episodes(), total=len(kept), stored=1 << 40)


def _schema(entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> Schema:
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


def _values(schema: Schema, state: np.ndarray, rows: Any) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    column = 0
    for spec in schema.fields:
        if spec.role == "observation":
            values[spec.name] = state[:, column : column + spec.size]
            column += spec.size
    action = np.array(rows["action"].to_pylist(), np.float32).reshape(len(rows), -1)
    values |= {"action": action[:-1], "reward": rows["reward"].to_numpy()[:-1], "late": rows["late"].to_numpy()[:-1]}
    return values


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
    sha256 = next(file["url"] for file in run["downloads"] if file["label"] == label).rpartition("/")[2]
    with tempfile.TemporaryDirectory(prefix="offbook-export-") as folder:
        arena.download(sha256, Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def _keep_film(arena: ArenaClient, run: Mapping[str, Any], films: Path) -> None:
    labels = [file["label"] for file in run["downloads"] if file["label"].endswith(".mp4")]
    films.mkdir(parents=True, exist_ok=True)
    for label in labels[:1]:
        (films / f"trial-{run['slot']}.mp4").write_bytes(_fetch(arena, run, label))
