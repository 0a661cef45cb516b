"""Cameras kept as video: the same pictures by every way of reading, copied files as they were, honest faults."""

import itertools
import os
import shutil
import threading
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from test_clips import moving, psnr

from offbook.data import video
from offbook.data.clips import read_clip, write_clip
from offbook.data.store import EpisodeStore, FieldSpec, Schema
from offbook.data.video import Video, frame_times
from offbook.data.windows import WindowSampler
from offbook.data.writer import Writer
from offbook.errors import DataError

CAMERA = FieldSpec("front", "uint8", (32, 48, 3), "observation", video=True)
SCHEMA = Schema((CAMERA, FieldSpec("action", "float32", (2,), "action")), rate_hz=10.0)
LENGTHS = [11, 1, 30]
SCENE = moving(200, 32, 48)
PLACES = [3, 60, 100]


def fields(episode, pictures=None):
    first, length = PLACES[episode], LENGTHS[episode]
    pictures = SCENE[first : first + length + 1] if pictures is None else pictures
    return {"front": pictures, "action": np.full((length, 2), episode, np.float32)}


def append(writer, episode, pictures=None):
    return writer.append(fields(episode, pictures), terminated=True, truncated=False)


@pytest.fixture
def raw(tmp_path):
    with EpisodeStore.create(tmp_path / "raw", SCHEMA) as writer:
        for episode in range(3):
            append(writer, episode)
    return EpisodeStore.open(tmp_path / "raw")


@pytest.fixture
def copied(tmp_path):
    """All episodes out of one file with B-frames and few key frames."""
    write_clip(tmp_path / "scene.mp4", SCENE, 25)
    with EpisodeStore.create(tmp_path / "copied", SCHEMA) as writer:
        for episode in range(3):
            rows = np.arange(PLACES[episode], PLACES[episode] + LENGTHS[episode] + 1)
            append(writer, episode, Video(path=tmp_path / "scene.mp4", frames=rows))
    return EpisodeStore.open(tmp_path / "copied")


def test_raw_frames_come_back_a_little_lossy(raw):
    raw.verify()
    assert (len(raw), raw.steps, raw.field("front").shape) == (3, 42, (42, 32, 48, 3))
    for episode in range(3):
        back = raw.episode(episode).fields["front"]
        assert back.shape == (LENGTHS[episode] + 1, 32, 48, 3)
        assert psnr(back, fields(episode)["front"]) > 33
    assert sum(1 for _ in (raw.path / "video" / "front").iterdir()) == 3
    assert raw.schema.observation_spec().cameras == {"front": (32, 48)}


def test_a_copied_file_is_the_same_file_once(copied, tmp_path):
    copied.verify()
    kept = list((copied.path / "video" / "front").iterdir())
    assert [path.read_bytes() for path in kept] == [(tmp_path / "scene.mp4").read_bytes()]
    whole = read_clip(tmp_path / "scene.mp4")
    for episode in range(3):
        first, length = PLACES[episode], LENGTHS[episode]
        np.testing.assert_array_equal(copied.episode(episode).fields["front"], whole[first : first + length + 1])
        given = copied.video("front", episode)
        assert given.path == kept[0]
        np.testing.assert_array_equal(given.frames, np.arange(first, first + length + 1))
    np.testing.assert_allclose(frame_times(tmp_path / "scene.mp4"), np.arange(200) / 25, atol=1e-6)


