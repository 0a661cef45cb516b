"""Episodes as other people's files hold them, written in each format's own layout."""

import json
import pickle

import h5py
import numpy as np
from PIL import Image


def walks(lengths=(5, 3, 7), *, size=3, actions=2, picture=False, seed=0):
    """Episodes of T steps: T + 1 observations, T actions and rewards; every number differs from every other."""
    random = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        made.append(
            {
                "observation": random.normal(size=(length + 1, size)).astype(np.float32),
                "action": random.uniform(-1, 1, (length, actions)).astype(np.float32),
                "reward": random.normal(size=length).astype(np.float32),
                "terminated": number % 2 == 0,
            }
        )
        if picture:
            made[-1]["front"] = random.integers(0, 256, (length + 1, 20, 16, 3), dtype=np.uint8)
    return made


def padded(values):
    """One row more, a filler, for formats that hold a row for the final observation too."""
    return np.concatenate([values, np.full_like(values[-1:], 77)])


def assert_same(store, episodes, *names, rename=None):
    assert len(store) == len(episodes)
    for number, episode in enumerate(episodes):
        fields = store.episode(number).fields
        for name in names or ("observation", "action", "reward"):
            values = fields[(rename or {}).get(name, name)]
            assert values.dtype == episode[name].dtype, name
            np.testing.assert_array_equal(values, episode[name], err_msg=f"episode {number}, {name}")


def d4rl(path, episodes, *, with_timeouts=True, after=True, **changes):
    """With the next observations, T rows an episode; without them the final observation has a row of its own."""
    cut, rows = (lambda values: values[:-1]) if after else (lambda values: values), (lambda v: v) if after else padded
    ends, flags = [], []
    for episode in episodes:
        length = len(episode["action"]) + (not after)
        ends.append(np.arange(length) == length - 1)
        flags.append(ends[-1] & episode["terminated"])
    terminals = np.concatenate(flags)
    arrays = {
        "observations": np.concatenate([cut(e["observation"]) for e in episodes]),
        "actions": np.concatenate([rows(e["action"]) for e in episodes]),
        "rewards": np.concatenate([rows(e["reward"]) for e in episodes]),
        "terminals": terminals,
    }
    if with_timeouts:
        arrays["timeouts"] = np.concatenate(ends) & ~terminals
    if after:
        arrays["next_observations"] = np.concatenate([e["observation"][1:] for e in episodes])
    with h5py.File(path, "w") as file:
        for name, array in {**arrays, **changes}.items():
            if array is not None:
                file.create_dataset(name, data=array, compression="gzip" if np.ndim(array) else None)


def robomimic(path, episodes, *, after=True, env_args=None, mask=None):
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if env_args is not None:
            data.attrs["env_args"] = json.dumps(env_args)
        for number, episode in enumerate(episodes):
            length = len(episode["action"]) + (not after)
            rows = (lambda v: v) if after else padded
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"] = rows(episode["action"])
            demo["rewards"] = rows(episode["reward"])
            demo["dones"] = (np.arange(length) == length - 1).astype(np.int64) * episode["terminated"]
            demo["states"] = np.arange(length * 4.0).reshape(length, 4)
            for name in ("observation", "front", "arm/joints"):
                if name.split("/")[0] in episode:
                    values = episode[name.split("/")[0]]
                    demo[f"obs/{name}"] = values[:-1] if after else values
                    if after:
                        demo[f"next_obs/{name}"] = values[1:]
        for name, demos in (mask or {}).items():
            file[f"mask/{name}"] = np.array(demos, dtype="S8")


def exorl(folder, episodes):
    folder.mkdir(parents=True, exist_ok=True)
    for number, episode in enumerate(episodes):
        length = len(episode["action"])
        first = {
            name: np.concatenate([np.full_like(episode[name][:1], 99), episode[name]]) for name in ("action", "reward")
        }
        discount = np.ones((length + 1, 1), np.float32)
        discount[-1] = not episode["terminated"]
        np.savez_compressed(
            folder / f"episode_{number:06d}_{length}.npz",
            observation=episode["observation"],
            action=first["action"],
            reward=first["reward"][:, None],
            discount=discount,
            physics=np.arange((length + 1) * 2.0).reshape(length + 1, 2) + 100 * number,
        )


def as_paths(episodes, *, after=True):
    paths = []
    for episode in episodes:
        length = len(episode["action"])
        ends = np.arange(length) == length - 1
        path = {
            "observations": episode["observation"][:-1],
            "actions": episode["action"],
            "rewards": episode["reward"],
            "terminals": ends & episode["terminated"],
            "next_observations": episode["observation"][1:],
        }
        if not after:
            path = {
                "observations": episode["observation"],
                "actions": padded(episode["action"]),
                "rewards": padded(episode["reward"]),
                "terminated": episode["terminated"],
            }
        paths.append(path)
    return paths


def paths(path, episodes, *, after=True, protocol=4):
    path.write_bytes(pickle.dumps(as_paths(episodes, after=after), protocol=protocol))


def toto(folder, episodes):
    """The weight of an episode is its last reward; all others are 0, and the row of the final observation has it."""
    made = []
    for number, episode in enumerate(episodes):
        pictures = folder / "data" / f"trajectory_{number}"
        pictures.mkdir(parents=True)
        names = [f"{i:05d}c.png" for i in range(len(episode["observation"]))]
        for name, picture in zip(names, episode.get("front", []), strict=False):
            Image.fromarray(picture).save(pictures / name)
        reward = np.zeros(len(names))
        reward[-1] = episode["reward"][-1]
        made.append(
            {
                "traj_id": f"trajectory_{number}",
                "observations": episode["observation"],
                "actions": padded(episode["action"]),
                "rewards": reward,
                "terminated": np.arange(len(names)) == len(names) - 1,
                "cam0c": names,
                "cam0d": [name.replace("c.", "d.") for name in names],
            }
        )
    (folder / "parsed.pkl").write_bytes(pickle.dumps(made))


def zarr_buffer(path, episodes, *, compressor="blosc", version=2, **changes):
    import numcodecs
    import zarr

    store = zarr.storage.ZipStore(path, mode="w") if path.suffix == ".zip" else zarr.storage.LocalStore(path)
    root = zarr.group(store, zarr_format=version)
    codec = {"blosc": numcodecs.Blosc("zstd"), "zlib": numcodecs.Zlib(1)}.get(compressor)
    arrays = {
        "data/obs": np.concatenate([episode["observation"] for episode in episodes]),
        "data/action": np.concatenate([padded(episode["action"]) for episode in episodes]),
        "meta/episode_ends": np.cumsum([len(episode["observation"]) for episode in episodes]),
    }
    if "front" in episodes[0]:
        arrays["data/img"] = np.concatenate([episode["front"] for episode in episodes]).astype(np.float32)
    for name, array in {**arrays, **changes}.items():
        if array is not None:
            settings = {"chunks": (4, *array.shape[1:]), **({"compressors": codec} if version == 2 else {})}
            part = root.create_array(name, shape=array.shape, dtype=array.dtype, **settings)
            part[:] = array
    store.close()
