"""What a user with bad recordings meets on the command line: the message, the exit code, and what is left."""

import json
import shutil

import numpy as np
import pytest
from made import SCHEMA, values

from offbook.client.protocol import ActionSpec
from offbook.data.store import EpisodeStore, FieldSpec, Schema
from offbook.data.windows import WindowSampler
from offbook.errors import DataError

BOUNDED = Schema(SCHEMA.fields, rate_hz=10.0, action=ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0)))
BRIEF = ["--preset", "smoke", "--fit.steps", "4", "--chunk", "2", "--execute", "1"]


def write(path, lengths, schema=BOUNDED, change=lambda i, fields: None):
    with EpisodeStore.create(path, schema) as writer:
        for i, length in enumerate(lengths):
            fields = values(i, length)
            change(i, fields)
            writer.append(fields, terminated=True, truncated=False, sync=False)
    return path


@pytest.mark.faults
def test_nan_is_placed_by_check_and_refused_by_training(cli, tmp_path):
    def change(i, fields):
        if i == 1:
            fields["joints"][3, 2] = np.nan

    path = write(tmp_path / "s", [9, 12, 7], change=change)
    outcome = cli(["data", "check", str(path), "--json"])
    (wrong,) = [finding for finding in json.loads(outcome.stdout)["findings"] if finding["result"] == "wrong"]
    assert outcome.exit_code == 1
    assert [wrong[key] for key in ("field", "count", "episode", "step")] == ["joints", 1, 1, 3]
    outcome = cli(["train", "bc", "--data", str(path), "--out", str(tmp_path / "run"), "--parts", "joints", *BRIEF])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert "episode 1" in outcome.stderr
    assert "joints" in outcome.stderr
    assert "expected finite numbers, got NaN or infinity; leave such steps out: --on-nan drop." in outcome.stderr


@pytest.mark.faults
def test_windows_with_nan_are_dropped_where_that_is_asked_for(cli, tmp_path):
    def change(i, fields):
        if i == 0:
            fields["joints"][3, 2] = np.nan
            fields["action"][5, 0] = np.inf

    path = write(tmp_path / "s", [9, 12, 7], change=change)
    out = ["--out", str(tmp_path / "run"), "--held-out", "0", "--on-nan", "drop"]
    outcome = cli(["train", "bc", "--data", str(path), *out, "--parts", "joints", *BRIEF])
    assert outcome.exit_code == 0, outcome.stderr
    assert "2 of 28 windows are left out for NaN or infinity" in outcome.stderr


@pytest.mark.faults
def test_episodes_shorter_than_a_window_are_counted_and_not_all_may_be(tmp_path):
    store = EpisodeStore.open(write(tmp_path / "s", [3, 9, 2, 5]))
    assert WindowSampler(store, ["joints"], length=4).dropped == 2
    with pytest.raises(DataError, match="the longest of 9 steps") as told:
        WindowSampler(store, ["joints"], length=10)
    assert told.value.exit_code == 1


@pytest.mark.faults
def test_a_field_that_no_episode_has_is_named(cli, tmp_path):
    path = write(tmp_path / "s", [9, 12], change=lambda i, fields: fields.update(action=None))
    data = json.loads(cli(["data", "info", str(path), "--json"]).stdout)
    assert {field["name"]: field["episodes"] for field in data["fields"]} == {
        **dict.fromkeys(("joints", "front", "reward", "mode"), 2),
        "action": 0,
    }
    outcome = cli(["train", "bc", "--data", str(path), "--out", str(tmp_path / "run"), "--parts", "joints", *BRIEF])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert "action" in outcome.stderr


