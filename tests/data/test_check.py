"""`data check`: what is wrong with a store is named, and nothing finished is ever dropped."""

import errno
import fcntl
import json
import os
import random
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from made import SCHEMA, values

from offbook.client.protocol import ActionSpec
from offbook.data import check as checking
from offbook.data.alignment import check_alignment
from offbook.data.check import check_store
from offbook.data.store import EpisodeStore, FieldSpec, Schema
from offbook.errors import DataError

BOUNDED = Schema(SCHEMA.fields, rate_hz=10.0, action=ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0)))


def write(path, episodes, schema=BOUNDED, change=lambda i, fields: None):
    with EpisodeStore.create(path, schema) as writer:
        for i, length in enumerate(episodes):
            fields = values(i, length)
            change(i, fields)
            writer.append(fields, terminated=True, truncated=False, sync=False)
    return path


def found(check, name):
    return [finding for finding in check.findings if finding.check == name]


def killed(path, tmp_path, episodes=2):
    """A copy of a store as a kill leaves it in the middle of an append: values, but no commit."""
    writer = EpisodeStore.append_to(path)
    for i in range(episodes):
        writer.append(values(10 + i, 6), terminated=True, truncated=False)
    shutil.copytree(path, tmp_path / "killed")
    writer.close()
    with (tmp_path / "killed" / "fields" / "joints.npy").open("ab") as stream:
        stream.write(os.urandom(100))
    with (tmp_path / "killed" / "episodes.journal").open("ab") as stream:
        stream.write(b'{"crc":"0000')
    return tmp_path / "killed"


def test_a_sound_store(tmp_path):
    check = check_store(write(tmp_path / "s", [9, 12, 7]))
    assert check.sound
    assert (check.episodes, check.steps, check.repaired) == (3, 28, "")
    results = {finding.check: finding.result for finding in check.findings}
    assert results == {
        "index": "ok",
        "leftovers": "ok",
        "checksums": "ok",
        "numbers": "ok",
        "bounds": "ok",
        "alignment": "unclear",
    }
    assert check_store(write(tmp_path / "empty", [])).sound


def test_numbers_that_are_none_are_counted_and_placed(tmp_path):
    def change(i, fields):
        if i == 1:
            fields["joints"][[4, 5], [0, 2]] = np.nan, np.inf
        if i == 2:
            fields["joints"][-1, 1] = -np.inf
            fields["reward"][0] = np.nan

    numbers = found(check_store(write(tmp_path / "s", [9, 12, 7], change=change)), "numbers")
    assert [finding.details for finding in numbers] == [
        {"field": "joints", "count": 3, "episodes": 2, "episode": 1, "step": 4},
        {"field": "reward", "count": 1, "episodes": 1, "episode": 2, "step": 0},
    ]
    assert numbers[0].text.startswith(
        "field 'joints': 3 values that are NaN or infinite, in 2 episodes; the first in episode 1"
    )
    # A value after the last step only.
    last = found(
        check_store(write(tmp_path / "t", [4], change=lambda i, f: f["joints"].__setitem__(-1, np.nan))), "numbers"
    )
    assert last[0].details == {"field": "joints", "count": 3, "episodes": 1, "episode": 0, "step": 4}


def test_actions_beyond_their_bounds_are_reported_and_no_error(tmp_path):
    def change(i, fields):
        fields["action"][0] = 1.0 + 1e-7
        if i == 1:
            fields["action"][3:6, 1] = 1.5

    check = check_store(write(tmp_path / "s", [9, 11], change=change))
    (bounds,) = found(check, "bounds")
    assert check.sound
    assert (bounds.result, bounds.details["count"], bounds.details["episode"], bounds.details["step"]) == (
        "look",
        3,
        1,
        3,
    )
    assert "3 of 20 steps (15.00%)" in bounds.text
    assert bounds.details["excess"] == pytest.approx(0.5, abs=1e-5)
    assert found(check_store(write(tmp_path / "t", [9], SCHEMA)), "bounds")[0].result == "unclear"


