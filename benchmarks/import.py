"""How fast recordings in other formats become a store, and what that saves whenever they are opened again.

200 episodes of 500 steps: an observation of 17 numbers, an action of 6 and a reward, float32, written with each
format's own library as its users write it. LeRobot's 20 episodes also have a camera of 64 x 64 as video, and they and
Minari's come from our own exports. By turns, in a process, with warm file caches:

- the import, until the store is on the disk;
- the bound: reading the files' bytes, and writing as many bytes as the store has to one file, with fsync;
- one plain load, which is the usual way without a store: the whole file into arrays, by the format's own library; of
  LeRobot's video, as many windows' frames as a batch has, each after one seek;
- the first batch: opening the store, making a sampler of all fields, and 64 windows of 4 steps at random.

A run of training begins with one of the last two. Flat arrays are read at about the speed of memory, so a store must
not be slower, and can hardly be faster; formats with a part for each episode pay for every part, a store must not.
"""

import itertools
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import av
import h5py
import numpy as np
import pyarrow.parquet as pq
import zarr

from offbook.data.formats import export_dataset, import_dataset
from offbook.data.schema import FieldSpec, Schema
from offbook.data.store import EpisodeStore
from offbook.data.windows import WindowSampler
from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim, Dataset, Metric
from offbook.runs.seeding import generator

EPISODES, STEPS, FILMED, SIZE = 200, 500, 20, 64
BATCH, LENGTH = 64, 4
# How many times as fast as one plain load the first batch must come.
FLAT, PARTS = 1, 10

Episode = dict[str, np.ndarray]
Arrays = Sequence[np.ndarray] | np.ndarray
Loaded = tuple[Arrays, Arrays, Arrays]


def recorded(count: int, seed: int, *, camera: bool = False) -> list[Episode]:
    """Episodes of T steps and T + 1 observations."""
    random = generator(seed, "import")
    y, x = np.mgrid[:SIZE, :SIZE]
    pattern = np.stack([x * 4 % 256, y * 3, (x + y) * 2], axis=-1).astype(np.uint8)
    episodes = []
    for _ in range(count):
        made = {
            "observation": random.random((STEPS + 1, 17), np.float32),
            "action": random.random((STEPS, 6), np.float32),
            "reward": random.random(STEPS, np.float32),
        }
        if camera:
            made["front"] = np.stack([np.roll(pattern, t, axis=1) for t in range(STEPS + 1)])
        episodes.append(made)
    return episodes


def store_of(episodes: list[Episode], path: Path) -> EpisodeStore:
    roles = {"observation": "observation", "front": "observation", "action": "action", "reward": "reward"}
    shapes = {name: (str(values.dtype), values.shape[1:]) for name, values in episodes[0].items()}
    specs = [FieldSpec(name, *shape, roles[name], video=name == "front") for name, shape in shapes.items()]
    with EpisodeStore.create(path, Schema(tuple(specs), environment="synthetic", rate_hz=30.0)) as writer:
        for fields in episodes:
            writer.append(fields, terminated=False, truncated=True, task="wander", sync=False)
    return EpisodeStore.open(path)


def export(name: str, episodes: list[Episode], path: Path) -> None:
    export_dataset(store_of(episodes, path.with_name(f"before {name}")), f"{name}:{path}")


def transitions(episode: Episode) -> Episode:
    """An episode as rows of what was seen, done, earned, and seen next."""
    seen = episode["observation"]
    rows = {"observations": seen[:-1], "next_observations": seen[1:], "actions": episode["action"]}
    return {**rows, "rewards": episode["reward"], "terminals": np.zeros(STEPS, bool)}


