"""How fast windows of video are read at random, beside seeking to each frame by itself.

Four episodes of 200 pictures of 192 x 256 pixels, a moving pattern with noise, kept in two ways: as a store encodes raw
frames (a key frame every eighth) and as x264 encodes by itself (every 250th), copied into the store. Windows of 16
frames, six at a time, anywhere. The other side keeps the files open, seeks to the key frame before each frame of a
window, decodes up to it and converts it with the same converter. Nothing decoded is kept on either side: the store is
opened anew for each batch, which counts.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from offbook.data.clips import pictures, write_clip
from offbook.data.schema import FieldSpec, Schema
from offbook.data.store import EpisodeStore
from offbook.data.video import Video, stamps
from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim
from offbook.runs.progress import track
from offbook.runs.seeding import generator

EPISODES, STEPS, SIZE = 4, 199, (192, 256)
LENGTH, BATCH = 16, 6
LIMIT = 5
KINDS = {"encoded": "key frame every 8th", "copied": "key frame every 250th"}


def scene(seed: int, episode: int) -> np.ndarray:
    """Something that moves, and noise as of a camera."""
    t, y, x = np.meshgrid(np.arange(STEPS + 1), *map(np.arange, SIZE), indexing="ij", sparse=True)
    waves = [np.sin(x / 19 + t / 5 + episode), np.cos(y / 17 - t / 8), np.sin((x + y) / 22 + t / 10)]
    noise = generator(seed, "video", episode).integers(-2, 3, (STEPS + 1, *SIZE, 1))
    shown = [(127 + 100 * np.broadcast_to(wave, noise.shape[:3]) + noise[..., 0]).astype(np.uint8) for wave in waves]
    return np.stack(shown, axis=-1)


def stores(folder: Path, seed: int) -> dict[str, EpisodeStore]:
    schema = Schema((FieldSpec("front", "uint8", (*SIZE, 3), "observation", video=True),), rate_hz=30.0)
    writers = [EpisodeStore.create(folder / name, schema) for name in KINDS.values()]
    for episode in track(range(EPISODES), "episodes"):
        frames = scene(seed, episode)
        write_clip(folder / f"{episode}.mp4", frames, 30)
        given = Video(path=folder / f"{episode}.mp4", frames=np.arange(STEPS + 1))
        for writer, values in zip(writers, (frames, given), strict=True):
            writer.append({"front": values}, terminated=False, truncated=True)
    for writer in writers:
        writer.close()
    return {name: EpisodeStore.open(folder / name) for name in KINDS.values()}


def windows(seed: int) -> Callable[[], np.ndarray]:
    """Rows of the next batch of windows."""
    random = generator(seed, "rows")

    def draw() -> np.ndarray:
        first = random.integers(EPISODES, size=BATCH) * STEPS + random.integers(STEPS - LENGTH + 1, size=BATCH)
        return np.asarray(first[:, None] + np.arange(LENGTH))

    return draw


def ours(store: EpisodeStore, seed: int) -> Callable[[], object]:
    draw = windows(seed)
    return lambda: EpisodeStore.open(store.path).field("front")[draw()]


def frame_by_frame(store: EpisodeStore, seed: int) -> Callable[[], object]:
    draw, files = windows(seed), [store.video("front", episode).path for episode in range(EPISODES)]
    opened, shown = [av.open(str(file)) for file in files], [stamps(file)[0] for file in files]
    for container in opened:
        container.streams.video[0].codec_context.thread_count = 1

    def one(row: int) -> av.VideoFrame:
        container, target = opened[row // STEPS], int(shown[row // STEPS][row % STEPS])
        container.seek(target, stream=container.streams.video[0])
        return next(frame for frame in container.decode(video=0) if frame.pts == target)

    return lambda: np.stack(list(pictures((one(row) for row in draw().reshape(-1).tolist()), *SIZE)))


def run(options: Options) -> list[Claim]:
    """Measures both ways on both kinds of files."""
    with tempfile.TemporaryDirectory() as folder:
        made = stores(Path(folder), options.seed)
        sides = {f"ours, {name}": ours(store, options.seed) for name, store in made.items()}
        sides |= {f"frame by frame, {name}": frame_by_frame(store, options.seed) for name, store in made.items()}
        seconds = timed(sides, options.repeats)
    rates = {
        side: median_metric(side, [BATCH * LENGTH / s for s in spent], unit="frames/s", higher_is_better=True)
        for side, spent in seconds.items()
    }
    claims = []
    for kind, name in KINDS.items():
        usual, same = (f"frame by frame, {file}" for file in (KINDS["copied"], name))
        ratios = {
            f"ratio to {other}": median_metric(
                f"ratio to {other}",
                [b / a for a, b in zip(seconds[f"ours, {name}"], seconds[other], strict=True)],
                higher_is_better=True,
            )
            for other in dict.fromkeys((usual, same))
        }
        claims.append(
            Claim(
                system="video",
                claim=f"windows of {LENGTH} frames of {kind} files are read at least {LIMIT} times as fast as the same "
                "frames one by one from files as encoders write them",
                metrics=(*ratios.values(), rates[f"ours, {name}"]),
                baseline_metrics=tuple(rates[other] for other in dict.fromkeys((usual, same))),
                seeds=(options.seed,),
                verdict="met" if ratios[f"ratio to {usual}"].value >= LIMIT else "missed",
            )
        )
    return claims