def test_bounds_that_are_the_recorded_range_say_nothing(tmp_path):
    extra = {"import": {"format": "exorl", "bounds": "recorded"}}
    (bounds,) = found(check_store(write(tmp_path / "s", [9], replace(BOUNDED, extra=extra))), "bounds")
    assert (bounds.result, "range of the recorded actions" in bounds.text) == ("unclear", True)


def test_changed_values_are_wrong(tmp_path):
    path = write(tmp_path / "s", [9, 12])
    with (path / "fields" / "mode.npy").open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"abcd")
    (checksums,) = found(check_store(path), "checksums")
    assert checksums.result == "wrong"
    assert "episode 1, steps 9 to 20" in checksums.text


@pytest.mark.faults
def test_repair_drops_what_is_unfinished_and_nothing_else(tmp_path, cli):
    path = killed(write(tmp_path / "s", [9, 12]), tmp_path)
    check = check_store(path)
    (leftovers,) = found(check, "leftovers")
    assert (check.sound, leftovers.result, leftovers.details["bytes"]) == (False, "wrong", 112)
    assert check.episodes == 4
    digest = EpisodeStore.open(path).digest
    outcome = cli(["data", "check", str(path), "--repair"])
    assert outcome.exit_code == 0
    assert "dropped 112 bytes of unfinished episodes; all 4 finished are kept" in outcome.stdout
    assert EpisodeStore.open(path).digest == digest
    again = check_store(path, repair=True)
    assert again.sound
    assert again.repaired == ""


@pytest.mark.faults
def test_a_store_that_is_being_written_is_left_alone(tmp_path):
    path = write(tmp_path / "s", [9])
    with EpisodeStore.append_to(path) as writer:
        writer.append(values(1, 6), terminated=True, truncated=False)
        check = check_store(path, repair=True)
        assert check.sound
        assert f"process {os.getpid()} is writing" in found(check, "leftovers")[0].text
        writer.append(values(2, 6), terminated=True, truncated=False)
    assert len(EpisodeStore.open(path)) == 3


@pytest.mark.faults
def test_a_check_makes_no_writer_fail(tmp_path):
    path = write(tmp_path / "s", [9])
    with (path / ".lock").open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        leaving = threading.Timer(0.2, fcntl.flock, (stream, fcntl.LOCK_UN))
        leaving.start()
        EpisodeStore.append_to(path).close()
        leaving.join()


def test_a_writer_that_begins_during_a_check_is_not_taken_for_a_killed_one(tmp_path, monkeypatch):
    path, begun = write(tmp_path / "s", [9]), []
    monkeypatch.setattr(checking, "_behind", lambda *given: (begun.append(EpisodeStore.append_to(path)), (0, 99))[1])
    assert "is writing" in found(check_store(path), "leftovers")[0].text
    begun[0].close()


@pytest.mark.faults
def test_an_index_that_lost_finished_episodes_is_not_repaired_away(tmp_path):
    path = write(tmp_path / "s", [9, 12])
    old = (path / "episodes.parquet").read_bytes()
    with EpisodeStore.append_to(path) as writer:
        writer.append(values(2, 5), terminated=True, truncated=False)
    (path / "episodes.parquet").write_bytes(old)
    before = {file: file.read_bytes() for file in path.rglob("*.npy")}
    check = check_store(path, repair=True)
    (leftovers,) = found(check, "leftovers")
    assert (leftovers.result, leftovers.details["rows"], check.repaired) == ("wrong", 5, "")
    assert {file: file.read_bytes() for file in path.rglob("*.npy")} == before