@pytest.mark.parametrize(("shift", "result"), [(0, "ok"), (1, "look")])
def test_actions_a_step_away_from_theirs_are_reported_and_no_error(cli, tmp_path, shift, result):
    chance = np.random.default_rng(7)
    pull, push = 0.95 * np.eye(3), 0.3 * chance.normal(size=(3, 2))
    schema = Schema((FieldSpec("s", "float64", (3,), "observation"), FieldSpec("a", "float64", (2,), "action")))
    with EpisodeStore.create(tmp_path / "s", schema) as writer:
        for _ in range(12):
            s, a = [chance.normal(size=3)], chance.normal(size=(60, 2))
            for action in a:
                s.append(pull @ s[-1] + push @ action)
            fields = {"s": np.array(s), "a": np.roll(a, shift, axis=0)}
            writer.append(fields, terminated=False, truncated=True)
    outcome = cli(["data", "check", str(tmp_path / "s"), "--json"])
    (alignment,) = [f for f in json.loads(outcome.stdout)["findings"] if f["check"] == "alignment"]
    assert (outcome.exit_code, alignment["result"]) == (0, result)
    assert ("a step late" in alignment["text"]) == (shift == 1)


def test_actions_beyond_their_bounds_are_kept_and_reported_with_their_share(cli, tmp_path):
    path = write(tmp_path / "s", [9, 11], change=lambda i, fields: fields["action"].__setitem__((3, 1), 1.5))
    outcome = cli(["data", "check", str(path)])
    assert outcome.exit_code == 0
    assert "2 of 20 steps (10.00%) have actions outside the declared bounds, by up to 0.5" in outcome.stdout
    assert "kept as they are" in outcome.stdout
    assert EpisodeStore.open(path).field("action")[3, 1] == 1.5


@pytest.mark.faults
def test_a_store_that_a_kill_cut_opens_and_is_repaired(cli, tmp_path):
    writer = EpisodeStore.append_to(write(tmp_path / "s", [9]))
    writer.append(values(1, 6), terminated=True, truncated=False)
    shutil.copytree(tmp_path / "s", tmp_path / "killed")
    writer.close()
    with (tmp_path / "killed" / "fields" / "joints.npy").open("ab") as stream:
        stream.write(bytes(100))
    path = str(tmp_path / "killed")
    assert json.loads(cli(["data", "info", path, "--json"]).stdout)["episodes"] == 2
    outcome = cli(["data", "check", path])
    assert (outcome.exit_code, "as a killed writer leaves them; drop them with --repair" in outcome.stdout) == (1, True)
    outcome = cli(["data", "check", path, "--repair"])
    assert (outcome.exit_code, "all 2 finished are kept" in outcome.stdout) == (0, True)
    assert cli(["data", "check", path]).exit_code == 0


@pytest.mark.faults
def test_values_that_changed_since_they_were_written_are_named(cli, tmp_path):
    path = write(tmp_path / "s", [9, 12])
    with (path / "fields" / "mode.npy").open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"abcd")
    outcome = cli(["data", "info", str(path), "--verify"])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert "episode 1, steps 9 to 20: expected the values that were written, got different ones" in outcome.stderr
    outcome = cli(["data", "check", str(path)])
    assert (outcome.exit_code, "episode 1, steps 9 to 20" in outcome.stdout) == (1, True)


def test_a_constant_entry_is_no_fault(cli, tmp_path):
    path = write(tmp_path / "s", [9, 12], change=lambda i, fields: fields["joints"].__setitem__((..., 1), 0.1))
    assert cli(["data", "check", str(path)]).exit_code == 0
    outcome = cli(["train", "bc", "--data", str(path), "--out", str(tmp_path / "run"), "--parts", "joints", *BRIEF])
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stderr.count("1 of 3 entries of joints never vary and tell nothing") == 1


@pytest.mark.faults
@pytest.mark.parametrize(("out", "got"), [("link", "a link"), (".", "the current one")])
def test_a_folder_whose_place_a_store_cannot_take(tmp_path, monkeypatch, cli, out, got):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    outcome = cli(["data", "import", "paths:nowhere.pkl", "--out", out])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert f"expected a new or empty folder, got {got}" in outcome.stderr
    assert [file.name for file in (tmp_path / "here").iterdir()] == ["link"]
