"""Trials leave an arena as recordings that other tools read."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from arena_server import Walker, running
from sqlalchemy import select

from offbook.arena.tables import Blob, Result, Trial
from offbook.arena.worker import run_worker
from offbook.data.clips import read_clip
from offbook.data.store import EpisodeStore

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    with running(tmp_path_factory.mktemp("arena"), watchdog_seconds=14.0) as arena:
        yield arena


def test_the_trials_of_a_submission_become_a_store_and_a_dataset_of_lerobot(arena, tmp_path, cli) -> None:
    entry = arena.submit("root", kind="anchor", anchor="random", name="random", trials=3)
    options = {"robot": Walker(steps=6), "name": "arm-1", "max_trials": 3, "idle_exit": 60.0}
    assert run_worker(arena.url, arena.tokens["lab"], "arm", **options).trials == {"done": 3}
    words = ["arena", "export", entry, str(tmp_path / "store"), "--films", str(tmp_path / "films"), "--url", arena.url]
    outcome = cli(words)
    assert outcome.exit_code == 0, outcome.stderr
    assert "3 trials, 15 steps" in outcome.stdout
    store = EpisodeStore.open(tmp_path / "store")
    store.verify()
    trials = {trial["slot"]: trial for trial in arena.status(entry)["trials"] if trial["state"] == "done"}
    for number, (slot, trial) in enumerate(sorted(trials.items())):
        episode = store.episode(number)
        assert (episode.seed, episode.score) == (trial["seed"], pytest.approx(trial["score"]))
        places, actions = episode.fields["place"], episode.fields["action"]
        assert (places.shape, actions.shape) == ((6, 2), (5, 1))
        # The walker goes by what it is told: each place is the last one and the action.
        np.testing.assert_allclose(places[1:, 0], places[:-1, 0] + actions[:, 0], rtol=1e-5)
        np.testing.assert_allclose(episode.fields["reward"], actions[:, 0], rtol=1e-6)
        assert read_clip(tmp_path / "films" / f"trial-{slot}.mp4").shape[1:] == (32, 48, 3)
    exported = cli(["data", "export", str(tmp_path / "store"), f"lerobot:{tmp_path / 'lerobot'}"])
    assert exported.exit_code == 0, exported.stderr
    back = cli(["data", "import", f"lerobot:{tmp_path / 'lerobot'}", "--out", str(tmp_path / "back")])
    assert back.exit_code == 0, back.stderr
    assert EpisodeStore.open(tmp_path / "back").steps == 15


def test_trials_that_cannot_be_exported_are_left_out_and_counted(arena, tmp_path, cli) -> None:
    entry = arena.submit("root", kind="anchor", anchor="random", name="mixed", trials=4)
    robot = Walker(steps=6)
    options = {"robot": robot, "name": "arm-1", "max_trials": 4, "idle_exit": 60.0}
    assert run_worker(arena.url, arena.tokens["lab"], "arm", **options).trials == {"done": 4}

    def changed(slot: int, label: str, content: bytes | None) -> None:
        """Another file in place of one that a worker sent, or none."""
        with arena.database.write() as session:
            trial = select(Trial.id).where(Trial.submission_id == int(entry), Trial.slot == slot)
            result = session.scalars(select(Result).where(Result.trial_id == trial.scalar_subquery())).one()
            kept = [file for file in result.files if file["name"] != label]
            if content is not None:
                sha256, size = arena.app.state.arena.blobs.put(content), len(content)
                row = {"sha256": sha256, "size": size, "media_type": "application/json", "private": False}
                session.add(Blob(**row, user_id=1, created=0.0))
                kept.append({"name": label, "sha256": sha256, "media_type": "application/json", "size": size})
            result.files = kept

    one = pa.table({"state": [[0.0, 0.0]], "action": [[1.0]], "reward": [1.0], "late": [False]})
    pq.write_table(one, tmp_path / "one.parquet")
    changed(0, "episode.parquet", (tmp_path / "one.parquet").read_bytes())
    changed(1, "manifest.json", b'{"format": 1, "robot": "arm"}')
    changed(2, "episode.parquet", None)
    words = ["arena", "export", entry, "--url", arena.url]
    told = cli([*words, str(tmp_path / "store")])
    assert told.exit_code == 0, told.stderr
    assert told.stdout.splitlines() == [
        f"{tmp_path}/store holds 1 trials, 5 steps, of submission {entry}.",
        "Left out, because there was one step alone, whose observation is the last: 1, trial 0",
        "Left out, because its recording cannot be understood: 1, trial 1",
        "Left out, because nothing was recorded: 1, trial 2",
    ]
    assert EpisodeStore.open(tmp_path / "store").steps == 5
    other = {"state": [["place", 3]], "action": 1, "robot": "arm", "rate_hz": 50.0}
    changed(3, "manifest.json", json.dumps(other).encode())
    listed = json.loads(cli([*words, str(tmp_path / "none"), "--json"]).stdout)
    assert (listed["status"], "1 where something else was observed" in listed["detail"]) == (1, True)
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_exported_is_said(arena, tmp_path, cli) -> None:
    entry = arena.submit("root", kind="anchor", anchor="random", name="waits", trials=1)
    outcome = cli(["arena", "export", entry, str(tmp_path / "store"), "--url", arena.url])
    assert (outcome.exit_code, "trials with recordings" in outcome.stderr) == (1, True)
    missing = cli(["arena", "export", "99999", str(tmp_path / "store"), "--url", arena.url])
    assert (missing.exit_code, "not_found" in missing.stderr) == (1, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("precious")
    taken = cli(["arena", "export", entry, str(tmp_path / "full"), "--url", arena.url])
    assert "new or empty" in taken.stderr
    assert not (tmp_path / "store").exists()