@pytest.mark.faults
def test_every_file_cut_at_twenty_places_is_refused_or_names_its_loss(tmp_path):
    path = write(tmp_path / "s", [9, 12])
    writer = EpisodeStore.append_to(path)
    for i in (2, 3):
        writer.append(values(i, 5), terminated=True, truncated=False)
    whole = tmp_path / "whole"
    shutil.copytree(path, whole)
    writer.close()
    episodes = [EpisodeStore.open(whole).episode(i).fields for i in range(4)]
    chance, cut = random.Random(0), tmp_path / "cut"
    for file in sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file() and file.name != ".lock"):
        content = (whole / file).read_bytes()
        for size in [0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(18))]:
            shutil.copytree(whole, cut)
            (cut / file).write_bytes(content[:size])
            check = check_store(cut)
            if check.sound:
                # The line break at the end of a file of JSON.
                assert (file.name, size) == ("store.json", len(content) - 1)
            wrong = [finding.text for finding in check.findings if finding.result == "wrong"]
            if check.episodes is None:
                assert file.name in wrong[0] or file.name == "episodes.parquet", (file, size, wrong)
            elif not check.sound:
                # Only the journal may lose its last lines, and what they spoke of is named.
                assert file.name == "episodes.journal", (file, size)
                assert "bytes behind the last finished episode" in wrong[0]
                store = EpisodeStore.open(cut)
                for i in range(len(store)):
                    for name, array in store.episode(i).fields.items():
                        np.testing.assert_array_equal(array, episodes[i][name])
            shutil.rmtree(cut)


@pytest.mark.faults
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_at_any_call_loses_nothing_finished(tmp_path, monkeypatch, call):
    path = write(tmp_path / "s", [9])
    real, calls = getattr(os, call), 0
    for failing in range(20):
        with EpisodeStore.append_to(path) as writer:
            before, calls = len(writer), 0

            def full(*arguments, failing=failing):
                nonlocal calls
                calls += 1
                if calls > failing:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*arguments)

            monkeypatch.setattr(os, call, full)
            try:
                writer.append(values(before, 6), terminated=True, truncated=False)
                finished = True
            except DataError as error:
                assert "No space left on device; see to the disk" in str(error)  # noqa: PT017
                finished = False
            monkeypatch.setattr(os, call, real)
            if finished:
                break
            assert len(EpisodeStore.open(path)) == before
            # The disk has room again: the same writer goes on.
            writer.append(values(before, 6), terminated=True, truncated=False)
        store = EpisodeStore.open(path)
        assert len(store) == before + 1
        np.testing.assert_array_equal(store.episode(before).fields["joints"], values(before, 6)["joints"])
    assert finished
    assert failing > 3
    assert check_store(path).sound


def test_the_verb(cli, tmp_path):
    path = write(tmp_path / "s", [9, 12], change=lambda i, fields: fields["joints"].__setitem__((0, 0), np.nan))
    outcome = cli(["data", "check", str(path)])
    assert outcome.exit_code == 1
    assert "the first in episode 0, step 0" in outcome.stdout
    assert "is not sound" in outcome.stdout
    outcome = cli(["data", "check", str(path), "--json"])
    data = json.loads(outcome.stdout)
    assert (outcome.exit_code, data["ok"], data["episodes"]) == (1, False, 2)
    wrong = [finding for finding in data["findings"] if finding["result"] == "wrong"]
    assert [(finding["field"], finding["count"], finding["step"]) for finding in wrong] == [("joints", 2, 0)]
    (path / "episodes.parquet").write_bytes(b"PAR1")
    outcome = cli(["data", "check", str(path), "--repair"])
    assert (outcome.exit_code, "index of a store" in outcome.stdout) == (1, True)
    outcome = cli(["data", "check", str(tmp_path / "nowhere")])
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert "expected an episode store, got no such folder" in outcome.stderr


def filmed(path, kept=(9, 12)):
    schema = Schema(
        (FieldSpec("front", "uint8", (16, 16, 3), "observation", video=True), SCHEMA["action"]), rate_hz=10.0
    )
    with EpisodeStore.create(path, schema) as writer:
        for i, length in enumerate(kept):
            fields = {name: part for name, part in values(i, length).items() if name in ("front", "action")}
            writer.append(fields, terminated=True, truncated=False)
    return path