@pytest.mark.parametrize("name", ["raw", "copied"])
def test_every_way_of_reading_gives_the_same_pictures(name, request, monkeypatch):
    # Room for five frames, so that most are dropped again.
    monkeypatch.setattr(video, "_CACHE_BYTES", 5 * 32 * 48 * 3)
    monkeypatch.setattr(video, "_OPEN_FILES", 2)
    store = request.getfixturevalue(name)
    whole = np.concatenate([store.episode(episode).fields["front"][:-1] for episode in range(3)])
    column = store.field("front")
    np.testing.assert_array_equal(column[:], whole)
    np.testing.assert_array_equal(np.asarray(column), whole)
    np.testing.assert_array_equal(column[-1], whole[-1])
    np.testing.assert_array_equal(column[[3, 25]], whole[[3, 25]])
    np.testing.assert_array_equal(column[np.int64(7)], whole[7])
    np.testing.assert_array_equal(column[40:10:-7], whole[40:10:-7])
    np.testing.assert_array_equal(column[np.arange(42) % 5 == 0], whole[::5])
    random = np.random.default_rng(0)
    for _ in range(20):
        rows = random.integers(0, 42, (3, 4))
        np.testing.assert_array_equal(column[rows], whole[rows])
    assert column[np.zeros((0, 4), np.int64)].shape == (0, 4, 32, 48, 3)
    for bad in (42, -43, [0, 42], np.array([0.5]), np.ones(41, bool), (3, 10)):
        with pytest.raises(IndexError):
            column[bad]


def test_windows_carry_video_like_any_field(raw):
    whole = np.concatenate([raw.episode(episode).fields["front"][:-1] for episode in range(3)])
    sampler = WindowSampler(raw, ["front", "action"], length=4, pad="left")
    windows = sampler.at(np.arange(len(sampler)))
    rows = raw.episodes["start"][windows.episode][:, None] + windows.start[:, None] + np.arange(4)
    expected = np.where(windows.valid[..., None, None, None], whole[np.maximum(rows, 0)], 0)
    np.testing.assert_array_equal(windows.data["front"], expected)
    assert windows.data["front"].dtype == np.uint8


def test_an_episode_may_lack_its_video(tmp_path):
    with EpisodeStore.create(tmp_path / "s", SCHEMA) as writer:
        append(writer, 0)
        writer.append({**fields(1), "front": None}, terminated=True, truncated=False)
    store = EpisodeStore.open(tmp_path / "s")
    store.verify()
    assert store.present("front").tolist() == [True, False]
    assert not store.field("front")[11:].any()
    windows = WindowSampler(store, ["front"], length=1).sample(64, 0)
    np.testing.assert_array_equal(windows.data["front"].any(axis=(1, 2, 3, 4)), windows.present["front"])
    with pytest.raises(DataError, match="episode 1, field 'front'"):
        store.video("front", 1)


def test_the_digest_does_not_depend_on_how_it_was_written(raw, copied, tmp_path):
    # Out of another store, in two goes, with a file of a crash in the way.
    with EpisodeStore.create(tmp_path / "again", SCHEMA) as writer:
        append(writer, 0)
    for name in ("000001.mp4", "000009.mp4", ".000001.mp4.x.mp4"):
        (tmp_path / "again" / "video" / "front" / name).write_text("of a crash")
    with EpisodeStore.append_to(tmp_path / "again") as writer:
        append(writer, 1, raw.video("front", 1))
        append(writer, 2)
    again = EpisodeStore.open(tmp_path / "again")
    assert again.digest == raw.digest != copied.digest
    again.verify()
    assert {file.name for file in again.path.glob("video/front/*")} == {f"{n:06}.mp4" for n in range(3)}


def test_a_file_that_a_later_session_gives_again_is_not_copied_again(copied, tmp_path):
    for episode in range(3):
        os.utime(tmp_path / "scene.mp4", (episode, episode))
        path = tmp_path / "sessions"
        with EpisodeStore.append_to(path) if episode else EpisodeStore.create(path, SCHEMA) as writer:
            rows = np.arange(PLACES[episode], PLACES[episode] + LENGTHS[episode] + 1)
            append(writer, episode, Video(path=tmp_path / "scene.mp4", frames=rows))
    store = EpisodeStore.open(path)
    assert [file.name for file in store.path.glob("video/front/*")] == ["000000.mp4"]
    assert store.digest == copied.digest
    # Another file of the same size is another file.
    other = bytearray((tmp_path / "scene.mp4").read_bytes())
    other[-1] ^= 1
    (tmp_path / "scene.mp4").write_bytes(other)
    with EpisodeStore.append_to(store.path) as writer:
        append(writer, 0, Video(path=tmp_path / "scene.mp4", frames=np.arange(12)))
    assert (store.path / "video/front/000001.mp4").read_bytes() == other
    EpisodeStore.open(store.path).verify()