def joined(episodes: list[Episode]) -> Episode:
    rows = [transitions(episode) for episode in episodes]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def write_d4rl(episodes: list[Episode], path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name, values in joined(episodes).items():
            file.create_dataset(name, data=values, compression="gzip")
        file["timeouts"] = np.arange(1, STEPS * len(episodes) + 1) % STEPS == 0


def write_robomimic(episodes: list[Episode], path: Path) -> None:
    with h5py.File(path, "w") as file:
        for number, rows in enumerate(map(transitions, episodes)):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = STEPS
            demo["obs/observation"], demo["next_obs/observation"] = rows["observations"], rows["next_observations"]
            demo["actions"], demo["rewards"] = rows["actions"], rows["rewards"]
            demo["dones"] = np.arange(1, STEPS + 1) == STEPS


def write_exorl(episodes: list[Episode], path: Path) -> None:
    path.mkdir()
    for number, episode in enumerate(episodes):
        # Row 0 is the reset.
        action, reward = (np.concatenate([episode[name][:1] * 0, episode[name]]) for name in ("action", "reward"))
        values = {"action": action, "reward": reward[:, None], "discount": np.ones((STEPS + 1, 1), np.float32)}
        np.savez_compressed(path / f"episode_{number:06d}_{STEPS}.npz", observation=episode["observation"], **values)


def write_paths(episodes: list[Episode], path: Path) -> None:
    path.write_bytes(pickle.dumps([transitions(episode) for episode in episodes]))


def write_zarr(episodes: list[Episode], path: Path) -> None:
    root, rows = zarr.open_group(path, mode="w", zarr_format=2), joined(episodes)
    for name, key in (("obs", "observations"), ("action", "actions"), ("reward", "rewards")):
        root.create_array(f"data/{name}", data=rows[key], chunks=(10_000, *rows[key].shape[1:]))
    root.create_array("meta/episode_ends", data=np.arange(1, len(episodes) + 1) * STEPS)


def load_d4rl(path: Path) -> Loaded:
    with h5py.File(path) as file:
        file["next_observations"][:]
        return file["observations"][:], file["actions"][:], file["rewards"][:]


def load_robomimic(path: Path) -> Loaded:
    with h5py.File(path) as file:
        demos = [file["data"][f"demo_{number}"] for number in range(len(file["data"]))]
        for demo in demos:
            demo["next_obs/observation"][:]
        return tuple([demo[key][:] for demo in demos] for key in ("obs/observation", "actions", "rewards"))


def load_exorl(path: Path) -> Loaded:
    parts = []
    for file in sorted(path.glob("*.npz")):
        with np.load(file) as content:
            parts.append(dict(content))
    return tuple([part[name] for part in parts] for name in ("observation", "action", "reward"))


def load_paths(path: Path) -> Loaded:
    with path.open("rb") as file:
        made = pickle.load(file)
    return tuple([one[name] for one in made] for name in ("observations", "actions", "rewards"))


def load_zarr(path: Path) -> Loaded:
    data = zarr.open_group(path, mode="r")["data"]
    return data["obs"][:], data["action"][:], data["reward"][:]


def load_minari(path: Path) -> Loaded:
    from minari import MinariDataset

    episodes = list(MinariDataset(path / "data").iterate_episodes())
    return tuple([getattr(one, name) for one in episodes] for name in ("observations", "actions", "rewards"))


def load_lerobot(path: Path) -> Loaded:
    table, random = pq.read_table(path / "data"), np.random.default_rng(0)
    columns = [table[name].combine_chunks() for name in ("observation.state", "action", "next.reward")]
    arrays = [getattr(c, "values", c).to_numpy(zero_copy_only=False).reshape(len(table), -1) for c in columns]
    films = [av.open(str(file)) for file in path.glob("videos/*/*/*.mp4")]
    for share in random.random(BATCH):
        film = films[random.integers(len(films))]
        film.seek(int(share * film.streams.video[0].duration), stream=film.streams.video[0])
        for frame in itertools.islice(film.decode(video=0), LENGTH):
            frame.to_ndarray(format="rgb24")
    for film in films:
        film.close()
    return arrays[0], arrays[1], arrays[2]


WAYS: dict[str, tuple[Callable[[list[Episode], Path], None], Callable[[Path], Loaded], int]] = {
    "d4rl": (write_d4rl, load_d4rl, FLAT),
    "robomimic": (write_robomimic, load_robomimic, PARTS),
    "exorl": (write_exorl, load_exorl, PARTS),
    "paths": (write_paths, load_paths, FLAT),
    "zarr": (write_zarr, load_zarr, FLAT),
    "lerobot": (partial(export, "lerobot"), load_lerobot, FLAT),
    "minari": (partial(export, "minari"), load_minari, PARTS),
}


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def claim(name: str, episodes: list[Episode], folder: Path, options: Options) -> Claim:
    """Writes, imports and loads recordings of one format."""
    (write, load, limit), source = WAYS[name], folder / name
    write(episodes, source)
    outs = (folder / f"store-{number}" for number in itertools.count())
    store = import_dataset(f"{name}:{source}", next(outs))
    fields = (*store.schema.observations, *store.schema.actions, "reward")
    given, made = (sum(file.stat().st_size for file in files(path)) for path in (source, store.path))

    def bound() -> None:
        for file in files(source):
            file.read_bytes()
        with (folder / "bound").open("wb") as target:
            target.write(bytes(made))
            os.fsync(target.fileno())

    sides: dict[str, Callable[[], object]] = {
        "import": lambda: import_dataset(f"{name}:{source}", next(outs)),
        "bound": bound,
        "load": lambda: load(source),
        "first batch": lambda: WindowSampler(EpisodeStore.open(store.path), fields, length=LENGTH).sample(BATCH, 0),
    }
    seconds = timed(sides, options.repeats)

    def ratio(called: str, over: str, under: str, *, higher_is_better: bool = True) -> Metric:
        ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        return median_metric(called, ratios, higher_is_better=higher_is_better)

    def speed(called: str, side: str, amount: float, unit: str) -> Metric:
        return median_metric(called, [amount / spent for spent in seconds[side]], unit=unit, higher_is_better=True)

    least = "at least as fast" if limit == 1 else f"at least {limit} times as fast"
    quicker = ratio("one plain load to the first batch", "load", "first batch")
    return Claim(
        system="import",
        claim=f"imported from {name}, recordings give a first batch {least} as one plain load",
        metrics=(
            quicker,
            ratio("one import to one plain load", "import", "load", higher_is_better=False),
            ratio("share of the bound, import", "bound", "import"),
            speed("import, steps", "import", store.steps, "steps/s"),
            speed("import, bytes of the files", "import", given / 1e6, "MB/s"),
            median_metric("first batch", seconds["first batch"], unit="s"),
        ),
        baseline_metrics=(
            speed("bound", "bound", given / 1e6, "MB/s"),
            median_metric("one plain load", seconds["load"], unit="s"),
        ),
        seeds=(options.seed,),
        data=(Dataset(name=name, sha256=store.digest, episodes=len(store)),),
        verdict="met" if quicker.value >= limit else "missed",
    )


def run(options: Options) -> list[Claim]:
    """Measures format by format."""
    plain, filmed = recorded(EPISODES, options.seed), recorded(FILMED, options.seed, camera=True)
    claims = []
    # Quiet of the bars of some hundred imports, and of Minari's warnings about its own parts.
    with warnings.catch_warnings(), mock.patch.dict(os.environ, OFFBOOK_QUIET="1"):
        warnings.simplefilter("ignore")
        for name in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                claims.append(claim(name, filmed if name == "lerobot" else plain, Path(folder), options))
    return claims
