"""Clips: frames, rate and size come back; broken files are refused; writing is atomic and repeatable."""

import av
import numpy as np
import pytest

from offbook.data.clips import probe, read_clip, write_clip
from offbook.errors import ConfigError, DataError


def moving(time, height, width):
    """A smooth coloured pattern that moves, like a rendered scene rather than noise."""
    t, y, x = np.meshgrid(np.arange(time), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 9 + t / 5), np.cos(y / 7 - t / 8), np.sin((x + y) / 12 + t / 10)]
    return np.stack([np.rint(127 + 100 * wave) for wave in waves], axis=-1).astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (63, 65), (33, 48), (17, 19)])
@pytest.mark.parametrize("fps", [10, 29.97])
def test_clips_come_back(tmp_path, height, width, fps):
    frames = moving(40, height, width)
    write_clip(tmp_path / "a.mp4", frames, fps)
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, info.height, info.width) == (40, height, width)
    assert info.fps == pytest.approx(fps, rel=1e-3)
    assert info.seconds == pytest.approx(40 / fps, rel=1e-3)
    back = read_clip(tmp_path / "a.mp4")
    assert back.shape == frames.shape
    assert psnr(back, frames) > 33
    for start, stop in ((0, 1), (13, 20), (39, None), (7, 7), (38, 99)):
        np.testing.assert_array_equal(read_clip(tmp_path / "a.mp4", start, stop), back[start:stop])
    assert read_clip(tmp_path / "a.mp4", 60).shape == (0, height, width, 3)


def test_any_part_of_a_long_clip_is_the_same_frames(tmp_path):
    write_clip(tmp_path / "a.mp4", moving(300, 32, 32), 25)
    whole = read_clip(tmp_path / "a.mp4")
    assert len(whole) == 300
    for start in (1, 100, 249, 251, 299):
        np.testing.assert_array_equal(read_clip(tmp_path / "a.mp4", start, start + 5), whole[start : start + 5])


def test_browsers_can_play_it_at_once(tmp_path):
    write_clip(tmp_path / "a.mp4", moving(5, 32, 32), 10)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")


def test_equal_frames_give_equal_files_and_old_ones_are_replaced(tmp_path):
    frames = moving(20, 48, 48)
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, frames, 10)
        # What others leave behind in memory must not show in the file.
        for size in (5_000, 50_000, 500_000):
            np.random.default_rng(size).bytes(size)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    write_clip(tmp_path / "a.mp4", frames[:3], 10)
    assert probe(tmp_path / "a.mp4").frames == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
def test_frames_may_lie_anyhow_in_memory(tmp_path, height, width):
    frames = moving(6, height, width)
    write_clip(tmp_path / "a.mp4", frames[:, ::-1, ::-1], 10)
    write_clip(tmp_path / "b.mp4", frames[:, ::-1, ::-1].copy(), 10)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_failed_write_leaves_the_old_clip(tmp_path):
    write_clip(tmp_path / "a.mp4", moving(5, 32, 32), 10)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(DataError, match="expected frames"):
        write_clip(tmp_path / "a.mp4", np.zeros((0, 32, 32, 3), np.uint8), 10)
    for settings in ({"fps": 0}, {"fps": 10, "crf": 99}):
        with pytest.raises(ConfigError, match="out of range"):
            write_clip(tmp_path / "a.mp4", moving(5, 32, 32), **settings)
    with pytest.raises(ConfigError, match=r"ending in \.mp4"):
        write_clip(tmp_path / "a.avi", moving(5, 32, 32), 10)
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_what_is_no_clip_is_refused(tmp_path):
    write_clip(tmp_path / "whole.mp4", moving(60, 64, 64), 10)
    content = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("half.mp4", "text.mp4", "nowhere.mp4"):
        with pytest.raises(DataError, match=f"{name}: expected a video"):
            read_clip(tmp_path / name)
    with pytest.raises(ConfigError, match="0 <= start <= stop"):
        read_clip(tmp_path / "whole.mp4", 5, 3)