def test_a_frame_may_be_there_twice(raw, tmp_path):
    given = raw.video("front", 0)
    doubled = np.append(given.frames[:-1], given.frames[-2])
    with EpisodeStore.create(tmp_path / "s", SCHEMA) as writer:
        append(writer, 0, Video(path=given.path, frames=doubled))
    back = EpisodeStore.open(tmp_path / "s").episode(0).fields["front"]
    np.testing.assert_array_equal(back[-1], back[-2])


@pytest.mark.faults
def test_what_does_not_fit_is_refused_and_leaves_the_store_as_it_was(copied, tmp_path):
    write_clip(tmp_path / "small.mp4", SCENE[:, :30], 25)
    (tmp_path / "text.mp4").write_text("not a video")
    scene = tmp_path / "scene.mp4"
    before = copied.digest
    with EpisodeStore.append_to(copied.path) as writer:
        for bad, words in (
            (Video(path=tmp_path / "small.mp4", frames=np.arange(12)), r"pictures of 32 x 48.*got 30 x 48"),
            (Video(path=tmp_path / "text.mp4", frames=np.arange(12)), "expected a video"),
            (Video(path=scene, frames=np.arange(190, 202)), "frames of the 200"),
            (Video(path=scene, frames=np.arange(11)), "12 frames for 11 steps"),
            (SCENE[:12, :, :30], r"shape \(12, 32, 48, 3\)"),
        ):
            with pytest.raises(DataError, match=words):
                append(writer, 0, bad)
    assert EpisodeStore.open(copied.path).digest == before
    plain = Schema((replace(CAMERA, video=False), SCHEMA.fields[1]))
    with EpisodeStore.create(tmp_path / "plain", plain) as writer, pytest.raises(DataError, match="not kept as video"):
        append(writer, 0, Video(path=scene, frames=np.arange(12)))
    with pytest.raises(DataError, match="a camera, to be kept as video"):
        FieldSpec("joints", "float32", (3,), "observation", video=True)
    with pytest.raises(DataError, match="a camera kept as video"):
        EpisodeStore.open(tmp_path / "plain").video("front", 0)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["gone", "cut", "other"])
def test_a_video_that_changed_is_named(raw, fault):
    file = raw.path / "video" / "front" / "000002.mp4"
    if fault == "gone":
        file.unlink()
    elif fault == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        shutil.copyfile(file.with_name("000001.mp4"), file)
    store = EpisodeStore.open(raw.path)
    with pytest.raises(DataError, match=r"000002\.mp4|episode 2"):
        store.verify()
    with pytest.raises(DataError, match=r"000002\.mp4"):
        store.field("front")[:]
    assert store.field("front")[:12].any()


def test_several_threads_may_read(copied, monkeypatch):
    monkeypatch.setattr(video, "_CACHE_BYTES", 5 * 32 * 48 * 3)
    column = copied.field("front")
    whole = column[:]
    wrong = []

    def read(seed):
        random = np.random.default_rng(seed)
        for _ in range(15):
            rows = random.integers(0, 42, 5)
            wrong.extend(rows[(column[rows] != whole[rows]).any(axis=(1, 2, 3))])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_an_episode_can_be_appended_without_waiting(tmp_path):
    with EpisodeStore.create(tmp_path / "s", SCHEMA) as writer:
        futures = [writer.append_soon(fields(e), terminated=True, truncated=False) for e in range(3)]
        writer.flush()
        assert [future.result(0) for future in futures] == [0, 1, 2]
        assert len(EpisodeStore.open(tmp_path / "s")) == 3
        writer.append_soon(fields(0), terminated=True, truncated=False)
    store = EpisodeStore.open(tmp_path / "s")
    assert len(store) == 4
    store.verify()


