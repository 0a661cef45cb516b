"""What is shown is bare: pixels without a word about their origin, and nothing that makes us read elsewhere."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from offbook.data.clips import read_clip, write_clip
from offbook.errors import DataError
from offbook.rating import media

SECRET = "made-by-bc-chunk50"


def film(path: Path, codec: str = "libx264", frames: int = 20, still: bool = False) -> Path:
    """A film whose container, stream and encoder tell of the system that made it."""
    options = {"x264-params": "mbtree=0"} if codec == "libx264" else {}
    with av.open(str(path), "w", metadata_encoding="utf-8") as container:
        container.metadata.update(title=SECRET, comment=SECRET)
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.metadata["handler_name"] = SECRET
        for k in range(frames):
            picture = np.full((48, 64, 3), 40 if still else 40 + 5 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


def grey(path: Path) -> np.ndarray:
    return read_clip(path)[:, 24, 32, 0].astype(int)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_a_film_keeps_its_pictures_and_loses_every_word(tmp_path: Path, name: str, codec: str) -> None:
    source, target = film(tmp_path / name, codec), tmp_path / "clean.mp4"
    assert SECRET.encode() in source.read_bytes()
    features = media.clean_film(source, target)
    content = target.read_bytes()
    for word in (SECRET, "x264", "Lavf", "Lavc", "offbook"):
        assert word.encode() not in content, word
    with av.open(str(target)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert len(container.streams) == 1
    assert np.abs(grey(target) - grey(source)).max() <= 3
    assert features["seconds"] == pytest.approx(2.0)
    assert features["motion"] > 0


def test_motion_tells_a_still_film_from_a_moving_one(tmp_path: Path) -> None:
    still = media.clean_film(film(tmp_path / "a.mp4", still=True), tmp_path / "b.mp4")
    assert still["motion"] < 1e-6


def test_odd_sizes_are_played_too(tmp_path: Path) -> None:
    write_clip(tmp_path / "odd.mp4", np.full((5, 33, 21, 3), 99, np.uint8), 10)
    media.clean_film(tmp_path / "odd.mp4", tmp_path / "clean.mp4")
    assert read_clip(tmp_path / "clean.mp4").shape == (5, 34, 22, 3)


def test_films_that_are_none_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {film(tmp_path / 'x.mp4')}\n")
    (tmp_path / "torn.mp4").write_bytes((tmp_path / "x.mp4").read_bytes()[:900])
    (tmp_path / "empty.mp4").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    for name in ("playlist", "list", "torn", "empty", "picture"):
        with pytest.raises(DataError, match=f"^{name}.mp4: expected a"):
            media.clean_film(tmp_path / f"{name}.mp4", tmp_path / "clean.mp4")
    monkeypatch.setattr(media, "SECONDS", 1.0)
    with pytest.raises(DataError, match="at most 1 s, got 2 s"):
        media.clean_film(tmp_path / "x.mp4", tmp_path / "clean.mp4")
    monkeypatch.setattr(media, "PIXELS", 1000)
    with pytest.raises(DataError, match="64 x 48"):
        media.clean_film(tmp_path / "x.mp4", tmp_path / "clean.mp4")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_keeps_its_pixels_and_loses_every_word(tmp_path: Path, suffix: str) -> None:
    source, target = tmp_path / f"a.{suffix}", tmp_path / "clean.png"
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:, :20] = 200
    image, exif, notes = Image.fromarray(pixels), Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0131], exif[0x0112] = SECRET, 6  # the software, and: turn by a quarter
    notes.add_text("parameters", SECRET)
    image.save(source, exif=exif, **({"pnginfo": notes} if suffix == "png" else {"quality": 95}))
    assert SECRET.encode() in source.read_bytes()
    media.clean_image(source, target)
    assert SECRET.encode() not in target.read_bytes()
    with Image.open(target) as clean:
        assert (clean.size, clean.info, dict(clean.getexif())) == ((30, 40), {}, {})
        assert abs(int(np.asarray(clean)[5, 15, 0]) - 200) < 6
        assert np.asarray(clean)[35, 15, 0] < 6


def test_a_see_through_picture_stays_so(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (10, 20, 30, 40)).save(tmp_path / "a.png")
    media.clean_image(tmp_path / "a.png", tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as clean:
        assert clean.getpixel((1, 1)) == (10, 20, 30, 40)


def test_sixteen_bits_of_grey_keep_their_order(tmp_path: Path) -> None:
    Image.fromarray(np.array([[100, 300, 20_000, 65_535]], np.uint16)).save(tmp_path / "a.png")
    media.clean_image(tmp_path / "a.png", tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as clean:
        assert (clean.mode, np.asarray(clean)[0, :, 1].tolist()) == ("RGB", [0, 1, 78, 255])


def test_pictures_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", "BMP")
    (tmp_path / "c.png").write_text("<svg onload='alert(1)'/>")
    for name in "abc":
        with pytest.raises(DataError, match=f"{name}.png: expected a PNG, JPEG or WebP"):
            media.clean_image(tmp_path / f"{name}.png", tmp_path / "clean.png")
    Image.new("RGB", (90, 90)).save(tmp_path / "d.png")
    monkeypatch.setattr(media, "PIXELS", 1000)
    with pytest.raises(DataError, match="at most 1000 pixels, got 90 x 90"):
        media.clean_image(tmp_path / "d.png", tmp_path / "clean.png")