def test_videos_agree_with_the_rows(tmp_path):
    path = filmed(tmp_path / "s")
    check = check_store(path)
    assert check.sound
    assert found(check, "videos")[0].text.startswith("23 frames are where the rows say")
    shutil.copy(path / "video/front/000000.mp4", path / "video/front/000001.mp4")
    check = check_store(path)
    assert [finding.result for finding in (*found(check, "checksums"), *found(check, "videos"))] == ["wrong", "wrong"]
    assert "000001.mp4, episode 1: expected 13 frames, got 3 frames missing" in found(check, "videos")[0].text
    (path / "video/front/000001.mp4").write_bytes(b"")
    assert "expected a video" in found(check_store(path), "videos")[0].text
    (path / "video/front/000001.mp4").unlink()
    assert "got no such file" in found(check_store(path), "videos")[0].text


@pytest.mark.faults
def test_a_store_killed_before_its_files_were_made_is_sound(tmp_path):
    path = filmed(tmp_path / "s", ())
    for folder in ("fields", "final"):
        shutil.rmtree(path / folder)
    check = check_store(path)
    assert (check.sound, check.episodes) == (True, 0)


@pytest.mark.faults
def test_a_video_cut_at_twenty_places_is_named(tmp_path):
    path = filmed(tmp_path / "s", (4,))
    file = path / "video/front/000000.mp4"
    content, chance = file.read_bytes(), random.Random(0)
    for size in [0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(18))]:
        file.write_bytes(content[:size])
        assert found(check_store(path), "checksums")[0].result == "wrong", size


@pytest.mark.faults
def test_repair_drops_videos_of_no_episode(tmp_path):
    path = filmed(tmp_path / "s")
    for name in ("000002.mp4", ".000003.mp4.x7.mp4"):
        shutil.copy(path / "video/front/000000.mp4", path / "video/front" / name)
    assert not check_store(path).sound
    check = check_store(path, repair=True)
    assert check.sound
    assert "all 2 finished are kept" in check.repaired
    assert sorted(file.name for file in path.glob("video/front/*")) == ["000000.mp4", "000001.mp4"]


@pytest.mark.faults
def test_repair_keeps_the_videos_that_another_writer_finished_before_it_had_the_lock(tmp_path, monkeypatch):
    path, real = filmed(tmp_path / "s"), EpisodeStore.append_to
    shutil.copy(path / "video/front/000000.mp4", path / "video/front/000002.mp4")

    def late(path):
        with real(path) as writer:
            fields = {name: part for name, part in values(2, 5).items() if name in ("front", "action")}
            writer.append(fields, terminated=True, truncated=False)
        return real(path)

    monkeypatch.setattr(EpisodeStore, "append_to", late)
    check = check_store(path, repair=True)
    assert (check.sound, check.episodes) == (True, 3)
    assert (path / "video/front/000002.mp4").exists()


def system(path, shift, *, policy=0.5, noise=0.3, moving=1.0, measured=0.0, lagging=0.0, episodes=12, length=60):
    """s' = M s + B a under a = K s + noise, with actions stored where they belong, or a step away from there."""
    chance = np.random.default_rng(7)
    m, b, k = 0.95 * np.eye(3), 0.3 * chance.normal(size=(3, 2)) * moving, -0.5 * chance.normal(size=(2, 3))
    schema = Schema((FieldSpec("s", "float64", (3,), "observation"), FieldSpec("a", "float64", (2,), "action")))
    with EpisodeStore.create(path, schema) as writer:
        for _ in range(episodes):
            s, a = [chance.normal(size=3)], []
            for _ in range(length):
                a.append(policy * k @ s[-1] + noise * chance.normal(size=2))
                driving = a[-1] + lagging * a[max(len(a) - 2, 0)]
                s.append(m @ s[-1] + b @ driving + (0.1 * chance.normal(size=3) if not moving else 0))
            stored = {0: a, 1: [a[0], *a[:-1]], -1: [*a[1:], a[-1]]}[shift]
            seen = np.array(s) + measured * chance.normal(size=(length + 1, 3))
            writer.append({"s": seen, "a": np.array(stored)}, terminated=False, truncated=True)
    return EpisodeStore.open(path)