def test_what_goes_wrong_behind_is_not_lost(tmp_path):
    writer = EpisodeStore.create(tmp_path / "s", SCHEMA)
    bad = writer.append_soon({**fields(0), "action": np.zeros((11, 3), np.float32)}, terminated=True, truncated=False)
    good = writer.append_soon(fields(1), terminated=True, truncated=False)
    assert good.result(60) == 0
    with pytest.raises(DataError, match="field 'action'"):
        writer.close()
    assert isinstance(bad.exception(), DataError)
    store = EpisodeStore.open(tmp_path / "s")
    store.verify()
    assert store.episodes["length"].tolist() == [1]


@pytest.mark.faults
def test_what_goes_wrong_behind_costs_no_other_episode(tmp_path):
    writer = EpisodeStore.create(tmp_path / "s", SCHEMA)
    wrong = {**fields(0), "action": np.zeros((11, 3), np.float32)}
    for given in (fields(1), wrong, fields(2)):
        writer.append_soon(given, terminated=True, truncated=False, sync=False)
    with pytest.raises(DataError, match="field 'action'"):
        writer.flush()
    assert EpisodeStore.open(tmp_path / "s").episodes["length"].tolist() == [1, 30]
    writer.close()


@pytest.mark.faults
def test_a_refused_episode_leaves_no_video_behind(tmp_path):
    schema = Schema((CAMERA, replace(CAMERA, name="wrist"), SCHEMA.fields[1]))
    write_clip(tmp_path / "small.mp4", SCENE[:, :30], 25)
    write_clip(tmp_path / "scene.mp4", SCENE, 25)
    good = {**fields(0), "wrist": fields(0)["front"]}
    small = Video(path=tmp_path / "small.mp4", frames=np.arange(12))
    late = Video(path=tmp_path / "scene.mp4", frames=np.arange(190, 202))
    with EpisodeStore.create(tmp_path / "s", schema) as writer:
        writer.append(good, terminated=True, truncated=False)
        kept = sorted((tmp_path / "s" / "video").rglob("*"))
        for bad in (small, late):
            with pytest.raises(DataError):
                writer.append({**good, "wrist": bad}, terminated=True, truncated=False)
            assert sorted((tmp_path / "s" / "video").rglob("*")) == kept
        scene = Video(path=tmp_path / "scene.mp4", frames=np.arange(12))
        writer.append({**good, "wrist": scene}, terminated=True, truncated=False)
    store = EpisodeStore.open(tmp_path / "s")
    store.verify()
    assert [store.video(name, 1).path.name for name in ("front", "wrist")] == ["000001.mp4", "000001.mp4"]


@pytest.mark.faults
@pytest.mark.parametrize("name", ["fsync", "pwrite"])
def test_an_append_that_is_interrupted_has_not_been(raw, tmp_path, monkeypatch, name):
    real, left = getattr(os, name), [0]

    def interrupted(*given):
        done = real(*given)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(os, name, interrupted)
    for place in itertools.count(1):
        with EpisodeStore.create(tmp_path / f"{place}", SCHEMA) as writer:
            append(writer, 0)
            left[0] = place
            with suppress(KeyboardInterrupt):
                append(writer, 1)
            left[0], count = 0, len(writer)
            if count == 1:
                append(writer, 1)
            append(writer, 2)
        assert EpisodeStore.open(tmp_path / f"{place}").digest == raw.digest, place
        if count == 2:
            break
    assert place > 3


@pytest.mark.faults
def test_a_writer_dropped_while_it_appends_gives_its_lock_back(tmp_path, monkeypatch):
    go, real = threading.Event(), Writer.append
    monkeypatch.setattr(Writer, "append", lambda *given, **more: (go.wait(60), real(*given, **more))[1])
    writer = EpisodeStore.create(tmp_path / "s", SCHEMA)
    future = writer.append_soon(fields(1), terminated=True, truncated=False)
    (worker,) = (thread for thread in threading.enumerate() if thread.name.startswith("append"))
    del writer
    go.set()
    assert future.result(60) == 0
    worker.join(60)
    with EpisodeStore.append_to(tmp_path / "s") as again:
        assert len(again) == 1