@pytest.mark.parametrize(("shift", "verdict"), [(0, "aligned"), (1, "late"), (-1, "early")])
@pytest.mark.parametrize("settings", [{}, {"policy": 0.0}, {"noise": 0.05}, {"measured": 0.03}])
def test_actions_stored_a_step_away_are_recognised(tmp_path, shift, verdict, settings):
    assert check_alignment(system(tmp_path / "s", shift, **settings)).verdict == verdict


def test_actions_that_go_on_working_for_a_step_are_no_false_alarm(tmp_path):
    settings = {"lagging": 0.8, "measured": 0.01}
    verdicts = {shift: check_alignment(system(tmp_path / f"{shift}", shift, **settings)) for shift in (0, 1, -1)}
    assert verdicts[0].gains[-1] > 0.1
    assert verdicts[0].verdict == "aligned"
    assert verdicts[1].verdict != "aligned"
    assert verdicts[-1].verdict == "early"


def test_chance_is_not_taken_for_an_effect_in_few_steps(tmp_path):
    schema = Schema((FieldSpec("s", "float64", (3,), "observation"), FieldSpec("a", "float64", (2,), "action")))
    reasons = set()
    for seed in range(40):
        chance = np.random.default_rng(seed)
        with EpisodeStore.create(tmp_path / f"{seed}", schema) as writer:
            fields = {"s": np.cumsum(chance.normal(size=(201, 3)), axis=0), "a": chance.normal(size=(200, 2))}
            writer.append(fields, terminated=True, truncated=False, sync=False)
        alignment = check_alignment(EpisodeStore.open(tmp_path / f"{seed}"))
        assert alignment.verdict == "unclear", (seed, alignment)
        reasons.add(alignment.reason)
    assert "two halves of the recordings do not agree" in reasons


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"noise": 0.0}, "no action tells more"),
        ({"moving": 0.0, "policy": 0.0}, "no action tells more"),
        ({"episodes": 1, "length": 12}, "too few steps"),
    ],
)
def test_what_the_data_cannot_tell_is_unclear(tmp_path, settings, reason):
    alignment = check_alignment(system(tmp_path / "s", 0, **settings))
    assert alignment.verdict == "unclear"
    assert reason in alignment.reason


@pytest.mark.parametrize("lengths", [[25_000, 25_000], [400, 3]])
def test_alignment_where_one_of_several_episodes_is_used(tmp_path, lengths):
    schema = Schema((FieldSpec("s", "float64", (1,), "observation"), FieldSpec("a", "float64", (1,), "action")))
    chance = np.random.default_rng(0)
    with EpisodeStore.create(tmp_path / "s", schema) as writer:
        for length in lengths:
            fields = {"s": chance.normal(size=(length + 1, 1)), "a": chance.normal(size=(length, 1))}
            writer.append(fields, terminated=True, truncated=False)
    assert check_alignment(EpisodeStore.open(tmp_path / "s")).verdict == "unclear"


def test_alignment_where_nothing_is_left_to_hold_out(tmp_path):
    schema = Schema((FieldSpec("s", "float64", (1,), "observation"), FieldSpec("a", "float64", (1,), "action")))
    chance = np.random.default_rng(0)
    with EpisodeStore.create(tmp_path / "s", schema) as writer:
        for none in (1.0, np.nan):
            fields = {"s": none * chance.normal(size=(101, 1)), "a": chance.normal(size=(100, 1))}
            writer.append(fields, terminated=True, truncated=False)
    alignment = check_alignment(EpisodeStore.open(tmp_path / "s"))
    assert (alignment.verdict, "none to hold out" in alignment.reason) == ("unclear", True)


def test_alignment_needs_states_and_actions(tmp_path):
    schema = Schema(
        (FieldSpec("front", "uint8", (16, 16, 3), "observation"), FieldSpec("a", "float64", (2,), "action"))
    )
    with EpisodeStore.create(tmp_path / "s", schema) as writer:
        fields = {"front": np.zeros((301, 16, 16, 3), np.uint8), "a": np.zeros((300, 2))}
        writer.append(fields, terminated=True, truncated=False)
    assert check_alignment(EpisodeStore.open(tmp_path / "s")).reason == "no state, or no action, is recorded"
